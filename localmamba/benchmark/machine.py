"""What a figure was measured on."""

import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

import torch

KERNELS = {"cpu": "numba", "cuda": "triton"}
"""The library behind the kernels on each device."""


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _driver() -> str:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "unknown"
    query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    return done.stdout.splitlines()[0].strip() if done.stdout else "unknown"


def describe_machine(device: str) -> dict[str, str]:
    """The device and the versions that decide its speed.

    Args:
        device: `cpu` or `cuda`.
    """
    versions = {name: _version(name) for name in ("torch", KERNELS[device], "timm")}
    if device == "cuda":
        return {"device": torch.cuda.get_device_name(), "driver": _driver(), **versions}
    return {"device": _cpu_name(), "threads": str(torch.get_num_threads()), **versions}
