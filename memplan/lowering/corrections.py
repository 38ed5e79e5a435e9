"""torch's decompositions that give other answers than its kernels, put right while memplan traces.

``multilabel_margin_loss``: torch's own (2.11 to 2.14) adds margins against class 0 for every label behind the first -1,
which its kernels, and the documentation, leave out.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

aten = torch.ops.aten
_MEAN, _SUM = 1, 2


def multilabel_margin_loss_forward(input: Tensor, target: Tensor, reduction: int) -> tuple[Tensor, Tensor]:
    """The loss, and which classes are targets; ``input`` and ``target`` are (N, C), (C,) or a number each."""
    scores, labels = (t if t.dim() == 2 else t.reshape(1, -1) for t in (input, target))
    count = scores.shape[1]
    classes = torch.arange(count, device=target.device)
    end = torch.where(labels == -1, classes, count).amin(-1, keepdim=True)
    given = classes < end  # (N, label)
    is_target = ((classes == labels.unsqueeze(-1)) & given.unsqueeze(-1)).any(1)  # (N, class)
    of_labels = scores.gather(-1, torch.where(given, labels, 0))
    margins = (1 - of_labels.unsqueeze(-1) + scores.unsqueeze(1)).clamp_min(0) / count  # (N, label, class)
    counted = given.unsqueeze(-1) & ~is_target.unsqueeze(1)
    loss = torch.where(counted, margins, 0).sum((1, 2)).reshape(target.shape[:-1])
    if reduction == _SUM:
        loss = loss.sum()
    elif reduction == _MEAN:
        loss = loss.mean()
    return loss, is_target.to(input.dtype).reshape(target.shape)


@contextmanager
def corrected() -> Iterator[None]:
    """torch's dispatch with the right one, for autograd too. (Compilation holds Dynamo's lock meanwhile.)"""
    operator = aten.multilabel_margin_loss_forward.default
    key = torch._C.DispatchKey.Autograd
    theirs = operator.py_kernels.get(key)
    if theirs is None:
        yield
        return
    try:
        operator.py_kernels[key] = multilabel_margin_loss_forward
        operator._dispatch_cache.clear()
        yield
    finally:
        operator.py_kernels[key] = theirs
        operator._dispatch_cache.clear()
