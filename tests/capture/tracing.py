"""`torch.compile` through memplan's capture alone: nothing is planned, printed or built.

Dynamo and AOTAutograd run as they do under memplan, with memplan's partitioner and decompositions; what they hand over
is captured as a `Program`, and the program runs plainly (see `tests.program_runner`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.fx
from torch._dynamo.backends.common import aot_autograd

from memplan.backend import chooser
from memplan.capture.attention import Simplified, simplify_masks
from memplan.capture.fx import capture
from memplan.capture.layout import convolutions_channels_last
from memplan.capture.partition import Partitioned, partitioner
from memplan.ir.config import Config
from memplan.ir.program import Extern, Phase, Program, View, evaluate
from memplan.ir.verify import verify_program
from memplan.lowering.decompositions import decomposition_table
from tests.program_runner import run_program


@dataclass
class Traced:
    """The graphs of a function, its programs, and what was made of its attention masks."""

    config: Config
    graphs: dict[Phase, torch.fx.GraphModule] = field(default_factory=dict)
    programs: dict[Phase, Program] = field(default_factory=dict)
    masks: list[Simplified] = field(default_factory=list)
    partitioned: Partitioned = field(default_factory=Partitioned)
    dynamo: torch.fx.GraphModule | None = None

    def backend(self, module: torch.fx.GraphModule, inputs: Sequence[object]) -> Callable[..., object]:
        self.masks.append(simplify_masks(module))
        self.dynamo = module
        compiler = aot_autograd(
            fw_compiler=self.compiler(Phase.FORWARD),
            bw_compiler=self.compiler(Phase.BACKWARD),
            inference_compiler=self.compiler(Phase.INFERENCE),
            partition_fn=partitioner(self.config, self.partitioned, chooser(self.config)),
            decompositions=decomposition_table(self.config),
            keep_inference_input_mutations=True,
        )
        return compiler(module, inputs)  # type: ignore[no-any-return]

    def compiler(self, phase: Phase) -> Callable[..., Callable[..., object]]:
        def compile_graph(module: torch.fx.GraphModule, _: Sequence[object]) -> Callable[..., object]:
            if phase is Phase.INFERENCE and self.config.enabled("layout"):
                convolutions_channels_last(module)
            saved: frozenset[int] = frozenset()
            if phase is Phase.FORWARD:
                count = len(module.graph.output_node().args[0])  # type: ignore[arg-type]
                saved = frozenset(range(self.partitioned.forward_outputs, count))
            program = capture(module, phase, name=phase.value, saved_outputs=saved)
            verify_program(program)
            self.graphs[phase], self.programs[phase] = module, program

            def run(args: list[object]) -> object:
                given = list(args)
                args.clear()
                return tuple(run_program(program, given))

            run._boxed_call = True  # type: ignore[attr-defined]
            return run

        return compile_graph

    @property
    def forward(self) -> torch.fx.GraphModule:
        return self.graphs[Phase.FORWARD]

    @property
    def backward(self) -> torch.fx.GraphModule:
        return self.graphs[Phase.BACKWARD]

    @property
    def saved_bytes(self) -> int:
        """Bytes of distinct storages that the forward makes and keeps for the backward."""
        program = self.programs[Phase.FORWARD]
        kept = {o.buffer for o in program.outputs[self.partitioned.forward_outputs :] if isinstance(o, View)}
        inputs = {i.view.buffer for i in program.inputs if hasattr(i, "view")}
        return sum(program.nbytes(b) for b in kept - inputs)

    @property
    def largest_buffer(self) -> int:
        """Bytes of the largest thing that any of the programs makes."""
        sizes = []
        for program in self.programs.values():
            made = {b for op in program.operations for b in op.writes}
            sizes += [evaluate(program.buffers[b].nbytes, program.hints) for b in made]
        return max(sizes, default=0)

    def targets(self, phase: Phase) -> list[str]:
        """Names of the operators of a program's calls, in order."""
        return [op.target for op in self.programs[phase].operations if isinstance(op, Extern)]


def traced(
    function: Callable[..., object], *, dynamic: bool | None = False, fullgraph: bool = True, **options: object
) -> tuple[Callable[..., object], Traced]:
    """``function`` compiled for capture alone, and what will be learned when it is called."""
    found = Traced(Config.from_options(options))
    compiled = torch.compile(function, backend=found.backend, dynamic=dynamic, fullgraph=fullgraph)
    return compiled, found  # type: ignore[return-value]
