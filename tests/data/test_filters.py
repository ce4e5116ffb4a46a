"""Filters: what an expression means, what it may not do, and which samples a run then reads."""

from __future__ import annotations

import ast
import json
import pickle
from itertools import islice
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_shards import png, write_tar

from ldm.data.filters import Filter
from ldm.data.metadata import COMPUTED
from ldm.data.module import Indexed, Shards, Streaming
from ldm.data.source import DataRank, SampleSpec
from ldm.latents.encode import ShardEncoder, encode_shards
from ldm.nets.autoencoder import KLAutoencoder

NAN = float("nan")
ROWS = [
    {"width": 512, "height": 300, "aesthetic": 6, "watermark": 0, "caption_length": 10, "domain": "Art.com"},
    {"width": 100, "height": 400, "aesthetic": 6, "watermark": 0, "caption_length": 301, "domain": "photo"},
    {"width": 300, "height": 256, "aesthetic": 5.6, "watermark": 1, "caption_length": 4, "domain": "x"},
    {"width": 256, "height": 256, "aesthetic": 0, "watermark": 0, "caption_length": 3, "domain": "ART"},
]
COLUMNS = {
    name: np.array([row[name] for row in ROWS], dtype=object if name == "domain" else np.float64)
    for name in ROWS[0]
}
EXPRESSIONS = [
    "min(width, height) >= 256 and aesthetic > 5.5 and not watermark and 3 < caption_length <= 300",
    "width > 300 or watermark",
    "watermark",
    "not aesthetic",
    "lower(domain) in ('art.com', 'x')",
    "domain not in ['x', 'photo']",
    "width in {100, 256}",
    "'art' in lower(domain)",
    "'o' not in domain",
    "len(domain) > 3",
    "'m' < domain < 'z' or domain == 'ART'",
    "abs(width - height) < 50",
    "-width < -200",
    "+width * 2 - height / 2 > 100",
    "(width > 200) + (height > 290) + watermark >= 2",
    "max(width, height, 300) == 300",
    "True and width != 512.0",
    "not (width > 200 and not watermark) or False",
]


def kept(text: str, columns: dict[str, np.ndarray] = COLUMNS) -> list[bool]:
    found = pickle.loads(pickle.dumps(Filter(text)))
    assert Filter(found.identity).identity == found.identity
    return (found.groups({name: columns[name] for name in found.columns}) == 0).tolist()


@pytest.mark.parametrize("text", EXPRESSIONS)
def test_an_expression_means_what_it_does_in_python(text):
    names = {"lower": str.lower}
    expected = [bool(eval(text, names, row)) for row in ROWS]  # the text is ours
    assert kept(text) == expected
    assert True in expected and False in expected


@given(
    st.recursive(
        st.sampled_from(["a", "b", "1", "2.5", "a > b", "a <= 2 < b", "a == b"]),
        lambda inner: st.one_of(
            st.tuples(inner, st.sampled_from(["and", "or", "+", "-", "*", "<", "!="]), inner).map(
                lambda three: f"({' '.join(three)})"
            ),
            inner.map(lambda one: f"(not {one})"),
            st.tuples(inner, inner).map(lambda two: f"min({two[0]}, {two[1]})"),
        ),
        max_leaves=8,
    ),
    st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=1, max_size=5),
)
def test_any_arithmetic_means_what_it_does_in_python(text, rows):
    text = f"({text}) and a == a and b == b"
    numbers = {"a": np.array([float(a) for a, _ in rows]), "b": np.array([float(b) for _, b in rows])}
    expected = [bool(eval(_booleans(text), {"bool": bool}, {"a": a, "b": b})) for a, b in rows]
    assert kept(text, numbers) == expected


def _booleans(text: str) -> str:
    """Let ``and`` and ``or`` of Python give true or false, as in a filter."""

    class Truth(ast.NodeTransformer):
        def visit_BoolOp(self, node):
            self.generic_visit(node)
            return ast.Call(ast.Name("bool", ast.Load()), [node], [])

    return ast.unparse(ast.fix_missing_locations(Truth().visit(ast.parse(text, mode="eval"))))


def test_a_sample_that_lacks_a_field_is_left_out():
    columns = {
        "a": np.array([1.0, NAN, 1.0]),
        "b": np.array([NAN, 1.0, 1.0]),
        "c": np.array(["x", "", "y"], object),
    }
    assert kept("a > 0 or b > 0", columns) == [False, False, True]
    assert kept("not a < 0 and c != 'x'", columns) == [False, False, True]
    assert kept("a / 0 > 3 and a - a == 0", columns) == [True, False, True]
    assert kept("(a - a) / 0", columns) == [False] * 3


