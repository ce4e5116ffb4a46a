"""Kill training, packing, encoding, sampling, evaluation and conversion, and compare with undisturbed ones.

Training: two processes, killed again and again at random moments, also in validations and while a checkpoint
is written, and started again by the same command. In the end everything must be as in a run that nobody
disturbed, bit for bit: weights, average, optimizer, order of the data, metrics.csv, images; and each step
must have had the same samples each time that it began. The other commands: one process, killed at random
moments and repeated until it is done: what is there after a kill is whole, and in the end everything is.
Exit code 1 if anything differs. ``--only mixture``: training on two sets, half of the kills with other
numbers of workers, after which all is the same bit for bit, half with other numbers of processes at the same
global batch, after which the order of the samples is. ``--only buckets`` and ``--only mixed-buckets``: the
same on aspect-ratio buckets, of one set and of two.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.kills.commands import Victim, prepare
from benchmarks.kills.sets import kill_buckets, kill_mixed_buckets, kill_mixture
from benchmarks.kills.training import Run, compare, kill, sequence
from data.shapes.packer import Settings, pack

SHARE = 0.6
"""Of the kills, in training."""
STEPS = 5
"""Of training, for each kill: enough that it is not done before the last one."""


def kill_training(folder: Path, shards: Path, kills: int, chance: random.Random) -> list[str]:
    """Print a row per kill; return what differs in the end."""
    killed, whole = (Run(folder / name, shards, STEPS * kills) for name in ("killed", "whole"))
    for run in (killed, whole):
        run.folder.mkdir()
    for kind in sequence(kills, chance):
        print(kill(killed, kind, chance), flush=True)
    killed.command.finish(2)
    whole.command.finish(2)
    return compare(killed, whole)


def kill_commands(folder: Path, shards: Path, kills: int, chance: random.Random) -> list[str]:
    """Print a row per kill; return what was wrong after one, or differs in the end."""
    (root := folder / "prepared").mkdir()
    victims = [Victim(task, folder / f"task-{n}") for n, task in enumerate(prepare(root, shards))]
    wrong: list[str] = []
    for number in range(kills):
        row, found = victims[number % len(victims)].kill(chance)
        print(row, *found, sep="\n  ", flush=True)
        wrong += found
    for victim in victims:
        found = victim.finish()
        print(f"| {victim.task.name} | done {victim.rounds} times | 0 | |", *found, sep="\n  ", flush=True)
        wrong += found
    return wrong


Part = Callable[[Path, Path, int, random.Random], list[str]]
PARTS: dict[str, Part] = {
    "commands": kill_commands,
    "training": kill_training,
    "mixture": kill_mixture,
    "buckets": kill_buckets,
    "mixed-buckets": kill_mixed_buckets,
}
"""What is killed; each prints a row per kill, and returns what differs in the end."""


def main() -> int:
    """Print a row per kill and what differs in the end; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kills", description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="Of the moments.")
    parser.add_argument(
        "--only",
        choices=sorted(PARTS),
        help="All kills of one sort; mixture and buckets: also continued by other numbers of processes.",
    )
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    chance, begun = random.Random(options.seed), time.monotonic()
    training = round(SHARE * options.kills)
    shares = {"commands": options.kills - training, "training": training}
    if options.only:
        shares = {options.only: options.kills}
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        shards = Path(name) / "shards"
        pack(shards, Settings(train=60, val=24, novel=12, pairs=12, shard_size=20))
        print("| killed by | had done | exit codes | unfinished files |\n|---|---|---|---|", flush=True)
        for part, kills in shares.items():
            wrong += PARTS[part](Path(name), shards, kills, chance) if kills else []
    minutes = (time.monotonic() - begun) / 60
    print(
        f"\n{options.kills} kills, seed {options.seed}, {minutes:.0f} minutes; differences: {wrong or 'none'}"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
