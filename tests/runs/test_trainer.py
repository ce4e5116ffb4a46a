"""Runs that would not end, options counted in epochs or time, and other people's callbacks."""

import os

import lightning as L
import pytest
import torch
from jsonargparse import Namespace
from lightning.pytorch import callbacks as theirs
from tiny_stage import TinyStage, loader

from ldm.callbacks.progress import ProgressBar
from ldm.checkpointing.callback import Checkpoints
from ldm.checkpointing.writer import AtomicCheckpointIO
from ldm.distributed.ddp import check_strategy, register
from ldm.distributed.launch import follow_slurm
from ldm.runs.finished import Finished, check_stopped, early_stopping
from ldm.runs.trainer import Trainer, ending, settle


def options(**changes):
    given = {
        "max_steps": 100, "max_epochs": -1, "max_time": None, "val_check_interval": 5, "fast_dev_run": False,
        "check_val_every_n_epoch": None, "accumulate_grad_batches": 1,
    }  # fmt: skip
    return Namespace(**{**given, **changes})


def trainer(folder, *callbacks, **changes):
    settings = {
        "accelerator": "cpu", "devices": 1, "max_steps": 8, "max_epochs": -1, "logger": False,
        "enable_model_summary": False, "num_sanity_val_steps": 0,
        "val_check_interval": 2, "check_val_every_n_epoch": None, "default_root_dir": folder,
        "plugins": [AtomicCheckpointIO()],
    }  # fmt: skip
    return Trainer(callbacks=[Checkpoints(), *callbacks], **{**settings, **changes})


def fit(folder, *callbacks, **changes):
    run, stage, last = trainer(folder, *callbacks, **changes), TinyStage(), folder / "checkpoints/last.ckpt"
    run.fit(stage, loader(), loader(8), ckpt_path=last if last.exists() else None)
    return run, stage


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_steps": -1}, "trainer.max_steps: got none, expected how many optimizer steps to train"),
        ({"max_epochs": 3}, "trainer.max_epochs: got 3, expected trainer.max_steps"),
        ({"check_val_every_n_epoch": 1}, "trainer.check_val_every_n_epoch: got 1, expected null"),
        (
            {"val_check_interval": "00:00:00:20"},
            "trainer.val_check_interval: got 00:00:00:20, expected",
        ),
        ({"val_check_interval": 0.5}, "trainer.val_check_interval: got 0.5, expected a number of batches"),
    ],
)
def test_options_that_a_stream_of_batches_cannot_have_are_refused(changes, message):
    with pytest.raises(ValueError) as error:
        settle(options(**changes), is_endless=True)
    assert message in str(error.value) and len(str(error.value)) <= 300


@pytest.mark.parametrize(
    ("steps", "batches", "every"), [(100, 1, 10), (10**6, 2, 2000), (3, 1, 1), (-1, 1, 1000)]
)
def test_a_run_without_an_interval_is_validated_now_and_then(steps, batches, every):
    given = options(
        max_steps=steps, accumulate_grad_batches=batches, val_check_interval=None, max_time="00:01:00:00"
    )
    settle(given, is_endless=True)
    assert given.val_check_interval == every


def test_data_of_ones_own_may_have_epochs():
    settle(
        options(max_steps=-1, max_epochs=3, check_val_every_n_epoch=1, val_check_interval=0.5),
        is_endless=False,
    )


def test_a_call_that_runs_out_of_time_reports_it_and_the_next_has_the_full_limit(tmp_path):
    first, stage = fit(tmp_path, max_time={"microseconds": 1})
    assert ending(first, stage.progress) == (
        "stopped at step 1 of 8, 4 samples: trainer.max_time is used up; "
        "the same command trains for as long again"
    )
    second, stage = fit(tmp_path, max_time={"hours": 1})
    assert ending(second, stage.progress) == "done, 8 steps, 32 samples"


def test_early_stopping_is_reported(tmp_path):
    still = theirs.EarlyStopping("val/loss", min_delta=100.0, patience=1)
    run, stage = fit(tmp_path, still)
    message = ending(run, stage.progress)
    assert message.startswith("stopped at step 4 of 8, 16 samples: Monitored metric val/loss did not improve")
    assert message.endswith("(EarlyStopping)") and len(message) < 300


