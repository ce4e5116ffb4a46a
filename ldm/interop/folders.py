"""A folder of a pipeline, with config.json and weights in one file or several."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.io.json_file import read_json
from ldm.io.weights import read_weights

FALLBACK = "fp16"
"""Variant to fall back to where there are no weights without a variant."""


@dataclass(frozen=True)
class ModelFolder:
    """A folder with a network.

    Args:
        folder: The folder.
        config: Contents of its config.json.
        weights: Tensors by name.
        files: The files of weights.
    """

    folder: Path
    config: dict[str, Any]
    weights: dict[str, Tensor]
    files: list[Path]

    @property
    def config_name(self) -> str:
        """Name of the config.json in messages."""
        return str(self.folder / "config.json")

    @property
    def name(self) -> str:
        """Name of the weights in messages."""
        return str(self.files[0] if len(self.files) == 1 else self.folder)


def read_model_folder(folder: Path, stems: tuple[str, ...], variant: str | None) -> ModelFolder:
    """Read config.json and weights.

    Args:
        folder: The folder.
        stems: How files of weights may begin.
        variant: Which weights, e.g. "fp16"; None takes those without a name, or else fp16.

    Raises:
        FileNotFoundError: If one is missing; the message lists the names tried.
        ValueError: If one is damaged.
    """
    config = read_json(folder / "config.json")
    files = _files(folder, stems, variant)
    weights = {name: tensor for file in files for name, tensor in read_weights(file).items()}
    return ModelFolder(folder, config, weights, files)


def _files(folder: Path, stems: tuple[str, ...], variant: str | None) -> list[Path]:
    variants = [variant] if variant else [None, FALLBACK]
    names = [name for kind in variants for stem in stems for name in _names(stem, kind)]
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if found is None:
        there = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
        raise FileNotFoundError(f"'{folder}' has no weights: found {there}, expected {names[0]}")
    return [found] if found.suffix != ".json" else _shards(found)


def _names(stem: str, variant: str | None) -> Iterator[str]:
    """Name the files that weights may be in, best first; an index lists several."""
    named = f".{variant}" if variant else ""
    for kind in ("safetensors", "bin"):
        yield f"{stem}{named}.{kind}"
        yield f"{stem}.{kind}.index{named}.json"
        yield f"{stem}{named}.{kind}.index.json"


def _shards(index: Path) -> list[Path]:
    names = sorted(set(read_json(index).get("weight_map", {}).values()))
    for name in names:
        if Path(name).name != name or name in (".", ".."):
            raise ValueError(f"'{index}' names the file '{name}', expected one in its own folder")
    if not names:
        raise ValueError(f"'{index}' has no weight_map, expected the file of each weight")
    return [index.parent / name for name in names]
