"""A step of sequences of unequal lengths on a CPU: one call under a mask, where that is faster than a call for each."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from small_models import KINDS
from small_models import make_gpt as make
from torch import Tensor

from fastattn import torch_compat
from fastattn.models import appending
from fastattn.models.appending import CALL_BYTES, keys_under_a_mask, mask_pays
from fastattn.models.steps import GPTDecoder

LENGTHS = (9, 4, 1, 70)
every_kind = pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)


def stepped(options: dict[str, Any], filling: float = 0.0) -> list[Tensor]:
    """Logits of three steps behind prompts of LENGTHS, of caches that hold `filling` where nothing was written."""
    torch.manual_seed(0)
    decoder = GPTDecoder(make(**options), len(LENGTHS), 80)
    ids = torch.randint(61, (len(LENGTHS), max(LENGTHS)))
    decoder.prefill(ids, torch.tensor(LENGTHS))
    for layer in decoder.cache:
        for cache in layer:
            for row, length in zip(cache, LENGTHS):
                row[:, length:] = filling
    return [decoder.step(torch.randint(61, (len(LENGTHS),))) for _ in range(3)]


@every_kind
def test_a_mask_gives_what_a_call_for_each_sequence_gives(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**options, "n_positions": 128}
    common = stepped(options)
    monkeypatch.setattr(appending, "mask_pays", lambda lengths, cache: False)
    torch.testing.assert_close(common, stepped(options))


@pytest.mark.parametrize("filling", [math.nan, math.inf, 1e30])
@every_kind
def test_what_a_cache_held_before_is_not_seen(options: dict[str, Any], filling: float) -> None:
    options = {**options, "n_positions": 128}
    torch.testing.assert_close(stepped(options, filling), stepped(options))


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_which_steps_run_under_a_mask(softcap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unequal lengths, one token each, and scores that nothing changes one by one."""
    used = []
    real = appending.UnderAMask.__call__

    def counted(*args: Any) -> Tensor:
        used.append(args[2])
        return real(*args)

    monkeypatch.setattr(appending.UnderAMask, "__call__", counted)
    model = make(attn_logit_softcapping=softcap)
    decoder = GPTDecoder(model, 2, 20)
    decoder.prefill(torch.randint(61, (2, 6)), torch.tensor([6, 3]))
    decoder.step(torch.tensor([1, 2]))
    expected = [] if softcap else list(range(len(model.h)))
    assert used == expected
    decoder.extend(torch.tensor([[1, 2], [3, 4]]))
    assert used == expected
    GPTDecoder(model, 2, 20, batch_invariant=True).step(torch.tensor([1, 2]))
    equal = GPTDecoder(model, 2, 20)
    equal.prefill(torch.randint(61, (2, 6)))
    equal.step(torch.tensor([1, 2]))
    assert used == expected


def test_when_a_mask_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = torch.zeros(4, 2, 256, 16)
    assert mask_pays([9, 8, 9, 9], cache)
    assert not mask_pays([9, 9, 9, 9], cache)
    assert not mask_pays([9], cache[:1])
    assert keys_under_a_mask([9, 70], 256) == 128
    assert keys_under_a_mask([9, 70], 80) == 80
    large = torch.empty(4, 8, 4096, 128, device="meta")
    per_key = 2 * 8 * 128 * 4
    most = 4 * CALL_BYTES // per_key  # keys that may be read in vain
    assert mask_pays([1023, 1023, 1023, 1024 - most + 3], large)
    assert not mask_pays([1023, 1023, 1023, 1024 - most + 2], large)
    assert mask_pays([9, 8], torch.zeros(2, 2, 64, 16, dtype=torch.float64))
    assert not mask_pays([9, 8], torch.zeros(2, 2, 64, 12))  # a head dim that the kernel does not take
    for fast in (False, True):
        monkeypatch.setattr(torch_compat, "has_mkl_on_intel", lambda: True)
        monkeypatch.setattr(torch_compat, "has_fast_products", lambda dtype, fast=fast: fast)
        assert mask_pays([9, 8], cache[:2].bfloat16()) == fast
    monkeypatch.setattr(torch_compat, "has_mkl_on_intel", lambda: False)
    assert not mask_pays([9, 8], cache[:2].bfloat16())
    monkeypatch.setattr(torch_compat, "has_cpu_flash_attention", lambda backward: False)
    assert not mask_pays([9, 8], cache)
