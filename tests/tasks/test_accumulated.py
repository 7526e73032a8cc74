"""A step over micro-batches of unequal sizes has the loss and the gradient of one batch, in every task."""

from __future__ import annotations

import itertools
from types import ModuleType
from typing import Any

import pytest
import task_cases
import torch
from training_cases import rows

from fastattn.data.encoding import InputTokenizer
from fastattn.data.records import Record
from fastattn.models import BertConfig
from fastattn.tasks import classify, masked_lm, qa, seq2seq, tag
from fastattn.train.distributed import Distributed
from fastattn.train.objective import Objective

SIZES: dict[str, Any] = {
    "vocab_size": 35, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
    "max_position_embeddings": 32, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
CPU = torch.device("cpu")
TASKS = {
    "classify": (classify, {}),
    "tag": (tag, {}),
    "qa": (qa, {}),
    "masked-lm": (masked_lm, {"mask_share": 0.5}),  # so that examples have unequal numbers of targets
    "masked-lm-nsp": (masked_lm, {"next_sentence": True, "max_length": 24, "mask_share": 0.5}),
    "seq2seq": (seq2seq, {}),
}


def _made(name: str, *, taught: bool) -> tuple[Any, Any]:
    """(model in float64, its data)."""
    task: ModuleType = TASKS[name][0]
    options = task.Options(**TASKS[name][1])
    tokenizer = InputTokenizer(task_cases.core(), mask_token="[MASK]")
    fields = rows(task.NAME) if task is not seq2seq else [{"source": "good film", "target": "bad film"}] * 3
    examples = task.examples_of([Record(f"line {i}", each) for i, each in enumerate(fields[:6], 1)], options)
    torch.manual_seed(0)
    model, teacher = (
        task.new_model(BertConfig(**{**SIZES, "hidden_size": width}), examples, options, tokenizer).double()
        for width in (16, 32)
    )
    given = {"teacher": (teacher, tokenizer)} if taught else {}
    return model.train(), task.training_set(model, tokenizer, examples, options, **given)


@pytest.mark.parametrize("taught", [False, True], ids=["labels", "teacher"])
@pytest.mark.parametrize("name", TASKS)
def test_micro_batches_give_the_gradient_of_one_batch(name: str, taught: bool) -> None:
    if taught and name == "classify":
        pytest.skip("a classifier's teacher is asked before the training")
    model, data = _made(name, taught=taught)
    torch.manual_seed(1)
    batch = {
        key: value.double() if value.is_floating_point() else value
        for key, value in data.collate([data[i] for i in range(min(6, len(data)))]).items()
    }
    count = len(batch["input_ids"])
    assert count >= 3
    found = []
    for cuts in ([0, count], [0, 1, count], [0, 1, 2, count]):
        parts = [{k: v[a:b] for k, v in batch.items()} for a, b in itertools.pairwise(cuts)]
        objective = Objective(model, model, CPU, torch.float32, Distributed(CPU), pytest.fail)
        model.zero_grad()
        loss, _ = objective.accumulate(parts)
        found.append((loss, [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    for loss, gradients in found[1:]:
        assert loss == pytest.approx(found[0][0])  # the sum of losses in float32
        torch.testing.assert_close(gradients, found[0][1])


def test_one_batch_keeps_its_bits() -> None:
    """The weight of the second part of a loss is exactly 1 then."""
    model, data = _made("masked-lm-nsp", taught=False)
    torch.manual_seed(1)
    batch = data.collate([data[i] for i in range(3)])
    plain = model(**batch).loss
    assert torch.equal(model(**batch, second_weight=torch.ones((), dtype=torch.float64)).loss, plain)
    loss, _ = Objective(model, model, CPU, torch.float32, Distributed(CPU), pytest.fail).accumulate([batch])
    assert loss == float(plain.detach().float())
