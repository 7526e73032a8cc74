"""What torch's `scaled_dot_product_attention` refuses, ours refuses as what torch raises, and by name."""

import pytest
import torch
import torch.nn.functional as F
from torch import zeros

import fastattn
from fastattn import scaled_dot_product_attention as sdpa

L, S, E = 5, 7, 8
BASE = {"query": zeros(2, 4, L, E), "key": zeros(2, 4, S, E), "value": zeros(2, 4, S, E)}


def every(change):
    """The same change to query, key and value."""
    return {name: change(tensor) for name, tensor in BASE.items()}


# (what is wrong, the name the message begins with)
BOTH = {
    "a mask that does not broadcast": ({"attn_mask": zeros(L + 1, S)}, "attn_mask"),
    "a mask with too many dimensions": ({"attn_mask": zeros(1, 2, 4, L, S)}, "attn_mask"),
    "a mask of integers": ({"attn_mask": zeros(L, S, dtype=torch.int32)}, "attn_mask"),
    "a complex mask": ({"attn_mask": zeros(L, S, dtype=torch.complex64)}, "attn_mask"),
    "a list as a mask": ({"attn_mask": [[1.0]]}, "attn_mask"),
    "dropout_p above 1": ({"dropout_p": 1.5}, "dropout_p"),
    "dropout_p below 0": ({"dropout_p": -0.5}, "dropout_p"),
    "dropout_p of NaN": ({"dropout_p": float("nan")}, "dropout_p"),
    "dropout_p as a string": ({"dropout_p": "a"}, "dropout_p"),
    "no dropout_p": ({"dropout_p": None}, "dropout_p"),
    "is_causal as an integer": ({"is_causal": 1}, "is_causal"),
    "is_causal as a string": ({"is_causal": "a"}, "is_causal"),
    "no is_causal": ({"is_causal": None}, "is_causal"),
    "enable_gqa as an integer": ({"enable_gqa": 1}, "enable_gqa"),
    "scale as a string": ({"scale": "a"}, "scale"),
    "scale as a tensor of a dimension": ({"scale": torch.tensor([0.3])}, "scale"),
    "a scale that requires grad": ({"scale": torch.tensor(0.3, requires_grad=True)}, "scale"),
    "a query of one dimension": ({"query": zeros(E)}, "query"),
    "a key of one dimension": ({"key": zeros(E)}, "key"),
    "a query of no dimension": ({"query": zeros(())}, "query"),
    "an integer query": ({"query": zeros(2, 4, L, E).int()}, "query"),
    "a bool query": ({"query": zeros(2, 4, L, E).bool()}, "query"),
    "integers throughout": (every(torch.Tensor.int), "query"),
    "complex throughout": (every(lambda t: t.to(torch.complex64)), "query"),
    "float8 throughout": (every(lambda t: t.to(torch.float8_e4m3fn)), "query"),
    "a key of another dtype": ({"key": zeros(2, 4, S, E).half()}, "key"),
    "a value of another dtype": ({"value": zeros(2, 4, S, E).double()}, "value"),
    "a query of another dtype": ({"query": zeros(2, 4, L, E).bfloat16()}, "key"),
    "a key on another device": ({"key": zeros(2, 4, S, E, device="meta")}, "key"),
    "a value on another device": ({"value": zeros(2, 4, S, E, device="meta")}, "value"),
    "a query on another device": ({"query": zeros(2, 4, L, E, device="meta")}, "key"),
    "batches that do not broadcast": ({"query": zeros(3, 4, L, E)}, "query, key, value"),
    "heads that do not broadcast": ({"query": zeros(2, 8, L, E)}, "query, key, value"),
    "heads that do not divide": ({"query": zeros(2, 6, L, E), "enable_gqa": True}, "query, key, value"),
    "value heads that do not divide": ({"value": zeros(2, 3, S, E), "enable_gqa": True}, "query, key, value"),
    "another head dim": ({"key": zeros(2, 4, S, E + 1)}, "key"),
    "no value": ({"value": None}, "value"),
    "a list as a key": ({"key": [1.0]}, "key"),
    "an array as a query": ({"query": BASE["query"].numpy()}, "query"),
}  # fmt: skip
# torch runs these, or does on some releases and devices
OURS = {
    "attn_mask and is_causal": ({"attn_mask": zeros(L, S), "is_causal": True}, "attn_mask"),
    "a mask on another device": ({"attn_mask": zeros(L, S, device="meta")}, "attn_mask"),
    "an infinite scale": ({"scale": float("inf")}, "scale"),
    "a scale beyond double": ({"scale": 10**400}, "scale"),
    "a value of another length": ({"value": zeros(2, 4, S + 1, E)}, "value"),
    "a head dim of 0": (every(lambda t: t[..., :0]), "query"),
    "a value head dim of 0": ({"value": zeros(2, 4, S, 0)}, "value"),
    "a head dim over 256": (every(lambda t: zeros(*t.shape[:-1], 300)), "query"),
    "an unknown backend": ({"backend": "nope"}, "backend"),
}  # fmt: skip


