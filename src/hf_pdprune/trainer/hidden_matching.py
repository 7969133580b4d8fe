"""HiddenMatching: brings a stage's hidden states near to the dense model's, block by block."""

from collections.abc import Mapping, Sequence

import torch

from ..plan import PruningPlan
from .losses import relative_squared_distance


class HiddenMatching:
    """
    Which hidden states of a stage are compared with which of the dense model's. Block numbers are those of the dense
    model throughout, so sets that are not contiguous are right, too: what leaves a kept block is compared with what
    leaves the last of the missing blocks that follow it, since the stage's next block gets it in their place.

    Args:
        plan ([`PruningPlan`]): What the stages do without now.
        blocks (`Sequence[int]`, *optional*): Kept blocks after which hidden states are matched; a stage leaves out
            those that it lacks. Default: those before a gap, where there is something to make up for.
    """

    def __init__(self, plan: PruningPlan, blocks: Sequence[int] | None = None):
        self.prefill = _pairs(plan, "prefill", blocks)
        self.decode = _pairs(plan, "decode", blocks)

    @property
    def dense_blocks(self) -> set[int]:
        """Blocks of the dense model whose output is needed."""
        return {dense for _, dense in (*self.prefill, *self.decode)}

    def loss(
        self,
        prefill: Mapping[int, torch.Tensor],
        decode: Mapping[int, torch.Tensor],
        dense: Mapping[int, torch.Tensor],
        batch: Mapping[str, torch.Tensor],
    ) -> torch.Tensor:
        """
        Sum over the completion tokens of the batch, so that it is divided by their number as other losses are. A
        prompt's tokens share the weight of its row's completion tokens.

        Args:
            prefill (`Mapping[int, torch.Tensor]`): Output of the prefill stage's blocks, by number, shape
                `(batch_size, prompt_tokens, hidden_size)`.
            decode (`Mapping[int, torch.Tensor]`): The same of the decode stage, `completion_tokens - 1` tokens; empty
                if it did not run.
            dense (`Mapping[int, torch.Tensor]`): The same of the dense model, for all of these tokens.
            batch (`Mapping[str, torch.Tensor]`): As the collator makes it.
        """
        prompt_tokens = batch["prompt_ids"].shape[1]
        labelled = batch["labels"] != -100
        in_prompt = batch["prompt_mask"].float()
        in_prompt = in_prompt * (labelled.sum(-1) / in_prompt.sum(-1))[:, None]
        loss = torch.zeros((), device=in_prompt.device)
        for block, dense_block in self.prefill:
            distance = relative_squared_distance(prefill[block], dense[dense_block][:, :prompt_tokens])
            loss = loss + (distance * in_prompt).sum() / len(self.prefill)
        for block, dense_block in self.decode if decode else ():
            distance = relative_squared_distance(decode[block], dense[dense_block][:, prompt_tokens:])
            loss = loss + distance[labelled[:, 1:]].sum() / len(self.decode)
        return loss


def _pairs(plan: PruningPlan, stage: str, blocks: Sequence[int] | None) -> list[tuple[int, int]]:
    """Kept blocks with the block of the dense model after which its hidden states should be the same."""
    skipped = plan.stage(stage).skipped_blocks
    kept = [block for block in range(plan.num_hidden_layers) if block not in skipped]
    followers = [*kept[1:], plan.num_hidden_layers]
    pairs = [(block, follower - 1) for block, follower in zip(kept, followers, strict=True)]
    if blocks is None:
        return [(block, dense) for block, dense in pairs if dense != block]
    return [(block, dense) for block, dense in pairs if block in blocks]
