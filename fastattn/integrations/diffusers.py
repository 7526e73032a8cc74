"""Hugging Face diffusers: `register()` once, then `model.set_attention_backend("fastattn")`."""

from __future__ import annotations

import copyreg
import inspect
from collections.abc import Callable
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any

from torch import Tensor

from fastattn.backends import NAMES
from fastattn.ops.sdpa import scaled_dot_product_attention

NAME = "fastattn"
_PARAMETERS = {"query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa"}


def register() -> None:
    """Make "fastattn" an attention backend of every diffusers model.

    Then `model.set_attention_backend("fastattn")`, or `with diffusers.attention_backend("fastattn"):`;
    "fastattn_torch" and the like name one of fastattn's own backends. Registers only; calling it again changes
    nothing. A model that was pickled with the backend set registers it where it is loaded.

    Masks are bool (True = attend) or float (added), (B, S), (L, S) or (B, H, L, S), broadcast; a mask whose shape is
    (B, S) covers keys, as diffusers reads it. Head dims over 256 and context parallelism are refused.

    Raises:
        ImportError: diffusers is not installed, or its registry of backends is not as expected.
    """
    dispatch = _dispatch()
    names, registry = dispatch.AttentionBackendName, dispatch._AttentionBackendRegistry
    for name, function in _FUNCTIONS.items():
        if name not in names._value2member_map_:
            _add_member(names, name)
        member = names(name)
        if member not in registry._backends:
            registry.register(member)(function)
    copyreg.pickle(names, _reduced)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    _parallel_config: Any = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """diffusers' attention function: tensors (B, L, H, D), otherwise `scaled_dot_product_attention`.

    Raises ValueError, TypeError: an argument does not fit; the message names it.
    """
    if return_lse:
        raise ValueError("return_lse: got True, needs False; fastattn.attention returns it")
    if _parallel_config is not None:
        raise ValueError("_parallel_config: got one, needs None: context parallelism has no fastattn kernel")
    if attn_mask is not None and attn_mask.shape == (query.shape[0], key.shape[1]):
        attn_mask = attn_mask[:, None, None]
    query, key, value = (t.transpose(1, 2) for t in (query, key, value))
    out = scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, backend=backend
    )
    return out.transpose(1, 2)


_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    NAME: attention,
    **{f"{NAME}_{backend}": partial(attention, backend=backend) for backend in NAMES},
}


def _dispatch() -> ModuleType:
    """diffusers' module of attention backends, found to be as this file expects."""
    try:
        dispatch = import_module("diffusers.models.attention_dispatch")
    except ImportError as error:
        raise ImportError(
            "fastattn.integrations.diffusers: needs diffusers with attention backends (0.35 or newer)"
        ) from error
    names = getattr(dispatch, "AttentionBackendName", None)
    registry = getattr(dispatch, "_AttentionBackendRegistry", None)
    for what, there in (
        (
            "AttentionBackendName",
            all(hasattr(names, part) for part in ("_value2member_map_", "_member_map_")),
        ),
        ("_AttentionBackendRegistry", all(hasattr(registry, part) for part in ("register", "_backends"))),
        ("AttentionBackendName.NATIVE", hasattr(names, "NATIVE")),
        ("dispatch_attention_fn", hasattr(dispatch, "dispatch_attention_fn")),
    ):
        if not there:
            raise _unknown(dispatch, f"{what} is not what it was")
    given = inspect.signature(dispatch.dispatch_attention_fn).parameters.keys()
    if missing := _PARAMETERS - given:
        raise _unknown(dispatch, f"dispatch_attention_fn has no {', '.join(sorted(missing))}")
    return dispatch


def _unknown(dispatch: ModuleType, what: str) -> ImportError:
    version = getattr(
        import_module(dispatch.__name__.partition(".")[0]), "__version__", "of an unknown version"
    )
    return ImportError(f"fastattn.integrations.diffusers: got diffusers {version}, in which {what}")


def _add_member(names: Any, name: str) -> None:
    """Give a str Enum one more member, as its class statement would have."""
    member = str.__new__(names, name)
    member._name_, member._value_, member.__objclass__ = name.upper(), name, names
    member._sort_order_ = len(names._member_names_)
    type.__setattr__(names, member._name_, member)
    names._member_names_.append(member._name_)
    names._member_map_[member._name_] = member
    names._value2member_map_[name] = member
    if names(name) is not member or member not in list(names):
        raise ImportError(f"fastattn.integrations.diffusers: {names.__name__} takes no new member")


def _reduced(member: Any) -> Any:
    return (_member, (member.value,)) if member.value in _FUNCTIONS else member.__reduce_ex__(2)


def _member(name: str) -> Any:
    """The registered name, which a pickled model calls in a process that has not registered it."""
    register()
    return _dispatch().AttentionBackendName(name)
