"""What a result depends on besides the code: machine, versions, commit."""

import importlib.metadata
import platform
import shlex
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch

from bench.schema import Environment

REPOSITORY = Path(__file__).parent.parent


def environment(device: torch.device, argv: Sequence[str], commit: str | None = None) -> Environment:
    """Describe this run.

    Args:
        device: where the model runs.
        argv: arguments after `python -m bench`.
        commit: what to record instead of the checkout's own history, which a copy lacks or lags behind; then `dirty` is
            `unknown`.
    """
    found = commit or _git("rev-parse", "HEAD")
    dirty = None if commit else _git("status", "--porcelain", "--untracked-files=no")
    return Environment(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        cpu=_cpu_name(),
        torch=torch.__version__,
        triton=_version("triton"),
        numba=_version("numba"),
        transformers=_version("transformers"),
        commit=found or "unknown",
        dirty="unknown" if dirty is None else str(bool(dirty)).lower(),
        started_at=datetime.now(UTC).isoformat(timespec="seconds"),
        command=shlex.join(["python", "-m", "bench", *argv]),
    )


def machine(device: torch.device) -> dict[str, object]:
    """Return what env.json holds beyond the row columns."""
    info: dict[str, object] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        info |= {
            "device_total_bytes": properties.total_memory,
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
        }
    return info


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def _git(*args: str) -> str | None:
    try:
        done = subprocess.run(["git", *args], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
