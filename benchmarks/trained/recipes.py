"""The rows of docs/results.md: each a named run with its settings and goals.

Settings are fixed here: they were chosen from the sizes of the training data and the time, never on a test set.
"""

from __future__ import annotations

from collections.abc import Sequence

from trained import files
from trained.rows import SEEDS, Goal, Step, TaskRow, evaluate, peer, train, with_peers


def shakespeare(
    name: str,
    minutes: float,
    layers: int,
    width: int,
    dropout: float,
    rates: tuple[float, float, float],
    goal: float,
) -> TaskRow:
    """The character model of tinyshakespeare within a time, by Muon and AdamW; rates: of Muon's matrices, of its other
    parameters, and of AdamW alone."""
    whole = 2 * minutes + 4  # of both, evaluations included
    common = (
        "--train", "{files}/train.txt", "--dev", "{files}/dev.txt", "--model", "nano", "--data.tokenizer=characters",
        "--task.packing=stream", "--task.max_length=256", "--model.n_positions=256", "--model.positions=rotary",
        f"--model.n_layer={layers}", f"--model.n_embd={width}", f"--model.n_head={width // 64}",
        "--model.activation_function=gelu",  # exact; nano's own is the approximation by tanh
        "--train.batch_size=8", "--train.warmup_steps=50", "--train.max_epochs=1000", "--train.min_lr_ratio=0.0",
        "--train.beta2=0.99", "--train.eval_every=250", "--train.save_every=1000000", "--train.precision={precision}",
        f"--train.max_seconds={{seconds:{minutes / whole:.5f}}}",
        *(f"--model.{place}_pdrop={dropout:g}" for place in ("embd", "resid") if dropout),
    )  # fmt: skip
    tests = ("--data", "{files}/test.txt", "--option", "max_length=256", "--option", "stride=128")
    kinds = {
        "Muon": ("--train.optimizer=muon", f"--train.muon_lr={rates[0]:g}", f"--train.lr={rates[1]:g}"),
        "AdamW": (f"--train.lr={rates[2]:g}",),
    }
    steps: list[Step] = []
    for kind, words in kinds.items():
        steps += [train(kind, "causal-lm", *common, *words, preset="decoder"), evaluate(kind, *tests)]
    return TaskRow(
        name,
        f"tinyshakespeare, characters, {minutes:.0f} minutes of training",
        whole,
        files.shakespeare,
        tuple(steps),
        ("loss", "bits_per_byte"),
        tuple(Goal(kind, "loss", goal, least=False) for kind in kinds),
        "Loss in nats per character over the whole validation split, the last tenth of the text, each character after "
        "at least 128 others. The best model is picked on the last 2 % of the other text, never on that split.",
    )


def learning_curve(
    name: str, model: str, words: Sequence[str], first: Sequence[Step] = ()
) -> tuple[Step, ...]:
    """A classifier from 100, 10 and 1 % of the labels, a TF-IDF classifier of the same labels beside."""
    steps = list(first)
    for percent, epochs in ((100, 3), (10, 10), (1, 30)):
        line, file = f"{percent} % of the labels", f"{{files}}/train-{percent}.jsonl"
        out = f"labels-{percent}"
        given = ("--train", file, "--model", model, f"--train.max_epochs={epochs}", *words)
        baselines = ("--train", file, "--baseline", "majority", "--baseline", "tfidf")
        tests = ("--data", f"{{data}}/classify/{name}/test.jsonl", *baselines)
        steps += [train(line, "classify", *given, out=out), evaluate(line, *tests, out=out)]
    return tuple(steps)


ENCODER = (
    "--model.hidden_size=256", "--model.num_hidden_layers=4", "--model.num_attention_heads=4",
    "--model.intermediate_size=1024",
)  # fmt: skip
TRANSLATOR = (
    "--model", "minilm-l6", "--data.tokenizer=bpe", "--data.vocab_size=4000", "--model.hidden_size=256",
    "--model.num_hidden_layers=2", "--model.num_attention_heads=4", "--model.intermediate_size=1024",
    "--model.attention_probs_dropout_prob=0", "--train.lr=1e-3", "--train.warmup_steps=400", "--train.max_epochs=100",
)  # fmt: skip
CLASSIFIED = ("accuracy", "macro_f1", "ece")
WRITTEN = ("bleu", "chrf", "rouge1", "rougeL")


def _reuters() -> TaskRow:
    steps = learning_curve("reuters8", "{encoder}", ("--task.max_length=256",))
    theirs = "transformers, 100 % of the labels"
    out = "transformers-100"
    compared = (
        peer(theirs, "classify", "labels-100", out),
        evaluate(theirs, "--data", "{data}/classify/reuters8/test.jsonl", out=out),
    )
    return TaskRow(
        "reuters8",
        "Reuters-8: topics of news, from all-MiniLM-L6-v2",
        60,
        files.labelled("reuters8"),
        (*steps, *compared),
        CLASSIFIED,
        (Goal("100 % of the labels", "accuracy", 0.974),),
        "A tenth of the training labels picks the best epoch.",
    )


