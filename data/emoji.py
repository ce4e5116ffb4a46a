"""Pack the emoji of a font as captioned images into shards: ``python -m data.emoji``."""

from __future__ import annotations

import argparse
import io
import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, features

from data.report import closing
from data.writing import Members, Samples, contents, pack
from ldm.cli import run_command
from ldm.data.order import permutation
from ldm.io.weights import sha256

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
NAMES = Path("/usr/share/unicode/emoji/emoji-test.txt")
STRIKE = 109
"""The only size of the bitmaps in Noto Color Emoji."""
SHARD_SIZE = 1000
LINE = re.compile(r"([0-9A-F ]+?) *; fully-qualified +# \S+ E[\d.]+ (.+)")
PERSON = re.compile(r"\b((wo)?m[ae]n|person|people|boys?|girls?)\b")

HELP = """\
Pack the emoji of a colour font as captioned images into tar shards: real drawings with sharp edges.
Debian has what it needs in two packages: apt-get install fonts-noto-color-emoji unicode-data

Each emoji gives --views images. The first shows it upright on white. In the others it is turned by up to 20
degrees, scaled, shifted and laid over a gradient of two colours, by the seed. Members: KEY.png, KEY.txt (CLDR
short name), KEY.cls and KEY.json (its subgroup in emoji-test.txt). An emoji is either in train-*.tar or in
val-*.tar, with all that is drawn like it: other skin tones, and the same of a man and of a woman.

If the folder already holds the same set, nothing is done."""


@dataclass(frozen=True)
class Emoji:
    """An emoji that a font draws.

    Args:
        text: Its code points.
        name: CLDR short name.
        subgroup: Its subgroup in emoji-test.txt, such as "animal-bird".
    """

    text: str
    name: str
    subgroup: str

    @property
    def family(self) -> str:
        """Name that it shares with those that are drawn nearly alike."""
        return self.name if self.subgroup.endswith("flag") else PERSON.sub("x", self.name.partition(":")[0])


def read_names(file: Path, skin_tones: bool = False) -> list[Emoji]:
    """Read Unicode's emoji-test.txt.

    Args:
        file: The file.
        skin_tones: Whether to take the variants of each skin tone, too.

    Raises:
        FileNotFoundError: If there is no file.
        ValueError: If it lists no emoji.
    """
    if not file.is_file():
        raise FileNotFoundError(
            f"--names: '{file}' does not exist, expected emoji-test.txt: apt-get install unicode-data"
        )
    found, subgroup = [], ""
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.startswith("# subgroup: "):
            subgroup = line.removeprefix("# subgroup: ")
        elif (match := LINE.fullmatch(line)) and (skin_tones or "skin tone" not in match[2]):
            text = "".join(chr(int(code, 16)) for code in match[1].split())
            found.append(Emoji(text, match[2], subgroup))
    if not found:
        raise ValueError(f"--names: '{file}' lists no emoji, expected Unicode's emoji-test.txt")
    return found


