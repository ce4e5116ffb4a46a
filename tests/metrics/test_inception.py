"""The numbers of the Inception network are those of other programs on the same images and weights."""

import pytest
import torch

from ldm.io.weights import sha256
from ldm.metrics.extractors.inception import Inception


@pytest.mark.slow
def test_all_numbers_agree_with_torch_fidelity_and_torchmetrics(agreement):
    assert {row.name for row in agreement} >= {"fid/inception", "is/inception", "kid/inception"}
    for row in agreement:
        assert row.difference < 1e-5, row
    varied = {row.name: row.ours for row in agreement}
    assert varied["is/inception"] > 1.01 and varied["fid/inception"] > 0.1


@pytest.mark.slow
def test_views_are_the_published_layers(inception_file):
    net = Inception(inception_file)
    kept = {}
    net.net.Mixed_6d.branch1x1.register_forward_hook(lambda module, given, out: kept.update(first=out))
    pixels = torch.randint(0, 256, (1, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    seen = net(pixels / 127.5 - 1.0, {}, net.views)
    assert {view: rows.shape[1] for view, rows in seen.items()} == {
        "features": 2048,
        "spatial": 2023,
        "logits": 1008,
    }
    # sFID: the first 7 channels of mixed_6's first convolution, the channel last
    spatial = seen["spatial"].view(17, 17, 7)
    assert torch.equal(spatial[3, 5], kept["first"][0, :7, 3, 5])
    torch.testing.assert_close(seen["logits"], seen["features"] @ net.net.fc.weight.T)
    assert net.metadata()["weights_sha256"] == sha256(inception_file)


def test_missing_and_wrong_weights_are_one_clear_line(tmp_path):
    with pytest.raises(
        FileNotFoundError, match="nothing is downloaded: get it from torch-fidelity's release"
    ):
        Inception(str(tmp_path / "nowhere.pth"))
    torch.save({"fc.weight": torch.zeros(1000, 2048)}, tmp_path / "torchvision.pth")
    with pytest.raises(
        ValueError, match="has 1 tensors that do not fit, expected the 566 of torch-fidelity's"
    ):
        Inception(str(tmp_path / "torchvision.pth"))


def test_a_pickle_that_would_run_something_is_refused(tmp_path):
    class Runs:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"fc.weight": Runs()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match=r"evil.pth' hold 'fc.weight', expected tensors by name"):
        Inception(str(tmp_path / "evil.pth"))
    assert not (tmp_path / "ran").exists()
