"""The Hopper backward, executed on the CPU, against float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from fastattn import reference
from numerics import assert_within_rule

UNBOUNDED = 1 << 29
ELEMENTS = {torch.float16: "half_t", torch.bfloat16: "bfloat16_t"}

# name: (head_dim, batch, num_heads, num_kv_heads, seqlen_q, seqlen_k, options)
CASES: dict[str, tuple[int, int, int, int, int, int, dict[str, Any]]] = {
    "one tile": (64, 1, 1, 1, 128, 128, {}),
    "edges of every tile": (64, 1, 1, 1, 129, 193, {}),
    "one query": (64, 1, 1, 1, 1, 65, {}),
    "one key": (64, 1, 1, 1, 65, 1, {}),
    "causal": (64, 2, 1, 1, 200, 200, {"causal": True}),
    "causal, fewer queries": (64, 1, 1, 1, 70, 260, {"causal": True}),
    "causal, more queries": (64, 1, 1, 1, 260, 70, {"causal": True}),
    "causal top left": (64, 1, 1, 1, 70, 260, {"causal": "top_left"}),
    "window": (64, 1, 1, 1, 300, 280, {"window": (30, 17)}),
    "window to the left": (64, 1, 1, 1, 300, 300, {"window": (64, 0), "causal": True}),
    "grouped heads": (64, 2, 4, 2, 100, 150, {"causal": True}),
    "key lengths": (64, 3, 2, 1, 130, 200, {"key_lengths": [0, 77, 200]}),
    "key lengths, causal": (64, 2, 1, 1, 130, 200, {"key_lengths": [131, 5], "causal": True}),
    "key lengths, several blocks": (64, 1, 2, 1, 140, 450, {"key_lengths": [430]}),
    "key lengths, causal, several blocks": (64, 1, 2, 2, 140, 450, {"key_lengths": [430], "causal": True}),
    "softcap": (64, 1, 2, 1, 130, 140, {"softcap": 3.0, "causal": True}),
    "scale": (64, 1, 1, 1, 65, 66, {"scale": 0.3}),
    "small head": (40, 1, 2, 2, 130, 130, {"causal": True}),
    "128": (128, 1, 2, 1, 140, 270, {}),
    "128, causal": (128, 1, 1, 1, 257, 257, {"causal": True}),
    "128, softcap": (128, 1, 1, 1, 130, 150, {"softcap": 2.0}),
    "padded to 128": (72, 1, 1, 1, 65, 130, {"causal": True}),
    "256": (256, 1, 2, 1, 70, 140, {"causal": True}),
    "256, softcap": (256, 1, 1, 1, 33, 65, {"softcap": 2.0}),
    "padded to 256": (136, 1, 1, 1, 65, 33, {}),
}


class Grads(NamedTuple):
    query: Tensor
    key: Tensor
    value: Tensor


def emulate(
    library: Callable[..., None], q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor,
    dlse: Tensor | None, *, causal: bool | str = False, window: tuple[int, int] = (-1, -1),
    key_lengths: Tensor | None = None, cu_seqlens: tuple[Tensor, Tensor] | None = None, softcap: float = 0.0,
    scale: float | None = None, one_pass: bool = False, **schedule: Any,
) -> Grads:  # fmt: skip
    """The gradients by the kernels; tensors are (B, H, S, D), or (H, T, D) with cu_seqlens."""
    packed = cu_seqlens is not None
    heads = q.shape[-3], k.shape[-3]
    batch = len(cu_seqlens[0]) - 1 if cu_seqlens else q.shape[0]
    grads = Grads(*(torch.full_like(x, torch.nan) for x in (q, k, v)))
    rows = torch.zeros(1, dtype=torch.int64)
    library("padded_rows", rows, cu_seqlens[0] if cu_seqlens else None, batch, q.shape[-2])
    scratch = torch.full((2, (1 if packed else batch) * heads[0] * int(rows)), torch.nan)
    padded_dim = next(d for d in (64, 128, 256) if q.shape[-1] <= d)
    sums = torch.zeros(scratch[0].numel(), padded_dim) if one_pass else None
    semaphores = torch.zeros(scratch[0].numel() // 64, dtype=torch.int32) if one_pass else None
    ticket = torch.zeros(1, dtype=torch.int32) if one_pass else None
    strides = [
        (0 if packed else x.stride(0), x.stride(-3), x.stride(-2)) for x in (q, k, v, out, dout, *grads)
    ]
    left, right = (UNBOUNDED if side < 0 else side for side in window)
    sizes = torch.tensor(
        [batch, *heads, q.shape[-2], k.shape[-2], q.shape[-2], k.shape[-2], q.shape[-1], causal == "top_left",
         left, 0 if causal else right]
    )  # fmt: skip
    library(
        "attention_backward", q, k, v, out, dout, lse, dlse, *grads, scratch[0], scratch[1],
        sums, semaphores, ticket, torch.tensor(strides), sizes, *(cu_seqlens or (None, None)), key_lengths,
        float(scale or q.shape[-1] ** -0.5), float(softcap), **schedule,
    )  # fmt: skip
    if ticket is not None and not packed:
        assert int(ticket) == batch * heads[1] * -(
            -k.shape[-2] // 128
        )  # each block has taken one tile of keys
    return grads


def differentiated(
    inputs: tuple[Tensor, ...], dout: Tensor, dlse: Tensor | None, options: dict[str, Any]
) -> tuple[Tensor, Tensor, Grads]:
    """(out, lse, gradients) of the formula in the dtype of the inputs."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out, lse = reference.attention(*leaves, **options, return_lse=True)
    results, upstream_grads = [out], [dout.to(out.dtype)]
    if dlse is not None:
        seen = lse.isfinite()
        results.append(lse.masked_fill(~seen, 0))
        upstream_grads.append(dlse.to(lse.dtype).masked_fill(~seen, 0))
    grads = torch.autograd.grad(results, leaves, upstream_grads)
    return out.detach(), lse.detach(), Grads(*grads)


