"""Memory registered with NCCL: collectives in an arena of it, and that it goes with its process group.

``torchrun --nproc-per-node N -m tests.gpu.check_registered`` (one GPU is enough: N = 1). All-reduce, all-gather,
reduce-scatter, all-to-all and broadcast in the arena give the bits that they give in plain memory; the device has the
arena's bytes back after `destroy_process_group`; and processes end well, which is for who runs this to see, whichever
went first: with ``--late`` the group is ended behind memplan's back, and the bytes stay with torch's allocator.
"""

from __future__ import annotations

import os

os.environ.setdefault("NCCL_NVLS_ENABLE", "0")

import argparse
import json
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from memplan.ir.communication import Memory
from memplan.runtime.arenas import ArenaUse
from memplan.runtime.communication_times import collective_call, operands

KINDS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast")


def result(kind: str, memory: torch.Tensor, nbytes: int, group: dist.ProcessGroup) -> torch.Tensor:
    """What a collective of a message of so many bytes gives, working in the memory."""
    half = memory.numel() // 2
    given, out = operands(kind, nbytes, group.size(), memory[:half], memory[half:], torch.float32)
    values = torch.arange(half // 4, device=memory.device) % 97 + group.rank()
    given.copy_(values[: given.numel()])
    out.copy_(values[: out.numel()])
    call = collective_call(kind, "library", given, out, group)
    assert call is not None
    call()
    torch.cuda.synchronize()
    return out.clone()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nbytes", type=int, default=64 * 2**20, help="of a message")
    parser.add_argument("--late", action="store_true", help="end the group without memplan knowing")
    args = parser.parse_args()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", timeout=timedelta(seconds=60))
    group = dist.group.WORLD
    assert group is not None
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved(device)
    use = ArenaUse(group.group_name, str(device), 2 * args.nbytes, lambda: None, Memory.REGISTERED)
    use.arena.grow(args.nbytes, 1)
    use.arena.grow(2 * args.nbytes, 2)  # the first allocation is given back
    torch.cuda.empty_cache()
    held = torch.cuda.memory_reserved(device) - before
    plain = torch.empty(2 * args.nbytes, dtype=torch.uint8, device=device)
    wrong = [
        kind
        for kind in KINDS
        if not torch.equal(result(kind, use(), args.nbytes, group), result(kind, plain, args.nbytes, group))
    ]
    rank = dist.get_rank()
    del plain
    end = distributed_c10d.destroy_process_group
    (end.__wrapped__ if args.late else end)()  # type: ignore[attr-defined]
    use.arena.release()  # as the thread that watches over it does
    torch.cuda.empty_cache()
    left = torch.cuda.memory_reserved(device) - before
    print(json.dumps({"rank": rank, "late": args.late, "wrong": wrong, "held": held, "left": left}), flush=True)
    if wrong or held != 2 * args.nbytes or left != (held if args.late else 0):
        raise SystemExit("memory registered with NCCL is not as it should be")


if __name__ == "__main__":
    main()
