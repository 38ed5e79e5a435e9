"""On a GPU: convolutions written into planned buffers, and their scratch. ``python -m tests.gpu.check_convolutions``.

For each of a grid of convolutions: the bits of ``memplan::convolution.out`` against ``aten::convolution``, the scratch
that was measured for plans against what the allocator's peak says of one call, and a compiled training step (poisoned)
against eager. One row each; about a minute. Exits with 1 if a row is wrong.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import memplan
from memplan import convolutions
from memplan.ir.config import Config
from memplan.ir.program import Contract, Extern, Literal, Tuple, View
from memplan.runtime.convolution import convolution_out

MIB = 1 << 20


@dataclass(frozen=True)
class Case:
    name: str
    channels: int
    filters: int
    size: int
    kernel: int
    stride: int = 1
    groups: int = 1
    bias: bool = False
    dims: int = 2
    batch: int = 16
    dilation: int = 1
    transposed: bool = False


CASES = (
    Case("3x3", 64, 64, 56, 3),
    Case("1x1", 256, 64, 56, 1),
    Case("7x7 stride 2", 3, 64, 224, 7, 2),
    Case("3x3 stride 2", 128, 128, 28, 3, 2),
    Case("bias", 64, 32, 28, 3, bias=True),
    Case("grouped", 64, 64, 28, 3, groups=4),
    Case("depthwise", 96, 96, 56, 3, groups=96),
    Case("depthwise 7x7", 128, 128, 28, 7, groups=128, bias=True),
    Case("depthwise stride 2", 96, 96, 57, 5, 2, groups=96),
    Case("dilated", 32, 32, 40, 3, dilation=2),
    Case("one dimension", 64, 128, 1000, 3, bias=True, dims=1),
    Case("three dimensions", 16, 16, 12, 3, dims=3, batch=4),
    Case("one pixel", 512, 32, 1, 1, bias=True),
    Case("one channel", 1, 8, 32, 3),
    Case("transposed", 64, 32, 28, 3, 2, transposed=True),
)


def arguments(case: Case, dtype: torch.dtype, last: bool) -> tuple[object, ...]:
    torch.manual_seed(0)
    space = [case.size] * case.dims
    shape = [case.channels, case.filters] if case.transposed else [case.filters, case.channels // case.groups]
    x = torch.randn(case.batch, case.channels, *space, device="cuda", dtype=dtype)
    w = torch.randn(*shape, *[case.kernel] * case.dims, device="cuda", dtype=dtype)
    b = torch.randn(case.filters, device="cuda", dtype=dtype) if case.bias else None
    if last and case.dims > 1:
        layout = torch.channels_last if case.dims == 2 else torch.channels_last_3d
        x, w = x.contiguous(memory_format=layout), w.contiguous(memory_format=layout)
    every = [[n] * case.dims for n in (case.stride, case.kernel // 2 * case.dilation, case.dilation, 0)]
    stride, padding, dilation, more = every
    return (x, w, b, stride, padding, dilation, case.transposed, more, case.groups)


def extern(target: str, args: tuple[object, ...], results: tuple[Tensor | None, ...]) -> Extern:
    """The call as a program has it."""

    def argument(a: object) -> object:
        if isinstance(a, Tensor):
            return View("x", a.dtype, tuple(a.shape), a.stride())
        return Tuple(tuple(map(argument, a))) if isinstance(a, list) else Literal(a)  # type: ignore[arg-type]

    views = tuple(None if r is None else View("y", r.dtype, tuple(r.shape), r.stride()) for r in results)
    given = tuple(map(argument, args))
    return Extern("c", target, given, (), views, Contract.FRESH, "cuda:0")  # type: ignore[arg-type]


def peak_of(call: Callable[[], object]) -> int:
    """What a call has alive at most, its results among it, by the allocator's peak."""
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - before


