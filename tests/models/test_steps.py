"""GPT's decoder: the forward's logits at each sequence's own length, bits that do not depend on the batch, 8 bits."""

from __future__ import annotations

from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from allocations import Allocations
from small_models import KINDS
from small_models import make_gpt as make
from torch import Tensor, nn

from fastattn import torch_compat
from fastattn.models import GPT, GPTConfig
from fastattn.models.decodable import can_decode
from fastattn.models.steps import GPTDecoder
from fastattn.nn import rows as products

every_kind = pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
LENGTHS = (9, 4, 1, 7)


def prompts(lengths: tuple[int, ...]) -> Tensor:
    """Rows that begin with so many tokens; what follows is padding."""
    return torch.randint(61, (len(lengths), max(lengths)))


@every_kind
@pytest.mark.parametrize("lengths", [LENGTHS, (9, 8, 9, 9)], ids=["packed", "padded"])
def test_every_step_is_the_forward_of_each_sequence(
    options: dict[str, Any], lengths: tuple[int, ...]
) -> None:
    model, ids = make(**options), prompts(lengths)
    decoder = model.decoder(4, 20)
    assert decoder is not None
    rows = [ids[i, :n] for i, n in enumerate(lengths)]
    logits = decoder.prefill(ids, torch.tensor(lengths))
    for _ in range(6):
        expected = torch.stack([model(row[None]).logits[0, -1] for row in rows])
        torch.testing.assert_close(logits, expected)
        tokens = torch.randint(61, (4,))
        rows = [torch.cat((row, token[None])) for row, token in zip(rows, tokens)]
        logits = decoder.step(tokens)


@every_kind
def test_all_logits_and_equal_lengths(options: dict[str, Any]) -> None:
    model, ids = make(**options), torch.randint(61, (3, 8))
    whole = model(ids).logits
    decoder = GPTDecoder(model, 3, 9)
    torch.testing.assert_close(decoder.logits(ids[:, :7]), whole[:, :7])
    torch.testing.assert_close(decoder.step(ids[:, 7]), whole[:, 7])
    torch.testing.assert_close(GPTDecoder(model, 3, 9).prefill(ids), whole[:, -1])


def test_prompts_are_read_without_their_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, seen = GPTDecoder(make(), 4, 9), []
    through = GPTDecoder._through_blocks
    monkeypatch.setattr(
        GPTDecoder, "_through_blocks", lambda self, x, *args: seen.append(len(x)) or through(self, x, *args)
    )
    decoder.prefill(prompts(LENGTHS), torch.tensor(LENGTHS))
    assert seen == [sum(LENGTHS)]
    decoder.prefill(prompts(LENGTHS))
    assert seen[1:] == [4 * max(LENGTHS)]


