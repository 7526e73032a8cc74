"""Encoders: what transformers computes, for every family and head, with padding on either side and with gradients."""

import encoder_models as tiny
import pytest
import torch
import torch._dynamo.testing
from small_models import BERT

from fastattn.models import (
    Bert,
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
)
from numerics import assert_within_rule

pytest.importorskip("transformers")
every_pair = pytest.mark.parametrize(("family", "head"), tiny.PAIRS, ids=["-".join(p) for p in tiny.PAIRS])
every_family = pytest.mark.parametrize("family", tiny.FAMILIES)


@every_pair
def test_results_are_those_of_transformers_within_float32_rounding(family, head):
    theirs = tiny.theirs(family, head)
    ours = tiny.ours_of(theirs, tiny.our_class(family, head))
    golden_model = tiny.double(tiny.theirs(family, head))
    with torch.no_grad():
        for side in ("right", "left"):
            ids, mask = tiny.batch(theirs.config.pad_token_id, side=side)
            actual = tiny.main_output(ours(ids, mask))
            real = mask.bool()
            if head in tiny.POOLED:  # of the first real token, where transformers takes the first column
                plain, golden = (
                    torch.cat([tiny.main_output(out) for out in tiny.row_by_row(model, ids, mask)])
                    for model in (theirs, golden_model)
                )
            else:
                plain, golden = (
                    tiny.main_output(model(ids, attention_mask=mask))[real]
                    for model in (theirs, golden_model)
                )
                lowest = torch.finfo(torch.float32).min if head == "ForQuestionAnswering" else 0.0
                assert (actual[~real] == lowest).all()
                actual = actual[real]
            assert_within_rule(actual, plain, golden, f"{family} {head} {side}")


@every_family
def test_hidden_states_and_attentions_have_the_form_of_transformers(family):
    theirs, golden_model = (tiny.theirs(family, "Model") for _ in range(2))
    tiny.double(golden_model)
    ours = tiny.ours_of(theirs, Bert)
    ids, mask = tiny.batch(theirs.config.pad_token_id)
    real, asked = mask.bool(), {"output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        actual = ours(ids, mask, **asked)
        plain, golden = (model(ids, attention_mask=mask, **asked) for model in (theirs, golden_model))
        bare = ours(ids, mask)
    assert bare.hidden_states is None
    assert bare.attentions is None
    torch.testing.assert_close(bare.last_hidden_state, actual.last_hidden_state)
    assert len(actual.hidden_states) == len(plain.hidden_states) == 4
    for index, states in enumerate(zip(actual.hidden_states, plain.hidden_states, golden.hidden_states)):
        assert_within_rule(*(state[real] for state in states), f"hidden state {index}")
    assert len(actual.attentions) == len(plain.attentions) == 3
    for index, weights in enumerate(zip(actual.attentions, plain.attentions, golden.attentions)):
        rows = [w.transpose(1, 2)[real] for w in weights]  # of real queries, (tokens, H, S)
        assert_within_rule(*rows, f"attention weights {index}")
        assert not weights[0].transpose(1, 2)[~real].any()
    if actual.pooler_output is not None:
        outputs = (actual.pooler_output, plain.pooler_output, golden.pooler_output)
        assert_within_rule(*outputs, "pooler_output")


LABELS = {
    "ForMaskedLM": lambda mask: {"labels": torch.randint(61, mask.shape).masked_fill(mask == 0, -100)},
    "ForSequenceClassification": lambda mask: {"labels": torch.randint(3, (len(mask),))},
    "ForTokenClassification": lambda mask: {"labels": torch.randint(3, mask.shape).masked_fill(mask == 0, -100)},
    "ForQuestionAnswering": lambda mask: {
        "start_positions": torch.randint(4, (len(mask),)), "end_positions": torch.tensor([3, 2, 200]),
    },
}  # fmt: skip


def labels_for(family, head, mask):
    torch.manual_seed(4)
    if head != "ForPreTraining":
        return LABELS[head](mask)
    if family == "electra":
        return {"labels": torch.randint(2, mask.shape)}
    return {**LABELS["ForMaskedLM"](mask), "next_sentence_label": torch.tensor([0, 1, 1])}


@pytest.mark.parametrize(
    ("family", "head"), [pair for pair in tiny.PAIRS if pair[1] != "Model"],
    ids=["-".join(pair) for pair in tiny.PAIRS if pair[1] != "Model"],
)  # fmt: skip
def test_one_step_of_sgd_gives_the_weights_that_transformers_gets(family, head, tmp_path):
    theirs = tiny.theirs(
        family, head, **({} if head in ("ForPreTraining", "ForQuestionAnswering") else {"num_labels": 3})
    )
    tiny.double(theirs)
    ours = tiny.ours_of(theirs, tiny.our_class(family, head))
    ids, mask = tiny.batch(theirs.config.pad_token_id)
    if head == "ForQuestionAnswering":  # their softmax is over padding too
        ids, mask = tiny.batch(theirs.config.pad_token_id, lengths=(9, 9, 9), seqlen=9)
    labels = labels_for(family, head, mask)
    losses = []
    for model in (theirs.train(), ours.train()):
        optimiser = torch.optim.SGD(model.parameters(), lr=0.5)
        loss = model(input_ids=ids, attention_mask=mask, **labels).loss
        loss.backward()
        optimiser.step()
        losses.append(loss.detach())
    torch.testing.assert_close(losses[1], losses[0].to(losses[1].dtype))
    ours.save_pretrained(tmp_path)
    after, expected = tiny.tensors_in(tmp_path), theirs.state_dict()
    assert after.keys() <= expected.keys()
    for name, tensor in after.items():
        torch.testing.assert_close(
            tensor, expected[name], msg=lambda message, name=name: f"{name}: {message}"
        )


@pytest.mark.parametrize("problem", ["regression", "regression of several", "several labels", "given"])
def test_sequence_classification_chooses_the_loss_as_transformers_does(problem):
    options, labels = {
        "regression": ({"num_labels": 1}, torch.tensor([0.5, -1.0, 2.0])),
        "regression of several": ({"num_labels": 3, "problem_type": "regression"}, torch.randn(3, 3)),
        "several labels": (
            {"num_labels": 3},
            torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]),
        ),
        "given": ({"num_labels": 3, "problem_type": "single_label_classification"}, torch.tensor([2, 0, 1])),
    }[problem]
    theirs = tiny.double(tiny.theirs("bert", "ForSequenceClassification", **options))
    ours = tiny.ours_of(theirs, BertForSequenceClassification)
    ids, mask = tiny.batch(0)
    if labels.is_floating_point():
        labels = labels.double()
    expected = theirs(ids, attention_mask=mask, labels=labels).loss
    torch.testing.assert_close(ours(ids, mask, labels=labels).loss, expected)


