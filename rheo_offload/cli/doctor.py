"""`rheo doctor`: measure this machine and say what limits it."""

import argparse
import json
import sys
from typing import Any

import torch

from rheo_offload import __version__

GIB, MIB = 1 << 30, 1 << 20


def add_parser(subparsers: Any) -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser(
        "doctor",
        help="measure this machine and say what limits it",
        description="Measure the link, the gather of KV blocks, pinning and host memory. "
        "Without a GPU, measure what is left. Medians; GB/s is 1e9 bytes a second.",
    )
    parser.add_argument("--quick", action="store_true", help="move less; seconds instead of a minute")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure and print; returns the exit code."""
    # The probe brings numba along, which the other verbs need not wait for.
    from rheo_offload.metrics import probe

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = probe.QUICK if args.quick else probe.Sizes()
    found = probe.report(device, sizes, lambda step: print(f"measuring: {step}", file=sys.stderr, flush=True))
    found["versions"] = {"rheo-offload": __version__, **found["versions"]}
    print(json.dumps(found, indent=2) if args.json else table(found))
    return 0


def table(found: dict[str, Any]) -> str:
    """Lay out a report of `metrics.probe.report` as text."""
    device, host = found["device"], found["host"]
    locked = host["locked_limit_bytes"]
    rows = [(name, version) for name, version in found["versions"].items()]
    rows += [("", "")]
    if device is None:
        rows.append(("GPU", "none"))
    else:
        rows.append(("GPU", f"{device['name']}, compute capability {device['compute_capability']}"))
        rows.append(("GPU memory", f"{_size(device['free_bytes'])} free of {_size(device['total_bytes'])}"))
    rows += [
        ("CPU cores", str(host["cores"])),
        ("host memory", f"{_size(host['free_bytes'])} free of {_size(host['total_bytes'])}"),
        ("locked memory", "unlimited" if locked is None else f"limit {_size(locked)}"),
        ("", ""),
    ]
    rows += [(figure["name"], _value(figure)) for figure in found["figures"]]
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {text}".rstrip() for name, text in rows]
    return "\n".join([*lines, "", "For an 8B model that attends to 4096 tokens a step:", *found["verdict"]])


def _value(figure: dict[str, Any]) -> str:
    text = f"{figure['value']:.3g} {figure['unit']} (median of {figure['runs']}"
    if figure["limit"] is not None:
        text += f"; {figure['value'] / figure['limit']:.0%} of {figure['limit_is']}, {figure['limit']:.3g}"
    return text + ")"


def _size(nbytes: int) -> str:
    return f"{nbytes / GIB:.4g} GiB" if nbytes >= GIB else f"{nbytes / MIB:.4g} MiB"
