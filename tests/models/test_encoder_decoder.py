"""Encoder-decoders beside transformers' of the same weights: logits, gradients, ids, folders both ways."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from encoder_decoder_models import PAD, PAIRS, VOCAB, batch, make_both, make_theirs
from safetensors.torch import load_file
from torch import Tensor

import fastattn.models as models
from fastattn.models import EncoderDecoder, EncoderDecoderConfig
from fastattn.models import steps as steps_module
from fastattn.models.checkpoint.names import to_file
from fastattn.nn.linear import Linear
from numerics import assert_each_within_rule, assert_within_rule

transformers = pytest.importorskip("transformers")
from transformers_rule import float64_throughout  # noqa: E402  which imports transformers

every_pair = pytest.mark.parametrize("name", PAIRS)
pytestmark = pytest.mark.filterwarnings("ignore:Version v4.12.0:FutureWarning")


@pytest.fixture
def both(name: str, tmp_path: Path) -> tuple[Any, EncoderDecoder]:
    """transformers' model and ours, of the same weights."""
    return make_both(name, tmp_path / "theirs")


def in_their_names(ours: EncoderDecoder, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    _, family = EncoderDecoder.fitted(
        ours.config, ours.families[0], frozenset(["encoder.pooler.dense.weight"])
    )
    return to_file(tensors, ours.config, family)


@every_pair
def test_everything_that_comes_out_is_theirs(name: str, both: tuple[Any, EncoderDecoder]) -> None:
    theirs, ours = both
    inputs, asked = batch(name), {"output_hidden_states": True, "output_attentions": True}
    real, source = inputs["labels"] != -100, inputs["attention_mask"].bool()

    def results(out: Any) -> dict[str, Tensor]:
        found = {"loss": out.loss.double(), "logits": out.logits[real]}
        found["encoder_last_hidden_state"] = out.encoder_last_hidden_state[source]
        for kind, rows in (("decoder", real), ("encoder", source)):
            for i, state in enumerate(getattr(out, f"{kind}_hidden_states")):
                found[f"{kind} state {i}"] = state[rows]
            for i, weights in enumerate(getattr(out, f"{kind}_attentions")):
                found[f"{kind} weights {i}"] = weights.transpose(1, 2)[rows]
        for i, weights in enumerate(out.cross_attentions):
            found[f"cross weights {i}"] = weights.transpose(1, 2)[real]
        return found

    with torch.no_grad():
        with float64_throughout():
            golden = results(copy.deepcopy(theirs).double()(**inputs, **asked))
        actual = results(ours(**inputs, **asked))
        bare = ours(**inputs)
        actual["logits without padding"], golden["logits without padding"] = (
            bare.logits[real],
            golden["logits"],
        )

        def plain() -> dict[str, Tensor]:
            found = results(theirs(**inputs, **asked))
            return found | {"logits without padding": found["logits"]}

        assert_each_within_rule(actual, plain, golden, name, torch.float32)
        explicit = ours(
            inputs["input_ids"], inputs["attention_mask"], *ours._shifted(inputs["labels"]), inputs["labels"]
        )
    assert bare.cross_attentions is bare.decoder_hidden_states is bare.encoder_attentions is None
    assert torch.equal(explicit.logits, bare.logits)
    assert torch.equal(explicit.loss, bare.loss)


@every_pair
def test_one_step_of_training_is_theirs(name: str, both: tuple[Any, EncoderDecoder]) -> None:
    theirs, ours = both

    def gradients(model: Any) -> dict[str, Tensor]:
        out = model.train()(**batch(name))
        assert model is not ours or out.logits is None  # in training the loss is made without
        out.loss.backward()
        parameters = dict(model.named_parameters())
        return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in parameters.items()}

    with float64_throughout():
        golden = gradients(copy.deepcopy(theirs).double())
    actual = in_their_names(ours, gradients(ours))
    assert actual.keys() == golden.keys()
    assert sum(bool(g.any()) for g in golden.values()) >= len(golden) - 2  # all but the pooler's
    assert_each_within_rule(actual, lambda: gradients(copy.deepcopy(theirs)), golden, name, torch.float32)
    gradients(theirs)
    for model in (theirs, ours):
        torch.optim.SGD(model.parameters(), lr=0.5).step()
    stepped = in_their_names(ours, {n: p.detach() for n, p in ours.named_parameters()})
    for key, parameter in theirs.named_parameters():
        torch.testing.assert_close(stepped[key], parameter.detach(), msg=lambda m, key=key: f"{key}: {m}")


