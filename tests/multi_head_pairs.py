"""torch's multi-head attention and ours with the same weights, on the same inputs."""

import torch
from torch import nn

from fastattn.nn.attention import MultiHeadAttention

EMBED, HEADS, BATCH, LEN_Q, LEN_K = 24, 4, 3, 5, 7
CONSTRUCTIONS = {
    "plain": {},
    "no bias": {"bias": False},
    "bias_kv": {"add_bias_kv": True},
    "zero_attn": {"add_zero_attn": True},
    "bias_kv and zero_attn": {"add_bias_kv": True, "add_zero_attn": True},
    "kdim": {"kdim": 10},
    "vdim": {"vdim": 11},
    "kdim, vdim, no bias": {"kdim": 10, "vdim": 11, "bias": False},
    "everything": {"kdim": 10, "vdim": 11, "add_bias_kv": True, "add_zero_attn": True},
}


def pair(seed=0, **options):
    """torch's module and ours, made under the same seed, with random biases so that every parameter matters."""
    modules = []
    for cls in (nn.MultiheadAttention, MultiHeadAttention):
        torch.manual_seed(seed)
        modules.append(cls(EMBED, HEADS, dtype=torch.float64, **options))
    theirs, ours = modules
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def inputs(module, *, batched=True, kind="cross", seed=1):
    """(query, key, value) leaves: one tensor thrice ("self"), twice ("memory") or three tensors ("cross")."""
    generator = torch.Generator().manual_seed(seed)

    def make(length, width):
        shape = (BATCH, length, width) if module.batch_first else (length, BATCH, width)
        shape = shape if batched else (length, width)
        return torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()

    query = make(LEN_K if kind == "self" else LEN_Q, module.embed_dim)
    if kind == "self":
        return query, query, query
    key = make(LEN_K, module.kdim)
    return (query, key, key) if kind == "memory" else (query, key, make(LEN_K, module.vdim))


def mask_of(shape, kind, seed=2):
    """A bool mask (True = hidden) or a float one that leaves every row something to see; None for kind None."""
    if kind is None:
        return None
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.rand(shape, generator=generator) < 0.4
    hidden[..., 0] = False
    if kind == "bool":
        return hidden
    values = torch.randn(shape, dtype=torch.float64, generator=generator)
    return values.masked_fill(hidden, float("-inf")) if kind == "float with -inf" else values


def leaves(query, key, value):
    return list({id(t): t for t in (query, key, value)}.values())


def run(module, tensors, *, weights_count, **options):
    """Output, weights and the gradients of inputs, masks and parameters under a fixed random upstream gradient."""
    masks = {
        name: mask.clone().requires_grad_()
        for name, mask in options.items()
        if isinstance(mask, torch.Tensor) and mask.is_floating_point() and bool(mask.isfinite().all())
    }
    out, weights = module(*tensors, **{**options, **masks})
    generator = torch.Generator().manual_seed(3)
    loss = (out * torch.randn(out.shape, dtype=out.dtype, generator=generator)).sum()
    if weights_count and weights is not None:
        loss = loss + (weights * torch.randn(weights.shape, dtype=out.dtype, generator=generator)).sum()
    wanted = {f"input {i}": t for i, t in enumerate(leaves(*tensors))}
    wanted |= masks | dict(module.named_parameters())
    grads = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    return out, weights, dict(zip(wanted, grads))


def assert_same(theirs, ours, tensors, **options):
    expected, actual = (run(m, tensors, weights_count=True, **options) for m in (theirs, ours))
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-10, atol=1e-12)
    assert (actual[1] is None) == (expected[1] is None)
    if expected[1] is not None:
        torch.testing.assert_close(actual[1], expected[1], rtol=1e-10, atol=1e-12)
    assert actual[2].keys() == expected[2].keys()
    for name, grad in expected[2].items():
        assert (grad is None) == (actual[2][name] is None), name
        if grad is not None:
            torch.testing.assert_close(
                actual[2][name], grad, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}"
            )
