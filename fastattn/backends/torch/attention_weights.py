"""The weights that attention returns, and their gradients, recomputed from lse tile by tile."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.backends.torch.exponential import exp_
from fastattn.backends.torch.gradient_sums import GradientSums
from fastattn.backends.torch.parts import dropped, parts, rows_of
from fastattn.backends.torch.references import is_extreme, references
from fastattn.spec import AttentionCall, AttentionSpec, WeightsGradsNeeded


def attention_weights_fwd(spec: AttentionSpec, call: AttentionCall, lse: Tensor, mean: bool) -> Tensor:
    """keep * exp(score - lse) / (1 - p), (B, H, Sq, Sk), or its mean over heads, (B, Sq, Sk)."""
    batch, num_heads, seqlen_q, _ = call.query.shape
    shape = (batch, seqlen_q, call.key.shape[2]) if mean else (batch, num_heads, seqlen_q, call.key.shape[2])
    weights = call.query.new_zeros(shape)
    lse_safe, has_nan = references(lse)
    extreme = is_extreme(call, lse) and call.sinks is None
    for part in parts(call):
        for row_tiles in part.schedule(fused=False, whole_rows=extreme):
            for tile in row_tiles:
                probs = _probs(part.scores(tile)[0], rows_of(part.of(lse_safe), tile), has_nan)
                if extreme:
                    probs /= probs.sum(-1, keepdim=True).clamp_min(1e-30)
                probs = dropped(part, tile, probs)
                part.of(weights)[..., tile.rows.start : tile.rows.stop, tile.cols.start : tile.cols.stop] = (
                    probs.mean(1) if mean else probs
                )
    return weights


def attention_weights_bwd(
    spec: AttentionSpec,
    call: AttentionCall,
    lse: Tensor,
    dweights: Tensor,
    mean: bool,
    needs: WeightsGradsNeeded,
) -> tuple[Tensor | None, ...]:
    """Gradients of the weights to query, key, lse, bias and slopes: dscore = W * dW, dlse = -rowsum(W * dW)."""
    sums = GradientSums(call, needs.bias, needs.alibi_slopes)
    dlse = lse.new_zeros(lse.shape)
    lse_safe, has_nan = references(lse)
    num_heads = call.query.shape[1]
    for part in parts(call):
        for row_tiles in part.schedule(fused=False):
            for tile in row_tiles:
                scores, slope = part.scores(tile)
                weights = dropped(part, tile, _probs(scores, rows_of(part.of(lse_safe), tile), has_nan))
                dtile = part.of(dweights)[
                    ..., tile.rows.start : tile.rows.stop, tile.cols.start : tile.cols.stop
                ]
                dtile = (dtile[:, None] / num_heads if mean else dtile).to(weights.dtype)
                dscores = torch.where(weights != 0, weights * dtile, 0)
                rows_of(part.of(dlse), tile).sub_(dscores.sum(-1))
                sums.add_scores(part, tile, dscores, slope)
    dq, dk, _, dbias, dslopes = sums.results()
    return dq, dk, dlse, dbias, dslopes


def _probs(scores: Tensor, reference: Tensor, has_nan: bool) -> Tensor:
    """exp(score - reference) in place of the scores; 0 where a query may not look, even if its reference is NaN."""
    hidden = scores == -torch.inf if has_nan else None
    probs = exp_(scores.sub_(reference[..., None]))
    return probs if hidden is None else probs.masked_fill_(hidden, 0)
