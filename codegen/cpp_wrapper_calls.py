"""Calls of torch in a C++ wrapper: through the small C interface where it can say the call exactly, else by Python."""

from __future__ import annotations

from ..ir.program import Contract, Copy, Extern, View
from .cpp_frame import Frame
from .cpp_frame_python import call_python, through_python
from .cpp_wrapper_externs import Marshaller, NoShimError, Shim, shim_of
from .wrapper_lines import CallExtern


def copy(frame: Frame, op: Copy) -> None:
    """Once more in Python where it fails, which says what is wrong."""
    target, source = frame.tensor(op.target), frame.tensor(op.source)
    frame.line(f"if (__builtin_expect(aoti_torch_copy_({target}, {source}, 0) != 0, 0)) {{")
    count = len(frame.lines)
    call_python(frame, "    target.copy_(source)\n", ["target", "source"], [target, source], [], [], [], [])
    frame.lines_unneeded_from(count)
    frame.line("}")
    frame.drop_views()


def extern(frame: Frame, line: CallExtern, op: Extern) -> None:
    before, locals_before, views_before = len(frame.parts[-1]), frame.locals, frame.views
    known = set(frame.tensors)
    try:
        _native(frame, line, op, shim_of(op))
    except NoShimError:
        # what was printed of it so far is taken back
        del frame.parts[-1][before:]
        frame.locals, frame.views, frame.tensors = locals_before, views_before, known
        through_python(frame, line, op)
    frame.drop_views()


def _native(frame: Frame, line: CallExtern, op: Extern, shim: Shim) -> None:
    outs: dict[str, str] = {}
    override: dict[View, str] = {}
    if op.contract is Contract.OUT:
        views = [v for v in op.results if v is not None]
        names = [a.name for a in Marshaller.schema_of(op).arguments if a.is_out]
        if len(names) != len(views):
            raise NoShimError(f"{op.target} writes {len(names)} results")
        outs = {n: frame.tensor(v) for n, v in zip(names, views, strict=True)}
        first, result = op.args[0] if op.args else None, op.results[0]
        if isinstance(first, View) and result is not None and frame.in_place(result.buffer, first.buffer):
            # one tensor for both: torch copies the first argument into another one
            override[first] = outs[names[0]]
    m = Marshaller(op, shim, lambda v: override.get(v) or frame.tensor(v), frame.size, frame.array, frame.local, outs)
    call = f"{shim.name}({', '.join(m.texts())})"
    frame.shims[shim.name] = shim
    frame.line(f"if (__builtin_expect({call} != 0, 0)) {{  // Python says what is wrong")
    made = dict(m.results)
    count = len(frame.lines)
    through_python(frame, line, op, {k: made[k] for k, v in enumerate(op.results) if v is not None and k in made})
    frame.lines_unneeded_from(count)
    frame.line("}")
    for k, name in made.items():
        view = op.results[k] if k < len(op.results) else None
        if op.contract is Contract.OUT or view is None:
            frame.line(f"mp::drop({name});")
            continue
        target = frame.member(view.buffer)
        frame.line(f"{target} = {name};")
        shape = f"{len(view.sizes)}, {frame.array(view.sizes)}, {frame.array(view.strides)}"
        frame.line(f"if (__builtin_expect(!mp::laid_out({target}, {shape}), 0)) {{")
        _relay(frame, view, target)
        frame.line("}")
        frame.tensors.add(view.buffer)


def _relay(frame: Frame, view: View, target: str) -> None:
    """The result is laid out as the plan says, or refused."""
    old = frame.local("AtenTensorHandle", target)
    shape = [f"a{k}" for k in range(2 * len(view.sizes))]
    sizes, strides = shape[: len(view.sizes)], shape[len(view.sizes) :]
    text = f"    return (laid_out(r, ({''.join(s + ', ' for s in sizes)}), ({''.join(s + ', ' for s in strides)})),)\n"
    numbers = [frame.size(n) for n in (*view.sizes, *view.strides)]
    count = len(frame.lines)
    call_python(frame, text, ["r", *shape], [old], numbers, [], [target], [])
    frame.lines_unneeded_from(count)
    frame.line(f"mp::drop({old});")
