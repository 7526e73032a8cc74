"""Multi-head attention: `torch.nn.MultiheadAttention` to its user, running on `fastattn.attention`."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NoReturn, cast, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn.nn.kv_cache import KVCache
from fastattn.nn.linear import linear
from fastattn.nn.masks import MaskError, ShapeError, check_inputs, merge_masks
from fastattn.nn.positions import Rotary, RotaryTable, alibi_slopes, apply_rotary
from fastattn.ops import arguments, spelling
from fastattn.ops.attention import attention
from fastattn.ops.plain import quietly
from fastattn.ops.symbolic import any_proxy, record_module

# What an instance has that torch's has not.
_EXTRA_ATTRIBUTES = (
    "num_kv_heads",
    "scale",
    "rotary",
    "window",
    "alibi_slopes",
    "softcap",
    "sinks",
    "q_norm",
    "k_norm",
    "backend",
    "swapped",
)


class MultiHeadAttention(nn.MultiheadAttention):
    r"""softmax(q k^T / sqrt(D) + masks) v over H heads, between an input and an output projection.

    The positional parameters, `forward`, parameter names, initialisation and results are those of
    `torch.nn.MultiheadAttention` (bool masks: True = do not attend; float masks are added). Differences: a
    row with no key to see gives 0 where torch gives NaN; torch's inference fast path, which reads the weights past
    `forward`, is never taken, also inside `nn.TransformerEncoderLayer`; dropout draws from fastattn's generator, so
    its masks agree with torch's in distribution only; TorchScript is not supported.

    Keyword Args:
        num_kv_heads: key/value heads, a divisor of num_heads (grouped-query attention); `in_proj_weight` then has
            (num_heads + 2 * num_kv_heads) * head_dim rows.
        head_dim: size of a head, embed_dim / num_heads by default; another goes without kdim and vdim.
        out_bias: whether the output projection has a bias; as `bias` by default.
        scale: what scores are multiplied by, head_dim**-0.5 by default.
        rotary: True, or a `Rotary`, turns queries and keys by their positions (after qk_norm); query i stands at key
            position i + S - L, as for window and alibi.
        window: (left, right) keys visible around each query; None or -1 is unbounded.
        alibi: True for the standard slopes, or a (H,) tensor: adds -slope * distance; a buffer `alibi_slopes`.
        softcap: scores become softcap * tanh(scores / softcap).
        sinks: True adds a learnable parameter `sinks` (H,), one logit per head that takes weight and carries no value.
        qk_norm: True normalises each head of q and k by a learned RMSNorm (`q_norm`, `k_norm`); a function of head_dim
            makes the two norms.
        backend: "auto" or the name of a fastattn backend.

    Raises ValueError for options that do not fit together; shapes that torch rejects raise ValueError too (and are
    also what torch raises: AssertionError, or RuntimeError for masks).
    """

    num_kv_heads: int
    scale: float | None = None
    rotary: Rotary | None
    window: tuple[int | None, int | None] | None
    alibi_slopes: Tensor | None
    softcap: float | None
    sinks: nn.Parameter | None
    q_norm: nn.Module | None
    k_norm: nn.Module | None
    backend: str
    swapped: bool

    @spelling.without_unknown
    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        out_bias: bool | None = None,
        scale: float | None = None,
        rotary: bool | Rotary = False,
        window: tuple[int | None, int | None] | None = None,
        alibi: bool | Tensor = False,
        softcap: float | None = None,
        sinks: bool = False,
        qk_norm: bool | Callable[[int], nn.Module] = False,
        backend: str = "auto",
        **unknown: NoReturn,
    ) -> None:
        if unknown:
            raise spelling.unexpected(MultiHeadAttention, unknown)
        if head_dim is not None and not (arguments.is_integer(head_dim) and head_dim > 0):
            raise ValueError(f"head_dim: got {head_dim!r}, needs a positive integer")
        own_width = head_dim is not None and head_dim * num_heads != embed_dim
        if own_width and (kdim is not None or vdim is not None or add_bias_kv):
            raise ValueError(
                f"head_dim: got {head_dim}, which with kdim, vdim or add_bias_kv must be embed_dim / num_heads"
            )
        super().__init__(
            embed_dim,
            1 if own_width else num_heads,
            dropout=dropout,
            bias=bias,
            add_bias_kv=add_bias_kv,
            add_zero_attn=add_zero_attn,
            kdim=kdim,
            vdim=vdim,
            batch_first=batch_first,
            device=device,
            dtype=dtype,
        )
        if (add_bias_kv or add_zero_attn) and (rotary or alibi is not False or window is not None):
            raise ValueError(
                "add_bias_kv, add_zero_attn: append keys that have no position, "
                "which do not go with rotary, alibi or window"
            )
        if own_width:
            assert head_dim is not None
            self.num_heads, self.head_dim = num_heads, head_dim
        if out_bias is False:
            self.out_proj.register_parameter("bias", None)
        elif out_bias and self.out_proj.bias is None:
            self.out_proj.bias = nn.Parameter(self.out_proj.weight.new_zeros(embed_dim))
        self.add_extras(
            num_kv_heads=num_kv_heads,
            scale=scale,
            rotary=rotary,
            window=window,
            alibi=alibi,
            softcap=softcap,
            sinks=sinks,
            qk_norm=qk_norm,
            backend=backend,
        )

    def add_extras(
        self,
        *,
        num_kv_heads: int | None = None,
        scale: float | None = None,
        rotary: bool | Rotary = False,
        window: tuple[int | None, int | None] | None = None,
        alibi: bool | Tensor = False,
        softcap: float | None = None,
        sinks: bool = False,
        qk_norm: bool | Callable[[int], nn.Module] = False,
        backend: str = "auto",
        swapped: bool = False,
    ) -> None:
        """Give a torch module what this class has more; the constructor and `swap_attention` call this, once.

        swapped: the module was made by torch and will be given back to it.
        """
        device, dtype = self.out_proj.weight.device, self.out_proj.weight.dtype
        self.num_kv_heads = self.num_heads if num_kv_heads is None else num_kv_heads
        if self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads: got {num_kv_heads}, needs a divisor of num_heads={self.num_heads}"
            )
        if self.num_kv_heads != self.num_heads or self.num_heads * self.head_dim != self.embed_dim:
            self._resize_projections()
        arguments.score_scale(scale, self.head_dim, dtype)
        self.scale = scale
        if rotary is True:
            rotary = Rotary(self.head_dim)
        if isinstance(rotary, Rotary) and rotary.head_dim != self.head_dim:
            raise ValueError(f"rotary: got one for head_dim {rotary.head_dim}, needs {self.head_dim}")
        self.rotary = rotary or None
        arguments.window_bounds(window)
        arguments.positive_or_zero("softcap", softcap, dtype)
        arguments.check_backend(backend)
        self.window = window
        self.softcap = softcap
        self.backend = backend
        self.swapped = swapped
        if isinstance(alibi, Tensor) and alibi.shape != (self.num_heads,):
            raise ValueError(f"alibi: got shape {tuple(alibi.shape)}, needs ({self.num_heads},)")
        slopes = alibi_slopes(self.num_heads, device) if alibi is True else alibi
        self.register_buffer("alibi_slopes", slopes if isinstance(slopes, Tensor) else None)
        zeros = torch.zeros(self.num_heads, device=device, dtype=dtype)
        self.register_parameter("sinks", nn.Parameter(zeros) if sinks else None)
        make_norm = partial(nn.RMSNorm, device=device, dtype=dtype) if qk_norm is True else qk_norm
        self.q_norm = make_norm(self.head_dim) if make_norm else None
        self.k_norm = make_norm(self.head_dim) if make_norm else None
        self.register_forward_pre_hook(keep_forward)

    def __prepare_scriptable__(self) -> None:
        """Called first by torch.jit.script."""
        way = "fastattn.restore_attention(model) puts torch's back" if self.swapped else "use torch's module"
        raise RuntimeError(
            f"torch.jit.script cannot compile fastattn.MultiHeadAttention: {way} "
            "(after swap_attention, restore_attention does); torch.jit.trace and torch.export work as it is"
        )

    def remove_extras(self) -> None:
        """Take away what `add_extras` gave, leaving exactly a torch module's attributes."""
        for name in _EXTRA_ATTRIBUTES:
            with suppress(AttributeError):
                delattr(self, name)
        hooks = self.register_forward_pre_hook(keep_forward).hooks_dict_ref() or {}
        for key in [key for key, hook in hooks.items() if hook is keep_forward]:
            del hooks[key]

    def _resize_projections(self) -> None:
        """Give torch's projections the sizes of num_kv_heads and head_dim, initialised as torch would."""
        q_dim, kv_dim = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        rows = {"k_proj_weight": kv_dim, "v_proj_weight": kv_dim}
        rows |= {"in_proj_weight": q_dim + 2 * kv_dim, "in_proj_bias": q_dim + 2 * kv_dim}
        for name, size in rows.items():
            old = getattr(self, name)
            if old is not None:
                setattr(self, name, nn.Parameter(old.new_empty((size, *old.shape[1:]))))
        for name in ("bias_k", "bias_v"):
            if (old := getattr(self, name)) is not None:
                setattr(self, name, nn.Parameter(old.new_empty((1, 1, kv_dim))))
        if q_dim != self.embed_dim:
            out = self.out_proj
            out.in_features, out.weight = q_dim, nn.Parameter(out.weight.new_empty((self.embed_dim, q_dim)))
            nn.init.kaiming_uniform_(out.weight, a=math.sqrt(5))  # torch.nn.Linear's
        self._initialise()

    def _initialise(self) -> None:
        """Draw the parameters as torch's module does, in the same order."""
        weights = (self.in_proj_weight, self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        for weight in weights:
            if weight is not None:
                nn.init.xavier_uniform_(weight)
        if self.in_proj_bias is not None:
            nn.init.zeros_(self.in_proj_bias)
        if self.out_proj.bias is not None:
            nn.init.zeros_(self.out_proj.bias)
        for extra in (self.bias_k, self.bias_v):
            if extra is not None:
                nn.init.xavier_normal_(extra)

    # fmt: off
    @overload
    def forward(
        self, query: Tensor, key: Tensor, value: Tensor,
        key_padding_mask: Tensor | None = None, need_weights: Literal[True] = True,
        attn_mask: Tensor | None = None, average_attn_weights: bool = True, is_causal: bool = False, *,
        causal: bool = False, segment_ids: Tensor | tuple[Tensor, Tensor] | None = None,
        key_lengths: Tensor | None = None, rotary: RotaryTable | None = None, cache: KVCache | None = None,
    ) -> tuple[Tensor, Tensor]: ...
    @overload
    def forward(
        self, query: Tensor, key: Tensor, value: Tensor,
        key_padding_mask: Tensor | None, need_weights: Literal[False],
        attn_mask: Tensor | None = None, average_attn_weights: bool = True, is_causal: bool = False, *,
        causal: bool = False, segment_ids: Tensor | tuple[Tensor, Tensor] | None = None,
        key_lengths: Tensor | None = None, rotary: RotaryTable | None = None, cache: KVCache | None = None,
    ) -> tuple[Tensor, None]: ...
    @overload
    def forward(
        self, query: Tensor, key: Tensor, value: Tensor,
        key_padding_mask: Tensor | None = None, *, need_weights: Literal[False],
        attn_mask: Tensor | None = None, average_attn_weights: bool = True, is_causal: bool = False,
        causal: bool = False, segment_ids: Tensor | tuple[Tensor, Tensor] | None = None,
        key_lengths: Tensor | None = None, rotary: RotaryTable | None = None, cache: KVCache | None = None,
    ) -> tuple[Tensor, None]: ...
    @overload
    def forward(
        self, query: Tensor, key: Tensor, value: Tensor,
        key_padding_mask: Tensor | None = None, need_weights: bool = True,
        attn_mask: Tensor | None = None, average_attn_weights: bool = True, is_causal: bool = False, *,
        causal: bool = False, segment_ids: Tensor | tuple[Tensor, Tensor] | None = None,
        key_lengths: Tensor | None = None, rotary: RotaryTable | None = None, cache: KVCache | None = None,
    ) -> tuple[Tensor, Tensor | None]: ...
    # fmt: on
    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        causal: bool = False,
        segment_ids: Tensor | tuple[Tensor, Tensor] | None = None,
        key_lengths: Tensor | None = None,
        rotary: RotaryTable | None = None,
        cache: KVCache | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """(output, weights or None), as torch.nn.MultiheadAttention.forward; the keyword-only options are additions.

        Shapes: query (L, E), (L, N, E), or (N, L, E) where batch_first; key (..., kdim) and value (..., vdim) likewise
        with S for L; key_padding_mask (N, S) or (S,); attn_mask (L, S) or (N * H, L, S). Weights are (N, L, S), or
        (N, H, L, S) where not averaged, without N for unbatched input.

        causal: hide later keys (aligned to the last key) without an attn_mask. segment_ids (N, L), or a pair (N, L),
        (N, S): only equal ids attend, negative ids attend nothing. key_lengths (N,): valid keys of each sequence.
        rotary: cos and sin to turn queries and new keys by, in place of positions 0, 1, ... and of the module's own
        `rotary`. cache: keys and values of earlier calls, to which this call's are appended; masks, segment ids of the
        keys and lengths then cover those before as well.
        """
        if any_proxy(query, key, value):
            return cast("tuple[Tensor, Tensor | None]", record_module(self, locals()))
        if query.is_nested or key.is_nested or value.is_nested:
            if is_causal or any(
                x is not None for x in (attn_mask, key_padding_mask, segment_ids, key_lengths, rotary, cache)
            ):
                raise ValueError("query: a nested tensor goes without masks, lengths, segments and cache")
            return self._forward_nested(query, key, value, need_weights, average_attn_weights, causal)
        widths = (self.embed_dim, self.kdim, self.vdim)
        batched = quietly(check_inputs, query, key, value, widths=widths, batch_first=self.batch_first)
        if is_causal and attn_mask is None:
            raise MaskError(
                "is_causal: is a hint about attn_mask, which is None; causal=True needs no attn_mask"
            )
        if is_causal and causal:
            raise ValueError("causal: got True besides is_causal=True, needs one of them")
        appended = (self.bias_k is not None) + self.add_zero_attn
        if appended and (causal or any(x is not None for x in (segment_ids, key_lengths, rotary, cache))):
            raise ValueError(
                "add_bias_kv, add_zero_attn: append keys that have no position, "
                "which do not go with causal, segment_ids, key_lengths, rotary or cache"
            )
        seq_dim = 1 if batched and self.batch_first else 0
        alignment: bool | str = causal
        positional = self.rotary is not None or self.window is not None or self.alibi_slopes is not None
        if is_causal and key_padding_mask is None and not need_weights and not positional:
            # torch trusts the hint here and uses attn_mask elsewhere; positions count from the last key in both
            alignment, attn_mask = "top_left", None
        masks = quietly(
            merge_masks,
            attn_mask,
            key_padding_mask,
            batch=query.shape[1 - seq_dim] if batched else 1,
            num_heads=self.num_heads,
            seqlen_q=query.shape[seq_dim],
            seqlen_k=key.shape[seq_dim] + (0 if cache is None else cache.length),
            batched=batched,
        )

        q, k, v = self._project(query, key, value)  # (B, H, L, D), (B, Hkv, S, D) twice
        q, k = self._place(q, k, rotary, 0 if cache is None else cache.length)
        if cache is not None:
            k, v = cache.append(k, v)
        if appended:
            k, v = self._append_keys(k, v)
            masks = masks.padded(appended)
        results = attention(
            q,
            k,
            v,
            causal=alignment,
            window=self.window,
            mask=masks.mask,
            bias=masks.bias,
            segment_ids=segment_ids,
            key_lengths=key_lengths,
            alibi_slopes=self.alibi_slopes,
            softcap=self.softcap,
            sinks=self.sinks,
            dropout_p=self.dropout if self.training else 0.0,
            scale=self.scale,
            return_weights=("mean" if average_attn_weights else True) if need_weights else False,
            backend=self.backend,
        )
        out, weights = results if isinstance(results, tuple) else (results, None)
        out = self._merge_heads(out, batched)  # (..., H * D)
        out = self._project_out(out)
        return out, weights if batched or weights is None else weights.squeeze(0)

    if TYPE_CHECKING:  # nn.Module says that a call of a module returns anything
        __call__ = forward

    def _forward_nested(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        need_weights: bool,
        average_attn_weights: bool,
        causal: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Pad, attend within each sequence's length, and cut the output back; the weights stay padded."""
        for name, tensor in (("query", query), ("key", key), ("value", value)):
            if not tensor.is_nested or tensor.layout != torch.strided or not self.batch_first:
                got = f"nested={tensor.is_nested}, layout={tensor.layout}, batch_first={self.batch_first}"
                raise ShapeError(f"{name}: got {got}, needs all three nested and strided, and batch_first")
        lengths_q, lengths_k = ([row.shape[0] for row in tensor.unbind()] for tensor in (query, key))
        if causal and lengths_q != lengths_k:
            raise ShapeError("key: causal nested attention needs the query's lengths")
        padded_q = torch.nested.to_padded_tensor(query, 0.0)
        padded_k = padded_q if key is query else torch.nested.to_padded_tensor(key, 0.0)
        padded_v = padded_k if value is key else torch.nested.to_padded_tensor(value, 0.0)
        out, weights = self.forward(
            padded_q,
            padded_k,
            padded_v,
            need_weights=need_weights,
            average_attn_weights=average_attn_weights,
            causal=causal,
            key_lengths=torch.tensor(lengths_k, dtype=torch.int32, device=query.device),
        )
        return torch.nested.as_nested_tensor([row[:n] for row, n in zip(out, lengths_q)]), weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values by head; one product of the packed weights where the inputs are one tensor."""
        heads = [self.num_heads, self.num_kv_heads, self.num_kv_heads]
        weight, bias = self.in_proj_weight, self.in_proj_bias
        if weight is not None and query is key and key is value:
            q, k, v = self._split_heads(linear(query, weight, bias)).split(heads, dim=1)
            return q, k, v
        rows = [n * self.head_dim for n in heads]
        if weight is not None:
            weights = weight.split(rows)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None, None, None) if bias is None else bias.split(rows)
        q, k, v = (
            self._split_heads(linear(x, w, b)) for x, w, b in zip((query, key, value), weights, biases)
        )
        return q, k, v

    def _project_out(self, out: Tensor) -> Tensor:
        """(..., H * D) -> (..., E)."""
        return linear(out, self.out_proj.weight, self.out_proj.bias)

    def _split_heads(self, x: Tensor) -> Tensor:
        """A view (B, heads, S, D) of (S, heads * D), (B, S, heads * D) or, sequence first, (S, B, heads * D)."""
        x = x.unflatten(-1, (x.shape[-1] // self.head_dim, self.head_dim))  # no -1: a size may be 0
        if x.dim() == 3:
            return x.transpose(0, 1).unsqueeze(0)
        return x.transpose(1, 2) if self.batch_first else x.permute(1, 2, 0, 3)

    def _merge_heads(self, out: Tensor, batched: bool) -> Tensor:
        """The inverse of `_split_heads`; no copy, as attention keeps the query's memory order."""
        if not batched:
            return out.squeeze(0).transpose(0, 1).flatten(-2)
        return (out.transpose(1, 2) if self.batch_first else out.permute(2, 0, 1, 3)).flatten(-2)

    def _place(self, q: Tensor, k: Tensor, table: RotaryTable | None, past: int) -> tuple[Tensor, Tensor]:
        """Normalise and rotate queries and keys, as far as the module does either."""
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if table is not None:
            interleaved = self.rotary is not None and self.rotary.interleaved
            q, k = (apply_rotary(x, table, interleaved=interleaved) for x in (q, k))
        elif self.rotary is not None:
            seqlen_q, seqlen_k = q.shape[2], k.shape[2]
            first = past + min(0, seqlen_k - seqlen_q)  # the last query and the last key share a position
            positions = torch.arange(first, past + seqlen_k, device=q.device)
            cos, sin = self.rotary.table(positions, torch.promote_types(q.dtype, torch.float32))
            q, k = (
                self.rotary.apply(x, (cos[len(positions) - n :], sin[len(positions) - n :]))
                for x, n in ((q, seqlen_q), (k, seqlen_k))
            )
        return q, k

    def _append_keys(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k and v with the learned pair of add_bias_kv, then the zero pair of add_zero_attn, behind them."""
        if self.bias_k is not None and self.bias_v is not None:
            shape = (k.shape[0], self.num_kv_heads, 1, self.head_dim)
            last_k, last_v = (
                b.to(k.dtype).view(1, *shape[1:]).expand(shape) for b in (self.bias_k, self.bias_v)
            )
            k, v = torch.cat((k, last_k), dim=2), torch.cat((v, last_v), dim=2)
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        return k, v

    def extra_repr(self) -> str:
        """The options in use."""
        shown: dict[str, Any] = {
            "embed_dim": self.embed_dim,
            "num_heads": self.num_heads,
            "num_kv_heads": self.num_kv_heads if self.num_kv_heads != self.num_heads else None,
            "head_dim": self.head_dim if self.num_heads * self.head_dim != self.embed_dim else None,
            "scale": self.scale,
            "dropout": self.dropout or None,
            "batch_first": self.batch_first or None,
            "rotary": self.rotary,
            "window": self.window,
            "alibi": True if self.alibi_slopes is not None else None,
            "softcap": self.softcap,
            "sinks": True if self.sinks is not None else None,
            "backend": None if self.backend == "auto" else self.backend,
        }
        return ", ".join(f"{name}={value}" for name, value in shown.items() if value is not None)


def keep_forward(module: nn.Module, args: tuple[Any, ...]) -> None:
    """A forward pre-hook that does nothing: its presence keeps torch's encoder layers from bypassing `forward`."""
