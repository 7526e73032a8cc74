"""One set of random weights in our encoder and in transformers', and a folder of sentence embeddings in two."""

from __future__ import annotations

import json
import os
import pydoc_data.topics
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from measure.protocols import CannotRun, Step, Tensors

SMALL: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128, "vocab_size": 500,
}  # fmt: skip
GROUP = 8  # sequences of a group, after sorting by length
REAL_WEIGHTS = "FASTATTN_REAL_WEIGHTS"


class EncoderPair:
    """A masked language model's weights, in ours and in transformers' BERT."""

    def __init__(self, preset: str, layers: int, device: torch.device, *, training: bool) -> None:
        from fastattn.models import BertConfig, BertForMaskedLM

        torch.manual_seed(7)
        sizes = SMALL if not preset else {"num_hidden_layers": layers}
        config = BertConfig.preset(
            preset or "bert-base-uncased", **sizes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
        )
        self.device, self.training, self.config = device, training, config
        self.model = BertForMaskedLM(config).to(device)

    def make(self, provider: str, dtype: torch.dtype) -> Any:
        """A new model: the trunk for inference, with its head for training; ours, or transformers' with SDPA."""
        from fastattn.models import BertForMaskedLM

        with tempfile.TemporaryDirectory() as folder:
            self.model.save_pretrained(folder)
            if provider == "fastattn":
                ours = BertForMaskedLM.from_pretrained(folder)
                # from_pretrained maps the file; copies of the pages make the weights private, as transformers' are
                ours.load_state_dict({name: value.clone() for name, value in ours.state_dict().items()})
                whole = ours.to(self.device, dtype)
                return whole.train() if self.training else whole.bert
            import transformers

            theirs = transformers.BertForMaskedLM.from_pretrained(folder, attn_implementation="sdpa")
            theirs = theirs.to(self.device, dtype)
            return theirs.train() if self.training else theirs.bert.eval()


def in_groups(mask: Tensor) -> list[tuple[Tensor, int]]:
    """(rows, longest) of groups of `GROUP` sequences of similar lengths."""
    lengths = mask.sum(1)
    return [(rows, int(lengths[rows].max())) for rows in lengths.argsort().split(GROUP)]


def sentences(count: int) -> list[str]:
    """English sentences of Python's own documentation."""
    text = " ".join(pydoc_data.topics.topics[key] for key in sorted(pydoc_data.topics.topics))
    parts = (re.sub(r"\s+", " ", part).strip() for part in re.split(r"(?<=[.!?])\s+", text))
    found = [part for part in parts if 20 < len(part) < 600]
    return found[:count]


def padded_sentences(folder: Path, texts: Sequence[str], device: torch.device, batch: int = 32) -> Step:
    """transformers' model on batches in the texts' order, each padded to its longest; means of length 1."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder, attn_implementation="sdpa").to(device).eval()
    longest = json.loads((folder / "sentence_bert_config.json").read_text(encoding="utf-8"))["max_seq_length"]

    def step() -> Tensors:
        made = []
        with torch.no_grad():
            for start in range(0, len(texts), batch):
                part = list(texts[start : start + batch])
                encoded = tokenizer(
                    part, padding=True, truncation=True, max_length=longest, return_tensors="pt"
                )
                states = model(**encoded.to(device)).last_hidden_state
                mask = encoded["attention_mask"][..., None].to(states.dtype)
                made.append((states * mask).sum(1) / mask.sum(1))
        return {"out": torch.nn.functional.normalize(torch.cat(made), dim=-1).cpu()}

    return step


def embedding_folder(preset: str, scratch: Path, texts: Sequence[str]) -> Path:
    """A sentence-transformers folder: the real one where there is one, else random weights of the preset's sizes."""
    root = os.environ.get(REAL_WEIGHTS)
    if root and preset:
        found = [path.parent for path in sorted(Path(root).rglob("modules.json"))]
        if not found:
            raise CannotRun(f"{REAL_WEIGHTS} has no folder with modules.json")
        return found[0]
    import tokenizers
    from tokenizers import normalizers, pre_tokenizers, processors, trainers

    from fastattn.models import BertConfig, BertForEmbedding

    core = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
    core.normalizer, core.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    size = 30522 if preset else 500
    core.train_from_iterator(texts, trainers.WordPieceTrainer(vocab_size=size, special_tokens=special))
    core.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    torch.manual_seed(7)
    model = BertForEmbedding(BertConfig.preset(preset) if preset else BertConfig(**SMALL))
    model.max_seq_length = 256
    model.save_pretrained(scratch)
    core.save(str(scratch / "tokenizer.json"))
    (scratch / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "BertTokenizerFast", "model_max_length": 256}'
    )
    return scratch
