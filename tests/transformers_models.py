"""Small random transformers models, one for every way a model calls attention, and inputs for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

VOCAB, WIDTH, LAYERS, HEADS, BATCH, LENGTH = 64, 32, 2, 4, 3, 9
SMALL = {"vocab_size": VOCAB, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BERT_LIKE = SMALL | {"intermediate_size": 48, "max_position_embeddings": 64}
LLAMA_LIKE = BERT_LIKE | SPECIAL | {"num_key_value_heads": 2, "head_dim": 8}
HYBRID = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
SEQ2SEQ = SPECIAL | {
    "vocab_size": VOCAB, "d_model": WIDTH, "encoder_layers": LAYERS, "decoder_layers": LAYERS,
    "encoder_attention_heads": HEADS, "decoder_attention_heads": HEADS, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
    "decoder_start_token_id": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Example:
    """How to build a model, and what it takes: "causal", "encoder", "image", "audio" or "seq2seq"."""

    build: Callable[[], nn.Module]
    kind: str

    def make(self, seed: int = 0) -> Any:
        """The model in eval mode, with weights large enough that attention is far from uniform."""
        torch.manual_seed(seed)
        model = self.build().eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() > 1:
                    spread = (
                        1.0
                        if "embed" in name or "wte" in name or "wpe" in name
                        else parameter.shape[-1] ** -0.5
                    )
                    parameter.normal_(0, spread)
                elif not name.endswith("weight"):  # biases, sinks; the weights of norms stay
                    parameter.normal_(0, 0.3)
        return model

    def inputs(self, padding: str = "none", seed: int = 1) -> tuple[dict[str, Tensor], Tensor]:
        """(arguments, valid): ragged rows padded on one side, and which positions of the output count."""
        torch.manual_seed(seed)
        mask = padding_mask(padding)
        ids = torch.randint(3, VOCAB, (BATCH, LENGTH)).masked_fill(~mask, 0)
        if self.kind == "image":
            return {"pixel_values": torch.randn(BATCH, 3, 16, 16)}, torch.ones(BATCH, dtype=torch.bool)
        if self.kind == "audio":
            arguments = {"input_features": torch.randn(BATCH, 8, 24), "decoder_input_ids": ids}
            return arguments | ({"decoder_attention_mask": mask.long()} if padding != "none" else {}), mask
        arguments = {"input_ids": ids}
        if padding != "none":
            arguments["attention_mask"] = mask.long()
        if self.kind == "seq2seq":
            arguments["decoder_input_ids"] = torch.randint(3, VOCAB, (BATCH, 6))
            valid = torch.ones(BATCH, 6, dtype=torch.bool)
            if padding != "none":
                valid = mask[:, :6] if padding == "right" else mask[:, -6:]
                arguments["decoder_attention_mask"] = valid.long()
            return arguments, valid
        return arguments, mask

    def prompt(self, padding: str) -> dict[str, Tensor]:
        """Arguments of `generate`.

        Of right-padded rows the shortest is left out: its last query, itself padding, sees nothing through a sliding
        window, and there eager attention takes the mean of all values where fastattn gives 0.
        """
        arguments, _ = self.inputs(padding)
        rows = 2 if padding == "right" else BATCH
        return {name: t[:rows] for name, t in arguments.items() if not name.startswith("decoder")}


def padding_mask(padding: str) -> Tensor:
    """(B, S) bool, True = a token: ragged rows, the first without padding."""
    lengths = torch.tensor([LENGTH, LENGTH - 3, 2 if padding != "none" else LENGTH])
    if padding == "none":
        lengths[:] = LENGTH
    mask = torch.arange(LENGTH) < lengths[:, None]
    return mask.flip(1) if padding == "left" else mask


def gpt_oss() -> nn.Module:
    config = hf.GptOssConfig(
        **LLAMA_LIKE, **HYBRID, num_local_experts=4, num_experts_per_tok=2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    config._experts_implementation = "eager"
    return hf.GptOssForCausalLM(config)


MODELS = {
    "gpt2": Example(
        lambda: hf.GPT2LMHeadModel(
            hf.GPT2Config(vocab_size=VOCAB, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, **SPECIAL)
        ),
        "causal",
    ),
    "bert": Example(lambda: hf.BertForMaskedLM(hf.BertConfig(**BERT_LIKE)), "encoder"),
    "roberta": Example(lambda: hf.RobertaForMaskedLM(hf.RobertaConfig(**BERT_LIKE, **SPECIAL)), "encoder"),
    "distilbert": Example(
        lambda: hf.DistilBertForMaskedLM(
            hf.DistilBertConfig(vocab_size=VOCAB, dim=WIDTH, n_layers=LAYERS, n_heads=HEADS, hidden_dim=48)
        ),
        "encoder",
    ),
    "llama": Example(lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA_LIKE)), "causal"),
    "mistral": Example(lambda: hf.MistralForCausalLM(hf.MistralConfig(**LLAMA_LIKE, sliding_window=4)), "causal"),
    "qwen3": Example(
        lambda: hf.Qwen3ForCausalLM(
            hf.Qwen3Config(**LLAMA_LIKE, **HYBRID, use_sliding_window=True, max_window_layers=0)
        ),
        "causal",
    ),
    "gemma2": Example(
        lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**LLAMA_LIKE, **HYBRID, attn_logit_softcapping=2.0)), "causal"
    ),
    "gemma3": Example(lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**LLAMA_LIKE, **HYBRID)), "causal"),
    "gpt_oss": Example(gpt_oss, "causal"),
    "modernbert": Example(
        lambda: hf.ModernBertForMaskedLM(
            hf.ModernBertConfig(**BERT_LIKE, **SPECIAL, cls_token_id=1, sep_token_id=2, local_attention=4)
        ),
        "encoder",
    ),
    "vit": Example(
        lambda: hf.ViTForImageClassification(
            hf.ViTConfig(
                hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS, intermediate_size=48,
                image_size=16, patch_size=4,
            )
        ),
        "image",
    ),
    "whisper": Example(
        lambda: hf.WhisperForConditionalGeneration(
            hf.WhisperConfig(**SEQ2SEQ, num_mel_bins=8, max_source_positions=12, max_target_positions=64)
        ),
        "audio",
    ),
    "bart": Example(
        lambda: hf.BartForConditionalGeneration(hf.BartConfig(**SEQ2SEQ, max_position_embeddings=64)), "seq2seq"
    ),
    "t5": Example(
        lambda: hf.T5ForConditionalGeneration(
            hf.T5Config(
                vocab_size=VOCAB, d_model=WIDTH, d_kv=8, d_ff=48, num_layers=LAYERS, num_heads=HEADS,
                pad_token_id=0, eos_token_id=2, decoder_start_token_id=1,
            )
        ),
        "seq2seq",
    ),
}  # fmt: skip


def put_logits(model, ids, queue):
    """What a spawned worker runs: here, as it can import this module whatever started the tests."""
    queue.put(model(ids).logits.detach().numpy())
