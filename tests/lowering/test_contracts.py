"""Every OUT entry of the contract table, watched on the CPU's allocator: the call must allocate nothing."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from memplan.ir.program import Contract
from memplan.lowering.call_site import resolve
from memplan.lowering.contracts import NATIVE_OUT, NATIVE_OUT_CPU, contract, is_composite_out

GENERATOR = torch.Generator().manual_seed(0)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=GENERATOR)


SAMPLES: dict[str, tuple[object, ...]] = {
    "aten.mm.default": (random(64, 48), random(48, 80)),
    "aten.addmm.default": (random(80), random(64, 48), random(48, 80)),
    "aten.bmm.default": (random(4, 32, 24), random(4, 24, 40)),
    "aten.baddbmm.default": (random(4, 32, 40), random(4, 32, 24), random(4, 24, 40)),
    "aten.addmv.default": (random(64), random(64, 48), random(48)),
    "aten.cumsum.default": (random(64, 48), 1),
    "aten.cumprod.default": (random(64, 48), 1),
    "aten.igamma.default": (random(64, 48).abs(), random(64, 48).abs()),
    "aten.igammac.default": (random(64, 48).abs(), random(64, 48).abs()),
    "aten.polygamma.default": (2, random(64, 48).abs()),
    "aten.bucketize.Tensor": (random(64, 48), torch.linspace(-2, 2, 9)),
    "aten.searchsorted.Tensor": (torch.linspace(-2, 2, 9), random(64, 48)),
    "aten.max_pool3d_with_indices.default": (random(2, 4, 8, 8, 8), [2, 2, 2]),
}


def allocated_bytes(call) -> int:  # type: ignore[no-untyped-def]
    """Bytes that a call asks the CPU's allocator for, those given back included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        call()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    return sum(max(e.nbytes(), 0) for e in events)


def out_arguments(target: str, results: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
    overload = resolve(target)
    assert overload is not None
    names = [a.name for a in overload._schema.arguments if a.is_out]
    return {n: torch.empty_like(r) for n, r in zip(names, results, strict=True)}


def variants(target: str) -> list[list[object]]:
    """The sample, matrices also transposed in memory, other operators also in half precision.

    Matmuls of half types are left out: on a CPU with matrix units oneDNN packs the operands into scratch of its own.
    """
    args = list(SAMPLES[target])
    if target in NATIVE_OUT:
        return [args, [a.mT.contiguous().mT if isinstance(a, torch.Tensor) and a.dim() > 1 else a for a in args]]
    return [args, [a.bfloat16() if isinstance(a, torch.Tensor) else a for a in args]]


@pytest.mark.parametrize("target", sorted(NATIVE_OUT | NATIVE_OUT_CPU))
def test_out_allocates_nothing(target: str) -> None:
    info = contract(target, "cpu")
    assert info.contract is Contract.OUT
    assert info.out_target is not None
    functional, overload = resolve(target), resolve(info.out_target)
    assert functional is not None
    assert overload is not None
    calls = []
    for args in variants(target):
        expected = functional(*args)
        results = expected if isinstance(expected, tuple) else (expected,)
        out = out_arguments(info.out_target, results)
        overload(*args, **out)  # a first call may set up a library
        for got, want in zip(out.values(), results, strict=True):
            torch.testing.assert_close(got, want)
        calls.append((args, out))
    assert allocated_bytes(lambda: [overload(*args, **out) for args, out in calls]) == 0


def test_the_watch_sees_an_allocation() -> None:
    image, weight = random(2, 3, 8, 8), random(4, 3, 3, 3)
    out = torch.empty(2, 4, 6, 6)
    args = (image, weight, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1)
    assert allocated_bytes(lambda: torch.ops.aten.convolution.out(*args, out=out)) >= out.nbytes


@pytest.mark.parametrize("target", sorted(set((NATIVE_OUT | NATIVE_OUT_CPU).values())))
def test_no_out_entry_is_a_generated_composite(target: str) -> None:
    assert not is_composite_out(target)


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("aten.convolution.default", Contract.FRESH),
        ("aten.native_layer_norm.default", Contract.FRESH),
        ("aten.embedding_dense_backward.default", Contract.FRESH),
        ("aten.view.default", Contract.ALIAS),
        ("aten._unsafe_view.default", Contract.ALIAS),
        ("aten.split.Tensor", Contract.ALIAS),
        ("aten.add_.Tensor", Contract.MUTATE),
        ("aten.nonzero.default", Contract.DYNAMIC),
        ("aten._local_scalar_dense.default", Contract.DYNAMIC),
        ("callable:while_loop", Contract.FRESH),
    ],
)
def test_other_contracts(target: str, expected: Contract) -> None:
    assert contract(target, "cpu").contract is expected


def test_a_gpu_has_its_own_table() -> None:
    assert contract("aten.mm.default", "cuda:0").out_target == "aten.mm.out"
    assert contract("aten.cumsum.default", "cuda:0").contract is Contract.FRESH
