"""Every metric against the field's libraries: their recorded values, and by -m downloads the libraries themselves."""

from __future__ import annotations

import json
import math
from importlib.metadata import version
from typing import Any

import metric_cases
import numpy as np
import pytest

from fastattn.evaluation import (
    Report,
    answers,
    baselines,
    classification,
    generation,
    language,
    regression,
    spans,
)
from fastattn.evaluation.words import words_of

RECORDED: dict[str, Any] = json.loads(metric_cases.GOLDEN.read_text(encoding="utf-8"))


def test_metrics_are_those_the_libraries_gave() -> None:
    assert metric_cases.differences(RECORDED["values"], metric_cases.our_values()) == []


def test_a_difference_is_noticed() -> None:
    ours = metric_cases.our_values()
    ours["tags 0"]["f1"] += 1e-6
    assert len(metric_cases.differences(RECORDED["values"], ours)) == 1


@pytest.mark.downloads
def test_the_recorded_values_are_the_libraries() -> None:
    """Needs scikit-learn, seqeval and rouge-score."""
    values = json.loads(json.dumps(metric_cases.library_values(), default=float))
    assert metric_cases.differences(RECORDED["values"], values) == []
    for name in metric_cases.PACKAGES:
        print(name, version(name), "recorded with", RECORDED["versions"][name])


def test_calibration_error_of_bins_by_hand() -> None:
    # 0.5 belongs to (0, 0.5], so the bins hold {0.4, 0.5} with one right, and {0.9} wrong
    confidence, right = np.array([0.4, 0.5, 0.9]), np.array([True, False, False])
    error, rows = classification.calibration(confidence, right, 2)
    assert error == pytest.approx((2 * abs(0.45 - 0.5) + 0.9) / 3, rel=1e-12)
    assert [(row["low"], row["high"], row["count"]) for row in rows] == [(0.0, 0.5, 2), (0.5, 1.0, 1)]
    assert [row["accuracy"] for row in rows] == [0.5, 0.0]
    assert classification.calibration(np.array([0.0, 1.0]), np.array([False, True]))[0] == 0.0


def test_log_loss_and_ties() -> None:
    report = classification.single_label([0, 1], [[0.5, 0.5], [0.25, 0.75]], ["a", "b"])
    assert report.metrics["log_loss"] == pytest.approx(-(math.log(0.5) + math.log(0.75)) / 2, rel=1e-12)
    assert report.metrics["accuracy"] == 1.0  # of equal probabilities the first label
    assert classification.single_label([0], [[0.0, 1.0]], ["a", "b"]).metrics["log_loss"] == math.inf


def test_a_correlation_with_a_constant_is_nan_and_ranks_are_shared() -> None:
    assert math.isnan(regression.regression([1, 1, 1], [1, 2, 3]).metrics["spearman"])
    rng = np.random.default_rng(0)
    columns = rng.normal([0.0, 100.0], size=(2, 50, 2))  # of means that alone would correlate
    found = regression.regression(*columns).metrics
    each = [regression.regression(*columns[:, :, i]).metrics for i in range(2)]
    assert all(found[name] == pytest.approx((each[0][name] + each[1][name]) / 2) for name in found)
    assert abs(found["pearson"]) < 0.5 < regression.regression(*columns.reshape(2, -1)).metrics["pearson"]
    assert regression.ranks(np.array([3.0, 1.0, 3.0, 2.0])).tolist() == [3.5, 1.0, 3.5, 2.0]
    assert regression.similarities([[1, 0], [0, 0]], [[2, 0], [1, 1]]).tolist() == [1.0, 0.0]


def test_spans_are_read_strictly() -> None:
    assert spans.spans_of(["B-X", "I-X", "I-Y", "I-X", "B-X", "B-X", "O", "I-X"]) == [
        ("X", 0, 2),
        ("X", 4, 5),
        ("X", 5, 6),
    ]
    assert spans.spans_of(["B-A-B", "I-A-B"]) == [("A-B", 0, 2)]
    report = spans.entity_f1([["O", "O"]], [["O", "O"]])
    assert (report.metrics["f1"], report.metrics["accuracy"]) == (0.0, 1.0)


def test_chinese_is_compared_by_characters_and_english_as_ever() -> None:
    assert answers.exact_match("《巴黎》铁塔。", "巴黎 铁塔")
    assert answers.f1("巴黎铁塔", "巴黎塔") == pytest.approx(6 / 7)
    assert answers.f1("Paris tower", "Paris town") == 0.5
    assert words_of("Die Größe, 巴黎 in तुम्हारा x_y") == ["die", "größe", "巴", "黎", "in", "तुम्हारा", "x", "y"]
    same = generation.rouge([["今天天气很好。"]], ["今天天气不好"])
    assert same["rouge1"] == pytest.approx(5 / 6)
    assert same["rouge2"] == pytest.approx(3 / 5)


def test_questions_without_an_answer() -> None:
    report = answers.answers([["a cat"], [], [], ["dog"]], ["cat", None, "x", None])
    assert report.metrics == {
        "exact_match": 0.5,
        "f1": 0.5,
        "no_answer_accuracy": 0.5,
        "has_answer_exact_match": 0.5,
        "has_answer_f1": 0.5,
    }
    assert "no_answer_accuracy" not in answers.answers([["a"]], ["a"]).metrics


def test_the_best_reference_counts_for_each_figure() -> None:
    one = generation.rouge([["a b c"]], ["a b"])
    assert generation.rouge([["x y", "a b c"]], ["a b"]) == one
    assert generation.longest_common("abcbdab", "bdcaba") == 4
    assert generation.longest_common("", "abc") == 0
    long = "ab" * 300
    assert generation.longest_common(long, long[1:]) == 599


