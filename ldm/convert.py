"""Bring weights here, or open them elsewhere: ``python -m ldm.convert to-diffusers --help``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from jsonargparse import ArgumentParser

from ldm.cli import run_command

HELP = """Bring weights of other programs here, or write ours as they read them.

Each command has its own --help. Nothing is downloaded; pickles are read without running what is in them."""
COMMANDS: tuple[Callable[..., None], ...] = ()
"""Functions whose names, arguments and docstrings are the command line."""


def parser() -> ArgumentParser:
    """Describe the command line: one command per function."""
    parser = ArgumentParser(prog="python -m ldm.convert", description=HELP, exit_on_error=False)
    commands = parser.add_subcommands(dest="command", metavar="COMMAND")
    for function in COMMANDS:
        command = ArgumentParser(exit_on_error=False, description=function.__doc__)
        command.add_function_arguments(function)
        commands.add_subcommand(_name(function), command)
    return parser


def convert(arguments: Sequence[str] | None = None) -> None:
    """Run the command.

    Args:
        arguments: The command line; None takes that of the process.
    """
    options = parser().parse_args(arguments)
    functions = {_name(function): function for function in COMMANDS}
    functions[options.command](**options[options.command].as_dict())


def _name(function: Callable[..., None]) -> str:
    return function.__name__.replace("_", "-")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_command(lambda: convert(arguments))


if __name__ == "__main__":
    sys.exit(main())
