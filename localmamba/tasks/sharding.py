"""Training with parameters, gradients and optimizer states cut over processes (FSDP2)."""

import json
import os
from hashlib import sha256
from pathlib import Path
from typing import Any, cast
from uuid import uuid4

import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from localmamba._files import remove, sync, write_atomically
from localmamba.tasks.state import BEFORE, DIGESTS


def shard(model: nn.Module, mesh: DeviceMesh) -> None:
    """Cuts a model in place: every block of `blocks`, as timm's models name them, and the rest.

    Parameters stay float32 and autocast casts, as without sharding: A and dt's bias in bfloat16
    would change the scan.
    """
    if isinstance(model, FSDPModule):
        return
    for name, blocks in list(model.named_modules()):
        if name.rpartition(".")[2] == "blocks":
            for block in blocks.children():
                fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def gather_state(model: nn.Module) -> dict[str, Tensor]:
    """Returns the whole state of a sharded model on the CPU; empty in all processes but the first.

    Every process takes part.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return cast(dict[str, Tensor], get_model_state_dict(model, options=options))


class ShardedStrategy(ModelParallelStrategy):
    """FSDP2 whose checkpoints are folders, one file a process, that are replaced as a whole.

    They keep the promises of `StateIO`: everything is synced before it gets its name, files have
    checksums, and the state before is kept. They load on any number of processes.

    Args:
        processes: Number of all processes.
    """

    def __init__(self, processes: int):
        super().__init__(data_parallel_size=processes, tensor_parallel_size=1)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None
    ) -> None:
        """Writes a checkpoint; every process takes part."""
        path = Path(self.broadcast(filepath))
        draft = self.broadcast(path.with_name(f".{path.name}.{uuid4().hex}.draft"))
        # Syncs the shards.
        super().save_checkpoint(checkpoint, draft, storage_options)
        own = set(draft.glob(f"__{self.global_rank}_*"))
        if self.global_rank == 0:
            own |= {file for file in draft.iterdir() if file.suffix != ".distcp"}
        digests: list[dict[str, str]] = [{} for _ in range(self.world_size)]
        dist.all_gather_object(
            digests, {file.name: sha256(file.read_bytes()).hexdigest() for file in own}
        )
        if self.global_rank == 0:
            for file in own:
                sync(file)
            everything = {name: digest for part in digests for name, digest in part.items()}
            write_atomically(draft / DIGESTS, json.dumps(everything))
            before = path.with_name(BEFORE)
            if path.exists():
                remove(before)
                os.replace(path, before)
            os.replace(draft, path)
            sync(path.parent)
        self.barrier()
