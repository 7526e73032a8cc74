"""A model's parameters split over processes by FSDP2, torch.distributed.fsdp.fully_shard."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastattn.ops.distributed import is_dtensor
from fastattn.train.recompute import blocks_of


class LossOf(nn.Module):
    """A model whose result is its loss.

    FSDP2 finds the tensors of a result by torch's pytrees, to which a model's own class of output is closed.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **batch: Tensor) -> Any:
        return self.model(**batch).loss


class Sharding:
    """Leaves a part of each parameter on this process, of its gradient and of its optimiser state alike.

    Each block of the model (a member of an nn.ModuleList) is gathered for its own forward and backward pass and
    released after it; what is in no block is one more such unit. All processes begin with the first one's values.

    Args:
        model: sharded in place, and moved to the device unit by unit.
        device: of this process.

    Raises:
        ValueError: a parameter has no dimension.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        self.model = model
        self._names = _names_by_parameter(model)
        self._skeleton = _without_values(model)
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        for tensor in (*model.parameters(), *model.buffers()):
            value = tensor.detach().to(device)
            dist.broadcast(value, 0)
            if value.data_ptr() != tensor.data_ptr():
                tensor.detach().copy_(value)
        self.blocks: list[Any] = _own_blocks(model)
        for block in self.blocks:
            fully_shard(block, mesh=mesh)
        self.root: Any = LossOf(model)  # its call gives the loss
        fully_shard(self.root, mesh=mesh)

    def release(self) -> None:
        """Leave each process with its own part, as after a forward pass without a backward one it is not yet."""
        for unit in [self.root, *self.blocks]:
            unit.reshard()

    def gathered(self, main: bool) -> nn.Module | None:
        """The model with whole parameters on the CPU where `main`, None elsewhere; all processes call it together.

        One parameter at a time is whole on the other processes.
        """
        self.release()
        model = copy.deepcopy(self._skeleton) if main else None
        for names in self._names:
            parameter: Any = self.model.get_parameter(names[0])
            value = parameter.detach().full_tensor()
            if model is not None:
                own = value.to(
                    "cpu", copy=True
                )  # a storage of just its size, which safetensors needs of tied ones
                made = nn.Parameter(own, requires_grad=parameter.requires_grad)
                for name in names:
                    _replace(model, name, made)
        if model is not None:
            for name, buffer in self.model.named_buffers():
                model.get_buffer(name).copy_(buffer)
        return model


def is_sharded(tensor: Tensor) -> bool:
    """Whether the tensor is split over processes."""
    return is_dtensor(tensor)


def own_part(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor, sharing its memory; any other tensor as it is."""
    whole: Any = tensor
    part: Tensor = whole.to_local() if is_sharded(tensor) else tensor
    return part


def _own_blocks(model: nn.Module) -> list[nn.Module]:
    """The model's blocks with parameters, except those that share one with another part of the model."""
    blocks = [block for block in blocks_of(model) if any(True for _ in block.parameters())]
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    return [block for block in blocks if all(uses[id(p)] == 1 for p in block.parameters())]


def _names_by_parameter(model: nn.Module) -> list[list[str]]:
    """The names of each parameter; a tied one has several."""
    found: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found.setdefault(id(parameter), []).append(name)
    return list(found.values())


def _without_values(model: nn.Module) -> nn.Module:
    """A copy of the model whose parameters are on the meta device."""
    memo: dict[int, Any] = {
        id(p): nn.Parameter(p.detach().to("meta"), requires_grad=p.requires_grad) for p in model.parameters()
    }
    made: nn.Module = copy.deepcopy(model, memo)
    return made


def _replace(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    place, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(place), leaf, parameter)
