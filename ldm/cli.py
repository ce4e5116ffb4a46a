"""Errors of all commands: one clear line for bad input, a traceback for bugs."""

from __future__ import annotations

import argparse
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from itertools import takewhile
from traceback import walk_tb
from types import FrameType
from typing import Any

from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser, DefaultHelpFormatter

USER_ERRORS = (ValueError, OSError, ArgumentError, ModuleNotFoundError)
"""Exceptions of bad input; any other is a bug and keeps its traceback."""
LIMIT = 300
"""Characters of the line that an error becomes, at most."""


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
    """Name the default device of commands: a GPU if there is one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def run_command(command: Callable[[], None]) -> int:
    """Run a command and return its exit code: 0, or after a line on stderr 2 or the error's own.

    With ``LDM_TRACEBACK=1`` in the environment errors keep their traceback.
    """
    try:
        command()
    except Exception as error:
        if os.environ.get("LDM_TRACEBACK") or not Reason.of(error).is_of_input():
            raise
        print(error_line(error), file=sys.stderr)
        return int(getattr(error, "exit_code", 2))
    return 0


@contextmanager
def naming(*options: str) -> Iterator[None]:
    """Name the option, as it is typed, in errors about its value: the first unless they name another."""
    try:
        yield
    except (ValueError, OSError) as error:
        found = {f"--{name}": text for name, _, text in [str(error).partition(": ")]}
        option = next((each for each in options if each in found), options[0])
        raise ValueError(f"{option}: {found.get(option, error)}") from error


def check_multiple(name: str, value: int, factor: int) -> None:
    """Check an option of the command line.

    Raises:
        ValueError: If it is no multiple of ``factor``.
    """
    if value < 1 or value % factor:
        raise ValueError(f"{name}: got {value}, expected a multiple of the autoencoder's factor {factor}")


@dataclass
class Reason:
    """The innermost of the errors that jsonargparse makes of one, and where in a configuration it arose.

    jsonargparse wraps an error once for each key above it, and tries a value of several allowed types as each
    of them. Here its exceptions are followed and not their texts: to the cause or, for several types, to all
    that the frame holds which raised, for it names only the first as its cause. What is read of its frames
    is not documented: tests/test_cli.py checks it.

    Args:
        error: What was raised first.
        keys: Option and keys that lead to it, the outermost first.
        built: Class whose arguments are wrong or whose constructor failed.
        wanted: Class that a value was to name.
        parser: Parser of the innermost key.
        notes: Where it was found, e.g. a file.
        others: What else was raised, for other types of the same value.
        is_parsing: Whether a command line or configuration was read, not built from.
    """

    error: BaseException
    keys: list[str] = field(default_factory=list)
    built: type | None = None
    wanted: type | None = None
    parser: argparse.ArgumentParser | None = None
    notes: list[str] = field(default_factory=list)
    others: list[BaseException] = field(default_factory=list)
    is_parsing: bool = False

    @classmethod
    def of(cls, error: BaseException) -> Reason:
        """Follow an error down to its reason."""
        found, keys = cls(error, is_parsing=isinstance(error, ArgumentError)), dict[int, str]()
        chain, found.others = _innermost(error)
        for found.error in chain:
            found.notes += getattr(found.error, "__notes__", [])
            for frame in filter(_parses, _frames(found.error)):
                actor = frame.f_locals.get("self")
                if isinstance(actor, argparse.ArgumentParser):
                    found.parser = actor
                elif isinstance(actor, argparse.Action) and not isinstance(actor, ActionConfigFile):
                    keys = dict(takewhile(lambda item: item[0] != id(found.parser), keys.items()))
                    keys[id(found.parser)] = actor.dest if keys else _as_typed(actor, found.parser)
                if isinstance(made := frame.f_locals.get("val_class"), type):
                    found.built = made
        raised: list[BaseException] = [found.error, *found.others]
        for frame in (frame for each in raised for frame in _frames(each)[-2:-1]):
            if isinstance(wanted := frame.f_locals.get("typehint"), type):
                found.wanted = wanted
        found.keys = list(keys.values())
        return found

    def is_of_input(self) -> bool:
        """Whether it is bad input, also to a class of the user, and no bug of ours."""
        return (
            _is_clear(self.error)
            or self.is_parsing
            or (self.built is not None and self.built.__module__.partition(".")[0] != "ldm")
        )

    def __str__(self) -> str:
        """Return it as one line: file, key, class, what was found, what was expected."""
        text, parsed = _text(self.error), _is_parsed(self.error)
        if parsed and self.others:
            text = _one_of([text, *map(_text, self.others)])
        if parsed:
            text = self._required(text) + self._instead(text)
        last = self.keys[-1].rpartition(".")[2].strip("-") if self.keys else ""
        if self.built and not parsed and self.built.__name__ not in text:
            text = f"{self.built.__name__}: {text}"
        if last and (parsed or not re.search(rf"\b{re.escape(last)}\b", text)):
            text = f"{'.'.join(self.keys)}: {text}"
        return " ".join(": ".join([*self.notes, text]).split())

    def _required(self, text: str) -> str:
        """Name options that lack as they are typed."""
        found = re.fullmatch(r"the following arguments are required: (.+)", text)
        if found is None or self.parser is None:
            return text
        typed = {action.dest: _as_typed(action, self.parser) for action in self.parser._actions}
        return ", ".join(typed.get(name, name) for name in found[1].split(", ")) + ": missing, but required"

    def _instead(self, text: str) -> str:
        """Name what there is instead of an option, key or class that there is not."""
        actions = self.parser._actions if self.parser else []
        if found := re.search(r"unknown key '(.+?)'", text):
            known: Iterable[str] = [action.dest for action in actions]
        elif found := re.match(r"unrecognized arguments: (-[^\s=]+)", text):
            known = [name for action in actions for name in action.option_strings]
        elif (found := re.match(r"got (\w+), expected .*import path", text)) and self.wanted:
            known = [cls.__name__ for cls in _subclasses(self.wanted)]
        else:
            return ""
        hint = instead(found[1], known)
        if self.built and "unknown key" in text:
            taken = ", ".join(inspect.signature(self.built).parameters)
            hint += f", expected of {self.built.__name__}: {taken}"
        return hint


def instead(name: str, known: Iterable[str]) -> str:
    """Say which of the known names was probably meant, "" if none is close."""
    near = get_close_matches(name, [each for each in known if not each.endswith(".help")], 1)
    return f", did you mean {near[0]}?" if near else ""


def _subclasses(cls: type[Any]) -> Iterator[type[Any]]:
    for subclass in cls.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)


_CLASS = "the import path of a class, such as package.module.Class"
REWORDED = {
    r"Expected a Literal\[(.+?)\]\. Got value: (.*)": r"got \2, expected one of \1",
    r"Expected an? str\. Got value: (True|False|[-+.\w]*\d[-+.\w]*)": r"got \1, expected text: quote it",
    r"Expected an? (.+?)\. Got value: (.*)": r"got \2, expected \1",
    r"(.+) does not conform to restriction (.+)": r"got \1, expected a number \2",
    r"invalid literal for int\(\) with base 10: '(.+)'": r"got \1, expected int",
    r"Expected a dot import path string: (.+)": rf"got \1, expected {_CLASS}",
    r"Not a valid subclass of (\w+)\. Got value: (.*)\nSubclass types.*": r"got \2, expected a class: \1",
    r"(?:Option|Key) '(.+?)' is not (?:accepted|expected)": r"got the unknown key '\1'",
    r"Group '(.+?)' does not accept option '(.+?)'": r"\1: got the unknown key '\2'",
}
"""Innermost messages of jsonargparse, and this project's words for them."""


