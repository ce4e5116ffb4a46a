"""The findings as primitives, and as a table of text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from ldm.data.fields import FIELDS
from ldm.inspection.survey import Groups, Survey

ASPECTS = ((1, 3), (9, 16), (2, 3), (3, 4), (1, 1), (4, 3), (3, 2), (16, 9), (3, 1))
"""Width to height of the bars of the histogram: an image counts to the nearest."""
SIDES = (64, 128, 256, 512, 1024, 2048)
"""Edges of the histogram of shorter sides, in pixels."""
MOST = 20
"""Lines of a list, at most."""


def findings(survey: Survey, tower: str, limit: int) -> dict[str, Any]:
    """Return all that was found as primitives.

    Args:
        survey: What was found.
        tower: Name of the text tower whose tokens are counted.
        limit: Most tokens that it reads.
    """
    return {
        "samples": survey.num_samples,
        "looked_at": survey.num_looked,
        "shards": _shards(survey),
        "broken_shards": [{"path": path, "reason": reason} for path, reason in survey.broken],
        "bad_samples": {
            reason: {"count": count, "examples": survey.bad[reason]}
            for reason, count in survey.num_bad.most_common()
        },
        "fields": _fields(survey),
        "images": _images(survey),
        "captions": _captions(survey, tower, limit),
        "classes": {str(label): count for label, count in sorted(survey.labels.items())},
        "duplicate_keys": _groups(survey.keys),
        "duplicate_images": _groups(survey.images),
        "images_that_look_alike": _groups(survey.alike),
    }


def _shards(survey: Survey) -> list[dict[str, Any]]:
    return [
        {
            "path": summary.path,
            "samples": summary.count,
            "bytes": summary.size,
            "members": {name: count for name, count in summary.present.items() if count},
            "ignored_members": summary.lost,
            "ignored_example": summary.lost_example,
        }
        for summary in survey.summaries
    ]


def _fields(survey: Survey) -> dict[str, dict[str, int]]:
    return {
        name: {"have": survey.fields[name], "lack": survey.num_looked - survey.fields[name]}
        for name in FIELDS
        if survey.fields[name]
    }


def _images(survey: Survey) -> dict[str, Any]:
    if not survey.sizes:
        return {}
    sides, aspects = Counter[str](), Counter[str]()
    for (width, height), count in survey.sizes.items():
        aspects[_aspect(width / height)] += count
        sides[_side(min(width, height))] += count
    kinds = survey.kinds.most_common()
    return {
        "shorter_side": _spread([min(size) for size, count in survey.sizes.items() for _ in range(count)]),
        "sizes": {f"{w}x{h}": count for (w, h), count in survey.sizes.most_common(MOST)},
        "distinct_sizes": len(survey.sizes),
        "shorter_sides": {name: sides[name] for name in map(_side, (1, *SIDES)) if sides[name]},
        "aspect_ratios": {f"{w}:{h}": aspects[f"{w}:{h}"] for w, h in ASPECTS if aspects[f"{w}:{h}"]},
        "kinds": {f"{kind} {mode}, {bits} bits": count for (kind, mode, bits), count in kinds},
        "channels": {_channels(*each): count for each, count in survey.channels.most_common()},
    }


def _channels(channels: int, bits: int) -> str:
    return f"{channels} channel{'s' if channels > 1 else ''} of {bits} bits"


def _captions(survey: Survey, tower: str, limit: int) -> dict[str, Any]:
    if not survey.tokens:
        return {}
    cut = sum(count > limit for count in survey.tokens)
    return {
        "count": len(survey.tokens),
        "distinct": len(survey.captions),
        "characters": _spread(survey.characters),
        "tokens": _spread(survey.tokens),
        "tower": tower,
        "limit": limit,
        "truncated": cut,
        "truncated_share": cut / len(survey.tokens),
    }


def _groups(groups: Groups) -> dict[str, Any]:
    return {"count": groups.count, "examples": groups.examples()}


def _spread(values: Sequence[int]) -> dict[str, float]:
    return {"min": min(values), "median": median(values), "max": max(values)}


def _aspect(ratio: float) -> str:
    width, height = min(
        ASPECTS, key=lambda aspect: max(ratio * aspect[1] / aspect[0], aspect[0] / aspect[1] / ratio)
    )
    return f"{width}:{height}"


def _side(pixels: int) -> str:
    below = next((edge for edge in SIDES if pixels < edge), None)
    return f"below {below}" if below else f"{SIDES[-1]} and more"


def table(found: dict[str, Any], is_sound: bool) -> str:
    """Write the findings as lines of text."""
    size = sum(shard["bytes"] for shard in found["shards"]) / 1e6
    lines = [f"{found['samples']:,} samples in {len(found['shards'])} shards, {size:,.1f} MB"]
    if found["looked_at"] < found["samples"]:
        lines.append(f"looked at {found['looked_at']:,} of them")
    for section in (
        _shard_lines,
        _field_lines,
        _image_lines,
        _caption_lines,
        _class_lines,
        _equal_lines,
        _bad_lines,
    ):
        lines += section(found)
    lines.append("nothing is broken" if is_sound else "broken: see above")
    return "".join(f"{line}\n" for line in lines)


Section = Callable[[dict[str, Any]], list[str]]


def _shard_lines(found: dict[str, Any]) -> list[str]:
    lines = [
        f"  {Path(shard['path']).name}: {shard['samples']:,}, {_counts(shard['members'])}"
        for shard in found["shards"][:MOST]
    ]
    rest = len(found["shards"]) - MOST
    return ["shards", *lines, *([f"  and {rest} more"] if rest > 0 else [])]


def _field_lines(found: dict[str, Any]) -> list[str]:
    lines = [
        f"  {name}: {counts['have']:,}" + (f", {counts['lack']:,} lack it" if counts["lack"] else "")
        for name, counts in found["fields"].items()
    ]
    return ["fields", *lines]


def _image_lines(found: dict[str, Any]) -> list[str]:
    if not (images := found["images"]):
        return []
    lines = [
        f"images: {images['distinct_sizes']} sizes, shorter side {_range(images['shorter_side'])} pixels"
    ]
    for name in ("sizes", "aspect_ratios", "kinds", "channels"):
        lines.append(f"  {name.replace('_', ' ')}: {_counts(dict([*images[name].items()][:8]))}")
    return lines


def _caption_lines(found: dict[str, Any]) -> list[str]:
    if not (captions := found["captions"]):
        return []
    return [
        f"captions: {captions['count']:,}, {captions['distinct']:,} of them distinct",
        f"  characters: {_range(captions['characters'])}",
        f"  tokens: {_range(captions['tokens'])}; {captions['truncated_share']:.1%} are cut to the "
        f"{captions['limit']} that {captions['tower']} reads",
    ]


def _class_lines(found: dict[str, Any]) -> list[str]:
    if not (classes := found["classes"]):
        return []
    most = sorted(classes, key=lambda label: -classes[label])
    least = min(classes.values())
    named = _counts({label: classes[label] for label in most[:8]})
    return [f"classes: {len(classes)}, at least {least:,} of each; {named}"]


def _equal_lines(found: dict[str, Any]) -> list[str]:
    lines = []
    for name in ("duplicate_keys", "duplicate_images", "images_that_look_alike"):
        if found[name]["count"]:
            first = " and ".join(found[name]["examples"][0][:2])
            lines.append(f"{name.replace('_', ' ')}: {found[name]['count']:,}, e.g. {first}")
    return lines


def _bad_lines(found: dict[str, Any]) -> list[str]:
    lines = [f"broken shard {each['path']}: {each['reason']}" for each in found["broken_shards"]]
    for shard in found["shards"]:
        if shard["ignored_members"]:
            count, example = shard["ignored_members"], shard["ignored_example"]
            lines.append(f"{shard['path']}: ignored members: {count}, e.g. {example}")
    for reason, each in found["bad_samples"].items():
        lines += [f"bad samples, {reason}: {each['count']:,}", *(f"  {text}" for text in each["examples"])]
    return lines


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())


def _range(spread: dict[str, float]) -> str:
    return f"{spread['min']:,} to {spread['max']:,}, median {spread['median']:,.0f}"
