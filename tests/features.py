"""The feature matrix: what each backend of fastattn does, by which test, and what others do; writes docs/features.md.

python tests/features.py        after a change of this table
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).resolve().parent.parent / "docs" / "features.md"
CPU, KERNEL = "tests/backends/test_torch_attention.py", "tests/kernels/test_contract.py"
KERNELS, OPS, VARLEN = "tests/kernels", "tests/ops/test_attention.py", "tests/ops/test_varlen.py"
DERIVATIVES, COMPILED = "tests/ops/test_attention_derivatives.py", "tests/ops/test_attention_compiled.py"
CHOICE = "tests/ops/test_attention_choice.py"
YES, NO, PART, UNKNOWN = "yes", "no", "in part", "?"
PEERS = ("flash-attn 2.8", "flash-attn 3", "flash-attn 4 (Hopper)", "SDPA cuDNN", "SDPA mem-efficient",
         "FlexAttention", "xFormers", "FlashInfer")  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """What one backend does, and the tests that hold it to that."""

    text: str
    tests: tuple[str, ...] = ()


@dataclass(frozen=True)
class Feature:
    """A row: fastattn's backends, then the peers in the order of PEERS."""

    name: str
    torch: Cell
    triton: Cell
    peers: str  # the cells, parted by "|"


def yes(*tests: str, text: str = YES) -> Cell:
    """A cell that claims something, and so needs a test."""
    assert tests
    return Cell(text, tests)


def contract(case: str) -> tuple[Cell, Cell]:
    """Forward and gradients of a case of tests/contract.py against float64, on the CPU and in the Triton kernels."""
    return yes(f"{CPU}::test_contract[{case}-torch.float32]"), yes(f"{KERNEL}::test_contract[{case}]")


def both(*tests: str, text: str = YES) -> tuple[Cell, Cell]:
    """The same tests for both: they are of the op above the backends."""
    return yes(*tests, text=text), yes(*tests, text=text)


NONE = Cell(NO)