def _text(error: BaseException) -> str:
    """Return the message of an error, without its wrapping, in the words of this project."""
    text = str(error)
    if "loading state_dict" in text:
        reasons = [line for line in text.splitlines() if "size mismatch" in line] or text.splitlines()[1:]
        message = f"the checkpoint does not fit model of the configuration: {reasons[0].strip().rstrip('.')}"
        if re.search(r'(?:"|mismatch for )(?!terms\.)\w', text):  # not only parameters of loss terms
            return f"{message}: expected its networks, or a fresh --run"
        return f"{message}: start another --run with --weights THIS_RUN"
    if text.startswith("Caught ") and "Original Traceback" in text:  # of a worker of a DataLoader
        return text.strip().splitlines()[-1].partition(": ")[2]
    if isinstance(error, ImportError | AttributeError):  # a class that there is not
        return text
    if not _is_parsed(error):
        return text if text and _is_clear(error) else f"{type(error).__name__}: {text}".rstrip(": ")
    text = re.sub(r"<class '(.+?)'>", r"\1", text).replace("typing.", "")
    text = re.sub(r"\bv(?=[<>=!])", "", text)
    for theirs, ours in REWORDED.items():
        if found := re.fullmatch(theirs, text, re.DOTALL):
            return found.expand(ours)
    return text


