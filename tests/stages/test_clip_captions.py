"""CLIP on equal captions, on captions that are too long, and on one pair; data modules of one's own."""

import warnings

import lightning as L
import pytest
import torch
from tiny_stage import Points
from torch.utils.data import DataLoader

from ldm.nets.clip import CLIPModel
from ldm.optim.recipes import AdamW, LinearScaling
from ldm.rng import SampleNoise
from ldm.stages.clip import CLIP


def clip(optimizer=None):
    torch.manual_seed(0)
    vision = {"image_size": 8, "layers": 1, "width": 8, "head_width": 4, "patch_size": 4}
    text = {"context_length": 6, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1}
    return CLIP(CLIPModel(8, vision, text), optimizer or AdamW(warmup=1))


def batch(text):
    image = torch.rand(len(text), 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return {"key": [str(i) for i in range(len(text))], "image": image, "text": text}


class Captioned(Points):
    """Images whose captions a test names."""

    def __init__(self, captions):
        super().__init__(len(captions), size=8)
        self.captions = captions

    def __getitem__(self, i):
        return {**super().__getitem__(i), "text": self.captions[i]}


class Foreign(L.LightningDataModule):
    """A data module without a batch size."""

    def __init__(self, captions, size):
        super().__init__()
        self.loader = DataLoader(Captioned(captions), batch_size=size)

    def train_dataloader(self):
        return self.loader

    val_dataloader = train_dataloader


class Unsized(Foreign):
    """One whose loader forms no batches: what it yields are some."""

    def __init__(self, captions, size):
        super().__init__(captions, size)
        self.loader = DataLoader([batch(captions[:size])] * 2, batch_size=None)


def fit(folder, data, stage=None):
    trainer = L.Trainer(
        default_root_dir=folder, accelerator="cpu", devices=1, max_steps=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0, limit_train_batches=1, log_every_n_steps=1,
    )  # fmt: skip
    trainer.fit(stage or clip(), datamodule=data)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def test_an_equal_caption_is_as_right_as_the_own_one():
    stage, data = clip(), batch(["a cat", "a dog", "a cat", "a cat"])
    values = stage.losses(data, SampleNoise(0, data["key"]))
    per_image = stage.encode_image(data["image"]) @ stage.encode_text(data["text"]).T
    best = per_image.argmax(1).tolist()
    right = [data["text"][found] == own for own, found in zip(data["text"], best, strict=True)]
    assert values["accuracy"].item() == sum(right) / 4
    assert values["loss"].item() >= 3 / 4 * torch.tensor(3.0).log().item() * 0.99  # the least possible


def test_validation_counts_equal_captions_as_training_does(tmp_path):
    values = fit(tmp_path, Foreign(["a cat"] * 4, 4))
    assert values["val/accuracy"] == values["train/accuracy"] == 1.0
    assert values["val/pairs"] == 4


def test_truncated_captions_are_counted_and_reported_once(tmp_path):
    data = Foreign(["a cat", "one two three four five six seven", "a dog", "a bird"], 4)
    with pytest.warns(UserWarning, match=r"25% of the captions in the first batch are cut off") as warned:
        assert fit(tmp_path, data)["train/truncated_captions"] == 0.25
    assert len([one for one in warned if "cut off" in str(one.message)]) == 1
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*cut off.*")
        assert fit(tmp_path, Foreign(["a cat", "a dog"], 2))["train/truncated_captions"] == 0.0


def test_one_pair_is_nothing_to_contrast(tmp_path):
    with pytest.raises(ValueError, match=r"data\.batch_size: got 1 on one process, expected at least 2"):
        fit(tmp_path, Foreign(["a cat", "a dog"], 1))


def test_pairs_of_a_foreign_module_are_those_of_its_loader(tmp_path):
    stage = clip()
    fit(tmp_path, Foreign(["a cat", "a dog", "a bird", "a fish"], 2), stage)
    assert stage._pairs == 2


@pytest.mark.parametrize("recipe", [None, AdamW(scaling=LinearScaling(2))])
def test_an_unknown_batch_size_is_requested_by_its_key(tmp_path, recipe):
    with pytest.raises(ValueError, match=r"data: Unsized has no batch_size, expected an attribute"):
        fit(tmp_path, Unsized(["a cat", "a dog"], 2), clip(recipe))