FEATURES = (
    Feature(
        "dtypes, forward and backward",
        yes(f"{CPU}::test_contract[plain-torch.float16]", f"{CPU}::test_contract[plain-torch.bfloat16]",
            f"{CPU}::test_contract[plain-torch.float32]", f"{CPU}::test_float64_agrees_to_rounding[plain]",
            text="fp16 bf16 fp32 fp64"),
        yes(f"{KERNEL}::test_contract[plain]", f"{KERNEL}::test_contract_in_other_dtypes[plain-torch.bfloat16]",
            f"{KERNEL}::test_contract_in_other_dtypes[plain-torch.float32]", text="fp16 bf16 fp32"),
        "fp16 bf16|fp16 bf16, fp8 forward|fp16 bf16|fp16 bf16|fp16 bf16 fp32|fp16 bf16 fp32, fp8 forward|"
        "fp16 bf16 fp32|fp16 bf16 fp8, no backward",
    ),
    Feature("largest head dim", *(yes(*cell.tests, text="256") for cell in contract("head dim 256")),
            "256|256, 512 for values|256|128, 192 in part|65536, slow|any|65536, slow|512"),
    Feature("head dims that are no multiple of 8", *contract("head dim 59"),
            "padded by a copy|no|no|no|no|yes|no|no"),
    Feature("values of another head dim", *contract("wider values"),
            "no|some pairs|yes|some pairs|yes|yes|yes|some pairs"),
    Feature("latent attention with absorbed weights (MLA)", NONE, NONE,
            "no|forward|no|no|no|by modification|by FA3|yes"),
    Feature("causal to the last key (bottom right)", *contract("causal"),
            "yes|yes|yes|by a helper|by a helper|user code|yes|yes"),
    Feature("causal from the first key (top left)", *contract("causal top left"),
            "no|no|no|yes|yes|user code|yes|no"),
    Feature("sliding window, either side", *contract("window both sides"),
            "yes|yes|yes|not by SDPA|by a dense mask|user code|yes|left"),
    Feature("grouped and single key heads", *contract("grouped heads"),
            "yes|yes|yes|yes|no|yes|forward|yes"),
    Feature("packed sequences (cu_seqlens)",
            yes(f"{VARLEN}::test_against_float64[causal-torch.float32]"),
            yes(f"{KERNELS}/test_varlen.py::test_error_rule[causal]"),
            "yes|yes|yes|nested tensors|nested, forward|user code|yes|yes"),
    Feature("packed documents in a dense batch (segment ids)", *contract("segments"),
            "no|no|user code|by a dense mask|by a dense mask|user code|yes|no"),
    Feature("padded batch (key lengths)", *contract("lengths"),
            "by unpadding|by unpadding|?|by a mask|by a mask|user code|yes|yes"),
    Feature("key/value cache with append and rotary",
            yes("tests/ops/test_kv_cache.py::test_append_and_attend[rotary-dense-chunk-ragged]"),
            yes(f"{KERNELS}/test_decode.py::test_error_rule[rotary]"),
            "yes|yes|no|no|no|no|rotary apart|rotary in the kernel"),
    Feature("paged cache, any page size",
            yes("tests/ops/test_kv_cache.py::test_append_and_attend[plain-paged-chunk-ragged]"),
            yes(f"{KERNELS}/test_decode.py::test_error_rule[pages of three]",
                f"{KERNELS}/test_decode.py::test_pages_give_the_bits_of_a_dense_cache[16]"),
            "multiples of 256|yes|yes|no|no|experimental|yes|yes"),
    Feature("decoding split over keys", Cell("not needed"),
            yes(f"{KERNELS}/test_decode.py::test_any_number_of_splits[7-dense]"),
            "yes|yes|no|?|no|yes|yes|yes"),
    Feature("ALiBi, with the slopes' gradient", *contract("alibi"),
            "no gradient|no|by modification|by a bias|by a bias|yes|by a bias|no backward"),
    Feature("softcap", *contract("softcap"),
            "not with dropout|yes|yes|no|no|yes|no|yes"),
    Feature("additive bias of any broadcast shape and layout", *contract("bias"),
            "no|no|by modification|yes|if aligned|yes|if aligned and expanded|no"),
    Feature("gradient of the bias", *contract("bias per head"),
            "no|no|no|no|yes|yes, by atomics|yes|no"),
    Feature("boolean mask", *contract("mask"),
            "no|no|user code|yes|yes|yes|as floats|yes"),
    Feature("block-sparse masks given as such", NONE, NONE,
            "no|no|yes|no|no|yes|no|yes"),
    Feature("learned sinks, with gradient", *contract("sinks"),
            "no|no|since 2026-07|no|no|by hand from lse|no|forward"),
    Feature("dropout", *contract("dropout"),
            "yes|no|no|multiples of 1/16|yes|no|yes|no"),
    Feature("one dropout mask for a seed, whatever runs",
            yes("tests/test_philox.py::test_golden_mask",
                f"{CPU}::test_contract[dropout over many tiles-torch.float32]"),
            yes(f"{KERNEL}::test_contract[dropout over many tiles]",
                f"{KERNELS}/test_attention_crossing.py::test_forward_of_one_backward_of_the_other"
                "[lengths, sinks, dropout-triton]"),
            "?|no|no|?|?|no|?|no"),
    Feature("log-sum-exp returned",
            yes(f"{CPU}::test_contract[plain-torch.float32]"), yes(f"{KERNEL}::test_contract[plain]"),
            "yes|yes|yes|by an internal op|by an internal op|yes|yes|yes"),
    Feature("gradient through the log-sum-exp",
            yes(f"{CPU}::test_gradient_from_one_result_alone[plain-lse]"),
            yes(f"{KERNELS}/test_attention.py::test_error_rule[causal]"),
            "no|no|yes|no|no|yes, not by flash|no|no"),
    Feature("attention weights returned, with gradient",
            yes(f"{OPS}::test_weights_and_their_gradient[per head-causal]"),
            yes(f"{KERNELS}/test_attention_weights.py::test_error_rule[causal, grouped heads-each head]"),
            "no|no|no|no|no|no|no|no"),
    Feature("fully masked rows give 0 and no NaN", *contract("mask with empty rows"),
            "?|?|?|?|?|?|?|?"),
    Feature("backward gives the same bits on every run",
            yes(f"{OPS}::test_bitwise_deterministic"),
            yes(f"{KERNELS}/test_attention.py::test_repeats_bitwise",
                f"{KERNELS}/test_varlen.py::test_repeats_bitwise"),
            "if asked|if asked, not at 256|if asked|no|yes|without a bias gradient|by kind|no backward"),
    Feature("a sequence gives the same bits alone and in a batch",
            yes(f"{OPS}::test_a_batch_changes_nothing_bitwise"),
            yes(f"{KERNELS}/test_attention.py::test_a_sequence_alone_gives_the_same_bits_as_in_a_batch"),
            "?|?|?|?|?|?|?|?"),
    Feature("second derivatives",
            Cell("by the formula", (f"{DERIVATIVES}::test_gradgradcheck",)),
            Cell("by the formula", (f"{KERNELS}/test_attention_features.py::test_second_derivatives",)),
            "no|no|no|no|no|no|no|no"),
    Feature("forward-mode derivatives (jvp)",
            *both(f"{DERIVATIVES}::test_jvp_matches_the_reference", text="by the formula"),
            "no|no|no|no|no|no|no|no"),
    Feature("vmap",
            *both(f"{DERIVATIVES}::test_vmap_of_grad_matches_the_reference", text="by the formula"),
            "no|no|no|yes|forward|no|no|no"),
    Feature("torch.compile without breaks",
            yes(f"{COMPILED}::test_compile_without_breaks_or_recompiles_across_lengths"),
            yes(f"{KERNELS}/test_varlen.py::test_compiles_without_breaks"),
            "yes|yes|no|yes|yes|needed for speed|yes|in part"),
    Feature("CUDA graphs", Cell(NO),
            yes("tests/gpu/test_attention.py::test_a_call_is_a_cuda_graph[triton]",
                f"{KERNELS}/test_varlen.py::test_no_length_leaves_the_device", text="yes, on a GPU's test run"),
            "lengths are frozen|yes|yes|yes|yes|yes|yes|yes"),
    Feature("one compiled kernel for every length", Cell("not needed"),
            yes(f"{KERNELS}/test_specialisation.py::test_lengths_batches_and_heads_share_one_variant"),
            "?|?|?|?|?|?|?|?"),
    Feature("offsets beyond 32 bits", Cell("torch's own"),
            yes(f"{KERNELS}/test_attention_memory.py::test_offsets_beyond_32_bits[rows]"),
            "no|?|in part|?|?|not backward|?|?"),
    Feature("says what runs and why not the others",
            *both(f"{CHOICE}::test_explain_says_what_runs_and_why_not_the_others"),
            "no|no|no|warnings|warnings|no|yes|no"),
    Feature("CPU, with gradients", yes(f"{CPU}::test_contract[everything-torch.float32]"), Cell("tests only"),
            "no|no|no|no|torch has its own|forward|no|no"),
    Feature("AMD GPUs", Cell("not tested"),
            yes(f"{KERNELS}/test_compile.py::test_a_sample_still_compiles_as_recorded[amd]",
                text="compiles, not offered"),
            "by Triton and CK|by Triton|no|no|by AOTriton|yes|by CK|no"),
    Feature("Windows", Cell("not tested"), Cell("not tested"),
            "from source|by others|no|yes|yes|by others|yes|no"),
)  # fmt: skip


