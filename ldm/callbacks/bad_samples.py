"""Counts of bad samples of the data, by reason."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import lightning as L
import torch
from typing_extensions import override

from ldm.data.module import Shards
from ldm.distributed.group import Group, default_group


class BadSamples(L.Callback):
    """Logs by reason how many bad samples were replaced, over all processes; nothing where there were none.

    ``train/bad_samples/missing_text`` counts those since the validation before, also if this one was cut off
    and is repeated; what a signal or an error stops between two validations counts only from there on.
    ``val/bad_samples/missing_text`` counts those of a validation.
    """

    def __init__(self) -> None:
        self._trained = Counter[str]()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"train": dict(self._trained)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._trained = Counter(state_dict["train"])

    @override
    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count those of training, for the checkpoint that is written before a validation."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(data, Shards) and not trainer.sanity_checking:
            self._trained += _total(data.bad["training"].take(), default_group(pl_module.device))

    @override
    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        if trainer.sanity_checking or not isinstance(data, Shards):
            return
        validated = _total(data.bad["validation"].take(), default_group(pl_module.device))
        for name, counts in (("train", self._trained), ("val", validated)):
            for reason, count in sorted(counts.items()):
                value = torch.tensor(float(count), device=pl_module.device)
                pl_module.log(
                    f"{name}/bad_samples/{reason.replace(' ', '_')}", value, sync_dist=True, batch_size=1
                )
        self._trained = Counter()


def _total(counts: dict[str, int], group: Group) -> Counter[str]:
    """Add up the counts of all processes; each gets the sums."""
    line = f"{json.dumps(counts)}\n".encode()
    gathered = bytes(group.gather(torch.tensor(list(line), dtype=torch.uint8)).tolist())
    total = sum((Counter(json.loads(found)) for found in gathered.splitlines()), Counter[str]())
    return group.broadcast(total)
