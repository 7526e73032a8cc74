"""Bert: every encoder of the family, from BERT to ModernBERT, computed on real tokens only."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastattn import torch_compat
from fastattn.models.bert_config import BertConfig
from fastattn.models.checkpoint import Family
from fastattn.models.checks import check_flags, check_ids, check_range
from fastattn.models.config import FULL, SLIDING
from fastattn.models.encoded import Encoded
from fastattn.models.pretrained import PretrainedEncoder
from fastattn.nn.dropout import Dropout
from fastattn.nn.encoder_blocks import EncoderBlock, EncoderMlp, SelfAttention
from fastattn.nn.linear import Linear, runs_eagerly
from fastattn.nn.norms import normalised
from fastattn.nn.positions import Rotary, RotaryTable, positions_of_tokens
from fastattn.nn.uninitialised import Uninitialised
from fastattn.nn.unpadding import Tokens
from fastattn.ops.arguments import INTEGER_DTYPES, check_tensor


class EncoderOutput(NamedTuple):
    """The output of an encoder, in the dtype of its weights; 0 at padding.

    Attributes:
        last_hidden_state: (B, S, E).
        pooler_output: (B, E), None without config.pooler.
        hidden_states: L + 1 of (B, S, E), the embeddings and then each layer's output; None unless asked for.
        attentions: L of (B, H, S, S); None unless asked for.
    """

    last_hidden_state: Tensor
    pooler_output: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class Bert(PretrainedEncoder, nn.Module):
    """Token, position and type embeddings and `num_hidden_layers` blocks of self-attention, without a head.

    Padding costs nothing: real tokens are packed for every layer and head, forward and backward, and outputs are padded
    back with 0. Values at padding, even NaN, change nothing. Programs that are recorded before the mask is known
    (torch.compile, export, CUDA graphs) compute padding too, so that one program serves every length.

    As in transformers, learned positions are columns: padding on the left shifts them, so pad on the right, or give
    position_ids. "First token" is a sequence's first real one wherever the padding is. A row of padding alone gives 0,
    its pooled output is the pooler applied to zeros.

    Devlin et al. 2018; Liu et al. 2019 (RoBERTa); Sanh et al. 2019 (DistilBERT); Clark et al. 2020 (ELECTRA);
    Warner et al. 2024 (ModernBERT).

    Args:
        config: sizes and options.
        add_pooler: False for a model without a pooler, whatever config.pooler says.
    """

    with_prefix = False

    def __init__(self, config: BertConfig, *, add_pooler: bool = True) -> None:
        super().__init__()
        self.config = config
        with Uninitialised():  # apply_init draws all of them
            self.embeddings = Embeddings(config)
            self.rotary = {
                FULL: Rotary(config.head_dim, config.rope_theta),
                SLIDING: Rotary(config.head_dim, config.local_rope_theta),
            }
            self.layers = nn.ModuleList(_block(config, i) for i in range(config.num_hidden_layers))
            self.final_norm = _norm(config, config.hidden_size) if config.pre_norm else nn.Identity()
            self.pooler = (
                Linear(config.hidden_size, config.hidden_size) if config.pooler and add_pooler else None
            )
        self.apply_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        *,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> EncoderOutput:
        """Hidden states of every token.

        Args:
            input_ids: (B, S) int64 or int32, token ids.
            attention_mask: (B, S), nonzero = a real token; None for no padding.
            token_type_ids: (B, S) integers, 0 by default; refused where the family has none.
            position_ids: (B, S) or (S,) integers, in place of those counted here.
            inputs_embeds: (B, S, embedding_dim) in place of input_ids: what the token embedding would give.
            output_hidden_states: also return the embeddings and the output of each layer.
            output_attentions: also return each layer's attention weights, 0 in rows and columns of padding.

        Raises:
            TypeError: something else than a tensor stands where a tensor belongs, or a flag is not a bool.
            ValueError: a tensor does not fit, the sequence is longer than the learned positions, or an id is out of
                range (checked on a CPU only, where it needs no synchronisation).
        """
        encoded = self.encode_tokens(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds,
            output_hidden_states=output_hidden_states, output_attentions=output_attentions,
        )  # fmt: skip
        padded = encoded.tokens.pad(encoded.x)
        pooled = None if self.pooler is None else torch.tanh(self.pooler(encoded.first()))  # (B, E)
        return EncoderOutput(padded, pooled, encoded.hidden_states, encoded.attentions)

    def encode_tokens(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        *,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> Encoded:
        """The hidden states of real tokens, which heads take and `forward` pads to (B, S, E)."""
        check_flags(output_hidden_states=output_hidden_states, output_attentions=output_attentions)
        batch, seqlen = self._check_inputs(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds
        )
        tokens = Tokens.of(attention_mask, batch, seqlen, gaps=SLIDING not in self.config.kinds_of_layers)
        if position_ids is None:
            position_ids = self._positions(
                input_ids, batch, seqlen, device=_device_of(input_ids, inputs_embeds)
            )
        positions = tokens.pack(position_ids.expand(batch, seqlen))  # (T,)
        ids, types, given = (
            None if tensor is None else tokens.pack(tensor)
            for tensor in (input_ids, token_type_ids, inputs_embeds)
        )
        self._check_ids(ids, types, positions)
        x = self.embeddings(ids, positions, types, given)  # (T, E)
        tables = self._rotary_tables(positions, x.dtype)
        states, weights = [], []
        kinds = self.config.kinds_of_layers
        last = None
        if not (output_hidden_states or output_attentions) and self._may_read_some(tokens, x):
            last = partial(self._last_layer, tokens, tables.get(kinds[-1]))
        for layer, kind in zip(self.layers if last is None else self.layers[:-1], kinds):
            if output_hidden_states:  # otherwise the next layer can reuse the memory
                states.append(x)
            x, shown = layer(x, tokens, rotary=tables.get(kind), weights=output_attentions)
            weights.append(shown)
        if last is None:
            x = normalised(self.final_norm, x)  # (T, E)
        return Encoded(
            tokens,
            x,
            last,
            tuple(tokens.pad(state) for state in (*states, x)) if output_hidden_states else None,
            tuple(weights) if output_attentions else None,
        )

    def _last_layer(
        self, tokens: Tokens, rotary: RotaryTable | None, x: Tensor, rows: Tensor | None
    ) -> Tensor:
        """The last layer and the final norm of x (T, E), for the tokens at rows (N,) or for all."""
        x, _ = self.layers[-1](x, tokens, rotary=rotary, rows=rows)
        return normalised(self.final_norm, x)

    def _may_read_some(self, tokens: Tokens, x: Tensor) -> bool:
        """Whether the last layer may run for some tokens: nothing else sees its calls, and it has no window, which
        counts columns."""
        if not runs_eagerly(x) or not self.layers or (tokens.real is not None and tokens.places is None):
            return False
        layer = self.layers[-1]
        return (
            type(layer) is EncoderBlock
            and type(layer.attn) is SelfAttention
            and layer.attn.window is None
            and not any(map(torch_compat.has_hooks, (*layer.modules(), self.final_norm)))
        )

    @classmethod
    def fitted(cls, config: BertConfig, family: Family, names: frozenset[str]) -> tuple[BertConfig, Family]:
        """The config without a pooler if the folder has none, as that of a masked LM."""
        if config.pooler and "pooler.dense.weight" not in names:
            config = replace(config, pooler=False)
        return super().fitted(config, family, names)

    @torch.no_grad()
    def apply_init(self) -> None:
        """Weights from normal(0, initializer_range), the pad token's 0, biases 0; under pre_norm, what adds to the
        stream scaled by 1 / sqrt(2 * num_hidden_layers)."""
        initialise(self, self.config)
        if self.config.pre_norm:
            for layer in self.layers:
                assert isinstance(layer, EncoderBlock)
                for linear in (layer.attn.out_proj, layer.mlp.c_proj):
                    linear.weight.mul_(1 / math.sqrt(2 * self.config.num_hidden_layers))

    def _positions(self, input_ids: Tensor | None, batch: int, seqlen: int, device: torch.device) -> Tensor:
        """Positions (S,), or (B, S) where they count tokens that are not pad_token_id."""
        columns = torch.arange(seqlen, device=device)
        offset, pad = self.config.position_offset, self.config.pad_token_id
        if not offset:
            return columns
        if input_ids is None or pad is None:
            return columns + offset
        return positions_of_tokens(input_ids, pad, offset)

    def _rotary_tables(self, positions: Tensor, dtype: torch.dtype) -> dict[str, RotaryTable]:
        """For each kind of layer, cos and sin (T, D/2) in float32 at least; none without rotary positions."""
        if self.config.positions != "rotary":
            return {}
        dtype = torch.promote_types(dtype, torch.float32)
        return {kind: self.rotary[kind].table(positions, dtype) for kind in set(self.config.kinds_of_layers)}

    def _check_ids(self, ids: Tensor | None, types: Tensor | None, positions: Tensor) -> None:
        """The ids of real tokens within their tables; padding may hold anything where it is not looked up."""
        config = self.config
        if ids is not None:
            check_range("input_ids", ids, config.vocab_size, "vocab_size")
        if types is not None:
            check_range("token_type_ids", types, config.type_vocab_size, "type_vocab_size")
        if config.positions == "learned":
            check_range("position_ids", positions, config.max_position_embeddings, "max_position_embeddings")

    def _check_inputs(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        token_type_ids: Tensor | None,
        position_ids: Tensor | None,
        inputs_embeds: Tensor | None,
    ) -> tuple[int, int]:
        """(batch, length), once everything fits."""
        config = self.config
        given = {
            "input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids,
            "position_ids": position_ids, "inputs_embeds": inputs_embeds,
        }  # fmt: skip
        for name, tensor in given.items():
            if tensor is not None:
                check_tensor(name, tensor)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids: needs either input_ids or inputs_embeds, got both or none")
        if input_ids is not None:
            check_ids("input_ids", input_ids)
            batch, seqlen = input_ids.shape
        else:
            assert inputs_embeds is not None
            if inputs_embeds.dim() != 3 or inputs_embeds.shape[2] != config.embedding_dim:
                raise ValueError(
                    f"inputs_embeds: got shape {tuple(inputs_embeds.shape)}, "
                    f"needs (batch, length, {config.embedding_dim})"
                )
            batch, seqlen = inputs_embeds.shape[:2]
        if attention_mask is not None and attention_mask.shape != (batch, seqlen):
            raise ValueError(
                f"attention_mask: got shape {tuple(attention_mask.shape)}, needs {(batch, seqlen)}"
            )
        for name, shapes in (
            ("token_type_ids", [(batch, seqlen)]), ("position_ids", [(batch, seqlen), (seqlen,)]),
        ):  # fmt: skip
            tensor = given[name]
            if tensor is not None and (
                tuple(tensor.shape) not in shapes or tensor.dtype not in INTEGER_DTYPES
            ):
                got = f"{tensor.dtype} of shape {tuple(tensor.shape)}"
                raise ValueError(f"{name}: got {got}, needs integers of shape {(batch, seqlen)}")
        if token_type_ids is not None and not config.type_vocab_size:
            raise ValueError(f"token_type_ids: a {config.model_type} model has no token types, needs None")
        limit = config.max_position_embeddings
        if config.positions == "learned" and position_ids is None and seqlen + config.position_offset > limit:
            raise ValueError(
                f"input_ids: {seqlen} tokens is more than the learned positions allow, "
                f"{limit - config.position_offset} (max_position_embeddings={limit})"
            )
        return batch, seqlen


class Embeddings(nn.Module):
    """norm(token + position + type), then a projection where the embeddings are narrower than the model."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        width = config.embedding_dim
        pad = config.pad_token_id
        self.word_embeddings = nn.Embedding(config.vocab_size, width, padding_idx=pad)
        self.position_embeddings = None
        if config.positions == "learned":
            unused = config.position_offset - 1 if config.position_offset else None
            self.position_embeddings = nn.Embedding(config.max_position_embeddings, width, padding_idx=unused)
        self.token_type_embeddings = (
            nn.Embedding(config.type_vocab_size, width) if config.type_vocab_size else None
        )
        self.norm = _norm(config, width)
        self.dropout = Dropout(_either(config.embedding_dropout, config.hidden_dropout_prob))
        self.projection = Linear(width, config.hidden_size) if width != config.hidden_size else None

    def forward(
        self, ids: Tensor | None, positions: Tensor, types: Tensor | None, given: Tensor | None
    ) -> Tensor:
        """ids, positions and types (T,), or `given` (T, embedding_dim) in place of ids -> (T, E)."""
        x = self.word_embeddings(ids) if given is None else given
        if self.token_type_embeddings is not None:
            first = self.token_type_embeddings.weight[0]
            x = x + (first if types is None else self.token_type_embeddings(types))
        if self.position_embeddings is not None:
            x = x + self.position_embeddings(positions)
        x = self.dropout(normalised(self.norm, x))
        return x if self.projection is None else self.projection(x)


