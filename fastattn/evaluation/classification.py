"""Accuracy, F1, the confusion table and calibration of classifiers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fastattn.evaluation.report import Report, check_pairs, f1_of

BINS = 15  # Guo et al. 2017, On Calibration of Modern Neural Networks, section 5


def single_label(
    references: Sequence[int], probabilities: npt.ArrayLike, labels: Sequence[str], *, bins: int = BINS
) -> Report:
    """Metrics of a classifier that gives every example one of L labels.

    accuracy, macro_f1, micro_f1, ece and log_loss (nats). The prediction is the first of the likeliest labels.
    macro_f1 is the mean F1 of the labels that occur in references or predictions, micro_f1 that of the pooled counts,
    which equals the accuracy. ece is the mean over all examples of |accuracy - confidence| of their bin, in `bins`
    bins of equal width over the confidence, the likeliest label's probability.
    Tables: confusion (labels, counts with a row for each reference and a column for each prediction), per_label,
    reliability (a row for each bin that holds an example).

    Args:
        references: (N,) integers, numbers of labels from 0.
        probabilities: (N, L), each row a distribution.
        labels: L names.
        bins: of the calibration.

    Raises:
        ValueError: there is no example, a shape does not fit, a reference is not the number of a label, or a
            probability is not within [0, 1].
    """
    count = check_pairs(references, np.asarray(probabilities), "probabilities")
    scores = _scores(probabilities, count, len(labels))
    expected = np.asarray(references, np.int64)
    if expected.min() < 0 or expected.max() >= len(labels):
        raise ValueError(f"references: needs numbers of labels within [0, {len(labels)})")
    predicted = scores.argmax(1)
    confusion = np.zeros((len(labels), len(labels)), np.int64)
    np.add.at(confusion, (expected, predicted), 1)
    right = predicted == expected
    per_label = _per_label(np.diag(confusion), confusion.sum(0), confusion.sum(1), labels)
    seen = [row["f1"] for row in per_label if row["references"] or row["predictions"]]
    ece, reliability = calibration(scores.max(1), right, bins)
    of_reference = scores[np.arange(count), expected]
    with np.errstate(divide="ignore"):
        log_loss = float(-np.log(of_reference).mean())
    accuracy = float(right.mean())
    return Report(
        metrics={
            "accuracy": accuracy,
            "macro_f1": float(np.mean(seen)),
            "micro_f1": accuracy,
            "ece": ece,
            "log_loss": log_loss,
        },
        count=count,
        tables={
            "confusion": {"labels": list(labels), "counts": confusion.tolist()},
            "per_label": per_label,
            "reliability": reliability,
        },
    )


def multi_label(
    references: npt.ArrayLike, probabilities: npt.ArrayLike, labels: Sequence[str], *, bins: int = BINS
) -> Report:
    """Metrics of a classifier that decides on each of L labels separately, yes where its probability is over 0.5.

    accuracy is the share of examples whose labels are all right, macro_f1 the mean over all L labels, micro_f1 that of
    the pooled counts. ece is over all N * L decisions; a decision's confidence is the probability of the decided value.

    Args:
        references: (N, L), 1 where the label applies, else 0.
        probabilities: (N, L).
        labels: L names.
        bins: of the calibration.

    Raises:
        ValueError: there is no example, a shape does not fit, a reference is neither 0 nor 1, or a probability is not
            within [0, 1].
    """
    expected = np.asarray(references)
    count = check_pairs(expected, np.asarray(probabilities), "probabilities")
    if expected.shape != (count, len(labels)) or not np.isin(expected, (0, 1)).all():
        raise ValueError(
            f"references: got shape {expected.shape}, needs 0 and 1 of shape {(count, len(labels))}"
        )
    scores = _scores(probabilities, count, len(labels))
    expected, predicted = expected.astype(bool), scores > 0.5
    correct = (expected & predicted).sum(0)
    per_label = _per_label(correct, predicted.sum(0), expected.sum(0), labels)
    right = expected == predicted
    ece, reliability = calibration(np.maximum(scores, 1 - scores).ravel(), right.ravel(), bins)
    return Report(
        metrics={
            "accuracy": float(right.all(1).mean()),
            "macro_f1": float(np.mean([row["f1"] for row in per_label])),
            "micro_f1": f1_of(int(correct.sum()), int(predicted.sum()), int(expected.sum()))[2],
            "ece": ece,
        },
        count=count,
        tables={"per_label": per_label, "reliability": reliability},
    )


def calibration(
    confidence: npt.NDArray[np.floating], right: npt.NDArray[np.bool_], bins: int = BINS
) -> tuple[float, list[dict[str, float]]]:
    """The expected calibration error and, for each bin with examples, its edges, count, mean confidence and accuracy.

    Bin m of M holds the confidences within (m / M, (m + 1) / M], 0 with the first.

    Args:
        confidence: (N,), within [0, 1].
        right: (N,) bool, whether the decision was right.
        bins: M.

    Returns:
        The error, and a dict for each bin: low, high, count, confidence, accuracy.
    """
    edges = np.linspace(0.0, 1.0, bins + 1)
    of_bin = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)
    rows = []
    error = 0.0
    for number in np.unique(of_bin):
        inside = of_bin == number
        mean, accuracy = float(confidence[inside].mean()), float(right[inside].mean())
        rows.append(
            {
                "low": float(edges[number]),
                "high": float(edges[number + 1]),
                "count": int(inside.sum()),
                "confidence": mean,
                "accuracy": accuracy,
            }
        )
        error += abs(mean - accuracy) * int(inside.sum())
    return error / len(confidence), rows


def _scores(probabilities: npt.ArrayLike, count: int, labels: int) -> npt.NDArray[np.float64]:
    scores = np.asarray(probabilities, np.float64)
    if scores.shape != (count, labels):
        raise ValueError(f"probabilities: got shape {scores.shape}, needs {(count, labels)}")
    if not ((scores >= 0) & (scores <= 1 + 1e-6)).all():  # NaN is neither
        raise ValueError("probabilities: needs numbers within [0, 1]")
    return scores


def _per_label(correct: Any, predicted: Any, expected: Any, labels: Sequence[str]) -> list[dict[str, Any]]:
    rows = []
    for name, c, p, e in zip(labels, correct.tolist(), predicted.tolist(), expected.tolist()):
        precision, recall, f1 = f1_of(c, p, e)
        row = {"label": name, "precision": precision, "recall": recall, "f1": f1}
        rows.append({**row, "references": e, "predictions": p})
    return rows
