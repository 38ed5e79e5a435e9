"""Letters for pictures: X11's fonts 7x13 and 7x13B (font-misc-misc, public domain), printable ASCII, one bit a pixel.

A drawing library would be a heavy dependency for a few labels. Each constant is the zlib stream, in base 85, of 95
glyphs (U+0020 to U+007E) of 13 rows of 7 bits, without padding.
"""

from __future__ import annotations

import base64
import zlib
from functools import cache

import numpy as np
import numpy.typing as npt

#: Pixels of every glyph, from one character to the next.
WIDTH, HEIGHT = 7, 13
_FIRST, _COUNT = 0x20, 95
_ELLIPSIS, _UNKNOWN = _COUNT, _COUNT + 1
_REGULAR = (
    b"c-mc4L2DCH5Z--0n{~UekGN`(Vzza~wTg|@Ly*vHmX&T#O=|HVz0{M42ayW#BH5UQZVx2}gkCBMQX~ieLQRF<M0yaxTLcf{Njxc7aOTZ"
    b"gt8>}Oym?=~`R03yaws%mdl6GKNLj4^t@mbk^Oj33rS9-$6EikB$2GgN=;05wl^ExO6)bb@;GP|EO$ghD6hB^*3t7+Rel6Q+Ph_^VLli"
    b"PbdN8B>!>ov9fI~<uya}s4zttY#S)mK8IbO)LdrVvACY045qLNWr>l<=1+>SH9!?5FvxO|)I$MIsZ$wxPOejU<$#6=3Nes-(R{rK1r@="
    b"~l%cfDp&a^PdY{)wDjeu~T3%|%6pAev?PTbXze6)sR4bKHld!3g?B|K>9lp>uP(HMQ6Cv19e=L_Nt)H6Z_P;Swb4nTa6DI^j04w(Akg;"
    b"KhB$O=xLIXc&COeFr(S-0EvT)=}UYxkf37x&!+V&Mc<7vzBwi1ZR}znkeH`mp;C_73&u28;_p2Py<<sH5A=>NRNOZ+vp1t#Bvw6N*p@c"
    b"J^!a4gdVXrQ?2u4B9725>?kI!V?7%rMy`NXfa2W`_x2=fCo!Bk$$BEFb|Z3+IcREyid<t|5(PvU9WCT}jR<BL(g5}>fQXt<{);kh;BY}"
    b"5p5J?MjV!*jtDn5sAh)%<q_xWU*Q;)Ale*9N`-~itFcbfs$`7+=SIzMfTKv?NRBJ^jgH&rpX^f!Q;X1-;og!&%kRW-&I6b-8Um%MgeOo"
    b"21As(e#Ljd&d12Vb#{!VQ(eNamQi7Hud7?QPOS3be<I+bx_(_NV|CtR~qRf1$;>pG>PlPh$n41NJ<LV2v&P1JhKi&O*Nfp;Hvcd$lv;6"
    b";1{-Y=TS>Hm4RzX26IvL^"
)
_BOLD = (
    b"c-mEyPiWI{6vuxtl3jip@gS)d>ruqRPa|0mq20lYAh?5PNttFI0$o9&g;7=logg@mt%2^~aTg&-4}&#X5fK{dO+p!VD0(TlQPBCP;CsJ"
    b"cx<9{5US8gx&+q$Q2sw5%W`!=H8kkDt9lGaVe}9+BU7ZJ$nr{oc8}}%fGuL($&Dy*_1iR$h?=QBUCzwbzHcc$J@WLz$OniiODn6apCI{"
    b"Pd+?3o*=O}^5t91JE?*v)d!dR+dNpx)AjeWcKGQe*opjK!VnVP<m?J6p`r32PgWu>==RnM9OqX<`nh>@1F=_MT#E1se@eY*^1##J;1d`"
    b"R@oiCcEm#Cw^Mrw>El<P6kgL|UzLYIvlxg%v1GSyzT5F!Rus8v&dyW!Od4ZMqc53Z{L1{AuGsEtQm>9l;$i0w8{SMiI)9u>q1<oH}Pmp"
    b"5eq>f|@Od?hGbQTt#g#OO&?4O~dIU2Sj!t0oALrLqP}{nz0BG(sQGqHl64hPJ;(%c`#33|BQJC4k_~5#X;Nd32N-#NA*CEEsLv%)P}Ru"
    b"Hfcir#dhWd^;GM;CW_-KIB-8uFyN(c-d+={kwWLM(MMo9b>ZO}HSfGS2X4E!zl%`VJaj=;K1Q;SK4$H4YAXoB8iL52pDkbn8{fJ@PMl1"
    b"KPvDqG8ZO3u4u=RrMv2zAFK>j_vO@oYg6kssvORG*bvAZY>@M6-J-w&uCI)BpL~D&nM_R9N)VKwks?dR1jvL@j3qkUthEbget)Y1jS6H"
    b"|!iPi`YrN>-9BK-s;AqiQIgs7alK{+*H1(4^=3*km2eaKBvzGWsq671QJ55i3OX2lb3+?RDRF;b;B>RjuRD^tp>C85)FjB?EdFIzy#9{"
    b"owQApZfQVi->"
)

Mask = npt.NDArray[np.bool_]


@cache
def _font(bold: bool) -> Mask:
    """All glyphs, (97, 13, 7): the 95 of the font, an ellipsis, and a box for what the font does not have."""
    packed = np.frombuffer(zlib.decompress(base64.b85decode(_BOLD if bold else _REGULAR)), dtype=np.uint8)
    bits = np.unpackbits(packed)[: _COUNT * HEIGHT * WIDTH].astype(np.bool_)
    font = np.zeros((_COUNT + 2, HEIGHT, WIDTH), dtype=np.bool_)
    font[:_COUNT] = bits.reshape(_COUNT, HEIGHT, WIDTH)
    font[_ELLIPSIS, 9:11, [1, 3, 5]] = True
    font[_UNKNOWN, 2:11, 1:6] = True
    font[_UNKNOWN, 3:10, 2:5] = False
    return font


def mask(text: str, *, bold: bool = False) -> Mask:
    """Where ink falls for a line of text: (`HEIGHT`, `WIDTH` * characters)."""
    return np.concatenate([_font(bold)[_glyph(c)] for c in text] or [np.zeros((HEIGHT, 0), dtype=np.bool_)], axis=1)


def _glyph(character: str) -> int:
    at = ord(character) - _FIRST
    return at if 0 <= at < _COUNT else _ELLIPSIS if character == "…" else _UNKNOWN


def fitted(text: str, width: int) -> str:
    """As much of a text as ``width`` pixels hold, an ellipsis at its end where that is not all."""
    room = max(width // WIDTH, 0)
    return text if len(text) <= room else text[: room - 1] + "…" if room > 1 else ""
