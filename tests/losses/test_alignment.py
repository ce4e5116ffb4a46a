"""Alignment with a frozen network: its formula, where gradients go, and blocks that are not there."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from tiny_model import randomised
from tiny_stage import trainer
from torch import nn

from ldm.callbacks.activation_checkpointing import ActivationCheckpointing
from ldm.callbacks.compile import Compile
from ldm.conditioners.none import Unconditional
from ldm.diffusion.mean_flow import MeanFlow
from ldm.latents.space import Pixels
from ldm.losses import Alignment, ConvHead, MLPHead
from ldm.nets.dit import DiT
from ldm.nets.hidden import HiddenStates, as_map
from ldm.nets.routing import Sprint
from ldm.nets.unet import UNet
from ldm.rng import SampleNoise
from ldm.stage_protocols import Progress
from ldm.stages.diffusion import Diffusion
from ldm.types import DenoiserDims

UNET = partial(
    UNet, block_out_channels=[8, 16], layers_per_block=1, attention=[False, True], num_heads=2, norm_groups=4
)
DIT = partial(DiT, patch_size=2, hidden=16, depth=3, heads=2)
BLOCKS = {"transformer_blocks.1": DIT, "mid_block.resnets.1": UNET, "down_blocks.0.resnets.0": UNET}
IMAGE = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
BATCH = {"key": ["a", "b"], "image": IMAGE}


class Patches(nn.Module):
    """A vision transformer's form: tokens of a class and of 4x4 patches, from a map that knows positions."""

    def __init__(self, channels=6):
        super().__init__()
        torch.manual_seed(1)
        self.conv = nn.Conv2d(3, channels, 4, stride=4)
        self.tokens = nn.Identity()

    def image_features(self, image):
        patches = self.conv(F.interpolate(image, (16, 16))).flatten(2).transpose(1, 2)
        tokens = self.tokens(torch.cat([100 + torch.zeros_like(patches[:, :1]), patches], dim=1))
        return tokens.mean(1)


def stage(block, denoiser, weight=0.5, head=None, **more):
    torch.manual_seed(0)
    terms = [Alignment(Patches, block, "tokens", head or MLPHead(8), weight, **more)]
    made = Diffusion(Pixels(), Unconditional(), denoiser, losses=terms).train()
    for term in made.loss_terms:
        term.prepare()
    return made


def test_tokens_become_maps_of_the_image_and_others_are_left_out():
    tokens = torch.arange(2 * 8 * 3.0).view(2, 8, 3)
    assert torch.equal(as_map(tokens, 64, 32), tokens.transpose(1, 2).view(2, 3, 4, 2))
    with_class = torch.cat([torch.zeros(2, 1, 3), tokens], 1)
    assert torch.equal(as_map(with_class, 64, 32), as_map(tokens, 64, 32))
    assert as_map(torch.zeros(1, 261, 5), 224, 224).shape == (1, 5, 16, 16)
    assert as_map(torch.zeros(1, 5), 9, 9).shape == (1, 5, 1, 1)
    wide = torch.zeros(1, 3 * 5, 2)
    assert as_map(wide, 24, 40).shape == (1, 2, 3, 5)


