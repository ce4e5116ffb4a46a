"""Zero-shot classification with a CLIP."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from ldm.metrics.extractors.clip import ImageText, network_metadata
from ldm.metrics.metric import MeansMetric, Metadata
from ldm.types import Batch

TEMPLATES = ("a photo of a {}.",)


class ZeroShot(MeansMetric):
    """Fraction of images whose class ``batch["label"]`` is among the k nearest (Radford et al. 2021).

    A class is the mean, scaled to length 1, of the vectors of its name in all templates (its sec. 3.1.4).

    Args:
        clip: Image and text tower.
        classes: Names of the classes, in the order of the labels, or a text file with one in each line.
        templates: Captions with ``{}`` where the name belongs, or a text file.
        ks: Numbers of nearest classes that are looked at.
        name: Name of the values: name@k.

    Raises:
        FileNotFoundError: If a file is given that is not there.
        ValueError: If there is no class or no template, or if a template lacks ``{}``.
    """

    def __init__(
        self,
        clip: ImageText,
        classes: Sequence[str] | str,
        templates: Sequence[str] | str = TEMPLATES,
        ks: Sequence[int] = (1, 5),
        name: str = "zero_shot",
    ) -> None:
        self.clip = clip
        self.classes, self.templates = _lines(classes, "classes"), _lines(templates, "templates")
        if not self.classes or not self.templates:
            raise ValueError(f"{'templates' if self.classes else 'classes'}: got none, expected one at least")
        if wrong := [template for template in self.templates if "{}" not in template]:
            raise ValueError(
                f"templates: got {wrong[0]!r}, expected captions with {{}} for the name of a class"
            )
        self.name = name
        self.ks = {f"{name}@{k}": k for k in ks if k <= len(self.classes)}
        self._heads: Tensor | None = None
        super().__init__(self.ks, higher_is_better=True)

    @override
    def to(self, device: torch.device | str) -> None:
        super().to(device)
        self._heads = None

    def update(self, images: Tensor, batch: Batch) -> None:
        """Classify images.

        Raises:
            ValueError: If the samples have no labels, or one that is no class.
        """
        label = batch.get("label")
        if label is None or not 0 <= int(label.min()) <= int(label.max()) < len(self.classes):
            what = "no label" if label is None else f"labels {int(label.min())} to {int(label.max())}"
            raise ValueError(
                f"{self.name}: the samples have {what}, expected one of {len(self.classes)} classes"
            )
        if self._heads is None:
            self._heads = torch.stack([self._head(name) for name in self.classes])
        image = F.normalize(self.clip.image_features(images), dim=1)
        scores = image.double() @ self._heads.to(image.device).double().T
        for value, k in self.ks.items():
            nearest = scores.topk(k, dim=1).indices
            self.add(value, (nearest == label.to(nearest.device)[:, None]).any(1))

    @override
    def metadata(self, name: str) -> Metadata:
        words = json.dumps([self.classes, self.templates]).encode()
        return {
            **super().metadata(name),
            **network_metadata(self.clip),
            "num_classes": len(self.classes),
            "num_templates": len(self.templates),
            "classes_sha256": hashlib.sha256(words).hexdigest(),
        }

    def _head(self, name: str) -> Tensor:
        vectors = self.clip.encode_text([template.replace("{}", name) for template in self.templates])
        return F.normalize(vectors.mean(0), dim=0)


def _lines(given: Sequence[str] | str, key: str) -> list[str]:
    if not isinstance(given, str):
        return list(given)
    if not Path(given).is_file():
        raise FileNotFoundError(f"{key}: the file '{given}' does not exist, expected one name in each line")
    return [line.strip() for line in Path(given).read_text(encoding="utf-8-sig").splitlines() if line.strip()]