def _chinese() -> TaskRow:
    pretraining = train(
        "pre-training", "masked-lm", "--train", "{data}/classify/chinese_reviews/train.jsonl", "--model", "minilm-l6",
        "--dev", "{data}/classify/chinese_reviews/dev.jsonl", "--data.tokenizer=characters", "--task.max_length=256",
        "--train.batch_size=32", "--train.lr=1e-3", "--train.max_epochs=60", "--train.max_seconds={seconds:0.7}",
        "--train.save_every=1000000", "--train.precision={precision}", *ENCODER,
        "--model.attention_probs_dropout_prob=0", out="encoder", preset="encoder",
    )  # fmt: skip
    words = (
        "--dev", "{data}/classify/chinese_reviews/dev.jsonl", "--task.max_length=256", "--train.precision={precision}",
    )  # fmt: skip
    return TaskRow(
        "chinese-reviews",
        "Chinese reviews: sentiment, from a masked LM of our own pre-trained on the reviews' characters",
        60,
        files.labelled("chinese_reviews"),
        learning_curve("chinese_reviews", "{out}/encoder", words, (pretraining,)),
        CLASSIFIED,
        (Goal("100 % of the labels", "accuracy", 0.85),),
        "Pre-training reads the training texts without their labels. The set's own dev part picks the best epochs.",
    )


def _entities() -> TaskRow:
    folder = "{data}/ner/wnut17"
    words = ("--train", f"{folder}/train.conll", "--dev", f"{folder}/dev.conll", "--model", "{encoder}",
             "--train.precision={precision}")  # fmt: skip
    tests = ("--data", f"{folder}/test.conll", "--train", f"{folder}/train.conll", "--baseline", "majority")
    return TaskRow(
        "wnut17",
        "WNUT-17: entities that training has not seen, from all-MiniLM-L6-v2",
        60,
        files.nothing,
        with_peers("tag", words, tests, SEEDS),
        ("f1", "precision", "recall"),
    )


def _questions() -> TaskRow:
    words = (
        "--train",
        "{files}/train.json",
        "--dev",
        "{files}/dev.json",
        "--model",
        "{encoder}",
        "--train.max_epochs=6",
        "--train.precision={precision}",
    )
    return TaskRow(
        "xquad",
        "XQuAD, English: answers in paragraphs of articles that training has not seen, from all-MiniLM-L6-v2",
        90,
        files.questions,
        with_peers("qa", words, ("--data", "{files}/test.json"), SEEDS),
        ("exact_match", "f1"),
        (),
        "Some 800 questions of 32 articles train, 8 articles each pick the epoch and test.",
    )


def _written(
    name: str, title: str, folder: str, columns: str, baseline: str, model: Sequence[str], *,
    preset: str | None = None, note: str = "",
) -> TaskRow:  # fmt: skip
    """A row of texts that are written, from `model`, the words of the command that say what is trained."""
    mapped = (f"--data.columns={columns}",) if columns else ()
    words = (
        "--train", f"{{data}}/{folder}/train.jsonl", "--dev", "{files}/dev.jsonl", *model, *mapped,
        "--task.max_length=128", "--task.max_target_length=96", "--train.precision={precision}",
        "--train.max_seconds={seconds:0.35}",
    )  # fmt: skip
    columned = tuple(word for each in columns.split(",") if each for word in ("--column", each))
    limits = ("--option", "max_length=128", "--option", "max_target_length=96")
    tests = ("--data", f"{{data}}/{folder}/test.jsonl", "--baseline", baseline, *columned, *limits)
    return TaskRow(
        name,
        title,
        45,
        files.pairs(folder),
        with_peers("seq2seq", words, tests, (0,), preset),
        WRITTEN,
        (),
        note,
    )


def _addresses() -> TaskRow:
    texts = ("--train", "{files}/train.txt", "--dev", "{files}/dev.txt")
    pretraining = train(
        "MLM + NSP", "masked-lm", *texts, "--model", "minilm-l6", "--task.next_sentence=true", "--task.max_length=128",
        "--train.batch_size=32", "--train.lr=1e-3", "--train.max_epochs=60", "--train.max_seconds={seconds:0.6}",
        "--train.eval_every=500", "--train.save_every=1000000", *ENCODER, out="encoder", preset="encoder",
    )  # fmt: skip
    held = ("--data", "{files}/test.txt", "--option", "next_sentence=true", "--option", "max_length=128")
    down = (
        "--train",
        "{files}/reuters-10.jsonl",
        "--train.max_epochs=10",
        "--task.max_length=128",
        "--train.lr=3e-4",
    )
    news = ("--data", "{data}/classify/reuters8/test.jsonl")
    topics = "Reuters-8, 10 % of the labels"
    random = ("--model", "minilm-l6", "--data.tokenizer={out}/encoder", *ENCODER)
    return TaskRow(
        "mlm-nsp",
        "State of the Union: pre-training by masked words and next sentences, and what it is worth for Reuters-8",
        60,
        files.addresses,
        (
            pretraining,
            evaluate("MLM + NSP", *held, out="encoder"),
            train(f"{topics}, pre-trained", "classify", *down, "--model", "{out}/encoder", out="pre-trained"),
            evaluate(f"{topics}, pre-trained", *news, out="pre-trained"),
            train(f"{topics}, random weights", "classify", *down, *random, out="random", preset="encoder"),
            evaluate(f"{topics}, random weights", *news, out="random"),
        ),
        ("loss", "next_sentence_accuracy", "accuracy", "macro_f1"),
        (),
        "A tenth of the addresses picks the best model and another tenth, held out, gives the loss. Accuracy of the "
        "first line is of masked words, of the others of topics.",
    )  # fmt: skip