def rounded(results: tuple[Tensor | None, ...]) -> int:
    return sum(-(-r.untyped_storage().nbytes() // 512) * 512 for r in results if r is not None)


def compare(config: Config, call: Callable[..., object], target: str, args: tuple[object, ...]) -> str:
    """Measured for plans, against the peak of one call; "wrong" where plans would be off by more than 2 MiB + 1 %."""
    found = call(*args)
    results = found if isinstance(found, tuple) else (found,)
    nbytes = rounded(results)
    facts = convolutions.facts_of(extern(target, args, results), config)
    del found, results
    torch.cuda.empty_cache()
    if facts is None:
        return "not measured wrong"
    peak = peak_of(lambda: call(*args))
    said = nbytes + facts.scratch
    # a block may be larger than asked for where the rest of it is too small to be another one
    verdict = "" if abs(said - peak) <= 2 * MIB + 0.01 * peak else " wrong"
    kind = facts.backend.removeprefix("Cuda")
    return f"{kind} scratch {facts.scratch / MIB:.2f}, peak - results {(peak - nbytes) / MIB:.2f}{verdict}"


def bits(args: tuple[object, ...]) -> str:
    x, w, b, *rest = args
    wanted = torch.ops.aten.convolution.default(*args)
    if str(torch._C._select_conv_backend(x, w, b, *rest).name) != convolutions.CUDNN:
        return "fresh"
    out = torch.full_like(wanted, float("nan"))
    assert out.stride() == wanted.stride()
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    convolution_out(*args, out=out)  # type: ignore[arg-type]
    made = torch.cuda.memory_stats()["allocation.all.allocated"] - before
    return ("equal" if torch.equal(out, wanted) else "DIFFERENT wrong") + f" ({made} allocations)"


def step(case: Case, dtype: torch.dtype, last: bool) -> str:
    """A small model around the convolution, trained one step with poison, against eager."""
    args = arguments(case, dtype, last)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(args[1].detach().clone())  # type: ignore[attr-defined]

        def forward(self, x: Tensor) -> Tensor:
            y = torch.ops.aten.convolution.default(torch.relu(x * 2), self.weight, *args[2:])
            return torch.sigmoid(y).float().mean()

    model, x = Net(), args[0]
    torch._dynamo.reset()
    wanted = model(x)
    wanted.backward()
    assert model.weight.grad is not None
    grad, model.weight.grad = model.weight.grad.clone(), None
    with memplan.record() as recording, tempfile.TemporaryDirectory() as folder:
        loss = torch.compile(model, backend="memplan", options={"poison": True, "cache_dir": folder})(x)
        loss.backward()
    off = float((model.weight.grad - grad).float().norm() / grad.float().norm())
    out = any(op.target == convolutions.OUT for op in recording.plans[0].program.operations if isinstance(op, Extern))
    good = torch.allclose(loss, wanted, rtol=1e-3) and off < (1e-4 if dtype is torch.float32 else 2e-2)
    return f"{'planned' if out else 'fresh'}, gradient off {off:.1e}{'' if good else ' wrong'}"


def rows(config: Config) -> Iterator[tuple[str, Callable[[], str]]]:
    def forward(case: Case, dtype: torch.dtype, last: bool) -> str:
        args = arguments(case, dtype, last)
        return f"{bits(args)}; {compare(config, torch.ops.aten.convolution.default, convolutions.FORWARD, args)}"

    def backward(case: Case, dtype: torch.dtype, last: bool) -> str:
        args = arguments(case, dtype, last)
        grad = torch.ones_like(torch.ops.aten.convolution.default(*args))
        x, w, b, *rest = args
        sizes = None if b is None else [case.filters]
        given = (grad, x, w, sizes, *rest, [True, True, b is not None])
        return compare(config, torch.ops.aten.convolution_backward.default, convolutions.BACKWARD, given)

    for case, dtype, last in itertools.product(CASES, (torch.bfloat16, torch.float32), (False, True)):
        title = f"{case.name}, {str(dtype).removeprefix('torch.')}{', channels last' if last else ''}"
        yield title, lambda c=case, d=dtype, la=last: forward(c, d, la)  # type: ignore[misc]
        yield f"  backward of {title}", lambda c=case, d=dtype, la=last: backward(c, d, la)  # type: ignore[misc]
    for case in CASES[:9]:
        yield f"step, {case.name}", lambda c=case: step(c, torch.bfloat16, True)  # type: ignore[misc]
    yield "float32 without TF32", lambda: flags(allow_tf32=False)
    yield "deterministic", lambda: flags(deterministic=True)
    yield "benchmark", lambda: flags(benchmark=True)
    yield "no cuDNN", lambda: flags(enabled=False)


def flags(**given: bool) -> str:
    settings = {"enabled": True, "benchmark": False, "deterministic": False, "allow_tf32": True, **given}
    with torch.backends.cudnn.flags(**settings):
        args = arguments(CASES[0], torch.float32, True)
        wanted = torch.ops.aten.convolution.default(*args)
        out = torch.empty_like(wanted)
        convolution_out(*args, out=out)  # type: ignore[arg-type]
        return "equal" if torch.equal(out, wanted) else "DIFFERENT wrong"


def main() -> int:
    print(torch.__version__, torch.cuda.get_device_name(), "cuDNN", torch.backends.cudnn.version(), "; MiB")
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        config = Config(cache_dir=folder)
        for title, check in rows(config):
            try:
                text = check()
            except Exception:  # one row must not cost the others
                traceback.print_exc(limit=4)
                text = "raised wrong"
            wrong += "wrong" in text
            print(f"{title}: {text}", flush=True)
            torch.cuda.empty_cache()
        held = torch.cuda.memory_reserved()
        print(f"reserved at the end: {held / MIB:.1f}")
    print(f"{wrong} wrong" if wrong else "all right")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
