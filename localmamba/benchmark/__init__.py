"""Speed and memory of image models, timm's and ours, on this machine."""

from .measure import DTYPES, MODES, Result, Setting, check_available, measure
from .report import describe_machine, read_csv, results_tables, write_csv

__all__ = [
    "DTYPES",
    "MODES",
    "Result",
    "Setting",
    "check_available",
    "describe_machine",
    "measure",
    "read_csv",
    "results_tables",
    "write_csv",
]