@every_pair
@pytest.mark.parametrize("beams", [1, 3])
def test_ids_are_theirs(name: str, beams: int, both: tuple[Any, EncoderDecoder]) -> None:
    theirs, ours = both
    inputs = batch(name)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    options = {"max_new_tokens": 10, "num_beams": beams}
    if beams > 1:
        options |= {"num_return_sequences": 2, "length_penalty": 1.5}
    expected = theirs.generate(ids, attention_mask=mask, do_sample=False, **options)
    assert len({tuple(row) for row in expected.tolist()}) > 1  # the sources matter
    actual = ours.generate(ids, mask, **options)
    assert torch.equal(actual, expected)
    assert torch.equal(ours.generate(ids, mask, **options, use_cache=False), expected)
    assert torch.equal(ours.generate(ids, mask, **options, batch_invariant=True), expected)
    handle = ours.decoder.lm_head.register_forward_hook(lambda *args: None)  # which decoders do not run
    assert torch.equal(ours.generate(ids, mask, **options), expected)
    handle.remove()
    start = expected[:: options.get("num_return_sequences", 1), :2]
    if beams == 1:
        again = ours.generate(ids, mask, decoder_input_ids=start, max_new_tokens=9)
        assert torch.equal(again, expected)


@every_pair
def test_a_batch_changes_no_bit_where_it_may_not(name: str, both: tuple[Any, EncoderDecoder]) -> None:
    _, ours = both
    inputs = batch(name)
    ids, mask, found = inputs["input_ids"], inputs["attention_mask"], []

    def keep(_: Tensor, scores: Tensor) -> Tensor:
        found.append(scores.clone())
        return scores

    options = {"max_new_tokens": 4, "batch_invariant": True, "logits_processor": keep, "eos_token_id": []}
    ours.generate(ids, mask, **options)
    together = torch.stack(found)  # (steps, B, V)
    for row in range(len(ids)):
        found.clear()
        ours.generate(ids[row : row + 1], mask[row : row + 1], **options)
        assert torch.equal(torch.stack(found)[:, 0], together[:, row])


@every_pair
@pytest.mark.parametrize("beams", [1, 3])
def test_keys_of_the_source_are_made_once(
    name: str, beams: int, both: tuple[Any, EncoderDecoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that each layer's product for cross keys and values reads: the real tokens of the sources, once."""
    _, ours = both
    inputs, rows = batch(name), {}
    of_keys = {id(block.cross_attn.kv.weight): i for i, block in enumerate(ours.decoder.h)}
    usual = steps_module.rows_of

    def counting(weight: Tensor, *others: Any, **options: Any) -> Any:
        product = usual(weight, *others, **options)

        def call(x: Tensor) -> Tensor:
            rows.setdefault(of_keys.get(id(weight)), []).append(len(x))
            return product(x)

        return call

    monkeypatch.setattr(steps_module, "rows_of", counting)
    options = {"max_new_tokens": 8, "num_beams": beams, "eos_token_id": []}
    ours.generate(inputs["input_ids"], inputs["attention_mask"], **options)
    real = int(inputs["attention_mask"].sum())
    assert {layer: counts for layer, counts in rows.items() if layer is not None} == {0: [real], 1: [real]}
    monkeypatch.undo()

    calls = []
    kv = ours.decoder.h[0].cross_attn.kv
    handle = kv.register_forward_hook(lambda _, args, __: calls.append(len(args[0])))
    ours.generate(inputs["input_ids"], inputs["attention_mask"], **options)  # by modules, as they have hooks
    handle.remove()
    assert calls == [real * beams]


def test_sampled_targets_do_not_depend_on_the_batch(tmp_path: Path) -> None:
    _, ours = make_both("bert to bert", tmp_path)
    inputs = batch("bert to bert")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    options = {"do_sample": True, "temperature": 1.3, "max_new_tokens": 6, "num_return_sequences": 2}
    drawn = ours.generate(ids, mask, seed=[3, 4, 5], **options)
    assert drawn.shape[0] == 6
    assert len({tuple(row) for row in drawn.tolist()}) > 3
    assert torch.equal(drawn, ours.generate(ids, mask, seed=[3, 4, 5], **options))
    alone = ours.generate(ids[1:2], mask[1:2], seed=[4], **options)
    assert torch.equal(alone, drawn[2:4, : alone.shape[1]])


@every_pair
@pytest.mark.parametrize("tied", [True, False])
def test_a_folder_goes_both_ways_value_by_value(name: str, tied: bool, tmp_path: Path) -> None:
    theirs, ours = make_both(name, tmp_path / "theirs", tie_word_embeddings=tied)
    assert ours.load_report == models.checkpoint.LoadReport((), ()) or not tied
    assert type(models.load(tmp_path / "theirs")) is EncoderDecoder
    ours.save_pretrained(tmp_path / "ours")
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("theirs", "ours"))
    left = set(ours.load_report.dropped)
    assert left <= {"decoder.cls.predictions.bias", "decoder.lm_head.bias"}
    assert before.keys() - left == after.keys()
    assert all(torch.equal(before[key], tensor) for key, tensor in after.items())
    again, info = transformers.EncoderDecoderModel.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not info["unexpected_keys"]
    assert set(info["missing_keys"]) <= left
    inputs = batch(name)
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(**inputs).logits, theirs(**inputs).logits)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    options = {"max_new_tokens": 5, "do_sample": False}
    expected = again.generate(ids, attention_mask=mask, **options)
    assert torch.equal(expected, theirs.generate(ids, attention_mask=mask, **options))
    if tied:
        assert meant(theirs.config.to_dict()) == meant(again.config.to_dict())


