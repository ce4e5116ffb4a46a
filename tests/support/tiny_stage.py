"""A stage of a few numbers, and data for it, for the tests of callbacks."""

from types import MappingProxyType

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from ldm.checkpointing.writer import AtomicCheckpointIO
from ldm.stages.counted import Counted


class Points(Dataset):
    """Sample i is an image and a caption that depend on i alone."""

    def __init__(self, count, size=4, seed=0):
        self.image = torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1

    def __len__(self):
        return len(self.image)

    def __getitem__(self, i):
        return {"key": f"{i:04d}", "image": self.image[i], "text": f"caption {i}"}


def loader(count=64, batch_size=4, rank=0, world=1, seed=0, size=4):
    points = Points(count, size, seed)
    return DataLoader(points, batch_size=batch_size, sampler=range(rank, count, world))


class TinyStage(Counted):
    """Learns to reproduce images channel by channel, and draws random numbers while it does."""

    name = "tiny"
    higher_is_better = MappingProxyType({"loss": False})
    generate_shows_input = True

    def __init__(self, lr=0.1):
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(3))
        self.shift = nn.Parameter(torch.full((3,), 0.5))
        self.frozen = nn.Parameter(torch.tensor([1.0 / 3.0]), requires_grad=False)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.lr = lr
        self.seen_scales = []

    def forward(self, image):
        return image * self.scale.view(3, 1, 1) + self.shift.view(3, 1, 1)

    def training_step(self, batch, batch_idx):
        self.count += 1
        image = batch["image"]
        loss = (self(image) - image + 0.01 * torch.randn_like(image)).square().mean()
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(image))
        return loss

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.log("samples", float(self.progress.samples), batch_size=len(batch["key"]))

    def validation_step(self, batch, batch_idx):
        self.seen_scales.append(self.scale.detach().clone())
        loss = (self(batch["image"]) - batch["image"]).square().mean()
        # a float count: Lightning averages counts over processes, and would cut integers
        self.log("val/loss", loss, batch_size=float(len(batch["key"])), sync_dist=True)

    @torch.no_grad()
    def generate(self, batch, seed):
        return self(batch["image"]).clamp(-1, 1)

    def configure_optimizers(self):
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=self.lr)


def trainer(folder, **changes):
    settings = {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": 8,
        "max_epochs": -1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
        "val_check_interval": 4,
        "check_val_every_n_epoch": None,
        "use_distributed_sampler": False,
        "default_root_dir": folder,
        "plugins": [AtomicCheckpointIO()],
    }
    return L.Trainer(**{**settings, **changes})
