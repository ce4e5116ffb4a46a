"""Counts of bad samples of the data, by reason."""

from __future__ import annotations

import json
from collections import Counter
from typing import Literal

import lightning as L
import torch
from typing_extensions import override

from ldm.data.module import Shards
from ldm.distributed.group import Group, default_group

KINDS: dict[str, Literal["training", "validation"]] = {"train": "training", "val": "validation"}


class BadSamples(L.Callback):
    """Logs by reason how many bad samples were replaced, over all processes; nothing where there were none.

    ``train/bad_samples/missing_text`` counts those since the validation before, or since the run was started
    again; ``val/bad_samples/missing_text`` those of a validation.
    """

    @override
    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        if trainer.sanity_checking or not isinstance(data, Shards):
            return
        group = default_group(pl_module.device)
        for name, kind in KINDS.items():
            for reason, count in _total(data.bad[kind].take(), group).items():
                value = torch.tensor(float(count), device=pl_module.device)
                pl_module.log(
                    f"{name}/bad_samples/{reason.replace(' ', '_')}", value, sync_dist=True, batch_size=1
                )


def _total(counts: dict[str, int], group: Group) -> dict[str, int]:
    """Add up the counts of all processes; each gets the sums."""
    line = f"{json.dumps(counts)}\n".encode()
    gathered = bytes(group.gather(torch.tensor(list(line), dtype=torch.uint8)).tolist())
    total = sum((Counter(json.loads(found)) for found in gathered.splitlines()), Counter[str]())
    return group.broadcast(dict(sorted(total.items())))
