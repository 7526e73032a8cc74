"""Cross-entropy in torch operations, on blocks of rows that stay in the cache between the passes over them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastattn import torch_compat
from fastattn.backends import linear_cross_entropy
from fastattn.backends.linear_cross_entropy import LinearGrads
from fastattn.backends.torch.softmax import block_elements
from fastattn.spec import CrossEntropyCall, LinearCrossEntropyCall, SoftmaxSpec, accumulation_dtype

LEAST = (
    2.0**-100
)  # a probability above it has all its digits, so its logarithm is as precise as that of a sum

Targets = tuple[Tensor | None, Tensor | None, Tensor]
Block = slice | None  # some rows, or all where one block holds them


def cross_entropy_fwd(
    spec: SoftmaxSpec,
    call: CrossEntropyCall,
    dlosses: Tensor | None = None,
    targets: Targets | None = None,
) -> tuple[Tensor, Tensor]:
    """(losses, norms) in the accumulation dtype: those of `reference.cross_entropy`, (N,), 0 where ignored.

    norms (N, 2) are the parts of lse, the largest logit and the logarithm of sum(exp(z - largest)): apart they lose
    nothing to the size of the logits. A target that is not a class has loss NaN.

    With dlosses, one number that is the gradient of every loss, (losses, gradient of the logits): the exponentials of
    a block make its sum and, while they are in the cache, its gradient. targets: of `read_targets`, if known.
    """
    if dlosses is None:
        return _forward(call, None, None)
    dlogits = _empty_like(call.logits)
    if targets is None:
        targets = read_targets(call.target, call.logits.shape[1], call.ignore_index)
    if call.label_smoothing or call.z_loss:
        losses, _ = _forward(call, dlosses, dlogits, targets)
        return losses, dlogits
    return _by_probability(call, dlosses, dlogits, targets), dlogits


def _with_gradient(
    spec: SoftmaxSpec, call: CrossEntropyCall, dlosses: Tensor, out: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(losses, norms, dlogits), the gradient written to `out` if given, which may be the logits."""
    made = _empty_like(call.logits) if out is None else out
    losses, norms = _forward(call, dlosses, made)
    return losses, norms, made


def _by_probability(call: CrossEntropyCall, dlosses: Tensor, dlogits: Tensor, targets: Targets) -> Tensor:
    """Losses without smoothing and z_loss from the probabilities of the targets, the gradient written to `dlogits`:
    neither the largest logit of a row nor its largest probability is looked for."""
    logits, (ignored, wrong, target) = call.logits, targets
    own = _target_weights(call, target)
    blocks, grads = _Blocks(logits, dlogits), _BlockGrads(call, dlosses, dlogits, targets, own, None)
    column = target[:, None]
    of_targets = logits.new_empty(column.shape, dtype=blocks.dtype)
    for rows in blocks:
        probs = blocks.probs(rows)
        torch_compat.softmax(probs, blocks.logits(rows), 1, log=False)
        torch.gather(probs, 1, _part(column, rows), out=_part(of_targets, rows))
        grads.finish(rows, probs, None)
    grads.finish_all()
    if of_targets.numel() and not of_targets.amin().item() >= LEAST:  # NaN is neither
        few = (of_targets < LEAST).nonzero()[:, 0]
    else:
        few = None
    losses = of_targets.log_().neg_()[:, 0]
    for rows in () if few is None else few.split(blocks.step):
        z = logits[rows].to(losses.dtype)
        losses[rows] = z.logsumexp(1) - z.gather(1, column[rows])[:, 0]
    if own is not None:
        losses.mul_(own)
    return _marked(losses, ignored, wrong)


