"""A language model that also learns from a teacher's distribution over the next token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastattn.constants import IGNORE_INDEX
from fastattn.data.corpora import DataError
from fastattn.models import GPT
from fastattn.models.decoder import CausalLMOutput
from fastattn.tasks.logprobs import logits_of, next_targets

CHUNK = 512  # tokens whose logits exist at a time


class Student(GPT):
    """A `GPT` with an optional teacher: its training loss is then (1 - w) L + w T^2 KL(teacher || model).

    L is the loss of the labels. The divergence is the mean over the targets that count, of distributions with the
    temperature T. Hinton et al. 2015, Distilling the Knowledge in a Neural Network. The teacher is not among the
    model's parameters.
    """

    teachers: tuple[GPT, ...] = ()  # at most one; in a tuple, it is not a submodule
    distill_weight = 0.0
    temperature = 1.0

    def learn_from(self, teacher: GPT, *, weight: float, temperature: float) -> None:
        """Set the teacher; it is put into eval mode and never trained.

        Raises:
            DataError: its vocabulary differs from the model's.
        """
        if teacher.config.vocab_size != self.config.vocab_size:
            raise DataError(
                f"--teacher: has {teacher.config.vocab_size} tokens, the model {self.config.vocab_size}; soft labels "
                f"need the same vocabulary"
            )
        self.teachers = (teacher.eval().requires_grad_(False),)
        self.distill_weight, self.temperature = weight, temperature

    def forward(self, *args: Any, **kwargs: Any) -> CausalLMOutput:
        """As `GPT.forward`."""
        output = super().forward(*args, **kwargs)
        if not (self.training and self.teachers and self.distill_weight) or output.loss is None:
            return output
        given = dict(zip(("input_ids", "attention_mask", "labels"), args)) | kwargs
        targets = next_targets(given["labels"], given.get("segment_ids"))
        seen = {name: given.get(name) for name in ("attention_mask", "segment_ids", "position_ids")}
        soft = self._divergence(given["input_ids"], targets != IGNORE_INDEX, seen, output.last_hidden_state)
        return output._replace(loss=(1 - self.distill_weight) * output.loss + self.distill_weight * soft)

    def _divergence(self, ids: Tensor, counted: Tensor, seen: dict[str, Any], hidden: Tensor) -> Tensor:
        """T^2 KL(teacher || model), the mean over the counted positions of (B, S)."""
        teacher = self.teachers[0]
        if teacher.wte.weight.device != ids.device:
            teacher.to(ids.device)
        with torch.no_grad():
            theirs = teacher(ids, **seen, return_logits=False).last_hidden_state[counted]
        ours = hidden[counted]
        total = hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, len(ours), CHUNK):
            part = slice(start, start + CHUNK)
            total = total + checkpoint(
                self._sum_of_divergences, ours[part], theirs[part], use_reentrant=False
            )
        return total * (self.temperature**2 / max(1, len(ours)))

    def _sum_of_divergences(self, ours: Tensor, theirs: Tensor) -> Tensor:
        given = (logits_of(self, ours) / self.temperature).log_softmax(-1)
        with torch.no_grad():
            wanted = (logits_of(self.teachers[0], theirs) / self.temperature).log_softmax(-1)
        return (wanted.exp() * (wanted - given)).sum()
