"""LoRA: low-rank adapters on linear layers, y = W x + b + scale * B A x, attached, detached and merged.

Hu et al. 2021; scale is alpha / r, or alpha / sqrt(r) (Kalajdzievski 2023, "rsLoRA"). Folders are in peft.py.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastattn.models.lora_layers import Adapter as Adapter
from fastattn.models.lora_layers import Block as Block
from fastattn.models.lora_layers import LoraAttention, LoraLinear, check_not_quantized
from fastattn.models.lora_layers import blocks_of as blocks_of
from fastattn.nn.attention import MultiHeadAttention
from fastattn.nn.int8 import in_numbered_layer
from fastattn.nn.modes import evaluating
from fastattn.ops.arguments import is_integer, is_number

ALL_LINEAR = "all-linear"
ROUNDINGS = 2  # that merged and adapted outputs may differ by: rounding of the weights, and of their products
_SAMPLE = (2, 32)  # (sequences, tokens) of the default example of a merge
Model = TypeVar("Model", bound=nn.Module)


def attach(
    model: Model,
    r: int = 8,
    alpha: float = 16,
    targets: str | Sequence[str] = ALL_LINEAR,
    dropout: float = 0.0,
    *,
    rslora: bool = False,
) -> Model:
    """Put adapters on a model's linear layers and freeze everything else; returns the model, its outputs unchanged.

    Args:
        model: one of ours, or any module with `nn.Linear`, `fastattn.nn.Linear` or `MultiHeadAttention`.
        r: the rank.
        alpha: outputs of B A are multiplied by alpha / r, or alpha / sqrt(r) with `rslora`.
        targets: names of layers or their endings, transformers' ("q_proj", "c_attn", "query") or ours ("attn.qkv",
            "mlp.c_fc", "in_proj_weight"); "all-linear" is every one in the model's numbered layers, heads left out.
        dropout: of the adapters' inputs in training.
        rslora: see alpha.

    Raises:
        TypeError, ValueError: an argument, a target that names no linear layer, or a model that has adapters or is
            quantized.
    """
    _check_numbers(r, alpha, dropout)
    check_not_quantized(model)
    chosen = _chosen(blocks_of(model), targets)
    add_adapters(model, dict.fromkeys(chosen, (r, alpha)), dropout=dropout, rslora=rslora)
    return model


def add_adapters(
    model: nn.Module, ranks: Mapping[Block, tuple[int, float]], *, dropout: float, rslora: bool
) -> dict[Block, Adapter]:
    """Freeze a model and put an adapter of the given rank and alpha on each block."""
    if any(True for _ in adapters_of(model)):
        raise ValueError("model: has adapters already; merge or detach them first")
    made = {}
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for block, (r, alpha) in ranks.items():
        path, _, leaf = block.ours.rpartition(".")
        module = model.get_submodule(path)
        if leaf == "weight" and path.endswith("out_proj"):
            # attention reads the weight, it does not call the module
            outer = model.get_submodule(path.rpartition(".")[0])
            module = outer if isinstance(outer, MultiHeadAttention) else module
        if not isinstance(module, (LoraLinear, LoraAttention)):
            module.__dict__["_without_lora"] = type(module)
            module.__class__ = LoraAttention if isinstance(module, MultiHeadAttention) else LoraLinear
            module.lora = nn.ModuleDict()
        lora = module.lora
        assert isinstance(lora, nn.ModuleDict)
        weight = model.get_parameter(block.ours)
        adapter = Adapter(block, weight, r=r, alpha=alpha, dropout=dropout, rslora=rslora)
        lora[block.name.rpartition(".")[2]] = adapter.train(model.training)
        made[block] = adapter
    return made


def adapters_of(model: nn.Module) -> Iterator[Adapter]:
    """The adapters of a model."""
    return (module for module in model.modules() if isinstance(module, Adapter))


def detach(model: Model) -> Model:
    """Remove the adapters; returns the model with the weights, bitwise, of before `attach`, which train again.

    Raises:
        ValueError: the model has no adapters.
    """
    _attached(model)
    for module in list(model.modules()):
        if isinstance(module, (LoraLinear, LoraAttention)):
            module.__class__ = module.__dict__.pop("_without_lora")
            del module.lora
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model


@torch.no_grad()
def merge(model: Model, *args: Any, **kwargs: Any) -> Model:
    """Add the adapters to the weights and remove them, if the merged model's outputs equal the adapted model's.

    Both are run on an example first; if they disagree the weights are restored. The outputs may differ by rounding: the
    largest distance from the same model in a wider dtype (float64; float32 for 16-bit weights) is at most twice the
    adapted model's for each of two roundings, of the weights and of the products, plus eps of the dtype times the
    largest output. Of a float64 model, which has no wider one, the adapted outputs count as exact, and their error is
    taken from float32's, scaled by the ratio of the two eps.

    Args:
        model: one with adapters.
        args, kwargs: the example, what model(*args, **kwargs) takes; seeded random tokens by default, for models that
            take token ids.

    Raises:
        ValueError: outputs differ by more, are not finite, or an example is needed; the model is as it was.
    """
    adapters = _attached(model)
    if not args and not kwargs:
        kwargs = dict(_example(model))
    originals = {a.block.ours: model.get_parameter(a.block.ours) for a in adapters}
    with evaluating(model):
        adapted = _outputs(model(*args, **kwargs))
        expected, error = _exact(model, adapted, args, kwargs)
        kept = {name: weight.detach().clone() for name, weight in originals.items()}
        try:
            _add(adapters, originals)
            merged = _outputs(_without(adapters, model, args, kwargs))
            bound = 2 * ROUNDINGS * error + torch.finfo(adapted.dtype).eps * float(expected.abs().max())
            distance = float((merged.to(expected.dtype) - expected).abs().max())
            if not distance <= bound:
                raise ValueError(
                    f"merge: merged outputs are {distance:.3g} from exact ones, needs at most {bound:.3g}, which "
                    f"rounding explains; the model is as it was"
                )
        except BaseException:
            for name, weight in originals.items():
                weight.copy_(kept[name])
            raise
    return detach(model)


def _add(adapters: list[Adapter], weights: Mapping[str, Tensor]) -> None:
    """Add scale * B A to the rows of each weight, rounded once."""
    for name, weight in weights.items():
        sums = weight.double()
        for adapter in adapters:
            if adapter.block.ours == name:
                sums[adapter.block.start : adapter.block.stop] += adapter.weight()
        weight.copy_(sums)


def _without(adapters: list[Adapter], model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """model(*args, **kwargs) while adapters add nothing."""
    scales = [adapter.scale for adapter in adapters]
    try:
        for adapter in adapters:
            adapter.scale = 0.0
        return model(*args, **kwargs)
    finally:
        for adapter, scale in zip(adapters, scales):
            adapter.scale = scale


def _attached(model: nn.Module) -> list[Adapter]:
    adapters = list(adapters_of(model))
    if not adapters:
        raise ValueError("model: has no adapters")
    return adapters


def _chosen(blocks: list[Block], targets: str | Sequence[str]) -> list[Block]:
    """The blocks that targets name."""
    if targets == ALL_LINEAR:
        layered = [b for b in blocks if in_numbered_layer(b.ours)]
        if not (layered or blocks):
            raise ValueError("targets: the model has no linear layer")
        return layered or blocks
    names = [targets] if isinstance(targets, str) else list(targets) if isinstance(targets, Iterable) else []
    if not names or not all(isinstance(name, str) and name for name in names):
        raise TypeError(f"targets: got {targets!r}, needs names of layers or {ALL_LINEAR!r}")
    chosen: dict[Block, None] = {}
    for target in names:
        matches = [b for b in blocks if any(_ends(n, target) for n in (b.name, b.ours, _module_of(b.ours)))]
        if not matches:
            known = sorted({b.name.rpartition(".")[2] for b in blocks})
            raise ValueError(f"targets: {target!r} names no linear layer; there are {', '.join(known)}")
        chosen.update(dict.fromkeys(matches))
    return list(chosen)


def _ends(name: str, ending: str) -> bool:
    return name == ending or name.endswith("." + ending)


def _module_of(weight: str) -> str:
    return weight.removesuffix(".weight").removesuffix("_weight")


def _check_numbers(r: int, alpha: float, dropout: float) -> None:
    if not is_integer(r) or r < 1:
        raise ValueError(f"r: got {r!r}, needs a positive integer")
    if isinstance(alpha, bool) or not is_number(alpha) or not 0 < alpha < math.inf:
        raise ValueError(f"alpha: got {alpha!r}, needs a positive finite number")
    if isinstance(dropout, bool) or not is_number(dropout) or not 0 <= dropout < 1:
        raise ValueError(f"dropout: got {dropout!r}, needs a number with 0 <= p < 1")


def _example(model: nn.Module) -> dict[str, Tensor]:
    """Token ids to compare on, the same every time, by the names that the model's forward has for them."""
    config: Any = getattr(model, "config", None)
    parts = {"input_ids": config}
    if hasattr(config, "encoder"):
        parts = {"input_ids": config.encoder, "decoder_input_ids": config.decoder}
    device = next(model.parameters()).device
    return {name: _random_ids(part).to(device) for name, part in parts.items()}