def cells(feature: Feature) -> list[str]:
    """The peers' cells."""
    return feature.peers.split("|")


def render() -> str:
    """The page."""
    columns = ["feature", "fastattn on torch", "fastattn on Triton", *PEERS]
    lines = [
        "# Features",
        "",
        "What fastattn's backends do, compared with other libraries. A cell of fastattn that claims something names "
        "its tests below; a test fails when one of them no longer exists. \"By the formula\" means that a "
        "differentiable formula of torch operations computes the call, which a warning says. With "
        "`backend=\"triton\"` or `\"cuda\"`, jvp and vmap are errors instead.",
        "",
        "The CUDA extension gets a column when its kernels have run on a GPU; until then its tests run them on a CPU "
        "(`tests/cuda_emulation`).",
        "",
        "The others were read in 2026: flash-attn 2.8.4, the `hopper/` folder of its repository (3), its CuTe "
        "kernels (4) on Hopper, `scaled_dot_product_attention` and FlexAttention of torch 2.11, xFormers 0.0.35 and "
        "FlashInfer of that time. \"User code\" and \"by modification\" mean a function that the caller writes; \"?\" "
        "means that it was not established.",
        "",
        f"| {' | '.join(columns)} |",
        "|" + "---|" * len(columns),
    ]  # fmt: skip
    for feature in FEATURES:
        lines.append(
            f"| {' | '.join([feature.name, feature.torch.text, feature.triton.text, *cells(feature)])} |"
        )
    lines += ["", "## The tests", "", "Run one with `pytest 'NAME'`.", ""]
    for feature in FEATURES:
        named = dict.fromkeys((*feature.torch.tests, *feature.triton.tests))
        if named:
            lines.append(f"- {feature.name}: " + "; ".join(f"`{test}`" for test in named))
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
