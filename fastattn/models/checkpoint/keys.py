"""Which keys of config.json are honoured, which have no influence on the result, and refusal of all others."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

# Keys that transformers writes for every model and that change no output of a forward pass.
WITHOUT_INFLUENCE = frozenset(
    (
        "model_type",
        "architectures",
        "dtype",
        "torch_dtype",
        "transformers_version",
        "use_cache",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "return_dict_in_generate",
        "torchscript",
        "use_bfloat16",
        "use_return_dict",
        "gradient_checkpointing",
        "chunk_size_feed_forward",
        "attn_implementation",
        "tokenizer_class",
        "finetuning_task",
        "task_specific_params",
        "problem_type",
        "id2label",
        "label2id",
        "num_labels",
        "prefix",
        "tf_legacy_loss",
        "initializer_factor",
        "tie_encoder_decoder",
        "cross_attention_hidden_size",
        "decoder_start_token_id",
        "sep_token_id",
        # notes of the programs that trained or uploaded a model: FARM, sentence-transformers' CrossEncoder, Unsloth
        "language",
        "name",
        "sbert_ce_default_activation_function",
        "sentence_transformers",
        "unsloth_fixed",
        "unsloth_version",
        # defaults of generation that config.json held before generation_config.json did
        "max_length",
        "min_length",
        "do_sample",
        "early_stopping",
        "num_beams",
        "num_beam_groups",
        "diversity_penalty",
        "temperature",
        "top_k",
        "top_p",
        "typical_p",
        "repetition_penalty",
        "length_penalty",
        "no_repeat_ngram_size",
        "encoder_no_repeat_ngram_size",
        "bad_words_ids",
        "num_return_sequences",
        "output_scores",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "remove_invalid_values",
        "exponential_decay_length_penalty",
        "suppress_tokens",
        "begin_suppress_tokens",
    )
)
# Keys of every transformers config that would change the result at another value.
SHARED_DEFAULTS: dict[str, Any] = {
    "is_encoder_decoder": False,
    "is_decoder": False,
    "add_cross_attention": False,
    "pruned_heads": {},
    "quantization_config": None,
    "auto_map": None,
}


def check_keys(
    entries: Mapping[str, Any],
    *,
    honoured: Collection[str],
    ignored: Collection[str] = (),
    defaults: Mapping[str, Any] | None = None,
) -> None:
    """Refuse what a config.json asks for and this package does not compute; all of it in one message.

    Args:
        entries: config.json.
        honoured: keys that the family reads.
        ignored: keys without influence on the result, besides `WITHOUT_INFLUENCE` and those that begin with "_".
        defaults: keys that would change the result, with the one value that is computed, which is the value
            transformers' config class has where a file does not say; besides `SHARED_DEFAULTS`.

    A null says that a key is not set. It is refused only where leaving the key out would mean a true value, as
    transformers reads null as false.

    Raises:
        ValueError: a key of `defaults` has another value, or nobody knows a key; the message begins with the key.
    """
    expected = {**SHARED_DEFAULTS, **(defaults or {})}
    wrong = []
    for key, value in entries.items():
        if key in honoured or key in ignored or key in WITHOUT_INFLUENCE or key.startswith("_"):
            continue
        if value is None and not expected.get(key):
            continue
        if key not in expected:
            wrong.append(f"{key}: got {value!r}, which is no key of this model type")
        elif value != expected[key]:
            wrong.append(f"{key}: got {value!r}, only {expected[key]!r} is supported")
    if wrong:
        raise ValueError("; ".join(wrong))
