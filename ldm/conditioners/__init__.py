"""Conditioners, one file per kind: each turns a batch into a Cond."""

from ldm import exports

__getattr__, __all__ = exports(
    __name__,
    base="Conditioner",
    composite="Composite",
    huggingface="HFText",
    inpainting="Inpainting",
    label="ClassLabel",
    layout="Layout",
    none="Unconditional",
    semantic="SemanticMap",
    size="ImageSize",
    spatial="Spatial",
    super_resolution="SuperResolution",
    text="CLIPText NewText",
)
