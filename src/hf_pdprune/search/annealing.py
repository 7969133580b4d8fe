"""AnnealingSearch: simulated annealing over plans."""

import math
import random
from collections.abc import Callable

from accelerate import PartialState
from tqdm.auto import tqdm

from ..plan import PruningPlan
from .objective import Objective


# So many draws in a row that cost nothing (known already) mean that the neighbourhood is used up.
_FREE_DRAWS = 300


class AnnealingSearch:
    """
    Simulated annealing with a temperature that falls geometrically with the budget spent. The acceptance threshold of
    a candidate is drawn before it is evaluated, so that its evaluation ends as soon as it is certain to be rejected.

    A search is determined by its seed and the energies. So a search that starts again with the journal of an
    interrupted one (see [`SearchJournal`]) repeats its decisions without computing anything, with the random generator
    in the same states, and goes on from there.

    Args:
        objective ([`Objective`]): Gives energies.
        moves (`Callable[[PruningPlan, random.Random], PruningPlan]`): Draws a neighbour.
        seed (`str`): Seed of the draws.
        initial_temperature (`float`): As a share of the start's energy.
        final_temperature (`float`): Likewise.
        name (`str`): Title of the progress bar.

    Attributes:
        num_steps (`int`): Candidates drawn.
        num_accepted (`int`): Candidates accepted.
    """

    def __init__(
        self,
        objective: Objective,
        moves: Callable[[PruningPlan, random.Random], PruningPlan],
        seed: str,
        initial_temperature: float,
        final_temperature: float,
        name: str,
    ):
        self.objective = objective
        self.moves = moves
        self.rng = random.Random(seed)
        self.initial_temperature = initial_temperature
        self.final_temperature = final_temperature
        self.name = name
        self.num_steps = 0
        self.num_accepted = 0

    def run(self, start: PruningPlan, budget: int) -> PruningPlan:
        """
        The best plan that is found, never a worse one than `start`.

        Args:
            start ([`PruningPlan`]): Where it begins.
            budget (`int`): Block forwards x tokens that may be spent.
        """
        objective, cost = self.objective, self.objective.cost
        current = best = start
        energy = best_energy = scale = objective.energy(start)
        objective.accept(start)
        begun, free_draws = cost.total, 0
        with tqdm(
            total=round(budget / objective.dense_block_tokens, 1),
            desc=self.name,
            unit="dense forward",
            bar_format="{l_bar}{bar}| {n:.1f}/{total} dense forwards [{elapsed}<{remaining}{postfix}]",
            disable=not PartialState().is_main_process,
        ) as progress:
            while budget > 0 and (spent := cost.total - begun) < budget and free_draws < _FREE_DRAWS:
                temperature = scale * self._temperature(spent / budget)
                candidate = self.moves(current, self.rng)
                # Metropolis: accept where u < exp((energy - candidate's) / temperature), u drawn beforehand.
                limit = energy - temperature * math.log(1.0 - self.rng.random())
                if candidate != current and (found := objective.energy(candidate, limit)) < math.inf:
                    current, energy = candidate, found
                    objective.accept(current)
                    self.num_accepted += 1
                if energy < best_energy:
                    best, best_energy = current, energy
                self.num_steps += 1
                newly_spent = cost.total - begun - spent
                free_draws = 0 if newly_spent else free_draws + 1
                progress.update(min(newly_spent / objective.dense_block_tokens, progress.total - progress.n))
                progress.set_postfix(
                    energy=f"{energy:.4f}",
                    best=f"{best_energy:.4f}",
                    temperature=f"{temperature:.4f}",
                    accepted=f"{self.num_accepted / self.num_steps:.0%}",
                    refresh=False,
                )
        objective.accept(best)
        return best

    def _temperature(self, progress: float) -> float:
        """Temperature after this part of the budget, as a share of the start's energy."""
        return self.initial_temperature * (self.final_temperature / self.initial_temperature) ** min(progress, 1.0)
