"""On-disk cache of compiled kernels.

The folder is `localmamba` in XDG_CACHE_HOME (by default `~/.cache`), or what the environment
variable LOCALMAMBA_CACHE names. Anything in it may be deleted at any time. A damaged file and a
folder that cannot be read or written cost a compilation and nothing else.
"""

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

_DIGEST_SIZE = hashlib.sha256().digest_size


def cached(key: str, make: Callable[[], bytes]) -> bytes:
    """Returns what `make` returned when it was first called with this key, in any process.

    Args:
        key: Names everything that the result depends on; of any length.
        make: Called where the disk has no whole result. Its errors pass through.
    """
    name = hashlib.sha256(key.encode()).hexdigest()
    content = _read(name)
    if content is None:
        content = make()
        _write(name, content)
    return content


def _folder() -> Path:
    if own := os.environ.get("LOCALMAMBA_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "localmamba"


def _read(name: str) -> bytes | None:
    """Reads a file; None if it is missing or damaged."""
    try:
        stored = (_folder() / name).read_bytes()
    except (OSError, RuntimeError):  # RuntimeError: there is no home
        return None
    digest, content = stored[:_DIGEST_SIZE], stored[_DIGEST_SIZE:]
    return content if hashlib.sha256(content).digest() == digest else None


def _write(name: str, content: bytes) -> None:
    """Writes a file atomically: other processes see it whole or not at all."""
    try:
        folder = _folder()
        folder.mkdir(parents=True, exist_ok=True)
        handle, unfinished = tempfile.mkstemp(dir=folder)
    except (OSError, RuntimeError):
        return
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(hashlib.sha256(content).digest() + content)
        os.replace(unfinished, folder / name)
    except OSError:  # a full disk, say
        Path(unfinished).unlink(missing_ok=True)
