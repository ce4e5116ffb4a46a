"""Several conditions at once."""

import pytest
import torch
from torch import nn

from ldm.conditioners.base import Conditioner
from ldm.conditioners.composite import Composite
from ldm.conditioners.inpainting import Inpainting
from ldm.conditioners.label import ClassLabel
from ldm.conditioners.layout import Layout
from ldm.conditioners.semantic import SemanticMap
from ldm.conditioners.super_resolution import SuperResolution
from ldm.latents.space import Pixels
from ldm.nets.unet import UNet
from ldm.rng import SampleNoise
from ldm.stages.diffusion import Diffusion
from ldm.types import Cond


class Letters(Conditioner):
    """A token per letter, all attended to."""

    reads = ("text",)

    def __init__(self, width, dropout=0.0):
        super().__init__(dropout)
        self.token_width = width
        self.letters = nn.Embedding(128, width)

    def forward(self, batch):
        codes = torch.tensor([[ord(c) for c in text.ljust(6)[:6]] for text in batch["text"]])
        return Cond(tokens=self.letters(codes))

    def null(self, batch):
        return self({**batch, "text": [""] * len(batch["key"])})


def batch(n=3):
    generator = torch.Generator().manual_seed(0)
    return {
        "key": [f"k{i}" for i in range(n)],
        "image": torch.rand(n, 3, 8, 8, generator=generator) * 2 - 1,
        "text": [f"caption {i}" for i in range(n)],
        "label": torch.arange(n) % 3,
        "mask": (torch.rand(n, 1, 8, 8, generator=generator) > 0.5).float(),
        "low_res": torch.rand(n, 3, 2, 2, generator=generator) * 2 - 1,
        "label_map": torch.randint(0, 5, (n, 8, 8), generator=generator),
        "layout": [torch.tensor([[0, 0.1, 0.1, 0.5, 0.5]])] * n,
    }


def everything(dropout=0.0, outer=0.0):
    torch.manual_seed(0)
    conditioners = [
        Letters(16, dropout),
        ClassLabel(3, 8, dropout),
        SemanticMap(5, 2, dropout),
        Layout(3, 16, max_boxes=2, num_heads=2, dropout=dropout),
        Inpainting(dropout),
    ]
    composite = Composite(conditioners, outer)
    composite.bind(Pixels())
    return composite, conditioners


def test_fields_are_joined_in_order():
    composite, conditioners = everything()
    cond, single = composite(batch()), [conditioner(batch()) for conditioner in conditioners]
    assert torch.equal(cond.tokens, torch.cat([single[0].tokens, single[3].tokens], 1))
    assert torch.equal(cond.mask, torch.cat([torch.ones(3, 6, dtype=torch.bool), single[3].mask], 1))
    assert torch.equal(cond.vector, single[1].vector)
    assert torch.equal(cond.spatial, torch.cat([single[2].spatial, single[4].spatial], 1))
    assert composite.reads == ("text", "label", "label_map", "layout", "image", "mask")
    assert (composite.token_width, composite.vector_width, composite.spatial_channels) == (16, 8, 2 + 1 + 3)


def test_vectors_are_added():
    conditioners = [ClassLabel(3, 8), ClassLabel(3, 8)]
    expected = conditioners[0](batch()).vector + conditioners[1](batch()).vector
    assert torch.equal(Composite(conditioners)(batch()).vector, expected)


def test_one_alone_is_itself():
    conditioner = Letters(16, dropout=0.4)
    data = batch(8)
    composite = Composite([conditioner])
    for found, expected in [
        (composite(data), conditioner(data)),
        (composite.null(data), conditioner.null(data)),
        (composite.dropped(data, noise(data)), conditioner.dropped(data, noise(data))),
    ]:
        assert torch.equal(found.tokens, expected.tokens) and found.mask is None


def noise(data):
    return SampleNoise(0, data["key"])


def dropped(composite, data):
    """(4, B) bool: which samples lost their letters, label, map and layout."""
    cond, null = composite.dropped(data, noise(data)), composite.null(data)
    return torch.stack(
        [
            (cond.tokens[:, :6] == null.tokens[:, :6]).flatten(1).all(1),
            (cond.vector == null.vector).all(1),
            (cond.spatial[:, :2] == null.spatial[:, :2]).flatten(1).all(1),
            (cond.mask[:, 6:] == null.mask[:, 6:]).all(1),
        ]
    )


