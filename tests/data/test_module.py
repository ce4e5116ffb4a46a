"""The data module under the real Trainer: the order, and exact resume."""

from __future__ import annotations

import warnings
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny_shards import png, sample, write_tar

from ldm.data.module import Indexed, Shards, Streaming
from ldm.data.source import DataRank
from ldm.stages.counted import Counted

COUNTS = [7, 5, 9, 4, 6]
TOTAL = sum(COUNTS)


class Recorder(Counted):
    """Notes what it is given."""

    def __init__(self, fail_at: int | None = None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.fail_at = fail_at
        self.train_keys: list[list[str]] = []
        self.train_texts: list[list[str]] = []
        self.val_keys: list[str] = []

    def training_step(self, batch, batch_idx):
        if self.fail_at is not None and len(self.train_keys) == self.fail_at:
            raise RuntimeError("stop here")
        self.train_keys.append(batch["key"])
        self.train_texts.append(batch.get("text", []))
        return self.weight.sum()

    def validation_step(self, batch, batch_idx):
        self.val_keys += batch["key"]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(folder: Path, max_steps: int, callbacks=(), **more) -> L.Trainer:
    return L.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        devices=more.pop("devices", 1),
        max_steps=max_steps,
        max_epochs=-1,
        val_check_interval=more.pop("val_check_interval", 4),
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=bool(callbacks),
        callbacks=list(callbacks),
        **more,
    )


@pytest.fixture
def data(shards):
    val = shards([6, 5], "val", 900)

    def make(batch_size=4, workers=0, **more):
        train = more.pop("train", None) or shards(COUNTS)
        return Shards(train, val, image_size=8, batch_size=batch_size, num_workers=workers, **more)

    return make


@pytest.fixture(autouse=True)
def seed():
    L.seed_everything(7, verbose=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*(workers|log|isinstance|tree|sequence|pytree|GPU|checkpoint).*")
        yield


def run(module: Shards, folder: Path, max_steps: int, ckpt=None, callbacks=(), fail_at=None, **more):
    model = Recorder(fail_at)
    fit = trainer(folder, max_steps, callbacks, **more)
    if fail_at is None:
        fit.fit(model, datamodule=module, ckpt_path=ckpt)
    else:
        with pytest.raises(RuntimeError, match="stop here"):
            fit.fit(model, datamodule=module, ckpt_path=ckpt)
    return model, fit


def flat(batches: list[list[str]]) -> list[str]:
    return [key for batch in batches for key in batch]


def test_an_epoch_holds_every_sample_once_and_the_next_one_in_another_order(data, tmp_path):
    model, _ = run(data(batch_size=1), tmp_path, 2 * TOTAL)
    keys = flat(model.train_keys)
    everything = {f"{n:06d}" for n in range(TOTAL)}
    assert set(keys[:TOTAL]) == set(keys[TOTAL:]) == everything
    assert keys[:TOTAL] != keys[TOTAL:]
    assert model.val_keys[:11] == [f"{n:06d}" for n in range(900, 911)]


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("cut", [3, 4, 9])  # in an epoch, at a validation, in the second epoch
def test_resumed_equals_uninterrupted(data, tmp_path, workers, cut):
    uninterrupted, _ = run(data(workers=workers), tmp_path, 14)
    first, fit = run(data(workers=workers), tmp_path, cut)
    fit.save_checkpoint(tmp_path / "cut.ckpt")
    rest, _ = run(data(workers=workers), tmp_path, 14, ckpt=tmp_path / "cut.ckpt")
    assert first.train_keys + rest.train_keys == uninterrupted.train_keys
    assert first.train_texts + rest.train_texts == uninterrupted.train_texts


@pytest.mark.parametrize("every", [1, 3])
def test_checkpoints_of_the_callback_resume_exactly_with_accumulation(data, tmp_path, every):
    """Two batches a step: checkpoints are written inside on_train_batch_end."""
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=every, save_top_k=-1)
    uninterrupted, _ = run(
        data(), tmp_path, 6, callbacks=[keep], accumulate_grad_batches=2, val_check_interval=5
    )
    checkpoint = tmp_path / "step=3.ckpt"
    assert torch.load(checkpoint, weights_only=True)["progress"] == {"steps": 3, "samples": 3 * 2 * 4}
    rest, _ = run(data(), tmp_path, 6, ckpt=checkpoint, accumulate_grad_batches=2, val_check_interval=5)
    assert rest.train_keys == uninterrupted.train_keys[6:]


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_checkpoints_written_at_a_validation_and_at_an_exception_resume_exactly(data, tmp_path, workers):
    after = ModelCheckpoint(tmp_path, filename="val-{step}", save_top_k=-1, every_n_epochs=1)
    broken = ModelCheckpoint(tmp_path, filename="x-{step}", save_on_exception=True, every_n_train_steps=99)
    uninterrupted, _ = run(data(workers=workers), tmp_path, 12)
    run(data(workers=workers), tmp_path, 12, callbacks=[after, broken], fail_at=6)
    for step in ("val-step=4", "x-step=6"):
        (checkpoint,) = tmp_path.glob(f"{step}*.ckpt")
        at = int(step[-1])
        rest, _ = run(data(workers=workers), tmp_path, 12, ckpt=checkpoint)
        assert rest.train_keys == uninterrupted.train_keys[at:], step


