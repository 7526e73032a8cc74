"""`softmax`: its contract against float64 on the torch backend, transforms, compilation, bad input."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from allocations import Allocations
from softmax_cases import SCALES, assert_hidden_as_in_the_reference, non_finite
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.library import opcheck

import fastattn
from fastattn import reference
from fastattn.backends.torch import softmax as torch_softmax
from numerics import assert_within_rule, plain_in_any_order

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    name: str
    shape: tuple[int, ...]
    dim: int = -1
    options: dict[str, Any] = field(default_factory=dict)
    mask: tuple[int, ...] | None = None  # its shape

    def __str__(self) -> str:
        return self.name


CASES = [
    Case("plain", (6, 33)),
    Case("log", (6, 33), options={"log": True}),
    Case("scale", (6, 33), options={"scale": 3.0}),
    Case("negative scale", (6, 33), options={"scale": -0.5, "log": True}),
    Case("one column", (5, 1)),
    Case("first dim", (9, 4, 5), 0, {"scale": 0.5}),
    Case("middle dim", (3, 9, 5), 1, {"log": True}),
    Case("causal", (2, 7, 11), options={"causal": True}),
    Case("causal, more rows than columns", (2, 11, 7), options={"causal": True}),
    Case("causal, over rows", (2, 11, 7), -2, {"causal": True, "log": True}),
    Case("causal, over neither", (4, 5, 6), 0, {"causal": True}),
    Case("mask", (2, 3, 7, 11), mask=(2, 1, 1, 11)),
    Case("mask of lower rank, log", (2, 3, 7, 11), options={"log": True, "scale": 2.0}, mask=(7, 11)),
    Case("everything", (2, 3, 9, 9), options={"log": True, "scale": 1.5, "causal": True}, mask=(3, 1, 9)),
    Case("everything, weights", (2, 3, 9, 9), 1, {"scale": 1.5, "causal": True}, mask=(3, 1, 9)),
]


def inputs_of(case: Case, dtype: torch.dtype) -> tuple[Tensor, dict[str, Any], Tensor]:
    x = torch.randn(case.shape).to(dtype)
    options = dict(case.options)
    if case.mask is not None:
        options["mask"] = torch.rand(case.mask) < 0.6
    return x, options, torch.randn(case.shape).to(dtype)


def run(
    function: Callable[..., Tensor], x: Tensor, dout: Tensor, dim: int, **options: Any
) -> tuple[Tensor, Tensor]:
    leaf = x.detach().requires_grad_()
    out = function(leaf, dim, **options)
    return out, torch.autograd.grad(out, leaf, dout.to(out.dtype))[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_error_rule(case: Case, dtype: torch.dtype) -> None:
    x, options, dout = inputs_of(case, dtype)
    actual = run(fastattn.softmax, x, dout, case.dim, **options)
    golden = run(reference.softmax, x.double(), dout.double(), case.dim, **options)
    formula = partial(run, reference.softmax, x, dout, case.dim, **options)
    plain = plain_in_any_order(formula, golden)
    for name, *results in zip(("out", "dx"), actual, plain, golden):
        assert results[0].dtype == dtype
        assert_within_rule(*results, name)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_blocks_change_nothing(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of single rows, of a few, and of everything."""
    x, options, dout = inputs_of(case, torch.float64)
    golden = run(reference.softmax, x, dout, case.dim, **options)
    for elements in (1, 40, 100, 2**20):
        monkeypatch.setitem(torch_softmax.BLOCK_ELEMENTS, "cpu", elements)
        for actual, expected in zip(run(fastattn.softmax, x, dout, case.dim, **options), golden):
            torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("limit", [1, 7, 12, 60, 61, 1000])
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_blocks_cover_everything_once_within_the_limit(dim: int, limit: int) -> None:
    tensor = torch.zeros(5, 4, 3).permute(2, 0, 1)
    for block in torch_softmax.blocks_of(tensor, dim, limit):
        assert tensor[block].shape[dim] == tensor.shape[dim]
        assert tensor[block].numel() <= max(limit, tensor.shape[dim])
        tensor[block] += 1
    assert bool((tensor == 1).all())


