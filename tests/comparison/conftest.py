"""Run folders as ldm.fit leaves them, written by its own parts."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml

from ldm.evaluation.record import append_lines
from ldm.io.images import write_png
from ldm.loggers.metrics_csv import MetricsCSV


@dataclass(frozen=True)
class Folders:
    """Makes run folders."""

    root: Path

    def make(self, name, losses, settings=None, seen=(64, 128), record=None):
        """One run: a training and a validation loss after each 64 samples, and a grid at each of ``seen``."""
        folder = self.root / name
        log = MetricsCSV(str(folder), lambda: {"val/loss": "min", "val/fid/x": "min"})
        folder.mkdir(parents=True)
        for i, loss in enumerate(losses, 1):
            log.log_metrics({"samples": 64 * i, "train/loss": loss + 1}, step=i)
            log.log_metrics({"samples": 64 * i, "val/loss": loss, "val/fid/x": 10 * loss}, step=i)
        settings = settings or {"model": {"class_path": "a.B", "init_args": {"lr": 1e-3}}}
        (folder / "config.yaml").write_text(yaml.safe_dump({"run": str(folder), **settings}))
        (folder / "environment.json").write_text(json.dumps({"git": {"revision": name}, "python": "3.11.7"}))
        for count in seen:
            shade = torch.full((3, 4, 4), count % 256, dtype=torch.uint8)
            write_png(folder / "images" / f"diffusion-{count:010d}.png", shade, {})
        if record is not None:
            when = {"samples": 64 * len(losses), "evaluation": "Evaluation"}
            append_lines(folder / "evaluations.jsonl", when, [record])
        return folder


@pytest.fixture
def folders(tmp_path) -> Folders:
    return Folders(tmp_path / "runs")
