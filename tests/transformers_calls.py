"""What the tests of transformers models share; importing it registers fastattn with transformers."""

import torch
from torch import nn
from transformers_models import MODELS

from fastattn.integrations import transformers as integration

integration.register()


def generate(model, implementation, prompt, **options):
    model.set_attn_implementation(implementation)
    options = {
        "max_new_tokens": 20,
        "min_new_tokens": 20,
        "do_sample": False,
        "no_repeat_ngram_size": 2,
    } | options
    with torch.no_grad():
        return model.generate(**prompt, pad_token_id=0, **options)


def structure(options):
    """What of a mask a kernel was given, by name."""
    return {
        n
        for n in ("causal", "window", "mask", "bias", "segment_ids", "key_lengths")
        if options.get(n) is not None and options[n] is not False
    }


def run(name, implementation="fastattn", padding="none", **more):
    model = MODELS[name].make()
    model.set_attn_implementation(implementation)
    arguments, valid = MODELS[name].inputs(padding)
    return model(**arguments, **more).logits[valid]


def call(**change):
    module = nn.Module()
    arguments = {
        "query": torch.randn(2, 4, 5, 8), "key": torch.randn(2, 2, 5, 8), "value": torch.randn(2, 2, 5, 6),
        "attention_mask": None, "scaling": 0.3,
    } | change  # fmt: skip
    module.is_causal = arguments.pop("module_is_causal", True)
    return integration.attention_forward(module, **arguments), arguments
