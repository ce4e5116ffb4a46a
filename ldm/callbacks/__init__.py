"""Callbacks of a run: averages, images, metrics, speed. Named by configs only."""

from ldm import exports

__getattr__, __all__ = exports(
    __name__,
    activation_checkpointing="ActivationCheckpointing",
    bad_samples="BadSamples",
    caption_lengths="CaptionLengths",
    compile="Compile",
    denoising_grid="DenoisingGrid",
    ema="EMA",
    evaluation="Evaluation",
    mixture_counts="MixtureCounts",
    post_hoc_ema="PostHocEMA",
    progress="ProgressBar",
    retrieval="ValidationRetrieval",
    sample_grid="SampleGrid",
    skip_nonfinite="SkipNonFinite",
    throughput="Throughput",
    watchdog="Watchdog",
)