def raised_by(function, change):
    with pytest.raises(Exception) as caught:  # noqa: PT011
        function(**(BASE | change))
    return caught.value


def torchs_class(error):
    """The class that code written for torch catches; NotImplementedError is a RuntimeError."""
    return next(kind for kind in (RuntimeError, TypeError, ValueError) if isinstance(error, kind))


@pytest.mark.parametrize("case", BOTH)
def test_the_class_is_torchs(case):
    change, name = BOTH[case]
    expected, error = raised_by(F.scaled_dot_product_attention, change), raised_by(sdpa, change)
    assert isinstance(error, torchs_class(expected))
    assert isinstance(error, (ValueError, TypeError))
    assert str(error).startswith(f"{name}: got ")


@pytest.mark.parametrize("case", [case for case in BOTH if "backend" not in case])
def test_the_class_is_torchs_under_an_override(case):
    change, name = BOTH[case]
    expected = raised_by(F.scaled_dot_product_attention, change)
    with fastattn.sdpa_override() as override:
        error = raised_by(F.scaled_dot_product_attention, change)
        assert override.calls == 1
    assert isinstance(error, torchs_class(expected))
    assert str(error).startswith(f"{name}: got ")


@pytest.mark.parametrize("case", OURS)
def test_what_ours_alone_refuses_is_a_runtime_error_too(case):
    change, name = OURS[case]
    error = raised_by(sdpa, change)
    assert isinstance(error, RuntimeError)
    assert isinstance(error, (ValueError, TypeError))
    assert str(error).startswith(f"{name}: got ")


def test_a_nested_tensor_among_dense_ones():
    nested = torch.nested.nested_tensor([zeros(n, 4, E) for n in (3, 2)], layout=torch.jagged).transpose(1, 2)
    with pytest.raises(TypeError, match="query: got a nested tensor") as caught:
        sdpa(nested, BASE["key"], BASE["value"])
    assert isinstance(caught.value, RuntimeError)


@pytest.mark.parametrize("number", ["scale", "dropout_p"])
def test_tensors_without_dimensions_are_numbers(number):
    q, k = torch.randn(2, 4, L, E), torch.randn(2, 4, S, E)
    given = {"scale": 0.25, "dropout_p": 1.0}[number]
    for kind in (torch.float32, torch.float64):
        out = sdpa(q, k, k, **{number: torch.tensor(given, dtype=kind)})
        assert torch.equal(out, sdpa(q, k, k, **{number: given}))


def test_other_errors_stay_what_they_are(monkeypatch):
    from fastattn.ops import sdpa as module

    def interrupted(*args, **options):
        raise KeyError("from within")

    monkeypatch.setattr(module, "attention", interrupted)
    with pytest.raises(KeyError, match="from within"):
        sdpa(**BASE)
