from .plan import PruningPlan
from .version import __version__


__all__ = ["PruningPlan", "__version__"]
