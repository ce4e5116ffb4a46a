"""Images in the folders that W&B's client leaves, which a killed one may not have sent.

The server may have a row and not its image: they go separate ways. Each begin of a run online has a folder
``wandb/run-*-<id>``; ``wandb/sent.txt`` names those of which everything was sent.
"""

from __future__ import annotations

from pathlib import Path

from ldm.io.atomic import write_text

SENT = "sent.txt"


def unsent(folder: Path, run: str) -> list[Path]:
    """List the folders of earlier begins of a run of which not everything is known to be sent.

    Args:
        folder: Of the client: ``wandb`` in the run's folder.
        run: Id of the run.
    """
    done = set(_sent(folder))
    return [path for path in sorted(folder.glob(f"run-*-{run}")) if path.name not in done]


def images(begun: Path) -> list[Path]:
    """List the images that were logged in one begin of a run."""
    return sorted(path for path in (begun / "files" / "media").rglob("*") if path.is_file())


def mark_sent(folder: Path, run: str) -> None:
    """Note that everything of all begins of a run until now is sent."""
    names = [*_sent(folder), *(path.name for path in unsent(folder, run))]
    write_text(folder / SENT, "".join(f"{name}\n" for name in names))


def _sent(folder: Path) -> list[str]:
    path = folder / SENT
    return path.read_text(encoding="utf-8").split() if path.is_file() else []
