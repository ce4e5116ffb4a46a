"""Tiny text encoders of random weights with tokenizers, written as transformers writes them."""

import torch

WORDS = ["a", "red", "blue", "green", "ring", "disc", "square", "star", "large", "small", "and", "in", "the"]


def tokenizer(mark=True):
    """Words of a small vocabulary; with an end mark, as T5 has, or without any, as Qwen has."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "</s>", "<unk>"]
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if mark:
        backend.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def write_t5(folder, seed=0):
    """A T5 with encoder and decoder, as google/t5-v1_1 is published."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=3, num_heads=2, feed_forward_proj="gated-gelu",
        tie_word_embeddings=False, decoder_start_token_id=0,
    )  # fmt: skip
    return _write(T5ForConditionalGeneration(config), tokenizer(), folder)


def write_qwen(folder):
    """A Qwen3: causal, without a token for the empty caption."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    return _write(Qwen3ForCausalLM(config), tokenizer(mark=False), folder)


def write_t5gemma(folder):
    """A T5-Gemma: two stacks of Gemma, of which the encoder is used."""
    from transformers import T5GemmaConfig, T5GemmaForConditionalGeneration, T5GemmaModuleConfig

    torch.manual_seed(0)
    stack = {
        "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "sliding_window": 8,
    }  # fmt: skip
    config = T5GemmaConfig(
        encoder=T5GemmaModuleConfig(**stack), decoder=T5GemmaModuleConfig(**stack), vocab_size=32
    )
    return _write(T5GemmaForConditionalGeneration(config), tokenizer(), folder)


def _write(model, words, folder):
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return str(folder)
