"""The documents say what the code has: every key, method and module, commands that parse, links that lead somewhere."""

import dataclasses
import importlib.util
import re
import shlex
import typing
from pathlib import Path

import pytest
import yaml

from rheo_offload.cli.main import parse
from rheo_offload.config import GROUPS, RheoConfig, packaged_names
from rheo_offload.selection.policy import METHODS
from tests.test_layering import LEVEL_OF

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "ARCHITECTURE.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += [ROOT / "bench" / "README.md", ROOT / "csrc_free_kernels" / "README.md"]
KEYS = [(name, f) for name, group in GROUPS.items() for f in dataclasses.fields(group)]


def rows(page: str, heading: str) -> list[list[str]]:
    """The cells of the first table below a heading, without its head."""
    lines = page.split(f"\n{heading}\n", 1)[1].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|---"))
    table = []
    for line in lines[start + 1 :]:
        if not line.startswith("|"):
            break
        table.append([cell.strip() for cell in line.strip().strip("|").split("|")])
    return table


def test_every_key_has_one_row_with_its_default_and_values():
    table = rows((ROOT / "docs" / "configuration.md").read_text(), "## Keys")
    assert [row[0] for row in table] == [f"`{group}.{f.name}`" for group, f in KEYS]
    plain = RheoConfig().to_dict()
    for (group, f), (key, default, values, meaning) in zip(KEYS, table, strict=True):
        assert yaml.safe_load(default) == plain[group][f.name], key
        assert values and meaning, key
        if typing.get_origin(f.type) is typing.Literal:
            assert set(re.findall(r"`(\w+)`", values)) == set(typing.get_args(f.type)), key


def test_every_packaged_configuration_is_named():
    page = (ROOT / "docs" / "configuration.md").read_text().split("## Keys")[0]
    assert [name for name in packaged_names() if f"`{name}`" not in page] == []


def test_every_method_has_one_row_with_its_parameters():
    table = rows((ROOT / "docs" / "selectors.md").read_text(), "## Methods")
    assert sorted(row[0] for row in table) == sorted(f"`{name}`" for name in METHODS)
    for method, *_, parameters in table:
        cls = METHODS[method.strip("`")]
        names = [f.name for f in dataclasses.fields(cls)] if dataclasses.is_dataclass(cls) else []
        assert [name for name in names if f"`{name}`" not in parameters] == [], method


def test_every_module_is_in_the_module_table():
    named = []
    for first, _ in rows((ROOT / "ARCHITECTURE.md").read_text(), "## Modules, bottom up"):
        folder = ""
        for name in re.findall(r"`([\w./]+)`", first):
            name = name.removeprefix("rheo_offload/")
            folder = name.rpartition("/")[0] or folder
            named.append(name if name.endswith("/") or "/" in name else f"{folder}/{name}".lstrip("/"))
    package = ROOT / "rheo_offload"
    files = [f.relative_to(package) for f in package.rglob("*.py") if not f.name.startswith("__")]
    assert [str(f) for f in files if str(f) not in named and f"{f.parts[0]}/" not in named] == []
    units = [name.partition("/")[0].removesuffix(".py") for name in named]
    levels = [LEVEL_OF[unit] for unit in units if unit in LEVEL_OF]
    assert levels == sorted(levels), "bottom up"
    homes = (package, ROOT)
    assert [name for name in named if not any((home / name).exists() for home in homes)] == []


def commands() -> list[str]:
    """Every `rheo` command line that a document shows in a block of its own."""
    found = []
    for page in PAGES:
        for block in re.findall(r"^```(?:bash)?\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
            lines = block.replace("\\\n", " ").splitlines()
            found += [line for line in lines if line.startswith("rheo ")]
    return found


@pytest.mark.parametrize("line", commands())
def test_commands_parse(line: str):
    verb, *words = shlex.split(line, comments=True)
    assert parse(words).run is not None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_modules_and_links_exist(page: Path):
    text = page.read_text()
    modules = set(re.findall(r"python -m ([\w.]+\w)", text)) - {"pytest", "pip"}
    assert [name for name in modules if importlib.util.find_spec(name) is None] == []
    links = [link for link in re.findall(r"\]\(([^)#\s]*)", text) if link and ":" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_tables_have_as_many_cells_in_every_row(page: Path):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE).replace(r"\|", "")
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({row.count("|") for row in table.splitlines()}) == 1, table.splitlines()[0]
