"""Small data that tiny encoders learn within seconds, a file per task, and the folders that they start from."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import task_cases

NAMES, PLACES = ("anna", "maria"), ("paris", "berlin")
QUICK = ("--train.max_epochs=6", "--train.batch_size=8", "--train.lr=1e-2", "--train.device=cpu")
ENCODER_TASKS = ("classify", "tag", "qa", "masked-lm", "embed")


def rows(task: str) -> list[dict[str, Any]]:
    """Examples from which a tiny encoder learns the rule behind the labels."""
    verbs, ends = ("lives in", "works for"), (".", "?", ", so")
    if task == "classify":
        parts = itertools.product(("good", "bad"), ("film", "river", "tower", "a film"), ("old", "new", "so"))
        return [{"text": f"{mark} {thing} {how}", "label": f"{mark}!"} for mark, thing, how in parts]
    sentences = [
        {"name": name, "verb": verb, "place": place, "end": end}
        for name, verb, place, end in itertools.product(NAMES, verbs, PLACES, ends)
    ]
    if task == "tag":
        return [
            {
                "tokens": [s["name"], *s["verb"].split(), s["place"], s["end"]],
                "tags": ["B-PER", "O", "O", "B-LOC", "O"],
            }
            for s in sentences
        ]
    if task == "qa":
        made = []
        for number, s in enumerate(sentences):
            context = f"{s['name']} {s['verb']} {s['place']} {s['end']}"
            answers = [{"text": s["place"], "answer_start": context.index(s["place"])}]
            question = f"where does {s['name']} live?"
            made.append({"id": str(number), "question": question, "context": context, "answers": answers})
        return made
    if task == "embed":
        pairs = (("anna", "the river"), ("maria", "the tower"), ("paris", "old film"), ("berlin", "acmes"))
        return [
            {"text": f"{a} {end}", "positive": f"{b} {how}"}
            for (a, b), end, how in itertools.product(pairs, ends, ("good", "bad"))
        ]
    return [{"text": f"{s['name']} {s['verb']} {s['place']} {s['end']}"} for s in sentences]


def write(path: Path, given: list[dict[str, Any]]) -> Path:
    """The rows as JSONL, or as CoNLL by the path's suffix."""
    if path.suffix == ".conll":
        blocks = ["\n".join(map("\t".join, zip(row["tokens"], row["tags"]))) for row in given]
        path.write_text("\n\n".join(blocks) + "\n")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in given))
    return path


def save_encoder(folder: Path, head: str = "Model", **changes: Any) -> Path:
    """A folder of a tiny encoder of transformers with random weights."""
    folder.mkdir(parents=True, exist_ok=True)
    task_cases.save_model(folder, head, vocab_size=35, **changes)
    return folder
