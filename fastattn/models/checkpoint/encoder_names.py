"""Names in the files of BERT, RoBERTa, DistilBERT, ELECTRA and ModernBERT: tensors, keys of config.json, classes."""

from __future__ import annotations

from typing import Any, NamedTuple

DISCRIMINATOR = "ElectraForPreTraining"


class Kind(NamedTuple):
    """The names in a family's files: of tensors, of config.json's keys and of classes."""

    classes: str  # in front of "ForMaskedLM"
    prefix: str
    trunk: dict[
        str, tuple[str, ...]
    ]  # ours, of the trunk -> theirs, behind the prefix; no ".weight" and ".bias"
    heads: dict[str, dict[str, str]]  # by our class: ours -> theirs, whole or without ".weight" and ".bias"
    keys: dict[str, str]  # our field -> config.json's key, where the names differ
    fields: tuple[str, ...]  # our fields that config.json has under the same name
    ignored: tuple[str, ...]  # keys without influence on a result
    fixed: dict[str, Any]  # keys that we compute at one value only, transformers' default
    dropped: tuple[str, ...]  # patterns of heads and buffers, behind the prefix


_BERT_LAYER = "encoder.layer.{i}."
_BERT_TRUNK: dict[str, tuple[str, ...]] = {
    "embeddings.word_embeddings": ("embeddings.word_embeddings",),
    "embeddings.position_embeddings": ("embeddings.position_embeddings",),
    "embeddings.token_type_embeddings": ("embeddings.token_type_embeddings",),
    "embeddings.norm": ("embeddings.LayerNorm",),
    "embeddings.projection": ("embeddings_project",),
    "layers.{i}.attn.qkv": tuple(f"{_BERT_LAYER}attention.self.{x}" for x in ("query", "key", "value")),
    "layers.{i}.attn.out_proj": (_BERT_LAYER + "attention.output.dense",),
    "layers.{i}.ln_1": (_BERT_LAYER + "attention.output.LayerNorm",),
    "layers.{i}.mlp.c_fc": (_BERT_LAYER + "intermediate.dense",),
    "layers.{i}.mlp.c_proj": (_BERT_LAYER + "output.dense",),
    "layers.{i}.ln_2": (_BERT_LAYER + "output.LayerNorm",),
    "pooler": ("pooler.dense",),
}
_DISTILBERT_LAYER = "transformer.layer.{i}."
_DISTILBERT_TRUNK: dict[str, tuple[str, ...]] = {
    **{name: theirs for name, theirs in _BERT_TRUNK.items() if name.startswith("embeddings.")},
    "layers.{i}.attn.qkv": tuple(f"{_DISTILBERT_LAYER}attention.{x}_lin" for x in "qkv"),
    "layers.{i}.attn.out_proj": (_DISTILBERT_LAYER + "attention.out_lin",),
    "layers.{i}.ln_1": (_DISTILBERT_LAYER + "sa_layer_norm",),
    "layers.{i}.mlp.c_fc": (_DISTILBERT_LAYER + "ffn.lin1",),
    "layers.{i}.mlp.c_proj": (_DISTILBERT_LAYER + "ffn.lin2",),
    "layers.{i}.ln_2": (_DISTILBERT_LAYER + "output_layer_norm",),
}
_MODERNBERT_TRUNK: dict[str, tuple[str, ...]] = {
    "embeddings.word_embeddings": ("embeddings.tok_embeddings",),
    "embeddings.norm": ("embeddings.norm",),
    "layers.{i}.ln_1": ("layers.{i}.attn_norm",),
    "layers.{i}.attn.qkv": ("layers.{i}.attn.Wqkv",),
    "layers.{i}.attn.out_proj": ("layers.{i}.attn.Wo",),
    "layers.{i}.ln_2": ("layers.{i}.mlp_norm",),
    "layers.{i}.mlp.c_fc": ("layers.{i}.mlp.Wi",),
    "layers.{i}.mlp.c_proj": ("layers.{i}.mlp.Wo",),
    "final_norm": ("final_norm",),
}

_SIZES = ("vocab_size", "initializer_range", "max_position_embeddings", "tie_word_embeddings")
_IDS = ("pad_token_id", "bos_token_id", "eos_token_id")
_SHARED = (
    *_SIZES, *_IDS, "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act",
    "hidden_dropout_prob", "attention_probs_dropout_prob", "type_vocab_size", "layer_norm_eps", "classifier_dropout",
)  # fmt: skip
_POOLER_OF_TF = (  # of the TensorFlow BERT's pooler, which no model has
    "directionality", "pooler_fc_size", "pooler_num_attention_heads", "pooler_num_fc_layers", "pooler_size_per_head",
    "pooler_type", "output_past", "mask_token_id", "cls_token_id",
)  # fmt: skip
_ABSOLUTE = {"position_embedding_type": "absolute"}
_BERT_LM = {
    "head.dense": "cls.predictions.transform.dense",
    "head.norm": "cls.predictions.transform.LayerNorm",
    "decoder.weight": "cls.predictions.decoder.weight",
    "decoder.bias": "cls.predictions.bias",
}
_LINEAR = {"classifier": "classifier"}
_QA = {"qa_outputs": "qa_outputs"}
_TWO_LAYERS = {"head.dense": "classifier.dense", "classifier": "classifier.out_proj"}
_BERT_HEADS = ("pooler.*", "cls.*", "classifier.*", "qa_outputs.*", "embeddings.position_ids")

