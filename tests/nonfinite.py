"""Calls whose scores are not all finite, and keys that hold NaN where no query may see them; for every backend."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fastattn
from fastattn import reference
from fastattn.spec import accumulation_dtype
from numerics import (
    assert_each_within_rule,
    assert_within_rule,
    plain_in_any_order,
    terms_of_score_gradients,
)

Operands = dict[str, Tensor]  # query, key, value and options that are tensors
HEADS, ROWS, DIM = 2, 6, 8


@dataclass(frozen=True)
class Irregular:
    """A call some of whose scores are not finite. `spoil` changes the operands in place."""

    name: str
    spoil: Callable[[Operands], None]
    options: dict[str, Any] = field(default_factory=dict)
    bias: bool = False
    keys: int = 19
    one_score: bool = False  # every key but one is 0: dquery has one score's gradient, whose terms cancel

    @property
    def cancels(self) -> bool:
        """Whether dquery is a few terms that cancel: a single key's weight is 1 whatever its score."""
        return self.keys == 1 or self.one_score

    def __str__(self) -> str:
        return self.name

    def operands(self, dtype: torch.dtype, seed: int = 0) -> Operands:
        """Fresh operands (1, H, S, D)."""
        generator = torch.Generator().manual_seed(seed)
        sizes = {"query": ROWS, "key": self.keys, "value": self.keys}
        found = {n: torch.randn(1, HEADS, s, DIM, generator=generator).to(dtype) for n, s in sizes.items()}
        if self.bias:
            found["bias"] = torch.randn(ROWS, self.keys, generator=generator).to(dtype)
        self.spoil(found)
        return found


def setting(name: str, index: tuple[Any, ...], value: float) -> Callable[[Operands], None]:
    """Sets one element, or one slice, of an operand."""

    def spoil(operands: Operands) -> None:
        operands[name][index] = value

    return spoil


def overflowing(sign: float, first: int, end: int) -> Callable[[Operands], None]:
    """Query 2 times keys first .. end - 1 overflows to an infinity of this sign; its scores with others are 0."""

    def spoil(operands: Operands) -> None:
        query, key = operands["query"], operands["key"]
        largest = torch.finfo(query.dtype).max
        if query.dtype == torch.float16:  # whose products do not overflow float32
            operands["query"][:, :, 2] = sign * math.inf
            operands["key"][:, :, first:end] = key[:, :, first:end].abs() + 1
            return
        query[:, :, 2] = sign * largest
        key[:] = 0
        key[:, :, first:end] = 2 + torch.arange(end - first)[:, None] % 3

    return spoil


FIRST = (0, 0, 2, 0)  # an element of query 2 of one head
THIRD = (0, 0, 3, 1)  # an element of key 3
IRREGULAR = (
    *(
        Irregular(f"{value} query, {keys} keys", setting("query", FIRST, value), keys=keys)
        for value in (math.nan, math.inf, -math.inf)
        for keys in (1, 5, 16, 19)
    ),
    Irregular("query of NaN alone", setting("query", (0, 0, 2), math.nan), keys=5),
    *(Irregular(f"{value} key", setting("key", THIRD, value)) for value in (math.nan, math.inf, -math.inf)),
    Irregular("nan key, causal", setting("key", THIRD, math.nan), {"causal": "top_left"}, keys=ROWS),
    Irregular("nan query, causal", setting("query", FIRST, math.nan), {"causal": True}),
    Irregular("inf query, causal square", setting("query", FIRST, math.inf), {"causal": True}, keys=ROWS),
    Irregular("nan query, window", setting("query", FIRST, math.nan), {"window": (2, 1)}),
    Irregular("nan query, softcap", setting("query", FIRST, math.nan), {"softcap": 2.0}),
    Irregular("inf query, softcap", setting("query", (0, 0, 2), math.inf), {"softcap": 2.0}),
    Irregular("nan query, dropout", setting("query", FIRST, math.nan), {"dropout_p": 0.5, "dropout_seed": 1}),
    Irregular("nan query, sinks", setting("query", FIRST, math.nan), {"sinks": torch.tensor([0.5, -1.0])}),
    Irregular("nan query, mask", setting("query", FIRST, math.nan),
              {"mask": (torch.arange(ROWS * 19) % 3 > 0).view(ROWS, 19)}),
    Irregular("nan query that sees nothing", setting("query", FIRST, math.nan),
              {"mask": (torch.arange(ROWS) != 2)[:, None].expand(ROWS, 19)}),
    Irregular("nan query, lengths", setting("query", FIRST, math.nan), {"key_lengths": torch.tensor([7])}),
    Irregular("nan bias", setting("bias", (2, 3), math.nan), bias=True),
    Irregular("nan bias row", setting("bias", (2,), math.nan), bias=True, keys=5),
    Irregular("inf bias", setting("bias", (2, 3), math.inf), bias=True),
    Irregular("scores of +inf", overflowing(1.0, 0, 19)),
    Irregular("one score of +inf", overflowing(1.0, 4, 5), one_score=True),
    Irregular("scores of -inf", overflowing(-1.0, 0, 19)),
    Irregular("scores of -inf, causal", overflowing(-1.0, 0, 6), {"causal": True}, keys=9),
    Irregular("some scores of -inf", overflowing(-1.0, 4, 9)),
    Irregular("a block of -inf first", overflowing(-1.0, 0, 270), keys=300),
    Irregular("nan query, many keys", setting("query", FIRST, math.nan), keys=600),
    Irregular("nan key, many keys", setting("key", THIRD, math.nan), keys=600),
)  # fmt: skip


