"""``memplan::convolution.out``: ``aten::convolution`` into a given tensor.

``aten::convolution.out`` allocates its result and copies it. cuDNN's own operator, ``aten::cudnn_convolution.out``,
writes where it is told to, and is what eager ends up with: the same algorithm, so the same bits. Which backend eager
takes is decided when a program is compiled (`memplan.convolutions`); what the user may set later
(``torch.backends.cudnn``) is read at every call, as eager reads it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

LIBRARY = torch.library.Library("memplan", "FRAGMENT")  # type: ignore[no-untyped-call]

if not hasattr(torch.ops.memplan, "convolution"):
    LIBRARY.define(  # type: ignore[no-untyped-call]
        "convolution.out(Tensor input, Tensor weight, Tensor? bias, SymInt[] stride, SymInt[] padding,"
        " SymInt[] dilation, bool transposed, SymInt[] output_padding, SymInt groups, *, Tensor(a!) out) -> Tensor(a!)"
    )


def cudnn_flags() -> tuple[bool, bool, bool]:
    """benchmark, deterministic, allow_tf32: as ``at::convolution`` asks for them."""
    deterministic = torch._C._get_cudnn_deterministic() or torch._C._get_deterministic_algorithms()
    return torch._C._get_cudnn_benchmark(), deterministic, allows_tf32()


def allows_tf32() -> bool:
    """Whether float32 convolutions may use TF32."""
    return bool(torch._C._get_fp32_precision_getter("cuda", "conv") == "tf32")


def convolution_out(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    *,
    out: Tensor,
) -> Tensor:
    """``aten.convolution`` into ``out``, which has the layout that it would return; not transposed."""
    if not torch._C._get_cudnn_enabled():
        found = torch.ops.aten.convolution.default(
            input, weight, bias, stride, padding, dilation, transposed, output_padding, groups
        )
        return out.copy_(found)
    target = out
    if input.dim() == 3:  # as eager does it: a picture of one row
        input, weight, target = input.unsqueeze(2), weight.unsqueeze(2), out.unsqueeze(2)
        stride, padding, dilation = (1, *stride), (0, *padding), (1, *dilation)
    torch.ops.aten.cudnn_convolution.out(input, weight, padding, stride, dilation, groups, *cudnn_flags(), out=target)
    if bias is not None:
        out.add_(bias.reshape(1, -1, *([1] * (out.dim() - 2))))
    return out


LIBRARY.impl("convolution.out", convolution_out, "CUDA")  # type: ignore[no-untyped-call]
