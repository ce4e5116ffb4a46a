"""Everything that is worth a measurement on one GPU: ``python -m benchmarks.gpu``.

Eight minutes in all. Each part is a process with a limit of its own, the surest first; what it found is in
the file --out at once. On a CPU the networks are tiny, to try the benchmark itself.
Networks of diffusers need ``pip install -e '.[test]'``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.gpu import commands, parts
from benchmarks.gpu.parts import Figures, Setting
from ldm.io.json_file import write_json

TOTAL = 480.0
"""Seconds of all parts."""
MARK = "figures: "


def _training(name: str, ours: bool, how: str) -> Callable[[Setting], Figures]:
    return lambda setting: parts.training(name, ours, how, setting)


def _fit(stage: str) -> Callable[[Setting], Figures]:
    return lambda setting: commands.fit(stage, setting)


PARTS: dict[str, tuple[float, Callable[[Setting], Figures]]] = {
    "peak": (30, parts.peak),
    "unet": (45, _training("unet", True, "eager")),
    "unet of diffusers": (45, _training("unet", False, "eager")),
    "autoencoder": (40, _training("autoencoder", True, "eager")),
    "clip": (40, _training("clip", True, "eager")),
    "shards": (40, commands.shards),
    "fit autoencoder": (90, _fit("autoencoder")),
    "fit clip": (60, _fit("clip")),
    "encode": (40, commands.encode),
    "fit diffusion": (120, _fit("diffusion")),
    "sample": (60, commands.sample),
    "unet compiled": (120, _training("unet", True, "compile")),
    "unet compiled, warm": (60, _training("unet", True, "compile")),
    "unet profile": (40, parts.profile),
    "unet largest batch": (60, parts.largest_batch),
    "unet of diffusers compiled": (120, _training("unet", False, "compile")),
    "autoencoder compiled": (90, _training("autoencoder", True, "compile")),
    "clip compiled": (60, _training("clip", True, "compile")),
    "unet with CUDA graphs": (90, _training("unet", True, "compile-graphs")),
    "autoencoder of diffusers": (40, _training("autoencoder", False, "eager")),
}
"""Limit in seconds of each part, and what it does, in order."""


def run(name: str, options: argparse.Namespace, limit: float, work: Path) -> dict[str, Any]:
    """Run a part in a process of its own; say why it has no figures if it has none."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--part", name, "--size", options.size]
    command += ["--device", options.device, "--rounds", str(options.rounds)]
    command += ["--work", str(work)]
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(work / "compiled")}
    begun = time.monotonic()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, env=environment)
    except subprocess.TimeoutExpired:
        return {"failed": f"not done after {limit:.0f} s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    found = json.loads(lines[-1].removeprefix(MARK)) if lines else {"failed": done.stderr[-300:]}
    return {**found, "seconds": round(time.monotonic() - begun, 1)}


def main(arguments: list[str] | None = None) -> int:
    """Run the parts; return 0."""
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--size", choices=parts.SIZES, default="sd1" if on_gpu else "tiny")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--patience", type=float, default=1.0, help="Factor of all limits, for a slow host.")
    parser.add_argument("--part", choices=PARTS, help="Run this one here, and print its figures.")
    parser.add_argument("--work", type=Path, default=Path("."), help="Of --part: folder for shards and runs.")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    options = parser.parse_args(arguments)
    if options.part is not None:
        setting = Setting(options.size, torch.device(options.device), options.work, options.rounds)
        print(MARK + json.dumps(PARTS[options.part][1](setting)), flush=True)
        return 0
    results: dict[str, Any] = {}
    end = time.monotonic() + TOTAL * options.patience
    with TemporaryDirectory(prefix="ldm-gpu-") as work:
        for name in options.parts:
            left = end - time.monotonic()
            limit = min(PARTS[name][0] * options.patience, left)
            is_late = left <= 0
            results[name] = {"failed": "no time left"} if is_late else run(name, options, limit, Path(work))
            write_json(options.out, results)
            print(f"{name}: {json.dumps(results[name])}", flush=True)
    print(
        f"{options.out}: {sum('failed' not in found for found in results.values())} of {len(results)} parts"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
