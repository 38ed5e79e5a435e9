"""The pages in ``docs/``: every command has one, what they name exists, what they show parses."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
import typer.main

from memplan.reports import cli

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE = re.compile(r"`([^`\n]+)`")
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*")
SCHEME = re.compile(r"[a-z]+:")


@cache
def generate() -> ModuleType:
    """``docs/generate.py``, which is no part of a package."""
    spec = spec_from_file_location("docs_generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


# typer brings its own copy of click, which has no public name: what is used of it is told by what it has
def commands(group: object = None, before: str = "") -> Iterator[tuple[str, object]]:
    """Every command by its whole name, groups too."""
    group = group or typer.main.get_command(cli.app)
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        yield f"{before}{name}", command
        if hasattr(command, "commands"):
            yield from commands(command, f"{before}{name} ")


COMMANDS = dict(commands())


def options(command: object) -> set[str]:
    """Long options of a command, and of those below it."""
    found = {"--help"}
    for parameter in command.params:  # type: ignore[attr-defined]
        found |= {o for o in (*parameter.opts, *parameter.secondary_opts) if o.startswith("--")}
    for below in getattr(command, "commands", {}).values():
        found |= options(below)
    return found


EVERY = options(typer.main.get_command(cli.app))
#: Options of other programs that pages name.
FOREIGN = {"--show-capture", "--profile", "--device"}


def parse(words: list[str]) -> None:
    """Parse a command line of ``memplan`` as it would be; nothing is run."""
    if words[:1] and words[0].startswith("--"):
        assert words[0] in EVERY, words
        return
    name = words[0]
    rest = words[1:]
    while hasattr(COMMANDS[name], "commands") and rest:
        name, rest = f"{name} {rest[0]}", rest[1:]
    COMMANDS[name].make_context(name, list(rest))  # type: ignore[attr-defined]


def shown(text: str) -> Iterator[list[str]]:
    """The command lines of ``memplan`` on a page, of blocks and within sentences, as words."""
    for line in generate().shown_commands(text):
        for part in re.split(r"[;|]", line):
            words = shlex.split(part)
            if "memplan" in words:
                yield words[words.index("memplan") + 1 :]
    for code in CODE.findall(re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
        words = shlex.split(re.split(r"[>|]", code)[0])
        if words[:1] == ["memplan"] and len(words) > 2 and "..." not in code:
            yield words[1:]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_page_that_shows_it(name: str) -> None:
    page = DOCS / "commands" / f"{name.split()[0]}.md"
    assert page.is_file(), f"no page for memplan {name}: write {page.relative_to(ROOT)} and run docs/generate.py"
    if not hasattr(COMMANDS[name], "commands"):
        words = name.split()
        assert any(line[: len(words)] == words for line in shown(page.read_text())), f"{page.name} does not run {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_page_names_what_exists(page: Path) -> None:
    text = page.read_text()
    for line in shown(text):
        parse(line)
    own = COMMANDS.get(page.stem) if page.parent.name == "commands" else None
    known = (options(own) if own is not None else EVERY) | FOREIGN
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    for code in CODE.findall(prose):
        if code.startswith(("memplan ", "python ", "g++ ", "./")):
            continue  # the command that it belongs to stands before it: parsed above, or another program's
        assert set(OPTION.findall(code)) <= known, f"{page.name} names {code}"
    for target in LINK.findall(text):
        if not SCHEME.match(target):
            assert (page.parent / target.partition("#")[0]).exists(), f"{page.name} links to {target}"


def test_every_block_has_its_output() -> None:
    for page in generate().pages():
        for match in generate().BLOCK.finditer(page.read_text()):
            assert match[2].strip(), f"{page.name} shows nothing below $ {match[1]}: run docs/generate.py"
            assert "Traceback" not in match[2], f"{page.name}: $ {match[1]} failed"


def test_every_page_is_in_the_list() -> None:
    listed = {(DOCS / target).resolve() for target in LINK.findall((DOCS / "README.md").read_text())}
    assert set(PAGES) - listed <= {ROOT / "README.md", DOCS / "README.md"}


@pytest.mark.parametrize("name", ["pack", "order", "schema"])
def test_pages_that_need_no_model_are_as_the_commands_print(name: str, tmp_path: Path) -> None:
    page = (DOCS / "commands" / f"{name}.md").read_text()
    assert generate().same(page, generate().Place.made(tmp_path).regenerated(page)), "run docs/generate.py"


def test_a_page_that_is_out_of_date_is_told_from_one_that_is_not() -> None:
    same = generate().same
    assert same("done in 1.25 s, 3.10s", "done in 7 s, 24.10s")
    assert same('{"peak": 1, "seconds": 0.006}', '{"peak": 1, "seconds": 0.125}')
    assert not same('{"peak": 1, "seconds": 0.006}', '{"peak": 2, "seconds": 0.006}')
    assert not same("peak 23.5 MiB in 1.2 s", "peak 23.6 MiB in 1.2 s")
