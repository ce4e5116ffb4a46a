"""Warnings of commands are one line each."""

import subprocess
import sys
import warnings

from tiny_runs import ROOT

from ldm.io.stderr import plain_warnings

PROGRAM = """\
import warnings
from ldm.io.stderr import plain_warnings
with plain_warnings():
    warnings.warn("data.val: 2 of 3 shards\\n are empty")
"""


def test_a_warning_is_one_line_without_code():
    shown = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True)
    assert shown.stderr == "warning: data.val: 2 of 3 shards are empty\n"


def test_afterwards_warnings_are_shown_as_before():
    before = warnings.formatwarning
    with plain_warnings():
        assert warnings.formatwarning is not before
    assert warnings.formatwarning is before
