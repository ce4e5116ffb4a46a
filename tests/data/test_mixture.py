"""Mixtures of sets: proportions, the order of each set, resume across changes of the weights."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from collections import Counter
from fractions import Fraction
from itertools import islice

import lightning as L
import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from jsonargparse import ArgumentParser
from tiny_shards import png, write_tar

from ldm.callbacks.mixture_counts import MixtureCounts
from ldm.data.mixture import Mixture, Turns, proportions
from ldm.data.module import Shards, Streaming
from ldm.data.sets import TrainSet
from ldm.data.source import DataRank
from ldm.data.view import Augment
from ldm.stages.counted import Counted

SHARES = st.lists(st.integers(1, 40), min_size=1, max_size=5)


def located(turns: Turns, positions: range) -> list[tuple[int, int]]:
    return [turns.locate(position) for position in positions]


@given(SHARES, st.integers(0, 2**64 - 1), st.integers(0, 10**9))
def test_every_prefix_has_the_proportions(shares, seed, start):
    """Exactly, with integers: |n - f p| < K - 1, and 0 for a single set."""
    turns, total = Turns(shares, seed), sum(shares)
    counts, limit = turns.before(start), max(1, (len(shares) - 1) * total)
    for position in range(start, start + 300):
        for count, share in zip(counts, shares, strict=True):
            assert abs(count * total - share * position) < limit
        number, within = turns.locate(position)
        assert within == counts[number]
        counts[number] += 1
    assert turns.before(start + 300) == counts


def test_a_block_has_exactly_its_proportions_and_no_two_are_alike():
    turns = Turns([3, 1], 5)
    length = int(turns.ends[-1])
    blocks = [[turns.locate(n)[0] for n in range(b * length, (b + 1) * length)] for b in range(3)]
    assert all(Counter(block) == {0: 3 * length // 4, 1: length // 4} for block in blocks)
    assert blocks[0] != blocks[1] != blocks[2]


@pytest.mark.parametrize("world", [2, 3, 4, 8])
def test_no_rank_always_gets_the_same_set(world):
    """Each gets a quarter of the second one, up to four deviations of as many independent draws."""
    turns = Turns([3, 1], 1)
    for rank in range(world):
        drawn = [turns.locate(n)[0] for n in range(rank, 4000 * world, world)]
        assert abs(sum(drawn) - 1000) < 4 * 27.4


def test_a_position_means_the_same_however_it_is_reached():
    straight = located(Turns([5, 2, 1], 3), range(10_000))
    turns = pickle.loads(pickle.dumps(Turns([5, 2, 1], 3)))
    for position in np.random.default_rng(0).permutation(10_000)[:100].tolist():
        assert turns.locate(position) == Turns([5, 2, 1], 3).locate(position) == straight[position]
    assert Turns([5, 2, 1], 4).locate(10**14) == Turns([5, 2, 1], 4).locate(10**14)
    assert located(Turns([5, 2, 1], 4), range(50)) != straight[:50]


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ({"b": 0.7, "a": 0.3}, {"a": 3, "b": 7}),
        ({"a": 2, "b": 4.0, "c": 0}, {"a": 1, "b": 2}),
        ({"a": 1e-3, "b": 1}, {"a": 1, "b": 1000}),
        ({"a": 5}, {"a": 1}),
        ({"a": 1e30, "b": 1e30}, {"a": 1, "b": 1}),
        ({"a": 123_457, "b": 876_543}, {"a": 123_457, "b": 876_543}),
    ],
)
def test_weights_are_taken_as_they_are_written(weights, expected):
    assert proportions(weights) == expected
    assert list(proportions(weights)) == sorted(expected)


@given(st.dictionaries(st.sampled_from("abcdef"), st.floats(1e-3, 1e3), min_size=1))
def test_other_weights_are_rounded_to_a_millionth_of_their_sum(weights):
    found, total = proportions(weights), sum(Fraction(weight) for weight in weights.values())
    assert found.keys() == weights.keys() and min(found.values()) >= 1
    for name, weight in weights.items():
        assert abs(Fraction(found[name], sum(found.values())) - Fraction(weight) / total) < Fraction(6, 10**6)


@given(st.lists(st.tuples(SHARES, st.integers(0, 9000)), min_size=1, max_size=4), st.integers(0, 99))
def test_in_a_new_phase_each_set_continues_where_it_stands(phases, seed):
    """Whatever the weights were, the samples of a set are 0, 1, 2, ..., and every restart finds the same."""
    names, position, read = "abcde", 0, Counter[str]()
    mixture, state = None, None
    for shares, length in phases:
        mixture = Mixture(dict(zip(names, shares, strict=False)), seed)
        if state is not None:
            mixture.resume(state, position, new_phase=True)
        assert {k: v for k, v in mixture.counts(position).items() if v} == +read
        for each in range(position, position + length):
            name, within = mixture.locate(each)
            assert within == read[name]
            read[name] += 1
        position, state = position + length, json.loads(json.dumps(mixture.state_dict()))
        again = Mixture(dict(zip(names, shares, strict=False)), seed)
        again.resume(state, position, new_phase=False)
        for each in range(0, position, 997):
            assert again.locate(each) == mixture.locate(each)


def test_other_weights_are_an_error_without_a_new_phase():
    state = Mixture({"a": 3, "b": 1}, 0).state_dict()
    Mixture({"b": 10, "a": 30, "c": 0}, 0).resume(state, 50, new_phase=False)
    message = r"^data.train: .* weights a 3, b 1, found a 1, b 1: .* --data.new_phase true$"
    with pytest.raises(ValueError, match=message):
        Mixture({"a": 1, "b": 1}, 0).resume(state, 50, new_phase=False)
    same = Mixture({"a": 3, "b": 1}, 0)
    same.resume(state, 50, new_phase=True)
    assert same.state_dict() == state


SIZES = {"art": [4, 3], "photos": [5, 6, 2]}


def write(folder, name: str, sizes: list[int], key: str = "") -> str:
    number = 0
    for shard, size in enumerate(sizes):
        files = []
        for _ in range(size):
            stem, about = f"{key}{number:04d}", {"alt": f"alt {number}", "many": ["x", "y"], "score": number}
            files += [(f"{stem}.png", png(number)), (f"{stem}.txt", f"text {number}".encode())]
            files += [(f"{stem}.json", json.dumps(about).encode())]
            number += 1
        write_tar(folder / name / f"train-{shard:06d}.tar", files)
    return str(folder / name / "train-*.tar")


@pytest.fixture
def sets(tmp_path):
    def make(**more):
        found = {name: {"shards": write(tmp_path, name, sizes)} for name, sizes in SIZES.items()}
        found["photos"]["weight"] = 3
        for key, value in more.items():
            name, _, option = key.partition("_")
            found[name][option] = value
        return {name: TrainSet(**of) for name, of in found.items()}

    return make


def data(train, tmp_path, **more) -> Shards:
    val = write(tmp_path, "val", [3])
    return Shards(train, val, **{"batch_size": 2, "image_size": 8, "fields": ["image", "text"], **more})


def test_each_set_runs_through_its_own_epochs(sets, tmp_path):
    source = data(sets(), tmp_path).source
    read = [source[position]["key"] for position in range(400)]
    for name, sizes in SIZES.items():
        keys = [key for key in read if key.startswith(f"{name}/")]
        everything = {f"{name}/{number:04d}" for number in range(sum(sizes))}
        epochs = [keys[n : n + len(everything)] for n in range(0, len(keys), len(everything))]
        assert len(epochs) > 5
        assert all(len(epoch) == len(set(epoch)) for epoch in epochs)
        assert all(set(epoch) == everything for epoch in epochs[:-1])
        assert epochs[0] != epochs[1]
    assert source.counts(400) == {name: sum(key.startswith(name) for key in read) for name in SIZES}
    assert abs(source.counts(400)["art"] - 100) < 1
    assert data(sets(), tmp_path).num_train == 20


def test_any_ranks_and_workers_read_the_same_in_the_same_order(sets, tmp_path):
    module = data(sets(photos_filter="score < 9"), tmp_path)
    orders = []
    for world, workers in [(1, 0), (2, 0), (3, 0), (1, 2), (2, 1)]:
        ranks = []
        for rank in range(world):
            loader = module.source.loader(lambda: 4090, 12 // world, workers, DataRank(rank, world))
            ranks.append([list(zip(b["key"], b["text"], strict=True)) for b in islice(loader, 3)])
        orders.append([ranks[i % world][step][i // world] for step in range(3) for i in range(12)])
    assert all(order == orders[0] for order in orders)
    assert orders[0] == [(s["key"], s["text"]) for s in map(module.source.__getitem__, range(4090, 4126))]


def test_keys_are_unique_over_sets_with_equal_keys(tmp_path):
    train = {name: TrainSet(write(tmp_path, name, [3, 3])) for name in ("a", "b")}
    source = data(train, tmp_path).source
    first = {source[position]["key"]: source[position]["text"] for position in range(12)}
    assert len(first) == 12
    assert {key.partition("/")[2] for key in first} == {f"{n:04d}" for n in range(6)}


def test_a_set_has_captions_a_class_and_a_filter_of_its_own(sets, tmp_path):
    options = {"art_caption": "a painting", "art_label": 7, "photos_label": 2, "photos_caption_key": "alt"}
    options |= {"photos_filter": "score >= 5 and len(alt) < 99"}
    module = data(sets(**options), tmp_path, fields=["text", "label"], filter="score != 8")
    found = {sample["key"]: sample for sample in map(module.source.__getitem__, range(80))}
    assert set(found) == {f"art/{n:04d}" for n in range(7)} | {
        f"photos/{n:04d}" for n in (5, 6, 7, *range(9, 13))
    }
    for key, sample in found.items():
        number = int(key[-4:])
        expected = ("a painting", 7) if key.startswith("art") else (f"alt {number}", 2)
        assert (sample["text"], sample["label"]) == expected
    assert module.source.report() == [
        "data.train.art.filter keeps 7 of 7 samples",
        "data.train.photos.filter keeps 7 of 13 samples",
    ]


def test_a_key_may_hold_several_captions(sets, tmp_path):
    source = data(sets(art_caption_key="many", photos_weight=0), tmp_path).source
    assert {source[position]["text"] for position in range(60)} == {"x", "y"}
    with pytest.raises(ValueError, match=r"data.train.art: data.fields: asks for \['text'\], but the shard"):
        _ = data(sets(art_caption_key="none"), tmp_path).source


def test_captions_of_a_set_come_before_those_that_are_drawn(sets, tmp_path):
    train = sets(art_caption="a painting", photos_caption_key="many")
    source = data(train, tmp_path, augment=Augment(captions={"alt": 1.0})).source
    found = {(sample["key"][:3], sample["text"]) for sample in map(source.__getitem__, range(80))}
    assert found == {("art", "a painting"), ("pho", "x"), ("pho", "y")}
    source = data(sets(art_caption="a painting"), tmp_path, augment=Augment(captions={"alt": 1.0})).source
    found = [sample["text"] for sample in map(source.__getitem__, range(80))]
    assert {text[:3] for text in found} == {"a p", "alt"}


@pytest.mark.parametrize("own", ["caption", "caption_key"])
def test_stored_text_embeddings_are_not_of_the_captions_of_a_set(sets, tmp_path, own):
    plain, train = sets(), sets(**{f"art_{own}": "alt"})
    for path in [*tmp_path.glob("art/*.tar"), *tmp_path.glob("photos/*.tar")]:
        add_embeddings(path)
    with pytest.raises(ValueError, match=rf"data.train.art.{own}: got 'alt', but the text embeddings that"):
        _ = data(train, tmp_path, fields=["image", "text_embedding"]).source
    source = data(train, tmp_path, fields=["image", "text"]).source
    assert {s["text"][:3] for s in map(source.__getitem__, range(40)) if s["key"].startswith("art")} == {
        "alt"
    }
    source = data(plain, tmp_path, fields=["image", "text_embedding"]).source
    assert source[0]["text_embedding"].shape == (1, 2)


def add_embeddings(path):
    array = io.BytesIO()
    np.save(array, np.zeros((1, 1, 2), np.float16))
    with tarfile.open(path) as tar:
        bodies = [(member.name, tar.extractfile(member).read()) for member in tar.getmembers()]
    keys = dict.fromkeys(name.partition(".")[0] for name, _ in bodies)
    write_tar(path, [*bodies, *((f"{key}.text.npy", array.getvalue()) for key in keys)])


def test_a_bad_sample_is_replaced_by_one_of_its_set(sets, tmp_path):
    train = sets()
    shard = tmp_path / "art" / "train-000000.tar"
    write_tar(shard, [("bad.png", b"no image"), ("bad.txt", b"x"), ("good.png", png(0)), ("good.txt", b"y")])
    source = data(train, tmp_path).source
    read = [source[position] for position in range(300)]
    assert abs(sum(sample["key"].startswith("art/") for sample in read) - 75) < 1
    skipped = [sample for sample in read if "skipped" in sample]
    assert skipped and all(sample["key"].startswith("art/") for sample in skipped)


def test_each_set_keeps_its_order_when_others_are_added(sets, tmp_path):
    few = data({"art": sets()["art"]}, tmp_path).source
    many = data(sets(), tmp_path).source
    art = [key for n in range(100) if (key := many[n]["key"]).startswith("art/")]
    assert [few[n]["key"] for n in range(len(art))] == art


def seeded(train, tmp_path, **more) -> Shards:
    L.seed_everything(7, verbose=False)
    return data(train, tmp_path, **more)


def test_what_a_set_was_is_compared_on_resume(sets, tmp_path):
    state = pickle.loads(pickle.dumps(seeded(sets(), tmp_path).state_dict()))
    seeded(dict(reversed(sets().items())), tmp_path).load_state_dict(state)
    with pytest.raises(ValueError, match=r"data.train: .* data with art.filter None, found 'score > 2'"):
        seeded(sets(art_filter="score > 2"), tmp_path).load_state_dict(state)
    with pytest.raises(
        ValueError, match=r"data.train: .* data with photos.filter None, found None|photos.shards"
    ):
        seeded({"art": sets()["art"]}, tmp_path).load_state_dict(state)
    with pytest.raises(
        ValueError, match=r"weights art 1, photos 3, found art 1, photos 1: .*--data.new_phase true"
    ):
        seeded(sets(photos_weight=1), tmp_path).load_state_dict(state)
    with pytest.raises(ValueError, match=r"weights art 1, photos 3, found art 1, more 2, photos 3"):
        more = {**sets(), "more": TrainSet(write(tmp_path, "more", [2]), 2)}
        seeded(more, tmp_path).load_state_dict(state)
    module = seeded(sets(photos_weight=1), tmp_path, new_phase=True)
    module.load_state_dict({**state, "samples": 101})
    assert module.source.state_dict()["phases"][1] == {"start": 101, "weights": {"art": 1, "photos": 1}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"art_weight": -1}, r"^data.train.art.weight: got -1, expected a number >= 0"),
        ({"art_weight": float("nan")}, r"^data.train.art.weight: got nan"),
        ({"art_weight": 0, "photos_weight": 0}, r"^data.train: all sets have weight 0"),
        ({"art_filter": "score >"}, r"^data.train.art.filter: 'score >' is no expression"),
        ({"art_filter": "scor > 3"}, r"^data.train.art.filter: no sample has 'scor', did you mean score\?"),
        ({"art_caption": " "}, r"^data.train.art.caption: got an empty caption"),
        ({"art_caption": "x", "art_caption_key": "y"}, r"^data.train.art: got caption and caption_key"),
        ({"art_label": -1}, r"^data.train.art.label: got -1"),
        (
            {"art_caption_key": "alt", "art_filter": "caption_length > 3"},
            r"^data.train.art.filter: caption_length is that of other captions than alt, expected len\(alt\)",
        ),
        ({"art_shards": "none-*.tar"}, r"^data.train.art: the pattern 'none-\*.tar' matches no file"),
    ],
)
def test_what_cannot_be_meant_is_one_clear_error(sets, tmp_path, change, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        _ = data(sets(**change), tmp_path).source


def test_names_of_sets_fit_options_and_keys(tmp_path):
    for name in ("a/b", "a.b", "", "ä"):
        with pytest.raises(ValueError, match=r"^data.train: a set is called"):
            Shards({name: TrainSet("x.tar"), "b": TrainSet("z.tar")}, "y.tar", batch_size=1)
    with pytest.raises(ValueError, match=r"^data.train: got no set"):
        Shards({}, "y.tar", batch_size=1)


def test_streaming_has_no_mixture(sets, tmp_path):
    with pytest.raises(ValueError, match=r"^data.train: Streaming reads no mixture of sets"):
        _ = data(sets(), tmp_path, reader=Streaming()).source


def test_options_of_a_set_can_be_given_on_the_command_line(tmp_path):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(Shards, "data")
    sets = {"photos": {"shards": "a.tar", "weight": 3}, "art": {"shards": ["b.tar", "c.tar"]}}
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump({"data": {"train": sets, "val": "v.tar", "batch_size": 1}}))
    given = ["--data.train.art.weight", "0.5", "--data.train.photos.filter", "width > 3"]
    config = parser.parse_args([f"--config={file}", *given])
    assert parser.instantiate(config).data.sets == {
        "photos": TrainSet("a.tar", 3, "width > 3"),
        "art": TrainSet(["b.tar", "c.tar"], 0.5),
    }
    again = tmp_path / "again.yaml"
    again.write_text(parser.dump(config))
    assert parser.parse_args([f"--config={again}"]).data == config.data


def test_the_mixture_of_one_set_is_its_order():
    assert [Mixture({"": 1.0}, 5).locate(n) for n in (0, 5, 10**12)] == [("", 0), ("", 5), ("", 10**12)]


class Reads(Counted):
    """Notes the keys of each step, and what is logged."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.keys: list[str] = []
        self.counts: list[dict[str, float]] = []

    def training_step(self, batch, batch_idx):
        self.keys += batch["key"]
        return self.weight.sum()

    def log(self, name, value, *args, **kwargs):
        self.counts += [{name: value}] if name.startswith("train/samples_") else []

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def train(module: Shards, folder, steps: int, ckpt=None) -> Reads:
    """Train some steps of 4 samples, and keep a checkpoint."""
    model = Reads()
    trainer = L.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        max_epochs=-1,
        logger=False,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        log_every_n_steps=10,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[MixtureCounts()],
    )
    trainer.fit(model, datamodule=module, ckpt_path=ckpt)
    trainer.save_checkpoint(folder / f"{steps}.ckpt")
    return model


