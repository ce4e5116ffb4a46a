"""Fit on two processes; the second meets losses that are not finite: run by test_skip_nonfinite.py."""

import sys
from pathlib import Path

import torch
from tiny_stage import TinyStage, loader, trainer

from ldm.callbacks.skip_nonfinite import SkipNonFinite
from ldm.checkpointing.callback import Checkpoints
from ldm.distributed.fsdp import FSDP2


class IllOnSecond(TinyStage):
    def __init__(self):
        super().__init__()
        self.seen = []

    def train_dataloader(self):
        return loader(64, 4, self.trainer.global_rank, 2)

    def training_step(self, batch, batch_idx):
        self.seen.append(self.scale.detach().clone())
        bad = self.trainer.global_rank == 1 and self.trainer.global_step in (3, 6, 7)
        loss = super().training_step(batch, batch_idx) + (torch.nan if bad else 0.0)
        self.log("train/bad", loss.detach(), batch_size=4)
        return loss


def main(folder, strategy):
    folder.mkdir(exist_ok=True)
    stage = IllOnSecond()
    callbacks = [SkipNonFinite(2), Checkpoints()]
    settings = {"enable_checkpointing": True, "limit_val_batches": 0}
    run = trainer(folder, devices=2, strategy=strategy, callbacks=callbacks, **settings)
    error = ""
    try:
        run.fit(stage)
    except ValueError as raised:
        error = str(raised)
    torch.save({"seen": stage.seen, "error": error}, folder / f"rank{run.global_rank}.pt")


if __name__ == "__main__":
    for name, strategy in {"ddp": "ddp", "fsdp2": FSDP2()}.items():
        print(f"== {name}", file=sys.stderr, flush=True)
        main(Path(sys.argv[1], name), strategy)
