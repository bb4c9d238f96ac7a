"""Launch choices timed where they count, in real steps: python -m bench.step_sweep CASES.json --model SHAPE.json

`bench kernels --tune` times an op in a loop over itself. In a step the weights of the model pass through the caches
between two calls, and every other kernel's instructions too, so what is best there need not be best here. A model of
four layers is enough. CASES is a list of

    {"block_size": 32, "batch": 8, "context": 16384, "miss_rate": 0.02,
     "variants": [[], [["attend_splits", {}, {"programs": 256}]]]}

Without `miss_rate` every block is resident and the method's own selection counts; with it, `frozen` blocks of which
that share is loaded in every step. A variant is a list of entries of the launch table: op, features, use.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench.breakdown import step_parts
from bench.lab import FULL, Lab
from bench.ours import AllResident, Rheo
from bench.selectors import Frozen
from bench.shapes import load_model, merge_weights
from bench.targets import COMMON, FULL_OVERRIDES, TRACES
from bench.timing import measure_rates
from csrc_free_kernels import launch
from rheo_offload.config import RheoConfig

STEPS, SETTLE = 12, 10


def sweep(lab: Lab, case: dict[str, Any]) -> Iterator[tuple[list[Any], dict[str, float]]]:
    """Yield every variant of a case with the milliseconds of a step, by part; the launch table is as before."""
    before, rate = list(launch.entries()), case.get("miss_rate")
    heads = lab.model.config.num_key_value_heads * case["batch"]
    for variant in case["variants"]:
        selection = None if rate is None else Frozen(forced_misses=True)
        name = AllResident.name if rate is None else Rheo.name
        try:
            for op, features, use in variant:
                launch.put(op, lab.device, heads, features, use)
            with lab.ours(name, case["batch"], case["context"], selection, warm=rate is None) as subject:
                if selection is not None:
                    selection.set_miss_rate(rate)
                lab.settle(subject, SETTLE)
                yield variant, step_parts(subject, STEPS)
        finally:
            launch.replace(before)


def make_lab(model: Any, name: str, block_size: int, reservoir_bytes: int) -> Lab:
    """Return the laboratory for cases of one block size."""
    overrides = [*FULL_OVERRIDES, *COMMON, f"cache.block_size={block_size}"]
    return Lab(
        model=model,
        model_name=name,
        config=RheoConfig().with_overrides(overrides),
        rates=measure_rates(model.device, 2**26),
        scale=replace(FULL, reservoir_bytes=reservoir_bytes),
        traces=TRACES,
        emit=lambda row: None,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Print a JSON line a variant."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.step_sweep", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("cases", type=Path)
    parser.add_argument("--model", required=True, help="config.json (random weights), few layers of it")
    parser.add_argument("--reservoir", metavar="GIB", type=float, default=16, help="host memory to fill")
    args = parser.parse_args(argv)
    cases = json.loads(args.cases.read_text(encoding="utf-8"))
    model = load_model(args.model, torch.device("cuda"), torch.bfloat16)
    merge_weights(model)
    for size in sorted({case["block_size"] for case in cases}):
        lab = make_lab(model, Path(args.model).stem, size, int(args.reservoir * 2**30))
        lab.say = lambda text: print(text, file=sys.stderr)  # type: ignore[method-assign]
        with torch.no_grad():
            for case in (case for case in cases if case["block_size"] == size):
                shown = {key: value for key, value in case.items() if key != "variants"}
                for variant, parts in sweep(lab, case):
                    rounded = {part: round(ms, 4) for part, ms in parts.items()}
                    print(json.dumps(shown | {"entries": variant, "ms": rounded}), flush=True)
        lab.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