def meant(entries: dict[str, Any]) -> dict[str, Any]:
    """A config's entries but for where it came from and what its decoder repeats."""
    left = ("dtype", "bos_token_id", "transformers_version")
    found = {k: v for k, v in entries.items() if k not in left and not k.startswith("_")}
    return {k: meant(v) if k in ("encoder", "decoder") else v for k, v in found.items()}


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("bert to bert", "BertForMaskedLM"),
        ("bert to gpt2", "GPT2LMHeadModel"),
        ("roberta to roberta", "RobertaForMaskedLM"),
    ],
)
def test_two_checkpoints_make_a_start_with_new_cross_attention_named(
    name: str, head: str, tmp_path: Path
) -> None:
    donor = make_theirs(name)
    donor.encoder.save_pretrained(tmp_path / "encoder")
    config = copy.deepcopy(donor.config.decoder)
    config.is_decoder = config.add_cross_attention = False
    decoder = getattr(transformers, head)(config).eval()
    decoder.save_pretrained(tmp_path / "decoder")
    ours = EncoderDecoder.from_encoder_decoder(
        tmp_path / "encoder", tmp_path / "decoder", decoder_start_token_id=config.bos_token_id
    )
    of_cross = {n for n, _ in ours.named_parameters() if "cross" in n}
    assert of_cross
    assert set(ours.load_report.new) == of_cross
    assert all(p.isfinite().all() for p in ours.parameters())
    assert not ours.training
    ours.save_pretrained(tmp_path / "both")
    theirs = transformers.EncoderDecoderModel.from_pretrained(tmp_path / "both").eval()
    for key, tensor in decoder.state_dict().items():
        assert torch.equal(theirs.decoder.state_dict()[key], tensor), key
    for key, tensor in donor.encoder.state_dict().items():
        assert torch.equal(theirs.encoder.state_dict()[key], tensor), key
    inputs = batch(name)
    real = inputs["labels"] != -100
    with torch.no_grad():
        torch.testing.assert_close(ours(**inputs).logits[real], theirs(**inputs).logits[real])
    if hasattr(decoder, "lm_head") and name != "bert to gpt2":  # the bare model's folder has no head
        decoder.roberta.save_pretrained(tmp_path / "bare")
        bare = EncoderDecoder.from_encoder_decoder(
            tmp_path / "encoder", tmp_path / "bare", decoder_start_token_id=config.bos_token_id
        )
        of_head = {
            "lm_head.bias",
            *(f"lm_transform.{n}.{leaf}" for n in ("dense", "norm") for leaf in ("weight", "bias")),
        }
        assert set(bare.load_report.new) == of_cross | {f"decoder.{n}" for n in of_head}
    narrow = make_theirs("roberta to bert")
    narrow.encoder.save_pretrained(tmp_path / "narrow")
    projected = EncoderDecoder.from_encoder_decoder(
        tmp_path / "narrow", tmp_path / "decoder", decoder_start_token_id=1
    )
    assert set(projected.load_report.new) == of_cross | {"enc_to_dec_proj.weight", "enc_to_dec_proj.bias"}
    assert projected(**batch("roberta to bert")).loss.isfinite()


