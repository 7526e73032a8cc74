"""What is counted and how."""

import math

import pytest
import torch
from tiny_lm import VOCAB, make_data, make_model

from fastattn.train.metrics import (
    Evaluation,
    count_targets,
    count_tokens,
    peak_flops,
    perplexity,
    training_flops,
)


def test_perplexity_is_the_exponential_without_overflow():
    assert Evaluation(2.0, 5).perplexity == pytest.approx(math.e**2)
    assert perplexity(1e4) == math.inf
    assert math.isnan(perplexity(math.nan))


def test_targets_are_labels_that_count():
    labels = torch.tensor([[5, 6, -100], [-100, 7, 8]])
    assert count_targets(labels, shifted=False) == 4
    assert count_targets(labels, shifted=True) == 3
    assert count_targets(torch.tensor([1, -100, 3]), shifted=True) == 2
    assert count_targets(torch.rand(4, 2), shifted=False) == 4


def test_tokens_leave_padding_out_where_a_mask_says_so():
    ids, labels = torch.zeros(2, 5, dtype=torch.long), torch.zeros(2, dtype=torch.long)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1] * 5])
    assert count_tokens({"input_ids": ids, "labels": labels, "attention_mask": mask}) == 8
    assert count_tokens({"input_ids": ids, "labels": labels}) == 10
    assert count_tokens({"pixels": ids, "labels": labels}) == 2


def test_flops_are_those_of_the_matrix_products_and_leave_no_trace():
    model, item = make_model(), make_data()[0]
    batch = {name: tensor[None] for name, tensor in item.items()}
    model.head.weight.grad = torch.ones_like(model.head.weight)
    before = torch.get_rng_state()
    assert training_flops(model, lambda: model(**batch).loss, batch) == 3 * 2 * 9 * 12 * VOCAB
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(model.head.weight.grad, torch.ones_like(model.head.weight))
    assert model.embed.weight.grad is None


@pytest.mark.parametrize(
    ("name", "dtype", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989e12),
        ("NVIDIA H100 PCIe", torch.bfloat16, 756e12),
        ("NVIDIA L40S", torch.float16, 362e12),
        ("NVIDIA L4", torch.float16, 121e12),
        ("NVIDIA A100-SXM4-80GB", torch.float32, None),
        ("Unheard-of 9000", torch.bfloat16, None),
    ],
)
def test_peak_is_known_by_name_or_not_at_all(monkeypatch, name, dtype, expected):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda"), dtype) == expected
    assert peak_flops(torch.device("cpu"), dtype) is None
