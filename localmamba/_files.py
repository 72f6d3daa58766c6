"""Files that are replaced in one step."""

import errno
import os
import shutil
from pathlib import Path
from uuid import uuid4

FULL = {errno.ENOSPC, errno.EDQUOT}
"""Error numbers of a disk, or a user's share of it, without space."""

DRAFTS = ".*.draft"
"""Pattern of the files that `write_atomically` is about to rename."""


def write_atomically(
    path: str | Path, content: str | bytes | memoryview, before: Path | None = None
) -> None:
    """Writes a file so that a reader finds the old content or the new one, never a part of it.

    That holds after a power cut too: content and names are synced to the disk. Missing folders are
    made. Several processes may write the same file: the last one wins.

    Args:
        path: The file, which is replaced if there is one.
        content: Its whole content; text is written as UTF-8.
        before: Name in the same folder under which the old content is kept.

    Raises:
        OSError: If it cannot be written; the old content is still there.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{uuid4().hex}.draft")
    try:
        with draft.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        if before is not None and path.exists():
            os.replace(path, before)
        os.replace(draft, path)
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise OSError(
            f"no space left on the disk of {path.parent} to write {path.name}; what was saved "
            "before is whole: free some space, then go on (a run: with --resume)"
        ) from error
    finally:
        draft.unlink(missing_ok=True)
    sync(path.parent)


def sync(path: Path) -> None:
    """Writes the content of a file, or the names in a folder, to the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def remove(path: Path) -> None:
    """Removes a file, or a folder and all that is in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
