"""BLEU and chrF by sacrebleu, and ROUGE that also supports scripts without spaces."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from fastattn.evaluation.report import MissingPackage, Report, check_pairs, f1_of
from fastattn.evaluation.words import is_unspaced, words_of


def texts(
    references: Sequence[Sequence[str]], predictions: Sequence[str], *, tokenize: str | None = None
) -> Report:
    """All metrics of generated texts: bleu and chrf (within [0, 100]), rouge1, rouge2 and rougeL, exact_match.

    Args:
        references: for each text one or more right texts.
        predictions: the generated texts.
        tokenize: of sacrebleu's BLEU; None takes "zh" where over half of the references have Han characters, or
            "char" where those hold kana, else "13a".

    Raises:
        MissingPackage: sacrebleu is not installed.
        ValueError: there is no text, the numbers of references and predictions differ, a text has no reference, or
            sacrebleu has no such tokenizer or cannot load it.
    """
    count = check_texts(references, predictions)
    scores, signatures = machine_translation(references, predictions, tokenize=tokenize)
    exact = sum(
        prediction.strip() in [r.strip() for r in right] for right, prediction in zip(references, predictions)
    )
    metrics = {**scores, **rouge(references, predictions), "exact_match": exact / count}
    return Report(metrics=metrics, count=count, signatures=signatures)


def check_installed() -> None:
    """Raise MissingPackage where sacrebleu cannot be imported."""
    try:
        import sacrebleu.metrics  # noqa: F401
    except ImportError:
        raise MissingPackage("BLEU and chrF", "sacrebleu") from None


def check_tokenizer(name: str, value: str) -> str:
    """sacrebleu's tokenizer of that name; ValueError by the argument's name for one that it lacks or cannot load."""
    check_installed()
    from sacrebleu.metrics import BLEU

    if value not in BLEU.TOKENIZERS:
        raise ValueError(f"{name}: got {value!r}, needs one of {', '.join(BLEU.TOKENIZERS)}")
    try:
        BLEU(tokenize=value)
    except Exception as error:  # of a package or file that this tokenizer needs
        raise ValueError(f"{name}: {value!r} cannot be used ({' '.join(str(error).split())})") from None
    return value


def machine_translation(
    references: Sequence[Sequence[str]], predictions: Sequence[str], *, tokenize: str | None = None
) -> tuple[dict[str, float], dict[str, str]]:
    """bleu and chrf of a whole set by sacrebleu, within [0, 100], and their signatures; see `texts`."""
    check_installed()
    from sacrebleu.metrics import BLEU, CHRF

    if tokenize is not None:
        check_tokenizer("tokenize", tokenize)
    check_texts(references, predictions)
    most = max(map(len, references))
    # one list for each place among the references; sacrebleu reads None as none there
    streams = [[right[i] if i < len(right) else None for right in references] for i in range(most)]
    scores, signatures = {}, {}
    for name, metric in (("bleu", BLEU(tokenize=tokenize or _tokenizer(references))), ("chrf", CHRF())):
        scores[name] = float(metric.corpus_score(list(predictions), streams).score)
        signatures[name] = str(metric.get_signature())
    return scores, signatures


def rouge(references: Sequence[Sequence[str]], predictions: Sequence[str]) -> dict[str, float]:
    """rouge1, rouge2 and rougeL: the mean over texts of the F1 of shared n-grams, or of the longest common subsequence.

    Words are runs of letters and digits in lower case, without stemming, and single characters in Han and kana. Of
    several references the one with the highest F1 counts, separately for each metric. Lin 2004, ROUGE: A Package for
    Automatic Evaluation of Summaries.
    """
    count = check_texts(references, predictions)
    sums = dict.fromkeys(("rouge1", "rouge2", "rougeL"), 0.0)
    for right, prediction in zip(references, predictions):
        given = words_of(prediction)
        best = dict.fromkeys(sums, 0.0)
        for reference in right:
            expected = words_of(reference)
            found = {
                "rouge1": _ngram_f1(expected, given, 1),
                "rouge2": _ngram_f1(expected, given, 2),
                "rougeL": f1_of(longest_common(expected, given), len(given), len(expected))[2],
            }
            best = {name: max(best[name], score) for name, score in found.items()}
        for name, score in best.items():
            sums[name] += score
    return {name: total / count for name, total in sums.items()}


def longest_common(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence, by Hyyrö's bit-parallel recurrence: a bit for each item of `first`."""
    places: dict[str, int] = {}
    for i, item in enumerate(first):
        places[item] = places.get(item, 0) | 1 << i
    everything = (1 << len(first)) - 1
    row = everything  # a bit is 0 where the length grows
    for item in second:
        matches = row & places.get(item, 0)
        row = ((row + matches) | (row - matches)) & everything
    return len(first) - row.bit_count()


def check_texts(references: Sequence[Sequence[str]], predictions: Sequence[str]) -> int:
    """The number of texts; ValueError if there is none, or if a text has no reference."""
    count = check_pairs(references, predictions)
    for number, right in enumerate(references):
        if isinstance(right, str) or not right:
            raise ValueError(f"references[{number}]: got {right!r}, needs a list of one text or more")
    return count


def _ngram_f1(expected: Sequence[str], given: Sequence[str], n: int) -> float:
    a, b = (Counter(zip(*(words[i:] for i in range(n)))) for words in (expected, given))
    return f1_of((a & b).total(), b.total(), a.total())[2]


def _tokenizer(references: Sequence[Sequence[str]]) -> str:
    """sacrebleu's tokenizer for the language that most references are in."""
    first = [right[0] for right in references]
    unspaced = [text for text in first if is_unspaced(text)]
    if 2 * len(unspaced) <= len(first):
        return "13a"
    kana = sum(any("\u3041" <= c <= "\u30ff" for c in text) for text in unspaced)
    return "char" if 2 * kana > len(unspaced) else "zh"
