"""Compare runs on one page of HTML: ``python -m ldm.compare runs/a runs/b --out compare.html``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser
from jsonargparse.typing import PositiveInt

from ldm.cli import command_parser, run_command
from ldm.comparison.page import page
from ldm.comparison.runs import read_runs
from ldm.io.atomic import write_text

HELP = """Compare runs on one page of HTML that needs no account, no network and nothing beside itself.

  python -m ldm.compare runs/demo/diffusion runs/wider/diffusion --out compare.html

Final values with how they were obtained, curves over each other, samples side by side at equal samples seen,
and the settings and environments that differ. Runs may be of different stages, or still training."""


def parser() -> ArgumentParser:
    """Describe the command line."""
    parser = command_parser("ldm.compare", HELP)
    parser.add_argument("runs", type=str, nargs="+", help="Run folders, as ldm.fit leaves them.")
    parser.add_argument("--out", type=str, default="compare.html", help="File to write.")
    parser.add_argument(
        "--images",
        type=PositiveInt,
        default=12,
        help="Image grids of each run, at most; they make the file large.",
    )
    return parser


def compare(arguments: Sequence[str] | None = None) -> None:
    """Run the command.

    Args:
        arguments: The command line; None takes that of the process.
    """
    options = parser().parse_args(arguments)
    text = page(read_runs(options.runs), options.images)
    out = Path(options.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, text)
    print(f"{out}: {len(options.runs)} runs, {len(text.encode()) / 1e6:.1f} MB")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_command(lambda: compare(arguments))


if __name__ == "__main__":
    sys.exit(main())
