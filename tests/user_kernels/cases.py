# mypy: ignore-errors
"""Functions that launch user kernels: torch's own samples, and ours. For the tests without a GPU and the script with.

Import this where Triton has a GPU, or inside of `pretended_gpu`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch.testing._internal import triton_utils as samples

from tests.user_kernels import own_kernels

N = 512


@dataclass(frozen=True)
class Case:
    """``make(device)`` gives the arguments; ``changed``: buffers that the launches change in the plan, without clones.

    ``clones``: copies that have to stay.
    """

    name: str
    function: Callable[..., object]
    make: Callable[[str], tuple[object, ...]]
    launches: int = 1
    clones: int = 0
    dynamic: bool = False


def _vectors(count: int = 2, n: int = N, dtype: torch.dtype = torch.float32) -> Callable[[str], tuple[object, ...]]:
    def make(device: str) -> tuple[object, ...]:
        if dtype.is_floating_point:
            return tuple(torch.randn(n, device=device, dtype=dtype) for _ in range(count))
        return tuple(torch.randint(0, 1 << 30, (n,), device=device, dtype=dtype) for _ in range(count))

    return make


def _matrices(rows: int, columns: int, count: int = 2) -> Callable[[str], tuple[object, ...]]:
    return lambda device: tuple(torch.randn(rows, columns, device=device) for _ in range(count))


def _grid(n: int) -> Callable[[dict[str, int]], tuple[int]]:
    return lambda meta: (triton.cdiv(n, meta["BLOCK_SIZE"]),)


def _binary(kernel, **constants) -> Callable[..., object]:
    def function(x, y):
        out = torch.empty_like(x)
        kernel[_grid(x.numel())](x, y, out, x.numel(), **constants)
        return out

    return function


def _unary(kernel, grid=(8,), **constants) -> Callable[..., object]:
    def function(x):
        out = torch.empty_like(x)
        kernel[grid](x, out, x.numel(), **constants)
        return out

    return function


def _two_launches(x, y):
    out = torch.zeros_like(x)
    samples.add_kernel[(4,)](x, y, out, N, BLOCK_SIZE=128)
    samples.add_kernel[(4,)](out, y, out, N, BLOCK_SIZE=128)
    return out * 2


def _none_argument(x):
    out = torch.empty_like(x)
    samples.add_kernel_with_none_param_and_equal_to_1_arg[(4,)](
        x, None, out, N, x.stride(0), ARGS_PASSED="one", BLOCK_SIZE=128
    )
    return out


def _optional(x, y):
    out = torch.empty_like(x)
    samples.add_kernel_with_optional_param[(4,)](x, y, out, N, ARGS_PASSED="two", BLOCK_SIZE=128)
    return out


def _weird_order(x, y):
    out = torch.empty_like(x)
    samples.add_kernel_autotuned_weird_param_order[_grid(N)](x, y, N, out_ptr=out)
    return out


def _two_dimensions(x, y):
    out = torch.empty_like(x)
    rows, columns = x.shape
    samples.add_kernel_2d_autotuned[
        lambda meta: (triton.cdiv(rows, meta["BLOCK_SIZE_X"]), triton.cdiv(columns, meta["BLOCK_SIZE_Y"]))
    ](x, y, out, rows, columns)
    return out


def _scaling(x, y):
    out = torch.empty_like(x)
    samples.add_kernel_with_scaling[(4,)](x, y, out, N, 0.3, BLOCK_SIZE=128)
    return out


def _tma(kernel_1d, kernel_2d, new_api):
    def one(x, y):
        out = torch.empty_like(x)
        d = [samples.create_tensor_descriptor_shim(t, [128], new_api=new_api) for t in (x, y, out)]
        kernel_1d[(4,)](*d, BLOCK_SIZE=128)
        return out

    def two(x, y):
        out = torch.empty_like(x)
        d = [samples.create_tensor_descriptor_shim(t, [16, 32], new_api=new_api) for t in (x, y, out)]
        kernel_2d[(x.shape[0] // 16, x.shape[1] // 32)](*d, BLOCK_SIZE_X=16, BLOCK_SIZE_Y=32)
        return out

    return one, two


def _device_tma(kernel):
    # descriptors that a kernel makes lie in memory that Triton asks its user for
    triton.set_allocator(lambda size, alignment, stream: torch.empty(size, device="cuda", dtype=torch.int8))

    def function(x, y):
        out, workspace = torch.empty_like(x), torch.empty(384, dtype=torch.uint8, device=x.device)
        kernel[(x.shape[0] // 16, x.shape[1] // 16)](x, y, out, x.shape[0], x.shape[1], workspace, BLOCK_SIZE=16)
        return out

    return function


def _in_place(x):
    x = x * 2
    samples.mul2_inplace_kernel[(4,)](x, N, BLOCK_SIZE=128)
    return x + 1


def _input_in_place(x):
    samples.mul2_inplace_kernel[(4,)](x, N, BLOCK_SIZE=128)
    return x + 1


def _indirection(activation):
    def function(x):
        out = torch.empty_like(x)
        samples.indirection_kernel[(1,)](x.clone(), out, 128, BLOCK_SIZE=128, ACTIVATION=activation)
        return out

    return function


def _strided(x):
    out = torch.empty_like(x)
    view, target = x[:, 16:48], out[:, 16:48]
    out.zero_()
    samples.double_strided_kernel[(2, 2)](view, target, x.stride(0), out.stride(0), X_BLOCK_SIZE=16, Y_BLOCK_SIZE=16)
    return out


def _asm(kernel):
    def function(x, y):
        z = torch.empty_like(x)
        kernel[(1,)](x, y, z, 12, BLOCK=128)
        return z

    return function


def _atomic(x, y):
    out = torch.ones_like(x)
    samples.atomic_add_kernel[(4,)](x, y, out, N, BLOCK_SIZE=128)
    return out


def _out_of_order(x, y):
    out = torch.empty_like(x)
    samples.add_kernel_out_of_order_fn2[(4,)](x, y, N, out, BLOCK_SIZE=128)
    return out


def _matmul(a, b, rows):
    c = torch.zeros(a.shape[0], b.shape[1], device=a.device, dtype=torch.float16)
    samples.strange_config_matmul_kernel[
        lambda meta: (triton.cdiv(a.shape[0], meta["BLOCK_SIZE_M"]) * triton.cdiv(b.shape[1], meta["BLOCK_SIZE_N"]),)
    ](a, b, c, rows, b.shape[1], a.shape[1])
    return c


def _matmul_arguments(device):
    made = [torch.ones(64, 64, device=device, dtype=torch.float16) for _ in range(2)]
    return (*made, torch.full((), 64, device=device, dtype=torch.int32))


def _ones(kernel):
    def function(x):
        out = torch.empty_like(x)
        kernel[(4,)](out, N, BLOCK_SIZE=128)
        return out + x

    return function


def _boolean(x, y):
    out = torch.empty_like(x)
    samples.add_kernel_with_boolean_param[(4,)](x, y, out, N, True, BLOCK_SIZE=128)
    return out


def _masked(x, y):
    out = torch.empty_like(x)
    samples.masked_add_kernel_with_bool_tensor[(4,)](x, y, x > 0, out, N, BLOCK_SIZE=128)
    return out


def _module(x):
    out = torch.empty_like(x)
    own_kernels.through_a_module[(4,)](x, out, N, 1.5, BLOCK=128)
    return out


def _overlap(x):
    y = x.clone()
    own_kernels.reads_what_it_writes[(4,)](y, x, N, BLOCK=128)
    return y


def _types(x):
    out = torch.empty_like(x, dtype=torch.float16)
    own_kernels.converted[(4,)](x, out, N, BLOCK=128, TYPE=tl.float16)
    return out


def _increment(x):
    y = x * 2
    own_kernels.increment[lambda meta: (triton.cdiv(y.numel(), meta["BLOCK"]),)](y, y.numel())
    return y


def _total(x):
    total = torch.zeros((), device=x.device)
    own_kernels.total[lambda meta: (triton.cdiv(x.numel(), meta["BLOCK"]),)](x, total, x.numel())
    return total


def _doubled(kernel):
    def function(x):
        out = torch.empty_like(x)
        kernel[lambda meta: (triton.cdiv(N, meta["BLOCK"]),)](x, out, N)
        return out

    return function


def _function_argument(x):
    return own_kernels.scaled(x) + 1  # Dynamo takes no function as an argument of a kernel, wrap_triton does


def _nothing(x):
    y = x + 1
    own_kernels.increment[(0,)](y, 0)
    return y


def _misaligned(x):
    out = torch.zeros_like(x)
    own_kernels.through_a_module[(4,)](x[1:], out[1:], N - 1, 1.5, BLOCK=128)
    return out


def _op(x):
    return own_kernels.doubled(x.cos())


def _op_in_place(x):
    y = x * 2
    own_kernels.incremented(y)
    return y


def _training(x, y):
    """A kernel between differentiable operations, its result detached."""
    with torch.no_grad():
        scale = torch.empty_like(x)
        samples.add_kernel[(4,)](x, y, scale, N, BLOCK_SIZE=128)
    return (x * scale).sin()


def _all() -> list[Case]:
    s, two = samples, _vectors(2)
    new = _tma(s.add_kernel_with_tma_1d_new_api, s.add_kernel_with_tma_2d_new_api, True)
    integers = _vectors(2, 128, torch.int32)
    cases = [
        Case("add_kernel", _binary(s.add_kernel, BLOCK_SIZE=128), two),
        Case("add_kernel, sizes that change", _binary(s.add_kernel, BLOCK_SIZE=128), two, dynamic=True),
        Case("sub_kernel", _binary(s.sub_kernel, BLOCK_SIZE=128), two),
        Case("add_kernel, launched twice", _two_launches, two, launches=2, clones=1),
        Case("add_kernel_with_optional_param", _optional, two),
        Case("add_kernel_with_none_param_and_equal_to_1_arg", _none_argument, _vectors(1)),
        Case("add_kernel_autotuned", _binary(s.add_kernel_autotuned), two),
        Case("sub_kernel_autotuned", _binary(s.sub_kernel_autotuned), two),
        Case("add_kernel_autotuned_weird_param_order", _weird_order, two),
        Case("add_kernel_2d_autotuned", _two_dimensions, _matrices(96, 96)),
        Case("add_kernel_with_scaling", _scaling, two),
        Case("add_kernel_with_tma_1d_new_api", new[0], two),
        Case("add_kernel_with_tma_2d_new_api", new[1], _matrices(32, 64)),
        Case("add_kernel_on_device_tma_new_api", _device_tma(s.add_kernel_on_device_tma_new_api), _matrices(32, 64)),
        Case("mul2_kernel", _unary(s.mul2_kernel, BLOCK_SIZE=128), _vectors(1)),
        Case("mul2_inplace_kernel", _in_place, _vectors(1)),
        Case("mul2_inplace_kernel on an input", _input_in_place, _vectors(1)),
        Case("indirection_kernel, mul2", _indirection("mul2_inplace_kernel"), _vectors(1, 128), clones=1),
        Case("indirection_kernel, add", _indirection("add_kernel"), _vectors(1, 128), clones=1),
        Case("double_strided_kernel", _strided, _matrices(32, 64, 1)),
        Case("inline_asm_kernel_is_pure_true", _asm(s.inline_asm_kernel_is_pure_true), integers),
        Case("inline_asm_kernel_is_pure_false", _asm(s.inline_asm_kernel_is_pure_false), integers),
        Case("add_kernel_with_block_ptr", _binary(s.add_kernel_with_block_ptr, BLOCK_SIZE=128), two),
        Case("kernel_with_block_ptr_2d", _unary(s.kernel_with_block_ptr_2d, BLOCK_SIZE=64), _vectors(1)),
        Case("add_kernel_with_import", _binary(s.add_kernel_with_import, BLOCK_SIZE=128), two),
        Case("cond_op_kernel", _binary(s.cond_op_kernel, BLOCK_SIZE=128), two),
        Case("atomic_add_kernel", _atomic, two),
        Case("add_4_times_kernel", _binary(s.add_4_times_kernel, BLOCK_SIZE=128), two),
        Case("add_kernel_out_of_order_fn2", _out_of_order, two),
        Case("strange_config_matmul_kernel", _matmul, _matmul_arguments),
        Case("a function of another module", _module, _vectors(1)),
        Case("reads what it writes", _overlap, _vectors(1), clones=1),
        Case("a type as an argument", _types, _vectors(1)),
        Case("restore_value", _increment, _vectors(1)),
        Case("restore_value, sizes that change", _increment, _vectors(1), dynamic=True),
        Case("reset_to_zero", _total, _vectors(1)),
        Case("heuristics", _doubled(own_kernels.with_heuristics), _vectors(1)),
        Case("pruned configurations", _doubled(own_kernels.pruned), _vectors(1)),
        Case("a function as an argument", _function_argument, _vectors(1)),
        Case("a grid of nothing", _nothing, _vectors(1)),
        Case("pointers at odd addresses", _misaligned, _vectors(1)),
        Case("triton_op", _op, _vectors(1)),
        Case("triton_op that changes its argument", _op_in_place, _vectors(1)),
    ]
    if hasattr(tl, "_experimental_descriptor_load"):  # the older interface, which Triton 3.6 no longer has
        old = _tma(s.add_kernel_with_tma_1d_old_api, s.add_kernel_with_tma_2d_old_api, False)
        cases.append(Case("add_kernel_with_tma_1d_old_api", old[0], two))
        cases.append(Case("add_kernel_with_tma_2d_old_api", old[1], _matrices(32, 64)))
        on_device = _device_tma(s.add_kernel_on_device_tma_old_api)
        cases.append(Case("add_kernel_on_device_tma_old_api", on_device, _matrices(32, 64)))
    for name in ("docstring_double_quotes", "docstring_single_quotes", "backslash_in_docstring"):
        full = f"kernel_with_{name}" if name.startswith("docstring") else "kernel_with_backslash_in_docstring"
        if hasattr(s, full):
            cases.append(Case(full, _ones(getattr(s, full)), _vectors(1)))
    for name in ("kernel_inline_asm_double_quotes", "kernel_inline_asm_single_quotes"):
        if hasattr(s, name):
            cases.append(Case(name, _unary(getattr(s, name), BLOCK_SIZE=64), _vectors(1)))
    if hasattr(s, "add_kernel_with_boolean_param"):
        cases.append(Case("add_kernel_with_boolean_param", _boolean, two))
    if hasattr(s, "masked_add_kernel_with_bool_tensor"):
        cases.append(Case("masked_add_kernel_with_bool_tensor", _masked, two))
    return cases


CASES = _all()
