"""The only home of private torch symbols: each is looked up once by `_find` and has a fallback where torch lacks it.

Callers import this module and write `torch_compat.name(...)`. A name that a torch release removes costs speed at most:
the call then takes torch's dispatcher or its public functions.
"""

from __future__ import annotations

import contextlib
import functools
import pkgutil
import warnings
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter


def _find(name: str) -> Any:
    """The object of a dotted name, None where this torch has none."""
    try:
        return pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        return None


_DispatchKey = _find("torch._C.DispatchKey")
_DispatchKeySet = _find("torch._C.DispatchKeySet")
_keys_of_tensor = _find("torch._C._dispatch_keys")
_keys_of_thread = _find("torch._C._dispatch_tls_local_include_set")
_function_modes = _find("torch._C._len_torch_function_stack")
_profiler_enabled = _find("torch._C._autograd._profiler_enabled")


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


_autocast_anywhere = _find("torch._C._is_any_autocast_enabled")
_HAS_DUAL_LEVEL = _find("torch.autograd.forward_ad._current_level") is not None
_PLAIN_THREAD_KEYS: set[int] = set() if PLAIN_KEYS is None else PLAIN_KEYS[0]
_CAN_TELL_STATE = PLAIN_KEYS is not None and _HAS_DUAL_LEVEL and _autocast_anywhere is not None


def only_autograd_watches() -> bool:
    """Whether a call of plain tensors is seen by autograd alone: no mode, transform, trace or profiler is active, no
    autocast, and forward-mode AD has given no tensor a tangent.

    Fallback: False.
    """
    return state_of_call(()) is not None


def state_of_call(tensors: Iterable[Any]) -> list[Any] | None:
    """What a call of these tensors depends on in torch, values aside: the modes of the thread, and of each tensor its
    dispatch keys, dtype, shape, strides and whether it requires grad. None unless `only_autograd_watches` and all are
    plain tensors or None. One frame, since a call of one query notices each.

    Fallback: None.
    """
    if (
        torch.compiler.is_compiling()  # first: a trace cannot follow what comes next
        or not _CAN_TELL_STATE
        or _autocast_anywhere()
        or forward_ad._current_level >= 0
        or _function_modes()
        or _profiler_enabled()
    ):
        return None
    of_thread = _keys_of_thread().raw_repr()  # inference mode shows in them
    if of_thread not in _PLAIN_THREAD_KEYS:
        return None
    state = [of_thread, torch.is_grad_enabled()]
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
        state += (keys, tensor.dtype, tensor.shape, tensor.stride(), tensor.requires_grad)
    return state


