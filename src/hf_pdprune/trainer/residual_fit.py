"""ResidualFit: local distillation in closed form, from which a stage's adapter starts."""

import logging
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple

import torch
from accelerate import PartialState
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from tqdm.auto import tqdm

from ..adapters import active_adapter
from ..blocks import bypass_blocks, get_blocks
from ..search.partial_forward import PartialForward, evaluating
from .gap_fit import GapFit
from .least_squares import LeastSquares
from .mlp_neurons import MLPNeurons, linear_layers, mlp_path


logger = logging.getLogger(__name__)

# On so many tokens neurons are chosen; on all of them what they count.
_SELECTION_TOKENS = 16384
# So many times as many neurons as there is room for are candidates.
_CANDIDATES = 2


class ResidualFit:
    """
    Starts a stage's adapter where the blocks on both sides of each gap do the work of the missing ones as well as
    they can: the MLP before the gap is given those neurons, of its own and of the missing blocks' MLPs, from which the
    dense model's hidden states after the gap can best be put together, and the columns that do so; the MLP after the
    gap does the same with what is still missing.

    The MLP's last linear layer writes into the residual stream, so its columns are a least-squares problem and need no
    gradient. Neurons of the missing blocks are evaluated on the hidden states that the MLP beside the gap reads; norms
    that differ by a factor per feature are folded into their rows. As many neurons as the MLP has room for are kept,
    chosen by what leaving each out would cost (optimal brain surgeon, Hassibi and Stork 1993) among the twice as many
    that add most to the residual stream. Ridge regression pulls
    columns towards the dense ones, by as much as serves a held-out fifth of the text best. Errors are divided by the
    norm of the dense hidden state, since norms that follow see directions only.

    Gaps are fitted on the dense model's hidden states, each by itself (but for those with one block between them): no
    stage has to run, and what stages have in common is fitted once. Following the errors that all earlier gaps leave
    takes three times as long for the same text, and more text is worth more. Neurons are chosen on the first 16,384
    tokens, columns then fitted on all.

    Where neurons cannot move (layers with bias, experts, an adapter of too low a rank), the block before a gap gets
    the best low-rank correction of its last linear layer (reduced-rank regression, Izenman 1975; the idea to fold a
    linear map into that layer is ReplaceMe's, arXiv 2505.02819).

    Cost: the dense model once over the tokens. Memory: per token two hidden states for each gap, and squares of the
    number of neurons before a gap and in it.

    Args:
        model (`nn.Module`): The dense model with LoRA adapters.
        input_ids (`Sequence[torch.LongTensor]`): Batches of shape `(batch_size, tokens)`, without padding.
    """

    def __init__(self, model: nn.Module, input_ids: Sequence[torch.LongTensor]):
        self.model = model
        self.input_ids = input_ids
        self.total_blocks = len(get_blocks(model))
        # Hidden states of the dense model that arrive at these blocks, and fits: stages need mostly the same ones.
        self._dense: dict[int, list[torch.Tensor]] = {}
        self._fits: dict[tuple, GapFit] = {}
        self._behind: dict[tuple, list[torch.Tensor]] = {}

    def fit(self, missing_blocks: Collection[int], adapter: str) -> dict[int, float]:
        """
        Fits one stage.

        Args:
            missing_blocks (`Collection[int]`): Blocks that the stage does without.
            adapter (`str`): The stage's adapter. In the fitted layers it learns anew.

        Returns:
            `dict[int, float]`: By fitted block, the part of the squared error that is left on these tokens.
        """
        beside = blocks_beside_gaps(self.total_blocks, missing_blocks)
        left: dict[int, float] = {}
        path: tuple = ()
        description = f"Local distillation, {adapter}"
        with evaluating(self.model), active_adapter(self.model, None):
            for block, gaps in tqdm(beside.items(), desc=description, disable=not PartialState().is_main_process):
                # What a fit depends on: the block, its gaps, and the blocks fitted before it with no other in between.
                path = (*(path if gaps.before else ()), (block, gaps.behind, self._rank(block, adapter)))
                if gaps.before:
                    hidden = self._behind[path[:-1]]
                else:  # where the first blocks are missing, the block reads the embeddings
                    hidden = self._dense_at(min((block, *gaps.behind)))
                fit = self._fit_block(path, gaps, adapter, hidden)
                if fit is not None:
                    fit.apply(get_blocks(self.model)[block], adapter)
                    left[block] = fit.left
                if gaps.behind and path not in self._behind:
                    with active_adapter(self.model, adapter if fit is not None else None):
                        self._behind[path] = self._advance(hidden, (block,))
        logger.info("local distillation of %s: %s of the squared error is left per block", adapter, left)
        return left

    def fitted_parameters(self, missing_blocks: Collection[int], adapter: str) -> list[nn.Parameter]:
        """The parameters of an adapter that [`ResidualFit.fit`] sets; arguments as there."""
        layers: list[BaseTunerLayer] = []
        with evaluating(self.model), active_adapter(self.model, None):
            hidden = self._advance([None] * len(self.input_ids), ())[0]
            for block, gaps in blocks_beside_gaps(self.total_blocks, missing_blocks).items():
                layer = self._residual_layer(block, adapter, hidden)
                neurons = [] if layer is None else self._neurons(block, gaps, adapter, hidden)
                if layer is not None and (neurons or gaps.behind):
                    layers += [layer, *(neurons[0].input_layers.values() if neurons else ())]
        return [part[adapter].weight for layer in layers for part in (layer.lora_A, layer.lora_B)]

    def _fit_block(self, path: tuple, gaps: "Gaps", adapter: str, hidden: list[torch.Tensor]) -> GapFit | None:
        """What the last block of `path` takes over of its gaps; `None` where nothing fits."""
        block = path[-1][0]
        layer = self._residual_layer(block, adapter, hidden[0])
        if layer is None:
            return None
        neurons = self._neurons(block, gaps, adapter, hidden[0])
        if not neurons and not gaps.behind:
            return None
        if path not in self._fits:
            data = _Gap(
                block, layer, neurons, len(gaps.before), hidden, self._dense_at(max((block, *gaps.behind)) + 1)
            )
            self._fits[path] = self._take_over_neurons(data) if neurons else self._correct(data, layer.r[adapter])
        return self._fits[path]

    def _rank(self, block: int, adapter: str) -> int | None:
        layer = next(reversed(linear_layers(get_blocks(self.model)[block]).values()), None)
        return layer.r.get(adapter) if isinstance(layer, BaseTunerLayer) else None

    def _correct(self, gap: "_Gap", rank: int) -> GapFit:
        """The best correction of the block's last linear layer."""
        problem, error = self._problem(gap)
        down, up = problem.reduced_rank(rank)
        left = problem.squared_error(down.T @ up.T) / error if error else 0.0
        return GapFit(left, {}, {gap.layer_name(self.model): (down, up)})

    def _take_over_neurons(self, gap: "_Gap") -> GapFit:
        """The neurons from which the hidden states behind the gap can best be put together."""
        own, width = gap.neurons[0], len(gap.neurons[0].columns)
        batches = -(-_SELECTION_TOKENS // self.input_ids[0].numel())
        candidates = self._candidates(gap, _CANDIDATES * width)
        prior = gap.prior[candidates]
        problem, error = self._problem(gap, candidates, batches)
        chosen, columns = problem.best_features(prior, width)
        if batches < len(self.input_ids):
            problem, error = self._problem(gap, candidates[chosen])
            _, columns = problem.best_features(prior[chosen], width)
            change = columns - prior[chosen]
        else:
            change = -prior
            change[chosen] += columns
        chosen = candidates[chosen]
        left = problem.squared_error(change) / error if error else 0.0
        deltas = {gap.layer_name(self.model): columns.T - own.columns.T}
        with _inputs_of(own.norm) as normed:
            self._run((gap.block,), *self._few(gap.hidden[0]))
        scales = [neurons.scale_from(own, normed[0]) for neurons in gap.neurons]
        for name in own.input_layers:
            rows = [neurons.rows(name, scale) for neurons, scale in zip(gap.neurons, scales, strict=True)]
            deltas[name] = (torch.cat(rows, dim=1)[:, chosen] - rows[0]).flatten(0, 1)
        return GapFit(left, {name: delta.float() for name, delta in deltas.items()}, {})

    def _candidates(self, gap: "_Gap", count: int) -> torch.LongTensor:
        """So many neurons as add most to the residual stream, on a few tokens."""
        columns = torch.cat([neurons.columns for neurons in gap.neurons]).float()
        if len(columns) <= count:
            return torch.arange(len(columns), device=columns.device)
        _, features = self._features(gap, self.input_ids[0], gap.hidden[0])
        weight = 1 / gap.target[0].float().norm(dim=-1, keepdim=True)
        strength = (features.float() * weight).flatten(0, 1).pow(2).sum(0) * columns.pow(2).sum(-1)
        return strength.topk(count).indices.sort().values

    def _features(self, gap: "_Gap", ids: torch.Tensor, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the block makes of hidden states, and what its last linear layer and the other neurons read there."""
        own, *others = gap.neurons or (None,)
        module = own.norm if own else get_blocks(self.model)[gap.block]
        with _inputs_of(gap.layer) as inputs, _inputs_of(module) as normed:
            output = self._run((gap.block,), ids, hidden)
        features = inputs[0].view(*hidden.shape[:-1], -1)
        return output, torch.cat([features, *(other.features(normed[0]) for other in others)], dim=-1)

    def _problem(
        self, gap: "_Gap", chosen: torch.LongTensor | None = None, batches: int | None = None
    ) -> tuple[LeastSquares, float]:
        """
        The regression of what is missing behind the gap when the `chosen` neurons count as `prior` says, and the
        squared error when the block's own ones do as in the dense model.
        """
        problem, error = LeastSquares(), 0.0
        for ids, hidden, target in list(zip(self.input_ids, gap.hidden, gap.target, strict=True))[:batches]:
            output, features = self._features(gap, ids, hidden)
            weight = 1 / target.float().norm(dim=-1, keepdim=True)
            missing = (target - output).float()
            error += (missing * weight).pow(2).sum().item()
            if gap.neurons:
                own = gap.neurons[0].columns
                missing += (features[..., : len(own)] @ own).float()
                features = features[..., chosen]
                missing -= features.float() @ gap.prior[chosen]
            problem.add(features.float() * weight, missing * weight)
        return problem, error

    def _neurons(self, block: int, gaps: "Gaps", adapter: str, hidden: torch.Tensor | None) -> list[MLPNeurons]:
        """The block's neurons and those of its gaps; none where the block cannot take them over."""
        blocks = get_blocks(self.model)
        ids, few = self._few(hidden)
        found = [
            MLPNeurons.find(blocks[number], partial(self._run, (number,), ids, few if number else None))
            for number in (block, *gaps.before, *gaps.behind)
        ]
        if any(neurons is None for neurons in found):
            return []
        own = found[0]
        layers = (*own.input_layers.values(), own.output_layer)
        if any(not _takes_any_delta(layer, adapter) for layer in layers):
            return []
        with _inputs_of(own.norm) as normed:
            self._run((block,), ids, few)
        return found if all(neurons.scale_from(own, normed[0]) is not None for neurons in found) else []

    def _residual_layer(self, block: int, adapter: str, hidden: torch.Tensor | None) -> BaseTunerLayer | None:
        """
        The block's last linear layer, if it is adapted and the block adds its output to the hidden states as it is (a
        norm may come between, or experts). Tried out on a few tokens: what is added to it has to come out.
        """
        ids, few = self._few(hidden)
        layer = next(reversed(linear_layers(get_blocks(self.model)[block]).values()), None)
        if not isinstance(layer, BaseTunerLayer) or adapter not in layer.lora_A:
            return None
        plain = self._run((block,), ids, few)
        added = torch.full_like(plain, 0.1 * plain.float().std().item())
        with _outputs_plus(layer, added):
            changed = self._run((block,), ids, few)
        close = torch.allclose(changed - plain, added, rtol=1e-2, atol=1e-2 * added.abs().max().item())
        return layer if close else None

    def _few(self, hidden: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.input_ids[0][:1, :8], None if hidden is None else hidden[:1, :8]

    def _dense_at(self, block: int) -> list[torch.Tensor]:
        """Hidden states of the dense model that arrive at a block."""
        if block not in self._dense:
            nearest = max((reached for reached in self._dense if reached < block), default=None)
            hidden = [None] * len(self.input_ids) if nearest is None else self._dense[nearest]
            self._dense[block] = self._advance(hidden, range(nearest or 0, block))
        return self._dense[block]

    def _advance(self, hidden: Sequence[torch.Tensor | None], blocks: Sequence[int]) -> list[torch.Tensor]:
        """Each batch's hidden states after `blocks`."""
        return [self._run(blocks, ids, h) for ids, h in zip(self.input_ids, hidden, strict=True)]

    def _run(self, blocks: Sequence[int], ids: torch.Tensor, hidden: torch.Tensor | None) -> torch.Tensor:
        """What `blocks` make of the hidden states that arrive there (`None`: of the embeddings of `ids`)."""
        blocks = tuple(blocks)
        start = blocks[0] if blocks and hidden is not None else 0
        last = blocks[-1] if blocks else 0
        others = [b for b in range(start, self.total_blocks) if b not in blocks]
        forward = PartialForward(self.model, start, hidden if start else None)
        outputs: list[torch.Tensor] = []
        with bypass_blocks(self.model, others):
            handle = get_blocks(self.model)[last].register_forward_hook(
                lambda module, args, output: outputs.append(output[0] if isinstance(output, tuple) else output)
            )
            try:
                forward(input_ids=ids, use_cache=False, logits_to_keep=1)
            finally:
                handle.remove()
        return outputs[0]


class Gaps(NamedTuple):
    """Missing blocks right before and right behind a kept one."""

    before: tuple[int, ...]
    behind: tuple[int, ...]


@dataclass
class _Gap:
    """
    What is fitted: a block beside a gap, its last linear layer, neurons (its own, those of the `num_before` missing
    blocks before it, and those of the ones behind it), hidden states that arrive and those wanted behind the gap.
    """

    block: int
    layer: nn.Module
    neurons: list[MLPNeurons]
    num_before: int
    hidden: list[torch.Tensor]
    target: list[torch.Tensor]

    @cached_property
    def prior(self) -> torch.Tensor:
        """
        What neurons count before anything is fitted, shape `(num_neurons, hidden_size)`. What the missing blocks
        before this one have added is in the hidden states that arrive already, or was not to be had.
        """
        columns = [neurons.columns.float() for neurons in self.neurons]
        before = range(1, 1 + self.num_before)
        return torch.cat([torch.zeros_like(c) if n in before else c for n, c in enumerate(columns)])

    def layer_name(self, model: nn.Module) -> str:
        """Name of the layer within the block."""
        return next(reversed(linear_layers(get_blocks(model)[self.block])))


def blocks_beside_gaps(total_blocks: int, missing_blocks: Collection[int]) -> dict[int, Gaps]:
    """
    The kept blocks that do the work of missing ones. Where the first blocks are missing, the first kept block does
    their work, as if they came behind it.
    """
    kept = [block for block in range(total_blocks) if block not in missing_blocks]
    behind = [
        tuple(range(block + 1, following)) for block, following in zip(kept, [*kept[1:], total_blocks], strict=True)
    ]
    behind[0] = (*range(kept[0]), *behind[0])
    before = [(), *behind[:-1]]
    if kept[0] > 0 and len(kept) > 1:  # only those between the two
        before[1] = tuple(range(kept[0] + 1, kept[1]))
    found = {block: Gaps(*gaps) for block, *gaps in zip(kept, before, behind, strict=True)}
    return {block: gaps for block, gaps in found.items() if gaps.before or gaps.behind}


def fitted_layers(model: nn.Module, missing_blocks: Collection[int]) -> list[str]:
    """Names, within the list of blocks, of the linear layers that [`ResidualFit`] may set: MLPs beside gaps."""
    blocks = get_blocks(model)
    names = []
    for block in blocks_beside_gaps(len(blocks), missing_blocks):
        layers, parent = linear_layers(blocks[block]), mlp_path(blocks[block])
        names += [f"{block}.{name}" for name in layers if name.rpartition(".")[0] == parent]
    return names


def _takes_any_delta(layer: nn.Module, adapter: str) -> bool:
    """Whether the adapter's rank is enough for any change of the layer's weight."""
    if not isinstance(layer, BaseTunerLayer) or adapter not in layer.lora_A:
        return False
    return layer.r[adapter] >= min(layer.get_base_layer().weight.shape)


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
