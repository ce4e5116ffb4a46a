"""Arrays that threads read."""

from __future__ import annotations

import pytest

from ldm.io.arrays import parsed


def test_a_disturbed_parser_is_asked_again():
    errors = [SystemError("AST constructor recursion depth mismatch (before=66, after=45)")] * 3

    def read(name: str) -> str:
        if errors:
            raise errors.pop()
        return f"the {name}"

    assert parsed(read, "array") == "the array" and not errors
    errors = [SystemError("for good")] * 99
    with pytest.raises(SystemError, match="for good"):
        parsed(read, "array")
    assert len(errors) == 89
    with pytest.raises(KeyError):
        parsed({}.__getitem__, "missing")
