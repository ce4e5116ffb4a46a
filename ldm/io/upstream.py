"""Find the checkpoints that a stage was built on, wherever its chain of runs lies now.

The config of a stage names them by a path of the machine that trained it; its checkpoint records their
SHA-256. While a stage is rebuilt, ``open_upstream`` looks for a path

1. at the path of ``--upstream NAME=PATH``,
2. in the rebuilt stage's own run folder, where ``keep_upstream`` put it when its run started, or in a folder
   above it: a plain Trainer writes its checkpoints below its ``default_root_dir``,
3. in the folder that this run folder lies in, under the same name,
4. at the path itself,

and takes the first file that has the recorded hash. Where no hash is recorded, as when a new run starts, it
takes the first of 1 and 4.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ldm.io.artifacts import Reference, is_reference
from ldm.io.atomic import link
from ldm.io.checkpoint import Checkpoint, find
from ldm.io.weights import model_folder_sha256

OPTION: dict[str, Any] = {
    "type": str,
    "nargs": "+",
    "default": [],
    "metavar": "NAME=PATH",
    "help": "Places of the checkpoints that the model was built on, by the names of their run folders, e.g. "
    "autoencoder=/data/runs/autoencoder; default: next to its own run folder, or where they were.",
}
"""Arguments of a parser for the option --upstream."""


MODEL_FOLDERS = "model_folders"
"""Entry of a checkpoint: folders of other programs' models that the stage is built on, with their SHA-256."""
KEPT = "upstream"
"""Folder of a run that holds what it was built on."""


@dataclass(frozen=True)
class _Search:
    overrides: Mapping[str, str] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)
    owner: Path | None = None
    recorded: Mapping[str, str] = field(default_factory=dict)


_NO_SEARCH = _Search()
_search: ContextVar[_Search] = ContextVar("upstream", default=_NO_SEARCH)


@contextmanager
def upstream_options(options: Sequence[str] | None) -> Iterator[None]:
    """Apply the values of ``--upstream`` to all stages that are built in the ``with`` block.

    Raises:
        ValueError: If one is not NAME=PATH, or if no stage was built on a checkpoint of that name.
    """
    overrides = {}
    for option in options or ():
        name, equals, path = option.partition("=")
        if not (name and equals and path):
            raise ValueError(
                f"--upstream: got '{option}', expected NAME=PATH, e.g. autoencoder=runs/autoencoder"
            )
        overrides[name] = path
    search = _Search(overrides)
    token = _search.set(search)
    try:
        yield
    finally:
        _search.reset(token)
    if unused := [name for name in overrides if name not in search.used]:
        raise ValueError(f"--upstream: nothing here is built on a checkpoint named '{unused[0]}'")


@contextmanager
def rebuilding(checkpoint: Checkpoint) -> Iterator[None]:
    """Let ``open_upstream`` look for what the stage of ``checkpoint`` was built on, in the ``with`` block."""
    recorded = {**checkpoint.upstream, **checkpoint.state.get(MODEL_FOLDERS, {})}
    token = _search.set(replace(_search.get(), owner=checkpoint.file, recorded=recorded))
    try:
        yield
    finally:
        _search.reset(token)


def open_upstream(
    path: str, stage: str | None = None, kind: Callable[[Checkpoint], str] | None = None
) -> Checkpoint:
    """Open a checkpoint that a stage is built on.

    Args:
        path: Checkpoint file or run folder, as the stage's config names it.
        stage: Name of the stage that must have written it; None accepts any.
        kind: Hash of what the stage depends on: ``--upstream`` may name another file for which it is equal.
            None takes only the recorded file.

    Raises:
        FileNotFoundError: If there is none; the message lists where it was looked for.
        ValueError: If none has the recorded hash, or one is damaged or of another stage.
    """
    search, name = _search.get(), upstream_name(path)
    expected = search.recorded.get(path)
    paths = [path]
    if expected is not None and search.owner is not None:
        if not is_reference(path):
            paths.insert(0, str(_sibling(Path(path), search.owner)))
        paths[:0] = [str(kept) for kept in _locations(search.owner, expected) if kept.exists()]
    if name in search.overrides:
        search.used.add(name)
        paths.insert(0, str(find(search.overrides[name])))
    if expected is None:
        return Checkpoint.open(paths[0], stage)
    named: Checkpoint | None = None
    outcomes: dict[str, Checkpoint | Exception] = {}
    for each in paths:
        try:
            checkpoint = Checkpoint.open(each, stage)
        except (FileNotFoundError, ValueError) as error:
            outcomes[each] = error
            continue
        if checkpoint.sha256 == expected:
            if named is None or (kind is not None and kind(named) == kind(checkpoint)):
                return named or checkpoint
            break
        if name in search.overrides and each == paths[0]:
            named = checkpoint
        outcomes[each] = checkpoint
    if named is not None:
        raise ValueError(
            f"--upstream {name}: '{paths[0]}' has SHA-256 {named.sha256[:12]}, expected "
            f"{expected[:12]}, that of the checkpoint that the run was built on"
            + ("" if kind is None else ", or one with the same encoder and latent scale")
        )
    raise _not_found(path, expected, outcomes)


