"""Combinations of options by the error rule: eight fixed ones, or FASTATTN_TEST_EXAMPLES=N fresh ones."""

from __future__ import annotations

import os
from typing import Any

from attention_cases import SMALL_TILES, UNEVEN_TILES, Case, Maker, Options, check
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

EXAMPLES = int(os.environ.get("FASTATTN_TEST_EXAMPLES", "0"))
BOUND = st.none() | st.integers(0, 40)  # a side of a window

CALLS = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 2),
        "group": st.integers(1, 2),
        "seqlen_q": st.integers(1, 40),
        "seqlen_k": st.integers(1, 40),
        "head_dim": st.sampled_from([3, 16, 24]),
        "value_dim": st.sampled_from([5, 16, 24]),
        "tiles": st.sampled_from([SMALL_TILES, UNEVEN_TILES]),
        "causal": st.sampled_from([False, True, "top_left"]),
        "window": st.none() | st.tuples(BOUND, BOUND),
        "softcap": st.sampled_from([None, 2.0]),
        "dropout_p": st.sampled_from([0.0, 0.3]),
        "tensors": st.sets(
            st.sampled_from(["mask", "bias", "segment_ids", "key_lengths", "alibi_slopes", "sinks"])
        ),
        "broadcast": st.lists(st.booleans(), min_size=4, max_size=4),
    }
)


def options_of(make: Maker, drawn: dict[str, Any], sizes: tuple[int, ...]) -> Options:
    """The options of a drawn call over (B, H, Sq, Sk) = sizes."""
    batch, heads, seqlen_q, seqlen_k = sizes
    shape = [1 if once else size for once, size in zip(drawn["broadcast"], sizes)]
    every: Options = {
        "mask": make.normal(*shape) < 0.8,
        "bias": make.normal(*shape),
        "segment_ids": (make.integers(-1, 2, batch, seqlen_q), make.integers(-1, 2, batch, seqlen_k)),
        "key_lengths": make.integers(0, seqlen_k + 1, batch),
        "alibi_slopes": make.normal(heads).abs(),
        "sinks": make.normal(heads),
    }
    options = {name: every[name] for name in drawn["tensors"]}
    options |= {name: drawn[name] for name in ("causal", "window", "softcap", "dropout_p")}
    return options | {"dropout_seed": 17}


@settings(
    max_examples=EXAMPLES or 8,
    derandomize=not EXAMPLES,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(CALLS)
def test_error_rule(drawn: dict[str, Any]) -> None:
    heads = drawn["group"]
    sizes = (drawn["batch"], heads, drawn["seqlen_q"], drawn["seqlen_k"])
    case = Case(
        "drawn",
        lambda make: options_of(make, drawn, sizes),
        batch=drawn["batch"],
        heads=heads,
        seqlen_q=drawn["seqlen_q"],
        seqlen_k=drawn["seqlen_k"],
        head_dim=drawn["head_dim"],
        value_dim=drawn["value_dim"],
        tiles=drawn["tiles"],
    )
    check(case)
