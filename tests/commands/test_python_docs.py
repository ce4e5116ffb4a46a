"""docs/python.md runs as it is written."""

import re
import shlex

import pytest
import torch
from tiny_runs import ROOT

from ldm import sample

TEXT = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_page_on_python_runs_from_top_to_bottom(home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").symlink_to(home / "runs")
    names = {"__name__": "__main__"}
    for kind, block in re.findall(r"```(python|bash)\n(.*?)```", TEXT, re.DOTALL):
        if kind == "python":
            exec(compile(block, "docs/python.md", "exec"), names)
            continue
        words = shlex.split(block)
        assert words[:3] == ["python", "-m", "ldm.sample"]
        assert sample.main([*words[3:], "--device=cpu"]) == 0
    drawn = sorted(path.name for path in (tmp_path / "drawn").iterdir())
    assert drawn == ["a blue square.png", "a red ring.png"]
    assert len(list((tmp_path / "drawn-by-label").glob("0*.png"))) == 2
    batch = {"key": ["a", "b"], "label": torch.tensor([3, 4])}
    stage, again = names["stage"].eval(), names["again"]
    assert torch.equal(names["images"], again.generate(batch, seed=0))
    again.to(memory_format=torch.channels_last)  # as in training: another layout may round differently
    assert torch.equal(stage.generate(batch, seed=0), again.generate(batch, seed=0))
