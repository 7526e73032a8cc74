"""`attention`: what holds on any backend (properties, transforms, compilation, choice of backend, bad input)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from contract import CASES, Case, Inputs
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.library import opcheck

import fastattn
from fastattn import backends
from fastattn.ops.arguments import call_arguments


def qkv(
    *, b: int = 2, h: int = 4, hkv: int = 4, sq: int = 9, sk: int = 11, d: int = 8, dv: int = 8,
    dtype: torch.dtype = torch.float32, grad: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    shapes = ((b, h, sq, d), (b, hkv, sk, d), (b, hkv, sk, dv))
    q, k, v = (torch.randn(shape, dtype=dtype, requires_grad=grad) for shape in shapes)
    return q, k, v


# Properties


@pytest.mark.parametrize("softcap", [None, 2.0], ids=["fused", "blockwise"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_nothing_beyond_the_lengths_matters(softcap: float | None, poison: float) -> None:
    q, k, v = qkv(sk=40)
    lengths = torch.tensor([0, 23])

    def run(fill: float) -> list[Tensor]:
        k2, v2 = k.clone(), v.clone()
        for b, n in enumerate(lengths.tolist()):
            k2[b, :, n:], v2[b, :, n:] = fill, fill
        leaves = [t.requires_grad_() for t in (q.clone(), k2, v2)]
        out, lse, weights = fastattn.attention(
            *leaves, key_lengths=lengths, softcap=softcap, return_lse=True, return_weights=True
        )
        return [
            out,
            lse,
            weights,
            *torch.autograd.grad(out.sum() + lse[1].sum() + weights.square().sum(), leaves),
        ]

    for clean, poisoned in zip(run(0.0), run(poison)):
        assert torch.equal(clean, poisoned)
    dk, dv = run(poison)[4:]
    assert not dk[0].any()
    assert not dv[0].any()
    assert not dk[1, :, 23:].any()
    assert not dv[1, :, 23:].any()


def test_rows_that_see_nothing_ignore_their_lse_gradient() -> None:
    q, k, v = qkv(grad=True)
    mask = torch.ones(9, 11, dtype=torch.bool)
    mask[4] = False
    out, lse = fastattn.attention(q, k, v, mask=mask, return_lse=True)
    assert not out[:, :, 4].any()
    assert bool((lse[:, :, 4] == -math.inf).all())
    dlse = torch.ones_like(lse)
    dlse[:, :, 4] = math.nan
    grads = torch.autograd.grad((out, lse), (q, k, v), (torch.ones_like(out), dlse))
    assert all(not g.isnan().any() for g in grads)
    assert not grads[0][:, :, 4].any()


def test_a_sink_alone_gives_zero_out_and_its_own_lse() -> None:
    q, k, v = qkv()
    sinks = torch.randn(4)
    out, lse = fastattn.attention(
        q, k, v, sinks=sinks, mask=torch.zeros(9, 11, dtype=torch.bool), return_lse=True
    )
    assert not out.any()
    torch.testing.assert_close(lse, sinks[:, None].expand(2, 4, 9))


@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}], ids=["fused", "blockwise"])
def test_lse_merges_partial_results(options: dict[str, Any]) -> None:
    """softmax over all keys = the parts over disjoint keys, weighted by exp(lse - total): what ring attention needs."""
    q, k, v = qkv(sk=64, dtype=torch.float64)
    whole, total = fastattn.attention(q, k, v, **options, return_lse=True)
    parts = [
        fastattn.attention(q, k[:, :, s], v[:, :, s], **options, return_lse=True)
        for s in (slice(0, 20), slice(20, 64))
    ]
    lses = torch.stack([lse for _, lse in parts])
    torch.testing.assert_close(torch.logsumexp(lses, 0), total)
    torch.testing.assert_close(sum(out * torch.exp(lse - total)[..., None] for out, lse in parts), whole)


def test_order_of_keys_does_not_matter() -> None:
    q, k, v = qkv(sk=300, dtype=torch.float64)
    order = torch.randperm(300)
    torch.testing.assert_close(
        fastattn.attention(q, k[:, :, order], v[:, :, order]), fastattn.attention(q, k, v)
    )


@pytest.mark.parametrize(
    "name", ["plain", "causal", "window both sides", "mask of rank 2", "softcap", "grouped heads"]
)
def test_a_batch_changes_nothing_bitwise(name: str) -> None:
    case = next(case for case in CASES if case.name == name)
    inputs = Inputs.of(case, torch.float32)
    q, k, v = (t.requires_grad_() for t in inputs.operands.values())
    both = fastattn.attention(q, k, v, **inputs.options)
    dout = torch.randn_like(both)
    grads = torch.autograd.grad(both, (q, k, v), dout)
    for b in range(2):
        leaves = [t[b : b + 1].detach().requires_grad_() for t in (q, k, v)]
        one = fastattn.attention(*leaves, **inputs.options)
        assert torch.equal(one, both[b : b + 1])
        for single, batched in zip(torch.autograd.grad(one, leaves, dout[b : b + 1]), grads):
            assert torch.equal(single, batched[b : b + 1])


@pytest.mark.parametrize("options", [{"causal": True}, {"sinks": torch.tensor([0.5, -1.0, 2.0])}], ids=str)
def test_a_batch_changes_nothing_bitwise_whatever_the_number_of_rows(options: dict[str, Tensor]) -> None:
    """Vectors of a processor end elsewhere in a batch than in one of its sequences."""
    for seqlen_q in range(1, 40, 3):
        q, k, v = torch.randn(3, 3, seqlen_q, 16), *torch.randn(2, 3, 3, seqlen_q + 40, 16).unbind()
        both = fastattn.attention(q, k, v, **options, return_lse=True)
        for b in range(3):
            one = fastattn.attention(*(t[b : b + 1] for t in (q, k, v)), **options, return_lse=True)
            for single, batched in zip(one, both):
                assert torch.equal(single, batched[b : b + 1])


@pytest.mark.parametrize("case", CASES[::4], ids=str)
def test_bitwise_deterministic(case: Case) -> None:
    inputs = Inputs.of(case, torch.float32)
    first, second = (inputs.run(fastattn.attention, torch.float32) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (2, 0, 1, 3), (1, 0, 2, 3)])
@pytest.mark.parametrize("softcap", [None, 2.0], ids=["fused", "blockwise"])
def test_results_lie_in_memory_like_their_tensors(order: tuple[int, ...], softcap: float | None) -> None:
    sizes = (2, 4, 9, 8)
    back = [order.index(dim) for dim in range(4)]

    def permuted() -> Tensor:
        return torch.randn([sizes[dim] for dim in order]).permute(back).requires_grad_()

    q, k, v = permuted(), permuted(), permuted()
    out, lse = fastattn.attention(q, k, v, softcap=softcap, return_lse=True)
    assert out.stride() == q.stride()
    assert lse.is_contiguous()
    for leaf, grad in zip((q, k, v), torch.autograd.grad(out.sum(), (q, k, v))):
        assert grad.stride() == leaf.stride()
    expected = fastattn.attention(q.contiguous(), k.contiguous(), v.contiguous(), softcap=softcap)
    torch.testing.assert_close(out, expected)


def test_views_of_packed_projections() -> None:
    """Slices of one (B, S, 3, H, D) tensor, as GPT-2 makes them, need no copy and give the same."""
    packed = torch.randn(2, 9, 3, 4, 8)
    q, k, v = (packed[:, :, i].transpose(1, 2) for i in range(3))
    expected = fastattn.attention(q.contiguous(), k.contiguous(), v.contiguous(), causal=True)
    torch.testing.assert_close(fastattn.attention(q, k, v, causal=True), expected)


def test_expanded_heads() -> None:
    q, k, v = qkv(dtype=torch.float64)
    expanded = k[:, :1].expand(-1, 4, -1, -1)
    torch.testing.assert_close(
        fastattn.attention(q, expanded, v), fastattn.reference.attention(q, expanded, v)
    )


@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}], ids=["fused", "blockwise"])
def test_a_last_stride_other_than_one(options: dict[str, Any]) -> None:
    leaves = [torch.randn(2, 4, 8, 9, dtype=torch.float64).mT.requires_grad_() for _ in range(3)]
    dout = torch.randn(2, 4, 8, 9, dtype=torch.float64).mT
    results = []
    for attend in (fastattn.attention, fastattn.reference.attention):
        out = attend(*leaves, causal=True, **options)
        results.append((out, *torch.autograd.grad(out, leaves, dout)))
    for actual, expected in zip(*results):
        torch.testing.assert_close(actual, expected)


# Weights and dropout


@pytest.mark.parametrize("case", [c for c in CASES if c.batch], ids=str)
@pytest.mark.parametrize("mean", [False, True], ids=["per head", "mean"])
def test_weights_and_their_gradient(case: Case, mean: bool) -> None:
    inputs = Inputs.of(case, torch.float64)
    kind = "mean" if mean else True
    results = []
    for attend in (fastattn.attention, fastattn.reference.attention):
        leaves = {n: t.detach().requires_grad_() for n, t in inputs.operands.items()}
        options = dict(inputs.options)
        for name in ("bias", "alibi_slopes"):
            if name in options:
                options[name] = leaves[name] = options[name].double().requires_grad_()
        out, lse, weights = attend(
            leaves["query"], leaves["key"], leaves["value"], **options, return_lse=True, return_weights=kind
        )
        torch.manual_seed(5)
        loss = (out * torch.randn(out.shape)).sum() + (weights * torch.randn(weights.shape)).sum()
        loss = loss + lse.masked_fill(lse == -math.inf, 0).sum()
        grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        results.append((weights, *grads))
    for actual, expected in zip(*results):
        if actual is None or expected is None:
            assert all(g is None or not g.any() for g in (actual, expected))
            continue
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_weights_multiply_the_values() -> None:
    q, k, v = qkv(dtype=torch.float64)
    out, weights = fastattn.attention(
        q, k, v, causal=True, dropout_p=0.4, dropout_seed=3, return_weights=True
    )
    torch.testing.assert_close(weights @ v, out)
    _, mean = fastattn.attention(q, k, v, causal=True, dropout_p=0.4, dropout_seed=3, return_weights="mean")
    torch.testing.assert_close(mean, weights.mean(1))


def test_dropout_seeds() -> None:
    q, k, v = qkv()

    def run(seed: int | Tensor | None) -> Tensor:
        return fastattn.attention(q, k, v, dropout_p=0.5, dropout_seed=seed)

    assert torch.equal(run(5), run(torch.tensor([5])))
    assert torch.equal(run(5), run(torch.tensor(5)))
    assert torch.equal(run(2**64 - 1), run(-1))
    assert not torch.equal(run(5), run(6))
    torch.manual_seed(1)
    first, second = run(None), run(None)
    torch.manual_seed(1)
    assert torch.equal(run(None), first)
    assert not torch.equal(first, second)


# Dtypes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(dtype: torch.dtype) -> None:
    q, k, v = qkv(grad=True)
    with torch.autocast("cpu", dtype):
        out = fastattn.attention(q, k, v.to(torch.float16))
    assert out.dtype == dtype
    torch.testing.assert_close(out, fastattn.attention(q.to(dtype), k.to(dtype), v.half().to(dtype)))
    assert torch.autograd.grad(out.sum(), q)[0].dtype == torch.float32


@pytest.mark.parametrize("softcap", [None, 2.0], ids=["fused", "blockwise"])
def test_autocast_stops_at_the_op(softcap: float | None) -> None:
    """What is kept in float32 outside autocast is kept in float32 inside it, forward, backward and transformed."""
    q, k, v = qkv(sq=40, sk=300, dtype=torch.bfloat16, grad=True)

    def run() -> list[Tensor]:
        out, lse, weights = fastattn.attention(q, k, v, softcap=softcap, return_lse=True, return_weights=True)
        results = [out, lse, weights, *torch.autograd.grad(out.sum() + lse.sum() + weights.sum(), (q, k, v))]
        return [*results, torch.func.vmap(lambda q: fastattn.attention(q, k, v, return_lse=True)[1])(q[None])]

    outside = run()
    with torch.autocast("cpu", torch.bfloat16):
        inside = run()
    for a, b in zip(inside, outside):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def test_autocast_leaves_float64_alone() -> None:
    q, k, v = qkv(dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert fastattn.attention(q, k, v).dtype == torch.float64


@pytest.mark.parametrize("bias_dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_bias_of_another_dtype_keeps_it(bias_dtype: torch.dtype) -> None:
    q, k, v = qkv(dtype=torch.bfloat16)
    bias = torch.randn(4, 9, 11, dtype=bias_dtype, requires_grad=True)
    out = fastattn.attention(q, k, v, bias=bias)
    (dbias,) = torch.autograd.grad(out.sum(), bias)
    assert (dbias.dtype, dbias.shape) == (bias_dtype, bias.shape)


# Transforms and higher derivatives


def _all_options() -> tuple[list[Tensor], Callable[..., tuple[Tensor, ...]]]:
    q, k, v = qkv(b=1, h=2, hkv=1, sq=3, sk=4, d=3, dv=2, dtype=torch.float64, grad=True)
    bias = torch.randn(2, 1, 4, dtype=torch.float64, requires_grad=True)
    slopes = torch.rand(2, dtype=torch.float64).requires_grad_()
    sinks = torch.randn(2, dtype=torch.float64, requires_grad=True)

    def attend(
        q: Tensor, k: Tensor, v: Tensor, bias: Tensor, slopes: Tensor, sinks: Tensor
    ) -> tuple[Tensor, ...]:
        return fastattn.attention(
            q, k, v, causal=True, bias=bias, alibi_slopes=slopes, sinks=sinks, softcap=2.0, dropout_p=0.3,
            dropout_seed=1, return_lse=True, return_weights=True,
        )  # fmt: skip

    return [q, k, v, bias, slopes, sinks], attend


def test_gradcheck() -> None:
    leaves, attend = _all_options()
    assert gradcheck(attend, leaves)


def test_gradgradcheck() -> None:
    leaves, attend = _all_options()
    with pytest.warns(RuntimeWarning, match="second derivative"):
        assert gradgradcheck(attend, leaves)


def test_second_derivative_when_query_key_and_value_are_one_tensor() -> None:
    x = torch.randn(1, 2, 4, 3, dtype=torch.float64, requires_grad=True)
    with pytest.warns(RuntimeWarning, match="second derivative"):
        assert gradgradcheck(lambda x: fastattn.attention(x, x, x, causal=True), (x,))


def test_jvp_matches_the_reference() -> None:
    q, k, v = qkv(dtype=torch.float64)
    tangents = tuple(torch.randn_like(t) for t in (q, k, v))
    expected = torch.func.jvp(lambda *a: fastattn.reference.attention(*a, causal=True), (q, k, v), tangents)[
        1
    ]
    with pytest.warns(RuntimeWarning, match=r"torch\.func transform"):
        actual = torch.func.jvp(lambda *a: fastattn.attention(*a, causal=True), (q, k, v), tangents)[1]
    torch.testing.assert_close(actual, expected)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t, dt) for t, dt in zip((q, k, v), tangents)]
        with pytest.warns(RuntimeWarning, match="forward-mode AD"):
            out = fastattn.attention(*duals, causal=True)
        tangent = forward_ad.unpack_dual(out).tangent
    torch.testing.assert_close(tangent, expected)


def test_vmap_of_grad_matches_the_reference() -> None:
    q, k, v = (torch.randn(3, 2, 4, s, 8, dtype=torch.float64) for s in (5, 6, 6))

    def per_sample(attend: Callable[..., Tensor]) -> Tensor:
        loss = lambda q, k, v: attend(q, k, v, causal=True).square().sum()  # noqa: E731
        return torch.func.vmap(torch.func.grad(loss))(q, k, v)

    with pytest.warns(RuntimeWarning, match=r"torch\.func transform"):
        actual = per_sample(fastattn.attention)
    torch.testing.assert_close(actual, per_sample(fastattn.reference.attention))


def test_vmap_over_seeds() -> None:
    q, k, v = qkv(b=1)
    seeds = torch.arange(3)
    run = lambda seed: fastattn.attention(q, k, v, dropout_p=0.5, dropout_seed=seed)  # noqa: E731
    with pytest.warns(RuntimeWarning, match=r"torch\.func transform"):
        batched = torch.func.vmap(run)(seeds)
    for seed, out in zip(seeds, batched):
        torch.testing.assert_close(out, run(seed))


TRANSFORMED: dict[str, Callable[[Callable[..., Tensor]], Callable[[Tensor, Tensor, Tensor], Tensor]]] = {
    "vmap": lambda attend: torch.func.vmap(attend),
    "grad": lambda attend: torch.func.grad(lambda q, k, v: attend(q[0], k[0], v[0]).square().sum()),
    "vmap of grad": lambda attend: torch.func.vmap(
        torch.func.grad(lambda q, k, v: attend(q, k, v).square().sum())
    ),
    "jvp": lambda attend: lambda q, k, v: torch.func.jvp(lambda q: attend(q[0], k[0], v[0]), (q,), (q,))[1],
}


@pytest.mark.parametrize("name", TRANSFORMED)
def test_compiled_transforms(name: str) -> None:
    """Traced code sees the transform too: a tangent that the fused op lost would be lost without a word."""
    torch._dynamo.reset()
    q, k, v = (torch.randn(3, 2, 4, s, 8) for s in (5, 6, 6))
    compiled = torch.compile(TRANSFORMED[name](fastattn.attention), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), TRANSFORMED[name](fastattn.reference.attention)(q, k, v))


def test_compiled_code_keeps_tangents() -> None:
    torch._dynamo.reset()
    q, k, v = qkv()
    expected = torch.func.jvp(lambda q: fastattn.reference.attention(q, k, v), (q,), (q,))[1]
    compiled = torch.compile(lambda q: fastattn.attention(q, k, v), backend="aot_eager")
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(compiled(forward_ad.make_dual(q, q))).tangent
    torch.testing.assert_close(tangent, expected)


def test_a_named_kernel_refuses_transforms() -> None:
    q, k, v = qkv()
    with pytest.raises(RuntimeError, match=r"backend='triton' cannot run this call: a torch\.func transform"):
        torch.func.jvp(lambda q: fastattn.attention(q, k, v, backend="triton"), (q,), (q,))


# As a torch op

OPCHECK_OPTIONS = {
    "plain": {},
    "masked": {"causal": True, "window": (3, None), "mask": torch.ones(9, 11, dtype=torch.bool)},
    "ragged": {"key_lengths": torch.tensor([3, 11]),
               "segment_ids": (torch.zeros(2, 9).int(), torch.zeros(2, 11).int())},
    "differentiable": {
        "bias": torch.randn(4, 9, 11, requires_grad=True), "sinks": torch.randn(4, requires_grad=True),
        "alibi_slopes": torch.rand(4).requires_grad_(), "dropout_p": 0.2, "dropout_seed": 3, "softcap": 2.0,
    },
}  # fmt: skip


@pytest.mark.parametrize("view", ["permuted", "expanded", "transposed"])
def test_opcheck_of_a_bias_in_any_layout(view: str) -> None:
    """The gradient's strides are what tracing was told, so that compiled code may rely on them."""
    bias = {
        "permuted": torch.randn(9, 11, 4).permute(2, 0, 1)[None],
        "expanded": torch.randn(1, 1, 9, 11).expand(2, 4, 9, 11),
        "transposed": torch.randn(2, 4, 11, 9).mT,
    }[view].requires_grad_()
    slopes = torch.rand(4, 2).T.requires_grad_()
    args = call_arguments(*qkv(grad=True), bias=bias, alibi_slopes=slopes)
    opcheck(torch.ops.fastattn.attention_fwd.default, (*args, "auto"))
    detached = tuple(a.detach() if isinstance(a, Tensor) else a for a in args)
    out, lse = torch.ops.fastattn.attention_fwd(*detached, "auto")
    needs = [True] * 5 + [False]
    opcheck(torch.ops.fastattn.attention_bwd.default, (out, None, out, lse, *detached, needs, "auto"))


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("options", OPCHECK_OPTIONS.values(), ids=OPCHECK_OPTIONS)
def test_opcheck(options: dict[str, Any], layout: str) -> None:
    q, k, v = qkv(hkv=2, dv=6, grad=True)
    if layout == "bshd":
        q = torch.randn(2, 9, 4, 8).transpose(1, 2).requires_grad_()
    args = call_arguments(q, k, v, **options)
    ops = torch.ops.fastattn
    opcheck(ops.attention_fwd.default, (*args, "auto"))
    detached = tuple(a.detach() if isinstance(a, Tensor) else a for a in args)
    out, lse = ops.attention_fwd(*detached, "auto")
    needs = [True] * 3 + ["bias" in options, "alibi_slopes" in options, "sinks" in options]
    opcheck(ops.attention_bwd.default, (out, lse, out, lse, *detached, needs, "auto"))
    opcheck(ops.attention_bwd.default, (out, None, out, lse, *detached, [False] * 6, "auto"))
    for mean in (False, True):
        opcheck(ops.attention_weights.default, (lse, *args, mean, "auto"))
        weights = ops.attention_weights(lse, *detached, mean, "auto")
        opcheck(ops.attention_weights_bwd.default, (weights, lse, *detached, mean, needs[:5], "auto"))


