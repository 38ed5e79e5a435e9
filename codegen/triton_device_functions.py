"""Source of the small device functions that emitted kernels may call; a kernel's module holds those it uses.

Each takes tensors that broadcast against each other, and calls no other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

#: Both words of a draw (`memplan.ir.loops.Random`). In 64 bits, since kernels that check indices check sums and
#: products of 32 bits for overflow as well; the compiler makes one wide multiplication of it.
_DRAW = """
    key = seed.to(tl.uint64, bitcast=True)
    first = offset.to(tl.uint32)
    second = (key >> 32).to(tl.uint32)
    if offset.dtype.primitive_bitwidth > 32:
        second = second ^ (offset.to(tl.uint64) >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        product = first.to(tl.uint64) * 0xD256D193
        first = (product >> 32).to(tl.uint32) ^ key.to(tl.uint32) ^ second
        second = product.to(tl.uint32)
        key = key + 0x9E3779B9
""".strip("\n")


def _uniform(name: str, word: str) -> str:
    """The line that makes ``name`` a float32 in [0, 1) of a 32-bit word."""
    signed = f"{word}.to(tl.int32, bitcast=True)"
    return f"    {name} = tl.where({signed} < 0, -{signed} - 1, {signed}) * 4.6566127342e-10"


DEVICE_FUNCTIONS: Mapping[str, str] = {
    "floor_divide": """
def floor_divide(a, b):
    quotient = a // b
    return tl.where((a - quotient * b != 0) & ((a < 0) != (b < 0)), quotient - 1, quotient)
""",
    "floor_modulo": """
def floor_modulo(a, b):
    rest = a % b
    return tl.where((rest != 0) & ((rest < 0) != (b < 0)), rest + b, rest)
""",
    "floor_divide_float": """
def floor_divide_float(a, b):
    rest = libdevice.fmod(a, b)
    quotient = (a - rest) / b
    quotient = tl.where((rest != 0.0) & ((b < 0.0) != (rest < 0.0)), quotient - 1.0, quotient)
    whole = tl.floor(quotient)
    whole = tl.where(quotient - whole > 0.5, whole + 1.0, whole)
    whole = tl.where(quotient == 0.0, (a / b) * 0.0, whole)
    return tl.where(b == 0.0, a / b, whole)
""",
    "floor_modulo_float": """
def floor_modulo_float(a, b):
    rest = libdevice.fmod(a, b)
    return tl.where((rest != 0.0) & ((rest < 0.0) != (b < 0.0)), rest + b, rest)
""",
    "integer_power": """
def integer_power(base, exponent, BITS: tl.constexpr):
    result = base * 0 + 1
    factor = base
    rest = exponent
    for _ in tl.static_range(BITS):
        result = tl.where((rest & 1) != 0, result * factor, result)
        factor = factor * factor
        rest = rest >> 1
    odd = (exponent & 1) != 0
    inverse = tl.where(base == 1, base, tl.where(base == -1, tl.where(odd, base, -base), base * 0))
    return tl.where(exponent < 0, inverse, result)
""",
    "digamma": """
def digamma(x):
    pole = (x == 0.0) | ((x < 0.0) & (x == tl.floor(x)))
    reflected = x < 0.0
    y = tl.where(reflected, 1.0 - x, x)
    shift = y * 0.0
    for _ in tl.static_range(10):
        small = y < 10.0
        shift = tl.where(small, shift - 1.0 / tl.where(small, y, 1.0), shift)
        y = tl.where(small, y + 1.0, y)
    z = 1.0 / (y * y)
    series = z * (1 / 12 - z * (1 / 120 - z * (1 / 252 - z * (1 / 240 - z * (1 / 132)))))
    value = shift + libdevice.log(y) - 0.5 / y - series
    fraction = x - tl.floor(x)
    angle = 3.141592653589793 * fraction
    value = tl.where(reflected, value - 3.141592653589793 / libdevice.tan(tl.where(reflected, angle, 1.0)), value)
    infinite = tl.where(x == 0.0, -1.0 / x, float("nan"))
    return tl.where(pole, infinite, value)
""",
    "log_ndtr": """
def log_ndtr(x):
    t = x * 0.7071067811865476
    tail = libdevice.log(libdevice.erfcx(-t) * 0.5) - t * t
    return tl.where(x < -1.0, tail, libdevice.log1p(-libdevice.erfc(t) * 0.5))
""",
    # eager's Bessel functions give NaN at infinity, libdevice's their limits
    **{
        name: f"""
def {name}(x):
    return tl.where(tl.abs(x) < float("inf"), libdevice.{function}(x), float("nan"))
"""
        for name, function in (
            ("i0", "cyl_bessel_i0"),
            ("i1", "cyl_bessel_i1"),
            ("bessel_j0", "j0"),
            ("bessel_j1", "j1"),
        )
    },
    "random_uniform": f"""
def random_uniform(seed, offset):
{_DRAW}
{_uniform("result", "first")}
    return result
""",
    "random_normal": f"""
def random_normal(seed, offset):
{_DRAW}
{_uniform("distance", "first")}
{_uniform("turn", "second")}
    return tl.sqrt(-2.0 * tl.log(tl.maximum(distance, 1.0e-7))) * tl.cos(6.283185307179586 * turn)
""",
    "random_int64": f"""
def random_int64(seed, offset):
{_DRAW}
    return (first.to(tl.uint64) | (second.to(tl.uint64) << 32)).to(tl.int64, bitcast=True)
""",
    "larger": """
def larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
""",
    "smaller": """
def smaller(a, b):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)
""",
    "larger_number": """