def build(emulated: Callable[..., Any], head_dim: int, dtype: torch.dtype) -> Callable[..., None]:
    padded = next(d for d in (64, 128, 256) if head_dim <= d)
    return emulated("attention_bwd.cpp", f"HEAD_DIM={padded}", f"ELEMENT={ELEMENTS[dtype]}")


def make_inputs(
    name: str, dtype: torch.dtype, head_dim: int | None = None
) -> tuple[tuple[Tensor, ...], Tensor, Tensor, dict[str, Any]]:
    own_dim, batch, num_heads, num_kv_heads, seqlen_q, seqlen_k, options = CASES[name]
    head_dim = head_dim or own_dim
    torch.manual_seed(len(name))
    q = torch.randn(batch, num_heads, seqlen_q, head_dim).to(dtype)
    k, v = (torch.randn(batch, num_kv_heads, seqlen_k, head_dim).to(dtype) for _ in range(2))
    options = dict(options)
    if "key_lengths" in options:
        options["key_lengths"] = torch.tensor(options["key_lengths"], dtype=torch.int32)
    dlse = torch.randn(batch, num_heads, seqlen_q)
    return (q, k, v), torch.randn_like(q), dlse, options


def check(
    emulated: Callable[..., Any], name: str, dtype: torch.dtype, with_dlse: bool, head_dim: int | None = None,
    **schedule: Any,
) -> Grads:  # fmt: skip
    inputs, dout, dlse, options = make_inputs(name, dtype, head_dim)
    upstream_grad = dlse if with_dlse else None
    out, lse, golden = differentiated(tuple(x.double() for x in inputs), dout, upstream_grad, options)
    _, _, plain = differentiated(inputs, dout, upstream_grad, options)
    if "key_lengths" in options:
        inputs = (inputs[0], *(x.clone() for x in inputs[1:]))
        for b, length in enumerate(options["key_lengths"].tolist()):
            for padded in inputs[1:]:
                padded[b, :, length:] = torch.nan
    grads = emulate(
        build(emulated, inputs[0].shape[-1], dtype), *inputs, out.to(dtype), lse.float(), dout, upstream_grad,
        **options, **schedule,
    )  # fmt: skip
    for label, actual, same, exact in zip(Grads._fields, grads, plain, golden):
        assert_within_rule(actual, same, exact, f"d{label}")
    return grads


@pytest.mark.parametrize("name", CASES)
def test_gradients(emulated: Callable[..., Any], name: str) -> None:
    vanishing = CASES[name][5] == 1  # with one key, the gradients of out to q and k are
    check(emulated, name, torch.float16, with_dlse=vanishing or len(name) % 2 == 0, seed=len(name))


@pytest.mark.parametrize("name", ["causal", "128, causal", "256"])
def test_bfloat16(emulated: Callable[..., Any], name: str) -> None:
    check(emulated, name, torch.bfloat16, with_dlse=True, seed=1)


