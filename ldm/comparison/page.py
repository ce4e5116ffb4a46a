"""The page: final values, curves, samples at equal samples seen, settings that differ."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from ldm.comparison.curves import line, panels
from ldm.comparison.runs import ComparedRun, EvaluationRecord, differing

MEASURED = (
    *("stage", "samples", "weights", "precision", "seed", "sampler", "guidance", "steps", "evaluation"),
    *("checkpoint", "checkpoint_sha256"),
)
"""Fields of a record that identify the measurement. If the others, its settings, differ, numbers may too."""
DEPENDS = {
    "": ("model", "data.val", "data.val_filter", "data.image_size", "trainer.limit_val_batches"),
    "loss": ("model.objective", "model.latents", "model.losses", "model.kl_weight"),
}
PAIRS = "val/pairs"
"""Pairs that a contrastive stage contrasts at once: its other validated values depend on it."""
PAIRED = ("val/loss", "val/accuracy")
"""The values that do."""
"""Settings that values of a validation depend on, by how their names begin; "model" is the stage's class."""


def page(runs: Sequence[ComparedRun], max_images: int) -> str:
    """Write the page as one text of HTML that loads nothing.

    Args:
        runs: At least one.
        max_images: Image grids of each run, at most, evenly over its training.
    """
    from plotly.offline import get_plotlyjs

    here = FileSystemLoader(Path(__file__).parent)
    template = Environment(loader=here, autoescape=True, undefined=StrictUndefined).get_template("page.html")
    return template.render(
        runs=runs,
        lines=[line(number) for number in range(len(runs))],
        values=_values(runs),
        panels=panels(runs),
        samples=[
            _samples(kind, runs, max_images) for kind in sorted({k for run in runs for k in run.images})
        ],
        settings=_rows([run.settings for run in runs]),
        environments=_rows([run.environment for run in runs]),
        plotly=get_plotlyjs(),
    )


def thinned(items: Sequence[int], most: int) -> list[int]:
    """Keep at most ``most`` items, evenly, the last among them."""
    if len(items) <= most:
        return list(items)
    step = (len(items) - 1) / max(1, most - 1)
    return [items[round(len(items) - 1 - i * step)] for i in range(most)][::-1]


def best(values: Sequence[float | None], directions: Sequence[str]) -> float | None:
    """Return the best of several final values, None unless the runs state one direction, "min" or "max"."""
    known = [value for value in values if value is not None]
    if len(set(known)) < 2 or len(set(directions)) != 1:
        return None
    return min(known) if directions[0] == "min" else max(known)


def measured_otherwise(cells: Sequence[EvaluationRecord | None]) -> list[str]:
    """Name what differs in how the same value was measured: reference, number of images, extractor ..."""
    records = [cell.record for cell in cells if cell is not None]
    return [key for key in differing(records) if key not in MEASURED]


def validated_otherwise(name: str, settings: Sequence[dict[str, str]]) -> list[str]:
    """Name the settings that differ and that a value without a record depends on."""
    keys = [key for start, found in DEPENDS.items() if name.startswith(f"val/{start}") for key in found]
    return [
        each
        for each in differing(settings)
        if any(each == key or (key != "model" and each.startswith(f"{key}.")) for key in keys)
    ]


def _values(runs: Sequence[ComparedRun]) -> list[dict[str, Any]]:
    """Make a row per final value: a cell of each run, the best among them, why they do not compare."""
    rows = []
    for name in sorted({name for run in runs for name in run.last}):
        cells = [run.last.get(name) for run in runs]
        bare = [run.settings for run, cell in zip(runs, cells, strict=True) if cell and not cell.record]
        unlike = measured_otherwise(cells) + validated_otherwise(name, bare) + _other_pairs(name, runs)
        stated = [run.directions[name] for run in runs if name in run.directions]
        top = None if unlike else best([None if cell is None else cell.value for cell in cells], stated)
        rows.append({"name": name, "cells": cells, "unlike": unlike, "best": top})
    return rows


def _other_pairs(name: str, runs: Sequence[ComparedRun]) -> list[str]:
    pairs = {run.last[PAIRS].value for run in runs if name in run.last and PAIRS in run.last}
    return [PAIRS] if name in PAIRED and len(pairs) > 1 else []


def _rows(tables: Sequence[dict[str, str]]) -> list[dict[str, Any]]:
    return [
        {"name": key, "cells": cells, "unlike": [], "best": None} for key, cells in differing(tables).items()
    ]


def _samples(kind: str, runs: Sequence[ComparedRun], most: int) -> dict[str, Any]:
    """Collect the image grids of one kind, and the prompts of the newest, from its PNG, if all runs agree."""
    shown, prompts = [], []
    for number, run in enumerate(runs):
        if grids := run.images.get(kind):
            kept = thinned(sorted(grids), most)
            encoded = {seen: base64.b64encode(grids[seen].read_bytes()).decode() for seen in kept}
            shown.append({"number": number, "name": run.name, "images": encoded})
            with Image.open(grids[kept[-1]]) as image:
                text = getattr(image, "text", {})
            prompts.append({"seed": text.get("seed", "0"), "captions": text.get("captions", "")})
    agree = all(one == prompts[0] for one in prompts)
    return {"name": kind, "runs": shown, "prompts": prompts[0] if agree else None}