def apply_function(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """`function.apply` without the look for transforms; only where `only_autograd_watches`.

    Fallback: `function.apply`.
    """
    if _find("torch._C._FunctionBase.apply") is None:
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


_any_requires_grad = _find("torch._C._any_requires_grad")


def any_requires_grad(args: Iterable[Any]) -> bool:
    """Whether one of an op's arguments is a tensor that requires grad.

    Fallback: `requires_grad` of each tensor.
    """
    if _any_requires_grad is not None:
        return bool(_any_requires_grad(*args))
    return any(isinstance(arg, Tensor) and arg.requires_grad for arg in args)


_transforms_active = _find("torch._C._are_functorch_transforms_active")
_is_wrapped = _find("torch._C._functorch.is_functorch_wrapped_tensor")


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


_dispatch_modes = _find("torch._C._len_torch_dispatch_stack")


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
    one = torch.ones(())
    try:
        forward_ad.make_dual(one, one)
    except RuntimeError:  # no level
        return False
    return True


if not _HAS_DUAL_LEVEL:
    _can_make_dual = torch.compiler.assume_constant_result(_can_make_dual)


_HAS_EXPORTING_FLAG = _find("torch.compiler._is_exporting_flag") is not None


def is_exporting() -> bool:
    """Whether `torch.export` records the call. Its public function is always true in code that torch 2.9 compiles.

    Fallback: the public function.
    """
    return bool(torch.compiler._is_exporting_flag if _HAS_EXPORTING_FLAG else torch.compiler.is_exporting())


_FakeTensor = _find("torch._subclasses.fake_tensor.FakeTensor")


def is_fake(tensor: Tensor) -> bool:
    """Whether a tensor has a shape and no values.

    Fallback: whether it is of a subclass; its values are then not read.
    """
    if _FakeTensor is not None:
        return isinstance(tensor, _FakeTensor)
    return type(tensor) not in (Tensor, Parameter)


_sdpa: Any = _find("torch._C._nn.scaled_dot_product_attention") or F.scaled_dot_product_attention


def torch_sdpa() -> Callable[..., Tensor]:
    """torch's own scaled_dot_product_attention, even if torch.nn.functional's was replaced.

    Fallback: the function in torch.nn.functional when fastattn was imported.
    """
    function: Callable[..., Tensor] = _sdpa
    return function


# torch's Python binding takes a third less time than the op, for a single query half of all
_cpu_flash_fwd = _find("torch._scaled_dot_product_flash_attention_for_cpu") or _find(
    "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default"
)
_cpu_flash_bwd = _find("torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default")


def has_cpu_flash_attention(*, backward: bool) -> bool:
    """Whether torch has its fused CPU attention, and the backward of it.

    Fallback: False, and attention on a CPU is blockwise softmax in torch operations.
    """
    return _cpu_flash_fwd is not None and (_cpu_flash_bwd is not None or not backward)


def cpu_flash_kernel() -> Any:
    """What `cpu_flash_attention` calls, for those who call it often; only where there is one."""
    return _cpu_flash_fwd


def cpu_flash_attention(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """(out, lse) by torch's fused CPU attention; the mask is additive, causal to the top left."""
    result: tuple[Tensor, Tensor] = _cpu_flash_fwd(
        query, key, value, 0.0, causal, attn_mask=mask, scale=scale
    )
    return result


def cpu_flash_attention_backward(
    dout: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
    causal: bool, mask: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv) of `cpu_flash_attention`."""
    result: tuple[Tensor, Tensor, Tensor] = _cpu_flash_bwd(
        dout, query, key, value, out, lse, 0.0, causal, attn_mask=mask, scale=scale
    )
    return result


_softmax_gradient_op = _find("torch._softmax_backward_data")


def softmax_gradient(dprobs: Tensor, probs: Tensor) -> Tensor:
    """probs * (dprobs - rowsum(probs * dprobs)), along the last dimension.

    Fallback: the formula in torch operations.
    """
    if _softmax_gradient_op is None:
        return _softmax_gradient(dprobs, probs, -1, log=False)
    result: Tensor = _softmax_gradient_op(dprobs, probs, -1, probs.dtype)
    return result


_bfloat16_products = _find("torch.ops.mkldnn._is_mkldnn_bf16_supported")
_float16_products = _find("torch.ops.mkldnn._is_mkldnn_fp16_supported")


@cache
def has_fast_products(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies matrices of a 16-bit dtype by oneDNN.

    Fallback: False, and callers widen their operands.
    """
    supported = {torch.bfloat16: _bfloat16_products, torch.float16: _float16_products}.get(dtype)
    return supported is not None and bool(supported())


_softmax = _find("torch.ops.aten._softmax")
_log_softmax = _find("torch.ops.aten._log_softmax")


def softmax(out: Tensor, x: Tensor, dim: int, *, log: bool) -> None:
    """Write softmax, or its logarithm, to `out`; without a copy where that is contiguous.

    Fallback: torch.softmax and torch.log_softmax, one more operator for the dispatcher.
    """
    kernel = _log_softmax if log else _softmax
    function: Any = torch.log_softmax if log else torch.softmax
    if out.is_contiguous() and out.dtype == x.dtype:
        function(x, dim, out=out) if kernel is None else kernel.out(x, dim, False, out=out)
    else:
        out.copy_(function(x, dim) if kernel is None else kernel.default(x, dim, False))


_softmax_bwd = _find("torch.ops.aten._softmax_backward_data")
_log_softmax_bwd = _find("torch.ops.aten._log_softmax_backward_data")


def softmax_backward(dx: Tensor, dout: Tensor, out: Tensor, dim: int, *, log: bool) -> None:
    """Write the gradient of softmax, or of its logarithm, to `dx`; without a copy where that is contiguous.

    Fallback: the formula in torch operations, with temporaries of the size of `out`.
    """
    kernel = _log_softmax_bwd if log else _softmax_bwd
    if kernel is None:
        dx.copy_(_softmax_gradient(dout, out, dim, log))
    elif dx.is_contiguous() and dx.dtype == dout.dtype:
        kernel.out(dout, out, dim, out.dtype, **{"out" if log else "grad_input": dx})
    else:
        dx.copy_(kernel.default(dout, out, dim, out.dtype))


def _softmax_gradient(dout: Tensor, out: Tensor, dim: int, log: bool) -> Tensor:
    if out.dtype in (torch.float16, torch.bfloat16):  # torch's kernels sum in float32
        dout, out = dout.float(), out.float()
    if log:
        return dout - out.exp() * dout.sum(dim, keepdim=True)
    product = dout * out
    return product - out * product.sum(dim, keepdim=True)


_layer_norm_backward: Any = _find("torch.ops.aten.native_layer_norm_backward")


def rms_norm_backward(
    dout: Tensor, x: Tensor, weight: Tensor, reciprocal: Tensor, *, needs_dx: bool, needs_dweight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of x * reciprocal * weight, reciprocal = 1 / sqrt(mean(x^2) + eps): dx (..., N) and dweight (N,).

    LayerNorm's kernel with a mean of 0, which takes the mean of dout * weight away as well.

    Fallback: the formula by torch's operations.
    """
    if _layer_norm_backward is None:
        scaled, normed = dout * weight, x * reciprocal
        dx = dweight = None
        if needs_dx:
            dx = (scaled - normed * (scaled * normed).mean(-1, keepdim=True)) * reciprocal
        if needs_dweight:
            dweight = (dout * normed).flatten(0, -2).sum(0)
        return dx, dweight
    size = weight.shape[0]
    zeros = torch.zeros_like(reciprocal)
    dx, dweight, _ = _layer_norm_backward(
        dout.contiguous(), x, [size], zeros, reciprocal, weight, None, [needs_dx, needs_dweight, False]
    )
    if needs_dx:
        dx.addcmul_(reciprocal, (dout @ weight).unsqueeze(-1), value=1 / size)
    return dx if needs_dx else None, dweight if needs_dweight else None


_onednn_linear: Any = _find("torch.ops.mkldnn._linear_pointwise")
_HAS_ONEDNN = _onednn_linear is not None and torch.backends.mkldnn.is_available()


def has_onednn_linear() -> bool:
    """Whether torch has oneDNN's linear layer, and this CPU oneDNN.

    Fallback: False, and linear layers are torch.nn.functional.linear.
    """
    return _HAS_ONEDNN


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x @ weight.T + bias by oneDNN."""
    result: Tensor = _onednn_linear(x, weight, bias, "none", [], "")
    return result


ONEDNN_MIN_PRODUCTS = 1 << 24  # multiplications below which what a oneDNN call costs more than it saves


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T of matrices, without a gradient: large float32 ones on a CPU by oneDNN, others as torch does.

    MKL, torch's own choice, does not use the vector instructions of every maker's CPUs.

    Fallback: torch's product.
    """
    if (
        _HAS_ONEDNN
        and x.is_cpu
        and x.dtype == weight.dtype == torch.float32
        and x.numel() * weight.shape[0] >= ONEDNN_MIN_PRODUCTS
    ):
        return onednn_linear(x, weight, None)
    return x @ weight.mT


_reorder_linear: Any = _find("torch.ops.mkldnn._reorder_linear_weight")


def _packs_bfloat16() -> bool:
    """Whether oneDNN multiplies with a bfloat16 weight in its own order here: tried once, on first use."""
    if not _HAS_ONEDNN or _reorder_linear is None:
        return False
    try:
        weight = torch.ones(32, 32, dtype=torch.bfloat16)
        out = packed_linear(weight, pack_linear(weight), None)
    except RuntimeError:
        return False
    return bool((out == 32).all())


@functools.cache
def has_packed_linear() -> bool:
    """Whether bfloat16 weights can be kept in the order in which oneDNN reads them.

    Fallback: False, and products read the weight as it is.
    """
    return _packs_bfloat16()


def pack_linear(weight: Tensor) -> Any:
    """A weight (O, I) in oneDNN's order for a product of one row.

    Fallback: none is needed, `has_packed_linear` says so.
    """
    return _reorder_linear(weight.detach(), 1)


def packed_linear(x: Tensor, pack: Any, bias: Tensor | None) -> Tensor:
    """x @ weight.T + bias with what `pack_linear` made of the weight.

    Fallback: none is needed, `has_packed_linear` says so.
    """
    result: Tensor = _onednn_linear(x, pack, bias, "none", [], "")
    return result


_int8_linear: Any = _find("torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32")
_int8_pack: Any = _find("torch.ops.quantized.linear_prepack")
_per_channel: Any = _find("torch._make_per_channel_quantized_tensor")
_avx512: Any = _find("torch.cpu._is_avx512_supported")
_vnni: Any = _find("torch.cpu._is_vnni_supported")


@functools.cache
def has_int8_linear() -> bool:
    """Whether torch was built with FBGEMM and its product of 8-bit numbers that returns float32.

    Fallback: False, and 8-bit numbers are multiplied in float64.
    """
    if _int8_linear is None or _int8_pack is None or _per_channel is None:
        return False
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        return False
    try:
        weight = torch.full((32, 32), -127, dtype=torch.int8)
        out = int8_linear(torch.full((1, 32), 3.0), pack_int8_linear(weight, torch.full((32,), 0.5)))
    except RuntimeError:
        return False
    return bool((out == -127 * 0.5 * 3 * 32).all())


@functools.cache
def has_int8_dot_products() -> bool:
    """Whether 8-bit products are summed in 32 bits, by AVX-512 VNNI, so that none saturates.

    Fallback: False, and activations use 7 bits.
    """
    return None not in (_avx512, _vnni) and bool(_avx512() and _vnni())


def pack_int8_linear(weight: Tensor, scale: Tensor) -> Any:
    """An int8 weight (O, I) and the float32 scale of each output, in FBGEMM's order.

    Fallback: none is needed, `has_int8_linear` says so.
    """
    zeros = torch.zeros(weight.shape[0], dtype=torch.int64)
    # FBGEMM packs for the engine that is set; "x86", the usual one, may pack for oneDNN
    engine = torch.backends.quantized.engine
    torch.backends.quantized.engine = "fbgemm"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.ao's deprecation of quantised tensors
            return _int8_pack(_per_channel(weight, scale.double(), zeros, 0), None)
    finally:
        torch.backends.quantized.engine = engine


def int8_linear(x: Tensor, pack: Any) -> Tensor:
    """round(x) @ (weight * scale).T, float32, for float32 x of magnitude 127 at most.

    Fallback: none is needed, `has_int8_linear` says so.
    """
    result: Tensor = _int8_linear(x, 1.0, 128, pack)
    return result


_graph_task = _find("torch._C._current_graph_task_id")


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


_GLOBAL_HOOKS = (
    _find("torch.nn.modules.module._global_forward_hooks"),
    _find("torch.nn.modules.module._global_forward_pre_hooks"),
    _find("torch.nn.modules.module._global_backward_hooks"),
    _find("torch.nn.modules.module._global_backward_pre_hooks"),
)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def hooks_of(module: torch.nn.Module) -> list[Any] | None:
    """What is called besides a module's forward.

    Fallback: None, where this torch keeps hooks elsewhere.
    """
    found = (*(getattr(module, name, None) for name in _HOOKS), *_GLOBAL_HOOKS)
    if any(hooks is None for hooks in found):
        return None
    return [hook for hooks in found for hook in hooks.values()]


def has_hooks(module: torch.nn.Module) -> bool:
    """Whether a call of a module does more than its forward.

    Fallback: True, where this torch keeps hooks elsewhere.
    """
    return hooks_of(module) != []


_HAS_VERSION = _find("torch.Tensor._version") is not None


def version_of(tensor: Tensor) -> int | None:
    """The number of in-place changes of a tensor.

    Fallback: None, and nothing derived from its values is cached for the next call.
    """
    return tensor._version if _HAS_VERSION else None


_flash_op = _find("torch.ops.aten._scaled_dot_product_flash_attention.default")
_flash_backward_op = _find("torch.ops.aten._scaled_dot_product_flash_attention_backward.default")


def override_flash_attention(
    dispatch_key: str, forward: Callable[..., Any], backward: Callable[..., Any]
) -> torch.library.Library:
    """Override torch's flash-attention ops on a dispatch key with these functions, until the result is released.

    Fallback: a RuntimeError, since there is nothing to override.
    """
    if _flash_op is None or _flash_backward_op is None:
        raise RuntimeError(f"torch {torch.__version__} has no flash-attention ops that fastattn knows")
    library = torch.library.Library("aten", "IMPL", dispatch_key)
    for op, kernel in ((_flash_op, forward), (_flash_backward_op, backward)):
        library.impl(op, kernel, dispatch_key, allow_override=True)
    return library


_cuda_sleep = _find("torch.cuda._sleep")


def cuda_sleep(cycles: int) -> None:
    """Queue a kernel that spins for so many clock cycles.

    Fallback: nothing is queued, and gaps between launches count in what is timed.
    """
    if _cuda_sleep is not None:
        _cuda_sleep(cycles)


_TorchDispatchMode = _find("torch.utils._python_dispatch.TorchDispatchMode")


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
