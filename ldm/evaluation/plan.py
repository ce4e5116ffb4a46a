"""The candidates that ``ldm.evaluate`` measures, each with the metrics that suit it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Protocol, runtime_checkable

import torch
from jsonargparse import Namespace
from torch.utils.data import Dataset

from ldm.cli import naming
from ldm.data.fields import Sample
from ldm.diffusion.guidance import ClassifierFree, Guidance, NegativePrompt
from ldm.diffusion.samplers.sampler import Sampler
from ldm.evaluation.reference import ReferenceImages
from ldm.evaluation.sources import FolderImages, GeneratedImages, ImageSource, RealImages, Repeated
from ldm.io.checkpoint import Checkpoint
from ldm.metrics.clip_score import CLIPScore
from ldm.metrics.extractors.clip import CLIPExtractor, ImageText
from ldm.metrics.extractors.inception import Inception
from ldm.metrics.feature_metrics import FeatureMetrics
from ldm.metrics.frechet import Frechet
from ldm.metrics.inception_score import InceptionScore
from ldm.metrics.kernel import CMMD, KID
from ldm.metrics.lpips import LPIPS
from ldm.metrics.measure import Measure
from ldm.metrics.metric import Metadata, Metric
from ldm.metrics.neighbours import Neighbours
from ldm.metrics.psnr import PSNR
from ldm.metrics.retrieval import Retrieval
from ldm.metrics.ssim import SSIM
from ldm.metrics.zero_shot import TEMPLATES, ZeroShot
from ldm.stage_protocols import ReadsFields
from ldm.stages.load import CLIPTower, load_stage
from ldm.stages.stage import Stage
from ldm.types import Generates


@dataclass(frozen=True)
class TrainedStage:
    """A trained stage that is measured.

    Args:
        path: Its checkpoint, as the command line names it.
        stage: The stage.
        origin: Path, SHA-256 and kind of weights of the bytes that were loaded.
    """

    path: str
    stage: Stage
    origin: Metadata = field(default_factory=dict)


Stages = Sequence[TrainedStage]


def load_trained(path: str, device: torch.device) -> TrainedStage:
    """Load a stage; its checkpoint is opened once."""
    found = Checkpoint.open(path)
    origin: Metadata = {"checkpoint": path, "checkpoint_sha256": found.sha256, "weights": found.weights}
    return TrainedStage(path, load_stage(found, Stage).to(device), origin)  # type: ignore[type-abstract]


@runtime_checkable
class HasSampler(Protocol):
    """A stage that draws with a sampler, which may be replaced."""

    sampler: Sampler


def reconstructs(stage: object) -> bool:
    """Return whether a stage generates images that are compared with the sample's own."""
    return isinstance(stage, Generates) and bool(getattr(stage, "generate_shows_input", False))


@dataclass(frozen=True)
class Metrics:
    """Metrics by the kind of images that they measure.

    Args:
        all: For any images.
        captioned: For images that a stage drew or read with captions.
        others: For images without captions, instead.
        paired: For reconstructions, compared with their originals.
    """

    all: list[Metric]
    captioned: list[Metric] = field(default_factory=list)
    others: list[Metric] = field(default_factory=list)
    paired: list[Metric] = field(default_factory=list)

    def of(self, stage: Stage, samples: Dataset[Sample]) -> list[Metric]:
        """Return the metrics of a stage's images for samples."""
        about_text = self.captioned if "text" in samples[0] else self.others
        return [*self.all, *about_text, *(self.paired if reconstructs(stage) else [])]

    @property
    def of_files(self) -> list[Metric]:
        """Those for images of which nothing else is known."""
        return [*self.all, *self.others]


