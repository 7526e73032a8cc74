"""Texts as vectors: poolings, sentence-transformers' folders, and encode's order, truncation and prompts."""

import json

import encoder_models as tiny
import pytest
import tokenizers
import torch
from tokenizers import models as token_models
from tokenizers import pre_tokenizers, processors

from fastattn.models import BertConfig, BertForEmbedding, embedding, load

WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "query", *(f"w{i}" for i in range(50))]
LEGACY = ("pooling_mode_cls_token", "pooling_mode_mean_tokens", "pooling_mode_max_tokens")


def tokenizer():
    core = tokenizers.Tokenizer(
        token_models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]")
    )
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    core.enable_padding(length=40)  # as all-MiniLM's file asks for
    core.enable_truncation(16)
    return core


def make(**options):
    torch.manual_seed(1)
    return BertForEmbedding(BertConfig(**tiny.SIZES, initializer_range=0.3), **options).eval()


def folder_of(path, **options):
    """A folder with a tokenizer, and the model that wrote it."""
    model = make(**options)
    model.max_seq_length = 12
    model.prompts = {"search": "query "}
    model.save_pretrained(path)
    tokenizer().save(str(path / "tokenizer.json"))
    return model


def texts(count=23):
    generator = torch.Generator().manual_seed(2)
    lengths = torch.randint(1, 20, (count,), generator=generator).tolist()
    return [" ".join(f"w{i}" for i in torch.randint(50, (n,), generator=generator).tolist()) for n in lengths]


def by_hand(model, text, pooling, normalize, front=""):
    ids = [1, *(WORDS.index(word) for word in (front + text).split()), 2]
    ids = [*ids[:11], 2] if len(ids) > 12 else ids
    states = model.bert(torch.tensor([ids])).last_hidden_state[0]
    vector = {"mean": states.mean(0), "cls": states[0], "max": states.amax(0)}[pooling]
    return vector / vector.norm() if normalize else vector


@pytest.mark.parametrize("pooling", ["mean", "cls", "max"])
@pytest.mark.parametrize("normalize", [True, False])
def test_encode_gives_each_text_its_vector_whatever_the_batch(pooling, normalize, tmp_path):
    folder_of(tmp_path, pooling=pooling, normalize=normalize)
    model = BertForEmbedding.from_pretrained(tmp_path, dtype=torch.float64)
    assert (model.pooling, model.normalize, model.max_seq_length) == (pooling, normalize, 12)
    lines = texts()
    model.train()
    found = model.encode(lines, batch_size=5)
    assert model.training  # and dropout was off
    assert not found.requires_grad
    model.eval()
    with torch.no_grad():
        expected = torch.stack([by_hand(model, line, pooling, normalize) for line in lines])
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(model.encode(lines), expected)
        torch.testing.assert_close(model.encode(lines[3]), expected[3])
        asked = by_hand(model, lines[1], pooling, normalize, "query ")
        torch.testing.assert_close(model.encode(lines[1], prompt_name="search"), asked)
        torch.testing.assert_close(model.encode(lines[1], prompt="query "), asked)
    assert model.encode([]).shape == (0, 32)


def test_folders_of_sentence_transformers_of_both_forms(tmp_path):
    model = folder_of(tmp_path, pooling="max", normalize=True)
    modules = json.loads((tmp_path / "modules.json").read_text())
    assert [module["path"] for module in modules] == ["", "1_Pooling", "2_Normalize"]
    assert json.loads((tmp_path / "1_Pooling" / "config.json").read_text()) == {
        "word_embedding_dimension": 32, **dict(zip(LEGACY, (False, False, True))),
    }  # fmt: skip
    for module in modules:
        module["type"] = (
            "sentence_transformers.sentence_transformer.modules.x." + module["type"].split(".")[-1]
        )
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    new = {"embedding_dimension": 32, "pooling_mode": "cls", "include_prompt": True}
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(new))
    (tmp_path / "sentence_bert_config.json").write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 9}))
    read = BertForEmbedding.from_pretrained(tmp_path)
    assert (read.pooling, read.normalize, read.max_seq_length) == ("cls", True, 9)
    assert read.prompts == {"search": "query "}
    ids, mask = tiny.batch(0)
    model.pooling = "cls"
    assert torch.equal(read(ids, mask).embeddings, model(ids, mask).embeddings)
    assert isinstance(load(tmp_path), BertForEmbedding)
    read.save_pretrained(tmp_path / "again")
    assert torch.equal(
        BertForEmbedding.from_pretrained(tmp_path / "again").encode(texts()), read.encode(texts())
    )


