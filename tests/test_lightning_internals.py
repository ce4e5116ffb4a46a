"""Contract with Lightning's private parts: a version that changes one of them fails here, by its name."""

import ast
import inspect
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from tiny_stage import TinyStage, loader, trainer

from ldm import lightning_internals as internals

ROOT = Path(__file__).resolve().parents[1]
OWNERS = {"trainer", "strategy", "launcher", "fit_loop", "epoch_loop", "val_loop", "precision_plugin"}
"""Names of Lightning's objects in ldm."""


def private_uses(source):
    """Lines of a module that name something private of Lightning."""
    tree, module = ast.parse(source), set(dir(L.LightningModule)) - set(dir(torch.nn.Module))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lightning"):
            names = [*node.module.split("."), *(alias.name for alias in node.names)]
            if any(name.startswith("_") for name in names):
                yield node.lineno
        if not isinstance(node, ast.Attribute) or node.attr.startswith("__"):
            continue
        owner = node.value
        name = owner.attr if isinstance(owner, ast.Attribute) else getattr(owner, "id", "")
        is_loop = node.attr in ("fit_loop", "epoch_loop", "val_loop", "batch_progress", "precision_plugin")
        is_private = node.attr.startswith("_") and (name in OWNERS or node.attr in module | {"_trainer"})
        if (is_loop and name != "self") or is_private:
            yield node.lineno


def test_no_other_module_names_a_private_part():
    found = {
        f"{path.relative_to(ROOT)}:{line}"
        for path in (ROOT / "ldm").rglob("*.py")
        if path.name != "lightning_internals.py"
        for line in private_uses(path.read_text())
    }
    assert found == set()


@pytest.mark.parametrize(
    "line",
    [
        "from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher",
        "trainer._checkpoint_connector.dump_checkpoint()",
        "self._trainer",
        "trainer.fit_loop.epoch_loop.batch_progress.total",
    ],
)
def test_the_search_finds(line):
    assert list(private_uses(line)) != []


def test_trainer_of_reads_trainer(tmp_path):
    stage = TinyStage()
    assert internals.trainer_of(stage) is None
    run = trainer(tmp_path, max_steps=1)
    run.fit(stage, loader())
    assert internals.trainer_of(stage) is run


def loops(folder, steps):
    """Checkpoint after some steps, written as ours are: after a validation."""

    class Save(L.Callback):
        def on_validation_end(self, trainer, pl_module):
            trainer.save_checkpoint(folder / "x.ckpt")

    run = trainer(folder, callbacks=[Save()], max_steps=steps)
    run.fit(TinyStage(), loader(256), loader(8))
    return torch.load(folder / "x.ckpt", weights_only=True)


