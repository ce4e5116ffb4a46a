"""Schedule of checkpoints; a full disk costs a checkpoint, not the run."""

import csv
import resource
import signal
from types import MappingProxyType

import lightning as L
import pytest
import torch
from comparing import assert_equal
from tiny_stage import TinyStage, loader, trainer

from ldm.callbacks.ema import EMA
from ldm.callbacks.evaluation import Evaluation
from ldm.checkpointing.async_writer import AsyncCheckpointIO
from ldm.checkpointing.callback import Checkpoints
from ldm.checkpointing.writer import AtomicCheckpointIO
from ldm.loggers.metrics_csv import MetricsCSV
from ldm.metrics.psnr import PSNR


class Full:
    """No file grows beyond its first bytes while certain steps are written."""

    def __init__(self, *steps):
        super().__init__()
        self.steps = steps

    def _write(self, checkpoint, target):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        if checkpoint["global_step"] in self.steps:
            resource.setrlimit(resource.RLIMIT_FSIZE, (512, before[1]))
        try:
            super()._write(checkpoint, target)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)


class FullDisk(Full, AtomicCheckpointIO):
    pass


class FullDiskBeside(Full, AsyncCheckpointIO):
    pass


full_disks = pytest.mark.parametrize("disk", [FullDisk, FullDiskBeside])


def fit(folder, disk, **changes):
    callbacks = [Checkpoints(monitor="val/loss", keep_every_n_steps=4)]
    settings = {"max_steps": 16, "callbacks": callbacks, "enable_checkpointing": True, **changes}
    run = trainer(folder, plugins=[disk], **settings)
    run.fit(TinyStage(), loader(256), loader(8))
    return run


def steps(folder):
    files = (folder / "checkpoints").iterdir()
    return {f.name: torch.load(f, weights_only=True)["global_step"] for f in files}


@full_disks
def test_training_outlives_a_full_disk(tmp_path, disk, capsys):
    run = fit(tmp_path, disk(8, 12))
    assert run.global_step == 16
    kept = {f"step={n:08d}.ckpt": n for n in (4, 16)}
    assert steps(tmp_path) == {"last.ckpt": 16, "previous.ckpt": 4, "best.ckpt": 16, **kept}
    errors = capsys.readouterr().err
    for step in (8, 12):
        assert f"warning: step {step}: checkpoint '{tmp_path}/checkpoints/last.ckpt' cannot be writ" in errors


@full_disks
def test_a_best_that_was_not_written_is_not_the_one_to_beat(tmp_path, disk):
    checkpoints = Checkpoints(monitor="val/loss", keep_every_n_steps=4)
    with pytest.raises(OSError, match="the end of training"):
        fit(tmp_path, disk(8, 12), max_steps=12, callbacks=[checkpoints])
    best = torch.load(tmp_path / "checkpoints" / "best.ckpt", weights_only=True)
    assert best["global_step"] == 4
    assert checkpoints.best == best["callbacks"]["Checkpoints"]["best"]


@full_disks
def test_an_end_that_cannot_be_written_is_an_error(tmp_path, disk):
    with pytest.raises(OSError, match="the end of training cannot be written"):
        fit(tmp_path, disk(18), max_steps=18)
    assert steps(tmp_path)["last.ckpt"] == 16


@full_disks
def test_a_full_disk_does_not_hide_another_error(tmp_path, disk, capsys):
    class Broken(TinyStage):
        def training_step(self, batch, batch_idx):
            if self.trainer.global_step == 6:
                raise RuntimeError("the machine went away")
            return super().training_step(batch, batch_idx)

    run = trainer(tmp_path, enable_checkpointing=True, callbacks=[Checkpoints()], plugins=[disk(6)])
    with pytest.raises(RuntimeError, match="the machine went away"):
        run.fit(Broken(), loader(), loader(8))
    assert "warning: stopped at step 6: checkpoint" in capsys.readouterr().err
    assert steps(tmp_path) == {"last.ckpt": 4}


