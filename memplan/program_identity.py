"""What a captured program is, apart from its names: the key of what is made from it, and how names are carried over.

Two programs that differ only in the names of buffers, operations and size symbols, in their own name, or in where in
the user's code they come from, have the same canonical form; then the same plan and the same code serve both.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache

import sympy

from .ir.plan import Plan
from .ir.program import Origin, Program, SymbolInput
from .saving_encoding import Writer, is_data

#: Fields that hold names of buffers and operations: one, a tuple of them, as keys, as first of a pair, in a target.
_ROLES: Mapping[str, Mapping[str, str]] = {
    "Buffer": {"name": "one"},
    "View": {"buffer": "one"},
    "KernelOp": {"name": "one", "mutates": "many"},
    "Extern": {"name": "one", "mutates": "many", "target": "target"},
    "Copy": {"name": "one", "mutates": "many"},
    "UserKernel": {"name": "one", "mutates": "many"},
    "Load": {"buffer": "one"},
    "Store": {"buffer": "one"},
    "InPlaceOf": {"buffer": "one"},
    "Slab": {"members": "many"},
    "OpaqueInput": {"name": "one"},
    "Plan": {"order": "many", "lifetimes": "keys", "placements": "keys", "notes": "pairs"},
    "Program": {"buffers": "keys", "notes": "pairs"},
}
_CALLABLE = "callable:"


@dataclass(frozen=True)
class Identity:
    """The canonical form of a captured program, and what stands in it by number.

    Two programs of equal ``form`` correspond name by name, symbol by symbol, origin by origin.
    """

    form: bytes
    names: tuple[str, ...]
    symbols: tuple[sympy.Symbol, ...]
    origins: tuple[Origin, ...]


_roles_of: dict[type, Mapping[str, str]] = {}


def roles(kind: type) -> Mapping[str, str]:
    """Which fields of a class hold names, and how."""
    found = _roles_of.get(kind)
    if found is None:
        inherited = (_ROLES.get(base.__name__, {}) for base in reversed(kind.__mro__))
        found = _roles_of[kind] = {field: role for given in inherited for field, role in given.items()}
    return found


class UnknownCallableError(Exception):
    """A higher-order operator holds something of which nobody can say whether it is the same."""


def identify(program: Program, fingerprint: Callable[[object], object]) -> Identity:
    """The identity of a captured program.

    Parameters
    ----------
    fingerprint:
        What of a callable of the program decides what is made from it, as plain data.

    Raises
    ------
    SavedModelError
        If something in the program is not data.
    UnknownCallableError
        If ``fingerprint`` raises it.
    """
    symbols = [i.symbol for i in program.inputs if isinstance(i, SymbolInput)]
    writer = _Canonical({s: k for k, s in enumerate(dict.fromkeys((*symbols, *program.hints)))})
    constants = [(str(t.dtype), str(t.device), tuple(t.shape), tuple(t.stride())) for t in program.constants.values()]
    form = writer.document(
        (
            program.phase,
            program.inputs,
            tuple(program.buffers.values()),
            program.operations,
            program.outputs,
            tuple(program.hints.items()),
            program.notes,
            tuple(writer.name(n) for n in program.constants),
            tuple(constants),
            tuple(writer.name(n) for n in program.callables),
            tuple(fingerprint(c) for c in program.callables.values()),
        )
    )
    return Identity(form, tuple(writer.names), tuple(writer.symbols), tuple(_origins(program)))


def _origins(program: Program) -> Iterator[Origin]:
    for buffer in program.buffers.values():
        yield buffer.origin
    for op in program.operations:
        yield from op.origins


class _Canonical(Writer):
    """Names as numbers in the order of their first appearance, symbols likewise; origins left out."""

    def __init__(self, symbols: dict[sympy.Symbol, int]) -> None:
        super().__init__()
        self.names: dict[str, int] = {}
        self.symbols = symbols

    def name(self, name: str) -> str:
        return f"#{self.names.setdefault(name, len(self.names))}"

    def entry(self, v: object) -> list[object]:
        kind = type(v).__name__
        if isinstance(v, Origin):
            return ["origin"]
        if isinstance(v, sympy.Basic):
            for s in sorted(v.free_symbols - self.symbols.keys(), key=lambda s: s.name):  # unknown ones: opaque inputs
                self.symbols[s] = len(self.symbols)
            return ["expression", str(v.xreplace({s: _numbered(s, self.symbols[s]) for s in v.free_symbols}))]
        if not is_data(v):
            return super().entry(v)
        values: list[object] = []
        for f in dataclasses.fields(v):  # type: ignore[arg-type]
            held = getattr(v, f.name)
            match roles(type(v)).get(f.name):
                case "one":
                    values.append(self.name(held))
                case "many":
                    values.append(self.value(tuple(self.name(n) for n in held)))
                case "target" if held.startswith(_CALLABLE):
                    values.append(_CALLABLE + self.name(held.removeprefix(_CALLABLE)))
                case _ if f.name != "origins":
                    values.append(self.value(held))
        return ["data", kind, *values]


@lru_cache(maxsize=4096)
def _numbered(symbol: sympy.Symbol, number: int) -> sympy.Symbol:
    """The symbol that stands for one of this number; its name tells the assumptions, since they are not printed."""
    given = {k: bool(v) for k, v in symbol.assumptions0.items() if k in ("integer", "nonnegative", "positive")}
    return sympy.Symbol(f"s{number}_" + "".join(f"{k[0]}{v:d}" for k, v in sorted(given.items())), **given)


def carried_over(plan: Plan, made_for: Identity, now: Identity) -> Plan:
    """The plan of a program with the names and symbols of another one of the same form.

    Names that passes made stay as they are, unless the other program uses them for something else.
    """
    names = {a: b for a, b in zip(made_for.names, now.names, strict=True) if a != b}
    symbols = {a: b for a, b in zip(made_for.symbols, now.symbols, strict=True) if a != b}
    if not names and not symbols:
        return plan
    taken = set(now.names)
    own = {*plan.program.buffers, *(op.name for op in plan.program.operations)} - set(made_for.names)
    for name in sorted(own & taken):
        new = name
        while new in taken or new in own:
            new += "_"
        names[name] = new
        taken.add(new)
    return _Renaming(names, symbols).of(plan)  # type: ignore[return-value]


@dataclass
class _Renaming:
    names: Mapping[str, str]
    symbols: Mapping[sympy.Symbol, sympy.Symbol]
    done: dict[int, tuple[object, object]] = field(default_factory=dict)  # by identity; the object is kept alive

    def of(self, v: object) -> object:
        if v is None or isinstance(v, (bool, int, str, float, complex)):
            return v
        found = self.done.get(id(v))
        if found is None:
            found = self.done[id(v)] = (v, self.made(v))
        return found[1]

    def name(self, name: str) -> str:
        return self.names.get(name, name)

    def made(self, v: object) -> object:
        if isinstance(v, sympy.Basic):
            return v.xreplace(self.symbols)
        if isinstance(v, tuple):
            return tuple(self.of(i) for i in v)
        if isinstance(v, Mapping):
            return {self.of(k): self.of(i) for k, i in v.items()}
        if not is_data(v):
            return v
        changed: dict[str, object] = {}
        for f in dataclasses.fields(v):  # type: ignore[arg-type]
            held = getattr(v, f.name)
            match roles(type(v)).get(f.name):
                case "one":
                    changed[f.name] = self.name(held)
                case "many":
                    changed[f.name] = tuple(self.name(n) for n in held)
                case "keys":
                    changed[f.name] = {self.name(n): self.of(i) for n, i in held.items()}
                case "pairs":
                    changed[f.name] = tuple((self.name(n), text) for n, text in held)
                case "target" if held.startswith(_CALLABLE):
                    changed[f.name] = _CALLABLE + self.name(held.removeprefix(_CALLABLE))
                case _:
                    changed[f.name] = self.of(held)
        return replace(v, **changed)  # type: ignore[type-var]
