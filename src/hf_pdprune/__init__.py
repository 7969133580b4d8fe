from .inference import DecodeStage, PrefillStage
from .kv import KVPayload, PayloadError, TokenAwareCache
from .plan import PruningPlan
from .version import __version__


__all__ = [
    "DecodeStage",
    "KVPayload",
    "PayloadError",
    "PrefillStage",
    "PruningPlan",
    "TokenAwareCache",
    "__version__",
]
