"""One tile of the backward: its weights, recomputed, and the gradients of its scores. Every pass uses them."""

# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

from .primitives import (
    score_pointers,
)
from .scores import (
    dropout_keep,
    exponents,
    logits,
)


@triton.jit
def weights_tile(
    query_tile, key_tile, reference_rows, correction_rows, first_query, first_key, scoring, dropout,
    KEYS_FIRST: tl.constexpr, IS_MASKED: tl.constexpr, VARIANT: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """(probs, weights, capped) of a tile: keys by queries if KEYS_FIRST, else queries by keys.

    probs = lse_correction * exp(logit - lse). weights are the probs that dropout kept, not yet divided by the
    probability of keeping them.
    """
    seed, head_index, threshold, _ = dropout
    rows = first_query + tl.arange(0, BLOCK_M)
    cols = first_key + tl.arange(0, BLOCK_N)
    if KEYS_FIRST:
        products = tl.dot(key_tile, tl.trans(query_tile), input_precision=VARIANT.dot_precision)
        scores, capped = logits(products, rows[None, :], cols[:, None], scoring, IS_MASKED, VARIANT)
        probs = tl.exp2(exponents(scores, reference_rows[None, :], scoring[0], VARIANT))
        if VARIANT.bias:
            probs *= correction_rows[None, :]
    else:
        products = tl.dot(query_tile, tl.trans(key_tile), input_precision=VARIANT.dot_precision)
        scores, capped = logits(products, rows[:, None], cols[None, :], scoring, IS_MASKED, VARIANT)
        probs = tl.exp2(exponents(scores, reference_rows[:, None], scoring[0], VARIANT))
        if VARIANT.bias:
            probs *= correction_rows[:, None]
    weights = probs
    if VARIANT.dropout:
        keep = dropout_keep(seed, head_index, first_query, first_key, threshold, BLOCK_M, BLOCK_N)
        if KEYS_FIRST:
            keep = tl.trans(keep)
        weights = tl.where(keep, probs, 0.0)
    return probs, weights, capped


@triton.jit
def gradient_tile(
    probs, weights, capped, dout_tile, value_tile, delta_rows, first_query, first_key, scoring, dropout, head_dweights,
    KEYS_FIRST: tl.constexpr, VARIANT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """(dscores, dproducts) of a tile: the gradients of the logits and of scale * q.k.

    dscores = probs * (dropout(dout @ v.T) - delta), or weights * dweights where the weights' gradients are given.
    """
    _, _, _, keep_scale = dropout
    if VARIANT.dweights:
        seqlen_q, seq_key_end, _, _, _ = scoring[6]
        rows = first_query + tl.arange(0, BLOCK_M)
        cols = first_key + tl.arange(0, BLOCK_N)
        if KEYS_FIRST:
            rows, cols = rows[None, :], cols[:, None]
        else:
            rows, cols = rows[:, None], cols[None, :]
        pointers = score_pointers(head_dweights, rows, cols, VARIANT.unit_dweights, VARIANT)
        dweights = tl.load(pointers, mask=(rows < seqlen_q) & (cols < seq_key_end), other=0.0).to(tl.float32)
        dscores = tl.where(weights != 0.0, weights * dweights * keep_scale, 0.0)
    else:
        if KEYS_FIRST:
            dprobs = tl.dot(value_tile, tl.trans(dout_tile), input_precision=VARIANT.dot_precision)
            delta_rows = delta_rows[None, :]
        else:
            dprobs = tl.dot(dout_tile, tl.trans(value_tile), input_precision=VARIANT.dot_precision)
            delta_rows = delta_rows[:, None]
        if VARIANT.dropout:
            dscores = weights * (dprobs * keep_scale) - probs * delta_rows
        else:
            dscores = probs * (dprobs - delta_rows)
    dproducts = dscores
    if VARIANT.softcap:
        dproducts = dscores * (1.0 - capped * capped)
    return dscores, dproducts
