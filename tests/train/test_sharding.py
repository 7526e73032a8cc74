"""Options of sharded training and its checkpoints in one process; test_distributed.py has several."""

import json

import pytest
import torch
from tiny_lm import make_blocks

from fastattn.train import ConfigError, TrainConfig


@pytest.mark.parametrize(
    ("option", "complaint"),
    [
        ({"optimizer": "muon"}, "optimizer: muon needs whole matrices, sharding=fsdp splits them"),
        ({"compile": True}, "compile: is not supported with sharding=fsdp"),
    ],
)
def test_options_that_need_a_whole_model_are_refused(option, complaint):
    TrainConfig(output_dir="out", max_steps=1, **option)
    with pytest.raises(ConfigError, match=complaint):
        TrainConfig(output_dir="out", max_steps=1, sharding="fsdp", **option)


def test_a_run_does_not_go_on_in_the_other_format(make_trainer):
    for before, after in (("ddp", "fsdp"), ("fsdp", "ddp")):
        make_trainer(model=make_blocks(), out=before, max_steps=2, sharding=before).fit()
        with pytest.raises(
            ConfigError, match=f"sharding: .* was trained with {before}, this run has {after}"
        ):
            make_trainer(model=make_blocks(), out=before, max_steps=4, sharding=after, resume="auto").fit()


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_at_another_number_of_processes_a_step_needs_the_same_rows(make_trainer, sharding):
    """The checkpoint of a run alone, marked as one of two processes with half the rows each."""

    def trainer(**options):
        return make_trainer(model=make_blocks(dropout=0.0), sharding=sharding, resume="auto", **options)

    checkpoint = make_trainer(model=make_blocks(dropout=0.0), max_steps=2, sharding=sharding).fit().checkpoint
    saved = json.loads((checkpoint / "trainer_state.json").read_text())
    saved["world_size"], saved["config"]["batch_size"] = 2, 2
    (checkpoint / "trainer_state.json").write_text(json.dumps(saved))
    generators = torch.load(checkpoint / "generators.pt", weights_only=True)
    torch.save(generators * 2, checkpoint / "generators.pt")
    del saved["files"]
    (checkpoint / "trainer_state.json").write_text(json.dumps(saved))
    with pytest.raises(ConfigError, match=r"batch_size: .* with 4 rows in a step .*, this run has 2"):
        trainer(max_steps=4, batch_size=2).fit()
    result = trainer(max_steps=4, batch_size=2, accumulate=2).fit()
    assert result.steps == 4
    warned = [record["text"] for record in result.log if record["event"] == "warning"]
    assert len(warned) == 2
    assert "max_steps: " in warned[0]
    assert "2 process(es), this run has 1" in warned[1]
