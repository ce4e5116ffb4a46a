"""ldm.fit online, by the real client and the stand-in for W&B's server: nothing lost, twice or hung."""

import os
import shutil
import signal
import time
from dataclasses import replace

import pytest
from wandb_runs import STEPS, Tiny, clients, end_clients
from wandb_server import Server

from benchmarks.wandb.bounds import bound
from data.shapes.packer import Settings, pack
from ldm.loggers.logged import logged

pytestmark = pytest.mark.slow
TRAINED = [10 * step for step in range(STEPS)]
ALL = sorted([*TRAINED, *(10 * step + extra for step in (3, 7, 11) for extra in (2, 9))])
"""Positions of the rows of an undisturbed run: training, image grids, validations."""


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards") / "shapes"
    pack(folder, Settings(train=60, val=24, novel=12, pairs=12, shard_size=20))
    return folder


@pytest.fixture
def server():
    with Server() as server:
        yield server
        end_clients(server.environment)


@pytest.fixture
def tiny(shards, server, tmp_path):
    (tmp_path / "group").mkdir()
    (tmp_path / "until").write_text("1000")
    return Tiny(shards, tmp_path / "group" / "run", server.environment, tmp_path)


def positions(server, tiny):
    return [row["_step"] for row in server.runs[tiny.id].rows]


def assert_complete(server, tiny):
    """The server has each row of the folder once, in order, with its values and images, within the bounds."""
    assert positions(server, tiny) == ALL
    run = server.runs[tiny.id]
    trainer = {"max_steps": STEPS, "val_check_interval": 4, "log_every_n_steps": 1}
    model = {"class_path": "ldm.stages.Autoencoder"}
    most = bound({"trainer": trainer, "model": model, "sample_grid": {"num": 6}}, 32, STEPS)
    assert len(run.rows) == most.rows + most.validations * (1 + len(most.grids))
    grids = {row["images"]["path"] for row in run.rows if "images" in row}
    sent = sum(map(len, run.lines["history"])) + sum(len(run.files[path]) for path in grids)
    assert len(grids) == most.validations and sent < most.bytes
    for row, ours in zip(run.rows, logged(tiny.run), strict=True):
        assert {name: row[name] for name in ours.values} == ours.values
        if ours.grid is not None:
            assert run.files[row[ours.grid.panel]["path"]] == ours.grid.path.read_bytes()
            assert row[ours.grid.panel]["caption"] == ours.grid.caption


def test_a_run_that_is_killed_with_its_group_ends_with_each_row_once(server, tiny):
    tiny.go_on_until(10)
    with tiny.started() as process:
        tiny.wait_for_steps(process, 6)
        server.stop()  # what is trained from here on does not arrive
        tiny.wait_for_steps(process, 10)
        os.killpg(process.pid, signal.SIGKILL)
    end_clients(server.environment)
    server.start()
    assert len(positions(server, tiny)) < 10
    tiny.go_on_until(1000)
    out, err, _ = tiny.train()
    assert "resumes" in out and not err
    assert_complete(server, tiny)
    assert server.runs[tiny.id].exits[-1] == 0
    assert "0 rows sent" in tiny.command("ldm.sync", tiny.run)
    assert_complete(server, tiny)


def test_offline_after_kills_one_command_sends_each_row_of_many_runs_once(server, tiny):
    """The first begin finds no server; what the second one trains twice is there once."""
    server.stop()
    tiny.go_on_until(6)
    with tiny.started() as process:
        tiny.wait_for_steps(process, 6)
        os.killpg(process.pid, signal.SIGKILL)
        _, err = process.communicate()
    (line,) = err.splitlines()
    assert line.startswith(f"warning: wandb.mode: no answer from {server.url} within 20 s")
    assert f"'python -m ldm.sync {tiny.run}' sends it" in line
    assert len(tiny.command("ldm.sync", tiny.run, code=75).splitlines()) == 1
    tiny.go_on_until(1000)
    tiny.train("--wandb.mode=offline")
    other = tiny.run.with_name("other")
    shutil.copytree(tiny.run, other)
    before = {path: path.stat() for path in tiny.run.glob("wandb/offline-run-*/*.wandb")}
    server.start()
    out = tiny.command("ldm.sync", tiny.run, other)
    assert out.count(f"{len(ALL)} rows sent") == 2
    assert_complete(server, tiny)
    assert_complete(server, replace(tiny, run=other))
    assert tiny.command("ldm.sync", tiny.run, other).count(": 0 rows sent") == 2
    assert_complete(server, tiny)
    assert all(path.stat().st_size == stat.st_size for path, stat in before.items()) and len(before) == 2
    run = server.runs[tiny.id]
    assert run.settings["model.optimizer.lr"] == 0.01 and run.attributes["groupName"] == "group"
    assert not [value for value in run.settings.values() if str(tiny.run.parent) in str(value)]


def test_required_without_an_answer_may_be_repeated(server, tiny):
    server.mode = 500
    _, err, _ = tiny.train("--wandb.required=true", code=75)
    assert err.startswith("error: wandb.mode: no answer from") and len(err.splitlines()) == 1
    assert not clients(server.environment)


def test_a_server_that_goes_silent_delays_neither_a_signal_nor_the_end(server, tiny):
    tiny.go_on_until(6)
    with tiny.started() as process:
        tiny.wait_for_steps(process, 2)
        server.mode = "silent"
        tiny.wait_for_steps(process, 6)
        process.send_signal(signal.SIGUSR1)
        begin = time.monotonic()
        out, err = process.communicate()
    assert process.returncode == 75 and "stopped at step 6 by SIGUSR1" in out
    assert time.monotonic() - begin < 60  # 10 s, on an idle machine
    (line,) = err.splitlines()
    assert line.startswith("warning: W&B: no answer in time: rows up to step 6 may be missing")
    assert f"'python -m ldm.sync {tiny.run}'" in line
    assert not clients(server.environment)
    server.mode = "well"
    tiny.go_on_until(7)  # before the first image of this process: W&B hooks into imports
    with tiny.started("--wandb.finish_timeout=2") as process:
        tiny.wait_for_steps(process, 7)
        for number in clients(server.environment):  # W&B's own process
            os.kill(number, signal.SIGKILL)
        tiny.go_on_until(1000)
        out, err = process.communicate()
    assert process.returncode == 0 and "done, 12 steps" in out
    assert "training goes on" in err and len(err.splitlines()) == 1
    assert not clients(server.environment)
    tiny.command("ldm.sync", tiny.run)
    assert_complete(server, tiny)
