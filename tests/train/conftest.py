"""A trainer on a tiny model that says nothing."""

from pathlib import Path

import pytest
from tiny_lm import make_data, make_model

from fastattn.train import TrainConfig, Trainer
from fastattn.train.progress import NoDisplay


@pytest.fixture
def make_trainer(tmp_path: Path):
    def make(*, model=None, train=None, dev=None, out="run", keywords=None, **options):
        defaults = {"max_steps": 20, "batch_size": 4, "lr": 1e-2, "warmup_steps": 3, "device": "cpu"}
        config = TrainConfig(output_dir=str(tmp_path / out), **{**defaults, **options})
        return Trainer(
            make_model() if model is None else model,
            config,
            make_data() if train is None else train,
            dev,
            **{"display": NoDisplay(), **(keywords or {})},
        )

    return make