def build_metrics(
    options: Namespace, more: Sequence[Metric], stages: Stages, real: ReferenceImages
) -> Metrics:
    """Choose the metrics that options and stages ask for.

    Args:
        options: The command line.
        more: Those of --metrics.
        stages: What is measured.
        real: What is compared with.

    Raises:
        ValueError: If there is none, or one without anything to measure.
    """
    reconstructed = any(reconstructs(each.stage) for each in stages)
    found = Metrics([])
    if options.inception:
        measures = [Frechet(), Frechet("spatial", "sfid"), InceptionScore(), KID(), Neighbours()]
        with naming("--inception"):
            inception = Inception(options.inception)
        found.all.append(FeatureMetrics(inception, measures, real.statistics))
    if options.clip:
        with naming("--clip"):
            tower = CLIPExtractor(CLIPTower(options.clip))
        against: list[Measure] = [] if real.samples is None else [Frechet(), CMMD()]
        found.captioned.append(FeatureMetrics(tower, [*against, CLIPScore()]))
        found.others.extend([FeatureMetrics(tower, against)] if against else [])
    if reconstructed:
        found.paired.extend([PSNR(), SSIM()])
    if options.lpips:
        if not reconstructed:
            raise ValueError("--lpips: compares reconstructions, expected an autoencoder as --checkpoint")
        with naming("--lpips"):
            found.paired.append(LPIPS(options.lpips))
    found.all.extend(more)
    given = options.inception or options.clip or more
    if not given and not reconstructed and not any(isinstance(each.stage, ImageText) for each in stages):
        raise ValueError("got no metric, expected --inception, --clip, --lpips or --metrics")
    return found


def check_stages(options: Namespace, stages: Stages) -> None:
    """Check that there is a stage for each option, and that stages draw images of one size.

    Raises:
        ValueError: If not: an option without effect would be believed to have one.
    """
    for name in ("sampler", "steps", "guidance", "negative_prompt"):
        if options[name] and not any(isinstance(each.stage, HasSampler) for each in stages):
            option = name.replace("_", "-")
            raise ValueError(f"--{option}: got one, but no --checkpoint is of a diffusion stage")
    for name in ("classes", "templates"):
        if options[name] and not any(isinstance(each.stage, ImageText) for each in stages):
            raise ValueError(f"--{name}: got one, but no --checkpoint is of a CLIP: it has no effect")
    sizes = {each.path: each.stage.image_size for each in stages if each.stage.image_size}
    if not options.size and len(set(sizes.values())) > 1:
        listed = ", ".join(f"{path} {size}" for path, size in sizes.items())
        raise ValueError(f"--size: got none, but checkpoints were trained on different sizes: {listed}")


def build_sources(
    options: Namespace,
    stages: Stages,
    samples: Dataset[Sample] | None,
    sweep: Sweep,
    metrics: Metrics,
) -> Iterator[ImageSource]:
    """Yield what is measured: each checkpoint in each setting, then each folder."""
    for trained in stages:
        path, stage, origin = trained.path, trained.stage, trained.origin
        assert samples is not None
        wanted = Repeated(samples, options.num_images or len(samples))  # type: ignore[arg-type]
        mine = metrics.of(stage, samples)
        if not isinstance(stage, Generates):
            yield RealImages(wanted, origin, [*mine, *build_clip_metrics(options, stage, samples)])
            continue
        for setting in settings(sweep, stage):
            name, how = f"{path} {setting.label}".strip(), (options.seed, options.precision)
            drawn = GeneratedImages(name, stage, setting.overrides, wanted, *how, origin)
            drawn.series, drawn.metrics = f"{path} {setting.series}".strip(), mine
            yield drawn
    for path in options.images:
        read = FolderImages(path, options.num_images, options.image)
        read.metrics = metrics.of_files
        yield read


def build_clip_metrics(options: Namespace, stage: Any, samples: Dataset[Sample]) -> Iterator[Metric]:
    """Yield what a CLIP is measured with: captions if there are any, classes if they are named."""
    clip = CLIPTower.of(stage.net)
    if "text" in samples[0] or not options.classes:
        yield FeatureMetrics(CLIPExtractor(clip), [Retrieval()])
    if options.classes:
        with naming("--classes", "--templates"):
            zero_shot = ZeroShot(clip, options.classes, options.templates or TEMPLATES)
        yield zero_shot