def upstream(*results: Tensor) -> list[Tensor]:
    """The gradients that come in from above to `results`, the same on every call."""
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in results]


def run(
    attend: Callable[..., Any], operands: Operands, options: dict[str, Any], **extra: Any
) -> dict[str, Tensor]:
    """out, lse, weights and the gradients of a number that all of them make."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in operands.items()}
    call = {**options, **({"bias": leaves["bias"]} if "bias" in leaves else {}), **extra}
    results = attend(*list(leaves.values())[:3], **call, return_lse=True, return_weights=True)
    out, lse, weights = (torch.where(r == -math.inf, 0, r).double() for r in results)
    dout, dlse = upstream(out, lse)
    total = (out * dout).sum() + (lse * dlse).sum() + weights.square().sum()
    grads = torch.autograd.grad(total, list(leaves.values()))
    found = dict(zip(("out", "lse", "weights"), (r.detach() for r in results)))
    return found | {f"d{name}": grad for name, grad in zip(leaves, grads)}


def assert_as_the_formula(
    actual: Sequence[Tensor], formula: Callable[[torch.dtype], Sequence[Tensor]], dtype: torch.dtype
) -> None:
    """NaN and infinities are where the formula in `dtype` has them, the rest is within the rule."""
    in_dtype, golden = formula(dtype), formula(torch.float64)
    holes = [~t.isfinite() for t in in_dtype]
    for a, w, hole in zip(actual, in_dtype, holes):
        torch.testing.assert_close(a[hole], w[hole], rtol=0, atol=0, equal_nan=True)

    def finite(results: Sequence[Tensor]) -> list[Tensor]:
        return [t.masked_fill(hole, 0) for t, hole in zip(results, holes)]

    plain = plain_in_any_order(lambda: finite(formula(dtype)), finite(golden))
    for i, three in enumerate(zip(finite(actual), plain, finite(golden))):
        assert_within_rule(*three, f"result {i}", dtype)


def _known(run: Callable[[], dict[str, Tensor]], unknown: dict[str, Tensor]) -> dict[str, Tensor]:
    """The results of `run` with 0 where they are not compared: there, no order of summation errs more than another."""
    return {name: result.masked_fill(unknown[name], 0) for name, result in run().items()}


def _terms(operands: Operands, golden: dict[str, Tensor]) -> dict[str, Tensor]:
    """The terms of dquery and dkey of rows that are not NaN."""
    rows = golden["lse"].isnan()
    weights = golden["weights"].masked_fill(rows[..., None], 0)
    query = operands["query"].masked_fill(rows[..., None], 0)
    dout, dlse = upstream(golden["out"], golden["lse"])
    terms = terms_of_score_gradients(
        query, operands["key"], operands["value"], weights, dout, dlse, 2 * weights
    )
    return dict(zip(("dquery", "dkey"), terms))


def check_irregular(
    case: Irregular, dtype: torch.dtype, *, exact: bool, samples: int = 1, **extra: Any
) -> None:
    """Rows with NaN, or nothing to see, where the formula has them in the dtype scores are kept in; the others within
    the rule.

    exact: whether gradients and weights are NaN nowhere else either. A kernel that works in tiles may also spoil, in
    a row that is NaN, the weights of keys that the row does not see, and with them those keys' gradients.
    samples: how many inputs, each judged by itself.
    """
    for seed in range(samples):
        operands = case.operands(dtype, seed)
        kept = {name: t.to(accumulation_dtype(dtype)) for name, t in operands.items()}
        pattern = run(reference.attention, kept, case.options)
        golden = run(reference.attention, {n: t.double() for n, t in operands.items()}, case.options)
        irregular = {n: ~(t.isfinite() & golden[n].isfinite()) for n, t in pattern.items()}
        known = partial(_known, partial(run, reference.attention, operands, case.options), irregular)
        plain = known()
        actual = run(fastattn.attention, operands, case.options, **extra)
        terms = _terms(operands, golden) if case.cancels else {}
        holes: dict[str, Tensor] = {}  # where results are not compared as numbers
        for name, value in actual.items():
            wanted = pattern[name]
            due = wanted.isnan()
            if name in (
                "dkey",
                "dvalue",
            ):  # of a key that a NaN row sees; the formula's 0 * NaN reaches the others too
                due = due & pattern["weights"].isnan().any(2)[..., None]
            if name in ("weights", "dvalue") and "dropout_p" in case.options:
                due = due & False  # a kernel may leave out what is dropped
            assert bool(value.isnan()[due].all()), f"{name}: finite where the formula gives NaN"
            if exact or name in ("out", "lse", "dquery"):
                assert not (value.isnan() & ~wanted.isnan()).any(), (
                    f"{name}: NaN where the formula gives none"
                )
            if name == "weights":  # whose values have tests of their own
                continue
            infinite = wanted.isinf()
            assert torch.equal(value[infinite].double(), wanted[infinite].double()), name
            holes[name] = ~(value.isfinite() & ~irregular[name] & plain[name].isfinite())

        def regular(results: dict[str, Tensor]) -> dict[str, Tensor]:
            return {n: results[n].masked_fill(hole, 0) for n, hole in holes.items()}  # noqa: B023

        judged = regular(actual), lambda: regular(known()), regular(golden)  # noqa: B023
        if dtype == torch.float64:
            torch.testing.assert_close(judged[0], judged[2], rtol=1e-10, atol=1e-11)
        else:
            of_terms = {n: t.masked_fill(holes[n], 0) for n, t in terms.items()}
            assert_each_within_rule(*judged, f"{case}, inputs {seed}", dtype, of_terms)
        rows = pattern["lse"].isnan()
        assert torch.equal(actual["out"].isnan().all(-1), rows)
        assert torch.equal(actual["weights"].isnan().any(-1), rows)


# Keys that nobody may see


@dataclass(frozen=True)
class Hiding:
    """A call of two sequences of 9 keys, of which keys 3 and 4 of the first and 7 and 8 of the second are hidden."""

    name: str
    options: Callable[[], dict[str, Any]]

    def __str__(self) -> str:
        return self.name


HIDDEN = torch.zeros(2, 9, dtype=torch.bool)
HIDDEN[0, 3:5] = HIDDEN[1, 7:] = True
MIXED = (torch.arange(2 * 2 * 5 * 9).view(2, 2, 5, 9) % 4 > 0) & ~HIDDEN[:, None, None]


def _bias(*, per_query: bool) -> Tensor:
    rows = torch.linspace(-1, 1, 5)[:, None] if per_query else torch.zeros(1, 1)
    return (torch.linspace(-1, 1, 9) + rows + torch.zeros(2, 1, 1, 1)).masked_fill(
        HIDDEN[:, None, None], -math.inf
    )


def _ids(device: str = "cpu") -> tuple[Tensor, Tensor]:
    of_keys = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 1]).expand(2, -1).masked_fill(HIDDEN, -1)
    return torch.tensor([[0, 0, 1, 1, -2]] * 2), of_keys


HIDINGS = (
    Hiding("mask of keys", lambda: {"mask": ~HIDDEN[:, None, None]}),
    Hiding("mask of pairs", lambda: {"mask": MIXED}),
    Hiding("expanded mask", lambda: {"mask": (~HIDDEN[:, None, None]).expand(2, 2, 5, 9)}),
    Hiding("mask, causal", lambda: {"mask": ~HIDDEN[:, None, None], "causal": True}),
    Hiding("mask, softcap", lambda: {"mask": MIXED, "softcap": 2.0}),
    Hiding("mask, dropout and sinks", lambda: {"mask": MIXED, "dropout_p": 0.3, "dropout_seed": 5,
                                               "sinks": torch.tensor([0.3, -0.2])}),
    Hiding("bias of keys", lambda: {"bias": _bias(per_query=False)}),
    Hiding("bias of pairs", lambda: {"bias": _bias(per_query=True)}),
    Hiding("segments", lambda: {"segment_ids": _ids()}),
    Hiding("segments, causal", lambda: {"segment_ids": _ids(), "causal": True}),
    Hiding("mask and bias, some each", lambda: {
        "mask": ~(HIDDEN & (torch.arange(9) % 2 == 0))[:, None, None],
        "bias": _bias(per_query=False).masked_fill((HIDDEN & (torch.arange(9) % 2 == 0))[:, None, None], 0.5)}),
    Hiding("mask and lengths", lambda: {"mask": ~(HIDDEN & (torch.arange(9) < 7))[:, None, None],
                                        "key_lengths": torch.tensor([9, 7])}),
)  # fmt: skip


def hidden_results(
    hiding: Hiding, dtype: torch.dtype, fill: float, *, weights: bool = True, attend: Callable[..., Any] | None = None,
    **extra: Any,
) -> dict[str, Tensor]:  # fmt: skip
    """Results and gradients when hidden keys and their values hold `fill`; queries of no segment hold it too."""
    generator = torch.Generator().manual_seed(5)
    query, key, value = (torch.randn(2, 2, s, DIM, generator=generator) for s in (5, 9, 9))
    options = hiding.options()
    for tensor in (key, value):
        tensor.masked_fill_(HIDDEN[:, None, :, None], fill)
    if "segment_ids" in options:
        query[:, :, 4] = fill
    leaves = {"query": query.to(dtype), "key": key.to(dtype), "value": value.to(dtype)}
    for name in ("bias", "sinks"):
        if name in options:
            leaves[name] = options.pop(name)
    for leaf in leaves.values():
        leaf.requires_grad_()
    call = {**options, **{n: t for n, t in leaves.items() if n in ("bias", "sinks")}, **extra}
    if weights:
        call["return_weights"] = True
    results = (attend or fastattn.attention)(*list(leaves.values())[:3], **call, return_lse=True)
    total = sum((torch.where(r == -math.inf, 0, r).double() ** 2).sum() for r in results)
    grads = torch.autograd.grad(total, list(leaves.values()))
    found = dict(zip(("out", "lse", "weights"), (r.detach() for r in results)))
    return found | {f"d{name}": grad for name, grad in zip(leaves, grads)}


def check_hidden(hiding: Hiding, dtype: torch.dtype, *poisons: float, **extra: Any) -> None:
    """Whatever hidden keys hold changes no bit of any result, and their gradients are 0."""
    clean = hidden_results(hiding, dtype, 0.0, **extra)
    for poison in poisons:
        poisoned = hidden_results(hiding, dtype, poison, **extra)
        for name, value in clean.items():
            assert not value.isnan().any(), (name, poison)
            assert torch.equal(poisoned[name], value), (name, poison)
        of_keys = HIDDEN[:, None, :, None]
        assert not (poisoned["dkey"] * of_keys).any(), poison
        assert not (poisoned["dvalue"] * of_keys).any(), poison
        if "dbias" in poisoned:
            assert not poisoned["dbias"].masked_fill(~HIDDEN[:, None, None], 0).any(), poison
