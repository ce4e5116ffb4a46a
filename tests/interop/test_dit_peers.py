"""The diffusion transformer is DiT's and PixArt-alpha's: counts, names and numbers against three peers."""

import math

import pytest
import torch
from tiny_model import randomised, relative

from ldm.interop import dit_keys
from ldm.nets.dit import DiT
from ldm.nets.dit_blocks import DiTOptions
from ldm.types import Cond, DenoiserDims

diffusers = pytest.importorskip("diffusers")

SMALL = {"patch_size": 2, "hidden": 24, "depth": 3, "heads": 2}
CLASSES = 5
LEARNED = DenoiserDims(sample=4, vector=24, output=8)
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


def count(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("hidden", "depth", "heads", "published"),
    [(384, 12, 6, 33), (768, 12, 12, 130), (1024, 24, 16, 458), (1152, 28, 16, 675)],
    ids=["S", "B", "L", "XL"],
)
def test_sizes_are_the_published_ones(hidden, depth, heads, published):
    with torch.device("meta"):
        ours = DiT(DenoiserDims(sample=4, vector=hidden, output=8), 2, hidden, depth, heads)
        theirs = diffusers.DiTTransformer2DModel(heads, hidden // heads, 4, 8, depth, sample_size=32)
    table = 1001 * hidden
    assert round((count(ours) + table) / 1e6) == published
    embeddings = count(ours.time_embedding) + table
    assert count(theirs) == count(ours) + table + (depth - 1) * embeddings, "a copy in each of their blocks"


def test_xl_2_has_exactly_the_parameters_of_the_published_file():
    with torch.device("meta"):
        ours = DiT(DenoiserDims(sample=4, vector=1152, output=8))
        names = dit_keys.to_facebook(ours.state_dict(), torch.empty(1001, 1152), grid=16)
    assert sum(value.numel() for value in names.values()) == 675_129_632


def test_pixart_alpha_has_exactly_as_many_parameters_as_theirs():
    with torch.device("meta"):
        theirs = diffusers.PixArtTransformer2DModel(sample_size=64, caption_channels=4096)
        assert count(DiT(DenoiserDims(sample=4, tokens=4096, output=8))) == count(theirs) == 610_856_096


def paper(weights, x, t, vector, heads, hidden, size):
    """The network in the words of Peebles & Xie 2023, on the names of their file, written for a square."""
    get = lambda name: weights[name].to(x)  # noqa: E731
    linear = lambda name, y: y @ get(f"{name}.weight").T + get(f"{name}.bias")  # noqa: E731
    norm = lambda y: (y - y.mean(-1, keepdim=True)) / (y.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()  # noqa: E731
    batch, channels, side, _ = x.shape
    grid = side // size
    cells = (
        x.reshape(batch, channels, grid, size, grid, size)
        .permute(0, 2, 4, 1, 3, 5)
        .reshape(batch, grid**2, -1)
    )
    tokens = (
        cells @ get("x_embedder.proj.weight").flatten(1).T + get("x_embedder.proj.bias") + get("pos_embed")
    )
    frequency = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32) / 128)
    angle = t[:, None].float() * frequency
    wave = torch.cat([angle.cos(), angle.sin()], 1).to(x)
    silu = lambda y: y / (1 + torch.exp(-y))  # noqa: E731
    c = linear("t_embedder.mlp.2", silu(linear("t_embedder.mlp.0", wave))) + vector
    for i in range(len({n.split(".")[1] for n in weights if n.startswith("blocks.")})):
        block = f"blocks.{i}."
        g1, b1, a1, g2, b2, a2 = (
            linear(f"{block}adaLN_modulation.1", silu(c))[:, None].chunk(6, -1)[j] for j in (1, 0, 2, 4, 3, 5)
        )
        qkv = linear(f"{block}attn.qkv", norm(tokens) * (1 + g1) + b1).reshape(
            batch, -1, 3, heads, hidden // heads
        )
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        weight = torch.softmax(q @ k.mT / math.sqrt(hidden // heads), -1)
        tokens = tokens + a1 * linear(f"{block}attn.proj", (weight @ v).transpose(1, 2).flatten(2))
        inner = linear(f"{block}mlp.fc1", norm(tokens) * (1 + g2) + b2)
        gelu = inner / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)))
        tokens = tokens + a2 * linear(f"{block}mlp.fc2", gelu)
    shift, scale = linear("final_layer.adaLN_modulation.1", silu(c))[:, None].chunk(2, -1)
    out = linear("final_layer.linear", norm(tokens) * (1 + scale) + shift)
    out = out.reshape(batch, grid, grid, size, size, -1).permute(0, 5, 1, 3, 2, 4)
    return out.reshape(batch, -1, side, side)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_the_numbers_are_those_of_the_paper_and_its_file(dtype):
    ours = randomised(DiT(LEARNED, **SMALL)).to(dtype)
    table = torch.randn(CLASSES + 1, 24)
    file = dit_keys.to_facebook(ours.state_dict(), table, grid=4)
    x, t, label = torch.randn(3, 4, 8, 8, dtype=dtype), torch.tensor([0, 500, 999]), torch.tensor([0, 5, 2])
    vector = table[label].to(dtype)
    expected = paper(file, x, t, vector, heads=2, hidden=24, size=2)
    assert relative(ours(x, t, Cond(vector=vector)), expected) < TOLERANCE[dtype]
    weights, again, grid = dit_keys.from_facebook(file, "a test")
    assert grid == 4 and torch.equal(again, table)
    assert {k: v.tolist() for k, v in weights.items()} == {
        k: v.tolist() for k, v in ours.state_dict().items()
    }


