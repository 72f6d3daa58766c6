"""A problem with few enough choices of directions to train them all, and a clear best one.

Images are grids of 6 x 6 tokens with two random bits each. A token has to tell bits of other
tokens, two steps away: of bit 0, what stands one step before it along `hilbert` took over from
one step before that along `diagonal`; of bit 1 likewise along `w3_flip` and `hilbert`. A block can
take one such step, so block 1 needs `diagonal` and `hilbert`, block 2 `hilbert` and `w3_flip`. No
other two directions lead to the same tokens, but for a few at the edges: a choice that misses a
direction guesses that bit, a loss of ln(2) / 2 = 0.347 in the mean of both bits.

    python tests/search/copy_task.py     trains all choices and writes brute_force.json; 3 minutes
"""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localmamba.models.localvim import LocalVim
from localmamba.ops.scan_orders import scan_order
from localmamba.search import SearchSettings, make_strategy, search_step

SIDE, BATCH, KEEP = 6, 32, 2
CANDIDATES = ["v_flip", "w3_flip", "diagonal", "hilbert"]
PATHS = [("diagonal", "hilbert"), ("hilbert", "w3_flip")]
"""For each bit, the directions of the step in block 1 and of the step in block 2."""

RANKING = Path(__file__).with_name("brute_force.json")

Table = list[list[str]]


def before(direction: str) -> np.ndarray:
    """For each token the one that the direction reads just before it, -1 for the first."""
    order = scan_order(direction, (SIDE, SIDE)).index
    source = np.full(SIDE * SIDE, -1)
    source[order[1:]] = order[:-1]
    return source


def sources() -> list[np.ndarray]:
    """For each bit and token the token whose bit it has to tell, or -1."""
    found = []
    for first, second in PATHS:
        one, two = before(first), before(second)
        found.append(np.where(two >= 0, one[two], -1))
    return found


SOURCES = sources()


def batches(count: int, seed: int) -> Iterator[Tensor]:
    """Images of random bits, -1 or 1, [B, 2, H, W]."""
    generator = torch.Generator().manual_seed(seed)
    shape = (BATCH, len(PATHS), SIDE, SIDE)
    for _ in range(count):
        yield torch.randint(0, 2, shape, generator=generator) * 2.0 - 1


def loss_of(model: nn.Module, images: Tensor) -> Tensor:
    """Cross-entropy, mean of both bits."""
    logits, bits = model(images), images.flatten(2)
    losses = []
    for bit, source in enumerate(SOURCES):
        tokens = np.flatnonzero(source >= 0)
        wanted = bits[:, bit, source[tokens]] > 0
        losses.append(F.binary_cross_entropy_with_logits(logits[:, tokens, bit], wanted.float()))
    return torch.stack(losses).mean()


@torch.no_grad()
def unseen_loss(model: nn.Module) -> float:
    """The loss on images that no training sees."""
    model.eval()
    return float(torch.stack([loss_of(model, images) for images in batches(2, 99)]).mean())


def make_model(directions: list[str] | Table, seed: int) -> LocalVim:
    """Two blocks that do not know where a token stands: only directions tell tokens apart."""
    torch.manual_seed(seed)
    model = LocalVim(
        img_size=SIDE, patch_size=1, in_chans=len(PATHS), num_classes=len(PATHS), global_pool="",
        embed_dim=32, depth=2, directions=directions, scattn=None, expand=1,
        d_state=2, drop_path_rate=0,
    )  # fmt: skip
    nn.init.zeros_(model.pos_embed).requires_grad_(False)
    model.rope = None
    return model


def make_optimizer(model: nn.Module, lr: float, steps: int) -> tuple:
    """AdamW and its schedule; made after a strategy has changed the model."""
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr, betas=(0.9, 0.99), weight_decay=0.0)
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)


def train(directions: Table, seed: int, steps: int = 150, lr: float = 0.01) -> float:
    """The loss on unseen images of a model with these directions, trained to the end."""
    model = make_model(directions, seed)
    optimizer, schedule = make_optimizer(model, lr, steps)
    for images in batches(steps, seed):
        optimizer.zero_grad()
        loss_of(model, images).backward()
        optimizer.step()
        schedule.step()
    return unseen_loss(model)


def search(strategy: str, seed: int, steps: int, lr: float, **settings) -> Table:
    """The directions that a strategy chooses."""
    model = make_model(CANDIDATES, seed)
    chosen = make_strategy(strategy, model, SearchSettings(KEEP, **settings), seed)
    optimizer, schedule = make_optimizer(model, lr, steps)
    pairs = zip(batches(steps, seed), batches(steps, seed + 1000), strict=True)
    for step, (images, held_out) in enumerate(pairs):
        search_step(
            chosen, lambda x: loss_of(model, x), optimizer, images, held_out, step / steps
        )  # fmt: skip
        schedule.step()
    chosen.end_epoch()
    return chosen.directions(chosen.conclude(lambda: unseen_loss(model)))


def all_choices() -> list[Table]:
    """The 36 there are."""
    sets = [list(names) for names in itertools.combinations(CANDIDATES, KEEP)]
    return [list(rows) for rows in itertools.product(sets, repeat=2)]


def main(seeds: int = 3) -> None:
    """Trains every choice from several seeds; best first."""
    torch.set_num_threads(1)
    ranking = []
    for choice in all_choices():
        losses = [round(train(choice, seed), 4) for seed in range(seeds)]
        ranking.append({"directions": choice, "losses": losses})
        print(choice, losses, flush=True)
    ranking.sort(key=lambda row: min(row["losses"]))
    lines = ",\n".join(json.dumps(row) for row in ranking)
    RANKING.write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    main()
