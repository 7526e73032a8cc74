"""What a folder of a model holds beside its config: shards, tokenizer files, generation options, a card."""

import json

import pytest
import safetensors.torch
import torch
from model_folders import Tokenizer, make, saved_beside_files

from fastattn.models import GPT
from fastattn.models.checkpoint import save
from fastattn.models.checkpoint.card import is_generated


@pytest.fixture
def old(tmp_path):
    return saved_beside_files(tmp_path)


@pytest.mark.parametrize("limit", [40_000, "40KB", 4_000])
def test_shards(old, limit):
    model = make(seed=3)
    model.save_pretrained(old, max_shard_size=limit)
    index = json.loads((old / "model.safetensors.index.json").read_text())
    shards = sorted(old.glob("model-*.safetensors"))
    assert not (old / "model.safetensors").exists()
    assert len(shards) > 2
    assert {p.name for p in shards} == set(index["weight_map"].values())
    sizes, total = save.shard_bytes(limit), 0
    for number, path in enumerate(shards, 1):
        assert path.name == f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        members = safetensors.torch.load_file(path)
        size = sum(t.numel() * t.element_size() for t in members.values())
        assert size <= sizes or len(members) == 1
        assert {n for n, file in index["weight_map"].items() if file == path.name} == set(members)
        total += size
    assert index["metadata"]["total_size"] == total
    state = GPT.from_pretrained(old).state_dict()
    assert all(torch.equal(state[n], t) for n, t in model.state_dict().items())
    model.save_pretrained(old)  # one file again
    assert sorted(p.name for p in old.glob("model*")) == ["model.safetensors"]
    assert all(
        torch.equal(GPT.from_pretrained(old).state_dict()[n], t) for n, t in model.state_dict().items()
    )


def test_sharded_folders_load_in_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = make(seed=3)
    model.save_pretrained(tmp_path / "model", max_shard_size=40_000)
    theirs, info = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(theirs.transformer.wpe.weight, model.wpe.weight)


@pytest.mark.parametrize("size", [0, -1, "", "5", "5 PB", "GB", "1.5GB", True, None, 2.0])
def test_sizes_of_shards(size):
    if size == "5":
        assert save.shard_bytes(size) == 5
        return
    with pytest.raises((TypeError, ValueError), match="max_shard_size: got"):
        save.shard_bytes(size)


def test_units_of_sizes():
    units = {"5GB": 5 * 10**9, "500MB": 5 * 10**8, "2GiB": 2**31, " 7 kb ": 7000, 12: 12}
    assert {size: save.shard_bytes(size) for size in units} == units


def test_tokenizer_files(old, tmp_path):
    model = GPT.from_pretrained(old)
    model.save_pretrained(tmp_path / "copy")
    assert (tmp_path / "copy" / "tokenizer.json").read_text() == '{"old": 1}'
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "vocab.txt").write_text("own")
    model.save_pretrained(tmp_path / "own")  # a folder that has a tokenizer keeps it and gets no second one
    assert not (tmp_path / "own" / "tokenizer.json").exists()
    assert (tmp_path / "own" / "vocab.txt").read_text() == "own"
    model.save_pretrained(tmp_path / "own", tokenizer=Tokenizer())
    assert (tmp_path / "own" / "tokenizer.json").read_text() == '{"new": 1}'
    assert not (tmp_path / "own" / "vocab.txt").exists()  # of the tokenizer that was replaced
    with pytest.raises(TypeError, match="tokenizer: got str"):
        model.save_pretrained(tmp_path / "own", tokenizer="gpt2")


def test_generation_config(old, tmp_path):
    entries = json.loads((old / "generation_config.json").read_text())
    assert entries["eos_token_id"] == 2
    (old / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 3], "top_p": 0.9}))
    model = GPT.from_pretrained(old)
    model.save_pretrained(tmp_path / "copy")
    kept = json.loads((tmp_path / "copy" / "generation_config.json").read_text())
    assert kept == {"eos_token_id": [2, 3], "top_p": 0.9}
    transformers = pytest.importorskip("transformers")
    read = transformers.GenerationConfig.from_pretrained(tmp_path / "copy")
    assert (read.eos_token_id, read.top_p) == ([2, 3], 0.9)
    (old / "generation_config.json").write_text("[")
    with pytest.raises(ValueError, match=r"generation_config\.json is not valid JSON"):
        GPT.from_pretrained(old)


def test_the_model_card(tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert is_generated(card)
    count = sum(p.numel() for p in model.parameters())
    for part in (
        "library_name: fastattn",
        "pipeline_tag: text-generation",
        f"{count:,} parameters",
        "float32",
    ):
        assert part in card
    make(n_layer=1).save_pretrained(tmp_path)
    newer = (tmp_path / "README.md").read_text()
    assert newer != card
    edited = newer.replace("# GPT2LMHeadModel", "# My model")
    (tmp_path / "README.md").write_text(edited)
    make().save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == edited
    hub = pytest.importorskip("huggingface_hub")
    assert hub.ModelCard(card).data.library_name == "fastattn"


def test_a_model_without_values_is_refused(tmp_path):
    with torch.device("meta"):
        model = make()
    with pytest.raises(ValueError, match=r"model: wte\.weight, .*meta device"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