def theirs_of(ours, table, size):
    theirs = diffusers.DiTTransformer2DModel(
        2, 12, 4, 8, 3, sample_size=size, patch_size=2, num_embeds_ada_norm=CLASSES
    )
    theirs.load_state_dict(dit_keys.to_diffusers(ours.state_dict(), table), strict=True)
    return theirs.eval()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("size", [8, 12])
def test_the_numbers_are_those_of_diffusers_at_any_size(dtype, size):
    ours = randomised(DiT(LEARNED, **SMALL, options=DiTOptions(as_diffusers=True), position_grid=4))
    table = torch.randn(CLASSES + 1, 24)
    theirs = theirs_of(ours, table, size=8).to(dtype)
    x, t, label = (
        torch.randn(3, 4, size, size, dtype=dtype),
        torch.tensor([0, 500, 999]),
        torch.tensor([0, 5, 2]),
    )
    got = ours.to(dtype)(x, t, Cond(vector=table[label].to(dtype)))
    assert relative(got, theirs(x, t, class_labels=label).sample) < TOLERANCE[dtype]
    weights, again = dit_keys.from_diffusers(theirs.state_dict(), "a test")
    assert torch.equal(again.float(), table)
    assert all(torch.equal(value, ours.state_dict()[name]) for name, value in weights.items())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_the_numbers_are_those_of_pixart_alpha_with_masked_tokens(dtype):
    ours = randomised(DiT(DenoiserDims(sample=4, tokens=10, output=8), **SMALL, position_grid=2)).to(dtype)
    theirs = diffusers.PixArtTransformer2DModel(
        2,
        12,
        4,
        8,
        3,
        cross_attention_dim=24,
        caption_channels=10,
        sample_size=8,
        interpolation_scale=2,
        use_additional_conditions=False,
    )
    theirs.load_state_dict(dit_keys.to_pixart(ours.state_dict()), strict=True)
    x, t = torch.randn(2, 4, 8, 12, dtype=dtype), torch.tensor([3, 977])
    tokens, mask = torch.randn(2, 5, 10, dtype=dtype), torch.tensor([[True] * 5, [True] * 2 + [False] * 3])
    expected = theirs.to(dtype).eval()(x, tokens, t, encoder_attention_mask=mask).sample
    assert relative(ours(x, t, Cond(tokens=tokens, mask=mask)), expected) < TOLERANCE[dtype]
    weights = dit_keys.from_pixart(theirs.state_dict(), "a test")
    assert all(torch.equal(value, ours.state_dict()[name]) for name, value in weights.items())


def test_files_that_are_something_else_are_named():
    ours = randomised(DiT(LEARNED, **SMALL))
    table = torch.randn(CLASSES + 1, 24)
    file = dit_keys.to_facebook(ours.state_dict(), table, grid=4)
    with pytest.raises(ValueError, match=r"x\.pt: pos_embed are not the fixed positions"):
        dit_keys.from_facebook({**file, "pos_embed": file["pos_embed"] + 0.1}, "x.pt")
    with pytest.raises(ValueError, match=r"x\.pt: 1 weights not expected \(lora\)"):
        dit_keys.from_facebook({**file, "lora": table}, "x.pt")
    folder = dit_keys.to_diffusers(ours.state_dict(), table)
    changed = dict(folder)
    changed["transformer_blocks.2.norm1.emb.timestep_embedder.linear_1.bias"] += 1
    with pytest.raises(
        ValueError, match=r"transformer_blocks\.2.*expected the same embeddings in all blocks"
    ):
        dit_keys.from_diffusers(changed, "x")
