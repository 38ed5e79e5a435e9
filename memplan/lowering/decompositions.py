"""Which operators AOTAutograd takes apart before memplan sees them.

Three groups. What has a lowering of its own stays whole (one node, one kernel, float32 inside for half types). What
has a fast library kernel stays whole (matmuls, convolutions, attention). The rest is taken apart as
`torch._decomp` has it; normalisations and softmax among it on purpose: their statistics are small and are kept for
the backward pass, while the normalised values are pointwise in them and can be recomputed there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial

import torch
from torch import Tensor
from torch._decomp import core_aten_decompositions, get_decompositions

from ..ir.config import Config
from . import lower  # noqa: F401  (registers the lowerings)
from .call_site import LOWERINGS
from .corrections import multilabel_margin_loss_forward
from .operators import efficient_zeros, max_pool2d_with_indices

Table = dict[torch._ops.OperatorBase, Callable[..., object]]
aten = torch.ops.aten

#: taken apart beyond torch's core set
EXTRA = (
    "_batch_norm_no_update", "_batch_norm_with_update", "_batch_norm_with_update_functional", "_log_softmax",
    "_native_batch_norm_legit", "_native_batch_norm_legit_functional", "_native_batch_norm_legit_no_training",
    "_softmax", "addmv", "batch_norm_backward", "dist", "elu", "index_select", "lcm", "linalg_vector_norm",
    "native_batch_norm", "native_group_norm", "native_layer_norm", "permute_copy", "rrelu_with_noise_backward",
    "tril_indices", "triu_indices", "unbind_copy", "upsample_bilinear2d", "hann_window", "var_mean", "std_mean",
    "_to_copy",
)  # fmt: skip

#: taken apart although they have a lowering of their own: their pieces fuse again, and can be recomputed one by one
SPLIT_ANYWAY = frozenset({"aten._softmax.default", "aten._log_softmax.default"})

#: whole, for a library kernel is better than the pieces, or for another stage of memplan takes them
WHOLE = (
    "convolution", "convolution_backward", "_convolution", "mm", "bmm", "addmm", "baddbmm", "mv", "dot", "vdot",
    "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention_for_cpu_backward",
    "_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention", "_scaled_dot_product_fused_attention_overrideable", "native_dropout",
    "_thnn_fused_lstm_cell", "grid_sampler_2d", "cumsum", "cumprod", "index_put_", "embedding_bag", "_embedding_bag",
    "detach", "_weight_norm_interface",
)  # fmt: skip

#: random operators: eager's own calls where eager's own numbers are asked for
RANDOM = (
    "bernoulli", "rrelu", "rrelu_with_noise", "dropout", "alpha_dropout", "feature_dropout", "normal", "uniform",
)  # fmt: skip


def _convolutions(planned_for_gpu: bool, gradients_apart: bool) -> Table:
    """Convolutions without their biases, on a GPU, and whose gradients are calls of their own, under a budget.

    Biases: what is added to results, and the sums that are its gradients. On a GPU torch has a convolution from cuDNN,
    then adds the bias in a pass of its own and sums its gradient in another, which is slow with channels last (0.9 and
    1.4 ms of the 37 of a step of ConvNeXt-B on an H100). As operations they fuse with what comes after or before. On a
    CPU oneDNN does both while it reads and writes for the convolution.

    Gradients: that of the input needs the weight, that of the weight the input, and libraries find them one after the
    other. Apart, an input that is computed again is there for one of them alone, and dropped before the other is born:
    the least that a step of ResNet-50 (256 images) needs falls from 3.49 to 3.36 GB. Without a budget it gains nothing
    there, where the step's peak is elsewhere.
    """

    def convolution(input: Tensor, weight: Tensor, bias: Tensor | None, *geometry: object) -> object:
        if bias is None or not (planned_for_gpu or input.device.type == "cuda"):
            return NotImplemented
        channels = bias.reshape([-1, *[1] * (weight.dim() - 2)])
        return aten.convolution.default(input, weight, None, *geometry) + channels

    def convolution_backward(
        grad_output: Tensor, input: Tensor, weight: Tensor, bias_sizes: Sequence[int] | None, *rest: object
    ) -> object:
        *geometry, mask = rest
        assert isinstance(mask, (list, tuple))
        call = partial(aten.convolution_backward.default, grad_output, input, weight, bias_sizes, *geometry)
        summed = mask[2] and (planned_for_gpu or grad_output.device.type == "cuda")
        apart = gradients_apart and mask[0] and (mask[1] or (mask[2] and not summed))
        if not (summed or apart):
            return NotImplemented
        bias = grad_output.sum([d for d in range(grad_output.dim()) if d != 1]) if summed else None
        left = [mask[0] and not apart, mask[1], mask[2] and not summed]
        of_input, of_weight, of_bias = call(left) if any(left) else (None, None, None)
        if apart:
            of_input = call([True, False, False])[0]
        return of_input, of_weight, bias if summed else of_bias

    return {aten.convolution.default: convolution, aten.convolution_backward.default: convolution_backward}


@lru_cache(maxsize=8)
def _table(eager_random: bool, planned_for_gpu: bool, gradients_apart: bool) -> Table:
    packets = [getattr(aten, name) for name in EXTRA if hasattr(aten, name)]
    table: Table = dict(core_aten_decompositions()) | dict(get_decompositions(packets))
    whole = {f"aten.{name}" for name in (WHOLE + RANDOM if eager_random else WHOLE)}
    kept: Table = {}
    for operator, decomposition in table.items():
        target = str(operator)
        packet = target.rpartition(".")[0] if target.count(".") == 2 else target
        if packet in whole or (target in LOWERINGS and target not in SPLIT_ANYWAY):
            continue
        kept[operator] = decomposition
    kept[aten.max_pool2d_with_indices.default] = max_pool2d_with_indices
    kept[aten._efficientzerotensor.default] = efficient_zeros
    kept[aten.multilabel_margin_loss_forward.default] = multilabel_margin_loss_forward
    return kept | _convolutions(planned_for_gpu, gradients_apart)


def decomposition_table(config: Config) -> Table:
    """Operator to decomposition, for `aot_autograd`; a new dictionary each time, since torch changes what it gets."""
    return dict(_table(config.random == "eager", config.target is not None, config.budget is not None))
