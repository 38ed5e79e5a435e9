"""Record what the CUDA caching allocator really did in a few training steps, as data for the simulator's tests.

    python benchmarks/record_allocator_trace.py tests/data/allocator [--expandable]

Each file is gzip JSON: ``{name, torch, device, expandable, events: [[key, size or null, stream]], segments: [address of
each as it was made; none with expandable segments], checks: [[index,
{allocated, requested, reserved, peak_allocated, peak_requested, peak_reserved}]]}``; a check holds after that many
events. ``events`` are requests as they were made, in order, so that replaying them must reproduce every check.
The sizes that the allocator's own trace names are rounded; the requested ones are read from memory_stats where the
trace lacks them, so ``requested`` may be absent from a check.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path

STATS = {"allocated": "allocated_bytes.all", "requested": "requested_bytes.all", "reserved": "reserved_bytes.all"}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--expandable", action="store_true")
    return parser.parse_args()


def stats() -> dict[str, int]:
    """Current and peak bytes, counted by the allocator."""
    import torch

    torch.cuda.init()  # type: ignore[no-untyped-call]
    now = torch.cuda.memory_stats()
    current = {name: int(now[f"{key}.current"]) for name, key in STATS.items()}
    return current | {f"peak_{name}": int(now[f"{key}.peak"]) for name, key in STATS.items()}


def convolutions() -> Callable[[], None]:
    """A small residual network on images."""
    import torch
    from torch import nn

    class Block(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.body = nn.Sequential(
                nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
                nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width),
            )  # fmt: skip

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(x + self.body(x))

    stem = [nn.Conv2d(3, 48, 7, 2, 3), *[Block(48) for _ in range(3)], nn.Conv2d(48, 96, 3, 2, 1)]
    head = [*[Block(96) for _ in range(3)], nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, 100)]
    model = nn.Sequential(*stem, *head).cuda()
    optimizer = torch.optim.AdamW(model.parameters())

    def step() -> None:
        images = torch.randn(24, 3, 160, 160, device="cuda")
        optimizer.zero_grad()
        model(images).square().mean().backward()
        optimizer.step()

    return step


def transformer() -> Callable[[], None]:
    """A transformer whose batches change in length, so that the allocator fragments."""
    import itertools

    import torch
    from torch import nn

    layer = nn.TransformerEncoderLayer(384, 6, 1536, batch_first=True, dropout=0.0)
    model = nn.Sequential(nn.Embedding(8000, 384), nn.TransformerEncoder(layer, 4), nn.Linear(384, 8000)).cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    lengths = itertools.cycle((129, 256, 77, 200))

    def step() -> None:
        tokens = torch.randint(8000, (6, next(lengths)), device="cuda")
        optimizer.zero_grad()
        model(tokens).float().logsumexp(-1).mean().backward()
        optimizer.step()

    return step


def mixed_sizes() -> Callable[[], None]:
    """Tensors of sizes around each threshold of the allocator, freed in a fixed irregular order."""
    import random

    import torch

    generator = random.Random(7)
    held: list[torch.Tensor] = []
    marks = (1, 511, 512, 513, 4096, 2**20 - 512, 2**20, 2**20 + 1, 5 * 2**20, 10 * 2**20 - 1, 10 * 2**20, 33 * 2**20)

    def step() -> None:
        for _ in range(400):
            size = max(1, generator.choice(marks) + generator.choice((-700, -1, 0, 1, 700)))
            held.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
            while len(held) > 40 or (held and generator.random() < 0.35):
                held.pop(generator.randrange(len(held)))

    return step


class Recorder:
    """Turns the allocator's trace entries into events; only entries after `start` count."""

    def __init__(self) -> None:
        self.events: list[tuple[int, int | None, int]] = []
        self.checks: list[tuple[int, dict[str, int]]] = []
        self.segments: list[int] = []
        self._keys: dict[int, int] = {}
        self._streams: dict[int, int] = {}
        self._seen = 0

    def start(self) -> None:
        import torch

        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.memory._record_memory_history(enabled="all", context=None, stacks="python", max_entries=2_000_000)

    def check(self) -> None:
        """Take over what happened since the last check, and the statistics now."""
        import torch

        torch.cuda.synchronize()
        trace = torch.cuda.memory._snapshot()["device_traces"][torch.cuda.current_device()]
        for entry in trace[self._seen :]:
            self._add(entry["action"], int(entry["addr"]) if "addr" in entry else 0, int(entry["size"]),
                      int(entry.get("stream", 0)))  # fmt: skip
        self._seen = len(trace)
        self.checks.append((len(self.events), stats()))

    def _add(self, action: str, address: int, size: int, stream: int) -> None:
        if action == "alloc":
            self._keys[address] = len(self.events)
            self.events.append((len(self.events), size, self._streams.setdefault(stream, len(self._streams))))
        elif action == "segment_alloc":
            self.segments.append(address)
        elif action == "free_completed" and address in self._keys:
            self.events.append((self._keys.pop(address), None, 0))

    def stop(self) -> None:
        import torch

        torch.cuda.memory._record_memory_history(enabled=None)


def record(name: str, make: Callable[[], Callable[[], None]], folder: Path, expandable: bool) -> None:
    """Record a model from an empty allocator through its construction and four steps."""
    import torch

    recorder = Recorder()
    base = stats()
    recorder.start()
    step = make()
    recorder.check()
    for _ in range(4):
        step()
        recorder.check()
    recorder.stop()
    if base["allocated"] or torch.cuda.memory_stats()["num_alloc_retries"]:
        raise SystemExit(f"{name}: the allocator was not empty at the start, or ran out of memory: record it alone")
    data = {
        "name": name,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(),
        "expandable": expandable,
        "events": recorder.events,
        "segments": recorder.segments,
        "checks": recorder.checks,
    }
    path = folder / f"{name}{'-expandable' if expandable else ''}.json.gz"
    path.write_bytes(gzip.compress(json.dumps(data, separators=(",", ":")).encode(), mtime=0))
    print(f"{path}: {len(recorder.events)} events, {path.stat().st_size} bytes, {recorder.checks[-1][1]}")


def main() -> None:
    arguments = parse()
    if arguments.expandable:
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    import multiprocessing

    arguments.folder.mkdir(parents=True, exist_ok=True)
    for make in (convolutions, transformer, mixed_sizes):  # each in its own process: each starts empty
        process = multiprocessing.get_context("spawn").Process(
            target=record, args=(make.__name__, make, arguments.folder, arguments.expandable)
        )
        process.start()
        process.join()
        if process.exitcode:
            raise SystemExit(f"{make.__name__}: exit code {process.exitcode}")


if __name__ == "__main__":
    main()
