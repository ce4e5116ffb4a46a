"""Checkpoints by reference to W&B: the real client, and the stand-in for its server."""

import json
import subprocess
import sys

import pytest
import wandb
from jsonargparse import Namespace
from wandb.sdk import wandb_setup
from wandb_server import KEY, Server

from ldm.io import wandb_client
from ldm.io.artifacts import Reference, checkpoint_file, look_up, run_folder_of
from ldm.io.pins import pinned, pinned_for

pytestmark = pytest.mark.slow
SHA = {"last.ckpt": "1" * 64, "best.ckpt": "2" * 64}
RUN = {"last.ckpt": b"the last", "best.ckpt": b"the best", "config.yaml": b"model: {}", "notes.txt": b"n"}


@pytest.fixture(scope="module")
def server():
    with Server() as server:
        server.digest = server.keep_artifact("a", RUN, ["best", "sha-" + "2" * 16], {"checkpoints": SHA})
        server.keep_artifact("none", {"latents.json": b"{}"})
        yield server


@pytest.fixture
def cache(server, tmp_path, monkeypatch):
    """An empty cache, and the server as the client's."""
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(wandb_client, "TIMEOUT", 60.0)  # a busy machine takes its time
    server.mode = "well"
    server.fetched.clear()
    yield tmp_path / "cache" / "artifacts"
    assert wandb.run is None and wandb_setup.singleton()._connection is None  # no process is left
    wandb.teardown()


def fetched(server):
    return [name for _, name in server.fetched if name != "manifest"]


def test_what_was_fetched_is_taken_from_the_cache(server, cache, monkeypatch):
    best = checkpoint_file("wandb:me/ldm/a:best")
    assert best.read_bytes() == b"the best" and best == cache / server.digest / "checkpoints" / "best.ckpt"
    assert (cache / server.digest / "config.yaml").read_bytes() == b"model: {}"
    assert sorted(fetched(server)) == ["best.ckpt", "config.yaml"]
    exact = look_up(f"wandb:me/ldm/a:sha-{'2' * 16}")
    assert str(exact.reference) == "wandb:me/ldm/a:v0/best.ckpt" and exact.digest == server.digest
    assert checkpoint_file(str(exact.reference)) == best
    assert checkpoint_file("wandb:me/ldm/a:latest").read_bytes() == b"the last"
    assert fetched(server)[2:] == ["last.ckpt"]
    server.mode = "cut"
    monkeypatch.setattr(wandb_client, "TIMEOUT", 2.0)
    assert checkpoint_file("wandb:me/ldm/a:v0").read_bytes() == b"the last"
    assert checkpoint_file("wandb:me/ldm/a:v0/best.ckpt") == best
    with pytest.raises(
        wandb_client.Unreachable, match=r"'wandb:me/ldm/a:best': no answer .* within 2 s; exact"
    ):
        checkpoint_file("wandb:me/ldm/a:best")


def test_a_folder_of_a_run_needs_no_checkpoint(server, cache):
    assert [path.name for path in run_folder_of("wandb:me/ldm/a:latest").iterdir()] == ["config.yaml"]
    assert fetched(server) == ["config.yaml"]


def test_several_processes_fetch_a_file_once(server, cache):
    code = "from ldm.io.artifacts import checkpoint_file; print(checkpoint_file('wandb:me/ldm/a:best'))"
    started = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) for _ in range(2)]
    found = {process.communicate(timeout=60)[0] for process in started}
    assert len(found) == 1 and [process.returncode for process in started] == [0, 0]
    assert sorted(fetched(server)) == ["best.ckpt", "config.yaml"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("wandb:a:v1", "got 'wandb:a:v1', expected wandb:ENTITY/PROJECT/NAME:VERSION, e.g. "),
        (
            "wandb:me/ldm/gone:v1",
            "'wandb:me/ldm/gone:v1' cannot be had from W&B: .*'gone:v1' not found in 'me/ldm'",
        ),
        ("wandb:me/other/a:v0", "'wandb:me/other/a:v0' cannot be had from W&B: .* not found in 'me/other'"),
        ("wandb:me/ldm/none:latest", "'wandb:me/ldm/none:v0' has no checkpoint last.ckpt, but latents.json"),
        (
            "wandb:me/ldm/a:v0/b.ckpt",
            "'wandb:me/ldm/a:v0/b.ckpt' has no checkpoint b.ckpt, but best.ckpt, con",
        ),
    ],
)
def test_what_is_not_there_is_one_clear_line(cache, text, message):
    with pytest.raises(ValueError, match=message) as error:
        checkpoint_file(text)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("mode", ["silent", 500])
