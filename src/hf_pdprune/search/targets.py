"""Targets: how many blocks each stage has to lose for a speedup."""

from torch import nn

from ..blocks import get_blocks
from ..projected_blocks import idle_layers
from ..spread_weights import num_parameters
from .search_config import SearchConfig


def num_blocks_to_remove(model: nn.Module, config: SearchConfig) -> tuple[int, int]:
    """
    How many blocks prefill and decode lose: as many as `config` says, or the fewest with which its targets are met.
    Prefill's time goes by the parameters of its blocks, that of a decode step by those of blocks and LM head, which
    are read for every token. Under the relaxed subset rule any block that prefill loses may be a projected one, of
    which a part still runs: the target is met even if all are.

    Args:
        model (`nn.Module`): The dense model.
        config ([`SearchConfig`]): Numbers, targets, or `max_kl` alone, with which all unprotected blocks may go.

    Returns:
        Blocks of prefill, and of decode.

    Raises:
        `ValueError`: If a target cannot be met, or if decode would lose fewer blocks than prefill.
    """
    sizes = [num_parameters(block) for block in get_blocks(model)]
    head = model.get_output_embeddings()
    head = 0 if head is None else num_parameters(head)
    most = max(len(sizes) - config.num_protected_first_blocks - config.num_protected_last_blocks, 0)
    prefill, decode = config.num_prefill_blocks, config.num_decode_blocks
    if config.target_ttft_speedup is not None:
        lost = _idle_sizes(model) if config.relaxed_subset_rule else sizes
        prefill = _fewest("target_ttft_speedup", config.target_ttft_speedup, sum(sizes), lost, most)
    if config.target_tpot_speedup is not None:
        decode = _fewest("target_tpot_speedup", config.target_tpot_speedup, sum(sizes) + head, sizes, most)
    if config.max_kl is not None and not prefill and not decode:
        return most, most
    if config.relaxed_subset_rule:
        return prefill, decode
    if config.target_ttft_speedup is not None:
        decode = max(prefill, decode)
    if decode < prefill:
        raise ValueError(
            f"target_tpot_speedup {config.target_tpot_speedup} takes {decode} blocks from decode, but "
            f"num_prefill_blocks is {prefill}: blocks missing in prefill are missing in decode too"
        )
    return prefill, decode


def _fewest(name: str, speedup: float, total: int, lost: list[int], most: int) -> int:
    """The fewest blocks without which a stage is `speedup` times faster, where a block is worth the mean of `lost`."""
    block = sum(lost) / len(lost)
    most = min(most, len(lost) - 1)
    for count in range(most + 1):
        if total / (total - count * block) >= speedup:
            return count
    raise ValueError(
        f"{name} {speedup} cannot be met: without all {most} blocks that are not protected it is "
        f"{total / (total - most * block):.2f}"
    )


def _idle_sizes(model: nn.Module) -> list[int]:
    """By block, the parameters that are left out where it is projected."""
    sizes = []
    for number, block in enumerate(get_blocks(model)):
        idle = [block.get_submodule(name) for name in idle_layers(model, number)]
        sizes.append(sum(map(num_parameters, idle)))
    return sizes
