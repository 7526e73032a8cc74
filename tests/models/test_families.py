"""Every decoder family beside transformers' model of the same weights: logits, gradients, ids, folders both ways."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from decoder_families import (
    FAMILIES,
    ORIGINAL,
    in_their_names,
    make_both,
    parameters_of,
    tokens,
)
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from fastattn.models import GPT, load
from fastattn.models.decoder_inputs import embedding_scale
from fastattn.nn import linear as linear_module
from numerics import assert_each_within_rule, assert_within_rule

transformers = pytest.importorskip("transformers")
from transformers_rule import float64_throughout  # noqa: E402  which imports transformers

every_family = pytest.mark.parametrize("name", FAMILIES)
SCALED = ("linear", "dynamic", "yarn", "yarn, its own numbers", "llama3")


@pytest.fixture
def both(name: str, tmp_path: Path) -> tuple[Any, GPT]:
    """transformers' model and ours, of the same weights."""
    return make_both(name, tmp_path / "theirs")


def double(theirs: Any) -> Any:
    """A copy in float64, which rope scalings that keep state have not seen a call of."""
    return copy.deepcopy(theirs).double()


@every_family
@pytest.mark.parametrize("length", [9, 3 * ORIGINAL])
def test_logits_are_theirs(name: str, length: int, both: tuple[Any, GPT]) -> None:
    theirs, ours = both
    ids = tokens(2, length)
    with torch.no_grad():
        with float64_throughout():
            golden = {"logits": double(theirs)(ids).logits}
        plain = copy.deepcopy(theirs)
        assert_each_within_rule(
            {"logits": ours(ids).logits},
            lambda: {"logits": plain(ids).logits},
            golden,
            name,
            torch.float32,
        )


@every_family
def test_logits_in_bfloat16_are_within_the_rule(name: str, both: tuple[Any, GPT]) -> None:
    theirs, ours = both
    ids = tokens(2, ORIGINAL + 3)
    half, wide = copy.deepcopy(theirs).bfloat16(), copy.deepcopy(theirs).bfloat16().double()
    with torch.no_grad():
        with float64_throughout():
            golden = wide(ids).logits
        assert_within_rule(ours.bfloat16()(ids).logits, half(ids).logits, golden, name, torch.bfloat16)


@every_family
def test_hidden_states_and_attention_weights_are_theirs(name: str, both: tuple[Any, GPT]) -> None:
    theirs, ours = both
    ids = tokens(2, 9)
    options = {"output_hidden_states": True, "output_attentions": True}

    def inside(model: Any) -> dict[str, Tensor]:
        out = model(ids, **options)
        parts = {f"hidden {i}": x for i, x in enumerate(out.hidden_states)}
        return parts | {f"weights {i}": x for i, x in enumerate(out.attentions)}

    with torch.no_grad():
        with float64_throughout():
            golden = inside(double(theirs))
        assert len(golden) == 2 * len(ours.h) + 1
        assert_each_within_rule(inside(ours), lambda: inside(theirs), golden, name, torch.float32)
        assert ours(ids).hidden_states is None
        assert ours(ids).attentions is None


def gradients(model: Any, ids: Tensor) -> dict[str, Tensor]:
    """Of the mean loss, by our names or theirs."""
    named = parameters_of(model)
    loss = model(ids, labels=ids).loss
    return dict(zip(named, torch.autograd.grad(loss, list(named.values()))))


@every_family
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_one_step_of_training_is_theirs(
    name: str, fused: bool, both: tuple[Any, GPT], monkeypatch: pytest.MonkeyPatch
) -> None:
    """fused: products by oneDNN, whose backward makes norms and activations again."""
    theirs, ours = both
    ids = tokens(2, ORIGINAL + 3)
    ids[:, 4:7] = theirs.config.pad_token_id  # read as a token, which trains its embedding in GPT-2 alone
    with float64_throughout():
        golden = gradients(double(theirs).train(), ids)
    ours.train()
    if fused:
        monkeypatch.setattr(linear_module, "ONEDNN_MIN_WEIGHTS", 1)
    actual = in_their_names(ours, gradients(ours, ids))
    monkeypatch.undo()
    assert_each_within_rule(
        actual, lambda: gradients(copy.deepcopy(theirs).train(), ids), golden, name, torch.float32
    )
    before = {n: p.detach().clone() for n, p in parameters_of(theirs).items()}
    for parameter in ours.parameters():
        parameter.grad = None
    ours(ids, labels=ids).loss.backward()
    torch.optim.SGD(ours.parameters(), lr=0.5).step()
    stepped = in_their_names(ours, {n: p.detach() for n, p in parameters_of(ours).items()})
    assert_each_within_rule(
        {n: w.double() for n, w in stepped.items()},
        lambda: {n: before[n] - 0.5 * g for n, g in gradients(copy.deepcopy(theirs).train(), ids).items()},
        {n: before[n].double() - 0.5 * g for n, g in golden.items()},
        f"{name}, stepped",
        torch.float32,
    )


