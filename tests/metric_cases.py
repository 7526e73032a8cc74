"""Random and hostile predictions for every metric, and what the field's libraries say of them.

`python tests/metric_cases.py --write` writes evaluation/golden.json from the libraries that are installed, with their
versions: scikit-learn, scipy, seqeval, rouge-score, and the rules of SQuAD's evaluate-v2.0.py and MLQA's
mlqa_evaluation_v1.py, which are written down here as those scripts state them.
"""

from __future__ import annotations

import json
import math
import random
import re
import string
import sys
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

GOLDEN = Path(__file__).parent / "evaluation" / "golden.json"
PACKAGES = ("scikit-learn", "scipy", "seqeval", "rouge-score")
TAGS = ("O", "O", "O", "B-PER", "I-PER", "B-LOC", "I-LOC")
ANSWERS = (
    "the Eiffel Tower", "Eiffel Tower", "eiffel tower.", "an Eiffel", "", "the", "!?", "42", "in 1889, Paris",
    "Paris in 1889", "a a a b", "b a", "Œuvre d'art", "it\u2019s \u201cquoted\u201d", "half-time", "  spaced \t out ",
)  # fmt: skip
CHINESE = (
    "巴黎铁塔",
    "巴黎 铁塔。",
    "《巴黎》铁塔!",
    "1889年",
    "1889 年",
    "铁塔",
    "巴黎的铁塔",
    "the 铁塔",
    "",
)
SENTENCES = (
    "The cat sat on the mat.", "a cat, on a mat", "", "...", "MAT", "on the mat the cat sat", "cats_and_dogs 12 x 3.5",
    "the the the the", "one two three four five six seven", "seven six five four three two one", "don't stop",
    "The quick brown fox jumps over the lazy dog; the dog sleeps.", "the dog sleeps",
)  # fmt: skip


def labels_case(seed: int, classes: int, count: int) -> tuple[list[int], np.ndarray]:
    """Random references and distributions; some ties, some labels that no example has, some certain ones."""
    rng = np.random.default_rng(seed)
    scores = rng.dirichlet(np.full(classes, 0.5), count).round(2)
    scores = scores / scores.sum(1, keepdims=True)
    scores[0] = np.eye(classes)[0]
    references = rng.integers(0, max(1, classes - 1), count)  # the last label is never right
    return references.tolist(), scores


LABEL_CASES = {"two": (0, 2, 50), "many": (1, 7, 200), "one example": (2, 3, 1), "few": (3, 5, 9)}


