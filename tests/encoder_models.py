"""Tiny encoders of transformers with random weights, each family with each head, and ours loaded from their folders."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastattn.models as models

SIZES = {
    "vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 40,
}  # fmt: skip
DROPLESS = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {  # how transformers' classes begin, and a config
    "bert": ("Bert", {**SIZES, **DROPLESS}),
    "roberta": ("Roberta", {**SIZES, **DROPLESS, "type_vocab_size": 1, "layer_norm_eps": 1e-5}),
    "distilbert": (
        "DistilBert",
        {
            "vocab_size": 61, "dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 48,
            "max_position_embeddings": 40, "dropout": 0.0, "attention_dropout": 0.0, "qa_dropout": 0.0,
            "seq_classif_dropout": 0.0,
        },
    ),
    "electra": ("Electra", {**SIZES, **DROPLESS, "embedding_size": 16}),
    "modernbert": (
        "ModernBert",
        {
            **SIZES, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2,
            "local_attention": 4,
        },
    ),
}  # fmt: skip
HEADS: dict[str, Any] = {  # as transformers calls it -> our class
    "Model": models.Bert,
    "ForMaskedLM": models.BertForMaskedLM,
    "ForPreTraining": models.BertForPreTraining,
    "ForSequenceClassification": models.BertForSequenceClassification,
    "ForTokenClassification": models.BertForTokenClassification,
    "ForQuestionAnswering": models.BertForQuestionAnswering,
}
POOLED = ("ForSequenceClassification",)
PAIRS = [
    (family, head)
    for family in FAMILIES
    for head in HEADS
    if head != "ForPreTraining" or family in ("bert", "electra")
]


def our_class(family: str, head: str) -> Any:
    """Our class of a head; ELECTRA's pre-training is its discriminator, a classifier of tokens."""
    if (family, head) == ("electra", "ForPreTraining"):
        return models.BertForTokenClassification
    return HEADS[head]


def theirs(family: str, head: str, seed: int = 0, **changes: Any) -> Any:
    """transformers' model in eval mode, with larger weights than it draws, so that every one matters."""
    import transformers

    begins, options = FAMILIES[family]
    torch.manual_seed(seed)
    config = getattr(transformers, begins + "Config")(**{**options, **changes}, attn_implementation="eager")
    model = getattr(transformers, begins + head)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.15)
    return model


def double(model: Any) -> Any:
    """The model in float64, with ModernBERT's rotary positions and softmax, which transformers has in float32."""
    model.double()
    if hasattr(model, "model") or hasattr(model, "rotary_emb"):
        from transformers.models.modernbert import modeling_modernbert as module

        trunk = getattr(model, "model", model)
        module.apply_rotary_pos_emb, module.eager_attention_forward = _rotate, _attend
        trunk.rotary_emb.forward = lambda x, positions, kind: _angles(trunk.config, x, positions, kind)
    return model


def _attend(
    module: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """transformers' eager attention of ModernBERT, the softmax in float32 at least."""
    scores = q @ k.mT * scaling
    if mask is not None:
        scores = scores + mask
    weights = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
    return (weights @ v).transpose(1, 2).contiguous(), weights


def _angles(config: Any, x: Tensor, positions: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    dim = config.hidden_size // config.num_attention_heads
    steps = torch.arange(0, dim, 2, dtype=torch.float64) / dim
    angles = positions[..., None].double() / config.rope_parameters[kind]["rope_theta"] ** steps
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


def _rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """transformers' apply_rotary_pos_emb, in float32 at least."""
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    turned = []
    for x in (q, k):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        first, second = wide.chunk(2, dim=-1)
        turned.append((wide * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype))
    return turned[0], turned[1]


def ours_of(model: Any, cls: Any, **options: Any) -> Any:
    """Our model, loaded from the folder that transformers writes."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = cls.from_pretrained(folder, **options)
        with torch.no_grad():  # the file it is mapped from goes
            for parameter in loaded.parameters():
                parameter.data = parameter.data.clone()
    return loaded


def tensors_in(folder: Path | str) -> dict[str, Tensor]:
    """What model.safetensors of a folder holds."""
    import safetensors.torch

    return safetensors.torch.load_file(Path(folder) / "model.safetensors")


def batch(
    pad: int, lengths: tuple[int, ...] = (11, 4, 7), seqlen: int = 11, side: str = "right"
) -> tuple[Tensor, Tensor]:
    """ids and mask (B, S) with padding on a side; no real token is a special one."""
    ids = torch.randint(3, SIZES["vocab_size"], (len(lengths), seqlen))
    columns = torch.arange(seqlen)
    ends = torch.tensor(lengths)[:, None]
    mask = columns < ends if side == "right" else columns >= seqlen - ends
    return ids.masked_fill(~mask, pad), mask.long()


def main_output(outputs: Any) -> Tensor:
    """The result of a model's call, ours or theirs, that a test compares."""
    for name in ("prediction_logits", "start_logits", "logits", "last_hidden_state"):
        if (found := getattr(outputs, name, None)) is not None:
            return found
    raise AssertionError(type(outputs))


def row_by_row(model: Any, ids: Tensor, mask: Tensor) -> list[Any]:
    """transformers' outputs of each sequence alone, without padding but at the positions of its columns."""
    found = []
    for row, real in zip(ids, mask.bool()):
        positions = real.nonzero().T
        counts = {} if model.config.model_type == "roberta" else {"position_ids": positions}
        found.append(model(input_ids=row[real][None], **counts))
    return found