def test_bleu_and_chrf_are_sacrebleus_of_the_whole_set() -> None:
    sacrebleu = pytest.importorskip("sacrebleu")
    given = ["the cat sat on the mat", "a dog sleeps there", "no"]
    right = [["the cat sat on a mat", "a cat sat on the mat"], ["the dog sleeps there"], ["yes"]]
    report = generation.texts(right, given)
    streams = [["the cat sat on a mat", "the dog sleeps there", "yes"], ["a cat sat on the mat", None, None]]
    bleu = sacrebleu.BLEU()
    assert report.metrics["bleu"] == bleu.corpus_score(given, streams).score
    assert report.metrics["chrf"] == sacrebleu.CHRF().corpus_score(given, streams).score
    assert report.signatures["bleu"] == str(bleu.get_signature())
    assert "tok:13a" in report.signatures["bleu"]
    assert "nc:6" in report.signatures["chrf"]
    assert "tok:zh" in generation.texts([["今天天气很好"]], ["今天天气不好"]).signatures["bleu"]
    assert "tok:char" in generation.texts([["今日はいい天気です"]], ["いい天気"]).signatures["bleu"]


def test_a_language_models_figures_by_hand() -> None:
    report = language.language(8 * math.log(2), 4, 2, unknown=1)
    assert report.metrics == pytest.approx(
        {"loss": 2 * math.log(2), "perplexity": 4.0, "bits_per_byte": 4.0, "unknown": 0.25}
    )
    assert report.count == 4
    assert language.language(1e6, 1, 1).metrics["perplexity"] == math.inf


def test_simple_methods() -> None:
    assert baselines.majority(["b", "a", "b", "a", "c"]) == "a"
    assert baselines.tags_by_word([["x", "y"], ["x", "x"]], [["O", "O"], ["B-A", "B-A"]]) == {
        "x": "B-A",
        "y": "O",
    }
    assert baselines.lead("One. Two.") == "One."
    assert baselines.lead("  First line\n\nSecond") == "First line"
    assert baselines.lead("第一句。第二句。") == "第一句。"
    assert baselines.lead("no end") == "no end"
    assert baselines.lead("  ") == ""


@pytest.mark.downloads
def test_tfidf_learns_what_words_tell() -> None:
    texts, labels = ["good film", "bad film", "good book", "bad book"], ["yes", "no", "yes", "no"]
    rows = baselines.tfidf_classifier(texts, labels, ["good day", "bad day"], ["no", "other", "yes"])
    assert rows.argmax(1).tolist() == [2, 0]
    chinese = baselines.tfidf_classifier(["很好", "很坏"], ["yes", "no"], ["好的", "坏的"], ["no", "yes"])
    assert chinese.argmax(1).tolist() == [1, 0]
    scores = baselines.tfidf_similarity(["a cat", "a cat"], ["a cat", "one dog"])
    assert scores == pytest.approx([1.0, 0.0])


BAD = {
    "no examples": (lambda: spans.entity_f1([], []), "references"),
    "other number": (lambda: answers.answers([["a"]], []), "predictions"),
    "texts for lists": (lambda: answers.answers(["a"], ["a"]), "references"),
    "other length": (lambda: spans.entity_f1([["O"]], [["O", "O"]]), r"predictions\[0\]"),
    "a tag without a type": (lambda: spans.spans_of(["B"]), "tags"),
    "another scheme": (lambda: spans.spans_of(["E-X"]), "tags"),
    "no reference": (lambda: generation.rouge([[]], ["a"]), r"references\[0\]"),
    "a text as references": (lambda: generation.rouge(["a"], ["a"]), r"references\[0\]"),
    "an unknown label": (lambda: classification.single_label([2], [[0.5, 0.5]], ["a", "b"]), "references"),
    "NaN": (lambda: classification.single_label([0], [[math.nan, 1.0]], ["a", "b"]), "probabilities"),
    "other labels": (lambda: classification.single_label([0], [[1.0]], ["a", "b"]), "probabilities"),
    "no decision": (lambda: classification.multi_label([[2, 0]], [[0.1, 0.2]], ["a", "b"]), "references"),
    "not finite": (lambda: regression.regression([1.0], [math.inf]), "predictions"),
    "other shape": (lambda: regression.regression([[1.0]], [[1.0, 2.0]]), "predictions"),
    "no token": (lambda: language.language(0.0, 0, 0), "tokens"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name: str) -> None:
    call, argument = BAD[name]
    with pytest.raises((TypeError, ValueError), match=f"^{argument}"):
        call()


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("sacrebleu", "sacrebleu.metrics", "sklearn", "sklearn.svm"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    with pytest.raises(ImportError, match=r"sacrebleu: pip install 'fastattn\[evaluate\]'"):
        generation.texts([["a"]], ["a"])
    with pytest.raises(ImportError, match=r"scikit-learn: pip install 'fastattn\[evaluate\]'"):
        baselines.tfidf_classifier(["a", "b"], ["a", "b"], ["a"], ["a", "b"])


def test_plots_of_a_classifier(tmp_path: Any) -> None:
    pytest.importorskip("matplotlib")
    from fastattn.evaluation.plots import plot_confusion, plot_reliability

    references, scores = metric_cases.labels_case(1, 3, 30)
    report = classification.single_label(references, scores, ["a", "$b$", "c"])
    for draw in (plot_reliability, plot_confusion):
        path = draw(report, tmp_path / "figure.svg")
        assert "<svg" in path.read_text(encoding="utf-8")
        with pytest.raises(ValueError, match=r"^path"):
            draw(report, tmp_path / "figure.jpg")
        with pytest.raises(ValueError, match=r"^report"):
            draw(Report({}, 1), tmp_path / "figure.svg")