def test_each_drops_out_at_its_own_rate_and_independently():
    composite, _ = everything(dropout=0.4)
    lost = dropped(composite, batch(2500)).float()
    assert (lost.mean(1) - 0.4).abs().max() < 4 * (0.24 / 2500) ** 0.5
    correlations = torch.corrcoef(lost) - torch.eye(4)
    assert correlations.abs().max() < 4 / 2500**0.5


def test_the_outer_dropout_takes_everything_at_once():
    composite, _ = everything(outer=0.3)
    lost = dropped(composite, batch(2500))
    assert (lost == lost[0]).all()
    assert abs(lost[0].float().mean() - 0.3) < 4 * (0.21 / 2500) ** 0.5


def test_guidance_leaves_alone_what_training_never_drops():
    data = batch()
    letters, hole = Letters(16, dropout=0.1), Inpainting()

    def null(*conditioners, dropout=0.0):
        composite = Composite(list(conditioners), dropout)
        composite.bind(Pixels())
        return composite.null(data)

    assert torch.equal(null(letters, hole).spatial, hole(data).spatial)
    assert torch.equal(null(letters, hole).tokens, letters.null(data).tokens)
    assert torch.equal(null(letters, hole, dropout=0.1).spatial, hole.null(data).spatial)
    assert torch.equal(null(Letters(16), hole).spatial, hole.null(data).spatial)
    assert torch.equal(null(Composite([letters, ClassLabel(3)]), hole).spatial, hole(data).spatial)


def test_different_token_widths_need_a_projection():
    conditioners = [Letters(16), Layout(3, 8, num_heads=2)]
    with pytest.raises(ValueError, match=r"tokens have widths \[16, 8\].*set conditioner\.token_width"):
        Composite(conditioners)
    composite = Composite([*conditioners, ClassLabel(3, 8)], token_width=12)
    cond = composite(batch())
    assert cond.tokens.shape == (3, 6 + 17, 12) and composite.token_width == 12
    cond.tokens.square().sum().backward()
    assert len([p for p in composite.projections.parameters() if p.grad.abs().sum() > 0]) == 2


def test_incompatible_conditioners_are_refused_by_name():
    with pytest.raises(ValueError, match=r"vectors of widths \[8, 4\] cannot be added"):
        Composite([ClassLabel(3, 8), ClassLabel(3, 4)])
    with pytest.raises(ValueError, match=r"conditioner\.conditioners is empty"):
        Composite([])
    maps = Composite([Inpainting(), SuperResolution(scale=2)])
    maps.bind(Pixels())
    with pytest.raises(ValueError, match=r"maps have sizes \[\(8, 8\), \(4, 4\)\]"):
        maps(batch())
    with pytest.raises(ValueError, match=r"label 3 is no class"):
        Composite([Letters(8), ClassLabel(3)]).check_values({**batch(), "label": torch.tensor([0, 3, 0])})


def test_the_stage_trains_every_conditioner_and_draws():
    composite, _ = everything(dropout=0.5)

    def unet(widths):
        return UNet(widths, [8, 8], 1, [True, True], num_heads=2, norm_groups=4)

    stage, data = Diffusion(Pixels(), composite, unet), batch(16)
    stage.losses(data, noise(data))["loss"].backward()
    missing = [n for n, p in composite.named_parameters() if p.grad is None or not p.grad.any()]
    assert missing == []
    stage.eval().sampler.num_steps = 2
    assert torch.isfinite(stage.generate(data, 0)).all()


def test_with_and_without_condition_in_one_pass_is_each_alone():
    torch.manual_seed(0)
    composite, _ = everything(dropout=0.5)

    def unet(widths):
        return UNet(widths, [8, 8], 1, [True, True], num_heads=2, norm_groups=4)

    stage, data = Diffusion(Pixels(), composite, unet).eval(), batch()
    for p in stage.denoiser.parameters():
        torch.nn.init.normal_(p, std=0.2)  # some begin as zeros, which would hide a condition
    x_t, t = torch.randn(3, 3, 8, 8), torch.tensor([10, 500, 990])
    with torch.no_grad():
        cond, uncond = stage.estimates().cond_and_uncond(data)(x_t, t)
        torch.testing.assert_close(cond, stage.cond(data)(x_t, t), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(uncond, stage.estimates().uncond(data)(x_t, t), rtol=1e-4, atol=1e-4)
    assert (cond - uncond).abs().mean() > 0.1
