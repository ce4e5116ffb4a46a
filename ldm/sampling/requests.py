"""Sampling requests from a command line, files, or the samples of shards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from ldm.data.buckets import Size
from ldm.data.decode import SampleId
from ldm.data.fields import FIELDS, Sample, collate, decode_sample
from ldm.data.image_size import uncropped
from ldm.data.readers import Indexed
from ldm.data.view import View
from ldm.diffusion.guidance import Guidance
from ldm.sampling.prompts import Prompt
from ldm.types import RGB8, Batch, ImageKind


def file_options() -> dict[str, str]:
    """Return the fields that a file can give, each with its option."""
    return {name: str(field.option) for name, field in FIELDS.items() if field.help is not None}


@dataclass(frozen=True)
class SampleOptions:
    """Options of a command line that select the images to draw.

    Args:
        prompts: Captions, each with one to guide away from, or None.
        labels: Classes.
        files: Path of the file for each field that is given by one.
        shards: Pattern of shards whose samples are drawn, or None.
        num: Number of samples, or of images without caption and label.
        copies: Images of each prompt, label or sample.
        negative: Caption to guide away from where a prompt has none of its own, or None.
        index_dir: Folder of the shards' indices; None: beside them, or a cache where that is read-only.
    """

    prompts: list[Prompt]
    labels: list[int]
    files: dict[str, str]
    shards: str | None
    num: int | None
    copies: int
    negative: str | None = None
    index_dir: str | None = None

    def given(self) -> dict[str, str]:
        """Return the fields that it gives, with the option that gives each."""
        values = {"text": self.prompts, "label": self.labels}
        names = [*self.files, *(name for name, value in values.items() if value)]
        return {name: _option(name) for name in names}


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

    @property
    def metadata(self) -> dict[str, str]:
        """What its file says of it: prompt and key, and what is guided away from."""
        negative = self.fields.get("negative_text")
        return {
            "prompt": self.subject,
            "key": self.key,
            **({"negative_prompt": negative} if negative else {}),
        }


def as_batch(requests: Sequence[SampleRequest]) -> Batch:
    """Collate requests, on the CPU."""
    return collate([{**request.fields, "key": request.key} for request in requests])


def expand_requests(
    options: SampleOptions, reads: Sequence[str], size: Size, kind: ImageKind = RGB8
) -> list[SampleRequest]:
    """List the images to draw with a model that is conditioned on the fields ``reads``.

    Args:
        options: The options.
        reads: Fields that the model reads; "size" is that of images which were never resized or cropped.
        size: Height and width of its images in pixels, to which files are cropped and resized.
        kind: Channels and bits of its images.

    Raises:
        ValueError: If nothing is requested, or a field of the model is missing, or another is given.
    """
    given = [name for name in reads if name != "size"]
    listed = _of_shards if options.shards else _of_options
    samples = list(listed(options, given, size, kind))
    samples = _with_negatives(samples, options.negative, reads)
    copies: Counter[str] = Counter()
    result = []
    sized = {"size": uncropped(*size)} if "size" in reads else {}
    for subject, fields in samples:
        for _ in range(options.copies):
            result.append(SampleRequest(subject, copies[subject], {**fields, **sized}))
            copies[subject] += 1
    return result


def check_guidance(guidance: Guidance, requests: Sequence[SampleRequest]) -> None:
    """Check that what is to be guided away from has an effect.

    Raises:
        ValueError: If guidance does not use the estimate that it takes the place of.
    """
    if any(request.fields.get("negative_text") for request in requests) and not guidance.uses_uncond:
        raise ValueError(
            f"--negative-prompt: the guidance is {type(guidance).__name__}, which does not use it: expected "
            "e.g. --guidance 3"
        )


def _with_negatives(
    samples: list[tuple[str, Sample]], default: str | None, reads: Sequence[str]
) -> list[tuple[str, Sample]]:
    """Give all samples a caption to guide away from, if any has one: the empty one is the null condition."""
    if default is None and not any("negative_text" in fields for _, fields in samples):
        return samples
    if "text" not in reads:
        raise ValueError(
            f"--negative-prompt: the model is conditioned on {' and '.join(reads) or 'nothing'}, expected "
            "one that is conditioned on captions"
        )
    return [(subject, {"negative_text": default or "", **fields}) for subject, fields in samples]


def _of_shards(
    options: SampleOptions, reads: Sequence[str], size: Size, kind: ImageKind
) -> Iterator[tuple[str, Sample]]:
    assert options.shards is not None
    if surplus := sorted(set(options.given().values())):
        raise ValueError(f"--shards: the samples are the requests, got {' and '.join(surplus)} too")
    if size.height != size.width and (squares := sorted({*reads} & {*file_options()})):
        raise ValueError(
            f"--shards: its samples are read as squares, got images of {size} and a model that reads "
            f"{' and '.join(squares)}: expected one --size, or files"
        )
    reader, asked = Indexed(index_dir=options.index_dir), (options.shards, size.width, "--shards")
    evaluation = reader.evaluation(*asked, lambda _: reads, (), kind=kind)
    if lacking := sorted(set(reads) - set(evaluation.fields)):
        raise ValueError(
            f"--shards: '{options.shards}' gives {', '.join(evaluation.fields)}, but the model is "
            f"conditioned on {' and '.join(reads)}: no {' and no '.join(lacking)}"
        )
    for i in range(min(len(evaluation), len(evaluation) if options.num is None else options.num)):
        sample = evaluation[i]
        fields = {name: value for name, value in sample.items() if name in reads}
        yield str(fields.get("text", sample["key"])), fields


def _of_options(
    options: SampleOptions, reads: Sequence[str], size: Size, kind: ImageKind
) -> Iterator[tuple[str, Sample]]:
    _check(options, reads)
    fields = read_files({name: path for name, path in options.files.items() if name in reads}, size, kind)
    prompts = options.prompts if "text" in reads else [None] * (1 if options.num is None else options.num)
    labels = options.labels if "label" in reads else [None]
    for prompt, label in product(prompts, labels):
        subject: Sample = {} if prompt is None else {"text": prompt.text}
        subject |= {} if label is None else {"label": label}
        negative = {} if prompt is None or prompt.negative is None else {"negative_text": prompt.negative}
        name = ", ".join(str(value) for value in subject.values()) or "image"
        yield name, {**fields, **subject, **negative}


def _check(options: SampleOptions, reads: Sequence[str]) -> None:
    """Check that what is given is what the model reads; an image to redraw, and its mask, may come too."""
    given = options.given()
    missing = [_option(field) for field in reads if field not in given]
    surplus = [option for field, option in given.items() if field not in {*reads, "image", "mask"}]
    if options.num is not None and {"text", "label"} & set(reads):
        surplus.append("--num")
    if not reads and options.num is None and not options.files:
        missing.append("--num")
    if missing or surplus:
        got = [*given.values(), *(["--num"] if options.num is not None else [])]
        expected = [_option(field) for field in reads]
        raise ValueError(
            f"the model of --checkpoint is conditioned on {' and '.join(reads) or 'nothing'}: got "
            f"{' and '.join(got) or 'nothing'}, expected {' and '.join(expected) or '--num'}"
            f"{', or --shards' if reads else ''}"
            f"{'; how many of each: --num-per-prompt' if '--num' in surplus else ''}"
        )


def read_files(files: Mapping[str, str], size: Size, kind: ImageKind = RGB8) -> Sample:
    """Decode files as the members of one sample: cropped and resized as in training.

    Args:
        files: Field to path.
        size: Height and width of the images in pixels.
        kind: Channels and bits of the images.

    Raises:
        OSError: If a file cannot be read.
        ValueError: If it does not hold what its field needs; the message names the file.
    """
    sample: Sample = {}
    for field, path in files.items():
        members = FIELDS[field].members
        member = next((name for name in members if path.endswith(f".{name}")), members[0])
        content = {member: Path(path).read_bytes()}
        sample |= decode_sample(content, SampleId(_option(field), path), [field], View(*size, kind=kind))
    sample.pop("key", None)
    return sample


def _option(field: str) -> str:
    """Return the option that gives a field, or what else must: there is no option for latents."""
    return FIELDS[field].option or f"--shards with '{field}'"
