"""CLIP stages in open_clip's hands, and open_clip's models in ours."""

import json

import numpy as np
import open_clip
import pytest
import torch
from clip_tokens import text_tokens
from PIL import Image
from safetensors.torch import load_file, save_file

from ldm.conditioners.text import CLIPText
from ldm.interop.open_clip import clip_arguments, export_clip, import_clip
from ldm.io.checkpoint import Checkpoint, header
from ldm.stages.clip import CLIP
from ldm.stages.load import CLIPTower, build_stage, load_stage

OPENAI_MEAN, OPENAI_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
CAPTIONS = ["a cat", "", "one two three four five six seven eight nine ten"]
VIT = {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8}
RESNET = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 32}
TEXT = {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}
MODELS = [
    {"embed_dim": 16, "vision_cfg": VIT, "text_cfg": TEXT},
    {"embed_dim": 12, "vision_cfg": VIT, "text_cfg": TEXT, "quick_gelu": True},
    {"embed_dim": 16, "vision_cfg": RESNET, "text_cfg": TEXT, "quick_gelu": True},
    {"embed_dim": 16, "vision_cfg": VIT, "text_cfg": TEXT, "init_logit_bias": -10.0},
]
PREPROCESS = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}


def open_clip_model(config):
    torch.manual_seed(0)
    apart = config.get("custom_text", False)
    kind = open_clip.CustomTextCLIP if apart else open_clip.CLIP
    model = kind(**{key: value for key, value in config.items() if key != "custom_text"}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def config_file(folder, config, preprocess=None):
    path = folder / "open_clip_config.json"
    path.write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess or {}}))
    return path


def random_image(size):
    pixels = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return Image.fromarray(pixels), torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1


APART = [
    {"embed_dim": 16, "vision_cfg": VIT, "text_cfg": TEXT, "custom_text": True},
    {"embed_dim": 12, "vision_cfg": VIT, "text_cfg": {**TEXT, "proj_bias": True}, "custom_text": True},
]


@pytest.mark.parametrize("config", [*MODELS, *APART])
def test_we_compute_the_embeddings_of_their_model(config, tmp_path):
    theirs = open_clip_model(config)
    torch.save(theirs.state_dict(), tmp_path / "weights.pt")
    path = import_clip(tmp_path / "weights.pt", config_file(tmp_path, config, PREPROCESS), tmp_path / "run")
    ours = load_stage(str(path), CLIP)
    size = config["vision_cfg"]["image_size"]
    pil, image = random_image(size)
    preprocess = open_clip.image_transform(size, is_train=False, **PREPROCESS)
    with torch.no_grad():
        expected = theirs.encode_image(preprocess(pil)[None], normalize=True)
        assert torch.allclose(ours.encode_image(image), expected, atol=1e-5)
        expected = theirs.encode_text(open_clip.tokenize(CAPTIONS, 8), normalize=True)
        assert torch.allclose(ours.encode_text(CAPTIONS), expected, atol=1e-5)
        found = CLIPTower(str(tmp_path / "run")).encode_text(CAPTIONS)
        assert torch.allclose(found, ours.encode_text(CAPTIONS), atol=1e-5)
        tokens = text_tokens(ours.net, CAPTIONS)
        assert torch.allclose(CLIPText(str(tmp_path / "run"))({"text": CAPTIONS}).tokens, tokens, atol=1e-5)
    assert ours.image_size == size
    build_stage(ours.config).init_from(Checkpoint.open(path, "clip").state)


