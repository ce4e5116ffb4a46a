"""Speed and waiting, measured on steps and loaders of known duration, by a clock that only they move."""

import re
import sys
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import TQDMProgressBar
from tiny_stage import TinyStage, loader, trainer

from ldm.callbacks.progress import ProgressBar, clock
from ldm.callbacks.throughput import Throughput


class Clock:
    """A clock that only steps, validations and loaders advance."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


CLOCK = Clock()


@pytest.fixture(autouse=True)
def _by_the_clock(monkeypatch):
    for module in ("throughput", "progress"):
        clocks = SimpleNamespace(perf_counter=CLOCK, monotonic=CLOCK)
        monkeypatch.setattr(f"ldm.callbacks.{module}.time", clocks)


class Slow(TinyStage):
    """A step takes 20 ms, a validation 200 ms."""

    def training_step(self, batch, batch_idx):
        CLOCK.now += 0.02
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        CLOCK.now += 0.2
        super().validation_step(batch, batch_idx)


class Endless:
    """Batches of 4, each after 10 ms, without an end and a length."""

    def __iter__(self):
        batch = next(iter(loader(4)))
        while True:
            CLOCK.now += 0.01
            yield batch


class Collect(L.Callback):
    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.values.append(dict(trainer.logged_metrics))


def test_throughput_excludes_validation_and_includes_the_wait_for_data(tmp_path):
    collect = Collect()
    run = trainer(
        tmp_path, callbacks=[Throughput(), collect], max_steps=12, log_every_n_steps=6, val_check_interval=3
    )
    run.fit(Slow(), Endless(), loader(4))
    assert "train/step_seconds" not in collect.values[4]
    values = collect.values[11]
    # of the last six steps, the two after a validation wait unmeasured
    assert values["train/step_seconds"].item() == pytest.approx((6 * 0.02 + 4 * 0.01) / 6)
    assert values["train/images_per_second"].item() == pytest.approx(6 * 4 / 0.16)
    assert values["train/images_per_second_per_device"] == values["train/images_per_second"]
    assert values["train/data_wait"].item() == pytest.approx(0.04 / 0.16)
    assert run.callback_metrics["samples"].item() == 48


def test_accumulated_batches_are_one_step(tmp_path):
    collect = Collect()
    run = trainer(tmp_path, callbacks=[Throughput(), collect], max_steps=4, accumulate_grad_batches=2)
    run.fit(Slow(), loader(1000))
    values = collect.values[-1]
    assert values["train/step_seconds"].item() == pytest.approx(2 * 0.02)
    assert values["train/images_per_second"].item() == pytest.approx(8 / 0.04)


def test_a_resumed_run_logs_at_the_steps_that_are_logged(tmp_path):
    first = trainer(tmp_path, max_steps=2)
    first.fit(Slow(), Endless(), loader(4))
    first.save_checkpoint(tmp_path / "x.ckpt")
    collect = Collect()
    run = trainer(
        tmp_path,
        callbacks=[Throughput(), collect],
        max_steps=7,
        log_every_n_steps=3,
        val_check_interval=100,
    )
    run.fit(Slow(), Endless(), loader(4), ckpt_path=tmp_path / "x.ckpt")
    found = [values.get("train/step_seconds") for values in collect.values]
    assert found[0] == pytest.approx(0.02)  # step 3, alone, without a wait before it
    assert found[3] == pytest.approx(0.03) and found[4] == pytest.approx(0.03)  # steps 4 to 6, and the last


def test_progress_writes_few_lines_where_there_is_no_terminal(tmp_path, capsys):
    run = trainer(
        tmp_path, callbacks=[ProgressBar(every_n_seconds=0.1)], enable_progress_bar=True, max_steps=15
    )
    run.fit(Slow(), Endless(), loader(4))
    lines = capsys.readouterr().out.splitlines()
    # step and batch take 30 ms, so each fourth step is due, then its validation of 200 ms, and the last step
    assert [re.match(r"tiny: step \d+|validation", line)[0] for line in lines] == [
        *("tiny: step 4", "validation", "tiny: step 8", "validation", "tiny: step 12", "validation"),
        "tiny: step 15",
    ]
    pattern = r"tiny: step 15/15, 60 samples \| 00:01 \| 00:00 left \| [\d.]+ samples/s \| train/loss [\d.]+"
    assert re.fullmatch(pattern, lines[-1]), lines[-1]
    assert any(line.startswith("validation: batch 1 of 1") for line in lines)
    assert not any(type(callback) is TQDMProgressBar for callback in run.callbacks)


def test_progress_of_a_resumed_run_counts_the_rest(tmp_path, capsys):
    first = trainer(tmp_path, max_steps=4)
    first.fit(TinyStage(), Endless(), loader(4))
    first.save_checkpoint(tmp_path / "x.ckpt")
    run = trainer(tmp_path, callbacks=[ProgressBar(0.0)], enable_progress_bar=True, max_steps=8)
    run.fit(TinyStage(), Endless(), loader(4), ckpt_path=tmp_path / "x.ckpt")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("tiny")]
    assert lines[0].startswith("tiny: step 5/8, ") and lines[-1].startswith("tiny: step 8/8, 32 samples")


def test_progress_draws_a_bar_on_a_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    run = trainer(tmp_path, callbacks=[ProgressBar()], enable_progress_bar=True)
    run.fit(Slow(), Endless(), loader(4))
    shown = capsys.readouterr().out
    assert "8/8" in shown and "samples/s" in shown and "validation" in shown
    assert "train/loss" in shown


def test_an_error_ends_the_bar(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)

    class Fails(TinyStage):
        def validation_step(self, batch, batch_idx):
            raise RuntimeError("broken")

    progress = ProgressBar()
    with pytest.raises(RuntimeError, match="broken"):
        trainer(tmp_path, callbacks=[progress], enable_progress_bar=True).fit(Fails(), Endless(), loader(4))
    assert progress.train_progress_bar.disable and progress.val_progress_bar.disable  # closed


def test_durations_are_written_as_clocks():
    assert [clock(s) for s in (0, 59.6, 600, 3661, 90000)] == [
        "00:00",
        "01:00",
        "10:00",
        "1:01:01",
        "25:00:00",
    ]


def test_random_numbers_are_not_touched(tmp_path):
    states = []
    for callbacks in ([], [Throughput(), ProgressBar()]):
        torch.manual_seed(0)
        trainer(tmp_path, callbacks=callbacks, enable_progress_bar=bool(callbacks)).fit(
            Slow(), Endless(), loader(4)
        )
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
