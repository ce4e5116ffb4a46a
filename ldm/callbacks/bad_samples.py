"""Counts of bad samples of the data, by reason."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import lightning as L
import torch
from typing_extensions import override

from ldm.data.bad_samples import TooManyBad
from ldm.data.module import Shards
from ldm.data.search import check, search_training, search_validation
from ldm.distributed.group import Group, default_group
from ldm.io.atomic import write_text

KINDS = {"train": "training", "val": "validation"}
LISTED = "bad-samples.txt"
"""File in the run folder that lists the bad samples which were found before the first step."""


class BadSamples(L.Callback):
    """Logs by reason how many bad samples were found or replaced, over all processes; nothing without any.

    Before the first step the first process looks for those that headers and captions tell, prints how many
    there are, and lists them in ``bad-samples.txt`` of the run folder; the policy applies to them.
    Each validation logs their number, ``train/bad_samples_found/missing_text`` and the same for ``val``.

    ``train/bad_samples/missing_text`` counts those replaced since the validation before, also if this one
    was cut off and is repeated; what a signal or an error stops between two counts only from there on.
    ``val/bad_samples/missing_text`` counts those of a validation.
    """

    def __init__(self) -> None:
        self._found: dict[str, dict[str, int]] = {}
        self._trained = Counter[str]()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"train": dict(self._trained)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._trained = Counter(state_dict["train"])

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, Shards):
            return
        refusal = self._search(data, Path(trainer.default_root_dir)) if trainer.is_global_zero else None
        if (refusal := default_group(trainer.strategy.root_device).broadcast(refusal)) is not None:
            raise TooManyBad(refusal)

    def _search(self, data: Shards, run: Path) -> str | None:
        """Search for bad samples, list and print them; return why they are too many, if they are."""
        searches = [search_training(data.source), search_validation(data.evaluation)]
        bad = [each for each in searches if each.found]
        if not bad:
            return None
        self._found = {each.kind: each.reasons for each in bad}
        listed = run / LISTED
        write_text(listed, "".join(f"{line}\n" for each in bad for line in each.lines))
        print(f"data.bad_samples: {'; '.join(map(str, bad))}; all are listed in {listed}", flush=True)
        try:
            check(searches, data.bad["training"].policy, str(listed))
        except TooManyBad as error:
            return str(error)
        return None

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
        group = default_group(pl_module.device)
        validated = _total(data.bad["validation"].take(), group)
        counted = {"train/bad_samples": self._trained, "val/bad_samples": validated}
        for name, kind in KINDS.items():
            counted[f"{name}/bad_samples_found"] = _total(self._found.get(kind, {}), group)
        for name, counts in counted.items():
            for reason, count in sorted(counts.items()):
                value = torch.tensor(float(count), device=pl_module.device)
                pl_module.log(f"{name}/{reason.replace(' ', '_')}", value, sync_dist=True, batch_size=1)
        self._trained = Counter()


def _total(counts: dict[str, int], group: Group) -> Counter[str]:
    """Add up the counts of all processes; each gets the sums."""
    line = f"{json.dumps(counts)}\n".encode()
    gathered = bytes(group.gather(torch.tensor(list(line), dtype=torch.uint8)).tolist())
    total = sum((Counter(json.loads(found)) for found in gathered.splitlines()), Counter[str]())
    return group.broadcast(total)