@pytest.mark.parametrize("config", MODELS)
def test_open_clip_opens_an_export_with_its_statistics_and_embeddings(config, tmp_path):
    net = {
        "class_path": "ldm.nets.clip.CLIPModel",
        "init_args": config | {f"image_{k}": v for k, v in PREPROCESS.items()},
    }
    stage = build_stage({"class_path": "ldm.stages.clip.CLIP", "init_args": {"net": net}}).eval()
    state = {"state_dict": stage.state_dict()}
    stage.on_save_checkpoint(state)
    torch.save(state, tmp_path / "clip.ckpt")
    folder = export_clip(tmp_path / "clip.ckpt", tmp_path / "out")
    theirs, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    theirs.eval()
    normalise = preprocess.transforms[-1]
    assert (list(normalise.mean), list(normalise.std)) == (PREPROCESS["mean"], PREPROCESS["std"])
    pil, image = random_image(stage.net.image_size)
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(CAPTIONS)
    with torch.no_grad():
        found = theirs.encode_text(tokens, normalize=True)
        assert torch.allclose(found, stage.encode_text(CAPTIONS), atol=1e-5)
        found = theirs.encode_image(preprocess(pil)[None], normalize=True)
        assert torch.allclose(found, stage.encode_image(image), atol=1e-5)
    record = json.loads((folder / "ldm.json").read_text())
    assert record["sha256"] == Checkpoint.open(tmp_path / "clip.ckpt").sha256


@pytest.mark.parametrize("config", MODELS)
def test_there_and_back_changes_no_bit(config, tmp_path):
    weights = open_clip_model(config).state_dict()
    save_file(weights, tmp_path / "first.safetensors")
    run = import_clip(
        tmp_path / "first.safetensors", config_file(tmp_path, config, PREPROCESS), tmp_path / "run"
    )
    folder = export_clip(run, tmp_path / "out")
    second = load_file(folder / "open_clip_model.safetensors")
    assert weights.keys() == second.keys()
    assert all(torch.equal(second[k], v) and second[k].dtype == v.dtype for k, v in weights.items())
    again = import_clip(
        folder / "open_clip_model.safetensors", folder / "open_clip_config.json", tmp_path / "again"
    )
    first, last = Checkpoint.open(run).state, Checkpoint.open(again).state
    assert first["config"] == last["config"]
    assert all(torch.equal(v, last["state_dict"][k]) for k, v in first["state_dict"].items())


def test_checkpoints_of_their_training_are_read(tmp_path):
    config, expected = MODELS[0], open_clip_model(MODELS[0]).state_dict()
    torch.save(
        {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in expected.items()}}, tmp_path / "parallel.pt"
    )
    torch.save({f"_orig_mod.{k}": v for k, v in expected.items()}, tmp_path / "compiled.pt")
    vector = expected | {"logit_scale": expected["logit_scale"][None]}
    torch.save(vector | {"input_resolution": torch.tensor(16)}, tmp_path / "openai.pt")
    torch.save({k: v.half() for k, v in expected.items()}, tmp_path / "half.pt")
    for name in ("parallel", "compiled", "openai"):
        path = import_clip(tmp_path / f"{name}.pt", config_file(tmp_path, config), tmp_path / name)
        found = load_stage(str(path), CLIP).net.model.state_dict()
        assert all(torch.equal(found[k].view_as(v), v) for k, v in expected.items()), name
    path = import_clip(tmp_path / "half.pt", config_file(tmp_path, config), tmp_path / "half")
    found = Checkpoint.open(path).state["state_dict"]
    assert all(torch.equal(found[f"net.model.{k}"].view_as(v), v.half().float()) for k, v in expected.items())
    assert all(v.dtype == torch.float32 for v in found.values())


def test_a_known_model_needs_its_name_alone():
    found = clip_arguments("ViT-L-14-quickgelu")
    assert found["embed_dim"] == 768 and found["quick_gelu"] is True
    assert found["text_cfg"] == {
        "context_length": 77,
        "vocab_size": 49408,
        "width": 768,
        "heads": 12,
        "layers": 12,
    }
    assert (tuple(found["image_mean"]), tuple(found["image_std"])) == (OPENAI_MEAN, OPENAI_STD)
    assert clip_arguments("ViT-B/32") == clip_arguments("ViT-B-32")


