"""State of a run that is not finished: saved, checked, found again."""

import io
import json
import os
import pickle
import warnings
from contextlib import ExitStack
from hashlib import sha256
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor

from localmamba._files import remove, write_atomically
from localmamba._signals import Stopped, handled, stop
from localmamba.tasks.job import ELSEWHERE, Job
from localmamba.tasks.run_folder import STATES, plain

STATE, BEFORE = STATES
DIGESTS = "digests.json"
"""Checksums of the files of a state that is a folder (`ShardedStrategy`)."""
DIGEST_BYTES = sha256().digest_size


class StateIO(TorchCheckpointIO):
    """Writes Lightning's checkpoints beside their target, with a checksum, and keeps the last two.

    Lightning's own goes through the temporary folder: a move between file systems is not atomic.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Writes a checkpoint, followed by its SHA-256."""
        del storage_options
        content = io.BytesIO()
        torch.save(checkpoint, content)
        content.write(sha256(content.getbuffer()).digest())
        write_atomically(path, content.getbuffer(), Path(path).with_name(BEFORE))

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Reads a checkpoint to the CPU, whatever the arguments. No code of the file is run."""
        del map_location, weights_only
        return read_state(Path(path))


def read_state(path: Path) -> dict[str, Any]:
    """Reads a saved state; of one in shards, all but the tensors.

    Raises:
        DamagedStateError: If it is not whole, or no state.
    """
    if path.is_dir():
        return _read_folder(path)
    whole = memoryview(path.read_bytes())
    content, digest = whole[:-DIGEST_BYTES], whole[-DIGEST_BYTES:]
    if sha256(content).digest() != digest:
        raise DamagedStateError(f"{path} is damaged, or no state of a run (wrong checksum)")
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        state["job"] = json.loads(state["job"])
    except (RuntimeError, ValueError, LookupError, TypeError, EOFError, pickle.UnpicklingError):
        raise DamagedStateError(f"{path} is no state of a run") from None
    return state


def _read_folder(path: Path) -> dict[str, Any]:
    try:
        for name, digest in json.loads((path / DIGESTS).read_text()).items():
            if sha256((path / name).read_bytes()).hexdigest() != digest:
                raise DamagedStateError(f"{path / name} is damaged (wrong checksum)")
        state = torch.load(path / "meta.pt", map_location="cpu", weights_only=True)
        state["job"] = json.loads(state["job"])
    except (OSError, ValueError, AttributeError, LookupError) as error:
        if isinstance(error, DamagedStateError):
            raise
        raise DamagedStateError(f"{path} is no state of a run") from None
    return state


class DamagedStateError(ValueError):
    """A file that should hold the state of a run holds something else."""


def find_state(folder: Path, job: Job) -> Path | None:
    """Returns the newest whole state in a folder, with a warning if a newer one is damaged.

    Returns:
        Its path; None if the run was stopped before it saved any.

    Raises:
        ValueError: If every state is damaged, or it is of a job with other settings.
    """
    faults = []
    for path in (folder / STATE, folder / BEFORE):
        if not path.exists():
            continue
        try:
            saved = read_state(path)["job"]
        except DamagedStateError as error:
            faults.append(str(error))
            continue
        now = plain(job.config())
        for key in (saved | now).keys() - ELSEWHERE:
            if saved.get(key) != now.get(key):
                raise ValueError(
                    f"{path} is of a {job.kind} with other settings: {key} was {saved.get(key)}, "
                    f"now {now.get(key)}"
                )
        if faults:
            warnings.warn(f"{faults[0]}; resuming from the one before, {path}", stacklevel=2)
        return path
    if faults:
        raise ValueError(
            f"nothing to resume: {' and '.join(faults)}; put a copy in its place, or start again "
            "with --overwrite"
        )
    return None


class SaveState(Checkpoint):
    """Saves Lightning's checkpoint of a run, from which it can be resumed.

    A signal that asks to stop is followed at the end of the running step, or of the validation
    after it, by every process at the same step; a second one at once.

    Args:
        folder: Folder of the first process, which alone writes; none if not given.
        job: Kept in the checkpoint, see `find_state`.
        resumed: The state from which the run goes on, if any.
    """

    def __init__(self, folder: Path | None, job: Job, resumed: Path | None = None):
        self.folder = folder
        self.job = job
        self.resumed = resumed
        self._saved = self._step = self._signal = 0
        self._asked: Tensor | None = None
        self._handling = ExitStack()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Tells the other processes whether there is a folder; all of them take part in saving."""
        del pl_module, stage
        self.path = trainer.strategy.broadcast(self.folder and self.folder / STATE)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Drops a newer state that is damaged, now that every process has read the one before."""
        del pl_module
        self._saved = self._step = trainer.global_step
        if self.folder and self.resumed and self.resumed.name == BEFORE:
            remove(self.folder / STATE)
            os.replace(self.resumed, self.folder / STATE)
        self._handling.enter_context(handled(self._note))

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Saves in the course of long epochs; never between batches whose gradients are added."""
        stepped, self._step = trainer.global_step > self._step, trainer.global_step
        if not stepped or trainer.is_last_batch:  # a state before the validation would skip it
            return
        signal = self._agreed(trainer)
        if signal or self._step - self._saved >= self.job.saving.save_steps:
            self._save(trainer, signal)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves after the other callbacks and the check of the loss."""
        del pl_module
        self._agreed(trainer)
        self._save(trainer, self._agreed(trainer))

    def on_train_end(self, *_: Any) -> None:
        """Restores the handlers of signals: nothing can be lost any more."""
        self._handling.close()

    def on_exception(self, *_: Any) -> None:
        """Restores the handlers of signals."""
        self._handling.close()

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Adds the job."""
        del trainer, pl_module
        checkpoint["job"] = json.dumps(plain(self.job.config()))

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._signal:
            stop(number, frame)
        self._signal = number

    def _agreed(self, trainer: Trainer) -> int:
        """Returns the signal that any of the processes had got at the last call, or 0.

        To read that of this call would be to wait for the GPU in every step.
        """
        if trainer.world_size == 1:
            return self._signal
        number = torch.tensor(self._signal, device=trainer.strategy.root_device)
        # The strategy's `reduce` has a barrier.
        dist.all_reduce(number, dist.ReduceOp.MAX)
        before, self._asked = self._asked, number
        return 0 if before is None else int(before)

    def _save(self, trainer: Trainer, signal: int) -> None:
        self._saved = trainer.global_step
        if self.path is not None:
            trainer.save_checkpoint(self.path)
        if signal:
            note = f"; step {self._saved} is saved, --resume goes on from it" if self.path else ""
            raise Stopped(signal, note)
