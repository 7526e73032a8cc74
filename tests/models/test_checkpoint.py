"""Model folders: transformers reads ours and we read its, nothing is half-written, and what does not fit is refused."""

import json
import shutil

import pytest
import safetensors.torch
import torch
from small_models import GPT2, VOCAB, make_gpt

from fastattn.models import GPT
from fastattn.models.checkpoint import DECODERS, open_weights, write_folder
from fastattn.models.checkpoint.load import family_of

SPECIAL = {"bos_token_id": 1, "eos_token_id": 2}


def make(**options):
    return make_gpt(torch.float32, **options)


def ids(*shape):
    return torch.randint(3, VOCAB, shape)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """A random transformers GPT-2 and the folder it saved itself to."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2, **SPECIAL)).eval()
    folder = tmp_path_factory.mktemp("gpt2")
    model.save_pretrained(folder)
    return model, folder


def test_a_transformers_gpt2_folder_loads(gpt2):
    theirs, folder = gpt2
    ours = GPT.from_pretrained(folder)
    assert not ours.training
    assert ours.config.eos_token_id == 2
    assert ours.config.attn_pdrop == theirs.config.attn_pdrop == 0.1
    tokens = ids(3, 11)
    torch.testing.assert_close(ours(tokens).logits, theirs(tokens).logits, rtol=1e-4, atol=1e-4)
    expected = theirs.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=20, do_sample=False
    )
    actual = ours.generate(tokens, max_new_tokens=20)
    assert torch.equal(actual, expected)
    assert len(set(actual[:, 11:].flatten().tolist())) > 5  # not one token over and over


def test_our_folder_loads_in_transformers(gpt2, tmp_path):
    transformers = pytest.importorskip("transformers")
    ours = make(**SPECIAL, dropout=0.1)
    ours.save_pretrained(tmp_path / "model")
    theirs, info = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(info.values())
    tokens = ids(2, 9)
    torch.testing.assert_close(theirs.eval()(tokens).logits, ours(tokens).logits, rtol=1e-4, atol=1e-4)
    assert theirs.config.eos_token_id == 2
    auto = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert isinstance(auto, transformers.GPT2LMHeadModel)
    (tmp_path / "again").mkdir()
    theirs.save_pretrained(tmp_path / "again")
    assert torch.equal(GPT.from_pretrained(tmp_path / "again")(tokens).logits, ours(tokens).logits)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tie_word_embeddings": False},
        {"positions": "rotary", "rope_theta": 5000.0, "num_kv_heads": 2},
        {"positions": "alibi", "window": 7, "qk_norm": True},
        {"bias": False, "n_inner": 48, "activation_function": "relu"},
    ],
)
def test_roundtrip(options, tmp_path):
    model = make(**options)
    model.save_pretrained(tmp_path / "a" / "model")
    loaded = GPT.from_pretrained(str(tmp_path / "a" / "model"))
    assert loaded.config == model.config
    assert (loaded.lm_head.weight is loaded.wte.weight) == model.config.tie_word_embeddings
    tokens = ids(2, 9)
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    entries = json.loads((tmp_path / "a" / "model" / "config.json").read_text())
    own = bool(options.keys() & {"positions", "bias"})
    assert entries["model_type"] == ("fastattn-gpt" if own else "gpt2")
    assert entries["dtype"] == "float32"


def test_tied_head_is_not_stored_twice(tmp_path):
    make().save_pretrained(tmp_path / "model")
    names = safetensors.torch.load_file(tmp_path / "model" / "model.safetensors")
    assert "lm_head.weight" not in names
    assert names["transformer.h.0.attn.c_attn.weight"].shape == (32, 96)


def test_dtype_is_kept(tmp_path):
    model = make().to(torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == "bfloat16"
    loaded = GPT.from_pretrained(tmp_path / "model")
    assert all(p.dtype == torch.bfloat16 for p in loaded.parameters())


def test_loaded_weights_train_and_do_not_touch_the_file(tmp_path):
    make().save_pretrained(tmp_path / "model")
    before = (tmp_path / "model" / "model.safetensors").read_bytes()
    loaded = GPT.from_pretrained(tmp_path / "model")
    tokens = ids(2, 9)
    loaded(tokens, labels=tokens).loss.backward()
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.sub_(parameter.grad)
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before


def rewrite(folder, change):
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    safetensors.torch.save_file(change(tensors), folder / "model.safetensors")


@pytest.fixture
def copied(gpt2, tmp_path):
    return gpt2[0], shutil.copytree(gpt2[1], tmp_path / "copy")


def same_logits(model, folder):
    tokens = ids(2, 9)
    torch.testing.assert_close(
        GPT.from_pretrained(folder)(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-4
    )


def test_files_without_the_prefix_and_with_old_buffers_load(copied):
    model, folder = copied

    def change(tensors):
        out = {name.removeprefix("transformer."): t for name, t in tensors.items()}
        out["h.0.attn.bias"] = torch.ones(1, 1, 64, 64)
        out["h.0.attn.masked_bias"] = torch.tensor(-1e4)
        out["lm_head.weight"] = out["wte.weight"].clone()
        return out

    rewrite(folder, change)
    same_logits(model, folder)


def test_sharded_files_load(copied):
    model, folder = copied
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = list(tensors)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for shard, members in shards.items():
        safetensors.torch.save_file({n: tensors[n] for n in members}, folder / shard)
    index = {"metadata": {}, "weight_map": {n: shard for shard, members in shards.items() for n in members}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    same_logits(model, folder)


def test_pickled_state_dicts_load_but_no_code_runs(copied):
    model, folder = copied
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    same_logits(model, folder)

    class Evil:
        def __reduce__(self):
            return (print, ("ran",))

    torch.save({"wte.weight": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        open_weights(folder)


def test_config_written_by_an_older_transformers(copied):
    model, folder = copied
    entries = json.loads((folder / "config.json").read_text())
    for name in ("dtype", "embd_pdrop", "tie_word_embeddings", "eos_token_id", "layer_norm_epsilon"):
        entries.pop(name, None)
    entries |= {"n_ctx": 64, "torch_dtype": "float32", "summary_type": "cls_index"}
    (folder / "config.json").write_text(json.dumps(entries))
    same_logits(model, folder)
    loaded = GPT.from_pretrained(folder).config
    assert (loaded.embd_pdrop, loaded.eos_token_id) == (0.1, 50256)  # GPT2Config's defaults


@pytest.mark.parametrize(
    ("entries", "name"),
    [
        ({"model_type": "mamba"}, "model_type"),
        ({}, "model_type"),
        ({"model_type": "gpt2", "scale_attn_weights": False}, "scale_attn_weights"),
        ({"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ({"model_type": "gpt2", "add_cross_attention": True}, "add_cross_attention"),
        ({"model_type": "gpt2", "activation_function": "swish"}, "activation_function"),
    ],
)
def test_what_cannot_be_honoured_is_refused(entries, name):
    with pytest.raises(ValueError, match=name):
        family_of(entries, DECODERS).read_config(entries)


def test_weights_that_do_not_fit_are_refused(copied):
    _, folder = copied
    rewrite(folder, lambda tensors: {k: v for k, v in tensors.items() if "h.1.mlp.c_fc.bias" not in k})
    with pytest.raises(ValueError, match=r"h\.1\.mlp\.c_fc\.bias"):
        GPT.from_pretrained(folder)
    rewrite(folder, lambda tensors: {**tensors, "transformer.h.1.mlp.c_fc.bias": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"h\.1\.mlp\.c_fc\.bias"):
        GPT.from_pretrained(folder)
    rewrite(
        folder,
        lambda tensors: {
            **tensors,
            "transformer.h.1.mlp.c_fc.bias": torch.zeros(128),
            "stray": torch.ones(1),
        },
    )
    with pytest.raises(ValueError, match="stray"):
        GPT.from_pretrained(folder)


def test_folders_that_are_none(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json"):
        GPT.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"')
    with pytest.raises(ValueError, match="JSON"):
        GPT.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="object"):
        GPT.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        GPT.from_pretrained(tmp_path)
    (tmp_path / "file").write_text("")
    for wrong in (tmp_path / "missing", str(tmp_path / "deep" / "missing"), tmp_path / "file", ""):
        with pytest.raises(ValueError, match="not a folder"):
            GPT.from_pretrained(wrong)


def test_a_hub_id_is_fetched(gpt2, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    theirs, folder = gpt2
    asked = []

    def snapshot_download(repo, allow_patterns, ignore_patterns):
        asked.append((repo, allow_patterns))
        return str(folder)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    tokens = ids(1, 5)
    ours = GPT.from_pretrained("someone/tiny-gpt2")
    torch.testing.assert_close(ours(tokens).logits, theirs(tokens).logits, rtol=1e-4, atol=1e-4)
    ((repo, patterns),) = asked
    assert repo == "someone/tiny-gpt2"
    assert not any("bin" in pattern for pattern in patterns)


def test_a_hub_id_that_cannot_be_fetched(monkeypatch):
    hub = pytest.importorskip("huggingface_hub")

    def snapshot_download(repo, allow_patterns, ignore_patterns):
        raise ConnectionError("no network")

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    with pytest.raises(ValueError, match=r"'nobody/nothing'.*no network"):
        GPT.from_pretrained("nobody/nothing")


def test_nothing_is_half_written(tmp_path, monkeypatch):
    model = make()
    model.save_pretrained(tmp_path / "model")
    before = {f.name: f.read_bytes() for f in (tmp_path / "model").iterdir()}

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    for target in ("model", "new"):
        with pytest.raises(OSError, match="disk full"):
            make(n_layer=1).save_pretrained(tmp_path / target)
    assert {f.name: f.read_bytes() for f in (tmp_path / "model").iterdir()} == before
    assert [f.name for f in tmp_path.iterdir()] == ["model"]


def test_saving_over_a_folder_keeps_its_other_files(tmp_path):
    make().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    other = make(n_layer=1)
    other.save_pretrained(tmp_path)
    assert GPT.from_pretrained(tmp_path).config == other.config
    assert (tmp_path / "tokenizer.json").read_text() == "{}"
    assert sorted(f.name for f in tmp_path.iterdir()) == [
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    ]


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="not a folder"):
        make().save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_new_folder_has_the_users_permissions(tmp_path):
    (tmp_path / "plain").mkdir()
    write_folder(tmp_path / "new", lambda folder: (folder / "x").write_text("x"))
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "plain").stat().st_mode