def _random_ids(config: Any) -> Tensor:
    vocab = getattr(config, "vocab_size", None)
    if vocab is None:
        raise ValueError("merge: needs an example of what the model takes, as it has no vocabulary")
    longest = min(getattr(config, name, _SAMPLE[1]) for name in ("n_positions", "max_position_embeddings"))
    shape = (_SAMPLE[0], max(1, min(_SAMPLE[1], longest - getattr(config, "position_offset", 0))))
    return torch.randint(0, vocab, shape, generator=torch.Generator().manual_seed(0), device="cpu")


def _outputs(result: Any) -> Tensor:
    """The tensor of a model's result that is compared."""
    for name in ("logits", "embeddings", "last_hidden_state", "start_logits"):
        if isinstance(found := getattr(result, name, None), Tensor):
            result = found
            break
    else:
        result = result[0] if isinstance(result, (tuple, list)) else result
    if not isinstance(result, Tensor):
        raise ValueError(f"merge: cannot compare a result of type {type(result).__name__}")
    return result


def _exact(
    model: nn.Module, adapted: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, float]:
    """The outputs that count as exact, and how far the model's own are from those by rounding."""
    narrow = adapted.dtype in (torch.float16, torch.bfloat16)
    dtype = torch.float32 if narrow or adapted.dtype == torch.float64 else torch.float64
    other = copy.deepcopy(model).to(dtype)
    outputs = _outputs(other(*_in_dtype(args, dtype), **_in_dtype(kwargs, dtype)))
    if adapted.dtype != torch.float64:
        return outputs, float((adapted.to(dtype) - outputs).abs().max())
    ratio = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    return adapted, ratio * float((outputs.double() - adapted).abs().max())


def _in_dtype(given: Any, dtype: torch.dtype) -> Any:
    """An example's floating-point tensors in another dtype."""

    def widen(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    if isinstance(given, dict):
        return {name: widen(value) for name, value in given.items()}
    return tuple(widen(value) for value in given)
