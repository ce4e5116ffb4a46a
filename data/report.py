"""What packers end with: contents of the shards, what was left out, and the next command."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from data.items import Item, Skipped
from data.writing import described
from ldm.cli import default_device

ALREADY = "already packed with these settings, nothing to do"
REPORT, SKIPPED = "packed.txt", "skipped.txt"
CLASSES = "classes.txt"
RECIPES = Path("shards/own")
"""Folder of the shards in configs/own."""
SIDES = (256, 128, 64)
"""Sides of images in pixels with a recipe in configs/own."""


def closing(out: Path, was_packed: bool, what: str, config: str, usual: Path) -> str:
    """Return the last lines of a packer whose set a configuration trains on.

    Args:
        out: Folder of the shards.
        was_packed: False if they were already there.
        what: What they hold.
        config: The configuration.
        usual: Folder of the shards in it.
    """
    lines = [] if was_packed else [f"{out}: {ALREADY}"]
    return "\n".join([*lines, f"{out}: {what}", f"next: {fit_command(config, out, usual)}"])


def fit_command(config: str, out: Path, usual: Path) -> str:
    """Return the command that trains a configuration on the shards in a folder, usual or not."""
    command = f"python -m ldm.fit --config {config}"
    if out == usual:
        return command
    return f'{command} --data.train "{out}/train-*.tar" --data.val "{out}/val-*.tar"'


@dataclass
class Report:
    """Counts what is packed.

    Args:
        out: Folder of the shards.
        items: Images by split.
        sides: Shorter side of each image in pixels.
    """

    out: Path
    items: dict[str, list[Item]] = field(default_factory=dict)
    sides: list[int] = field(default_factory=list)

    def add(self, split: str) -> Callable[[Item, int], None]:
        """Return a function that counts an image of a split with its shorter side."""
        found = self.items.setdefault(split, [])

        def take(item: Item, side: int) -> None:
            found.append(item)
            self.sides.append(side)

        return take

    def text(self, skipped: Skipped) -> str:
        """Return counts, sizes, skipped files and the next command as text."""
        lines = [self._packed(), self._sizes(), *self._captions(), *self._skipped(skipped), *self._next()]
        return "".join(f"{line}\n" for line in lines)

    def _packed(self) -> str:
        sizes = [shard.stat().st_size for shard in self.out.glob("*.tar")]
        return f"{self.out}: {described({name: len(items) for name, items in self.items.items()}, sizes)}"

    def _sizes(self) -> str:
        low, middle, high = min(self.sides), median(self.sides), max(self.sides)
        return f"  shorter sides: {low} to {high} pixels, median {middle:.0f}"

    def _captions(self) -> list[str]:
        items = [item for found in self.items.values() for item in found]
        captions = [item.caption for item in items if item.caption is not None]
        if not captions:
            return ["  captions: none (CLIP and diffusion by text need some)"]
        words = [len(caption.split()) for caption in captions]
        distinct = len(set(captions))
        length = " to ".join(str(count) for count in sorted({min(words), max(words)}))
        line = f"  captions: {len(captions)}, {distinct} of them distinct, of {length} words"
        labels = {item.label for item in items if item.label is not None}
        return [f"{line}, such as {captions[0]:.60}", *([f"  classes: {len(labels)}"] if labels else [])]

    def _skipped(self, skipped: Skipped) -> list[str]:
        if not skipped:
            return []
        reasons = [
            f"    {len(names)} {reason} (first: {names[0]})" for reason, names in skipped.files.items()
        ]
        return [f"  skipped {len(skipped)}, all listed in {self.out / SKIPPED}:", *reasons]

    def _next(self) -> list[str]:
        """Return the command of the largest recipe that fits the images, on a CPU that of 64 pixels."""
        if "val" not in self.items:
            return [
                "next: name shards of other images as --data.val; the recipes in docs/own-images.md need some"
            ]
        fitting = [side for side in SIDES if side <= median(self.sides)] or [SIDES[-1]]
        side = SIDES[-1] if default_device() == "cpu" else fitting[0]
        return [
            f"next: {fit_command(f'own/{side}/autoencoder', self.out, RECIPES)}",
            "docs/own-images.md has the steps after it, other sizes, and how many steps to train",
        ]
