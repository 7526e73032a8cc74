"""Every op with one tensor at a time laid out oddly in memory: results are those of dense tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

import fastattn

B, H, S, D, V, PAGE = 2, 2, 6, 8, 16, 4

Tensors = dict[str, Tensor]


def is_constant(t: Tensor, dim: int) -> bool:
    """Whether a tensor holds the same along a dimension."""
    return bool((t == t.narrow(dim, 0, 1)).all())


def columns_apart(t: Tensor) -> Tensor:
    return torch.stack([t, torch.zeros_like(t)], -1)[..., 0]


def columns_outermost(t: Tensor) -> Tensor:
    return t.movedim(-1, 0).contiguous().movedim(0, -1)


def rows_apart(t: Tensor) -> Tensor:
    """Rows that begin at no multiple of 16 bytes."""
    return torch.cat([t, torch.zeros_like(t[..., :1])], -1)[..., :-1]


def padded_rows(t: Tensor) -> Tensor:
    """Rows with a gap between them that keeps them at multiples of 16 bytes."""
    return torch.cat([t, torch.zeros_like(t)], -1)[..., : t.shape[-1]]


def misplaced(t: Tensor) -> Tensor:
    """One element after a multiple of 16 bytes."""
    return torch.cat([torch.zeros_like(t.reshape(-1)[:1]), t.reshape(-1)])[1:].view(t.shape)


def expanded(t: Tensor) -> Tensor:
    """Stride 0 along the dimension in which all are equal."""
    dim = next(dim for dim, size in enumerate(t.shape) if size > 1 and is_constant(t, dim))
    return t.narrow(dim, 0, 1).expand(t.shape)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    made.__name__: made
    for made in (columns_apart, columns_outermost, rows_apart, padded_rows, misplaced, expanded)
}


@dataclass
class Case:
    """An op, its tensors, what each result's gradient is, and which tensors have one."""

    call: Callable[[Tensors], tuple[Tensor, ...]]
    tensors: Tensors
    upstream: Tensors = field(default_factory=dict)  # "d" + the name of a result, in their order
    differentiable: tuple[str, ...] = ()
    written: tuple[str, ...] = ()  # tensors the op writes to, results too; each element needs its own memory
    exact: bool = (
        True  # on Triton the same bits; False: torch's products run too, whose bits depend on strides
    )

    @cached_property
    def expected(self) -> list[Tensor]:
        """What dense tensors give."""
        return self.run()

    def layouts(self, name: str) -> list[str]:
        """The layouts that a tensor can have."""
        tensor = {**self.tensors, **self.upstream}[name]
        found = [layout for layout in LAYOUTS if layout != "expanded"]
        constant = any(size > 1 and is_constant(tensor, dim) for dim, size in enumerate(tensor.shape))
        return [*found, "expanded"] if constant and name not in self.written else found

    def run(self, changed: str | None = None, layout: str | None = None) -> list[Tensor]:
        """Results and gradients, with one tensor in a layout."""
        tensors = {name: t.clone() for name, t in {**self.tensors, **self.upstream}.items()}
        if changed is not None and layout is not None:
            tensors[changed] = LAYOUTS[layout](tensors[changed])
            assert torch.equal(tensors[changed], {**self.tensors, **self.upstream}[changed])
        leaves = [tensors[name].requires_grad_() for name in self.differentiable]
        results = self.call(tensors)
        found = [*results, *(tensors[name] for name in self.written)]
        if leaves:
            upstream = [tensors[name] for name in self.upstream]
            found += torch.autograd.grad(results, leaves, upstream)
        return [t.detach() for t in found]


