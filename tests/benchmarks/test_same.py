"""A refactoring is proved by comparing everything: each kind of difference must be found and named."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.same import compare, steps

CSV = "step,train/loss,train/step_seconds,val/loss\n0,0.25,1.5,\n1,0.125,1.25,0.5\n"


def metrics(tmp_path, after):
    (tmp_path / "before.csv").write_text(CSV)
    (tmp_path / "after.csv").write_text(after)
    return compare.compare_metrics(tmp_path / "before.csv", tmp_path / "after.csv")


def checkpoint(**changes):
    weight = torch.tensor([1.0, float("nan"), -0.0])
    state = {"weight": weight, "moment": torch.ones(2), "raw": torch.arange(3.0), "callback": "EMA"} | changes
    return {
        "state_dict": {"net.weight": state["weight"]},
        "optimizer_states": [{"state": {0: {"exp_avg": state["moment"]}}, "param_groups": [{"lr": 0.1}]}],
        "callbacks": {state["callback"]: {"raw": {"net.weight": state["raw"]}}},
    }


def test_times_may_differ_and_columns_stand_in_another_order(tmp_path):
    other = "step,val/loss,train/loss,train/step_seconds\n0,,0.25,9\n1,0.5,0.125,8\n"
    assert metrics(tmp_path, other) == compare.Found("2 x 3", None)


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("0.125", "0.12500001", "row 2, column train/loss: '0.125' and '0.12500001'"),
        ("1,0.125,1.25,0.5\n", "", "2 and 1 rows"),
        ("val/loss", "val/lost", "column val/loss: only in BEFORE"),
        (",1.5,\n", ",1.5,0.5\n", "row 1, column val/loss: '' and '0.5'"),
    ],
)
def test_a_difference_of_metrics_is_named(tmp_path, old, new, named):
    assert old in CSV
    found = metrics(tmp_path, CSV.replace(old, new)).difference
    assert found is not None and "before.csv" in found and named in found


def test_a_file_without_rows_proves_nothing(tmp_path):
    for name in ("before.csv", "after.csv"):
        (tmp_path / name).write_text("step,train/loss\n")
    assert "no rows" in compare.compare_metrics(tmp_path / "before.csv", tmp_path / "after.csv").difference


def test_equal_weights_may_lie_under_other_names_of_callbacks():
    found = compare.compare_weights(checkpoint(), checkpoint(callback="ldm.callbacks.EMA"))
    assert found == compare.Found("1 by name, 1 of the optimizer, 1 others", None)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"weight": torch.tensor([1.0, float("nan"), 0.0])}, "net.weight, element 2 of 3: -0.0 and 0.0"),
        ({"weight": torch.tensor([1.0, 2.0, -0.0])}, "net.weight, element 1 of 3: nan and 2.0"),
        ({"weight": torch.zeros(2)}, "torch.float32 (3,) and torch.float32 (2,)"),
        (
            {"moment": torch.tensor([1.0, 1.0 + 2**-23])},
            "optimizer tensor 0, element 1 of 2: 1.0 and 1.00000",
        ),
        ({"raw": torch.arange(3.0) + 1}, "callbacks.EMA.raw.net.weight in BEFORE"),
        ({"raw": torch.arange(3)}, "callbacks.EMA.raw.net.weight in BEFORE"),
    ],
)
def test_a_difference_of_weights_is_named(changes, named):
    found = compare.compare_weights(checkpoint(), checkpoint(**changes)).difference
    assert found is not None and named in found


def test_checkpoints_are_found_and_read(tmp_path):
    for side, changes in (("before", {}), ("after", {"moment": torch.zeros(2)})):
        (tmp_path / side).mkdir()
        torch.save(checkpoint(**changes), tmp_path / side / "last.ckpt")
    found = compare.compare_checkpoints(tmp_path / "before", tmp_path / "after")
    assert "last.ckpt, optimizer tensor 0, element 0 of 2: 1.0 and 0.0" in found.difference
    (tmp_path / "after" / "last.ckpt").unlink()
    found = compare.compare_checkpoints(tmp_path / "before", tmp_path / "after")
    assert found.difference.endswith("last.ckpt: only in BEFORE")


def test_files_images_and_evaluations_are_compared(tmp_path):
    for side, value in (("before", 1), ("after", 2)):
        (tmp_path / side).mkdir()
        (tmp_path / side / "a.tar").write_bytes(bytes([0, value]))
        Image.fromarray(np.full((2, 2, 3), value, np.uint8)).save(tmp_path / side / "a.png")
        results = [{"values": [{"name": "fid", "value": value / 3}]}]
        (tmp_path / side / "e.json").write_text(json.dumps({"results": results}))
    one, other = tmp_path / "before", tmp_path / "after"
    assert "a.tar, byte 1" in compare.compare_files(one, other).difference
    assert "a.png, element 0 of 12: 1 and 2" in compare.compare_images(one, other).difference
    assert compare.compare_files(one, one).difference is compare.compare_images(one, one).difference is None
    found = compare.compare_evaluations(one / "e.json", other / "e.json").difference
    assert "row 1, column fid: '0.3333333333333333' and '0.6666666666666666'" in found


def test_the_plan_holds_what_is_needed_first_and_no_bases(tmp_path):
    for name in ("demo/autoencoder", "demo/_base", "demo/clip", "demo/digits", "conditions/layout"):
        (tmp_path / "configs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "configs" / f"{name}.yaml").touch()
    assert "demo/_base" not in steps.plan(tmp_path, [])
    assert steps.plan(tmp_path, ["digits"]) == ["shards/digits", "demo/digits"]
    order = steps.plan(tmp_path, ["conditions/layout"])
    assert order.index("demo/autoencoder") < order.index("shards/conditions-latents") < len(order) - 1
    with pytest.raises(ValueError, match="--only: got digit"):
        steps.plan(tmp_path, ["digit"])


def test_a_changed_file_is_another_state(tmp_path):
    (tmp_path / "ldm").mkdir()
    (tmp_path / "ldm" / "a.py").write_text("1")
    sides = [steps.Side(tmp_path, tmp_path / "work", {}, {}) for _ in range(2)]
    state = sides[0].state
    (tmp_path / "ldm" / "a.py").write_text("2")
    assert sides[1].state != state
