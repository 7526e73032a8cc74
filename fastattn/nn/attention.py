"""Multi-head attention with the interface of `torch.nn.MultiheadAttention`, running on `fastattn.attention`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NoReturn, cast, overload

import torch
from torch import Tensor, nn

from fastattn.nn.heads import Heads
from fastattn.nn.kv_cache import KVCache
from fastattn.nn.masks import MaskError, check_inputs, merge_masks
from fastattn.nn.nested import forward_nested
from fastattn.nn.positions import Rotary, RotaryTable, alibi_slopes
from fastattn.ops import arguments, spelling
from fastattn.ops.attention import attention
from fastattn.ops.plain import quietly
from fastattn.ops.symbolic import any_proxy, record_module

# Attributes that torch's class does not have.
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


class MultiHeadAttention(Heads):
    r"""softmax(q k^T / sqrt(D) + masks) v over H heads, between an input and an output projection.

    The positional parameters, `forward`, parameter names, initialisation and results are those of
    `torch.nn.MultiheadAttention` (bool masks: True = do not attend; float masks are added). Differences: a
    row with no key to see gives 0 where torch gives NaN; torch's inference fast path, which reads the weights past
    `forward`, is never taken, also inside `nn.TransformerEncoderLayer`; dropout draws from fastattn's generator, so
    its masks agree with torch's in distribution only; TorchScript is not supported.

    Args:
        embed_dim, num_heads: E, the width of queries and outputs, and H, which divides E unless head_dim is given.
        dropout: of attention weights in training mode, in [0, 1).
        bias: whether the projections have biases.
        add_bias_kv, add_zero_attn: append a learned key and value, and one of zeros, that every query sees.
        kdim, vdim: widths of keys and values, E by default.
        batch_first: batched inputs and outputs are (N, L, E), not (L, N, E).
        device, dtype: of the parameters.

    Keyword Args:
        num_kv_heads: key/value heads, a divisor of num_heads (grouped-query attention); `in_proj_weight` then has
            (num_heads + 2 * num_kv_heads) * head_dim rows.
        head_dim: size of a head, embed_dim / num_heads by default; another goes without kdim and vdim.
        out_bias: whether the output projection has a bias; as `bias` by default.
        scale: factor on the scores, head_dim**-0.5 by default.
        rotary: True or a `Rotary`: rotary position embedding of queries and keys, after qk_norm. Query i has position
            i + S - L, as for window and alibi.
        window: (left, right) keys visible around each query; None or -1 is unbounded.
        alibi: True for the standard slopes, or a (H,) tensor: adds -slope * distance; a buffer `alibi_slopes`.
        softcap: scores become softcap * tanh(scores / softcap).
        sinks: True adds a learnable parameter `sinks` (H,), one logit per head that takes weight and carries no value.
        qk_norm: True normalises each head of q and k by a learned RMSNorm (`q_norm`, `k_norm`); a function
            is called with head_dim to make the two norms.
        backend: "auto", "cuda", "triton" or "torch".

    Raises:
        ValueError, TypeError: an option has a wrong value or type, or options do not fit together.
        AssertionError: num_heads does not divide embed_dim, as in torch.
    """

    scale: float | None = None
    window: tuple[int | None, int | None] | None
    alibi_slopes: Tensor | None
    softcap: float | None
    sinks: nn.Parameter | None
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
        """Add the attributes of this class to a torch module; the constructor and `swap_attention` call it once.

        swapped: the module was made by torch; `restore_attention` gives it torch's class again.
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
        arguments.softcap_or_zero(softcap, dtype)
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
        """Remove the attributes that `add_extras` added, leaving exactly a torch module's."""
        for name in _EXTRA_ATTRIBUTES:
            with suppress(AttributeError):
                delattr(self, name)
        hooks = self.register_forward_pre_hook(keep_forward).hooks_dict_ref() or {}
        for key in [key for key, hook in hooks.items() if hook is keep_forward]:
            del hooks[key]

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
        """Attention as torch.nn.MultiheadAttention.forward; the keyword-only options are additions.

        Args:
            query: (L, E), (L, N, E), or (N, L, E) where batch_first, in the dtype of the weights or under autocast.
            key, value: the same with S for L, and kdim and vdim for E; or all three nested, where batch_first.
            key_padding_mask: (N, S) or (S,), bool, True = do not attend, or float, added.
            need_weights, average_attn_weights: whether to return the weights, and their mean over heads.
            attn_mask: (L, S) or (N * H, L, S), bool, True = do not attend, or float, added.
            is_causal: a hint that attn_mask is causal, as in torch; needs it.
            causal: hide later keys (aligned to the last key) without an attn_mask.
            segment_ids: (N, L) integers, or a pair (N, L), (N, S): only equal ids attend, negative ids nothing.
            key_lengths: (N,) integers, valid keys of each sequence.
            rotary: cos and sin, in place of positions 0, 1, ... and of the module's own `rotary`.
            cache: keys and values of earlier calls, to which this call's are appended; masks, segment ids of the keys
                and lengths then cover those before as well.

        Returns:
            The output, in query's shape, and the weights, (N, L, S), or (N, H, L, S) where not averaged, without N for
            unbatched input; None without need_weights.

        Raises:
            ValueError, TypeError: a tensor does not fit, or options do not go together. Shapes and masks that torch
                rejects raise an error that is also torch's: an AssertionError, or a RuntimeError for masks.
        """
        if any_proxy(query, key, value):
            return cast("tuple[Tensor, Tensor | None]", record_module(self, locals()))
        if query.is_nested or key.is_nested or value.is_nested:
            if is_causal or any(
                x is not None for x in (attn_mask, key_padding_mask, segment_ids, key_lengths, rotary, cache)
            ):
                raise ValueError("query: a nested tensor goes without masks, lengths, segments and cache")
            options = {"need_weights": need_weights, "average_attn_weights": average_attn_weights}
            return forward_nested(self, query, key, value, causal=causal, **options)
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
        held = 0 if cache is None else cache.length
        if is_causal and key_padding_mask is None and not need_weights and not positional and not held:
            # torch trusts the hint here and uses attn_mask elsewhere; positions count from the last key in both, and
            # with earlier keys the hint does not say where a query stands
            alignment, attn_mask = "top_left", None
        masks = quietly(
            merge_masks,
            attn_mask,
            key_padding_mask,
            batch=query.shape[1 - seq_dim] if batched else 1,
            num_heads=self.num_heads,
            seqlen_q=query.shape[seq_dim],
            seqlen_k=key.shape[seq_dim] + held,
            batched=batched,
        )

        q, k, v = self._project(query, key, value)  # (B, H, L, D), (B, Hkv, S, D) twice
        q, k = self._place(q, k, rotary, held)
        if appended:
            k, v = self._append_keys(k, v)
            masks = masks.padded(appended)
        attend: Callable[..., Any] = attention if cache is None else cache.attention
        results = attend(
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
