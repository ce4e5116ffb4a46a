"""Our text tower against open_clip's, from which its weights may come."""

import pytest
import torch
from clip_tokens import text_tokens
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transform import image_transform

from ldm.conditioners.text import NewText
from ldm.nets.clip import CLIPModel
from ldm.nets.text import TextTower, num_tokens

VISION = {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8}
CONFIGS = [
    ({"context_length": 8, "width": 16, "heads": 2, "layers": 1}, False),
    ({"context_length": 8, "width": 16, "heads": 4, "layers": 3}, True),
    ({"context_length": 21, "width": 14, "heads": 2, "layers": 2, "mlp_ratio": 4.36}, False),
    (
        {"context_length": 8, "width": 16, "heads": 2, "layers": 1, "pool_type": "eos", "eos_id": 49407}
        | {"proj_bias": True, "qk_norm": False, "ls_init_value": None},
        False,
    ),
    ({"context_length": 77, "width": 64, "heads": 1, "layers": 4}, True),
]
CAPTIONS = ["a cat", "", "one two three four five six seven eight nine ten", "Ünïcode, 3 digits & 'quotes'!"]
OPENAI_MEAN, OPENAI_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def clip(text_cfg=CONFIGS[1][0], quick_gelu=True, seed=0, **more):
    """A CLIP whose parameters are all random: open_clip starts biases at 0 and norms at 1."""
    torch.manual_seed(seed)
    model = CLIPModel(16, VISION, text_cfg, quick_gelu, **more).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def relative(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize(("text_cfg", "quick_gelu"), CONFIGS)
def test_the_tower_computes_the_tokens_of_its_clip(text_cfg, quick_gelu, dtype, tolerance):
    model = clip(text_cfg, quick_gelu).to(dtype)
    assert relative(model.text_tower().encode(CAPTIONS), text_tokens(model, CAPTIONS)) < tolerance


def test_the_activation_is_recognised():
    model = clip()
    tower = model.text_tower()
    other = TextTower(**tower.config["init_args"] | {"quick_gelu": False})
    other.load_state_dict(tower.state_dict())
    assert relative(other.encode(CAPTIONS), tower.encode(CAPTIONS)) > 1e-4


def test_layers_left_out_are_open_clips_intermediate_layers():
    model = clip().double()
    every = model.model.forward_intermediates(
        text=model.tokenize(CAPTIONS), text_indices=3, normalize_intermediates=True
    )["text_intermediates"]
    for skipped, expected in enumerate(reversed(every)):
        tower = model.text_tower().clip_skip(skipped)
        assert tower.layers == 3 - skipped
        assert relative(tower.encode(CAPTIONS), expected) < 1e-10
    with pytest.raises(ValueError, match="clip_skip: got 3, expected 0 to 2"):
        model.text_tower().clip_skip(3)


def test_no_token_attends_to_a_later_one():
    tower = clip().text_tower().double()
    ids = torch.randint(0, 49408, (2, 8), generator=torch.Generator().manual_seed(1))
    changed = ids.clone()
    changed[:, 5] += 1
    before, after = tower(ids), tower(changed)
    assert torch.equal(before[:, :5], after[:, :5])
    assert all((before[:, i] - after[:, i]).abs().max() > 1e-6 for i in range(5, 8))
    assert relative(tower(ids[:, :4]), before[:, :4]) < 1e-12, "short sequences start at position 0"


def test_the_tower_owns_its_weights_and_learns():
    model = clip()
    tower = model.text_tower()
    first = tower.encode(CAPTIONS)
    first.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in tower.parameters())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(tower.encode(CAPTIONS), first)


def test_a_tower_rebuilds_from_its_config():
    tower = clip(CONFIGS[2][0], False).text_tower().clip_skip(1)
    again = TextTower(**tower.config["init_args"])
    again.load_state_dict(tower.state_dict())
    assert torch.equal(again.encode(CAPTIONS), tower.encode(CAPTIONS))
    assert tower.config["class_path"] == "ldm.nets.TextTower"


