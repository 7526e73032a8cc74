"""Llama, Mistral, Qwen and Gemma: their config.json and tensor names beside ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastattn.models.checkpoint.keys import check_keys
from fastattn.models.checkpoint.names import Family, Part
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
_SHARED_FIELDS: dict[str, Any] = {
    "positions": "rotary",
    "norm": "rmsnorm",
    "gated_mlp": True,
    "bias": False,
    "train_pad_embedding": False,
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
class _Dialect:
    """What a family's config.json says in its own way.

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
        """A message that begins with our name of a field, with config.json's name for it."""
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
    """The same as an integer where it is one."""
    return int(number) if number == int(number) else number


def meaning(config: GPTConfig) -> dict[str, Any]:
    """A config's fields with those that others stand for when they are None."""
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
    """Refuse what is no dict of these keys."""
    if not isinstance(given, Mapping):
        raise ValueError(f"{name}: got {given!r}, needs a dict")
    for key in given:
        if key not in keys:
            raise ValueError(f"{name}: got {key!r}, which is not supported")


def _heads(config: GPTConfig) -> tuple[int, int, int]:
    """Rows of the projections of queries, keys and values."""
    keys = config.kv_heads * config.head_dim
    return config.n_head * config.head_dim, keys, keys


def _block(ours: str, *theirs: str) -> Part:
    sizes = _heads if len(theirs) == 3 else None
    return Part(f"h.{{i}}.{ours}", tuple(f"model.layers.{{i}}.{name}" for name in theirs), sizes=sizes)


def _parts(norms: Mapping[str, str]) -> tuple[Part, ...]:
    packed = {
        "attn.in_proj_": ("self_attn.q_proj.", "self_attn.k_proj.", "self_attn.v_proj."),
        "attn.out_proj.": ("self_attn.o_proj.",),
        "mlp.c_fc.": ("mlp.gate_proj.", "mlp.up_proj."),
        "mlp.c_proj.": ("mlp.down_proj.",),
    }
    return (
        Part("wte.weight", ("model.embed_tokens.weight",)),
        *(_block(f"{ours}.weight", f"{theirs}.weight") for ours, theirs in norms.items()),
        *(
            _block(ours + kind, *(name + kind for name in theirs))
            for ours, theirs in packed.items()
            for kind in ("weight", "bias")
        ),
        _block("attn.q_norm.weight", "self_attn.q_norm.weight"),
        _block("attn.k_norm.weight", "self_attn.k_norm.weight"),
        Part("ln_f.weight", ("model.norm.weight",)),
        Part("lm_head.weight", ("lm_head.weight",)),
    )


_PRE_NORMS = {"ln_1": "input_layernorm", "ln_2": "post_attention_layernorm"}
_SANDWICH = {
    "ln_1": "input_layernorm",
    "ln_1_out": "post_attention_layernorm",
    "ln_2": "pre_feedforward_layernorm",
    "ln_2_out": "post_feedforward_layernorm",
}


def _family(model_type: str, name: str, dialect: _Dialect) -> Family:
    return Family(
        model_type=model_type,
        architectures=(f"{name}ForCausalLM", f"{name}Model"),
        parts=_parts(_SANDWICH if dialect.fields.get("sandwich_norms") else _PRE_NORMS),
        prefix="model.",
        dropped=("layers.*.self_attn.rotary_emb.inv_freq",),  # a buffer that old files carry
        read_config=dialect.read,
        write_config=lambda config: dialect.write(config, model_type),
    )


_LLAMA_DEFAULTS: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_QWEN_DEFAULTS = {
    **_LLAMA_DEFAULTS,
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "bos_token_id": None,
    "eos_token_id": None,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_GEMMA_DEFAULTS = {
    **{key: value for key, value in _LLAMA_DEFAULTS.items() if key != "hidden_act"},
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "attention_bias": False,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
_ACT = {"hidden_act": "activation_function"}
_BIAS = {"attention_bias": "attention_bias"}
_GEMMA_KEYS = {
    "hidden_activation": "activation_function",
    **_BIAS,
    "query_pre_attn_scalar": "query_pre_attn_scalar",
    "final_logit_softcapping": "final_logit_softcapping",
}
_GEMMA_FIELDS = {
    **_SHARED_FIELDS,
    "norm_unit_offset": True,
    "sandwich_norms": True,
    "scale_embedding": True,
}
_LLAMA = _Dialect(
    keys={**_ACT, **_BIAS, "mlp_bias": "mlp_bias"},
    fields=_SHARED_FIELDS,
    defaults={**_LLAMA_DEFAULTS, "attention_bias": False, "mlp_bias": False},
)
_MISTRAL = _Dialect(
    keys=_ACT,
    fields=_SHARED_FIELDS,
    defaults={
        **_LLAMA_DEFAULTS,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 4096 * 32,
        "sliding_window": 4096,
    },
    windows="all",
)
_QWEN2 = _Dialect(
    keys=_ACT,
    fields={**_SHARED_FIELDS, "attention_bias": True, "attention_out_bias": False},
    defaults=_QWEN_DEFAULTS,
    windows="switched",
)
_QWEN3 = _Dialect(
    keys={**_ACT, **_BIAS},
    fields={**_SHARED_FIELDS, "qk_norm": True},
    defaults={**_QWEN_DEFAULTS, "head_dim": 128, "attention_bias": False},
    windows="switched",
)
_GEMMA2 = _Dialect(
    keys={**_GEMMA_KEYS, "attn_logit_softcapping": "attn_logit_softcapping"},
    fields=_GEMMA_FIELDS,
    defaults={
        **_GEMMA_DEFAULTS,
        "vocab_size": 256000,
        "max_position_embeddings": 8192,
        "final_logit_softcapping": 30.0,
        "attn_logit_softcapping": 50.0,
    },
    windows="layer_types",
    full_every=2,
    fixed={
        "use_bidirectional_attention": False,
        "sliding_window_pattern": 2,  # transformers' model reads layer_types only
    },
    ignored=("hidden_act",),
)
_GEMMA3 = _Dialect(
    keys=_GEMMA_KEYS,
    fields={**_GEMMA_FIELDS, "qk_norm": True},
    defaults={
        **_GEMMA_DEFAULTS,
        "vocab_size": 262208,
        "max_position_embeddings": 131072,
        "final_logit_softcapping": None,
    },
    theta=1000000.0,
    local_theta=10000.0,
    windows="layer_types",
    full_every=6,
    fixed={
        "use_bidirectional_attention": False,
        "attn_logit_softcapping": None,  # transformers' model does not apply it
    },
    ignored=("hidden_act",),
)

LLAMA_LINE: tuple[Family, ...] = (
    _family("llama", "Llama", _LLAMA),
    _family("mistral", "Mistral", _MISTRAL),
    _family("qwen2", "Qwen2", _QWEN2),
    _family("qwen3", "Qwen3", _QWEN3),
    _family("gemma2", "Gemma2", _GEMMA2),
    _family("gemma3_text", "Gemma3", _GEMMA3),
)