@pytest.mark.parametrize("block", BLOCKS)
def test_it_is_the_mean_cosine_of_patches(block):
    model = stage(block, BLOCKS[block])
    (term,) = model.loss_terms
    seen = {}
    dict(model.denoiser.named_modules())[block].register_forward_hook(
        lambda module, arguments, output: seen.update(hidden=output)
    )
    losses = model.losses(BATCH, SampleNoise(0, BATCH["key"]))
    hidden = seen["hidden"][0] if isinstance(seen["hidden"], tuple) else seen["hidden"]
    positions = hidden if hidden.ndim == 3 else hidden.flatten(2).transpose(1, 2)
    linears = [layer for layer in term.projector if isinstance(layer, nn.Conv2d)]
    for layer in linears:  # at each position by itself
        positions = positions @ layer.weight.flatten(1).T + layer.bias
        positions = positions if layer is linears[-1] else F.silu(positions)
    side = round(positions.shape[1] ** 0.5)
    target = F.interpolate(Patches().conv(IMAGE), (side, side), mode="bilinear", antialias=True)
    targets = target.flatten(2).transpose(1, 2)
    cosines = [
        sum(F.cosine_similarity(p, t, dim=0) for p, t in zip(ps, ts, strict=True)) / len(ps)
        for ps, ts in zip(positions, targets, strict=True)
    ]
    expected = 1 - sum(cosines) / 2
    torch.testing.assert_close(losses["alignment"], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(losses["loss"], losses["denoising"] + 0.5 * expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "callbacks",
    [
        [ActivationCheckpointing()],
        pytest.param([Compile(on_cpu=True)], marks=pytest.mark.slow),
        pytest.param([ActivationCheckpointing(), Compile("aot_eager", on_cpu=True)], marks=pytest.mark.slow),
    ],
    ids=["recomputed", "compiled", "both"],
)
@pytest.mark.parametrize("objective", [None, MeanFlow(ratio=1.0, power=0.0)], ids=["noise", "mean flow"])
def test_with_a_route_and_blocks_recomputed_or_compiled_it_is_the_same(
    objective, callbacks, tmp_path, capsys
):
    torch.manual_seed(0)
    made = Diffusion(
        Pixels(),
        Unconditional(),
        lambda dims: randomised(DIT(dims, routing=Sprint(1, 1, drop=0.2))),
        objective,
        losses=[Alignment(Patches, "transformer_blocks.0", "tokens", MLPHead(8))],
    ).train()
    made.loss_terms[0].prepare()
    found = []
    for chosen in ([], callbacks):
        for callback in chosen:
            callback.setup(trainer(tmp_path), made, "fit")
            callback.on_fit_start(trainer(tmp_path), made)
        made.zero_grad()
        losses = made.losses(BATCH, SampleNoise(0, BATCH["key"]))
        losses["loss"].backward()
        found.append({**losses, **{name: p.grad for name, p in made.named_parameters()}})
    assert "Compile: training goes on without it" not in capsys.readouterr().err
    assert all(value is not None and value.any() for value in found[0].values())
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(("block", "later"), [("transformer_blocks.1", "transformer_blocks.2")])
def test_gradients_reach_the_projector_and_blocks_up_to_that_one(block, later):
    model = stage(block, DIT)
    nn.init.normal_(model.denoiser.proj_out.weight)
    losses = model.losses(BATCH, SampleNoise(0, BATCH["key"]))
    names = [name for name, _ in model.named_parameters()]
    found = torch.autograd.grad(losses["alignment"], list(model.parameters()), allow_unused=True)
    reached = {name for name, gradient in zip(names, found, strict=True) if gradient is not None}
    assert any(name.startswith(f"denoiser.{block}.") for name in reached)
    assert not any(name.startswith((f"denoiser.{later}.", "denoiser.proj_out")) for name in reached)
    assert {name for name in names if name.startswith("terms.")} <= reached
    assert not any("conv" in name for name in names if name.startswith("terms.0._"))  # frozen


@pytest.mark.parametrize("block", BLOCKS)
def test_with_weight_0_training_is_that_without(block):
    model, plain = stage(block, BLOCKS[block], weight=0.0), stage(block, BLOCKS[block], weight=0.0)
    model.losses(BATCH, SampleNoise(0, BATCH["key"]))["loss"].backward()
    plain.losses(BATCH, SampleNoise(0, BATCH["key"]))["denoising"].backward()
    for ours, theirs in zip(model.denoiser.parameters(), plain.denoiser.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=0)


def test_a_mean_that_all_positions_share_does_not_count_with_a_convolution():
    head, features = ConvHead(), torch.randn(2, 5, 4, 4)
    target = head.target(features)
    torch.testing.assert_close(head.target(3 * features + 7), target, rtol=1e-4, atol=1e-4)
    assert target.mean((2, 3)).abs().max() < 1e-5
    assert head.projector(8, 5)(torch.zeros(1, 8, 4, 4)).shape == (1, 5, 4, 4)


def test_after_stop_nothing_is_aligned_and_the_projector_stays():
    model = stage("transformer_blocks.0", DIT, stop=4)
    assert "alignment" in model.losses(BATCH, SampleNoise(0, BATCH["key"]))
    model.progress = Progress(1, 4)
    losses = model.losses(BATCH, SampleNoise(0, BATCH["key"]))
    assert "alignment" not in losses and torch.equal(losses["loss"], losses["denoising"])
    losses["loss"].backward()  # all processes know of all parameters
    assert all(not weight.grad.any() for weight in model.terms.parameters())


def test_validation_and_sampling_keep_no_hidden_states():
    model = stage("transformer_blocks.0", DIT).eval()
    assert set(model.losses(BATCH, SampleNoise(0, BATCH["key"]))) == {"loss"}
    assert model._hidden.take(16, 16) == {}
    assert model.reads(()) == ("image",)


@pytest.mark.parametrize(
    ("build", "block", "says"),
    [
        (
            DIT,
            "transformer_blocks.9",
            "the denoiser DiT has no block 'transformer_blocks.9', expected such as tran",
        ),
        (UNET, "middle", "the denoiser UNet has no block 'middle', expected such as"),
        (UNET, "mid_block", "the block 'mid_block' of the denoiser has no hidden states of its own"),
    ],
)
def test_a_block_that_is_not_there_is_one_clear_line(build, block, says):
    with pytest.raises(ValueError, match=says):
        Diffusion(Pixels(), Unconditional(), build, losses=[Alignment(Patches, block)])


@pytest.mark.parametrize("patch", [2, 3])
def test_channels_are_found_without_computing(patch):
    dims = DenoiserDims(3, tokens=7, vector=5, spatial=2)
    network = DIT(dims, patch_size=patch)
    hidden = HiddenStates(network, ["transformer_blocks.0", "transformer_blocks.2"])
    before = {name: value.clone() for name, value in network.state_dict().items()}
    assert hidden.channels(dims) == {"transformer_blocks.0": 16, "transformer_blocks.2": 16}
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert network.training and {p.device.type for p in network.parameters()} == {"cpu"}


def test_a_trained_model_needs_no_extractor():
    model = stage("transformer_blocks.0", DIT)
    state = {"state_dict": model.state_dict()}
    model.on_save_checkpoint(state)
    again = Diffusion(
        Pixels(), Unconditional(), DIT, losses=[Alignment(Patches, "transformer_blocks.0", head=MLPHead(8))]
    )
    again.load_state_dict(state["state_dict"], strict=True)
    assert again.loss_terms[0]._maps is None
    names = {name for name in state["state_dict"] if name.startswith("terms.")}
    assert len(names) == 6 and not names & set(again.averaged_parameters())
