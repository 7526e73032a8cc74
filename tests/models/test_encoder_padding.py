"""Padding: what it holds changes nothing, and nothing is computed for it, forward and backward, heads included."""

import inspect
import weakref

import encoder_models as tiny
import pytest
import torch
import torch._dynamo.testing
from torch.utils.flop_counter import FlopCounterMode

import fastattn.models as models
from fastattn.models import Bert, BertConfig
from fastattn.models.presets import FAMILY_FIELDS, alternating_layers
from fastattn.nn.unpadding import Tokens

LENGTHS = (11, 4, 7)
HEADS = (*tiny.HEADS.values(), models.BertForEmbedding)
every_head = pytest.mark.parametrize("cls", HEADS, ids=lambda cls: cls.__name__)
every_family = pytest.mark.parametrize("family", FAMILY_FIELDS)


def make(cls, family="bert", **changes):
    torch.manual_seed(3)
    fields = {
        **FAMILY_FIELDS[family],
        **tiny.SIZES,
        "pad_token_id": 1,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if family == "modernbert":
        fields |= {"layer_types": alternating_layers(3, 3), "local_attention": 4}
    if family == "electra":
        fields |= {"embedding_size": 16}
    fields |= {"initializer_range": 0.3, "model_type": family, "num_labels": 3}
    return cls(BertConfig(**{**fields, **changes})).double().eval()


def labels_of(cls, mask):
    torch.manual_seed(5)
    batch = len(mask)
    if cls is models.BertForQuestionAnswering:
        return {"start_positions": torch.randint(4, (batch,)), "end_positions": torch.randint(4, (batch,))}
    if cls is models.BertForSequenceClassification:
        return {"labels": torch.randint(3, (batch,))}
    if cls is models.BertForTokenClassification:
        return {"labels": torch.randint(3, (3, 11))}
    if cls in (models.BertForMaskedLM, models.BertForPreTraining):
        return {"labels": torch.randint(61, (3, 11))}
    return {}


def run(model, ids, mask, **inputs):
    """(results at real tokens, gradients)."""
    model.zero_grad()
    labels = {
        name: torch.nn.functional.pad(label, (0, ids.shape[1] - 11), value=2) if label.dim() == 2 else label
        for name, label in labels_of(type(model), mask).items()
    }
    outputs = model(None if "inputs_embeds" in inputs else ids, mask, **labels, **inputs)
    loss = outputs.loss if labels else outputs[0].square().sum()
    loss.backward()
    tensors = [out for out in outputs if isinstance(out, torch.Tensor)]
    shown = [t[mask.bool()] if t.shape[:2] == mask.shape else t for t in tensors]
    return [t.detach() for t in shown], {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@every_head
def test_what_padding_holds_reaches_no_result_and_no_gradient(cls):
    model = make(cls)
    ids, mask = tiny.batch(1, LENGTHS)
    results, grads = run(model, ids, mask)
    poisoned, others = run(model, ids.masked_fill(mask == 0, -(2**31)), mask)  # no embedding has such a row
    torch.manual_seed(6)
    embeds = model.bert if hasattr(model, "bert") else model
    given = embeds.embeddings.word_embeddings(ids).detach().masked_fill((mask == 0)[..., None], torch.nan)
    nan, of_nan = run(model, ids, mask, inputs_embeds=given)
    for first, second, third in zip(results, poisoned, nan, strict=True):
        assert torch.equal(first, second)
        assert torch.equal(first, third)
    for name, grad in grads.items():
        assert torch.equal(grad, others[name])
        if "word_embeddings" not in name:
            assert torch.equal(grad, of_nan[name])


@every_family
def test_a_longer_batch_changes_no_bit(family):
    model = make(models.BertForTokenClassification, family)
    ids, mask = tiny.batch(1, LENGTHS)
    results, grads = run(model, ids, mask)
    more, others = run(model, *(torch.nn.functional.pad(x, (0, 9)) for x in (ids, mask)))
    for first, second in zip(results, more, strict=True):
        assert torch.equal(first, second)
    for name, grad in grads.items():
        assert torch.equal(grad, others[name])


@every_head
def test_programs_that_compute_padding_give_the_same_and_do_not_recompile(cls):
    torch.compiler.reset()
    # layers of both kinds once, behind one head; one layer behind the others
    few = {"num_hidden_layers": 1, "layer_types": alternating_layers(1, 3)}
    changes = {} if cls is models.BertForMaskedLM else few
    model = make(cls, "modernbert" if cls is not models.BertForPreTraining else "bert", **changes)
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for longer in range(5):
        ids, mask = (torch.nn.functional.pad(x, (0, longer)) for x in tiny.batch(1, LENGTHS))
        torch.manual_seed(longer)
        labels = {
            name: torch.nn.functional.pad(label, (0, longer), value=2) if label.dim() == 2 else label
            for name, label in labels_of(cls, mask).items()
        }
        if cls is models.BertForTokenClassification:  # a loss in training mode, with gradients
            model.train()
        actual, expected = compiled(ids, mask, **labels), model(ids, mask, **labels)
        for got, want in zip(actual, expected, strict=True):
            if isinstance(want, torch.Tensor):
                torch.testing.assert_close(got, want)
    assert counter.frame_count <= 2  # the first length, and every other one


@every_head
def test_flops_do_not_grow_with_padding(cls):
    model = make(cls, "modernbert" if cls is not models.BertForPreTraining else "bert")
    counts = []
    for longer in (0, 20):
        ids, mask = tiny.batch(1, LENGTHS)
        ids, mask = (torch.nn.functional.pad(x, (0, longer)) for x in (ids, mask))
        with FlopCounterMode(display=False) as counter:
            run(model, ids, mask)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]
    dense_ids = torch.randint(3, 61, (3, 11))
    with FlopCounterMode(display=False) as counter:
        run(model, dense_ids, torch.ones_like(dense_ids))
    assert counts[0] < 0.8 * counter.get_total_flops()  # 22 tokens of 33


@every_head
@every_family
def test_a_row_of_padding_alone_gives_zeros_and_leaves_the_others_alone(cls, family):
    model = make(cls, family)
    ids, mask = tiny.batch(1, LENGTHS)
    results, _ = run(model, ids, mask)
    with_empty = [torch.cat((x, torch.full_like(x[:1], fill))) for x, fill in ((ids, 1), (mask, 0))]
    outputs = model(*with_empty)
    first = next(out for out in outputs if isinstance(out, torch.Tensor))
    assert first.isfinite().all()
    if cls is Bert or cls is models.BertForEmbedding:
        assert not first[3].any()
    loss = sum(
        out.square().sum() for out in outputs if isinstance(out, torch.Tensor) and out.abs().max() < 1e30
    )
    if isinstance(loss, torch.Tensor):
        loss.backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    shown = [out for out in outputs if isinstance(out, torch.Tensor)]
    kept = [out for out in results if out.dim()]
    for before, after in zip(kept, shown):
        after = after[:3]
        after = after[mask.bool()] if after.shape[:2] == mask.shape else after
        torch.testing.assert_close(after, before)


def test_batches_of_nothing():
    model = make(Bert)
    empty = model(torch.zeros(0, 5, dtype=torch.long), torch.zeros(0, 5))
    assert empty.last_hidden_state.shape == (0, 5, 32)
    assert empty.pooler_output.shape == (0, 32)
    padding = model(torch.zeros(2, 5, dtype=torch.long), torch.zeros(2, 5), output_attentions=True)
    assert not padding.last_hidden_state.any()
    assert padding.attentions[0].shape == (2, 4, 5, 5)


FORMS = {
    "dense": None,
    "packed": [[1, 1, 1, 0, 0], [0, 1, 1, 1, 1], [0, 0, 0, 0, 0], [1, 0, 0, 1, 0]],
}


@pytest.mark.parametrize("form", [*FORMS, "masked"])
def test_tokens_pack_pad_and_pool(form):
    mask = FORMS["packed" if form == "masked" else form]
    mask = torch.ones(4, 5) if mask is None else torch.tensor(mask)
    real = mask.bool()
    tokens = Tokens.of(None if form == "dense" else mask, 4, 5)
    if form == "masked":
        tokens = Tokens(4, 5, real)
    x = torch.randn(4, 5, 3, dtype=torch.float64, requires_grad=True)
    packed = tokens.pack(x)
    assert packed.shape == (int(real.sum()) if form != "masked" else 20, 3)
    assert torch.equal(tokens.pad(packed), x.masked_fill(~real[..., None], 0))
    assert torch.equal(tokens.lengths(x.device), real.sum(1))
    rows = [row[keep] for row, keep in zip(x, real)]
    zero = torch.zeros(3, dtype=torch.float64)
    expected = {
        "first": torch.stack([row[0] if len(row) else zero for row in rows]),
        "mean": torch.stack([row.mean(0) if len(row) else zero for row in rows]),
        "max": torch.stack([row.amax(0) if len(row) else zero for row in rows]),
    }
    for name, want in expected.items():
        got = getattr(tokens, name)(packed)
        torch.testing.assert_close(got, want)
        grads = [torch.autograd.grad(out.square().sum(), x, retain_graph=True)[0] for out in (got, want)]
        torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.parametrize("how", ["first", "sum", "mean", "max"])
def test_pooling_without_a_mask_stays_on_the_device_of_the_tokens(how):
    """Without a mask no tensor says where the tokens are; the meta device refuses operands on a CPU, as a GPU does."""
    pooled = getattr(Tokens.of(None, 2, 3), how)(torch.empty(6, 4, device="meta"))
    assert pooled.device.type == "meta"
    assert pooled.shape == (2, 4)


def test_hidden_states_that_nobody_asked_for_are_not_kept():
    model = make(Bert)
    first, alive = [], []
    model.layers[0].register_forward_hook(lambda module, args, out: first.append(weakref.ref(out[0])))
    model.layers[2].register_forward_hook(lambda module, args, out: alive.append(first[-1]() is not None))
    ids, mask = tiny.batch(1, LENGTHS)
    with torch.no_grad():
        model(ids, mask)
        model(ids, mask, output_hidden_states=True)
    assert alive == [False, True]


@every_head
def test_every_head_has_the_arguments_of_the_encoder(cls):
    """Written out in each, as a signature is what torch and trainers read."""
    wanted, found = (inspect.signature(part.forward).parameters for part in (Bert, cls))
    assert list(found)[:6] == list(wanted)[:6]
    assert {name: str(found[name]) for name in wanted} == {name: str(p) for name, p in wanted.items()}
    assert all(found[name].kind == p.kind for name, p in wanted.items())