@pytest.mark.parametrize(
    ("part", "changes", "complaint"),
    [
        ("decoder", {"model_type": "llama"}, "decoder.model_type: got 'llama'"),
        ("encoder", {"model_type": "t5"}, "encoder.model_type: got 't5'"),
        ("decoder", {"add_cross_attention": False}, "decoder.add_cross_attention: got False"),
        ("decoder", {"is_decoder": False}, "decoder.is_decoder: got False"),
        ("encoder", {"is_decoder": True}, "encoder.is_decoder: got True"),
        ("decoder", {"cross_attention_hidden_size": 24}, "decoder.cross_attention_hidden_size: got 24"),
        ("decoder", {"position_embedding_type": "relative_key"}, "decoder.position_embedding_type"),
        ("encoder", {"a_new_key": 3}, "encoder.a_new_key: got 3"),
        ("decoder", {"hidden_act": "mish"}, "decoder.*got 'mish'"),
        (None, {"tie_encoder_decoder": True}, "tie_encoder_decoder: got True"),
        (None, {"is_encoder_decoder": False}, "is_encoder_decoder: got False"),
        (None, {"a_new_key": 3}, "a_new_key: got 3"),
        (None, {"vocab_size": 4}, "vocab_size: got 4"),
        (None, {"encoder": None}, "encoder: got None"),
        (None, {"decoder_start_token_id": VOCAB}, f"decoder_start_token_id: got {VOCAB}"),
    ],
)  # fmt: skip
def test_what_is_not_computed_is_refused_before_a_weight_is_read(
    part: str | None, changes: dict[str, Any], complaint: str, tmp_path: Path
) -> None:
    entries = make_theirs("bert to bert").config.to_diff_dict() if not _ENTRIES else copy.deepcopy(_ENTRIES)
    _ENTRIES.update(copy.deepcopy(entries))
    (entries if part is None else entries[part]).update(changes)
    (tmp_path / "config.json").write_text(json.dumps(entries))  # and no weights
    with pytest.raises(ValueError, match=complaint):
        EncoderDecoder.from_pretrained(tmp_path)


_ENTRIES: dict[str, Any] = {}