def test_plain_softmax_is_torchs() -> None:
    x = torch.randn(4, 5, 6)
    for dim in range(3):
        assert torch.equal(fastattn.softmax(x, dim), x.softmax(dim))
        assert torch.equal(fastattn.softmax(x, dim, log=True), x.log_softmax(dim))


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("how", ["mask", "-inf", "causal"])
def test_a_row_without_entries(how: str, log: bool) -> None:
    x = torch.randn(4, 3)
    options: dict[str, Any] = {"log": log}
    if how == "mask":
        options["mask"] = torch.tensor([True, False, True, True])[:, None]
    elif how == "causal":
        options["causal"] = True  # the first query stands before the first key
    else:
        x[1] = -math.inf
    row = 0 if how == "causal" else 1
    out, dx = run(fastattn.softmax, x, torch.ones(4, 3), -1, **options)
    assert bool((out[row] == (-math.inf if log else 0.0)).all())
    assert not dx[row].any()
    assert not out[2:].isnan().any()
    assert not dx.isnan().any()


@pytest.mark.parametrize("log", [False, True])
def test_what_a_mask_hides_never_matters(log: bool) -> None:
    x, dout = torch.randn(4, 6), torch.randn(4, 6)
    mask = torch.rand(4, 6) < 0.5
    clean = run(fastattn.softmax, x, dout, -1, mask=mask, log=log)
    poisoned = run(
        fastattn.softmax,
        x.masked_fill(~mask, math.nan),
        dout.masked_fill(~mask, math.nan),
        -1,
        mask=mask,
        log=log,
    )
    for a, b in zip(clean, poisoned):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_minus_infinity_is_hidden_before_scaling(dtype: torch.dtype) -> None:
    x = torch.tensor([-math.inf, 0.0, 1.0], dtype=dtype)
    expected = {-1.0: [0.0, 0.7310586, 0.2689414], 0.0: [0.0, 0.5, 0.5], 1.0: [0.0, 0.2689414, 0.7310586]}
    for scale, values in expected.items():
        torch.testing.assert_close(fastattn.softmax(x, scale=scale), torch.tensor(values).to(dtype))
        logs = fastattn.softmax(x, scale=scale, log=True)
        torch.testing.assert_close(logs, torch.tensor(values).log().to(dtype))


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("blocks", [1, 2**18])
def test_entries_that_are_not_finite(
    scale: float, log: bool, blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """-inf is hidden, +inf under a negative scale too, and NaN spreads over the rest of its row, not what is hidden."""
    monkeypatch.setitem(torch_softmax.BLOCK_ELEMENTS, "cpu", blocks)
    x, dout, options = non_finite(7)
    options |= {"scale": scale, "log": log}
    assert_hidden_as_in_the_reference(x, dout, run(fastattn.softmax, x, dout, -1, **options), **options)
    whole = {"mask": torch.ones_like(options["mask"]), "log": log, "scale": scale}
    x, dout = x[:, [0, 1, 2, 4]][:8], dout[:8, :4]
    actual = run(fastattn.softmax, x, dout, -1, scale=scale, log=log)
    assert_hidden_as_in_the_reference(x, dout, actual, **{**whole, "mask": whole["mask"][:8, :4]})


@pytest.mark.parametrize("log", [False, True])
def test_infinite_gradients_do_not_reach_what_is_hidden(log: bool) -> None:
    x, dout = torch.randn(3, 5), torch.randn(3, 5)
    x[:, 2] = -math.inf
    dout[0, 1], dout[1, 0], dout[2, 2] = math.inf, math.nan, math.nan
    _, dx = run(fastattn.softmax, x, dout, -1, log=log)
    assert not dx[:, 2].any()
    assert not dx[2].isnan().any()


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.filterwarnings("ignore:fastattn materialises the masked scores")
def test_derivatives_with_minus_infinity_under_a_negative_scale(log: bool) -> None:
    """Second derivatives, forward mode, vmap and the compiled call: as of the row without the entry."""
    kept = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)

    def whole(kept: Tensor) -> Tensor:
        x = torch.cat([kept[:, :1], torch.full_like(kept[:, :1], -math.inf), kept[:, 1:]], 1)
        return fastattn.softmax(x, scale=-0.7, log=log)[:, [0, 2, 3]]

    def without(kept: Tensor) -> Tensor:
        return reference.softmax(kept, scale=-0.7, log=log)

    assert gradcheck(whole, kept)
    assert gradgradcheck(whole, kept)
    tangent = torch.randn_like(kept)
    for transformed in (
        lambda f: torch.func.jvp(f, (kept,), (tangent,)),
        lambda f: torch.func.vmap(lambda row: f(row[None]))(kept),
        lambda f: torch.func.hessian(lambda row: f(row[None]).square().sum())(kept[0]),
        lambda f: torch.compile(f, fullgraph=True, backend="aot_eager")(kept),
    ):
        torch.testing.assert_close(transformed(whole), transformed(without))