def test_token_types_positions_and_given_embeddings():
    theirs = tiny.double(tiny.theirs("bert", "Model"))
    ours = tiny.ours_of(theirs, Bert)
    ids, mask = tiny.batch(0)
    options = {
        "token_type_ids": torch.randint(2, ids.shape),
        "position_ids": torch.randint(40, ids.shape),
    }
    expected = theirs(ids, attention_mask=mask, **options).last_hidden_state[mask.bool()]
    torch.testing.assert_close(ours(ids, mask, **options).last_hidden_state[mask.bool()], expected)
    embeds = torch.randn(*ids.shape, 32, dtype=torch.float64, requires_grad=True)
    expected = theirs(inputs_embeds=embeds, attention_mask=mask, **options).last_hidden_state[mask.bool()]
    actual = ours(inputs_embeds=embeds, attention_mask=mask, **options).last_hidden_state[mask.bool()]
    torch.testing.assert_close(actual, expected)
    grads = [torch.autograd.grad(out.square().sum(), embeds)[0] for out in (actual, expected)]
    torch.testing.assert_close(grads[0][mask.bool()], grads[1][mask.bool()])
    assert not grads[0][mask == 0].any()


def test_windows_count_columns_where_a_mask_has_gaps():
    theirs = tiny.double(tiny.theirs("modernbert", "Model"))
    ours = tiny.ours_of(theirs, Bert)
    ids, mask = tiny.batch(0)
    mask[0, 3:6] = 0
    expected = theirs(ids, attention_mask=mask).last_hidden_state[mask.bool()]
    actual = ours(ids, mask).last_hidden_state
    torch.testing.assert_close(actual[mask.bool()], expected)
    assert not actual[mask == 0].any()


def test_bfloat16_stays_within_the_rule_of_bfloat16():
    theirs = tiny.theirs("bert", "ForMaskedLM")
    ours = tiny.ours_of(theirs, BertForMaskedLM, dtype=torch.bfloat16)
    golden = tiny.theirs("bert", "ForMaskedLM").bfloat16().double()
    ids, mask = tiny.batch(0)
    real = mask.bool()
    with torch.no_grad():
        results = (
            ours(ids, mask).logits[real],
            theirs.bfloat16()(ids, attention_mask=mask).logits[real],
            golden(ids, attention_mask=mask).logits[real],
        )
    assert results[0].dtype == torch.bfloat16
    assert_within_rule(*results)


