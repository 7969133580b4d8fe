"""RoundSearch: chooses the blocks of a removal round anew, with what distillation has healed so far."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from ..blocks import get_blocks
from ..data import PromptCompletionCollator
from ..plan import PruningPlan
from ..search import Calibration, Objective, SearchConfig
from ..search.block_progress import BlockProgress
from ..search.calibration import MIN_COMPLETION_TOKENS
from ..search.operations import with_removed


def round_examples(
    rows: Iterable[dict[str, Any]], count: int, collator: PromptCompletionCollator
) -> list[dict[str, list[int]]]:
    """
    The examples that rounds are searched on. A trainer asks for them before the first step, too: what is wrong with
    them should not be found out in the second round.

    Args:
        rows (`Iterable[dict]`): Training rows with `input_ids`.
        count (`int`): So many of them are taken, `round_search_examples`.
        collator ([`PromptCompletionCollator`]): Cuts them into prompt and completion.

    Raises:
        `ValueError`: If they have too few completion tokens to choose blocks by.
    """
    examples = [collator.with_prompt(row) for _, row in zip(range(count), rows, strict=False)]
    tokens = sum(label != -100 for example in examples for label in example["labels"])
    if tokens < MIN_COMPLETION_TOKENS:
        raise ValueError(
            f"round_search_examples={count} is too small: the first {len(examples)} training rows have {tokens} "
            f"completion tokens, search_in_rounds needs at least {MIN_COMPLETION_TOKENS}"
        )
    return examples


class RoundSearch:
    """
    Chooses which blocks a removal round takes, greedily and by the search's own objective, in which the stages apply
    what their adapters have learned so far. Only how many blocks go comes from the given plan. The blocks at both ends
    that a search protects by default stay.

    Args:
        model (`nn.Module`): The dense model with adapters.
        adapters (`Mapping[str, str]`): Adapter of each stage.
        examples (`Sequence[dict]`): What plans are measured on, see [`round_examples`].
        collator ([`PromptCompletionCollator`]): That of the training, which says what fills up examples, and which
            stage predicts the first completion token.
        batch_size (`int`): Examples per forward.
    """

    def __init__(
        self,
        model: nn.Module,
        adapters: Mapping[str, str],
        examples: Sequence[dict[str, list[int]]],
        collator: PromptCompletionCollator,
        batch_size: int = 4,
    ):
        self.model = model
        self.adapters = adapters
        limits = SearchConfig()
        last = len(get_blocks(model)) - limits.num_protected_last_blocks
        self.removable = range(limits.num_protected_first_blocks, last)
        first_token = collator.first_token
        self.calibration = Calibration(model, examples, collator.pad_token_id, batch_size, first_token=first_token)

    def __call__(self, plan: PruningPlan, target: PruningPlan) -> PruningPlan:
        """
        The plan of a round.

        Args:
            plan ([`PruningPlan`]): That of the round before; what it removes stays removed.
            target ([`PruningPlan`]): Has as many blocks missing in each stage as the result.
        """
        objective = Objective(self.model, self.calibration, adapters=self.adapters)
        goal = len(target.prefill.missing_blocks), len(target.decode.missing_blocks)
        steps = goal[1] - len(plan.decode.missing_blocks)
        with BlockProgress(steps, "Search in rounds") as progress:
            while (missing := len(plan.prefill.missing_blocks)) < goal[0] or len(plan.decode.missing_blocks) < goal[1]:
                objective.accept(plan)
                candidates = self._next(plan, in_prefill=missing < goal[0])
                plan, energy = objective.best_of(candidates, progress.update)
                progress.set_postfix(energy=f"{energy:.4f}")
                progress.update()
        return plan

    def _next(self, plan: PruningPlan, in_prefill: bool) -> list[PruningPlan]:
        """Plans that do without one block more, in both stages or in decode alone."""
        prefill, decode = plan.prefill.removed_blocks, plan.decode.removed_blocks
        if in_prefill:
            # A block that decode lacks already costs it nothing more; each other goes out of both stages.
            blocks = [block for block in self.removable if block not in prefill]
            return [with_removed(plan, (*prefill, block), {*decode, block}) for block in blocks]
        blocks = [block for block in self.removable if block not in decode]
        return [with_removed(plan, prefill, (*decode, block)) for block in blocks]
