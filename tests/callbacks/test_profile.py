"""A trace of the steps that were named, and of no others."""

import gzip
import json

import pytest
from tiny_stage import TinyStage, loader, trainer

from ldm.callbacks.profile import Profile


def test_the_trace_has_as_many_steps_as_wanted(tmp_path):
    trainer(tmp_path, callbacks=[Profile(2, skip=3)], max_steps=8).fit(TinyStage(), loader())
    with gzip.open(tmp_path / "profile-0.json.gz") as file:
        names = [event.get("name", "") for event in json.load(file)["traceEvents"]]
    assert sorted(name for name in names if name.startswith("ProfilerStep")) == [
        "ProfilerStep#4",
        "ProfilerStep#5",
    ]


@pytest.mark.parametrize(("steps", "found"), [(3, 0), (5, 1)])
def test_a_run_that_is_too_short_for_the_trace_says_so(tmp_path, steps, found):
    with pytest.warns(UserWarning, match=f"profile: the trace has {found} of 2 .* after {steps} batches"):
        trainer(tmp_path, callbacks=[Profile(2, skip=3)], max_steps=steps).fit(TinyStage(), loader())
    assert (tmp_path / "profile-0.json.gz").exists() == bool(found)


def test_no_steps_are_an_error():
    with pytest.raises(ValueError, match="profile: got -1, expected a positive number of steps"):
        Profile(-1)
