"""torch's own samples: the first one of every operator, as it is and not contiguous, forward and backward.

Every ATen call that they come to (after memplan's decompositions) is lowered, verified, run by the reference
evaluator and compared with eager.
"""

from __future__ import annotations

import pytest
import torch
from torch.testing._internal.common_methods_invocations import op_db

from tests.lowering.harness import LoweringMode

#: sgn's gradient of a real input is a zero tensor without storage, which no kernel is asked for
STORAGELESS = "aten._efficientzerotensor.default"

GROUPS = 12


def samples(op, dtype: torch.dtype, grad: bool):  # type: ignore[no-untyped-def]
    first = next(iter(op.sample_inputs("cpu", dtype, requires_grad=grad)), None)
    if first is None:
        return
    yield first
    leaves = torch.utils._pytree.tree_leaves((first.input, first.args, first.kwargs))
    if grad and all(t.layout is torch.strided for t in leaves if isinstance(t, torch.Tensor)):
        yield first.noncontiguous()


def run(op, sample, grad: bool) -> None:  # type: ignore[no-untyped-def]
    out = op(sample.input, *sample.args, **sample.kwargs)
    if not grad:
        return
    leaves = [t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor) and t.requires_grad]
    real = [t for t in leaves if not t.is_complex()]
    if real:
        sum(t.sum() for t in real).backward()


def eager_refuses(op, sample, grad: bool) -> bool:  # type: ignore[no-untyped-def]
    """Some operators take no strided input, some no empty one: eager's own refusal is no matter of ours."""
    for leaf in torch.utils._pytree.tree_leaves((sample.input, sample.args, sample.kwargs)):
        if isinstance(leaf, torch.Tensor):
            leaf.grad = None
    try:
        run(op, sample, grad)
    except (RuntimeError, ValueError, TypeError, NotImplementedError):
        return True
    return False


def check_group(ops, dtype: torch.dtype) -> LoweringMode:  # type: ignore[no-untyped-def]
    mode = LoweringMode(collect=True, largest=1 << 12)
    for op in ops:
        if dtype not in op.supported_dtypes("cpu") or op.name.startswith("jiterator"):
            continue
        grad = op.supports_autograd and dtype is torch.float32
        for sample in samples(op, dtype, grad):
            try:
                with mode:
                    run(op, sample, grad)
            except (RuntimeError, ValueError, TypeError, NotImplementedError):
                if not eager_refuses(op, sample, grad):
                    raise
    return mode


@pytest.mark.parametrize("group", range(GROUPS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool], ids=str)
def test_first_samples(group: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    mode = check_group(op_db[group::GROUPS], dtype)
    wrong = [f"{target}: {message}" for target, message in mode.failures if target != STORAGELESS]
    assert not wrong, "\n\n".join(wrong[:5])
    assert mode.lowered