@pytest.mark.parametrize(
    "text",
    [
        "",
        "3 > 2",
        "width >",
        "__import__('os').system('true')",
        "open('/etc/passwd')",
        "width.real > 3",
        "().__class__",
        "(lambda: 3)()",
        "[x for x in width]",
        "f'{width}' == '3'",
        "width ** 99",
        "width @ 3 > 1",
        "width if height else 3",
        "(x := 3)",
        "width is 3",
        "json[0] > 1",
        "width[0] > 1",
        "width > None",
        "width > 1j",
        "width > 1" + "0" * 400,
        "width in ()",
        "width in (height,)",
        "width in (1, 'a')",
        "lower(domain=3)",
        "min(width) > 1",
        "len(domain, domain) > 1",
        "domain + 'a' == 'b'",
        "not 'a' and width",
        "width > 'a' and width > 3",
        "a" + " + a" * 5000,
        "(" * 500 + "a",
        "a\0b",
        "a; b",
        "await a",
        "*a",
        "min(*a)",
    ],
)
def test_whatever_else_there_is_in_python_is_refused_in_one_line(text):
    with pytest.raises(ValueError, match=r"^data\.filter: ") as caught:
        Filter(text)
    assert "\n" not in str(caught.value)


def test_a_name_is_text_where_it_meets_text():
    assert Filter("a > 3 and b == 'x' and len(c) > 2 and json['d e'] and 'x' in f").columns == {
        "a": float,
        "b": str,
        "c": str,
        "d e": float,
        "f": str,
    }


AESTHETIC = [[6, None, 3, 9], [1, 2], [7, 7, 5, "high", 8], [9]]


@pytest.fixture
def train(tmp_path):
    number = iter(range(100))
    for shard, scores in enumerate(AESTHETIC):
        files = []
        for score, n in zip(scores, number, strict=False):
            about = {"captions": ["a", "bb"], "n": n} | ({} if score is None else {"aesthetic": score})
            files += [(f"{n:03d}.png", png(n)), (f"{n:03d}.json", json.dumps(about).encode())]
        write_tar(tmp_path / "shards" / f"train-{shard:06d}.tar", files)
    return str(tmp_path / "shards" / "train-*.tar")


def keys(train: str, least: float) -> set[str]:
    flat = [score for scores in AESTHETIC for score in scores]
    numbers = [n for n, score in enumerate(flat) if isinstance(score, int) and score >= least]
    return {f"{n:03d}" for n in numbers}


def data(train: str, kept: str | None = None, **more) -> Shards:
    return Shards(train, train, batch_size=2, image_size=8, filter=kept, **more)


