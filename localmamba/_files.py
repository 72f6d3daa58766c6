"""Files that are replaced in one step."""

import os
from pathlib import Path
from uuid import uuid4


def write_atomically(path: str | Path, content: str | bytes) -> None:
    """Writes a file so that a reader finds the old content or the new one, never a part of it.

    Missing folders are made. Several processes may write the same file: the last one wins.

    Args:
        path: The file, which is replaced if there is one.
        content: Its whole content; text is written as UTF-8.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        draft.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
