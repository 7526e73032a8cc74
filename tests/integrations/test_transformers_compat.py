"""What transformers renames or takes away costs structure or a refusal by name, never a result or an AttributeError."""

import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import transformers
from transformers import masking_utils
from transformers_models import MODELS, padding_mask
from transformers_sweep import compare, in_float64, results, results_in_orders

from fastattn.integrations import transformers as integration
from fastattn.integrations import transformers_compat as compat
from fastattn.integrations import transformers_masks
from fastattn.integrations.structured_mask import StructuredMask

integration.register()

PATTERNS = {
    "causal": masking_utils.causal_mask_function,
    "bidirectional": masking_utils.bidirectional_mask_function,
    "window": masking_utils.sliding_window_causal_mask_function(3),
    "two-sided": masking_utils.sliding_window_bidirectional_mask_function(2),
    "chunked": masking_utils.chunked_causal_mask_function(3, torch.zeros(3, dtype=torch.int64)),
}


def masks_of(pattern, padding, seqlen=9):
    """(ours, transformers' dense bool mask) of a mask function."""
    places = {
        "batch_size": 3, "q_length": seqlen, "kv_length": seqlen, "mask_function": pattern, "attention_mask": padding,
        "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False, "device": "cpu",
    }  # fmt: skip
    return transformers_masks.structured_mask(**places), masking_utils.sdpa_mask(**places)


MAKERS = [name for name, *_ in transformers_masks._MAKERS]


@pytest.fixture
def makers():
    """What is known of transformers' mask functions is found out anew, now and afterwards."""
    transformers_masks.known_makers.cache_clear()
    yield transformers_masks.known_makers
    transformers_masks.known_makers.cache_clear()


def test_every_maker_of_masks_is_known_to_this_version(makers):
    assert len(makers()) == len(MAKERS)
    assert transformers_masks._CAUSAL is masking_utils.causal_mask_function
    assert transformers_masks._BIDIRECTIONAL is masking_utils.bidirectional_mask_function


def renamed(sliding_window):
    """The function of transformers with its free variable renamed."""
    window = sliding_window

    def inner_mask(batch_idx, head_idx, q_idx, kv_idx):
        return kv_idx > q_idx - window

    return inner_mask


def wider(sliding_window):
    """The names that are known, another meaning."""

    def inner_mask(batch_idx, head_idx, q_idx, kv_idx):
        return kv_idx >= q_idx - sliding_window

    return inner_mask


def window_of(overlay):
    return masking_utils.and_masks(overlay, masking_utils.causal_mask_function)


@pytest.mark.parametrize("maker", [renamed, wider])
def test_a_mask_function_of_another_make_becomes_a_dense_mask(maker, makers, monkeypatch):
    monkeypatch.setattr(masking_utils, "sliding_window_overlay", maker)
    assert len(makers()) == len(MAKERS) - 1
    for padding in (None, padding_mask("left")):
        ours, dense = masks_of(window_of(maker(3)), padding)
        assert isinstance(ours, torch.Tensor)
        assert torch.equal(ours, dense)
    assert isinstance(masks_of(PATTERNS["causal"], None)[0], StructuredMask)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("how", ["gone", "other arguments", "no function"])
def test_a_maker_that_changed_is_unknown(name, how, makers, monkeypatch):
    """Mask functions made before, or elsewhere, are then dense as well."""
    pattern = PATTERNS["window"]
    padding = None if name == "and_masks" else padding_mask("right")  # transformers' own masks need that one
    if how == "gone":
        monkeypatch.delattr(masking_utils, name)
    else:
        other = (lambda: None) if how == "other arguments" else (lambda *args, **kwargs: object())
        monkeypatch.setattr(masking_utils, name, other)
    assert len(makers()) == len(MAKERS) - 1
    ours, dense = masks_of(pattern, padding)
    assert torch.equal(ours.dense() if isinstance(ours, StructuredMask) else ours, dense)


GONE = {
    "masks": ("_masking_utils", {"sdpa_mask", "eager_mask", "prepare_padding_mask"}),
    "tracing": ("_import_utils", {"is_tracing"}),
    "collected outputs": ("_output_capturing", {"_active_collector"}),
}


