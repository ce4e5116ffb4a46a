"""Everything that ldm uses of Lightning beyond its public interface.

One function each, which states what it relies on. Checked on Lightning 2.6.0 and 2.6.6;
tests/test_lightning_internals.py fails where another version differs. No other module of ldm names a private
attribute of Lightning.
"""

from __future__ import annotations

import signal
from contextlib import AbstractContextManager
from typing import Any

import lightning as L
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher


def trainer_of(module: L.LightningModule) -> L.Trainer | None:
    """Return the trainer of a module, None without one; ``module.trainer`` raises.

    Relies on ``LightningModule._trainer``.
    """
    return module._trainer


def align_loops(checkpoint: dict[str, Any], steps: int, trainer: L.Trainer) -> None:
    """Make a checkpoint's loops resume after a complete optimizer step, whatever batch ended the run.

    Edits the state_dict of the loops before Lightning loads it; no live loop is written to. Lightning then
    takes the checkpoint for one that was saved after a validation: it trains the next batch, and where a
    validation is due at the step, it skips that and adds 1 to the logged steps. Without this a run that ended
    between accumulated batches steps too early, another ``accumulate_grad_batches`` shifts steps and
    validations, and logged steps are one off where a run validated before it was saved but now would not, or
    the reverse. Epochs after the first, and the end of one, stay as Lightning saved them: an endless stream
    of batches has neither.

    Relies on ``checkpoint["loops"]["fit_loop"]``: its ``epoch_loop.batch_progress`` with the counts ready,
    started, processed and completed under total and current, and ``is_last_batch``; its
    ``epoch_loop.state_dict`` with ``_batches_that_stepped``; and on ``_TrainingEpochLoop.reset``.

    Args:
        checkpoint: One that training resumes from.
        steps: Optimizer steps that it holds.
        trainer: Resumes it.
    """
    loop = checkpoint["loops"]["fit_loop"]
    batches = loop["epoch_loop.batch_progress"]
    is_first_epoch = batches["total"]["started"] == batches["current"]["started"]
    if steps == 0 or batches["is_last_batch"] or not is_first_epoch:
        return
    count = steps * trainer.accumulate_grad_batches
    for counts in (batches["total"], batches["current"]):
        counts.update(ready=count, started=count, processed=count, completed=count)
    every = trainer.val_check_interval  # a fraction of an epoch is not known yet: one of a stream has no end
    by_batches = isinstance(every, int) and trainer.check_val_every_n_epoch is None
    is_due = trainer.enable_validation and by_batches and count % every == 0
    loop["epoch_loop.state_dict"]["_batches_that_stepped"] = steps - 1 if is_due else steps


def set_max_steps(trainer: L.Trainer, steps: int) -> None:
    """Change ``trainer.max_steps``: training that is at its last step begins no loop, and so no validation.

    Relies on ``_TrainingEpochLoop.max_steps``, which ``trainer.max_steps`` and ``_FitLoop.done`` read.
    """
    trainer.fit_loop.epoch_loop.max_steps = steps


def validate(trainer: L.Trainer, steps: int) -> None:
    """Validate in training before its first step, as after the step before; logged under the same number.

    Relies on ``_TrainingEpochLoop.val_loop``, a loop with ``restarting`` and ``run``, and on
    ``_TrainingEpochLoop._batches_that_stepped``, the number under which loggers log.

    Args:
        trainer: In ``on_train_start``.
        steps: Optimizer steps done.
    """
    loop = trainer.fit_loop.epoch_loop
    stepped, loop._batches_that_stepped = loop._batches_that_stepped, steps - 1
    trainer.validating = True
    loop.val_loop.restarting = False
    loop.val_loop.run()
    trainer.training = True
    loop._batches_that_stepped = stepped


def dump_checkpoint(trainer: L.Trainer) -> dict[str, Any]:
    """Build a checkpoint on this process alone; ``trainer.save_checkpoint`` waits for all processes.

    Relies on ``Trainer._checkpoint_connector.dump_checkpoint``.
    """
    return trainer._checkpoint_connector.dump_checkpoint()


def ignore_sigterm(trainer: L.Trainer) -> None:
    """Keep Lightning from acting on SIGTERM.

    Its processes ask each other about it before every step: a broadcast, and a wait for the device.

    Relies on ``Trainer._signal_connector.received_sigterm`` and on
    ``_TrainingEpochLoop._broadcast_sigterm_tensor``: the only writes to live objects of Lightning.
    """
    trainer._signal_connector.received_sigterm = False
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]


def kill_subprocesses(trainer: L.Trainer) -> None:
    """Kill the processes that the trainer itself started, if it did.

    Relies on ``_SubprocessScriptLauncher.kill`` of the strategy's launcher.
    """
    launcher = trainer.strategy.launcher
    if isinstance(launcher, _SubprocessScriptLauncher):
        launcher.kill(signal.SIGKILL)


def forward_context(trainer: L.Trainer) -> AbstractContextManager[None]:
    """Compute in the trainer's precision, outside of its steps.

    Relies on ``Precision.forward_context`` of ``Trainer.precision_plugin``.
    """
    context: AbstractContextManager[None] = trainer.precision_plugin.forward_context()
    return context


def set_ddp_option(strategy: DDPStrategy, name: str, value: Any) -> None:
    """Set an argument of torch's DistributedDataParallel before the strategy wraps the module.

    Relies on ``DDPStrategy._ddp_kwargs``.
    """
    strategy._ddp_kwargs[name] = value
