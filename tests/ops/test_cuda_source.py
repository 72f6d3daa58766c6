"""scan.cu compiles for every kind of input, and fits its registers. Needs NVRTC, but no GPU."""

import re
from itertools import combinations, product

import pytest
import torch
from kernel_cases import DTYPES
from ops.kernels import kernels_of, patch, warp_scan_wave
from scan_cases import (
    ScanCase,
    scan_arguments,
)

pytest.importorskip("triton")
bindings = pytest.importorskip("cuda.bindings.nvrtc")

from localmamba.ops._common import nvrtc  # noqa: E402 - Triton is there

SPILLED_BYTES = 16
"""The backward kernel reloads four values where step sizes have no bias; elsewhere none."""

LANES = {"one a channel": 0, "two": 1, "four": 2, "segments": 1000}
"""How a pass is cut, and how many programs make a wave, in programs of the test case."""

FACTORS = {
    "dtype": DTYPES,
    "inputs": ("grid", "grid, padded", "scan", "scan, padded", "none"),
    "D": (False, True),
    "dt_bias": (False, True),
    "softplus": (False, True),
    "way": ("forward", "backward"),
    "lanes": tuple(LANES),
    "capability": ((8, 0), (9, 0)),
}


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    """The compiler runs, and leaves nothing in the user's cache."""
    monkeypatch.setenv("LOCALMAMBA_CACHE", str(tmp_path))
    nvrtc._cubin.cache_clear()


def covering_pairs(factors: dict[str, tuple]) -> list[dict]:
    """Combinations in which any two values of different factors meet at least once."""
    rows = [dict(zip(factors, values, strict=True)) for values in product(*factors.values())]
    pairs = [set(combinations(row.items(), 2)) for row in rows]
    missing = set().union(*pairs)
    chosen = []
    while missing:
        best = max(range(len(rows)), key=lambda i: len(pairs[i] & missing))
        missing -= pairs[best]
        chosen.append(rows[best])
    return chosen


def spelled_out(code: str) -> str:
    """A `struct` code without counts: 3P2i is PPPii."""
    return "".join(kind * int(count or 1) for count, kind in re.findall(r"(\d*)(\w)", code))


def parameter_kinds(kernel: str) -> str:
    """The `struct` codes of a kernel's parameters, from its declaration in scan.cu."""
    declaration = re.search(rf"\b{kernel}\(([^)]*)\)", nvrtc._SOURCE.read_text())
    kinds = {"*": "P", "i64": "q", "int": "i"}
    return "".join(
        next(code for kind, code in kinds.items() if kind in parameter)
        for parameter in declaration[1].split(",")
    )


def launches(row: dict, monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple]:
    """The kernels that a pass asks for, and what each is compiled with; none of them runs."""
    asked: dict[str, tuple] = {}

    def launch(name, defines, *rest):
        code, arguments = spelled_out(rest[2]), rest[3:]
        assert code == parameter_kinds(name)
        pointers = [x is None or isinstance(x, torch.Tensor) for x in arguments]
        assert pointers == [kind == "P" for kind in code]
        asked[name] = defines

    monkeypatch.setattr(nvrtc, "launch", launch)
    patch(
        monkeypatch,
        "selective_scan",
        combine_segments=lambda *args, **_: args[1],
        sum_partials=lambda x, axis, dtype: x.sum(axis).to(dtype),
        sum_blocks=lambda *_: None,
    )
    order, *padded = row["inputs"].split(", ")
    directions = ("w7", "v_flip") if padded else ("h", "v_flip")
    options = tuple(name for name in ("D", "dt_bias", "softplus") if row[name])
    case = ScanCase("", directions, (9, 11), 32, 16, order, options)
    arguments = scan_arguments(case, row["dtype"])
    programs = arguments.tensors["u"].shape[0] * len(directions)
    warp_scan_wave(monkeypatch, LANES[row["lanes"]] * programs)
    kernels = kernels_of("selective_scan", "cuda_cpp")
    dy, tensors, rest = arguments
    if row["way"] == "forward":
        kernels.forward(**tensors, **rest, save=True)
    else:
        kernels.backward(dy, **tensors, **rest, states=torch.empty(0))
    return asked


def compile_log(defines: tuple, capability: tuple[int, int]) -> str:
    """What the compiler says of registers, by kernel."""
    major, minor = capability
    options = [f"--gpu-architecture=sm_{major}{minor}", "--std=c++17", "--ptxas-options=-v"]
    options += [f"-D{name}={value}" for name, value in defines]
    source = nvrtc._SOURCE.read_bytes()
    program = nvrtc._check(bindings.nvrtcCreateProgram(source, b"scan.cu", 0, [], []))
    encoded = [option.encode() for option in options]
    failed = int(bindings.nvrtcCompileProgram(program, len(encoded), encoded)[0])
    log = b" " * nvrtc._check(bindings.nvrtcGetProgramLogSize(program))
    nvrtc._check(bindings.nvrtcGetProgramLog(program, log))
    assert not failed, log.decode()
    return log.decode()


@pytest.mark.parametrize(
    "row", covering_pairs(FACTORS), ids=lambda row: " ".join(map(str, row.values()))
)
def test_source_compiles_and_keeps_to_its_registers(row, monkeypatch):
    asked = launches(row, monkeypatch)
    kernels = {f"scan_{row['way']}"}
    if row["lanes"] == "segments" or (row["way"] == "backward" and row["lanes"] != "one a channel"):
        kernels |= {{"forward": "segment_end", "backward": "segment_carry"}[row["way"]]}
    assert asked.keys() == kernels
    split = {"two": 2, "four": 4}.get(row["lanes"], 1) if row["way"] == "forward" else 1
    for defines in set(asked.values()):
        assert ("SPLIT", split) in defines
        log = compile_log(defines, row["capability"])
        assert kernels <= set(re.findall(r"entry function '(\w+)'", log))
        spilled = re.findall(r"(\d+) bytes spill (?:stores|loads)", log)
        assert spilled
        assert max(map(int, spilled)) <= SPILLED_BYTES


def test_kernels_are_in_the_binary():
    cubin = nvrtc._cubin((("ELEMENT", 1), ("GRID_ORDER", 1), ("HAS_INDEX", 1)), (9, 0))
    for kernel in (b"scan_forward", b"scan_backward", b"segment_end", b"segment_carry"):
        assert b".text." + kernel in cubin


def test_compiler_errors_are_shown():
    with pytest.raises(RuntimeError, match=r"(?s)does not compile.*sm_10.*gpu-architecture"):
        nvrtc._cubin((("ELEMENT", 0),), (1, 0))
