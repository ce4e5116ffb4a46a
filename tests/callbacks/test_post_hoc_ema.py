"""Post-hoc EMA: averages of several lengths in training, their snapshots, exact resume, and any length."""

import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_ema import Recorder, SameBatch, SaveDuring, WithoutNoise
from tiny_stage import TinyStage, loader, trainer

from ldm.callbacks.ema import EMA
from ldm.callbacks.post_hoc_ema import PostHocEMA
from ldm.checkpointing.snapshots import read_averages, read_snapshots, snapshot_interval
from ldm.optim.power_average import Profile, reconstruction


def fit(folder, *callbacks, stage=None, data=None, ckpt_path=None, **changes):
    torch.manual_seed(0)
    stage = stage or TinyStage()
    run = trainer(folder, callbacks=list(callbacks), limit_val_batches=1, **changes)
    run.fit(stage, data or loader(4000), loader(8), ckpt_path=ckpt_path)
    return stage


def average(weights, sigma_rel):
    """Sum the weights after each step by their share of the profile."""
    ends = (np.arange(len(weights) + 1) / len(weights)) ** (Profile(sigma_rel, len(weights)).gamma + 1)
    return (torch.stack(weights).double() * torch.from_numpy(np.diff(ends))[:, None]).sum(0)


def steps(folder):
    return [each.progress.steps for each in read_snapshots(folder).values()]


def contents(folder):
    """Snapshots by name: what each is of, and the bytes of its weights; the order of a header is any."""
    return {
        path.name: (each, {name: value.numpy().tobytes() for name, value in load_file(path).items()})
        for path, each in read_snapshots(folder).items()
    }


def test_averages_have_their_closed_form_beside_an_ema(tmp_path):
    recorder, averages = Recorder(), PostHocEMA((0.05, 0.2), every_n_steps=4)
    fit(tmp_path, recorder, averages, EMA(0.9), max_steps=12)
    for i, sigma_rel in enumerate((0.05, 0.2)):
        expected = average(recorder.after_step, sigma_rel).float()
        torch.testing.assert_close(averages.averages[i]["scale"], expected, rtol=1e-5, atol=1e-6)
    assert set(averages.averages[0]) == {"scale", "shift"}  # neither frozen parameters nor buffers


def test_lengths_made_of_snapshots_are_within_a_percent_of_those_that_are_tracked(tmp_path):
    recorder, averages = Recorder(), PostHocEMA((0.05, 0.10), every_n_steps=15)
    fit(tmp_path, recorder, averages, max_steps=300, val_check_interval=300)
    found = read_snapshots(tmp_path)
    stored = [(path, i, Profile(s, f.time)) for path, f in found.items() for i, s in enumerate(f.sigma_rel)]
    for sigma_rel in (0.07, 0.12):
        parts, _ = reconstruction([profile for *_, profile in stored], Profile(sigma_rel, 300))
        made = sum(
            part * dict(read_averages(path, i))["scale"].double()
            for part, (path, i, _) in zip(parts, stored, strict=True)
        )
        tracked = average(recorder.after_step, sigma_rel)
        spread = torch.stack(recorder.after_step).double().std(0)
        assert ((made - tracked).norm() / spread.norm()) < 0.01


def test_snapshots_are_bounded_and_the_end_has_one(tmp_path):
    fit(tmp_path, PostHocEMA(every_n_steps=2, max_snapshots=4), max_steps=21, val_check_interval=21)
    assert steps(tmp_path) == [8, 16, 21]
    assert [snapshot_interval(step, 2, 4) for step in (2, 8, 9, 10, 16, 19, 20)] == [2, 2, 2, 4, 4, 4, 8]


def test_accumulated_batches_update_once(tmp_path):
    averages = PostHocEMA(every_n_steps=2)
    fit(tmp_path, averages, accumulate_grad_batches=3, max_steps=4, val_check_interval=12)
    assert averages.time == 4 and steps(tmp_path) == [2, 4]


@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_validation_end"])
def test_resumed_run_is_the_uninterrupted_one(tmp_path, hook):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    checkpoint = tmp_path / "x.ckpt"

    def run(folder, *callbacks, ckpt_path=None):
        callbacks = (EMA(0.9), *callbacks, PostHocEMA(every_n_steps=3))
        fit(folder, *callbacks, stage=WithoutNoise(), data=SameBatch(), ckpt_path=ckpt_path)
        return callbacks[-1]

    averages = run(whole, SaveDuring(hook, checkpoint))
    # what it wrote after the checkpoint is not to stay
    resumed.mkdir()
    (resumed / "averages").mkdir()
    shutil.copy(whole / "averages" / "step=00000003.safetensors", resumed / "averages")
    for step in (6, 7, 8):
        (resumed / "averages" / f"step={step:08d}.safetensors").write_bytes(b"of later steps")
    again = run(resumed, ckpt_path=checkpoint)
    assert again.time == averages.time == 8
    for ours, theirs in zip(again.averages, averages.averages, strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert contents(whole) == contents(resumed) and len(contents(whole)) == 3


def test_half_precision_halves_the_snapshots(tmp_path):
    fit(tmp_path, PostHocEMA(every_n_steps=8, dtype="float16"))
    (path,) = read_snapshots(tmp_path)
    assert {value.dtype for _, value in read_averages(path, 1)} == {torch.float16}


def test_a_snapshot_that_cannot_be_written_is_a_warning(tmp_path):
    (tmp_path / "averages").write_text("a file, where the folder should be")
    averages = PostHocEMA(every_n_steps=4)
    with pytest.warns(UserWarning, match="step 4: no snapshot of the averages"):
        fit(tmp_path, averages)
    assert averages.time == 8


def test_bad_settings_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"got 0.3, expected a length in \(0, 0.288\]"):
        PostHocEMA((0.05, 0.3))
    with pytest.raises(
        ValueError, match=r"sigma_rel is \[0.1, 0.1\], expected one or more different lengths"
    ):
        PostHocEMA((0.1, 0.1))
    with pytest.raises(
        ValueError, match="got every_n_steps 0 and max_snapshots 1, expected at least 1 and 2"
    ):
        PostHocEMA(every_n_steps=0, max_snapshots=1)


def test_other_lengths_than_the_run_has_are_refused(tmp_path):
    path = tmp_path / "x.ckpt"
    fit(tmp_path, SaveDuring("on_train_batch_end", path), PostHocEMA((0.05, 0.10)))
    with pytest.raises(ValueError, match=r"sigma_rel is \[0.07\], but the run averages over \[0.05, 0.1\]"):
        fit(tmp_path, PostHocEMA((0.07,)), ckpt_path=path)