def open_model_folder(path: str) -> tuple[Path, str]:
    """Find a folder of another program's model that a stage is built on.

    It is no checkpoint of ours and may be large: no run keeps a copy of it. It may lie next to the run.

    Returns:
        The folder, and the SHA-256 of its files.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If none has the recorded hash.
    """
    search, name = _search.get(), Path(path).name
    expected = search.recorded.get(path)
    folders = [Path(path)]
    if expected is not None and search.owner is not None:
        folders.insert(0, run_folder(search.owner.absolute()).parent / name)
    if name in search.overrides:
        search.used.add(name)
        folders = [Path(search.overrides[name])]
    found = {folder: model_folder_sha256(folder) for folder in folders if folder.is_dir()}
    for folder, sha256 in found.items():
        if expected in (None, sha256):
            return folder, sha256
    if not found:
        raise FileNotFoundError(
            f"model '{path}' does not exist, expected a local folder; nothing is downloaded: name another "
            f"place of it with --upstream {name}=PATH"
        )
    folder, sha256 = next(iter(found.items()))
    raise ValueError(
        f"model '{folder}' has SHA-256 {sha256[:12]}, expected {str(expected)[:12]}, that of the folder that "
        f"the run was built on: restore its files, or name another place with --upstream {name}=PATH"
    )


def check_model_folders(folders: Mapping[str, str], checkpoint: Mapping[str, Any]) -> None:
    """Check that a run goes on with the folders of other programs' models that it began with.

    Args:
        folders: Those of now, with the SHA-256 of their files.
        checkpoint: State of the run's checkpoint.

    Raises:
        ValueError: If one has other contents than then.
    """
    then = checkpoint.get(MODEL_FOLDERS, {}).values()
    for path, now in folders.items():
        if now not in then:
            raise ValueError(
                f"model '{path}' changed since this run began (SHA-256 {now[:12]} now, "
                f"{' or '.join(sha[:12] for sha in then) or 'none'} then): start a new run folder, or "
                "restore its files"
            )


def keep_upstream(run: Path, upstream: Mapping[str, str]) -> None:
    """Keep what a run is built on in its own folder: whatever becomes of the originals, it can be used.

    Files are named by their hash, and are hard links: they cost nothing while the original is there. On
    another file system they are copies.

    Args:
        run: Folder of the run.
        upstream: Checkpoints that its stage is built on, with their SHA-256.

    Raises:
        ValueError: If one of them was replaced meanwhile.
        OSError: If one cannot be copied.
    """
    for path, sha256 in upstream.items():
        found = open_upstream(path)
        if not (kept := _kept(run, sha256)).exists():
            link(found.file, kept)
        if Checkpoint.open(kept).sha256 != sha256:
            kept.unlink()
            raise ValueError(
                f"upstream checkpoint '{path}' was replaced meanwhile: wait for the end of its run"
            )
        with rebuilding(found):
            keep_upstream(run, found.upstream)


def keep_if_absent(run: Path, upstream: Mapping[str, str]) -> None:
    """Keep what a run is built on, unless its folder has it already; a warning if it cannot be kept."""
    try:
        keep_upstream(run, {path: sha for path, sha in upstream.items() if not _kept(run, sha).exists()})
    except (OSError, ValueError) as error:
        warnings.warn(f"'{run}' keeps no copy of what this run is built on: {error}", stacklevel=2)


def run_folder(path: Path) -> Path:
    """Return the run folder of a checkpoint in it; any other path stands for itself."""
    return path.parent.parent if path.parent.name in ("checkpoints", KEPT) else path


def upstream_name(path: str) -> str:
    """Return the name that --upstream has for a checkpoint: of its run folder, or of its artifact."""
    return Reference.parse(path).name if is_reference(path) else run_folder(Path(path)).name


def _kept(run: Path, sha256: str) -> Path:
    return run / KEPT / f"{sha256}.ckpt"


def _locations(owner: Path, sha256: str) -> Iterator[Path]:
    """List where what a checkpoint was built on may be kept: in its run folder, or in one above it."""
    yield _kept(run_folder(owner), sha256)
    for folder in list(owner.absolute().parents)[:4]:
        yield _kept(folder, sha256)


def _sibling(path: Path, owner: Path) -> Path:
    """Move ``path`` to where ``owner``'s run folder lies."""
    run = run_folder(path)
    return run_folder(owner.absolute()).parent / run.name / path.relative_to(run)


def _not_found(path: str, expected: str, outcomes: Mapping[str, Checkpoint | Exception]) -> Exception:
    hashes = {p: found.sha256[:12] for p, found in outcomes.items() if isinstance(found, Checkpoint)}
    damages = [found for found in outcomes.values() if isinstance(found, ValueError)]
    if damages and not hashes:
        return damages[0]
    where = " and ".join(f"'{each}'" for each in (hashes or outcomes))
    hint = f"name it with --upstream {upstream_name(path)}=PATH"
    if not hashes:
        return FileNotFoundError(
            f"upstream checkpoint '{path}' does not exist: looked for SHA-256 {expected[:12]} at {where}; "
            f"{hint}"
        )
    now = " and ".join(hashes.values())
    return ValueError(
        f"upstream checkpoint '{path}' changed since this run began (SHA-256 {now} now at {where}, "
        f"{expected[:12]} then): start a new run folder, restore the earlier file, or {hint}"
    )
