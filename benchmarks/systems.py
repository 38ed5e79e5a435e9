"""What is compared: eager PyTorch, Inductor and memplan, each with options, written as one word.

``eager``, ``inductor``, ``memplan``; ``inductor-budget=0.5`` (activation_memory_budget);
``memplan-budget=0.5`` (a budget in bytes: that part of the peak that memplan predicts with default options);
``memplan:disable=rematerialize/inplace,random=eager`` or ``inductor:mode=max-autotune`` (options of torch.compile);
``+expandable_segments`` at the end of any of them sets that in the caching allocator.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import nn

EXPANDABLE = "+expandable_segments"


@dataclass(frozen=True)
class System:
    """One way to run a model; ``name`` is the text it was parsed from."""

    name: str
    backend: str
    options: dict[str, object] = field(default_factory=dict)
    mode: str | None = None
    budget: float | None = None
    expandable_segments: bool = False

    @classmethod
    def parse(cls, text: str) -> System:
        """Raises ValueError for a system that does not exist."""
        body = text.removesuffix(EXPANDABLE)
        expandable = body != text
        body, _, given = body.partition(":")
        backend, _, budget = body.partition("-budget=")
        if backend not in ("eager", "inductor", "memplan"):
            raise ValueError(f"unknown system {text!r}; systems are eager, inductor, memplan (with options)")
        options: dict[str, object] = {}
        mode = None
        for item in filter(None, given.split(",")):
            key, equals, value = item.partition("=")
            if not equals:
                raise ValueError(f"{text!r}: an option is written name=value")
            if key == "mode":
                mode = value
            else:
                options[key] = value.split("/") if key == "disable" else _literal(value)
        return cls(text, backend, options, mode, float(budget) if budget else None, expandable)

    def with_eager_random(self) -> System:
        """The same system drawing eager's random numbers, for comparing answers of models with dropout."""
        more = {"memplan": {"random": "eager"}, "inductor": {"fallback_random": True}}.get(self.backend, {})
        return replace(self, options={**self.options, **more})

    def environment(self) -> dict[str, str]:
        """Environment variables that the process needs from its start."""
        if not self.expandable_segments:
            return {}
        setting = "expandable_segments:True"
        return {"PYTORCH_CUDA_ALLOC_CONF": setting, "PYTORCH_ALLOC_CONF": setting}

    def with_bytes(self, module: nn.Module, batch: tuple[torch.Tensor, ...]) -> System:
        """memplan's budget as bytes: planning says what the default needs."""
        if self.backend != "memplan" or self.budget is None:
            return self
        import memplan

        from .prediction import predicted_bytes

        default_options = {k: v for k, v in self.options.items() if k != "offload"}  # that is for budgets
        graphs = memplan.analyze(module, batch, options=default_options)
        torch._dynamo.reset()
        default = predicted_bytes(graphs)["predicted"]
        assert isinstance(default, int)
        return replace(self, options={**self.options, "budget": int(self.budget * default)}, budget=None)

    def compile(self, module: nn.Module) -> Callable[..., torch.Tensor]:
        """The callable to measure: the module itself, or what torch.compile makes of it."""
        if self.backend == "eager":
            return module
        if self.budget is not None:
            import torch._functorch.config as functorch_config

            functorch_config.activation_memory_budget = self.budget
        if self.mode is not None:
            return torch.compile(module, backend=self.backend, mode=self.mode)  # type: ignore[no-any-return]
        return torch.compile(module, backend=self.backend, options=self.options or None)  # type: ignore[no-any-return]


def _literal(text: str) -> object:
    try:
        value: object = ast.literal_eval(text.capitalize() if text in ("true", "false") else text)
    except (ValueError, SyntaxError):
        return text
    return value
