"""Measures of generated images: float64 sums, no Lightning."""

from ldm import exports

__getattr__, __all__ = exports(
    __name__,
    clip_score="CLIPScore",
    feature_metrics="FeatureMetrics",
    frechet="Frechet",
    inception_score="InceptionScore",
    kernel="CMMD KID",
    lpips="LPIPS",
    measure="Measure",
    metric="Metric",
    neighbours="Neighbours",
    psnr="PSNR",
    retrieval="Retrieval",
    ssim="SSIM",
    torch_metric="TorchMetric",
    zero_shot="ZeroShot",
)
