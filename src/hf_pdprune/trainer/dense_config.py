"""Keeps what the dense model's config says: exported stages have it from there."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


# Written by Trainer and SFTTrainer: no KV cache, and the load balancing of experts, which is no part of the loss here.
_WRITTEN = ("use_cache", "output_router_logits", "router_aux_loss_coef")


@contextmanager
def kept_config(model: nn.Module) -> Iterator[None]:
    """
    What a trainer's construction writes into a model's config is undone at the end of this context.

    Args:
        model (`nn.Module`): The dense model, with adapters or without.
    """
    configs = {id(config): config for config in (model.config, model.config.get_text_config())}.values()
    before = [
        (config, name, getattr(config, name)) for config in configs for name in _WRITTEN if hasattr(config, name)
    ]
    yield
    for config, name, value in before:
        setattr(config, name, value)
