"""Model configurations: sizes and options, validated, with presets as rows and JSON in transformers' names."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import InitVar, asdict, dataclass
from typing import Any

from fastattn.nn.blocks import ACTIVATIONS
from fastattn.ops.arguments import is_integer, is_number
from fastattn.spec import MAX_HEAD_DIM

POSITIONS = ("learned", "rotary", "alibi")
MAX_SIZE = 2**31 - 1  # of a dimension: ids and positions are 32-bit integers in the kernels


@dataclass
class GPTConfig:
    """A GPT's sizes and options; names and meanings are transformers' `GPT2Config` where it has them.

    Args:
        vocab_size: tokens.
        n_positions: longest sequence; a limit under learned positions, only a default length otherwise.
        n_embd, n_layer, n_head: model width, blocks, query heads.
        n_inner: width of the MLP, 4 * n_embd by default.
        num_kv_heads: key/value heads, n_head by default; fewer is grouped-query attention.
        positions: "learned" (GPT-2), "rotary" or "alibi".
        rope_theta: base of the rotary angles.
        window: how many keys each query sees, itself included; None for all.
        qk_norm: normalise queries and keys per head.
        bias: whether linear layers and norms have a bias.
        activation_function: one of `fastattn.nn.blocks.ACTIVATIONS`.
        embd_pdrop, resid_pdrop, attn_pdrop: dropout of embeddings, of what blocks add, of attention weights.
        dropout: sets all three; not stored.
        tie_word_embeddings: one matrix for the token embedding and the output.
        layer_norm_epsilon, initializer_range: as named.
        bos_token_id, eos_token_id, pad_token_id: ids `generate` uses by default, None for none.

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
    dropout: InitVar[float | None] = None

    def __post_init__(self, dropout: float | None) -> None:
        if dropout is not None:
            dropout = _probability("dropout (it sets embd_pdrop, resid_pdrop and attn_pdrop)", dropout)
            self.embd_pdrop = self.resid_pdrop = self.attn_pdrop = dropout
        for name, check in _CHECKS.items():
            setattr(self, name, check(name, getattr(self, name)))
        if self.n_embd % self.n_head:
            raise ValueError(f"n_head: got {self.n_head}, which does not divide n_embd={self.n_embd}")
        if self.n_head % self.kv_heads:
            raise ValueError(f"num_kv_heads: got {self.kv_heads}, which does not divide n_head={self.n_head}")
        if self.head_dim > MAX_HEAD_DIM:
            raise ValueError(
                f"n_head: got {self.n_head}, which makes n_embd / n_head = {self.head_dim}, "
                f"needs a head dim of at most {MAX_HEAD_DIM}"
            )
        if self.positions == "rotary" and self.head_dim % 2:
            raise ValueError(
                f"positions: rotary needs an even head dim, got n_embd / n_head = {self.head_dim}"
            )

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.n_embd // self.n_head

    @property
    def kv_heads(self) -> int:
        """Key/value heads."""
        return self.n_head if self.num_kv_heads is None else self.num_kv_heads

    @property
    def mlp_dim(self) -> int:
        """Hidden width of the MLP."""
        return 4 * self.n_embd if self.n_inner is None else self.n_inner

    @classmethod
    def preset(cls, name: str, **changes: Any) -> GPTConfig:
        """A row of `PRESETS`, with some fields changed."""
        if not isinstance(name, str) or name not in PRESETS:
            raise ValueError(f"preset: got {name!r}, needs one of {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **changes})

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain types."""
        return asdict(self)


_GPT2 = {"bos_token_id": 50256, "eos_token_id": 50256}
PRESETS: dict[str, dict[str, Any]] = {
    "nano": {"vocab_size": 4096, "n_positions": 256, "n_embd": 128, "n_layer": 4, "n_head": 4},
    "micro": {"vocab_size": 8192, "n_positions": 512, "n_embd": 256, "n_layer": 6, "n_head": 4},
    "gpt2": {**_GPT2, "n_embd": 768, "n_layer": 12, "n_head": 12},
    "gpt2-medium": {**_GPT2, "n_embd": 1024, "n_layer": 24, "n_head": 16},
    "gpt2-large": {**_GPT2, "n_embd": 1280, "n_layer": 36, "n_head": 20},
    "gpt2-xl": {**_GPT2, "n_embd": 1600, "n_layer": 48, "n_head": 25},
}


Check = Callable[[str, Any], Any]  # given a field's name and value; returns the value as a plain type


def _size(name: str, number: Any) -> int:
    if not is_integer(number) or not 1 <= number <= MAX_SIZE:
        raise ValueError(f"{name}: got {number!r}, needs a positive integer, at most {MAX_SIZE}")
    return int(number)


def _probability(name: str, number: Any) -> float:
    if isinstance(number, bool) or not is_number(number) or not 0.0 <= number < 1.0:
        raise ValueError(f"{name}: got {number!r}, needs a number with 0 <= p < 1")
    return float(number)


def _positive(name: str, number: Any) -> float:
    if isinstance(number, bool) or not is_number(number) or not 0.0 < number < math.inf:
        raise ValueError(f"{name}: got {number!r}, needs a positive finite number")
    return float(number)


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{name}: got {value!r}, needs True or False")
    return value


def _id(name: str, number: Any) -> int:
    if not is_integer(number) or not 0 <= number <= MAX_SIZE:
        raise ValueError(f"{name}: got {number!r}, needs a token id, an integer of 0 or more")
    return int(number)


def _ids(name: str, value: Any) -> int | Sequence[int]:
    if isinstance(value, (list, tuple)):
        return type(value)(_id(f"{name}[{index}]", number) for index, number in enumerate(value))
    return _id(name, value)


def _one_of(choices: Sequence[str]) -> Check:
    def check(name: str, value: Any) -> str:
        if not isinstance(value, str) or value not in choices:
            raise ValueError(f"{name}: got {value!r}, needs one of {', '.join(choices)}")
        return value

    return check


def _or_none(check: Check) -> Check:
    return lambda name, value: None if value is None else check(name, value)


_CHECKS: dict[str, Check] = {  # every field has one
    **dict.fromkeys(("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"), _size),
    **dict.fromkeys(("n_inner", "num_kv_heads", "window"), _or_none(_size)),
    **dict.fromkeys(("embd_pdrop", "resid_pdrop", "attn_pdrop"), _probability),
    **dict.fromkeys(("rope_theta", "layer_norm_epsilon", "initializer_range"), _positive),
    **dict.fromkeys(("qk_norm", "bias", "tie_word_embeddings"), _flag),
    **dict.fromkeys(("bos_token_id", "pad_token_id"), _or_none(_id)),
    "eos_token_id": _or_none(_ids),
    "positions": _one_of(POSITIONS),
    "activation_function": _one_of(tuple(ACTIVATIONS)),
}
