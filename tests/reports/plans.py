"""Plans made by hand and at random, that no planner has seen: what the reports are tested on."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from memplan.ir.plan import Certificate, External, InPlaceOf, InPool, Lifetime, Own, Placement, Plan, Pool
from memplan.ir.program import (
    Buffer,
    BufferKind,
    Contract,
    Extern,
    Origin,
    Phase,
    Program,
    TensorInput,
    View,
)

FLOAT = torch.float32


@dataclass(frozen=True)
class Made:
    """One buffer of a plan made by hand: elements of float32, made by a step, alive over ``[birth, death)``."""

    name: str
    elements: int
    kind: BufferKind
    birth: int
    death: int
    placement: Placement
    origin: Origin = field(default_factory=Origin)
    donated: bool = False


def origin(node: str, line: int, code: str = "", module: str = "", op: str = "aten.mm.default") -> Origin:
    return Origin(node=node, op=op, module=module, file="/home/ann/train.py", line=line, code=code)


def make_plan(
    name: str,
    phase: Phase,
    made: Sequence[Made],
    steps: int,
    pools: tuple[Pool, ...] = (),
    device: str = "cuda:0",
    scratch: dict[int, int] | None = None,
) -> Plan:
    """A plan of ``steps`` extern calls, each writing the buffers born at it; timeline as the allocator counts it."""
    buffers = {m.name: Buffer(m.name, m.elements * 4, FLOAT, device, m.kind, m.origin, donated=m.donated) for m in made}
    views = {m.name: View(m.name, FLOAT, (m.elements,), (1,)) for m in made}
    outside = [m for m in made if isinstance(m.placement, External)]
    inside = [m for m in made if not isinstance(m.placement, External)]
    operations = []
    for k in range(steps):
        born = [m for m in inside if m.birth == k]
        read = [m for m in made if m not in born and m.birth <= k == m.death - 1]
        first = born[0].origin if born else Origin(node=f"n{k}", op="aten.relu.default")
        operations.append(
            Extern(
                name=f"op{k}",
                target=first.op or "aten.relu.default",
                args=tuple(views[m.name] for m in read),
                kwargs=(),
                results=tuple(views[m.name] for m in born),
                contract=Contract.OUT,
                device=device,
                origins=(first,),
                scratch=(scratch or {}).get(k, 0),
            )
        )
    program = Program(
        name=name,
        phase=phase,
        buffers=buffers,
        operations=tuple(operations),
        inputs=tuple(TensorInput(k, views[m.name]) for k, m in enumerate(outside)),
        outputs=tuple(views[m.name] for m in inside if m.death > steps),
    )
    timeline = _timeline(program, made, steps, pools, scratch or {})
    peak = max(timeline, default=0)
    return Plan(
        program=program,
        order=tuple(op.name for op in operations),
        lifetimes={m.name: Lifetime(m.birth, m.death) for m in made},
        placements={m.name: m.placement for m in made},
        pools=pools,
        timeline=timeline,
        certificate=Certificate(peak + 4096, peak, peak - 1024 if peak > 1024 else 0, peak, 0),
        notes=(("op0", "kept: its input is read again"),) if operations else (),
        predicted_peak={device: peak},
    )


def _timeline(
    program: Program, made: Sequence[Made], steps: int, pools: tuple[Pool, ...], scratch: dict[int, int]
) -> tuple[int, ...]:
    """Written apart from the code under test, the slow way: every buffer at every step."""
    root = {m.name: m.name for m in made}
    for m in made:
        if isinstance(m.placement, InPlaceOf):
            root[m.name] = root[m.placement.buffer]
    by_name = {m.name: m for m in made}
    out = []
    for k in range(steps):
        total = scratch.get(k, 0) + sum(int(p.nbytes) for p in pools if p.lifetime.start <= k < p.lifetime.stop)
        for r in set(root.values()):
            group = [m for m in made if root[m.name] == r]
            alive = min(m.birth for m in group) <= k < max(m.death for m in group)
            counted = not isinstance(by_name[r].placement, External) or by_name[r].donated
            if alive and counted and not isinstance(by_name[r].placement, InPool):
                total += -(-max(m.elements for m in group) * 4 // 512) * 512
        out.append(total)
    return tuple(out)


def training() -> tuple[Plan, Plan, tuple[tuple[str, str], ...]]:
    """A forward and a backward of a small network: pools, in-place reuse, saved tensors, donated inputs."""
    k = BufferKind
    qkv = origin("mm", 12, "qkv = self.qkv(x)", "layers.0.attention")
    gelu = origin("gelu", 14, "h = F.gelu(self.up(x))", "layers.0.mlp", "aten.gelu.default")
    loss = origin("mse", 20, "loss = F.mse_loss(h, target)", "", "aten.mse_loss.default")
    forward = make_plan(
        "forward0",
        Phase.FORWARD,
        [
            Made("primals_1", 65536, k.PARAMETER, 0, 4, External(), origin("primals_1", 5, module="layers.0")),
            Made("primals_2", 4096, k.INPUT, 0, 4, External(), origin("primals_2", 30)),
            Made("buf0", 262144, k.SAVED, 0, 5, Own(), qkv),
            Made("buf1", 131072, k.TEMPORARY, 1, 3, InPool("pool0", 0), gelu),
            Made("buf2", 131072, k.TEMPORARY, 2, 3, InPlaceOf("buf1"), gelu),
            Made("buf3", 65536, k.TEMPORARY, 1, 3, InPool("pool0", 524288), gelu),
            Made("buf4", 16384, k.SAVED, 2, 5, Own(), gelu),
            Made("buf5", 1, k.OUTPUT, 3, 5, Own(), loss),
        ],
        4,
        (Pool("pool0", 786432, "cuda:0", Lifetime(1, 3)),),
    )
    backward = make_plan(
        "backward0",
        Phase.BACKWARD,
        [
            Made("primals_1", 65536, k.PARAMETER, 0, 3, External(), origin("primals_1", 5, module="layers.0")),
            Made("mm", 262144, k.INPUT, 0, 2, External(), qkv, donated=True),
            Made("gelu", 16384, k.INPUT, 0, 1, External(), gelu, donated=True),
            Made("tangents_1", 1, k.INPUT, 0, 1, External(), donated=True),
            Made("buf0", 16384, k.TEMPORARY, 0, 2, InPlaceOf("gelu"), gelu),
            Made("buf1", 262144, k.TEMPORARY, 1, 3, InPlaceOf("mm"), qkv),
            Made("buf2", 65536, k.OUTPUT, 2, 4, Own(), qkv),
        ],
        3,
        scratch={1: 8192},
    )
    return forward, backward, (("primals_1", "primals_1"), ("buf0", "mm"), ("buf4", "gelu"))


def inference() -> Plan:
    k = BufferKind
    return make_plan(
        "inference0",
        Phase.INFERENCE,
        [
            Made("arg0", 4096, k.INPUT, 0, 3, External()),
            Made("buf0", 4096, k.TEMPORARY, 0, 2, Own(), origin("mm", 12, "y = x @ w", "proj")),
            Made("buf1", 8192, k.TEMPORARY, 1, 3, Own(), origin("cat", 13, "y = torch.cat([y, y])")),
            Made("buf2", 2048, k.OUTPUT, 2, 4, Own(), origin("sum", 14, "return y.sum(0)")),
        ],
        3,
    )


def random_plan(seed: int, phase: Phase = Phase.INFERENCE, steps: int = 8, count: int = 12, name: str = "g") -> Plan:
    """Lifetimes, in-place chains, one pool and scratch at random; offsets stacked, so that none overlap."""
    rng = random.Random(seed)
    made: list[Made] = []
    pool_at = 0
    for i in range(count):
        birth = rng.randrange(steps)
        death = rng.randint(birth + 1, steps + 1)
        elements = rng.randint(1, 5000)
        candidates = [m for m in made if m.death == birth + 1 and m.elements >= elements and m.birth < birth]
        choice = rng.random()
        if choice < 0.15:
            donated = rng.random() < 0.5
            kind = BufferKind.INPUT
            made.append(Made(f"b{i}", elements, kind, 0, death if donated else steps, External(), donated=donated))
            continue
        placement: Placement = Own()
        if choice < 0.4 and candidates:
            placement = InPlaceOf(rng.choice(candidates).name)
        elif choice < 0.7 and death <= steps:
            placement = InPool("pool0", pool_at)
            pool_at += -(-elements * 4 // 512) * 512
        kind = BufferKind.OUTPUT if death > steps else BufferKind.TEMPORARY
        made.append(Made(f"b{i}", elements, kind, birth, death, placement, origin(f"n{i}", i + 1)))
    pools = (Pool("pool0", pool_at, "cuda:0", Lifetime(0, steps)),) if pool_at else ()
    scratch = {rng.randrange(steps): rng.randint(1, 9999)}
    return make_plan(name, phase, made, steps, pools, scratch=scratch)