def test_compile_without_breaks_or_recompiles_across_lengths() -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, lengths: Tensor) -> tuple[Tensor, ...]:
        return fastattn.attention(
            q,
            k,
            v,
            causal=True,
            window=(50, 0),
            mask=mask,
            key_lengths=lengths,
            return_lse=True,
            return_weights="mean",
        )

    compiled = torch.compile(attend, fullgraph=True, backend=counter)
    for step, length in enumerate((5, 17, 1000, 64, 33)):
        leaves = [torch.randn(2, 4, length, 8, requires_grad=True) for _ in range(3)]
        extra = torch.rand(length, length) < 0.9, torch.tensor([length, 1])
        actual, expected = compiled(*leaves, *extra), attend(*leaves, *extra)
        for a, e in zip(actual, expected):
            torch.testing.assert_close(a, e)
        actual[0].sum().backward()
        if step == 1:
            counter.frame_count = (
                0  # static shapes first, dynamic ones with the second length: torch's own way
            )
    assert counter.frame_count == 0


def test_compiled_dropout_draws_anew() -> None:
    torch._dynamo.reset()
    q, k, v = qkv()
    compiled = torch.compile(
        lambda: fastattn.attention(q, k, v, dropout_p=0.5), fullgraph=True, backend="aot_eager"
    )
    assert not torch.equal(compiled(), compiled())