def test_without_an_answer_the_command_may_be_repeated(server, cache, mode, monkeypatch):
    monkeypatch.setattr(wandb_client, "TIMEOUT", 2.0)
    server.mode = mode
    with pytest.raises(wandb_client.Unreachable, match=rf"no answer from {server.url} within 2 s") as error:
        checkpoint_file("wandb:me/ldm/a:v0")
    assert error.value.exit_code == 75


def test_a_key_is_needed_and_the_right_one(server, cache, monkeypatch):
    server.mode = 401
    with pytest.raises(ValueError, match=r"a:v0' cannot be had from W&B: .*status 401"):
        checkpoint_file("wandb:me/ldm/a:v0")
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("HOME", str(cache))
    with pytest.raises(ValueError, match=r"a:v0' cannot be had from W&B: No API key configured.*wandb login"):
        checkpoint_file("wandb:me/ldm/a:v0")
    assert len(KEY) == 40


def test_without_wandb_it_says_what_to_install(cache, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"a:v0' cannot be had from W&B: .*pip install wandb"):
        checkpoint_file("wandb:me/ldm/a:v0")
    monkeypatch.undo()


def test_what_arrives_damaged_is_not_kept(server, cache):
    kept = next(run for name, run in server.runs.items() if "best.ckpt" in run.files)
    whole, kept.files["best.ckpt"] = kept.files["best.ckpt"], b"the bent"
    with pytest.raises(ValueError, match=r"best\.ckpt arrived damaged, repeat the command"):
        checkpoint_file("wandb:me/ldm/a:best")
    kept.files["best.ckpt"] = whole
    assert checkpoint_file("wandb:me/ldm/a:best").read_bytes() == whole


def test_a_cache_that_cannot_be_written_is_one_clear_line(cache, monkeypatch):
    for folder, reason in (("/proc/nowhere", "No such file"), ("/dev/null", "Not a directory")):
        monkeypatch.setenv("LDM_CACHE", folder)
        with pytest.raises(OSError, match=rf"LDM_CACHE: '{folder}/artifacts' cannot be written \({reason}"):
            checkpoint_file("wandb:me/ldm/a:best")


def test_an_alias_is_replaced_wherever_it_stands(cache):
    settings = {"a": [{"checkpoint": "wandb:me/ldm/a:best"}, "wandb:me/ldm/a:latest", 3], "b": "runs/wandb:a"}
    assert pinned(settings) == {
        "a": [{"checkpoint": "wandb:me/ldm/a:v0/best.ckpt"}, "wandb:me/ldm/a:v0", 3],
        "b": "runs/wandb:a",
    }
    assert settings["a"][1] == "wandb:me/ldm/a:latest"


def test_a_run_keeps_the_version_that_it_began_with(server, cache, tmp_path):
    digest = server.keep_artifact("moves", {"last.ckpt": b"1"})
    config = Namespace(model=Namespace(latents=Namespace(checkpoint="wandb:me/ldm/moves:latest")))
    exact = pinned_for(tmp_path / "run", config)
    assert exact.model.latents.checkpoint == "wandb:me/ldm/moves:v0"
    assert config.model.latents.checkpoint == "wandb:me/ldm/moves:latest"
    server.keep_artifact("moves", {"last.ckpt": b"2"})
    assert str(look_up("wandb:me/ldm/moves:latest").reference) == "wandb:me/ldm/moves:v1"
    server.mode = "cut"
    assert pinned_for(tmp_path / "run", config) == exact
    recorded = json.loads((tmp_path / "run" / "artifacts.json").read_text())
    assert recorded == {"wandb:me/ldm/moves:latest": {"exact": "wandb:me/ldm/moves:v0", "digest": digest}}


@pytest.mark.parametrize("text", ["wandb:me/ldm/a:v0", "wandb:me/ldm/a:best", "wandb:me/ldm/a:v12/best.ckpt"])
def test_a_reference_reads_as_it_is_written(text):
    assert str(Reference.parse(text)) == text
    assert Reference.parse(text).is_exact == (":v" in text)
