"""TokenAwareBlocks: which blocks lose least when decode receives only some of the prompt's tokens."""

import logging
import math
import random
from collections.abc import Sequence
from dataclasses import replace

from torch import nn
from transformers import DynamicCache

from ..blocks import get_blocks
from ..kv.attention_replay import AttentionReplay
from ..plan import KVPlan, PruningPlan
from .annealing import AnnealingSearch
from .attention_mass import AttentionMass
from .block_progress import BlockProgress
from .block_windows import BlockWindows
from .objective import Objective
from .search_config import SearchConfig


logger = logging.getLogger(__name__)

_GREEDY = "Greedy, token-aware blocks"


class TokenAwareBlocks:
    """
    Chooses the token-aware blocks of a plan by the KL that dropping prompt tokens (see [`KVPlan`]) causes through the
    disaggregated forward: greedily one by one, then by annealing jointly. Prefill is never run again, and decode only
    from the first block that differs, so a candidate costs a fraction of a forward over the completion.

    The prompts should be longer than the window, or dropping causes nothing. With several `window_factors` blocks get
    windows of their own (see [`BlockWindows`]).

    Args:
        objective ([`Objective`]): On prompts that are longer than the window.
        config ([`SearchConfig`]): Window, choice of tokens, number or target.

    Raises:
        `ValueError`: If tokens are to be chosen by attention, and the model's cannot be observed.
    """

    def __init__(self, objective: Objective, config: SearchConfig):
        if config.token_choice == "attention":
            _check_observable(objective.model)
        self.objective = objective
        self.config = replace(config, token_choice=config.token_choice or _best_choice(objective.model))

    def choose(self, plan: PruningPlan) -> PruningPlan:
        """
        `plan` with its token-aware blocks.

        Raises:
            `ValueError`: If there are not as many blocks, or if the target cannot be met; it says how near the best
                comes.
        """
        candidates = self.candidates(plan)
        if self.config.window_factors != [1.0]:
            windows = BlockWindows(self.objective, self.config, candidates)
            return windows.choose(plan, self._budget(plan, windows))
        count = self._count(plan, candidates)
        if count in (0, len(candidates)):
            return self._with_blocks(plan, candidates[:count])
        if self.config.token_aware_criterion == "random":
            rng = random.Random(f"{self.config.search_seed} random")
            return self._with_blocks(plan, rng.sample(candidates, count))
        longest = self.objective.calibration.longest_prompt
        window = (self.config.first_tokens, self.config.last_tokens)
        if longest <= sum(window):
            logger.warning(
                "token-aware blocks are chosen on prompts of at most %d tokens, of which a window of %d + %d drops "
                "none: all blocks look alike; use longer calibration prompts",
                longest,
                *window,
            )
        if self.config.token_aware_criterion == "attention_mass":
            return self._with_blocks(plan, self._least_attention_outside(candidates)[:count])
        spent = self.objective.cost.total
        if count <= len(candidates) / 2:
            plan = self._add_blocks(self._with_blocks(plan, ()), candidates, count)
        else:  # from the other end fewer candidates have to be evaluated
            plan = self._give_back_blocks(self._with_blocks(plan, candidates), len(candidates) - count)
        if self.config.refine_token_aware_blocks:
            plan = self._anneal(plan, candidates, self.objective.cost.total - spent)
        return plan

    def choose_within(
        self, plans: Sequence[PruningPlan], objective: Objective, max_kl: float
    ) -> tuple[PruningPlan, PruningPlan]:
        """
        The first of some plans that does not pass `max_kl` with its token-aware blocks.

        Args:
            plans (`Sequence[PruningPlan]`): Those that are tried, in this order.
            objective ([`Objective`]): Gives the energy that is bounded.
            max_kl (`float`): The bound.

        Returns:
            That plan as it was, and with its token-aware blocks.

        Raises:
            `ValueError`: If there is none; it says how near the best comes.
        """
        wanted = f"num_token_aware_blocks {self.config.num_token_aware_blocks}"
        if self.config.target_kv_reduction is not None:
            wanted = f"target_kv_reduction {self.config.target_kv_reduction}"
        energies: list[tuple[float, int]] = []
        impossible: list[ValueError] = []
        for plan in plans:
            try:
                self.check(plan)
            except ValueError as error:
                impossible.append(error)
                continue
            if energies and objective is not self.objective:
                self.objective.forget()  # there is memory for the states of one of them
            chosen = self.choose(plan)
            if (energy := objective.energy(chosen)) <= max_kl:
                return plan, chosen
            energies.append((energy, len(plan.decode.missing_blocks)))
            logger.info("without %d blocks and with %s KL is %.4f, above max_kl", energies[-1][1], wanted, energy)
            if objective is not self.objective:
                objective.forget()
        if not energies:
            raise impossible[0] if math.isinf(max_kl) else ValueError(f"within max_kl {max_kl}, {impossible[0]}")
        energy, missing = min(energies)
        raise ValueError(
            f"max_kl {max_kl} and {wanted} cannot both be met: the plan that comes nearest is without {missing} "
            f"blocks and has KL {energy:.4f}"
        )

    def candidates(self, plan: PruningPlan) -> tuple[int, ...]:
        """Blocks that decode runs and whose cache can be shortened: a sliding window is bounded already."""
        layers = DynamicCache(config=self.objective.model.config).layers
        silent = plan.prefill.projected_blocks if self.config.token_choice == "attention" else ()
        return tuple(
            block for block in plan.kept_blocks("decode") if not layers[block].is_sliding and block not in silent
        )

    def check(self, plan: PruningPlan) -> None:
        """Raises what [`TokenAwareBlocks.choose`] raises for a plan like this, before anything is measured."""
        candidates = self.candidates(plan)
        if self.config.window_factors != [1.0]:
            self._budget(plan, BlockWindows(self.objective, self.config, candidates))
        else:
            self._count(plan, candidates)

    def _count(self, plan: PruningPlan, candidates: tuple[int, ...]) -> int:
        """How many blocks have to be token-aware, with the same window each."""
        config = self.config
        if config.target_kv_reduction is None:
            return self._checked_number(candidates)
        for count in range(len(candidates) + 1):
            tried = self._with_blocks(plan, candidates[:count])
            if tried.kv_reduction(config.kv_prompt_tokens)["total"] >= config.target_kv_reduction:
                return count
        raise self._unreachable(tried, candidates)

    def _budget(self, plan: PruningPlan, windows: BlockWindows) -> int:
        """Tokens that the candidates may hand over of a prompt of `kv_prompt_tokens`, with windows of their own."""
        config, candidates = self.config, windows.candidates
        tokens = config.kv_prompt_tokens
        least = windows.least(plan)
        smallest = sum(least.kept_prompt_tokens(block, tokens) for block in candidates)
        if config.target_kv_reduction is None:
            count = self._checked_number(candidates)
            budget = count * (config.first_tokens + config.last_tokens) + (len(candidates) - count) * tokens
            if budget < smallest:
                raise ValueError(
                    f"window_factors {config.window_factors} have no window small enough for the bytes of "
                    f"num_token_aware_blocks {count}"
                )
            return budget
        dense = plan.num_hidden_layers * tokens
        fixed = sum(plan.kept_prompt_tokens(b, tokens) for b in plan.kept_blocks("decode") if b not in candidates)
        budget = math.floor(dense / config.target_kv_reduction) - fixed
        if budget < smallest:
            raise self._unreachable(least, candidates)
        return budget

    def _checked_number(self, candidates: Sequence[int]) -> int:
        count = self.config.num_token_aware_blocks or 0
        if count > len(candidates):
            raise ValueError(
                f"num_token_aware_blocks is {count}, but only {len(candidates)} of the blocks that decode keeps can "
                "be token-aware"
            )
        return count

    def _unreachable(self, best: PruningPlan, candidates: Sequence[int]) -> ValueError:
        config = self.config
        window = next(iter(best.kv.windows.values()), (config.first_tokens, config.last_tokens))
        return ValueError(
            f"target_kv_reduction {config.target_kv_reduction} cannot be met: with all {len(candidates)} possible "
            f"blocks token-aware, a window of {window[0]} + {window[1]} of {config.kv_prompt_tokens} prompt tokens "
            f"and {len(best.decode.missing_blocks)} blocks removed it is "
            f"{best.kv_reduction(config.kv_prompt_tokens)['total']:.2f}"
        )

    def _with_blocks(self, plan: PruningPlan, blocks: Sequence[int]) -> PruningPlan:
        config = self.config
        kv = KVPlan(tuple(sorted(blocks)), config.first_tokens, config.last_tokens, config.token_choice)
        return replace(plan, kv=kv)

    def _least_attention_outside(self, candidates: Sequence[int]) -> list[int]:
        """The candidates, those first that spend least attention outside the first and last tokens, as PDTrim does."""
        objective, config = self.objective, self.config
        mass = AttentionMass.measure(objective.model, objective.calibration, config.first_tokens, config.last_tokens)
        shares = mass.shares
        return sorted(candidates, key=lambda block: shares[block])

    def _add_blocks(self, plan: PruningPlan, candidates: tuple[int, ...], count: int) -> PruningPlan:
        with BlockProgress(count, _GREEDY) as progress:
            for _ in range(count):
                chosen = plan.kv.token_aware_blocks
                options = [self._with_blocks(plan, (*chosen, b)) for b in candidates if b not in chosen]
                plan = self._best_of(plan, options, progress)
        return plan

    def _give_back_blocks(self, plan: PruningPlan, count: int) -> PruningPlan:
        with BlockProgress(count, _GREEDY) as progress:
            for _ in range(count):
                chosen = plan.kv.token_aware_blocks
                options = [self._with_blocks(plan, tuple(b for b in chosen if b != block)) for block in chosen]
                plan = self._best_of(plan, options, progress)
        return plan

    def _best_of(self, plan: PruningPlan, options: list[PruningPlan], progress: BlockProgress) -> PruningPlan:
        self.objective.accept(plan)
        plan, energy = self.objective.best_of(options, progress.update)
        progress.set_postfix(energy=f"{energy:.4f}")
        progress.update()
        return plan

    def _anneal(self, plan: PruningPlan, candidates: tuple[int, ...], greedy_cost: int) -> PruningPlan:
        def swap(current: PruningPlan, rng: random.Random) -> PruningPlan:
            chosen = current.kv.token_aware_blocks
            out, into = rng.choice(chosen), rng.choice([block for block in candidates if block not in chosen])
            return self._with_blocks(current, (*(block for block in chosen if block != out), into))

        config = self.config
        search = AnnealingSearch(
            self.objective,
            swap,
            f"{config.search_seed} token-aware",
            config.initial_temperature,
            config.final_temperature,
            "Annealing, token-aware blocks",
        )
        return search.run(plan, greedy_cost)


def _check_observable(model: nn.Module) -> None:
    for block in get_blocks(model):
        AttentionReplay(block)


def _best_choice(model: nn.Module) -> str:
    """Which tokens to keep where nobody says, and all blocks stay."""
    try:
        _check_observable(model)
    except ValueError as error:
        logger.info("token_choice is first_last: %s", error)
        return "first_last"
    return "attention"
