"""Formatting of metrics for tables, progress bars and figures."""


def is_fraction(metric: str) -> bool:
    """Whether a metric is a fraction of the images, shown in percent."""
    return "accuracy" in metric or "top5" in metric


def format_metric(metric: str, value: float, percent: str = "") -> str:
    """Formats the value of a metric.

    Args:
        metric: Name, which selects the format.
        value: Value; fractions are between 0 and 1.
        percent: Percent sign to append to fractions.
    """
    if is_fraction(metric):
        return f"{100 * value:.2f}{percent}"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.1f}" if metric == "seconds" else f"{value:.4f}"
