"""Training on sets or in buckets, killed and continued by other numbers of processes and workers."""

from __future__ import annotations

import random
import signal
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from typing_extensions import override

from benchmarks.kills.forks import Command
from benchmarks.kills.training import KINDS, Journal, Run, compare, in_training, in_writing, kill, sequence
from ldm.stage_protocols import progress_of

BATCH = 12
"""Samples of a step, over all processes."""
STEPS = 5
"""Of training, for each kill."""
ROUNDING = 1e-2
"""Relative, of losses: other numbers of processes add the same gradients in another order, and a weight whose
gradient is 0 but for rounding, such as a bias before a normalization, moves by that alone."""
SIGKILLS = [kind for kind, (_, number, _) in KINDS.items() if number == signal.SIGKILL]


class Positions(Journal):
    """Notes the world size with the keys of each step's samples."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, n: int) -> None:
        """Note the samples of the step that begins."""
        self._note(trainer, [progress_of(pl_module).steps, batch["key"], trainer.world_size])


@dataclass(frozen=True)
class ContinuedRun(Run):
    """A run whose numbers of processes and workers change.

    Args:
        data: What of the configuration's section ``data`` is not in ``options``.
        world: Processes.
        workers: Of each, to read.
    """

    data: Mapping[str, Any] = field(default_factory=dict)
    world: int = 2
    workers: int = 0

    @property
    @override
    def options(self) -> dict[str, Any]:
        own = {
            "data.batch_size": BATCH // self.world,
            "data.num_workers": self.workers,
            "trainer.val_check_interval": 4,
            "trainer.devices": self.world,
            "trainer.callbacks+": "benchmarks.kills.continued.Positions",
        }
        kept = {name: value for name, value in super().options.items() if name != "data.train"}
        last = kept.pop("trainer.callbacks.folder")
        kept.pop("trainer.callbacks+")
        return {**kept, **own, "trainer.callbacks.folder": last}

    @property
    @override
    def command(self) -> Command:
        config = self.folder / "data.yaml"
        config.write_text(yaml.safe_dump({"data": dict(self.data)}))
        plain = super().command
        return replace(plain, arguments=[*plain.arguments[:2], "--config", str(config), *plain.arguments[2:]])

    def restarted(self, world: int, workers: int) -> ContinuedRun:
        """Return the same run in other processes."""
        return replace(self, world=world, workers=workers)

    def positions(self) -> dict[int, set[str]]:
        """Collect what was read at each global position: one key, however often and by whom."""
        found: dict[int, set[str]] = defaultdict(set)
        for rank in range(3):
            for note in self.notes(rank):
                if isinstance(note, list):
                    step, keys, world = note
                    for number, key in enumerate(keys):
                        found[step * BATCH + number * world + rank].add(key)
        return found


def kill_continued(
    folder: Path, shards: Path, data: Mapping[str, Any], kills: int, chance: random.Random
) -> list[str]:
    """Print a row per kill; return what differs in the end from runs that nobody disturbed.

    Args:
        folder: Of the runs.
        shards: To validate on.
        data: What is trained on, of the configuration's section ``data``.
        kills: How many: half of a run of two processes, half of one with another number at each start.
        chance: Draws moments and numbers.
    """
    same, others, whole = (
        ContinuedRun(folder / name, shards, STEPS * kills, data) for name in ("same", "others", "all")
    )
    for run in (same, others, whole):
        run.folder.mkdir()
    for kind in sequence(kills - kills // 2, chance, SIGKILLS):
        print(kill(same.restarted(2, chance.randrange(3)), kind, chance), flush=True)
    for _ in range(kills // 2):
        print(_kill_others(others, chance), flush=True)
    for run, world in ((same, 2), (others, chance.choice((1, 3))), (whole, 2)):
        run.restarted(world, 0).command.finish(world)
    return compare(same, whole) + _compare_order(others, whole)


def _kill_others(run: ContinuedRun, chance: random.Random) -> str:
    """Start the run in one to three processes, kill one or all, and describe it in a row of a table."""
    world, workers = chance.choice((1, 2, 3)), chance.randrange(3)
    process = run.restarted(world, workers).command.start(world)
    chance.choice((in_training, in_training, in_writing))(run, process, chance)
    was_running = process.is_running
    which = chance.choice((slice(0, 1), slice(0, None)))
    process.send(signal.SIGKILL, which)
    codes = process.wait(60)
    steps = max([note[0] for note in run.notes() if isinstance(note, list)], default=0)
    about = f"SIGKILL, {'all' if which.stop is None else 'first'} of {world}, {workers} workers each"
    about = about if was_running else f"(ended before) {about}"
    return f"| {about} | step {steps} | {', '.join(map(str, codes))} | {run.is_unfinished()} |"


def _compare_order(ours: ContinuedRun, theirs: ContinuedRun) -> list[str]:
    """Name what differs after other numbers of processes: keys exactly, losses by more than rounding."""
    one, two = ours.positions(), theirs.positions()
    wrong = [f"position {p}: {sorted(one[p])}, not {sorted(two[p])}" for p in two if one[p] != two[p]]
    wrong += [f"position {p} is more" for p in one.keys() - two.keys()]
    wrong += ["not every position"] * (sorted(two) != list(range(BATCH * theirs.steps)))
    one_loss, two_loss = _losses(ours), _losses(theirs)
    if not np.allclose(one_loss, two_loss, rtol=ROUNDING):
        wrong.append(f"losses by {np.abs(one_loss / two_loss - 1).max():.2g}")
    return wrong


def _losses(run: ContinuedRun) -> np.ndarray:
    rows = run.metrics()
    return np.array([float(row["train/loss"]) for row in rows if row["train/loss"]])
