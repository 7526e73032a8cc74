"""swap_attention for transformers models: which of their configs can select fastattn, and with which masks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from fastattn.integrations import inspection, swap_peers
from fastattn.integrations import transformers_compat as compat
from fastattn.integrations.transformers import REFUSED, implementation_name, is_ours, register
from fastattn.integrations.transformers_kinds import why_dense
from fastattn.spec import MAX_HEAD_DIM

_PREVIOUS = "_fastattn_previous"  # on a swapped model: a `_Previous`
_REGISTERS = "_fastattn_registers"  # on each of its models and attention modules: a `_Registers`
_HEAD_DIMS = ("head_dim", "head_size", "attention_head_size", "key_value_proj_dim", "dim_head", "dim_per_head",
              "qk_head_dim", "v_head_dim", "value_dim_per_head", "head_dims")  # fmt: skip
_DROPOUTS = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob", "attn_dropout")
# The kind of masks of each implementation; masks of other implementations are used by those only.
_MASKS_OF = {None: "float", "eager": "float", "sdpa": "bool"}


class _Previous(list[tuple[Any, str | None]]):
    """(config, its implementation before) of every config in a swapped model; registers "fastattn" when unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickle, (list(self),)


def _unpickle(pairs: list[tuple[Any, str | None]]) -> _Previous:
    register()
    return _Previous(pairs)


class _Registers:
    """Registers "fastattn" when it is unpickled, with a whole model or with a part of one."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _registers, ()


def _registers() -> _Registers:
    register()
    return _Registers()


@dataclass
class _Group:
    """The modules whose attention, and whose masks, depend on the same configs."""

    configs: dict[int, Any] = field(default_factory=dict)
    owners: dict[int, Any] = field(default_factory=dict)  # the models that contain them
    calling: dict[str, nn.Module] = field(default_factory=dict)  # attention through transformers' interface
    others: dict[str, nn.Module] = field(default_factory=dict)  # attention of their own
    beside: dict[str, nn.Module] = field(default_factory=dict)  # without attention, but using its masks

    def merge(self, other: _Group) -> None:
        """Add the modules of another group."""
        for name in ("configs", "owners", "calling", "others", "beside"):
            getattr(self, name).update(getattr(other, name))


def swap_models(
    model: nn.Module, backend: str
) -> tuple[list[str], list[str], list[tuple[str, str]], list[tuple[str, str]]]:
    """Set the implementation of the transformers models in a tree.

    Returns (swapped, already, left, dense): names of modules, with reasons; `dense` are swapped ones that get dense
    masks, and why.
    """
    register()
    swapped: list[str] = []
    already: list[str] = []
    left: list[tuple[str, str]] = []
    dense: list[tuple[str, str]] = []
    for prefix, top in top_models(model):
        recorded = {id(config): old for config, old in getattr(top, _PREVIOUS, [])}
        previous = _Previous()
        groups = _groups(prefix, top)
        chosen: dict[int, str] = {}
        for group in groups:
            before = {key: compat.implementation(config) for key, config in group.configs.items()}
            ours = all(is_ours(name) for name in before.values())
            if ours and not recorded.keys() & group.configs.keys():
                already += group.calling  # fastattn was chosen by the user
                left += [(path, _itself(module)) for path, module in group.others.items()]
                continue
            old = {recorded[key] if key in recorded and is_ours(n) else n for key, n in before.items()}
            reasons, masks, why = _plan(group, old)
            left += [(path, _itself(module)) for path, module in group.others.items()]
            if reasons is not None:
                left += reasons
                continue
            chosen |= dict.fromkeys(group.configs, implementation_name(backend, masks))
            (already if ours else swapped).extend(group.calling)
            if masks:
                dense += [(path, why) for path in group.calling]
        inside = {key for group in groups for key in group.configs if group.calling or group.others}
        if (
            chosen
            and inside <= chosen.keys()
            and all(n == implementation_name(backend) for n in chosen.values())
        ):
            # the configs that contain them make masks, too
            around = [c for c in _configs(top) if id(c) not in inside and _choosable(top, c)]
            chosen |= {id(config): implementation_name(backend) for config in around}
        for config in _configs(top):
            now = compat.implementation(config)
            old_name = recorded[id(config)] if id(config) in recorded and is_ours(now) else now
            if id(config) in chosen and not (is_ours(now) and id(config) not in recorded):
                previous.append((config, old_name))
            elif id(config) in recorded and is_ours(now):  # a module added since cannot run on it
                compat.set_implementation(config, old_name)
        vars(top).pop(_PREVIOUS, None)
        if previous:
            for config, _ in previous:
                compat.set_implementation(config, chosen[id(config)])
            setattr(top, _PREVIOUS, previous)
            switched = {id(config) for config, _ in previous}
            for group in groups:
                if switched & group.configs.keys():
                    for part in (*group.owners.values(), *group.calling.values()):
                        vars(part)[_REGISTERS] = _Registers()
    order = {path: i for i, (path, _) in enumerate(model.named_modules())}
    left.sort(key=lambda entry: order.get(entry[0], 0))
    return swapped, already, left, dense


def restore_models(model: nn.Module) -> list[str]:
    """Undo `swap_models`: the names of the modules that run what they ran before."""
    restored: list[str] = []
    for prefix, top in top_models(model):
        changed = set()
        for config, name in vars(top).pop(_PREVIOUS, []):
            if is_ours(compat.implementation(config)):  # the user may have chosen another since
                compat.set_implementation(config, name)
                changed.add(id(config))
        for group in _groups(prefix, top):
            if changed & group.configs.keys():
                restored += group.calling
        for part in top.modules():
            vars(part).pop(_REGISTERS, None)
    return restored


def top_models(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The outermost transformers models."""
    inside: tuple[str, ...] = ()
    for path, module in model.named_modules():
        if compat.is_model(module) and not path.startswith(inside or ("\0",)):
            inside = (*inside, f"{path}." if path else "")
            yield path, module