class Drawings:
    """Draws emoji as a font has them.

    Args:
        file: Font with coloured bitmaps 109 pixels large.

    Raises:
        FileNotFoundError: If there is no file.
        ValueError: If it is no such font, or Pillow cannot put emoji of several code points together.
    """

    def __init__(self, file: Path) -> None:
        if not file.is_file():
            raise FileNotFoundError(
                f"--font: '{file}' does not exist, expected a font: apt-get install fonts-noto-color-emoji"
            )
        if not features.check("raqm"):
            raise ValueError(
                "Pillow has no libraqm, expected one with it: its wheels have, pip install pillow"
            )
        try:
            self.font = ImageFont.truetype(file, STRIKE, layout_engine=ImageFont.Layout.RAQM)
        except OSError as error:
            raise ValueError(f"--font: '{file}' has no bitmaps of {STRIKE} pixels: {error}") from error
        self.width = self.font.getlength("\N{GRINNING FACE}")
        self.missing = self.draw("\U0010fffd")

    def draw(self, text: str) -> Image.Image | None:
        """Draw one emoji as RGBA, cut to what is painted; None if the font has it not."""
        if self.font.getlength(text) != self.width:  # of several pieces
            return None
        canvas = Image.new("RGBA", (2 * STRIKE, 2 * STRIKE))
        ImageDraw.Draw(canvas).text((STRIKE // 2, STRIKE // 4), text, font=self.font, embedded_color=True)
        box = canvas.getbbox()
        return canvas.crop(box) if box and canvas.getcolors(1) is None else None


def view(drawing: Image.Image, size: int, rng: np.random.Generator | None) -> Image.Image:
    """Lay a drawing over a background.

    Args:
        drawing: RGBA.
        size: Side of the result in pixels.
        rng: Draws turn, scale, place and colours; None is upright in the middle, on white.
    """
    fitting = (size - 4) / max(drawing.size)
    if rng is None:
        background, scale, shift = Image.new("RGB", (size, size), "white"), fitting, (0, 0)
    else:
        background, scale = _gradient(size, rng), fitting * rng.uniform(0.7, 1.3)
        drawing = drawing.rotate(rng.uniform(-20, 20), Image.Resampling.BICUBIC, expand=True)
        shift = tuple(rng.integers(-size // 10, size // 10 + 1, 2).tolist())
    width, height = (max(1, round(side * scale)) for side in drawing.size)
    drawing = drawing.resize((width, height), Image.Resampling.LANCZOS)
    background.paste(drawing, ((size - width) // 2 + shift[0], (size - height) // 2 + shift[1]), drawing)
    return background


def split(emoji: Sequence[Emoji], fraction: float, seed: int) -> dict[str, list[int]]:
    """Choose training and validation emoji, whole families at a time; return their positions."""
    families = list(dict.fromkeys(each.family for each in emoji))
    order = permutation(len(families), seed)
    val = {families[i] for i in order[: max(1, round(fraction * len(families)))].tolist()}
    return {
        name: [i for i, each in enumerate(emoji) if (each.family in val) == (name == "val")]
        for name in ("train", "val")
    }


def pack_emoji(
    out: Path,
    font: Path = FONT,
    names: Path = NAMES,
    size: int = 64,
    views: int = 8,
    val_fraction: float = 0.15,
    seed: int = 0,
    skin_tones: bool = False,
) -> bool:
    """Write train and val shards into ``out``; False if they were already there.

    Args:
        out: Folder for the shards.
        font: Colour font.
        names: Unicode's emoji-test.txt.
        size: Side of the images in pixels.
        views: Images of each emoji.
        val_fraction: Share of the validation emoji.
        seed: Seed of split and views.
        skin_tones: Whether to take the variants of each skin tone, too.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If an argument is out of its range, or ``out`` holds other shards.
    """
    for option, value, low, high in (("size", size, 8, 512), ("views", views, 1, 1000)):
        if not low <= value <= high:
            raise ValueError(f"--{option}: {value}, expected {low} to {high}")
    if not 0 < val_fraction < 1:
        raise ValueError(f"--val-fraction: {val_fraction}, expected a number between 0 and 1")
    drawings, listed = Drawings(font), read_names(names, skin_tones)
    emoji = [each for each in listed if drawings.draw(each.text) is not None]
    if not emoji:
        raise ValueError(f"--font: '{font}' draws none of the {len(listed)} emoji of '{names}'")
    hashes = {"font": sha256(font), "names": sha256(names)}
    settings = {"set": "emoji", "version": 1, "size": size, "views": views, "val_fraction": val_fraction}
    settings |= {"seed": seed, "skin_tones": skin_tones, **hashes}
    words = {"font": f"the font '{font}'", "names": f"the names of '{names}'"}
    splits = {
        name: Samples(_samples(emoji, rows, drawings, size, views, seed))
        for name, rows in split(emoji, val_fraction, seed).items()
    }
    return pack(out, settings, splits, SHARD_SIZE, views * len(emoji), words)


def _samples(
    emoji: Sequence[Emoji], rows: Sequence[int], drawings: Drawings, size: int, views: int, seed: int
) -> Iterator[Members]:
    labels = {name: i for i, name in enumerate(dict.fromkeys(each.subgroup for each in emoji))}
    for number in range(views):
        for row in rows:
            each, png = emoji[row], io.BytesIO()
            drawing = drawings.draw(each.text)
            assert drawing is not None
            rng = np.random.default_rng([seed, row, number]) if number else None
            view(drawing, size, rng).save(png, "PNG")
            label = labels[each.subgroup]
            yield {
                "__key__": f"emoji-{row:04d}-{number:03d}",
                "png": png.getvalue(),
                "txt": each.name,
                "cls": str(label),
                "json": json.dumps({"label": label, "subgroup": each.subgroup, "emoji": each.text}),
            }


def _gradient(size: int, rng: np.random.Generator) -> Image.Image:
    """Draw a gradient of two colours in any direction."""
    ends, angle = rng.uniform(0, 255, (2, 3)), rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    along = (np.cos(angle) * x + np.sin(angle) * y) / (2 * np.sqrt(2)) + 0.5
    return Image.fromarray((ends[0] + along[..., None] * (ends[1] - ends[0])).round().astype(np.uint8))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data.emoji", description=HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder for the shards; made if missing")
    add("--font", type=Path, default=FONT, help=f"colour font (default {FONT})")
    add("--names", type=Path, default=NAMES, help=f"Unicode's emoji-test.txt (default {NAMES})")
    add("--size", type=int, default=64, metavar="N", help="side of the images in pixels (default 64)")
    add("--views", type=int, default=8, metavar="N", help="images of each emoji (default 8)")
    add("--val-fraction", type=float, default=0.15, metavar="X", help="share for validation (default 0.15)")
    add("--seed", type=int, default=0, metavar="N", help="seed of split and views (default 0)")
    add("--skin-tones", action="store_true", help="also take the variants of each skin tone")
    return parser


def _run(arguments: Sequence[str] | None) -> None:
    options = vars(_parser().parse_args(arguments))
    out, packed = options["out"], pack_emoji(**options)
    print(closing(out, packed, contents(out), "emoji/autoencoder", Path("shards/emoji")))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_command(lambda: _run(arguments))


if __name__ == "__main__":
    sys.exit(main())
