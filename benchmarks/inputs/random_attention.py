"""Random calls of `attention`: sizes, dtypes, strides and any mixture of features."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from measure.rounding import terms_of_dscores, terms_of_one_key

SEQUENCES = (1, 2, 15, 17, 63, 64, 65, 113, 127, 128, 129, 191, 200, 255, 257, 384, 511, 520, 1000, 1023)
HEAD_DIMS = (1, 8, 16, 17, 32, 40, 59, 64, 80, 96, 111, 128, 160, 192, 200, 256)
CALLS_PER_KIND = 16
FEW = (
    4  # plain torch's error of fewer numbers, each a sum of many terms that cancel, is too often 0 by chance
)


class RandomCall:
    """A call drawn from a seed: sizes, dtype, strides and any mixture of features.

    CALLS_PER_KIND consecutive seeds share the dtype, head dims and features that kernels are compiled for.
    """

    def __init__(self, seed: int, device: torch.device, longest: int) -> None:
        self.draw, self.kind = random.Random(seed), random.Random(seed // CALLS_PER_KIND)
        self.generator = torch.Generator(device).manual_seed(seed)
        self.device = device
        draw, kind = self.draw, self.kind
        lengths = [length for length in SEQUENCES if length <= longest]
        self.kv_heads, group = draw.choice([1, 2, 3]), kind.choice([1, 1, 2, 4])
        self.batch, self.heads = draw.choice([1, 2, 3]), self.kv_heads * group
        self.seqlen_q, self.seqlen_k = draw.choice(lengths), draw.choice(lengths)
        if draw.random() < 0.4:
            self.seqlen_k = self.seqlen_q
        self.head_dim = kind.choice(HEAD_DIMS)
        self.value_dim = self.head_dim if kind.random() < 0.7 else kind.choice(HEAD_DIMS)
        self.dtype = kind.choice([torch.float16, torch.bfloat16, torch.bfloat16, torch.float32])
        self.rows_first = draw.random() < 0.5  # (B, S, H, D) in memory
        self.options = self._options()
        self.operands = {
            "query": self._operand(self.heads, self.seqlen_q, self.head_dim),
            "key": self._operand(self.kv_heads, self.seqlen_k, self.head_dim),
            "value": self._operand(self.kv_heads, self.seqlen_k, self.value_dim),
        }
        self.dout = self._normal(self.batch, self.heads, self.seqlen_q, self.value_dim).to(self.dtype)
        self.dlse = self._normal(self.batch, self.heads, self.seqlen_q)

    def describe(self) -> str:
        """The call in a line."""
        shape = f"B{self.batch} H{self.heads}/{self.kv_heads} S{self.seqlen_q},{self.seqlen_k}"
        shape += f" D{self.head_dim},{self.value_dim}"
        layout = "bshd" if self.rows_first else "bhsd"
        features = {name: _shape(value) for name, value in self.options.items()}
        return f"{shape} {str(self.dtype)[6:]} {layout} {features}"

    def run(
        self, attend: Callable[..., Any], dtype: torch.dtype, gradients: bool = True, **extra: Any
    ) -> dict[str, Tensor]:
        """out, lse and the gradient of every differentiable input, from upstream gradients of out and lse.

        Without `gradients` no input requires any, so that a backend needs no backward.
        """
        leaves = {n: t.detach().to(dtype).requires_grad_(gradients) for n, t in self.operands.items()}
        options = dict(self.options)
        for name in {"bias", "alibi_slopes", "sinks"} & options.keys():
            kept = dtype if dtype == torch.float64 else options[name].dtype
            options[name] = leaves[name] = options[name].detach().to(kept).requires_grad_(gradients)
        out, lse = attend(
            *(leaves[n] for n in ("query", "key", "value")), **options, return_lse=True, **extra
        )
        if not gradients:
            return {"out": out.detach(), "lse": lse.detach()}
        grads = torch.autograd.grad(
            (out, lse),
            tuple(leaves.values()),
            (self.dout.to(out.dtype), self.dlse.to(lse.dtype)),
            allow_unused=True,
        )
        results = {"out": out.detach(), "lse": lse.detach()}
        for (name, leaf), grad in zip(leaves.items(), grads):
            results["d" + name] = torch.zeros_like(leaf) if grad is None else grad
        return results

    def cancelling_terms(self) -> dict[str, Tensor]:
        """The terms of gradients that cancel: of dquery and dkey in rows that see one key, whose weight is 1 whatever
        the score, and of the gradients of a bias, slopes or sinks of fewer than FEW numbers."""

        of_few = self._terms_of_few()
        if self.options.get("dropout_p"):  # of an output that dropout has scaled the rounding does not cancel
            return of_few
        query, key, value = self.operands.values()
        dquery, dkey = terms_of_one_key(query, key, value, self.dout, self.dlse, **self.options)
        return {"dquery": dquery, "dkey": dkey, **of_few}

    def _terms_of_few(self) -> dict[str, Tensor]:
        """For the gradients of bias, slopes and sinks of fewer than FEW numbers: the sums of their terms' absolute
        values; under dropout of all terms, as if each were kept."""
        from fastattn import reference

        few = {
            n: self.options[n]
            for n in ("bias", "alibi_slopes", "sinks")
            if n in self.options and self.options[n].numel() < FEW
        }
        if not few:
            return {}
        options = {n: t for n, t in self.options.items() if not n.startswith("dropout")}
        query, key, value = (t.double() for t in self.operands.values())
        out, lse, weights = reference.attention(
            query, key, value, **options, return_lse=True, return_weights=True
        )
        dout = self.dout.double() / (1 - self.options.get("dropout_p", 0.0))
        of_scores, delta = terms_of_dscores(value, weights, dout, self.dlse)
        terms = {}
        if "bias" in few:
            terms["dbias"] = of_scores.sum_to_size(few["bias"].shape)
        if "alibi_slopes" in few:
            rows, columns = (torch.arange(n, device=self.device) for n in self._sizes()[2:])
            first = 0 if options["causal"] == "top_left" else self.seqlen_k - self.seqlen_q
            terms["dalibi_slopes"] = (of_scores * (rows[:, None] + first - columns).abs()).sum((0, 2, 3))
        if "sinks" in few:
            of_sink = torch.exp(few["sinks"].double()[:, None] - lse)
            terms["dsinks"] = (of_sink * (delta[..., 0] + self.dlse.double().abs())).sum((0, 2))
            # In 16 bits out is rounded, by plain torch too, and delta = dout . out carries that: the errors are
            # independent, so their squares add. Plain torch's own error in one number may be small by chance.
            if self.dtype != torch.float32:
                rounded = (of_sink[..., None] * out * dout).square().sum((0, 2, 3)).sqrt()
                of_float32 = torch.finfo(self.dtype).eps / torch.finfo(torch.float32).eps
                terms["dsinks"] = terms["dsinks"].maximum(of_float32 * rounded)
        return terms

    def _options(self) -> dict[str, Any]:
        draw, kind = self.draw, self.kind
        options: dict[str, Any] = {"causal": kind.choice([False, True, True, "top_left"])}
        if kind.random() < 0.3:
            options["window"] = (draw.choice([0, 5, 40, 130]), kind.choice([0, 70, None]))
        if kind.random() < 0.25:
            options["key_lengths"] = self._integers(0, self.seqlen_k + 1, self.batch)
        if kind.random() < 0.5:  # half of the calls use only what every backend supports
            return options
        for name, chance in (("mask", 0.25), ("bias", 0.3)):
            if kind.random() < chance:
                shape = [size if draw.random() < 0.6 else 1 for size in self._sizes()]
                noise = self._normal(*shape)
                options[name] = noise > -1.3 if name == "mask" else noise
        if kind.random() < 0.3:
            options["segment_ids"] = tuple(self._integers(-1, 3, self.batch, n) for n in self._sizes()[2:])
        if kind.random() < 0.25:
            options["alibi_slopes"] = self._normal(self.heads).abs()
        if kind.random() < 0.25:
            options["softcap"] = 2.0
        if kind.random() < 0.25:
            options["sinks"] = self._normal(self.heads)
        if kind.random() < 0.25:
            options |= {"dropout_p": 0.2, "dropout_seed": draw.randrange(1 << 40)}
        return options

    def _sizes(self) -> tuple[int, int, int, int]:
        return self.batch, self.heads, self.seqlen_q, self.seqlen_k

    def _operand(self, heads: int, length: int, dim: int) -> Tensor:
        if self.rows_first:
            return self._normal(self.batch, length, heads, dim).transpose(1, 2).to(self.dtype)
        return self._normal(self.batch, heads, length, dim).to(self.dtype)

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device)

    def _integers(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator, device=self.device)


def _shape(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_shape(item) for item in value)
    return tuple(value.shape) if isinstance(value, Tensor) else value
