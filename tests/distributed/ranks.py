"""Processes joined by gloo that run what a test asks them to: started once, torch is slow to import."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import traceback
from collections.abc import Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path

#: seconds until a collective without its peer is an error, and until a test gives up
TIMEOUT = 60


def run_rank(rank: int, world: int, store: str, requests: Connection) -> None:
    """Serve requests (module, function, arguments) until the pipe closes."""
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=TIMEOUT)
    )
    while True:
        try:
            module, function, arguments = requests.recv()
        except EOFError:
            return
        torch._dynamo.reset()
        torch.manual_seed(rank)
        try:
            requests.send((True, getattr(importlib.import_module(module), function)(*arguments)))
        except Exception:
            requests.send((False, traceback.format_exc()))


class Ranks:
    """The processes, by rank."""

    def __init__(self, folder: Path, world: int = 2) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(world):
            mine, theirs = context.Pipe()
            process = context.Process(target=run_rank, args=(rank, world, str(folder / "store"), theirs), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(mine)
            self.processes.append(process)

    def run(self, module: str, function: str, *arguments: object) -> Sequence[object]:
        """What the function returns on each rank.

        Raises
        ------
        AssertionError
            With the traceback of a rank on which it fails.
        """
        outcomes = self.outcomes(module, function, *arguments)
        for rank, (ok, value) in enumerate(outcomes):
            assert ok, f"rank {rank}:\n{value}"
        return [value for _, value in outcomes]

    def outcomes(self, module: str, function: str, *arguments: object) -> list[tuple[bool, object]]:
        for pipe in self.pipes:
            pipe.send((module, function, arguments))
        found = []
        for rank, pipe in enumerate(self.pipes):
            assert pipe.poll(4 * TIMEOUT), f"rank {rank} does not answer to {function}"
            found.append(pipe.recv())
        return found

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join(10)
            if process.is_alive():
                process.kill()