def test_an_epoch_holds_each_kept_sample_once_at_any_number_of_ranks_and_workers(train):
    module = data(train, "aesthetic >= 6")
    expected = keys(train, 6)
    assert module.num_train == len(expected) == 6
    orders = []
    for world, workers in [(1, 0), (2, 0), (1, 2)]:
        ranks = [
            [
                b["key"]
                for b in islice(module.source.loader(lambda: 0, 6 // world, workers, DataRank(r, world)), 3)
            ]
            for r in range(world)
        ]
        orders.append([ranks[i % world][step][i // world] for step in range(3) for i in range(6)])
    assert orders[0] == orders[1] == orders[2]
    epochs = [orders[0][start : start + 6] for start in (0, 6, 12)]
    assert all(set(epoch) == expected for epoch in epochs) and epochs[0] != epochs[1]
    assert module.source.report() == ["data.filter keeps 6 of 12 samples; 2 lack 'aesthetic'"]
    assert data(train).source.report() == []


def test_the_order_is_that_of_shards_that_hold_the_kept_samples_alone(train, tmp_path):
    """So latents that ldm.encode --filter wrote are read in the order of the images that they are of."""
    text = "aesthetic >= 6"
    net = KLAutoencoder(latent_channels=1, block_out_channels=[4], layers_per_block=1, norm_groups=2)
    encoder = ShardEncoder(net, torch.device("cpu"), 8, 3, 0, False)
    made_by = {"autoencoder": {"sha256": "0", "checkpoint": "x"}, "image_size": 8, "keep_images": False}
    paths = sorted(str(path) for path in Path(train).parent.glob("train-*.tar"))
    out = tmp_path / "out"
    assert encode_shards(encoder, paths, out, made_by, kept=Filter(text)) == (6, 0)
    spec = SampleSpec(("text",), 8, 5)
    ours = data(train, text).reader.open(data(train, text).sets, spec)
    with pytest.warns(UserWarning, match="1 of 4 shards are empty"):
        theirs = Indexed().open(str(out / "train-*.tar"), spec)
    assert [theirs[n] for n in range(20)] == [ours[n] for n in range(20)]
    with pytest.raises(
        ValueError, match=r"--out: .*out' was encoded with filter aesthetic >= 6, expected None"
    ):
        encode_shards(encoder, paths, out, made_by)
    with pytest.raises(ValueError, match=r"data.filter: 'aesthetic > 99' keeps 0 of 12 samples"):
        encode_shards(encoder, paths, tmp_path / "none", made_by, kept=Filter("aesthetic > 99"))


def test_validation_has_a_filter_of_its_own(train):
    everything = data(train, "aesthetic >= 6").evaluation
    some = data(train, val_filter="aesthetic >= 6").evaluation
    assert len(everything) == 12 and len(some) == 6
    assert [some[n]["key"] for n in range(6)] == sorted(keys(train, 6))
    assert (
        some.fingerprint(6)
        != everything.fingerprint(6)
        != data(train, val_filter="n < 6").evaluation.fingerprint(6)
    )
    assert len(some.check("data.val")) == 3
    with pytest.raises(ValueError, match=r"^data.val_filter: 'aesthetic > 99' keeps 0 of 12 samples"):
        _ = data(train, val_filter="aesthetic > 99").evaluation


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "aestetic > 5",
            r"^data.filter: no sample has 'aestetic', did you mean aesthetic\?: .*n, aesthetic, width",
        ),
        (
            "aesthetic > 99",
            r"^data.filter: 'aesthetic > 99' keeps 0 of 12 samples; 2 lack 'aesthetic', expected",
        ),
        ("n == 'x'", r"^data.filter: 'n' is used as text, but is a number, e.g. 0.0"),
        ("len(width) > 3", r"^data.filter: 'width' is used as text, but is a number, e.g. 8.0"),
        ("captions > 3", r"^data.filter: no sample has 'captions'"),
    ],
)
def test_a_filter_that_cannot_be_meant_is_one_clear_error(train, text, message):
    with pytest.raises(ValueError, match=message):
        _ = data(train, text).source


def test_text_compared_with_a_number_is_named(tmp_path):
    train = str(
        write_tar(tmp_path / "a.tar", [("0.png", png(0)), ("0.txt", b"x"), ("0.json", b'{"s": "5.5"}')])
    )
    with pytest.raises(ValueError, match=r"^data.filter: 's' is used as a number, but is text, e.g. '5.5'"):
        _ = data(train, "s > 5").source


def test_fewer_samples_than_a_batch_name_the_filter(train):
    with pytest.raises(
        ValueError, match=r"data.batch_size: 2 is more than the 1 samples .*\(data.filter keeps 1 of"
    ):
        data(train, "n == 3").setup("fit")


def test_another_filter_is_another_set_of_data(train):
    L.seed_everything(7, verbose=False)
    state = data(train, "aesthetic >= 6").state_dict()
    data(train, "aesthetic  >=  6").load_state_dict(state)
    with pytest.raises(ValueError, match=r"with filter 'aesthetic >= 6', found 'aesthetic > 5.5': restore"):
        data(train, "aesthetic > 5.5").load_state_dict(state)
    with pytest.raises(ValueError, match=r"with filter 'aesthetic >= 6', found None: restore"):
        data(train).load_state_dict(state)
    with pytest.raises(ValueError, match=r"with filter None, found 'aesthetic >= 6': restore"):
        data(train, "aesthetic >= 6").load_state_dict(data(train).state_dict())


def test_samples_that_a_filter_leaves_out_lack_nothing(tmp_path, recwarn):
    files = [(f"{n}.png", png(n)) for n in range(5)] + [(f"{n}.txt", b"caption") for n in (0, 2, 4)]
    train = str(write_tar(tmp_path / "a.tar", files))
    assert data(train, "caption_length > 3", fields=["text"]).num_train == 3
    assert not [each for each in recwarn if "lack 'text'" in str(each.message)]
    with pytest.warns(UserWarning, match=r"data.fields: 2 of 5 samples lack 'text', e.g. '1' of"):
        assert data(train, "width > 3", fields=["text"]).num_train == 5
    with pytest.warns(UserWarning, match=r"data.fields: 2 of 5 samples lack 'text', e.g. '1' of"):
        _ = data(train, fields=["text"]).source


def test_streaming_has_no_filter(train):
    with pytest.raises(
        ValueError, match=r"^data.filter: Streaming has no index to filter in, expected Indexed"
    ):
        _ = data(train, "n > 3", reader=Streaming()).source


def test_computed_columns_are_documented():
    readme = (Path(__file__).parents[2] / "data" / "README.md").read_text()
    assert all(f"`{name}`" in readme for name in COMPUTED)
