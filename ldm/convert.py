"""Bring weights here, or open them elsewhere: ``python -m ldm.convert to-diffusers --help``."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import docstring_parser
from jsonargparse import ArgumentParser

from ldm.checkpointing.post_hoc import reconstruct
from ldm.cli import command_parser, run_command
from ldm.interop.compvis import export_file, import_file
from ldm.interop.diffusers import export_pipeline, import_folder
from ldm.interop.dit_file import export_dit, import_dit
from ldm.interop.open_clip import export_clip, import_clip
from ldm.interop.transformers import export_text, import_text
from ldm.io.pins import pinned
from ldm.io.upstream import OPTION, upstream_options

HELP = """Bring weights of other programs here, write ours as they read them, or make another average of ours.

Each command has its own --help. Nothing is downloaded; pickles are read without running what is in them."""
COMMANDS: dict[str, Callable[..., Any]] = {
    "from-diffusers": import_folder,
    "to-diffusers": export_pipeline,
    "from-compvis": import_file,
    "to-compvis": export_file,
    "from-dit": import_dit,
    "to-dit": export_dit,
    "from-open-clip": import_clip,
    "to-open-clip": export_clip,
    "from-transformers": import_text,
    "to-transformers": export_text,
    "post-hoc-ema": reconstruct,
}
"""Functions whose arguments and docstrings are the command line; those of a dataclass are options too."""
EXPORTS_OF_DIFFUSION = (export_pipeline, export_file, export_dit, export_text)
"""Those with the option --upstream."""


def parser() -> ArgumentParser:
    """Describe the command line: one command per function."""
    parser = command_parser("ldm.convert", HELP)
    commands = parser.add_subcommands(dest="command", metavar="COMMAND")
    for name, function in COMMANDS.items():
        command = command_parser("", inspect.cleandoc(function.__doc__ or "").partition("\n\nArgs:")[0])
        _add_arguments(command, function)
        if function in EXPORTS_OF_DIFFUSION:
            command.add_argument("--upstream", **OPTION)
        commands.add_subcommand(name, command)
    return parser


def convert(arguments: Sequence[str] | None = None) -> None:
    """Run the command.

    Args:
        arguments: The command line; None takes that of the process.
    """
    options = pinned(parser().parse_args(arguments))
    given = options[options.command].as_dict()
    with upstream_options(given.pop("upstream", None)):
        written = _call(COMMANDS[options.command], given)
    path, notes = written if isinstance(written, tuple) else (written, [])
    for note in notes:
        print(f"note: {note}")
    print(f"wrote {path}")


def _add_arguments(command: ArgumentParser, function: Callable[..., Any]) -> None:
    help_of = {
        each.arg_name: each.description for each in docstring_parser.parse(function.__doc__ or "").params
    }
    for name, kind, default in _parameters(function):
        if isinstance(kind, type) and is_dataclass(kind):
            _add_arguments(command, kind)
            continue
        required = default is inspect.Parameter.empty
        values = {"required": True} if required else {"default": default}
        kind = str if kind == str | Path else kind
        command.add_argument(f"--{name.replace('_', '-')}", type=kind, help=help_of[name], **values)


def _call(function: Callable[..., Any], given: dict[str, Any]) -> Any:
    """Call with the values of the options, and with dataclasses made of theirs."""
    return function(
        **{
            name: _call(kind, given) if isinstance(kind, type) and is_dataclass(kind) else given[name]
            for name, kind, _ in _parameters(function)
        }
    )


def _parameters(function: Callable[..., Any]) -> list[tuple[str, Any, Any]]:
    """List name, type and default of the parameters."""
    hints = get_type_hints(function.__init__ if isinstance(function, type) else function)  # type: ignore[misc]
    parameters = inspect.signature(function).parameters
    return [(name, hints[name], parameter.default) for name, parameter in parameters.items()]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_command(lambda: convert(arguments))


if __name__ == "__main__":
    sys.exit(main())
