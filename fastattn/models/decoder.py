"""GPT: every decoder, from GPT-2 to Llama and Gemma, as options of one forward pass."""

from __future__ import annotations

import math
from contextlib import nullcontext
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastattn import torch_compat
from fastattn.constants import MAX_INT32
from fastattn.generation import generate
from fastattn.models.checkpoint import DECODERS, Pretrained
from fastattn.models.checks import check_caches, check_flags, check_ids, check_range
from fastattn.models.config import FULL, GPTConfig
from fastattn.models.decodable import can_decode
from fastattn.models.decoder_inputs import (
    check_learned_positions,
    count_positions,
    embedding_scale,
    next_tokens,
    visibility,
)
from fastattn.models.losses import mean_loss, mean_loss_of
from fastattn.models.steps import GPTDecoder
from fastattn.models.tied import TiedWeight, shares_gradient
from fastattn.models.unpadded import Row
from fastattn.nn.attention import MultiHeadAttention
from fastattn.nn.blocks import Mlp, PostNormBlock, PreNormBlock, Transform
from fastattn.nn.cross_attention import CrossAttention, Memory
from fastattn.nn.dropout import Dropout
from fastattn.nn.int8 import check_kind
from fastattn.nn.kv_cache import KVCache, lengths_kept_on_error
from fastattn.nn.linear import Linear, linear
from fastattn.nn.norms import RMSNorm, normalised
from fastattn.nn.positions import RotaryTable, lengths_of_segments, sinusoids
from fastattn.nn.rows import forget
from fastattn.nn.uninitialised import Uninitialised
from fastattn.ops.arguments import INTEGER_DTYPES, check_tensor, is_integer


class CausalLMOutput(NamedTuple):
    """The output of a language model.

    Attributes:
        loss: () in float32 at least, None without labels; NaN where no label counts.
        logits: (B, S, V), or the last logits_to_keep of S; None in training, see `GPT.forward`.
        last_hidden_state: (B, S, E), after the final norm; anything at padding, as in hidden_states.
        hidden_states: L + 1 of (B, S, E), the blocks' inputs and then last_hidden_state.
        attentions: L of (B, H, S, S).
        cross_attentions: L of (B, H, S, Sk), with a memory.
    """

    loss: Tensor | None
    logits: Tensor | None
    last_hidden_state: Tensor
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    cross_attentions: tuple[Tensor, ...] | None = None


