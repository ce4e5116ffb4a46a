"""Artifacts of W&B along a chain: autoencoder -> latents -> diffusion, each by its name and its contents.

An error in publishing is a warning: it must not end a run that is trained.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ldm.data.manifest import LATENTS
from ldm.io.artifacts import BEST, Reference, is_reference
from ldm.io.checkpoint import find
from ldm.io.weights import sha256 as file_sha256
from ldm.loggers.outbox import Artifact
from ldm.loggers.wandb import WandbSamplesLogger
from ldm.runs.folder import RunFolder


def run_of(checkpoint: str | Path) -> RunFolder:
    """Return the run that a checkpoint lies in; a run folder stands for its newest checkpoint."""
    path = Path(checkpoint).absolute()
    return RunFolder(path.parent.parent if path.suffix == ".ckpt" else path)


def artifact_name(folder: Path) -> str:
    """Name the artifact of a run or of shards by its folder: ``demo-clip`` for ``runs/demo/clip``."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(folder.absolute().parts[-2:]).strip("/"))


def version(sha256: str) -> str:
    """Name the version of an artifact by the SHA-256 of a file in it."""
    return f"sha-{sha256[:16]}"


def artifact_of(checkpoint: str, sha256: str) -> tuple[str, str]:
    """Return name and version of the artifact of a checkpoint: of its run, or as it is referred to."""
    if is_reference(checkpoint):
        reference = Reference.parse(checkpoint)
        return reference.path, reference.version
    return artifact_name(run_of(checkpoint).folder), version(sha256)


def use_upstream(
    loggers: Iterable[WandbSamplesLogger], upstream: Mapping[str, str], latents: Iterable[Path]
) -> None:
    """Record what a run is built on.

    Args:
        loggers: Where to.
        upstream: Checkpoints that the stage is built on, with their SHA-256.
        latents: Folders of the shards of latents that it trains on.
    """
    built_on = dict(artifact_of(path, sha) for path, sha in upstream.items())
    built_on |= {artifact_name(folder): _version_of(folder / LATENTS) for folder in latents}
    for logger in loggers:
        logger.use(built_on, "built_on")


def use_weights(loggers: Iterable[WandbSamplesLogger], checkpoint: str) -> None:
    """Record the checkpoint whose weights a new run starts with."""
    for logger in loggers:
        logger.use(dict([artifact_of(checkpoint, file_sha256(find(checkpoint)))]), "started_with")


def publish_run(
    loggers: Iterable[WandbSamplesLogger], run: RunFolder, kind: str, metadata: Mapping[str, Any]
) -> None:
    """Make a finished run's checkpoints an artifact: the last, and the best if there is one, as alias too.

    Args:
        loggers: Where to.
        run: The run.
        kind: Name of its stage.
        metadata: Samples seen, and what it was built on.
    """
    for logger in loggers:
        with _warning(f"the checkpoints of {run.folder}"):
            hashes = {file_sha256(find(run.last)): run.last}
            if (best := run.last.with_name(BEST)).exists():
                hashes.setdefault(file_sha256(best), best)  # the last may be the best
            logger.publish(
                Artifact(
                    name=artifact_name(run.folder),
                    kind=kind,
                    versions=[*map(version, hashes), *(["best"] if best.exists() else [])],
                    files={path.name: path for path in (*hashes.values(), *run.records, *run.curves)},
                    metadata={**metadata, "checkpoints": {path.name: sha for sha, path in hashes.items()}},
                )
            )


def publish_latents(logger: WandbSamplesLogger, folder: Path, made_by: dict[str, Any]) -> None:
    """Make shards of latents an artifact: their manifest, and the shards by reference.

    Args:
        logger: Where to.
        folder: The shards.
        made_by: Record of the autoencoder in the manifest.
    """
    source = made_by["autoencoder"]
    logger.use(dict([artifact_of(source["checkpoint"], source["sha256"])]), "built_on")
    with _warning(f"the latents in {folder}"):
        logger.publish(
            Artifact(
                name=artifact_name(folder),
                kind="latents",
                versions=[_version_of(folder / LATENTS)],
                files={LATENTS: folder / LATENTS},
                references=sorted(folder.glob("*.tar")),
                metadata=made_by,
            )
        )


def _version_of(path: str | Path) -> str:
    return version(file_sha256(find(path)))


@contextmanager
def _warning(what: str) -> Iterator[None]:
    """Let any error be a warning that names what is not published."""
    try:
        yield
    except Exception as error:
        warnings.warn(f"wandb.artifacts: {what} are not published: {error}", stacklevel=3)
