"""The bench of whole models runs every case in its small form and its contestants agree."""

import bench_gpt
import pytest
import schema
import torch

CPU = torch.device("cpu")


@pytest.mark.parametrize("case", bench_gpt.cases_for(CPU), ids=lambda case: case.name)
def test_contestants_compute_the_same(case):
    pytest.importorskip("transformers")
    workload = case.small().open(CPU)
    results = [workload.step(contestant)() for contestant in case.contestants(CPU)]
    for other in results[1:]:
        for name, tensor in results[0].items():
            torch.testing.assert_close(tensor, other[name], rtol=1e-4, atol=0)
    judgement = workload.judge("fastattn")
    assert (judgement is None) == (case.group == "generate")
    if judgement is not None:
        torch.testing.assert_close(results[0]["loss"].double(), judgement.golden["loss"], rtol=1e-5, atol=0)


def test_a_training_step_leaves_gradients():
    pytest.importorskip("transformers")
    case = next(case for case in bench_gpt.cases_for(CPU) if case.group == "train").small()
    workload = case.open(CPU)
    workload.step("fastattn")()
    assert all(parameter.grad is not None for parameter in workload.model.parameters())


def test_the_command_stores_a_result(tmp_path, capsys):
    pytest.importorskip("transformers")
    path = tmp_path / "gpt.json"
    assert bench_gpt.main(["--quick", "--only", "generate-1x32", "--json", str(path)]) == 0
    (case,) = schema.load(path)["cases"]
    assert [row["status"] for row in case["rows"]] == ["ok"] * 3
    assert "generate-1x32" in capsys.readouterr().out