@dataclass(frozen=True)
class Sweep:
    """Samplers, steps and guidances to draw with, in all combinations; where there are none, the stage's own.

    Args:
        samplers: Samplers.
        steps: Numbers of their steps.
        guidances: Scales of classifier-free guidance, or guidances.
        negative_prompt: Caption to guide away from, by guidances that use one; None leaves the empty one.
    """

    samplers: Sequence[Sampler] = ()
    steps: Sequence[int] = ()
    guidances: Sequence[float | Guidance] = ()
    negative_prompt: str | None = None

    @property
    def innermost(self) -> str:
        """Name of what changes from one setting to the next; "" if it is the sampler at most."""
        return "guidance" if len(self.guidances) > 1 else "steps" if len(self.steps) > 1 else ""


@dataclass(frozen=True)
class SamplingSetting:
    """One point of a sweep.

    Args:
        overrides: Sampler and guidance in place of the stage's own.
        metadata: Settings that differ from the stage's, by name.
        innermost: Name of the setting that changes along a curve; "" if there is but one.
    """

    overrides: dict[str, object]
    metadata: dict[str, str]
    innermost: str

    @property
    def label(self) -> str:
        """Settings, for tables."""
        return " ".join(f"{name}={value}" for name, value in self.metadata.items())

    @property
    def series(self) -> str:
        """Settings that all points of a curve share."""
        return " ".join(f"{name}={value}" for name, value in self.metadata.items() if name != self.innermost)


def check_negative_prompt(sweep: Sweep, stages: Stages) -> None:
    """Check that a negative prompt has an effect on what every diffusion stage draws.

    Raises:
        ValueError: If not.
    """
    if sweep.negative_prompt is None:
        return
    for path, stage in ((each.path, each.stage) for each in stages if isinstance(each.stage, HasSampler)):
        if not (isinstance(stage, ReadsFields) and "text" in stage.reads(())):
            raise ValueError(f"--negative-prompt: '{path}' is not conditioned on captions")
        used = [each.overrides.get("guidance") for each in settings(sweep, stage)]
        if not any(isinstance(guidance, NegativePrompt) for guidance in used):
            raise ValueError(
                f"--negative-prompt: '{path}' is drawn without guidance that uses it: expected e.g. "
                "--guidance 3"
            )


def settings(sweep: Sweep, stage: Stage) -> Iterator[SamplingSetting]:
    """Yield every combination of sampler, steps and guidance."""
    if not isinstance(stage, HasSampler):
        yield SamplingSetting({}, {}, "")
        return
    samplers = sweep.samplers or [stage.sampler]
    own: list[None] = [None]
    for sampler, steps, guidance in product(samplers, sweep.steps or own, sweep.guidances or own):
        mine = copy.copy(sampler)
        overrides: dict[str, object] = {"sampler": mine}
        metadata = {"sampler": type(mine).__name__} if len(sweep.samplers) > 1 else {}
        if steps is not None:
            mine.num_steps, metadata["steps"] = steps, str(steps)
        if isinstance(guidance, Guidance):
            overrides["guidance"] = guidance.to(stage.device)
            metadata["guidance"] = _label(guidance)
        elif guidance is not None:
            overrides["guidance"], metadata["guidance"] = ClassifierFree(guidance), f"{guidance:g}"
        used = overrides.get("guidance", getattr(stage, "guidance", None))
        if sweep.negative_prompt is not None and isinstance(used, Guidance) and used.uses_uncond:
            overrides["guidance"] = NegativePrompt(sweep.negative_prompt, used)
        yield SamplingSetting(overrides, metadata, sweep.innermost)


def _label(guidance: Guidance) -> str:
    """Name a guidance by its class, its numbers and what it holds: Interval(100, 800, Rescaled(3, 0.7))."""
    numbers = [f"{v:g}" for k, v in vars(guidance).items() if k != "training" and isinstance(v, int | float)]
    inside = [_label(each) for each in guidance.children() if isinstance(each, Guidance)]
    return f"{type(guidance).__name__}({', '.join([*numbers, *inside])})"
