"""Files that are replaced in one step."""

import os
from pathlib import Path
from uuid import uuid4

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
    finally:
        draft.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
