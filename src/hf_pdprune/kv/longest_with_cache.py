"""longest_with_cache: the length up to which a model's `generate` goes on from the cache that it was given."""

import inspect

from torch import nn


_ORIGINAL = "original_max_position_embeddings"


def longest_with_cache(model: nn.Module) -> int | None:
    """
    Some models have other rotary frequencies for sequences that are longer than those of their first training (phi3,
    phimoe, phi4_multimodal: longrope). When a sequence becomes so long their `prepare_inputs_for_generation` leaves
    out the cache, so that all of it is read anew.

    Returns:
        `int` or `None`: Tokens up to which the cache is used; `None` where that is always.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    prepare = getattr(type(base), "prepare_inputs_for_generation", None)
    original, longest = (getattr(base.config, name, None) for name in (_ORIGINAL, "max_position_embeddings"))
    if original is None or longest is None or longest <= original:
        return None
    names = prepare.__code__.co_names if inspect.isfunction(prepare) else ()
    return original if _ORIGINAL in names else None


def check_keeps_cache(longest: int | None, tokens: int) -> None:
    """Raises a `ValueError` if a sequence of so many tokens is one for which the cache is left out."""
    if longest is not None and tokens > longest:
        raise ValueError(
            f"{tokens} tokens: beyond {longest} this model has other rotary frequencies, and its generate forgets the "
            f"cache, and with it what was selected. Keep prompt and answer within {longest} tokens"
        )
