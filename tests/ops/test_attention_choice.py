"""`attention`: the choice of backend, what `explain` says of it, and bad input."""

from __future__ import annotations

import math

import pytest
import torch
from attention_inputs import qkv

import fastattn
from fastattn import backends


def test_explain_says_what_runs_and_why_not_the_others() -> None:
    q, k, v = qkv(grad=True)
    explanation = fastattn.explain(q, k, v, causal=True)
    assert explanation.backend == explanation.backward == "torch"
    assert [name for name, _ in explanation.refusals] == [name for name in backends.NAMES if name != "torch"]
    assert explanation.spec.causal == "bottom_right"


def test_explain_takes_the_arguments_of_attention() -> None:
    q, k, v = qkv()
    options = {
        "dropout_p": 0.1,
        "softcap": 3.0,
        "return_lse": True,
        "return_weights": "mean",
        "backend": "torch",
    }
    explanation = fastattn.explain(q, k, v, **options)  # type: ignore[arg-type]
    assert explanation.backward is None
    assert explanation.spec.features() == ("softcap", "dropout")
    assert explanation.tiles is not None
    assert "blockwise" in explanation.tiles


def test_explaining_changes_nothing_and_checks_as_the_call_does() -> None:
    q, k, v = qkv()
    state = torch.get_rng_state()
    fastattn.explain(q, k, v, dropout_p=0.1)
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ValueError, match="return_weights: got 'all'"):
        fastattn.explain(q, k, v, return_weights="all")


def test_a_named_backend_that_cannot_raises_its_reason() -> None:
    q, k, v = qkv(dtype=torch.float64)
    with pytest.raises(RuntimeError, match="backend='triton' cannot run this call: "):
        fastattn.attention(q, k, v, backend="triton")


