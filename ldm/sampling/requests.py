"""What to draw: wishes from a command line, from files, or from the samples of shards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from ldm.data.decode import Origin, Sample, decode
from ldm.data.readers import Indexed
from ldm.data.source import Spec, collate
from ldm.types import Batch

FILES = {
    "image": ("--image", "png"),
    "mask": ("--mask", "mask.png"),
    "low_res": ("--low-res", "low.png"),
    "label_map": ("--label-map", "map.png"),
    "layout": ("--layout", "json"),
}
"""Fields that a file gives: its option, and the member of a sample that is decoded like it."""
SUBJECTS = {"text": "--prompt or --prompts", "label": "--labels"}
"""Fields that make one image each."""


@dataclass(frozen=True)
class SampleOptions:
    """What a command line asks for.

    Args:
        prompts: Captions.
        labels: Classes.
        files: Path of the file for each field of ``FILES`` that has one.
        shards: Pattern of shards whose samples are the wishes, or None.
        num: Number of samples, or of images without caption and label.
        copies: Images of each wish.
    """

    prompts: list[str]
    labels: list[int]
    files: dict[str, str]
    shards: str | None
    num: int | None
    copies: int

    def given(self) -> dict[str, str]:
        """Return the fields that it gives, with the option that gives each."""
        found = {field: FILES[field][0] for field in self.files}
        found |= {"text": SUBJECTS["text"]} if self.prompts else {}
        return found | ({"label": SUBJECTS["label"]} if self.labels else {})


@dataclass(frozen=True)
class SampleRequest:
    """One image to draw.

    Args:
        subject: Caption, class or name of the sample: what a person would call it.
        copy: Number of the image among those of the same subject.
        fields: What the model is conditioned on, decoded.
    """

    subject: str
    copy: int
    fields: Sample

    @property
    def key(self) -> str:
        """Name that the image's random numbers belong to."""
        return f"{self.subject}/{self.copy}"


def as_batch(wished: Sequence[SampleRequest]) -> Batch:
    """Put wishes into the form that stages know, on the CPU."""
    return collate([cast(Sample, {**wish.fields, "key": wish.key}) for wish in wished])


def expand_requests(asked: SampleOptions, reads: Sequence[str], size: int) -> list[SampleRequest]:
    """List the images that are asked of a model that is conditioned on the fields ``reads``.

    Args:
        asked: What the user wants.
        reads: Fields that the model reads.
        size: Side of its images in pixels, to which files are cropped and resized.

    Raises:
        ValueError: If that asks for nothing, or lacks what the model reads, or gives what it does not read.
    """
    samples = list(_of_shards(asked, reads, size) if asked.shards else _of_options(asked, reads, size))
    copies: Counter[str] = Counter()
    result = []
    for subject, fields in samples:
        for _ in range(asked.copies):
            result.append(SampleRequest(subject, copies[subject], fields))
            copies[subject] += 1
    return result


def _of_shards(asked: SampleOptions, reads: Sequence[str], size: int) -> Iterator[tuple[str, Sample]]:
    assert asked.shards is not None
    if surplus := sorted(set(asked.given().values())):
        raise ValueError(f"--shards: the samples say what to draw, got {' and '.join(surplus)} too")
    evaluation = Indexed().evaluation(asked.shards, Spec(("image",), size, 0))
    if lacking := sorted(set(reads) - set(evaluation.spec.fields)):
        raise ValueError(
            f"--shards: '{asked.shards}' gives {', '.join(evaluation.spec.fields)}, but the model is "
            f"conditioned on {' and '.join(reads)}: no {' and no '.join(lacking)}"
        )
    for i in range(min(len(evaluation), len(evaluation) if asked.num is None else asked.num)):
        sample = evaluation[i]
        fields = {name: value for name, value in sample.items() if name in reads}
        yield str(fields.get("text", sample["key"])), cast(Sample, fields)


def _of_options(asked: SampleOptions, reads: Sequence[str], size: int) -> Iterator[tuple[str, Sample]]:
    _check(asked, reads)
    fields = read_files({name: path for name, path in asked.files.items() if name in reads}, size)
    subjects: list[Mapping[str, Any]] = [{}] * (1 if asked.num is None else asked.num)
    if "text" in reads:
        subjects = [{"text": prompt} for prompt in asked.prompts]
    if "label" in reads:
        subjects = [{**subject, "label": label} for subject in subjects for label in asked.labels]
    for subject in subjects:
        name = ", ".join(str(value) for value in subject.values()) or "image"
        yield name, cast(Sample, {**fields, **subject})


def _check(asked: SampleOptions, reads: Sequence[str]) -> None:
    """Check that what is given is what the model reads; an image to redraw, and its mask, may come too."""
    given = asked.given()
    missing = [SUBJECTS.get(field) or FILES[field][0] for field in reads if field not in given]
    surplus = [option for field, option in given.items() if field not in {*reads, "image", "mask"}]
    if asked.num is not None and set(reads) & set(SUBJECTS):
        surplus.append("--num")
    if not reads and asked.num is None and not asked.files:
        missing.append("--num")
    if missing or surplus:
        got = [*given.values(), *(["--num"] if asked.num is not None else [])]
        options = [SUBJECTS.get(field) or FILES[field][0] for field in reads]
        raise ValueError(
            f"the model of --checkpoint is conditioned on {' and '.join(reads) or 'nothing'}: got "
            f"{' and '.join(got) or 'nothing'}, expected {' and '.join(options) or '--num'}"
            f"{', or --shards' if reads else ''}"
        )


def read_files(files: Mapping[str, str], size: int) -> Sample:
    """Decode files as the members of one sample: cropped and resized as in training.

    Args:
        files: Field to path.
        size: Side of the images in pixels.

    Raises:
        OSError: If a file cannot be read.
        ValueError: If it does not hold what its field needs; the message names the file.
    """
    sample: dict[str, Any] = {}
    for field, path in files.items():
        member = {FILES[field][1]: Path(path).read_bytes()}
        sample |= decode(member, Origin(FILES[field][0], path), [field], size, None)
    sample.pop("key", None)
    return cast(Sample, sample)
