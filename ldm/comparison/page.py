"""The page: settings that differ, curves over each other, samples side by side, final values."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from fnmatch import fnmatch
from html import escape
from pathlib import Path

from ldm.comparison.curves import Curve, panel, stroke
from ldm.comparison.runs import Evaluated, Run, differing
from ldm.comparison.style import SCRIPT, STYLE
from ldm.io.images import read_text
from ldm.runs.folder import LARGER_IS_BETTER, SMALLER_IS_BETTER

DRAWN = (
    *("stage", "samples", "weights", "precision", "seed", "sampler", "guidance", "steps", "evaluation"),
    *("checkpoint", "checkpoint_sha256"),
)
"""What a record says of what was measured. The rest says how: where that differs, so may the numbers."""
HIDDEN = ("train/step_seconds", "train/data_wait", "train/images_per_second_per_device")
"""Curves that say nothing of a model, or nothing new."""


def page(runs: Sequence[Run], most_pictures: int) -> str:
    """Write the page as one text of HTML that loads nothing.

    Args:
        runs: At least one.
        most_pictures: Sample grids of each run, at most, evenly over its training.
    """
    names = ", ".join(run.name for run in runs)
    body = [
        f"<h1>Runs compared</h1><p class='note'>{escape(names)}</p>",
        _legend(runs),
        _values(runs),
        _panels(runs),
        _samples(runs, most_pictures),
        _table("Settings that differ", runs, differing([run.settings for run in runs])),
        _table("Environments that differ", runs, differing([run.environment for run in runs])),
    ]
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(names)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head><body>{''.join(body)}<script>{SCRIPT}</script></body></html>\n"
    )


def thinned(items: Sequence[int], most: int) -> list[int]:
    """Keep at most ``most`` items, evenly, the last among them."""
    if len(items) <= most:
        return list(items)
    step = (len(items) - 1) / max(1, most - 1)
    return [items[round(len(items) - 1 - i * step)] for i in range(most)][::-1]


def best(name: str, values: Sequence[float | None]) -> float | None:
    """Return the best of several final values, if the name says which end is good; None if it does not."""
    known, bare = [value for value in values if value is not None], name.removeprefix("val/")
    if len(known) < 2 or len(set(known)) < 2:
        return None
    if any(fnmatch(bare, pattern) for pattern in SMALLER_IS_BETTER):
        return min(known)
    return max(known) if any(fnmatch(bare, pattern) for pattern in LARGER_IS_BETTER) else None


def _legend(runs: Sequence[Run]) -> str:
    entries = (
        f'<label><input type="checkbox" data-run="{i}" checked><svg viewBox="0 0 28 10"><line x1="0" x2="28" '
        f'y1="5" y2="5" stroke-width="3" {stroke(i)}/></svg>{escape(run.name)}</label>'
        for i, run in enumerate(runs)
    )
    return f'<div class="legend">{"".join(entries)}</div>'


def _panels(runs: Sequence[Run]) -> str:
    """Draw a panel per value; training and validation of the same value share one."""
    titles: dict[str, list[Curve]] = {}
    for i, run in enumerate(runs):
        for name, points in run.curves.items():
            part, _, title = name.partition("/")
            if name not in HIDDEN:
                titles.setdefault(title or part, []).append(Curve(i, run.name, points, part == "val"))
    if not titles:
        return "<h2>Curves</h2><p class='note'>No run has logged a value yet.</p>"
    end = max(x for curves in titles.values() for curve in curves for x, _ in curve.points)
    drawn = "".join(panel(title, titles[title], end) for title in sorted(titles, key=_importance))
    toggle = '<div class="controls"><label><input type="checkbox" id="log"> logarithmic</label></div>'
    note = "<p class='note'>Over samples seen. Thin: training; with dots: validation.</p>"
    return f'<h2>Curves</h2>{note}{toggle}<div class="panels">{drawn}</div>'


def _importance(title: str) -> tuple[int, str]:
    """Put the loss first, and what concerns the machine last."""
    return (0 if title == "loss" else 2 if "per_second" in title else 1, title)


def _samples(runs: Sequence[Run], most: int) -> str:
    """Show the sheets of each kind side by side, with one slider for all."""
    kinds = sorted({kind for run in runs for kind in run.images})
    if not kinds:
        return ""
    shown = {(run.name, kind): _thinned(run.images.get(kind, {}), most) for run in runs for kind in kinds}
    seen = sorted({count for sheets in shown.values() for count in sheets})
    slider = (
        f'<div class="controls"><input type="range" id="seen" min="0" max="{len(seen) - 1}" '
        f'value="{len(seen) - 1}" data-values="{" ".join(map(str, seen))}" aria-label="samples seen">'
        '<span><b id="seen-now"></b> samples seen</span></div>'
    )
    rows = []
    for kind in kinds:
        figures = [_sheets(i, run, shown[run.name, kind]) for i, run in enumerate(runs) if kind in run.images]
        drawn_for = _drawn_for([shown[run.name, kind] for run in runs if kind in run.images])
        rows.append(f'<h3>{escape(kind)}</h3>{drawn_for}<div class="samples">{"".join(figures)}</div>')
    note = "<p class='note'>The newest sheet of each run up to as many samples seen.</p>"
    return f"<h2>Samples</h2>{note}{slider}{''.join(rows)}"


def _drawn_for(sheets: Sequence[dict[int, Path]]) -> str:
    """Say whether the newest sheets of runs show the same: by the seed and captions in their text."""
    says = [read_text(one[max(one)]) for one in sheets]
    if len({(text.get("seed"), text.get("captions")) for text in says}) > 1:
        return "<p class='note'>Prompts or seeds differ between the runs.</p>"
    lines = "".join(f"<li>{escape(line)}</li>" for line in says[0].get("captions", "").splitlines())
    seed = escape(says[0].get("seed", "0"))
    return f"<details><summary>Prompts, with seed {seed}</summary><ol>{lines}</ol></details>" if lines else ""


def _thinned(sheets: dict[int, Path], most: int) -> dict[int, Path]:
    return {count: sheets[count] for count in thinned(sorted(sheets), most)}


def _sheets(number: int, run: Run, sheets: dict[int, Path]) -> str:
    images = "".join(
        f'<img data-seen="{count}" alt="{escape(run.name, quote=True)} at {count}" '
        f'src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}">'
        for count, path in sheets.items()
    )
    caption = f'<figcaption>{escape(run.name)} <span class="at"></span></figcaption>'
    return f'<figure class="run-{number}">{caption}{images}</figure>'


def _values(runs: Sequence[Run]) -> str:
    """Tabulate final values with their records, the best of each marked."""
    last = [run.last for run in runs]
    names = sorted({name for values in last for name in values})
    if not names:
        return ""
    rows = []
    for name in names:
        cells = [values.get(name) for values in last]
        unlike = measured_otherwise(cells)
        top = None if unlike else best(name, [None if cell is None else cell.value for cell in cells])
        warning = f"<p class='note'>not comparable: {escape(', '.join(unlike))}</p>" if unlike else ""
        shown = "".join(_value(cell, top) for cell in cells)
        rows.append(f"<tr><th>{escape(name)}{warning}</th>{shown}</tr>")
    note = (
        "<p class='note'>Last of each run; open a value for how it was obtained. Marked: the best, unless "
        "they were measured in different ways.</p>"
    )
    return f"<h2>Final values</h2>{note}{_framed(runs, rows)}"


def measured_otherwise(cells: Sequence[Evaluated | None]) -> list[str]:
    """Name what differs in how the same value was measured: reference, number of pictures, extractor ..."""
    records = [cell.record for cell in cells if cell is not None]
    return [key for key in differing(records) if key not in DRAWN]


def _value(cell: Evaluated | None, top: float | None) -> str:
    if cell is None:
        return '<td class="absent">&ndash;</td>'
    kind, shown = "number best" if cell.value == top else "number", f"{cell.value:.5g}"
    if cell.record:
        says = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in cell.record.items())
        shown = f"<details><summary>{shown}</summary><dl>{says}</dl></details>"
    return f'<td class="{kind}">{shown}</td>'


def _table(title: str, runs: Sequence[Run], differences: dict[str, list[str]]) -> str:
    if len(runs) < 2:
        return ""
    rows = [
        f"<tr><th>{escape(key)}</th>{''.join(_setting(value) for value in values)}</tr>"
        for key, values in differences.items()
    ]
    return f"<h2>{title}</h2>" + (_framed(runs, rows) if rows else "<p class='note'>Nothing differs.</p>")


def _setting(value: str) -> str:
    return f"<td>{escape(value)}</td>" if value else '<td class="absent">&ndash;</td>'


def _framed(runs: Sequence[Run], rows: Iterable[str]) -> str:
    heads = "".join(f"<th>{escape(run.name)}</th>" for run in runs)
    return (
        f'<div class="scroll"><table><thead><tr><th></th>{heads}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )
