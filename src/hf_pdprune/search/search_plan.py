"""search_plan: from a dense model and a calibration to a pruning plan."""

import logging
import os
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from torch import nn

from ..blocks import num_blocks
from ..plan import PruningPlan
from .annealing import AnnealingSearch
from .baselines import contiguous_group, end_group, greedy, greedy_decode, greedy_prefill, one_shot, random_blocks
from .block_statistics import BlockStatistics
from .calibration import Calibration
from .moves import Moves, removable_blocks
from .objective import Objective
from .search_config import SearchConfig
from .search_journal import SearchJournal
from .token_aware_blocks import TokenAwareBlocks


logger = logging.getLogger(__name__)

JOURNAL_FILE_NAME = "search_journal.jsonl"
KV_JOURNAL_FILE_NAME = "search_journal_kv.jsonl"
# Of annealing's budget; the rest goes to both stages jointly.
_PREFILL_SHARE = 0.5


def search_plan(
    model: nn.Module,
    calibration: Calibration,
    statistics: BlockStatistics,
    config: SearchConfig,
    output_dir: str | os.PathLike | None = None,
    kv_calibration: Calibration | None = None,
) -> PruningPlan:
    """
    Finds what each stage can lose: blocks for prefill, blocks for decode as a superset, both jointly, and then the
    token-aware blocks.

    Args:
        model (`nn.Module`): The dense model.
        calibration ([`Calibration`]): What plans are measured on.
        statistics ([`BlockStatistics`]): Redundancy of the blocks.
        config ([`SearchConfig`]): The options.
        output_dir (`str`, *optional*): Folder for `pruning_plan.json` and the search's journals. A search that was
            interrupted goes on from there.
        kv_calibration ([`Calibration`], *optional*): What token-aware blocks are measured on, a few long prompts.
            Default: `calibration`.

    Returns:
        [`PruningPlan`]: With `provenance` filled in.

    Raises:
        `ValueError`: If more is to be removed than there is, if the statistics are of another model, or if the
        target for the KV entries cannot be met.
    """
    total = num_blocks(model.config)
    if (statistics.model_type, statistics.num_hidden_layers) != (model.config.model_type, total):
        raise ValueError(
            f"the block statistics are of {statistics.base_model} ({statistics.model_type}, "
            f"{statistics.num_hidden_layers} blocks), the model is {model.config.model_type} with {total}"
        )
    config.check_model(total)
    removable = removable_blocks(statistics, config)
    begun = time.perf_counter()
    objective = _objective(model, calibration, config, output_dir, JOURNAL_FILE_NAME)
    # What cannot be met is found before anything is spent: which blocks are removed changes nothing about it.
    needs_window = bool(config.num_token_aware_blocks) or config.target_kv_reduction is not None
    if needs_window:
        selection = TokenAwareBlocks(objective, config)
        example = one_shot(objective, removable, config)
        selection.count(example, selection.candidates(example))

    plan, start_energy = _choose_blocks(objective, removable, config)
    energies = {"dense": 0.0, "start": start_energy, "blocks": objective.energy(plan)}
    costs = {"blocks": objective}
    if needs_window:
        if kv_calibration is not None:
            objective.forget()
            costs["token_aware_blocks"] = _objective(model, kv_calibration, config, output_dir, KV_JOURNAL_FILE_NAME)
        kv_objective = costs.get("token_aware_blocks", objective)
        plan = TokenAwareBlocks(kv_objective, config).choose(plan)
        every = replace(plan, kv=replace(plan.kv, token_aware_blocks=()))
        energies["all_tokens"], energies["token_aware"] = kv_objective.energy(every), kv_objective.energy(plan)
    energies["result"] = objective.energy(plan)
    provenance = {
        "config": asdict(config),
        "calibration": _describe(calibration),
        "kv_calibration": None if kv_calibration is None else _describe(kv_calibration),
        "removable_blocks": list(removable),
        "objective": energies,
        "cost": {name: _describe_cost(spent) for name, spent in costs.items()},
        "seconds": round(time.perf_counter() - begun, 1),
    }
    plan = replace(plan, base_model=statistics.base_model, provenance=provenance)
    if output_dir is not None and PartialState().is_main_process:
        plan.save_pretrained(output_dir)
    logger.info("plan: %s %s %s", plan.prefill, plan.decode, plan.kv)
    return plan


def _choose_blocks(
    objective: Objective, removable: tuple[int, ...], config: SearchConfig
) -> tuple[PruningPlan, float]:
    """The plan with its removed blocks, and the energy of where the search started."""
    simple = {
        "one_shot": one_shot,
        "random": random_blocks,
        "end_group": end_group,
        "contiguous": contiguous_group,
        "greedy": greedy,
    }
    if config.strategy in simple:
        plan = simple[config.strategy](objective, removable, config)
        return plan, objective.energy(plan)

    def budget() -> int:
        """Block forwards x tokens that annealing may spend in all, as far as it is known by now."""
        dense_forwards = config.annealing_budget
        return greedy_cost if dense_forwards is None else round(dense_forwards * objective.dense_block_tokens)

    def anneal(start: PruningPlan, name: str, budget: int) -> PruningPlan:
        temperatures = config.initial_temperature, config.final_temperature
        search = AnnealingSearch(objective, Moves(removable), f"{config.search_seed} {name}", *temperatures, name)
        return search.run(start, budget)

    cost, annealing_cost = objective.cost, 0
    plan = greedy_prefill(objective, removable, config)
    greedy_cost = cost.block_tokens
    if 0 < config.num_prefill_blocks < config.num_decode_blocks:
        plan = anneal(plan, "Annealing, prefill", round(_PREFILL_SHARE * budget()))
        annealing_cost = cost.block_tokens - greedy_cost
    plan = greedy_decode(objective, removable, config, plan)
    start, greedy_cost = objective.energy(plan), cost.block_tokens - annealing_cost
    if config.num_decode_blocks:
        plan = anneal(plan, "Annealing, both stages", budget() - annealing_cost)
    return plan, start


def _objective(
    model: nn.Module, calibration: Calibration, config: SearchConfig, output_dir: str | os.PathLike | None, name: str
) -> Objective:
    path = None if output_dir is None else Path(output_dir) / name
    journal = SearchJournal(path, calibration.digest, write=PartialState().is_main_process)
    return Objective(model, calibration, int(config.hidden_cache_gb * 1e9), journal)


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