def test_keeping_none_of_the_kept_is_refused():
    with pytest.raises(ValueError, match="keep_newest: got 0, expected at least 1"):
        Checkpoints(keep_newest=0)


def test_only_an_atomic_writer_is_accepted(tmp_path):
    from lightning.fabric.plugins.io import TorchCheckpointIO

    with pytest.raises(ValueError, match=r"trainer.plugins: .* written by TorchCheckpointIO, expected ldm"):
        fit(tmp_path, TorchCheckpointIO())


class Worse(TinyStage):
    """Logs a score that falls at each validation under two names, and states a direction of one."""

    higher_is_better = MappingProxyType({"score": True})

    def validation_step(self, batch, batch_idx):
        for name in ("score", "other"):
            self.log(f"val/{name}", -float(self.trainer.global_step))


def best_step(folder, **settings):
    """Optimizer steps of the best of three checkpoints, after 4, 8 and 12."""
    checkpoints = Checkpoints(**settings)
    changes = {"max_steps": 12, "enable_checkpointing": True, "plugins": [AtomicCheckpointIO()]}
    trainer(folder, callbacks=[checkpoints], **changes).fit(Worse(), loader(256), loader(8))
    return steps(folder)["best.ckpt"]


@pytest.mark.parametrize(("mode", "expected"), [(None, 4), ("max", 4), ("min", 12)])
def test_the_best_is_in_the_stated_direction_unless_a_mode_is_given(tmp_path, mode, expected):
    assert best_step(tmp_path, monitor="val/score", mode=mode) == expected


@pytest.mark.parametrize(("monitor", "meant"), [("val/other", "val/score"), ("val/scroe", "val/score")])
def test_a_monitor_that_nobody_states_needs_a_mode_before_the_first_step(tmp_path, monitor, meant):
    with pytest.raises(ValueError, match=f"monitor: got '{monitor}', .* expected e.g. {meant}, or"):
        best_step(tmp_path, monitor=monitor)
    assert not (tmp_path / "checkpoints").exists()
    assert best_step(tmp_path, monitor="val/other", mode="max") == 4


class Fails(PSNR):
    """Measures at the first evaluation alone."""

    def compute(self):
        if self.num_computed > 0:
            raise RuntimeError("no weights")
        self.num_computed += 1
        return super().compute()

    num_computed = 0


@pytest.mark.parametrize("first", [0, 1])
def test_a_run_outlives_a_monitored_metric_that_fails(tmp_path, capsys, first):
    metric = Fails()
    metric.num_computed = first
    checkpoints = Checkpoints(monitor="val/psnr", mode="max")
    run = trainer(
        tmp_path,
        callbacks=[checkpoints, Evaluation([metric], 8)],
        enable_checkpointing=True,
        plugins=[AtomicCheckpointIO()],
    )
    with pytest.warns(UserWarning, match="metric Fails is left out"):
        run.fit(TinyStage(), loader(256), loader(8))
    assert run.global_step == 8
    assert (tmp_path / "checkpoints" / "best.ckpt").exists() == (first == 0)
    message = "step 8: checkpoints.monitor: 'val/psnr' was not logged, expected one of "
    assert (message in capsys.readouterr().err) == (first == 1)


def test_a_resumed_run_need_not_measure_at_once(tmp_path, capsys):
    def fit(steps, resume):
        evaluation = Evaluation([PSNR()], 8, every_n_steps=25)
        callbacks = [checkpoints, evaluation]
        run = trainer(
            tmp_path,
            callbacks=callbacks,
            max_steps=steps,
            enable_checkpointing=True,
            plugins=[AtomicCheckpointIO()],
        )
        run.fit(TinyStage(), loader(256), loader(8), ckpt_path=resume)

    checkpoints = Checkpoints(monitor="val/psnr", mode="max")
    fit(8, None)
    best = checkpoints.best
    checkpoints = Checkpoints(monitor="val/psnr", mode="max")
    fit(16, tmp_path / "checkpoints" / "last.ckpt")  # not due at step 12, due at the end
    assert checkpoints.best is not None and checkpoints.best >= best
    assert "step 12: checkpoints.monitor: 'val/psnr' was not logged" in capsys.readouterr().err
    assert steps(tmp_path)["last.ckpt"] == 16


