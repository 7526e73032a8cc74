"""Model configurations: sizes and options, validated, with presets as rows and JSON in transformers' names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import InitVar, asdict, dataclass, field
from typing import Any

from fastattn.models.fields import (
    Check,
    flag,
    one_of,
    or_none,
    positive,
    probability,
    size,
    size_or_0,
    text,
    token_id,
    token_ids,
)
from fastattn.models.presets import DECODERS
from fastattn.nn.blocks import ACTIVATIONS
from fastattn.nn.positions import Rotary
from fastattn.nn.rotary_scaling import RotaryScaling
from fastattn.ops.arguments import is_integer
from fastattn.spec import MAX_HEAD_DIM

POSITIONS = ("learned", "rotary", "alibi", "sinusoidal")
NORMS = ("layernorm", "rmsnorm")
FULL, SLIDING = LAYER_TYPES = ("full_attention", "sliding_attention")


class Derived(int):
    """A size computed from other fields; copies with other fields compute it again."""


@dataclass
class GPTConfig:
    """A decoder's sizes and options; names and meanings are those of transformers' configs where they have them.

    The defaults are GPT-2's. Llama, Mistral, Qwen and Gemma are rows of `fastattn.models.presets.DECODERS`.

    Args:
        vocab_size: tokens.
        n_positions: longest sequence; a limit under learned positions, only a default length otherwise.
        n_embd, n_layer, n_head: model width, blocks, query heads.
        n_inner: width of the MLP, 4 * n_embd by default.
        num_kv_heads: key/value heads, n_head by default; fewer is grouped-query attention.
        head_dim: size of a head, n_embd / n_head by default.
        positions: "learned" (GPT-2), "rotary", "alibi" or "sinusoidal" ("Attention Is All You Need").
        position_offset: row of the learned positions for a sequence's first token. Above 0, positions count tokens
            other than pad_token_id, which has the row before (RoBERTa: pad_token_id + 1).
        rope_theta: base of the rotary angles.
        rope_scaling: how rotary angles are stretched, a dict with "rope_type" ("default", "linear", "dynamic", "yarn"
            or "llama3") and that type's numbers, "factor" first, as in transformers' config.json.
        rope_local_base_freq: base of the rotary angles of sliding layers, unscaled; rope_theta's by default.
        window: how many keys each query sees, itself included; None for all.
        layer_types: for each layer "full_attention" or "sliding_attention", which alone has the window; every layer has
            it by default.
        qk_norm: an RMSNorm over each head's queries and keys; with norm="rmsnorm" its epsilon and offset are those of
            the other norms, else the epsilon is the dtype's eps, as in torch.nn.RMSNorm.
        query_pre_attn_scalar: scores are multiplied by its -1/2 power; head_dim by default.
        attn_logit_softcapping: scores become cap * tanh(scores / cap).
        final_logit_softcapping: the same of the logits.
        scale_embedding: token embeddings are multiplied by sqrt(n_embd).
        norm: "layernorm" or "rmsnorm".
        norm_unit_offset: RMSNorms multiply by 1 + weight, as in Gemma.
        sandwich_norms: norms after attention and MLP as well as before, as in Gemma 2.
        post_norm: norms after each sum and after the embeddings, none at the end, as in BERT.
        type_vocab_size: token types, all tokens being of the first; 0 for none.
        lm_transform: a dense layer, activation and norm before the head, which then has a bias, as in BERT.
        lm_activation: the activation of that; activation_function by default.
        add_cross_attention: blocks also read an encoder's output, where one is given, after self-attention.
        bias: whether linear layers and LayerNorms have a bias.
        attention_bias: whether the projections of queries, keys and values have one; as bias by default.
        attention_out_bias: the same of attention's output projection; as attention_bias by default.
        mlp_bias: the same of the MLP; as bias by default.
        gated_mlp: the MLP is activation(gate) * rest, as in SwiGLU and GeGLU.
        activation_function: one of `fastattn.nn.blocks.ACTIVATIONS`.
        embd_pdrop, resid_pdrop, attn_pdrop: dropout of embeddings, of what blocks add, of attention weights.
        dropout: sets all three; not stored.
        tie_word_embeddings: one matrix for the token embedding and the output.
        layer_norm_epsilon, initializer_range: as named, for either norm.
        bos_token_id, eos_token_id, pad_token_id: ids `generate` uses by default, None for none.
        train_pad_embedding: whether the embedding of pad_token_id gets a gradient from inputs; it does not in
            transformers' Llama, Mistral, Qwen and Gemma.
        model_type: the family in whose format it is saved if that can hold the config; None for the first that can.

    Raises:
        ValueError: a field has the wrong type or is out of range, or fields do not fit each other.
    """

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    num_kv_heads: int | None = None
    positions: str = "learned"
    rope_theta: float = 10000.0
    window: int | None = None
    qk_norm: bool = False
    bias: bool = True
    activation_function: str = "gelu_new"
    embd_pdrop: float = 0.0
    resid_pdrop: float = 0.0
    attn_pdrop: float = 0.0
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | Sequence[int] | None = None
    pad_token_id: int | None = None
    head_dim: int = None  # type: ignore[assignment]  # an int once the config is made
    rope_scaling: Mapping[str, Any] | None = None
    rope_local_base_freq: float | None = None
    layer_types: Sequence[str] | None = None
    query_pre_attn_scalar: float | None = None
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    scale_embedding: bool = False
    norm: str = "layernorm"
    norm_unit_offset: bool = False
    sandwich_norms: bool = False
    attention_bias: bool | None = None
    attention_out_bias: bool | None = None
    mlp_bias: bool | None = None
    gated_mlp: bool = False
    train_pad_embedding: bool = True
    post_norm: bool = False
    type_vocab_size: int = 0
    lm_transform: bool = False
    lm_activation: str | None = None
    position_offset: int = 0
    add_cross_attention: bool = False
    model_type: str | None = field(default=None, compare=False)
    dropout: InitVar[float | None] = None

    def __post_init__(self, dropout: float | None) -> None:
        if dropout is not None:
            dropout = probability("dropout (it sets embd_pdrop, resid_pdrop and attn_pdrop)", dropout)
            self.embd_pdrop = self.resid_pdrop = self.attn_pdrop = dropout
        if isinstance(self.head_dim, Derived):  # of a copy, whose other sizes may have changed
            self.head_dim = None  # type: ignore[assignment]
        for name, check in _CHECKS.items():
            setattr(self, name, check(name, getattr(self, name)))
        if self.head_dim is None:
            if self.n_embd % self.n_head:
                raise ValueError(f"n_head: got {self.n_head}, which does not divide n_embd={self.n_embd}")
            self.head_dim = Derived(self.n_embd // self.n_head)
        self._check_fit()

    def _check_fit(self) -> None:
        """Refuse fields that do not go together; the message names the one that is out of place."""
        if self.n_head % self.kv_heads:
            raise ValueError(f"num_kv_heads: got {self.kv_heads}, which does not divide n_head={self.n_head}")
        derived = isinstance(self.head_dim, Derived)
        if self.head_dim > MAX_HEAD_DIM:
            got = f"n_head: got {self.n_head}, which makes n_embd / n_head = {self.head_dim}"
            raise ValueError(
                f"{got if derived else f'head_dim: got {self.head_dim}'}, "
                f"needs a head dim of at most {MAX_HEAD_DIM}"
            )
        if self.positions == "rotary" and self.head_dim % 2:
            origin = "n_embd / n_head = " if derived else "head_dim="
            raise ValueError(f"positions: rotary needs an even head dim, got {origin}{self.head_dim}")
        needs = {  # fields that have a meaning only together with another
            "rope_scaling": (self.rope_scaling is not None, self.positions == "rotary", "positions='rotary'"),
            "rope_local_base_freq": (
                self.rope_local_base_freq is not None,
                self.positions == "rotary" and self.layer_types is not None,
                "positions='rotary' and layer_types",
            ),
            "norm_unit_offset": (self.norm_unit_offset, self.norm == "rmsnorm", "norm='rmsnorm'"),
            "post_norm": (self.post_norm, not self.sandwich_norms, "sandwich_norms=False"),
            "lm_transform": (self.lm_transform, self.norm == "layernorm", "norm='layernorm'"),
            "lm_activation": (self.lm_activation is not None, self.lm_transform, "lm_transform=True"),
            "position_offset": (
                self.position_offset > 0,
                self.positions == "learned" and self.position_offset < self.n_positions,
                f"positions='learned' and less than n_positions={self.n_positions}",
            ),
            "add_cross_attention": (
                self.add_cross_attention,
                self.head_dim * self.n_head == self.n_embd,
                "head_dim = n_embd / n_head",
            ),
        }
        for name, (given, fits, condition) in needs.items():
            if given and not fits:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, needs {condition}")
        if self.layer_types is not None:
            if len(self.layer_types) != self.n_layer:
                raise ValueError(
                    f"layer_types: got {len(self.layer_types)} layers, needs n_layer={self.n_layer}"
                )
            if SLIDING in self.layer_types and self.window is None:
                raise ValueError("layer_types: sliding attention needs a window, got window=None")
        self.rotary()  # refuses a scaling that does not fit

    @property
    def kv_heads(self) -> int:
        """Key/value heads."""
        return self.n_head if self.num_kv_heads is None else self.num_kv_heads

    @property
    def mlp_dim(self) -> int:
        """Hidden width of the MLP."""
        return 4 * self.n_embd if self.n_inner is None else self.n_inner

    @property
    def biases(self) -> tuple[bool, bool, bool]:
        """Whether queries, keys and values have a bias, whether attention's output has, whether the MLP has."""
        attention = self.bias if self.attention_bias is None else self.attention_bias
        out = attention if self.attention_out_bias is None else self.attention_out_bias
        return attention, out, self.bias if self.mlp_bias is None else self.mlp_bias

    @property
    def padding_idx(self) -> int | None:
        """The row of the token embedding that lookups give no gradient."""
        pad = self.pad_token_id
        return None if self.train_pad_embedding or pad is None or pad >= self.vocab_size else pad

    @property
    def kinds(self) -> tuple[str, ...]:
        """Each layer's kind, one of `LAYER_TYPES`."""
        if self.layer_types is not None:
            return tuple(self.layer_types)
        return (FULL if self.window is None else SLIDING,) * self.n_layer

    def rotary(self) -> dict[str, Rotary]:
        """The rotary embedding of each kind of layer; empty with other positions."""
        if self.positions != "rotary":
            return {}
        scaling = None if self.rope_scaling is None else _scaling(self.rope_scaling, self)
        head_dim = int(self.head_dim)  # not Derived, which a trace of torch 2.9 cannot hand to an operation
        everywhere = Rotary(head_dim, self.rope_theta, scaling=scaling)
        local = (
            everywhere if self.rope_local_base_freq is None else Rotary(head_dim, self.rope_local_base_freq)
        )
        kinds = self.layer_types or [FULL if self.window is None else SLIDING]
        return {kind: local if kind == SLIDING else everywhere for kind in sorted(set(kinds))}

    @classmethod
    def preset(cls, name: str, **changes: Any) -> GPTConfig:
        """A row of `fastattn.models.presets.DECODERS`, with some fields changed; fewer layers are its first ones.

        Raises:
            ValueError: there is no such row, or a field does not fit. TypeError: the config has no field of that name.
        """
        if not isinstance(name, str) or name not in PRESETS:
            raise ValueError(f"preset: got {name!r}, needs one of {', '.join(PRESETS)}")
        row = PRESETS[name]
        if "layer_types" in row and is_integer(changes.get("n_layer")):
            row = {**row, "layer_types": row["layer_types"][: max(int(changes["n_layer"]), 0)]}
        return cls(**{**row, **changes})

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain types; head_dim is None where n_embd / n_head makes it."""
        fields = asdict(self)
        if isinstance(self.head_dim, Derived):
            fields["head_dim"] = None
        return fields


PRESETS: dict[str, dict[str, Any]] = {name: preset.fields for name, preset in DECODERS.items()}


def _kinds_of_layers(name: str, value: Any) -> list[str]:
    if not isinstance(value, (list, tuple)) or not value:
        raise ValueError(
            f"{name}: got {value!r}, needs a list of {' or '.join(LAYER_TYPES)}, one for each layer"
        )
    return [one_of(LAYER_TYPES)(f"{name}[{index}]", kind) for index, kind in enumerate(value)]


_NUMBERS_OF_SCALING: dict[
    str, dict[str, tuple[Check, bool]]
] = {  # type -> number -> its check, whether it is needed
    "default": {},
    "linear": {"factor": (positive, True)},
    "dynamic": {"factor": (positive, True)},
    "yarn": {
        "factor": (positive, True),
        "original_max_position_embeddings": (size, False),
        **dict.fromkeys(
            ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim"),
            (or_none(positive), False),
        ),
        "truncate": (flag, False),
    },
    "llama3": {
        **dict.fromkeys(("factor", "low_freq_factor", "high_freq_factor"), (positive, True)),
        "original_max_position_embeddings": (size, False),
    },
}


def _rope_scaling(name: str, value: Any) -> dict[str, Any] | None:
    """The dict with plain numbers; None for the default type."""
    if not isinstance(value, Mapping):
        raise ValueError(f"{name}: got {value!r}, needs a dict with a rope_type, or None")
    kind = one_of(tuple(_NUMBERS_OF_SCALING))(f"{name}['rope_type']", value.get("rope_type"))
    numbers = _NUMBERS_OF_SCALING[kind]
    for key in value:
        if key != "rope_type" and key not in numbers:
            raise ValueError(f"{name}: got {key!r}, which {kind} scaling does not have")
    for key, (_, needed) in numbers.items():
        if needed and key not in value:
            raise ValueError(f"{name}: got no {key!r}, which {kind} scaling needs")
    if kind == "default":
        return None
    given = {
        key: check(f"{name}[{key!r}]", value[key]) for key, (check, _) in numbers.items() if key in value
    }
    return {"rope_type": kind, **given}


def _scaling(values: Mapping[str, Any], config: GPTConfig) -> RotaryScaling:
    given = {key: value for key, value in values.items() if value is not None and key != "rope_type"}
    kind = values["rope_type"]
    original = given.pop("original_max_position_embeddings", config.n_positions)
    if kind == "dynamic" and config.head_dim <= 2:
        raise ValueError(f"rope_scaling: dynamic scaling needs a head dim above 2, got {config.head_dim}")
    scaling = RotaryScaling(kind, original_length=original, **given)
    if kind == "llama3" and scaling.high_freq_factor <= scaling.low_freq_factor:
        raise ValueError(
            f"rope_scaling['high_freq_factor']: got {scaling.high_freq_factor}, "
            f"needs more than low_freq_factor={scaling.low_freq_factor}"
        )
    return scaling


_CHECKS: dict[str, Check] = {  # every field has one
    **dict.fromkeys(("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"), size),
    **dict.fromkeys(("n_inner", "num_kv_heads", "window", "head_dim"), or_none(size)),
    **dict.fromkeys(("embd_pdrop", "resid_pdrop", "attn_pdrop"), probability),
    **dict.fromkeys(("rope_theta", "layer_norm_epsilon", "initializer_range"), positive),
    **dict.fromkeys(
        (
            "rope_local_base_freq",
            "query_pre_attn_scalar",
            "attn_logit_softcapping",
            "final_logit_softcapping",
        ),
        or_none(positive),
    ),
    **dict.fromkeys(
        (
            "qk_norm",
            "bias",
            "tie_word_embeddings",
            "scale_embedding",
            "norm_unit_offset",
            "sandwich_norms",
            "gated_mlp",
            "train_pad_embedding",
            "post_norm",
            "lm_transform",
            "add_cross_attention",
        ),
        flag,
    ),
    **dict.fromkeys(("attention_bias", "attention_out_bias", "mlp_bias"), or_none(flag)),
    **dict.fromkeys(("bos_token_id", "pad_token_id"), or_none(token_id)),
    "eos_token_id": or_none(token_ids),
    "positions": one_of(POSITIONS),
    "model_type": or_none(text),
    "norm": one_of(NORMS),
    "activation_function": one_of(tuple(ACTIVATIONS)),
    "layer_types": or_none(_kinds_of_layers),
    "rope_scaling": or_none(_rope_scaling),
    "lm_activation": or_none(one_of(tuple(ACTIVATIONS))),
    **dict.fromkeys(("type_vocab_size", "position_offset"), size_or_0),
}
