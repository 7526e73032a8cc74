"""The config.json of Llama, Mistral, Qwen and Gemma, read as a GPTConfig and written from one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastattn.models.checkpoint.keys import check_keys
from fastattn.models.config import FULL, SLIDING, GPTConfig
from fastattn.ops.arguments import is_integer

# config.json -> GPTConfig, in every family here.
_SHARED_KEYS = {
    "vocab_size": "vocab_size",
    "max_position_embeddings": "n_positions",
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "num_key_value_heads": "num_kv_heads",
    "intermediate_size": "n_inner",
    "head_dim": "head_dim",
    "attention_dropout": "attn_pdrop",
    "rms_norm_eps": "layer_norm_epsilon",
    "initializer_range": "initializer_range",
    "tie_word_embeddings": "tie_word_embeddings",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "pad_token_id": "pad_token_id",
}
_ROPE_KEYS = ("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor")
_IGNORED = (
    "pretraining_tp",  # how a product was once cut, which changes no value
    "max_sequence_length",  # max_position_embeddings once more, in old files
    "is_llama_config",
    "transformers.js_config",
    "cache_implementation",
    "finetuned",
)
_MOST_LAYERS = 1 << 16
_FIXED = {"rope_interleaved": False, "use_mrope": False}
_OF_SCALING: dict[str, tuple[str, ...]] = {  # rope_type -> keys of its dict
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
}
# Keys that may be in any rope dict: those of other types say nothing there, nor does "finetuned".
_OF_ANY_SCALING = ("finetuned", *(key for keys in _OF_SCALING.values() for key in keys))


@dataclass(frozen=True)
class Dialect:
    """How a family's config.json differs from the others.

    Args:
        keys: config.json -> GPTConfig, besides the shared ones.
        fields: of a GPTConfig that every model of the family has.
        defaults: what transformers' config class has where a file does not say; also every key with such a value.
        fixed: keys that would change the result and are computed at this value only.
        ignored: keys without influence on the result.
        theta: base of the rotary angles where a file does not say.
        local_theta: that of sliding layers, where they have their own.
        windows: "none", "all" layers, "switched" on from a layer on by use_sliding_window, or by "layer_types".
        full_every: one layer in so many is full, where a file does not list layer_types.
    """

    keys: Mapping[str, str]
    fields: Mapping[str, Any]
    defaults: Mapping[str, Any]
    theta: float = 10000.0
    local_theta: float | None = None
    windows: str = "none"
    full_every: int = 0
    fixed: Mapping[str, Any] = field(default_factory=dict)
    ignored: Sequence[str] = ()

    @property
    def all_keys(self) -> dict[str, str]:
        """config.json -> GPTConfig."""
        return {**_SHARED_KEYS, **self.keys}

    def read(self, entries: dict[str, Any]) -> GPTConfig:
        """A GPTConfig of config.json; ValueError begins with the key that cannot be honoured."""
        keys = self.all_keys
        window_keys = {
            "none": (),
            "all": ("sliding_window",),
            "switched": ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types"),
            "layer_types": ("sliding_window", "sliding_window_pattern", "layer_types"),
        }[self.windows]
        local = ("rope_local_base_freq",) if self.local_theta is not None else ()
        honoured = {*keys, *_ROPE_KEYS, *window_keys, *local} - self.fixed.keys()
        check_keys(
            entries, honoured=honoured, ignored=(*_IGNORED, *self.ignored), defaults={**_FIXED, **self.fixed}
        )
        said = {**self.defaults, **entries}
        values = {ours: said[theirs] for theirs, ours in keys.items() if theirs in said}
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if values.get(name) == -1:  # how old files say that there is none
                values[name] = None
        values |= self.fields
        values |= self._windows(said) | self._rope(said)
        if values.get("layer_types") is None:  # no layer has positions of its own
            values["rope_local_base_freq"] = None
        values["model_type"] = entries.get("model_type")
        try:
            return GPTConfig(**values)
        except ValueError as error:
            raise ValueError(self._in_their_words(str(error))) from None

    def _in_their_words(self, message: str) -> str:
        """A message that begins with a field of GPTConfig, with config.json's name in its place."""
        names = {ours: theirs for theirs, ours in self.all_keys.items()}
        names |= {"window": "sliding_window"}
        name, colon, rest = message.partition(":")
        return f"{names[name]} ({name}){colon}{rest}" if names.get(name, name) != name else message

    def _windows(self, said: Mapping[str, Any]) -> dict[str, Any]:
        """window and layer_types; the latter None where all layers are alike."""
        window, kinds = said.get("sliding_window"), said.get("layer_types")
        if self.windows == "none":
            return {}
        if self.windows == "all":
            return {"window": window}
        if self.windows == "switched" and not said.get("use_sliding_window"):
            window = None
        if kinds is None:
            layers = range(_count("num_hidden_layers", said))
            if self.windows == "layer_types":
                every = _count("sliding_window_pattern", {"sliding_window_pattern": self.full_every, **said})
                kinds = [SLIDING if (i + 1) % every else FULL for i in layers]
            elif window is not None:
                first = _count("max_window_layers", said, least=0)
                kinds = [SLIDING if i >= first else FULL for i in layers]
        if kinds is not None and not (isinstance(kinds, list) and kinds):
            return {"window": window, "layer_types": kinds}  # which GPTConfig refuses
        if kinds is None or kinds == [FULL] * len(kinds):
            return {"window": None, "layer_types": None}
        if window is not None and self.local_theta is None and kinds == [SLIDING] * len(kinds):
            return {"window": window, "layer_types": None}
        return {"window": window, "layer_types": kinds}

    def _rope(self, said: Mapping[str, Any]) -> dict[str, Any]:
        """rope_theta, rope_scaling and rope_local_base_freq, from either form of config.json."""
        given = {} if said.get("rope_parameters") is None else said["rope_parameters"]
        for name in ("rope_parameters", "rope_scaling"):
            if not isinstance(said.get(name) or {}, Mapping):
                raise ValueError(f"{name}: got {said[name]!r}, needs a dict")
        if self.local_theta is None:
            name = "rope_scaling" if said.get("rope_scaling") else "rope_parameters"
            theta, scaling = _one_rope(name, said.get("rope_scaling") or given, said, self.theta)
            return {"rope_theta": theta, "rope_scaling": scaling}
        _check_dict("rope_parameters", given, (FULL, SLIDING))
        for kind, numbers in given.items():
            if numbers is not None and not isinstance(numbers, Mapping):
                raise ValueError(f"rope_parameters[{kind!r}]: got {numbers!r}, needs a dict")
        everywhere = {**(given.get(FULL) or {}), **(said.get("rope_scaling") or {})}
        theta, scaling = _one_rope(f"rope_parameters[{FULL!r}]", everywhere, said, self.theta)
        base = said.get("rope_local_base_freq", self.local_theta)
        name = f"rope_parameters[{SLIDING!r}]"
        local, scaled = _one_rope(name, given.get(SLIDING) or {}, {"rope_theta": base}, self.local_theta)
        if scaled is not None:
            raise ValueError(f"{name}['rope_type']: got {scaled['rope_type']!r}, only 'default' is supported")
        return {"rope_theta": theta, "rope_scaling": scaling, "rope_local_base_freq": local}

    def write(self, config: GPTConfig, model_type: str) -> dict[str, Any]:
        """config.json's entries; ValueError where they cannot say all of the config."""
        ours = config.to_dict()
        attention_bias, _, mlp_bias = config.biases
        ours |= {
            "n_inner": config.mlp_dim,
            "num_kv_heads": config.kv_heads,
            "attention_bias": attention_bias,
            "mlp_bias": mlp_bias,
            "query_pre_attn_scalar": _whole(config.query_pre_attn_scalar or int(config.head_dim)),
        }
        entries = {theirs: ours[name] for theirs, name in self.all_keys.items()}
        if ours["head_dim"] is None and self.defaults["head_dim"] is None:
            del entries["head_dim"]
        else:
            entries["head_dim"] = int(config.head_dim)
        entries |= {"rope_theta": config.rope_theta, "rope_scaling": ours["rope_scaling"]}
        if self.local_theta is not None:
            entries["rope_local_base_freq"] = config.rope_local_base_freq or config.rope_theta
        if self.windows != "none":
            entries["sliding_window"] = config.window
        if self.windows == "switched":
            entries |= {"use_sliding_window": config.window is not None, "max_window_layers": config.n_layer}
        if self.windows in ("switched", "layer_types"):
            entries["layer_types"] = list(config.kinds)
        again = self.read({"model_type": model_type, **entries})
        # where two configs differ although every model of them is the same, what is meant counts
        for name, value in meaning(config).items():
            if value != meaning(again)[name]:
                raise ValueError(f"{name}: got {value!r}, which a {model_type} does not have")
        return entries


