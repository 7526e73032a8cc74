"""flash-attn's packed sequences: pages, used lengths, windows in every form, and the softmax under dropout."""

import itertools

import numpy as np
import pytest
import torch

from fastattn.integrations import flash_attn as fa
from fastattn.reference import attention as reference

H, HKV, D = 4, 2, 8
LENGTHS_Q, LENGTHS_K = [3, 0, 5, 2, 1], [4, 3, 5, 0, 6]
NAMES = {"softmax_scale": "scale", "window_size": "window", "s_aux": "sinks"}
SLOPES = torch.linspace(0.1, 1, len(LENGTHS_Q) * H, dtype=torch.float64).view(-1, H)
OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window_size": (2, 1)},
    "softcap": {"softcap": 1.5, "causal": True},
    "alibi": {"alibi_slopes": SLOPES, "causal": True},
    "sinks": {"s_aux": torch.linspace(-1, 1, H).double()},
}


def normal(*shape):
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def ends(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def expected_of(q, k, v, options, lengths_q=LENGTHS_Q, used_q=None, keys=None):
    """(out, lse), sequence by sequence; `keys` gives the keys and values of sequence b."""
    outs, lses = [], []
    options = {NAMES.get(name, name): value for name, value in options.items()}
    slopes = options.pop("alibi_slopes", None)
    for b, query in enumerate(q.split(lengths_q)):
        used = len(query) if used_q is None else used_q[b]
        key, value = keys(b)
        own = slopes if slopes is None or slopes.dim() == 1 else slopes[b]
        one = [t.transpose(0, 1)[None] for t in (query[:used], key, value)]
        out, lse = reference(*one, alibi_slopes=own, return_lse=True, **options)
        unused = len(query) - used
        outs.append(torch.cat([out[0].transpose(0, 1), query.new_zeros(unused, H, value.shape[-1])]))
        empty = torch.full((H, unused), -torch.inf, dtype=lse.dtype)
        if "sinks" in options:
            empty = options["sinks"][:, None].expand(H, unused)
        lses.append(torch.cat([lse[0], empty], 1))
    return torch.cat(outs), torch.cat(lses, 1)


def assert_same(actual, expected, sources):
    torch.testing.assert_close(actual, expected)
    weight = torch.randn_like(expected[0])
    grads = [torch.autograd.grad(results[0], sources, weight) for results in (actual, expected)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize(("some_q", "some_k"), [(True, False), (False, True), (True, True)])
def test_used_lengths(option, some_q, some_k):
    q, k, v = normal(sum(LENGTHS_Q), H, D), normal(sum(LENGTHS_K), HKV, D), normal(sum(LENGTHS_K), HKV, D)
    used_q = [2, 0, 5, 0, 1] if some_q else None
    used_k = [1, 0, 5, 0, 2] if some_k else None

    def keys(b):
        used = LENGTHS_K[b] if used_k is None else used_k[b]
        return [t.split(LENGTHS_K)[b][:used] for t in (k, v)]

    out, lse, _ = fa.flash_attn_varlen_func(
        q, k, v, ends(LENGTHS_Q), ends(LENGTHS_K), 5, 6, return_attn_probs=True,
        seqused_q=None if used_q is None else torch.tensor(used_q),
        seqused_k=None if used_k is None else torch.tensor(used_k, dtype=torch.int32),
        **OPTIONS[option],
    )  # fmt: skip
    assert_same((out, lse), expected_of(q, k, v, OPTIONS[option], used_q=used_q, keys=keys), (q, k, v))


def test_what_lies_behind_the_used_lengths_influences_nothing():
    q, k, v = normal(6, H, D), normal(8, HKV, D), normal(8, HKV, D)
    used = {"seqused_q": torch.tensor([2, 1]), "seqused_k": torch.tensor([3, 2])}
    results = []
    for poison in (0.0, torch.nan):
        sources = [t.detach().clone() for t in (q, k, v)]
        sources[0][[2, 4, 5]] = sources[1][[3, 6, 7]] = sources[2][[3, 6, 7]] = poison
        for source in sources:
            source.requires_grad_()
        out = fa.flash_attn_varlen_func(*sources, ends([3, 3]), ends([4, 4]), 3, 4, causal=True, **used)
        results.append((out, *torch.autograd.grad(out, sources, torch.ones_like(out))))
    torch.testing.assert_close(*results, rtol=0, atol=0)


def paged(page, table_width, spare=3):
    """Pages of keys and values in random order, and the block table."""
    batch = len(LENGTHS_Q)
    blocks = batch * table_width + spare
    table = torch.randperm(blocks)[: batch * table_width].view(batch, table_width).to(torch.int32)
    return normal(blocks, page, HKV, D).detach(), normal(blocks, page, HKV, D + 2).detach(), table


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize(("page", "width"), [(1, 6), (4, 2), (16, 1)])
@pytest.mark.parametrize("lengths", ["cu_seqlens_k", "seqused_k", "both"])
def test_paged_keys(option, page, width, lengths):
    q = normal(sum(LENGTHS_Q), H, D)
    k, v, table = paged(page, width)
    cu_seqlens, used = ends(LENGTHS_K), None
    if lengths != "cu_seqlens_k":
        used, cu_seqlens = (
            torch.tensor(LENGTHS_K, dtype=torch.int32),
            None if lengths == "seqused_k" else ends([6] * 5),
        )

    def keys(b):
        return [t[table[b].long()].flatten(0, 1)[: LENGTHS_K[b]] for t in (k, v)]

    out, lse, _ = fa.flash_attn_varlen_func(
        q, k, v, ends(LENGTHS_Q), cu_seqlens, 5, 6, return_attn_probs=True, block_table=table, seqused_k=used,
        **OPTIONS[option],
    )  # fmt: skip
    assert_same((out, lse), expected_of(q, k, v, OPTIONS[option], keys=keys), (q,))


def test_pages_may_be_shared_and_unused_entries_may_be_anything():
    q = normal(4, H, D)
    k, v = normal(5, 2, HKV, D).detach(), normal(5, 2, HKV, D).detach()
    table = torch.tensor([[3, 1, -1], [3, 4, 999]])
    out = fa.flash_attn_varlen_func(q, k, v, ends([2, 2]), ends([3, 4]), 2, 4, block_table=table)
    for b, blocks, count in ((0, [3, 1], 3), (1, [3, 4], 4)):
        own = [t[blocks].flatten(0, 1)[:count] for t in (k, v)]
        plain = fa.flash_attn_func(q[None, 2 * b : 2 * b + 2], *(t[None] for t in own))
        torch.testing.assert_close(out[2 * b : 2 * b + 2], plain[0])


WINDOWS = {
    "tuple": (2, 0),
    "list": [2, 0],
    "tensor": torch.tensor([2, 0]),
    "int32 tensor": torch.tensor([2, 0], dtype=torch.int32),
    "array": np.array([2, 0]),
    "tuple of tensors": (torch.tensor(2), torch.tensor(0)),
    "list of tensors of one element": [torch.tensor([2]), torch.tensor([0], dtype=torch.int16)],
    "tuple of numpy integers": (np.int64(2), np.int32(0)),
}


@pytest.mark.parametrize("form", WINDOWS)
def test_a_window_in_every_form(form):
    window = WINDOWS[form]
    q, k = normal(2, 5, H, D).detach(), normal(2, 7, H, D).detach()
    qkv = torch.stack([q, q, q], 2)
    packed = [t.flatten(0, 1) for t in (q, k, k)]
    cu_seqlens = (ends([5, 5]), ends([7, 7]), 5, 7)
    calls = [
        lambda w: fa.flash_attn_func(q, k, k, window_size=w),
        lambda w: fa.flash_attn_qkvpacked_func(qkv, window_size=w),
        lambda w: fa.flash_attn_kvpacked_func(q, torch.stack([k, k], 2), window_size=w),
        lambda w: fa.flash_attn_varlen_func(*packed, *cu_seqlens, window_size=w),
        lambda w: fa.flash_attn_varlen_qkvpacked_func(qkv.flatten(0, 1), cu_seqlens[0], 5, window_size=w),
        lambda w: fa.flash_attn_varlen_kvpacked_func(
            packed[0], torch.stack(packed[1:], 1), *cu_seqlens, window_size=w
        ),
        lambda w: fa.flash_attn_with_kvcache(q, k, k, window_size=w),
    ]
    for call in calls:
        assert torch.equal(call(window), call((2, 0)))
        assert not torch.equal(call(window), call((-1, -1)))


@pytest.mark.parametrize(
    "window",
    [
        3, None, "22", (1,), (1, 2, 3), (1.0, 2), (True, 1), torch.tensor(1), torch.tensor([1.0, 2]),
        np.array([1, 2, 3]), (torch.tensor([1, 2]), 0), (-2, 0), {"left": 1, "right": 2},
    ],
)  # fmt: skip
def test_windows_that_are_none(window):
    q = normal(1, 3, H, D).detach()
    with pytest.raises((ValueError, TypeError), match="window_size: got") as caught:
        fa.flash_attn_func(q, q, q, window_size=window)
    assert isinstance(caught.value, RuntimeError)


@pytest.mark.parametrize("longest", [(5, 6), (None, None), (torch.tensor(8), 8)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("used", [False, True])
def test_the_softmax_under_dropout(longest, causal, used):
    """What was kept, scaled, times the values is the output, and without its signs it is the softmax."""
    q, k, v = normal(sum(LENGTHS_Q), H, D), normal(sum(LENGTHS_K), HKV, D), normal(sum(LENGTHS_K), HKV, D)
    lengths_q, lengths_k = ([1, 0, 4, 2, 1], [4, 1, 5, 0, 3]) if used else (LENGTHS_Q, LENGTHS_K)
    extra = {"seqused_q": torch.tensor(lengths_q), "seqused_k": torch.tensor(lengths_k)} if used else {}
    out, _, signed = fa.flash_attn_varlen_func(
        q, k, v, ends(LENGTHS_Q), ends(LENGTHS_K), *longest, 0.5, causal=causal, alibi_slopes=SLOPES,
        return_attn_probs=True, **extra,
    )  # fmt: skip
    most = [max(lengths) if n is None else int(n) for n, lengths in zip(longest, (lengths_q, lengths_k))]
    assert signed.shape == (len(LENGTHS_Q), H, *most)
    assert (signed < 0).any()
    for b, (rows, columns) in enumerate(zip(lengths_q, lengths_k)):
        query, key, value = (
            t.split(lengths)[b][:n].transpose(0, 1)[None]
            for t, lengths, n in ((q, LENGTHS_Q, rows), (k, LENGTHS_K, columns), (v, LENGTHS_K, columns))
        )
        _, weights = reference(query, key, value, causal=causal, alibi_slopes=SLOPES[b], return_weights=True)
        torch.testing.assert_close(signed[b, :, :rows, :columns].abs(), weights[0])
        kept = signed[b, :, :rows, :columns].clamp(min=0) * 2
        expected = kept @ value[0].repeat_interleave(H // HKV, 0)
        torch.testing.assert_close(out.split(LENGTHS_Q)[b][:rows].transpose(0, 1), expected)
        assert not signed[b, :, rows:].any()
        assert not signed[b, :, :, columns:].any()


def calls():
    q, k = torch.zeros(10, H, D), torch.zeros(10, HKV, D)
    pages, table = torch.zeros(6, 4, HKV, D), torch.zeros(2, 3, dtype=torch.int32)
    cu_seqlens = ends([5, 5])
    packed = {
        "q": q, "k": k, "v": k, "cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens,
        "max_seqlen_q": 5, "max_seqlen_k": 5,
    }  # fmt: skip
    padded = {"q": q[None], "k": k[None], "v": k[None]}
    return {
        "varlen": (fa.flash_attn_varlen_func, packed),
        "paged": (fa.flash_attn_varlen_func, packed | {"k": pages, "v": pages, "block_table": table}),
        "func": (fa.flash_attn_func, padded),
    }


@pytest.mark.parametrize(
    ("function", "change", "match"),
    [
        ("varlen", {"seqused_q": torch.tensor([5, 6])}, "seqused_q.*needs 0 to"),
        ("varlen", {"seqused_k": torch.tensor([-1, 5])}, "seqused_k.*needs 0 to"),
        ("varlen", {"seqused_k": torch.tensor([5])}, "seqused_k: got shape"),
        ("varlen", {"seqused_k": torch.tensor([5.0, 5.0])}, "seqused_k: got torch.float32"),
        ("varlen", {"seqused_q": [5, 5]}, "seqused_q: got list"),
        ("varlen", {"cu_seqlens_q": torch.tensor([0, 5, 10])}, "cu_seqlens_q: got torch.int64"),
        ("varlen", {"cu_seqlens_k": None}, "cu_seqlens_k: got NoneType"),
        ("varlen", {"cu_seqlens_k": ends([5, 6])}, "cu_seqlens_k"),
        ("varlen", {"max_seqlen_q": 2**40}, "max_seqlen_q.*32-bit"),
        ("varlen", {"max_seqlen_k": 2**70}, "max_seqlen_k.*32-bit"),
        ("varlen", {"max_seqlen_k": 4}, "max_seqlen_k"),
        ("varlen", {"max_seqlen_k": "4"}, "max_seqlen_k"),
        ("varlen", {"q": torch.zeros(10, H, D).half()}, "k: got torch.float32"),
        ("varlen", {"q": None}, "q: got NoneType"),
        ("paged", {"block_table": torch.zeros(2, 1).int()}, "block_table: got 1 pages"),
        ("paged", {"block_table": torch.full((2, 3), 6)}, "block_table.*needs 0 to 5"),
        ("paged", {"block_table": torch.full((2, 3), -1)}, "block_table.*needs 0 to 5"),
        ("paged", {"block_table": torch.zeros(3, 3).int()}, "block_table: got shape"),
        ("paged", {"block_table": torch.zeros(3).int()}, "block_table: got shape"),
        ("paged", {"block_table": torch.zeros(2, 3)}, "block_table: got torch.float32"),
        ("paged", {"block_table": [[0, 0]]}, "block_table: got list"),
        ("paged", {"k": torch.zeros(10, HKV, D)}, "k: got shape"),
        ("paged", {"v": torch.zeros(5, 4, HKV, D)}, "v: got shape"),
        ("paged", {"cu_seqlens_k": None}, "cu_seqlens_k"),
        ("func", {"q": torch.zeros(1, 10, H, D).int()}, "q: got torch.int32"),
        ("func", {"k": torch.zeros(1, 10, HKV, D).half()}, "k: got torch.float16"),
        ("func", {"k": torch.zeros(1, 10, 3, D)}, "v: got 2 heads|k: got 3 heads"),
        ("func", {"q": torch.zeros(1, 10, H, 300)}, "head dim"),
        ("func", {"v": torch.zeros(1, 9, HKV, D)}, "v: got length"),
        ("func", {"softmax_scale": "a"}, "softmax_scale"),
        ("func", {"softmax_scale": 10**400}, "softmax_scale"),
        ("func", {"softcap": 10**400}, "softcap"),
        ("func", {"softcap": "a"}, "softcap"),
        ("func", {"dropout_p": 1.5}, "dropout_p"),
        ("func", {"alibi_slopes": torch.zeros(3)}, "alibi_slopes"),
        ("func", {"s_aux": torch.zeros(3)}, "s_aux"),
        ("func", {"causal": 1}, "causal"),
    ],
)  # fmt: skip
def test_refused_by_name_as_a_runtime_error_too(function, change, match):
    run, arguments = calls()[function]
    with pytest.raises((ValueError, TypeError), match=match) as caught:
        run(**(arguments | change))
    assert isinstance(caught.value, RuntimeError)


@pytest.mark.parametrize(
    ("function", "change"),
    [
        ("varlen", {"max_seqlen_q": 2**40}),
        ("varlen", {"max_seqlen_q": "4"}),
        ("varlen", {"cu_seqlens_q": [0, 5, 10]}),
        ("func", {"window_size": 3}),
        ("func", {"softmax_scale": "a"}),
        ("func", {"causal": "yes"}),
    ],
)
def test_what_pybind_refuses_is_a_type_error(function, change):
    run, arguments = calls()[function]
    with pytest.raises(TypeError):
        run(**(arguments | change))


def test_pages_get_no_gradient():
    run, arguments = calls()["paged"]
    pages = arguments["k"].clone().requires_grad_()
    with pytest.raises(RuntimeError, match="k: requires grad"):
        run(**(arguments | {"k": pages}))
    with torch.no_grad():
        run(**(arguments | {"k": pages}))


@pytest.mark.parametrize(("causal", "local"), list(itertools.product([False, True], [False, True])))
def test_padding_is_packing(causal, local):
    """The used lengths of a padded batch give what packing it gives."""
    q, k, v = normal(3, 6, H, D), normal(3, 7, HKV, D), normal(3, 7, HKV, D)
    lengths_q, lengths_k = [6, 2, 4], [7, 3, 5]
    options = {"causal": causal, "window_size": (2, 1) if local else (-1, -1)}
    whole = [t.flatten(0, 1) for t in (q, k, v)]
    out = fa.flash_attn_varlen_func(
        *whole, ends([6] * 3), ends([7] * 3), 6, 7, seqused_q=torch.tensor(lengths_q),
        seqused_k=torch.tensor(lengths_k), **options,
    )  # fmt: skip
    packed = [
        torch.cat([row[:n] for row, n in zip(t, lengths)])
        for t, lengths in ((q, lengths_q), (k, lengths_k), (v, lengths_k))
    ]
    expected = fa.flash_attn_varlen_func(*packed, ends(lengths_q), ends(lengths_k), 6, 7, **options)
    rows = torch.arange(6) < torch.tensor(lengths_q)[:, None]
    assert_same((out.unflatten(0, (3, 6))[rows],), (expected,), (q, k, v))