def test_a_monitor_that_is_not_logged_costs_the_best_and_not_the_run(tmp_path, capsys):
    fit(tmp_path, AtomicCheckpointIO(), max_steps=8, callbacks=[Checkpoints("val/lost", "min")])
    assert steps(tmp_path) == {"last.ckpt": 8, "previous.ckpt": 4}
    message = (
        "warning: step 4: checkpoints.monitor: 'val/lost' was not logged, expected one of val/loss; best"
    )
    errors = capsys.readouterr().err
    assert message in errors and errors.startswith(
        "warning: checkpoints.monitor: got 'val/lost', which nothing"
    )


class Ends(TinyStage):
    """Is ended in the last validation by what a function does."""

    def __init__(self, end):
        super().__init__()
        self.end = end

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        if batch_idx == 1 and self.progress.steps == 8:
            self.end()


class Impatient(L.Callback):
    """Presses Ctrl-C once more while the first is dealt with."""

    def on_exception(self, trainer, pl_module, exception):
        if isinstance(exception, KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


class BadCallback(L.Callback):
    """Fails before Checkpoints, at the beginning of the last validation."""

    def on_validation_start(self, trainer, pl_module):
        if trainer.global_step == 8:
            fails()


def fails():
    raise RuntimeError("one bad sample")


def interrupted():
    signal.raise_signal(signal.SIGINT)


def logged(folder):
    return list(csv.DictReader((folder / "metrics.csv").open()))


def fit_to_the_end(folder, module, writer, *more, resume=None):
    run = trainer(
        folder,
        callbacks=[
            EMA(),
            Evaluation([PSNR()], 8, every_n_steps=3),
            *more,
            Checkpoints("val/loss", keep_every_n_steps=8),
        ],
        enable_checkpointing=True,
        logger=MetricsCSV(str(folder)),
        plugins=[writer()],
    )
    torch.manual_seed(0)
    run.fit(module, loader(256), loader(8), ckpt_path=resume)
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


def test_training_is_saved_before_validation(tmp_path):
    class Look(L.Callback):
        def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
            seen.append((trainer.global_step, steps(tmp_path)["last.ckpt"]))

    seen = []
    fit(tmp_path, AtomicCheckpointIO(), max_steps=8, callbacks=[Look(), Checkpoints()])
    assert seen == [(4, 4), (4, 4), (8, 8), (8, 8)]


@pytest.mark.parametrize("writer", [AtomicCheckpointIO, AsyncCheckpointIO])
@pytest.mark.parametrize("end", [fails, interrupted, BadCallback])
def test_an_interrupted_validation_costs_no_step(tmp_path, capsys, ctrl_c, writer, end):
    """Weights, averages, metrics and kept checkpoints equal those of an uninterrupted run."""
    expected = fit_to_the_end(tmp_path / "whole", TinyStage(), writer)
    stage, more = (TinyStage(), [end()]) if end is BadCallback else (Ends(end), [Impatient()])
    with pytest.raises((RuntimeError, SystemExit)):
        fit_to_the_end(tmp_path / "parts", stage, writer, *more)
    last = tmp_path / "parts" / "checkpoints" / "last.ckpt"
    assert f"stopped in the validation at step 8: saved {last}\n" in capsys.readouterr().out
    assert steps(tmp_path / "parts") == {"last.ckpt": 8, "previous.ckpt": 4, "best.ckpt": 4}
    resumed = fit_to_the_end(tmp_path / "parts", TinyStage(), writer, resume=last)
    for part in ("state_dict", "callbacks", "optimizer_states", "progress", "validation"):
        assert_equal(resumed[part], expected[part], part)
    assert logged(tmp_path / "parts") == logged(tmp_path / "whole")
    assert steps(tmp_path / "parts") == steps(tmp_path / "whole")
