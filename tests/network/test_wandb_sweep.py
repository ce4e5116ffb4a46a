"""Sweeps of W&B: the real agent, docs/sweep.yaml, and the stand-in for the server."""

import json
import subprocess
import sys

import pytest
import yaml
from tiny_runs import ROOT
from wandb_runs import Tiny, end_clients
from wandb_server import Server, Sweep

from data.shapes.packer import Settings, pack
from ldm.io.checkpoint import Checkpoint

pytestmark = pytest.mark.slow
STEPS = 4


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """Two agents at once: one has a trial and then one of a misspelt option, the other one is stopped."""
    home = tmp_path_factory.mktemp("home")
    pack(home / "shapes", Settings(train=60, val=24, novel=12, pairs=12, shard_size=20))
    (home / "until").write_text("2")
    with Server() as server:
        tiny = Tiny(home / "shapes", home / "sweep", server.environment)
        paced = Tiny(home / "shapes", home / "sweep", server.environment, home)
        for name, run, trials in (
            ("whole", tiny, [("a1", {"model.optimizer.lr": 0.02}), ("a2", {"model.optimzer.lr": 0.02})]),
            ("cut", paced, [("b1", {"model.optimizer.lr": 0.03})]),
        ):
            config = yaml.safe_load((ROOT / "docs" / "sweep.yaml").read_text())
            assert config["command"][-4:-1] == [
                "--config=demo/autoencoder",
                "--run=runs/sweep",
                "--wandb.mode=online",
            ]
            options = [*run.arguments(f"--trainer.max_steps={STEPS}", f"--run={home / 'sweep'}")]
            config["command"] = [*config["command"][:-4], *options, config["command"][-1]]
            server.sweeps[name] = Sweep(json.dumps(config), trials)
        agents = [agent(tiny, name) for name in server.sweeps]
        server.wait_for(lambda: (home / "sweep" / "b1" / "metrics.csv").exists(), 240)
        server.sweeps["cut"].stopped.add("b1")
        said = [process.communicate(timeout=240)[0] for process in agents]
        yield home / "sweep", server, said
        end_clients(server.environment)


def agent(tiny, sweep):
    command = [sys.executable, "-m", "wandb", "agent", f"me/ldm/{sweep}"]
    return subprocess.Popen(
        command,
        env=tiny.environment(PATH=f"{sys.prefix}/bin:/usr/bin:/bin"),
        cwd=tiny.run.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_each_trial_has_a_folder_and_a_run_by_the_sweeps_id(swept):
    folder, server, _ = swept
    assert {path.name for path in folder.iterdir()} == {"a1", "b1"}
    assert Checkpoint.open(folder / "a1").progress.steps == STEPS
    assert yaml.safe_load((folder / "a1" / "config.yaml").read_text())["model"]["init_args"]["optimizer"][
        "init_args"
    ]["lr"] == pytest.approx(0.02)
    assert set(server.runs) == {"a1", "b1"}
    run = server.runs["a1"]
    assert run.settings["model.optimizer.lr"] == 0.02 and run.attributes["sweep"] == "whole"
    assert run.attributes["groupName"] == "sweep"
    losses = [row["val/loss"] for row in run.rows if "val/loss" in row]
    assert run.summary["val/loss"] == losses[-1] > 0


def test_a_trial_that_the_agent_stops_can_be_resumed(swept):
    folder, server, _ = swept
    assert Checkpoint.open(folder / "b1").progress.steps == 2
    assert server.runs["b1"].exits[-1] == 75


def test_an_option_that_is_not_there_is_one_clear_line(swept):
    _, _, (said, _) = swept
    (line,) = [line for line in said.splitlines() if line.startswith("error:")]
    assert "optimzer" in line and len(line) <= 300
