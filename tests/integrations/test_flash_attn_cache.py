"""flash-attn's caches: rows picked by index, left padding, pages and rotary positions, held against the reference."""

import pytest
import torch

from fastattn.integrations import flash_attn as fa
from fastattn.nn.positions import apply_rotary
from fastattn.reference import attention as reference
from numerics import assert_within_rule

B, H, HKV, D, PLACES = 3, 4, 2, 16, 24
NAMES = {"softmax_scale": "scale", "window_size": "window", "s_aux": "sinks"}


def normal(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=torch.float64).to(dtype)


class Problem:
    """One call, and the same computed from what its sequences hold."""

    def __init__(
        self,
        *,
        queries=3,
        new=3,
        leftpad=False,
        rows=False,
        pages=None,
        rotary=None,
        dtype=torch.float64,
        **options,
    ):
        self.options, self.new, self.rotary = options, new, rotary
        self.q = normal(B, queries, H, D, dtype=dtype)
        self.k, self.v = (normal(B, new, HKV, D, dtype=dtype) if new else None for _ in range(2))
        self.lengths = torch.tensor([9, 17, 4], dtype=torch.int32)
        self.leftpad = torch.tensor([5, 0, 4], dtype=torch.int32) if leftpad else None
        self.index = torch.tensor([4, 0, 3], dtype=torch.int32) if rows else None
        stored = 5 if rows else B
        whole = [normal(stored, PLACES, HKV, D, dtype=dtype) for _ in range(2)]
        self.table = None
        if pages:
            self.table = torch.randperm(B * PLACES // pages).view(B, -1).to(torch.int32)
            caches = [torch.empty(B * PLACES // pages, pages, HKV, D, dtype=dtype) for _ in whole]
            for cache, part in zip(caches, whole):
                cache[self.table.long().flatten()] = part.view(-1, pages, HKV, D)
            whole = caches
        self.k_cache, self.v_cache = whole
        self.tables = {}
        if rotary:
            angles = torch.rand(40, D // 4) * 6
            cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
            self.tables = {
                "rotary_cos": cos,
                "rotary_sin": sin,
                "rotary_interleaved": rotary == "interleaved",
            }

    def run(self, **change):
        arguments = {
            "q": self.q, "k_cache": self.k_cache, "v_cache": self.v_cache, "k": self.k, "v": self.v,
            "cache_seqlens": self.lengths, "cache_batch_idx": self.index, "cache_leftpad": self.leftpad,
            "block_table": self.table, "return_softmax_lse": True, **self.tables, **self.options,
        }  # fmt: skip
        return fa.flash_attn_with_kvcache(**(arguments | change))

    def whole(self, cache, b):
        """(PLACES, Hkv, D): what sequence b has in a cache."""
        if self.table is not None:
            return cache[self.table[b].long()].flatten(0, 1)
        return cache[b if self.index is None else int(self.index[b])]

    def turned(self, x, start, advances=True):
        if not self.rotary:
            return x
        steps = torch.arange(len(x)) if advances else torch.zeros(len(x), dtype=torch.long)
        tables = [self.tables[n].to(torch.float64)[start + steps] for n in ("rotary_cos", "rotary_sin")]
        turned = apply_rotary(x.double().transpose(0, 1), tables, interleaved=self.rotary == "interleaved")
        return turned.transpose(0, 1).to(x.dtype)

    def expected(self, before, dtype=torch.float64):
        """(out, lse) by the reference in `dtype`, and the caches as they have to be afterwards."""
        options = {
            NAMES.get(name, name): value for name, value in self.options.items() if name != "num_splits"
        }
        local = any(side not in (-1, None) for side in options.get("window", (-1, -1)))
        slopes = options.pop("alibi_slopes", None)
        outs, lses, after = [], [], []
        for b, length in enumerate(self.lengths.tolist()):
            start = 0 if self.leftpad is None else int(self.leftpad[b])
            query = self.turned(self.q[b], length, options.get("causal", False) or local)
            parts = []
            for cache, fresh in zip(
                before, (None if self.k is None else self.turned(self.k[b], length), self.v)
            ):
                row = self.whole(cache, b).clone()
                if self.new:
                    row[length : length + self.new] = fresh if fresh.dim() == 3 else fresh[b]
                parts.append(row)
            after.append(parts)
            key, value = (row[start : length + self.new] for row in parts)
            own = slopes if slopes is None or slopes.dim() == 1 else slopes[b]
            one = [t[None].transpose(1, 2).to(dtype) for t in (query, key, value)]
            out, lse = reference(*one, alibi_slopes=own, return_lse=True, **options)
            outs.append(out.transpose(1, 2)[0])
            lses.append(lse[0])
        return torch.stack(outs), torch.stack(lses), after

    def check(self):
        before = self.k_cache.clone(), self.v_cache.clone()
        out, lse = self.run()
        expected, expected_lse, after = self.expected(before)
        if self.q.dtype == torch.float64:
            torch.testing.assert_close((out, lse), (expected, expected_lse))
        else:
            plain, plain_lse, _ = self.expected(before, self.q.dtype)
            assert_within_rule(out, plain, expected, "out")
            assert_within_rule(lse, plain_lse, expected_lse, "lse", self.q.dtype)
        touched = [torch.zeros(cache.shape[:2], dtype=torch.bool) for cache in before]
        for b, parts in enumerate(after):
            for cache, row in zip((self.k_cache, self.v_cache), parts):
                torch.testing.assert_close(self.whole(cache, b), row, rtol=1e-3, atol=1e-3)
            places = range(int(self.lengths[b]), int(self.lengths[b]) + self.new)
            for mark in touched:
                for place in places:
                    page = PLACES if self.table is None else mark.shape[1]
                    block = b if self.index is None else int(self.index[b])
                    block = block if self.table is None else int(self.table[b, place // page])
                    mark[block, place % page] = True
        for cache, old, mark in zip((self.k_cache, self.v_cache), before, touched):
            assert torch.equal(cache[~mark], old[~mark])


PLACEMENT = {
    "own rows": {},
    "rows by index": {"rows": True},
    "left padding": {"leftpad": True},
    "rows by index and left padding": {"rows": True, "leftpad": True},
    "pages": {"pages": 4},
    "pages and left padding": {"pages": 6, "leftpad": True},
}
OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window_size": (3, 1)},
    "causal window, softcap": {"causal": True, "window_size": (4, -1), "softcap": 2.0},
    "alibi, split": {
        "causal": True,
        "alibi_slopes": torch.linspace(0.1, 1, B * H).view(B, H).double(),
        "num_splits": 3,
    },
    "sinks, scale": {"s_aux": torch.linspace(-1, 1, H).double(), "softmax_scale": 0.3},
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("placement", PLACEMENT)
@pytest.mark.parametrize(("queries", "new"), [(1, 0), (1, 1), (4, 2), (2, 5)])
def test_placements_and_options(placement, option, queries, new):
    Problem(queries=queries, new=new, **PLACEMENT[placement], **OPTIONS[option]).check()


@pytest.mark.parametrize("rotary", ["halves", "interleaved"])
@pytest.mark.parametrize("option", ["plain", "causal", "window"])
@pytest.mark.parametrize("placement", PLACEMENT)
@pytest.mark.parametrize(("queries", "new"), [(1, 1), (3, 3), (4, 1), (1, 3)])
def test_rotary_positions(placement, option, rotary, queries, new):
    """Queries turn by cache_seqlens + i, whatever k's length, or all by cache_seqlens where nothing is causal."""
    Problem(queries=queries, new=new, rotary=rotary, **PLACEMENT[placement], **OPTIONS[option]).check()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("placement", PLACEMENT)
def test_within_the_error_rule(placement, dtype):
    Problem(queries=4, new=2, dtype=dtype, rotary="halves", causal=True, **PLACEMENT[placement]).check()


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("new", [0, 2])
@pytest.mark.parametrize("layout", ["slice", "heads first"])
def test_unevenly_spaced_rows_are_written_too(rows, new, layout):
    problem = Problem(leftpad=True, rows=rows, new=new, causal=True)
    for name in ("k_cache", "v_cache"):
        cache = getattr(problem, name)
        if layout == "slice":
            spaced = torch.cat([cache, torch.full_like(cache, torch.nan)], dim=1)[:, :PLACES]
        else:
            spaced = cache.transpose(1, 2).contiguous().transpose(1, 2)
        setattr(problem, name, spaced)
    problem.check()


@pytest.mark.parametrize("placement", ["rows by index", "left padding", "pages and left padding"])
def test_on_triton(placement, monkeypatch):
    """Pages of one token, and pages as long as a row."""
    pytest.importorskip("triton")
    monkeypatch.setenv("FASTATTN_BACKEND", "triton")
    Problem(
        queries=2, new=1, dtype=torch.float32, rotary="halves", causal=True, **PLACEMENT[placement]
    ).check()


def test_what_lies_in_the_left_padding_is_never_read():
    problem = Problem(leftpad=True, causal=True)
    expected = problem.expected((problem.k_cache.clone(), problem.v_cache.clone()))[0]
    for b, pad in enumerate(problem.leftpad.tolist()):
        problem.k_cache[b, :pad] = torch.nan
        problem.v_cache[b, :pad] = torch.nan
    torch.testing.assert_close(problem.run()[0], expected)


def test_the_same_row_for_several_sequences():
    """Without k: what beams share is read where it lies."""
    problem = Problem(rows=True, new=0)
    problem.index = torch.tensor([2, 2, 2], dtype=torch.int32)
    problem.check()


def test_a_whole_paged_cache_where_no_lengths_are_given():
    problem = Problem(pages=4, new=0)
    problem.lengths = torch.tensor([PLACES] * B, dtype=torch.int32)
    out, _ = problem.run(cache_seqlens=None)
    torch.testing.assert_close(out, problem.expected((problem.k_cache, problem.v_cache))[0])


@pytest.mark.parametrize(
    ("kind", "change", "match"),
    [
        ({"rows": True}, {"cache_batch_idx": torch.tensor([0, 1])}, "cache_batch_idx: got shape"),
        ({"rows": True}, {"cache_batch_idx": torch.tensor([0.0, 1, 2])}, "cache_batch_idx: got torch.float32"),
        ({"rows": True}, {"cache_batch_idx": torch.tensor([0, 1, 5])}, "cache_batch_idx.*needs 0 to 4"),
        ({"rows": True}, {"cache_batch_idx": torch.tensor([0, 1, -1])}, "cache_batch_idx.*needs 0 to 4"),
        ({"rows": True}, {"cache_batch_idx": torch.tensor([0, 1, 1])}, "cache_batch_idx.*rows of their own"),
        ({"rows": True}, {"cache_batch_idx": [0, 1, 2]}, "cache_batch_idx: got list"),
        ({"rows": True}, {"cache_batch_idx": None}, "k_cache: got batch size 5"),
        ({"pages": 4}, {"cache_batch_idx": torch.tensor([0, 1, 2])}, "cache_batch_idx.*block_table"),
        ({"leftpad": True}, {"cache_leftpad": torch.tensor([0, 0, 5])}, r"cache_leftpad.*\[9, 17, 4\]"),
        ({"leftpad": True}, {"cache_leftpad": torch.tensor([0, 0, -1])}, "cache_leftpad.*needs 0 to"),
        ({"leftpad": True}, {"cache_leftpad": torch.tensor([0, 0])}, "cache_leftpad: got shape"),
        ({"leftpad": True}, {"cache_seqlens": 22}, "cache_seqlens: got 22, needs at most 21"),
        ({"leftpad": True}, {"v_cache": torch.zeros(B, 5, HKV, D).double()}, "v_cache"),
        ({"leftpad": True, "pages": 4}, {"block_table": torch.zeros(2, 2).int()}, "block_table"),
        ({}, {"cache_seqlens": 2**40}, "cache_seqlens.*32-bit"),
        ({}, {"cache_seqlens": 22}, "cache_seqlens"),
        ({}, {"cache_seqlens": None}, "cache_seqlens"),
        ({}, {"cache_seqlens": "9"}, "cache_seqlens: got str"),
        ({}, {"num_splits": 2**40}, "num_splits.*32-bit"),
        ({"rotary": "halves"}, {"rotary_sin": None}, "rotary_sin"),
        ({"rotary": "halves", "new": 1}, {"rotary_cos": torch.ones(12, 4).double()}, "rotary"),
        ({"rotary": "halves", "new": 1}, {"k": torch.zeros(B, 1, HKV, 8).double()}, "k: got"),
        ({"rotary": "halves"}, {"k": None, "v": None}, "rotary_cos.*k"),
        ({}, {"q": torch.zeros(B, 3, H, D)}, "k_cache|k: |key"),
    ],
)  # fmt: skip
def test_refused_by_name_and_nothing_is_written(kind, change, match):
    problem = Problem(**kind)
    before = problem.k_cache.clone(), problem.v_cache.clone()
    with pytest.raises((ValueError, TypeError), match=match) as caught:
        problem.run(**change)
    assert isinstance(caught.value, RuntimeError)
    assert torch.equal(problem.k_cache, before[0])
    assert torch.equal(problem.v_cache, before[1])