def test_nan_in_a_row_stays_in_it() -> None:
    x = torch.randn(3, 4)
    x[1, 2] = math.nan
    out = fastattn.softmax(x)
    assert bool(out[1].isnan().all())
    assert not out[::2].isnan().any()


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (2, 0, 3)])
def test_empty(shape: tuple[int, ...]) -> None:
    for dim in range(len(shape)):
        out, dx = run(fastattn.softmax, torch.zeros(shape), torch.zeros(shape), dim, causal=True)
        assert out.shape == dx.shape == shape


def test_a_scalar() -> None:
    assert fastattn.softmax(torch.tensor(3.0)) == 1
    assert fastattn.softmax(torch.tensor(3.0), 0, log=True) == 0


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 1, 0), (0, 2, 1)])
@pytest.mark.parametrize("options", [{}, {"scale": 2.0, "causal": True}], ids=["whole", "blocks"])
def test_results_lie_in_memory_like_x(order: tuple[int, ...], options: dict[str, Any]) -> None:
    x = torch.randn(3, 4, 5).permute(order)
    for dim in range(3):
        out, dx = run(fastattn.softmax, x, torch.ones(x.shape), dim, **options)
        assert out.stride() == dx.stride() == x.stride()
        torch.testing.assert_close(out, reference.softmax(x.contiguous(), dim, **options))


def test_views_and_expanded_inputs() -> None:
    x = torch.randn(6, 8, 10)[::2, 1:6, ::3]
    torch.testing.assert_close(fastattn.softmax(x, scale=2.0), (2 * x).softmax(-1))
    x = torch.randn(4, 1, 5).expand(4, 3, 5)
    torch.testing.assert_close(fastattn.softmax(x, 0), x.softmax(0))


def test_a_wider_result() -> None:
    """What CUDA autocast asks of the op: float32 from 16-bit scores, their gradient in 16 bits."""
    x = torch.randn(4, 9).half()
    out = torch.ops.fastattn.softmax_fwd(x, None, 1, 2.0, False, False, torch.float32, "auto")
    torch.testing.assert_close(out, (2 * x.float()).softmax(-1))
    assert (
        torch.ops.fastattn.softmax_bwd(out, out, 1, 2.0, False, torch.float16, "auto").dtype == torch.float16
    )


def test_nothing_is_made_beyond_the_result() -> None:
    """Forward and backward allocate their results, and blocks."""
    x = torch.randn(64, 32, 1024)
    with Allocations() as made:
        out = torch.ops.fastattn.softmax_fwd(x, None, 2, 0.5, True, False, x.dtype, "torch")
        torch.ops.fastattn.softmax_bwd(out, out, 2, 0.5, False, x.dtype, "torch")
    block = torch_softmax.BLOCK_ELEMENTS["cpu"] * x.element_size()
    assert block < x.nbytes
    assert [size for size in made.sizes if size > block] == [x.nbytes, x.nbytes]


# Derivatives and transforms


def _options(log: bool) -> dict[str, Any]:
    return {"scale": 0.7, "causal": True, "mask": torch.tensor([True, True, False, True]), "log": log}


@pytest.mark.parametrize("log", [False, True])
def test_gradcheck_and_gradgradcheck(log: bool) -> None:
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    finite = fastattn.softmax(x, **_options(True)) > -math.inf

    def function(x: Tensor) -> Tensor:
        return fastattn.softmax(x, **_options(log)).where(finite, 0)

    assert gradcheck(function, x)
    assert gradgradcheck(function, x)


@pytest.mark.parametrize("log", [False, True])
def test_transforms_match_the_reference(log: bool) -> None:
    x, tangent = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(2, 3, 4, dtype=torch.float64)
    ours = lambda x: fastattn.softmax(x, **_options(log))  # noqa: E731
    theirs = lambda x: reference.softmax(x, **_options(log))  # noqa: E731
    with pytest.warns(RuntimeWarning, match=r"masked scores: a torch\.func transform"):
        torch.testing.assert_close(
            torch.func.jvp(ours, (x,), (tangent,)), torch.func.jvp(theirs, (x,), (tangent,))
        )
    torch.testing.assert_close(torch.func.vmap(ours)(x), theirs(x))
    with forward_ad.dual_level(), pytest.warns(RuntimeWarning, match="forward-mode AD"):
        dual = forward_ad.unpack_dual(ours(forward_ad.make_dual(x, tangent)))
    torch.testing.assert_close(dual.tangent, torch.func.jvp(theirs, (x,), (tangent,))[1])
    with pytest.raises(RuntimeError, match=r"backend='triton' cannot run this call: a torch\.func transform"):
        torch.func.vmap(lambda x: fastattn.softmax(x, backend="triton"))(x)


