"""The exported tokenizer in transformers' hands against ours."""

import json
import random

import pytest
from transformers import CLIPTokenizer

from ldm.interop.tokenizer import pad_id, write_tokenizer
from ldm.nets.text import tokenize

CAPTIONS = [
    "",
    "   ",
    "a cat",
    "A Large RED ring, left of two blue squares",
    "it's 'n they'll we've I'm you'd don't",
    "1,000.50 kg; 3/4 (or 75%) of 12-34 = x^2?",
    "über naïve café ÅNGSTRÖM crème brûlée",
    "Привет мир, καλημέρα κόσμε, 日本語 中文 한국어 हिन्दी عربى",
    "emoji 😀 👩‍👩‍👧 ©",
    "tabs\tand\nlines   and   spaces",
    "supercalifragilisticexpialidocious antidisestablishmentarianism",
    "snake_case kebab-case ... --- ??? *** ### <b> a@b.cc https://x.yz/?q=1",
    "word " * 100,
    "<|weird|> {braces} [brackets] ~tilde~ `tick` $5 \\slash",
]


def ids(folder, captions, length):
    tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    return tokenizer(captions, padding="max_length", truncation=True)["input_ids"], tokenizer


def random_words(count=200):
    rng = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFXYZ0123456789éüßñ,.-:;?/()' "
    return ["".join(rng.choices(letters, k=rng.randrange(1, 60))) for _ in range(count)]


@pytest.mark.parametrize(("length", "pad"), [(77, 0), (20, 0), (77, 49407)])
def test_transformers_gets_our_ids(tmp_path, length, pad):
    write_tokenizer(tmp_path, length, pad)
    captions = CAPTIONS + random_words()
    found, tokenizer = ids(tmp_path, captions, length)
    assert found == tokenize(captions, length, pad).tolist()
    assert (len(tokenizer), tokenizer.model_max_length, tokenizer.pad_token_id) == (49408, length, pad)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (49406, 49407)


def test_the_known_differences_are_as_documented(tmp_path):
    write_tokenizer(tmp_path, 12)
    captions = ["wow!", "salt &amp; pepper", "“curly”"]
    found, _ = ids(tmp_path, captions, 12)
    ours = tokenize(captions, 12).tolist()
    assert (found[0][2], ours[0][2]) == (0, 256)
    assert ours[1] == tokenize(["salt & pepper"], 12)[0].tolist() != found[1]
    assert ours[2] == tokenize(['"curly"'], 12)[0].tolist() != found[2]
    write_tokenizer(tmp_path, 12, 49407)
    assert ids(tmp_path, captions[:1], 12)[0][0] == tokenize(captions[:1], 12, 49407)[0].tolist()


@pytest.mark.parametrize("pad", [0, 49407])
def test_padding_is_read_back_from_ours_and_from_what_transformers_saves(tmp_path, pad):
    write_tokenizer(tmp_path / "ours", 77, pad)
    CLIPTokenizer.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    assert pad_id(tmp_path / "ours") == pad_id(tmp_path / "theirs") == pad
    assert pad_id(tmp_path / "nowhere", tmp_path / "ours") == pad


def test_padding_of_old_new_missing_and_foreign_settings(tmp_path):
    settings = tmp_path / "tokenizer_config.json"
    assert pad_id(tmp_path) == 49407
    settings.write_text(json.dumps({"pad_token": {"content": "!", "__type": "AddedToken"}}))
    assert pad_id(tmp_path) == 0
    settings.write_text(json.dumps({"pad_token": None}))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"pad_token": "!"}))
    assert pad_id(tmp_path) == 0
    settings.write_text(json.dumps({"pad_token": "[PAD]"}))
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: pad_token is '\[PAD\]', expected one of"):
        pad_id(tmp_path)
