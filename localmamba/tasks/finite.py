"""Losses that are not finite: stops a run and saves what reproduces the pass, or skips steps."""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from localmamba._files import write_atomically
from localmamba.data.module import derive_seed, seed_generators
from localmamba.models.loading import build_model
from localmamba.tasks.job import Job, TrainingJob
from localmamba.tasks.run_folder import plain

FILE = "nonfinite.pt"
"""Pass whose loss was not finite, in the folder of its run."""


@dataclass(frozen=True)
class _Pass:
    """A forward pass whose flags (images finite, loss finite) are to be read."""

    flags: Tensor
    copy: Tensor  # on the CPU, once `copied` has come
    copied: torch.cuda.Event | None
    content: dict[str, Any]


class FiniteCheck(Callback):
    """Stops a run at NaN or infinity, after saving the pass; or skips so many steps.

    To stop, the flags of a batch are read when the next one starts, as soon as the forward pass is
    done: the backward pass goes on meanwhile. So the weights from before the batch are kept on the
    device. To skip, the flags are read before the optimizer's step, in every process
    alike.

    Args:
        skip: Largest number of steps that are skipped.
        run: Description of the run for `reproduce`, see `describe_run`.
        folder: Folder of the first process; none if nothing is to be saved.
    """

    def __init__(
        self, skip: int = 0, run: Mapping[str, str] | None = None, folder: Path | None = None
    ):
        self.skip, self.run, self.folder = skip, run or {}, folder
        self.skipped = 0
        self._noted: list[_Pass] = []
        self._weights: dict[str, Tensor] = {}
        self._before: list[Tensor] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Tells the other processes the folder."""
        del pl_module, stage
        self.folder = trainer.strategy.broadcast(self.folder)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Makes room for the weights from before a batch."""
        del trainer
        assert isinstance(pl_module.model, nn.Module)
        self._weights = _named_tensors(pl_module.model)
        self._before = [tensor.clone() for tensor in self._weights.values()]

    def on_train_batch_start(self, *_: Any) -> None:
        """Checks the batch before, then keeps the weights."""
        self.check()
        torch._foreach_copy_(self._before, list(self._weights.values()))

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Skips the step if the loss of any process was not finite, as often as is allowed."""
        del pl_module
        if not self.skip:
            return
        finite = torch.stack([one.flags.all() for one in self._noted]).all().int()
        if trainer.strategy.reduce(finite, reduce_op="min"):
            self._noted = []
            return
        self.skipped += 1
        if self.skipped > self.skip:
            self.check()
            raise ValueError(f"more than skip_nonfinite {self.skip} losses were not finite")
        self._noted = []
        optimizer.zero_grad(set_to_none=True)
        # Running statistics have seen the pass.
        torch._foreach_copy_(list(self._weights.values()), self._before)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Logs the number of steps skipped so far."""
        del trainer
        if self.skip:
            count = float(self.skipped)
            pl_module.log("skipped_steps", count, on_step=False, on_epoch=True, reduce_fx="max")

    def on_train_epoch_end(self, *_: Any) -> None:
        """Checks the last batch."""
        self.check()

    def on_save_checkpoint(self, *_: Any) -> None:
        """Checks the last batch, so that no state is saved that goes on to NaN."""
        self.check()

    def state_dict(self) -> dict[str, int]:
        """Returns the number of skipped steps, for a checkpoint."""
        return {"skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Takes the number of a checkpoint."""
        self.skipped = state_dict["skipped"]

    def note(
        self, images: Tensor, targets: Tensor, loss: Tensor, where: str, seeds: list[list[int]]
    ) -> None:
        """Computes the flags of a forward pass, on its device.

        Args:
            images: Images [B, C, H, W].
            targets: Labels, before they are mixed.
            loss: Loss of the pass.
            where: Epoch and step.
            seeds: Arguments of `seed_pass` before the pass.
        """
        flags = torch.stack([images.isfinite().all(), loss.detach().isfinite().all()])
        content = {"images": images, "targets": targets, "where": where, "seeds": seeds}
        copy, copied = flags.to("cpu", non_blocking=True), None
        if flags.is_cuda:
            copied = torch.cuda.Event()
            copied.record()
        self._noted.append(_Pass(flags, copy, copied, content))

    def check(self) -> None:
        """Raises ValueError if the images or the loss of a pass noted were not finite."""
        noted, self._noted = self._noted, []
        for one in noted:
            if one.copied is not None:
                one.copied.synchronize()
            images, loss = one.copy.tolist()
            if not (images and loss):
                what = (
                    "the loss is no longer finite" if images else "the input holds NaN or infinity"
                )
                advice = "; try a smaller lr, clip_grad 1 or precision 32" if images else ""
                where, saved = one.content["where"], self._save(one.content)
                raise ValueError(f"{what} ({where}){advice}{saved}")

    def _save(self, content: dict[str, Any]) -> str:
        if self.folder is None:
            return ""
        file = io.BytesIO()
        weights = {
            name: tensor.cpu() for name, tensor in zip(self._weights, self._before, strict=True)
        }
        tensors = {name: content[name].cpu() for name in ("images", "targets")}
        torch.save({**self.run, **content, **tensors, "weights": weights}, file)
        write_atomically(self.folder / FILE, file.getbuffer())
        return f"; {self.folder / FILE} holds the pass for localmamba.tasks.finite.reproduce"


def describe_run(job: Job, arguments: Mapping[str, Any]) -> dict[str, str]:
    """Returns what `reproduce` needs to know of a run: its job, and arguments of its model."""
    return {"job": json.dumps(plain(job.config())), "arguments": json.dumps(plain(arguments))}


def seed_pass(seeds: Sequence[Sequence[int]]) -> None:
    """Seeds all generators from the first numbers, then PyTorch's from the second ones."""
    seed_generators(*seeds[0])
    torch.manual_seed(derive_seed(*seeds[1]))


def reproduce(path: Path) -> Tensor:
    """Runs again, on the CPU, the pass of a training whose loss was not finite.

    A search comes to the same pass with `--resume` from its last state.

    Args:
        path: The file `nonfinite.pt` of the run.

    Returns:
        The loss, with its graph.
    """
    from localmamba.tasks.classification import Classification

    content = torch.load(path, map_location="cpu", weights_only=True)
    job = TrainingJob.from_config(json.loads(content["job"]))
    arguments = json.loads(content["arguments"])
    model = build_model(job.model, arguments).train()
    for name, tensor in _named_tensors(model).items():
        tensor.copy_(content["weights"][name])
    module = Classification(
        model, arguments["num_classes"], job.training, job.augmentation, job.seed
    )
    seed_pass(content["seeds"])
    with torch.autocast("cpu", torch.bfloat16, enabled=job.hardware.precision == "bf16-mixed"):
        mixed = module.mix(content["images"], content["targets"])
        return module.cross_entropy(model, *mixed)


def _named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Returns parameters and buffers by name, without gradient; of a sharded one its shard."""
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {n: (t.to_local() if hasattr(t, "to_local") else t).detach() for n, t in named.items()}