@every_family
def test_compiled_without_breaks_or_recompiles_across_lengths(family):
    ours = tiny.ours_of(tiny.theirs(family, "ForMaskedLM"), BertForMaskedLM).double()
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    compiled = torch.compile(ours, fullgraph=True, backend=counter)
    with torch.no_grad():
        for length in range(8, 28):
            ids, mask = tiny.batch(ours.config.pad_token_id, (length, 5, length - 2), length)
            torch.testing.assert_close(compiled(ids, mask).logits, ours(ids, mask).logits)
    assert counter.frame_count <= 2  # the first length, and every other one


BAD = {
    "ids of three dimensions": ({"input_ids": torch.zeros(1, 2, 3, dtype=torch.long)}, "input_ids: got torch.int64 of"),
    "ids of floats": ({"input_ids": torch.zeros(1, 2)}, "input_ids: got torch.float32"),
    "no ids": ({}, "input_ids: needs either"),
    "ids and embeddings": (
        {"input_ids": torch.zeros(1, 2, dtype=torch.long), "inputs_embeds": torch.zeros(1, 2, 32)}, "input_ids: needs",
    ),
    "embeddings of another width": ({"inputs_embeds": torch.zeros(1, 2, 31)}, "inputs_embeds: got shape"),
    "an id too large": ({"input_ids": torch.full((1, 2), 61)}, "input_ids: got 61 to 61, needs 0 to 60"),
    "a mask of another shape": (
        {"input_ids": torch.zeros(1, 2, dtype=torch.long), "attention_mask": torch.ones(1, 3)},
        "attention_mask: got shape",
    ),
    "a type too large": (
        {"input_ids": torch.zeros(1, 2, dtype=torch.long), "token_type_ids": torch.full((1, 2), 2)},
        "token_type_ids: got 2 to 2",
    ),
    "too many tokens": ({"input_ids": torch.zeros(1, 41, dtype=torch.long)}, "input_ids: 41 tokens is more than"),
    "a position too large": (
        {"input_ids": torch.zeros(1, 2, dtype=torch.long), "position_ids": torch.tensor([0, 40])},
        "position_ids: got 0 to 40",
    ),
    "labels of another shape": (
        {"input_ids": torch.zeros(1, 2, dtype=torch.long), "labels": torch.zeros(1, 3, dtype=torch.long)},
        "labels: got torch.int64 of shape",
    ),
    "a label too large": (
        {"input_ids": torch.zeros(1, 2, dtype=torch.long), "labels": torch.full((1, 2), 61)}, "labels: got 61 to 61",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("inputs", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_refused_by_name(inputs, message):
    model = BertForMaskedLM(BertConfig(**tiny.SIZES))
    with pytest.raises(ValueError, match=message):
        model(**inputs)


def test_a_family_without_token_types_refuses_them():
    model = Bert(BertConfig(**tiny.SIZES, type_vocab_size=0))
    ids = torch.zeros(1, 2, dtype=torch.long)
    with pytest.raises(ValueError, match="token_type_ids: a bert model has no token types"):
        model(ids, token_type_ids=ids)
    with pytest.raises(TypeError, match="input_ids"):
        model([[1, 2]])


def test_positions_of_answers_are_a_column_for_each_text():
    """As (B,) or (B, 1), which give the same loss; anything else is refused by name before it is used."""
    torch.manual_seed(0)
    model = BertForQuestionAnswering(BertConfig(**tiny.SIZES)).eval()
    ids, at = torch.randint(2, 61, (2, 4)), torch.tensor([1, 3])
    loss = model(ids, start_positions=at, end_positions=at).loss
    assert torch.equal(model(ids, start_positions=at[:, None], end_positions=at[:, None]).loss, loss)
    for name in ("start_positions", "end_positions"):
        good = dict.fromkeys(("start_positions", "end_positions"), at)
        with pytest.raises(TypeError, match=f"{name}: got list"):
            model(ids, **{**good, name: [1, 3]})
        for bad in (at[:1], at[None], at.double()):
            with pytest.raises(ValueError, match=f"{name}: got torch"):
                model(ids, **{**good, name: bad})


@pytest.mark.parametrize("flag", ["output_hidden_states", "output_attentions"])
def test_flags_that_are_none_are_refused_by_name(flag):
    model = Bert(BertConfig(**BERT))
    with pytest.raises(TypeError, match=rf"^{flag}: got 1, needs True or False"):
        model(torch.ones(1, 3, dtype=torch.long), **{flag: 1})