KINDS: dict[str, Kind] = {
    "bert": Kind(
        "Bert", "bert.", _BERT_TRUNK,
        {
            "BertForPreTraining": {
                **_BERT_LM, "pooler": "bert.pooler.dense", "seq_relationship": "cls.seq_relationship",
            },
            "BertForMaskedLM": _BERT_LM,
            "BertForSequenceClassification": {"head.dense": "bert.pooler.dense", **_LINEAR},
            "BertForTokenClassification": _LINEAR,
            "BertForQuestionAnswering": _QA,
        },
        {}, _SHARED, _POOLER_OF_TF, _ABSOLUTE, _BERT_HEADS,
    ),
    "roberta": Kind(
        "Roberta", "roberta.", _BERT_TRUNK,
        {
            "BertForMaskedLM": {
                "head.dense": "lm_head.dense", "head.norm": "lm_head.layer_norm",
                "decoder.weight": "lm_head.decoder.weight", "decoder.bias": "lm_head.bias",
            },
            "BertForSequenceClassification": _TWO_LAYERS,
            "BertForTokenClassification": _LINEAR,
            "BertForQuestionAnswering": _QA,
        },
        {}, _SHARED, _POOLER_OF_TF, _ABSOLUTE, (*_BERT_HEADS, "lm_head.*"),
    ),
    "distilbert": Kind(
        "DistilBert", "distilbert.", _DISTILBERT_TRUNK,
        {
            "BertForMaskedLM": {
                "head.dense": "vocab_transform", "head.norm": "vocab_layer_norm", "decoder": "vocab_projector",
            },
            "BertForSequenceClassification": {"head.dense": "pre_classifier", **_LINEAR},
            "BertForTokenClassification": _LINEAR,
            "BertForQuestionAnswering": _QA,
        },
        {
            "hidden_size": "dim", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads",
            "intermediate_size": "hidden_dim", "hidden_act": "activation", "hidden_dropout_prob": "dropout",
            "attention_probs_dropout_prob": "attention_dropout", "classifier_dropout": "seq_classif_dropout",
        },
        (*_SIZES, *_IDS, "qa_dropout"),
        ("sinusoidal_pos_embds", "tie_weights_", "output_past", "mask_token_id"),  # the file has the positions
        {},
        ("vocab_*", "pre_classifier.*", "classifier.*", "qa_outputs.*", "embeddings.position_ids"),
    ),
    "electra": Kind(
        "Electra", "electra.", _BERT_TRUNK,
        {
            "BertForMaskedLM": {
                "head.dense": "generator_predictions.dense", "head.norm": "generator_predictions.LayerNorm",
                "decoder": "generator_lm_head",
            },
            "BertForSequenceClassification": _TWO_LAYERS,
            "BertForTokenClassification": _LINEAR,
            "BertForQuestionAnswering": _QA,
            DISCRIMINATOR: {
                "head.dense": "discriminator_predictions.dense",
                "classifier": "discriminator_predictions.dense_prediction",
            },
        },
        {}, (*_SHARED, "embedding_size"),
        (
            *_POOLER_OF_TF, "summary_type", "summary_use_proj", "summary_activation", "summary_last_dropout",
        ),
        _ABSOLUTE,
        (
            "generator_predictions.*", "generator_lm_head.*", "discriminator_predictions.*", "classifier.*",
            "qa_outputs.*", "sequence_summary.*", "embeddings.position_ids",
        ),
    ),
    "modernbert": Kind(
        "ModernBert", "model.", _MODERNBERT_TRUNK,
        {
            "BertForMaskedLM": {"head.dense": "head.dense", "head.norm": "head.norm", "decoder": "decoder"},
            **{
                name: {"head.dense": "head.dense", "head.norm": "head.norm", ours: "classifier"}
                for name, ours in (
                    ("BertForSequenceClassification", "classifier"), ("BertForTokenClassification", "classifier"),
                    ("BertForQuestionAnswering", "qa_outputs"),
                )
            },
        },
        {"hidden_act": "hidden_activation", "layer_norm_eps": "norm_eps"},
        (
            *_SIZES, *_IDS, "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
            "attention_bias", "mlp_bias", "norm_bias", "decoder_bias", "layer_types", "local_attention",
            "embedding_dropout", "mlp_dropout", "classifier_pooling", "classifier_dropout", "classifier_bias",
            "classifier_activation", "cls_token_id", "sep_token_id",
        ),
        (
            "layer_norm_eps", "position_embedding_type", "reference_compile", "repad_logits_with_grad",
            "deterministic_flash_attn", "initializer_cutoff_factor", "sparse_prediction",
            "mask_token_id",
        ),
        {"sparse_pred_ignore_index": -100},
        ("head.*", "decoder.*", "classifier.*"),
    ),
}  # fmt: skip
