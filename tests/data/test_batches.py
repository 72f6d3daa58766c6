"""Batches of images: sizes, augmentation, determinism, equal transforms of files and arrays."""

import dataclasses

import numpy as np
import pytest
import torch

from localmamba.data import Augmentation, Examples, ImageSettings, InputSpec, Source
from localmamba.data.module import ImageData
from localmamba.data.sampling import EpochBatches
from localmamba.data.transforms import BatchAugmentation, eval_transform, normalize

GRAY = InputSpec(size=8, channels=1, mean=(0.5,), std=(0.25,))
RGB = InputSpec(size=16, channels=3, mean=(0.4, 0.5, 0.6), std=(0.2, 0.2, 0.2), crop_pct=0.8)


def arrays(count: int = 20, size: int = 8) -> Examples:
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (count, size, size), dtype=np.uint8)
    return Examples(images, np.arange(count) % 2)


def image_data(batch_size=8, **options) -> ImageData:
    source = Source("arrays", ("a", "b"), 1, {"train": arrays(), "val": arrays(6)})
    return ImageData(source, GRAY, ImageSettings(batch_size=batch_size, workers=0), **options)


def test_training_batches_are_whole_and_shuffled():
    first = list(image_data().train_dataloader())
    assert [tuple(images.shape) for images, _ in first] == [(8, 1, 8, 8)] * 2
    again = list(image_data().train_dataloader())
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(first, again, strict=True))
    other = image_data(seed=1).train_dataloader()
    assert not torch.equal(next(iter(other))[0], first[0][0])


def order(loader) -> list[list[int]]:
    return list(loader.batch_sampler)


def test_every_epoch_has_an_order_of_its_own_that_can_be_sought():
    batches = EpochBatches([np.arange(20)], batch_size=4)
    epochs = []
    for epoch in range(3):
        batches.set_epoch(epoch)
        epochs += list(batches)
    assert sorted(i % 20 for i in epochs[0] + epochs[1] + epochs[2] + epochs[3] + epochs[4]) == [
        *range(20)
    ]
    assert [i % 20 for i in epochs[0]] != [i % 20 for i in epochs[5]]
    for done in (0, 3, 5, 9):
        batches.seek(done)
        batches.set_epoch(done // 5)  # as Lightning does, after the resume
        assert list(batches) == epochs[done : (done // 5 + 1) * 5]


def test_processes_share_the_batches_of_one():
    whole = list(EpochBatches([np.arange(22)], batch_size=8, seed=3))
    shares = [list(EpochBatches([np.arange(22)], 4, 3, rank, 2)) for rank in range(2)]
    assert [sorted(a + b) for a, b in zip(*shares, strict=True)] == list(map(sorted, whole))


def test_a_search_has_images_of_alpha_in_the_second_half_of_a_batch():
    data = image_data(batch_size=4, choice_share=0.2)
    weights, alpha = (set(part.tolist()) for part in data.parts())
    assert (len(weights), len(alpha)) == (16, 4)
    batches = order(data.train_dataloader())
    assert len(batches) == 4
    for batch in batches:
        assert set(batch[:4]) <= weights
        assert set(batch[4:]) <= alpha


def test_augmentation_of_an_image_follows_seed_epoch_and_image():
    data = image_data(augmentation=Augmentation(crop_scale=(0.2, 0.9)), seed=5)
    dataset = data.dataset("train", training=True)
    torch.manual_seed(1)
    first, other_epoch = dataset[3][0], dataset[3 + len(dataset)][0]
    torch.manual_seed(2)
    assert torch.equal(dataset[3][0], first)
    assert not torch.equal(other_epoch, first)


def test_a_set_smaller_than_a_batch_is_one_batch():
    (batch,) = image_data(batch_size=64).train_dataloader()
    assert len(batch[0]) == 20


def test_held_out_batches_hold_every_image_in_order():
    batches = list(image_data(batch_size=4).val_dataloader())
    assert torch.equal(torch.cat([labels for _, labels in batches]), torch.arange(6) % 2)


def test_arrays_and_files_get_the_same_tensors(tmp_path):
    examples = arrays(3)
    paths = []
    for i in range(3):
        paths.append(str(tmp_path / f"{i}.png"))
        examples.image(i).save(paths[-1])
    files = Examples(paths, examples.labels)
    spec = dataclasses.replace(GRAY, size=20)
    transform = eval_transform(spec)
    for i in range(3):
        assert torch.equal(transform(files.image(i)), transform(examples.image(i)))


def test_normalize_is_by_channel():
    images = torch.full((1, 3, 2, 2), 255, dtype=torch.uint8)
    assert torch.allclose(normalize(images, RGB)[0, :, 0, 0], torch.tensor([3.0, 2.5, 2.0]))


def test_no_augmentation_is_normalization():
    images = torch.from_numpy(arrays().images)[:, None]
    augmented = BatchAugmentation(GRAY, Augmentation())(images)
    assert torch.equal(augmented, normalize(images, GRAY))


def test_mirror_images():
    images = torch.from_numpy(arrays().images)[:, None]
    augmented = BatchAugmentation(GRAY, Augmentation(hflip=1.0))(images)
    assert torch.equal(augmented, normalize(images.flip(-1), GRAY))


def bright_spot(size: int = 33) -> torch.Tensor:
    image = torch.zeros(200, 1, size, size, dtype=torch.uint8)
    image[:, :, size // 2 - 1 : size // 2 + 2, size // 2 - 1 : size // 2 + 2] = 255
    return image


@pytest.mark.parametrize(
    ("augmentation", "largest"),
    [
        (Augmentation(shift=0.25), 0.25),
        (Augmentation(rotate=30, zoom=0.2, shear=10), 0.0),
        (Augmentation(elastic=0.03), 0.12),
    ],
    ids=["shift", "around the center", "elastic"],
)
def test_how_far_a_spot_in_the_centre_moves(augmentation, largest):
    torch.manual_seed(0)
    plain = InputSpec(33, 1, (0.0,), (1.0,))
    moved = BatchAugmentation(plain, augmentation)(bright_spot())[:, 0]
    axis = torch.arange(33) - 16.0
    mass = moved.sum((1, 2))
    x, y = (moved.sum(1) * axis).sum(1) / mass, (moved.sum(2) * axis).sum(1) / mass
    reach = torch.stack([x, y]).abs().max() / 33
    assert reach <= largest + 0.01
    assert reach >= 0.5 * largest
    assert float(x.std()) == pytest.approx(float(y.std()), rel=0.3, abs=0.05)


def test_erasing_changes_about_its_share_of_the_images():
    torch.manual_seed(0)
    images = torch.full((400, 1, 8, 8), 128, dtype=torch.uint8)
    augmented = BatchAugmentation(GRAY, Augmentation(erasing=0.25))(images)
    changed = (augmented != normalize(images, GRAY)).flatten(1).any(1)
    assert 0.15 < changed.float().mean() < 0.35


@pytest.mark.parametrize(
    ("augmentation", "message"),
    [
        ({"hflip": 1.5}, "hflip must be between 0 and 1, got 1.5"),
        ({"rotate": -1}, "rotate must be at least 0"),
        ({"crop_scale": (0.5, 0.2)}, "crop_scale must be two fractions"),
    ],
)
def test_wrong_augmentation(augmentation, message):
    with pytest.raises(ValueError, match=message):
        Augmentation(**augmentation)
