"""Do weights have the names and shapes that a network expects?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

SHOWN = 3
"""Names of each kind that a message lists."""


def check(found: Mapping[str, Tensor], expected: Mapping[str, Sequence[int]], name: str) -> None:
    """Check that weights have exactly the expected names and shapes.

    Args:
        found: The weights.
        expected: Shape of each.
        name: File or folder that they are from, for the message.

    Raises:
        ValueError: If a name is missing or unknown, or a shape differs; lists the first few of each.
    """
    shapes = {
        key: f"{key} {tuple(found[key].shape)} instead of {tuple(shape)}"
        for key, shape in expected.items()
        if key in found and tuple(found[key].shape) != tuple(shape)
    }
    problems = {
        "missing": [key for key in expected if key not in found],
        "not expected": [key for key in found if key not in expected],
        "of another shape": list(shapes.values()),
    }
    said = [_list(keys, kind, len(expected)) for kind, keys in problems.items() if keys]
    if said:
        raise ValueError(f"{name}: {'; '.join(said)}")


def _list(keys: list[str], kind: str, total: int) -> str:
    more = ", ..." if len(keys) > SHOWN else ""
    of = f"{len(keys)} of {total}" if kind != "not expected" else f"{len(keys)}"
    return f"{of} weights {kind} ({', '.join(keys[:SHOWN])}{more})"
