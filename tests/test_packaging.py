"""What is installed: every package is named, data files travel, the entry point and the command are there."""

from __future__ import annotations

import importlib.util
import re
import tomllib
from importlib import metadata, resources
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
IN_CHECKOUT = (ROOT / "pyproject.toml").exists()
#: Files that are read at run time and are no Python.
DATA = {
    "memplan.codegen": ["cpp_prelude.h"],
    "memplan.passes": ["pack_search.cpp"],
    "memplan.reports": ["view.js"],
}


@pytest.mark.skipif(not IN_CHECKOUT, reason="reads pyproject.toml of the checkout")
def test_every_package_is_named() -> None:
    """A nested package that is not named works in an editable install and is missing from the wheel."""
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {"memplan": "memplan"} | tool["package-dir"]
    found = set()
    for package, folder in folders.items():
        for path in (ROOT / folder).rglob("*.py"):
            found.add(".".join([package, *path.parent.relative_to(ROOT / folder).parts]))
    assert found == set(tool["packages"])


@pytest.mark.skipif(not IN_CHECKOUT, reason="reads pyproject.toml of the checkout")
def test_every_data_file_is_named() -> None:
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    for package, patterns in tool["package-data"].items():
        folder = ROOT / tool["package-dir"].get(package, package.replace(".", "/"))
        missed = [
            p.name
            for p in folder.rglob("*")
            if p.is_file() and p.suffix not in (".py", ".pyc", ".so") and not any(p.match(q) for q in patterns)
        ]
        assert not missed, f"{package} leaves out {missed}"


@pytest.mark.parametrize(("package", "name"), [(p, n) for p, names in DATA.items() for n in names])
def test_data_files_are_installed(package: str, name: str) -> None:
    assert resources.files(package).joinpath(name).read_text().strip()


@pytest.mark.parametrize("package", ["ir", "capture", "lowering", "runtime", "passes", "codegen", "reports"])
def test_packages_are_installed(package: str) -> None:
    assert importlib.util.find_spec(f"memplan.{package}") is not None


def test_the_backend_is_found_by_name() -> None:
    entry = [e for e in metadata.entry_points(group="torch_dynamo_backends") if e.name == "memplan"]
    assert len(entry) == 1
    assert "memplan" in torch._dynamo.list_backends()
    from memplan.backend import compile as backend

    assert entry[0].load() is backend


def test_the_command_is_installed() -> None:
    entry = [e for e in metadata.entry_points(group="console_scripts") if e.name == "memplan"]
    assert len(entry) == 1
    assert callable(entry[0].load())


def test_no_generic_name_reaches_the_import_path() -> None:
    """`passes`, `codegen` and `reports` install below memplan only."""
    files = metadata.files("memplan") or []
    top = {f.parts[0] for f in files if len(f.parts) > 1 and f.suffix == ".py"}
    assert top <= {"memplan"}, top


@pytest.mark.skipif(not IN_CHECKOUT, reason="reads pyproject.toml of the checkout")
def test_supported_versions_are_stated_once() -> None:
    from memplan.backend import SUPPORTED_TORCH

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (torch_range,) = [d for d in project["dependencies"] if re.match(r"torch\b", d)]
    assert f">={SUPPORTED_TORCH[0][0]}.{SUPPORTED_TORCH[0][1]}" in torch_range
    assert project["requires-python"] == ">=3.11,<3.14"
