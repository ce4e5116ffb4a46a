"""Index shards before anyone reads them: ``python -m ldm.data 'shards/train-*.tar'``.

The indices, NAME.tar.index.npz, are to be uploaded with the shards.
"""

from __future__ import annotations

import sys

from ldm.cli import command_parser, run_command
from ldm.data.index import summarize_all
from ldm.data.tar import expand


def index(arguments: list[str] | None = None) -> None:
    """Run the command."""
    parser = command_parser("ldm.data", __doc__)
    parser.add_argument("shards", nargs="+", help="Paths, with braces or globs.")
    found = summarize_all(expand(parser.parse_args(arguments).shards, "shards"), None)
    print(f"{len(found)} shards, {sum(summary.count for summary in found)} samples: indexed")


if __name__ == "__main__":
    sys.exit(run_command(index))
