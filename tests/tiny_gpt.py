"""The sizes of a small GPT whose logits differ enough to tell mistakes from rounding."""

from typing import Any

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "n_positions": 64,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "initializer_range": 0.3,
}
