"""Fingerprints: whether two stages come from the same dense model and distillation, and which dense model that is."""

import hashlib
import json
from collections.abc import Iterable, Mapping

import torch
from accelerate.utils import align_module_device
from torch import nn

from .plan import PruningPlan
from .shortened_config import text_config_of


_SAMPLED_ROWS = 64
_SAMPLED_SIGNS = 1024  # of each weight
_SHAPE_ENTRIES = (
    "model_type",
    "hidden_size",
    "vocab_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)


def model_fingerprint(model: nn.Module) -> str:
    """
    Hex digest by which a payload and the stage that receives it recognise each other.

    A stage checkpoint carries the digest of its export, which both stages of a pair share. For a dense model it is
    computed: from the shape of its KV entries and from a sample of its embedding weights.
    """
    config = model.config
    if getattr(config, "pdprune", None) is not None:
        return PruningPlan.entry_of(config)["fingerprint"]
    text_config = text_config_of(config)
    entries = text_config.to_dict()  # as attributes, those that differ from block to block raise
    shape = {name: entries.get(text_config.attribute_map.get(name, name)) for name in _SHAPE_ENTRIES}
    digest = hashlib.sha256(json.dumps(shape, sort_keys=True).encode())
    embeddings = model.get_input_embeddings()
    with align_module_device(embeddings):  # accelerate may have offloaded them
        weight = embeddings.weight.detach()
        rows = torch.linspace(0, weight.shape[0] - 1, min(_SAMPLED_ROWS, weight.shape[0])).long()
        digest.update(weight[rows.to(weight.device)].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:32]


def combined_fingerprint(dense: str, tensors: Mapping[str, torch.Tensor]) -> str:
    """The digest of a pair: of its dense model's and of a sample of what its distillation has learned."""
    digest = hashlib.sha256(dense.encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].detach().flatten()[:_SAMPLED_ROWS].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:32]


def weights_fingerprint(tensors: Iterable[torch.Tensor]) -> str:
    """
    The digest of some weights, whatever they are called, by the signs of a sample of each: signs are the same in every
    dtype that a model can be loaded in, and some of them change with the least training.
    """
    digests = set()  # tied weights count once, as not every model lists them twice
    for tensor in tensors:
        if tensor.is_floating_point():
            flat = tensor.detach().flatten()
            places = torch.linspace(0, flat.numel() - 1, min(_SAMPLED_SIGNS, flat.numel()), dtype=torch.float64).long()
            signs = torch.signbit(flat[places.to(flat.device)]).cpu().numpy().tobytes()
            digests.add(hashlib.sha256(f"{tuple(tensor.shape)}".encode() + signs).hexdigest())
    return hashlib.sha256("".join(sorted(digests)).encode()).hexdigest()[:32]
