"""SIGTERM and SIGUSR1: stopped between two steps, saved, exit code 75; the same command resumes exactly."""

import os
import signal
import subprocess
import sys

import pytest
from comparing import assert_same_run, state
from interruptions import signalled

from ldm import fit
from ldm.checkpointing.preemption import SIGNALS, Notice, Preemption, requeue


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "step", "where", "number", "stops_at"),
    [
        ("autoencoder", 0, "setup", signal.SIGTERM, None),
        ("autoencoder", 0, "setup", signal.SIGUSR1, None),
        ("autoencoder", 2, "backward", signal.SIGTERM, 3),
        ("autoencoder", 4, "validation", signal.SIGUSR1, 4),
        ("diffusion", 5, "backward", signal.SIGUSR1, 6),
    ],
)
def test_a_signal_stops_at_the_next_step_and_loses_nothing(
    chain, fresh, capsys, name, step, where, number, stops_at
):
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1)]
    assert fit.main(fresh.arguments(name, *signalled(step, where, number))) == 75
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1)] == before
    assert f"stopped at step {stops_at or 0} by {number.name}: the same command" in capsys.readouterr().out
    if stops_at is None:
        assert not (fresh.runs / name / "checkpoints").exists()
    else:
        assert state(fresh.runs / name)["global_step"] == stops_at
    assert fit.main(fresh.arguments(name)) == 0
    assert_same_run(fresh.runs / name, chain.runs / name)


def test_a_signal_after_the_last_step_leaves_a_finished_run(chain, fresh, capsys):
    assert fit.main(fresh.arguments("autoencoder", *signalled(8, "validation", signal.SIGTERM))) == 0
    assert_same_run(fresh.runs / "autoencoder", chain.runs / "autoencoder")
    assert fit.main(fresh.arguments("autoencoder")) == 0
    assert "finished, 8 of 8 steps are done" in capsys.readouterr().out


@pytest.mark.parametrize("step", [4, pytest.param(8, marks=pytest.mark.slow)])
def test_ctrl_c_in_a_validation_costs_no_step(chain, fresh, capsys, ctrl_c, step):
    assert fit.main(fresh.arguments("autoencoder", *signalled(step, "validation", signal.SIGINT))) == 130
    last = fresh.runs / "autoencoder" / "checkpoints" / "last.ckpt"
    assert capsys.readouterr().out.endswith(f"stopped in the validation at step {step}: saved {last}\n")
    assert fit.main(fresh.arguments("autoencoder")) == 0
    assert_same_run(fresh.runs / "autoencoder", chain.runs / "autoencoder")
    assert fit.main(fresh.arguments("autoencoder")) == 0
    assert "finished, 8 of 8 steps are done" in capsys.readouterr().out


def scontrol(folder, monkeypatch, code=0):
    """A stand-in for SLURM's scontrol that writes down its arguments."""
    program = folder / "scontrol"
    program.write_text(f'#!/bin/sh\necho "$@" >> "{folder}/asked"\necho no such job >&2\nexit {code}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    return folder / "asked"


def test_only_a_job_signalled_by_usr1_is_requeued(tmp_path, monkeypatch, capsys):
    requeue(signal.SIGUSR1)  # no job at all
    log = scontrol(tmp_path, monkeypatch)
    requeue(signal.SIGTERM)
    assert not log.exists()
    requeue(signal.SIGUSR1)
    assert log.read_text() == "requeue 17\n"
    assert capsys.readouterr().err == ""
    scontrol(tmp_path, monkeypatch, code=1)
    requeue(signal.SIGUSR1)
    assert "scontrol requeue 17 failed: no such job" in capsys.readouterr().err


def test_of_an_array_only_the_signalled_task_is_requeued(tmp_path, monkeypatch):
    log = scontrol(tmp_path, monkeypatch)
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "17")  # which is the number of its last task too
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    requeue(signal.SIGUSR1)
    assert log.read_text() == "requeue 17_3\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_that_was_held_back_is_heard_and_one_after_the_end_does_no_harm(number):
    held = signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    try:
        signal.raise_signal(number)
        notice = Notice()
        with notice.listening():
            assert notice.urgency == 1 + SIGNALS.index(number)
        assert number in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)


ENDED = """
import os, signal, threading, time
from ldm.checkpointing.preemption import Notice

signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
notice = Notice()
with notice.listening():
    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
os.kill(os.getpid(), signal.SIGUSR1)
"""


def test_a_signal_after_the_end_does_no_harm_to_a_process_with_threads():
    process = subprocess.run([sys.executable, "-c", ENDED], capture_output=True, text=True, timeout=60)
    assert (process.returncode, process.stderr) == (0, "")


def test_never_asking_is_refused():
    with pytest.raises(ValueError, match="every_n_steps: got 0, expected at least 1"):
        Preemption(0)
