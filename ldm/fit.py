"""Train a stage: ``python -m ldm.fit --config configs/demo/autoencoder.yaml``.

The same command resumes an interrupted run. Any field of the file can be overridden on the command line,
e.g. ``--model.optimizer.lr 1e-3 --data.batch_size 64``; what all runs share is in configs/base.yaml.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence

from jsonargparse import ArgumentParser

from ldm.cli import command_parser
from ldm.runs.options import CONFIG, FIELDS, HELP, OPTIONS, WandB

MORE = """Fields of the configuration, each of which is an option too:
{fields}

--help-all lists them all, --model.help CLASS and --data.reader.help CLASS what a class takes, e.g.
--model.help Diffusion. --print_config shows the values that a command line comes to."""


def help_parser() -> ArgumentParser:
    """Make the parser whose help is shown; that which parses takes seconds to import."""
    parser = command_parser("ldm.fit", HELP)
    parser.add_argument("-c", "--config", type=str, help=CONFIG)
    for name, option in OPTIONS.items():
        parser.add_argument(f"--{name}", **option)
    parser.add_class_arguments(WandB, "wandb")
    parser.epilog = MORE.format(fields="\n".join(f"  --{name:<16} {text}" for name, text in FIELDS.items()))
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code: 0 done, 2 bad input, 75 stopped by a signal, 130 by Ctrl-C."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    if not given or {"-h", "--help"} & set(given):
        help_parser().print_help()
        return 0 if given else 2
    from ldm import training

    return training.main(["--help"] if given == ["--help-all"] else arguments)


if __name__ == "__main__":
    # until training listens, and once it has ended
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    sys.exit(main())
