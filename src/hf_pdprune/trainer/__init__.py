from .callbacks import BlockRemovalCallback
from .losses import forward_kl, mean_over_labels, reverse_kl
from .pdprune_config import PDPruneConfig
from .pdprune_trainer import PDPruneTrainer
from .residual_fit import ResidualFit


__all__ = [
    "BlockRemovalCallback",
    "PDPruneConfig",
    "PDPruneTrainer",
    "ResidualFit",
    "forward_kl",
    "mean_over_labels",
    "reverse_kl",
]
