"""A run folder is complete and usable, however the run ends."""

import os
import signal

import pytest
import torch
from comparing import assert_equal, assert_same_run, error_of, metrics, state
from holding import QUICK, holder
from interruptions import signalled

from ldm import encode, fit
from ldm.io import lock
from ldm.latents.space import AutoencoderLatents


def values(run):
    return [{k: v for k, v in row.items() if v and k.startswith("val/")} for row in metrics(run)]


@pytest.mark.slow
@pytest.mark.parametrize("interval", ["4", "100", None])
def test_the_end_is_validated_so_the_latent_scale_is_of_the_weights_that_are_saved(fresh, interval):
    arguments = [a for a in fresh.arguments("autoencoder", "--trainer.max_steps=6") if "interval" not in a]
    for name, every in (("whole", "6"), ("run", interval)):
        more = [] if every is None else [f"--trainer.val_check_interval={every}"]
        assert fit.main([*arguments, *more, f"--run={fresh.runs / name}"]) == 0
    ours, expected = state(fresh.runs / "run"), state(fresh.runs / "whole")
    for part in ("state_dict", "latent", "optimizer_states", "progress"):
        assert_equal(ours[part], expected[part], part)
    assert ours["latent"]["measured_at"] == 6
    assert torch.isfinite(ours["state_dict"]["latent_std"]).all()
    assert values(fresh.runs / "run")[-1] == values(fresh.runs / "whole")[-1] != {}


@pytest.mark.slow
def test_weights_without_a_scale_are_refused_before_anything_is_encoded(fresh, capsys):
    run = fresh.runs / "autoencoder"
    arguments = fresh.arguments("autoencoder", "--trainer.max_steps=5")
    with pytest.warns(UserWarning, match="the latent scale is not measured at step 5"):
        assert fit.main([*arguments, "--trainer.limit_val_batches=0"]) == 0
    out = fresh.runs / "latents"
    line = error_of(capsys, [*fresh.encode(), f"--out={out}"], encode.main)
    assert f"'{run}/checkpoints/last.ckpt' has no measured latent scale for its weights of step 5" in line
    assert "found none" in line and len(line) < 300 and not out.exists()
    with pytest.raises(ValueError, match="no measured latent scale"):
        AutoencoderLatents(str(run))
    assert fit.main(arguments) == 0  # validates what it finds
    assert AutoencoderLatents(str(run)).channels > 0
    assert fit.main(arguments) == 0
    assert "finished, 5 of 5 steps are done" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_that_was_stopped_has_the_scale_of_other_weights(chain, fresh, capsys):
    stop = ["--trainer.callbacks+=interruptions.Stop", "--trainer.callbacks.step=6"]
    with pytest.raises(RuntimeError, match="the machine went away"):
        fit.main(fresh.arguments("autoencoder", *stop, "--trainer.callbacks.where=start"))
    line = error_of(capsys, [*fresh.encode(), f"--out={fresh.runs / 'latents'}"], encode.main)
    assert "no measured latent scale for its weights of step 6, found that of step 4" in line
    assert fit.main(fresh.arguments("autoencoder", "--trainer.max_steps=6")) == 0  # ends here
    assert state(fresh.runs / "autoencoder")["latent"]["measured_at"] == 6


@pytest.mark.slow
def test_a_run_killed_in_a_validation_begins_with_it_and_ends_as_if_nothing_was(chain, fresh):
    arguments, run = fresh.arguments("autoencoder"), fresh.runs / "autoencoder"
    if not (child := os.fork()):  # a process that need not import anything
        try:
            fit.main([*arguments, *signalled(4, "validation", signal.SIGKILL)])
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert state(run)["progress"]["steps"] == 4 and values(run)[-1] == {}
    assert fit.main(arguments) == 0
    assert_same_run(run, chain.runs / "autoencoder")


@pytest.mark.slow
def test_a_dry_run_leaves_nothing_that_the_real_one_finds(chain, fresh, capsys):
    dry = fresh.arguments("autoencoder", "--trainer.fast_dev_run=2")
    assert fit.main(dry) == 0
    assert "dry run, nothing is left, done, 2 steps" in capsys.readouterr().out
    assert not fresh.runs.exists()
    assert fit.main(fresh.arguments("autoencoder", "--trainer.max_steps=4")) == 0
    before = {path: path.stat().st_mtime_ns for path in fresh.runs.rglob("*")}
    assert fit.main(dry) == 0
    assert {path: path.stat().st_mtime_ns for path in fresh.runs.rglob("*")} == before


@pytest.mark.slow
def test_a_second_start_names_the_running_process_and_touches_nothing(chain, fresh, capsys, monkeypatch):
    for name, seconds in QUICK.items():
        monkeypatch.setattr(lock, name, seconds)
    run = fresh.runs / "autoencoder"
    with holder(run) as process:
        line = error_of(capsys, fresh.arguments("autoencoder"))
        assert f"--run: '{run}' is in use by process {process.pid} on " in line
        assert sorted(path.name for path in run.iterdir()) == [".lock", ".lock-holder.txt"]
    out = fresh.runs / "latents"
    with holder(out):
        line = error_of(capsys, [*chain.encode(), f"--out={out}"], encode.main)
        assert f"--out: '{out}' is in use by process " in line
    assert fit.main(fresh.arguments("autoencoder", "--trainer.max_steps=2")) == 0  # of one that was killed