def test_epochs_limited_by_the_trainer_continue_and_do_not_repeat(data, tmp_path):
    uninterrupted, _ = run(data(), tmp_path, 9)
    model, _ = run(data(), tmp_path, 9, limit_train_batches=3, val_check_interval=2)
    assert model.train_keys == uninterrupted.train_keys


def test_overfit_batches_repeats_the_same_batches(data, tmp_path):
    model, _ = run(data(), tmp_path, 6, overfit_batches=2, val_check_interval=6)
    assert model.train_keys == model.train_keys[:2] * 3
    assert len(set(flat(model.train_keys))) == 8


def test_another_batch_size_and_number_of_workers_continue_the_same_order(data, tmp_path):
    uninterrupted, _ = run(data(batch_size=1), tmp_path, 40)
    _, fit = run(data(batch_size=4), tmp_path, 5)
    fit.save_checkpoint(tmp_path / "cut.ckpt")
    second, fit = run(data(batch_size=5, workers=2), tmp_path, 7, ckpt=tmp_path / "cut.ckpt")
    fit.save_checkpoint(tmp_path / "again.ckpt")
    third, _ = run(data(batch_size=2), tmp_path, 12, ckpt=tmp_path / "again.ckpt")
    keys = flat(uninterrupted.train_keys)
    assert flat(second.train_keys) == keys[20:30]
    assert flat(third.train_keys) == keys[30:40]


