"""Folders read: what is damaged, hostile or elsewhere is refused by name, and nothing is copied that need not be."""

import json
import logging
import pickle
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from decoder_families import GPT2_SIZES, SIZES
from small_models import make_gpt

from fastattn.models import GPT, load
from fastattn.models.checkpoint import DECODERS, resolve_folder
from fastattn.models.checkpoint.hub import push_folder
from fastattn.models.checkpoint.load import dtype_of, float_dtype


@pytest.fixture
def folder(tmp_path):
    make_gpt(torch.float32).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def weights(folder):
    return safetensors.torch.load_file(folder / "model.safetensors")


def shard(folder, *, drop=(), beyond=(), where=None):
    """Cut the weights into two shards; `drop` leaves tensors out, `beyond` leaves them out of the index only."""
    tensors = weights(folder)
    (folder / "model.safetensors").unlink()
    names = list(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, members in parts.items():
        safetensors.torch.save_file({n: tensors[n] for n in members if n not in drop}, folder / file)
    index = {n: file for file, members in parts.items() for n in members if n not in beyond}
    index |= where or {}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return names


def test_weights_are_mapped_and_not_copied(folder):
    """Parameters in the file's order and dtype are the file's pages: they follow it while nobody writes to them."""
    model = GPT.from_pretrained(folder)
    name = "transformer.wte.weight"
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    start = 8 + int.from_bytes(raw[:8], "little") + header[name]["data_offsets"][0]
    with path.open("r+b") as file:
        file.seek(start)
        file.write(b"\0\0\0\0")
    assert model.wte.weight[0, 0] == 0
    with torch.no_grad():
        model.wte.weight.fill_(3.0)  # pages that are written to are the model's own
    assert path.read_bytes()[start : start + 4] == b"\0\0\0\0"


def test_pickled_weights_are_mapped_too(folder):
    torch.save(weights(folder), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    model = GPT.from_pretrained(folder)
    path = folder / "pytorch_model.bin"
    start = path.read_bytes().find(model.wte.weight.detach().numpy().tobytes())
    with path.open("r+b") as file:
        file.seek(start)
        file.write(b"\0\0\0\0")
    assert model.wte.weight[0, 0] == 0


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_weights_of_any_age_load(folder, zipped):
    expected = GPT.from_pretrained(folder).state_dict()
    torch.save(weights(folder), folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    (folder / "model.safetensors").unlink()
    state = GPT.from_pretrained(folder).state_dict()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_sharded_pickles_load(folder):
    expected = GPT.from_pretrained(folder).state_dict()
    names = shard(folder)
    where = {}
    for path in sorted(folder.glob("model-*.safetensors")):
        tensors = safetensors.torch.load_file(path)
        file = path.with_suffix(".bin").name.replace("model", "pytorch_model")
        torch.save(tensors, folder / file)
        where |= dict.fromkeys(tensors, file)
        path.unlink()
    (folder / "model.safetensors.index.json").unlink()
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    assert sorted(where) == sorted(names)
    state = GPT.from_pretrained(folder).state_dict()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


ran = []


class Code:
    """A pickle that calls a function when it is read."""

    def __reduce__(self):
        return (ran.append, ("ran",))


@pytest.mark.parametrize("kind", ["zip", "old", "bare", "shard"])
def test_code_in_pickles_does_not_run(folder, kind):
    tensors = {**weights(folder), "transformer.wte.weight": Code()}
    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    if kind == "bare":
        path.write_bytes(pickle.dumps(tensors))
    elif kind == "shard":
        torch.save(tensors, folder / "pytorch_model-00001-of-00001.bin")
        where = dict.fromkeys(tensors, "pytorch_model-00001-of-00001.bin")
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(
        ValueError, match=r"pytorch_model.*\.bin is damaged or no file of tensors.*[Ww]eights.only"
    ):
        GPT.from_pretrained(folder)
    assert ran == []


OUTSIDE = [
    "../model/x",
    "/etc/hostname",
    "sub/x.safetensors",
    "..",
    ".",
    "",
    "model-00001-of-00002.safetensors/",
]


@pytest.mark.parametrize("name", OUTSIDE)
def test_an_index_that_names_another_place_is_refused(folder, name):
    shard(folder, where={"transformer.wte.weight": name})
    (folder / "sub").mkdir()
    shutil.copy(folder / "model-00001-of-00002.safetensors", folder / "sub" / "x.safetensors")
    with pytest.raises(ValueError, match=r"index\.json names the file") as caught:
        GPT.from_pretrained(folder)
    assert repr(name) in str(caught.value)


def test_an_index_and_its_shards_must_agree(folder, tmp_path):
    names = list(weights(folder))
    cases = {
        "lack": ({"drop": names[1:3]}, f"its shards lack {', '.join(sorted(names[1:3]))}"),
        "beyond": ({"beyond": names[1:2]}, rf"it does not name {names[1]}"),
    }
    for case, (options, message) in cases.items():
        copy = shutil.copytree(folder, tmp_path / case)
        shard(copy, **options)
        with pytest.raises(ValueError, match=message):
            GPT.from_pretrained(copy)
    shard(folder)
    first = safetensors.torch.load_file(folder / "model-00001-of-00002.safetensors")
    second = safetensors.torch.load_file(folder / "model-00002-of-00002.safetensors")
    safetensors.torch.save_file(
        {**second, names[0]: first[names[0]]}, folder / "model-00002-of-00002.safetensors"
    )
    with pytest.raises(ValueError, match=rf"holds {names[0]} twice"):
        GPT.from_pretrained(folder)


@pytest.mark.parametrize("part", [0.001, 0.1, 0.5, 0.999])
@pytest.mark.parametrize("kind", ["safetensors", "shard", "bin"])
def test_truncated_files_are_refused(folder, kind, part):
    path = folder / "model.safetensors"
    if kind == "shard":
        shard(folder)
        path = folder / "model-00002-of-00002.safetensors"
    elif kind == "bin":
        torch.save(weights(folder), folder / "pytorch_model.bin")
        path.unlink()
        path = folder / "pytorch_model.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(part * len(whole))])
    with pytest.raises(ValueError, match=rf"{path.name} is damaged"):
        GPT.from_pretrained(folder)


def test_nan_in_any_tensor_is_refused_by_name(folder):
    tensors = weights(folder)
    for name in ("transformer.h.1.attn.c_attn.weight", "transformer.wpe.weight", "transformer.ln_f.bias"):
        changed = {n: t.clone() for n, t in tensors.items()}
        changed[name].view(-1)[-1] = float("nan")
        safetensors.torch.save_file(changed, folder / "model.safetensors")
        ours = name.removeprefix("transformer.").replace("c_attn.", "in_proj_")
        with pytest.raises(ValueError, match=rf"not finite.* in {ours}$"):
            GPT.from_pretrained(folder)


def test_the_dtype_is_the_callers_else_that_of_config_json(folder):
    assert GPT.from_pretrained(folder, dtype="bfloat16").wte.weight.dtype == torch.bfloat16
    assert load(folder, dtype=torch.float64).h[1].attn.in_proj_weight.dtype == torch.float64
    entries = json.loads((folder / "config.json").read_text())
    for key in ("dtype", "torch_dtype"):
        del entries["dtype"]
        (folder / "config.json").write_text(json.dumps({**entries, key: "float16"}))
        assert GPT.from_pretrained(folder).ln_f.weight.dtype == torch.float16
        entries["dtype"] = None
    assert dtype_of({"dtype": "int64"}) is dtype_of({"dtype": "nothing"}) is dtype_of({}) is None
    for wrong, error in (
        ("int8", ValueError),
        ("nothing", ValueError),
        (3, TypeError),
        (torch.int64, ValueError),
    ):
        with pytest.raises(error, match="dtype: got"):
            float_dtype(wrong)
        with pytest.raises(error, match="dtype: got"):
            GPT.from_pretrained(folder, dtype=wrong)


def test_fields_of_the_config_can_be_changed(folder):
    assert GPT.from_pretrained(folder, attn_pdrop=0.3).h[0].attn.dropout == 0.3
    with pytest.raises(TypeError, match="n_heads: GPTConfig has no such field"):
        GPT.from_pretrained(folder, n_heads=2)
    with pytest.raises(ValueError, match=r"missing: h\.2\.ln_1\.weight"):
        GPT.from_pretrained(folder, n_layer=3)


def test_left_out_tensors_are_logged(folder, caplog):
    tensors = weights(folder)
    extra = {"transformer.h.0.attn.bias": torch.ones(1, 1, 64, 64), "score.weight": torch.ones(2, 32)}
    safetensors.torch.save_file({**tensors, **extra}, folder / "model.safetensors")
    with caplog.at_level(logging.INFO, logger="fastattn"):
        model = GPT.from_pretrained(folder)
    assert set(model.load_report.dropped) == set(extra)
    assert all(name in caplog.text for name in extra)


OTHER_HEADS = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")


@pytest.mark.parametrize("ending", OTHER_HEADS)
@pytest.mark.parametrize("kind", ["GPT2", "Llama", "Mistral", "Qwen2", "Qwen3", "Gemma2", "Gemma3Text"])
def test_heads_of_other_classes_are_left_out(kind, ending, tmp_path):
    """Folders of transformers' classifiers over decoders, some of which name their trunk otherwise."""
    transformers = pytest.importorskip("transformers")
    cls = getattr(transformers, kind + ending, None)
    if cls is None:
        pytest.skip("transformers has no such class")
    sizes = {**SIZES, "num_hidden_layers": 1, "tie_word_embeddings": True}
    config = getattr(transformers, f"{kind}Config")
    theirs = cls._from_config(config(**(GPT2_SIZES if kind == "GPT2" else sizes)))
    theirs.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="architectures: no class of fastattn is"):
        report = load(tmp_path).load_report
    heads = {
        n for n, _ in theirs.named_parameters() if n.startswith(("score.", "classifier.", "qa_outputs."))
    }
    assert heads
    assert (set(report.dropped), report.new) == (heads, ())


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_an_untied_trunk_is_refused_for_want_of_a_head(kind, tmp_path):
    family = next(each for each in DECODERS if each.model_type == kind)
    sizes = {**(GPT2_SIZES if kind == "gpt2" else SIZES), "tie_word_embeddings": False}
    GPT(family.read_config(sizes)).save_pretrained(tmp_path)
    tensors = weights(tmp_path)
    del tensors["lm_head.weight"]
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    message = r"missing: lm_head\.weight; it has no output head, new=\['lm_head\.weight'\] initialises one$"
    with pytest.raises(ValueError, match=message):
        load(tmp_path)
    assert GPT.from_pretrained(tmp_path, new=["lm_head.weight"]).load_report.new == ("lm_head.weight",)


class FakeHub:
    """What of huggingface_hub.HfApi an upload calls."""

    def __init__(self, calls, *, existing=(), error=None):
        self.calls, self.existing, self.error = calls, existing, error

    def __call__(self, token=None):
        self.calls.append(("token", token))
        return self

    def create_repo(self, repo_id, *, private, exist_ok):
        if self.error is not None:
            raise self.error
        self.calls.append(("create", repo_id, private, exist_ok))
        return f"hub://{repo_id}"

    def file_exists(self, repo_id, filename):
        return filename in self.existing

    def upload_folder(self, *, repo_id, folder_path, commit_message, ignore_patterns, delete_patterns):
        files = sorted(p.name for p in Path(folder_path).iterdir())
        self.calls.append(("upload", repo_id, files, commit_message, ignore_patterns, delete_patterns))


def test_push_to_hub(folder, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    (folder / "tokenizer.json").write_text("{}")
    model, calls = GPT.from_pretrained(folder), []
    monkeypatch.setattr(hub, "HfApi", FakeHub(calls))
    assert model.push_to_hub("me/tiny", private=True, token="secret") == "hub://me/tiny"
    names = ["README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"]
    assert calls[:2] == [("token", "secret"), ("create", "me/tiny", True, True)]
    assert calls[2][:3] == ("upload", "me/tiny", names)
    assert calls[2][4] is None
    assert "model-*-of-*.safetensors" in calls[2][5]
    monkeypatch.setattr(hub, "HfApi", FakeHub(calls, existing=["README.md"]))
    model.push_to_hub("me/tiny", commit_message="more")
    assert calls[-1][3:5] == ("more", ["README.md"])  # a card on the hub stays
    monkeypatch.setattr(hub, "HfApi", FakeHub(calls, error=ConnectionError("no network")))
    with pytest.raises(ValueError, match=r"repo_id: 'me/tiny' could not be uploaded.*no network"):
        model.push_to_hub("me/tiny")
    monkeypatch.undo()
    monkeypatch.setattr(hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # where nothing listens
    with pytest.raises(ValueError, match="repo_id: 'me/tiny' could not be uploaded"):
        model.push_to_hub("me/tiny", token="secret")
    for wrong in ("", "a/b/c", None):
        with pytest.raises(ValueError, match="repo_id: got"):
            push_folder(folder, wrong)


MODEL, OTHER = '{"model_type": "gpt2"}', "{}"
REPOSITORIES = {  # files, and those of them that are left alone
    "safetensors": (
        {"config.json": MODEL, "model.safetensors": "", "pytorch_model.bin": "", "tf_model.h5": ""},
        {"pytorch_model.bin", "tf_model.h5"},
    ),
    "pickled": ({"config.json": MODEL, "pytorch_model.bin": "", "training_args.bin": ""}, {"training_args.bin"}),
    "adapter": ({"adapter_config.json": OTHER, "adapter_model.safetensors": "", "adapter_model.bin": ""},
                {"adapter_model.bin"}),
    "pickled adapter": ({"adapter_config.json": OTHER, "adapter_model.bin": "", "optimizer.bin": ""},
                        {"optimizer.bin"}),
    "pickled model and adapter": (
        {"config.json": MODEL, "pytorch_model.bin": "", "adapter_config.json": OTHER, "adapter_model.safetensors": ""},
        set(),
    ),
    "sentence-transformers": (
        {"modules.json": "[]", "0_Transformer/config.json": MODEL, "0_Transformer/pytorch_model.bin": "",
         "1_Pooling/config.json": OTHER, "1_Pooling/pytorch_model.bin": ""},
        {"1_Pooling/pytorch_model.bin"},
    ),
    "other formats": (
        {"config.json": MODEL, "model.safetensors": "", "consolidated.safetensors": "", "params.json": OTHER,
         "original/consolidated.00.pth": "", "original/model.safetensors": "", "onnx/config.json": MODEL},
        {"consolidated.safetensors", "original/consolidated.00.pth", "original/model.safetensors", "onnx/config.json"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", REPOSITORIES)
def test_files_of_a_hub_repository_that_are_fetched(kind, tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    files, left = REPOSITORIES[kind]
    asked = []

    def snapshot_download(repo, *, allow_patterns, ignore_patterns):
        asked.append(allow_patterns)
        patterns = {"allow_patterns": allow_patterns, "ignore_patterns": ignore_patterns}
        for name in hub.utils.filter_repo_objects(files, **patterns):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(files[name])
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    assert resolve_folder("someone/model") == tmp_path
    fetched = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert fetched == files.keys() - left
    assert len(asked) == (2 if any(name.endswith(".bin") for name in fetched) else 1)


def test_offline_errors_name_the_id(monkeypatch, tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=r"'nobody/nothing', which is not a folder and could not be fetched"):
        load("nobody/nothing")
