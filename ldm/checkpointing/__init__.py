"""Writing of checkpoints, and their schedule."""

from ldm import exports

__getattr__, __all__ = exports(
    __name__,
    async_writer="AsyncCheckpointIO",
    callback="Checkpoints",
    preemption="Preemption",
    writer="AtomicCheckpointIO",
)