def test_a_run_that_early_stopping_ended_is_finished_until_it_is_to_wait_for_longer(tmp_path):
    def early(patience):
        return theirs.EarlyStopping("val/loss", min_delta=100.0, patience=patience)

    fit(tmp_path, early(1))
    last = tmp_path / "checkpoints/last.ckpt"
    saved = ("run", last, torch.load(last, weights_only=True))
    with pytest.raises(
        Finished, match=r"^run: finished, stopped at step 4: Monitored metric val/loss did not"
    ):
        check_stopped(*saved, trainer(tmp_path, early(1)))
    check_stopped(*saved, trainer(tmp_path))  # without it, or with another one, training goes on
    check_stopped(*saved, trainer(tmp_path, early(2)))
    run, stage = fit(tmp_path, early(3))
    assert stage.progress.steps == 8 and early_stopping(run)[0].patience == 3
    assert ending(run, stage.progress) == "done, 8 steps, 32 samples"


def test_a_misspelt_metric_of_early_stopping_costs_no_step(tmp_path):
    with pytest.raises(ValueError, match=r"EarlyStopping monitors val/los, .* expected one of val/loss$"):
        fit(tmp_path, theirs.EarlyStopping("val/los"))
    assert torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)["progress"]["steps"] == 2


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (theirs.GradientAccumulationScheduler({0: 3}), "expected trainer.accumulate_grad_batches"),
        (
            theirs.StochasticWeightAveraging(0.1, swa_epoch_start=1),
            "expected the moving average that every run",
        ),
        (theirs.Timer("00:00:00:10"), "expected trainer.max_time"),
    ],
)
def test_callbacks_that_the_run_does_without_are_named(callback, message):
    with pytest.raises(ValueError, match=f"trainer.callbacks: got {type(callback).__name__}.*{message}"):
        Trainer(callbacks=[callback], logger=False)


def test_other_callbacks_work_with_ours(tmp_path):
    saved = theirs.ModelCheckpoint(tmp_path / "own", monitor="val/loss", save_top_k=2, every_n_train_steps=2)
    logger = L.pytorch.loggers.CSVLogger(tmp_path)
    rates = theirs.LearningRateMonitor()
    fit(tmp_path, saved, rates, theirs.Timer(), logger=logger)
    assert len(list((tmp_path / "own").glob("*.ckpt"))) == 2


def test_a_configured_progress_bar_replaces_ours():
    own = theirs.TQDMProgressBar()
    run = Trainer(callbacks=[ProgressBar(), own], logger=False)
    assert [c for c in run.callbacks if isinstance(c, theirs.ProgressBar)] == [own]


@pytest.fixture
def slurm(monkeypatch):
    """Variables of SLURM from a test, and none of torchrun."""
    for name in [name for name in os.environ if name.startswith(("SLURM_", "TORCHELASTIC"))]:
        monkeypatch.delenv(name)
    return lambda **values: [monkeypatch.setenv(f"SLURM_{name}", value) for name, value in values.items()]


def test_two_devices_are_not_trained_by_the_one_task_of_a_notebook(slurm):
    register()
    slurm(JOB_ID="7", JOB_NAME="jup", NTASKS="1")
    follow_slurm()
    with pytest.raises(ValueError, match=r"trainer.devices: 2 in all, but SLURM started 1 for them: start a"):
        check_strategy(L.Trainer(accelerator="cpu", devices=2, logger=False))
    check_strategy(L.Trainer(accelerator="cpu", devices=1, logger=False))
    slurm(JOB_NAME="interactive")
    check_strategy(L.Trainer(accelerator="cpu", devices=2, logger=False))


@pytest.mark.parametrize(
    "given", [{}, {"NTASKS_PER_NODE": "2"}, {"PROCID": "0", "LOCALID": "0", "NODEID": "0"}]
)
def test_a_shell_of_several_tasks_is_none_of_them(slurm, given):
    slurm(NTASKS="2", **given)
    with pytest.raises(ValueError, match=r"SLURM_NTASKS is 2, but without SLURM_\w+") as error:
        follow_slurm()
    assert len(str(error.value)) <= 300


@pytest.fixture
def _kernels():
    """What a Trainer sets for the whole process is as before."""
    before = torch.backends.cudnn.benchmark, torch.are_deterministic_algorithms_enabled()
    yield
    torch.backends.cudnn.benchmark = before[0]
    torch.use_deterministic_algorithms(before[1])


@pytest.mark.parametrize(("deterministic", "expected"), [(None, True), (False, True), (True, False)])
def test_fast_kernels_are_left_out_where_each_run_is_to_have_the_same_bits(_kernels, deterministic, expected):
    Trainer(accelerator="cpu", devices=1, benchmark=True, deterministic=deterministic, logger=False)
    assert torch.backends.cudnn.benchmark == expected
