"""The rank blamed for a hang; a watchdog ends hung runs only."""

import threading
import time

import pytest
import torch.distributed as dist
from tiny_stage import TinyStage, loader, trainer

from ldm.callbacks.heartbeat import EXIT_CODE, Heartbeat, HeartbeatMonitor, HeartbeatStore, Verdict, blame
from ldm.callbacks.watchdog import Watchdog


def beats(*signs, tick=1, **phases):
    return {
        r: Heartbeat(f"node{r}", tick, s, phases.get(f"of{r}", "in batch 1")) for r, s in enumerate(signs)
    }


def test_a_process_without_a_new_heartbeat_is_blamed_before_one_that_is_behind():
    before, after = beats(7, 5, 7), beats(7, 5, 7, tick=4)
    after[2] = before[2]
    ranks, reason = blame(before, after, 3)
    assert ranks == [2]
    assert reason == "process 2 (node2) cannot be heard: killed, stopped, or cut off"


def test_a_process_without_any_heartbeat_is_blamed():
    ranks, reason = blame(beats(7), beats(7, tick=4), 2)
    assert ranks == [1]
    assert "process 1 cannot be heard" in reason


def test_the_rank_with_the_least_progress_is_blamed_with_its_phase():
    ranks, reason = blame(beats(7, 5, 7), beats(7, 5, 7, tick=4, of1="in batch 3, step 2"), 3)
    assert ranks == [1]
    assert reason == "process 1 (node1) stands in batch 3, step 2, and the others wait for it"


def test_no_rank_is_blamed_if_all_hang_at_the_same_point():
    assert blame(beats(7, 7), beats(7, 7, tick=4), 2) == ([], "all processes stand in batch 1")


def test_many_are_counted():
    ranks, reason = blame(
        beats(*[1] * 20), {**beats(*[1] * 20), 0: Heartbeat("node0", 2, 1, "in batch 1")}, 20
    )
    assert ranks == list(range(1, 20))
    assert "process 8 (node8) and 11 more cannot be heard" in reason


def test_processes_hear_each_other_over_the_store():
    store = dist.HashStore()
    first, second = HeartbeatStore(0, 3, store), HeartbeatStore(1, 3, store)
    output = Heartbeat("node1", 2, 3, "in batch 4")
    second.report(output)
    assert first.everyones() == {1: output}
    assert second.verdict() is None
    first.publish(Verdict([1], "it sleeps"))
    assert second.verdict() == Verdict([1], "it sleeps")


@pytest.mark.slow
def test_a_watchdog_ends_a_hung_run_and_reports_where(capsys):
    ended = threading.Event()
    codes = []
    watch = HeartbeatMonitor(
        2.0, HeartbeatStore(0, 1, dist.HashStore()), lambda code: (codes.append(code), ended.set())
    )
    watch.start()
    for batch in range(12):  # longer than the timeout, but moving, on a busy machine too
        watch.sign(f"in batch {batch}")
        time.sleep(0.25)
    assert not codes
    assert ended.wait(60)
    watch.stop()
    assert codes == [EXIT_CODE]
    output = capsys.readouterr().err
    assert "(--watchdog.timeout 2): it stands in batch 11" in output
    assert "assert ended.wait(60)" in output  # where the main thread was


class Deaf(dist.Store):
    """A store that never answers, like that of a host whose cable is cut."""

    def set(self, key, value):
        time.sleep(1000)


def test_a_process_ends_though_the_store_does_not_answer(capsys):
    ended = threading.Event()
    watch = HeartbeatMonitor(0.2, HeartbeatStore(1, 2, Deaf()), lambda code: ended.set())
    watch.start()
    assert ended.wait(60)
    watch.stop()
    assert "process 0 cannot be heard: killed, stopped, or cut off from this one" in capsys.readouterr().err


def test_a_stopped_watch_ends_nothing():
    codes = []
    watch = HeartbeatMonitor(0.2, HeartbeatStore(0, 1, dist.HashStore()), codes.append)
    watch.start()
    watch.stop()
    time.sleep(1)
    assert not codes


@pytest.mark.parametrize("fails", [False, True])
def test_no_watch_outlives_training(tmp_path, fails):
    class Stage(TinyStage):
        def training_step(self, batch, batch_idx):
            if fails:
                raise RuntimeError("ill")
            return super().training_step(batch, batch_idx)

    watchdog = Watchdog(60.0)
    run = trainer(tmp_path, callbacks=[watchdog], max_steps=2)
    try:
        run.fit(Stage(), loader(4))
    except RuntimeError as error:
        assert fails and str(error) == "ill"
    assert watchdog._watch is None


def test_a_timeout_of_zero_is_refused_and_null_disables():
    with pytest.raises(ValueError, match=r"watchdog.timeout: got 0 s, expected a positive number, or null"):
        Watchdog(0.0)
    Watchdog(None)
