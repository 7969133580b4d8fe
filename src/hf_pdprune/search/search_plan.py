"""search_plan: from a dense model and a calibration to a pruning plan."""

import logging
import math
import os
import time
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import nn

from ..blocks import num_blocks
from ..data import pack_tokens
from ..plan import PruningPlan
from ..projected_blocks import check_projectable
from ..shortened_config import context_length
from ..spread_weights import input_device
from .baselines import contiguous_group, end_group, one_shot, random_blocks
from .block_statistics import BlockStatistics
from .calibration import Calibration
from .merged_pairs import MERGED_PAIRS_FILE_NAME, MergedPairs
from .objective import Objective
from .operations import Operations, removable_blocks, unprotected_blocks, with_removed
from .pareto_front import ParetoFront, ParetoPoint
from .removal_goal import RemovalGoal
from .search_config import SearchConfig
from .search_journal import SearchJournal
from .stepwise import Step, StepwiseSearch
from .targets import removal_goal
from .token_aware_blocks import TokenAwareBlocks


logger = logging.getLogger(__name__)

JOURNAL_FILE_NAME = "search_journal.jsonl"
KV_JOURNAL_FILE_NAME = "search_journal_kv.jsonl"


def search_plan(
    model: nn.Module,
    calibration: Calibration,
    statistics: BlockStatistics,
    config: SearchConfig,
    output_dir: str | os.PathLike | None = None,
    kv_calibration: Calibration | None = None,
    merge_text: Iterable[list[int]] | None = None,
) -> PruningPlan:
    """
    Finds what each stage can lose: blocks for prefill, blocks for decode as a superset, both jointly, and then the
    token-aware blocks.

    Args:
        model (`nn.Module`): The dense model. It may lie on several devices (`device_map`), or in partitions (ZeRO-3).
        calibration ([`Calibration`]): What plans are measured on.
        statistics ([`BlockStatistics`]): Redundancy of the blocks.
        config ([`SearchConfig`]): The options.
        output_dir (`str`, *optional*): Folder for `pruning_plan.json` and the search's journals. A search that was
            interrupted goes on from there.
        kv_calibration ([`Calibration`], *optional*): What token-aware blocks are measured on, a few long prompts.
            Default: `calibration`.
        merge_text (`Iterable[list[int]]`, *optional*): Rows of tokens that pairs are distilled on, needed with
            `merge_pairs`; not those of the calibration.

    Returns:
        [`PruningPlan`]: With `provenance` filled in.

    Raises:
        `ValueError`: If more is to be removed than there is, if the statistics are of another model, if the target
            for the KV entries, `max_kl` or both together cannot be met, or if no plan's logits are finite.
    """
    total = num_blocks(model.config)
    if (statistics.model_type, statistics.num_hidden_layers) != (model.config.model_type, total):
        raise ValueError(
            f"the block statistics are of {statistics.base_model} ({statistics.model_type}, "
            f"{statistics.num_hidden_layers} blocks), the model is {model.config.model_type} with {total}"
        )
    goal = removal_goal(model, config)
    # From here on the numbers of blocks are those that the targets come to, at most.
    asked = config
    config = replace(
        config,
        num_prefill_blocks=goal.num_prefill_blocks,
        num_decode_blocks=goal.num_decode_blocks,
        target_ttft_speedup=None,
        target_tpot_speedup=None,
        target_latency_speedup=None,
        prefill_latency_share=None,
    )
    config.check_model(total)
    needed = goal.fewest_blocks if config.max_kl is None else goal.required_blocks
    removable = removable_blocks(statistics, config, at_least=needed)
    if config.relaxed_subset_rule:
        check_projectable(model, removable)
    begun = time.perf_counter()
    needs_window = bool(config.num_token_aware_blocks) or config.target_kv_reduction is not None
    merged_pairs = _merged_pairs(model, merge_text, statistics, config, output_dir)
    objective = kv_objective = _objective(model, calibration, config, output_dir, JOURNAL_FILE_NAME, merged_pairs)
    costs = {"blocks": objective}
    if needs_window and kv_calibration is not None:
        kv_objective = _objective(model, kv_calibration, config, output_dir, KV_JOURNAL_FILE_NAME, merged_pairs)
        costs["token_aware_blocks"] = kv_objective
    operations = Operations(removable, merged_pairs.pairs, config.relaxed_subset_rule)
    if needs_window:
        # What cannot be met is found before anything is spent. With max_kl, and for a latency, up to num_decode_blocks
        # go: a target is out of reach where it is so without all of these, and a number of token-aware blocks where it
        # is so with them.
        up_to = config.max_kl is not None or goal.num_steps is None
        certain = not up_to or config.target_kv_reduction is not None
        lost = operations.blocks[: config.num_decode_blocks] if certain else ()
        TokenAwareBlocks(kv_objective, config).check(with_removed(objective.dense_plan, (), lost))

    plan, steps = _choose_blocks(objective, operations, config, goal, may_keep_all=needs_window)
    plans = _plans_to_try(objective, plan, steps, asked, goal)
    blocks = plan = plans[0]
    energies = {"dense": 0.0}
    if needs_window:
        if kv_objective is not objective:
            objective.forget()
        max_kl = math.inf if config.max_kl is None else config.max_kl
        blocks, plan = TokenAwareBlocks(kv_objective, config).choose_within(plans, objective, max_kl)
        every = replace(plan, kv=plan.kv.with_windows({}))
        energies["all_tokens"], energies["token_aware"] = kv_objective.energy(every), kv_objective.energy(plan)
    energies["blocks"], energies["result"] = objective.energy(blocks), objective.energy(plan)
    energies["start"] = next((step.greedy_energy for step in steps if step.plan == blocks), energies["blocks"])
    if math.isinf(max(energies["result"], energies.get("token_aware", 0.0))):
        raise ValueError(
            "the logits of every plan that was tried hold NaN or infinity on the calibration set (a dtype too narrow?)"
        )
    provenance = {
        "config": asdict(asked),
        "calibration": _describe(calibration),
        "kv_calibration": None if kv_calibration is None else _describe(kv_calibration),
        "removable_blocks": list(removable),
        # JSON has no infinity, which the greedy start of a search that ended well may have.
        "objective": {name: energy if math.isfinite(energy) else None for name, energy in energies.items()},
        "cost": {name: _describe_cost(spent) for name, spent in costs.items()},
        "seconds": round(time.perf_counter() - begun, 1),
    }
    if steps:
        provenance["cost"]["plain_greedy_block_tokens"] = steps[-1].plain_block_tokens
    if merged_pairs.pairs:
        provenance["cost"]["distilling_pairs_block_tokens"] = merged_pairs.block_tokens
    plan = replace(plan, base_model=statistics.base_model, provenance=provenance)
    if output_dir is not None and PartialState().is_main_process:
        dense = ParetoPoint(replace(objective.dense_plan, base_model=statistics.base_model), 0.0)
        points = [ParetoPoint(replace(step.plan, base_model=statistics.base_model), step.energy) for step in steps]
        if steps:
            ParetoFront([dense, *points]).save(output_dir)
        plan.save_pretrained(output_dir)
    PartialState().wait_for_everyone()  # who reads the plan finds it
    logger.info("plan: %s %s %s", plan.prefill, plan.decode, plan.kv)
    return plan


