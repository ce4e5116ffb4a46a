"""Retrieval and zero-shot accuracy of a CLIP in training, against counts made one by one."""

import json

import jsonargparse
import numpy as np
import pytest
import torch
from tiny_stage import Points, TinyStage, loader, trainer
from torch import nn
from torch.utils.data import DataLoader

from ldm.callbacks.ema import EMA
from ldm.callbacks.retrieval import ValidationRetrieval
from ldm.loggers.metrics_csv import MetricsCSV

CLASSES, TEMPLATES = ["red", "green", "blue"], ["a {} thing", "the {} one"]


def vector(text):
    return np.random.default_rng(list(text.encode())).normal(size=3)


class Labelled(Points):
    def __getitem__(self, i):
        return super().__getitem__(i) | {"label": i % 3}


class Tower(TinyStage):
    """Embeds an image as three of its pixels, scaled by training, and a caption as random numbers."""

    def __init__(self):
        super().__init__()
        self.net = nn.Identity()
        self.net.image_size = 4

    def image_features(self, image):
        return image.flatten(1)[:, :3] * self.scale + self.shift

    def encode_text(self, text):
        return torch.nn.functional.normalize(torch.tensor(np.stack([vector(t) for t in text])).float(), dim=1)


def fit(folder, *callbacks, stage=None, pairs=None, **changes):
    torch.manual_seed(0)
    stage = stage or Tower()
    run = trainer(folder, callbacks=list(callbacks), logger=MetricsCSV(str(folder)), **changes)
    run.fit(stage, loader(1000), DataLoader(pairs or Labelled(12), batch_size=5))
    return {k: v.item() for k, v in run.callback_metrics.items() if k.startswith("val/")}, stage


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def counted(stage, num, k):
    """Recall among the first ``num`` pairs, by the definition."""
    pairs = Labelled(12)
    with torch.no_grad():
        image = unit(stage.image_features(pairs.image[:num]).double().numpy())
    text = unit(np.stack([vector(f"caption {i}") for i in range(num)]))
    heads = unit(np.stack([unit(sum(unit(vector(t.format(c))) for t in TEMPLATES)) for c in CLASSES]))
    among = lambda scores, i: (scores > scores[i]).sum() < k  # noqa: E731
    return {
        f"val/image_to_text@{k}/clip": np.mean([among(text @ image[i], i) for i in range(num)]),
        f"val/text_to_image@{k}/clip": np.mean([among(image @ text[i], i) for i in range(num)]),
        f"val/zero_shot@{k}": np.mean([among(heads @ image[i], i % 3) for i in range(num)]),
    }


@pytest.mark.parametrize("num", [7, 12])
def test_recall_is_over_all_pairs_and_not_within_batches(tmp_path, num):
    ema = EMA(0.9)
    matching = ValidationRetrieval(num, (1, 2), CLASSES, TEMPLATES, zero_shot_at=(1, 2))
    values, stage = fit(tmp_path, matching, ema, max_steps=4)
    with ema.swapped(stage):  # measured are the averages
        expected = counted(stage, num, 1) | counted(stage, num, 2)
    found = {name: value for name, value in values.items() if "@" in name}
    assert found == pytest.approx(expected, abs=1e-6)
    assert 0 < found["val/zero_shot@1"] < 1 and 0 < found["val/image_to_text@2/clip"] < 1


def test_every_value_has_metadata(tmp_path):
    fit(
        tmp_path,
        ValidationRetrieval(12, (1,), CLASSES, TEMPLATES, (1,)),
        EMA(0.9),
        max_steps=4,
        precision="bf16-mixed",
    )
    lines = [json.loads(line) for line in (tmp_path / "evaluations.jsonl").read_text().splitlines()]
    records = {line["name"]: line for line in lines}
    assert records.keys() == {"val/image_to_text@1/clip", "val/text_to_image@1/clip", "val/zero_shot@1"}
    for line in records.values():
        assert (line["samples"], line["weights"], line["num"]) == (16, "ema", 12)
        assert line["precision"] == "32-true" and "seed" not in line and line["resize"].endswith("to 4")
    assert (records["val/zero_shot@1"]["num_classes"], records["val/zero_shot@1"]["num_templates"]) == (3, 2)


def test_classes_without_labels_are_one_line_and_retrieval_goes_on(tmp_path):
    matching = ValidationRetrieval(12, (1,), CLASSES)
    with pytest.warns(UserWarning, match="the samples have no label, expected one of 3 classes"):
        values, _ = fit(tmp_path, matching, pairs=Points(12), max_steps=4)
    assert "val/image_to_text@1/clip" in values and "val/zero_shot@1" not in values


def test_other_stages_are_left_alone(tmp_path):
    values, _ = fit(tmp_path, ValidationRetrieval(12, (1,), CLASSES), stage=TinyStage(), max_steps=4)
    assert values.keys() == {"val/loss"}


def test_training_and_the_device_of_the_stage_stay_as_they_are(tmp_path):
    _, alone = fit(tmp_path / "alone")
    _, measured = fit(tmp_path / "measured", ValidationRetrieval(12, (1,), CLASSES))
    assert measured.training and measured.net.training
    for name, weight in alone.state_dict().items():
        assert torch.equal(measured.state_dict()[name], weight), name


def test_a_config_lists_classes_or_names_files(tmp_path):
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--callback", type=ValidationRetrieval)
    (tmp_path / "classes.txt").write_text("red\n green\n\nblue\n")
    (tmp_path / "templates.txt").write_text("\n".join(TEMPLATES))

    def built(**arguments):
        path = "ldm.callbacks.retrieval.ValidationRetrieval"
        wanted = {"class_path": path, "init_args": {"num_samples": 8, **arguments}}
        return parser.instantiate(parser.parse_object({"callback": wanted})).callback.metrics[-1]

    listed = built(classes=CLASSES, templates=TEMPLATES)
    read = built(classes=str(tmp_path / "classes.txt"), templates=str(tmp_path / "templates.txt"))
    assert listed.classes == read.classes == CLASSES and listed.templates == read.templates == TEMPLATES
    with pytest.raises(FileNotFoundError, match=r"classes: the file 'nowhere.txt' does not exist"):
        ValidationRetrieval(8, classes="nowhere.txt")
    with pytest.raises(ValueError, match="templates: got 'a thing', expected captions with"):
        ValidationRetrieval(8, classes=CLASSES, templates=["a thing"])
