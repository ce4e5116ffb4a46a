"""open_clip's and timm's networks from local files compute what they do in their own libraries."""

import json

import open_clip
import pytest
import timm
import torch
from PIL import Image

from ldm.io.images import from_bytes
from ldm.io.weights import sha256
from ldm.metrics.extractors.clip import CLIPExtractor, Embedding, OpenCLIP
from ldm.metrics.extractors.dino import DINOv2

CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "patch_size": 8, "head_width": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A folder as open_clip writes them, a file of weights, and the model."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    model = open_clip.CLIP(**CONFIG).eval()
    config = {"model_cfg": CONFIG, "preprocess_cfg": {"mean": MEAN, "std": STD, "size": 32}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, folder / "train.pt")
    return folder, model


def images(size, count=3):
    generator = torch.Generator().manual_seed(size)
    return torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)


def test_open_clip_from_a_folder_embeds_as_its_own_preprocessing(clip):
    folder, model = clip
    mine = OpenCLIP(str(folder), str(folder / "train.pt"))
    preprocess = open_clip.image_transform(32, is_train=False, mean=MEAN, std=STD)
    pixels = images(32)
    shown = torch.stack([preprocess(Image.fromarray(p.permute(1, 2, 0).numpy())) for p in pixels])
    with torch.no_grad():
        expected = model.encode_image(shown)
        words = model.encode_text(open_clip.get_tokenizer("ViT-B-32")(["a red ring", "blue"]), normalize=True)
    torch.testing.assert_close(mine.image_features(from_bytes(pixels)), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mine.encode_text(["a red ring", "blue"]), words, rtol=1e-4, atol=1e-6)


def test_open_clip_resizes_nearly_as_pillow_does(clip):
    folder, model = clip
    mine = OpenCLIP(str(folder), str(folder / "open_clip_pytorch_model.bin"))
    preprocess = open_clip.image_transform(32, is_train=False, mean=MEAN, std=STD)
    pixels = images(80)
    shown = torch.stack([preprocess(Image.fromarray(p.permute(1, 2, 0).numpy())) for p in pixels])
    with torch.no_grad():
        expected = model.encode_image(shown)
    # Pillow rounds to integers after resizing
    torch.testing.assert_close(mine.image_features(from_bytes(pixels)), expected, rtol=0.02, atol=0.02)


def test_a_record_names_the_file_by_its_hash(clip):
    folder, _ = clip
    metadata = CLIPExtractor(OpenCLIP(str(folder), str(folder / "train.pt"))).metadata()
    assert metadata["weights_sha256"] == sha256(folder / "train.pt")
    assert "open_clip" in metadata["implementation"] and metadata["resize"].endswith("to 32")


def test_a_record_of_any_module_hashes_its_weights():
    class Net(torch.nn.Linear):
        def image_features(self, image):
            return self(image.mean((2, 3)))

    one, other = Net(3, 4), Net(3, 4)
    hashes = [Embedding(net, "x").metadata()["weights_sha256"] for net in (one, one, other)]
    assert hashes[0] == hashes[1] != hashes[2]


def test_wrong_names_and_files_are_one_clear_line(clip, tmp_path):
    folder, _ = clip
    with pytest.raises(FileNotFoundError, match=r"nowhere.pt' of open_clip's ViT-B-32 does not exist"):
        OpenCLIP("ViT-B-32", str(tmp_path / "nowhere.pt"))
    with pytest.raises(ValueError, match="open_clip knows no 'ViT-Z-99'"):
        OpenCLIP("ViT-Z-99", str(folder / "train.pt"))
    with pytest.raises(ValueError, match="needs hf_tokenizer_name 'timm/ViT-B-16-SigLIP' from the network"):
        OpenCLIP("ViT-B-16-SigLIP", str(folder / "train.pt"))
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(
        ValueError, match=r"other.pt': 38 of 38 weights missing \(.*; 1 weights not expected \(a\)"
    ):
        OpenCLIP(str(folder), str(tmp_path / "other.pt"))
    (tmp_path / "page.pt").write_text("<html>not found</html>")
    with pytest.raises(ValueError, match=r"page.pt': a web page, not the file itself"):
        OpenCLIP(str(folder), str(tmp_path / "page.pt"))
    (tmp_path / "open_clip_config.json").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match=r"open_clip_config.json': a Git LFS pointer"):
        OpenCLIP(str(tmp_path), str(folder / "train.pt"))


def test_dinov2_is_timms_class_token(tmp_path):
    name = "test_vit"
    torch.manual_seed(0)
    net = timm.create_model(name, pretrained=False, num_classes=0, img_size=32, global_pool="token").eval()
    torch.save(net.state_dict(), tmp_path / "vit.pth")
    mine = DINOv2(str(tmp_path / "vit.pth"), model=name, size=32)
    pixels = images(32)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    shown = (pixels / 255.0 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    with torch.no_grad():
        expected = net.forward_features(shown)[:, 0]
    seen = mine(from_bytes(pixels), {}, {"features"})["features"]
    torch.testing.assert_close(seen, expected, rtol=1e-4, atol=1e-5)
    assert mine.metadata()["weights_sha256"] == sha256(tmp_path / "vit.pth")
    with pytest.raises(FileNotFoundError, match=r"nowhere.pth' of timm's test_vit does not exist"):
        DINOv2(str(tmp_path / "nowhere.pth"), model=name)
