"""Run both checkouts step by step, and print a table of what is equal.

Runs every command of two checkouts in small, float32 on one thread, and compares what they leave: shards and
latents byte by byte, metrics.csv to the last digit, weights bit by bit, images pixel by pixel.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.same import compare
from benchmarks.same.compare import Found
from benchmarks.same.steps import AFTER_COMMANDS, COMMANDS, RENAMED_CONFIGS, Side, output, plan

WIDTHS = (28, 14, 9)


def same(before: Side, after: Side, names: Sequence[str], steps: int, reuse: bool) -> list[str]:
    """Run and compare all steps, print a row for each, and return the differences.

    Args:
        before: The checkout whose results count.
        after: The other one.
        names: The steps, in order.
        steps: Optimizer steps of each run.
        reuse: Whether BEFORE's results that are already there are taken.
    """
    print(f"left out of metrics.csv: {', '.join(compare.TIMES)}")
    _row("config", "rows x columns", "metrics", "weights")
    differences = []
    for name in names:
        begun = time.monotonic()
        before.run(name, steps, reuse)
        after.run(name, steps, reuse=False)
        found = _compare(name, before.folder / output(name), after.folder / output(name))
        _show(name, *found, seconds=time.monotonic() - begun)
        new = [f.difference for f in found if f.difference]
        print("".join(f"  {difference}\n" for difference in new), end="", flush=True)
        differences += new
        if found[0].difference and name.startswith("shards/") and not name.endswith("-latents"):
            _copy_shards(before.folder / name, after.folder / name)
    return differences


def _compare(name: str, before: Path, after: Path) -> list[Found]:
    if name.startswith("shards/"):
        return [compare.compare_files(before, after)]
    if name == "samples":
        return [compare.compare_images(before, after)]
    if name == "evaluation":
        return [compare.compare_evaluations(before / "evaluation.json", after / "evaluation.json")]
    return [
        compare.compare_metrics(before / "metrics.csv", after / "metrics.csv"),
        compare.compare_checkpoints(before / "checkpoints", after / "checkpoints"),
    ]


def _copy_shards(before: Path, after: Path) -> None:
    """Let AFTER train on BEFORE's shards, so that what follows does not differ for theirs alone."""
    shutil.rmtree(after)
    after.mkdir()
    for path in before.glob("*.tar"):
        shutil.copy2(path, after / path.name)


def _show(name: str, metrics: Found, weights: Found | None = None, *, seconds: float = 0.0) -> None:
    cells = ["DIFFERENT" if found.difference else "equal" for found in (metrics, weights) if found]
    last = f"{cells[1]}: {weights.size}" if weights else ""
    _row(name, metrics.size, cells[0], f"{last} ({seconds:.0f} s)".strip())


def _row(*cells: str) -> None:
    print(" | ".join(f"{cell:{width}}" for cell, width in zip(cells, (*WIDTHS, 0), strict=True)), flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code: 1 if anything differs."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.same", description=__doc__)
    parser.add_argument("before", type=Path, metavar="BEFORE", help="Folder of a checkout.")
    parser.add_argument("after", type=Path, metavar="AFTER", help="Folder of the changed one.")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help="Configurations or steps, and their needs."
    )
    parser.add_argument("--work", type=Path, help="Folder for what is run (default: a temporary one).")
    parser.add_argument(
        "--steps", type=int, default=20, help="Optimizer steps of each run, even (default 20)."
    )
    parser.add_argument(
        "--before-cache",
        action="store_true",
        help="Take what the same BEFORE left in --work; AFTER runs anew.",
    )
    options = parser.parse_args(arguments)
    if options.steps < 2 or options.steps % 2:
        parser.error(f"--steps: got {options.steps}, expected an even number")
    try:
        names = plan(options.before, options.only)
    except ValueError as error:
        parser.error(str(error))
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        before = Side(options.before, work / "before", COMMANDS, {})
        after = Side(options.after, work / "after", COMMANDS | AFTER_COMMANDS, RENAMED_CONFIGS)
        before.check()
        after.check()
        differences = same(before, after, names, options.steps, options.before_cache)
    print(f"first difference: {differences[0]}" if differences else "all equal")
    return 1 if differences else 0


if __name__ == "__main__":
    sys.exit(main())
