"""LPIPS as a loss: the lpips package's distance with the same weights, and its gradient."""

import sys
from pathlib import Path

import pytest
import torch

from ldm.io.weights import read_weights
from ldm.losses import LPIPS
from ldm.nets.lpips import LPIPSNet


@pytest.fixture(scope="module", params=["alex", pytest.param("vgg", marks=pytest.mark.slow)])
def package(request, tmp_path_factory):
    """The lpips package's network with random weights, and files of them in the published formats."""
    lpips = pytest.importorskip("lpips", reason="pip install lpips")
    torch.manual_seed(0)
    net = lpips.LPIPS(net=request.param, pnet_rand=True, verbose=False)
    for head in net.lins:
        torch.nn.init.uniform_(head.model[-1].weight)
    folder = tmp_path_factory.mktemp(request.param)
    trunk = {f"features.{k.split('.', 1)[1]}": v for k, v in net.net.state_dict().items()}
    torch.save({**trunk, "classifier.6.bias": torch.zeros(1000)}, folder / "trunk.pth")
    torch.save(
        {f"lin{i}.model.1.weight": h.model[-1].weight.data for i, h in enumerate(net.lins)},
        folder / "heads.pth",
    )
    return request.param, net, folder


def images(size=64):
    return torch.rand(2, 3, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_it_is_the_packages_distance_and_gradient(package):
    name, net, folder = package
    made, real = images()
    ours, theirs = (made.clone().requires_grad_() for _ in range(2))
    term = LPIPS(str(folder / "trunk.pth"), net=name, heads=str(folder / "heads.pth"), reduction="mean")
    found, expected = term({"image": real}, {"image": ours}), net(theirs, real).flatten()
    assert torch.allclose(found, expected, rtol=1e-6, atol=1e-6) and found.min() > 1e-3
    found.sum().backward()
    expected.sum().backward()
    assert (ours.grad - theirs.grad).norm() < 1e-5 * theirs.grad.norm()
    assert not term.state_dict() and not list(term.parameters())  # no checkpoint holds it


def test_a_sum_counts_it_for_every_value_of_the_image(package):
    name, _, folder = package
    made, real = images(32)
    mean, total = (
        LPIPS(str(folder / "trunk.pth"), net=name, reduction=kind)({"image": real}, {"image": made})
        for kind in ("mean", "sum")
    )
    assert torch.allclose(total, mean * 3 * 32 * 32)


def test_the_default_heads_are_the_packages_own(package):
    name, _, folder = package
    own = read_weights(Path(sys.modules["lpips"].__file__).parent / f"weights/v0.1/{name}.pth")
    net = LPIPSNet(str(folder / "trunk.pth"), name)
    for i in range(5):
        assert torch.equal(net.get_buffer(f"head{i}"), own[f"lin{i}.model.1.weight"][0])


def test_its_gradient_is_finite_where_features_vanish(package):
    name, _, folder = package
    term = LPIPS(str(folder / "trunk.pth"), net=name)
    flat = torch.full((1, 3, 32, 32), -1.0, requires_grad=True)
    loss = term({"image": images(32)[1][:1]}, {"image": flat})
    loss.sum().backward()
    assert flat.grad.isfinite().all() and flat.grad.abs().sum() > 0
    same = images(32)[0].requires_grad_()
    term({"image": same.detach()}, {"image": same}).sum().backward()
    assert not same.grad.any()


def test_missing_files_are_named_when_training_starts_and_not_before(tmp_path):
    term = LPIPS(str(tmp_path / "vgg16.pth"))
    with pytest.raises(
        FileNotFoundError, match=r"LPIPS needs torchvision's vgg16-397923af.pth, .*vgg16.pth' does not"
    ):
        term.prepare()