@every_family
@pytest.mark.parametrize("beams", [1, 3])
def test_greedy_and_beam_ids_are_theirs(name: str, beams: int, both: tuple[Any, GPT]) -> None:
    """Past the original length too. Dynamic scaling goes by the longest row of a batch in transformers, by each row's
    own length here, which for rows of one length is the same."""
    theirs, ours = both
    ids, mask = tokens(3, 10), torch.ones(3, 10, dtype=torch.int64)
    if name != "dynamic":
        ids[0, :4] = mask[0, :4] = 0
        ids[2, :9] = mask[2, :9] = 0
    options: dict[str, Any] = {"max_new_tokens": 2 * ORIGINAL, "num_beams": beams}
    expected = theirs.generate(ids, attention_mask=mask, do_sample=False, eos_token_id=None, **options)
    actual = ours.generate(ids, mask, eos_token_id=[], **options)
    assert torch.equal(actual, expected)
    if beams > 1:
        options["num_return_sequences"] = 2
        expected = theirs.generate(ids, attention_mask=mask, do_sample=False, **options)  # ended by a token
        assert torch.equal(ours.generate(ids, mask, **options), expected)
    assert len(set(actual[:, 10:].flatten().tolist())) > 4  # not one token over and over


@every_family
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_as_if_alone(name: str, side: str, both: tuple[Any, GPT]) -> None:
    """Beyond the original length, where dynamic scaling depends on how many tokens a row has."""
    ours = both[1].double()
    lengths, width = (ORIGINAL + 5, 7), ORIGINAL + 9
    ids, mask = torch.zeros(2, width, dtype=torch.int64), torch.zeros(2, width, dtype=torch.int64)
    for row, n in enumerate(lengths):
        part = slice(width - n, width) if side == "left" else slice(0, n)
        ids[row, part], mask[row, part] = tokens(n), 1
    with torch.no_grad():
        padded = ours(ids, mask).logits
        for row in range(2):
            real = mask[row].bool()
            torch.testing.assert_close(padded[row, real], ours(ids[row, real][None]).logits[0])


@every_family
def test_packed_documents_are_as_if_alone(name: str, both: tuple[Any, GPT]) -> None:
    ours = both[1].double()
    documents = [tokens(1, n) for n in (4, ORIGINAL + 6, 1)]
    segments = torch.cat([torch.full((1, d.shape[1]), i) for i, d in enumerate(documents)], 1)
    with torch.no_grad():
        packed = ours(torch.cat(documents, 1), segment_ids=segments).logits
        alone = torch.cat([ours(document).logits for document in documents], 1)
    torch.testing.assert_close(packed, alone)


@every_family
def test_a_folder_goes_both_ways_value_by_value(name: str, both: tuple[Any, GPT], tmp_path: Path) -> None:
    theirs, ours = both
    ours.save_pretrained(tmp_path / "ours")
    again, report = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values())
    assert again.config.model_type == theirs.config.model_type
    state = again.state_dict()
    assert state.keys() == theirs.state_dict().keys()
    assert all(torch.equal(state[n], tensor) for n, tensor in theirs.state_dict().items())
    said, kept = again.config.to_dict(), theirs.config.to_dict()
    for key in ("transformers_version", "_name_or_path", "architectures", "dtype", "max_window_layers"):
        said.pop(key, None), kept.pop(key, None)  # layer_types says what the last one did
    assert said == kept
    back = GPT.from_pretrained(tmp_path / "ours")
    assert back.config == ours.config
    assert all(torch.equal(a, b) for a, b in zip(back.state_dict().values(), ours.state_dict().values()))
    auto = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert type(auto) is type(theirs)
    by_load = load(tmp_path / "ours")
    assert type(by_load) is GPT
    assert by_load.config == ours.config


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", ["Gemma2", "Gemma3"])
def test_embeddings_are_scaled_by_a_number_of_their_dtype(
    kind: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """sqrt(640) is no number of any of them, and 0.19 % from bfloat16's nearest."""
    name = "Gemma3TextConfig" if kind == "Gemma3" else f"{kind}Config"
    sizes = {
        "vocab_size": 64,
        "hidden_size": 640,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "head_dim": 16,
    }
    config = getattr(transformers, name)(**sizes, num_attention_heads=2, num_key_value_heads=1)
    theirs = getattr(transformers, f"{kind}ForCausalLM")(config).to(dtype).eval()
    theirs.save_pretrained(tmp_path)
    ours, ids = GPT.from_pretrained(tmp_path, dtype=dtype), tokens(2, 8) % 64
    with torch.no_grad():
        expected = theirs(ids, output_hidden_states=True).hidden_states[0]
        assert torch.equal(ours(ids, output_hidden_states=True).hidden_states[0], expected)
    for width in (640, 1152, 2304, 3584, 5376):
        exact = float(torch.tensor(width**0.5, dtype=dtype))
        assert embedding_scale(width, dtype) == exact


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("gemma3", 3),
        *(
            pytest.param(name, 20, marks=pytest.mark.exhaustive)
            for name in ("gpt2", "llama", "gemma3", "dynamic")
        ),
    ],
)
def test_compiles_once_for_all_lengths(name: str, count: int, both: tuple[Any, GPT]) -> None:
    ours = both[1].double()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ours, backend=counter, fullgraph=True, dynamic=True)
    counts = []
    for length in range(ORIGINAL - 1, ORIGINAL - 1 + count):
        ids = tokens(2, length)
        with torch.no_grad():
            torch.testing.assert_close(compiled(ids).logits, ours(ids).logits)
        counts.append(counter.frame_count)
    torch.compiler.reset()
    assert counts == [counts[0]] * count  # the first call alone compiles
