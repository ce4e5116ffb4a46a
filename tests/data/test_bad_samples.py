"""Samples that cannot be used are replaced, counted by reason and logged; a wrong configuration is not."""

from __future__ import annotations

import json
from collections import Counter

import lightning as L
import pytest
import torch
from tiny_shards import png, sample, write_shards, write_tar

from ldm.callbacks.bad_samples import BadSamples
from ldm.data import bad_samples
from ldm.data.bad_samples import BadSamplePolicy, Tally
from ldm.data.decode import Skipped
from ldm.data.module import Shards, Streaming
from ldm.stages.counted import Counted


class Labelled(Counted):
    """Reads labels of ten classes."""

    classes = {"label": 10}  # noqa: RUF012

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.labels, self.keys = [], []

    def reads(self, stored):
        return ("image", "label")

    def validate_batch(self, batch):
        assert batch["label"].max() < 10

    def training_step(self, batch, batch_idx):
        self.labels += batch["label"].tolist()
        return self.weight.sum()

    def validation_step(self, batch, batch_idx):
        self.keys += batch["key"]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Logged(L.Callback):
    """Keeps what was logged, validation by validation."""

    def __init__(self):
        self.values = []

    def on_validation_end(self, trainer, pl_module):
        values = trainer.callback_metrics.items()
        self.values.append({name: value.item() for name, value in values if "bad_samples" in name})


class Killed(L.Callback):
    """Saves before each validation, as a run does, and cuts the second one off."""

    def __init__(self, path):
        self.path = path

    def on_validation_start(self, trainer, pl_module):
        trainer.save_checkpoint(self.path)

    def on_validation_epoch_start(self, trainer, pl_module):
        if trainer.global_step == 8:
            raise RuntimeError("the machine went away")


def fit(folder, data, steps=8, others=(), **options):
    logged, model = Logged(), Labelled()
    trainer = L.Trainer(
        default_root_dir=folder, accelerator="cpu", devices=1, max_steps=steps, max_epochs=-1,
        val_check_interval=4, check_val_every_n_epoch=None, num_sanity_val_steps=0, logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        use_distributed_sampler=False, callbacks=[BadSamples(), logged, *others],
    )  # fmt: skip
    trainer.fit(model, datamodule=data, **options)
    return model, logged


def shards_with(folder, count, label_of, name="train-000000", **broken):
    files = []
    for number in range(count):
        members = dict(sample(number))
        members[f"{number:06d}.json"] = json.dumps({"label": label_of(number)}).encode()
        members[f"{number:06d}.png"] = broken.get(f"s{number}", png(number))
        files += members.items()
    return str(write_tar(folder / f"{name}.tar", files))


def trained(logged):
    """Bad samples that training replaced, in all that was logged."""
    counts = (values.items() for values in logged.values)
    return sum(n for items in counts for name, n in items if name.startswith("train/bad_samples/"))


@pytest.mark.filterwarnings("ignore")
def test_a_validation_that_is_cut_off_costs_no_count_of_training(tmp_path):
    """Found by kills: what was counted before it was in no checkpoint."""
    shards = shards_with(tmp_path, 16, lambda n: n % 10, s5=png(5)[:40])
    _, whole = fit(tmp_path, Shards(shards, shards, image_size=8, batch_size=4), 12)
    assert trained(whole) == 3
    data, killed = Shards(shards, shards, image_size=8, batch_size=4), Killed(tmp_path / "last.ckpt")
    with pytest.raises(RuntimeError, match="the machine went away"):
        fit(tmp_path, data, 12, [killed])
    data = Shards(shards, shards, image_size=8, batch_size=4)
    _, rest = fit(tmp_path, data, 12, ckpt_path=killed.path, weights_only=True)
    assert trained(rest) == 2  # of steps 5 to 8, and 9 to 12


def test_classes_that_the_model_lacks_are_bad_samples_of_training_and_validation(tmp_path):
    train = shards_with(tmp_path, 16, lambda n: 10 if n == 3 else n % 10, s5=png(5)[:45])
    val = shards_with(tmp_path, 12, lambda n: 99 if n == 7 else n % 10, "val")
    data = Shards(train, val, image_size=8, batch_size=4)
    with pytest.warns(UserWarning) as caught:
        model, logged = fit(tmp_path, data)
    messages = [str(warning.message) for warning in caught]
    what = "sample '000007', member 'json': class 99 is no class of the model, expected 0 to 9"
    assert sum(what in message for message in messages) == 1
    assert "2 bad validation samples were replaced (1 different ones): 2 unknown class" in messages
    assert len(model.labels) == 32 and max(model.labels) < 10
    assert model.keys == [f"{n:06d}" for n in range(12)] * 2
    assert [values["val/bad_samples/unknown_class"] for values in logged.values] == [1.0, 1.0]
    total = Counter()
    for values in logged.values:
        total.update({name: n for name, n in values.items() if name.startswith("train/")})
    assert set(total) == {"train/bad_samples/unknown_class", "train/bad_samples/unreadable_image"}
    assert sum(total.values()) == data.bad["training"].total >= 4
    (summary,) = (
        text for text in messages if f"{data.bad['training'].total} bad training samples were" in text
    )
    for name, count in total.items():
        assert f"{count:.0f} {name.rpartition('/')[2].replace('_', ' ')}" in summary