# As a torch op


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_opcheck(dim: int, log: bool) -> None:
    x = torch.randn(5, 4, 6).transpose(0, 1).requires_grad_()
    mask = torch.rand(4, 1, 6) < 0.8
    ops = torch.ops.fastattn
    opcheck(ops.softmax_fwd.default, (x, mask, dim, 0.5, False, log, x.dtype, "auto"))
    opcheck(ops.softmax_fwd.default, (x.detach(), None, dim, 1.0, False, log, torch.float64, "auto"))
    out = ops.softmax_fwd(x.detach(), None, dim, 0.5, True, False, x.dtype, "auto").requires_grad_()
    opcheck(ops.softmax_bwd.default, (x, out, dim, 0.5, log, x.dtype, "auto"))


def test_compile_without_breaks_or_recompiles_across_lengths() -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda x, m: fastattn.softmax(x, mask=m, causal=True, scale=0.5), fullgraph=True, backend=counter
    )
    for step, length in enumerate((5, 17, 300, 64)):
        x, mask = torch.randn(2, length, length, requires_grad=True), torch.rand(length, length) < 0.9
        out = compiled(x, mask)
        torch.testing.assert_close(out, reference.softmax(x, mask=mask, causal=True, scale=0.5))
        out.square().sum().backward()
        if step == 1:
            counter.frame_count = 0
    assert counter.frame_count == 0


def test_explain_and_the_choice_of_backend() -> None:
    x = torch.randn(4, 100)
    explanation = fastattn.explain_softmax(x, causal=True)
    assert explanation.backend == "torch"
    assert [name for name, _ in explanation.refusals] == ["cuda", "triton"]
    assert explanation.tiles is not None
    assert "torch's softmax" in explanation.tiles
    assert explanation.to_dict()["spec"]["columns"] == 128
    with pytest.raises(RuntimeError, match="backend='triton' cannot run this call: "):
        fastattn.softmax(x.double(), backend="triton")


X = torch.zeros(3, 4)
BAD = {
    "list": ({"x": [1.0]}, TypeError, "x: got list, needs a torch.Tensor"),
    "integers": ({"x": X.int()}, TypeError, "x: got torch.int32, needs a float dtype"),
    "dim": ({"dim": 2}, ValueError, "dim: got 2, needs -2 to 1 for 2 dimensions"),
    "dim type": ({"dim": 1.0}, TypeError, "dim: got float, needs an int"),
    "scale": ({"scale": math.inf}, ValueError, "scale: got inf, needs a finite number"),
    "scale type": ({"scale": torch.tensor(1.0)}, TypeError, "scale: got Tensor, needs a number"),
    "float mask": ({"mask": X}, TypeError, "mask: got torch.float32, needs bool"),
    "mask shape": ({"mask": torch.ones(4, 3).bool()}, ValueError, r"mask: got shape \(4, 3\), needs one that"),
    "mask rank": ({"mask": torch.ones(1, 3, 4).bool()}, ValueError, "mask: got shape"),
    "mask device": ({"mask": X.bool().to("meta")}, ValueError, "mask: got device meta, needs x's cpu"),
    "causal": ({"causal": "top_left"}, TypeError, "causal: got 'top_left', needs True or False"),
    "causal rank": ({"x": X[0], "causal": True}, ValueError, r"causal: got True for shape \(4,\), needs at least 2"),
    "log": ({"log": 1}, TypeError, "log: got 1, needs True or False"),
    "backend": ({"backend": "cudnn"}, ValueError, "backend: got 'cudnn', needs auto, cuda, triton or torch"),
}  # fmt: skip


@pytest.mark.parametrize("change", BAD)
def test_bad_input_is_refused_by_name(change: str) -> None:
    arguments, error, message = BAD[change]
    with pytest.raises(error, match=message):
        fastattn.softmax(**{"x": X, **arguments})