def _plan(group: _Group, before: set[str | None]) -> tuple[list[tuple[str, str]] | None, str, str]:
    """(why its modules are left or None, the masks it gets, why not structured ones)."""
    if not group.calling:
        return [], "", ""
    fixed = next((owner for owner in group.owners.values() if not compat.can_choose(owner)), None)
    if fixed is not None:
        why = f"{type(fixed).__name__} does not let its attention be chosen"
        return [(path, why) for path in group.calling], "", ""
    reasons = {path: no for path, module in group.calling.items() if (no := _why_not(module)) is not None}
    if reasons:
        path = next(iter(reasons))
        shared = f"its config names one implementation for it and for {path or 'the model itself'}"
        return [(p, reasons.get(p, f"{shared}: {reasons[path]}")) for p in group.calling], "", ""
    if (dense := _why_dense(group)) is None:
        return None, "", ""
    masks = {_MASKS_OF.get(name) for name in before}
    if len(masks) > 1 or None in masks:
        names = ", ".join(sorted(str(name) for name in before))
        return (
            [(p, f"{dense}, and {names} makes masks that fastattn cannot read") for p in group.calling],
            "",
            "",
        )
    sdpa = all(compat.runs_sdpa(owner) for owner in group.owners.values())
    return None, str(masks.pop()) if sdpa else "float", dense


def _why_dense(group: _Group) -> str | None:
    """Why modules cannot get structured masks, or None for an implied mask; None if they can."""
    beside = {**group.others, **group.beside}
    found = why_dense(map(type, group.calling.values()), map(type, beside.values()), group.owners.values())
    if found is None:
        return None
    cls, why = found
    paths = [path for path, module in {**beside, **group.calling}.items() if type(module) is cls]
    name = cls.__name__ if isinstance(cls, type) else type(cls).__name__
    return f"{paths[0] or 'the model'} ({name}) {why}" if paths else f"{name} {why}"