def test_streaming_leaves_out_classes_that_the_model_lacks(tmp_path):
    train = shards_with(tmp_path, 16, lambda n: 10 if n == 3 else n % 10)
    data = Shards(train, write_shards(tmp_path, [4], "val"), image_size=8, batch_size=4, reader=Streaming(1))
    with pytest.warns(UserWarning, match=r"sample '000003', member 'json': class 10 is no class"):
        model, _ = fit(tmp_path, data)
    assert max(model.labels) < 10


def test_many_classes_that_the_model_lacks_are_a_mistake_of_the_configuration(tmp_path):
    train = shards_with(tmp_path, 40, lambda n: n % 10 + 1)
    data = Shards(train, write_shards(tmp_path, [4], "val"), image_size=8, batch_size=4)
    with pytest.raises(ValueError, match=r"data.train: 4 of the first 40 samples .*class 10 is no class"):
        fit(tmp_path, data)


def test_the_first_bad_sample_is_an_error_where_the_policy_says_so(tmp_path):
    train = shards_with(tmp_path, 16, lambda n: n % 10, s5=png(5)[:45])
    val = shards_with(tmp_path, 12, lambda n: n % 10, "val")
    broken = shards_with(tmp_path, 12, lambda n: 99 if n == 7 else n % 10, "broken")
    strict = BadSamplePolicy("error")
    for shards, message in (
        ((train, val), r"data.bad_samples.action is error: .*sample '000005', member 'png'"),
        ((val, broken), r"data.bad_samples.action is error: .*sample '000007', member 'json': class 99"),
    ):
        data = Shards(*shards, image_size=8, batch_size=4, bad_samples=strict)
        with pytest.warns(UserWarning), pytest.raises(ValueError, match=message):
            fit(tmp_path, data)
    fit(tmp_path, Shards(val, val, image_size=8, batch_size=4, bad_samples=strict))


def test_what_the_search_finds_is_printed_listed_and_logged_and_ends_a_strict_run(tmp_path, capsys):
    train = shards_with(tmp_path, 16, lambda n: n % 10, s5=b"<html>", s9=b"")
    val = shards_with(tmp_path, 12, lambda n: n % 10, "val", s3=b"<html>")
    with pytest.warns(UserWarning):
        _, logged = fit(tmp_path, Shards(train, val, image_size=8, batch_size=4))
    name = "bad_samples_found/unreadable_image"
    for values in logged.values:  # in each validation: a resumed run logs what an uninterrupted one does
        found = {n: v for n, v in values.items() if name in n}
        assert found == {f"train/{name}": 2.0, f"val/{name}": 1.0}
    line = (
        "data.bad_samples: 2 of 16 training samples are bad: 2 unreadable image, e.g. '000005', '000009'; "
        "1 of 12 validation samples are bad: 1 unreadable image, e.g. '000003'; all are listed in "
        f"{tmp_path}/bad-samples.txt"
    )
    assert line in capsys.readouterr().out.splitlines()
    listed = (tmp_path / "bad-samples.txt").read_text().splitlines()
    assert [each.split("\t")[:2] for each in listed] == [
        ["training", "unreadable image"],
        ["training", "unreadable image"],
        ["validation", "unreadable image"],
    ]
    assert listed[2].endswith("sample '000003', member 'png': its 6 bytes are no JPEG, PNG or WebP image")
    strict = Shards(train, val, image_size=8, batch_size=4, bad_samples=BadSamplePolicy("error"))
    with pytest.raises(
        ValueError, match=r"action is error: 2 bad samples, .*first step: 3, all in .*bad-samp"
    ):
        fit(tmp_path, strict)


def test_a_share_counts_once_enough_was_read():
    tally = Tally(BadSamplePolicy(max_share=0.02), "--bad-samples")
    for _ in range(9):
        tally.count(100, ["x"] * 5)
    with pytest.raises(ValueError, match=r"--bad-samples.max_share: 50 of 1000 samples are bad, .* 0.02 of"):
        tally.count(100, ["x"] * 5)
    tally = Tally(BadSamplePolicy(max_share=0.05), "--bad-samples")
    for _ in range(20):
        tally.count(100, ["x"] * 5)
    with pytest.raises(ValueError, match=r"bad_samples.max_share: got 2, expected a share, 0 to 1"):
        BadSamplePolicy(max_share=2)


def test_only_the_first_bad_samples_are_named_and_all_are_counted(monkeypatch):
    monkeypatch.setattr(bad_samples, "NAMED", 2)
    met = bad_samples.BadSamples("training", BadSamplePolicy(max_share=1.0))
    with pytest.warns() as told:
        met.note(1, [Skipped("text", "a"), Skipped("image", "b"), Skipped("text", "a"), Skipped("text", "c")])
        met.note(1, [Skipped("image", "d")])
        met.summarize()
    assert [str(warning.message) for warning in told] == [
        "bad training sample replaced: a",
        "bad training sample replaced: b",
        "further bad training samples are counted, not named",
        "5 bad training samples were replaced (at least 2 different ones): 3 text, 2 image",
    ]
    assert met.take() == {"text": 3, "image": 2}