def test_the_order_is_the_same_at_any_number_of_processes(data):
    """A global batch of 12 samples, read by 1, 2 and 3 processes with and without workers."""
    module = data()
    expected = None
    for world, workers in [(1, 0), (2, 0), (3, 0), (1, 2), (2, 2), (3, 2)]:
        ranks = []
        for rank in range(world):
            loader = module.source.loader(lambda: 24, 12 // world, workers, DataRank(rank, world))
            ranks.append([b["key"] for b, _ in zip(loader, range(5), strict=False)])
        batches = [[ranks[i % world][step][i // world] for i in range(12)] for step in range(5)]
        expected = expected or batches
        assert batches == expected


def test_changed_data_seed_or_grouping_is_refused(data, shards, tmp_path):
    _, fit = run(data(), tmp_path, 2)
    state = fit.datamodule.state_dict()
    with pytest.raises(ValueError, match=r"reader.*group_shards=8.*group_shards=2"):
        run_setup(data(reader=Indexed(group_shards=2))).load_state_dict(state)
    L.seed_everything(8, verbose=False)
    with pytest.raises(ValueError, match=r"seed_everything: .* seed 7, found 8"):
        run_setup(data()).load_state_dict(state)
    L.seed_everything(7, verbose=False)
    shards([8, 4, 9, 4, 6])
    with pytest.raises(ValueError, match=r"data.train: .* fingerprint"):
        run_setup(data(train=str(tmp_path / "shards/train-{000000..000004}.tar"))).load_state_dict(state)
    with pytest.raises(ValueError, match="shards 5, found 4"):
        run_setup(data(train=str(tmp_path / "shards/train-00000[0-3].tar"))).load_state_dict(state)


def run_setup(module: Shards) -> Shards:
    _ = module.source
    return module


def test_images_are_floats_in_minus_one_to_one_after_the_transfer(data):
    module = data()
    batch = next(iter(module.val_dataloader()))
    assert batch["image"].dtype == torch.uint8
    moved = module.on_after_batch_transfer(module.on_before_batch_transfer(dict(batch), 0), 0)
    values = torch.tensor([n % 256 for n in range(900, 904)])
    assert torch.equal(moved["image"][:, 0, 0, 0], values / 127.5 - 1)
    white, black = torch.tensor(255) / 127.5 - 1, torch.tensor(0) / 127.5 - 1
    assert (white, black) == (1, -1)


def test_training_draws_captions_and_validation_takes_the_text(data, tmp_path):
    model, fit = run(data(), tmp_path, 14)
    texts = flat(model.train_texts)
    assert {text[-1] for text in texts} == set("abc")
    assert all(
        text.startswith(f"n{int(key)} ") for key, text in zip(flat(model.train_keys), texts, strict=True)
    )
    batch = next(iter(fit.datamodule.val_dataloader()))
    assert batch["text"][0] == "number 900"
    assert batch["label"].tolist() == [0, 1, 2, 3]


def test_a_bad_sample_shifts_nothing_and_is_reported_once(data, shards, tmp_path):
    good, _ = run(data(), tmp_path, 16)
    files = [file for number in range(7) for file in sample(number)]
    files[3 * 3] = ("000003.png", png(3)[:40])
    write_tar(tmp_path / "shards/train-000000.tar", files)
    with pytest.warns(UserWarning, match=r"train-000000.tar: sample '000003', member 'png'") as caught:
        bad, fit = run(data(train=str(tmp_path / "shards/train-{000000..000004}.tar")), tmp_path, 16)
    reports = [w for w in caught if "bad training sample replaced" in str(w.message)]
    keys, expected = flat(bad.train_keys), flat(good.train_keys)
    moved = [i for i, (a, b) in enumerate(zip(keys, expected, strict=True)) if a != b]
    assert [expected[i] for i in moved] == ["000003"] * len(moved)
    assert [keys[i] for i in moved if i + 1 < len(keys)] == [
        expected[i + 1] for i in moved if i + 1 < len(keys)
    ]
    assert len(reports) == 1
    assert fit.datamodule.bad["training"].total == len(moved) >= 2


class Captioned(Recorder):
    """Says what it reads, and which labels it knows."""

    def reads(self, stored):
        return ("image", "text")

    def validate_batch(self, batch):
        if "label" in batch and batch["label"].max() > 9:
            raise ValueError(f"label {batch['label'].max()}")


def val_of(tmp_path, number: int, **members: bytes) -> str:
    """Write validation shards of 2 and 11 samples, ``number`` with other members; None drops one."""
    write_tar(tmp_path / "v-0.tar", [*sample(0), *sample(1)])
    found = {name: body for n in range(2, 13) for name, body in sample(n)[:2]}
    found |= {f"{number:06d}.{kind}": body for kind, body in members.items()}
    write_tar(tmp_path / "v-1.tar", sorted(found.items()))
    return str(tmp_path / "v-*.tar")


@pytest.mark.parametrize("bad", [{"png": png(5)[:40]}, {"txt": b""}, {"txt": b"caf\xe9"}])
def test_a_bad_validation_sample_does_not_end_a_run(shards, tmp_path, bad):
    data = Shards(shards(COUNTS), val_of(tmp_path, 5, **bad), image_size=8, batch_size=4)
    model = Captioned()
    with pytest.warns(
        UserWarning, match=r"bad validation sample replaced: .*v-1.tar: sample '000005'"
    ) as caught:
        trainer(tmp_path, 8).fit(model, datamodule=data)
    assert model.val_keys == [f"{n:06d}" for n in range(13)] * 2
    messages = [str(warning.message) for warning in caught]
    assert sum("sample replaced" in message for message in messages) == 1
    assert any("2 bad validation samples were replaced (1 different ones): 2 " in text for text in messages)
    assert data.bad["training"].total == 0


def test_validation_is_checked_before_the_first_step(shards, tmp_path):
    val = val_of(tmp_path, 2, json=b'{"label": 12}')
    files = [file for n in range(2, 13) for file in sample(n)]
    cases = {
        r"data.val: asks for \['text'\], but .*v-1.tar has 11 samples .*the first is '000002'": files[::3],
        r"data.val: image and text are read, but 11 samples in a row .*v-1.tar: sample '000012', member": [
            (name, b" " if name.endswith("txt") else body) for name, body in files if "json" not in name
        ],
        "label 12": [(name, b'{"label": 12}' if "json" in name else body) for name, body in files],
    }
    for message, content in cases.items():
        write_tar(tmp_path / "v-1.tar", content)
        model = Captioned()
        with pytest.raises(ValueError, match=message):
            trainer(tmp_path, 8).fit(
                model, datamodule=Shards(shards(COUNTS), val, image_size=8, batch_size=4)
            )
        assert model.train_keys == []


def test_a_batch_larger_than_the_data_is_refused(data, tmp_path):
    with pytest.raises(
        ValueError, match=f"data.batch_size: 32 is more than the {TOTAL} samples of data.train"
    ):
        run(data(batch_size=32), tmp_path, 1)


def test_counts_and_bad_arguments(data):
    module = data()
    assert (module.num_train, module.num_val) == (TOTAL, 11)
    with pytest.raises(ValueError, match=r"data.fields: got \['imge'\]"):
        data(fields=["imge"])
    with pytest.raises(ValueError, match=r"data.num_workers: got -1, expected at least 0"):
        data(workers=-1)


def test_fields_that_shards_lack_are_named(data):
    with pytest.raises(
        ValueError, match=r"data.fields: asks for \['latent'\], .*train-000000.tar has 7 samples"
    ):
        _ = data(fields=["image", "latent"]).source
    with pytest.raises(ValueError, match=r"data.fields: asks for \['image', 'latent'\], but .*'latent.npy'"):
        _ = data(fields=["image", "latent"], reader=Streaming()).source


@pytest.mark.parametrize("workers", [0, 2])
def test_streaming_trains_and_resumes_at_the_shards_that_were_read(data, tmp_path, workers):
    module = data(workers=workers, reader=Streaming(shuffle_buffer=1))
    assert module.num_train is None
    uninterrupted, fit = run(module, tmp_path, 12)
    assert len(set(flat(uninterrupted.train_keys[:7]))) >= 24
    state = fit.datamodule.state_dict()
    assert state["source"]["turn"] > 0
    fit.save_checkpoint(tmp_path / "cut.ckpt")
    again = data(workers=workers, reader=Streaming(shuffle_buffer=1))
    rest, _ = run(again, tmp_path, 16, ckpt=tmp_path / "cut.ckpt")
    assert len(rest.train_keys) == 4
    assert set(flat(uninterrupted.train_keys[-3:])) & set(flat(rest.train_keys[:2]))


class TwoProcesses(Recorder):
    """Has a buffer, which DDP synchronises on every forward pass, and writes the keys of each rank."""

    def __init__(self, folder: Path):
        super().__init__()
        self.register_buffer("table", torch.zeros(3))
        self.folder = folder

    def on_fit_end(self):
        seen = {"train": self.train_keys, "val": self.val_keys}
        torch.save(seen, self.folder / f"rank{self.global_rank}.pt")


@pytest.mark.slow
def test_two_processes_read_the_order_of_one_and_evaluate_once(data, tmp_path):
    uninterrupted, _ = run(data(batch_size=4), tmp_path, 12, val_check_interval=6)
    fit = trainer(tmp_path, 6, devices=2, strategy="ddp_fork", val_check_interval=6)
    fit.fit(TwoProcesses(tmp_path), datamodule=data(batch_size=2))
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    for step in range(6):
        one, two = (rank["train"][step] for rank in ranks)
        assert [key for pair in zip(one, two, strict=True) for key in pair] == uninterrupted.train_keys[step]
    assert [len(rank["val"]) for rank in ranks] == [6, 5]
    assert sorted(ranks[0]["val"] + ranks[1]["val"]) == [f"{n:06d}" for n in range(900, 911)]
