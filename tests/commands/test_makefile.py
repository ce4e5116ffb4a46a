"""``make help`` names what make can do."""

import re

from tiny_runs import ROOT


def test_help_names_every_target():
    text = (ROOT / "Makefile").read_text()
    targets = set(re.search(r"^\.PHONY:(.*)$", text, re.MULTILINE)[1].split())
    assert set(re.findall(r'^\t@echo "make (\S+) ', text, re.MULTILINE)) == targets - {"help"}
    assert targets == set(re.findall(r"^([a-z][\w-]*):(?!=)", text, re.MULTILINE))
