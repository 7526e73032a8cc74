"""The structure of transformers' masks reaches the kernel: causal, windows, padding, packed documents."""

import copy
import itertools

import pytest
import torch
import transformers as hf
from transformers import masking_utils
from transformers_calls import run, structure
from transformers_models import BATCH, LENGTH, MODELS, VOCAB, padding_mask
from transformers_rule import (
    assert_call_within_rule,
)

import fastattn
from fastattn.integrations.structured_mask import StructuredMask
from fastattn.integrations.transformers_masks import structured_mask


@pytest.mark.parametrize(
    ("name", "padding", "expected"),
    [
        ("llama", "none", [{"causal"}, {"causal"}]),
        ("llama", "right", [{"causal", "key_lengths"}] * 2),
        ("llama", "left", [{"causal", "segment_ids"}] * 2),
        ("mistral", "none", [{"causal", "window"}] * 2),
        ("gemma3", "right", [{"causal", "window", "key_lengths"}, {"causal", "key_lengths"}]),
        ("bert", "none", [set(), set()]),
        ("bert", "right", [{"key_lengths"}] * 2),
        ("modernbert", "none", [set(), {"window"}]),
        ("t5", "none", [{"bias"}] * 2 + [{"causal", "bias"}, {"bias"}] * 2),
    ],
)
def test_structure_reaches_the_kernel(calls, name, padding, expected):
    run(name, padding=padding)
    assert [structure(options) for options in calls] == expected


def test_a_window_that_reaches_everything_is_none(calls):
    model = hf.MistralForCausalLM(MODELS["mistral"].build().config).eval()
    model.config.sliding_window = LENGTH
    model.set_attn_implementation("fastattn")
    model(**MODELS["mistral"].inputs()[0])
    assert [structure(options) for options in calls] == [{"causal"}] * 2


PATTERNS = {
    "causal": masking_utils.causal_mask_function,
    "bidirectional": masking_utils.bidirectional_mask_function,
    "window": masking_utils.sliding_window_causal_mask_function(3),
    "window of one": masking_utils.sliding_window_causal_mask_function(1),
    "two-sided": masking_utils.sliding_window_bidirectional_mask_function(2),
    "both windows": masking_utils.and_masks(
        masking_utils.sliding_window_causal_mask_function(4),
        masking_utils.sliding_window_causal_mask_function(3),
    ),
}
PACKED = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 0], [0, 1, 2, 3, 4, 5, 6, 0, 1], list(range(9))])
STRUCTURED = {"causal", "bidirectional", "window", "window of one", "two-sided", "both windows"}


def masks_of(pattern, seqlen_q, past, total, padding, offset_tensor=False):
    """(ours, transformers' dense bool mask) for queries after `past` tokens of a cache of `total` places."""
    places = {
        "batch_size": BATCH, "q_length": seqlen_q, "kv_length": total, "mask_function": pattern, "kv_offset": 0,
        "q_offset": torch.tensor([past]) if offset_tensor else past,
        "attention_mask": padding, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False,
        "use_vmap": False, "device": torch.device("cpu"), "dtype": torch.float32, "config": None,
    }  # fmt: skip
    return structured_mask(**places), masking_utils.sdpa_mask(**places)


@pytest.mark.parametrize("name", PATTERNS)
def test_a_structured_mask_is_transformers_mask(name):
    kinds = set()
    for (seqlen_q, past, extra), side, as_tensor in itertools.product(
        [(9, 0, 0), (4, 5, 0), (1, 8, 0), (6, 0, 3), (1, 5, 3), (3, 4, 2)],
        ("none", "left", "right"),
        (False, True),
    ):
        padding = None if side == "none" else padding_mask(side)[:, : seqlen_q + past]
        ours, dense = masks_of(PATTERNS[name], seqlen_q, past, seqlen_q + past + extra, padding, as_tensor)
        assert torch.equal(ours.dense() if isinstance(ours, StructuredMask) else ours, dense)
        assert tuple(ours.shape) == tuple(dense.shape)
        kinds.add(type(ours))
        if extra == 0:
            assert isinstance(ours, StructuredMask)
    assert StructuredMask in kinds


@pytest.mark.parametrize(
    ("seqlen_q", "side", "expected"),
    [(1, "left", {"mask"}), (1, "right", {"key_lengths"}), (4, "left", {"causal", "segment_ids"})],
)
def test_one_query_after_padding_on_the_left_takes_a_mask_of_keys(seqlen_q, side, expected):
    padding = padding_mask(side)
    length = padding.shape[1]
    ours, dense = masks_of(PATTERNS["causal"], seqlen_q, length - seqlen_q, length, padding)
    options = ours.options(BATCH, seqlen_q)
    assert structure(options) == expected
    q, k, v = (torch.randn(BATCH, 2, n, 8) for n in (seqlen_q, length, length))
    k.masked_fill_(~padding.bool()[:, None, :, None], torch.nan)
    actual = fastattn.attention(q, k, v, **options)
    expected_out = fastattn.attention(q, k, v, mask=dense)
    seen = dense.any(-1)[..., None]
    torch.testing.assert_close(actual.masked_fill(~seen, 0), expected_out.masked_fill(~seen, 0))
    moved = ours.to("meta")
    assert moved.dense().device.type == "meta"


def test_packed_documents_are_segments():
    for pattern in (PATTERNS["causal"], PATTERNS["window"]):
        ids = masking_utils.find_packed_sequence_indices(PACKED)
        within = masking_utils.remap_positions_for_packed_sequence(pattern, PACKED)
        packed = masking_utils.and_masks(within, masking_utils.packed_sequence_mask_function(ids))
        ours, dense = masks_of(packed, LENGTH, 0, LENGTH, None)
        assert isinstance(ours, StructuredMask)
        assert ours.segment_ids is not None
        assert torch.equal(ours.dense(), dense)


