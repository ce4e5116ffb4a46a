"""Results of the demo: a table with goals, report.json, samples.png."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.callbacks.progress import clock
from ldm.hardware import choose_precision, device_of
from ldm.io.atomic import write_text
from ldm.runs.environment import environment


@dataclass(frozen=True)
class Line:
    """A line of the table.

    Args:
        figure: Key of the figure.
        meaning: The figure in words.
        goal: What should be reached, in the figure's unit; None if there is no goal.
        at_most: Whether the goal is an upper bound.
        form: How the figure is written; "clock" for durations.
    """

    figure: str
    meaning: str
    goal: float | None = None
    at_most: bool = False
    form: str = ".3f"

    def write(self, figures: dict[str, float]) -> str:
        """Write the line, or nothing if the figure is missing."""
        if self.figure not in figures:
            return ""
        value = figures[self.figure]
        return f"{self.meaning:<58} {self._number(value):>8}  {self._goal(value)}".rstrip() + "\n"

    def _goal(self, value: float) -> str:
        if self.goal is None:
            return ""
        reached = value <= self.goal if self.at_most else value >= self.goal
        sign = "<=" if self.at_most else ">="
        return f"{sign} {self._number(self.goal):<8} {'reached' if reached else 'missed'}"

    def _number(self, value: float) -> str:
        return clock(value) if self.form == "clock" else format(value, self.form)


MINUTES = {"bf16-mixed": 20, "32-true": 35}
"""Goal of the complete demo on two cores, by precision."""

TABLE = [
    Line(
        "seconds/total",
        "time, installing not counted [h:]mm:ss",
        60 * MINUTES[choose_precision(device_of("auto"))],
        at_most=True,
        form="clock",
    ),
    Line("seconds/pack", "  pack shards", form="clock"),
    Line("seconds/autoencoder", "  train autoencoder (at the same time as CLIP)", form="clock"),
    Line("seconds/clip", "  train CLIP", form="clock"),
    Line("seconds/encode", "  encode latents", form="clock"),
    Line("seconds/diffusion", "  train diffusion", form="clock"),
    Line("seconds/sample", "  draw unseen captions", form="clock"),
    Line("seconds/measure", "  measure", form="clock"),
    Line("autoencoder/psnr", "autoencoder: PSNR of held-out images, dB", 33.0, form=".2f"),
    Line("autoencoder/read_back_all", "  reconstructions in which everything reads right", 0.95),
    Line("clip/recall/image_to_text", "CLIP: caption found among 512 of unseen pairs (R@1)", 0.97),
    Line("clip/recall/text_to_image", "  image found among them", 0.97),
    Line("clip/swaps", "  swapped captions told apart", 0.995),
    Line("novel/count", "500 unseen captions drawn: count right", 0.97),
    Line("novel/colour", "  colours", 0.97),
    Line("novel/size", "  sizes", 0.97),
    Line("novel/position", "  positions", 0.97),
    Line("novel/shape", "  shapes", 0.85),
    Line("novel/all", "  everything at once", 0.75),
    Line("pairs/all", "200 captions with unseen pairs drawn: everything at once", 0.65),
    Line("novel/fid/clip", "Fréchet distance (CLIP features) of the unseen captions", form=".4f"),
    Line("novel/fid_floor/clip", "  of real images, half against half", form=".4f"),
    Line("novel/clip_score/clip", "CLIP score", form=".1f"),
]


def table(figures: dict[str, float]) -> str:
    """Write the figures as a table."""
    head = f"{'what':<58} {'measured':>8}  goal\n{'-' * 86}\n"
    return head + "".join(line.write(figures) for line in TABLE)


class Times:
    """Seconds of each step, added up over calls of the demo that continue one another.

    Args:
        path: File that remembers them.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.seconds: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}

    def add(self, step: str, seconds: float) -> None:
        """Add to a step."""
        self.seconds[step] = self.seconds.get(step, 0.0) + seconds
        self._keep()

    def set(self, step: str, seconds: float) -> None:
        """Set a step that every call repeats completely."""
        self.seconds[step] = seconds
        self._keep()

    def figures(self) -> dict[str, float]:
        """Return the seconds of all steps, and in total: two stages train at the same time."""
        alone = sum(s for step, s in self.seconds.items() if step not in ("autoencoder", "clip"))
        parallel = max(self.seconds.get("autoencoder", 0.0), self.seconds.get("clip", 0.0))
        return {"seconds/total": alone + parallel, **{f"seconds/{k}": v for k, v in self.seconds.items()}}

    def _keep(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_text(self._path, json.dumps(self.seconds))


def write_report(path: Path, figures: dict[str, float]) -> None:
    """Write the figures, their goals, and what they were measured on."""
    goals: dict[str, Any] = {line.figure: line.goal for line in TABLE if line.goal is not None}
    report = {"figures": figures, "goals": goals, "environment": environment()}
    write_text(path, json.dumps(report, indent=2) + "\n")
