"""Reading of run folders."""

import pytest

from ldm.comparison.runs import differing, read_runs


def test_a_run_is_its_settings_curves_images_and_records(folders):
    record = {"samples": 128, "name": "val/fid/x", "value": 3.5, "num": 500, "weights": "ema"}
    folder = folders.make("a", [0.5, 0.25], record=record)
    (run,) = read_runs([str(folder)])
    assert run.name == "a"
    assert run.settings == {"model": "a.B", "model.lr": "0.001"}
    assert run.environment["git.revision"] == "a"
    assert run.curves["train/loss"] == [(64.0, 1.5), (128.0, 1.25)]
    assert run.curves["val/loss"] == [(64.0, 0.5), (128.0, 0.25)]
    assert {kind: sorted(grids) for kind, grids in run.images.items()} == {"diffusion": [64, 128]}
    assert run.last["val/loss"].value == 0.25 and run.last["val/loss"].record == {}
    assert run.last["val/fid/x"].value == 3.5
    assert run.last["val/fid/x"].record == {
        "samples": "128",
        "num": "500",
        "weights": "ema",
        "evaluation": "Evaluation",
    }


def test_image_grids_of_one_step_are_distinguished_by_their_content(folders):
    folder = folders.make("a", [0.5], seen=(64,)) / "images"
    for name in ("noise-levels-0000000064.png", "notes.png", "diffusion-0000000064.png.tmp-1"):
        (folder / name).write_bytes(b"")
    (run,) = read_runs([str(folder.parent)])
    assert {kind: list(grids) for kind, grids in run.images.items()} == {
        "diffusion": [64],
        "noise-levels": [64],
    }


def test_only_what_differs_is_kept():
    a, b = {"lr": "1", "seed": "0", "only": "x"}, {"lr": "2", "seed": "0"}
    assert differing([a, b]) == {"lr": ["1", "2"], "only": ["x", ""]}
    assert differing([a, a]) == {}


def test_names_are_as_short_as_unique_ones_can_be(folders):
    paths = [str(folders.make(name, [1.0])) for name in ("one/diffusion", "two/diffusion")]
    assert [run.name for run in read_runs(paths)] == ["one/diffusion", "two/diffusion"]
    assert [run.name for run in read_runs(paths[:1])] == ["diffusion"]


def test_a_run_still_training_or_cut_short_is_read(folders):
    folder = folders.make("a", [0.5], seen=())
    with (folder / "metrics.csv").open("a") as file:
        file.write("2,128,nan,inf,\n3,19")
    (run,) = read_runs([str(folder)])
    assert run.curves["val/loss"] == [(64.0, 0.5)]
    (folder / "metrics.csv").unlink()
    (run,) = read_runs([str(folder)])
    assert run.curves == {} and run.last == {}


def test_nested_lists_of_settings_are_distinguished(folders):
    callbacks = {
        "trainer": {"callbacks": [{"class_path": "x.A"}, {"class_path": "x.B", "init_args": {"n": 3}}]}
    }
    (run,) = read_runs([str(folders.make("a", [1.0], callbacks))])
    assert run.settings["trainer.callbacks.1.n"] == "3"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda folder: folder / "nowhere",
            "nowhere' is no run folder: expected config.yaml and metrics.csv",
        ),
        (
            lambda folder: (folder / "config.yaml").write_text("a: [") and folder,
            "config.yaml: cannot be read",
        ),
        (lambda folder: (folder / "evaluations.jsonl").write_text("{") and folder, "line 1 is not JSON"),
    ],
)
def test_folders_that_are_no_run_are_named(folders, spoil, message):
    folder = spoil(folders.make("a", [1.0])) or None
    path = folder if folder is not True and folder is not None else folders.root / "a"
    with pytest.raises(ValueError, match=message):
        read_runs([str(path)])


def test_the_same_run_twice_is_refused(folders):
    folder = str(folders.make("a", [1.0]))
    with pytest.raises(ValueError, match="twice"):
        read_runs([folder, folder])