def _why_not(module: nn.Module) -> str | None:
    """Why the op cannot run a module that calls transformers' interface."""
    name = type(module).__name__
    for keyword in ("indices", "block_indices", "sinks"):
        if keyword in inspection.passes(type(module)):
            return f"{name} passes {keyword}: {REFUSED[keyword]}"
    if (dim := max(_head_dims(module), default=0)) > MAX_HEAD_DIM:
        return f"{name} has head dim {dim}, fastattn runs 1 to {MAX_HEAD_DIM}"
    if _drops_everything(module):
        return f"{name} has attention dropout 1.0, fastattn needs less"
    return None


def _head_dims(module: nn.Module) -> Iterator[int]:
    found = _numbers(module, _HEAD_DIMS) or _numbers(getattr(module, "config", None), ("head_dim",))
    if not found:
        width = _numbers(module, ("embed_dim", "hidden_size", "all_head_size", "inner_dim"))
        heads = _numbers(module, ("num_heads", "num_attention_heads", "n_heads"))
        found = [width[0] // heads[0]] if width and heads else []
    yield from found


def _numbers(holder: object, names: tuple[str, ...]) -> list[int]:
    """The attributes of these names that are numbers above 0."""
    values = [getattr(holder, name, None) for name in names]
    return [value for value in values if isinstance(value, int) and value > 0]


def _drops_everything(module: nn.Module) -> bool:
    """Whether a module, or its config for it, drops every weight of its attention in training."""
    config = getattr(module, "config", None)
    rates = [getattr(config, name, None) for name in _DROPOUTS]
    for name, value in (*vars(module).items(), *module.named_children()):
        if "drop" in name and not any(part in name for part in ("resid", "hidden", "out_", "proj", "path")):
            rates.append(getattr(value, "p", value))
    return any(isinstance(rate, float) and rate >= 1.0 for rate in rates)


def _itself(module: nn.Module) -> str:
    return f"{type(module).__name__} computes attention itself{swap_peers.hint(module)}"


def _configs(model: nn.Module) -> list[Any]:
    """Every config in a model, once each, before the configs inside it."""
    found: dict[int, Any] = {}
    queue = [m.config for m in model.modules() if compat.is_model(m)]
    for config in queue:
        if id(config) not in found:
            found[id(config)] = config
            queue += compat.sub_configs(config)
    for module in model.modules():
        own = getattr(module, "config", None)
        if inspection.calls_interface(type(module)) and compat.implementation(own) is not None:
            found.setdefault(id(own), own)
    return list(found.values())


def _choosable(top: nn.Module, config: Any) -> bool:
    return all(compat.can_choose(m) for m in top.modules() if compat.is_model(m) and m.config is config)


def _groups(prefix: str, top: nn.Module) -> list[_Group]:
    """The modules that compute attention in a transformers model, grouped by their config."""
    known = {id(config): config for config in _configs(top)}
    groups: dict[int, _Group] = {}
    owners: dict[str, Any] = {}
    for inner, module in top.named_modules():
        owner = owners[inner] = module if compat.is_model(module) else owners[inner.rpartition(".")[0]]
        calls = inspection.calls_interface(type(module))
        beside = not compat.is_model(module) and inspection.weighs_by_mask(type(module))
        if not (calls or beside or _attends(module)):
            continue
        path = ".".join(filter(None, (prefix, inner)))
        group = _Group({id(owner.config): owner.config}, {id(owner): owner})
        kind = group.calling if calls else group.others if _attends(module) else group.beside
        kind[path] = module
        if calls and id(config := getattr(module, "config", None)) in known:
            group.configs[id(config)] = config
        for key in list(group.configs):
            if key in groups:
                group, new = groups[key], group
                if group is not new:
                    group.merge(new)
        for key in group.configs:
            if key in groups and groups[key] is not group:
                group.merge(groups[key])
        for key in group.configs:
            groups[key] = group
    return list({id(group): group for group in groups.values()}.values())


def _attends(module: nn.Module) -> bool:
    """Whether a module computes attention itself; a torch.nn.MultiheadAttention is swapped by its class."""
    if (
        isinstance(module, nn.MultiheadAttention)
        or compat.is_model(module)
        or not inspection.attends(type(module))
    ):
        return False
    return not any(m is not module and (inspection.calls_interface(type(m))) for m in module.modules())