GPT = (
    "--model", "nano", "--data.vocab_size=4096", "--model.n_positions=256", "--model.n_embd=256", "--model.n_layer=4",
    "--model.positions=rotary",
)  # fmt: skip


def _seconds(share: str) -> str:
    return "--train.max_seconds={seconds:" + share + "}"


def _pretrained(share: str) -> Step:
    return train(
        "language model", "causal-lm", "--train", "{files}/text.txt", *GPT, "--task.max_length=256",
        "--train.batch_size=16", "--train.lr=2e-3", "--train.max_epochs=4", _seconds(share),
        "--data.dev_fraction=0.02", "--train.save_every=1000000", "--train.precision={precision}",
        out="lm", preset="decoder",
    )  # fmt: skip


def _chatting(share: str) -> Step:
    return train(
        "chat", "chat", "--train", "{files}/chats-train.jsonl", "--dev", "{files}/chats-dev.jsonl",
        "--model", "{out}/lm",
        "--task.max_length=256", "--train.lr=5e-4", "--train.max_epochs=3", _seconds(share),
        "--train.precision={precision}",
    )  # fmt: skip


def _chat() -> TaskRow:
    tests = ("--data", "{files}/chats-test.jsonl")
    stops = "{files}/chats-test.jsonl"
    return TaskRow(
        "chat",
        "A chat model of a small GPT: package descriptions in one line",
        30,
        files.conversations,
        (
            _pretrained("0.5"),
            evaluate("language model", *tests, "--task", "chat", out="lm"),
            Step("language model", "stops", ("{out}/lm", stops)),
            _chatting("0.3"),
            evaluate("chat", *tests, "--task", "chat"),
            Step("chat", "stops", ("{out}/chat", stops)),
        ),
        ("loss", "end_accuracy", "stopped"),
        (Goal("chat", "end_accuracy", 0.9), Goal("chat", "stopped", 0.9)),
        "End accuracy is how often the token that ends a turn is the likeliest where one ends; stopped, the share of "
        "100 answers, written greedily, that end by themselves within 64 tokens.",
    )  # fmt: skip


def _preferences() -> TaskRow:
    tests = ("--data", "{files}/preferences-test.jsonl", "--task", "dpo")
    tuned = train(
        "dpo", "dpo", "--train", "{files}/preferences-train.jsonl", "--dev", "{files}/preferences-dev.jsonl",
        "--model", "{out}/chat", "--task.max_length=256", "--train.lr=5e-5", "--train.max_epochs=2",
        "--train.max_seconds={seconds:0.25}", "--train.precision={precision}",
    )  # fmt: skip
    return TaskRow(
        "dpo",
        "Preferences: of two summaries that of the package which was asked about",
        30,
        files.conversations,
        (_pretrained("0.35"), _chatting("0.2"), evaluate("chat", *tests), tuned, evaluate("dpo", *tests)),
        ("accuracy", "margin", "chosen_logprob", "rejected_logprob"),
        (),
        "Accuracy is the share of held-out pairs whose chosen answer is the likelier.",
    )


ROWS: dict[str, TaskRow] = {
    row.name: row
    for row in (
        shakespeare("shakespeare-5min", 5, 4, 192, 0.0, (0.01, 4e-3, 3e-3), 1.60),
        shakespeare("shakespeare-60min", 60, 4, 256, 0.25, (0.006, 2.5e-3, 1.5e-3), 1.50),
        _reuters(),
        _chinese(),
        _entities(),
        _questions(),
        _written(
            "en-de", "English to German package descriptions, from random weights", "translate/en-de", "", "copy",
            TRANSLATOR, preset="encoder",
            note="Not from all-MiniLM-L6-v2, whose tokenizer drops the case of German nouns.",
        ),
        _written(
            "debian", "Package descriptions to one line, from all-MiniLM-L6-v2", "summarise/debian",
            "source=document,target=summary", "lead", ("--model", "{encoder}"),
        ),
        _addresses(),
        _chat(),
        _preferences(),
    )
}  # fmt: skip
