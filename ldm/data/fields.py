"""The table of data fields, and what follows from it: the whitelist of members, decoding, collation.

To add a field (depth, edges ...), add a row to ``FIELDS`` and a conditioner that reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor

from ldm.data import arrays, decode, kinds, raster
from ldm.data.decode import UNKNOWN_SIZE, BadSample, Decode, Decoded, Members, SampleId
from ldm.data.image_size import decode_size
from ldm.data.stacking import NO_SLOTS, Slot, Slots, stack
from ldm.data.view import View
from ldm.io.images import from_bytes
from ldm.types import Batch

Sample = dict[str, Any]
"""A decoded sample: its "key", a value for each field that is read, and "skipped" where it replaces bad
samples: why each of them could not be used."""

IMAGES = ("jpg", "jpeg", "png", "webp")
LATENT, FLIPPED_LATENT, TEXT_EMBEDDING = "latent.npy", "latent.flip.npy", "text.npy"
"""Members that ``ldm.encode`` writes."""
STORED = ("latent", "text_embedding")
"""Fields of these, which replace what they were computed from."""
STORED_SUBSETS = ((), ("latent",), ("text_embedding",), STORED)
"""Which of them a set may have."""
UNKNOWN_CLASS = "unknown class"
"""Reason of bad samples with a class that the model lacks."""
_NONE: Mapping[str, int] = {}


@dataclass(frozen=True)
class Field:
    """A field of the data.

    Args:
        members: Endings of the members that it is read from, the preferred one first.
        decode: Decodes them.
        collate: Makes the batch's value of a list of the samples' values; ``stack`` needs equal shapes.
        on_device: Converts the batch's value, if it is one of ``COMPACT``, once it is on the device, or None.
        json_keys: Keys of the member "json" that give it.
        option: Option of ``ldm.sample`` that gives it; None if there is none.
        highest: Finds the highest class in a sample's value, where it holds classes; -1 if it has none.
        flipped: Member that is read instead where the view is flipped; None if the value itself can be.
        help: What the file is that ``option`` names: it is decoded as the first of ``members``. None if
            ``option`` takes no file but values, each of which makes an image.
        is_implied: Whether any image gives it: then it is loaded only where it is asked for by name.
    """

    members: tuple[str, ...]
    decode: Decode
    collate: Callable[[list[Any]], Any] = stack
    on_device: Callable[[Tensor], Tensor] | None = None
    json_keys: tuple[str, ...] = ()
    option: str | None = None
    help: str | None = None
    highest: Callable[[Any], int] | None = None
    flipped: str | None = None
    is_implied: bool = False

    def read(self, flip: bool | None) -> tuple[str, ...]:
        """List the members that it is read from.

        Args:
            flip: Whether the view is flipped; None: it may be.
        """
        if self.flipped is None or flip is False:
            return self.members
        return (self.flipped,) if flip else (*self.members, self.flipped)


class Packed(list[Tensor]):
    """A list of tensors (n, ...) that travels to another process as one: each would cost an open file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpacked, (torch.cat(list(self)), [len(rows) for rows in self])


def _unpacked(rows: Tensor, counts: list[int]) -> list[Tensor]:
    return list(rows.split(counts))


def _highest(classes: Tensor) -> int:
    return int(classes.max()) if classes.numel() else -1


_image, _low_res = decode.images(kinds.decoded), decode.images(kinds.decoded, resize=False)
_mask = decode.pixels(raster.mask, "nearest-exact")
_CLASSES = "Image whose grey levels or palette are classes."
_BOXES = "JSON file of classes and boxes, see data/README.md."
FIELDS: dict[str, Field] = {
    "image": Field(IMAGES, _image, stack, from_bytes, (), "--image", "Image to condition on, or to redraw."),
    "text": Field(("txt", "json"), decode.text, list, None, ("caption", "captions"), "--prompt or --prompts"),
    "label": Field(("cls", "json"), decode.label, torch.tensor, None, ("label",), "--labels", highest=int),
    "latent": Field((LATENT,), arrays.latent, stack, Tensor.float, flipped=FLIPPED_LATENT),
    "text_embedding": Field((TEXT_EMBEDDING,), arrays.text_embedding, Packed),
    "mask": Field(
        ("mask.png",), _mask, stack, Tensor.float, (), "--mask", "Image that is white where to paint."
    ),
    "low_res": Field(
        ("low.png", "low.jpg"), _low_res, stack, from_bytes, (), "--low-res", "Image to enlarge."
    ),
    "label_map": Field(
        ("map.png",), decode.label_map, stack, Tensor.long, (), "--label-map", _CLASSES, _highest
    ),
    "layout": Field(
        ("json",),
        decode.layout,
        Packed,
        None,
        ("layout",),
        "--layout",
        _BOXES,
        lambda boxes: _highest(boxes[:, :1]),
    ),
    "size": Field(("json", *IMAGES), decode_size, json_keys=("height", "width"), is_implied=True),
}
"""Name of each field, as in ``Batch``, to how it is read."""


def whitelist(fields: Collection[str] | None = None, flip: bool | None = None) -> tuple[str, ...]:
    """List the members that fields are read from. No other member is ever read.

    Args:
        fields: Names of fields; None takes all.
        flip: Whether the view is flipped; None: it may be.
    """
    return _whitelist(tuple(FIELDS), None if fields is None else tuple(fields), flip)


@lru_cache(256)
def _whitelist(table: tuple[str, ...], fields: tuple[str, ...] | None, flip: bool | None) -> tuple[str, ...]:
    rows = [FIELDS[name] for name in table if fields is None or name in fields]
    return tuple(dict.fromkeys(member for field in rows for member in field.read(flip)))


