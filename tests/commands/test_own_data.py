"""A run on a data module of one's own, named in a configuration or on the command line."""

import pytest
import yaml
from comparing import error_of
from tiny_runs import ROOT

from ldm import fit
from ldm.io.checkpoint import Checkpoint
from ldm.runs.recipe import names_class

MINE = {"class_path": "own_data.OwnData", "init_args": {"batch_size": 4}}


@pytest.fixture
def arguments(chain, tmp_path):
    """The demo's autoencoder, whose own configuration names shards: a configuration without them."""
    config = yaml.safe_load((ROOT / "configs/demo/autoencoder.yaml").read_text()) | {"data": MINE}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(config))
    tiny = [a for a in chain.arguments("autoencoder")[2:] if not a.startswith(("--data", "--run"))]
    return ["--config", str(tmp_path / "mine.yaml"), f"--run={tmp_path / 'run'}", *tiny]


def test_own_data_trains_resumes_and_its_recorded_config_runs_again(arguments, tmp_path, capsys):
    assert fit.main([*arguments, "--trainer.max_steps=4"]) == 0
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert saved["data"] == MINE
    again = ["--config", str(tmp_path / "run" / "config.yaml"), f"--run={tmp_path / 'run'}"]
    assert fit.main([*again, "--trainer.max_steps=8"]) == 0
    assert "resumes" in capsys.readouterr().out
    checkpoint = Checkpoint.open(tmp_path / "run")
    assert checkpoint.progress.steps == 8 and checkpoint.progress.samples == 32


def test_arguments_of_own_data_are_checked(arguments, tmp_path, capsys):
    assert "data: module 'own_data' has no attribute 'Nothing'" in error_of(
        capsys, [*arguments, "--data.class_path=own_data.Nothing"]
    )
    line = error_of(capsys, [*arguments, "--data.init_args.batch_size=many"])
    assert "batch_size: got many, expected int" in line
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("command_line", "is_named"),
    [
        (["--data.class_path=own_data.OwnData"], True),
        (["--data.class_path", "own_data.OwnData"], True),
        (["--data=own_data.OwnData"], True),
        (["--data", "{class_path: own_data.OwnData}"], True),
        (["--data", "{train: a.tar, val: b.tar}"], False),
        (["--data.train=a.tar", "--data.val=b.tar"], False),
        (["--config=demo/autoencoder", "-c", "demo/clip"], False),
        (["--config=nowhere.yaml"], False),
        (["--config"], False),
    ],
)
def test_a_class_is_looked_for_wherever_it_can_be_named(command_line, is_named):
    assert names_class("data", command_line) == is_named
