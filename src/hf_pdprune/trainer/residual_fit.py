"""ResidualFit: local distillation in closed form, from which a stage's adapter starts."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from accelerate import PartialState
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from tqdm.auto import tqdm
from transformers.pytorch_utils import Conv1D

from ..adapters import active_adapter, adapter_layers
from ..blocks import bypass_blocks, get_blocks
from ..search.partial_forward import PartialForward, evaluating


logger = logging.getLogger(__name__)


class ResidualFit:
    """
    Starts a stage's adapter where the missing blocks are made up for as well as one linear layer per block can: from
    the first gap on, every kept block's last linear layer (the MLP's down projection) gets the low-rank correction
    that brings the hidden states after the block, and after the missing ones that follow it, nearest to the dense
    model's.

    That layer writes into the residual stream, so the correction is a least-squares problem and needs no gradient:
    with its inputs a and what is missing r, both divided by the norm of the dense hidden state (norms follow, which
    see directions only), D = (A'A + ridge)^-1 A'R; its best approximation of a given rank on these inputs keeps the
    leading eigenvectors of D'(A'A)D (reduced-rank regression, Izenman 1975). Blocks are fitted in order, each on the
    hidden states that the blocks fitted before it give. The idea to fold a linear map into the down projection is
    ReplaceMe's (arXiv 2505.02819).

    Cost: the dense model once and the stage twice over the tokens. Memory: two hidden states per token, and the square
    of the layer's input size.

    Args:
        model (`nn.Module`): The dense model with LoRA adapters.
        input_ids (`Sequence[torch.LongTensor]`): Batches of shape `(batch_size, tokens)`, without padding.
        ridge (`float`, defaults to 0.01): Regularisation, as a share of the mean of A'A's diagonal.
    """

    def __init__(self, model: nn.Module, input_ids: Sequence[torch.LongTensor], ridge: float = 0.01):
        self.model = model
        self.input_ids = input_ids
        self.ridge = ridge
        self.total_blocks = len(get_blocks(model))

    def fit(self, missing_blocks: Sequence[int], adapter: str) -> dict[int, float]:
        """
        Sets the corrections of one stage.

        Args:
            missing_blocks (`Sequence[int]`): Blocks that the stage does without.
            adapter (`str`): The stage's adapter. Its corrections replace what the fitted layers had learned.

        Returns:
            `dict[int, float]`: By fitted block, the part of the squared error that is left.
        """
        kept = [block for block in range(self.total_blocks) if block not in missing_blocks]
        following = dict(zip(kept, [*kept[1:], self.total_blocks], strict=True))
        affected = [block for block in kept if kept[0] > 0 or any(following[b] > b + 1 for b in kept if b <= block)]
        left: dict[int, float] = {}
        if not affected:
            return left
        with evaluating(self.model), active_adapter(self.model, None):
            dense = [None] * len(self.input_ids)
            dense = [self._run(range(affected[0]), ids, None) for ids in self.input_ids] if affected[0] else dense
            stage, reached = list(dense), affected[0]
            if kept[0] > 0:  # the first blocks are missing: the stage begins with the embeddings
                stage = [self._run((), ids, None) for ids in self.input_ids]
            description = f"Local distillation, {adapter}"
            for block in tqdm(affected, desc=description, disable=not PartialState().is_main_process):
                between = range(reached, following[block])
                dense = [self._run(between, ids, h) for ids, h in zip(self.input_ids, dense, strict=True)]
                reached = following[block]
                if (layer := self._residual_layer(block, adapter, stage[0])) is not None:
                    left[block] = self._fit_layer(layer, block, adapter, stage, dense)
                with active_adapter(self.model, adapter):
                    stage = [self._run((block,), ids, h) for ids, h in zip(self.input_ids, stage, strict=True)]
        logger.info("local distillation of %s: %s of the squared error is left per block", adapter, left)
        return left

    def _fit_layer(
        self,
        layer: BaseTunerLayer,
        block: int,
        adapter: str,
        stage: Sequence[torch.Tensor],
        dense: Sequence[torch.Tensor],
    ) -> float:
        """Sets the correction of one layer; returns the part of the squared error that is left."""
        layer.lora_B[adapter].weight.zero_()
        gram = cross = error = 0.0
        for ids, hidden, target in zip(self.input_ids, stage, dense, strict=True):
            with active_adapter(self.model, adapter), _inputs_of(layer) as inputs:
                output = self._run((block,), ids, hidden)
            weight = 1 / target.float().norm(dim=-1, keepdim=True)
            features = (inputs[0].float() * weight).flatten(0, 1)
            missing = ((target - output).float() * weight).flatten(0, 1)
            gram, cross = gram + features.T @ features, cross + features.T @ missing
            error += missing.pow(2).sum().item()
        gram, cross = gram.double(), cross.double()
        eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        solution = torch.linalg.solve(gram + self.ridge * gram.diagonal().mean() * eye, cross)
        rank = layer.r[adapter]
        leading = torch.linalg.eigh(solution.T @ gram @ solution).eigenvectors[:, -rank:]
        down = (solution @ leading).T / layer.scaling[adapter]
        # The same product, shared out evenly: gradients of both factors are then of about one size.
        balance = (down.norm() / leading.norm()).sqrt() if down.any() else torch.ones_like(down[0, 0])
        # A rank beyond the layer's output size has nothing to fit; what is left of it starts as LoRA does.
        layer.lora_A[adapter].weight[: len(down)].copy_(down / balance)
        layer.lora_B[adapter].weight[:, : len(down)].copy_(leading * balance)
        low_rank = solution @ leading @ leading.T
        explained = (2 * (cross * low_rank).sum() - (low_rank * (gram @ low_rank)).sum()).item()
        return 1 - explained / error if error else 0.0

    def _residual_layer(self, block: int, adapter: str, hidden: torch.Tensor | None) -> BaseTunerLayer | None:
        """
        The adapted layer whose output the block adds to the hidden states as it is, or `None` (a norm may come
        between, or experts). Tried out on a few tokens: what is added to its output has to come out of the block.
        """
        ids = self.input_ids[0][:1, :8]
        few = None if hidden is None else hidden[:1, :8]
        module = get_blocks(self.model)[block]
        plain = self._run((block,), ids, few)
        added = torch.full_like(plain, 0.1 * plain.float().std().item())
        for layer in reversed(list(adapter_layers(module).values())):
            if adapter not in layer.lora_A:
                continue
            with _outputs_plus(layer, added):
                changed = self._run((block,), ids, few)
            if torch.allclose(changed - plain, added, rtol=1e-2, atol=1e-2 * added.abs().max().item()):
                return layer
        return None

    def _run(self, blocks: Sequence[int], ids: torch.Tensor, hidden: torch.Tensor | None) -> torch.Tensor:
        """What neighbouring `blocks` make of hidden states (`None`: of the embeddings of `ids`)."""
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


def last_linear(block: nn.Module) -> str | None:
    """Name, within a block, of its last linear layer: the one that is fitted, if it can be."""
    names = [name for name, module in block.named_modules() if isinstance(module, (nn.Linear, Conv1D))]
    return names[-1] if names else None


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
    """Adds a tensor to what a layer returns, where their shapes agree."""

    def add(module: nn.Module, args: tuple, output: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
        return output + added if output.shape == added.shape else output

    handle = layer.register_forward_hook(partial(add, added=added))
    try:
        yield
    finally:
        handle.remove()