def test_taking_the_tower_leaves_the_random_numbers_alone():
    model = clip()
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    model.text_tower()
    assert torch.equal(torch.rand(3), expected), "networks built afterwards start from other weights"


@pytest.mark.parametrize(
    ("text_cfg", "complaint"),
    [
        ({"no_causal_mask": True}, r"net\.text_cfg has no_causal_mask"),
        ({"qk_norm": True}, r"net\.text_cfg has qk_norm"),
        ({"vocab_size": 100}, r"net\.text_cfg\.vocab_size is 100, expected 49408"),
    ],
)
def test_towers_of_another_kind_are_refused_by_key(text_cfg, complaint):
    with pytest.raises(ValueError, match=complaint):
        clip(CONFIGS[0][0] | text_cfg).text_tower()


def test_ids_are_open_clips():
    model, long, theirs = clip(), "word " * 90, SimpleTokenizer()
    tower = model.text_tower()
    for text in (*CAPTIONS, long):
        assert torch.equal(tower.tokenize([text]), theirs([text], 8))
        assert num_tokens(text) == len(theirs.encode(text)) + 2
    assert torch.equal(model.tokenize(CAPTIONS), theirs(CAPTIONS, 8))


def test_only_padding_differs_between_padding_tokens():
    arguments = clip().text_tower().config["init_args"]
    zero, end = (TextTower(**arguments | {"pad_id": pad}).tokenize(CAPTIONS) for pad in (0, 49407))
    is_text = torch.arange(8) < torch.tensor([[min(num_tokens(c), 8)] for c in CAPTIONS])
    assert torch.equal(zero[is_text], end[is_text])
    assert (zero[~is_text] == 0).all() and (end[~is_text] == 49407).all() and (~is_text).any()


def test_the_image_tower_gets_inputs_with_the_configured_statistics():
    plain, openai = clip(), clip(image_mean=OPENAI_MEAN, image_std=OPENAI_STD)
    pixels = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    image = pixels / 127.5 - 1
    normalise = image_transform(16, is_train=False, mean=OPENAI_MEAN, std=OPENAI_STD).transforms[-1]
    assert torch.allclose(
        openai.image_features(image), plain.model.encode_image(normalise(pixels / 255)), atol=1e-5
    )
    assert torch.equal(plain.image_features(image), plain.model.encode_image(image)), "mean .5 changes no bit"
    assert (
        set(plain.state_dict())
        == set(openai.state_dict())
        == {f"model.{k}" for k in plain.model.state_dict()}
    )


def test_a_new_tower_starts_like_open_clips():
    config = {"context_length": 32, "width": 64, "heads": 4, "layers": 3}
    torch.manual_seed(0)
    theirs = CLIPModel(16, VISION, config).text_tower().state_dict()
    ours = TextTower(64, 3, 4, 32)
    ours.initialise()
    for name, weight in ours.state_dict().items():
        spread = theirs[name].std().item()
        if weight.ndim == 2:
            assert weight.std().item() == pytest.approx(spread, rel=0.1 if weight.numel() > 2000 else 0.2), (
                name
            )
        elif "mlp" not in name:
            assert torch.equal(weight, theirs[name]), name  # biases 0, norms 1


def test_a_new_tower_conditions_and_is_trained():
    conditioner = NewText(16, 2, 2, context_length=8)
    batch = {"key": ["0", "1"], "text": ["a cat", "two dogs"]}
    tokens = conditioner(batch).tokens
    assert tokens.shape == (2, 8, 16) and conditioner.token_width == 16 and not conditioner.upstream
    tokens.square().sum().backward()
    assert all(weight.grad is not None for weight in conditioner.parameters())
    assert torch.equal(conditioner.null(batch).tokens[0], conditioner({**batch, "text": ["", ""]}).tokens[0])
