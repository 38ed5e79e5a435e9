"""The tuning block: printed from the wrapper's lines, run on buffers made for it."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import memplan
from memplan import kernel_tuning, template_tuning
from memplan.codegen.triton_kernel import TritonKernel
from memplan.codegen.tuning_block import TuningBlock
from memplan.codegen.wrapper_lines import WrapperProgram
from memplan.runtime import cuda_launch
from tests.fake_gpu import FakeGpu, Launched, make_fake_gpu


class Tokens(nn.Module):
    """An embedding, a norm, a product, a loss: indices on the way in and at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 96)
        self.norm = nn.LayerNorm(96)
        self.head = nn.Linear(96, 50)

    def forward(self, tokens: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(self.head(F.gelu(self.norm(self.table(tokens)))), target)


class OnCpu(kernel_tuning.Bench):
    def __init__(self, *rest: object) -> None:
        super().__init__(*rest)  # type: ignore[arg-type]
        self.indices: list[Tensor] = []

    def reserve(self, device: str, nbytes: int) -> None:
        assert device == "cuda:0"
        super().reserve("cpu", nbytes)

    def buffer(self, offset: int, nbytes: int, dtype: str, below: int = 0) -> Tensor:
        made = super().buffer(offset, nbytes, dtype, below)
        if below:
            self.indices.append(made.clone())
        return made


@dataclass
class Tuned:
    """What was printed and timed."""

    blocks: list[tuple[WrapperProgram, TuningBlock]] = field(default_factory=list)
    benches: list[OnCpu] = field(default_factory=list)
    runs: list[tuple[range, TritonKernel, Launched]] = field(default_factory=list)  # with the arena's addresses

    @property
    def indices(self) -> list[Tensor]:
        """What index buffers held."""
        return [values for bench in self.benches for values in bench.indices]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    yield make_fake_gpu(monkeypatch)
    monkeypatch.undo()
    cuda_launch.native_launch.cache_clear()


@pytest.fixture
def tuned(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> Iterator[Tuned]:
    """Kernels are timed on the fake GPU: the last configuration is always the fastest."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # among several, atomic additions of floats have no fixed order
    found = Tuned()
    print_tuning = kernel_tuning.print_tuning

    def printed(program: WrapperProgram, *rest: object) -> TuningBlock:
        block = print_tuning(program, *rest)  # type: ignore[arg-type]
        found.blocks.append((program, block))
        return block

    def times(runs: Sequence[Callable[[], None]]) -> list[float]:
        arena = found.benches[-1].arena
        assert arena is not None
        inside = range(arena.data_ptr(), arena.data_ptr() + arena.nbytes + 1)
        for run in runs:
            before = len(gpu.launches())
            run()
            found.runs += [(inside, gpu.kernel(launched), launched) for launched in gpu.launches()[before:]]
            once = arena.clone()
            run()
            assert torch.equal(arena, once)
        return [10.0 - k for k in range(len(runs))]

    def bench(kernels: Mapping[str, TritonKernel]) -> OnCpu:
        found.benches.append(OnCpu(kernels, times))
        return found.benches[-1]

    monkeypatch.setattr(kernel_tuning, "print_tuning", printed)
    monkeypatch.setattr(kernel_tuning, "Bench", bench)
    monkeypatch.setattr(kernel_tuning, "compile_builds", gpu.compile_builds)
    monkeypatch.setattr(memplan.compilation, "tuning_wanted", lambda config: config.max_autotune)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "no GPU at all")
    yield found
    torch.set_num_threads(threads)


def step(folder: Path, **options: object) -> tuple[list[Tensor], memplan.recording.Recording]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Tokens()
    given = {"cache_dir": str(folder), "pools": "never", **options}
    with memplan.record() as recording:
        loss = torch.compile(model, backend="memplan", options=given)(torch.arange(4096) % 50, torch.arange(4096) % 7)
        loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)], recording


def choices(source: str) -> list[tuple[str, list[str], list[int]]]:
    """(kernel, its arguments' names, its sizes) of every choice of a block."""
    found = []
    for call in ast.walk(ast.parse(source)):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "choose":
            name, arguments = call.args
            assert isinstance(name, ast.Constant)
            assert isinstance(arguments, ast.Tuple)
            sizes = [ast.literal_eval(k.value) for k in call.keywords if k.arg == "sizes"]
            names = [a.id for a in arguments.elts if isinstance(a, ast.Name)]
            found.append((name.value, names, list(sizes[0].values()) if sizes else []))
    return found


def launches(source: str) -> dict[str, list[str]]:
    """The first launch of every kernel in a C++ wrapper: its arguments' texts."""
    arrays = dict(re.findall(r"uint64_t (l\d+)\[\] = \{(.*)\};", source))
    found: dict[str, list[str]] = {}
    for name, array in re.findall(r'MP_LAUNCH\(\d+, "(\w+)", .*, f\.stream0, (l\d+)\);', source):
        texts = re.findall(r"\(uint64_t\)\(([^()]*|\([^()]*\))\)", arrays[array])
        found.setdefault(name, texts)
    return found


def test_tuning_in_python_and_model_in_cpp_come_from_the_same_walk(gpu: FakeGpu, tuned: Tuned, tmp_path: Path) -> None:
    """The same kernels in the same order, each on the same buffers in the same order, as large as the plan says."""
    _, recording = step(tmp_path, wrapper="cpp", max_autotune=True)
    assert len(tuned.blocks) == len(recording.graphs) == 2
    for (program, block), graph in zip(tuned.blocks, recording.graphs, strict=True):
        plan = program.plan
        of_model = launches(graph.wrapper)
        chosen = choices(block.source)
        assert chosen
        assert tuple(n for n, _, _ in chosen) == block.kernels
        assert [n for n in of_model if n in block.kernels] == list(block.kernels)
        assert set(of_model) - set(block.kernels) == set(block.left_out) | {
            n for n in of_model if len(gpu.emitted[n][1].configs) == 1
        }
        sizes = dict(re.findall(r"^    (\w+) = bench\.buffer\(\d+, (\d+),", block.source, re.MULTILINE))
        for name, arguments, numbers in chosen:
            buffers = [t.removeprefix("p.") for t in of_model[name][: len(arguments)]]
            assert [plan.storage_of(b) for b in buffers] == arguments
            assert len(of_model[name]) == len(arguments) + len(numbers)
            assert all(int(sizes[a]) >= plan.program.nbytes(b) for a, b in zip(arguments, buffers, strict=True))


def test_what_was_chosen_is_what_runs(gpu: FakeGpu, tuned: Tuned, tmp_path: Path) -> None:
    plain, untuned = step(tmp_path, wrapper="cpp")
    assert not tuned.blocks
    gpu.reset()
    found, recording = step(tmp_path, wrapper="cpp", max_autotune=True)
    for a, b in zip(plain, found, strict=True):
        assert torch.equal(a, b)
    assert [g.wrapper for g in recording.graphs] == [g.wrapper for g in untuned.graphs]  # no tuning is in any wrapper
    assert [g.plan.placements for g in recording.graphs] == [g.plan.placements for g in untuned.graphs]
    timed = {n: gpu.emitted[n][1].configs for bench in tuned.benches for n in bench.chosen}
    last = {n: configs[-1].num_warps for n, configs in timed.items()}
    ran = {k.kernel: k.block[0] // 32 for k in gpu.launches()}
    assert any(configs[0].num_warps != configs[-1].num_warps for configs in timed.values())
    assert {n: ran[n] for n in last if n in ran} == {n: w for n, w in last.items() if n in ran}

    blocks = len(tuned.blocks)
    again, _ = step(tmp_path, wrapper="python", max_autotune=True)
    assert len(tuned.blocks) == blocks  # what was found is kept
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_indices_are_in_range(tuned: Tuned, tmp_path: Path) -> None:
    step(tmp_path, wrapper="cpp", max_autotune=True)
    limits = re.findall(r'"int64", below=(\d+)\)', "".join(block.source for _, block in tuned.blocks))
    assert set(limits) == {"50"}
    assert tuned.indices
    for values in tuned.indices:
        assert 0 <= int(values.min()) < int(values.max()) < 50


def test_nothing_but_the_arena_is_touched(tuned: Tuned, tmp_path: Path) -> None:
    """No input of the model is cloned or written for tuning, and all that is taken is an arena as the plan allows."""
    _, recording = step(tmp_path, wrapper="cpp", max_autotune=True)
    assert len({kernel.name for _, kernel, _ in tuned.runs}) == len({n for _, b in tuned.blocks for n in b.kernels})
    for inside, kernel, launched in tuned.runs:
        addresses = launched.arguments[: len(launched.arguments) - len(kernel.symbols)]
        assert addresses
        assert all(address in inside for address in addresses)
    for (_, block), graph in zip(tuned.blocks, recording.graphs, strict=True):
        assert 0 < block.nbytes <= max(graph.plan.timeline) + kernel_tuning.ALLOWANCE
    assert [b.arena for b in tuned.benches] == [None] * len(tuned.benches)
    of_library = 32 << 20  # a workspace of cuBLAS on an H100, which a model that is all templates does not take
    assert max(kernel_tuning.ALLOWANCE, template_tuning.ALLOWANCE + of_library) < 64 << 20


def counted(x: Tensor, seen: Tensor) -> Tensor:
    seen += x.sum(0)
    return x * seen


def test_what_a_kernel_changes_is_the_same_before_every_run(tuned: Tuned, tmp_path: Path) -> None:
    """The fixture's timer runs everything twice and compares."""
    options = {"cache_dir": str(tmp_path), "max_autotune": True, "pools": "never"}
    x, seen = torch.randn(64, 6000), torch.zeros(6000)
    torch.compile(counted, backend="memplan", options=options)(x, seen)
    torch.testing.assert_close(seen, x.sum(0))
    assert "restored=" in "".join(block.source for _, block in tuned.blocks)


def test_what_needs_more_than_the_plan_leaves_is_not_timed(
    tuned: Tuned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_tuning, "ALLOWANCE", 0)
    _, recording = step(tmp_path, wrapper="cpp", max_autotune=True)
    assert any(block.left_out for _, block in tuned.blocks)
    for (program, block), graph in zip(tuned.blocks, recording.graphs, strict=True):
        assert block.nbytes <= max(program.plan.timeline) == max(graph.plan.timeline)
        for name, reason in block.left_out.items():
            assert f"# {name} keeps its first configuration: {reason}" in block.source


def unchecked(table: Tensor, rows: Tensor) -> Tensor:
    return table[rows * 3 - 2].sin()


def test_positions_that_are_not_known_to_be_inside_are_not_timed(tuned: Tuned, tmp_path: Path) -> None:
    """Zero would be no index of a table with one row."""
    options = {"cache_dir": str(tmp_path), "max_autotune": True}
    table, rows = torch.randn(7, 4000), torch.tensor([1, 2] * 100)
    found = torch.compile(unchecked, backend="memplan", options=options)(table, rows)
    torch.testing.assert_close(found, unchecked(table, rows))
    ((_, block),) = tuned.blocks
    assert not block.kernels
    assert block.left_out


def test_an_arena_that_cannot_be_had_is_no_error(
    tuned: Tuned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(bench: OnCpu, device: str, nbytes: int) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 bytes")

    monkeypatch.setattr(OnCpu, "reserve", full)
    found, _ = step(tmp_path, wrapper="cpp", max_autotune=True)
    assert "keep their first configuration: CUDA out of memory" in caplog.text
    plain, _ = step(tmp_path, wrapper="cpp")
    assert all(torch.equal(a, b) for a, b in zip(plain, found, strict=True))
