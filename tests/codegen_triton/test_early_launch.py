"""Kernels that are started early wait before anything else, as compiled; others and other GPUs' know nothing of it."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import sample_kernels as s
import triton.backends.nvidia

from memplan.codegen.triton_kernel import TritonKernel, emit_triton
from memplan.codegen.triton_product import emit_launches
from memplan.ir.canonical import canonicalize
from memplan.ir.config import Config
from memplan.ir.early_launch import EarlyLaunch, early_launch, early_template
from memplan.ir.errors import CompilerError, OptionError
from memplan.ir.loops import Kernel
from memplan.runtime.early_launch import waits_first
from memplan.runtime.triton_build import Build, Compiled, Target, compile_one
from tests.templates.products import CONFIGS, product

Emit = Callable[[EarlyLaunch], TritonKernel]
EARLY = (EarlyLaunch.WAIT, EarlyLaunch.START, EarlyLaunch.END)


def ordinary(kernel: Kernel) -> Emit:
    return lambda early: emit_triton(canonicalize(kernel), name="kernel", hints={}, early=early)


def template(method: str, launch: int = 0) -> Emit:
    p = product((1, 48, 64, 256), CONFIGS[method], bias=True, epilogue="residual")
    return lambda early: emit_launches(p, name="kernel", early=early)[launch]


KERNELS: dict[str, Emit] = {
    "pointwise": ordinary(s.add_relu(5000)),
    "tiles": ordinary(s.transpose(300, 200)),
    "persistent rows": ordinary(s.softmax(64, 768)),
    "looped rows": ordinary(s.cross_entropy(64, 50257)),
    "columns": ordinary(s.column_sum(4096, 768)),
    "one sum": ordinary(s.total_sum(4096, 768)),
    "welford": ordinary(s.batch_norm_statistics(16, 8, 400)),
    "indices": ordinary(s.embedding(200, 64, 1000)),
    "atomics": ordinary(s.embedding_backward(200, 64)),
    "random numbers": ordinary(s.dropout(5000)),
    **{f"product by {method}": template(method) for method in CONFIGS},
    "finish of a product": template("staged", 1),
}


#: those that are built under every policy
SOME = ("pointwise", "looped rows", "product by split")


def built(kernel: TritonKernel, arch: int = 90) -> Compiled:
    return compile_one(Build.of(kernel, kernel.configs[0]), Target(arch=arch))


def instructions(cubin: bytes) -> list[str]:
    """What the GPU runs, in order: without its predicate, with what follows the first dot."""
    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-sass", file.name], capture_output=True, text=True, check=True).stdout
    return re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", text)


#: of SASS: loads, stores and atomics of global memory, asynchronous copies from there, branches and ends
TOUCHES = re.compile(r"(LD|LDG|ST|STG|ATOM|ATOMG|RED|REDG|LDGSTS|UBLKCP|UTMALDG|BRA|EXIT|CALL|RET)\b")


@pytest.mark.parametrize("name", KERNELS)
def test_every_kernel_waits_before_it_touches_memory(name: str) -> None:
    """As the compiler's text has it, and as the GPU runs it."""
    for early in EARLY if name in SOME else (EarlyLaunch.START,):
        kernel = KERNELS[name](early)
        found = built(kernel)
        assert found.early
        ptx = found.handle.asm["ptx"]  # type: ignore[attr-defined]
        assert ptx.count("griddepcontrol.wait") == 1
        assert ptx.count("griddepcontrol.launch_dependents") == (early is not EarlyLaunch.WAIT)
        run = instructions(found.cubin)
        assert run.count("ACQBULK") == 1
        assert not [i for i in run[: run.index("ACQBULK")] if TOUCHES.match(i)]
        assert [i for i in run[run.index("ACQBULK") :] if TOUCHES.match(i)]


def test_where_the_next_one_is_started() -> None:
    start, end = (built(KERNELS["pointwise"](e)).handle.asm["ptx"] for e in (EarlyLaunch.START, EarlyLaunch.END))  # type: ignore[attr-defined]
    order = re.compile(r"griddepcontrol\.\w+|\b(?:ld|st)\.global")
    assert order.findall(start)[:2] == ["griddepcontrol.launch_dependents", "griddepcontrol.wait"]
    assert order.findall(end)[0] == "griddepcontrol.wait"
    assert order.findall(end)[-1] == "griddepcontrol.launch_dependents"


@pytest.mark.parametrize("name", ["pointwise", "product by split"])
def test_older_gpus_have_none_of_it(name: str) -> None:
    early = early_launch("auto", 80)
    assert early is EarlyLaunch.NEVER
    found = built(KERNELS[name](early), 80)
    assert not found.early
    assert "griddepcontrol" not in found.handle.asm["ptx"]  # type: ignore[attr-defined]
    assert "gdc_" not in KERNELS[name](early).source


