"""The findings as one page of HTML that loads nothing."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ldm.inspection.look import Look


def page(found: dict[str, Any], looks: Sequence[Look], is_sound: bool) -> str:
    """Write the page.

    Args:
        found: The findings.
        looks: Samples with thumbnails, for the contact sheet.
        is_sound: Whether nothing is broken.
    """
    here = FileSystemLoader(Path(__file__).parent)
    template = Environment(loader=here, autoescape=True, undefined=StrictUndefined).get_template("page.html")
    images = found["images"]
    histograms = {
        "Aspect ratios": images.get("aspect_ratios", {}),
        "Shorter sides, pixels": images.get("shorter_sides", {}),
        "Sizes": images.get("sizes", {}),
        "Kinds": images.get("kinds", {}),
        "Classes": found["classes"],
    }
    return template.render(
        found=found, histograms=histograms, sheet=[_cell(look) for look in looks], is_sound=is_sound
    )


def _cell(look: Look) -> dict[str, Any]:
    assert look.picture is not None
    return {
        "key": look.key,
        "image": base64.b64encode(look.picture.thumbnail).decode(),
        "size": f"{look.picture.width}x{look.picture.height}",
        "caption": look.caption or "",
        "label": look.label,
    }
