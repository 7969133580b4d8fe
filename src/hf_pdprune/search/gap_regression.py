"""GapRegression: what a block has to do so that blocks beside it can go, in closed form."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple

import torch
from torch import nn

from ..adapters import active_adapter
from ..blocks import bypass_blocks, get_blocks
from ..evaluating import evaluating
from ..spread_weights import gathering
from .gap_fit import GapFit, TakenNeurons
from .least_squares import LeastSquares
from .mlp_neurons import MLPNeurons, linear_layers
from .partial_forward import PartialForward


# On so many tokens neurons are chosen; on all of them what they count.
_SELECTION_TOKENS = 16384
# So many times as many neurons as there is room for are candidates.
_CANDIDATES = 2


class Gaps(NamedTuple):
    """Missing blocks right before and right behind a kept one."""

    before: tuple[int, ...]
    behind: tuple[int, ...]


class GapRegression:
    """
    Fits a block beside a gap so that the hidden states after the gap are the dense model's, as well as they can be:
    its MLP is given those neurons, of its own and of the missing blocks' MLPs, from which these hidden states can best
    be put together, and the columns that do so.

    The MLP's last linear layer writes into the residual stream, so its columns are a least-squares problem and need no
    gradient. Neurons of the missing blocks are evaluated on the hidden states that the MLP beside the gap reads; norms
    that differ by a factor per feature are folded into their rows. As many neurons as the MLP has room for are kept,
    chosen by what leaving each out would cost (optimal brain surgeon, Hassibi and Stork 1993) among the twice as many
    that add most to the residual stream. Ridge regression pulls columns towards the dense ones, by as much as serves a
    held-out fifth of the text best. Errors are divided by the norm of the dense hidden state, since norms that follow
    see directions only. Neurons are chosen on the first 16,384 tokens, columns then fitted on all.

    Where neurons cannot move (layers with bias, experts, weights that are not whole in this process), the block before
    a gap gets the best low-rank correction of its last linear layer (reduced-rank regression, Izenman 1975; the idea
    to fold a linear map into that layer is ReplaceMe's, arXiv 2505.02819).

    Cost: the dense model once over the tokens, and each fitted block two or three times. Memory: hidden states of the
    tokens for each block that has been asked for, and squares of twice the number of an MLP's neurons.

    Args:
        model (`nn.Module`): The dense model, with adapters (which are off) or without.
        input_ids (`Sequence[torch.LongTensor]`): Batches of shape `(batch_size, tokens)`, without padding.

    Attributes:
        block_tokens (`int`): Block forwards x tokens so far.
    """

    def __init__(self, model: nn.Module, input_ids: Sequence[torch.LongTensor]):
        self.model = model
        self.input_ids = input_ids
        self.blocks = get_blocks(model)
        self.total_blocks = len(self.blocks)
        self.block_tokens = 0
        # Hidden states of the dense model that arrive at these blocks.
        self._dense: dict[int, list[torch.Tensor]] = {}

    def fit(
        self,
        block: int,
        gaps: Gaps,
        rank: int,
        hidden: Sequence[torch.Tensor] | None = None,
        takes_neurons: bool = True,
    ) -> GapFit | None:
        """
        Fits one block.

        Args:
            block (`int`): The block.
            gaps ([`Gaps`]): What is missing beside it.
            rank (`int`): Of the correction, where neurons cannot move.
            hidden (`Sequence[torch.Tensor]`, *optional*): Each batch's hidden states that arrive at the block.
                Default: the dense model's (where the first blocks are missing, the embeddings).
            takes_neurons (`bool`, defaults to `True`): Whether it may take over neurons.

        Returns:
            [`GapFit`], or `None` where nothing fits: the block does not add its last linear layer's output to the
            hidden states as it is, or it has no gap behind it and cannot take over neurons.
        """
        with gathering(self.model), evaluating(self.model), active_adapter(self.model, None):
            if hidden is None:
                hidden = self.dense_at(min((block, *gaps.behind)))
            if not self._adds_last_layer(block, hidden[0]):
                return None
            neurons = self._neurons(block, gaps, hidden[0]) if takes_neurons else []
            if not neurons and not gaps.behind:
                return None
            target = self.dense_at(max((block, *gaps.behind)) + 1)
            data = _Gap(self.blocks[block], block, gaps, neurons, list(hidden), target)
            return self._take_over_neurons(data) if neurons else self._correct(data, rank)

    def _correct(self, gap: "_Gap", rank: int) -> GapFit:
        """The best correction of the block's last linear layer."""
        problem, error = self._problem(gap)
        down, up = problem.reduced_rank(rank)
        left = problem.squared_error(down.T @ up.T) / error if error else 0.0
        return GapFit(left, gap.output_layer, correction=(down.to(self.model.dtype), up.to(self.model.dtype)))

    def _take_over_neurons(self, gap: "_Gap") -> GapFit:
        """The neurons from which the hidden states behind the gap can best be put together."""
        own, width = gap.neurons[0], len(gap.neurons[0].columns)
        batches = -(-_SELECTION_TOKENS // self.input_ids[0].numel())
        candidates = self._candidates(gap, _CANDIDATES * width)
        prior = gap.prior[candidates]
        problem, error = self._problem(gap, candidates, batches)
        chosen, columns = problem.best_features(prior, width)
        with _inputs_of(own.norm) as normed:
            self._run((gap.number,), *self._few(gap.hidden[0]))
        scales = torch.stack([neurons.scale_from(own, normed[0]).float() for neurons in gap.neurons])
        numbers = (gap.number, *gap.gaps.before, *gap.gaps.behind)
        taken = TakenNeurons(numbers, tuple(own.input_layers), scales, candidates[chosen], columns)
        if batches < len(self.input_ids):
            whole = problem.restricted(chosen)
            self._add(whole, gap, taken, batches)
            _, taken.columns = whole.best_features(prior[chosen], width)
        left = problem.squared_error(torch.zeros_like(prior).index_copy(0, chosen, taken.columns))
        return GapFit(left / error if error else 0.0, gap.output_layer, taken)

    def _add(self, problem: LeastSquares, gap: "_Gap", taken: TakenNeurons, first: int) -> None:
        """Adds the batches from `first` on to the regression of the taken neurons, which the block itself computes."""
        batches = zip(self.input_ids[first:], gap.hidden[first:], gap.target[first:], strict=True)
        with GapFit(0.0, gap.output_layer, taken).active(self.blocks, gap.number):
            for ids, hidden, target in batches:
                rest, _, features = self._features(gap, ids, hidden, [])
                weight = 1 / target.float().norm(dim=-1, keepdim=True)
                problem.add(features.float() * weight, (target - rest).float() * weight)

    def _candidates(self, gap: "_Gap", count: int) -> torch.LongTensor:
        """So many neurons as add most to the residual stream, on a few tokens."""
        columns = torch.cat([neurons.columns for neurons in gap.neurons]).float()
        if len(columns) <= count:
            return torch.arange(len(columns), device=columns.device)
        *_, features = self._features(gap, self.input_ids[0], gap.hidden[0], gap.neurons[1:])
        weight = 1 / gap.target[0].float().norm(dim=-1, keepdim=True)
        strength = (features.float() * weight).flatten(0, 1).pow(2).sum(0) * columns.pow(2).sum(-1)
        return strength.topk(count).indices.sort().values

    def _features(
        self, gap: "_Gap", ids: torch.Tensor, hidden: torch.Tensor, others: Sequence[MLPNeurons]
    ) -> tuple[torch.Tensor, ...]:
        """
        The block's output without what its last linear layer adds, what that adds, and what this layer reads, followed
        by the activations of other neurons there.
        """
        module = gap.neurons[0].norm if gap.neurons else gap.block
        with _inputs_of(gap.layer) as inputs, _inputs_of(module) as normed, _outputs_of(gap.layer) as added:
            output = self._run((gap.number,), ids, hidden)
        features = inputs[0].view(*hidden.shape[:-1], -1)
        added = added[0].view_as(output)
        rest = output.float() - added.float()
        return rest, added, torch.cat([features, *(other.features(normed[0]) for other in others)], dim=-1)

    def _problem(
        self, gap: "_Gap", chosen: torch.LongTensor | None = None, batches: int | None = None
    ) -> tuple[LeastSquares, float]:
        """
        The regression of what the `chosen` neurons have to add (all features of a correction: what is missing behind
        the gap), and the squared error with the block as it is in the dense model.
        """
        problem, error = LeastSquares(), 0.0
        for ids, hidden, target in list(zip(self.input_ids, gap.hidden, gap.target, strict=True))[:batches]:
            rest, added, features = self._features(gap, ids, hidden, gap.neurons[1:])
            target = target.to(rest.device)  # of the missing block, which may lie elsewhere
            weight = 1 / target.float().norm(dim=-1, keepdim=True)
            wanted = (target - rest).float() * weight
            missing = wanted - added.float() * weight
            error += missing.pow(2).sum().item()
            if gap.neurons:
                problem.add(features[..., chosen].float() * weight, wanted)
            else:
                problem.add(features.float() * weight, missing)
        return problem, error

    def _neurons(self, block: int, gaps: Gaps, hidden: torch.Tensor) -> list[MLPNeurons]:
        """The block's neurons and those of its gaps; none where the block cannot take them over."""
        ids, few = self._few(hidden)
        found = [
            MLPNeurons.find(self.blocks[number], partial(self._run, (number,), ids, few if number else None))
            for number in (block, *gaps.before, *gaps.behind)
        ]
        if any(neurons is None for neurons in found):
            return []
        own = found[0]
        with _inputs_of(own.norm) as normed:
            self._run((block,), ids, few)
        return found if all(neurons.scale_from(own, normed[0]) is not None for neurons in found) else []

    def _adds_last_layer(self, block: int, hidden: torch.Tensor) -> bool:
        """
        Whether a block adds its last linear layer's output to the hidden states as it is (a norm may come between, or
        experts). Tried out on a few tokens: what is added to it has to come out.
        """
        ids, few = self._few(hidden)
        layer = next(reversed(linear_layers(self.blocks[block]).values()), None)
        if layer is None:
            return False
        plain = self._run((block,), ids, few)
        added = torch.full_like(plain, 0.1 * plain.float().std().item())
        with _outputs_plus(layer, added):
            changed = self._run((block,), ids, few)
        wrong = (changed.float() - plain.float() - added.float()).abs()
        # By so much sums are rounded where the dtype is narrow.
        rounding = sum(states.float().abs() for states in (plain, changed, few) if states is not None)
        return bool((wrong <= 0.02 * added.float().abs() + torch.finfo(plain.dtype).eps * rounding).all())

    def _few(self, hidden: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.input_ids[0][:1, :8], None if hidden is None else hidden[:1, :8]

    def dense_at(self, block: int) -> list[torch.Tensor]:
        """
        Each batch's hidden states of the dense model that arrive at a block.

        Raises:
            `ValueError`: If they are not finite.
        """
        if block not in self._dense:
            nearest = max((reached for reached in self._dense if reached < block), default=None)
            hidden = [None] * len(self.input_ids) if nearest is None else self._dense[nearest]
            for number in range(nearest or 0, block):
                hidden = self.advance(hidden, (number,))
                if not all(bool(torch.isfinite(states).all()) for states in hidden):
                    raise ValueError(
                        f"block {number}: its hidden states hold NaN or infinity (a dtype too narrow for it?)"
                    )
            self._dense[block] = hidden if block else self.advance(hidden, ())
        return self._dense[block]

    def forget_before(self, block: int) -> None:
        """Gives up the hidden states that arrive at blocks before this one."""
        self._dense = {reached: states for reached, states in self._dense.items() if reached >= block}

    def advance(self, hidden: Sequence[torch.Tensor | None], blocks: Sequence[int]) -> list[torch.Tensor]:
        """
        Each batch's hidden states after `blocks`.

        Args:
            hidden (`Sequence[torch.Tensor]`): What arrives at the first of them; `None`: the embeddings.
            blocks (`Sequence[int]`): Neighbours.
        """
        with gathering(self.model), evaluating(self.model), active_adapter(self.model, None):
            return [self._run(blocks, ids, states) for ids, states in zip(self.input_ids, hidden, strict=True)]

    def _run(self, blocks: Sequence[int], ids: torch.Tensor, hidden: torch.Tensor | None) -> torch.Tensor:
        """What `blocks` make of the hidden states that arrive there (`None`: of the embeddings of `ids`)."""
        blocks = tuple(blocks)
        self.block_tokens += len(blocks) * ids.numel()
        start = blocks[0] if blocks and hidden is not None else 0
        last = blocks[-1] if blocks else 0
        others = [b for b in range(start, self.total_blocks) if b not in blocks]
        forward = PartialForward(self.model, start, hidden if start else None)
        outputs: list[torch.Tensor] = []
        with bypass_blocks(self.model, others):
            handle = self.blocks[last].register_forward_hook(
                lambda module, args, output: outputs.append(output[0] if isinstance(output, tuple) else output)
            )
            try:
                forward(input_ids=ids, use_cache=False, logits_to_keep=1)
            finally:
                handle.remove()
        return outputs[0]


@dataclass
class _Gap:
    """
    What is fitted: a block beside gaps, its number, neurons (its own, those of the missing blocks before it, and those
    of the ones behind it), each batch's hidden states that arrive and those wanted behind the gap.
    """

    block: nn.Module
    number: int
    gaps: Gaps
    neurons: list[MLPNeurons]
    hidden: list[torch.Tensor]
    target: list[torch.Tensor]

    @property
    def output_layer(self) -> str:
        """Name within the block of its last linear layer."""
        return next(reversed(linear_layers(self.block)))

    @property
    def layer(self) -> nn.Module:
        """The block's last linear layer."""
        return next(reversed(linear_layers(self.block).values()))

    @cached_property
    def prior(self) -> torch.Tensor:
        """
        What neurons count before anything is fitted, shape `(num_neurons, hidden_size)`. What the missing blocks
        before this one have added is in the hidden states that arrive already, or was not to be had.
        """
        columns = [neurons.columns.float() for neurons in self.neurons]
        before = range(1, 1 + len(self.gaps.before))
        return torch.cat([torch.zeros_like(c) if n in before else c for n, c in enumerate(columns)])


@contextmanager
def _inputs_of(layer: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Collects what a layer is called with."""
    inputs: list[torch.Tensor] = []
    handle = layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    try:
        yield inputs
    finally:
        handle.remove()


@contextmanager
def _outputs_of(layer: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Collects what a layer returns."""
    outputs: list[torch.Tensor] = []
    handle = layer.register_forward_hook(lambda module, args, output: outputs.append(output))
    try:
        yield outputs
    finally:
        handle.remove()


@contextmanager
def _outputs_plus(layer: nn.Module, added: torch.Tensor) -> Iterator[None]:
    """Adds a tensor to what a layer returns, where it is of that size."""

    def add(module: nn.Module, args: tuple, output: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
        # Some blocks flatten batch and sequence (OPT).
        return output + added.view_as(output) if output.numel() == added.numel() else output

    handle = layer.register_forward_hook(partial(add, added=added))
    try:
        yield
    finally:
        handle.remove()