def test_without_it_nothing_is_started_early() -> None:
    assert not built(KERNELS["pointwise"](EarlyLaunch.NEVER)).early


@pytest.mark.parametrize(
    ("old", "new", "first"),
    [
        ("    gdc_wait()\n", "    tl.store(b2, tl.load(b0))\n    gdc_wait()\n", "global"),
        ("    gdc_wait()\n", "    if tl.program_id(0) > 0:\n        gdc_wait()\n", "bra|BB"),
        ("    gdc_wait()\n", "    for k in range(tl.program_id(0)):\n        gdc_wait()\n", "bra|BB"),
    ],
    ids=["after a load", "in a branch", "in a loop"],
)
def test_a_kernel_that_waits_too_late_is_refused(old: str, new: str, first: str) -> None:
    kernel = KERNELS["pointwise"](EarlyLaunch.START)
    assert kernel.source.count(old) == 1
    config = kernel.configs[0]
    late = Build("kernel", kernel.source.replace(old, new), kernel.arguments, kernel.aligned, config.blocks, 4, 1)
    with pytest.raises(CompilerError, match=f"kernel waits for the kernel before it too late: `.*({first})"):
        compile_one(late, Target())


PTX = """
.visible .entry kernel(
	.param .u64 .ptr .global .align 1 kernel_param_0
)
.reqntid 128
{
	.reg .b32 	%r<5>;
$L__tmp0:
	ld.param.b64 	%rd3, [kernel_param_0];
	mov.u32 	%r3, %tid.x;	LINE
	// begin inline asm
	griddepcontrol.wait; // dummy %r2
	ret;
}
"""


@pytest.mark.parametrize(
    "line",
    [
        "ld.global.b32 %r4, [%rd3];",
        "ld.b32 %r4, [%rd3];",
        "ldu.global.b32 %r4, [%rd3];",
        "st.global.b32 [%rd3], %r3;",
        "atom.global.add.u32 %r4, [%rd3], 1;",
        "red.global.add.u32 [%rd3], 1;",
        "cp.async.cg.shared.global [%r4], [%rd3], 16;",
        "prefetch.global.L2 [%rd3];",
        "@%p1 bra $L__BB0_2;",
        "$L__BB0_1:",
        "bra.uni $L__BB0_2;",
        "call.uni __assertfail, (%rd3);",
        "ret;",
        "@%p1",
    ],
)
def test_what_may_not_come_before_the_wait(line: str) -> None:
    assert waits_first(PTX.replace("LINE", ""), "kernel")
    assert not waits_first(PTX.replace("LINE", line).replace("griddepcontrol.wait", "nanosleep.u32 20"), "kernel")
    with pytest.raises(CompilerError, match="too late"):
        waits_first(PTX.replace("LINE", f"\n\t{line}"), "kernel")


def test_a_text_without_a_function_is_refused() -> None:
    with pytest.raises(CompilerError, match="no function kernel is found"):
        waits_first("griddepcontrol.wait;", "kernel")


def test_the_option(monkeypatch: pytest.MonkeyPatch) -> None:
    assert early_launch("never", 90) is EarlyLaunch.NEVER
    assert early_launch("auto", 90) is not EarlyLaunch.NEVER
    assert early_template("auto", 90) is EarlyLaunch.END
    assert early_template("auto", 80) is EarlyLaunch.NEVER
    assert [early_template(e.value, 90) for e in EarlyLaunch] == list(EarlyLaunch)
    assert [early_launch(e.value, 100) for e in EarlyLaunch] == list(EarlyLaunch)
    assert [early_launch(e.value, 89) for e in EarlyLaunch] == [EarlyLaunch.NEVER] * 4
    with pytest.raises(OptionError, match=r"is one of auto, never, wait, start, end, not 'nevr' .*'never'"):
        Config.from_options({"early_launch": "nevr"})
    keys = {Config.from_options({"early_launch": e}).cache_key() for e in ("auto", "never", "start")}
    assert len(keys) == 3
    monkeypatch.setenv("MEMPLAN_EARLY_LAUNCH", "end")
    assert Config.from_options({}).early_launch == "end"
    assert Config.from_options({"early_launch": "wait"}).early_launch == "wait"
    monkeypatch.setenv("MEMPLAN_EARLY_LAUNCH", "yes")
    with pytest.raises(OptionError, match="early_launch"):
        Config.from_options({})


def test_the_rest_of_the_text_is_the_same() -> None:
    """The body is the same text under every policy."""
    plain = KERNELS["persistent rows"](EarlyLaunch.NEVER)
    body = plain.source.partition("):\n")[2]
    for early in EARLY:
        source = KERNELS["persistent rows"](early).source
        lines = [x for x in source.partition("):\n")[2].splitlines() if "gdc_" not in x]
        assert lines == body.splitlines()
