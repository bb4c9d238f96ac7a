"""Run compute-sanitizer over a few cases of every kernel's tests: python -m bench.sanitize OUT [--cases N]

memcheck finds reads and writes outside of allocations, racecheck hazards in shared memory. The first cases of every
test function are the small and ragged ones. Needs a GPU and compute-sanitizer; the exit code is 1 when a tool finds
anything.
"""

import argparse
import re
import subprocess
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

TOOLS = ("memcheck", "racecheck")
TESTS = "tests/kernels"
LEFT_OUT = ("test_compile.py", "test_source.py")  # they launch nothing


def collect(cases: int) -> list[str]:
    """Return the node ids of the first `cases` Triton cases of every test function."""
    command = [sys.executable, "-m", "pytest", TESTS, "--collect-only", "-q", "-p", "no:cacheprovider"]
    listing = subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()
    by_function: dict[str, list[str]] = defaultdict(list)
    for node in listing:
        if "::" not in node or any(name in node for name in LEFT_OUT) or "numba" in node:
            continue
        by_function[node.partition("[")[0]].append(node)
    return [node for nodes in by_function.values() for node in nodes[:cases]]


def sanitize(tool: str, nodes: list[str], out: Path) -> str:
    """Run one tool over the tests; returns its summary line, and keeps the whole log."""
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", "pytest"]
    command += ["-q", "-p", "no:cacheprovider", *nodes]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    text = done.stdout + done.stderr
    (out / f"{tool}.txt").write_text("\n".join(text.splitlines()[-200:]) + "\n")
    summaries = re.findall(r"=+ (?:ERROR SUMMARY|RACECHECK SUMMARY): .*", text)
    passed = re.findall(r"^.*\d+ passed.*$", text, flags=re.MULTILINE)
    return f"{tool}: exit {done.returncode}; {' '.join(passed[-1:])}; {' '.join(summaries[-1:])}"


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.sanitize", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--cases", type=int, default=2, metavar="N", help="of every test function; default: 2"
    )
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    nodes = collect(args.cases)
    with ThreadPoolExecutor() as pool:  # side by side: both mostly wait for instrumented kernels
        reports = list(pool.map(lambda tool: sanitize(tool, nodes, args.out), TOOLS))
    lines = [f"{len(nodes)} cases", *reports]
    (args.out / "sanitizer.txt").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    return 0 if all("exit 0" in line for line in lines[1:]) else 1


if __name__ == "__main__":
    sys.exit(main())
