"""ResidualFit: local distillation in closed form, from which a stage's adapter starts."""

import logging
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from accelerate import PartialState
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from tqdm.auto import tqdm

from ..adapters import active_adapter
from ..blocks import bypass_blocks, get_blocks
from ..search.partial_forward import PartialForward, evaluating
from .least_squares import LeastSquares
from .mlp_neurons import MLPNeurons, linear_layers, mlp_path


logger = logging.getLogger(__name__)


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
    norm of the dense hidden state, since norms that follow see directions only. Gaps are fitted in order, each on the
    hidden states that the stage then has.

    Where neurons cannot move (layers with bias, experts, an adapter of too low a rank), the block before a gap gets
    the best low-rank correction of its last linear layer (reduced-rank regression, Izenman 1975; the idea to fold a
    linear map into that layer is ReplaceMe's, arXiv 2505.02819).

    Cost: the dense model and each stage once over the tokens. Memory: per token one hidden state and one for each gap,
    and squares of the number of neurons before a gap and in it.

    Args:
        model (`nn.Module`): The dense model with LoRA adapters.
        input_ids (`Sequence[torch.LongTensor]`): Batches of shape `(batch_size, tokens)`, without padding.
    """

    def __init__(self, model: nn.Module, input_ids: Sequence[torch.LongTensor]):
        self.model = model
        self.input_ids = input_ids
        self.total_blocks = len(get_blocks(model))
        # Hidden states of the dense model that arrive at these blocks; the second stage needs mostly the same ones.
        self._dense: dict[int, list[torch.Tensor]] = {}

    def fit(self, missing_blocks: Collection[int], adapter: str) -> dict[int, float]:
        """
        Fits one stage.

        Args:
            missing_blocks (`Collection[int]`): Blocks that the stage does without.
            adapter (`str`): The stage's adapter. In the fitted blocks' MLPs it learns anew.

        Returns:
            `dict[int, float]`: By fitted block, the part of the squared error that is left on these tokens.
        """
        gaps = blocks_before_gaps(self.total_blocks, missing_blocks)
        left: dict[int, float] = {}
        if not gaps:
            return left
        first = min(gaps)
        with evaluating(self.model):
            # Where the first blocks are missing, the stage begins with the embeddings.
            stage = self._dense_at(0 if 0 in missing_blocks else first)
            reached = first
            description = f"Local distillation, {adapter}"
            for block, gap in tqdm(gaps.items(), desc=description, disable=not PartialState().is_main_process):
                stage = self._advance(stage, [b for b in range(reached, block) if b not in missing_blocks], adapter)
                dense = self._dense_at(max(block, *gap) + 1)
                error = self._fit_block(block, gap, adapter, stage, dense)
                stage = self._advance(stage, (block,), adapter)
                reached = block + 1
                if error is not None:
                    left[block] = _squared_error(stage, dense) / error if error else 0.0
        logger.info("local distillation of %s: %s of the squared error is left per block", adapter, left)
        return left

    def fitted_parameters(self, missing_blocks: Collection[int], adapter: str) -> list[nn.Parameter]:
        """The parameters of an adapter that [`ResidualFit.fit`] sets; arguments as there."""
        layers: list[BaseTunerLayer] = []
        with evaluating(self.model):
            hidden = self._advance([None] * len(self.input_ids), (), None)[0]
            for block, gap in blocks_before_gaps(self.total_blocks, missing_blocks).items():
                layer = self._residual_layer(block, adapter, hidden)
                if layer is not None:
                    own, others = self._neurons(block, gap, adapter, hidden)
                    layers += [layer, *(own.input_layers.values() if others else ())]
        return [part[adapter].weight for layer in layers for part in (layer.lora_A, layer.lora_B)]

    def _fit_block(
        self,
        block: int,
        gap: Sequence[int],
        adapter: str,
        stage: Sequence[torch.Tensor],
        dense: Sequence[torch.Tensor],
    ) -> float | None:
        """Sets the adapter in the block's MLP; returns the squared error without it, `None` where nothing fits."""
        layer = self._residual_layer(block, adapter, stage[0])
        if layer is None:
            return None
        layer.lora_B[adapter].weight.zero_()
        own, others = self._neurons(block, gap, adapter, stage[0])
        problem, error = LeastSquares(), 0.0
        module = get_blocks(self.model)[block]
        for ids, hidden, target in zip(self.input_ids, stage, dense, strict=True):
            norm = own.norm if others else module
            with active_adapter(self.model, adapter), _inputs_of(layer) as inputs, _inputs_of(norm) as normed:
                output = self._run((block,), ids, hidden)
            features = inputs[0].view(*hidden.shape[:-1], -1) if hidden is not None else inputs[0]
            weight = 1 / target.float().norm(dim=-1, keepdim=True)
            missing = (target - output).float()
            error += (missing * weight).pow(2).sum().item()
            with active_adapter(self.model, None):
                for other in others:
                    more = other.features(normed[0])
                    missing -= (more @ other.columns).float()
                    features = torch.cat([features, more], dim=-1)
            problem.add(features.float() * weight, missing * weight)
        if not others:
            down, up = problem.reduced_rank(layer.r[adapter])
            _set_factors(layer, adapter, down / layer.scaling[adapter], up)
            return error
        columns = torch.cat([neurons.columns for neurons in (own, *others)]).float()
        chosen, columns = problem.best_features(columns, len(own.columns))
        _set_delta(layer, adapter, columns.T - own.columns.T)
        few = normed[0][:1]
        scales = [torch.ones_like(few[0, 0]), *(other.scale_from(own, few) for other in others)]
        for name, inner in own.input_layers.items():
            rows = [n.rows(name, scale) for n, scale in zip((own, *others), scales, strict=True)]
            new = torch.cat(rows, dim=1)[:, chosen].flatten(0, 1)
            _set_delta(inner, adapter, new - rows[0].flatten(0, 1))
        return error

    def _neurons(
        self, block: int, gap: Sequence[int], adapter: str, hidden: torch.Tensor | None
    ) -> tuple[MLPNeurons | None, list[MLPNeurons]]:
        """The block's neurons and those of the gap; none of the gap's where the block cannot take them over."""
        blocks = get_blocks(self.model)
        ids, few = self._few(hidden)
        found = []
        with active_adapter(self.model, None):
            for number in (block, *gap):
                run = partial(self._run, (number,), ids, few if number else None)
                found.append(MLPNeurons.find(blocks[number], run))
            own, *others = found
            if any(neurons is None for neurons in found):
                return own, []
            layers = (*own.input_layers.values(), own.output_layer)
            if any(not _takes_any_delta(layer, adapter) for layer in layers):
                return own, []
            with _inputs_of(own.norm) as normed:
                self._run((block,), ids, few)
            if any(other.scale_from(own, normed[0]) is None for other in others):
                return own, []
        return own, others

    def _residual_layer(self, block: int, adapter: str, hidden: torch.Tensor | None) -> BaseTunerLayer | None:
        """
        The block's last linear layer, if it is adapted and the block adds its output to the hidden states as it is (a
        norm may come between, or experts). Tried out on a few tokens: what is added to it has to come out.
        """
        ids, few = self._few(hidden)
        layer = next(reversed(linear_layers(get_blocks(self.model)[block]).values()), None)
        if not isinstance(layer, BaseTunerLayer) or adapter not in layer.lora_A:
            return None
        with active_adapter(self.model, None):
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
            self._dense[block] = self._advance(hidden, range(nearest or 0, block), None)
        return self._dense[block]

    def _advance(
        self, hidden: Sequence[torch.Tensor | None], blocks: Sequence[int], adapter: str | None
    ) -> list[torch.Tensor]:
        """Each batch's hidden states after `blocks`."""
        if len(blocks) == 0 and hidden[0] is not None:
            return list(hidden)
        with active_adapter(self.model, adapter):
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


def _squared_error(stage: Sequence[torch.Tensor], dense: Sequence[torch.Tensor]) -> float:
    return sum(
        ((d - s).float() / d.float().norm(dim=-1, keepdim=True)).pow(2).sum().item()
        for s, d in zip(stage, dense, strict=True)
    )


def _takes_any_delta(layer: nn.Module, adapter: str) -> bool:
    """Whether the adapter's rank is enough for any change of the layer's weight."""
    if not isinstance(layer, BaseTunerLayer) or adapter not in layer.lora_A:
        return False
    return layer.r[adapter] >= min(layer.get_base_layer().weight.shape)


def _set_delta(layer: BaseTunerLayer, adapter: str, delta: torch.Tensor) -> None:
    """Makes the adapter add `delta`, shape `(out_features, in_features)`, to the layer's weight."""
    delta = delta.float() / layer.scaling[adapter]
    identity = torch.eye(min(delta.shape), device=delta.device)
    # Of about one size, so that gradients of both factors are too.
    balance = (delta.norm() / identity.norm()).sqrt() if bool(delta.any()) else torch.ones_like(delta[0, 0])
    factors = (delta / balance, identity * balance)
    _set_factors(layer, adapter, *(factors if delta.shape[0] < delta.shape[1] else reversed(factors)))


def _set_factors(layer: BaseTunerLayer, adapter: str, down: torch.Tensor, up: torch.Tensor) -> None:
    # What is left of a rank beyond the factors' starts as LoRA does.
    layer.lora_A[adapter].weight[: len(down)].copy_(down)
    layer.lora_B[adapter].weight.zero_()
    layer.lora_B[adapter].weight[:, : len(down)].copy_(up)


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