def multi_case(seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    references = rng.integers(0, 2, (60, 4))
    references[:, 3] = 0  # a label that no example has
    return references, rng.random((60, 4)).round(3)


def numbers_case(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers with ties, of very different sizes."""
    rng = np.random.default_rng(seed)
    first = rng.integers(0, 6, 40).astype(float)
    return first, (first + rng.normal(0, 2, 40)).round(1) * 10.0 ** ((seed % 2) * 30)


def tags_case(seed: int) -> tuple[list[list[str]], list[list[str]]]:
    draw = random.Random(seed)
    lengths = [draw.randrange(0, 9) for _ in range(40)]
    made = [[[draw.choice(TAGS) for _ in range(n)] for n in lengths] for _ in range(2)]
    made[1][:20] = [list(tags) for tags in made[0][:20]]  # half of them right
    return made[0], made[1]


def answers_case(texts: tuple[str, ...]) -> tuple[list[list[str]], list[str]]:
    """Every answer as a prediction for every pair of right ones, and for none."""
    golds = [[], *([text] for text in texts), *([a, b] for a, b in zip(texts, texts[3:]))]
    pairs = [(gold, text) for gold in golds for text in texts]
    return [gold for gold, _ in pairs], [text for _, text in pairs]


def rouge_case() -> tuple[list[list[str]], list[str]]:
    pairs = [(a, b) for a in SENTENCES for b in SENTENCES]
    return [[a] for a, _ in pairs], [b for _, b in pairs]


def squad_rules(references: list[list[str]], predictions: list[str], *, chinese: bool) -> dict[str, float]:
    """exact and f1 as evaluate-v2.0.py computes them; with MLQA's normalisation of Chinese where asked."""

    def normalise(text: str) -> list[str]:
        text = text.lower()
        if chinese:
            kept = "".join(
                c for c in text if unicodedata.category(c)[0] != "P" and c not in string.punctuation
            )
            return re.findall("[\u4e00-\u9fa5]|[^\\s\u4e00-\u9fa5]+", kept)
        text = "".join(c for c in text if c not in set(string.punctuation))
        return re.sub(r"\b(a|an|the)\b", " ", text).split()

    def f1(gold: str, answer: str) -> float:
        a, b = normalise(gold), normalise(answer)
        same = sum((Counter(a) & Counter(b)).values())
        if not a or not b:
            return float(a == b)
        if not same:
            return 0.0
        precision, recall = same / len(b), same / len(a)
        return 2 * precision * recall / (precision + recall)

    exact = total = 0.0
    for right, answer in zip(references, predictions):
        golds = [text for text in right if normalise(text)] or [""]
        exact += max(normalise(gold) == normalise(answer) for gold in golds)
        total += max(f1(gold, answer) for gold in golds)
    return {"exact_match": exact / len(predictions), "f1": total / len(predictions)}


def library_values() -> dict[str, Any]:
    """What the libraries say of every case."""
    import scipy.stats
    import sklearn.metrics as metrics
    from rouge_score import rouge_scorer
    from seqeval.metrics import f1_score, precision_score, recall_score
    from seqeval.scheme import IOB2

    values: dict[str, Any] = {}
    for name, case in LABEL_CASES.items():
        references, scores = labels_case(*case)
        predicted = scores.argmax(1)
        values[f"labels {name}"] = {
            "accuracy": metrics.accuracy_score(references, predicted),
            "macro_f1": metrics.f1_score(references, predicted, average="macro"),
            "micro_f1": metrics.f1_score(references, predicted, average="micro"),
            "confusion": metrics.confusion_matrix(
                references, predicted, labels=range(scores.shape[1])
            ).tolist(),
        }
    references, scores = multi_case(4)
    values["multi"] = {
        "accuracy": metrics.accuracy_score(references, scores > 0.5),
        "macro_f1": metrics.f1_score(references, scores > 0.5, average="macro", zero_division=0),
        "micro_f1": metrics.f1_score(references, scores > 0.5, average="micro"),
    }
    for seed in range(3):
        first, second = numbers_case(seed)
        values[f"numbers {seed}"] = {
            "pearson": scipy.stats.pearsonr(first, second / np.abs(second).max()).statistic,
            "spearman": scipy.stats.spearmanr(first, second).statistic,
            "mse": metrics.mean_squared_error(first, second),
            "mae": metrics.mean_absolute_error(first, second),
        }
    for seed in (0, 1):
        gold, given = tags_case(seed)
        options = {"mode": "strict", "scheme": IOB2}
        values[f"tags {seed}"] = {
            "f1": f1_score(gold, given, **options),
            "precision": precision_score(gold, given, **options),
            "recall": recall_score(gold, given, **options),
            "macro_f1": f1_score(gold, given, average="macro", **options),
        }
    for name, texts in (("english", ANSWERS), ("chinese", CHINESE)):
        values[f"answers {name}"] = squad_rules(*answers_case(texts), chinese=name == "chinese")
    right, given = rouge_case()
    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=False)
    each = [scorer.score(a[0], b) for a, b in zip(right, given)]
    values["rouge"] = {
        name: math.fsum(e[name].fmeasure for e in each) / len(each) for name in ("rouge1", "rouge2", "rougeL")
    }
    return values


def our_values() -> dict[str, Any]:
    """What fastattn.evaluation says of every case, and of more figures than the libraries have."""
    from fastattn.evaluation import answers, classification, generation, regression, spans

    values: dict[str, Any] = {}
    for name, case in LABEL_CASES.items():
        references, scores = labels_case(*case)
        names = [f"label {i}" for i in range(scores.shape[1])]
        report = classification.single_label(references, scores, names)
        values[f"labels {name}"] = {**report.metrics, "confusion": report.tables["confusion"]["counts"]}
    references, scores = multi_case(4)
    values["multi"] = classification.multi_label(references, scores, list("abcd")).metrics
    for seed in range(3):
        values[f"numbers {seed}"] = regression.regression(*numbers_case(seed)).metrics
    for seed in (0, 1):
        values[f"tags {seed}"] = spans.entity_f1(*tags_case(seed)).metrics
    for name, texts in (("english", ANSWERS), ("chinese", CHINESE)):
        values[f"answers {name}"] = answers.answers(*answers_case(texts)).metrics
    values["rouge"] = generation.rouge(*rouge_case())
    return values


def differences(expected: dict[str, Any], given: dict[str, Any]) -> list[str]:
    """Where two tables of figures differ by more than the rounding of float64 sums."""
    wrong = []
    for case, figures in expected.items():
        for name, value in figures.items():
            found = given[case][name]
            same = found == value if isinstance(value, list) else math.isclose(found, value, rel_tol=1e-9)
            if not same:
                wrong.append(f"{case} {name}: {found}, expected {value}")
    return wrong


if __name__ == "__main__":
    from importlib.metadata import version

    if sys.argv[1:] != ["--write"]:
        sys.exit("say --write")
    made = {"versions": {name: version(name) for name in PACKAGES}, "values": library_values()}
    GOLDEN.write_text(json.dumps(made, indent=1, default=float) + "\n", encoding="utf-8")
