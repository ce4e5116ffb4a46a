"""``--weights`` that are not used, or missing, are said; config.yaml has those that the run began with."""

from pathlib import Path

import pytest
from jsonargparse import Namespace

from ldm.runs.weights import frozen_at_random, keep_weights


def config(run, given, ckpt_path="last"):
    return Namespace(run=str(run), weights=given, ckpt_path=ckpt_path)


def begun(run, text):
    run.mkdir()
    (run / "config.yaml").write_text(text)
    return run


@pytest.mark.parametrize(
    ("text", "began_with"), [("weights: a\n", "a"), ("weights: null\n", None), ("", None)]
)
def test_a_resumed_run_keeps_what_it_began_with(tmp_path, text, began_with):
    run = begun(tmp_path / "run", text)
    for given in (None, began_with, "b"):
        found = config(run, given)
        warning = keep_weights(found, run / "checkpoints" / "last.ckpt")
        assert found.weights == began_with
        expected = f"--weights b is not used: '{run}' already has a checkpoint: give another --run"
        assert warning == (expected if given == "b" else None)
        assert keep_weights(found, run / "checkpoints" / "last.ckpt") is None


def test_a_fresh_run_takes_the_given_weights(tmp_path):
    found = config(begun(tmp_path / "run", "weights: a\n"), "b")  # stopped before its first checkpoint
    assert keep_weights(found, None) is None and found.weights == "b"


def test_a_checkpoint_of_another_run_is_named_as_the_reason(tmp_path):
    found = config(tmp_path / "new", "b", "other.ckpt")
    warning = keep_weights(found, Path("other.ckpt"))
    assert warning == "--weights b is not used: --ckpt_path has all weights: leave out one of the two"
    assert found.weights is None


@pytest.mark.parametrize(
    ("frozen", "given", "is_warned"),
    [(["encoder"], None, True), (["encoder"], "a", False), ([], None, False), (None, None, False)],
)
def test_frozen_weights_that_were_never_trained_are_a_warning(frozen, given, is_warned):
    found = Namespace(weights=given)
    if frozen is not None:
        found["model.init_args.frozen"] = frozen
    warning = frozen_at_random(found)
    assert (warning or "").startswith("model.frozen: [encoder] without --weights") == is_warned
