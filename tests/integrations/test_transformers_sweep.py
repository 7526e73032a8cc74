"""Every model type of the installed transformers that can be made tiny from its config, before and after a swap.

FASTATTN_SWEEP names the types, or is "all"; without it, the forty of which each shows something that the others do not.
A type that cannot be built or is not switched is skipped with the reason, which pytest prints.
"""

import os

import pytest
from transformers_sweep import check
from transformers_tiny import CannotBuild, types

import fastattn.integrations.transformers

fastattn.integrations.transformers.register()

FORTY = [
    "llama", "gpt2", "minimax", "mistral", "gemma2", "gemma3_text", "gpt_oss", "qwen3", "qwen3_moe",
    "evolla", "llama4_text", "granitemoe_swa", "bert", "roc_bert", "markuplm", "deberta-v2", "modernbert",
    "t5", "bart", "whisper", "pegasus_x", "bigbird_pegasus", "nllb-moe", "longt5", "informer", "git",
    "clip", "align_text_model", "clap_text_model", "splinter", "gemma4_audio", "gemma3n_audio",
    "gemma4_text", "deepseek_v32", "deepseek_v4", "inkling2_text", "lightglue", "jamba", "vit", "qwen2_vl_text",
]  # fmt: skip
CHOSEN = os.environ.get("FASTATTN_SWEEP", "").split() or FORTY
TYPES = types() if CHOSEN == ["all"] else CHOSEN


@pytest.mark.exhaustive
@pytest.mark.parametrize("model_type", TYPES)
def test_a_swap_changes_nothing_but_rounding(model_type, record_property):
    if model_type not in types():
        pytest.skip(f"{model_type}: this transformers has no such type")
    try:
        outcome = check(model_type)
    except CannotBuild as error:
        pytest.skip(f"{model_type} cannot be built: {error}")
    record_property("outcome", str(outcome))
    if not outcome.swapped:
        why = "; ".join(dict.fromkeys(outcome.left)) or "nothing in it computes attention"
        pytest.skip(f"{model_type} is not switched: {why}")
