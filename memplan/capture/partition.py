"""The joint graph cut into forward and backward.

The cut is torch's minimum cut (Chen et al. and the "aggressive" variants of
`torch._functorch.partitioners`), told to recompute whatever a fused kernel recomputes for nothing; then what is saved
is narrowed: one storage once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch._functorch.config as functorch_config
import torch.fx
from functorch.compile import min_cut_rematerialization_partition

from ..ir.config import Config
from .dropout import seed_dropout


@dataclass
class Partitioned:
    """What the partitioner learned, for the compilers that AOTAutograd calls next."""

    forward_outputs: int = 0
    forward: torch.fx.GraphModule | None = None
    backward: torch.fx.GraphModule | None = None


def partitioner(config: Config, found: Partitioned) -> Callable[..., tuple[torch.fx.GraphModule, torch.fx.GraphModule]]:
    """A partition function for AOTAutograd; ``found`` is filled in when it runs."""

    def partition(
        joint: torch.fx.GraphModule, inputs: object, *, num_fwd_outputs: int, **kwargs: object
    ) -> tuple[torch.fx.GraphModule, torch.fx.GraphModule]:
        if config.random == "fast":
            seed_dropout(joint)
        changes: dict[str, object] = {"recompute_views": True}
        if config.enabled("rematerialize") and config.recompute_time > 0:
            changes |= {
                "ban_recompute_used_far_apart": False,
                "ban_recompute_long_fusible_chains": False,
                "ban_recompute_materialized_backward": False,
                "ban_recompute_not_in_allowlist": False,
                "ban_recompute_reductions": False,
            }
        with functorch_config.patch(changes):
            forward, backward = min_cut_rematerialization_partition(
                joint, inputs, num_fwd_outputs=num_fwd_outputs, **kwargs
            )
        found.forward_outputs = num_fwd_outputs
        found.forward, found.backward = forward, backward
        return forward, backward

    return partition