class Logits:
    """The logits of each step of a generation."""

    def __init__(self, model: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[Tensor] = []
        for name in ("prefill", "step"):
            run = getattr(GPTDecoder, name)
            monkeypatch.setattr(
                GPTDecoder,
                name,
                lambda *args, run=run, **options: self.seen.append(run(*args, **options)) or self.seen[-1],
            )

    def take(self) -> Tensor:
        seen, self.seen = torch.stack(self.seen, 1), []
        return seen


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [None, "int8"])
def test_batch_invariant_tokens_and_logits_have_the_bits_of_a_sequence_alone(
    options: dict[str, Any], dtype: torch.dtype, kind: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make(dtype, **options).quantize(kind)
    logits, ids = Logits(model, monkeypatch), prompts(LENGTHS)
    mask = torch.arange(ids.shape[1]) < torch.tensor(LENGTHS)[:, None]
    out = model.generate(ids, mask, max_new_tokens=8, batch_invariant=True)
    together = logits.take()
    for members in ([0], [1], [2], [3], [3, 1], [2, 0, 1]):
        short = max(LENGTHS[i] for i in members)
        some = model.generate(
            ids[members, :short], mask[members, :short], max_new_tokens=8, batch_invariant=True
        )
        assert torch.equal(some[:, short:], out[members, ids.shape[1] :]), members
        assert torch.equal(logits.take(), together[members]), members
    padded = model.generate(ids.flip(1), mask.flip(1), max_new_tokens=8, batch_invariant=True)
    assert padded.shape == out.shape
    default = model.generate(ids, mask, max_new_tokens=8)
    assert default.shape == out.shape


def test_a_model_without_a_decoder_cannot_be_batch_invariant() -> None:
    model = make()
    model.lm_head.register_forward_hook(lambda *args: None)
    with pytest.raises(ValueError, match=r"^batch_invariant: this model has no decoder"):
        model.generate(prompts((3,)), batch_invariant=True)
    with pytest.raises(ValueError, match=r"^batch_invariant: got True with use_cache=False"):
        make().generate(prompts((3,)), batch_invariant=True, use_cache=False)


class Adapted(nn.Module):
    """A layer with something added, as adapters do."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.calls = layer, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        out: Tensor = self.layer(x)
        return out + 0.1


PARTS = (
    "ln_f",
    "wpe",
    "h.0.ln_1",
    "h.0.attn.out_proj",
    "h.0.mlp",
    "h.0.mlp.c_fc",
    "h.1.mlp.c_proj",
    "h.1.attn",
    "h.1",
)


@pytest.mark.parametrize("part", PARTS)
def test_a_hook_anywhere_is_called_in_generation(part: str) -> None:
    model, seen = make(), []
    assert can_decode(model)
    handle = model.get_submodule(part).register_forward_hook(lambda *args: seen.append(1))
    if part == "h.0.attn.out_proj":  # attention reads the weight: no call, with a decoder or without
        handle.remove()
        assert can_decode(model)
        return
    assert not can_decode(model)
    model.generate(prompts((3,)), max_new_tokens=2)
    assert len(seen) == 2
    handle.remove()
    assert can_decode(model)


@pytest.mark.parametrize("part", ["lm_head", "ln_f", "h.0.ln_1", "h.0.mlp", "h.0.mlp.c_fc", "h.1"])
def test_a_replaced_module_is_called_in_generation(part: str) -> None:
    model = make()
    parent, _, name = part.rpartition(".")
    owner = model.get_submodule(parent) if parent else model
    if isinstance(owner, nn.ModuleList):
        return
    adapted = Adapted(model.get_submodule(part))
    setattr(owner, name, adapted)
    ids = prompts((3,))
    out = model.generate(ids, max_new_tokens=4)
    assert adapted.calls == 4
    expected = ids
    for _ in range(4):
        expected = torch.cat((expected, model(expected).logits[:, -1].argmax(-1, keepdim=True)), 1)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("padded", [False, True])
def test_a_step_allocates_the_same_whatever_the_length(padded: bool) -> None:
    """No mask, positions or copies of the cache that grow with what was generated."""
    model = make(torch.float32)
    lengths = LENGTHS if padded else (5, 5, 5, 5)
    decoder = GPTDecoder(model, 4, 60)
    decoder.prefill(prompts(lengths), torch.tensor(lengths))
    totals = []
    for _ in range(40):
        with Allocations() as allocated:
            decoder.step(torch.zeros(4, dtype=torch.int64))
        totals.append(sum(allocated.sizes))
    assert totals[2] == totals[20] == totals[-1]


def test_generation_looks_at_ids_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    with pytest.raises(ValueError, match="input_ids: got"):
        model.generate(prompts((3,)) + 61)
    monkeypatch.setattr(GPT, "_check_inputs", lambda *args: pytest.fail("a step checked its inputs"))
    model.generate(prompts((3,)), max_new_tokens=5)


def test_8_bits_are_those_of_the_weights_at_the_time() -> None:
    model, ids = make(torch.float32), prompts((5, 5))
    plain = GPTDecoder(model, 2, 8).logits(ids)
    rounded = GPTDecoder(model.quantize("int8"), 2, 8).logits(ids)
    assert not torch.equal(plain, rounded)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.5)
    halved = GPTDecoder(model, 2, 8).logits(ids)
    twin = make(torch.float32).quantize("int8")
    with torch.no_grad():
        twin.lm_head.weight.mul_(0.5)
    assert torch.equal(halved, GPTDecoder(twin, 2, 8).logits(ids))
    assert not torch.equal(GPTDecoder(model.quantize(None), 2, 8).logits(ids), halved)


def test_8_bits_follow_a_change_without_a_trace_once_asked_again() -> None:
    model, ids = make(torch.float32).quantize("int8"), prompts((5, 5))
    before = GPTDecoder(model, 2, 8).logits(ids)
    model.h[0].mlp.c_fc.weight.data.mul_(0.5)
    after = GPTDecoder(model.quantize("int8"), 2, 8).logits(ids)
    twin = make(torch.float32)
    with torch.no_grad():
        twin.h[0].mlp.c_fc.weight.mul_(0.5)
    assert not torch.equal(before, after)
    assert torch.equal(after, GPTDecoder(twin.quantize("int8"), 2, 8).logits(ids))


@pytest.mark.parametrize("kind", ["int4", 8, ["int8"], True])
def test_other_kinds_are_refused(kind: Any) -> None:
    with pytest.raises(ValueError, match=r"^kind: got"):
        make().quantize(kind)


def test_the_perplexity_of_a_trained_model_rises_by_less_than_a_percent_with_8_bits() -> None:
    """Python's own manual by the byte, which every Python carries, every fortieth row held out."""
    data = torch.frombuffer(bytearray("".join(topics.values()).encode()), dtype=torch.uint8)
    rows = data[: len(data) // 64 * 64].view(-1, 64).long()
    held_out = rows[::40]
    train = rows[torch.arange(len(rows)) % 40 != 0]
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=256, n_positions=64, n_embd=64, n_layer=2, n_head=4)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(300):
        batch = train[torch.randint(len(train), (16,))]
        optimizer.zero_grad()
        model(batch, labels=batch).loss.backward()
        optimizer.step()
    model.eval()

    def perplexity() -> float:
        logits = GPTDecoder(model, len(held_out), 64).logits(held_out)
        return (
            nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), held_out[:, 1:].flatten()).exp().item()
        )

    plain = perplexity()
    # That it has learned what follows what, whatever the pages say: its losses are below those of the bytes' shares in
    # the text by more than chance gives, six standard errors of the mean difference.
    shares = torch.bincount(train.flatten(), minlength=256).add(1) / (train.numel() + 256)
    logits = GPTDecoder(model, len(held_out), 64).logits(held_out)[:, :-1]
    losses = nn.functional.cross_entropy(logits.flatten(0, 1), held_out[:, 1:].flatten(), reduction="none")
    gains = -shares.log()[held_out[:, 1:].flatten()] - losses
    assert gains.mean() > 6 * gains.std() / gains.numel() ** 0.5
    assert perplexity() == plain
    model.quantize("int8")
    rounded = perplexity()
    assert rounded != plain
    assert rounded < 1.01 * plain


def test_a_prompt_alone_packs_no_float32_weight_and_steps_do(monkeypatch: pytest.MonkeyPatch) -> None:
    line = {"float32": ((None, "packed"),)}
    monkeypatch.setattr(products, "FASTEST", {torch_compat.instructions(): line})
    model = make(torch.float32, vocab_size=17000)  # a head large enough
    ids = torch.randint(17000, (1, 5))
    before = len(products._packs)
    first = model.generate(ids, max_new_tokens=1)
    assert len(products._packs) == before
    assert torch.equal(model.generate(ids, max_new_tokens=4)[:, :6], first)
    assert len(products._packs) == before + int(torch_compat.has_packed_linear(torch.float32))