def decode_sample(
    members: Mapping[str, bytes],
    sample: SampleId,
    fields: Collection[str],
    view: View,
    optional: Collection[str] = (),
    classes: Mapping[str, int] = _NONE,
    slots: Slots = NO_SLOTS,
) -> Sample:
    """Decode fields of a sample.

    Args:
        members: Member name ("jpg", "txt", ...) to its bytes.
        sample: Shard and key.
        fields: Names of fields; others are not decoded.
        view: What is shown of the image, and of what lies on it, and which caption is drawn; the
            low-resolution image keeps its size.
        optional: Names of further fields, each left out where it is missing or bad.
        classes: Number of classes of fields that hold some.
        slots: Memory that values may be decoded into.

    Raises:
        BadSample: If one of ``fields`` is missing or cannot be decoded, a caption is empty, a class is not
            one of ``classes``, or what lies on the image has other proportions.
    """
    result: Sample = {"key": sample.key}
    sizes: dict[str, tuple[int, int]] = {}
    for name in (*fields, *optional):
        try:
            member, decoded = _decode(name, members, sample, view, slots.get(name))
            if name in classes:
                _check_classes(name, member, decoded.value, classes[name], sample)
            if decoded.size is not None and sizes:
                _check_proportions({**sizes, member: decoded.size}, sample)
        except BadSample:
            if name in fields:
                raise
        else:
            result[name] = decoded.value
            if decoded.size is not None:
                sizes[member] = decoded.size
    return result


def _decode(
    name: str, members: Mapping[str, bytes], sample: SampleId, view: View, slot: Slot | None
) -> tuple[str, Decoded]:
    """Decode a field; also return the first member that it is read from."""
    names = FIELDS[name].read(view.flip)
    content = {member: members[member] for member in names if member in members}
    decoded = FIELDS[name].decode(Members(content, sample, view, slot)) if content else None
    if decoded is None:
        found = ", ".join(members) or "none of them"
        what = f"missing: it gives the field '{name}' (found {found})"
        raise sample.bad(" or ".join(names), what, f"missing {name}")
    return next(iter(content)), decoded


def _check_classes(field: str, member: str, value: Any, num_classes: int, sample: SampleId) -> None:
    """Check that the model has the classes of a field."""
    highest = FIELDS[field].highest
    if highest is not None and (found := highest(value)) >= num_classes:
        what = f"class {found} is no class of the model, expected 0 to {num_classes - 1}"
        raise sample.bad(member, f"{what} (conditioner.num_classes={num_classes})", UNKNOWN_CLASS)


def _check_proportions(sizes: Mapping[str, tuple[int, int]], sample: SampleId) -> None:
    """Check that all that lies on the image has its proportions: or the central square would be another.

    Args:
        sizes: Member to the height and width that it states.
        sample: Shard and key.
    """
    image = next((sizes[member] for member in FIELDS["image"].members if member in sizes), None)
    if image is None:
        return
    height, width = image
    for member, (h, w) in sizes.items():
        rounding = 0 if (h, w) == UNKNOWN_SIZE else max(height, width, h, w)  # to full pixels, where resized
        if abs(width * h - w * height) > rounding:
            what = "'width' and 'height' are" if member == "json" else "is"
            text = f"{what} {w}x{h}, expected the proportions of the image, {width}x{height}"
            raise sample.bad(member, text, "other proportions")


def collate(samples: Sequence[Mapping[str, Any]]) -> Batch:
    """Collate samples by the table of fields; other values become lists.

    A field that some of them lack is left out.

    Raises:
        ValueError: If tensors of a field differ in shape.
    """
    batch: dict[str, Any] = {}
    for name in samples[0]:
        values = [sample[name] for sample in samples if name in sample]
        if name not in FIELDS:
            batch[name] = values
        elif len(values) == len(samples):
            _check_shapes(name, values, [sample["key"] for sample in samples])
            batch[name] = FIELDS[name].collate(values)
    batch.pop("skipped", None)
    if skipped := [message for sample in samples for message in sample.get("skipped", ())]:
        batch["skipped"] = skipped
    return cast(Batch, batch)


def _check_shapes(name: str, values: Sequence[Any], keys: Sequence[str]) -> None:
    if FIELDS[name].collate is not stack:
        return
    odd = next((i for i, value in enumerate(values) if value.shape != values[0].shape), None)
    if odd is not None:
        one, other = tuple(values[0].shape), tuple(values[odd].shape)
        raise ValueError(f"samples '{keys[0]}' and '{keys[odd]}' have {name}s of shapes {one} and {other}")


COMPACT = torch.uint8, torch.uint16, torch.float16
"""Types that fields have until they are on the device."""


def converted(batch: Batch) -> Batch:
    """Convert images, masks, maps (integers) and latents (float16) to what ``Batch`` says, where they are."""
    found = cast(dict[str, Any], dict(batch))
    for name, field in FIELDS.items():
        if field.on_device is not None and name in found and found[name].dtype in COMPACT:
            found[name] = field.on_device(found[name].contiguous())
    return cast(Batch, found)


def check_names(fields: Collection[str], option: str) -> tuple[str, ...]:
    """Return the names of ``fields`` in the order of the table.

    Raises:
        ValueError: If there are none, or one is not in the table; it names ``option``.
    """
    if not fields or not set(fields) <= set(FIELDS):
        raise ValueError(f"{option}: got {list(fields)}, expected some of {', '.join(FIELDS)}")
    return tuple(name for name in FIELDS if name in fields)
