"""Any number of processes measure what one measures, also with uneven shares and one that saw nothing."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from ldm.distributed.group import ProcessGroup, SingleProcess
from ldm.evaluation.session import Measurement
from ldm.metrics.clip_score import CLIPScore
from ldm.metrics.feature_metrics import FeatureMetrics
from ldm.metrics.features import Extractor
from ldm.metrics.frechet import Frechet
from ldm.metrics.inception_score import InceptionScore
from ldm.metrics.kernel import CMMD, KID
from ldm.metrics.metric import ReferenceInfo
from ldm.metrics.neighbours import Neighbours
from ldm.metrics.psnr import PSNR
from ldm.metrics.retrieval import Retrieval
from ldm.metrics.ssim import SSIM
from ldm.metrics.zero_shot import ZeroShot

COUNT = 41
MEASURES = [
    Frechet(),
    Frechet("spatial", "sfid"),
    KID(10, 20),
    CMMD(),
    InceptionScore(3),
    Neighbours(),
    CLIPScore(),
    Retrieval(),
]


class Eye(Extractor):
    """Looks at an image with float64 eyes, so that batches of other sizes do not round otherwise."""

    def __init__(self):
        super().__init__(
            "eye", ("features", "spatial", "logits", "embedding", "text", "agreement", "caption")
        )

    def forward(self, images, batch, views):
        x = images.double()
        embedding = nn.functional.normalize(x.mean((2, 3)), dim=1)
        words = torch.tensor([[1.0, len(text), 0.5] for text in batch["text"]]).double()
        text = nn.functional.normalize(words, dim=1)
        return {
            "features": torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1),
            "spatial": x[:, 0, :2, :2].flatten(1),
            "logits": 3 * x[:, :, 0].flatten(1),
            "embedding": embedding,
            "text": text,
            "agreement": (embedding * text).sum(1, keepdim=True).clamp_min(0),
            "caption": torch.tensor([len(text) for text in batch["text"]]),
        }

    def metadata(self):
        return {}


class Names:
    """Takes colours for their names."""

    def image_features(self, image):
        return image.double().mean((2, 3))

    def encode_text(self, text):
        return torch.stack(
            [torch.tensor([name in t for name in ("red", "green", "blue")]) for t in text]
        ).double()


def measure(positions, group):
    """Measure the samples at ``positions`` of a fixed set, in batches of 4."""
    generator = torch.Generator().manual_seed(0)
    real, made = torch.rand(2, COUNT, 3, 12, 12, generator=generator) * 2 - 1
    zero_shot = ZeroShot(Names(), ["red", "green", "blue"], ks=(1, 2))
    metrics = [FeatureMetrics(Eye(), MEASURES), PSNR("error"), SSIM(), zero_shot]
    run = Measurement(metrics, group, torch.device("cpu"))
    run.begin(ReferenceInfo())
    for start in range(0, len(positions), 4):
        part = positions[start : start + 4]
        text = ["x" * (i % 5) for i in part]
        batch = {"image": real[part], "key": [f"{i}" for i in part], "text": text}
        batch |= {"index": torch.tensor(part), "label": torch.tensor([i % 3 for i in part])}
        run.update_real(batch)
        run.update(made[part], batch)
    found = run.finish()
    assert run.failures == []
    assert all(value.metadata["num"] == COUNT for value in found)
    return {value.name: value.value for value in found}


def metrics_of_rank(rank, world):
    uneven = [[i for i in range(COUNT) if i % 7 < 5], [i for i in range(COUNT) if i % 7 >= 5], []]
    return {
        "even": list(range(rank, COUNT, world)),
        "one": list(range(COUNT)) if rank == world - 1 else [],
        "uneven": uneven[rank],
    }


class FailsOnOne(PSNR):
    """Fails on the last process alone, while it moves, begins, or looks at images."""

    def __init__(self, where):
        super().__init__("fails")
        self.where = where

    def to(self, device):
        self._fail("to")

    def begin(self, reals, group):
        self._fail("begin")

    def measure(self, images, batch):
        self._fail("measure")
        return super().measure(images, batch)

    def _fail(self, where):
        if self.where == where and dist.get_rank() == dist.get_world_size() - 1:
            raise RuntimeError(f"no memory: {where}")


def failing(rank, world):
    """Measure on all processes, of which the last cannot; return the failures and the others' values."""
    generator = torch.Generator().manual_seed(rank)
    real, made = torch.rand(2, 4, 3, 4, 4, generator=generator)
    metrics = [FailsOnOne("to"), FailsOnOne("begin"), FailsOnOne("measure"), PSNR("error")]
    run = Measurement(metrics, ProcessGroup("cpu"), torch.device("cpu"))
    run.begin(ReferenceInfo())
    indices = torch.arange(4) * world + rank
    run.update(made, {"image": real, "key": [str(i) for i in indices], "index": indices})
    values = [(value.name, value.metadata["num"]) for value in run.compute()]
    return values, run.failures


def work(rank, world, store, folder):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    found = {name: measure(mine, ProcessGroup("cpu")) for name, mine in metrics_of_rank(rank, world).items()}
    torch.save((found, failing(rank, world)), os.path.join(folder, f"{rank}.pt"))
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_processes_measure_what_one_does(tmp_path, world):
    alone = measure(list(range(COUNT)), SingleProcess())
    assert len(alone) == 2 * 2 + 2 + 1 + 2 + 4 + 1 + 6 + 2 + 2
    arguments = (world, str(tmp_path / "store"), str(tmp_path))
    mp.start_processes(work, arguments, nprocs=world, start_method="fork")
    for rank in range(world):
        found, (others, failures) = torch.load(tmp_path / f"{rank}.pt")
        assert others == [("error", 4 * world)]
        where = f"(on {{}} of {world} processes)"
        assert failures == [
            f"metric FailsOnOne is left out of this evaluation: RuntimeError: no memory: {part} "
            + where.format(number)
            for part, number in (("to", world), ("begin", 1), ("measure", 1))
        ]
        for name, values in found.items():
            assert values == pytest.approx(alone, rel=1e-10), (rank, name)


def test_the_value_does_not_depend_on_the_order_of_the_images():
    forwards, backwards = (
        measure(list(range(COUNT)), SingleProcess()),
        measure(list(range(COUNT))[::-1], SingleProcess()),
    )
    assert backwards == pytest.approx(forwards, rel=1e-6)
    for name in ("kid/eye", "is/eye", "is_std/eye", "precision/eye", "fid/eye"):
        assert backwards[name] == pytest.approx(forwards[name], rel=1e-10)
