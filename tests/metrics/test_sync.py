"""Two processes measure what one measures, also when one of them saw nothing."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from ldm.metrics.clip_score import CLIPScore
from ldm.metrics.frechet import FrechetDistance
from ldm.metrics.psnr import PSNR

COUNT = 41


class Means(nn.Module):
    def encode_image(self, image):
        return nn.functional.normalize(image.mean((2, 3)), dim=1)

    def encode_text(self, text):
        return nn.functional.normalize(torch.tensor([[1.0, len(word), 0.0] for word in text]), dim=1)

    def image_features(self, image):
        return image.mean((2, 3))


def measure(positions, all_reduce):
    """Measure the samples at ``positions`` of a fixed set, in batches of 4."""
    generator = torch.Generator().manual_seed(0)
    real, made = torch.rand(2, COUNT, 3, 4, 4, generator=generator) * 2 - 1
    metrics = [FrechetDistance(Means()), CLIPScore(Means()), PSNR()]
    for start in range(0, len(positions), 4):
        part = positions[start : start + 4]
        batch = {"image": real[part], "key": [f"{i}" for i in part], "text": ["x" * (i % 5) for i in part]}
        for metric in metrics:
            metric.update(made[part], batch)
    values = {}
    for metric in metrics:
        metric.sync(all_reduce)
        values |= metric.compute()
    return values


def all_reduce(tensor):
    dist.all_reduce(tensor)
    return tensor


def work(rank, store, folder):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    shares = {"halves": list(range(rank, COUNT, 2)), "one": list(range(COUNT)) if rank == 1 else []}
    torch.save({k: measure(v, all_reduce) for k, v in shares.items()}, os.path.join(folder, f"{rank}.pt"))
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    alone = measure(list(range(COUNT)), lambda tensor: tensor)
    assert set(alone) == {"fid/clip", "fid/clip_floor", "clip_score", "picture_psnr"}
    mp.spawn(work, (str(tmp_path / "store"), str(tmp_path)), nprocs=2)
    for rank in range(2):
        for name, values in torch.load(tmp_path / f"{rank}.pt").items():
            assert values == pytest.approx(alone, rel=1e-9), (rank, name)
