"""Policy for image files that cannot be read, and their list."""

import csv
import warnings
from io import StringIO
from pathlib import Path
from typing import Literal

from localmamba._files import write_atomically

BadImagePolicy = Literal["error", "skip", "unchecked"]


class BadImages:
    """The images of a run that cannot be read.

    Args:
        policy: `error` (stop), `skip` (record) or `unchecked` (as `error`, when one is met).
        share: Share of a split that may be bad under `skip`.

    Attributes:
        left_out: Indices of those that the check of a split found, by split.
    """

    def __init__(self, policy: BadImagePolicy, share: float):
        self.policy = policy
        self.share = share
        self.left_out: dict[str, list[int]] = {}
        self._path: Path | None = None
        self._causes: dict[str, dict[str, str]] = {}

    @property
    def path(self) -> Path | None:
        """CSV file of them, if there are any."""
        return self._path

    @path.setter
    def path(self, path: Path | None) -> None:
        self._path = path
        self._write()

    def add(self, split: str, total: int, causes: dict[str, str], needed: bool = False) -> None:
        """Records images that cannot be read, by name.

        Args:
            split: Name of the split.
            total: Number of images in it.
            causes: What `open_image` said of each.
            needed: Whether nothing can stand in for them, whatever the policy.

        Raises:
            ValueError: If they may not be left out.
        """
        known = self._causes.setdefault(split, {})
        if not (new := {name: cause for name, cause in causes.items() if name not in known}):
            return
        known |= new
        first = " | ".join(list(new.values())[:3]) + (" | ..." if len(new) > 3 else "")
        if needed or self.policy != "skip":
            raise ValueError(
                f"{len(new)} of {total} images of {split!r} cannot be read: {first}; remove them, "
                "or leave them out with --bad_images skip"
            )
        if len(known) > self.share * total:
            raise ValueError(
                f"{len(known)} of {total} images of {split!r} cannot be read, more than the share "
                f"of {self.share:g} that --bad_share allows: {first}"
            )
        warnings.warn(f"left out {len(new)} of {total} images of {split!r}: {first}", stacklevel=2)
        self._write()

    def _write(self) -> None:
        if self._path is None or not any(self._causes.values()):
            return
        text = StringIO(newline="")
        writer = csv.writer(text)
        writer.writerow(["split", "file", "cause"])
        for split, causes in self._causes.items():
            writer.writerows([split, *item] for item in causes.items())
        write_atomically(self._path, text.getvalue())
