"""Base of the stages: steps, optimizer, logging and the contents of checkpoints."""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from typing_extensions import override

from ldm.distributed.group import default_group
from ldm.hardware import computes
from ldm.io.checkpoint import header, saved_progress
from ldm.io.config import Configurable, config_of
from ldm.io.upstream import keep_if_absent
from ldm.latents.manifest import check_source
from ldm.lightning_internals import trainer_of
from ldm.loggers.steps import TRUNCATED, is_due, is_logged, mean_losses
from ldm.losses.term import LossTerm
from ldm.nets.text import caption_ids, num_tokens, truncated
from ldm.optim.adamw import place_state
from ldm.optim.combined import build_optimizer, describe
from ldm.optim.recipes import NoScaling, Optimization
from ldm.rng import SampleNoise
from ldm.stages.counted import global_batch_size
from ldm.stages.images import TakesImages
from ldm.stages.terms import TERMS, SumsTerms, without_terms
from ldm.types import Batch


class Stage(Configurable, TakesImages, SumsTerms, ABC):
    """A LightningModule whose subclass gives ``losses(batch, noise)``.

    All random numbers of a step are functions of (seed, samples seen, sample key): a resumed run,
    and a run on another number of processes, draws the same ones.

    Args:
        optimizer: Recipe of the parameters.
        terms: Loss terms that ``sum_terms`` adds up. Their own parameters are trained and saved, but neither
            averaged nor exported.

    Raises:
        ValueError: If two terms have one name.
    """

    name: ClassVar[str]
    higher_is_better: dict[str, bool]
    """By name of a validation's value: whether higher ones are better; absent if neither direction is."""
    config: dict[str, Any] | None = None
    """``{"class_path", "init_args"}`` that rebuilds this stage; derived when training starts unless set."""
    context_length: int | None = None
    """CLIP tokens of a caption that are read, begin and end marks included; None without captions."""

    def __init__(self, optimizer: Optimization, terms: Sequence[LossTerm] = ()) -> None:
        super().__init__(terms)
        self.optimizer = optimizer
        self.higher_is_better = dict.fromkeys(
            ["loss", *(name for t in terms for name in t.lower_is_better)], False
        )
        self._lr = 0.0
        self._is_first_batch = True
        self._optimizer_name: str | None = None

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

    def latent_sources(self) -> dict[str, str]:
        """Checkpoints that may have encoded the latents of the data, with their SHA-256."""
        return self.upstream()

    def latent_encoder(self) -> str | None:
        """Hash of the encoder and scale that latents of the data must come from, whatever the decoder."""
        return None

    def validate_shards(
        self, fields: Collection[str], train: str | list[str], val: str | list[str], image_size: int
    ) -> None:
        """Check that latents in the data come from the autoencoder that this stage decodes with."""
        check_source(fields, train, val, image_size, self.latent_sources(), self.latent_encoder())

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        if self.image_size is None and "image" in batch:
            self.image_size = batch["image"].shape[-1]
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            self.step_losses = []
        # a step in several batches draws what it draws in one
        noise = SampleNoise(f"{_global_seed()}/train/{self.progress.samples}", batch["key"])
        losses = self.losses(batch, noise)
        values = {f"train/{name}": value.detach() for name, value in losses.items()}
        limit = self.context_length
        is_read = self._is_first_batch or is_due(self.trainer, self.progress.steps + 1)
        if is_read and limit is not None and "text" in batch:
            values[TRUNCATED] = torch.full_like(values["train/loss"], self._truncated(batch["text"], limit))
        self.step_losses.append(values)
        self._lr = self.trainer.optimizers[0].param_groups[0]["lr"]  # once the step is done, that of the next
        return losses["loss"]

    def count_tokens(self, captions: Sequence[str]) -> list[int]:
        """Return the tokens of each caption, begin and end marks included."""
        return [num_tokens(caption) for caption in captions]

    @property
    def tokenizer(self) -> Callable[[str], Sequence[int]] | None:
        """CLIP's, for the workers of the loader; None without captions."""
        return None if self.context_length is None else caption_ids

    def _truncated(self, text: list[str], limit: int) -> float:
        """Return the fraction of captions that are cut off, with a warning in the first batch."""
        fraction = truncated(text, limit)
        if fraction and self._is_first_batch:
            rank_zero_warn(
                f"{fraction:.0%} of the captions in the first batch are cut off: they have more than {limit} "
                f"tokens, the context of the text tower; see {TRUNCATED}"
            )
        self._is_first_batch = False
        return fraction

    @override
    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        size = len(batch["key"])
        if 0 < self.trainer.max_steps <= self.progress.steps:
            self.trainer.should_stop = True  # Lightning then validates, whatever the interval
        if not (self.is_step_complete and is_logged(self.trainer, self.progress.steps)):
            return
        # samples are the x axis of every curve
        self.log_dict({"samples": float(self.progress.samples), "train/lr": self._lr}, batch_size=size)
        means = mean_losses(self.step_losses)
        if is_due(self.trainer, self.progress.steps):  # else others may not know that this one stops
            group = default_group(self.device)
            reduced = group.all_reduce(torch.stack(list(means.values()))) / group.world
            means = dict(zip(means, reduced, strict=True))
        self.log_dict(means, batch_size=size)

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        noise = SampleNoise("validation", batch["key"])  # depends on the sample's key alone
        for name, (mean, count) in self.means(batch, noise).items():
            # Lightning truncates the mean of an int over processes, which would weigh uneven counts wrongly
            size: Any = float(count)
            self.log(f"val/{name}", mean, batch_size=size, sync_dist=True, on_epoch=True)

    def means(self, batch: Batch, noise: SampleNoise) -> dict[str, tuple[Tensor, int]]:
        """Compute what validation averages over all samples: means over a batch, and of how many samples."""
        return {name: (value, len(batch["key"])) for name, value in self.losses(batch, noise).items()}

    @override
    def configure_optimizers(self) -> Any:
        optimizer, recipes = self._build_optimizer()
        self._optimizer_name = describe(optimizer, recipes)
        num_steps = self.trainer.max_steps
        schedule = LambdaLR(optimizer, [_factor(recipe, num_steps) for recipe in recipes])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _build_optimizer(self) -> tuple[torch.optim.Optimizer, list[Optimization]]:
        """Build one optimizer; loss terms with parameters bring recipes of their own."""
        half = not str(self.trainer.precision).startswith(("32", "64"))
        native = computes(torch.bfloat16, self.device)
        recipes: list[tuple[Optimization, nn.Module]] = [(self.optimizer, without_terms(self))]
        for term in cast(Sequence[LossTerm], self.terms):
            if any(weight.requires_grad for weight in term.parameters()):
                recipes.append((term.optimizer or self.optimizer, term))
        scales = any(not isinstance(recipe.scaling, NoScaling) for recipe, _ in recipes)
        samples = global_batch_size(self.trainer, self.trainer.datamodule) if scales else 1  # type: ignore[attr-defined]
        return build_optimizer(recipes, samples, torch.bfloat16 if half and native else torch.float32)

    @override
    def on_train_start(self) -> None:
        super().on_train_start()
        batches, every = self.trainer.num_training_batches, self.trainer.accumulate_grad_batches
        if math.isfinite(batches) and batches % every:  # Lightning divides by ``every`` all the same
            rank_zero_warn(
                f"trainer.accumulate_grad_batches: {every} does not divide the {batches:.0f} batches of an "
                "epoch: its last step has fewer, and a gradient too small by as much"
            )
        # train as configured now, not as when the checkpoint was written
        if isinstance(schedule := self.lr_schedulers(), LambdaLR):
            fresh = self._build_optimizer()[0].param_groups
            schedule.base_lrs = [group["lr"] for group in fresh]
            for group, new, factor in zip(
                schedule.optimizer.param_groups, fresh, schedule.lr_lambdas, strict=True
            ):
                lr = new["lr"] * factor(schedule.last_epoch)
                group.update({k: v for k, v in new.items() if k != "params"}, lr=lr, initial_lr=new["lr"])
            place_state(schedule.optimizer)

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint.update(header())
        checkpoint["stage"] = self.name
        checkpoint["config"] = self.config
        checkpoint["upstream"] = self.upstream()
        checkpoint["latent_encoder"] = self.latent_encoder()
        checkpoint |= self.images_state()
        checkpoint["optimizer"] = self._optimizer_name

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if checkpoint.get("stage") != self.name:
            found = checkpoint.get("stage")
            raise ValueError(f"checkpoint is of stage '{found}', but the config's stage is '{self.name}'")
        self.check_upstream(checkpoint)
        self._check_optimizer(checkpoint)
        super().on_load_checkpoint(checkpoint)
        self.load_images(checkpoint)

    def _check_optimizer(self, checkpoint: dict[str, Any]) -> None:
        """Check that the moments of a checkpoint, of the same networks, are of this stage's optimizer."""
        then, trainer = checkpoint.get("optimizer"), trainer_of(self)
        is_same_network = checkpoint["state_dict"].keys() == self.state_dict().keys()
        if then is None or trainer is None or trainer.state.fn != "fit" or not is_same_network:
            return
        if (now := describe(*self._build_optimizer())) != then:
            raise ValueError(
                f"model.optimizer: got {now}, but the checkpoint holds the state of {then}: name that one, "
                "or start afresh with its weights, --weights and another --run"
            )

    def check_upstream(self, checkpoint: dict[str, Any]) -> None:
        """Check that ``checkpoint`` was trained on the very files that this stage was built on.

        An autoencoder may have another decoder by now.

        Raises:
            ValueError: If one of them has other contents than then.
        """
        then, encoder = checkpoint["upstream"].values(), self.latent_encoder()
        is_same_encoder = encoder is not None and checkpoint.get("latent_encoder") == encoder
        interchangeable = self.latent_sources() if is_same_encoder else {}
        for path, now in sorted(self.upstream().items()):
            if now not in then and path not in interchangeable:  # by contents: a run folder may have moved
                raise ValueError(
                    f"upstream checkpoint '{path}' changed since this run began (SHA-256 {now[:12]} now, "
                    f"{' or '.join(sha[:12] for sha in then) or 'none'} then): start a new run folder, or "
                    "restore the earlier file"
                )

    def init_from(self, checkpoint: dict[str, Any]) -> None:
        """Take the weights of a checkpoint, averaged where it has averages, and nothing else: to fine-tune.

        What the checkpoint was built on need not be what this stage is built on. Parameters of loss terms are
        not taken: the terms may be others.
        """
        own = {k: v for k, v in self.state_dict().items() if k.startswith(f"{TERMS}.")}
        weights = {k: v for k, v in checkpoint["state_dict"].items() if not k.startswith(f"{TERMS}.")}
        self.load_state_dict({**weights, **own}, strict=True)

    def load_trained(self, checkpoint: dict[str, Any]) -> None:
        """Take weights and progress from a checkpoint that is not to be continued."""
        self.check_upstream(checkpoint)
        self.load_state_dict(checkpoint["state_dict"], strict=True)
        self.progress = saved_progress(checkpoint)
        self.load_images(checkpoint)

    @override
    def configure_model(self) -> None:
        # channels_last makes the demo's steps 1.1 (float32) to 1.3 times (bfloat16) as fast on a CPU. Here,
        # for DDP adds up gradients wrongly if the layout changes after it has wrapped the stage.
        self.to(memory_format=torch.channels_last)

    @override
    def on_fit_start(self) -> None:
        if self.config is None:
            try:
                self.config = config_of(self)
            except ValueError as error:
                rank_zero_warn(
                    f"checkpoints of this run can be resumed, but no command can read them: {error}"
                )
        self.follow_images(self.trainer.datamodule)  # type: ignore[attr-defined]
        if self.trainer.is_global_zero and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            keep_if_absent(Path(self.trainer.default_root_dir), self.upstream())


def _factor(recipe: Optimization, num_steps: int) -> Callable[[int], float]:
    return lambda step: recipe.factor(step, num_steps)


def _global_seed() -> int:
    return int(os.environ.get("PL_GLOBAL_SEED", "0"))
