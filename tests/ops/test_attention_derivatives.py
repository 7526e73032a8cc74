"""Derivatives of `attention`: finite differences, second derivatives, tangents, transforms."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from attention_inputs import qkv
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import fastattn


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
    """Traced code sees the transform too: a tangent that the fused op drops would be lost silently."""
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
