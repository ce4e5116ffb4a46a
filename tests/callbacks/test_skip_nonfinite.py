"""A loss or gradient that is not finite: skipped by all processes, counted, and named when it persists."""

import copy
import gc
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from tiny_stage import TinyStage, loader, trainer

from ldm.callbacks.skip_nonfinite import SkipNonFinite
from ldm.checkpointing.callback import Checkpoints
from ldm.optim.adamw import FusedAdamW


class Ill(TinyStage):
    """Has a loss, or only a gradient, that is not finite at given steps."""

    def __init__(self, steps, kind="loss", value=float("nan"), fused=False):
        super().__init__()
        self.fused = fused
        self.steps, self.kind, self.value = steps, kind, value
        self.seen = []

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if self.trainer.global_step not in self.steps:
            return loss
        if self.kind == "gradient":
            loss.register_hook(lambda grad: grad * self.value)
            return loss
        # a constant added: autograd itself would find every gradient finite
        bad = loss + self.value
        self.log("train/bad", bad.detach(), batch_size=1)
        return bad

    def configure_optimizers(self):
        trained = [self.scale, self.shift]
        return FusedAdamW(trained, self.lr, (0.9, 0.999)) if self.fused else super().configure_optimizers()

    def on_train_batch_start(self, batch, batch_idx):
        super().on_train_batch_start(batch, batch_idx)
        optimizer = self.optimizers()
        self.seen.append(copy.deepcopy((self.state_dict(), optimizer.state_dict()["state"])))


class Node:
    """What lives as long as the graph of a step."""


class Through(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, node):
        ctx.node = node
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class Traced(TinyStage):
    """Has weak references to the graphs of its steps."""

    def __init__(self):
        super().__init__()
        self.graphs = []

    def training_step(self, batch, batch_idx):
        node = Node()
        self.graphs.append(weakref.ref(node))
        return Through.apply(super().training_step(batch, batch_idx), node)


def fit(folder, stage, max_in_a_row=20, **changes):
    callbacks = [SkipNonFinite(max_in_a_row), Checkpoints()]
    run = trainer(folder, enable_checkpointing=True, callbacks=callbacks, **changes)
    run.fit(stage, loader(), loader(8))
    return run


def same(one, two):
    (weights, moments), (others, their_moments) = one, two
    assert all(torch.equal(weights[name], others[name]) for name in ("scale", "shift"))
    for index, state in moments.items():
        for name, value in state.items():
            if not torch.equal(value, their_moments[index][name]):
                return False
    return moments.keys() == their_moments.keys()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", ["loss", "gradient"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_step_changes_neither_weights_nor_moments(tmp_path, kind, value, fused, capsys):
    stage = Ill({3}, kind, value, fused)
    run = fit(tmp_path, stage, log_every_n_steps=8, gradient_clip_val=0.5)
    assert run.global_step == 8
    assert same(stage.seen[3], stage.seen[4])
    assert not torch.equal(stage.seen[4][0]["scale"], stage.seen[5][0]["scale"])
    assert run.callback_metrics["train/skipped_steps"] == 1
    term = f"train/bad is {value}" if kind == "loss" else "the gradient is not finite though the losses are"
    assert (
        f"step 3 is skipped: process 0: {term}, samples 0012, 0013, 0014, 0015\n" in capsys.readouterr().err
    )


def test_finite_steps_are_unchanged(tmp_path):
    torch.manual_seed(0)
    ours = TinyStage()
    fit(tmp_path / "a", ours)
    torch.manual_seed(0)
    plain = TinyStage()
    trainer(tmp_path / "b").fit(plain, loader(), loader(8))
    assert torch.equal(ours.scale, plain.scale) and torch.equal(ours.shift, plain.shift)


def test_the_graph_of_a_step_is_freed(tmp_path):
    """Found by the memory of a long run: each step left the nodes of its graph behind."""
    stage = Traced()
    fit(tmp_path, stage)
    gc.collect()
    assert len(stage.graphs) > 3
    assert [graph() for graph in stage.graphs] == [None] * len(stage.graphs)


