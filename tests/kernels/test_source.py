"""Rules that the kernel sources keep, checked on their syntax trees."""

import ast
import importlib
import inspect
from pathlib import Path

import pytest

from rheo_offload.ops import HOMES, OPS

PACKAGE = Path(__file__).parents[2] / "csrc_free_kernels"
SOURCES = {str(p.relative_to(PACKAGE)): p for p in sorted(PACKAGE.rglob("*.py"))}
GPU_SOURCES = [name for name in SOURCES if name.startswith("gpu/")]
WAITS = {"item", "cpu", "tolist", "synchronize"}


def tree_of(name: str) -> ast.Module:
    return ast.parse(SOURCES[name].read_text())


def calls(tree: ast.AST) -> list[ast.Call]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


def masked_loads_without_other(tree: ast.AST) -> list[int]:
    """Lines of `tl.load` calls with a mask, by name or as the second argument, and no `other`."""
    return [
        call.lineno
        for call in calls(tree)
        if ast.unparse(call.func) == "tl.load"
        and ({"mask"} & {k.arg for k in call.keywords} or len(call.args) > 1)
        and "other" not in {k.arg for k in call.keywords}
        and len(call.args) < 3
    ]


def waits(tree: ast.AST) -> list[int]:
    """Lines that call a method which waits for the device or brings a value to the host."""
    return [c.lineno for c in calls(tree) if isinstance(c.func, ast.Attribute) and c.func.attr in WAITS]


def imported_packages(tree: ast.AST) -> set[str]:
    names = [a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names]
    names += [node.module or "." for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("name", GPU_SOURCES)
def test_masked_loads_say_what_masked_elements_are(name):
    assert masked_loads_without_other(tree_of(name)) == []


@pytest.mark.parametrize("name", GPU_SOURCES)
def test_no_autotune(name):
    named = [
        n for n in ast.walk(tree_of(name)) if "autotune" in (getattr(n, "attr", None), getattr(n, "id", None))
    ]
    assert named == []


@pytest.mark.parametrize("name", [n for n in SOURCES if n.startswith(("gpu/", "cpu/"))])
def test_nothing_waits(name):
    assert waits(tree_of(name)) == []


@pytest.mark.parametrize("name", SOURCES)
def test_imports_nothing_of_the_runtime(name):
    own = {"csrc_free_kernels", "torch", "triton", "numba", "numpy"}
    standard = {"collections", "contextlib", "functools", "itertools", "json", "math", "pathlib", "typing"}
    assert imported_packages(tree_of(name)) <= own | standard


def test_every_home_has_every_op():
    for home in HOMES.values():
        assert set(OPS) <= {p.stem for p in (PACKAGE / home).glob("*.py")}


@pytest.mark.parametrize("op", OPS)
def test_homes_agree_on_the_signature(op):
    def parameters(home):
        function = getattr(importlib.import_module(f"csrc_free_kernels.{home}.{op}"), op)
        return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]

    assert parameters("gpu") == parameters("reference")
    assert parameters("cpu") == parameters("reference")


@pytest.mark.parametrize("op", OPS)
def test_signature_is_the_contract(op):
    """The README spells each op's call out, score ops with the same arguments together."""
    function = getattr(importlib.import_module(f"csrc_free_kernels.reference.{op}"), op)
    parameters = inspect.signature(function).parameters.values()
    words = [p.name for p in parameters]
    keyword_only = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    if keyword_only:
        words.insert(len(words) - len(keyword_only), "*")
    text, call = (PACKAGE / "README.md").read_text(), f"({', '.join(words)})`"
    assert f"`{op}{call}" in text or (op.startswith("score_") and f"`score_X{call}" in text)


def test_the_rules_can_fail():
    bad = ast.parse(
        "tl.load(p, mask=m)\ntl.load(p, m)\ntl.load(p, m, 0)\ntl.load(p, mask=m, other=0)\nx.item()\n"
    )
    assert masked_loads_without_other(bad) == [1, 2]
    assert waits(bad) == [5]
