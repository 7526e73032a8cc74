"""Correlations and errors of numbers: regressions, and similarities of embedded pairs."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fastattn.evaluation.report import Report, check_pairs


def regression(references: npt.ArrayLike, predictions: npt.ArrayLike) -> Report:
    """pearson, spearman, mse and mae of predictions; a correlation with a constant is NaN.

    Args:
        references, predictions: (N,) finite numbers, or (N, C), C for each example, of which a correlation is the mean
            of those of the columns.

    Raises:
        ValueError: there is no number, the shapes differ, or a number is not finite.
    """
    expected, given = np.asarray(references, np.float64), np.asarray(predictions, np.float64)
    count = check_pairs(expected, given)
    for name, values in (("references", expected), ("predictions", given)):
        if values.ndim not in (1, 2) or not values.size or not np.isfinite(values).all():
            raise ValueError(f"{name}: got shape {values.shape}, needs finite numbers (N,) or (N, C)")
    if expected.shape != given.shape:
        raise ValueError(
            f"predictions: got shape {given.shape}, needs that of the references, {expected.shape}"
        )
    columns = list(zip(expected.reshape(count, -1).T, given.reshape(count, -1).T))
    difference = given - expected
    return Report(
        metrics={
            "pearson": float(np.mean([pearson(x, y) for x, y in columns])),
            "spearman": float(np.mean([pearson(ranks(x), ranks(y)) for x, y in columns])),
            "mse": float((difference**2).mean()),
            "mae": float(np.abs(difference).mean()),
        },
        count=count,
    )


def similarities(first: npt.ArrayLike, second: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Cosines (N,) of the rows of two matrices (N, E); 0 for a row of zeros."""
    a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    products = (a * b).sum(1)
    return np.divide(products, lengths, out=np.zeros_like(products), where=lengths > 0)


def pearson(x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]) -> float:
    """Pearson's correlation of x and y (N,); NaN where one of them does not vary."""
    if (x == x[0]).all() or (y == y[0]).all():
        return float("nan")
    # by its largest magnitude first: squares of very large or small numbers leave the range of float64
    a, b = (v - v.mean() for v in (x / np.abs(x).max(), y / np.abs(y).max()))
    return float(np.clip((a / np.linalg.norm(a)) @ (b / np.linalg.norm(b)), -1.0, 1.0))


def ranks(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Ranks from 1 on, equal values sharing the mean of theirs."""
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[group]
