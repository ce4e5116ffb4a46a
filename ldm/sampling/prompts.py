"""Captions from a text file, as editors and shells of all systems write it."""

from __future__ import annotations

import codecs
import re
from pathlib import Path

from ldm.io.weights import recognise

MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
"""Encodings by the mark that a file begins with."""
BLANK = " \t\v\f\u00a0\ufeff"
"""Characters stripped from the ends of a caption; the last is a mark that joined files have in the middle."""


def read_prompts(path: str) -> list[str]:
    """Read one caption per line; empty lines are skipped.

    Args:
        path: File in UTF-8, or in UTF-16 with a mark at the beginning, as Windows writes it.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is not text in one of these encodings, or holds no caption; names file and line.
    """
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
    if not (captions := [caption for line in lines if (caption := line.strip(BLANK))]):
        raise ValueError(f"--prompts: file '{path}' holds no caption, expected one per line")
    return captions


def _not_text(path: str, lines_before: int, reason: str) -> ValueError:
    where = f"--prompts: '{path}', line {lines_before + 1}"
    return ValueError(f"{where}: not readable as UTF-8 ({reason}): save the file as UTF-8")
