"""Other loggers of Lightning beside ours: the same names, and image grids."""

import csv
import io

import numpy as np
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_stage import TinyStage, loader, trainer

from ldm.callbacks.sample_grid import SampleGrid
from ldm.loggers.logged import PER_STEP, logged
from ldm.loggers.metrics_csv import MetricsCSV


def test_tensorboard_has_the_names_of_metrics_csv_and_the_grids(tmp_path):
    loggers = [MetricsCSV(str(tmp_path)), TensorBoardLogger(tmp_path, name="board")]
    run = trainer(tmp_path, callbacks=[SampleGrid(num=3)], logger=loggers, max_steps=4, log_every_n_steps=1)
    run.fit(TinyStage(), loader(100), loader(4))
    (folder,) = tmp_path.glob("board/*")
    board = EventAccumulator(str(folder), size_guidance={"images": 0}).Reload()
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    names = {name for name in rows[0] if name != "step"}
    assert names == set(board.Tags()["scalars"]) - {"epoch", "hp_metric"} and len(names) > 2
    losses = [(int(row["step"]), float(row["val/loss"])) for row in rows if row["val/loss"]]
    shown = [(event.step, event.value) for event in board.Scalars("val/loss")]
    assert np.allclose(losses, shown) and losses
    grids = [row for row in logged(tmp_path) if row.grid is not None]
    images = board.Images("images")
    assert [image.step for image in images] == [row.step for row in grids] == [3]
    for image, row in zip(images, grids, strict=True):
        theirs, ours = Image.open(io.BytesIO(image.encoded_image_string)), Image.open(row.grid.path)
        assert np.array_equal(np.asarray(theirs), np.asarray(ours))
        assert row.grid.caption == "caption 0\ncaption 1\ncaption 2"
    assert "images/captions/text_summary" in board.Tags()["tensors"]


def test_rows_of_a_step_are_training_then_grids_then_validation(tmp_path):
    run = trainer(
        tmp_path,
        callbacks=[SampleGrid(num=3)],
        logger=MetricsCSV(str(tmp_path)),
        max_steps=8,
        log_every_n_steps=1,
    )
    run.fit(TinyStage(), loader(100), loader(4))
    rows = logged(tmp_path)
    places = [row.position for row in rows]
    assert places == sorted(set(places))
    last = [row for row in rows if row.position // PER_STEP == 7]
    assert last[-2].grid is not None and last[-2].values == {"samples": 32}
    assert "val/loss" in last[-1].values
    assert [row.step for row in last] == [7] * len(last)