@pytest.mark.parametrize("option", ["scale", "softcap"])
def test_compiled_code_takes_any_number(option: str) -> None:
    torch._dynamo.reset()
    q, k, v = qkv()
    compiled = torch.compile(
        lambda number: fastattn.attention(q, k, v, **{option: number}), fullgraph=True, backend="aot_eager"
    )
    for number in (0.5, 0.7, 2.0, 3):
        torch.testing.assert_close(compiled(number), fastattn.attention(q, k, v, **{option: number}))


def test_export() -> None:
    class Attend(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return fastattn.attention(q, k, v, causal=True)

    length = torch.export.Dim("length")
    example = tuple(torch.randn(2, 4, 9, 8) for _ in range(3))
    program = torch.export.export(Attend(), example, dynamic_shapes=({2: length},) * 3)
    inputs = tuple(torch.randn(2, 4, 33, 8) for _ in range(3))
    torch.testing.assert_close(program.module()(*inputs), Attend()(*inputs))


def test_activation_checkpointing() -> None:
    q, k, v = qkv(grad=True)
    plain = torch.autograd.grad(fastattn.attention(q, k, v, dropout_p=0.3, dropout_seed=1).sum(), q)[0]
    out = torch.utils.checkpoint.checkpoint(
        lambda *a: fastattn.attention(*a, dropout_p=0.3, dropout_seed=1), q, k, v, use_reentrant=False
    )
    assert torch.equal(torch.autograd.grad(out.sum(), q)[0], plain)


def test_only_the_asked_for_gradients_are_computed() -> None:
    q, k, v = qkv()
    bias = torch.randn(4, 9, 11)
    k.requires_grad_()
    out = fastattn.attention(q, k, v, bias=bias)
    out.sum().backward()
    assert k.grad is not None
    assert q.grad is None
    assert bias.grad is None


# The choice of backend


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


# Bad input

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
