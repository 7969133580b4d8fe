"""dense_fingerprint: what an export records of the dense model, so that another one is not taken for it."""

from torch import nn

from ..adapters import MergedWeights, is_quantized
from ..fingerprint import weights_fingerprint


def dense_fingerprint(model: nn.Module) -> str | None:
    """
    The fingerprint of a dense model's own weights, whatever adapters it has and whatever dtype it was loaded in.
    `None` where they are quantised: unlike the checkpoint's.

    Args:
        model (`nn.Module`): The dense model, wrapped by peft or not.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if hasattr(base.config, "quantization_config") or any(map(is_quantized, base.modules())):
        return None
    return weights_fingerprint(MergedWeights(model, None).values())
