"""A small model saved in a folder with files of its user, and what a folder holds."""

from pathlib import Path

import safetensors.torch
import torch
from small_models import make_gpt


def make(**options):
    return make_gpt(torch.float32, **options)


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def tensors(folder):
    return safetensors.torch.load_file(folder / "model.safetensors")


def saved_beside_files(tmp_path):
    """A saved model with files of a user beside it."""
    folder = tmp_path / "model"
    make(eos_token_id=2).save_pretrained(folder)
    (folder / "notes.txt").write_text("mine")
    (folder / "checkpoint-1" / "deep").mkdir(parents=True)
    (folder / "checkpoint-1" / "deep" / "state.pt").write_bytes(b"state")
    (folder / "link").symlink_to("notes.txt")
    (folder / "tokenizer.json").write_text('{"old": 1}')
    return folder


class Tokenizer:
    def save_pretrained(self, folder):
        for name in ("tokenizer.json", "vocab.json"):
            Path(folder, name).write_text('{"new": 1}')
