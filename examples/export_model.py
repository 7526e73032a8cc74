"""Export a swapped model with torch.export and to ONNX: torch's own operations, any length, no fastattn needed."""

import tempfile
from pathlib import Path

import onnxruntime
import torch

import fastattn

torch.manual_seed(0)
model = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(32, 4, batch_first=True), 1).eval()
fastattn.swap_attention(model)
x = torch.randn(2, 10, 32)
length = torch.export.Dim("length", min=2, max=64)
shapes = {"src": {1: length}}

program = torch.export.export(model, (x,), dynamic_shapes=shapes)
operations = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
assert not any("fastattn" in name for name in operations)
longer = torch.randn(2, 17, 32)
torch.testing.assert_close(program.module()(longer), model(longer))
print("torch.export keeps", ", ".join(sorted(name for name in operations if "attention" in name)))

with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "encoder.onnx"
    torch.onnx.export(program, (x,), path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: longer.numpy()})
torch.testing.assert_close(torch.from_numpy(found), model(longer), rtol=1e-4, atol=1e-5)
print("ONNX Runtime agrees at length", longer.shape[1])
