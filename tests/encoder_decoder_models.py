"""Tiny encoder-decoders of transformers with random weights, ours loaded from their folders, and batches for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastattn.models import EncoderDecoder

SOURCE_VOCAB, VOCAB, START, END, PAD = 61, 53, 1, 2, 0
PAIRS: dict[str, tuple[str, str, int]] = {  # encoder, decoder, width of the encoder; the decoder's is 32
    "bert to bert": ("Bert", "Bert", 32),
    "roberta to bert": ("Roberta", "Bert", 24),
    "bert to gpt2": ("Bert", "GPT2", 32),
    "roberta to roberta": ("Roberta", "Roberta", 32),
    "bert to roberta": ("Bert", "Roberta", 24),
}
_DROPLESS = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_BERT_SIZES = {
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
}
_DECODERS: dict[str, dict[str, Any]] = {
    "Bert": {"hidden_size": 32, **_BERT_SIZES, **_DROPLESS},
    "Roberta": {"hidden_size": 32, **_BERT_SIZES, **_DROPLESS, "bos_token_id": 0, "pad_token_id": 1},
    "GPT2": {
        "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40,
        **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0),
    },
}  # fmt: skip


def make_theirs(name: str, **decoder: Any) -> Any:
    """transformers' model in eval mode on eager attention, with larger weights than it draws, so that each matters."""
    import transformers

    reader, writer, width = PAIRS[name]
    encoder_config = getattr(transformers, f"{reader}Config")(
        vocab_size=SOURCE_VOCAB,
        hidden_size=width,
        pad_token_id=int(reader == "Roberta"),
        **_BERT_SIZES,
        **_DROPLESS,
    )
    decoder_config = getattr(transformers, f"{writer}Config")(
        **{
            "vocab_size": VOCAB, "pad_token_id": PAD, "bos_token_id": START, "eos_token_id": END, "is_decoder": True,
            "add_cross_attention": True, **_DECODERS[writer], **decoder,
        }
    )  # fmt: skip
    config = transformers.EncoderDecoderConfig(
        encoder=encoder_config.to_dict(), decoder=decoder_config.to_dict(), eos_token_id=END,
        decoder_start_token_id=decoder_config.bos_token_id, pad_token_id=decoder_config.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(sorted(PAIRS).index(name))
    model = transformers.EncoderDecoderModel(config=config)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            # GPT-2's matrices, without norms behind them, have to outweigh its biases
            matrix = parameter.dim() == 2 and path.startswith("decoder.transformer.")
            parameter.add_(torch.randn_like(parameter), alpha=0.4 if matrix else 0.15)
    return model.eval()


def make_both(name: str, folder: Path, **decoder: Any) -> tuple[Any, EncoderDecoder]:
    """transformers' model and ours, read from the folder that it saved itself to."""
    theirs = make_theirs(name, **decoder)
    theirs.save_pretrained(folder)
    return theirs, EncoderDecoder.from_pretrained(folder)


def batch(name: str) -> dict[str, Tensor]:
    """Sources padded on the right, on the left and not at all, and targets of which two end early."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, SOURCE_VOCAB, (3, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, 6:] = mask[1, :4] = 0
    ids = ids.masked_fill(mask == 0, int(PAIRS[name][0] == "Roberta"))
    labels = torch.randint(3, VOCAB, (3, 6), generator=generator)
    labels[0, 4:] = labels[2, 5:] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
