"""From tar shards to batches."""

from ldm import exports

__getattr__, __all__ = exports(
    __name__,
    module="Shards",
    readers="Indexed Reader",
    streaming="Streaming",
)