def test_settings_that_are_not_read_are_written_again(tmp_path):
    folder_of(tmp_path)
    others = {
        "config_sentence_transformers.json": {"similarity_fn_name": "dot", "__version__": {"pytorch": "2.0"}},
        "sentence_bert_config.json": {"module_output_name": "token_embeddings"},
    }
    for name, more in others.items():
        entries = json.loads((tmp_path / name).read_text())
        (tmp_path / name).write_text(json.dumps({**entries, **more}))
    model = BertForEmbedding.from_pretrained(tmp_path)
    model.max_seq_length, model.prompts = 7, {"passage": "of "}
    model.save_pretrained(tmp_path / "again")
    found = {name: json.loads((tmp_path / "again" / name).read_text()) for name in others}
    for name, more in others.items():
        assert more.items() <= found[name].items()
    assert found["sentence_bert_config.json"]["max_seq_length"] == 7
    assert found["config_sentence_transformers.json"]["prompts"] == {"passage": "of "}


@pytest.mark.parametrize("kind", ["roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet"])
def test_settings_may_have_the_name_of_an_older_version(kind, tmp_path):
    folder_of(tmp_path)
    (tmp_path / "sentence_bert_config.json").unlink()
    settings = {"max_seq_length": 7, "do_lower_case": True}
    (tmp_path / f"sentence_{kind}_config.json").write_text(json.dumps(settings))
    read = BertForEmbedding.from_pretrained(tmp_path)
    assert (read.max_seq_length, read.lower_case) == (7, True)
    assert read.prepared(["A b"], prompt="Query: ") == ["query: a b"]


def test_a_bare_encoder_gets_mean_pooling(tmp_path):
    pytest.importorskip("transformers")
    tiny.theirs("bert", "Model").save_pretrained(tmp_path)
    model = BertForEmbedding.from_pretrained(tmp_path)
    assert (model.pooling, model.normalize) == ("mean", False)
    assert model.load_report.dropped == ("pooler.dense.bias", "pooler.dense.weight")
    assert BertForEmbedding.from_pretrained(tmp_path, pooling="cls", normalize=True).pooling == "cls"
    with pytest.raises(ValueError, match=r"tokenizer: the model's folder has no tokenizer\.json"):
        model.encode("w1")


REFUSED = {
    "a dense layer": (
        "modules.json",
        [{"path": path, "type": f"a.{path or 'Transformer'}"} for path in ("", "Pooling", "Dense")],
        "modules Transformer, Pooling, Dense",
    ),
    "no modules": ("modules.json", {"a": 1}, "is not a list of modules"),
    **{
        f"a module at {path}": (
            "modules.json",
            [{"path": "", "type": "a.Transformer"}, {"path": path, "type": "a.Pooling"}],
            "needs a path inside the folder",
        )
        for path in ("../1_Pooling", "/1_Pooling", "a/../../b", 3)
    },
    "two poolings": ("1_Pooling/config.json", {"pooling_mode": ["cls", "mean"]}, "got the pooling"),
    "another pooling": ("1_Pooling/config.json", {"pooling_mode_weightedmean_tokens": True}, "got the pooling"),
    "prompts left out": (
        "1_Pooling/config.json", {"pooling_mode": "mean", "include_prompt": False}, "include_prompt: got False",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("file", "content", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_not_computed_is_refused_by_name(file, content, message, tmp_path):
    folder_of(tmp_path)
    (tmp_path / file).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        BertForEmbedding.from_pretrained(tmp_path)


def test_a_batch_has_so_many_tokens_or_one_text(tmp_path, monkeypatch):
    """Where no number of texts is named; the longest texts come first."""
    folder_of(tmp_path)
    model = BertForEmbedding.from_pretrained(tmp_path)
    monkeypatch.setattr(embedding, "tokens_at_a_time", lambda device: 11)
    seen = []
    real = model.forward
    monkeypatch.setattr(
        model, "forward", lambda ids, mask: seen.append(ids.ne(0).sum(1).tolist()) or real(ids, mask)
    )
    lines = [" ".join(["w1"] * n) for n in (3, 10, 1, 2, 1, 1)]  # and two tokens around each
    assert model.encode(lines).shape == (6, model.config.hidden_size)
    assert seen == [[12], [5, 4], [3, 3, 3]]
    seen.clear()
    model.encode(lines, batch_size=4)
    assert [len(each) for each in seen] == [4, 2]
    assert model.encode([]).shape == (0, model.config.hidden_size)


def test_bad_arguments(tmp_path):
    folder_of(tmp_path)
    model = BertForEmbedding.from_pretrained(tmp_path)
    with pytest.raises(TypeError, match=r"texts\[1\]: got int"):
        model.encode(["w1", 2])
    with pytest.raises(ValueError, match="batch_size: got 0"):
        model.encode(["w1"], batch_size=0)
    with pytest.raises(ValueError, match="prompt_name: got 'passage', needs one of search"):
        model.encode(["w1"], prompt_name="passage")
    with pytest.raises(TypeError, match="prompt: got int"):
        model.encode(["w1"], prompt=3)
    for options, message in (
        ({"pooling": "last"}, "pooling: got 'last'"),
        ({"normalize": 1}, "normalize: got 1"),
    ):
        with pytest.raises(ValueError, match=message):
            make(**options)
        with pytest.raises(ValueError, match=message):
            BertForEmbedding.from_pretrained(
                tmp_path / "nowhere", **options
            )  # before the folder is looked for
