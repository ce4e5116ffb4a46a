"""CLIP's tokenizer as the files that transformers reads.

Its ids are ours but for four things, none of them in plain captions:

- Captions are not mended: HTML entities, curly quotes and what else ftfy puts right stay as they are.
- With pad id 0 a literal "!" is padding there, id 0, and here the end of a word, id 256; Stable Diffusion 2.x
  has the same. Exact padding is worth more than exclamation marks: a denoiser attends to it in every caption.
- The marks themselves, written out in a caption, have other names.
- A capital sigma at the end of a word becomes a small one of the other kind.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from ldm.io.atomic import write_text
from ldm.io.json_file import read_json, write_json
from ldm.nets.text import VOCAB_SIZE, byte_pairs

BEGIN, END = "<|startoftext|>", "<|endoftext|>"
"""Marks of begin and end, by transformers' names."""
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json")
"""Files that name the special tokens."""


@lru_cache(maxsize=1)
def vocabulary() -> dict[str, int]:
    """Return each token's id, in the order of the ids."""
    pairs = byte_pairs()
    names = {pairs.sot_token_id: BEGIN, pairs.eot_token_id: END}
    return {names.get(i, token): i for token, i in pairs.encoder.items()}


def write_tokenizer(folder: str | Path, context_length: int, pad_id: int = 0) -> None:
    """Write what transformers' ``CLIPTokenizer`` is made from: vocab.json, merges.txt, two files of settings.

    Args:
        folder: Where the files go.
        context_length: L, begin and end marks included.
        pad_id: Token that fills up short captions.
    """
    folder = Path(folder)
    ids = vocabulary()
    special = {
        "bos_token": BEGIN,
        "eos_token": END,
        "unk_token": END,
        "pad_token": list(ids)[pad_id],
    }
    write_json(folder / "vocab.json", ids)
    merges = "\n".join(" ".join(pair) for pair in byte_pairs().bpe_ranks)
    write_text(folder / "merges.txt", f"#version: 0.2\n{merges}\n")
    write_json(folder / SETTINGS[1], special)
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": context_length, "do_lower_case": True}
    write_json(folder / SETTINGS[0], settings | special)


def pad_id(*folders: Path) -> int:
    """Read which token fills up short captions from the first folder that has a tokenizer's settings.

    Returns:
        Its id; that of the end mark, transformers' default, where no file names one.

    Raises:
        ValueError: If it is no token of CLIP's.
    """
    files = [folder / name for folder in folders for name in SETTINGS if (folder / name).is_file()]
    tokens = [(file, token) for file in files if (token := read_json(file).get("pad_token")) is not None]
    if not tokens:
        return vocabulary()[END]
    file, token = tokens[0]
    name = token["content"] if isinstance(token, dict) else token
    if name not in vocabulary():
        raise ValueError(f"{file}: pad_token is '{name}', expected one of CLIP's {VOCAB_SIZE} tokens")
    return vocabulary()[name]
