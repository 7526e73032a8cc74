"""A swap leaves every module of a transformers model its masks, whatever computes attention beside it."""

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
import transformers as hf
from torch import nn
from transformers_models import MODELS, put_logits
from transformers_sweep import check, in_float64, results
from transformers_tiny import build, types

import fastattn
import fastattn.integrations.swap
from fastattn.integrations import transformers_compat as compat
from fastattn.integrations.transformers_kinds import wants_eager_masks

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}


def git():
    vision = dict(SMALL, image_size=32, patch_size=16)
    return hf.GitForCausalLM(hf.GitConfig(vision_config=vision, vocab_size=100, **SMALL)).eval()


def test_git_does_not_see_the_future():
    model = git()
    one, two = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[5, 6, 7, 99]])
    fastattn.swap_attention(model)
    assert (model(one).logits - model(two).logits)[:, :3].abs().max() == 0


def test_informer_does_not_see_the_future():
    tiny = build("informer")
    fastattn.swap_attention(tiny.model)
    later = dict(tiny.arguments, future_values=tiny.arguments["future_values"].clone())
    later["future_values"][:, -1] += 1
    one, two = (tiny.model(**arguments).last_hidden_state for arguments in (tiny.arguments, later))
    assert (one - two)[:, :-1].abs().max() == 0
    assert one.shape[1] > 1


# What a swap got wrong, by why: attention of their own beside others, modules that say nothing of causality, a router
# that reads the mask, masks that the model widens or broadcasts, and what the op cannot run.
WRONG = [
    "git", "informer", "bigbird_pegasus", "pegasus_x", "gemma4_audio", "align_text_model", "clap_text_model",
    "splinter", "nllb-moe", "deepseek_v4", "lightglue", "axk2", "deepseek_v32", "inkling2_text", "gemma4",
    "kosmos_2_5_text_model", "minimax", "evolla",
]  # fmt: skip


@pytest.mark.parametrize("model_type", WRONG)
def test_logits_gradients_causality_and_padding_stay(model_type):
    if model_type not in types():
        pytest.skip(f"this transformers has no {model_type}")
    check(model_type)


def choose(model):
    """What a user does who names the implementation; the report is what a swap then finds."""
    model.set_attn_implementation("fastattn")
    left = [] if compat.can_choose(model) else [("", "fixed")]
    return fastattn.integrations.swap.SwapReport(("",), (), tuple(left), "auto")


@pytest.mark.parametrize("model_type", WRONG[:11])
def test_the_implementation_by_name_gives_the_same(model_type):
    if model_type not in types():
        pytest.skip(f"this transformers has no {model_type}")
    check(model_type, choose)


def test_only_what_needs_them_gets_eager_masks_by_name():
    models = {name: build(name).model for name in ("llama", "gemma2", "gpt_oss", "bert", "t5", "clip", "git")}
    wants = {name: wants_eager_masks(model.config) for name, model in models.items()}
    assert wants == {name: name == "git" for name in models}


@pytest.mark.parametrize(
    "model_type", ["git", "bigbird_pegasus", "pegasus_x", "informer", "clap_text_model", "gemma4_text"]
)
def test_a_swap_of_a_mixed_model_is_undone(model_type):
    model = build(model_type).model
    names = [compat.implementation(m.config) for m in model.modules() if compat.is_model(m)]
    report = fastattn.swap_attention(model)
    again = fastattn.swap_attention(model)
    assert report.swapped
    assert (again.swapped, again.already, again.left, again.dense) == (
        (), report.swapped, report.left, report.dense,
    )  # fmt: skip
    assert set(fastattn.restore_attention(model)) == set(report.swapped)
    assert [compat.implementation(m.config) for m in model.modules() if compat.is_model(m)] == names


def test_the_report_names_what_is_left_and_what_gets_dense_masks():
    report = fastattn.swap_attention(build("bigbird_pegasus").model)
    assert {name.rpartition(".")[2] for name in report.swapped} == {"self_attn", "encoder_attn"}
    assert all("decoder" in name for name in report.swapped)
    assert {why for _, why in report.left} == {"BigBirdPegasusSelfAttention computes attention itself"}
    assert dict(report.dense).keys() == set(report.swapped)
    assert "BigBirdPegasusSelfAttention" in report.dense[0][1]
    assert report.dense[0][1] in str(report)
    assert report.to_dict()["dense"] == dict(report.dense)
    assert fastattn.swap_attention(MODELS["llama"].make()).dense == ()
    assert fastattn.swap_attention(MODELS["gpt_oss"].make()).dense == ()


