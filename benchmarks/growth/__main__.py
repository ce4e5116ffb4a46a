"""Does anything grow faster than it should? ``python -m benchmarks.growth [--parts samples shards ...]``.

Start, memory and step at several numbers of samples, shards and parameters, and along a run: each row of the
table says how it should grow (constant, linear), and the exponent at its three largest sizes. Seconds are
of processor time, which other work on the machine takes no part of. A row that grows faster than it should is
measured once more, then marked; the exit code is 1 if any is. Linux; three to four minutes on one busy core.
``--parts parameters --sizes 1000000 10000000 100000000`` goes further.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.growth import length, samples, shards, weights
from benchmarks.growth.line import HEADER, Case, grow
from ldm.io.json_file import write_json

Part = Callable[[Sequence[int], Path], list[Case]]
PARTS: dict[str, tuple[Sequence[int], Part]] = {
    "length": ((50, 100, 200, 400), length.cases),
    "samples": ([10**n for n in range(3, 10)], lambda sizes, folder: samples.cases(sizes)),
    "shards": ((30, 100, 300, 1_000), shards.cases),
    "parameters": ([10**n for n in range(5, 8)], weights.cases),
}
"""Sizes of each part, and what it measures; the run first, while the process has little memory to reuse."""


def measure(name: str, sizes: Sequence[int] | None = None) -> list[dict[str, Any]]:
    """Measure a part and print its rows.

    Args:
        name: Of the part.
        sizes: Of it; None takes those in PARTS.
    """
    found = []
    with tempfile.TemporaryDirectory(prefix="ldm-growth-") as folder:
        for case in PARTS[name][1](sizes or PARTS[name][0], Path(folder)):
            line = grow(case)
            print(line.row(), flush=True)
            found.append(line.as_json())
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; return 1 if a row grows faster than it should."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth", description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--out", type=Path, default=Path("growth.json"))
    parser.add_argument("--sizes", nargs="+", type=int, help="Growing, at least two; of a single part.")
    options = parser.parse_args(arguments)
    if options.sizes and (len(options.parts) > 1 or len(set(options.sizes)) < 2):
        parser.error(f"--sizes: got {options.sizes}, expected two or more for one of --parts")
    torch.set_num_threads(1)
    started = time.monotonic()
    print(HEADER)
    results: dict[str, Any] = {}
    for name in options.parts:
        results[name] = measure(name, options.sizes)
        write_json(options.out, results)
    rows = [row for part in results.values() for row in part]
    fast = [row["name"] for row in rows if row["is_too_fast"]]
    print(
        f"\n{options.out}: {len(rows)} rows in {time.monotonic() - started:.0f} s, too fast: {fast or 'none'}"
    )
    return 1 if fast else 0


if __name__ == "__main__":
    sys.exit(main())
