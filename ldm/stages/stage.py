"""What every stage shares: steps, optimizer, logging, and what its checkpoints say."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import lightning as L
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from ldm.distributed.group import default_group
from ldm.hardware import computes
from ldm.io.checkpoint import header
from ldm.optim.recipes import Optimization
from ldm.rng import SampleNoise
from ldm.types import Batch

_COUNTS = ("ready", "started", "processed", "completed")
"""Of batches, as Lightning names them."""


class Stage(L.LightningModule, ABC):
    """A LightningModule whose subclass gives ``losses(batch, noise)``.

    All random numbers of a step are functions of (seed, samples seen, sample key): a resumed run,
    and a run on another number of processes, draws the same ones.

    Args:
        optimizer: How the parameters are updated.
    """

    name: ClassVar[str]
    config: dict[str, Any] | None = None
    """``{"class_path", "init_args"}`` that rebuilds this stage; ``ldm.fit`` and ``build`` set it."""
    image_size: int | None = None
    """Side of the images trained on; known once training has started."""

    def __init__(self, optimizer: Optimization) -> None:
        super().__init__()
        self.optimizer = optimizer
        self._samples_before, self._batches_before, self._samples_per_batch = 0, 0, 0
        self._step_began = 0
        self._step_losses: list[dict[str, Tensor]] = []

    @property
    def samples_seen(self) -> int:
        """Training samples processed so far, over all processes.

        Derived from Lightning's count of processed batches, which is right in every hook and when an
        exception ends a batch half way; batches are equally large on all processes.
        """
        if self._trainer is None or not self._samples_per_batch:
            return self._samples_before
        total: Any = self._trainer.fit_loop.epoch_loop.batch_progress.total
        batches = total.processed - self._batches_before
        return self._samples_before + batches * self._samples_per_batch

    @abstractmethod
    def losses(self, batch: Batch, noise: SampleNoise) -> dict[str, Tensor]:
        """Compute the step's losses, all scalars; "loss" is the one that is minimised.

        Args:
            batch: B samples.
            noise: Source of every random number, one stream per sample.
        """

    def upstream(self) -> dict[str, str]:
        """Checkpoints that this stage is built on, with their SHA-256."""
        return {}

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of a training batch and log its parts."""
        size = len(batch["key"])
        self._samples_per_batch = size * self.trainer.world_size
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            self._step_began = self.samples_seen  # a step in several batches draws what it draws in one
            self._step_losses = []
        noise = SampleNoise(f"{_global_seed()}/train/{self._step_began}", batch["key"])
        losses = self.losses(batch, noise)
        self._step_losses.append({f"train/{name}": value.detach() for name, value in losses.items()})
        mine = _mean(self._step_losses)  # those of all processes are logged once the step is done
        self.log_dict(mine, batch_size=size, prog_bar=True, logger=False)
        self.log("train/lr", self.trainer.optimizers[0].param_groups[0]["lr"], batch_size=size)
        return losses["loss"]

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Log the losses of the step, and the samples seen: the x axis of every curve."""
        size = len(batch["key"])
        self.log("samples", float(self.samples_seen), batch_size=size)
        is_whole = (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if is_whole and every and self.trainer.global_step % every == 0:  # processes wait for each other here
            mine, group = _mean(self._step_losses), default_group(self.device)
            means = group.all_reduce(torch.stack(list(mine.values()))) / group.world
            self.log_dict(dict(zip(mine, means, strict=True)), batch_size=size)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log the losses at random numbers that depend on the sample's key alone."""
        for name, (mean, count) in self.means(batch, SampleNoise("validation", batch["key"])).items():
            # Lightning truncates the mean of an int over processes, which would weigh uneven shares wrongly
            size: Any = float(count)
            self.log(f"val/{name}", mean, batch_size=size, sync_dist=True, on_epoch=True)

    def means(self, batch: Batch, noise: SampleNoise) -> dict[str, tuple[Tensor, int]]:
        """Compute what validation averages over all samples: means over a batch, and of how many samples."""
        return {name: (value, len(batch["key"])) for name, value in self.losses(batch, noise).items()}

    def configure_optimizers(self) -> Any:
        """Build the optimizer and its schedule over the trainer's number of steps."""
        optimizer = self._build_optimizer()
        num_steps = self.trainer.max_steps
        schedule = LambdaLR(optimizer, lambda step: self.optimizer.factor(step, num_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _build_optimizer(self) -> torch.optim.Optimizer:
        half = not str(self.trainer.precision).startswith(("32", "64"))
        native = computes(torch.bfloat16, self.device)
        optimizer = self.optimizer.build(self, torch.bfloat16 if half and native else torch.float32)
        factor = self.optimizer.scaling.factor(global_batch_size(self.trainer, self.trainer.datamodule))  # type: ignore[attr-defined]
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * factor
        return optimizer

    def on_train_start(self) -> None:
        """Train as the configuration says, and not as the checkpoint that is resumed said."""
        for config in self.trainer.lr_scheduler_configs:
            schedule = config.scheduler
            assert isinstance(schedule, LambdaLR)
            fresh = self._build_optimizer().param_groups
            schedule.base_lrs = [group["lr"] for group in fresh]
            for group, new, factor in zip(
                schedule.optimizer.param_groups, fresh, schedule.lr_lambdas, strict=True
            ):
                lr = new["lr"] * factor(schedule.last_epoch)
                group.update({k: v for k, v in new.items() if k != "params"}, lr=lr, initial_lr=new["lr"])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what rebuilds the stage: its class, arguments, and what it was built on."""
        checkpoint.update(header())
        checkpoint["stage"] = self.name
        checkpoint["config"] = self.config
        checkpoint["upstream"] = self.upstream()
        checkpoint["samples_seen"] = self.samples_seen
        if self._trainer is not None:
            checkpoint["batches_per_step"] = self._trainer.accumulate_grad_batches
        checkpoint["image_size"] = self.image_size

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint is of this stage and was built on the same upstream checkpoints."""
        if checkpoint.get("stage") != self.name:
            found = checkpoint.get("stage")
            raise ValueError(f"checkpoint is of stage '{found}', but the config's stage is '{self.name}'")
        self.check_upstream(checkpoint)
        self._samples_before = checkpoint["samples_seen"]
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        if self._trainer is not None:
            _recount(progress, checkpoint.get("batches_per_step"), self._trainer.accumulate_grad_batches)
        self._batches_before = progress["total"]["processed"]
        self.image_size = checkpoint["image_size"]

    def check_upstream(self, checkpoint: dict[str, Any]) -> None:
        """Check that ``checkpoint`` was trained on the very files that this stage was built on.

        Raises:
            ValueError: If one of them has other contents than then.
        """
        then = checkpoint["upstream"].values()
        for path, now in sorted(self.upstream().items()):
            if now not in then:  # by contents: a run folder may have moved
                raise ValueError(
                    f"upstream checkpoint '{path}' changed since this run began (SHA-256 {now[:12]} now, "
                    f"{' or '.join(sha[:12] for sha in then) or 'none'} then): start a new run folder, or "
                    "restore the earlier file"
                )

    def init_from(self, checkpoint: dict[str, Any]) -> None:
        """Take the weights of a checkpoint, averaged where it has averages, and nothing else: to fine-tune.

        What the checkpoint was built on need not be what this stage is built on.
        """
        self.load_state_dict(checkpoint["state_dict"], strict=True)

    def load_trained(self, checkpoint: dict[str, Any]) -> None:
        """Take weights and progress from a checkpoint that is not to be continued."""
        self.check_upstream(checkpoint)
        self.load_state_dict(checkpoint["state_dict"], strict=True)
        self._samples_before, self.image_size = checkpoint["samples_seen"], checkpoint["image_size"]

    def configure_model(self) -> None:
        """Lay kernels out as convolutions like them best.

        Measured: channels_last makes the demo's steps 1.1 (float32) to 1.3 times (bfloat16) as fast on a CPU.
        Here, because DDP adds up gradients wrongly when the layout changes after it took hold of the weights.
        """
        self.to(memory_format=torch.channels_last)

    def on_fit_start(self) -> None:
        """Take the size of the images from the data."""
        self.image_size = getattr(self.trainer.datamodule, "image_size", self.image_size)  # type: ignore[attr-defined]


def global_batch_size(trainer: L.Trainer, data: Any) -> int:
    """Count the samples of an optimizer step, over all processes and accumulated batches.

    Args:
        trainer: Of any number of processes.
        data: What has a ``batch_size``, that of one process; without one, e.g. a plain loader, 1 is taken.
    """
    return getattr(data, "batch_size", 1) * trainer.world_size * trainer.accumulate_grad_batches


def _mean(losses: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Average each loss over batches of one size, in float32."""
    return {name: torch.stack([part[name].float() for part in losses]).mean() for name in losses[0]}


def _recount(progress: dict[str, Any], then: int | None, now: int) -> None:
    """Count batches as if every step so far had had as many as from now on.

    Lightning steps, and validates, after so many batches since the beginning of the run: after 5 steps of one
    batch the sixth would end with the first of its two.
    """
    if then not in (None, now):
        for count in (progress["total"], progress["current"]):
            count.update({name: count[name] // then * now for name in _COUNTS})


def _global_seed() -> int:
    return int(os.environ.get("PL_GLOBAL_SEED", "0"))
