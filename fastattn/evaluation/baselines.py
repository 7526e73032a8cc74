"""Baselines without a model: the majority, TF-IDF with a linear classifier, the lead and a copy."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from fastattn.evaluation.report import MissingPackage
from fastattn.evaluation.words import SENTENCE_END, is_unspaced

Label = TypeVar("Label", bound=Hashable)

_SENTENCE_END = re.compile(SENTENCE_END + r"|\n\s*\n")


def majority(labels: Sequence[Label]) -> Label:
    """The most frequent label; of equally frequent ones the first in alphabetical order.

    Raises:
        ValueError: there is no label.
    """
    counts = Counter(labels)
    return min(counts, key=lambda label: (-counts[label], str(label)))


def tags_by_word(sentences: Sequence[Sequence[str]], tags: Sequence[Sequence[str]]) -> dict[str, str]:
    """The most frequent tag of each word of tagged sentences."""
    seen: dict[str, list[str]] = {}
    for words, of_words in zip(sentences, tags):
        for word, tag in zip(words, of_words):
            seen.setdefault(word, []).append(tag)
    return {word: majority(each) for word, each in seen.items()}


def tfidf_classifier(
    texts: Sequence[str], labels: Sequence[str], evaluated: Sequence[str], names: Sequence[str]
) -> npt.NDArray[np.float64]:
    """For each evaluated text a one-hot row over `names`: the label by a linear SVM over TF-IDF features.

    Words and pairs of words with sublinear counts; 1 to 3 characters where texts are mostly in Han or kana.

    Args:
        texts, labels: to train on, two different labels at least.
        evaluated: the texts to label.
        names: L labels, those of the training texts among them.

    Returns:
        (N, L), N evaluated texts.

    Raises:
        MissingPackage: scikit-learn is not installed.
    """
    svm = sklearn_package().svm
    vectors = _vectors(texts)
    classifier = svm.LinearSVC(random_state=0).fit(vectors.fit_transform(texts), list(labels))
    found = classifier.predict(vectors.transform(evaluated))
    rows = np.zeros((len(evaluated), len(names)))
    rows[np.arange(len(evaluated)), [list(names).index(label) for label in found]] = 1.0
    return rows


def tfidf_similarity(first: Sequence[str], second: Sequence[str]) -> npt.NDArray[np.float64]:
    """Cosines (N,) of the TF-IDF vectors of N pairs of texts; document frequencies are those of all texts given.

    Raises:
        MissingPackage: scikit-learn is not installed.
    """
    vectors = _vectors([*first, *second]).fit([*first, *second])
    a, b = vectors.transform(first), vectors.transform(second)
    return np.asarray(a.multiply(b).sum(1)).ravel()


def lead(text: str) -> str:
    """The first sentence of a text; the whole text if no sentence ends."""
    return next((part for part in _SENTENCE_END.split(text.strip()) if part.strip()), "").strip()


def _vectors(texts: Sequence[str]) -> Any:
    unspaced = 2 * sum(map(is_unspaced, texts)) > len(texts)
    make = sklearn_package().feature_extraction.text.TfidfVectorizer
    if unspaced:
        return make(analyzer="char", ngram_range=(1, 3), sublinear_tf=True)
    return make(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\b\w+\b")


def sklearn_package() -> Any:
    """scikit-learn with the modules used here; MissingPackage where it cannot be imported."""
    try:
        import sklearn.feature_extraction.text
        import sklearn.svm
    except ImportError:
        raise MissingPackage("the baseline tfidf", "scikit-learn") from None
    return sklearn
