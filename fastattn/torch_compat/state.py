"""The state of torch around a call: modes, transforms, traces, autograd; and calls that bypass its dispatcher."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from .lookup import find

_DispatchKey = find("torch._C.DispatchKey")
_DispatchKeySet = find("torch._C.DispatchKeySet")
_keys_of_tensor = find("torch._C._dispatch_keys")
_keys_of_thread = find("torch._C._dispatch_tls_local_include_set")
_function_modes = find("torch._C._len_torch_function_stack")
_profiler_enabled = find("torch._C._autograd._profiler_enabled")


def _keys(*names: str) -> int:
    keys = _DispatchKeySet(getattr(_DispatchKey, names[0]))
    for name in names[1:]:
        keys = keys.add(getattr(_DispatchKey, name))
    return int(keys.raw_repr())


def _plain_keys() -> tuple[set[int], set[int]] | None:
    """Dispatch keys with nothing active but autograd: those of the thread, and those of a tensor."""
    if None in (_keys_of_tensor, _keys_of_thread, _function_modes, _profiler_enabled):
        return None
    try:
        of_thread = {_keys("BackendSelect"), _keys("BackendSelect", "ADInplaceOrView")}
        of_tensor = {
            _keys(device, f"Autocast{device}", *tracked)
            for device in ("CPU", "CUDA")
            for tracked in ((), ("ADInplaceOrView", f"Autograd{device}"))  # () under inference_mode
        }
    except (AttributeError, TypeError):  # no such class or key
        return None
    return of_thread, of_tensor


PLAIN_KEYS = _plain_keys()
PLAIN_TENSOR_KEYS: set[int] = set() if PLAIN_KEYS is None else PLAIN_KEYS[1]
_autocast_anywhere = find("torch._C._is_any_autocast_enabled")
_HAS_DUAL_LEVEL = find("torch.autograd.forward_ad._current_level") is not None
_PLAIN_THREAD_KEYS: set[int] = set() if PLAIN_KEYS is None else PLAIN_KEYS[0]
_CAN_TELL_STATE = PLAIN_KEYS is not None and _HAS_DUAL_LEVEL and _autocast_anywhere is not None


def nothing_records() -> bool:
    """Whether no mode, trace or profiler of this thread sees a call, autocast casts nothing, and forward-mode AD has
    given no tensor a tangent. The dispatch keys of the thread and of tensors are not checked.

    Fallback: False.
    """
    return not (
        torch.compiler.is_compiling()  # first, as a trace cannot follow the others
        or not _CAN_TELL_STATE
        or _autocast_anywhere()
        or forward_ad._current_level >= 0
        or _function_modes()
        or _profiler_enabled()
    )


def what_records() -> str | None:
    """What `only_autograd_records` is False for, in words; None where it is True.

    Fallback: that this torch does not tell.
    """
    if not _CAN_TELL_STATE:
        return "this torch does not tell what records a call"
    found = (
        (torch.compiler.is_compiling(), "the call is compiled"),
        (_autocast_anywhere(), "autocast is on"),
        (forward_ad._current_level >= 0, "forward-mode AD is on"),
        (_function_modes(), "a torch function mode is on"),
        (_profiler_enabled(), "a profiler is on"),
        (_keys_of_thread().raw_repr() not in _PLAIN_THREAD_KEYS, "a mode, transform or trace is on"),
    )
    return next((what for is_on, what in found if is_on), None)


def only_autograd_records() -> bool:
    """Whether a call of plain tensors is seen by autograd alone: no mode, transform, trace or profiler is active, no
    autocast, and forward-mode AD has given no tensor a tangent.

    Fallback: False.
    """
    return nothing_records() and _keys_of_thread().raw_repr() in _PLAIN_THREAD_KEYS


def state_of_call(tensors: Iterable[Any]) -> list[Any] | None:
    """What a call of these tensors depends on in torch, values aside: the modes of the thread, and of each tensor its
    dispatch keys, dtype, shape, strides and whether it requires grad. None unless `only_autograd_records` and all are
    plain tensors or None.

    Fallback: None.
    """
    if not nothing_records():
        return None
    of_thread = _keys_of_thread().raw_repr()  # inference mode shows in them
    if of_thread not in _PLAIN_THREAD_KEYS:
        return None
    state: list[Any] = [of_thread, torch.is_grad_enabled()]
    for tensor in tensors:
        if tensor is None:
            state.append(None)
            continue
        kind = type(tensor)
        if kind is not Tensor and kind is not Parameter:
            return None
        keys = _keys_of_tensor(tensor).raw_repr()
        if keys not in PLAIN_TENSOR_KEYS:
            return None
        state.append((keys, tensor.dtype, tensor.shape, tensor.stride(), tensor.requires_grad))
    return state


_TensorGuards = find("torch._C._dynamo.guards.TensorGuards")


def tensor_guard(tensors: Sequence[Tensor]) -> Callable[..., bool] | None:
    """A function of as many tensors: whether `state_of_call` is the same for them as for these, in a tenth of its time.

    It is False where a tensor is given twice, checks neither `nothing_records` nor grad mode, and keeps no tensor.

    Fallback: None.
    """
    return _guard_of(tensors) if _CAN_GUARD else None


def _guard_of(tensors: Sequence[Tensor]) -> Callable[..., bool]:
    sizes, strides = [list(t.shape) for t in tensors], [list(t.stride()) for t in tensors]
    guard = _TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
    check: Callable[..., bool] = guard.check
    return check


def _guard_sees_all() -> bool:
    """Whether torch's guard tells tensors apart by everything that a plan depends on."""
    if _TensorGuards is None:
        return False
    one = torch.zeros(2, 3, device="cpu")
    others = [one.mT, one[:, :2], one.double(), torch.zeros_like(one, requires_grad=True), Parameter(one, False),
              torch.zeros(3, 2, device="cpu").mT, one.to("meta"), torch._neg_view(one)]  # fmt: skip
    try:
        check = _guard_of([one])
        if not check(one.clone()) or any(check(other) for other in others):
            return False
        with torch.inference_mode():
            return not check(one) and not check(torch.zeros(2, 3, device="cpu"))
    except (AttributeError, TypeError, RuntimeError):
        return False


