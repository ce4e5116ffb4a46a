"""Captions through any text encoder of transformers, which nothing else in the project imports."""

from __future__ import annotations

import os
import warnings
from collections.abc import Collection
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from typing_extensions import override

from ldm.conditioners.base import Conditioner
from ldm.io.upstream import open_model_folder
from ldm.nets.frozen import Frozen
from ldm.types import Batch, Cond, send

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

Layer = Literal["last", "penultimate"]
DType = Literal["float32", "bfloat16", "float16"]
TOKENIZERS = ("tokenizer.json", "tokenizer_config.json")
"""Files of which a folder with a tokenizer has one."""


class HFText(Conditioner):
    """Tokens of a text encoder of transformers, e.g. T5, T5-Gemma, Qwen3, from a local folder; never trained.

    Shards may hold the tokens of their captions (``ldm.encode --text``): then these are taken in training.
    The null condition is the empty caption. Tokens past the end of a caption are 0 and not attended to. It
    needs the extra ``ldm[hf]``. Pickles and code in the folder are never loaded, nothing is downloaded.

    Args:
        folder: Folder with config.json, weights as safetensors and the tokenizer, as ``save_pretrained``
            writes them.
        max_length: L, most tokens of a caption that are read.
        dropout: Fraction of training samples that get the empty caption.
        layer: Whose hidden states are the tokens: the last layer's, after its norm if there is one, or those
            of the layer before.
        dtype: What the encoder is loaded and computed in, also in mixed precision.

    Raises:
        ImportError: If transformers is not installed.
        ValueError: If the folder has no tokenizer, lacks weights, or has no text model.
    """

    reads = ("text",)

    def __init__(
        self,
        folder: str,
        max_length: int = 128,
        dropout: float = 0.1,
        layer: Layer = "last",
        dtype: DType = "float32",
    ) -> None:
        super().__init__(dropout)
        if max_length < 1:
            raise ValueError(f"conditioner.max_length: got {max_length}, expected at least 1")
        found, sha256 = open_model_folder(folder)
        self.encoder = Frozen(TextModel(found, max_length, layer, getattr(torch, dtype)))
        self.token_width, self.max_length = self.encoder.module.width, max_length
        self._folders = {folder: sha256}
        self._identity = {"sha256": sha256, "max_length": max_length, "layer": layer, "dtype": dtype}

    @override
    def reads_stored(self, stored: Collection[str]) -> tuple[str, ...]:
        return ("text_embedding",) if "text_embedding" in stored else ("text",)

    @property
    @override
    def text_encoder(self) -> dict[str, Any]:
        return self._identity

    @override
    def forward(self, batch: Batch) -> Cond:
        if (stored := batch.get("text_embedding")) is not None:
            return self._padded([send(tokens, self.encoder.module.device) for tokens in stored])
        self._require(batch)
        return self._padded(self.encoder.module.encode(batch["text"]))

    @override
    def null(self, batch: Batch) -> Cond:
        if "negative_text" in batch:
            return self._padded(self.encoder.module.encode(batch["negative_text"]))
        null = self._padded([self.encoder.module.null])
        assert null.tokens is not None and null.mask is not None
        count = len(batch["key"])
        return Cond(tokens=null.tokens.expand(count, -1, -1), mask=null.mask.expand(count, -1))

    @override
    def check(self, batch: Batch) -> None:
        texts = [*batch["text"], *batch.get("negative_text", [])]
        counts = {text: self.encoder.module.num_tokens(text) for text in texts}
        longest = max(counts, key=lambda text: counts[text])
        if num := sum(counts[text] > self.max_length for text in texts):
            warnings.warn(
                f"{num} of {len(texts)} captions are cut to the {self.max_length} tokens of max_length: "
                f"'{longest:.60}' has {counts[longest]}",
                stacklevel=2,
            )

    @override
    def truncated(self, batch: Batch) -> dict[str, Tensor]:
        """Return the fraction of captions that are cut."""
        if "text" not in batch:
            return {}
        is_cut = [self.encoder.module.num_tokens(text) > self.max_length for text in batch["text"]]
        return {"truncated_text": torch.tensor(sum(is_cut) / len(is_cut), device=self.encoder.module.device)}

    @property
    @override
    def model_folders(self) -> dict[str, str]:
        return self._folders

    def _padded(self, tokens: list[Tensor]) -> Cond:
        """Fill up tokens (n, D) of captions to (B, L, D) float32."""
        lengths = torch.tensor([len(each) for each in tokens])
        rows = pad_sequence([each.float() for each in tokens], batch_first=True)
        filled = nn.functional.pad(rows, (0, 0, 0, self.max_length - rows.shape[1]))
        mask = torch.arange(self.max_length) < lengths[:, None]
        return Cond(tokens=filled, mask=send(mask, filled.device))


