"""Models for `check_models`: small ones of transformers, timm's at 224 pixels, and code as people write it by hand.

Each entry builds a module whose forward gives what is compared, and its inputs. Dropout is off; its random numbers have
tests of their own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

Built = tuple[nn.Module, list[object]]
VOCABULARY, TOKENS = 97, 24

#: What most configurations of transformers call the same; each takes what it knows of it.
_SMALL: dict[str, object] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_NO_DROPOUT = (
    "hidden_dropout_prob", "attention_probs_dropout_prob", "attention_dropout", "hidden_dropout", "dropout",
    "resid_pdrop", "embd_pdrop", "attn_pdrop", "activation_dropout", "classifier_dropout", "resid_dropout",
    "drop_path_rate", "classifier_dropout_prob", "dropout_rate", "embedding_dropout", "attention_probs_dropout",
    "residual_dropout", "mlp_dropout", "hidden_act_dropout", "summary_last_dropout", "drop_connect_rate",
)  # fmt: skip


class Language(nn.Module):
    """Token loss of a language model; the loss is inside."""

    def __init__(self, model: nn.Module, extra: dict[str, object] | None = None) -> None:
        super().__init__()
        self.model, self.extra = model, extra or {}

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        return self.model(input_ids=ids, labels=labels, **self.extra).loss  # type: ignore[no-any-return]


class Images(nn.Module):
    def __init__(self, model: nn.Module, of: str = "logits", name: str = "pixel_values") -> None:
        super().__init__()
        self.model, self.of, self.name = model, of, name

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self.model(**{self.name: x}), self.of)  # type: ignore[no-any-return]


def _model(kind: str, head: str, **given: object) -> nn.Module:
    """A small model of transformers, whose configuration takes what it knows of `_SMALL`."""
    import transformers

    config_class = getattr(transformers, f"{kind}Config")
    known = set(inspect.signature(config_class.__init__).parameters) | set(config_class().to_dict())
    values = {k: v for k, v in {**_SMALL, **dict.fromkeys(_NO_DROPOUT, 0.0)}.items() if k in known} | given
    values = {k: v for k, v in values.items() if v is not None}
    config = config_class(**values)
    config._experts_implementation = "eager"  # the grouped product has no float64
    model = getattr(transformers, f"{kind.removesuffix('Text')}{head}")(config)
    return model  # type: ignore[no-any-return]


def _language(kind: str, head: str = "ForCausalLM", extra: dict[str, object] | None = None, **given: object) -> Built:
    model = Language(_model(kind, head, **given), extra if extra is not None else _no_cache(head))
    ids = torch.randint(3, VOCABULARY, (2, TOKENS))
    return model, [ids, ids.clone()]


def _no_cache(head: str) -> dict[str, object]:
    return {} if head in ("ForMaskedLM", "ForPreTraining") else {"use_cache": False}


def _image(
    kind: str, head: str = "ForImageClassification", size: int = 32, of: str = "logits", **given: object
) -> Built:
    given = {"num_labels": 7, **given}
    return Images(_model(kind, head, **given), of), [torch.randn(4, 3, size, size)]


class Hand(nn.Module):
    """Layers, and what a function does with them and the inputs."""

    def __init__(self, call: Callable[..., object], **layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(layers)
        self.call = call

    def forward(self, *inputs: Tensor) -> object:
        return self.call(self.layers, *inputs)


def _hand(call: Callable[..., object], *inputs: object, **layers: nn.Module) -> Built:
    return Hand(call, **layers), list(inputs)


def _transformer() -> Built:
    layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2), [torch.randn(4, 16, 64, requires_grad=True)]


def _attention_weights() -> Built:
    attention = nn.MultiheadAttention(32, 4, batch_first=True)
    return _hand(lambda m, x: m["a"](x, x, x, average_attn_weights=False), torch.randn(2, 10, 32), a=attention)


def _lstm() -> Built:
    return _hand(lambda m, x: m["r"](x)[0], torch.randn(4, 12, 24), r=nn.LSTM(24, 32, 2, batch_first=True))


def _sorting() -> Built:
    def call(m: nn.ModuleDict, x: Tensor) -> tuple[Tensor, ...]:
        y = m["l"](x)
        values, at = y.topk(5, dim=-1)
        return values.exp(), y.sort(dim=0).values, y.gather(-1, at).cumsum(-1), y.scatter(-1, at, values * 2)

    return _hand(call, torch.randn(16, 32), l=nn.Linear(32, 48))


def _unet() -> Built:
    def call(m: nn.ModuleDict, x: Tensor) -> Tensor:
        a = functional.silu(m["n1"](m["c1"](x)))
        b = functional.silu(m["n2"](m["c2"](functional.avg_pool2d(a, 2))))
        c = functional.interpolate(m["c3"](functional.max_pool2d(b, 2)), scale_factor=2, mode="nearest")
        d = functional.interpolate(m["c4"](torch.cat((b, c), 1)), scale_factor=2, mode="bilinear")
        return m["c5"](torch.cat((a, d), 1))  # type: ignore[no-any-return]

    return _hand(
        call, torch.randn(2, 3, 32, 32), c1=nn.Conv2d(3, 16, 3, padding=1), n1=nn.GroupNorm(4, 16),
        c2=nn.Conv2d(16, 32, 3, padding=1), n2=nn.GroupNorm(4, 32), c3=nn.Conv2d(32, 32, 3, padding=1),
        c4=nn.ConvTranspose2d(64, 16, 3, padding=1), c5=nn.Conv2d(32, 4, 1),
    )  # fmt: skip


def _experts() -> Built:
    """A mixture of experts by index: each token goes to its two best."""

    def call(m: nn.ModuleDict, x: Tensor) -> Tensor:
        scores = m["gate"](x).softmax(-1)
        weights, chosen = scores.topk(2, dim=-1)
        out = torch.zeros_like(x)
        for k in range(4):
            weight = torch.where(chosen == k, weights, 0.0).sum(-1, keepdim=True)
            out = out + weight * m[f"e{k}"](x)
        return out + x

    experts = {f"e{k}": nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)) for k in range(4)}
    return _hand(call, torch.randn(40, 32, requires_grad=True), gate=nn.Linear(32, 4), **experts)


def _vmap() -> Built:
    def call(m: nn.ModuleDict, x: Tensor) -> Tensor:
        return torch.vmap(lambda row: torch.sin(row @ m["l"].weight).cumsum(0))(x)

    return _hand(call, torch.randn(6, 10, 16), l=nn.Linear(16, 16))


def _fourier() -> Built:
    def call(m: nn.ModuleDict, x: Tensor) -> Tensor:
        return torch.fft.irfft(torch.fft.rfft(m["l"](x)) * torch.polar(x[..., :17].abs(), x[..., :17]), n=32)

    return _hand(call, torch.randn(8, 32, requires_grad=True), l=nn.Linear(32, 32))


def _in_place() -> Built:
    """Slices, masks and indices written in place."""

    def call(m: nn.ModuleDict, x: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        y = m["l"](x)
        y[:, ::2] *= 2
        y[y > 1] = 0.5
        z = torch.zeros(20, 24, dtype=y.dtype, device=y.device).index_add(0, at, y)
        z[3:7] += y[:4].tanh()
        return z, y.clone().relu_()

    return _hand(call, torch.randn(16, 24, requires_grad=True), torch.randint(0, 20, (16,)), l=nn.Linear(24, 24))


def _embedding_bag() -> Built:
    bag, table = nn.EmbeddingBag(50, 16, mode="sum"), nn.Embedding(50, 16)
    return _hand(lambda m, i: m["b"](i) @ m["e"](i).mean(1).mT, torch.randint(0, 50, (8, 6)), b=bag, e=table)


def _volume() -> Built:
    def call(m: nn.ModuleDict, x: Tensor) -> Tensor:
        return m["n"](functional.max_pool3d(m["c"](x).relu(), 2)).mean((2, 3, 4))  # type: ignore[no-any-return]

    return _hand(call, torch.randn(2, 3, 8, 12, 12), c=nn.Conv3d(3, 8, 3, padding=1), n=nn.BatchNorm3d(8))


def _ctc() -> Built:
    def call(m: nn.ModuleDict, x: Tensor, targets: Tensor) -> Tensor:
        scores = m["l"](x).log_softmax(-1)
        lengths = torch.full((4,), 20), torch.full((4,), 5)
        return functional.ctc_loss(scores, targets, *lengths)

    return _hand(call, torch.randn(20, 4, 16), torch.randint(1, 11, (4, 5)), l=nn.Linear(16, 11))


def _unrolled() -> Built:
    """A recurrent cell by hand, fifty steps."""

    def call(m: nn.ModuleDict, x: Tensor) -> Tensor:
        h = torch.zeros_like(x[0])
        for step in x.unbind(0):
            gate, new = m["w"](torch.cat((step, h), -1)).chunk(2, -1)
            h = h + torch.sigmoid(gate) * (torch.tanh(new) - h)
        return h

    return _hand(call, torch.randn(50, 8, 16, requires_grad=True), w=nn.Linear(32, 32))


def _diffusion() -> Built:
    """A block of a diffusion transformer: shift, scale and gate from a time step."""

    def call(m: nn.ModuleDict, x: Tensor, t: Tensor) -> Tensor:
        angles = t[:, None] * torch.exp(-torch.arange(16, device=t.device, dtype=t.dtype) / 4)
        c = m["t"](torch.cat((angles.sin(), angles.cos()), -1))
        for k in range(2):
            shift, scale, gate = m[f"m{k}"](functional.silu(c))[:, None].chunk(3, -1)
            y = functional.layer_norm(x, (32,)) * (1 + scale) + shift
            q, k_, v = m[f"q{k}"](y).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
            y = functional.scaled_dot_product_attention(q, k_, v).transpose(1, 2).flatten(2)
            x = x + gate * m[f"o{k}"](y)
        return x

    layers = {"t": nn.Linear(32, 32)}
    for k in range(2):
        layers |= {f"m{k}": nn.Linear(32, 96), f"q{k}": nn.Linear(32, 96), f"o{k}": nn.Linear(32, 32)}
    return _hand(call, torch.randn(3, 20, 32, requires_grad=True), torch.rand(3), **layers)


def _contrastive() -> Built:
    def call(m: nn.ModuleDict, x: Tensor, y: Tensor) -> Tensor:
        a, b = functional.normalize(m["a"](x), dim=-1), functional.normalize(m["b"](y), dim=-1)
        logits = a @ b.mT * m["s"].weight.exp().squeeze()
        labels = torch.arange(x.shape[0], device=x.device)
        return (functional.cross_entropy(logits, labels) + functional.cross_entropy(logits.mT, labels)) / 2

    return _hand(
        call, torch.randn(12, 16), torch.randn(12, 20), a=nn.Linear(16, 24), b=nn.Linear(20, 24),
        s=nn.Linear(1, 1, bias=False),
    )  # fmt: skip


def _graph_network() -> Built:
    """Messages along edges, summed and maximised at their ends."""

    def call(m: nn.ModuleDict, x: Tensor, edges: Tensor) -> Tensor:
        for k in range(2):
            message = m[f"m{k}"](torch.cat((x[edges[0]], x[edges[1]]), -1)).relu()
            summed = torch.zeros_like(x).index_add(0, edges[1], message)
            most = torch.zeros_like(x).scatter_reduce(0, edges[1][:, None].expand_as(message), message, "amax")
            x = x + m[f"u{k}"](torch.cat((summed, most), -1))
        return x

    layers = {f"m{k}": nn.Linear(32, 16) for k in range(2)} | {f"u{k}": nn.Linear(32, 16) for k in range(2)}
    return _hand(call, torch.randn(30, 16, requires_grad=True), torch.randint(0, 30, (2, 90)), **layers)


def _wavenet() -> Built:
    """One-dimensional dilated convolutions with gates, as WaveNet has them."""

    def call(m: nn.ModuleDict, x: Tensor) -> Tensor:
        skip = 0
        for k in range(4):
            a, b = m[f"c{k}"](functional.pad(x, (2**k, 0))).chunk(2, 1)
            y = torch.tanh(a) * torch.sigmoid(b)
            skip = skip + m[f"s{k}"](y)
            x = x + y
        return torch.as_tensor(skip).relu()

    layers = {f"c{k}": nn.Conv1d(12, 24, 2, dilation=2**k) for k in range(4)} | {
        f"s{k}": nn.Conv1d(12, 8, 1) for k in range(4)
    }
    return _hand(call, torch.randn(2, 12, 64), **layers)


def _weight_norm() -> Built:
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(24, 24))
    spectral = nn.utils.parametrizations.spectral_norm(nn.Conv1d(4, 4, 3))
    return _hand(lambda m, x: m["s"](m["w"](x)), torch.randn(2, 4, 24), w=normed, s=spectral)


_CAUSAL = (
    "Mistral", "GPTNeoX", "GPTBigCode", "GPTJ", "Qwen2", "Granite", "Mixtral", "Nemotron", "Qwen2Moe", "Phi",
    "Gemma", "Cohere", "StableLm", "Persimmon", "Olmo", "Olmo2", "Bloom", "Starcoder2", "SmolLM3", "OPT", "Phi3",
    "Falcon", "Olmoe", "GraniteMoe", "CodeGen", "Rwkv", "Cohere2", "Ernie4_5",
)  # fmt: skip
_OF_HEADS = ("Qwen3", "Gemma2", "Gemma3Text", "Glm", "Glm4", "Helium")
_MASKED = (
    "Albert", "Electra", "DebertaV2", "MPNet", "ModernBert", "Roberta", "DistilBert", "FNet", "Ernie", "RoFormer",
    "XLMRoberta", "MobileBert", "ConvBert", "SqueezeBert", "Esm",
)  # fmt: skip
_OWN: dict[str, dict[str, object]] = {
    "GPTBigCode": {"n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 64},
    "GPTJ": {"n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 64, "rotary_dim": 8},
    "CodeGen": {"n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 64, "rotary_dim": 8},
    "Bloom": {"n_head": 4, "n_layer": 2},
    "OPT": {"ffn_dim": 112, "word_embed_proj_dim": 64},
    "Mixtral": {"num_local_experts": 4},
    "Olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "GraniteMoe": {"num_local_experts": 4},
    "Qwen2Moe": {
        "num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 48, "num_experts_per_tok": 2
    },
    "Rwkv": {"context_length": 32, "attention_hidden_size": 64},
    "Albert": {"embedding_size": 32},
    "Electra": {"embedding_size": 32},
    "DistilBert": {"dim": 64, "hidden_dim": 112, "n_layers": 2, "n_heads": 4},
    "DebertaV2": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8},
    "ModernBert": {"global_attn_every_n_layers": 2, "local_attention": 8},
    "FNet": {"tpu_short_seq_length": TOKENS},
    "MobileBert": {"embedding_size": 32, "intra_bottleneck_size": 32, "true_hidden_size": 32},
    "ConvBert": {"embedding_size": 64},
    "SqueezeBert": {"embedding_size": 64},
    "Esm": {"position_embedding_type": "rotary", "mask_token_id": 3},
    "Gemma3Text": {"sliding_window": 8},
    "Gemma2": {"sliding_window": 8},
    "Mistral": {"sliding_window": 8},
}  # fmt: skip
_IMAGES: dict[str, Callable[[], Built]] = {
    "Dinov2": partial(_image, "Dinov2", image_size=32, patch_size=8),
    "Beit": partial(_image, "Beit", image_size=32, patch_size=8),
    "Segformer": partial(
        _image, "Segformer", "ForSemanticSegmentation", 64, depths=[1, 1], hidden_sizes=[16, 32], num_encoder_blocks=2,
        sr_ratios=[4, 2], patch_sizes=[7, 3], strides=[4, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2],
        decoder_hidden_size=32,
    ),
    "MobileNetV2": partial(_image, "MobileNetV2", depth_multiplier=0.25, image_size=64, size=64),
    "RegNet": partial(
        _image, "RegNet", embedding_size=8, hidden_sizes=[16, 32], depths=[1, 2], groups_width=8, layer_type="y"
    ),
    "Swinv2": partial(
        _image, "Swinv2", image_size=32, patch_size=4, embed_dim=12, depths=[2, 2], num_heads=[2, 4], window_size=4
    ),
    "PoolFormer": partial(
        _image, "PoolFormer", size=64, depths=[1, 1], hidden_sizes=[16, 32], num_encoder_blocks=2, patch_sizes=[7, 3],
        strides=[4, 2], padding=[2, 1],
    ),
    "Levit": partial(
        _image, "Levit", size=64, image_size=64, drop_path_rate=0, hidden_sizes=[32, 48, 64], depths=[1, 1, 1],
        num_attention_heads=[2, 3, 4], key_dim=[8, 8, 8],
    ),
    "CLIP": partial(
        _image, "CLIPVision", "Model", of="pooler_output", image_size=32, patch_size=8, num_hidden_layers=2
    ),
    "SwiftFormer": partial(_image, "SwiftFormer", size=64, depths=[1, 1, 1, 1], embed_dims=[16, 24, 32, 48]),
}  # fmt: skip
_OTHERS: dict[str, Callable[[], Built]] = {
    "transformer": _transformer, "attention-weights": _attention_weights, "lstm": _lstm, "sorting": _sorting,
    "unet": _unet, "experts": _experts, "vmap": _vmap, "fourier": _fourier, "in-place": _in_place,
    "embedding-bag": _embedding_bag, "volume": _volume, "ctc": _ctc, "unrolled": _unrolled, "diffusion": _diffusion,
    "contrastive": _contrastive, "graph-network": _graph_network, "wavenet": _wavenet, "weight-norm": _weight_norm,
}  # fmt: skip
_TWO_SIDED: dict[str, dict[str, object]] = {
    "Bart": {"d_model": 48, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
             "decoder_attention_heads": 4, "encoder_ffn_dim": 80, "decoder_ffn_dim": 80},
    "T5": {"d_model": 48, "d_kv": 12, "d_ff": 80, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0},
}  # fmt: skip
MODELS: dict[str, Callable[[], Built]] = (
    {k.lower(): partial(_language, k, **_OWN.get(k, {})) for k in _CAUSAL}
    | {k.lower(): partial(_language, k, head_dim=16, **_OWN.get(k, {})) for k in _OF_HEADS}
    | {k.lower(): partial(_language, k, "ForMaskedLM", **_OWN.get(k, {})) for k in _MASKED}
    | {k.lower(): partial(_language, k, "ForConditionalGeneration", **v) for k, v in _TWO_SIDED.items()}
    | {k.lower(): build for k, build in _IMAGES.items()}
    | _OTHERS
)


def _timm(name: str, size: int) -> Built:
    import timm

    return timm.create_model(name, num_classes=10), [torch.randn(4, 3, size, size)]


#: Those of timm that shuffle no dropout in by default, at the sizes that they are made for.
TIMM: dict[str, Callable[[], Built]] = {
    f"timm:{name}": partial(_timm, name, size)
    for size, names in {
        224: (
            "poolformer_s12", "levit_128s", "tnt_s_patch16_224", "twins_svt_small", "convnextv2_atto", "mobilevit_xxs",
            "dla34", "gmlp_s16_224", "volo_d1_224", "swin_tiny_patch4_window7_224", "resnext50_32x4d",
            "res2net50_26w_4s", "edgenext_xx_small", "resmlp_12_224", "sequencer2d_s", "densenet121", "vgg11_bn",
            "xcit_nano_12_p16_224",
            "repvgg_a0", "fastvit_t8", "mobilenetv3_large_100", "beit_base_patch16_224", "nfnet_l0",
            "tf_efficientnetv2_b0", "hiera_tiny_224", "regnety_008", "hrnet_w18_small", "coat_lite_tiny",
            "vit_tiny_patch16_224", "mixer_s16_224", "cait_xxs24_224", "efficientformer_l1", "pit_ti_224",
            "deit3_small_patch16_224", "ghostnet_100",
        ),
        240: ("crossvit_tiny_240",),
        256: ("maxvit_rmlp_nano_rw_256",),
        299: ("inception_v3",),
    }.items()
    for name in names
}  # fmt: skip
