"""EMA: its closed form, when it is swapped in, and exact resume."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny_stage import TinyStage, loader, trainer
from torch import nn

from ldm.callbacks.ema import EMA
from ldm.checkpointing.writer import AtomicCheckpointIO


class Recorder(L.Callback):
    """Notes the weights after every optimizer step, and in each hook of validation."""

    def __init__(self):
        self.after_step = []
        self.hooks = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.after_step.append(pl_module.scale.detach().clone())

    def note(self, name, pl_module):
        self.hooks.append((name, pl_module.scale.detach().clone()))

    def on_validation_start(self, trainer, pl_module):
        self.note("validation", pl_module)

    def on_validation_epoch_start(self, trainer, pl_module):
        self.note("validation", pl_module)

    def on_validation_epoch_end(self, trainer, pl_module):
        self.note("validation", pl_module)

    def on_validation_end(self, trainer, pl_module):
        self.note("validation", pl_module)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.note("training", pl_module)

    def on_train_epoch_end(self, trainer, pl_module):
        self.note("training", pl_module)

    def on_train_end(self, trainer, pl_module):
        self.note("training", pl_module)


def fit(folder, *callbacks, stage=None, ckpt_path=None, count=1000, **changes):
    torch.manual_seed(0)
    stage = stage or TinyStage()
    run = trainer(
        folder, callbacks=list(callbacks), plugins=[AtomicCheckpointIO()], limit_val_batches=2, **changes
    )
    run.fit(stage, loader(count), loader(8), ckpt_path=ckpt_path)
    return run, stage


def average(weights, first, decay, warmup):
    shadow = first.double()
    for n, weight in enumerate(weights):
        d = min(decay, (1 + n) / (10 + n)) if warmup else decay
        shadow = d * shadow + (1 - d) * weight.double()
    return shadow.float()


@pytest.mark.parametrize(("decay", "warmup"), [(0.7, False), (0.7, True), (0.15, True), (0.0, False)])
def test_average_has_its_closed_form(tmp_path, decay, warmup):
    ema, recorder = EMA(decay, warmup), Recorder()
    fit(tmp_path, recorder, ema)
    expected = average(recorder.after_step, torch.zeros(3), decay, warmup)
    torch.testing.assert_close(ema.shadow["scale"], expected, rtol=1e-6, atol=1e-7)
    assert ema.num_updates == 8


def test_accumulated_batches_update_once(tmp_path):
    ema, recorder = EMA(0.5, warmup=False), Recorder()
    fit(tmp_path, ema, recorder, accumulate_grad_batches=3, max_steps=4, val_check_interval=6)
    assert ema.num_updates == 4
    expected = average(recorder.after_step[2::3], torch.zeros(3), 0.5, False)
    torch.testing.assert_close(ema.shadow["scale"], expected)


@pytest.mark.parametrize("ema_first", [True, False])
def test_validation_uses_the_average_and_training_never_does(tmp_path, ema_first):
    ema, recorder = EMA(0.9, warmup=False), Recorder()
    _, stage = fit(tmp_path, *([ema, recorder] if ema_first else [recorder, ema]))
    steps = [torch.zeros(3), *recorder.after_step]
    averages = [average(steps[1 : n + 1], torch.zeros(3), 0.9, False) for n in (4, 8)]
    validation = [w for name, w in recorder.hooks if name == "validation"]
    training = [w for name, w in recorder.hooks if name == "training"]
    assert len(validation) == 8 and len(stage.seen_scales) == 4
    for n, weights in enumerate(
        [validation[:4] + stage.seen_scales[:2], validation[4:] + stage.seen_scales[2:]]
    ):
        for weight in weights:
            torch.testing.assert_close(weight, averages[n])
    for weight, raw in zip(training, [*steps[:8], steps[8], steps[8]], strict=True):
        assert torch.equal(weight, raw)
    assert torch.equal(stage.scale, steps[8])


def test_frozen_parameters_and_buffers_have_no_average(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, save_last=True)
    ema = EMA(0.9)
    _, stage = fit(tmp_path, ema, checkpoint, enable_checkpointing=True)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert set(ema.shadow) == set(saved["callbacks"]["EMA"]["raw"]) == {"scale", "shift"}
    assert torch.equal(saved["state_dict"]["frozen"], torch.tensor([1.0 / 3.0]))
    assert saved["state_dict"]["count"] == stage.count == 8


class SaveDuring(L.Callback):
    """Writes a checkpoint in one hook, once, at optimizer step 4."""

    def __init__(self, hook, path):
        self.path = path
        setattr(self, hook, self.save)

    def save(self, trainer, *args):
        if trainer.global_step == 4 and not self.path.exists():
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_validation_start", "on_validation_end"])
def test_checkpoint_holds_average_and_raw_weights_swapped_or_not(tmp_path, hook):
    recorder, path = Recorder(), tmp_path / "x.ckpt"
    fit(tmp_path, SaveDuring(hook, path), recorder, EMA(0.9, warmup=False))
    saved = torch.load(path, weights_only=True)
    assert saved["weights"] == "ema"
    expected = average(recorder.after_step[:4], torch.zeros(3), 0.9, False)
    torch.testing.assert_close(saved["state_dict"]["scale"], expected)
    assert torch.equal(saved["callbacks"]["EMA"]["raw"]["scale"], recorder.after_step[3])


class WithoutNoise(TinyStage):
    """Its steps depend on weights and batch alone, and every batch is the same one."""

    def training_step(self, batch, batch_idx):
        return (self(batch["image"]) - batch["image"]).square().mean()


class SameBatch:
    def __iter__(self):
        while True:
            yield next(iter(loader(4)))


@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_validation_end"])
def test_resumed_run_is_the_uninterrupted_one(tmp_path, hook):
    def run(*callbacks, ckpt_path=None):
        stage, ema = WithoutNoise(), EMA(0.9)
        fitted = trainer(tmp_path, callbacks=[*callbacks, ema], plugins=[AtomicCheckpointIO()])
        fitted.fit(stage, SameBatch(), loader(8), ckpt_path=ckpt_path)
        return stage, ema

    path = tmp_path / "x.ckpt"
    stage, ema = run(SaveDuring(hook, path))
    resumed_stage, resumed = run(ckpt_path=path)
    assert resumed.num_updates == ema.num_updates == 8
    for name in ema.shadow:
        assert torch.equal(resumed.shadow[name], ema.shadow[name]), name
    for name, weight in stage.state_dict().items():
        assert torch.equal(resumed_stage.state_dict()[name], weight), name


def test_error_in_validation_leaves_raw_weights_and_a_right_checkpoint(tmp_path):
    class Fails(L.Callback):
        def on_validation_batch_end(self, *args):
            raise RuntimeError("broken image")

    ema, recorder, stage = EMA(0.9, warmup=False), Recorder(), TinyStage()
    checkpoint = ModelCheckpoint(tmp_path, save_last=True, save_on_exception=True)
    with pytest.raises(RuntimeError, match="broken image"):
        fit(tmp_path, checkpoint, Fails(), ema, recorder, stage=stage, enable_checkpointing=True)
    assert torch.equal(stage.scale, recorder.after_step[3])
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert torch.equal(saved["callbacks"]["EMA"]["raw"]["scale"], recorder.after_step[3])
    assert torch.equal(saved["state_dict"]["scale"], ema.shadow["scale"])


def test_swapped_nests_and_ends_with_the_raw_weights_even_after_an_error(tmp_path):
    ema = EMA(0.9)
    _, stage = fit(tmp_path, ema)
    raw = stage.scale.detach().clone()
    with pytest.raises(KeyError), ema.swapped(stage):
        with ema.swapped(stage):
            assert torch.equal(stage.scale, ema.shadow["scale"])
        assert torch.equal(stage.scale, ema.shadow["scale"])
        raise KeyError
    assert torch.equal(stage.scale, raw)


def test_validate_uses_the_average_of_a_checkpoint(tmp_path):
    path = tmp_path / "x.ckpt"
    fit(tmp_path, EMA(0.9), SaveDuring("on_validation_end", path))
    stage = TinyStage()
    trainer(tmp_path, callbacks=[EMA(0.9)]).validate(stage, loader(8), ckpt_path=path, verbose=False)
    saved = torch.load(path, weights_only=True)
    assert torch.equal(stage.seen_scales[0], saved["state_dict"]["scale"])
    assert torch.equal(stage.scale, saved["state_dict"]["scale"])


def test_tied_weights_are_averaged_under_each_name(tmp_path):
    class Tied(TinyStage):
        def __init__(self):
            super().__init__()
            self.twin = nn.Module()
            self.twin.scale = self.scale

    path = tmp_path / "x.ckpt"
    fit(tmp_path, EMA(0.9), SaveDuring("on_train_batch_end", path), stage=Tied())
    weights = torch.load(path, weights_only=True)["state_dict"]
    assert torch.equal(weights["scale"], weights["twin.scale"])


def test_bad_settings_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"EMA: decay is 1\.0, expected a number in \[0, 1\)"):
        EMA(1.0)
    with pytest.raises(ValueError, match="save_weights_only is true, expected false"):
        weights_only = ModelCheckpoint(tmp_path, save_weights_only=True)
        fit(tmp_path, EMA(0.9), weights_only, enable_checkpointing=True)
