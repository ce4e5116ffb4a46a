"""Gradients of distances in features of DINOv2 and open_clip are those of their own libraries' graphs."""

import json
from functools import partial

import open_clip
import pytest
import timm
import torch
from torch.nn import functional as F

from ldm.losses import FeatureDistance
from ldm.metrics.extractors.clip import OpenCLIP
from ldm.metrics.extractors.dino import IMAGE_MEAN, IMAGE_STD, DINOv2

MODEL = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "patch_size": 8, "head_width": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


def dino(folder):
    torch.manual_seed(0)
    options = {"num_classes": 0, "img_size": 32, "global_pool": "token"}
    net = timm.create_model("test_vit", pretrained=False, **options).eval()
    torch.save(net.state_dict(), folder / "vit.pth")
    return partial(DINOv2, str(folder / "vit.pth"), "test_vit", 32), net, (IMAGE_MEAN, IMAGE_STD)


def clip(folder):
    torch.manual_seed(0)
    net = open_clip.CLIP(**MODEL).eval()
    statistics = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
    preprocess = {"mean": statistics[0], "std": statistics[1], "size": 32}
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": MODEL, "preprocess_cfg": preprocess})
    )
    torch.save(net.state_dict(), folder / "open_clip_pytorch_model.bin")
    return (
        partial(OpenCLIP, str(folder), str(folder / "open_clip_pytorch_model.bin")),
        net.encode_image,
        statistics,
    )


@pytest.mark.parametrize("kind", [dino, clip])
def test_the_gradient_of_the_image(kind, tmp_path):
    build, describe, (mean, std) = kind(tmp_path)
    made, real = torch.rand(2, 2, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    made.requires_grad_()

    def features(image):
        shown = ((image + 1) / 2 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
        return describe(shown)

    cosine = F.cosine_similarity(features(made), features(real).detach())
    (expected,) = torch.autograd.grad((2 - 2 * cosine).sum(), made)
    term = FeatureDistance(build, reduction="mean")
    found = term({"image": real}, {"image": made})
    torch.testing.assert_close(found, 2 - 2 * cosine, rtol=1e-4, atol=1e-6)
    found.sum().backward()
    assert expected.abs().max() > 1e-5
    torch.testing.assert_close(made.grad, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    assert not list(term.parameters()) and not term.state_dict()
