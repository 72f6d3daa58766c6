"""Numba's cache of compiled kernels: reused by later processes; damage costs a compilation only."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numba
import pytest
import torch

from localmamba.ops._common import numba_jit

SOURCE = """
from localmamba.ops._common.numba_jit import kernel
from localmamba.ops._common.simd import store_float

@kernel
def double_kernel(x, to):
    store_float(to, x + x)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "kernels.py").write_text(SOURCE)
    return tmp_path


def new_process(folder: Path) -> ModuleType:
    """Imports the kernel as a new process does, and checks that it computes."""
    spec = importlib.util.spec_from_file_location("kernels", folder / "kernels.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    result = torch.zeros(1, dtype=torch.float32)
    module.double_kernel(1.5, result.data_ptr())
    assert result.item() == 3.0
    return module


def hits(module: ModuleType) -> int:
    return sum(module.double_kernel.compiled.stats.cache_hits.values())


def files(folder: Path, suffix: str) -> list[Path]:
    """The cache files of the kernel, as `$NUMBA_CACHE_DIR/*/*name*` finds them."""
    return list((folder / "cache").glob(f"*/*double_kernel*.{suffix}"))


def test_a_second_process_compiles_nothing(folder: Path) -> None:
    assert hits(new_process(folder)) == 0
    assert hits(new_process(folder)) == 1


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "cut short": lambda content: content[: len(content) // 2],
    "last byte missing": lambda content: content[:-1],
    "end zeroed": lambda content: content[: len(content) // 2].ljust(len(content), b"\0"),
    "garbage": lambda _: bytes(range(255, 0, -1)) * 8,
    "text": lambda _: b"<html>not a cache</html>",
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("suffix", ["nbi", "nbc"])
def test_a_damaged_file_is_made_again(folder: Path, suffix: str, damage: Callable) -> None:
    new_process(folder)
    (file,) = files(folder, suffix)
    file.write_bytes(damage(file.read_bytes()))
    assert hits(new_process(folder)) == 0
    assert hits(new_process(folder)) == 1


@pytest.mark.parametrize("suffix", ["nbi", "nbc"])
def test_a_missing_file_is_made_again(folder: Path, suffix: str) -> None:
    new_process(folder)
    (file,) = files(folder, suffix)
    file.unlink()
    new_process(folder)
    assert hits(new_process(folder)) == 1


def test_a_full_disk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    new_process(folder)
    assert files(folder, "nb[ci]") == []


def test_a_folder_that_cannot_be_made(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numba finds another folder, or none."""
    (folder / "file").touch()
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(folder / "file" / "folder"))
    new_process(folder)


def test_no_folder_at_all(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("os.makedirs", nowhere)
    assert new_process(folder).double_kernel.compiled.stats.cache_path is None


def test_other_sources_compile_anew(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A change in a file of functions that kernels call; the old version's files go."""
    new_process(folder)
    before = set(files(folder, "nb[ci]"))
    monkeypatch.setattr(numba_jit, "_source_hash", lambda: "0123456789abcdef")
    assert hits(new_process(folder)) == 0
    assert before.isdisjoint(files(folder, "nb[ci]"))
    assert hits(new_process(folder)) == 1


def test_the_hash_covers_every_source() -> None:
    """Kernels of every operator's folder call functions of `_common`."""
    assert len(list(Path(numba_jit.__file__).parents[1].rglob("*.py"))) > 20
    assert len(numba_jit._source_hash()) == 16
