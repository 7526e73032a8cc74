"""What a user's type checker sees of calls whose result depends on their arguments: mypy --strict on a user's file."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
USER = """
import torch
from torch import Tensor
from typing_extensions import assert_type

import fastattn

q = k = v = torch.randn(1, 2, 3, 4)
ends = torch.tensor([0, 3], dtype=torch.int32)
packed = torch.randn(3, 2, 4)
wanted: bool = bool(len(q))

out = fastattn.attention(q, k, v, causal=True, window=(255, 0), backend="auto")
assert_type(out, Tensor)
out.sum().item()
assert_type(fastattn.attention(q, k, v, return_lse=False, return_weights=False), Tensor)
assert_type(fastattn.attention(q, k, v, return_lse=True, mask=None), tuple[Tensor, Tensor])
assert_type(fastattn.attention(q, k, v, return_weights=True), tuple[Tensor, Tensor])
assert_type(fastattn.attention(q, k, v, return_weights="mean"), tuple[Tensor, Tensor])
assert_type(fastattn.attention(q, k, v, return_lse=True, return_weights="mean"), tuple[Tensor, Tensor, Tensor])
assert_type(fastattn.attention(q, k, v, return_lse=wanted), Tensor | tuple[Tensor, ...])

assert_type(fastattn.attention_varlen(packed, packed, packed, ends, ends, 3, 3, dropout_p=0.1), Tensor)
assert_type(fastattn.attention_varlen(packed, packed, packed, ends, ends, return_lse=True), tuple[Tensor, Tensor])
assert_type(
    fastattn.attention_varlen(packed, packed, packed, ends, ends, return_lse=wanted), Tensor | tuple[Tensor, Tensor]
)

assert_type(fastattn.attention_kv_cache(q, k, v, ends, key=k, value=v, num_splits=1), Tensor)
assert_type(fastattn.attention_kv_cache(q, k, v, ends, return_lse=True), tuple[Tensor, Tensor])
assert_type(fastattn.attention_kv_cache(q, k, v, ends, return_lse=wanted), Tensor | tuple[Tensor, Tensor])

module = fastattn.MultiHeadAttention(4, 2, batch_first=True)
assert_type(module(q, k, v), tuple[Tensor, Tensor])
assert_type(module.forward(q, k, v), tuple[Tensor, Tensor])
assert_type(module.forward(q, k, v, None, False), tuple[Tensor, None])
assert_type(module(q, k, v, need_weights=False, causal=True), tuple[Tensor, None])
assert_type(module(q, k, v, need_weights=wanted), tuple[Tensor, Tensor | None])

assert_type(fastattn.softmax(q), Tensor)
assert_type(fastattn.cross_entropy(q[0, 0], ends), Tensor)
assert_type(fastattn.linear_cross_entropy(q[0, 0], q[0, 0], ends), Tensor)
assert_type(fastattn.explain(q, k, v, return_weights=True).weights, str | None)
assert_type(fastattn.explain_varlen(packed, packed, packed, ends, ends).backend, str)
"""
WRONG = (
    "fastattn.attention(q, k, v, is_causal=True)",
    "fastattn.attention(q, k, v, return_weights='max')",
    "fastattn.attention(q, k, v, return_lse=True).sum()",
    "fastattn.attention_varlen(packed, packed, packed, ends, ends, mask=None)",
    "fastattn.attention_kv_cache(q, k, v, ends, dropout_p=0.1)",
    "module.forward(q, k, v, need_weights='no')",
)


@pytest.mark.exhaustive
def test_a_users_type_checker(tmp_path: Path) -> None:
    """Every line of USER has the type it states, and every line of WRONG is an error."""
    (tmp_path / "user.py").write_text(USER)
    (tmp_path / "wrong.py").write_text(USER + "\n".join(WRONG) + "\n")
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--follow-imports=silent"]
    environment = {**os.environ, "MYPYPATH": str(ROOT), "MYPY_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(
        [*command, "user.py", "wrong.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=280,
        env=environment,
    )
    found = re.findall(r"^(user|wrong)\.py:(\d+): error:", done.stdout, re.MULTILINE)
    first = len(USER.splitlines()) + 1
    expected = {("wrong", str(first + place)) for place in range(len(WRONG))}
    assert set(found) == expected, done.stdout + done.stderr
