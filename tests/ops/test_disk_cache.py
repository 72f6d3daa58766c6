"""What is compiled once is found again, and nothing that is wrong with the disk stops a program."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("triton")

from localmamba.ops._common import disk_cache, nvrtc
from localmamba.ops._common.disk_cache import cached

BINARY = bytes(range(256)) * 64


class Maker:
    """Makes something and counts how often."""

    def __init__(self, content: bytes = BINARY):
        self.content = content
        self.calls = 0

    def __call__(self) -> bytes:
        self.calls += 1
        return self.content


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own, that does not exist yet."""
    own = tmp_path / "not" / "there yet"
    monkeypatch.setenv("LOCALMAMBA_CACHE", str(own))
    return own


def made(key: str, times: int) -> int:
    """How often a result is made when it is asked for so many times."""
    maker = Maker()
    for _ in range(times):
        assert cached(key, maker) == BINARY
    return maker.calls


def test_made_once_a_key(folder: Path) -> None:
    assert made("a", times=3) == 1
    assert made("a", times=3) == 0
    assert made("b", times=3) == 1
    assert len(list(folder.iterdir())) == 2, "no unfinished file stays"


def test_an_empty_result_is_a_result() -> None:
    maker = Maker(b"")
    assert cached("a", maker) == cached("a", maker) == b""
    assert maker.calls == 1


@pytest.mark.parametrize("where", ["LOCALMAMBA_CACHE", "XDG_CACHE_HOME", "HOME"])
def test_where_it_lies(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOCALMAMBA_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(where, str(tmp_path))
    cached("a", Maker())
    inside = {"LOCALMAMBA_CACHE": ".", "XDG_CACHE_HOME": "localmamba", "HOME": ".cache/localmamba"}
    assert [path.parent for path in tmp_path.rglob("*") if path.is_file()] == [
        tmp_path / inside[where]
    ]


@pytest.mark.parametrize(
    "broken",
    [b"", b"short", BINARY, b"\0" * 32 + BINARY],
    ids=["empty", "short", "without a digest", "another digest"],
)
def test_a_broken_file_is_made_again(broken: bytes, folder: Path) -> None:
    made("a", times=1)
    (file,) = folder.iterdir()
    whole = file.read_bytes()
    for content in (broken, whole[:-1], whole + b"x", whole[:-1] + b"x"):
        file.write_bytes(content)
        assert made("a", times=2) == 1
        assert file.read_bytes() == whole


def test_a_folder_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LOCALMAMBA_CACHE", str(tmp_path / "file" / "folder"))
    assert made("a", times=2) == 2


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(folder: Path) -> None:
    folder.mkdir(parents=True)
    folder.chmod(0o500)
    assert made("a", times=2) == 2


def test_a_full_disk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk_cache.os, "replace", full)
    assert made("a", times=2) == 2
    assert list(folder.iterdir()) == []


def test_no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("LOCALMAMBA_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert made("a", times=2) == 2


def test_errors_of_the_maker_pass() -> None:
    def fail() -> bytes:
        raise RuntimeError("does not compile")

    with pytest.raises(RuntimeError, match="does not compile"):
        cached("a", fail)
    assert made("a", times=1) == 1


def test_several_processes_at_once(folder: Path) -> None:
    """All write the same files, over and over, and none ever reads half of one."""
    script = f"""
import sys
sys.path.insert(0, {str(Path(disk_cache.__file__).parent)!r})
import disk_cache

for i in range(200):
    content = bytes([i]) * 50_000
    assert disk_cache.cached(str(i), lambda: content) == content
    disk_cache._write("shared", content)
    assert disk_cache._read("shared") is not None
"""

    def run(_: int) -> int:
        return subprocess.run([sys.executable, "-c", script], check=False).returncode

    with ThreadPoolExecutor() as pool:
        assert list(pool.map(run, range(3))) == [0, 0, 0]
    assert len(list(folder.iterdir())) == 201


def test_scan_kernels_are_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a second process does, and one for another GPU or with another source."""
    pytest.importorskip("cuda.bindings.nvrtc")
    compiled = []

    def compile_source(*variant) -> bytes:
        compiled.append(variant)
        return BINARY

    def new_process(capability: tuple[int, int] = (9, 0), element: int = 1) -> None:
        nvrtc._cubin.cache_clear()
        assert nvrtc._cubin((("ELEMENT", element),), capability) == BINARY

    monkeypatch.setattr(nvrtc, "_compile", compile_source)
    new_process()
    new_process()
    assert len(compiled) == 1
    new_process(capability=(8, 0))
    new_process(element=0)
    assert len(compiled) == 3
    other = Path(os.environ["LOCALMAMBA_CACHE"]) / "scan.cu"
    other.write_bytes(nvrtc._SOURCE.read_bytes() + b"\n")
    monkeypatch.setattr(nvrtc, "_SOURCE", other)
    new_process()
    assert len(compiled) == 4
    nvrtc._cubin.cache_clear()
