"""What every command does about errors: one clear line for the user, a traceback for us."""

from __future__ import annotations

import argparse
import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from jsonargparse import ArgumentError, ArgumentParser, DefaultHelpFormatter

if TYPE_CHECKING:
    import torch

USER_ERRORS = (ValueError, OSError, ArgumentError)
"""What bad input raises; anything else is our mistake and keeps its traceback."""


class Help(argparse.RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Shows a command's description as it was written, line by line."""


def command_parser(name: str, description: str) -> ArgumentParser:
    """Make the parser of a command.

    Args:
        name: Module that is run, e.g. "ldm.sample"; "" for a command within one.
        description: What the command does, with examples.
    """
    prog = f"python -m {name}" if name else None
    return ArgumentParser(prog=prog, description=description, exit_on_error=False, formatter_class=Help)


def default_device() -> str:
    """Name the device that commands use unless told otherwise: a GPU where there is one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def run_command(command: Callable[[], None]) -> int:
    """Run a command and return its exit code: 0, or 2 after a line on stderr about bad input.

    With ``LDM_TRACEBACK=1`` in the environment errors keep their traceback.
    """
    try:
        command()
    except Exception as error:
        if os.environ.get("LDM_TRACEBACK") or not is_user_error(error):
            raise
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


def device(name: str) -> torch.device:
    """Find the device that ``--device`` names.

    Raises:
        ValueError: If there is no such device here.
    """
    import torch

    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"--device: got {name}, expected a device that is here, such as cpu ({reason})"
        ) from error


def check_at_least(name: str, value: int, lowest: int) -> None:
    """Check an option of the command line.

    Raises:
        ValueError: If it is smaller than ``lowest``.
    """
    if value < lowest:
        raise ValueError(f"{name}: got {value}, expected at least {lowest}")


def is_user_error(error: Exception) -> bool:
    """Tell bad input from a bug; Lightning's own error by its name, as importing it would import torch."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return (
        isinstance(error, USER_ERRORS)
        or "MisconfigurationException" in names
        or "loading state_dict" in str(error)
    )


def one_line(error: Exception) -> str:
    """Reduce an error to one line."""
    text = str(error) or type(error).__name__
    if isinstance(error, ArgumentError):
        text = _reason(text)
    elif "loading state_dict" in text:
        reasons = [line for line in text.splitlines() if "size mismatch" in line] or text.splitlines()[1:]
        text = f"the checkpoint does not fit model of the configuration: {reasons[0].strip():.240}"
    return re.sub(r"\s+", " ", text).strip()


def _reason(text: str) -> str:
    """Reduce a parser's nested explanation to the key, by its full name, and the innermost reason.

    A value of several allowed types is explained once for each: the first is the one that is meant, but what
    is said of a class comes before what is said of a number that may stand for it.
    """
    if text.startswith("Problems parsing config"):
        return text
    reasons = [line for line in map(_strip, text.splitlines()) if line and not line.startswith(NOISE)]
    keys = [key for line in reasons for key in re.findall(KEY, line)]
    classes = re.findall(r"given class_path '(.+?)'", text)
    rest = [re.sub(rf"{KEY}\s*", "", line) for line in reasons]
    rest = [line for line in rest if line and not line.startswith("Problem with given class_path")]
    plain = [match[1] for line in rest if (match := re.fullmatch(PLAIN, line))]
    rest = [line for line in rest if not re.fullmatch(PLAIN, line)] or rest
    reason = rest[0] if rest else "is not valid"
    if unknown := re.match(r"(?:Option|Key) '(.+?)' is not (?:accepted|expected)", reason):
        reason = f"got the unknown key '{unknown[1]}'" + _expected(classes[-1:])
    reason = re.sub(r"^Expected an? (.+?)\. Got value: (.*)", r"got \2, expected \1", reason)
    given = re.findall(r"Given value: (.+)", text)
    if re.fullmatch(PLAIN, reason) and given:
        reason = f"got {given[0]}, expected {plain[0]}"
    if "import path" in reason and given:
        plainly = f"{plain[0]} or " if plain else ""
        reason = f"got {given[0]}, expected {plainly}the import path of a class, such as package.module.Class"
    return f"{'.'.join(keys)}: {reason}" if keys else reason


KEY = r'^Parser key "(.+?)"(?: element \d+)?:'
PLAIN = r"Expected an? (\w+)"
NOISE = (
    "Does not validate",
    "Subtypes:",
    "Errors:",
    "Given value",
    "Expected a path but",
    "Expected a NoneType",
)


def _strip(line: str) -> str:
    return re.sub(r"<class '(.+?)'>", r"\1", line.strip(" -")).replace("typing.", "")


def _expected(class_path: list[str]) -> str:
    """List what a class takes, if there is one."""
    if not class_path:
        return ""
    name, (module, _, attribute) = class_path[0], class_path[0].rpartition(".")
    taken = inspect.signature(getattr(importlib.import_module(module), attribute)).parameters
    return f", expected of {name}: {', '.join(taken)}"
