"""The arguments of the losses: checked, cast and brought into the form that the ops take."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.ops import arguments
from fastattn.ops.autocast import autocasts
from fastattn.spec import accumulation_dtype

REDUCTIONS = ("none", "mean", "sum")


def checked_targets(target: Tensor, shape: tuple[int, ...], like: Tensor, name: str) -> Tensor:
    """Class indices as int64, on the device and in the shape of the tokens."""
    arguments.check_tensor("target", target)
    if target.dtype not in arguments.INTEGER_DTYPES:
        raise TypeError(f"target: got {target.dtype}, needs integers (class indices)")
    if target.shape != shape:
        got, whole = arguments.shape_of(target), arguments.shape_of(like)
        raise ValueError(f"target: got shape {got}, needs {tuple(shape)} for {name} of shape {whole}")
    if target.device != like.device:
        raise ValueError(f"target: got device {target.device}, needs that of {name}, {like.device}")
    return target.long()


def checked_options(ignore_index: int, label_smoothing: float, reduction: str) -> tuple[int, float]:
    """(ignore_index, label_smoothing) of the types and in the ranges they need; the reduction is checked too."""
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index: got {type(ignore_index).__name__}, needs an int")
    if isinstance(label_smoothing, (bool, str, Tensor)) or label_smoothing is None:
        raise TypeError(f"label_smoothing: got {type(label_smoothing).__name__}, needs a number")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing: got {label_smoothing}, needs 0 to 1")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: got {reduction!r}, needs {', '.join(REDUCTIONS)}")
    return ignore_index, float(label_smoothing)


def checked_z_loss(z_loss: float) -> float:
    """The factor of the z-loss as a float."""
    if isinstance(z_loss, bool) or not arguments.is_number(z_loss):
        raise TypeError(f"z_loss: got {type(z_loss).__name__}, needs a number")
    if not 0.0 <= z_loss <= torch.finfo(torch.float32).max:
        raise ValueError(f"z_loss: got {z_loss}, needs a finite number, 0 or more")
    return float(z_loss)


def checked_class_weight(weight: Tensor | None, num_classes: int, like: Tensor, name: str) -> Tensor | None:
    """Class weights in the accumulation dtype, contiguous."""
    if weight is None:
        return None
    arguments.check_tensor("class_weight", weight)
    arguments.check_floating("class_weight", weight)
    if weight.shape != (num_classes,):
        raise ValueError(f"class_weight: got shape {arguments.shape_of(weight)}, needs ({num_classes},)")
    if weight.device != like.device:
        raise ValueError(f"class_weight: got device {weight.device}, needs that of {name}, {like.device}")
    if torch.is_grad_enabled() and weight.requires_grad:
        raise RuntimeError("class_weight: requires grad, which cross-entropy does not give; detach() it")
    return as_class_weight(weight, like.dtype)


def as_class_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Checked class weights in the accumulation dtype of logits of `dtype`, contiguous."""
    return weight.to(accumulation_dtype(dtype)).contiguous()


def check_linear(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Refuse operands of a linear layer that do not fit each other."""
    if hidden.dim() == 0:
        raise ValueError("hidden: got shape (), needs (..., E)")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or weight.shape[0] == 0:
        got, width = arguments.shape_of(weight), hidden.shape[-1]
        raise ValueError(f"weight: got shape {got}, needs (V, {width}) for hidden of width {width}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: got shape {arguments.shape_of(bias)}, needs ({weight.shape[0]},)")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.dtype != hidden.dtype and not stays_wide(tensor, hidden):
            raise TypeError(
                f"{name}: got {tensor.dtype}, needs hidden's {hidden.dtype}; cast it or use autocast"
            )
        if tensor.device != hidden.device:
            raise ValueError(f"{name}: got device {tensor.device}, needs hidden's {hidden.device}")


def autocast(tensor: Tensor) -> Tensor:
    """An operand of a matrix product in autocast's dtype where autocast is on; float64 is left alone."""
    if tensor.dtype == torch.float64 or not autocasts(tensor.device.type):
        return tensor
    return tensor.to(torch.get_autocast_dtype(tensor.device.type))


def stays_wide(operand: Tensor, hidden: Tensor) -> bool:
    """Whether, under autocast, a weight or bias stays float32 and is cast within the linear loss: its gradient, summed
    in float32, is then never rounded to 16 bits.
    """
    narrow = hidden.dtype in (torch.float16, torch.bfloat16)
    return narrow and operand.dtype == torch.float32 and autocasts(hidden.device.type)


def loss_dtype(logits: Tensor) -> torch.dtype:
    """The dtype of the losses: that of the logits, wider under autocast."""
    return accumulation_dtype(logits.dtype) if autocasts(logits.device.type) else logits.dtype


def mean_of(
    class_weight: Tensor | None, z_loss: float, target: Tensor, ignore_index: int
) -> tuple[Tensor | None, Tensor]:
    """The class weights to take, and what to divide the sum of losses by: the tokens that count, or their weights.

    With both class weights and z_loss there are two divisors: the weights are scaled so that the number of tokens
    serves both.
    """
    kept = target != ignore_index
    count = kept.sum()
    if class_weight is None:
        return None, count
    classes = torch.where(kept, target, 0).clamp(0, class_weight.shape[0] - 1)  # others are refused later
    total = torch.where(kept, class_weight[classes], 0).sum()
    if not z_loss:
        return class_weight, total
    some = total != 0
    return class_weight * torch.where(some, count / total, 0), torch.where(some, count, 0)


def rows_of(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Logits as (N, V) and targets as (N,) int64."""
    classes_dim = 0 if logits.dim() == 1 else 1
    rows = logits.movedim(classes_dim, -1).reshape(-1, logits.shape[classes_dim])
    return rows, target.long().reshape(-1)
