"""ONNX programs of models on fastattn give what the models give."""

import io
from typing import Any

import numpy as np
import pytest
import torch
from export_cases import assert_as_exact, encoder, padded
from torch import Tensor, nn

import fastattn
from numerics import assert_within_rule


def onnx_runtime() -> Any:
    if torch.__version__.startswith("2.9."):
        pytest.skip("torch 2.9 exports no model of dynamic batch and length to ONNX")
    for name in ("onnx", "onnxscript"):
        pytest.importorskip(name)
    return pytest.importorskip("onnxruntime")


def run_onnx(program: Any, *inputs: Tensor) -> list[np.ndarray]:
    stored = io.BytesIO()
    program.save(stored)
    session = onnx_runtime().InferenceSession(stored.getvalue(), providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    return session.run(None, {name: tensor.numpy() for name, tensor in zip(names, inputs)})


@pytest.mark.filterwarnings("ignore")
def test_onnx_of_a_swapped_encoder() -> None:
    onnx_runtime()
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    program = torch.onnx.export(
        encoder(), padded(2, 7), dynamic_shapes=({0: batch, 1: length},) * 2, dynamo=True, verbose=False
    )
    for sizes in ((2, 7), (4, 11)):
        assert_as_exact(run_onnx(program, *padded(*sizes))[0], *sizes)


@pytest.mark.filterwarnings("ignore")
def test_onnx_of_a_swapped_bert() -> None:
    onnx_runtime()
    pytest.importorskip("transformers")
    from transformers import BertConfig, BertModel

    def bert(dtype: torch.dtype, implementation: str = "eager") -> nn.Module:
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        return (
            BertModel(BertConfig(vocab_size=50, **sizes, attn_implementation=implementation)).eval().to(dtype)
        )

    def inputs(batch: int, length: int) -> tuple[Tensor, Tensor]:
        mask = (~padded(batch, length)[1]).long()
        return torch.arange(batch * length).view(batch, length) % 50, mask

    swapped = bert(torch.float32)
    assert fastattn.swap_attention(swapped).swapped
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    program = torch.onnx.export(
        swapped, inputs(2, 7), input_names=["input_ids", "attention_mask"], dynamo=True, verbose=False,
        dynamic_shapes={"input_ids": {0: batch, 1: length}, "attention_mask": {0: batch, 1: length}},
    )  # fmt: skip
    for sizes in ((2, 7), (4, 11)):
        given = inputs(*sizes)
        hidden, pooled = run_onnx(program, *given)
        with torch.no_grad():
            plain, golden = (bert(dtype)(*given) for dtype in (torch.float32, torch.float64))
        assert_within_rule(torch.tensor(hidden), plain.last_hidden_state, golden.last_hidden_state)
        assert_within_rule(torch.tensor(pooled), plain.pooler_output, golden.pooler_output)
