"""What Hopper's attention kernels refuse, by name, and how a call reaches the extension."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from fastattn import extension
from fastattn.backends import cuda, layout
from fastattn.backends.cuda import attention as cuda_attention
from fastattn.ops.arguments import call_arguments
from fastattn.reference import attention as reference_attention
from fastattn.spec import AttentionCall, AttentionSpec, VarlenCall
from fastattn.strides import is_expanded

HEADS = torch.empty(1, 2, 32, 64, dtype=torch.float16)
HOPPER = AttentionSpec.of(AttentionCall(HEADS, HEADS, HEADS)).replace(device="cuda", arch=90)
BUILT = ("8.0+PTX", "9.0a")


def normalised(call: AttentionCall) -> AttentionCall:
    """The call as it reaches the CUDA backend."""
    return layout.for_backend(cuda, layout.operands(call))


@pytest.mark.parametrize("head_dim", [8, 64, 80, 128, 256])
def test_takes(head_dim: int) -> None:
    features = {
        "key_lengths": True,
        "softcap": True,
        "window_left": True,
        "causal": "top_left",
        "group_size": 4,
    }
    for changes in ({}, features):
        spec = HOPPER.replace(head_dim=head_dim, value_dim=head_dim, **changes)
        assert cuda_attention.why_not(spec, BUILT) is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"arch": 80}, "compute capability 9.0, this GPU has 8.0"),
        ({"arch": 100}, "compute capability 9.0, this GPU has 10.0"),
        ({"arch": None}, "this device has none"),
        ({"dtype": torch.float32}, "dtype torch.float32"),
        ({"mask": True, "sinks": True}, "a mask, sinks"),
        ({"bias": True}, "a bias"),
        ({"segments": True}, "segment_ids"),
        ({"alibi": True}, "alibi_slopes"),
        ({"dropout": True}, "dropout"),
        ({"value_dim": 128}, "value dim 128"),
        ({"head_dim": 60, "value_dim": 60}, "head dim 60"),
        ({"head_dim": 264, "value_dim": 264}, "head dim 264"),
        ({"aligned": False}, "multiple of 16 bytes"),
    ],
)
def test_refuses(changes: dict, reason: str) -> None:
    assert reason in str(cuda_attention.why_not(HOPPER.replace(**changes), BUILT))


def test_refuses_a_build_without_hopper() -> None:
    assert "built for 8.0+PTX, attention needs 9.0a" in str(cuda_attention.why_not(HOPPER, ("8.0+PTX",)))


def test_auto_passes_over_what_was_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "not yet measured" in str(cuda_attention.why_not_auto(HOPPER))
    measured = (cuda_attention.MeasuredHeads(90, False, 64),)
    monkeypatch.setattr(cuda_attention, "MEASURED_HEADS", measured)
    assert cuda_attention.why_not_auto(HOPPER) is None
    assert "not yet measured" in str(cuda_attention.why_not_auto(HOPPER.replace(head_dim=128)))
    assert "single query" in str(cuda_attention.why_not_auto(HOPPER.replace(single_query=True)))


def _stand_in(query: Tensor, key: Tensor, value: Tensor, key_lengths, *options) -> tuple[Tensor, Tensor]:
    """The extension's function, with its demands, on the reference."""
    top_left, left, right, softcap, scale, _ = options
    assert scale > 0.0
    for tensor in (query, key, value):
        assert tensor.stride(-1) == 1
        assert 0 not in tensor.stride()
    window = (None if left < 0 else left, None if right < 0 else right)
    if top_left:
        assert right == 0
    return reference_attention(
        query, key, value, causal="top_left" if top_left else False, window=None if top_left else window,
        key_lengths=key_lengths, softcap=softcap or None, scale=scale, return_lse=True,
    )  # fmt: skip


@pytest.mark.parametrize("scale", [0.3, -0.3, 0.0])
@pytest.mark.parametrize(
    "options", [{}, {"causal": True}, {"causal": "top_left"}, {"window": (3, 2), "softcap": 2.0}]
)
def test_calls(monkeypatch: pytest.MonkeyPatch, scale: float, options: dict) -> None:
    monkeypatch.setattr(extension, "module", lambda: SimpleNamespace(attention_forward=_stand_in))
    query, key = torch.randn(1, 2, 9, 8), torch.randn(1, 1, 13, 8)
    value = torch.randn(1, 1, 8, 13).transpose(2, 3)  # columns apart
    defaults = dict.fromkeys(
        (
            "window",
            "mask",
            "bias",
            "segment_ids",
            "key_lengths",
            "alibi_slopes",
            "softcap",
            "sinks",
            "dropout_seed",
        )
    )
    arguments = {**defaults, "causal": False, "dropout_p": 0.0, "scale": scale, **options}
    call = normalised(AttentionCall(*call_arguments(query, key.expand(1, 1, 13, 8), value, **arguments)))
    out, lse = cuda_attention.attention_fwd(AttentionSpec.of(call), call)
    wanted = reference_attention(query, key, value, scale=scale, return_lse=True, **options)
    torch.testing.assert_close((out, lse), wanted)


def test_expanded_heads_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "module", lambda: SimpleNamespace(attention_forward=_stand_in))
    query = torch.randn(1, 2, 9, 8)
    key = torch.randn(1, 1, 9, 8).expand(1, 2, 9, 8)
    call = normalised(AttentionCall(query, key, key))
    assert not any(map(is_expanded, (call.query, call.key, call.value)))
    out, _ = cuda_attention.attention_fwd(AttentionSpec.of(call), call)
    torch.testing.assert_close(out, reference_attention(query, key, key, scale=1.0))


def test_packed_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    results = torch.empty(5, 2, 8), torch.empty(2, 5)

    def varlen_forward(*arguments: object) -> tuple[Tensor, Tensor]:
        seen.append(arguments)
        return results

    monkeypatch.setattr(extension, "module", lambda: SimpleNamespace(varlen_forward=varlen_forward))
    query = torch.randn(5, 2, 8)
    cu_seqlens = torch.tensor([0, 2, 5], dtype=torch.int32)
    call = VarlenCall(
        query, query, query, cu_seqlens, cu_seqlens, causal="bottom_right", window_left=4, scale=-0.5
    )
    assert cuda_attention.varlen_fwd(AttentionSpec.of(call.as_one_sequence()), call) == results
    torch.testing.assert_close(seen[0][0], -query)
    assert seen[0][5:] == (False, 4, 0, 0.0, 0.5)