def _count(name: str, said: Mapping[str, Any], least: int = 1) -> int:
    """A number of layers."""
    number: Any = said.get(name)
    if not is_integer(number) or not least <= number <= _MOST_LAYERS:
        raise ValueError(f"{name}: got {number!r}, needs an integer from {least} to {_MOST_LAYERS}")
    return int(number)


def _whole(number: float) -> float:
    """The number as an int if it is a whole one."""
    return int(number) if number == int(number) else number


def meaning(config: GPTConfig) -> dict[str, Any]:
    """A config's fields, with defaults filled in for None."""
    fields = config.to_dict()
    del fields["model_type"], fields["train_pad_embedding"]  # which change no output
    attention, out, mlp = config.biases
    scaling = config.rope_scaling
    if scaling is not None and scaling["rope_type"] in ("yarn", "llama3"):
        fields["rope_scaling"] = {"original_max_position_embeddings": config.n_positions, **scaling}
    return {
        **fields,
        "n_inner": config.mlp_dim,
        "num_kv_heads": config.kv_heads,
        "head_dim": int(config.head_dim),
        "query_pre_attn_scalar": config.query_pre_attn_scalar or float(config.head_dim),
        "rope_local_base_freq": config.rope_local_base_freq or config.rope_theta,
        "bias": None,  # only of norms, which RMSNorm has none of
        "attention_bias": attention,
        "attention_out_bias": out,
        "mlp_bias": mlp,
        "window": config.window if SLIDING in config.kinds else None,
        "layer_types": list(config.kinds),
        "eos_token_id": list(ids) if isinstance(ids := config.eos_token_id, tuple) else ids,
    }


