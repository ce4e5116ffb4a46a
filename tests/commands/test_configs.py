"""Every configuration keeps to the rules of the house; test_derived_fields.py builds them."""

import pytest
from tiny_runs import ROOT

from ldm import fit


def name(path):
    return str(path.relative_to(ROOT / "configs"))


ALL = sorted((ROOT / "configs").rglob("*.yaml"))
CONFIGS = [path for path in ALL if path.name != "base.yaml" and not path.name.startswith("_")]


@pytest.mark.parametrize("path", CONFIGS, ids=name)
def test_a_configuration_is_short_and_opens_with_its_command(path):
    lines = path.read_text().splitlines()
    head = "\n".join(lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))])
    assert f"python -m ldm.fit --config {name(path).removesuffix('.yaml')}" in head
    assert "xpected" in head


def test_the_total_length_of_all_configurations_is_bounded():
    own = [path for path in ALL if "own" in path.parts]
    assert sum(len(path.read_text().splitlines()) for path in own) <= 140
    assert sum(len(path.read_text().splitlines()) for path in ALL if path not in own) <= 900


def test_the_table_of_configurations_is_complete():
    table = (ROOT / "configs" / "README.md").read_text()
    assert {n for n in map(name, ALL) if f"`{n.removesuffix('.yaml')}`" not in table} == set()


def test_misspelt_fields_cannot_hide_behind_base_yaml(tmp_path):
    assert fit.main(["--config", str(CONFIGS[0]), f"--run={tmp_path}", "--trainer.log_every_n_step=1"]) == 2