def test_align_loops_knows_the_counts_of_a_checkpoint(tmp_path):
    saved = loops(tmp_path, 4)
    loop = saved["loops"]["fit_loop"]
    counts = {"ready": 4, "started": 4, "processed": 4, "completed": 4}
    assert loop["epoch_loop.batch_progress"] == {"total": counts, "current": counts, "is_last_batch": False}
    assert loop["epoch_loop.state_dict"]["_batches_that_stepped"] == 3
    internals.align_loops(saved, 4, trainer(tmp_path, accumulate_grad_batches=3))
    counts = dict.fromkeys(counts, 12)
    assert loop["epoch_loop.batch_progress"] == {"total": counts, "current": counts, "is_last_batch": False}


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(
    ("interval", "batches"), [(4, None), (8, None), (4, 0)]
)  # a validation at the step that is resumed from, or none, or none at all
def test_align_loops_resumes_at_the_step_after(tmp_path, interval, batches, accumulate):
    loops(tmp_path, 4)

    class Look(L.Callback):
        def __init__(self):
            self.seen, self.validated = [], []

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            logged = trainer.fit_loop.epoch_loop._batches_that_stepped
            self.seen.append((batch_idx, trainer.global_step, pl_module.progress.steps, logged))

        def on_validation_start(self, trainer, pl_module):
            self.validated.append(trainer.global_step)

    look = Look()
    run = trainer(
        tmp_path,
        callbacks=[look],
        max_steps=8,
        accumulate_grad_batches=accumulate,
        val_check_interval=interval * accumulate,
        limit_val_batches=batches,
    )
    run.fit(TinyStage(), loader(256), loader(8), ckpt_path=tmp_path / "x.ckpt")
    first, last = 4 * accumulate, 8 * accumulate
    assert look.seen == [(i, *[i // accumulate] * 3) for i in range(first, last)]
    assert look.validated == ([8] if batches is None else [])


def test_align_loops_leaves_the_end_of_an_epoch_to_lightning(tmp_path):
    saved = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    settings = {"val_check_interval": None, "check_val_every_n_epoch": 1, "enable_checkpointing": True}
    first = trainer(tmp_path, callbacks=[saved], max_epochs=2, max_steps=-1, **settings)
    first.fit(TinyStage(), loader(16), loader(8))
    for epoch, steps in ((0, 4), (1, 8)):
        run = trainer(tmp_path, max_epochs=3, max_steps=-1, **{**settings, "enable_checkpointing": False})
        stage = TinyStage()
        run.fit(stage, loader(16), loader(8), ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
        assert run.global_step == stage.progress.steps == 12 and stage.progress.samples == 48
        assert int(stage.count) == 12, f"resumed after {steps} steps"


def test_set_max_steps_lets_training_begin_after_its_last_step(tmp_path):
    loops(tmp_path, 4)

    class Look(L.Callback):
        def __init__(self, more):
            self.more, self.begun = more, False

        def on_fit_start(self, trainer, pl_module):
            internals.set_max_steps(trainer, 4 + self.more)
            assert trainer.max_steps == 4 + self.more

        def on_train_start(self, trainer, pl_module):
            self.begun = True
            internals.set_max_steps(trainer, 4)

    for more in (0, 1):
        look = Look(more)
        run = trainer(tmp_path, callbacks=[look], max_steps=4)
        run.fit(TinyStage(), loader(256), loader(8), ckpt_path=tmp_path / "x.ckpt")
        assert look.begun == bool(more) and run.global_step == 4


def test_validate_validates_all_under_the_number_of_the_step_before(tmp_path):
    loops(tmp_path, 4)

    class Validate(L.Callback):
        def __init__(self):
            self.seen = []

        def on_train_start(self, trainer, pl_module):
            internals.validate(trainer, 4)
            assert trainer.training and torch.is_grad_enabled()

        def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
            logged = trainer.fit_loop.epoch_loop._batches_that_stepped
            self.seen.append((batch_idx, trainer.global_step, logged, pl_module.training))

    validate = Validate()
    run = trainer(tmp_path, callbacks=[validate], max_steps=6, val_check_interval=3)
    run.fit(TinyStage(), loader(256), loader(8), ckpt_path=tmp_path / "x.ckpt")
    first, later = validate.seen[:2], validate.seen[2:]
    assert first == [(0, 4, 3, False), (1, 4, 3, False)] and {step for _, step, *_ in later} == {6}
    assert "val/loss" in run.callback_metrics


def test_dump_checkpoint_builds_a_checkpoint(tmp_path):
    run = trainer(tmp_path, max_steps=1)
    run.fit(TinyStage(), loader())
    found = internals.dump_checkpoint(run)
    expected = ("state_dict", "loops", "optimizer_states", "lr_schedulers", "callbacks", "progress")
    assert set(expected) <= found.keys()


def test_ignore_sigterm_replaces_what_is_there(tmp_path):
    run = trainer(tmp_path)
    assert run._signal_connector.received_sigterm is False
    assert inspect.ismethod(run.fit_loop.epoch_loop._broadcast_sigterm_tensor)
    run._signal_connector.received_sigterm = True
    internals.ignore_sigterm(run)
    assert run.received_sigterm is False and run.fit_loop.epoch_loop._broadcast_sigterm_tensor() is None


def test_kill_subprocesses_knows_the_launcher(tmp_path):
    assert list(inspect.signature(_SubprocessScriptLauncher.kill).parameters) == ["self", "signum"]
    internals.kill_subprocesses(trainer(tmp_path))  # has started none


def test_forward_context_computes_in_the_precision(tmp_path):
    weight = torch.ones(2, 2)
    with internals.forward_context(trainer(tmp_path, precision="bf16-mixed")):
        assert (weight @ weight).dtype == torch.bfloat16
    assert (weight @ weight).dtype == torch.float32


def test_set_ddp_option_sets_an_argument():
    strategy = DDPStrategy(gradient_as_bucket_view=True)
    internals.set_ddp_option(strategy, "broadcast_buffers", False)
    assert strategy._ddp_kwargs == {"gradient_as_bucket_view": True, "broadcast_buffers": False}