class GPT(Pretrained, nn.Module):
    """A causal language model: embeddings, `n_layer` pre-norm blocks, a final norm and a linear head.

    What differs between families is a field of the config: positions, norms, the MLP's gate, windows, soft caps, BERT's
    order of norms and its head, cross-attention to an encoder. Initialised as GPT-2: normal(0, initializer_range),
    biases 0, the projections that add to the residual stream scaled by 1 / sqrt(2 * n_layer), but for BERT's order of
    norms, whose sums are normalised. Radford et al. 2019.
    """

    families = DECODERS
    generates = True
    shifts_labels = True  # a row's first label is never a target; code that counts targets reads this

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        with Uninitialised():  # _init_weights draws all of them
            self.wte = nn.Embedding(config.vocab_size, config.n_embd, config.padding_idx)
            self.wpe = _position_embedding(config) if config.positions == "learned" else None
            self.wtt = nn.Embedding(config.type_vocab_size, config.n_embd) if config.type_vocab_size else None
            self.ln_emb = _norm(config, config.n_embd) if config.post_norm else None
            self.rotary = config.rotary()  # by kind of layer; empty with other positions
            self.drop = Dropout(config.embd_pdrop)
            self.h = nn.ModuleList(_block(config, kind) for kind in config.kinds)
            self.ln_f = nn.Identity() if config.post_norm else _norm(config, config.n_embd)
            self.lm_transform = _transform(config) if config.lm_transform else None
            self.lm_head = Linear(config.n_embd, config.vocab_size, bias=config.lm_transform)
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
        return_logits: bool | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        memory: Memory | None = None,
        labels_aligned: bool = False,
    ) -> CausalLMOutput:
        """Logits of the next token at every position, and the mean cross-entropy of `labels` shifted by one.

        Args:
            input_ids: (B, S) int64 or int32, token ids.
            attention_mask: (B, S), nonzero = a real token; with a cache (B, length + S). Padding on either side
                changes nothing for real tokens: positions count real tokens only.
            labels: (B, S) integers, usually input_ids; the token at s + 1 is the target at s, -100 is ignored.
            position_ids: (B, S) or (S,) integers, in place of those counted here; if learned, rows of their table.
            segment_ids: (B, S) integers, several documents packed in a row: a token sees its own document only,
                positions restart with each and no target crosses a boundary. Negative ids are padding.
            cache: one `KVCache` per block, as `new_cache` makes; holds earlier tokens and is appended to.
            logits_to_keep: logits of the last so many positions only; 0 for all.
            return_logits: whether to keep the logits. None = not where a model in training mode makes a loss with
                gradients, which `linear_cross_entropy` does with a few tokens' logits at a time. On a CPU blocks are
                then given a padded batch as one row of its real tokens, (1, T, E).
            output_hidden_states, output_attentions: also return these, see `CausalLMOutput`; O(S * S) memory.
            memory: an encoder's output, which a model with config.add_cross_attention reads; optional.
            labels_aligned: labels[:, s] is the target at position s, as in an `EncoderDecoder`.

        Raises:
            TypeError, ValueError: an argument does not fit, the sequence is longer than learned positions or the cache
                allow, or an id or a label that counts is out of range (checked on a CPU only).
        """
        tensors = {"labels": labels, "segment_ids": segment_ids, "position_ids": position_ids}
        self._check_inputs(input_ids, attention_mask, tensors, cache, logits_to_keep)
        if return_logits is None:
            return_logits = labels is None or not (self.training and torch.is_grad_enabled())
        elif not isinstance(return_logits, bool):
            raise TypeError(f"return_logits: got {return_logits!r}, needs True, False or None")
        check_flags(
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            labels_aligned=labels_aligned,
        )
        config = self.config
        past = cache[0].length if cache else 0
        if memory is not None and not isinstance(memory, Memory):
            raise TypeError(f"memory: got {type(memory).__name__}, needs a Memory, as EncoderDecoder makes")
        if memory is not None and not config.add_cross_attention:
            raise ValueError("memory: this model has no cross-attention, needs config.add_cross_attention")
        targets = None
        if labels is not None:
            targets = next_tokens(labels, segment_ids, config.vocab_size, aligned=labels_aligned)
        # given positions, not numbers of tokens, are the lengths that dynamic scaling goes by
        counted = position_ids is None or not any(rotary.is_dynamic for rotary in self.rotary.values())
        if position_ids is None:
            position_ids = count_positions(input_ids, attention_mask, segment_ids, past, config)
        whole = return_logits or output_attentions or cache is not None or segment_ids is not None
        if targets is not None and counted and not whole:
            row = Row.of(attention_mask, targets, memory)
            if row is not None:  # a subclass may forward something else
                return row.run(
                    partial(GPT.forward, self), input_ids, targets, position_ids, output_hidden_states
                )
        visible = visibility(attention_mask, segment_ids, input_ids.shape[1])

        plain_head = (
            targets is not None and type(self.lm_head) is Linear and not torch_compat.has_hooks(self.lm_head)
        )
        tied = TiedWeight(self.wte) if plain_head and shares_gradient(self.wte, self.lm_head) else None
        x = self.wte(input_ids) if tied is None else tied.embed(input_ids)  # (B, S, E)
        if config.scale_embedding:
            x = x * embedding_scale(config.n_embd, self.wte.weight.dtype)
        if self.wpe is not None:
            x = x + self.wpe(position_ids)  # (B, S, E)
        elif config.positions == "sinusoidal":
            x = x + sinusoids(position_ids, config.n_embd, x.dtype)  # (B, S, E)
        if self.wtt is not None:
            x = x + self.wtt.weight[0]
        if self.ln_emb is not None:
            x = normalised(self.ln_emb, x)
        tables = self._rotary_tables(position_ids, segment_ids, x.dtype)
        x = self.drop(x)
        hidden: list[Tensor] | None = [] if output_hidden_states else None
        weights: list[Tensor] | None = [] if output_attentions else None
        crossed: list[Tensor] | None = [] if output_attentions and memory is not None else None
        with nullcontext() if cache is None else lengths_kept_on_error(cache):
            for i, (block, kind) in enumerate(zip(self.h, config.kinds)):
                if hidden is not None:
                    hidden.append(x)
                past_keys = None if cache is None else cache[i]
                x = block(
                    x, **visible, rotary=tables.get(kind), cache=past_keys, weights=weights,
                    memory=memory, cross_weights=crossed,
                )  # fmt: skip
        x = self.ln_f(x)  # (B, S, E)
        inside = (
            None if hidden is None else (*hidden, x), None if weights is None else tuple(weights),
            None if crossed is None else tuple(crossed),
        )  # fmt: skip

        head = None if not plain_head else self.lm_head.weight if tied is None else tied.head()  # (V, E)
        cap = config.final_logit_softcapping
        if targets is not None and head is not None and not return_logits:
            h = x if self.lm_transform is None else self.lm_transform(x)
            return CausalLMOutput(mean_loss(h, head, targets, self.lm_head.bias, cap), None, x, *inside)
        if targets is None and not return_logits:
            return CausalLMOutput(None, None, x, *inside)
        kept = x[:, -logits_to_keep:]
        if self.lm_transform is not None:
            kept = self.lm_transform(kept)
        logits = self.lm_head(kept) if head is None else linear(kept, head, self.lm_head.bias)
        # (B, S or logits_to_keep, V)
        if cap is not None:
            logits = cap * torch.tanh(logits / cap)
        loss = None if targets is None else mean_loss_of(logits, targets)
        return CausalLMOutput(loss, logits if return_logits else None, x, *inside)

    def new_cache(self, batch: int, capacity: int) -> list[KVCache]:
        """Empty caches for `batch` sequences of up to `capacity` tokens, on the model's device and in its dtype."""
        config, weight = self.config, self.wte.weight
        return [
            KVCache(
                batch, config.kv_heads, capacity, config.head_dim, dtype=weight.dtype, device=weight.device
            )
            for _ in self.h
        ]

    @property
    def max_positions(self) -> int | None:
        """Most tokens of a sequence: the learned positions there are; None with positions that any length has."""
        return None if self.wpe is None else self.config.n_positions - self.config.position_offset

    def step(self, ids: Tensor, cache: list[KVCache] | None, attention_mask: Tensor | None = None) -> Tensor:
        """Logits of the token after `ids`, (B, V): one step of generation, see `fastattn.generation.CausalLM`."""
        logits = self(ids, attention_mask, cache=cache, logits_to_keep=1, return_logits=True).logits
        assert logits is not None
        return logits[:, -1]

    def decoder(self, batch: int, capacity: int, *, batch_invariant: bool = False) -> GPTDecoder | None:
        """A `GPTDecoder`, whose steps skip the checks of forward; None where modules were replaced or have hooks."""
        return (
            GPTDecoder(self, batch, capacity, batch_invariant=batch_invariant) if can_decode(self) else None
        )

    def quantize(self, kind: str | None = "int8") -> GPT:
        """Let `generate` and `decoder` multiply with weights rounded to 8 bits, or with None as they are; returns self.

        A weight has a scale for each output and an activation one for each token, so that a sequence's result does not
        depend on its batch. The error of each is below 1/254 of the largest magnitude under the scale (activations:
        1/126 on CPUs without AVX-512 VNNI). Weights themselves, `forward` and training stay as they are; the rounded
        copies are made once and again where a weight has changed. A change through `weight.data` leaves no trace, so
        call this again after one. ValueError for another kind, and where modules were replaced or have hooks.
        """
        check_kind("kind", kind)
        if kind is not None and not can_decode(self):
            raise ValueError(
                "kind: a model with replaced modules or hooks does not decode with 8-bit weights"
            )
        forget(self)
        self.quantized = kind
        return self

    generate = generate

    def tie_weights(self) -> None:
        """Tie the head's weight to the token embedding if the config asks for it."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.wte.weight

    def _rotary_tables(
        self, position_ids: Tensor, segment_ids: Tensor | None, dtype: torch.dtype
    ) -> dict[str, RotaryTable]:
        """For each kind of layer cos and sin, (S, D/2) or (B, S, D/2), in float32 at least; empty without rotary."""
        if not self.rotary:
            return {}
        wide = torch.promote_types(dtype, torch.float32)
        lengths = None if segment_ids is None else lengths_of_segments(segment_ids)
        return {kind: rotary.table(position_ids, wide, lengths) for kind, rotary in self.rotary.items()}

    @torch.no_grad()
    def _init_weights(self) -> None:
        std = self.config.initializer_range
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif name.endswith(("out_proj.weight", "mlp.c_proj.weight")) and not self.config.post_norm:
                parameter.normal_(0.0, std / math.sqrt(2 * self.config.n_layer))
            elif parameter.dim() == 2:
                parameter.normal_(0.0, std)  # norm weights keep their initial values
        if self.config.padding_idx is not None:
            self.wte.weight[self.config.padding_idx].zero_()
        if self.wpe is not None and self.wpe.padding_idx is not None:
            self.wpe.weight[self.wpe.padding_idx].zero_()

    def _check_inputs(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        tensors: dict[str, Tensor | None],
        cache: list[KVCache] | None,
        logits_to_keep: int,
    ) -> None:
        given = {"input_ids": input_ids, "attention_mask": attention_mask, **tensors}
        for name, tensor in given.items():
            if tensor is not None:
                check_tensor(name, tensor)
        check_tensor("input_ids", input_ids)
        if not is_integer(logits_to_keep):
            raise TypeError(f"logits_to_keep: got {logits_to_keep!r}, needs an integer")
        check_ids("input_ids", input_ids)
        batch, seqlen = input_ids.shape
        if cache is not None:
            check_caches(cache, len(self.h), (batch, self.config.kv_heads))
        past = cache[0].length if cache else 0
        if attention_mask is not None and attention_mask.shape != (batch, past + seqlen):
            shape = tuple(attention_mask.shape)
            raise ValueError(f"attention_mask: got shape {shape}, needs {(batch, past + seqlen)}")
        for name, tensor in tensors.items():
            if tensor is None:
                continue
            # compared one by one: hashing the sizes, as a set does, would specialise compiled code to them
            fits = tuple(tensor.shape) == (batch, seqlen) or (
                name == "position_ids" and tuple(tensor.shape) == (seqlen,)
            )
            if not fits or tensor.dtype not in INTEGER_DTYPES:
                got = f"{tensor.dtype} of shape {tuple(tensor.shape)}"
                raise ValueError(f"{name}: got {got}, needs integers of shape {(batch, seqlen)}")
        if tensors["segment_ids"] is not None and past:
            raise ValueError("segment_ids: packed sequences do not go with a cache that holds tokens")
        if not 0 <= logits_to_keep <= MAX_INT32 or (logits_to_keep and tensors["labels"] is not None):
            raise ValueError(
                f"logits_to_keep: got {logits_to_keep}, needs 0 or more, and 0 (all) with labels"
            )
        if self.max_positions is not None and tensors["position_ids"] is None:  # which are checked below
            check_learned_positions(self.config, self.max_positions, past + seqlen, attention_mask)
        check_range("input_ids", input_ids, self.config.vocab_size, "vocab_size")
        if self.wpe is not None and tensors["position_ids"] is not None:
            check_range("position_ids", tensors["position_ids"], self.config.n_positions, "n_positions")


def _norm(config: GPTConfig, dim: int) -> nn.Module:
    if config.norm == "layernorm":
        return nn.LayerNorm(dim, eps=config.layer_norm_epsilon, bias=config.bias)
    return RMSNorm(dim, config.layer_norm_epsilon, unit_offset=config.norm_unit_offset)


def _position_embedding(config: GPTConfig) -> nn.Embedding:
    unused = config.position_offset - 1 if config.position_offset else None
    return nn.Embedding(config.n_positions, config.n_embd, unused)


def _transform(config: GPTConfig) -> Transform:
    return Transform(
        config.n_embd, config.n_embd, activation=config.lm_activation or config.activation_function, bias=True,
        norm=_norm(config, config.n_embd),
    )  # fmt: skip


def _block(config: GPTConfig, kind: str) -> PreNormBlock:
    attention_bias, out_bias, mlp_bias = config.biases
    norm = partial(_norm, config)
    scalar = config.query_pre_attn_scalar
    attn = MultiHeadAttention(
        config.n_embd,
        config.n_head,
        dropout=config.attn_pdrop,
        bias=attention_bias,
        batch_first=True,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        out_bias=out_bias,
        scale=None if scalar is None else scalar**-0.5,
        window=None if config.window is None or kind == FULL else (config.window - 1, 0),
        alibi=config.positions == "alibi",
        softcap=config.attn_logit_softcapping,
        qk_norm=norm if config.qk_norm and config.norm == "rmsnorm" else config.qk_norm,
    )
    mlp = Mlp(
        config.n_embd,
        config.mlp_dim,
        activation=config.activation_function,
        bias=mlp_bias,
        dropout=config.resid_pdrop,
        gated=config.gated_mlp,
    )
    cross = None
    if config.add_cross_attention:
        cross = CrossAttention(config.n_embd, config.n_head, bias=attention_bias, dropout=config.attn_pdrop)
    make = PostNormBlock if config.post_norm else PreNormBlock
    return make(
        attn, mlp, norm=norm, sandwich=config.sandwich_norms, dropout=config.resid_pdrop, cross_attn=cross
    )