@pytest.mark.parametrize(
    "name",
    [
        "one query", "one key", "causal, fewer queries", "causal, more queries", "window", "grouped heads",
        "key lengths", "key lengths, several blocks",
    ],
)  # fmt: skip
def test_warpgroups_share_keys(emulated: Callable[..., Any], name: str) -> None:
    """Head dim 256, where one warpgroup accumulates dk and the other dv."""
    check(emulated, name, torch.float16, with_dlse=True, head_dim=256, seed=len(name), resident=2)


@pytest.mark.parametrize("landing", ["eager", "lazy", "random"])
@pytest.mark.parametrize("name", ["grouped heads", "key lengths, causal", "128, causal", "256"])
def test_no_schedule_changes_a_bit(emulated: Callable[..., Any], name: str, landing: str) -> None:
    first = check(emulated, name, torch.float16, with_dlse=True, seed=0, landing="random")
    for seed in range(1, 4):
        again = check(emulated, name, torch.float16, with_dlse=True, seed=seed, landing=landing, resident=2)
        for label, a, b in zip(Grads._fields, first, again):
            assert torch.equal(a, b), f"d{label} under schedule {seed}"


@pytest.mark.parametrize(
    ("lengths_q", "lengths_k", "options"),
    [
        ([5, 130, 1, 64], [5, 130, 1, 64], {"causal": True}),
        ([0, 129, 3], [7, 200, 0], {}),
        ([100, 20], [40, 200], {"causal": True, "window": (50, 0), "softcap": 4.0}),
    ],
    ids=["causal", "empty sequences", "window and softcap"],
)
@pytest.mark.parametrize(
    ("head_dim", "one_pass"),
    [
        pytest.param(head_dim, one_pass, id=f"{head_dim}, {'one pass' if one_pass else 'two passes'}")
        for head_dim, one_pass in ((64, False), (64, True), (128, False), (128, True), (256, False))
    ],
)
def test_packed(
    emulated: Callable[..., Any],
    head_dim: int,
    one_pass: bool,
    lengths_q: list[int],
    lengths_k: list[int],
    options: dict[str, Any],
) -> None:
    """Each sequence as if it were alone, between neighbours of NaN; tokens of no sequence get zero gradients."""
    dtype, num_heads, num_kv_heads, behind = torch.float16, 2, 1, 9
    if one_pass:
        options = {name: value for name, value in options.items() if name != "softcap"}
    starts_q, starts_k = ([sum(ls[:i]) for i in range(len(ls) + 1)] for ls in (lengths_q, lengths_k))
    torch.manual_seed(3)
    q, dout = (torch.randn(num_heads, starts_q[-1] + behind, head_dim).to(dtype) for _ in range(2))
    k, v = (torch.randn(num_kv_heads, starts_k[-1] + behind, head_dim).to(dtype) for _ in range(2))
    dlse = torch.randn(q.shape[:2])
    cu_seqlens = tuple(torch.tensor(starts, dtype=torch.int32) for starts in (starts_q, starts_k))
    library = build(emulated, head_dim, dtype)
    for b in range(len(lengths_q)):
        rows, keys = slice(*starts_q[b : b + 2]), slice(*starts_k[b : b + 2])
        own = tuple(x[None, :, s] for x, s in ((q, rows), (k, keys), (v, keys)))
        own_dout, own_dlse = dout[None, :, rows], dlse[None, :, rows]
        out, lse, golden = differentiated(tuple(x.double() for x in own), own_dout, own_dlse, options)
        _, _, plain = differentiated(own, own_dout, own_dlse, options)

        def among_nan(x: Tensor, own: slice) -> Tensor:
            alone = torch.full_like(x, torch.nan)
            alone[:, own] = x[:, own]
            return alone

        packed_out, packed_lse = torch.zeros_like(q), torch.full_like(dlse, -torch.inf)
        packed_out[:, rows], packed_lse[:, rows] = out[0].to(dtype), lse[0].float()
        grads = emulate(
            library, among_nan(q, rows), among_nan(k, keys), among_nan(v, keys), packed_out, packed_lse,
            among_nan(dout, rows), dlse, cu_seqlens=cu_seqlens, one_pass=one_pass, **options, seed=b,
        )  # fmt: skip
        for label, s, actual, same, exact in zip(Grads._fields, (rows, keys, keys), grads, plain, golden):
            assert_within_rule(actual[:, s], same[0], exact[0], f"d{label}")
            end = (starts_q if label == "query" else starts_k)[-1]
            assert actual[:, end:].eq(0).all()


