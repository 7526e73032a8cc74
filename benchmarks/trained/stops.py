"""How many answers of a chat model end by themselves, written greedily after the conversations of a file.

python benchmarks/trained/stops.py FOLDER CHATS.jsonl
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import checkout

ANSWERS, NEW_TOKENS = 100, 64


@torch.no_grad()
def stopped(folder: Path, chats: Path, count: int = ANSWERS) -> dict[str, float]:
    """The share of answers to the first `count` conversations that end within NEW_TOKENS, and their mean length."""
    from fastattn.data import Tokenizer
    from fastattn.data.chat import DEFAULT_TEMPLATE, ChatTemplate
    from fastattn.models import GPT
    from fastattn.tasks.chat import ends_of

    tokenizer = Tokenizer.from_pretrained(folder)
    model = GPT.from_pretrained(folder).eval()
    tokenizer.chat_template = tokenizer.chat_template or DEFAULT_TEMPLATE
    template, ends = ChatTemplate.of(tokenizer), ends_of(model, tokenizer)
    ended, lengths = 0, []
    lines = [line for line in chats.read_text(encoding="utf-8").splitlines() if line.strip()][:count]
    for line in lines:
        text = template.render(json.loads(line)["messages"][:-1], add_generation_prompt=True)
        room = (model.max_positions or 10**9) - NEW_TOKENS
        ids = torch.tensor([tokenizer.encode(text)[-room:]])
        made = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False)[0, ids.shape[1] :].tolist()
        places = [place for place, token in enumerate(made) if token in ends]
        ended += bool(places)
        lengths.append(places[0] if places else len(made))
    return {"stopped": ended / len(lines), "answer_tokens": sum(lengths) / len(lengths)}


def main(arguments: list[str]) -> int:
    """The command line; prints one JSON object."""
    checkout.make_importable()
    print(json.dumps(stopped(Path(arguments[0]), Path(arguments[1]))))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
