"""Hidden states of open_clip's text tower: the reference of ours."""

from torch import Tensor

from ldm.nets.clip import CLIPModel


def text_tokens(clip: CLIPModel, text: list[str]) -> Tensor:
    """Map B captions to the sequence (B, L, D) after the text tower's last layer norm."""
    model = clip.model
    hidden = model.token_embedding(clip.tokenize(text)) + model.positional_embedding
    return model.ln_final(model.transformer(hidden, attn_mask=model.attn_mask))
