"""Runs scan.cu on a CPU: compiled by g++, the 32 lanes of a warp taking turns."""

import ctypes
import re
import subprocess
from functools import lru_cache
from pathlib import Path

from torch import Tensor

from localmamba.ops._common import nvrtc

SHIM = Path(__file__).with_suffix(".hpp")

ASSEMBLY = {
    r"asm\(\"\{\.reg \.f16.*?\);": "to[0] = from_half(from), to[1] = from_half(from >> 16);",
    r"asm\(\"cvt\.rn\.bf16x2.*?\);": "r = to_bfloat16(high) << 16 | to_bfloat16(low);",
    r"asm\(\"cvt\.rn\.f16x2.*?\);": "r = to_half(high) << 16 | to_half(low);",
    r"asm\(\"ex2\.approx.*?\);": "r = exp2_to_zero(x);",
    r"u32 address =.*?asm volatile\(\"cp\.async\.cg.*?\);": "memcpy(to, from, sizeof(Eight));",
    r"asm volatile\(\"cp\.async\.wait_all.*?\);": "",
}
"""What stands for scan.cu's assembly."""

# Libraries must not share the static arrays of templates, nor floats be read as floats alone.
FLAGS = ["-O1", "-std=c++17", "-shared", "-fPIC", "-w", "-fno-gnu-unique", "-fno-strict-aliasing"]

KINDS = {"P": ctypes.c_void_p, "q": ctypes.c_longlong, "i": ctypes.c_int}


def translated(defines: tuple[tuple[str, int], ...]) -> str:
    """scan.cu as C++, with a function `run_<kernel>(columns, rows, ...)` for each kernel."""
    source = nvrtc._SOURCE.read_text()
    for pattern, replacement in ASSEMBLY.items():
        source, found = re.subn(pattern, replacement, source, flags=re.DOTALL)
        assert found == 1, pattern
    kernels = re.findall(r"__global__ void __launch_bounds__\([^)]*\) (\w+)\(([^)]*)\)", source)
    source = source.replace('extern "C" __global__', "static")
    for name, parameters in kernels:
        names = ", ".join(re.findall(r"(\w+)\s*(?:,|$)", parameters))
        source += (
            f'extern "C" void run_{name}(int columns, int grid_rows, {parameters}) '
            f"{{ run_grid(columns, grid_rows, [&] {{ {name}({names}); }}); }}\n"
        )
    macros = "".join(f"#define {name} {value}\n" for name, value in defines)
    return f'{macros}#include "{SHIM}"\n{source}'


class Emulator:
    """In place of `nvrtc.launch`.

    Args:
        folder: For what is compiled.
    """

    def __init__(self, folder: Path):
        self.library = lru_cache(self._compile)
        self.folder = folder

    def _compile(self, defines: tuple[tuple[str, int], ...]) -> ctypes.CDLL:
        stem = self.folder / "_".join(str(value) for _, value in defines)
        stem.with_suffix(".cpp").write_text(translated(defines))
        target = [stem.with_suffix(".so"), stem.with_suffix(".cpp")]
        subprocess.run(["g++", *FLAGS, "-o", *target], check=True)
        return ctypes.CDLL(str(stem.with_suffix(".so")))

    def launch(
        self,
        name: str,
        defines: tuple[tuple[str, int], ...],
        grid: tuple[int, int],
        threads: int,
        code: str,
        *arguments: Tensor | int | None,
    ) -> None:
        """As `nvrtc.launch`."""
        assert threads == 32
        kinds = "".join(kind * int(n or 1) for n, kind in re.findall(r"(\d*)(\w)", code))
        values = [
            KINDS[kind](x.data_ptr() if isinstance(x, Tensor) else x)
            for kind, x in zip(kinds, arguments, strict=True)
        ]
        getattr(self.library(defines), f"run_{name}")(*map(ctypes.c_int, grid), *values)