@pytest.mark.filterwarnings("ignore:.*(workers|GPU|checkpoint|tree|isinstance).*")
def test_weights_change_in_a_run_and_no_sample_of_an_epoch_is_lost(sets, tmp_path):
    """Phases of 13, 12 and 15 steps: the second begins without notice of the batch size or of workers."""
    weights = ({}, {"photos_weight": 0.5, "art_weight": 2}, {"photos_weight": 0})
    keys: list[str] = []
    for end, more, options in zip((13, 25, 40), weights, ({}, {"num_workers": 1}, {}), strict=True):
        module = seeded(sets(**more), tmp_path, batch_size=4, new_phase=end > 13, **options)
        start = None if end == 13 else tmp_path / f"{len(keys) // 4}.ckpt"
        model = train(module, tmp_path, end, start)
        keys += model.keys
        again = module.source
        assert [again[n]["key"] for n in range(len(keys))] == keys
    assert len(keys) == 160
    for name, sizes in SIZES.items():
        of = [key for key in keys if key.startswith(name)]
        epochs = [of[n : n + sum(sizes)] for n in range(0, len(of), sum(sizes))]
        assert all(len(set(epoch)) == len(epoch) for epoch in epochs)
    counts = [sum(key.startswith(name) for key in keys) for name in SIZES]
    assert model.counts[-2:] == [{"train/samples_art": counts[0]}, {"train/samples_photos": counts[1]}]
    parts = keys[:52], keys[52:100], keys[100:]
    shares = [sum(key.startswith("art") for key in part) / len(part) for part in parts]
    assert shares == pytest.approx([0.25, 0.8, 1], abs=0.02)
    with pytest.raises(ValueError, match=r"weights art 1, found art 1, photos 3: .*--data.new_phase true"):
        train(seeded(sets(), tmp_path, batch_size=4), tmp_path, 50, tmp_path / "40.ckpt")
