"""Captions from a text file, as editors and shells of all systems write it."""

from __future__ import annotations

import codecs
import json
import re
from pathlib import Path
from typing import NamedTuple

from ldm.conditioners.base import Conditioner
from ldm.conditioners.text import TowerText
from ldm.io.weights import recognise

MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
"""Encodings by the mark that a file begins with; one mark of UTF-32 begins with one of UTF-16."""
BLANK = " \t\v\f\u00a0\ufeff"
"""Characters stripped from the ends of a caption; the last is a mark that joined files have in the middle."""


class Prompt(NamedTuple):
    """A caption to draw.

    Args:
        text: The caption.
        negative: Caption to guide away from, instead of the empty one; None takes that of the call.
    """

    text: str
    negative: str | None = None


def read_prompt_file(path: str) -> list[Prompt]:
    """Read captions, one per line; from a file ``.jsonl`` objects with "prompt" and "negative_prompt".

    Args:
        path: File in an encoding of ``read_prompts``; empty lines are skipped.

    Raises:
        OSError: If it cannot be read.
        ValueError: As ``read_prompts``, or if a line is no such object; names file and line.
    """
    if not path.endswith(".jsonl"):
        return [Prompt(text) for text in read_prompts(path)]
    found = [_parsed(path, i, line) for i, line in enumerate(_lines(path)) if line.strip(BLANK)]
    if not found:
        raise ValueError(f"--prompts: file '{path}' holds no caption, expected one per line")
    return found


def read_prompts(path: str) -> list[str]:
    """Read one caption per line; empty lines are skipped.

    Args:
        path: File in UTF-8, or in UTF-16 or UTF-32 with a mark at the beginning, as Windows writes it.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is not text in one of these encodings, or holds no caption; names file and line.
    """
    if not (captions := [caption for line in _lines(path) if (caption := line.strip(BLANK))]):
        raise ValueError(f"--prompts: file '{path}' holds no caption, expected one per line")
    return captions


def read_in_chunks(conditioner: Conditioner) -> None:
    """Let a conditioner read captions of any length through CLIP text towers, in chunks.

    Raises:
        ValueError: If it has no such tower.
    """
    towers = [module for module in conditioner.modules() if isinstance(module, TowerText)]
    if not towers:
        raise ValueError(
            f"--long-prompts: the conditioner is {type(conditioner).__name__}, expected one with a CLIP text "
            "tower: others have no chunks"
        )
    for tower in towers:
        tower.long_prompts = "chunks"


def _lines(path: str) -> list[str]:
    recognise(path, f"--prompts: '{path}'")
    content = Path(path).read_bytes()
    encoding = next((name for mark, name in MARKS.items() if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        raise _not_text(path, content[: error.start].count(b"\n"), error.reason) from error
    lines = re.split(r"\r\n|\r|\n", text)
    for number, line in enumerate(lines):
        if "\0" in line:
            raise _not_text(path, number, "it has a NUL character, as in UTF-16 without a mark")
    return lines


def _parsed(path: str, number: int, line: str) -> Prompt:
    where = f"--prompts: '{path}', line {number + 1}"
    try:
        found = json.loads(line.strip(BLANK))
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: {error.msg}, expected a JSON object") from error
    names = {"prompt", "negative_prompt"}
    fits = isinstance(found, dict) and "prompt" in found and found.keys() <= names
    if not fits or not all(isinstance(value, str) for value in found.values()):
        raise ValueError(
            f'{where}: got {line.strip(BLANK):.80}, expected {{"prompt": "...", "negative_prompt": "..."}}'
        )
    return Prompt(found["prompt"], found.get("negative_prompt"))


def _not_text(path: str, lines_before: int, reason: str) -> ValueError:
    where = f"--prompts: '{path}', line {lines_before + 1}"
    return ValueError(f"{where}: not readable as UTF-8 ({reason}): save the file as UTF-8")