def test_an_image_tower_of_timm_fetches_nothing(tmp_path):
    vision = {"timm_model_name": "vit_tiny_patch16_224", "timm_model_pretrained": True, "image_size": 32}
    found = clip_arguments(config_file(tmp_path, MODELS[0] | {"vision_cfg": vision}))
    assert found["vision_cfg"] == {"timm_model_name": "vit_tiny_patch16_224", "image_size": 32}


def test_a_bare_configuration_is_read_too(tmp_path):
    (tmp_path / "tiny.json").write_text(json.dumps(MODELS[1]))
    found = clip_arguments(tmp_path / "tiny.json")
    assert found == MODELS[1] | {"image_mean": list(OPENAI_MEAN), "image_std": list(OPENAI_STD)}


@pytest.mark.parametrize(
    ("model", "complaint"),
    [
        (
            "ViT-B-16-SigLIP",
            r"ViT-B-16-SigLIP: text_cfg\.hf_tokenizer_name is timm/ViT-B-16-SigLIP, expected a",
        ),
        ("roberta-ViT-B-32", r"text_cfg\.hf_model_name is roberta-base, expected a CLIP"),
        ("ViT-L-14-CLIPA", r"text_cfg\.hf_tokenizer_name is bert-base-uncased"),
        ("coca_ViT-B-32", "multimodal_cfg is"),
        ("ViT-B-33", "--model: got 'ViT-B-33', expected a model that open_clip knows, such as ViT-B-32"),
        ("hf-hub:some/model", "--model: got 'hf-hub:some/model', expected a model"),
    ],
)
def test_other_towers_and_unknown_models_are_refused(model, complaint):
    with pytest.raises(ValueError, match=complaint):
        clip_arguments(model)


def test_other_tokens_and_files_that_are_no_configuration_are_refused(tmp_path):
    config = MODELS[0] | {"text_cfg": TEXT | {"vocab_size": 100}}
    with pytest.raises(
        ValueError, match=r"open_clip_config\.json: text_cfg\.vocab_size is 100, expected 49408"
    ):
        clip_arguments(config_file(tmp_path, config))
    (tmp_path / "other.json").write_text('{"vision_cfg": {}}')
    with pytest.raises(ValueError, match=r"other\.json: has no embed_dim and no text_cfg"):
        clip_arguments(tmp_path / "other.json")


def test_a_program_is_refused_with_the_way_out(tmp_path):
    torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)).save(tmp_path / "ViT-B-32.pt")
    with pytest.raises(ValueError, match=r"ViT-B-32\.pt' are a TorchScript archive.*expected a state dict"):
        import_clip(tmp_path / "ViT-B-32.pt", config_file(tmp_path, MODELS[0]), tmp_path / "run")


def test_weights_of_another_model_are_refused_by_name(tmp_path):
    torch.save(open_clip_model(MODELS[1]).state_dict(), tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"weights\.pt.*text_projection"):
        import_clip(tmp_path / "weights.pt", config_file(tmp_path, MODELS[0]), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_another_stage_is_not_exported(tmp_path):
    torch.save({**header(), "stage": "diffusion", "config": {}}, tmp_path / "diffusion.ckpt")
    with pytest.raises(ValueError, match="of stage 'diffusion', expected stage 'clip'"):
        export_clip(tmp_path / "diffusion.ckpt", tmp_path / "out")


def test_which_models_of_open_clip_are_taken():
    """Those whose text tower and tokens are CLIP's own."""

    def is_taken(name):
        try:
            return bool(clip_arguments(name))
        except ValueError:
            return False

    configs = {name: open_clip.get_model_config(name) for name in open_clip.list_models()}
    for name, config in configs.items():
        foreign = {"hf_model_name", "hf_tokenizer_name"} & config["text_cfg"].keys()
        assert is_taken(name) == (not foreign and "multimodal_cfg" not in config), name
    assert {"ViT-B-32", "EVA02-B-16", "MobileCLIP-B"} <= {name for name in configs if is_taken(name)}
