"""Targets: what the options of a search come to for a model."""

from torch import nn

from ..blocks import get_blocks
from ..spread_weights import num_parameters
from .block_sizes import fewest_blocks, head_size, idle_sizes
from .latency_goal import LatencyGoal
from .removal_goal import BlockCounts, RemovalGoal
from .search_config import SearchConfig


def removal_goal(model: nn.Module, config: SearchConfig) -> RemovalGoal:
    """
    How far the stages are shortened: as many blocks as `config` says, or the fewest with which its targets for the
    stages are met, or a [`LatencyGoal`]. Prefill's time goes by the parameters of its blocks, that of a decode step by
    those of blocks and LM head, which are read for every token. Under the relaxed subset rule any block that prefill
    loses may be a projected one, of which a part still runs: its target is met even if all are.

    Args:
        model (`nn.Module`): The dense model.
        config ([`SearchConfig`]): Numbers, targets, or `max_kl` alone, with which all unprotected blocks may go.

    Returns:
        [`RemovalGoal`]: The goal.

    Raises:
        `ValueError`: If a target cannot be met, or if decode would lose fewer blocks than prefill.
    """
    protected = config.num_protected_first_blocks + config.num_protected_last_blocks
    relaxed = config.relaxed_subset_rule
    if config.target_latency_speedup is not None:
        return LatencyGoal(model, config.target_latency_speedup, config.prefill_latency_share, relaxed, protected)
    sizes = [num_parameters(block) for block in get_blocks(model)]
    can_go = min(max(len(sizes) - protected, 0), len(sizes) - 1)  # one has to stay
    prefill, decode = config.num_prefill_blocks, config.num_decode_blocks
    if config.target_ttft_speedup is not None:
        block = sum(idle_sizes(model) if relaxed else sizes) / len(sizes)
        prefill = fewest_blocks("target_ttft_speedup", config.target_ttft_speedup, sum(sizes), block, can_go)
    if config.target_tpot_speedup is not None:
        total, block = sum(sizes) + head_size(model), sum(sizes) / len(sizes)
        decode = fewest_blocks("target_tpot_speedup", config.target_tpot_speedup, total, block, can_go)
    if config.max_kl is not None and not prefill and not decode:
        return BlockCounts(can_go, can_go, relaxed)
    if not relaxed and config.target_ttft_speedup is not None:
        decode = max(prefill, decode)
    if not relaxed and decode < prefill:
        raise ValueError(
            f"target_tpot_speedup {config.target_tpot_speedup} takes {decode} blocks from decode, but "
            f"num_prefill_blocks is {prefill}: blocks missing in prefill are missing in decode too"
        )
    least = (
        prefill if config.target_ttft_speedup is not None else 0,
        decode if config.target_tpot_speedup is not None else 0,
    )
    return BlockCounts(prefill, decode, relaxed, least)