_CAN_GUARD = _guard_sees_all()


def apply_function(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """`function.apply` without the look for transforms; only where `only_autograd_records`.

    Fallback: `function.apply`.
    """
    if find("torch._C._FunctionBase.apply") is None:
        return function.apply
    apply: Callable[..., Any] = super(torch.autograd.Function, function).apply  # type: ignore[misc]
    return apply


def can_bypass_dispatcher(args: Iterable[Any]) -> bool:
    """Whether only autograd would notice that an op's kernel is called without the dispatcher: no mode, transform,
    trace or profiler is active, and every tensor is a plain one.

    Fallback: False, and the call goes through the dispatcher.
    """
    if (
        PLAIN_KEYS is None
        or torch.compiler.is_compiling()
        or _keys_of_thread().raw_repr() not in PLAIN_KEYS[0]
        or _function_modes()
        or _profiler_enabled()
    ):
        return False
    for arg in args:
        if arg is None:
            continue
        kind = type(arg)
        if kind is Tensor or kind is Parameter:
            if _keys_of_tensor(arg).raw_repr() not in PLAIN_TENSOR_KEYS:
                return False
        elif isinstance(arg, Tensor):
            return False
    return True


_any_requires_grad = find("torch._C._any_requires_grad")


def any_requires_grad(args: Iterable[Any]) -> bool:
    """Whether one of an op's arguments is a tensor that requires grad.

    Fallback: `requires_grad` of each tensor.
    """
    if _any_requires_grad is not None:
        return bool(_any_requires_grad(*args))
    return any(isinstance(arg, Tensor) and arg.requires_grad for arg in args)


_transforms_active = find("torch._C._are_functorch_transforms_active")
_is_wrapped = find("torch._C._functorch.is_functorch_wrapped_tensor")


def transforms_active(tensors: Iterable[Any]) -> bool:
    """Whether a torch.func transform is active, seen from a call with these tensors.

    Fallback: whether a transform has wrapped one of them.
    """
    if _transforms_active is not None:
        return bool(_transforms_active())
    return any(is_wrapped(tensor) for tensor in tensors if isinstance(tensor, Tensor))


def is_wrapped(tensor: Tensor) -> bool:
    """Whether a torch.func transform has wrapped a tensor, so that its values are not plain ones.

    Fallback: whether it is strided but has no storage, as wrapped tensors are; not detected in compiled code.
    """
    if _is_wrapped is not None:
        return bool(_is_wrapped(tensor))
    if torch.compiler.is_compiling():
        return False
    try:
        tensor.untyped_storage()
    except NotImplementedError:
        return tensor.layout is torch.strided
    return False


_dispatch_modes = find("torch._C._len_torch_dispatch_stack")


def dispatch_mode_active() -> bool:
    """Whether a mode such as FakeTensorMode or FlopCounterMode sees every call.

    Fallback: True, and callers take the path that such a mode can record.
    """
    return _dispatch_modes is None or bool(_dispatch_modes())


def dual_level_entered() -> bool:
    """Whether forward-mode AD may have given tensors a tangent.

    Fallback: whether torch lets a dual tensor be made now; compiled code keeps the answer it was traced with.
    """
    if _HAS_DUAL_LEVEL:
        return bool(forward_ad._current_level >= 0)
    return _can_make_dual()


def _can_make_dual() -> bool:
    one = torch.ones((), device="cpu")
    try:
        forward_ad.make_dual(one, one)
    except RuntimeError:  # no level
        return False
    return True


if not _HAS_DUAL_LEVEL:
    _can_make_dual = torch.compiler.assume_constant_result(_can_make_dual)
_HAS_EXPORTING_FLAG = find("torch.compiler._is_exporting_flag") is not None


def is_exporting() -> bool:
    """Whether `torch.export` records the call. Its public function is always true in code that torch 2.9 compiles.

    Fallback: the public function.
    """
    return bool(torch.compiler._is_exporting_flag if _HAS_EXPORTING_FLAG else torch.compiler.is_exporting())


_FakeTensor = find("torch._subclasses.fake_tensor.FakeTensor")


def is_fake(tensor: Tensor) -> bool:
    """Whether a tensor has a shape and no values.

    Fallback: whether it is of a subclass; its values are then not read.
    """
    if _FakeTensor is not None:
        return isinstance(tensor, _FakeTensor)
    return type(tensor) not in (Tensor, Parameter)


_graph_task = find("torch._C._current_graph_task_id")


def has_graph_task() -> bool:
    """Whether a backward can tell which run of the autograd engine it is in.

    Fallback: False, and nothing is handed from one backward to another.
    """
    return _graph_task is not None


def graph_task() -> int:
    """The number of the engine's run that calls a backward.

    Fallback: -1, as outside of a backward; `has_graph_task` says so beforehand.
    """
    return -1 if _graph_task is None else int(_graph_task())


_will_execute = find("torch._C._will_engine_execute_node")


def will_execute(node: Any) -> bool:
    """Whether the engine's run that calls a backward comes to a node, or has come to it already.

    Fallback: False.
    """
    return _will_execute is not None and bool(_will_execute(node))


_TorchDispatchMode = find("torch.utils._python_dispatch.TorchDispatchMode")


def has_dispatch_mode() -> bool:
    """Whether `dispatch_mode` gets the operations. Fallback: it does not."""
    return _TorchDispatchMode is not None


def dispatch_mode(
    handle: Callable[[Any, tuple[Any, ...], dict[str, Any]], Any],
) -> contextlib.AbstractContextManager[Any]:
    """A context in which every operation of torch calls `handle(op, args, kwargs)` instead.

    Fallback: a context in which operations are torch's own.
    """
    if _TorchDispatchMode is None:
        return contextlib.nullcontext()

    class Mode(_TorchDispatchMode):  # type: ignore[misc, valid-type]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return handle(func, args, kwargs or {})

    mode: contextlib.AbstractContextManager[Any] = Mode()
    return mode
