"""One process at a time holds a folder; one that was killed, on any node, does not hold it for ever."""

import os
import signal
import subprocess
import sys
import time

import pytest
from holding import QUICK, holder

from ldm.io import lock
from ldm.io.lock import held

TWICE = f"""
import shutil, sys, time
from pathlib import Path
from ldm.io import lock
vars(lock).update({QUICK})
folder = Path(sys.argv[1]) / "run"
with lock.held(folder, "--run"):
    shutil.rmtree(folder)
    with lock.held(folder, "--run"):
        time.sleep(5 * lock.HEARTBEAT)
print("done")
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    for name, seconds in QUICK.items():
        monkeypatch.setattr(lock, name, seconds)


def test_it_is_gone_after_the_block_and_after_an_error(tmp_path):
    with pytest.raises(RuntimeError), held(tmp_path, "--run"):
        assert f"process {os.getpid()} on " in (tmp_path / lock.HOLDER).read_text()
        with held(tmp_path, "--run"):  # built twice in one process
            pass
        assert (tmp_path / lock.LOCK).exists()
        raise RuntimeError
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize("where", [None, "node7"])
def test_a_living_holder_is_named(tmp_path, capsys, where):
    with holder(tmp_path, where) as process:
        message = f"--run: '{tmp_path}' is in use by process {process.pid} on .* since 2"
        with pytest.raises(ValueError, match=message), held(tmp_path, "--run"):
            pass
        assert process.poll() is None and capsys.readouterr().err == ""


@pytest.mark.slow
def test_one_killed_on_this_node_is_replaced_at_once(tmp_path, capsys):
    with holder(tmp_path):
        pass
    begin = time.monotonic()
    with held(tmp_path, "--run"):
        assert time.monotonic() - begin < lock.LEASE / 2
    assert capsys.readouterr().err == ""


@pytest.mark.slow
def test_one_on_a_node_that_went_away_is_replaced_once_it_gives_no_sign_of_life(tmp_path, capsys):
    with holder(tmp_path, "node7") as process:
        pass
    begin = time.monotonic()
    with held(tmp_path, "--run"):
        assert time.monotonic() - begin > lock.LEASE / 2
    assert f"is in use by process {process.pid}" in (message := capsys.readouterr().err)
    assert message.endswith("without a sign of life: waiting 1 s for one\n")


@pytest.mark.slow
def test_one_that_was_frozen_and_replaced_ends(tmp_path):
    with holder(tmp_path, "node7") as process:
        process.send_signal(signal.SIGSTOP)
        with held(tmp_path, "--run"):
            process.send_signal(signal.SIGCONT)
            assert process.wait(20) == 1
            assert f"process {os.getpid()} on " in (tmp_path / lock.HOLDER).read_text()


@pytest.mark.slow
def test_a_folder_that_was_deleted_and_is_held_again_by_the_same_process_ends_nothing(tmp_path):
    ended = subprocess.run([sys.executable, "-c", TWICE, str(tmp_path)], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "done\n", "")


@pytest.mark.slow
def test_a_lock_that_was_deleted_is_taken_again(tmp_path):
    with holder(tmp_path) as process:
        (tmp_path / lock.LOCK).unlink()
        for _ in range(100):
            if (tmp_path / lock.LOCK).exists():
                break
            time.sleep(0.1)
        with pytest.raises(ValueError, match="is in use by"), held(tmp_path, "--run"):
            pass
        assert process.poll() is None