def cases(dtype: torch.dtype, backend: str) -> dict[str, Case]:
    """Every op on a backend; the operands have one dimension along which they are constant, so they can be expanded."""
    generator = torch.Generator().manual_seed(0)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*shape: int, same: int | None = None, dtype: torch.dtype = dtype) -> Tensor:
        t = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        return t if same is None else t.narrow(same, 0, 1).expand(shape).contiguous()

    def int32(*numbers: Any) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int32)

    def masked(t: Tensors) -> tuple[Tensor, ...]:
        names = ("query", "key", "value", "mask", "bias", "alibi_slopes", "sinks", "key_lengths")
        options = {n: t[n] for n in names}
        return fastattn.attention(
            **options, segment_ids=(t["query_ids"], t["key_ids"]), return_lse=True, backend=backend
        )

    def weighted(t: Tensors) -> tuple[Tensor, ...]:
        return fastattn.attention(
            t["query"], t["key"], t["value"], bias=t["bias"], return_lse=True, return_weights=True,
            backend=backend,
        )  # fmt: skip

    def plain(t: Tensors) -> tuple[Tensor, ...]:
        return fastattn.attention(
            t["query"], t["key"], t["value"], causal=True, return_lse=True, backend=backend
        )

    def varlen(t: Tensors) -> tuple[Tensor, ...]:
        names = ("query", "key", "value", "cu_seqlens_q", "cu_seqlens_k", "alibi_slopes", "sinks")
        return fastattn.attention_varlen(
            **{n: t[n] for n in names}, causal=True, return_lse=True, backend=backend
        )

    def kv_cache(t: Tensors) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return fastattn.attention_kv_cache(**t, return_lse=True, backend=backend)

    def softmax(t: Tensors) -> tuple[Tensor, ...]:
        return (fastattn.softmax(t["x"], mask=t["mask"], scale=0.5, backend=backend),)

    def loss(t: Tensors) -> tuple[Tensor, ...]:
        options = {n: t[n] for n in ("logits", "target", "class_weight")}
        return (fastattn.cross_entropy(**options, label_smoothing=0.1, reduction="none"),)

    def linear_loss(t: Tensors) -> tuple[Tensor, ...]:
        options = {n: t[n] for n in ("hidden", "weight", "bias", "target", "class_weight")}
        return (fastattn.linear_cross_entropy(**options, reduction="none"),)

    heads = (B, H, S, D)
    qkv = {
        "query": normal(*heads, same=0),
        "key": normal(*heads, same=1),
        "value": normal(*heads, same=0),
    }
    scores = {"dout": normal(*heads, same=2), "dlse": normal(B, H, S, same=1, dtype=wide)}
    seen = torch.rand(B, 1, S, S, generator=generator) < 0.7
    slopes = {"alibi_slopes": normal(B, H, same=0, dtype=wide).abs(), "sinks": normal(H, same=0, dtype=wide)}
    tokens = (10, H, D)
    cached = {
        "query": normal(B, H, 1, D, same=0), "k_cache": normal(B, H, 2 * PAGE, D), "v_cache": normal(B, H, 2 * PAGE, D),
        "cache_lengths": int32(4, 4), **slopes,
    }  # fmt: skip
    target = torch.randint(0, V, (S,), generator=generator)
    logits_of = ("query", "key", "value", "bias", "alibi_slopes", "sinks")
    return {
        "attention": Case(plain, qkv, scores, ("query", "key", "value")),
        "attention, masked": Case(
            masked,
            qkv | slopes | {
                "mask": seen, "bias": normal(1, H, S, S, same=2), "query_ids": int32([0, 0, 1, 1, 1, 2]).expand(B, S),
                "key_ids": int32([0, 0, 0, 1, 1, 2]).expand(B, S), "key_lengths": int32(5, 5),
            },
            scores, logits_of,
        ),
        "weights": Case(
            weighted, qkv | {"bias": normal(B, 1, S, S, same=0)},
            scores | {"dweights": normal(B, H, S, S, same=1)}, ("query", "key", "value", "bias"),
        ),
        "varlen": Case(
            varlen,
            {
                "query": normal(*tokens, same=1), "key": normal(*tokens, same=1), "value": normal(*tokens, same=0),
                "cu_seqlens_q": int32(0, 4, 10), "cu_seqlens_k": int32(0, 4, 10), **slopes,
            },
            {"dout": normal(*tokens, same=0), "dlse": normal(H, 10, same=0, dtype=wide)},
            ("query", "key", "value", "alibi_slopes", "sinks"),
        ),
        "kv_cache": Case(
            kv_cache,
            cached | {
                "key": normal(B, H, 1, D, same=0), "value": normal(B, H, 1, D, same=1),
                "rotary_cos": normal(2 * PAGE, D // 2, same=0), "rotary_sin": normal(2 * PAGE, D // 2, same=0),
            },
            written=("k_cache", "v_cache"),
        ),
        "kv_cache, paged": Case(
            kv_cache,
            cached | {
                "k_cache": normal(4, H, PAGE, D, same=1), "v_cache": normal(4, H, PAGE, D, same=0),
                "block_table": int32([2, 1], [2, 1]),
            },
        ),
        "softmax": Case(
            softmax, {"x": normal(3, 4, V, same=1), "mask": torch.rand(3, 1, V, generator=generator) < 0.8},
            {"dout": normal(3, 4, V, same=0)}, ("x",),
        ),
        "cross_entropy": Case(
            loss,
            {"logits": normal(S, V, same=0), "target": target, "class_weight": normal(V, same=0, dtype=wide).abs()},
            {"dlosses": normal(S, same=0)}, ("logits",),
        ),
        "linear_cross_entropy": Case(
            linear_loss,
            {
                "hidden": normal(S, D, same=0), "weight": normal(V, D, same=1), "bias": normal(V, same=0),
                "target": target, "class_weight": normal(V, same=0, dtype=wide).abs(),
            },
            {"dlosses": normal(S, same=0)}, ("hidden", "weight", "bias"), exact=False,
        ),
    }  # fmt: skip


def names(made: dict[str, Case]) -> list[tuple[str, str]]:
    """(case, tensor) for each tensor of each case."""
    return [(case, name) for case, c in made.items() for name in (*c.tensors, *c.upstream)]