def _forward(
    call: CrossEntropyCall, dlosses: Tensor | None, dlogits: Tensor | None, targets: Targets | None = None
) -> tuple[Tensor, Tensor]:
    """(losses, norms); with dlosses and dlogits, the gradient is written to the latter."""
    logits, smoothing, weight = call.logits, call.label_smoothing, call.class_weight
    dtype = accumulation_dtype(logits.dtype)
    largest = logits.new_empty(logits.shape[0], 1, dtype=dtype)
    highest = torch.empty_like(largest)  # the probability of the largest logit, 1 / sum(exp(z - largest))
    spread = None  # the mean of (weighted) logits less the largest
    if smoothing:
        spread = logits.new_empty(logits.shape[0], dtype=dtype)
    if targets is None:
        targets = read_targets(call.target, logits.shape[1], call.ignore_index)
    ignored, wrong, target = targets
    chosen = logits.gather(1, target[:, None])[:, 0].to(dtype)  # before the gradient overwrites them
    own, mean = _target_weights(call, target), call.weight_mean()
    blocks = _Blocks(logits, dlogits)
    grads = None
    if dlosses is not None and dlogits is not None:
        grads = _BlockGrads(call, dlosses, dlogits, targets, own, mean)
    for rows in blocks:
        z, probs = blocks.logits(rows), blocks.probs(rows)
        z_largest, p_highest = _part(largest, rows), _part(highest, rows)
        torch.amax(z, 1, keepdim=True, out=z_largest)
        if spread is not None:
            torch.sub(z, z_largest, out=probs)
            mean_of_block = probs.mean(1) if weight is None else probs @ (weight / weight.shape[0])
            _part(spread, rows).copy_(mean_of_block)
        torch_compat.softmax(probs, z, 1, log=False)
        torch.amax(probs, 1, keepdim=True, out=p_highest)
        if grads is not None:
            lse = (z_largest - p_highest.log())[:, 0] if call.z_loss else None
            grads.finish(rows, probs, lse)
    if grads is not None:
        grads.finish_all()
    log_sum = highest.log_().neg_()[:, 0]
    chosen.sub_(largest[:, 0])
    if own is None:
        if spread is not None:
            chosen.mul_(1 - smoothing).add_(spread, alpha=smoothing)
        losses = log_sum - chosen
    else:
        losses = own * (log_sum - chosen)
        if spread is not None and mean is not None:
            losses += smoothing * (mean * log_sum - spread)
    if call.z_loss:
        losses += call.z_loss * (largest[:, 0] + log_sum).square_()
    return _marked(losses, ignored, wrong), torch.cat([largest, log_sum[:, None]], 1)


def _marked(losses: Tensor, ignored: Tensor | None, wrong: Tensor | None) -> Tensor:
    """The losses, in their place: NaN where the target is no class, 0 where it is ignored."""
    if wrong is not None:
        losses.masked_fill_(wrong, torch.nan)
    if ignored is not None:
        losses.masked_fill_(ignored, 0)
    return losses


