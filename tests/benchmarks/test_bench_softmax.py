"""The bench of softmax and the losses runs every case in its small form and its contestants agree."""

import bench_softmax
import pytest
import schema
import torch

CPU = torch.device("cpu")
CASES = [*bench_softmax.cpu_cases(), *bench_softmax.gpu_cases()]


@pytest.mark.parametrize(
    "case", {(c.group, c.causal, c.dtype, c.direction): c for c in CASES}.values(), ids=str
)
def test_contestants_compute_the_same(case):
    workload = case.small().open(CPU)
    ours, theirs = (workload.step(contestant)() for contestant in case.contestants(CPU))
    assert len(ours) == (1 if case.direction == "forward" else 3 if case.width else 2)
    tolerance = 4 * torch.finfo(case.dtype).eps
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=tolerance, atol=tolerance)
    judgement = workload.judge("fastattn")
    for name, golden in judgement.golden.items():
        torch.testing.assert_close(judgement.part(name, ours[name]).double(), golden, rtol=0.03, atol=0.03)


def test_a_linear_loss_counts_three_products_with_its_gradients():
    case = bench_softmax.cpu_cases()[0]
    assert case.flops == 3 * 2 * 1024 * 32768 * 256


def test_the_command_stores_a_result(tmp_path, capsys):
    path = tmp_path / "softmax.json"
    assert bench_softmax.main(["--quick", "--only", "softmax-512", "--json", str(path)]) == 0
    (case,) = schema.load(path)["cases"]
    assert [row["status"] for row in case["rows"]] == ["ok"] * 2
    assert "softmax-512" in capsys.readouterr().out