def test_bad_input_names_the_argument(tmp_path: Path) -> None:
    _, ours = make_both("bert to gpt2", tmp_path)
    inputs = batch("bert to gpt2")
    ids, mask, labels = inputs.values()
    target = labels.clamp(min=0)
    complaints: list[tuple[str, Any]] = [
        ("decoder_input_ids: got None", lambda: ours(ids, mask)),
        ("decoder_input_ids: got torch.float32", lambda: ours(ids, mask, target.float())),
        ("decoder_input_ids: .* needs int64 or int32 of shape \\(3, length\\)", lambda: ours(ids, mask, target[:2])),
        ("decoder_input_ids: got 0 to 53", lambda: ours(ids, mask, target.masked_fill(target > 3, VOCAB))),
        ("decoder_input_ids: 41 tokens", lambda: ours(ids, mask, torch.ones(3, 41, dtype=torch.int64))),
        ("decoder_attention_mask: got shape", lambda: ours(ids, mask, target, mask)),
        ("labels: got shape", lambda: ours(ids, mask, target, labels=labels[:, 1:])),
        ("labels: got torch.float32", lambda: ours(ids, mask, target, labels=labels.float())),
        ("labels: got torch.float32", lambda: ours(ids, mask, labels=labels.float())),
        ("labels: got .*53", lambda: ours(ids, mask, labels=labels.masked_fill(labels > 3, VOCAB))),
        ("attention_mask: got shape", lambda: ours(ids, mask[:, 1:], target)),
        ("input_ids: got", lambda: ours(ids[0], None, target)),
        ("return_logits: got 3", lambda: ours(ids, mask, target, return_logits=3)),
        ("attention_mask: got shape", lambda: ours.generate(ids, mask[:, 1:])),
        ("attention_mask: got shape", lambda: ours.generate(ids, mask[:, 1:], batch_invariant=True)),
        ("decoder_input_ids: got", lambda: ours.generate(ids, mask, decoder_input_ids=target[:2])),
        ("max_new_tokens: ", lambda: ours.generate(ids, mask, max_new_tokens=41)),
        ("max_new_tokens: got -1", lambda: ours.generate(ids, mask, max_new_tokens=-1)),
        ("memory: this model has no cross-attention", lambda: models.GPT(models.GPTConfig.preset("nano"))(
            ids, memory=ours._memory(ours.encoder.encode_tokens(ids)))),
        ("encoder: got", lambda: EncoderDecoderConfig(None, ours.config.decoder)),
        ("decoder: got", lambda: EncoderDecoderConfig(ours.config.encoder, {})),
        ("model_type: got 'electra'", lambda: models.bert_decoder(models.BertConfig.preset("electra-small"))),
    ]  # fmt: skip
    for complaint, call in complaints:
        with pytest.raises((TypeError, ValueError), match=f"^{complaint}"):
            call()
    ours.config.pad_token_id = None
    with pytest.raises(ValueError, match=r"config\.pad_token_id is missing"):
        ours(ids, mask, labels=labels)
    ours.generation_config = None
    ours.config.decoder_start_token_id = ours.config.bos_token_id = None
    with pytest.raises(ValueError, match="decoder_start_token_id nor bos_token_id"):
        ours.generate(ids, mask)


def test_padding_of_the_source_is_neither_computed_nor_seen(tmp_path: Path) -> None:
    _, ours = make_both("bert to bert", tmp_path)
    inputs = batch("bert to bert")
    ids, mask, labels = inputs.values()
    expected = ours(**inputs)
    lengths = set()
    handles = [
        module.register_forward_pre_hook(lambda _, args: lengths.add(args[0].shape[0]))
        for name, module in ours.named_modules()
        if type(module) is Linear and (name.startswith("encoder.layers") or name.endswith(".kv"))
    ]
    other = ours(ids.masked_fill(mask == 0, 7), mask, labels=labels)
    for handle in handles:
        handle.remove()
    assert lengths == {int(mask.sum())}
    assert torch.equal(other.logits, expected.logits)
    hidden = labels.clone()
    hidden[0, 4:] = PAD  # padding that was left among the labels: read as padding, it does not count
    torch.testing.assert_close(
        ours(ids[:1], mask[:1], labels=hidden[:1, :]).logits[:, :4], other.logits[:1, :4]
    )


def test_int8_decodes_nearly_the_same(tmp_path: Path) -> None:
    _, ours = make_both("bert to bert", tmp_path)
    inputs = batch("bert to bert")
    with torch.no_grad():
        before = ours(**inputs).logits
        rounded = EncoderDecoder.from_pretrained(tmp_path, quantize="int8")
        ids = rounded.generate(inputs["input_ids"], inputs["attention_mask"], max_new_tokens=5)
        after = rounded(**inputs).logits
    assert ids.shape == (3, 6)
    assert not torch.equal(after, before)

    def round_rows(x: Tensor) -> Tensor:
        step = x.abs().amax(-1, keepdim=True) / 127
        return (x / step).round() * step

    by_hand = copy.deepcopy(ours)
    for layer in by_hand.encoder.layers.modules():
        if type(layer) is Linear:
            layer.weight.data.copy_(round_rows(layer.weight.data))
            layer.register_forward_pre_hook(lambda _, args: (round_rows(args[0]),))
    with torch.no_grad():
        assert_within_rule(after, by_hand(**inputs).logits, before)
    exact = [model.decoder.h[0].cross_attn.q.weight for model in (ours, rounded)]
    assert torch.equal(*exact)  # what would be saved is not rounded
