"""Gradients made visible: plain gradient descent, and a callback that saves them."""

import lightning as L
import torch

from ldm.optim.recipes import Optimization


class SGD(Optimization):
    """Plain gradient descent: weights differ as much as gradients do. Adam and Muon divide by their size."""

    def build(self, module, dtype=torch.float32):
        return torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=self.lr)


class KeepGradients(L.Callback):
    """Writes the gradients of the first step, over all its batches and processes, before they are clipped.

    Args:
        path: The file, written by the first process.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step == 0 and trainer.is_global_zero:
            trained = [(name, p) for name, p in pl_module.named_parameters() if p.requires_grad]
            assert all(p.grad is not None for _, p in trained)
            torch.save({name: p.grad.clone() for name, p in trained}, self.path)


class CountCollectives(L.Callback):
    """Counts the collectives of two steps and writes them down.

    Args:
        path: The file, written by the first process.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx % trainer.accumulate_grad_batches:
            return
        if trainer.global_step == 3:
            self._profile.__enter__()
        if trainer.global_step == 5:
            self._profile.__exit__(None, None, None)
            if trainer.is_global_zero:
                names = [event.name for event in self._profile.events() if event.name.startswith("gloo:")]
                torch.save(names, self.path)


class IllSteps(L.Callback):
    """Makes gradients of the first batch of some steps NaN, on the last process alone.

    Args:
        steps: Optimizer steps, counted from 0.
    """

    def __init__(self, steps: list[int]) -> None:
        self.steps = steps

    def on_before_backward(self, trainer, pl_module, loss):
        is_first = trainer.fit_loop.epoch_loop.batch_idx % trainer.accumulate_grad_batches == 0
        if is_first and trainer.global_step in self.steps and trainer.global_rank == trainer.world_size - 1:
            loss.register_hook(lambda gradient: gradient * torch.nan)