@torch.no_grad()
def initialise(model: nn.Module, config: BertConfig) -> None:
    """Linear layers and embeddings from normal(0, initializer_range), biases and pad rows 0, norms 1."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            module.weight.normal_(0.0, config.initializer_range)
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                module.weight[module.padding_idx].zero_()
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.zero_()


def _block(config: BertConfig, index: int) -> EncoderBlock:
    sliding = config.kinds_of_layers[index] == SLIDING
    side = config.local_attention // 2
    attn = SelfAttention(
        config.hidden_size,
        config.num_attention_heads,
        bias=config.attention_bias,
        dropout=config.attention_probs_dropout_prob,
        window=(side, side) if sliding else None,
    )
    mlp = EncoderMlp(
        config.hidden_size,
        config.intermediate_size,
        activation=config.hidden_act,
        bias=config.mlp_bias,
        gated=config.gated_mlp,
        dropout=_either(config.mlp_dropout, 0.0),
    )
    embedded = config.pre_norm and index == 0  # the embeddings have just been normalised
    return EncoderBlock(
        attn,
        mlp,
        nn.Identity() if embedded else _norm(config, config.hidden_size),
        _norm(config, config.hidden_size),
        pre_norm=config.pre_norm,
        attn_dropout=_either(config.attention_output_dropout, config.hidden_dropout_prob),
        mlp_dropout=config.hidden_dropout_prob if config.mlp_dropout is None else 0.0,
    )


def _norm(config: BertConfig, width: int) -> nn.LayerNorm:
    return nn.LayerNorm(width, eps=config.layer_norm_eps, bias=config.norm_bias)


def _either(value: float | None, default: float) -> float:
    return default if value is None else value


def _device_of(*tensors: Tensor | None) -> torch.device:
    return next(tensor.device for tensor in tensors if tensor is not None)
