"""Training: a loop for any module whose forward returns an object with a loss, and its configuration."""

from fastattn.train.config import TrainConfig
from fastattn.train.loss_curve import plot_loss
from fastattn.train.sections import ConfigError, load_config, save_config
from fastattn.train.state import FitResult
from fastattn.train.trainer import Trainer
from fastattn.train.updates import TrainingDiverged

__all__ = [
    "ConfigError",
    "FitResult",
    "TrainConfig",
    "Trainer",
    "TrainingDiverged",
    "load_config",
    "plot_loss",
    "save_config",
]
