"""Speed and memory of image models, timm's and ours, on the machine at hand."""

from .machine import describe_machine
from .measure import measure
from .report import read_csv, results_tables, write_csv
from .settings import DTYPES, MODES, Result, Setting, check_available

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