class _Blocks:
    """Blocks of rows, and memory for one block: its logits in the accumulation dtype, and its probabilities.

    Memory of a block's size is kept for the next block, so that it stays in the cache.
    """

    def __init__(self, logits: Tensor, dlogits: Tensor | None) -> None:
        self.whole, self.dlogits = logits, dlogits
        self.dtype = accumulation_dtype(logits.dtype)
        self.step = max(1, block_elements(logits.device.type) // max(1, logits.shape[1]))
        # Torch's softmax reads the logits again after it has written probabilities, so these need memory of their own.
        self.in_place = (
            dlogits is not None and dlogits.dtype == self.dtype and dlogits.data_ptr() != logits.data_ptr()
        )
        self.kept: dict[str, Tensor] = {}

    def __iter__(self) -> Iterator[Block]:
        rows = self.whole.shape[0]
        if rows <= self.step:
            return iter((None,))
        return (slice(start, start + self.step) for start in range(0, rows, self.step))

    def logits(self, rows: Block) -> Tensor:
        """The logits of a block."""
        z = _part(self.whole, rows)
        return z if z.dtype == self.dtype else self._memory("logits", z).copy_(z)

    def probs(self, rows: Block) -> Tensor:
        """Where the probabilities of a block are written: where its gradient will be, or to memory of their own."""
        if self.in_place and self.dlogits is not None:
            return _part(self.dlogits, rows)
        return self._memory("probs", _part(self.whole, rows))

    def _memory(self, name: str, like: Tensor) -> Tensor:
        if name not in self.kept:
            self.kept[name] = torch.empty(like.shape, dtype=self.dtype, device=like.device)
        return self.kept[name][: like.shape[0]]


class _BlockGrads:
    """Turns the probabilities of a block of rows into the gradient of its logits.

    dloss * (f * probability - (1 - s) * w[target] * [target] - s * w / V),
    f = (1 - s) * w[target] + s * mean(w) + 2 * z_loss * lse. A target that is not a class gives NaN.
    """

    def __init__(
        self,
        call: CrossEntropyCall,
        dlosses: Tensor,
        dlogits: Tensor,
        targets: Targets,
        own: Tensor | None,
        mean: Tensor | None,
    ) -> None:
        self.ignored, wrong, target = targets
        self.column = target[:, None]
        self.call, self.own, self.dlogits = call, own, dlogits
        self.dlosses = dlosses.to(accumulation_dtype(dlogits.dtype))  # of every row, or one for all
        if wrong is not None:
            self.dlosses = self.dlosses.expand(wrong.shape).masked_fill(wrong, torch.nan)
        self.base = own if own is None or mean is None else own + call.label_smoothing * mean
        self.wanted = self.dlosses * (call.label_smoothing - 1 if own is None else -own)

    def _factor(self, rows: Block, lse: Tensor | None) -> Tensor:
        """dloss * f of each row, or of all rows."""
        dlosses = _of(self.dlosses, rows)
        if lse is None:
            return dlosses if self.base is None else dlosses * _of(self.base, rows)
        return dlosses * (
            2 * self.call.z_loss * lse[:, None] + (1.0 if self.base is None else _of(self.base, rows))
        )

    def finish(self, rows: Block, block: Tensor, lse: Tensor | None) -> None:
        """Make the gradient of a block's probabilities, in their place, and write it; lse under z_loss."""
        block.mul_(self._factor(rows, lse))
        smoothing, weight = self.call.label_smoothing, self.call.class_weight
        if smoothing:
            share = smoothing / block.shape[1] * _of(self.dlosses, rows)
            block.sub_(share if weight is None else share * weight)
        column = _part(self.column, rows)
        block.scatter_add_(1, column, _of(self.wanted, rows).expand(column.shape))
        part = _part(self.dlogits, rows)
        if block.data_ptr() != part.data_ptr():
            part.copy_(block)

    def finish_all(self) -> None:
        """Write the zeros of ignored rows, also where their logits are NaN; by a mask they would cost a whole pass."""
        if self.ignored is not None:
            self.dlogits.index_fill_(0, self.ignored.nonzero()[:, 0], 0)


def cross_entropy_bwd(
    spec: SoftmaxSpec, call: CrossEntropyCall, dlosses: Tensor, norms: Tensor, out: Tensor | None = None
) -> Tensor:
    """The gradient of the logits, whose softmax is made again, written to `out` if given, which may be the logits.

    norms give the lse of z_loss.
    """
    logits = call.logits
    dlogits = _empty_like(logits) if out is None else out
    targets = read_targets(call.target, logits.shape[1], call.ignore_index)
    own, mean = _target_weights(call, targets[2]), call.weight_mean()
    blocks, grads = _Blocks(logits, dlogits), _BlockGrads(call, dlosses, dlogits, targets, own, mean)
    lse = norms.sum(1) if call.z_loss else None
    for rows in blocks:
        probs = blocks.probs(rows)
        torch_compat.softmax(probs, blocks.logits(rows), 1, log=False)
        grads.finish(rows, probs, None if lse is None else _part(lse, rows))
    grads.finish_all()
    return dlogits


def linear_cross_entropy_fwd(
    spec: SoftmaxSpec,
    call: LinearCrossEntropyCall,
    needs: tuple[bool, ...] | None = None,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, LinearGrads | None]:
    """(losses, norms) without all the logits, and the needed gradients of the sum of losses times `scale`."""
    return linear_cross_entropy.forward(
        spec, call, needs, cross_entropy_fwd, cross_entropy_bwd, scale, _with_gradient
    )


def linear_cross_entropy_bwd(
    spec: SoftmaxSpec, call: LinearCrossEntropyCall, dlosses: Tensor, norms: Tensor, needs: tuple[bool, ...]
) -> LinearGrads:
    """The gradients of hidden, weight and bias that are needed, from logits computed again."""
    return linear_cross_entropy.backward(spec, call, dlosses, norms, needs, cross_entropy_bwd)


def _empty_like(logits: Tensor) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def read_targets(target: Tensor, num_classes: int, ignore_index: int) -> Targets:
    """(which rows are ignored, which others have a target that is not a class, a class for every row).

    On a CPU, where values can be read, None stands for no row.
    """
    if target.is_cpu and _are_classes(target, num_classes, ignore_index):
        return None, None, target
    ignored = target == ignore_index
    classes = target.masked_fill(ignored, 0)
    if target.is_cpu and _are_classes(classes, num_classes, -1):
        return ignored, None, classes
    target = classes.clamp(0, num_classes - 1)
    return ignored, classes != target, target


def _are_classes(target: Tensor, num_classes: int, ignore_index: int) -> bool:
    """Whether all targets are classes, and none can be the one that is ignored."""
    if target.numel() == 0:
        return True
    bounds = torch.aminmax(target)
    lowest, highest = bounds.min.item(), bounds.max.item()
    return lowest >= 0 and highest < num_classes and not lowest <= ignore_index <= highest


def _part(tensor: Tensor, rows: Block) -> Tensor:
    """The rows of a block."""
    return tensor if rows is None else tensor[rows]


def _of(values: Tensor, rows: Block) -> Tensor:
    """What the rows of a block have in `values`, as a column; the one number where all rows share it."""
    return values if values.dim() == 0 else _part(values, rows)[:, None]


def _target_weights(call: CrossEntropyCall, target: Tensor) -> Tensor | None:
    """(1 - s) * w[target], if there are class weights."""
    return None if call.class_weight is None else call.class_weight[target] * (1 - call.label_smoothing)
