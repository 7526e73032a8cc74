"""generate: transformers' tokens, with and without the cache, for ragged batches; sampling draws what it says."""

import pytest
import torch
from gpt2_names import from_gpt2_names
from small_models import GPT2, VOCAB
from small_models import make_gpt as make

from fastattn.nn.modes import evaluating

KINDS = {
    "learned": {},
    "rotary, gqa": {"positions": "rotary", "num_kv_heads": 2},
    "alibi, window": {"positions": "alibi", "window": 6},
}


def ids(*shape):
    return torch.randint(3, VOCAB, shape)


def ragged(lengths, side, width=None):
    """Random prompts of these lengths, padded with 0 on one side, and their mask."""
    width = width or max(lengths)
    tokens, mask = torch.zeros(len(lengths), width, dtype=torch.int64), torch.zeros(len(lengths), width)
    for row, n in enumerate(lengths):
        part = slice(width - n, width) if side == "left" else slice(0, n)
        tokens[row, part], mask[row, part] = ids(n), 1
    return tokens, mask.long()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("eos", [None, 7])
def test_greedy_tokens_are_those_of_transformers(padded, eos):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(**GPT2, bos_token_id=1, eos_token_id=eos, pad_token_id=0)
    torch.manual_seed(4)
    theirs = transformers.GPT2LMHeadModel(config).double().eval()
    ours = make(eos_token_id=eos, pad_token_id=0)
    ours.load_state_dict(from_gpt2_names(theirs.state_dict()))
    tokens, mask = ragged([9, 4, 1, 7] if padded else [9] * 4, "left")
    expected = theirs.generate(tokens, attention_mask=mask, max_new_tokens=30, do_sample=False)
    actual = ours.generate(tokens, attention_mask=mask, max_new_tokens=30)
    assert torch.equal(actual, expected)
    assert torch.equal(ours.generate(tokens, mask, max_new_tokens=30, use_cache=False), expected)
    assert len(set(actual[:, 9:].flatten().tolist())) > 8


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS.keys())
@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_a_ragged_batch_continues_each_prompt_as_if_alone(options, side):
    model = make(**options)
    tokens, mask = ragged([8, 3, 5], "left" if side == "both" else side, width=10)
    if side == "both":
        tokens, mask = tokens.roll(-1, dims=1), mask.roll(-1, dims=1)
    out = model.generate(tokens, mask, max_new_tokens=12)
    assert torch.equal(out[:, :10], tokens)
    for row in range(3):
        prompt = tokens[row][mask[row].bool()][None]
        alone = model.generate(prompt, max_new_tokens=12)
        assert torch.equal(out[row, 10:], alone[0, prompt.shape[1] :])
    assert torch.equal(model.generate(tokens, mask, max_new_tokens=12, use_cache=False), out)


def test_a_row_stops_at_its_end_token_and_the_batch_when_all_have():
    model = make()
    tokens = ids(3, 5)
    free = model.generate(tokens, max_new_tokens=20)
    assert free.shape == (3, 25)
    ends = [free[0, 8].item(), free[1, 6].item(), free[2, 10].item()]
    out = model.generate(tokens, max_new_tokens=20, eos_token_id=ends, pad_token_id=60)
    longest = 0
    for row in range(3):
        stop = next(i for i in range(5, 25) if free[row, i].item() in ends)
        longest = max(longest, stop + 1)
        assert torch.equal(out[row, : stop + 1], free[row, : stop + 1])
        assert (out[row, stop + 1 :] == 60).all()
    assert out.shape[1] == longest < 25
    config_ends = make(eos_token_id=ends[0])
    config_ends.load_state_dict(model.state_dict())
    by_config = config_ends.generate(tokens[:1], max_new_tokens=20)
    assert by_config[0, -1] == ends[0]
    assert by_config.shape[1] < 25
    assert torch.equal(config_ends.generate(tokens, max_new_tokens=20, eos_token_id=[]), free)


