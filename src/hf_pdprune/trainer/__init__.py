from .callbacks import BlockRemovalCallback
from .losses import (
    distillation_loss,
    forward_kl,
    jensen_shannon,
    mean_over_labels,
    reverse_kl,
    skewed_forward_kl,
    skewed_reverse_kl,
)
from .pdprune_config import PDPruneConfig
from .pdprune_trainer import PDPruneTrainer
from .residual_fit import ResidualFit
from .training_checkpoint import DivergenceError, last_complete_checkpoint


__all__ = [
    "BlockRemovalCallback",
    "DivergenceError",
    "PDPruneConfig",
    "PDPruneTrainer",
    "ResidualFit",
    "distillation_loss",
    "forward_kl",
    "jensen_shannon",
    "last_complete_checkpoint",
    "mean_over_labels",
    "reverse_kl",
    "skewed_forward_kl",
    "skewed_reverse_kl",
]
