"""Metrics that look at images themselves: values known by hand."""

import pytest
import torch
from torch import nn
from torchmetrics.functional.image.lpips import _LPIPS

from ldm.distributed.group import SingleProcess
from ldm.evaluation.session import Measurement
from ldm.metrics.extractors.clip import CLIPExtractor, Embedding, Features, ImageText
from ldm.metrics.feature_metrics import FeatureMetrics
from ldm.metrics.frechet import Frechet
from ldm.metrics.lpips import LPIPS
from ldm.metrics.metric import ReferenceInfo
from ldm.metrics.psnr import PSNR
from ldm.metrics.ssim import SSIM
from ldm.metrics.zero_shot import ZeroShot

COLOURS = ["red", "green", "blue"]


class Colours(nn.Module):
    """An image's vector is its mean colour; a caption's, the axis of the colour that it ends with."""

    def image_features(self, image):
        return image.mean((2, 3))

    def encode_text(self, text):
        return torch.eye(3)[[COLOURS.index(words.split()[-1]) for words in text]]


def flat_images(*colours):
    return torch.tensor(colours).view(-1, 3, 1, 1).expand(-1, 3, 16, 16)


def value_of(metric, images, batch):
    metric.begin(ReferenceInfo(), SingleProcess())
    for part in (slice(0, 1), slice(1, None)):
        metric.update(images[part], {name: field[part] for name, field in batch.items()})
    metric.sync(SingleProcess())
    return metric.compute()


def test_psnr_is_the_mean_over_images():
    image = torch.zeros(2, 3, 16, 16)
    off = torch.tensor([0.2, 0.02]).view(2, 1, 1, 1)
    # 10 log10(2^2 / error^2) = 20 and 40 dB
    assert value_of(PSNR(), image + off, {"image": image})["psnr"] == pytest.approx(30, rel=1e-5)
    assert PSNR().compute() == {}


def test_ssim_of_flat_images_is_the_luminance_term():
    a, b = 0.75, 0.375  # in [0, 1]
    expected = (2 * a * b + 0.01**2) / (a**2 + b**2 + 0.01**2)
    images, real = flat_images([0.5] * 3, [0.5] * 3), flat_images([-0.25] * 3, [0.5] * 3)
    assert value_of(SSIM(), images, {"image": real})["ssim"] == pytest.approx((expected + 1) / 2, rel=1e-4)


def test_ssim_of_an_inverted_image_is_negative():
    image = 0.5 * torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert value_of(SSIM(), -image, {"image": image})["ssim"] < -0.5


@pytest.fixture(scope="module")
def alexnet(tmp_path_factory):
    from torchvision.models import alexnet

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "alexnet.pth"
    net = alexnet(weights=None)
    torch.save(net.state_dict(), path)
    return str(path), net


