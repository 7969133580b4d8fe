"""BlockWindows: how many of the prompt's tokens each block hands over, where that differs from block to block."""

import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace

from accelerate import PartialState
from tqdm.auto import tqdm

from ..plan import KVPlan, PruningPlan
from .annealing import AnnealingSearch
from .objective import Objective
from .search_config import SearchConfig


logger = logging.getLogger(__name__)

# Calibration prompts shorter than this part of `kv_prompt_tokens` favour long windows.
_LEAST_PART_OF_PROMPT = 0.75
# First and last prompt tokens; `None` for all of them.
Window = tuple[int, int] | None
# Share of moves that exchange the windows of two blocks; others give to one block and take from others.
_EXCHANGE_SHARE = 0.5


class BlockWindows:
    """
    Divides what may cross the wire among the blocks: each gets one of a few windows, or all tokens. The KL that every
    window causes is measured for every block alone, tokens are given to those where they take most of it away (the
    greedy solution of a multiple-choice knapsack problem, Sinha and Zoltners 1979), and the whole is then annealed
    jointly. Prefill is never run again.

    Windows of more than half of the objective's longest prompt are left out (but for the plan's own): on these prompts
    they would drop less than they do on longer ones, and look too good.

    Args:
        objective ([`Objective`]): On prompts that are longer than the windows.
        config ([`SearchConfig`]): Window and factors, choice of tokens, prompt length.
        candidates (`Sequence[int]`): Blocks whose cache can be shortened.
    """

    def __init__(self, objective: Objective, config: SearchConfig, candidates: Sequence[int]):
        self.objective = objective
        self.config = config
        self.candidates = tuple(candidates)
        kv = KVPlan((), config.first_tokens, config.last_tokens, config.token_choice)
        longest = objective.calibration.longest_prompt
        # The first token stays: much of the attention rests on it (attention sinks, arXiv 2309.17453).
        windows = {
            (max(round(factor * kv.first_tokens), min(kv.first_tokens, 1)), max(round(factor * kv.last_tokens), 1))
            for factor in config.window_factors
        }
        fitting = {
            window
            for window in windows
            if kv.observed_tokens <= sum(window) < config.kv_prompt_tokens
            and (2 * sum(window) <= longest or window == (kv.first_tokens, kv.last_tokens))
        }
        if longest < _LEAST_PART_OF_PROMPT * config.kv_prompt_tokens:
            logger.warning(
                "windows are chosen on prompts of %d tokens for prompts of %d, on which long windows drop more; use "
                "longer calibration prompts",
                longest,
                config.kv_prompt_tokens,
            )
        self.kv = kv
        # From the smallest one to all tokens, with the tokens that each hands over.
        self.sizes: dict[Window, int] = {window: sum(window) for window in sorted(fitting, key=sum)}
        self.sizes[None] = config.kv_prompt_tokens

    def with_windows(self, plan: PruningPlan, windows: Mapping[int, Window]) -> PruningPlan:
        """`plan` with these windows."""
        shortened = {block: window for block, window in windows.items() if window is not None}
        return replace(plan, kv=self.kv.with_windows(shortened))

    def least(self, plan: PruningPlan) -> PruningPlan:
        """`plan` with the smallest window everywhere: the most that bytes can be reduced."""
        return self.with_windows(plan, dict.fromkeys(self.candidates, next(iter(self.sizes))))

    def choose(self, plan: PruningPlan, budget: int) -> PruningPlan:
        """
        `plan` with its windows.

        Args:
            plan ([`PruningPlan`]): The blocks of each stage.
            budget (`int`): Tokens that the candidates may hand over of a prompt of `kv_prompt_tokens`.
        """
        objective, spent = self.objective, self.objective.cost.total
        costs = self._costs(self.with_windows(plan, {}))
        chosen = self.with_windows(plan, allocate(costs, self.sizes, budget))
        if not self.config.refine_token_aware_blocks:
            return chosen
        search = AnnealingSearch(
            objective,
            lambda current, rng: self._move(current, budget, rng),
            f"{self.config.search_seed} windows",
            self.config.initial_temperature,
            self.config.final_temperature,
            "Annealing, windows of blocks",
        )
        return search.run(chosen, objective.cost.total - spent)

    def _costs(self, plan: PruningPlan) -> dict[int, dict[Window, float]]:
        """KL of each window for each block alone."""
        windows = [window for window in self.sizes if window is not None]
        self.objective.accept(plan)
        costs: dict[int, dict[Window, float]] = {}
        disable = not PartialState().is_main_process
        for block in tqdm(self.candidates, desc="Windows, block by block", unit="block", disable=disable):
            energies = {window: self.objective.energy(self.with_windows(plan, {block: window})) for window in windows}
            costs[block] = energies | {None: self.objective.energy(plan)}
        return costs

    def _move(self, plan: PruningPlan, budget: int, rng: random.Random) -> PruningPlan:
        """A neighbour within the budget; `plan` itself where the draw gives none."""
        levels, sizes = list(self.sizes), self.sizes
        there = {block: plan.kv.windows.get(block) for block in self.candidates}
        place = {block: levels.index(window) for block, window in there.items()}
        first, second = rng.sample(self.candidates, 2) if len(self.candidates) > 1 else self.candidates * 2
        if rng.random() < _EXCHANGE_SHARE:
            place[first], place[second] = place[second], place[first]
        elif place[first] < len(levels) - 1:
            place[first] += 1
            others = [block for block in self.candidates if block != first]
            rng.shuffle(others)
            while sum(sizes[levels[level]] for level in place.values()) > budget:
                lowered = next((block for block in others if place[block] > 0), None)
                if lowered is None:
                    return plan
                place[lowered] -= 1
                rng.shuffle(others)
        return self.with_windows(plan, {block: levels[level] for block, level in place.items()})


def allocate(
    costs: Mapping[int, Mapping[Window, float]], sizes: Mapping[Window, int], budget: int
) -> dict[int, Window]:
    """
    A window for each block: from the smallest ones on, tokens go where they take away most cost per token, as long as
    there are any.

    Args:
        costs (`Mapping[int, Mapping[Window, float]]`): What each window costs each block.
        sizes (`Mapping[Window, int]`): Tokens of each window.
        budget (`int`): Tokens of all blocks together.
    """
    smallest = min(sizes, key=sizes.get)
    chosen = dict.fromkeys(costs, smallest)
    left = budget - len(chosen) * sizes[smallest]
    while True:
        steps = [
            (
                (costs[block][chosen[block]] - costs[block][window]) / (sizes[window] - sizes[chosen[block]]),
                block,
                window,
            )
            for block in chosen
            for window in sizes
            if 0 < sizes[window] - sizes[chosen[block]] <= left
        ]
        best = max(steps, key=lambda step: step[0], default=None)
        if best is None or best[0] <= 0:
            return chosen
        _, block, window = best
        left -= sizes[window] - sizes[chosen[block]]
        chosen[block] = window
