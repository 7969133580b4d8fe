"""ResidualFit: local distillation in closed form, from which a stage's adapter starts."""

import logging
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

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


class ResidualFit:
    """
    Starts a stage's adapter where the block before each gap does the work of the missing ones as well as it can: its
    MLP is given those neurons, of its own and of the missing blocks' MLPs, from which the dense model's hidden states
    after the gap can best be put together, and the columns that do so.

    The MLP's last linear layer writes into the residual stream, so its columns are a least-squares problem and need no
    gradient. Neurons of the missing blocks are evaluated on the hidden states that the MLP before the gap reads; norms
    that differ by a factor per feature are folded into their rows. As many neurons as the MLP has room for are kept,
    chosen by what leaving each out would cost (optimal brain surgeon, Hassibi and Stork 1993). Ridge regression pulls
    columns towards the dense ones, by as much as serves a held-out fifth of the text best. Errors are divided by the
    norm of the dense hidden state, since norms that follow see directions only.

    Gaps are fitted on the dense model's hidden states, each by itself: no stage has to run, and what stages have in
    common is fitted once. Following the errors that earlier gaps leave takes three times as long for the same text,
    and more text is worth more. Neurons are chosen on the first 16,384 tokens, columns then fitted on all.

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

    def fit(self, missing_blocks: Collection[int], adapter: str) -> dict[int, float]:
        """
        Fits one stage.

        Args:
            missing_blocks (`Collection[int]`): Blocks that the stage does without.
            adapter (`str`): The stage's adapter. In the fitted layers it learns anew.

        Returns:
            `dict[int, float]`: By fitted block, the part of the squared error that is left on these tokens.
        """
        gaps = blocks_before_gaps(self.total_blocks, missing_blocks)
        left: dict[int, float] = {}
        description = f"Local distillation, {adapter}"
        with evaluating(self.model), active_adapter(self.model, None):
            for block, gap in tqdm(gaps.items(), desc=description, disable=not PartialState().is_main_process):
                fit = self._fit_gap(block, gap, adapter)
                if fit is not None:
                    fit.apply(get_blocks(self.model)[block], adapter)
                    left[block] = fit.left
        logger.info("local distillation of %s: %s of the squared error is left per block", adapter, left)
        return left

    def fitted_parameters(self, missing_blocks: Collection[int], adapter: str) -> list[nn.Parameter]:
        """The parameters of an adapter that [`ResidualFit.fit`] sets; arguments as there."""
        layers: list[BaseTunerLayer] = []
        with evaluating(self.model), active_adapter(self.model, None):
            hidden = self._advance([None] * len(self.input_ids), ())[0]
            for block, gap in blocks_before_gaps(self.total_blocks, missing_blocks).items():
                layer = self._residual_layer(block, adapter, hidden)
                if layer is not None:
                    neurons = self._neurons(block, gap, adapter, hidden)
                    layers += [layer, *(neurons[0].input_layers.values() if neurons else ())]
        return [part[adapter].weight for layer in layers for part in (layer.lora_A, layer.lora_B)]

    def _fit_gap(self, block: int, gap: tuple[int, ...], adapter: str) -> GapFit | None:
        """What the block takes over of the gap; `None` where nothing fits."""
        # Where the first blocks are missing, the block reads the embeddings.
        hidden, target = self._dense_at(min(block, *gap)), self._dense_at(max(block, *gap) + 1)
        layer = self._residual_layer(block, adapter, hidden[0])
        if layer is None:
            return None
        neurons = self._neurons(block, gap, adapter, hidden[0])
        key = block, gap, None if neurons else layer.r[adapter]
        if key not in self._fits:
            data = _Gap(block, layer, neurons, hidden, target)
            self._fits[key] = self._take_over_neurons(data) if neurons else self._correct(data, layer.r[adapter])
        return self._fits[key]

    def _correct(self, gap: "_Gap", rank: int) -> GapFit:
        """The best correction of the block's last linear layer."""
        problem, error = self._problem(gap)
        down, up = problem.reduced_rank(rank)
        left = problem.squared_error(down.T @ up.T) / error if error else 0.0
        return GapFit(left, {}, {gap.layer_name(self.model): (down, up)})

    def _take_over_neurons(self, gap: "_Gap") -> GapFit:
        """The neurons from which the hidden states behind the gap can best be put together."""
        own = gap.neurons[0]
        prior = torch.cat([neurons.columns for neurons in gap.neurons]).float()
        batches = -(-_SELECTION_TOKENS // self.input_ids[0].numel())
        problem, error = self._problem(gap, batches)
        chosen, columns = problem.best_features(prior, len(own.columns))
        if batches < len(self.input_ids):
            problem, error = self._problem(gap, chosen=chosen)
            _, columns = problem.best_features(prior[chosen], len(chosen))
            change = columns - prior[chosen]
        else:
            change = -prior
            change[chosen] += columns
        left = problem.squared_error(change) / error if error else 0.0
        deltas = {gap.layer_name(self.model): columns.T - own.columns.T}
        with _inputs_of(own.norm) as normed:
            self._run((gap.block,), *self._few(gap.hidden[0]))
        scales = [neurons.scale_from(own, normed[0]) for neurons in gap.neurons]
        for name in own.input_layers:
            rows = [neurons.rows(name, scale) for neurons, scale in zip(gap.neurons, scales, strict=True)]
            deltas[name] = (torch.cat(rows, dim=1)[:, chosen] - rows[0]).flatten(0, 1)
        return GapFit(left, {name: delta.float() for name, delta in deltas.items()}, {})

    def _problem(
        self, gap: "_Gap", batches: int | None = None, chosen: torch.LongTensor | None = None
    ) -> tuple[LeastSquares, float]:
        """
        The regression of what is missing behind the gap when its neurons (all, or the `chosen` ones) count what they
        do in the dense model, and the squared error when the block's own ones do.
        """
        problem, error = LeastSquares(), 0.0
        own, *others = gap.neurons or (None,)
        columns = torch.cat([neurons.columns for neurons in gap.neurons]) if own else None
        module = get_blocks(self.model)[gap.block]
        for ids, hidden, target in list(zip(self.input_ids, gap.hidden, gap.target, strict=True))[:batches]:
            with _inputs_of(gap.layer) as inputs, _inputs_of(own.norm if own else module) as normed:
                output = self._run((gap.block,), ids, hidden)
            features = inputs[0].view(*hidden.shape[:-1], -1)
            weight = 1 / target.float().norm(dim=-1, keepdim=True)
            missing = (target - output).float()
            error += (missing * weight).pow(2).sum().item()
            if own:
                missing += (features @ own.columns).float()
                features = torch.cat([features, *(other.features(normed[0]) for other in others)], dim=-1)
                if chosen is not None:
                    features = features[..., chosen]
                missing -= (features @ (columns if chosen is None else columns[chosen])).float()
            problem.add(features.float() * weight, missing * weight)
        return problem, error

    def _neurons(self, block: int, gap: Sequence[int], adapter: str, hidden: torch.Tensor | None) -> list[MLPNeurons]:
        """The block's neurons and those of the gap; none where the block cannot take them over."""
        blocks = get_blocks(self.model)
        ids, few = self._few(hidden)
        found = [
            MLPNeurons.find(blocks[number], partial(self._run, (number,), ids, few if number else None))
            for number in (block, *gap)
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


@dataclass
class _Gap:
    """What is fitted: the block before a gap, its last linear layer, neurons, and hidden states before and behind."""

    block: int
    layer: nn.Module
    neurons: list[MLPNeurons]
    hidden: list[torch.Tensor]
    target: list[torch.Tensor]

    def layer_name(self, model: nn.Module) -> str:
        """Name of the layer within the block."""
        return next(reversed(linear_layers(get_blocks(model)[self.block])))


def blocks_before_gaps(total_blocks: int, missing_blocks: Collection[int]) -> dict[int, tuple[int, ...]]:
    """
    The kept blocks that do the work of missing ones, each with those that follow it. Where the first blocks are
    missing, the first kept block does their work.
    """
    kept = [block for block in range(total_blocks) if block not in missing_blocks]
    gaps = {
        block: tuple(range(block + 1, following))
        for block, following in zip(kept, [*kept[1:], total_blocks], strict=True)
    }
    gaps[kept[0]] = (*range(kept[0]), *gaps[kept[0]])
    return {block: gap for block, gap in gaps.items() if gap}


def fitted_layers(model: nn.Module, missing_blocks: Collection[int]) -> list[str]:
    """Names, within the list of blocks, of the linear layers that [`ResidualFit`] may set: MLPs before gaps."""
    blocks = get_blocks(model)
    names = []
    for block in blocks_before_gaps(len(blocks), missing_blocks):
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