@pytest.mark.parametrize("what", GONE)
@pytest.mark.parametrize(("name", "padding"), [("gemma3", "left"), ("bert", "right"), ("t5", "left")])
def test_models_run_without_private_names(what, name, padding, monkeypatch):
    example = MODELS[name]
    model = example.make()
    arguments, valid = example.inputs(padding)
    model.set_attn_implementation("eager")
    plain, golden = results_in_orders(model, arguments, valid), in_float64(model, arguments, valid)
    place, names = GONE[what]
    module = getattr(compat, place)
    assert names <= vars(module).keys()
    rest = types.SimpleNamespace(**{k: v for k, v in vars(module).items() if k not in names})
    monkeypatch.setattr(compat, place, rest)
    for implementation in ("fastattn", "fastattn_float_masks"):
        model.set_attn_implementation(implementation)
        compare(results(model, arguments, valid), plain, golden, implementation)


@pytest.mark.parametrize("use_vmap", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_dense_masks_made_here_are_transformers(pattern, use_vmap, monkeypatch):
    places = {
        "batch_size": 3, "q_length": 4, "kv_length": 9, "q_offset": 5, "kv_offset": 0, "device": "cpu",
        "mask_function": PATTERNS[pattern], "attention_mask": padding_mask("left")[:, :8], "use_vmap": use_vmap,
        "allow_is_causal_skip": False,
    }  # fmt: skip
    expected = masking_utils.sdpa_mask(**places), masking_utils.eager_mask(**places, dtype=torch.float32)
    rest = {k: v for k, v in vars(masking_utils).items() if k not in ("sdpa_mask", "eager_mask")}
    monkeypatch.setattr(compat, "_masking_utils", types.SimpleNamespace(**rest))
    assert torch.equal(compat.dense_bool_mask(**places), expected[0])
    assert torch.equal(compat.dense_float_mask(**places, dtype=torch.float32), expected[1])


def test_implementations_are_set_without_the_private_attribute():
    class Config:
        def __init__(self, *subs):
            self.sub_configs = {str(i): None for i in range(len(subs))}
            self.__dict__.update({str(i): sub for i, sub in enumerate(subs)}, name="eager")

        @property
        def _attn_implementation(self):
            return self.name

        @_attn_implementation.setter
        def _attn_implementation(self, value):
            self.name = value
            for sub in compat.sub_configs(self):
                sub._attn_implementation = value

    inner = Config()
    config = Config(Config(inner), Config())
    compat.set_implementation(config, "fastattn")
    names = [compat.implementation(c) for c in (config, *compat.sub_configs(config), inner)]
    assert names == ["fastattn", "eager", "eager", "eager"]


IMPORTS = """
import importlib, sys
import transformers
import transformers.masking_utils as masking
import transformers.utils.output_capturing as capturing

def tried():
    for name in [name for name in sys.modules if name.startswith("fastattn.integrations.transformers")]:
        del sys.modules[name]
    try:
        importlib.import_module("fastattn.integrations.transformers").register()
        return "registered"
    except ImportError as error:
        return str(error)

version = transformers.__version__
for old in ("5.17.0", "4.57.1.dev0"):
    transformers.__version__ = old
    assert tried().endswith(f"got transformers {old}, needs 5.23 or newer"), tried()
transformers.__version__ = "6.0"
assert tried() == "registered", tried()
register = transformers.AttentionInterface.register
interface = transformers.AttentionInterface
transformers.AttentionInterface = object
assert "has no AttentionInterface" in tried(), tried()
transformers.AttentionInterface = interface
for name in [name for name in vars(masking) if "mask" in name and name != "AttentionMaskInterface"]:
    delattr(masking, name)
del capturing._active_collector
assert tried() == "registered", tried()
"""


def test_an_import_tells_what_version_is_needed():
    """And no AttributeError, whatever is renamed."""
    subprocess.run([sys.executable, "-c", IMPORTS], check=True)


PRIVATE = ("masking_utils", "output_capturing", '"_attn_implementation', "._attn_implementation", "_supports_sdpa",
           "import transformers\n", "from transformers")  # fmt: skip


def test_private_names_of_transformers_have_one_home():
    """Besides the documented interface, everything goes through transformers_compat."""
    for path in Path(integration.__file__).parent.glob("*.py"):
        text = path.read_text().replace("fastattn.integrations import transformers", "")
        if path.name != "transformers_compat.py":
            assert not [name for name in PRIVATE if name in text], path.name


def test_the_version_here_is_one_that_is_written_for():
    compat.check_version()
    assert compat.version() == transformers.__version__