def test_heads_between_other_heads(emulated: Callable[..., Any]) -> None:
    """Strided heads, in the memory order (B, S, H, D)."""
    dtype = torch.float16
    q, dout = (torch.randn(1, 70, 3, 72).to(dtype)[:, :, 1:2, :64].transpose(1, 2) for _ in range(2))
    k, v = (torch.randn(1, 90, 3, 72).to(dtype)[:, :, 1:2, :64].transpose(1, 2) for _ in range(2))
    dlse = torch.randn(1, 1, 70)
    inputs = (q, k, v)
    out, lse, golden = differentiated(tuple(x.double() for x in inputs), dout, dlse, {})
    _, _, plain = differentiated(inputs, dout, dlse, {})
    grads = emulate(build(emulated, 64, dtype), *inputs, out.to(dtype), lse.float(), dout, dlse, seed=5)
    for label, actual, same, exact in zip(Grads._fields, grads, plain, golden):
        assert_within_rule(actual, same, exact, f"d{label}")


ONE_PASS = [
    "one tile",
    "edges of every tile",
    "one query",
    "causal",
    "causal, fewer queries",
    "causal, more queries",
    "causal top left",
    "window",
    "grouped heads",
    "key lengths",
    "key lengths, several blocks",
    "key lengths, causal, several blocks",
]


@pytest.mark.parametrize("resident", [1, 3])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", ONE_PASS)
def test_one_pass(emulated: Callable[..., Any], name: str, head_dim: int, resident: int) -> None:
    check(
        emulated, name, torch.float16, with_dlse=True, head_dim=head_dim, one_pass=True, resident=resident,
        seed=resident,
    )  # fmt: skip


@pytest.mark.parametrize("head_dim", [40, 72])
def test_one_pass_pads_heads(emulated: Callable[..., Any], head_dim: int) -> None:
    check(emulated, "causal", torch.bfloat16, with_dlse=True, head_dim=head_dim, one_pass=True, seed=2)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(
    "name", ["grouped heads", "key lengths, several blocks", "key lengths, causal, several blocks"]
)
def test_one_pass_adds_in_order(emulated: Callable[..., Any], name: str, head_dim: int) -> None:
    """The sums of dq have the same bits in any schedule."""
    options = {"with_dlse": True, "head_dim": head_dim, "one_pass": True}
    first = check(emulated, name, torch.float16, resident=1, seed=0, **options)
    for seed in range(1, 4):
        again = check(emulated, name, torch.float16, resident=4, seed=seed, **options)
        for label, a, b in zip(Grads._fields, first, again):
            assert torch.equal(a, b), f"d{label} under schedule {seed}"


@pytest.mark.parametrize("head_dim", [64, 128])
def test_one_pass_of_a_sequence_alone(emulated: Callable[..., Any], head_dim: int) -> None:
    """The order in which a head's tiles add depends on the head, not on its place in a batch."""
    inputs, dout, dlse, options = make_inputs("grouped heads", torch.float16, head_dim)
    out, lse, _ = differentiated(tuple(x.double() for x in inputs), dout, dlse, options)
    library = build(emulated, head_dim, torch.float16)
    tensors = (*inputs, out.half(), lse.float(), dout, dlse)
    together = emulate(library, *tensors, **options, one_pass=True, seed=1)
    for b in range(len(dout)):
        alone = emulate(library, *(x[b : b + 1] for x in tensors), **options, one_pass=True, seed=2)
        for label, whole, own in zip(Grads._fields, together, alone):
            assert torch.equal(whole[b : b + 1], own), f"d{label}"


@pytest.mark.parametrize("heads", [16, 64], ids=["every head its own keys", "four heads share keys"])
def test_sections_fit_the_cache(emulated: Callable[..., Any], heads: int) -> None:
    """q and dout of a section's heads have 32 MB of L2 at most, with the sums of dq where there is one pass."""
    batch_heads = torch.zeros(2, dtype=torch.int64)
    build(emulated, 128, torch.float16)("key_sections", batch_heads, 1, heads, 16, 8192, 8192)
    group = heads // 16
    head_bytes = 8192 * 128 * 2 * 2
    for section, bytes_per_batch_head in zip(
        batch_heads.tolist(), (head_bytes * group, 2 * head_bytes * group)
    ):
        assert section == (32 << 20) // bytes_per_batch_head
