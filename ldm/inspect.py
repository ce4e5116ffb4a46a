"""Look at what shards hold: ``python -m ldm.inspect "shards/own/*.tar" --html shards.html``."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser
from jsonargparse.typing import NonNegativeInt, PositiveInt

from ldm.cli import command_parser, run_command
from ldm.data.tar import expand
from ldm.inspection.page import page
from ldm.inspection.report import findings, table
from ldm.inspection.survey import survey
from ldm.io.atomic import write_text
from ldm.io.stderr import plain_warnings
from ldm.nets.text import num_tokens
from ldm.types import RGB8, ImageKind

HELP = """Look at what shards hold, and at what of it is broken.

  python -m ldm.inspect "shards/own/*.tar" --html shards.html
  python -m ldm.inspect "shards/web/{00000..00999}.tar" --samples 10000 --clip runs/clip --json shards.json

Samples and members of each shard, sizes and kinds of the images, lengths of the captions in characters and
tokens and the share that is cut off, classes, keys and images that are there twice, and what training could
not use, with the reasons that it would count. Shards are not changed; their folder may be read-only."""
CONTEXT_LENGTH = 77
"""Tokens that the text tower of CLIP reads."""


class BrokenShards(ValueError):
    """Something is broken, and --strict asked for an error."""

    exit_code = 1


def parser() -> ArgumentParser:
    """Describe the command line."""
    parser = command_parser("ldm.inspect", HELP)
    add = parser.add_argument
    add("shards", type=str, nargs="+", help="Paths, with braces or globs.")
    add("--samples", type=PositiveInt | None, help="Samples to look at, drawn at random; default: all.")
    add("--seed", type=int, default=0, help="Seed of the draw.")
    add(
        "--clip",
        type=str | None,
        help="Run of a CLIP whose tokens are counted; default: CLIP's tokenizer and 77.",
    )
    add(
        "--image",
        type=ImageKind | None,
        help="Kind of images that training declares, --image.channels 1: what it refuses is bad.",
    )
    add("--json", type=str | None, help="File for all findings.")
    add("--html", type=str | None, help="File for a page with them and a contact sheet.")
    add("--images", type=NonNegativeInt, default=48, help="Images of the contact sheet.")
    add("--strict", action="store_true", help="End with exit code 1 if anything is broken.")
    add("--index-dir", type=str | None, help="Folder of the indices; default: beside the shards, or a cache.")
    cores = len(os.sched_getaffinity(0))
    add("--workers", type=PositiveInt, default=cores, help="Processes that read and decode.")
    return parser


def inspect(arguments: Sequence[str] | None = None) -> None:
    """Run the command.

    Args:
        arguments: The command line; None takes that of the process.

    Raises:
        BrokenShards: If anything is broken and ``--strict`` was given.
    """
    command = parser()
    options = command.parse_args(arguments)
    kind = command.instantiate(options).image or RGB8
    paths = expand(options.shards, "shards")
    tower, limit = (options.clip, _limit(options.clip)) if options.clip else ("CLIP", CONTEXT_LENGTH)
    shown = options.images if options.html else 0
    what = options.index_dir, options.samples, options.seed, shown, _count_tokens, options.workers
    seen = survey(paths, *what, kind)
    found = findings(seen, tower, limit)
    if options.json:
        write_text(Path(options.json), json.dumps(found, indent=2, ensure_ascii=False) + "\n")
    if options.html:
        write_text(Path(options.html), page(found, seen.looks, seen.is_sound))
    print(table(found, seen.is_sound), end="")
    if options.strict and not seen.is_sound:
        raise BrokenShards(f"--strict: of {len(paths)} shards something is broken, see above")


def _count_tokens(captions: Sequence[str]) -> list[int]:
    return [num_tokens(caption) for caption in captions]


def _limit(run: str) -> int:
    from ldm.stages import CLIP
    from ldm.stages.load import load_stage

    return load_stage(run, CLIP).context_length


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    with plain_warnings():
        return run_command(lambda: inspect(arguments))


if __name__ == "__main__":
    sys.exit(main())
