"""Imports go down only, so that each package can be understood and changed with what lies below it alone."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# From the ground up. A unit imports units of lower levels and itself; equal levels do not know each other.
LEVELS = [
    {"errors", "types"},
    {"config_checks"},
    {"config", "device"},
    {"ops"},
    {"transfer"},
    {"cache", "selection"},
    {"metrics"},
    {"execution"},
    {"model"},
    {"engine"},
    {"", "eval", "calibration"},
    {"trace"},
    {"cli", "server"},
    {"__main__"},
]
LEVEL_OF = {unit: level for level, units in enumerate(LEVELS) for unit in units}


def unit_of(file: Path) -> str:
    """The first part of a path inside the package; the package's own __init__ is the empty unit."""
    first = file.relative_to(ROOT / "rheo_offload").parts[0].removesuffix(".py")
    return "" if first == "__init__" else first


def imported(file: Path) -> set[str]:
    """Every module a file imports, at any depth of the code, as dotted absolute names."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def unit_of_name(name: str) -> str | None:
    """The unit a dotted name belongs to; None outside the package."""
    package, *rest = name.split(".")
    if package != "rheo_offload":
        return None
    return (
        rest[0] if rest and (ROOT / "rheo_offload" / rest[0]).with_suffix(".py").is_file() else _folder(rest)
    )


def _folder(rest: list[str]) -> str:
    return rest[0] if rest and (ROOT / "rheo_offload" / rest[0]).is_dir() else ""


def violations(unit: str, names: set[str]) -> list[str]:
    """The imports of a unit that do not go down."""
    wrong = []
    for name in sorted(names):
        target = unit_of_name(name)
        if target is not None and target != unit and LEVEL_OF[target] >= LEVEL_OF[unit]:
            wrong.append(f"{unit or 'rheo_offload'} imports {name}")
    return wrong


FILES = sorted((ROOT / "rheo_offload").rglob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=[str(f.relative_to(ROOT)) for f in FILES])
def test_imports_go_down(file: Path):
    assert violations(unit_of(file), imported(file)) == []


@pytest.mark.parametrize(
    ("unit", "name"),
    [
        ("cache", "rheo_offload.selection.policy.METHODS"),
        ("selection", "rheo_offload.cache"),
        ("execution", "rheo_offload.offload"),
        ("types", "rheo_offload.errors.CacheError"),
        ("model", "rheo_offload.cli.main"),
    ],
)
def test_the_rule_catches_a_wrong_import(unit: str, name: str):
    assert violations(
        unit, {name, "torch.nn", "rheo_offload.version.__version__" if unit != "types" else "os"}
    )


def test_kernels_know_nothing_of_the_runtime():
    wrong = [
        f"{file.relative_to(ROOT)}: {name}"
        for file in (ROOT / "csrc_free_kernels").rglob("*.py")
        for name in imported(file)
        if name.split(".")[0] in ("rheo_offload", "bench", "tests", "transformers")
    ]
    assert wrong == []


def test_nothing_that_is_installed_imports_tests_or_bench():
    wrong = [f"{f}: {n}" for f in FILES for n in imported(f) if n.split(".")[0] in ("tests", "bench")]
    assert wrong == []