def _choose_blocks(
    objective: Objective, operations: Operations, config: SearchConfig, goal: RemovalGoal, may_keep_all: bool
) -> tuple[PruningPlan, list[Step]]:
    """
    The plan with its missing blocks, and the steps to it where the strategy goes block by block. That none can go is
    an error unless the plan may keep all.
    """
    simple = {
        "one_shot": one_shot,
        "random": random_blocks,
        "end_group": end_group,
        "contiguous": contiguous_group,
    }
    if config.strategy in simple:
        return simple[config.strategy](objective, operations.removable, config), []
    search = StepwiseSearch(objective, operations, config, annealing=config.strategy == "annealing")
    max_kl = math.inf if config.max_kl is None else config.max_kl
    steps = search.run(goal, max_kl)
    if not steps and search.refused and not may_keep_all:
        raise ValueError(
            f"max_kl {config.max_kl} cannot be met: the best plan with one block less has KL "
            f"{min(step.energy for step in search.refused):.4f}"
        )
    if config.max_kl is not None and not operations.blocks and not may_keep_all:
        raise ValueError(
            "no block may go: none that is not protected is at least as redundant as distillation_threshold "
            f"{config.distillation_threshold}"
        )
    return steps[-1].plan if steps else objective.dense_plan, steps


def _plans_to_try(
    objective: Objective, plan: PruningPlan, steps: list[Step], asked: SearchConfig, goal: RemovalGoal
) -> list[PruningPlan]:
    """
    The plan that was found, and with `max_kl` those with fewer blocks gone, for where token-aware blocks take KL above
    it. Only those are among them with which the stages are as fast as asked for.
    """
    plans = [plan]
    if asked.max_kl is not None and steps:
        plans += [*(step.plan for step in steps[-2::-1]), objective.dense_plan]
    fast_enough = [tried for tried in plans if goal.shortfall(tried) is None]
    if not fast_enough:
        lost = len(plan.prefill.skipped_blocks), len(plan.decode.missing_blocks)
        within = "" if asked.max_kl is None else f"within max_kl {asked.max_kl} "
        raise ValueError(
            f"{goal.shortfall(plan)}; {within}only {lost[0]} and {lost[1]} can go (KL {objective.energy(plan):.4f})"
        )
    return fast_enough