class TextModel(nn.Module):
    """A text encoder of transformers with its tokenizer.

    Args:
        folder: Local folder of both.
        max_length: Most tokens of a caption.
        layer: Whose hidden states are returned.
        dtype: What it computes in.
    """

    null: Tensor
    """(n, D), the tokens of the empty caption."""

    def __init__(self, folder: Path, max_length: int, layer: Layer, dtype: torch.dtype) -> None:
        super().__init__()
        self.max_length, self.layer = max_length, layer
        self.tokenizer = _read_tokenizer(folder)
        self.model = _read_model(folder, dtype).eval()
        self.ids = lru_cache(maxsize=1 << 16)(self._ids)
        self.register_buffer("null", self.encode([""])[0], persistent=False)

    @property
    def width(self) -> int:
        """D of the tokens."""
        return self.null.shape[1]

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.null.device

    @torch.no_grad()
    def encode(self, text: list[str]) -> list[Tensor]:
        """Encode B captions as tokens (n, D) each, in the dtype of the encoder, on its device."""
        rows = [torch.tensor(self.ids(caption)) for caption in text]
        device = next(self.model.parameters()).device
        ids = send(pad_sequence(rows, batch_first=True), device)
        mask = send(pad_sequence([torch.ones_like(row) for row in rows], batch_first=True), device)
        with torch.autocast(device.type, enabled=False):
            found = self.model(
                input_ids=ids, attention_mask=mask, output_hidden_states=self.layer == "penultimate"
            )
        hidden = found.last_hidden_state if self.layer == "last" else found.hidden_states[-2]
        return [tokens[: len(row)] for tokens, row in zip(hidden, rows, strict=True)]

    def num_tokens(self, caption: str) -> int:
        """Count the tokens of a caption, with those that are cut."""
        return len(self.tokenizer(caption)["input_ids"])

    def _ids(self, caption: str) -> tuple[int, ...]:
        found = self.tokenizer(caption, truncation=True, max_length=self.max_length)["input_ids"]
        # tokenizers without marks have no token for the empty caption, and nothing could be attended to
        marks = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id, self.tokenizer.pad_token_id, 0)
        return tuple(found) or (next(mark for mark in marks if mark is not None),)


def _read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    if not any((folder / name).is_file() for name in TOKENIZERS):
        raise ValueError(
            f"conditioner.folder: '{folder}' has no tokenizer, expected {' or '.join(TOKENIZERS)} beside "
            "config.json, as save_pretrained of the model's tokenizer writes it"
        )
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else it warns when workers are forked
    found = _transformers().AutoTokenizer.from_pretrained(folder, **_LOCAL)
    found.model_max_length = int(1e9)  # we cut, and say so
    return cast("PreTrainedTokenizerBase", found)


def _read_model(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Read the encoder; weights of a decoder in the folder are passed over.

    Raises:
        ValueError: If the folder lacks some of its weights: they would be random.
    """
    library = _transformers()
    library.utils.logging.disable_progress_bar()
    try:
        config: PretrainedConfig = library.AutoConfig.from_pretrained(folder, **_LOCAL)
        kind = library.AutoModel
        if type(config) in library.MODEL_FOR_TEXT_ENCODING_MAPPING:
            kind, config.is_encoder_decoder = library.AutoModelForTextEncoding, False
        model, info = kind.from_pretrained(
            folder, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True, **_LOCAL
        )
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"conditioner.folder: '{folder}' cannot be read: {reason:.200}") from error
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"conditioner.folder: '{folder}' lacks {len(missing)} weights of {type(model).__name__}, the "
            f"first is {missing[0]}"
        )
    return cast("PreTrainedModel", model)


_LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            "conditioner: HFText needs transformers, which is not installed: pip install 'ldm[hf]'"
        ) from error
    return transformers
