"""Op name + device -> kernel. The only place that knows which home an op runs from."""

import importlib
from collections.abc import Callable
from functools import wraps
from types import SimpleNamespace
from typing import Any

import torch

from rheo_offload.errors import ConfigError

HOMES = {"triton": "gpu", "numba": "cpu", "reference": "reference"}

OPS = (
    "append",
    "append_chunk",
    "attend",
    "attend_centroids",
    "attend_fetch",
    "block_mass",
    "decide",
    "gated_act",
    "gather",
    "linear_few",
    "merge",
    "open_groups",
    "prefill_attention",
    "rank_bias",
    "resolve",
    "ring_append",
    "rms_norm",
    "rope",
    "sample",
    "sample_greedy",
    "score_mean",
    "score_minmax",
    "score_windows",
    "select",
    "stage",
    "summarize_chunk",
    "token_bias",
)


def kernels_for(device: torch.device, kernels: str = "auto") -> SimpleNamespace:
    """Return the ops for a device as attributes, one function per name in `OPS`.

    Args:
        device: where the pool lives.
        kernels: `auto` (Triton on CUDA, numba on the CPU), `triton`, `numba` or `reference`.

    Raises:
        ConfigError: Triton was asked for on a CPU, where it can only interpret its kernels.
    """
    if kernels == "auto":
        kernels = "triton" if device.type == "cuda" else "numba"
    if kernels not in HOMES:
        raise ValueError(f"kernels must be auto or one of {sorted(HOMES)}, not {kernels!r}")
    if kernels == "triton" and device.type == "cpu" and not _interprets():
        raise ConfigError(
            "execution.kernels triton needs a GPU, and the model is on the CPU; use auto or numba"
        )
    home = HOMES[kernels]
    ops = {op: getattr(importlib.import_module(f"csrc_free_kernels.{home}.{op}"), op) for op in OPS}
    if device.type == "cuda" and torch.cuda.device_count() > 1:
        ops = {name: _on(device, op) for name, op in ops.items()}
    return SimpleNamespace(**ops)


def _interprets() -> bool:
    """Return whether Triton interprets its kernels, as it does in tests without a GPU."""
    interpret: bool = importlib.import_module("triton").knobs.runtime.interpret
    return interpret


def _on(device: torch.device, op: Callable[..., Any]) -> Callable[..., Any]:
    """Return `op` with `device` as the current one: Triton launches there, wherever the tensors are."""

    @wraps(op)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.cuda.current_device() == device.index:
            return op(*args, **kwargs)
        with torch.cuda.device(device):
            return op(*args, **kwargs)

    return call


def of_kernels(module: str, name: str) -> Any:
    """Return what `csrc_free_kernels.<module>` calls `name`; imported here, when it is needed, and nowhere before."""
    return getattr(importlib.import_module(f"csrc_free_kernels.{module}"), name)