def test_sampling_is_reproducible_and_leaves_the_global_generator_alone():
    model = make()
    tokens = ids(2, 5)
    options = {"max_new_tokens": 15, "do_sample": True}
    state = torch.get_rng_state()
    first = model.generate(tokens, seed=1, **options)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model.generate(tokens, seed=1, **options), first)
    assert torch.equal(model.generate(tokens, seed=1, use_cache=False, **options), first)
    assert not torch.equal(model.generate(tokens, seed=2, **options), first)
    generator = torch.Generator().manual_seed(1)
    drawn = model.generate(tokens, generator=generator, **options)
    assert torch.equal(model.generate(tokens, generator=torch.Generator().manual_seed(1), **options), drawn)
    assert not torch.equal(model.generate(tokens, generator=generator, **options), drawn)  # it goes on


def test_cold_or_narrow_sampling_is_greedy():
    model = make()
    tokens = ids(2, 5)
    greedy = model.generate(tokens, max_new_tokens=15)
    for options in ({"temperature": 1e-4}, {"top_k": 1}, {"top_p": 1e-6}):
        assert torch.equal(
            model.generate(tokens, max_new_tokens=15, do_sample=True, seed=0, **options), greedy
        )


def test_training_mode_is_left_for_the_call_and_restored():
    model = make(dropout=0.5).train()
    model.h[1].eval()
    modes = [m.training for m in model.modules()]
    tokens = ids(2, 5)
    out = model.generate(tokens, max_new_tokens=10)
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(model.eval().generate(tokens, max_new_tokens=10), out)
    model.train()

    def fail_inside():
        with evaluating(model):
            assert not model.training
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail_inside()
    assert model.training


def test_no_gradients_and_no_side_effects():
    model = make()
    tokens = ids(2, 5)
    before = tokens.clone()
    out = model.generate(tokens, max_new_tokens=3)
    assert torch.equal(tokens, before)
    assert all(p.grad is None for p in model.parameters())
    model(out, labels=out).loss.backward()  # what it returns can be trained on


def test_it_runs_under_autocast_and_in_bfloat16():
    tokens, mask = ragged([5, 3], "left")
    single = make().float()
    with torch.autocast("cpu", torch.bfloat16):
        out = single.generate(tokens, mask, max_new_tokens=4)
    assert out.shape == (2, 9)
    assert single.bfloat16().generate(tokens, mask, max_new_tokens=4).shape == (2, 9)


def test_it_may_fill_every_position():
    model = make()
    tokens = ids(1, 60)
    assert model.generate(tokens, max_new_tokens=5).shape == (1, 65)  # the last token is never fed back
    assert torch.equal(model.generate(tokens, max_new_tokens=0), tokens)
    rotary = make(positions="rotary")
    assert rotary.generate(tokens, max_new_tokens=20).shape == (1, 80)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens"),
        ({"max_new_tokens": 61}, "max_new_tokens"),
        ({"temperature": 0.5}, "do_sample"),
        ({"top_k": 5}, "do_sample"),
        ({"do_sample": True, "temperature": 0.0}, "temperature"),
        ({"do_sample": True, "top_k": -1}, "top_k"),
        ({"do_sample": True, "top_p": 0.0}, "top_p"),
        ({"do_sample": True, "top_p": 1.5}, "top_p"),
        ({"seed": 1, "generator": torch.Generator(), "do_sample": True}, "seed"),
        ({"attention_mask": torch.ones(2, 4)}, "attention_mask"),
        ({"attention_mask": torch.tensor([[1] * 5, [0] * 5])}, "attention_mask"),
        ({"input_ids": torch.ones(5, dtype=torch.int64)}, "input_ids"),
        ({"input_ids": torch.ones(2, 0, dtype=torch.int64)}, "input_ids"),
        ({"input_ids": torch.full((2, 5), 61)}, "input_ids"),
    ],
)
def test_bad_options_are_refused_by_name(options, name):
    model = make()
    with pytest.raises(ValueError, match=name):
        model.generate(**{"input_ids": ids(2, 5), **options})
    assert not model.training
