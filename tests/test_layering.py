"""Who imports whom: read off the syntax trees, so that an import inside a function counts too."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
#: Folders by the name under which they install.
FOLDERS = {
    "ir": ROOT / "memplan" / "ir",
    "capture": ROOT / "memplan" / "capture",
    "lowering": ROOT / "memplan" / "lowering",
    "runtime": ROOT / "memplan" / "runtime",
    "passes": ROOT / "passes",
    "codegen": ROOT / "codegen",
    "reports": ROOT / "reports",
}
#: The order of `ir`'s files: each may import those of earlier ranks, and its own.
RANKS = (
    {
        "errors",
        "config",
        "communication",
        "communication_options",
        "early_launch",
        "device",
        "eager",
        "flops",
        "joint",
        "call_work",
    },
    {"loops", "user_kernel"},
    {"index", "index_inversion"},
    {"over_ranges", "totals"},
    {"program", "canonical"},
    {"template", "in_flight"},
    {"plan", "activation"},
    {
        "verify",
        "verify_access",
        "verify_kernel",
        "verify_plan",
        "verify_communication",
        "verify_template",
        "verify_slabs",
        "verify_timeline",
        "verify_offload",
        "printing",
    },
)
#: Names that say nothing of what is in a file.
GENERIC = {"utils", "helpers", "misc", "common"}


def files() -> list[tuple[str, Path]]:
    return [(folder, path) for folder, where in FOLDERS.items() for path in sorted(where.rglob("*.py"))]


def imports(folder: str, path: Path) -> Iterator[tuple[int, str, bool]]:
    """(line, what of memplan is imported as a dotted name below it, whether relatively)."""
    package = ["memplan", folder, *path.relative_to(FOLDERS[folder]).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "memplan":
                    yield node.lineno, ".".join(alias.name.split(".")[1:]), False
        elif isinstance(node, ast.ImportFrom):
            base = (node.module or "").split(".") if node.module else []
            if node.level:
                base = package[: len(package) - node.level + 1] + base
            if base[:1] != ["memplan"]:
                continue
            rest = base[1:]
            for alias in node.names:
                yield node.lineno, ".".join([*rest, alias.name] if len(rest) < 2 else rest), bool(node.level)


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_imports_ir_and_itself(folder: str) -> None:
    """Only the command line and what runs a user's model, in `reports`, may use the public API."""
    wrong = []
    for name, path in files():
        if name != folder:
            continue
        for line, target, _ in imports(name, path):
            head = target.split(".")[0]
            if head in (folder, "ir"):
                continue
            if folder == "reports" and head not in FOLDERS:
                continue
            wrong.append(f"{path.relative_to(ROOT)}:{line} imports memplan.{target}")
    assert not wrong, "\n".join(wrong)


def test_ir_imports_nothing_else() -> None:
    wrong = [
        f"{path.name}:{line} imports memplan.{target}"
        for folder, path in files()
        if folder == "ir"
        for line, target, _ in imports(folder, path)
        if target.split(".")[0] != "ir"
    ]
    assert not wrong, "\n".join(wrong)


def test_the_files_of_ir_import_downwards() -> None:
    rank = {name: k for k, names in enumerate(RANKS) for name in names}
    wrong = []
    for folder, path in files():
        if folder != "ir" or path.stem == "__init__":
            continue
        assert path.stem in rank, f"ir/{path.name} has no rank: add it to RANKS"
        for line, target, _ in imports(folder, path):
            other = target.split(".")[1]
            if rank[other] > rank[path.stem]:
                wrong.append(f"{path.name}:{line} imports {other}, which stands above it")
    assert not wrong, "\n".join(wrong)


def test_inside_a_folder_imports_are_relative() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports memplan.{target} absolutely"
        for folder, path in files()
        for line, target, relative in imports(folder, path)
        if not relative and target.split(".")[0] == folder
    ]
    assert not wrong, "\n".join(wrong)


def test_verifiers_import_no_pass() -> None:
    for name in ("verify", "verify_access", "verify_kernel", "verify_plan"):
        heads = {target.split(".")[0] for _, target, _ in imports("ir", FOLDERS["ir"] / f"{name}.py")}
        assert heads <= {"ir"}, f"{name} imports {sorted(heads)}"


def test_no_pass_imports_another_stage() -> None:
    """A pass is pure: it neither builds nor runs nor prints."""
    wrong = [
        f"{path.name}:{line} imports {target}"
        for folder, path in files()
        if folder == "passes"
        for line, target, _ in imports(folder, path)
        if target.split(".")[0] in ("codegen", "runtime", "reports", "capture", "backend")
    ]
    assert not wrong, "\n".join(wrong)


def test_no_import_cycle() -> None:
    """Between the modules of all folders, counting only what is imported when a module is loaded."""
    edges: dict[str, set[str]] = {}
    for folder, path in files():
        module = ".".join([folder, *path.relative_to(FOLDERS[folder]).with_suffix("").parts])
        edges[module] = {m for m in _loaded(folder, path) if m != module}
    done: set[str] = set()
    for start in edges:
        cycle = _cycle(start, edges, done)
        assert cycle is None, " -> ".join(cycle or [])


def _loaded(folder: str, path: Path) -> set[str]:
    """Modules that are imported at the top level of a file."""
    lines = {n.lineno for n in ast.parse(path.read_text()).body if isinstance(n, (ast.Import, ast.ImportFrom))}
    found = set()
    for line, target, _ in imports(folder, path):
        if line in lines:
            found |= {target, target.rpartition(".")[0]}
    return found


def _cycle(start: str, edges: dict[str, set[str]], done: set[str]) -> list[str] | None:
    path: list[str] = []

    def visit(module: str) -> list[str] | None:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done or module not in edges:
            return None
        path.append(module)
        for other in sorted(edges[module]):
            found = visit(other)
            if found:
                return found
        path.pop()
        done.add(module)
        return None

    return visit(start)


def test_no_generic_file_names() -> None:
    named = [str(path.relative_to(ROOT)) for _, path in files() if path.stem in GENERIC]
    assert not named, f"say what is in it: {named}"
