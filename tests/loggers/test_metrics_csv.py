"""metrics.csv: every row once, also over new columns, crashes and resumed runs."""

import csv
import json

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny_stage import TinyStage, loader, trainer

from ldm.loggers.metrics_csv import MetricsCSV


def rows(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return [{k: v for k, v in row.items() if v} for row in csv.DictReader(file)]


def test_directions_of_logged_metrics_are_saved_with_the_rows(tmp_path):
    log = MetricsCSV(str(tmp_path / "run"), lambda: {"val/loss": "min", "val/psnr": "max", "val/fid": "min"})
    log.log_metrics({"train/loss": 0.1}, step=0)
    assert not (tmp_path / "run" / "metrics.json").exists()
    log.log_metrics({"val/loss": 0.1}, step=0)
    log.log_metrics({"val/psnr": 20.0}, step=0)
    stated = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert stated == {"val/loss": "min", "val/psnr": "max"}


def test_rows_and_new_columns(tmp_path):
    log = MetricsCSV(str(tmp_path / "run"))
    log.log_metrics({"train/loss": 0.1, "samples": 64.0, "epoch": 0}, step=0)
    log.log_metrics({"val/loss": 2.5, "samples": 64.0}, step=0)
    log.log_metrics({"train/loss": 1e-12, "samples": 3e9}, step=1)
    assert rows(tmp_path / "run") == [
        {"step": "0", "samples": "64", "train/loss": "0.1"},
        {"step": "0", "samples": "64", "val/loss": "2.5"},
        {"step": "1", "samples": "3000000000", "train/loss": "1e-12"},
    ]
    assert (tmp_path / "run" / "metrics.csv").read_text().startswith("step,samples,")


def test_every_float32_survives(tmp_path):
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 1e-3
    log = MetricsCSV(str(tmp_path))
    for step, value in enumerate(values.tolist()):
        log.log_metrics({"x": value}, step)
    read = torch.tensor([float(row["x"]) for row in rows(tmp_path)])
    assert torch.equal(read, values)


def test_values_that_are_no_numbers_are_written_as_they_are(tmp_path):
    MetricsCSV(str(tmp_path)).log_metrics({"a": float("nan"), "b": float("inf")}, 0)
    assert rows(tmp_path) == [{"step": "0", "a": "nan", "b": "inf"}]


def test_resume_drops_what_the_interrupted_run_wrote_later(tmp_path):
    log = MetricsCSV(str(tmp_path))
    for step in range(5):
        log.log_metrics({"train/loss": step}, step)
    log.log_metrics({"val/loss": 9}, 4)
    log = MetricsCSV(str(tmp_path))
    log.log_metrics({"train/loss": 30}, 3)
    assert [(row["step"], row.get("train/loss")) for row in rows(tmp_path)] == [
        ("0", "0"), ("1", "1"), ("2", "2"), ("3", "30"),
    ]  # fmt: skip


def test_a_validation_that_is_made_up_for_keeps_the_training_row_of_its_step(tmp_path):
    MetricsCSV(str(tmp_path)).log_metrics({"train/loss": 1}, 3)
    MetricsCSV(str(tmp_path)).log_metrics({"val/loss": 2}, 3)
    assert [set(row) for row in rows(tmp_path)] == [{"step", "train/loss"}, {"step", "val/loss"}]


def test_a_step_that_is_repeated_takes_the_validation_after_it_along(tmp_path):
    """Killed when a validation was logged, and the checkpoint of before it was not yet written."""
    log = MetricsCSV(str(tmp_path))
    for step in (8, 9):
        log.log_metrics({"train/loss": step}, step)
    log.log_metrics({"val/loss": 2, "train/bad_samples/other": 1}, 9)
    log.log_metrics({"train/loss": 10}, 10)
    log = MetricsCSV(str(tmp_path))
    log.log_metrics({"val/loss": 2}, 9)  # resumed in the validation
    assert [row.get("train/loss") for row in rows(tmp_path)] == ["8", "9", None]
    log = MetricsCSV(str(tmp_path))
    log.log_metrics({"train/loss": 9}, 9)  # resumed before the step
    assert [row.get("train/loss") for row in rows(tmp_path)] == ["8", "9"]


def test_a_line_cut_short_is_dropped(tmp_path):
    log = MetricsCSV(str(tmp_path))
    log.log_metrics({"train/loss": 1}, 0)
    with open(tmp_path / "metrics.csv", "a") as file:
        file.write("1,,0.12")
    MetricsCSV(str(tmp_path)).log_metrics({"train/loss": 3}, 2)
    assert [row["step"] for row in rows(tmp_path)] == ["0", "2"]


@pytest.mark.parametrize("stopped_at", [5, 6])
def test_a_resumed_fit_leaves_each_step_once(tmp_path, stopped_at):
    def fit(folder, max_steps, ckpt_path=None):
        saved = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=4, save_top_k=-1)
        log = MetricsCSV(str(folder))
        run = trainer(folder, max_steps=max_steps, callbacks=[saved], enable_checkpointing=True, logger=log)
        run.fit(TinyStage(), loader(100), loader(8), ckpt_path=ckpt_path)

    fit(tmp_path / "whole", 8)
    fit(tmp_path / "parts", stopped_at)
    fit(tmp_path / "parts", 8, ckpt_path=tmp_path / "parts" / "step=4.ckpt")
    steps = [
        [(row["step"], "val/loss" in row) for row in rows(tmp_path / name)] for name in ("whole", "parts")
    ]
    # Lightning writes a step's checkpoint before its validation, and does not repeat that on resume
    assert [s for s in steps[0] if s != ("3", True)] == [s for s in steps[1] if s != ("3", True)]
    assert len(steps[1]) == len(set(steps[1])) == 10