def test_lpips_has_the_network_of_the_file_and_the_published_linear_layers(alexnet):
    path, net = alexnet
    made, real = torch.rand(2, 2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    metric = LPIPS(path)
    mine = value_of(metric, made, {"image": real})["lpips"]
    # by hand: unit features of every stage, squared differences weighted, averaged over places
    linear = _LPIPS(net="alex", pnet_rand=True)
    total = 0.0
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    x, y = ((z - shift.view(3, 1, 1)) / scale.view(3, 1, 1) for z in (made, real))
    stages = iter(linear.lins)
    with torch.no_grad():
        for layer in net.features[:12]:
            x, y = layer(x), layer(y)
            if isinstance(layer, nn.ReLU):
                one, other = (nn.functional.normalize(z, dim=1) for z in (x, y))
                total += next(stages).model[-1]((one - other) ** 2).mean()
    assert mine == pytest.approx(float(total), rel=1e-4) and mine > 1e-4
    assert value_of(LPIPS(path), real, {"image": real})["lpips"] == 0.0
    assert len(metric.metadata("lpips")["weights_sha256"]) == 64


def test_lpips_takes_grey_as_rgb_and_refuses_four_channels(alexnet):
    metric = LPIPS(alexnet[0])
    one, other = torch.rand(2, 2, 1, 64, 64) * 2 - 1
    as_rgb = metric.measure(one.repeat(1, 3, 1, 1), {"image": other.repeat(1, 3, 1, 1)})
    assert torch.equal(metric.measure(one, {"image": other}), as_rgb)
    with pytest.raises(ValueError, match="LPIPS: takes images of 3 channels, or grey, got 4: leave it out"):
        metric.measure(one.repeat(1, 4, 1, 1), {"image": other.repeat(1, 4, 1, 1)})


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_psnr_and_ssim_of_any_channels_tell_16_bits_apart(channels):
    image = torch.rand(2, channels, 16, 16, dtype=torch.float64) - 0.5
    off = image + 2 / 65535  # one level: 20 log10(65535) dB
    assert value_of(PSNR(), off, {"image": image})["psnr"] == pytest.approx(96.33, abs=0.01)
    assert value_of(SSIM(), image, {"image": image})["ssim"] == pytest.approx(1.0)
    assert 0.999 < value_of(SSIM(), off, {"image": image})["ssim"] < 1.0


class Means(nn.Module):
    """An image's vector is the mean of each channel."""

    def __init__(self, channels=None):
        super().__init__()
        if channels is not None:
            self.image_channels = channels

    def image_features(self, image):
        return image.mean((2, 3))


def measured(network, images):
    metrics = [FeatureMetrics(Embedding(network, "means"), [Frechet()]), PSNR()]
    batch = {"key": ["a", "b", "c"], "index": torch.arange(3), "image": images.flip(0)}
    run = Measurement(metrics, SingleProcess(), torch.device("cpu"))
    run.begin(ReferenceInfo())
    run.update_real(batch)
    run.update(images, batch)
    return {value.name: value.value for value in run.finish()}, run.failures


@pytest.mark.filterwarnings("ignore:fid")
def test_networks_that_know_rgb_get_grey_as_such_and_others_their_channels():
    grey = torch.rand(3, 1, 8, 8) * 2 - 1
    assert measured(Means(), grey) == measured(Means(), grey.repeat(1, 3, 1, 1))
    four = torch.rand(3, 4, 8, 8) * 2 - 1
    found, failures = measured(Means(), four)
    assert found.keys() == {"psnr"} and len(failures) == 1
    assert "means: takes images of 3 channels, or grey, got 4: leave it out, or name a network" in failures[0]
    found, failures = measured(Means(channels=4), four)
    assert found.keys() == {"psnr", "fid/means"} and not failures


def test_lpips_of_another_network_or_without_a_file_is_one_clear_line(alexnet, tmp_path):
    with pytest.raises(ValueError, match=r"lacks 2. of 26 tensors of vgg.*vgg16-397923af.pth"):
        LPIPS(alexnet[0], net="vgg")
    with pytest.raises(
        FileNotFoundError, match=r"nowhere.pth' do not exist, expected a local file; nothing is downloaded"
    ):
        LPIPS(str(tmp_path / "nowhere.pth"))


def test_clips_views_are_unit_vectors_and_a_clamped_cosine():
    assert isinstance(Colours(), Features) and isinstance(Colours(), ImageText)
    images = flat_images([2.0, 0.0, 0.0], [0.6, 0.8, 0.0], [0.0, 0.0, -1.0])
    batch = {"text": ["red", "green", "blue"]}
    seen = CLIPExtractor(Colours())(images, batch, {"features", "agreement"})
    assert seen["embedding"][0].tolist() == [1.0, 0.0, 0.0]
    assert seen["agreement"].flatten().tolist() == pytest.approx([1.0, 0.8, 0.0], rel=1e-6)
    assert len(set(seen["caption"].tolist())) == 3
    with pytest.raises(ValueError, match=r"clip: the samples have \['image', 'key'\], expected 'text'"):
        CLIPExtractor(Colours())(images, {"key": [], "image": images}, {"agreement"})


def test_zero_shot_accuracy_counts_the_nearest_class_names():
    images = flat_images([1.0, 0.2, 0.0], [0.9, 1.0, 0.5], [0.5, 0.9, 0.8])
    batch = {"label": torch.tensor([0, 0, 2])}
    metric = ZeroShot(Colours(), COLOURS, ("a photo of {}", "{}"), ks=(1, 2, 5))
    assert value_of(metric, images, batch) == {
        "zero_shot@1": pytest.approx(1 / 3),
        "zero_shot@2": pytest.approx(1.0),
    }


def test_zero_shot_refuses_labels_that_are_no_class():
    metric = ZeroShot(Colours(), COLOURS)
    for label in (-1, 3):
        with pytest.raises(ValueError, match=r"the samples have labels .*, expected one of 3 classes"):
            metric.update(flat_images([1.0] * 3), {"label": torch.tensor([0, label])})
    with pytest.raises(ValueError, match="the samples have no label"):
        metric.update(flat_images([1.0] * 3), {})


def test_zero_shot_takes_templates_as_they_are_but_not_none():
    assert ZeroShot(Colours(), COLOURS, ["{x} {}"])._head("red").isfinite().all()
    for given in ({"classes": [], "templates": ["{}"]}, {"classes": COLOURS, "templates": []}):
        with pytest.raises(ValueError, match="got none, expected one at least"):
            ZeroShot(Colours(), **given)


def test_a_file_of_classes_may_begin_with_a_byte_order_mark(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_text("\n".join(COLOURS), encoding="utf-8-sig")
    assert ZeroShot(Colours(), str(path)).classes == list(COLOURS)
