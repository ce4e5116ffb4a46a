"""Environment of a run: program, revision, versions and hardware, without names of machine or user."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ldm.hardware import computes

MOST_CHANGES = 2**20
"""Most bytes of uncommitted changes to record: longer ones are data, not source."""


def environment() -> dict[str, Any]:
    """Collect what environment.json records."""
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "command": _command(),
        "git": _git(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "bfloat16": [name for name in ("cpu", "cuda") if _computes_bfloat16(name)],
        "devices": devices or ["cpu"],
        "packages": dict(_packages()),
    }


def uncommitted() -> str:
    """Return the changes since the revision, as git writes them, and the names of files it does not know.

    At most ``MOST_CHANGES`` bytes, and then a line that marks the cut; empty outside of a repository.
    """
    try:
        root = _git_output("rev-parse", "--show-toplevel")
        changes = _git_output("-C", root, "diff", "HEAD", "--no-color", "--no-ext-diff")
        new = _git_output("-C", root, "ls-files", "--others", "--exclude-standard")
    except (OSError, subprocess.CalledProcessError):
        return ""
    text = "".join(f"# not under version control: {name}\n" for name in new.splitlines())
    text += changes + "\n" if changes else ""
    content = text.encode()
    if len(content) <= MOST_CHANGES:
        return text
    beginning = content[:MOST_CHANGES].decode(errors="ignore")
    return f"{beginning}\n# cut: {len(content):,} bytes in all\n"


@cache  # a start asks twice, and hundreds of files are read
def _packages() -> list[tuple[str, str]]:
    return sorted((found.name, found.version) for found in importlib.metadata.distributions())


def _computes_bfloat16(device: str) -> bool:
    here = device == "cpu" or torch.cuda.is_available()
    return here and computes(torch.bfloat16, torch.device(device))


def _command() -> str:
    """Return the command line as one would type it."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = ["-m", spec.name.removesuffix(".__main__")] if spec else [Path(sys.argv[0]).name]
    return shlex.join(["python", *program, *sys.argv[1:]])


def _git() -> dict[str, Any] | None:
    """Return revision and whether there are uncommitted changes; None outside of a repository."""
    try:
        return {
            "revision": _git_output("rev-parse", "HEAD"),
            "dirty": bool(_git_output("status", "--porcelain")),
        }
    except (OSError, subprocess.CalledProcessError):
        return None


def _git_output(*arguments: str) -> str:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, errors="replace", check=True
    ).stdout.rstrip("\n")
