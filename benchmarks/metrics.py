"""Do our numbers agree with torch-fidelity's and torchmetrics'? ``python -m benchmarks.metrics``.

All get the same images and the same file of Inception weights: random ones in the true format, unless a
file is named (``--inception``). What is compared is therefore everything but the weights.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch_fidelity
from torch import Tensor, nn
from torch.utils.data import Dataset
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_kid import kid_features_to_metric
from torchmetrics.image.fid import FrechetInceptionDistance

from ldm.distributed.group import SingleProcess
from ldm.io.images import from_bytes
from ldm.metrics.extractors.inception import Inception
from ldm.metrics.feature_metrics import FeatureMetrics
from ldm.metrics.frechet import Frechet
from ldm.metrics.inception_score import InceptionScore
from ldm.metrics.kernel import KID
from ldm.metrics.neighbours import Neighbours
from ldm.metrics.precision import full_precision

NAMES = {
    "fid/inception": "frechet_inception_distance",
    "is/inception": "inception_score_mean",
    "is_std/inception": "inception_score_std",
    "kid/inception": "kernel_inception_distance_mean",
    "kid_std/inception": "kernel_inception_distance_std",
    "precision/inception": "precision",
    "recall/inception": "recall",
}
"""Our names and torch-fidelity's."""
SPLITS = 3
"""Splits of the Inception score: there are few images."""


class SampleGrid(Dataset[Tensor]):
    """Images as torch-fidelity takes them.

    Args:
        images: (N, 3, H, W) uint8.
    """

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        """Return N."""
        return len(self.images)

    def __getitem__(self, i: int) -> Tensor:
        """Return image i."""
        return self.images[i]


@dataclass(frozen=True)
class Row:
    """One number by two programs."""

    name: str
    ours: float
    theirs: float
    program: str

    @property
    def difference(self) -> float:
        """Relative difference; absolute where theirs is 0."""
        return abs(self.ours - self.theirs) / (abs(self.theirs) or 1.0)


def write_random_inception(path: Path, seed: int = 0) -> None:
    """Write random weights with the names and shapes of the published file; signals keep their size."""
    nothing = mock.patch("torch.load", return_value={})
    with nothing, mock.patch.object(FeatureExtractorInceptionV3, "load_state_dict"):
        net = FeatureExtractorInceptionV3("random", ["2048"], "nowhere")
    torch.manual_seed(seed)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    net.fc.weight.mul_(20.0)  # classes that are as different as those of the published weights
    torch.save(net.state_dict(), path)


def images(count: int, seed: int, darkness: float = 0.0, size: int = 64) -> Tensor:
    """Draw coloured clouds, (count, 3, size, size) uint8; black at a ``darkness`` of 1."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 5, 5, generator=generator)
    clouds = nn.functional.interpolate(coarse, (size, size), mode="bicubic", antialias=False)
    contrast = torch.rand(count, 1, 1, 1, generator=generator) + 0.3
    noise = 0.3 * torch.rand(clouds.shape, generator=generator)
    shown = (1.0 - darkness) * (clouds * contrast + noise)
    return (shown.clamp(0, 1) * 255).to(torch.uint8)


def ours(generated: Tensor, real: Tensor, weights: str, subset_size: int) -> tuple[dict[str, float], Any]:
    """Measure with this project, in batches of 10 as the other gets them."""
    measures = [Frechet(), InceptionScore(SPLITS), KID(subset_size=subset_size), Neighbours()]
    metric = FeatureMetrics(Inception(weights), measures)
    for start in range(0, len(generated), 10):
        part, other = generated[start : start + 10], real[start : start + 10]
        position = torch.arange(start, start + len(part))
        with full_precision(torch.device("cpu")):
            batch: Any = {"key": ["x"] * len(part), "image": from_bytes(other), "index": position}
            metric.update_real(batch)
            metric.update(from_bytes(part), batch)
    metric.sync(SingleProcess())
    return metric.compute(), metric


def by_torch_fidelity(generated: Tensor, real: Tensor, weights: str, subset_size: int) -> dict[str, float]:
    """Measure with torch-fidelity."""
    return dict(
        torch_fidelity.calculate_metrics(
            input1=SampleGrid(generated),
            input2=SampleGrid(real),
            feature_extractor="inception-v3-compat",
            feature_extractor_weights_path=weights,
            isc=True,
            isc_splits=SPLITS,
            fid=True,
            kid=True,
            prc=True,
            kid_subset_size=subset_size,
            batch_size=10,
            cuda=False,
            cache=False,
            verbose=False,
        )
    )


class Seen(nn.Module):
    """Hands torchmetrics features that are computed already, as its 'images'."""

    num_features = 2048

    def forward(self, features: Tensor) -> Tensor:
        """Return them."""
        return features


def by_torchmetrics(metric: FeatureMetrics) -> dict[str, float]:
    """Measure the same features with torchmetrics, where it computes the same thing."""
    fid = FrechetInceptionDistance(feature=Seen(), normalize=False, input_img_size=(3, 64, 64))
    fid.update(metric.real.rows("features"), real=True)
    fid.update(metric.generated.rows("features"), real=False)
    return {"fid/inception": float(fid.compute())}


def compare(weights: str, count: int, subset_size: int) -> list[Row]:
    """Measure ``count`` images against as many with all programs."""
    generated, real = images(count, 1), images(count, 2, darkness=0.5)
    mine, metric = ours(generated, real, weights, subset_size)
    fidelity = by_torch_fidelity(generated, real, weights, subset_size)
    rows = [Row(name, mine[name], fidelity[theirs], "torch-fidelity") for name, theirs in NAMES.items()]
    rows += [Row(name, mine[name], value, "torchmetrics") for name, value in by_torchmetrics(metric).items()]
    kid = kid_features_to_metric(
        *(features.rows("features") for features in (metric.generated, metric.real)),
        kid_subset_size=subset_size,
        verbose=False,
    )
    theirs = kid[NAMES["kid/inception"]]
    return [*rows, Row("kid/inception", mine["kid/inception"], theirs, "torch-fidelity in float64")]


def table(rows: list[Row]) -> str:
    """Lay the comparison out as Markdown."""
    lines = ["| number | ours | the other's | program | relative difference |", "|---|---|---|---|---|"]
    for row in rows:
        numbers = f"{row.ours:.9g} | {row.theirs:.9g} | {row.program} | {row.difference:.1e}"
        lines.append(f"| {row.name} | {numbers} |")
    return "\n".join(lines)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.metrics", description=__doc__)
    parser.add_argument("--inception", help="Weights of torch-fidelity's Inception; default: random ones.")
    parser.add_argument("--num", type=int, default=40, help="Images of each side.")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        weights = options.inception or str(Path(folder) / "random.pth")
        if options.inception is None:
            write_random_inception(Path(weights))
        print(table(compare(weights, options.num, subset_size=options.num // 2)))


if __name__ == "__main__":
    main()
