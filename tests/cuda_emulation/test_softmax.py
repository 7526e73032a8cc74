"""The CUDA softmax, host code and kernels, run by the emulation against float64, on both sides of every threshold."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from cuda_emulation.extension import EmulatedExtension
from softmax_cases import (
    CASES,
    DTYPES,
    SCALES,
    assert_hidden_as_in_the_reference,
    call_for_kernels,
    call_of,
    inputs,
    non_finite,
    reference,
)
from torch import Tensor

from fastattn.backends import torch as other
from fastattn.backends.cuda import softmax as backend
from fastattn.spec import SoftmaxSpec
from numerics import assert_within_rule, plain_in_any_order

SEEDS = range(3)
NARROW = [
    8 << i for i in range(16)
]  # the rows of the table for 16-bit inputs end here, on a GPU with clusters
WIDE = NARROW[:-1]  # and those for floats and the backward


def forward(x: Tensor, dim: int, **options: Any) -> Tensor:
    call = call_for_kernels(x, dim, **options)
    spec = SoftmaxSpec.of(x, call.dim, mask=call.mask is not None, causal=call.causal, log=call.log)
    return backend.softmax_fwd(spec, call)


def backward(out: Tensor, dout: Tensor, dim: int, dtype: torch.dtype, **options: Any) -> Tensor:
    log = options.get("log", False)
    spec = SoftmaxSpec.of(out, dim, log=log, backward=True)
    return backend.softmax_bwd(spec, dout, out, dim % out.dim(), options.get("scale", 1.0), dtype)


def both(x: Tensor, dout: Tensor, dim: int, **options: Any) -> tuple[Tensor, Tensor]:
    out = forward(x, dim, **options)
    return out, backward(out, dout, dim, x.dtype, **options)


def check(x: Tensor, dout: Tensor, dim: int, **options: Any) -> tuple[Tensor, Tensor]:
    actual = both(x, dout, dim, **options)
    golden = reference(x.double(), dout.double(), dim, **options)
    plain = plain_in_any_order(partial(reference, x, dout, dim, **options), golden)
    for name, *three in zip(("out", "dx"), actual, plain, golden):
        assert_within_rule(*three, name)
    return actual


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_error_rule(emulated_extension: EmulatedExtension, name: str, dtype: torch.dtype) -> None:
    x, dout, dim, options = inputs(name, dtype, "cpu")
    results = []
    for seed in SEEDS:
        emulated_extension.configure(seed=seed)
        results.append(check(x, dout, dim, **options))
    for out, dx in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(dx, results[0][1])


@pytest.mark.parametrize(("dtype", "last"), [(torch.float16, NARROW[-1]), (torch.float32, WIDE[-1])], ids=str)
@pytest.mark.parametrize("columns", [1, *sorted({n + more for n in NARROW for more in (0, 1)})])
def test_both_sides_of_every_threshold(
    emulated_extension: EmulatedExtension, columns: int, dtype: torch.dtype, last: int
) -> None:
    """On a GPU with clusters: whole rows in more and more threads, then rows that are read twice."""
    elements, lanes, warps, blocks = emulated_extension.module.softmax_plan(
        columns, dtype.itemsize, clusters=True
    )
    assert (elements == 0) == (columns > last)
    if elements:
        held = elements * lanes * warps * blocks
        assert columns <= held
        assert held < 2 * max(columns, 8)
    x, dout = (torch.randn(1 if columns > 5000 else 5, columns).to(dtype) for _ in range(2))
    check(x, dout, -1)


@pytest.mark.parametrize("size", [2, 4])
def test_two_blocks_fit_a_multiprocessor_where_a_cluster_takes_the_row(
    emulated_extension: EmulatedExtension, size: int
) -> None:
    """No block of more than 512 threads, but for rows that fill the largest cluster and devices without clusters."""
    plan = partial(emulated_extension.module.softmax_plan, element_size=size)
    last = NARROW[-1] if size == 2 else WIDE[-1]
    for columns in (1, 512, 8192, 8193, 16384, 16385, 20000, 32768, 65536, last // 2):
        _, lanes, warps, blocks = plan(columns, clusters=True)
        assert lanes * warps <= 512, columns
        assert blocks <= 8
    assert plan(last, clusters=True)[1:] == (32, 32, 8)
    if size == 2:
        assert {plan(columns, clusters=True) for columns in (16385, 32768)} == {(32, 32, 16, 2)}
        assert {plan(columns, clusters=False) for columns in (16385, 32768)} == {(32, 32, 32, 1)}


@pytest.mark.parametrize("columns", [16384, 16385, 32768, 32769])
def test_without_clusters_long_rows_are_read_twice(
    emulated_extension: EmulatedExtension, columns: int
) -> None:
    emulated_extension.configure(arch=80)
    for dtype, last in ((torch.float16, 32768), (torch.float32, 16384)):
        elements, _, _, blocks = emulated_extension.module.softmax_plan(columns, dtype.itemsize)
        assert ((elements == 0), blocks) == (columns > last, 1)
        check(torch.randn(2, columns).to(dtype), torch.randn(2, columns).to(dtype), -1, scale=3.0)


def test_what_a_thread_holds_is_whole_vectors(emulated_extension: EmulatedExtension) -> None:
    """Rows that begin anywhere: the edges are read by element, what lies beyond them is never touched."""
    for dtype in DTYPES:
        for offset in range(9):
            for columns in (1, 7, 8, 9, 64, 1023, 1024):
                storage = torch.full((offset + 3 * (columns + 5),), float("nan"), dtype=dtype)
                x = storage[offset:].view(3, columns + 5)[:, :columns].copy_(torch.randn(3, columns))
                check(x, torch.randn(3, columns).to(dtype), -1)


@pytest.mark.parametrize("columns", [33, 700, 20000])
@pytest.mark.parametrize("log", [False, True])
def test_rows_without_entries_and_what_a_mask_hides(
    emulated_extension: EmulatedExtension, log: bool, columns: int
) -> None:
    emulated_extension.configure(arch=80)
    x, dout = torch.randn(4, columns), torch.randn(4, columns)
    mask = torch.rand(4, columns) < 0.5
    mask[2] = False
    poisoned = [t.masked_fill(~mask, float("nan")) for t in (x, dout)]
    clean = both(x, dout, -1, mask=mask, log=log)
    for a, b in zip(clean, both(*poisoned, -1, mask=mask, log=log)):
        assert torch.equal(a, b)
    out, dx = clean
    assert bool((out[2] == (-torch.inf if log else 0)).all())
    assert not dx[2].any()
    assert both(torch.full((2, columns), -torch.inf), dout[:2], -1)[0].eq(0).all()


@pytest.mark.parametrize("columns", [5, 900, 20000])
def test_non_finite_rows_are_torchs(emulated_extension: EmulatedExtension, columns: int) -> None:
    emulated_extension.configure(arch=80)
    x = torch.randn(4, columns)
    x[0, 1], x[1, 2], x[2] = float("nan"), torch.inf, -1000.0
    x[3, 3:] = -torch.inf
    assert forward(x, -1)[:2].isnan().all()
    check(x[2:], torch.randn(2, columns), -1)


@pytest.mark.parametrize("columns", [5, 900, 33000])
@pytest.mark.parametrize("log", [False, True])
def test_entries_that_are_not_finite(emulated_extension: EmulatedExtension, log: bool, columns: int) -> None:
    """In a few threads, in many, and in rows that are read twice."""
    emulated_extension.configure(arch=80)
    x, dout, options = non_finite(columns)
    for scale in SCALES:
        options |= {"scale": scale, "log": log}
        assert_hidden_as_in_the_reference(x, dout, both(x, dout, -1, **options), **options)


HALVES = [torch.float16, torch.bfloat16]
EVERY_PLAIN_KERNEL = [(5, 90), (250, 90), (900, 90), (9000, 90), (17000, 90), (33000, 80)]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(("columns", "arch"), EVERY_PLAIN_KERNEL)
def test_a_plain_call_and_one_whose_mask_keeps_everything(
    emulated_extension: EmulatedExtension, columns: int, arch: int, dtype: torch.dtype
) -> None:
    """The plain kernels and the general ones: the same bits where the scale is a power of two, else within the rule."""
    x, dout = (torch.randn(3, columns).to(dtype) for _ in range(2))
    everything = torch.ones(columns, dtype=torch.bool)
    for seed in SEEDS if columns < 10_000 else SEEDS[:1]:
        emulated_extension.configure(arch=arch, seed=seed)
        for scale in (1.0, 0.125, 64.0):
            assert torch.equal(forward(x, -1, scale=scale), forward(x, -1, scale=scale, mask=everything))
    for scale in (0.3, 7.0):
        check(x, dout, -1, scale=scale)
        check(x, dout, -1, scale=scale, mask=everything)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(("columns", "arch"), EVERY_PLAIN_KERNEL)
def test_plain_rows_that_are_not_finite(
    emulated_extension: EmulatedExtension, columns: int, arch: int, dtype: torch.dtype
) -> None:
    """Rows with elements that are not finite, and rows whose scores overflow to +inf or -inf."""
    emulated_extension.configure(arch=arch)
    largest = torch.finfo(dtype).max
    x = torch.randn(10, columns).to(dtype)
    x[0, 0] = x[1, -1] = x[2, ::2] = x[3] = -torch.inf
    x[4, 0], x[5], x[6, 1], x[7, 1] = torch.inf, torch.inf, torch.nan, -torch.inf
    x[7, 2] = torch.nan
    x[8, ::2], x[9] = largest, -largest
    dout = torch.randn(10, columns).to(dtype)
    everything = torch.ones(10, columns, dtype=torch.bool)
    for scale in (1.0, 2.5, 1e-25, 1e-35, 0.0, -1.0) if columns < 10_000 else (1.0, 1e-35, -1.0):
        actual = both(x, dout, -1, scale=scale)
        assert_hidden_as_in_the_reference(
            x[:8], dout[:8], tuple(t[:8] for t in actual), scale=scale, mask=everything[:8]
        )
        general = forward(x, -1, scale=scale, mask=everything)
        torch.testing.assert_close(
            actual[0], general, equal_nan=True, rtol=2 * torch.finfo(dtype).eps, atol=1e-6
        )


def test_layouts(emulated_extension: EmulatedExtension) -> None:
    """Permuted, sliced, expanded and five-dimensional inputs, and a gradient in another memory order."""
    base = torch.randn(4, 3, 6, 5)
    wide_mask = torch.rand(2, 1, 3, 1, 7) < 0.7
    cases: list[tuple[Tensor, int, dict[str, Any]]] = [
        (base.permute(2, 0, 3, 1), 1, {}),
        (base.permute(2, 0, 3, 1), 3, {"causal": True}),
        (base.permute(2, 0, 1, 3), 2, {"causal": True}),
        (base[::2, :, 1:5, ::2], -1, {}),
        (base.transpose(2, 3), 2, {"causal": True, "mask": torch.rand(6) < 0.7}),
        (torch.randn(4, 1, 5).expand(4, 3, 5), 1, {}),
        (torch.randn(2, 3, 3, 2, 7), -1, {"mask": wide_mask}),
        (torch.randn(2, 3, 3, 2, 7).permute(3, 0, 4, 1, 2), 2, {}),
        (torch.randn(2, 3, 3, 2, 7).permute(3, 0, 2, 1, 4), -1, {"mask": torch.rand(2, 3, 3, 7) < 0.7}),
        (torch.randn(6), 0, {}),
    ]
    for x, dim, options in cases:
        dout = torch.randn(x.shape[::-1]).permute(*range(x.dim() - 1, -1, -1))
        actual = check(x, dout, dim, **options)
        assert actual[0].stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("columns", [9, 300, 5000])
def test_a_wider_result(emulated_extension: EmulatedExtension, dtype: torch.dtype, columns: int) -> None:
    """What autocast asks for: a float32 result of 16-bit rows, and a 16-bit gradient."""
    x, dout = torch.randn(3, columns).to(dtype), torch.randn(3, columns)
    call = call_of(x, -1)
    out = emulated_extension.module.softmax_forward(x, None, 1, 1.0, False, False, torch.float32)
    assert out.dtype == torch.float32
    golden, golden_dx = reference(x.double(), dout.double(), -1)
    assert_within_rule(out, x.float().softmax(-1), golden, "out")
    plain_dx = reference(x.float(), dout, -1)[1].to(dtype)
    assert_within_rule(backward(out, dout, call.dim, dtype), plain_dx, golden_dx, "dx")


def test_empty(emulated_extension: EmulatedExtension) -> None:
    for shape in ((0, 4), (4, 0)):
        empty = torch.empty(shape)
        assert both(empty, empty, -1)[1].shape == shape


def test_offsets_beyond_32_bits(emulated_extension: EmulatedExtension) -> None:
    """Rows 2**30 elements apart; only the pages in use are ever touched."""
    near = torch.randn(3, 20).half()
    storage = torch.empty(2**31 + 64, dtype=torch.float16)
    far = storage.as_strided(near.shape, (2**30, 1)).copy_(near)
    assert torch.equal(forward(far, -1), forward(near, -1))
    out = forward(near, -1)
    spread = storage.as_strided(near.shape, (2**30, 1)).copy_(out)
    dout = torch.randn(3, 20).half()
    assert torch.equal(backward(spread, dout, -1, torch.float16), backward(out, dout, -1, torch.float16))


def test_backends_cross(emulated_extension: EmulatedExtension) -> None:
    x, dout = torch.randn(5, 70), torch.randn(5, 70)
    call = call_of(x, -1, log=True)
    spec = SoftmaxSpec.of(x, -1, log=True)
    for one, two in ((backend, other), (other, backend)):
        out = one.softmax_fwd(spec, call)
        dx = two.softmax_bwd(spec.replace(backward=True), dout, out, 1, 1.0, x.dtype)
        torch.testing.assert_close(dx, reference(x, dout, -1, log=True)[1])


X = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X, None, 2, 1.0, False, False, torch.float32), "dim: got 2, needs 0 to 1"),
        ((X, X, 1, 1.0, False, False, torch.float32), "mask: got Float, needs Bool"),
        ((X[0], None, 0, 1.0, True, False, torch.float32), "causal: got True for shape"),
        (
            (X[None], None, 0, 1.0, True, False, torch.float32),
            "causal: got True for dim 0 of 3",
        ),
        ((X.double(), None, 1, 1.0, False, False, torch.float64), "dtype: got Double, needs float16"),
        ((X, None, 1, 1.0, False, False, torch.float16), "dtype: got Half for Float"),
    ],
)
def test_host_code_refuses(
    emulated_extension: EmulatedExtension, arguments: tuple[Any, ...], message: str
) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        emulated_extension.module.softmax_forward(*arguments)
