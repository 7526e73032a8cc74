"""GPT: a pre-norm causal language model with learned, rotary or ALiBi positions, a KV cache and packed sequences."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn.models.checkpoint import load_gpt, save_gpt
from fastattn.models.config import GPTConfig
from fastattn.models.generation import generate
from fastattn.nn.attention import MultiHeadAttention
from fastattn.nn.blocks import Mlp, PreNormBlock
from fastattn.nn.kv_cache import KVCache
from fastattn.nn.linear import Linear
from fastattn.nn.positions import Rotary, positions_from_mask, positions_in_segments

IGNORE_INDEX = -100


@dataclass
class CausalLMOutput:
    """What a language model returns; loss is None without labels."""

    loss: Tensor | None  # ()
    logits: Tensor  # (B, S, V), or the last logits_to_keep of S
    last_hidden_state: Tensor  # (B, S, E), after the final norm


class GPT(nn.Module):
    """A causal language model: embeddings, `n_layer` pre-norm blocks, a final norm and a linear head.

    Initialised as GPT-2: normal(0, initializer_range), biases 0, the two projections that add to the residual
    stream scaled by 1 / sqrt(2 * n_layer). Radford et al. 2019.
    """

    shifts_labels = True  # a row's first label is never a target; what counts targets asks for this

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd) if config.positions == "learned" else None
        self.rotary = Rotary(config.head_dim, config.rope_theta) if config.positions == "rotary" else None
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList(_block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon, bias=config.bias)
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        self.tie_weights()
        self._init_weights()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
        segment_ids: Tensor | None = None,
        cache: list[KVCache] | None = None,
        logits_to_keep: int = 0,
    ) -> CausalLMOutput:
        """Logits of the next token at every position, and the mean cross-entropy of `labels` shifted by one.

        Args:
            input_ids: (B, S) token ids.
            attention_mask: (B, S), nonzero = a real token; with a cache (B, length + S). Padding on either side
                changes nothing for real tokens: positions count real tokens only.
            labels: (B, S), usually input_ids; the token at s + 1 is the target at s, -100 is ignored.
            position_ids: (B, S) or (S,), in place of those counted here.
            segment_ids: (B, S) integers, several documents packed in a row: a token sees its own document only,
                positions restart with each and no target crosses a boundary. Negative ids are padding.
            cache: one `KVCache` per block, as `new_cache` makes; holds earlier tokens and is appended to.
            logits_to_keep: logits of the last so many positions only; 0 for all.
        """
        past = 0 if cache is None else cache[0].length
        self._check_inputs(input_ids, attention_mask, labels, segment_ids, past, logits_to_keep)
        visible = _visibility(attention_mask, segment_ids, input_ids.shape[1])
        if position_ids is None:
            position_ids = _count_positions(input_ids, attention_mask, segment_ids, past)

        x = self.wte(input_ids)  # (B, S, E)
        if self.wpe is not None:
            x = x + self.wpe(position_ids)  # (B, S, E)
        table = (
            None if self.rotary is None else self.rotary.table(position_ids)
        )  # cos, sin (B or none, S, D/2)
        x = self.drop(x)
        for i, block in enumerate(self.h):
            x = block(x, **visible, rotary=table, cache=None if cache is None else cache[i])
        x = self.ln_f(x)  # (B, S, E)
        logits = self.lm_head(x[:, -logits_to_keep:])  # (B, S or logits_to_keep, V)
        loss = None if labels is None else _next_token_loss(logits, labels, segment_ids)
        return CausalLMOutput(loss, logits, x)

    def new_cache(self, batch: int, capacity: int) -> list[KVCache]:
        """Empty caches for `batch` sequences of up to `capacity` tokens, on the model's device and in its dtype."""
        config, weight = self.config, self.wte.weight
        return [
            KVCache(
                batch, config.kv_heads, capacity, config.head_dim, dtype=weight.dtype, device=weight.device
            )
            for _ in self.h
        ]

    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Tensor:
        """Prompt and continuation ids; the options are those of `fastattn.models.generation.generate`."""
        return generate(self, input_ids, attention_mask, **options)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write config.json and model.safetensors, in GPT-2's format where the model has nothing GPT-2 has not."""
        save_gpt(self.config, self.state_dict(), directory)

    @classmethod
    def from_pretrained(cls, path_or_id: str | Path) -> GPT:
        """A model in eval mode from a folder, ours or a transformers GPT-2, or from the Hugging Face hub."""
        config, state = load_gpt(path_or_id)
        with torch.device("meta"):
            model = cls(config)
        missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
        if missing or unexpected:
            raise ValueError(
                f"pretrained model: {path_or_id} does not fit its config: missing {missing}, unexpected {unexpected}"
            )
        model.tie_weights()
        return model.eval()

    def tie_weights(self) -> None:
        """Make the head's weight the token embedding itself, where the config says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.wte.weight

    @torch.no_grad()
    def _init_weights(self) -> None:
        std = self.config.initializer_range
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif name.endswith(("out_proj.weight", "mlp.c_proj.weight")):
                parameter.normal_(0.0, std / math.sqrt(2 * self.config.n_layer))
            elif parameter.dim() == 2:
                parameter.normal_(0.0, std)

    def _check_inputs(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        labels: Tensor | None,
        segment_ids: Tensor | None,
        past: int,
        logits_to_keep: int,
    ) -> None:
        if input_ids.dim() != 2 or input_ids.is_floating_point():
            got = f"{input_ids.dtype} of shape {tuple(input_ids.shape)}"
            raise ValueError(f"input_ids: got {got}, needs integers of shape (batch, length)")
        batch, seqlen = input_ids.shape
        if attention_mask is not None and attention_mask.shape != (batch, past + seqlen):
            needs = f"({batch}, {past + seqlen})"
            raise ValueError(f"attention_mask: got shape {tuple(attention_mask.shape)}, needs {needs}")
        for name, tensor in (("labels", labels), ("segment_ids", segment_ids)):
            if tensor is not None and tensor.shape != input_ids.shape:
                raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, needs {tuple(input_ids.shape)}")
        if segment_ids is not None and past:
            raise ValueError("segment_ids: packed sequences do not go with a cache that holds tokens")
        if labels is not None and logits_to_keep:
            raise ValueError("logits_to_keep: labels need the logits of every position")
        if self.wpe is not None and past + seqlen > self.config.n_positions:
            raise ValueError(
                f"input_ids: {past + seqlen} tokens is more than n_positions={self.config.n_positions}, "
                f"the learned positions there are"
            )


def _block(config: GPTConfig) -> PreNormBlock:
    attn = MultiHeadAttention(
        config.n_embd,
        config.n_head,
        dropout=config.attn_pdrop,
        bias=config.bias,
        batch_first=True,
        num_kv_heads=config.num_kv_heads,
        window=None if config.window is None else (config.window - 1, 0),
        alibi=config.positions == "alibi",
        qk_norm=config.qk_norm,
    )
    mlp = Mlp(
        config.n_embd,
        config.mlp_dim,
        activation=config.activation_function,
        bias=config.bias,
        dropout=config.resid_pdrop,
    )
    return PreNormBlock(
        attn, mlp, norm_eps=config.layer_norm_epsilon, bias=config.bias, dropout=config.resid_pdrop
    )


def _visibility(attention_mask: Tensor | None, segment_ids: Tensor | None, seqlen: int) -> dict[str, Any]:
    """The options of attention by which only real tokens of one document see each other."""
    if attention_mask is None:
        return {"segment_ids": segment_ids}
    if segment_ids is None and seqlen == 1:
        return {"key_padding_mask": attention_mask == 0}  # (B, past + 1): one call decodes the whole batch
    real = attention_mask != 0
    if segment_ids is not None:
        ids = torch.where(real, segment_ids, -1)
    elif real.device.type == "cpu" and not torch.compiler.is_compiling() and bool(real.all()):
        return {}  # without padding the call stays dense; elsewhere than on a CPU asking would synchronise
    else:
        ids = real.to(torch.int32) - 1  # 0 for a token, -1 for padding
    return {"segment_ids": (ids[:, ids.shape[1] - seqlen :], ids)}


def _count_positions(
    input_ids: Tensor, attention_mask: Tensor | None, segment_ids: Tensor | None, past: int
) -> Tensor:
    """(B, S), or (S,) where all rows agree: how many tokens of its own document stand before each token."""
    if segment_ids is not None:
        return positions_in_segments(segment_ids)
    if attention_mask is not None:
        return positions_from_mask(attention_mask)[:, past:]
    return torch.arange(past, past + input_ids.shape[1], device=input_ids.device)


def _next_token_loss(logits: Tensor, labels: Tensor, segment_ids: Tensor | None) -> Tensor:
    """Mean over targets of -log softmax(logits)[next token], in float32; NaN where there is no target."""
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)  # (B, S): shifting labels copies no logits
    if segment_ids is not None:
        following = F.pad(segment_ids[:, 1:], (0, 1), value=-1)
        targets = torch.where((following == segment_ids) & (segment_ids >= 0), targets, IGNORE_INDEX)
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE_INDEX)
