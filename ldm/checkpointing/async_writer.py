"""Write checkpoints in a thread: training waits for a copy of the tensors, not for the disk."""

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor
from typing_extensions import override

from ldm.checkpointing.writer import AtomicCheckpointIO


class AsyncCheckpointIO(AtomicCheckpointIO):
    """Copies a checkpoint into the memory of the host, and writes it in a thread, atomically.

    One is written at a time: the next one waits for it. Takes the memory of one checkpoint more.
    """

    def __init__(self) -> None:
        super().__init__()
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None

    def _save(self, checkpoint: dict[str, Any], path: Path, then: Callable[[], object]) -> None:
        """Begin to write; an error of the one before it is raised here."""
        self.finish()
        self._writing = self._thread.submit(self._save_now, snapshot(checkpoint), path, then)

    def _save_now(self, kept: dict[str, Any], path: Path, then: Callable[[], object]) -> None:
        try:
            super()._save(kept, path, then)
        except OSError as error:  # reported at once: the next save may be an hour away
            print(f"warning: {error}", file=sys.stderr, flush=True)
            raise

    def finish(self) -> None:
        """Wait until what is being written is there.

        Raises:
            OSError: If it cannot be written.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    @override
    def teardown(self) -> None:
        self.finish()


def snapshot(state: Any, copies: dict[tuple[Any, ...], Tensor] | None = None) -> Any:
    """Copy a checkpoint to the host: what training changes afterwards does not change the copy.

    Tensors that are one and the same stay so, and are written once.

    Args:
        state: Dictionaries, lists and tuples of tensors and primitives.
        copies: Of tensors that were met before.
    """
    copies = {} if copies is None else copies
    if isinstance(state, Tensor):
        key = (state.data_ptr(), state.device, state.dtype, state.shape, state.stride())
        if key not in copies:
            copies[key] = state.detach().to("cpu", copy=True)
        return copies[key]
    if isinstance(state, dict):
        return type(state)((k, snapshot(v, copies)) for k, v in state.items())
    if isinstance(state, list):
        return [snapshot(v, copies) for v in state]
    if type(state) is tuple:
        return tuple(snapshot(v, copies) for v in state)
    return state
