"""The dense model of a recipe and its tokenizer, and the check that it is the one that a pair was made from."""

import os
from collections.abc import Sequence
from typing import Any

from accelerate import PartialState
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..hub.dense_fingerprint import dense_fingerprint
from ..hub.load_stages import stage_locations


def load_dense_model(
    name: str, pairs: Sequence[str | os.PathLike] = (), dtype: str = "auto", **model_kwargs: Any
) -> PreTrainedModel:
    """
    The dense model in eval mode, on this process's device.

    Args:
        name (`str`): Repo id or folder.
        pairs (`Sequence[str]`, *optional*): Pairs or plans that it has to be the dense model of.
        dtype (`str`, defaults to `"auto"`): `auto` is the checkpoint's on an accelerator, and float32 on a CPU (where
            bfloat16 can be 30 times slower).
        model_kwargs: For `AutoModelForCausalLM.from_pretrained` (`revision`, `attn_implementation`, ...).

    Raises:
        `ValueError`: If there is no such model, or it is not the dense model of a pair.
    """
    device = PartialState().device
    if dtype == "auto" and device.type == "cpu":
        dtype = "float32"
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, use_safetensors=True, **model_kwargs)
    except OSError as error:
        raise ValueError(f"no dense model {name!r}: {str(error).splitlines()[0]}") from error
    for pair in pairs:
        check_dense_model(model, name, pair)
    return model.to(device).eval()


def load_tokenizer(name: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, with a padding token; a `ValueError` where there is none."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
    except OSError as error:
        raise ValueError(f"no model {name!r}: {str(error).splitlines()[0]}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_dense_model(model: nn.Module, name: str, source: str | os.PathLike, **hub_kwargs: Any) -> None:
    """
    Raises a `ValueError` where a pair was made from another dense model. What does not say from which one (a plan
    alone, a pair of an older version, or of quantised weights) is accepted.

    Args:
        model (`nn.Module`): The model that is taken for the pair's dense model.
        name (`str`): What it is called.
        source (`str`): Folder or repo id of the pair, or of a plan.
        hub_kwargs: `revision`, `token`, `cache_dir` and so on.
    """
    try:
        plan, locations = stage_locations(source, **hub_kwargs)
    except FileNotFoundError:  # a plan alone
        return
    recorded = set()
    for location in locations.values():
        config = AutoConfig.from_pretrained(
            location.path, subfolder=location.subfolder, trust_remote_code=False, **hub_kwargs
        )
        if getattr(config, "pdprune", None) is not None:
            recorded.add(plan.entry_of(config).get("dense_fingerprint"))
    recorded.discard(None)
    own = dense_fingerprint(model) if recorded else None
    if own is not None and own not in recorded:
        where = os.path.abspath(name) if os.path.isdir(name) else name
        raise ValueError(
            f"{where} is not the dense model of {source}: its weights differ from those of {plan.base_model} that the "
            "stages were made from"
        )