def test_the_environment_forces_a_backend_loudly(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = qkv(dtype=torch.float64)
    monkeypatch.setenv("FASTATTN_BACKEND", "torch")
    with pytest.warns(RuntimeWarning, match="FASTATTN_BACKEND=torch forces"):
        fastattn.attention(q, k, v)
    monkeypatch.setenv("FASTATTN_BACKEND", "triton")
    with (
        pytest.raises(RuntimeError, match="backend='triton' cannot run this call"),
        pytest.warns(RuntimeWarning),
    ):
        fastattn.attention(q, k, v)
    assert fastattn.attention(q, k, v, backend="torch").shape == q.shape  # a name in the call stands
    with pytest.raises(RuntimeError, match=r"backend='triton' cannot run this call: a torch\.func transform"):
        torch.func.jvp(lambda q: fastattn.attention(q, k, v), (q,), (q,))
    monkeypatch.setenv("FASTATTN_BACKEND", "torch")
    refusals = dict(fastattn.explain(q, k, v).refusals)
    assert refusals.keys() == {*backends.NAMES} - {"torch"}
    assert set(refusals.values()) == {"FASTATTN_BACKEND=torch forces another"}
    monkeypatch.setenv("FASTATTN_BACKEND", "fastest")
    with pytest.raises(ValueError, match="FASTATTN_BACKEND='fastest' is not a backend"):
        fastattn.attention(q, k, v)


Q, K, V = torch.zeros(2, 4, 5, 8), torch.zeros(2, 2, 7, 8), torch.zeros(2, 2, 7, 8)
BAD = {
    "query of rank 3": ({"query": Q[0]}, ValueError, "query: got shape .4, 5, 8., needs 4 dimensions"),
    "query not a tensor": ({"query": [1.0]}, TypeError, "query: got list, needs a torch.Tensor"),
    "integers": ({"key": K.int()}, TypeError, "key: got torch.int32, needs float16"),
    "mixed dtypes": ({"value": V.half()}, TypeError, "value: got torch.float16, needs the query's torch.float32"),
    "mixed devices": ({"key": K.to("meta")}, ValueError, "key: got device meta, needs the query's cpu"),
    "batch": ({"key": K[:1]}, ValueError, "key: got batch size 1, needs the query's 2"),
    "head dim": ({"key": K[..., :4]}, ValueError, "key: got head dim 4, needs the query's 8"),
    "value heads": ({"value": V[:, :1]}, ValueError, "value: got 1 heads, needs the key's 2"),
    "value length": ({"value": V[:, :, :3]}, ValueError, "value: got length 3, needs the key's 7"),
    "heads do not divide": ({"query": Q[:, :3]}, ValueError, "key: got 2 heads, which does not divide the query's 3"),
    "head dim too large": ({"query": torch.zeros(2, 4, 5, 257), "key": torch.zeros(2, 2, 7, 257)}, ValueError,
                           "query: got head dim 257, needs 1 to 256"),
    "causal": ({"causal": "left"}, ValueError, "causal: got 'left', needs False, True"),
    "causal number": ({"causal": 1}, ValueError, "causal: got 1, needs False, True"),
    "window not a pair": ({"window": 3}, ValueError, "window: got 3, needs None or a pair"),
    "window negative": ({"window": (-2, 0)}, ValueError, r"window: got \(-2, 0\), needs sides of 0 or more"),
    "window float": ({"window": (1.5, 0)}, TypeError, r"window: got \(1.5, 0\), needs integers"),
    "float mask": ({"mask": torch.zeros(5, 7)}, TypeError, "mask: got torch.float32, needs bool"),
    "mask shape": ({"mask": torch.ones(3, 5, 7).bool()}, ValueError, r"mask: got shape \(3, 5, 7\), needs one that"),
    "mask rank": ({"mask": torch.ones(1, 1, 1, 5, 7).bool()}, ValueError, "mask: got shape"),
    "bool bias": ({"bias": torch.ones(5, 7).bool()}, TypeError, "bias: got torch.bool, needs a float"),
    "bias shape": ({"bias": torch.zeros(7, 5)}, ValueError, r"bias: got shape \(7, 5\), needs one that broadcasts"),
    "segments for unequal lengths": ({"segment_ids": torch.zeros(2, 5).int()}, ValueError, "segment_ids: got one"),
    "segments shape": ({"segment_ids": (torch.zeros(2, 5).int(), torch.zeros(2, 5).int())}, ValueError,
                       r"segment_ids: got shape \(2, 5\), needs \(2, 7\)"),
    "float segments": ({"segment_ids": (torch.zeros(2, 5), torch.zeros(2, 7))}, TypeError, "segment_ids: got torch.f"),
    "lengths shape": ({"key_lengths": torch.tensor([1, 2, 3])}, ValueError, r"key_lengths: got shape \(3,\), needs"),
    "negative lengths": ({"key_lengths": torch.tensor([-1, 2])}, ValueError, "key_lengths: got values from -1 to 2"),
    "lengths too long": ({"key_lengths": torch.tensor([1, 8])}, ValueError, "key_lengths: got values from 1 to 8"),
    "float lengths": ({"key_lengths": torch.tensor([1.0, 2.0])}, TypeError, "key_lengths: got torch.float32"),
    "slopes shape": ({"alibi_slopes": torch.zeros(3)}, ValueError, r"alibi_slopes: got shape \(3,\), needs \(4,\)"),
    "integer slopes": ({"alibi_slopes": torch.zeros(4).int()}, TypeError, "alibi_slopes: got torch.int32"),
    "sinks shape": ({"sinks": torch.zeros(2)}, ValueError, r"sinks: got shape \(2,\), needs \(4,\)"),
    "softcap zero": ({"softcap": 0.0}, ValueError, "softcap: got 0.0, needs a positive"),
    "softcap tensor": ({"softcap": torch.tensor(3.0)}, TypeError, "softcap: got Tensor, needs a number"),
    "dropout of one": ({"dropout_p": 1.0}, ValueError, "dropout_p: got 1.0, needs 0 <= p < 1"),
    "negative dropout": ({"dropout_p": -0.1}, ValueError, "dropout_p: got -0.1"),
    "nan dropout": ({"dropout_p": math.nan}, ValueError, "dropout_p: got nan"),
    "seed of two": ({"dropout_p": 0.1, "dropout_seed": torch.tensor([1, 2])}, TypeError, "dropout_seed: got torch.i"),
    "dropout None": ({"dropout_p": None}, TypeError, "dropout_p: got NoneType, needs a number"),
    "scale list": ({"scale": [1.0]}, TypeError, "scale: got list, needs a number"),
    "complex scale": ({"scale": 1j}, TypeError, "scale: got complex, needs a number"),
    "window of lists": ({"window": ([1], 2)}, TypeError, r"window: got \(\[1\], 2\), needs integers"),
    "unused seed": ({"dropout_seed": "x"}, TypeError, "dropout_seed: got str, needs an int"),
    "weights tensor": ({"return_weights": torch.zeros(2)}, ValueError, "return_weights: got tensor"),
    "lengths of 64 bits": ({"key_lengths": torch.tensor([2**32 + 3, 1])}, ValueError,
                           "key_lengths: got values from 1 to 4294967299, needs 32-bit integers"),
    "segments of 64 bits": ({"segment_ids": (torch.zeros(2, 5).long(), torch.full((2, 7), 2**32))}, ValueError,
                            "segment_ids: got values from 4294967296 to 4294967296, needs 32-bit"),
    "float seed": ({"dropout_p": 0.1, "dropout_seed": 1.5}, TypeError, "dropout_seed: got float"),
    "seed too large": ({"dropout_p": 0.1, "dropout_seed": 2**64}, ValueError, "dropout_seed: got 1844"),
    "scale": ({"scale": math.inf}, ValueError, "scale: got inf, needs a finite number"),
    "scale tensor": ({"scale": torch.tensor(1.0)}, TypeError, "scale: got Tensor"),
    "weights": ({"return_weights": "all"}, ValueError, "return_weights: got 'all', needs False, True or 'mean'"),
    "backend": ({"backend": "cudnn"}, ValueError, "backend: got 'cudnn', needs auto, cuda, triton or torch"),
}  # fmt: skip


@pytest.mark.parametrize("change", BAD)
def test_bad_input_is_refused_by_name(change: str) -> None:
    arguments, error, message = BAD[change]
    with pytest.raises(error, match=message):
        fastattn.attention(**{"query": Q, "key": K, "value": V, **arguments})


def test_nested_tensors_are_refused() -> None:
    nested = torch.nested.nested_tensor([torch.zeros(4, 5, 8), torch.zeros(4, 3, 8)], layout=torch.jagged)
    with pytest.raises(TypeError, match="query: got a nested tensor"):
        fastattn.attention(nested, K, V)
