"""What a user gets on installing and importing: no side effects, sorted exports, one version, its pins."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import rheo_offload

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

IMPORT_PROBE = """
import json, os, sys, threading
import torch
from transformers import AttentionInterface, AttentionMaskInterface

def state():
    tables = (AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping)
    return {
        "registered": [sorted(table) for table in tables],
        "environment": dict(os.environ),
        "cuda_in_use": torch.cuda.is_initialized(),
        "patched": [id(torch.nn.Module.__call__), id(torch.nn.functional.scaled_dot_product_attention)],
        "threads": threading.active_count(),
        "kernel_modules": [m for m in sys.modules if m.startswith("csrc_free_kernels.")],
    }

before = state()
import rheo_offload
after = state()
print(json.dumps({name: before[name] == after[name] for name in before}))
"""


@pytest.fixture(scope="module")
def import_probe() -> dict[str, bool]:
    """What stayed the same in a fresh interpreter when the package was imported."""
    probe = subprocess.run(
        [sys.executable, "-c", IMPORT_PROBE], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert probe.returncode == 0, probe.stderr
    unchanged: dict[str, bool] = json.loads(probe.stdout)
    return unchanged


@pytest.mark.parametrize(
    "what", ["registered", "environment", "cuda_in_use", "patched", "threads", "kernel_modules"]
)
def test_import_changes_nothing(import_probe: dict[str, bool], what: str):
    assert import_probe[what]


def test_exports_are_sorted():
    for file in [
        *(ROOT / "rheo_offload").rglob("__init__.py"),
        *(ROOT / "csrc_free_kernels").rglob("__init__.py"),
    ]:
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.Assign) and any(getattr(t, "id", "") == "__all__" for t in node.targets):
                exports = ast.literal_eval(node.value)
                assert exports == sorted(exports), file


def test_the_public_surface():
    assert {"RheoConfig", "offload", "restore"} <= set(rheo_offload.__all__)
    assert all(hasattr(rheo_offload, name) for name in rheo_offload.__all__)


def test_the_changelog_knows_this_version():
    assert re.search(
        rf"^## {re.escape(rheo_offload.__version__)}\b", (ROOT / "CHANGELOG.md").read_text(), re.M
    )


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.lower().split("==") for line in lines if line and not line.startswith("#"))


def test_every_dependency_is_pinned_inside_its_range():
    groups = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    wanted = [Requirement(text) for group in groups for text in group]
    pinned = pins()
    for requirement in wanted:
        if requirement.name != PROJECT["name"]:
            assert requirement.specifier.contains(pinned[requirement.name.lower()]), requirement


def test_constraints_are_plain_public_pins():
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        assert line.startswith("#") or re.fullmatch(r"[A-Za-z0-9_.-]+==[A-Za-z0-9.]+", line), line


def test_the_licence_is_apache_in_full():
    text = (ROOT / "LICENSE").read_text()
    assert "Version 2.0, January 2004" in text and "END OF TERMS AND CONDITIONS" in text
    assert PROJECT["license"] == "Apache-2.0"


def test_package_data_covers_the_configurations():
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert "configs/*.yaml" in data["rheo_offload"]
    assert list((ROOT / "rheo_offload" / "configs").glob("*.yaml"))


def make_demo(home, **commands):
    """Run `make demo` where the environment's commands are these shell scripts."""
    for name in ("Makefile", "constraints.txt", "pyproject.toml"):
        (home / name).write_text((ROOT / name).read_text())
    (home / ".venv/bin").mkdir(parents=True)
    for name, script in commands.items():
        file = home / ".venv/bin" / name
        file.write_text(f"#!/bin/sh\n{script}\n")
        file.chmod(0o755)
    return subprocess.run(
        ["make", "--no-print-directory", "demo"], cwd=home, capture_output=True, text=True, check=False
    )


def test_make_demo_without_an_index_says_how_to_do_without(tmp_path):
    """No package can be had: one plain message names what is missing and the way round it."""
    done = make_demo(tmp_path, python="echo 'ERROR: no index' >&2; exit 1")
    assert done.returncode != 0
    assert "Could not get torch==" in done.stderr and "make demo MODEL=DIR" in done.stderr


TORCH_ONLY = 'case "$*" in *torch==*) ;; *) exit 1;; esac'
NO_EXTRA = 'case "$*" in *demo*) exit 1;; esac'
RHEO = 'echo "rheo $*"'


@pytest.mark.parametrize("python", [TORCH_ONLY, NO_EXTRA])
def test_make_demo_goes_on_without_its_extra(tmp_path, python):
    """Gemma's packages cannot be had; the rest is installed already, or can be."""
    done = make_demo(tmp_path, python=python, rheo=RHEO)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "rheo demo"
    assert "Could not get the packages of the [demo] extra" in done.stderr
    assert not (tmp_path / ".venv/.demo").exists(), "the next run tries again"


def test_make_demo_needs_this_package(tmp_path):
    done = make_demo(tmp_path, python=TORCH_ONLY)
    assert done.returncode != 0 and "Could not get this package" in done.stderr


def test_make_demo_takes_the_extra_where_it_can(tmp_path):
    done = make_demo(tmp_path, python="exit 0", rheo=RHEO)
    assert done.returncode == 0 and "Could not" not in done.stderr
    assert (tmp_path / ".venv/.demo").exists()


def test_make_demo_takes_a_local_model():
    plan = subprocess.run(
        ["make", "-n", "demo", "MODEL=some/dir"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert 'rheo demo --model "some/dir"' in plan.stdout and "gemma" not in plan.stdout