def _one_of(texts: list[str]) -> str:
    """Unite "got 1, expected a" and "got 1, expected b"."""
    got, _, first = texts[0].partition(", expected ")
    rest = [text.partition(", expected ") for text in texts[1:]]
    expected = [first, *(each for found, _, each in rest if found == got and each)]
    return f"{got}, expected {' or '.join(dict.fromkeys(expected))}" if first else texts[0]


def _is_clear(error: BaseException) -> bool:
    """Whether an error is bad input; Lightning's own by its name, as importing it takes seconds."""
    is_lightning_s = "MisconfigurationException" in [kind.__name__ for kind in type(error).__mro__]
    return isinstance(error, USER_ERRORS) or is_lightning_s or "loading state_dict" in str(error)


_NONE = "Expected a <class 'NoneType'>"


def _innermost(error: BaseException) -> tuple[list[BaseException], list[BaseException]]:
    """Follow an error to the first one raised; also return those raised as deep for other types."""
    if not _is_parsed(error):
        return [error], []
    lists = [found for found in _frames(error)[-1].f_locals.values() if isinstance(found, list) and found]
    several = next((each for each in lists if all(isinstance(e, Exception) for e in each)), [])
    several = several or [error.__cause__] * (error.__cause__ is not None)
    tried = [_innermost(each) for each in several if not str(each).startswith(_NONE)]
    if not tried:
        return [error], []
    # an error in a constructor or deep in a class is more specific than that a value is of another type
    depths = [(not _is_parsed(chain[-1]), len(chain)) for chain, _ in tried]
    best = [found for found, depth in zip(tried, depths, strict=True) if depth == max(depths)]
    (chain, others), *ties = best
    return [error, *chain], [*others, *(chain[-1] for chain, _ in ties)]


def _frames(error: BaseException) -> list[FrameType]:
    """List the frames from where an error was caught to where it was raised."""
    return [frame for frame, _ in walk_tb(error.__traceback__)]


def _parses(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__")).partition(".")[0] in ("jsonargparse", "argparse")


def _is_parsed(error: BaseException) -> bool:
    """Whether a parser raised it."""
    return any(map(_parses, _frames(error)[-1:]))


def _as_typed(option: argparse.Action, parser: argparse.ArgumentParser | None) -> str:
    """Name an option: for a command as it was typed, for a configuration as its key."""
    typed = parser is not None and parser.prog.startswith("python -m") and option.option_strings
    return option.option_strings[0] if typed else option.dest


def error_line(error: BaseException) -> str:
    """Return an error as one line of at most ``LIMIT`` characters.

    Long quotations are shortened first, of paths the beginning; then the middle, so that the beginning and
    the reason stay.
    """
    line = f"error: {Reason.of(error)}"
    if len(line) > LIMIT:
        line = re.sub(r"[^\s'\"()]{40,}", lambda word: f"{word[0][:8]}...{word[0][-28:]}", line)
    if len(line) > LIMIT:
        line = f"{line[: LIMIT - 103]}...{line[-100:]}"
    return line