def test_what_transformers_refuses_sdpa_for_is_in_the_report():
    report = fastattn.swap_attention(build("splinter").model)
    assert "SplinterSelfAttention) has no is_causal" in report.dense[0][1]
    report = fastattn.swap_attention(build("nllb-moe").model)
    assert "is not allowed sdpa by transformers" in report.dense[0][1]


def test_a_module_that_does_not_say_if_it_is_causal_is_as_it_was():
    """LayoutLM on eager attention sees every key; transformers' sdpa takes it for causal."""
    model = build("layoutlm").model.train(False)
    ids = torch.tensor([[3, 4, 5, 6]])
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        expected = model(ids).logits
        fastattn.swap_attention(model)
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-5)
        fastattn.restore_attention(model)
    model.set_attn_implementation("eager")
    expected = model(ids).logits
    model.set_attn_implementation("fastattn")
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-5)


class OwnAttention(nn.Module):
    """Attention with eager attention's masks, in a model whose other layer goes through the interface."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        q, k, v = self.qkv(hidden_states).chunk(3, -1)
        scores = q @ k.transpose(-1, -2)
        if attention_mask is not None:
            mask = attention_mask[:, 0]
            scores = (
                scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
                if mask.dtype == torch.bool
                else scores + mask
            )
        return scores.softmax(-1) @ v, None


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("padding", ["none", "right", "left"])
def test_a_layer_exchanged_by_its_user_keeps_its_mask(implementation, padding):
    """Its masks stay those of the implementation before: for sdpa without padding that is none, as before."""
    model = MODELS["llama"].make()
    model.set_attn_implementation(implementation)
    model.model.layers[1].self_attn = OwnAttention(model.config)
    arguments, valid = MODELS["llama"].inputs(padding)
    plain, golden = results(model, arguments, valid), in_float64(model, arguments, valid)
    report = fastattn.swap_attention(model)
    assert report.swapped == ("model.layers.0.self_attn",)
    assert report.left == (("model.layers.1.self_attn", "OwnAttention computes attention itself"),)
    actual = results(model, arguments, valid)
    for name, exact in golden.items():
        scale = max(exact.norm(), 1e-2 * max(g.norm() for g in golden.values()))
        assert (actual[name] - exact).norm() <= 2 * (plain[name] - exact).norm() + 1e-5 * scale, name


def test_masks_that_fastattn_cannot_read_leave_a_mixed_model_alone():
    model = MODELS["llama"].make()
    model.model.layers[1].self_attn = OwnAttention(model.config)
    compat.set_implementation(model.config, "flex_attention")
    report = fastattn.swap_attention(model)
    assert report.swapped == ()
    assert "flex_attention" in dict(report.left)["model.layers.0.self_attn"]
    assert compat.implementation(model.config) == "flex_attention"


def llama(**change):
    sizes = dict(SMALL, hidden_size=32, vocab_size=64, num_key_value_heads=2, head_dim=8) | change
    return hf.LlamaForCausalLM(hf.LlamaConfig(**sizes)).eval()


@pytest.mark.parametrize(
    ("change", "why"), [({"head_dim": 320}, "head dim 320"), ({"attention_dropout": 1.0}, "dropout 1.0")]
)
def test_what_the_op_cannot_run_is_left(change, why):
    model, ids = llama(**change), torch.tensor([[3, 4, 5]])
    expected, before = model(ids).logits, compat.implementation(model.config)
    report = fastattn.swap_attention(model)
    assert report.swapped == ()
    assert [name for name, _ in report.left] == ["model.layers.0.self_attn"]
    assert why in report.left[0][1]
    assert compat.implementation(model.config) == before
    assert torch.equal(model(ids).logits, expected)
    assert torch.isfinite(model.train()(ids).logits).all()


BUILT = {
    "bert": (hf.BertModel, lambda: hf.BertConfig(**SMALL, vocab_size=64, attention_probs_dropout_prob=1.0)),
    "gpt2": (
        hf.GPT2Model,
        lambda: hf.GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=4, attn_pdrop=1.0),
    ),
    "vit": (
        hf.ViTModel,
        lambda: hf.ViTConfig(**SMALL, image_size=16, patch_size=8, attention_probs_dropout_prob=1.0),
    ),
    "gpt_neox": (hf.GPTNeoXModel, lambda: hf.GPTNeoXConfig(**SMALL, vocab_size=64, attention_dropout=1.0)),
}


@pytest.mark.parametrize("name", BUILT)
def test_a_dropout_of_everything_is_left_whatever_it_is_called(name):
    model, config = BUILT[name]
    report = fastattn.swap_attention(model(config()))
    assert report.swapped == ()
    assert "dropout 1.0" in report.left[0][1]


def test_a_sharded_model_is_swapped():
    fake = pytest.importorskip("torch.testing._internal.distributed.fake_pg")
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    torch.distributed.init_process_group("fake", store=fake.FakeStore(), rank=0, world_size=1)
    try:
        model = llama()
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        for module in (model.model.layers[0].self_attn, model):
            fsdp.fully_shard(module, mesh=mesh)
        assert fastattn.swap_attention(model).swapped == ("model.layers.0.self_attn",)
        assert fastattn.restore_attention(model) == ("model.layers.0.self_attn",)
    finally:
        torch.distributed.destroy_process_group()


def test_one_config_for_two_head_dims_is_left_whole():
    model = hf.LlamaForCausalLM(llama(num_hidden_layers=2).config).eval()
    model.model.layers[1].self_attn.head_dim = 512
    reasons = dict(fastattn.swap_attention(model).left)
    assert "head dim 512" in reasons["model.layers.1.self_attn"]
    assert "model.layers.1.self_attn" in reasons["model.layers.0.self_attn"]


UNPICKLE = """
import pickle, sys
import torch
{load}
out = model(torch.tensor([[3, 4, 5]])).logits
import fastattn
assert fastattn.restore_attention(model) == ("model.layers.0.self_attn",)
assert model.config._attn_implementation == "sdpa"
torch.save(out, sys.argv[2])
"""


@pytest.mark.parametrize(
    "load",
    [
        "model = pickle.load(open(sys.argv[1], 'rb'))",
        pytest.param("model = torch.load(sys.argv[1], weights_only=False)", marks=pytest.mark.exhaustive),
    ],
)
def test_a_swapped_model_registers_where_it_is_unpickled(load, tmp_path):
    model, ids = llama(), torch.tensor([[3, 4, 5]])
    fastattn.swap_attention(model)
    saved = tmp_path / "model"
    if "torch.load" in load:
        torch.save(model, saved)
    else:
        saved.write_bytes(pickle.dumps(model))
    subprocess.run([sys.executable, "-c", UNPICKLE.format(load=load), saved, tmp_path / "out"], check=True)
    torch.testing.assert_close(torch.load(tmp_path / "out"), model(ids).logits)


PART = """
import pickle, sys, torch
from transformers import PreTrainedModel
part = pickle.load(open(sys.argv[1], "rb"))
x = torch.linspace(-1, 1, 3 * 32).view(1, 3, 32)
ids = torch.tensor([[3, 4, 5]])
cos, sin = torch.ones(1, 3, 8), torch.zeros(1, 3, 8)
whole = isinstance(part, PreTrainedModel)
out = part(ids)[0] if whole else part(x, position_embeddings=(cos, sin), attention_mask=None)[0]
assert out.isfinite().all()
"""


@pytest.mark.parametrize(
    "path", [pytest.param("model", marks=pytest.mark.exhaustive), "model.layers.0.self_attn"]
)
def test_a_part_of_a_swapped_model_registers_too(path, tmp_path):
    model = llama()
    fastattn.swap_attention(model)
    part = model.get_submodule(path)
    saved = tmp_path / "part"
    saved.write_bytes(pickle.dumps(part))
    subprocess.run([sys.executable, "-c", PART, saved], check=True)
    fastattn.restore_attention(model)
    assert not any("fastattn" in name for module in model.modules() for name in vars(module))


def test_a_swapped_model_runs_in_a_spawned_worker():
    model, ids = llama(), torch.tensor([[3, 4, 5]])
    fastattn.swap_attention(model)
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    worker = context.Process(target=put_logits, args=(model, ids, queue))
    worker.start()
    out = torch.from_numpy(queue.get(timeout=120))
    worker.join()
    torch.testing.assert_close(out, model(ids).logits)


def test_a_copy_of_a_swapped_model_is_swapped_and_restored_by_itself():
    model = git()
    fastattn.swap_attention(model)
    twin = copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (twin, torch.load(file, weights_only=False)):
        assert len(fastattn.restore_attention(other)) == 1
        assert compat.implementation(other.config.vision_config) == "eager"
    assert compat.implementation(model.config.vision_config) != "eager"
    assert len(fastattn.restore_attention(model)) == 1


def test_a_second_swap_sees_what_came_in_since():
    model = MODELS["llama"].make()
    before = compat.implementation(model.config)
    fastattn.swap_attention(model)
    model.model.layers[1].self_attn = OwnAttention(model.config)
    report = fastattn.swap_attention(model)
    assert report.already == ("model.layers.0.self_attn",)
    assert report.dense
    assert compat.implementation(model.config) != before
    model.model.layers[0].self_attn.head_dim = 512
    report = fastattn.swap_attention(model)
    assert report.already == report.swapped == ()
    assert compat.implementation(model.config) == before
    assert fastattn.restore_attention(model) == ()