@pytest.mark.parametrize(
    "pattern",
    [
        masking_utils.chunked_causal_mask_function(3, torch.zeros(BATCH, dtype=torch.int64)),
        masking_utils.or_masks(
            PATTERNS["causal"], masking_utils.blockwise_overlay(torch.zeros(BATCH, 9, dtype=torch.int64))
        ),
        masking_utils.and_masks(PATTERNS["causal"], lambda b, h, q, k: (q + k) % 2 == 0),
        masking_utils.remap_positions_for_packed_sequence(PATTERNS["causal"], PACKED),
    ],
)
def test_other_masks_become_dense(pattern):
    ours, dense = masks_of(pattern, LENGTH, 0, LENGTH, None)
    assert isinstance(ours, torch.Tensor)
    assert torch.equal(ours, dense)


def test_a_structured_mask_is_a_tensor_to_others():
    mask, dense = masks_of(PATTERNS["window"], 4, 5, 9, padding_mask("left"))
    assert mask.dtype == torch.bool
    assert mask.ndim == mask.dim() == 4
    assert torch.equal(mask[:, :, 1:], dense[:, :, 1:])
    assert torch.equal(mask & dense, dense)
    assert torch.equal(~mask | dense, torch.ones_like(dense))
    assert torch.equal(torch.cat([mask, dense], -1), torch.cat([dense, dense], -1))
    assert torch.equal(torch.where(mask, 0.0, -1.0), torch.where(dense, 0.0, -1.0))
    assert torch.equal(mask.to(torch.float32), dense.float())
    assert isinstance(mask.to("cpu"), StructuredMask)
    assert mask.contiguous() is mask
    assert torch.equal(copy.deepcopy(mask).dense(), dense)
    assert not hasattr(mask, "nothing_of_that_name")


@pytest.mark.parametrize("pass_as", ["position_ids", "position_ids and no cache", "cu_seq_lens"])
def test_packed_documents_do_not_see_each_other(calls, pass_as):
    """With a cache, transformers' own masks forget that position_ids are packed."""
    model = MODELS["llama"].make()
    ids = torch.randint(3, VOCAB, (1, 9))
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 0]])
    more = {"position_ids": positions, "use_cache": pass_as != "position_ids and no cache"}
    if pass_as == "cu_seq_lens":
        ends = torch.tensor([0, 3, 8, 9], dtype=torch.int32)
        more |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends.clone(), "max_length_q": 5, "max_length_k": 5}
    model.set_attn_implementation("fastattn")
    assert_call_within_rule(
        model,
        lambda model: {"logits": model(ids, **more).logits},
        lambda model: {"logits": torch.cat([model(part).logits for part in ids.split([3, 5, 1], 1)], 1)},
    )
    assert [structure(options) for options in calls] == [{"causal", "segment_ids"}] * 2


def test_positions_of_padding_are_not_packed(calls):
    """`generate` numbers padding from 0 on the right, too."""
    model, (arguments, _) = MODELS["llama"].make(), MODELS["llama"].inputs("right")
    positions = (arguments["attention_mask"].cumsum(-1) - 1).masked_fill(arguments["attention_mask"] == 0, 0)
    model.set_attn_implementation("fastattn")
    assert_call_within_rule(
        model, lambda model: {"logits": model(**arguments, position_ids=positions).logits}
    )
    assert [structure(options) for options in calls] == [{"causal", "key_lengths"}] * 2


def test_positions_that_only_skip_are_not_packed(calls):
    model = MODELS["llama"].make()
    ids, positions = torch.randint(3, VOCAB, (1, 9)), torch.arange(9)[None] * 2
    more = {"attention_mask": torch.ones_like(ids), "position_ids": positions}
    model.set_attn_implementation("fastattn")
    assert_call_within_rule(model, lambda model: {"logits": model(ids, **more).logits})


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
@pytest.mark.parametrize("padding", ["none", "left"])
def test_prefill_in_chunks_aligns_to_the_last_key(calls, name, padding):
    model = MODELS[name].make()
    arguments, valid = MODELS[name].inputs(padding)
    mask = padding_mask(padding).long()

    def in_two_chunks(model):
        first = model(arguments["input_ids"][:, :5], attention_mask=mask[:, :5], use_cache=True)
        second = model(
            arguments["input_ids"][:, 5:], attention_mask=mask, past_key_values=first.past_key_values
        )
        return {"logits": torch.cat([first.logits, second.logits], 1)[valid]}

    model.set_attn_implementation("fastattn")
    assert_call_within_rule(model, in_two_chunks)
    assert all("mask" not in structure(options) for options in calls)
    assert {options["causal"] for options in calls} == {"top_left", True}


@pytest.mark.parametrize("as_float", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_a_mask_of_the_users_own(calls, name, as_float):
    mask = (torch.rand(BATCH, 1, LENGTH, LENGTH) < 0.5) | torch.eye(LENGTH, dtype=torch.bool)
    additive = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    model, (arguments, _) = MODELS[name].make(), MODELS[name].inputs()
    model.set_attn_implementation("fastattn")
    assert_call_within_rule(
        model,
        lambda model: {"logits": model(**arguments, attention_mask=additive if as_float else mask).logits},
        lambda model: {"logits": model(**arguments, attention_mask=additive.to(model.dtype)).logits},
    )
    assert structure(calls[0]) == {"bias" if as_float else "mask"}
