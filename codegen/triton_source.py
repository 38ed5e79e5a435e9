"""The text of a module with one Triton kernel: imports, device functions, the function itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from memplan.ir.early_launch import EarlyLaunch

from .triton_device_functions import device_source

_HEADER = "import triton\nimport triton.language as tl\nfrom triton.language.extra import libdevice\n"
_EARLY = "from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait\n"

#: what stands before and after the body
_AROUND: Mapping[EarlyLaunch, tuple[tuple[str, ...], tuple[str, ...]]] = {
    EarlyLaunch.NEVER: ((), ()),
    EarlyLaunch.WAIT: (("gdc_wait()",), ()),
    EarlyLaunch.START: (("gdc_launch_dependents()", "gdc_wait()"), ()),
    EarlyLaunch.END: (("gdc_wait()",), ("gdc_launch_dependents()",)),
}


def module_source(name: str, parameters: Iterable[str], functions: Iterable[str], body: str, early: EarlyLaunch) -> str:
    """Source of a module.

    Parameters
    ----------
    functions:
        Names of device functions that the body calls.
    body:
        Its lines, indented.
    early:
        What it does about the kernels before and after it.
    """
    first, last = _AROUND[early]
    header = _HEADER if early is EarlyLaunch.NEVER else _HEADER + _EARLY
    head = f"{header}{device_source(functions)}\n\n@triton.jit\ndef {name}({', '.join(parameters)}):\n"
    return head + _indented(first) + body + _indented(last)


def _indented(lines: Iterable[str]) -> str:
    return "".join(f"    {line}\n" for line in lines)