def larger_number(a, b):
    return tl.where((b != b) | (a > b), a, b)
""",
    "smaller_number": """
def smaller_number(a, b):
    return tl.where((b != b) | (a < b), a, b)
""",
    "larger_integer": """
def larger_integer(a, b):
    return tl.maximum(a, b)
""",
    "smaller_integer": """
def smaller_integer(a, b):
    return tl.minimum(a, b)
""",
    "product": """
def product(a, b):
    return a * b
""",
    "first_larger": """
def first_larger(a, a_index, b, b_index):
    take = (a > b) | ((a == b) & (a_index < b_index))
    return tl.where(take, a, b), tl.where(take, a_index, b_index)
""",
    "first_smaller": """
def first_smaller(a, a_index, b, b_index):
    take = (a < b) | ((a == b) & (a_index < b_index))
    return tl.where(take, a, b), tl.where(take, a_index, b_index)
""",
    "first_larger_float": """
def first_larger_float(a, a_index, b, b_index):
    greater = (a > b) | ((a != a) & (b == b))
    equal = (a == b) | ((a != a) & (b != b))
    take = greater | (equal & (a_index < b_index))
    return tl.where(take, a, b), tl.where(take, a_index, b_index)
""",
    "first_smaller_float": """
def first_smaller_float(a, a_index, b, b_index):
    smaller = (a < b) | ((a != a) & (b == b))
    equal = (a == b) | ((a != a) & (b != b))
    take = smaller | (equal & (a_index < b_index))
    return tl.where(take, a, b), tl.where(take, a_index, b_index)
""",
    # a row of -inf alone has no finite maximum to subtract
    "online_step": """
def online_step(top, total, value):
    next_top = tl.maximum(top, value, propagate_nan=tl.PropagateNan.ALL)
    base = tl.where(next_top == float("-inf"), 0.0, next_top)
    return next_top, total * tl.exp(top - base) + libdevice.exp(value - base)
""",
    "online_union": """
def online_union(top_a, total_a, top_b, total_b):
    top = tl.maximum(top_a, top_b, propagate_nan=tl.PropagateNan.ALL)
    base = tl.where(top == float("-inf"), 0.0, top)
    return top, total_a * libdevice.exp(top_a - base) + total_b * libdevice.exp(top_b - base)
""",
    # T. F. Chan, G. H. Golub, R. J. LeVeque, "Updating formulae and a pairwise algorithm for computing sample
    # variances", 1979
    "welford_union": """
def welford_union(mean_a, m2_a, weight_a, mean_b, m2_b, weight_b):
    delta = mean_b - mean_a
    weight = weight_a + weight_b
    part = tl.where(weight == 0.0, 0.0, weight_b / weight)
    return mean_a + delta * part, m2_a + m2_b + delta * delta * weight_a * part, weight
""",
}


def device_source(names: Iterable[str]) -> str:
    """Definitions of the named functions, in the table's order."""
    wanted = set(names)
    return "".join(f"\n\n@triton.jit{text}" for name, text in DEVICE_FUNCTIONS.items() if name in wanted)
