"""``memplan report TARGET --fake`` beside what import, Dynamo and AOTAutograd take for the same model.

python -m benchmarks.report_time [MODEL ...] [--runs 3] [-o benchmarks/results/report_time.md]

Every measurement is a process of its own, timed from its start to its end in seconds of the processor; the two kinds
take turns, and medians are compared. The base imports torch, makes the model, and traces it on fake tensors through
Dynamo and AOTAutograd with compilers that do nothing and torch's own partitioner. (Models of transformers: importing
that library is a part of both.)
"""

from __future__ import annotations

import argparse
import copy
import os
import platform
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

from .models import bert, gpt2, images, llama, small_images, tokens

F32 = torch.float32
Made = tuple[nn.Module, tuple[torch.Tensor, ...]]
SMALL = {"hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 4}


def gpt2_12() -> Made:
    shape = {"n_layer": 12, "n_embd": 64, "n_head": 4, "vocab_size": 1000, "n_positions": 128}
    return gpt2(F32, **shape)().train(), tokens(1000, 2, 64)()


def llama_16() -> Made:
    shape = {**SMALL, "num_hidden_layers": 16, "num_key_value_heads": 2, "vocab_size": 1000}
    return llama(F32, max_position_embeddings=128, **shape)().train(), tokens(1000, 2, 64)()


def bert_12() -> Made:
    shape = {**SMALL, "num_hidden_layers": 12, "vocab_size": 1000, "max_position_embeddings": 128}
    return bert(F32, **shape)().train(), tokens(1000, 2, 64)()


def resnet() -> Made:
    return small_images("resnet")().train(), images(2, 64, 10)()


FACTORIES: dict[str, Callable[[], Made]] = {"gpt2": gpt2_12, "llama": llama_16, "bert": bert_12, "resnet": resnet}


def trace(name: str) -> None:
    """The base: Dynamo and AOTAutograd alone, on fake tensors."""
    from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils import _pytree as pytree

    def compiler(module: torch.fx.GraphModule, inputs: object) -> Callable[..., object]:
        return make_boxed_func(module.forward)  # type: ignore[no-any-return]

    model, batch = FACTORIES[name]()
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    memo: dict[int, object] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        made: torch.Tensor = mode.from_tensor(tensor)
        memo[id(tensor)] = nn.Parameter(made) if isinstance(tensor, nn.Parameter) else made
    model = copy.deepcopy(model, memo)
    backend = aot_autograd(fw_compiler=compiler, bw_compiler=compiler, partition_fn=min_cut_rematerialization_partition)
    with torch._functorch.config.patch(force_non_lazy_backward_lowering=True):
        torch.compile(model, backend=backend)(*pytree.tree_map(mode.from_tensor, batch))


def seconds(arguments: list[str]) -> float:
    """Processor seconds of a process with these arguments to Python."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False, env=env)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{done.stderr[-3000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def compare(name: str, runs: int) -> tuple[float, float]:
    """Median seconds of the base and of the report, in turns."""
    factory = f"benchmarks.report_time:{FACTORIES[name].__name__}"
    base, report = [], []
    for _ in range(runs):
        base.append(seconds(["-m", "benchmarks.report_time", "--trace", name]))
        report.append(seconds(["-m", "memplan.reports.cli", "report", factory, "--fake"]))
    return statistics.median_low(base), statistics.median_low(report)


def table(rows: list[tuple[str, float, float]], runs: int) -> Iterator[str]:
    yield "# memplan report, beside import, Dynamo and AOTAutograd"
    yield ""
    yield (
        f"torch {torch.__version__}, Python {platform.python_version()}, {os.cpu_count()} processors, one thread, load "
        f"{os.getloadavg()[1]:.1f}; processor seconds of whole processes, medians of {runs} in turns. "
        "`python -m benchmarks.report_time`"
    )
    yield ""
    yield "| model | import, Dynamo, AOTAutograd s | memplan report --fake s | ratio |"
    yield "|---|---|---|---|"
    for name, base, report in rows:
        yield f"| {name} | {base:.1f} | {report:.1f} | {report / base:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("models", nargs="*", default=list(FACTORIES))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--trace", metavar="MODEL", help="the base, here")
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    if options.trace:
        trace(options.trace)
        return
    rows = []
    for name in options.models:
        rows.append((name, *compare(name, options.runs)))
        text = "\n".join([*table(rows, options.runs), ""])
        print(text, flush=True)
        if options.output:
            options.output.write_text(text)


if __name__ == "__main__":
    main()
