"""Loggers of metrics and images."""

from ldm import exports

__getattr__, __all__ = exports(
    __name__,
    metrics_csv="MetricsCSV",
    wandb="WandbSamplesLogger",
)
