"""Send what W&B lacks of runs: ``python -m ldm.sync runs/demo/diffusion runs/demo/clip``."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser
from jsonargparse.typing import NonNegativeFloat

from ldm.cli import command_parser, error_line, run_command

HELP = """Send to Weights & Biases what it lacks of runs: each row, image grid and artifact once, in order.

  python -m ldm.sync runs/demo/*

Runs may have been offline, killed, or cut off from the server. What is sent comes from metrics.csv, images,
config.yaml and evaluations.jsonl of the run's folder; called again it sends nothing. It needs 'wandb login'
or WANDB_API_KEY. Exit code 75: the server gave no answer, the same command may be repeated."""


def parser() -> ArgumentParser:
    """Describe the command line."""
    parser = command_parser("ldm.sync", HELP)
    parser.add_argument(
        "runs", type=str, nargs="+", help="Run folders, as ldm.fit leaves them, and latents of ldm.encode."
    )
    parser.add_argument(
        "--timeout", type=NonNegativeFloat, default=600.0, help="Seconds for each run until it is sent."
    )
    return parser


def sync(arguments: Sequence[str] | None = None) -> None:
    """Run the command: an error of one run does not keep the others from being sent.

    Args:
        arguments: The command line; None takes that of the process.
    """
    options = parser().parse_args(arguments)
    from ldm.io.lock import held
    from ldm.runs.sending import send

    failed: list[Exception] = []
    for name in options.runs:
        try:
            if not Path(name).is_dir():
                raise ValueError(f"'{name}' is no folder, expected that of a run")
            with held(Path(name), "runs"):
                print(f"{name}: {send(Path(name), options.timeout)}", flush=True)
        except (ValueError, OSError) as error:
            failed.append(error)
            if len(options.runs) > 1:
                print(error_line(error), file=sys.stderr, flush=True)
    if len(failed) > 1 or (failed and len(options.runs) > 1):
        last = failed[-1]
        last.args = (f"runs: {len(failed)} of {len(options.runs)} were not sent, see above",)
    if failed:
        raise failed[-1]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code: 0 sent, 2 bad input, 75 no answer."""
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # nothing is computed
    return run_command(lambda: sync(arguments))


if __name__ == "__main__":
    sys.exit(main())