def _one_rope(
    name: str, given: Any, said: Mapping[str, Any], theta: float
) -> tuple[Any, dict[str, Any] | None]:
    """The base and our rope_scaling of one dict of rotary parameters."""
    _check_dict(name, given, ("rope_type", "type", "rope_theta", "partial_rotary_factor", *_OF_ANY_SCALING))
    for where in (given, said):
        share = where.get("partial_rotary_factor")
        if share is not None and share != 1:
            raise ValueError(f"partial_rotary_factor: got {share!r}, only 1.0 is supported")
    kind = given.get("rope_type", given.get("type", "default"))
    if not isinstance(kind, str) or kind not in _OF_SCALING:
        raise ValueError(f"{name}['rope_type']: got {kind!r}, needs one of {', '.join(_OF_SCALING)}")
    base = given.get("rope_theta", said.get("rope_theta"))
    base = theta if base is None else base
    if kind == "default":
        return base, None
    scaling = {key: given[key] for key in _OF_SCALING[kind] if given.get(key) is not None}
    original = scaling.get("original_max_position_embeddings")
    longest = said.get("max_position_embeddings")
    if kind == "yarn" and "factor" not in scaling and is_integer(original) and is_integer(longest):
        scaling["factor"] = longest / original if original else 0.0
    return base, {"rope_type": kind, **scaling}


def _check_dict(name: str, given: Any, keys: Sequence[str]) -> None:
    """Refuse a value that is not a dict with these keys."""
    if not isinstance(given, Mapping):
        raise ValueError(f"{name}: got {given!r}, needs a dict")
    for key in given:
        if key not in keys:
            raise ValueError(f"{name}: got {key!r}, which is not supported")