def test_a_persistent_one_ends_the_run_with_the_last_good_weights(tmp_path):
    stage = Ill({2, 5, 6, 7})
    with pytest.raises(
        ValueError, match=r"3 steps in a row .* step 7: process 0: train/bad is nan, samples 0028"
    ):
        fit(tmp_path, stage, max_in_a_row=3)
    saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 7
    assert torch.equal(saved["state_dict"]["scale"], stage.seen[5][0]["scale"])
    assert saved["callbacks"]["SkipNonFinite"] == {"num_skipped": 4, "in_a_row": 0}


def test_a_step_that_the_device_skips_is_known_to_the_next(tmp_path, capsys):
    """The run ends one step later than where the host decides."""
    stage = Ill({1, 3, 5, 6, 7}, fused=True)
    with pytest.raises(ValueError, match=r"3 steps in a row .* step 7: process 0: train/bad is nan, samples"):
        fit(tmp_path, stage, max_in_a_row=3, max_steps=12, log_every_n_steps=50, val_check_interval=12)
    assert len(stage.seen) == 9 and same(stage.seen[5], stage.seen[8])
    assert "step 1 is skipped: process 0: train/bad is nan, samples 0004" in capsys.readouterr().err
    saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert torch.equal(saved["state_dict"]["scale"], stage.seen[5][0]["scale"])
    assert saved["callbacks"]["SkipNonFinite"]["num_skipped"] == 5


def test_a_checkpoint_right_after_a_skipped_step_counts_it(tmp_path):
    fit(tmp_path, Ill({2, 3}, fused=True), max_steps=4, log_every_n_steps=50)
    saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["callbacks"]["SkipNonFinite"] == {"num_skipped": 2, "in_a_row": 2}


def test_all_batches_of_an_accumulated_step_are_named_and_skipped(tmp_path, capsys):
    stage = Ill({1})
    run = fit(tmp_path, stage, accumulate_grad_batches=2, max_steps=4)
    assert run.callback_metrics["train/skipped_steps"] == 1
    assert "samples 0008, 0009, 0010, 0011 and 4 more" in capsys.readouterr().err
    assert same(stage.seen[2], stage.seen[4])


def test_counts_go_on_after_a_resumption(tmp_path):
    with pytest.raises(ValueError, match="2 steps in a row"):
        fit(tmp_path, Ill({4, 5}), max_in_a_row=2)
    callbacks = [SkipNonFinite(2), Checkpoints()]
    run = trainer(tmp_path, enable_checkpointing=True, callbacks=callbacks)
    run.fit(
        Ill({6}), loader(), loader(8), ckpt_path=tmp_path / "checkpoints" / "last.ckpt", weights_only=True
    )
    assert callbacks[0].num_skipped == 3


def test_none_in_a_row_is_refused():
    with pytest.raises(ValueError, match="max_in_a_row is 0, expected at least 1"):
        SkipNonFinite(0)


@pytest.fixture(scope="module")
def ill(tmp_path_factory):
    """Run folders and outputs by strategy; the second of two processes meets losses that are not finite."""
    folder = tmp_path_factory.mktemp("ill")
    script = Path(__file__).parents[1] / "support" / "two_ill_processes.py"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, str(script), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    ddp, fsdp2 = done.stderr.split("== fsdp2\n", 1)
    return folder, {"ddp": ddp, "fsdp2": fsdp2}


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_all_processes_skip_what_one_met(ill, strategy):
    folder, output = ill[0] / strategy, ill[1][strategy]
    one, two = (torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    for ours, theirs in zip(one["seen"], two["seen"], strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(one["seen"][3], one["seen"][4]) and not torch.equal(one["seen"][4], one["seen"][5])
    for line in (one["error"], two["error"]):
        assert "2 steps in a row" in line
        assert "process 1: train/bad is nan" in line and "process 0" not in line
    assert "step 3 is skipped: process 1: train/bad is nan" in output
    # an error may have met one process alone, which has but a part of split weights
    assert (folder / "checkpoints" / "last.ckpt").exists() == (strategy == "ddp")
    assert ("stopped at step 7: not saved" in output) == (strategy == "fsdp2")
