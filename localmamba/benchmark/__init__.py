"""Speed and memory of image models, timm's and ours, on the machine at hand."""

from .machine import describe_machine
from .measure import measure
from .report import results_tables, write_csv
from .settings import DTYPES, MODES, Result, Setting

__all__ = [
    "DTYPES",
    "MODES",
    "Result",
    "Setting",
    "describe_machine",
    "measure",
    "results_tables",
    "write_csv",
]
