"""Names and formats of metrics."""

SHARES = ("accuracy", "top5")
"""Metrics that are shares of the images, shown in per cent."""


def is_share(metric: str) -> bool:
    """Returns whether a metric, such as `val_accuracy`, is a share of the images."""
    return metric.removeprefix("val_") in SHARES


def format_metric(name: str, value: float) -> str:
    """Formats a metric with its unit."""
    return f"{100 * value:.2f} %" if is_share(name) else f"{value:.4f}"