def _merged_pairs(
    model: nn.Module,
    merge_text: Iterable[list[int]] | None,
    statistics: BlockStatistics,
    config: SearchConfig,
    output_dir: str | os.PathLike | None,
) -> MergedPairs:
    """The pairs that may be merged, distilled now or by the search that is resumed."""
    if not config.merge_pairs:
        return MergedPairs()
    absorbed = [block for block in unprotected_blocks(statistics, config) if block > 0]
    if merge_text is None:
        raise ValueError("merge_pairs needs merge_text, which pairs are distilled on")
    input_ids = pack_tokens(merge_text, config.merge_tokens, context_length(model.config), input_device(model))
    if output_dir is not None and (Path(output_dir) / MERGED_PAIRS_FILE_NAME).is_file():
        pairs = MergedPairs.from_pretrained(output_dir, model)
        if pairs.source != MergedPairs.source_digest(model, input_ids, absorbed, config.merge_rank):
            raise ValueError(
                f"{Path(output_dir) / MERGED_PAIRS_FILE_NAME} holds pairs that were distilled from other text, or "
                "with another merge_tokens, merge_rank or number of protected blocks; remove it, or choose another "
                "output folder"
            )
        return pairs
    pairs = MergedPairs.distil(model, input_ids, absorbed, config.merge_rank)
    if output_dir is not None and PartialState().is_main_process:
        pairs.save_pretrained(output_dir)
    return pairs


def _objective(
    model: nn.Module,
    calibration: Calibration,
    config: SearchConfig,
    output_dir: str | os.PathLike | None,
    name: str,
    merged_pairs: MergedPairs,
) -> Objective:
    path = None if output_dir is None else Path(output_dir) / name
    cache_dtype = None if config.hidden_cache_dtype is None else getattr(torch, config.hidden_cache_dtype)
    subject = "-".join(filter(None, (calibration.round_digest, config.hidden_cache_dtype, merged_pairs.digest)))
    return Objective(
        model,
        calibration,
        int(config.hidden_cache_gb * 1e9),
        SearchJournal(path, subject),
        cache_dtype,
        merged_pairs,
    )


def _describe(calibration: Calibration) -> dict[str, Any]:
    return {
        "name": calibration.name,
        "digest": calibration.digest,
        "examples": calibration.num_examples,
        "prompt_tokens": calibration.num_prompt_tokens,
        "completion_tokens": calibration.num_completion_tokens,
    }


def _describe_cost(objective: Objective) -> dict[str, Any]:
    return {**asdict(objective.cost), "dense_forward_block_tokens": objective.dense_block_tokens}
