"""generate drives whatever has a cache and a step: here a Markov chain, no module and no attention."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from fastattn.generation import generate
from fastattn.models import GPT, GPTConfig

FOLLOWS = torch.tensor([3, 0, 1, 5, 2, 4])  # token i is followed by FOLLOWS[i]: 0 3 5 4 2 1 0
PROMPTS = torch.tensor([[1, 0], [4, 2]])


class Chain:
    """A first-order Markov chain. Its cache is the list of the tokens that it was given, (B, S) each."""

    config = SimpleNamespace(vocab_size=6, eos_token_id=None, pad_token_id=None)
    max_positions = 8

    def __init__(self) -> None:
        self.masks: list[Tensor | None] = []

    def new_cache(self, batch: int, capacity: int) -> list[Tensor]:
        self.room = (batch, capacity)
        return []

    def step(self, ids: Tensor, cache: list[Tensor] | None, attention_mask: Tensor | None = None) -> Tensor:
        self.masks.append(attention_mask)
        if cache is not None:
            cache.append(ids)
            self.fed = torch.cat(cache, 1)
        return torch.nn.functional.one_hot(FOLLOWS[ids[:, -1]], 6).float()


@pytest.mark.parametrize("use_cache", [True, False])
def test_any_model_with_a_step_generates(use_cache: bool) -> None:
    chain = Chain()
    made = generate(chain, PROMPTS, max_new_tokens=5, use_cache=use_cache)
    assert made.tolist() == [[1, 0, 3, 5, 4, 2, 1], [4, 2, 1, 0, 3, 5, 4]]
    assert chain.masks == [None] * 5
    if use_cache:
        assert chain.room == (2, 7)
        assert torch.equal(chain.fed, made[:, :-1])  # each token once; the last one is not needed


def test_padding_is_moved_to_the_left_and_masked() -> None:
    chain, prompts = Chain(), torch.tensor([[1, 0, 0], [4, 2, 1]])
    made = generate(chain, prompts, torch.tensor([[1, 1, 0], [1, 1, 1]]), max_new_tokens=2)
    assert made.tolist() == [[1, 0, 0, 3, 5], [4, 2, 1, 0, 3]]
    assert [mask.tolist() for mask in chain.masks if mask is not None] == [
        [[False, True, True], [True, True, True]],
        [[False, True, True, True], [True, True, True, True]],
    ]


def test_its_config_ends_rows_and_its_positions_are_a_limit() -> None:
    chain = Chain()
    chain.config = SimpleNamespace(vocab_size=6, eos_token_id=[5, 0], pad_token_id=2)
    assert generate(chain, PROMPTS, max_new_tokens=5).tolist() == [[1, 0, 3, 5], [4, 2, 1, 0]]
    assert (
        generate(chain, PROMPTS.flip(0) * 0 + 4, max_new_tokens=5, eos_token_id=2).tolist() == [[4, 4, 2]] * 2
    )
    chain.config = SimpleNamespace(vocab_size=6, eos_token_id=[3], pad_token_id=2)
    assert generate(chain, PROMPTS, max_new_tokens=4).tolist() == [[1, 0, 3, 2, 2], [4, 2, 1, 0, 3]]
    with pytest.raises(ValueError, match=r"^max_new_tokens: a prompt of 2 and 8 more"):
        generate(chain, PROMPTS, max_new_tokens=8)


def test_a_step_of_gpt_is_its_forward() -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=11, n_positions=16, n_embd=8, n_layer=2, n_head=2)).double().eval()
    ids = torch.randint(11, (2, 5))
    cache = model.new_cache(2, 8)
    with torch.no_grad():
        expected = model(ids).logits[:, -1]
        first = model.step(ids[:, :4], cache)
        torch.testing.assert_close(first, model(ids[:, :4]).logits[:, -1])
        torch.testing.assert_close(model.step(ids[:, 4:], cache), expected)
        torch.testing.assert_close(model.step(ids, None), expected)
    assert model.max_positions == 16
    assert (
        GPT(GPTConfig(vocab_size=11, n_embd=8, n_layer=1, n_head=2, positions="rotary")).max_positions is None
    )
