"""Retrieval and zero-shot accuracy of a CLIP in training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L
from torch import Tensor
from typing_extensions import override

from ldm.callbacks.evaluation import Evaluation
from ldm.metrics.extractors.clip import CLIPExtractor, ImageText
from ldm.metrics.feature_metrics import FeatureMetrics
from ldm.metrics.metric import Metadata, Metric
from ldm.metrics.retrieval import Retrieval
from ldm.metrics.zero_shot import TEMPLATES, ZeroShot
from ldm.types import Batch


class ValidationRetrieval(Evaluation):
    """Measures a CLIP by retrieval and by zero-shot classification while it is trained.

    Over the first validation samples, with the averaged weights if there are any, in float32, and as
    ``Evaluation`` does: values are logged as ``val/image_to_text@k/clip``, ``val/text_to_image@k/clip`` and
    ``val/zero_shot@k``, can be monitored, and go with their records to ``evaluations.jsonl``. Other stages
    are left alone.

    Args:
        num_samples: Number of pairs, over all processes. Among more, the right one is harder to find.
        retrieval_at: Values of k of R@k (Radford et al. 2021, arXiv:2103.00020, sec. 3.1); empty: none.
        classes: Names of the classes, in the order of the labels of the validation samples, or a text file
            with one in each line; None: no zero-shot classification.
        templates: Captions with ``{}`` where the name of a class belongs, or a text file.
        zero_shot_at: Values of k: how many classes are named.
        every_n_steps: Measure at the first validation after each so many optimizer steps, and at the end;
            None measures at every validation.
    """

    def __init__(
        self,
        num_samples: int,
        retrieval_at: Sequence[int] = (1, 5, 10),
        classes: Sequence[str] | str | None = None,
        templates: Sequence[str] | str = TEMPLATES,
        zero_shot_at: Sequence[int] = (1, 5),
        every_n_steps: int | None = None,
    ) -> None:
        self._clip = _InTraining()
        metrics: list[Metric] = []
        if retrieval_at:
            metrics.append(FeatureMetrics(CLIPExtractor(self._clip), [Retrieval(retrieval_at)]))
        if classes is not None:
            metrics.append(ZeroShot(self._clip, classes, templates, zero_shot_at))
        super().__init__(metrics, num_samples, every_n_steps)

    @override
    def fits(self, pl_module: L.LightningModule) -> bool:
        return isinstance(pl_module, ImageText)

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._clip.stage = pl_module

    @override
    def images(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch) -> Tensor:
        return batch["image"]

    @override
    def metadata(self, trainer: L.Trainer, pl_module: L.LightningModule) -> Metadata:
        precision = str(trainer.precision)  # metrics take no autocast
        return {"precision": precision if precision.endswith("-true") else "32-true"}


class _InTraining:
    """The stage as metrics see it; no module, or they would take it off its device after measuring."""

    stage: Any

    def image_features(self, image: Tensor) -> Tensor:
        features: Tensor = self.stage.image_features(image)
        return features

    def encode_text(self, text: list[str]) -> Tensor:
        vectors: Tensor = self.stage.encode_text(text)
        return vectors

    def metadata(self) -> Metadata:
        """Describe the network; the evaluation records which weights it has, by the samples seen."""
        net = self.stage.net
        resize = f"torch bicubic, antialias, to {net.image_size}"
        return {"network": f"{type(net).__module__}.{type(net).__qualname__}", "resize": resize}
