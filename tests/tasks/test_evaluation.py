"""Metrics of an evaluation, against values counted by hand and scikit-learn's."""

import numpy as np
import pytest
import torch
from scipy.special import softmax
from sklearn.metrics import (
    confusion_matrix,
    log_loss,
    precision_recall_fscore_support,
    top_k_accuracy_score,
)
from torch import nn

from localmamba.data import Examples, ImageSettings, InputSpec, Source
from localmamba.data.module import ImageData
from localmamba.tasks.classification import Classification
from localmamba.tasks.evaluation import TOP, Evaluation, evaluate, evaluate_model
from localmamba.tasks.settings import Hardware
from localmamba.tasks.trainer import make_trainer

SPEC = InputSpec(8, 1, (0.5,), (0.5,))


def evaluation(labels: list[int], ranked: list[list[int]], classes: str) -> Evaluation:
    count = len(labels)
    images = tuple(map(str, range(count)))
    confidence, losses = np.full(count, 0.5), np.full(count, 0.25)
    return Evaluation(
        tuple(classes), images, np.array(labels), np.array(ranked), confidence, losses, 1.0, 1.0
    )


def test_values_counted_by_hand():
    # a: 2 of 3 right, b: 1 of 2, c: never right, d: no images.
    found = evaluation([0, 0, 0, 1, 1, 2], [[0], [0], [1], [1], [0], [0]], "abcd")
    assert found.metrics() == {"accuracy": 0.5, "loss": 0.25, "images": 6}
    assert found.confusion().tolist() == [[2, 1, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    a, b, c, d = found.per_class()
    assert a == {
        "class": "a",
        "images": 3,
        "recall": 0.666667,
        "precision": 0.5,
        "f1": 0.571429,
        "confused_with": "b",
        "confused_images": 1,
    }
    assert (b["recall"], b["precision"]) == (0.5, 0.5)
    assert (c["recall"], c["precision"], c["f1"], c["confused_with"]) == (0.0, None, 0.0, "a")
    assert (d["images"], d["recall"], d["f1"], d["confused_with"]) == (0, None, None, None)
    assert found.predictions()[4] == {
        "image": "4",
        "class": "b",
        "predicted": "a",
        "probability": 0.5,
    }


class Table(nn.Module):
    """Gives the image whose first pixel is i the logits of row i."""

    def __init__(self, logits: np.ndarray):
        super().__init__()
        self.logits = nn.Parameter(torch.from_numpy(logits))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        numbers = ((images[:, 0, 0, 0] * 0.5 + 0.5) * 255).round().long()
        return self.logits[numbers]


def numbered(labels: np.ndarray, count: int) -> Source:
    images = np.broadcast_to(
        np.arange(len(labels), dtype=np.uint8)[:, None, None], (len(labels), 8, 8)
    )
    examples = Examples(images.copy(), labels)
    return Source("numbered", tuple(f"c{i}" for i in range(count)), 1, {"test": examples})


def test_a_model_is_evaluated_as_by_scikit_learn():
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(101, 9)).astype(np.float32)
    labels = generator.integers(0, 9, 101)
    logits[np.arange(101), labels] += 1
    data = ImageData(numbered(labels, 9), SPEC, ImageSettings(batch_size=16), evaluated="test")
    cpu = Hardware("cpu")
    in_training = evaluate(make_trainer(cpu), Classification(Table(logits), 9), data)
    found = evaluate_model(Table(logits), data, cpu)
    assert found.labels.tolist() == labels.tolist()
    assert (found.ranked == np.argsort(-logits, axis=1)[:, :TOP]).all()
    metrics = found.metrics()
    assert metrics["accuracy"] == pytest.approx((logits.argmax(1) == labels).mean())
    assert metrics["loss"] == pytest.approx(log_loss(labels, softmax(logits, axis=1)))
    assert in_training == pytest.approx({name: metrics[name] for name in in_training})
    assert metrics["top5"] == pytest.approx(top_k_accuracy_score(labels, logits, k=5))
    assert (found.confusion() == confusion_matrix(labels, logits.argmax(1))).all()
    expected = precision_recall_fscore_support(labels, logits.argmax(1), zero_division=np.nan)
    columns = zip(*expected, strict=True)
    for row, (precision, recall, f1, images) in zip(found.per_class(), columns, strict=True):
        assert row["images"] == images
        assert row["recall"] == pytest.approx(recall, abs=1e-6)
        assert row["precision"] == pytest.approx(precision, abs=1e-6)
        assert row["f1"] == pytest.approx(f1, abs=1e-6)
    assert found.rate > 0
    assert found.model_rate >= found.rate


def test_outputs_that_are_not_finite_are_refused():
    logits = np.zeros((4, 3), np.float32)
    logits[2, 1] = np.nan
    data = ImageData(numbered(np.zeros(4, int), 3), SPEC, ImageSettings(), evaluated="test")
    with pytest.raises(ValueError, match="puts out NaN or infinity for 1 of 4 images"):
        evaluate_model(Table(logits), data, Hardware("cpu"))
