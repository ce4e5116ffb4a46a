"""The figures of the demo: pure functions of trained stages and shards."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from data.shapes.reader import score
from ldm.data.module import Shards
from ldm.io.images import from_bytes, to_bytes
from ldm.metrics.clip_score import CLIPScore
from ldm.metrics.extractors.clip import CLIPExtractor
from ldm.metrics.feature_metrics import FeatureMetrics
from ldm.metrics.frechet import Frechet
from ldm.metrics.psnr import PSNR
from ldm.metrics.retrieval import recall_at_1
from ldm.sampling.draw import draw
from ldm.sampling.requests import SampleRequest
from ldm.stages.autoencoder import Autoencoder
from ldm.stages.diffusion import Diffusion
from ldm.stages.load import CLIPTower
from ldm.types import Batch

Figures = dict[str, float]

PAIR = re.compile(r"a (\w+) (\w+) (\w+) (left of|above) a (\w+) (\w+) (\w+)(.*)")


def load(pattern: str, num: int, image_size: int) -> Batch:
    """Load the first ``num`` samples of shards, images (N, 3, H, W) in [-1, 1]."""
    data = Shards(pattern, pattern, image_size=image_size, batch_size=num)
    return data.on_after_batch_transfer(next(iter(data.val_dataloader())), 0)


def of_autoencoder(stage: Autoencoder, batch: Batch) -> Figures:
    """Measure reconstructions: PSNR in dB, and how often they agree with their captions in everything."""
    parts = [
        stage.generate({"key": batch["key"][i : i + 100], "image": batch["image"][i : i + 100]}, seed=0)
        for i in range(0, len(batch["key"]), 100)
    ]
    images = _rounded(torch.cat(parts))
    psnr = PSNR("psnr")
    psnr.update(images, batch)
    return {**psnr.compute(), "read_back_all": read_back(images, batch["text"])["all"]}


def of_clip(clip: CLIPTower, batch: Batch) -> Figures:
    """Measure retrieval among the different captions of ``batch``, and whether swapped ones differ to it."""
    first = sorted({text: i for i, text in reversed(list(enumerate(batch["text"])))}.values())
    texts = [batch["text"][i] for i in first]
    image = clip.encode_image(batch["image"][first])
    recall = recall_at_1(image, clip.encode_text(texts))
    return {**{f"recall/{k}": v for k, v in recall.items()}, "swaps": swap_accuracy(clip, image, texts)}


def swap_accuracy(clip: CLIPTower, image: Tensor, texts: Sequence[str]) -> float:
    """Return how often an image is closer to its caption than to one with colours or objects swapped."""
    rows, right, wrong = [], [], []
    for i, text in enumerate(texts):
        for swapped in swaps(text):
            rows.append(i)
            right.append(text)
            wrong.append(swapped)
    similar = [(image[rows] * clip.encode_text(side)).sum(1) for side in (right, wrong)]
    return float((similar[0] > similar[1]).double().mean())


def swaps(text: str) -> list[str]:
    """Say something else with the same words: the two colours exchanged, the two objects exchanged."""
    match = PAIR.fullmatch(text)
    if match is None:
        return []
    size_a, colour_a, shape_a, relation, size_b, colour_b, shape_b, rest = match.groups()
    colours = f"a {size_a} {colour_b} {shape_a} {relation} a {size_b} {colour_a} {shape_b}{rest}"
    order = f"a {size_b} {colour_b} {shape_b} {relation} a {size_a} {colour_a} {shape_a}{rest}"
    return [swapped for swapped in (colours, order) if swapped != text]


def drawn(stage: Diffusion, texts: Sequence[str], seed: int = 0, batch_size: int = 100) -> Tensor:
    """Draw one image per caption, (N, 3, H, W) uint8."""
    return torch.stack(
        list(draw(stage, [SampleRequest(text, 0, {"text": text}) for text in texts], seed, batch_size))
    )


def of_images(images: Tensor, batch: Batch, clip: CLIPTower) -> Figures:
    """Measure images drawn for the captions of ``batch``, uint8, with a CLIP."""
    metrics = FeatureMetrics(CLIPExtractor(clip), [Frechet(), CLIPScore()])
    placed: Batch = {**batch, "index": torch.arange(len(images))}
    metrics.update_real(placed)
    metrics.update(from_bytes(images), placed)
    return metrics.compute()


def read_back(images: Tensor, texts: Sequence[str]) -> Figures:
    """Read images (N, 3, H, W), uint8 or in [-1, 1], and compare with their captions: shares in [0, 1]."""
    bytes_ = images if images.dtype == torch.uint8 else to_bytes(images)
    sums: dict[str, float] = defaultdict(float)
    for image, text in zip(bytes_.permute(0, 2, 3, 1).cpu().numpy(), texts, strict=True):
        for name, right in score(image, text).items():
            sums[name] += float(right) / len(texts)
    return dict(sums)


def _rounded(images: Tensor) -> Tensor:
    return from_bytes(to_bytes(images))
