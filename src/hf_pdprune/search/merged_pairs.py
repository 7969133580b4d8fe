"""MergedPairs: pairs of neighbours that one distilled block replaces, distilled locally and once each."""

import hashlib
import logging
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import reduce
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn
from tqdm.auto import tqdm
from transformers.pytorch_utils import Conv1D

from ..adapters import active_adapter, adapter_layers
from ..artefact_file import write_artefact
from ..blocks import get_blocks
from ..fingerprint import model_fingerprint
from ..inference.stage import position_ids
from .partial_forward import evaluating
from .reduced_rank import Sums, best_ridge, reduced_rank, ridge_regression


logger = logging.getLogger(__name__)

MERGED_PAIRS_FILE_NAME = "merged_pairs.safetensors"
_RIDGES = (0.01, 0.03, 0.1, 0.3)


@dataclass
class MergedPair:
    """
    What distillation adds to the last linear layer of a kept block so that it stands for the absorbed one too.

    Args:
        down (`torch.Tensor`): Shape `(rank, in_features)`.
        up (`torch.Tensor`): Shape `(out_features, rank)`.
        error_left (`float`): Part of what the absorbed block adds to the hidden states that stays missing, squared,
            on tokens that the fit has not seen.
    """

    down: torch.Tensor
    up: torch.Tensor
    error_left: float


class MergedPairs:
    """
    Pairs of neighbours [kept, absorbed] that one distilled block replaces. The kept block learns the pair's output
    from the pair's input: a low-rank correction of its last linear layer (the MLP's down projection), which writes
    into the residual stream. So it is a least-squares problem, solved in closed form (see [`reduced_rank`]): the
    features are that layer's inputs in the dense model, the target is what the absorbed block adds to the hidden
    states, both divided by the norm of the hidden state that results. Its ridge is the one that does best on half of
    the batches after a fit on the other half.

    The correction is a LoRA on the kept block: [`MergedPairs.active`] applies it while candidates are measured, and
    [`MergedPairs.start_adapter`] makes it the start of a stage's adapter. At export it is merged into the weight, so a
    merged block costs what the kept one did.

    Args:
        pairs (`Mapping[tuple[int, int], MergedPair]`, *optional*): By [kept, absorbed].
        fingerprint (`str`, *optional*): Of the dense model that they belong to.

    Attributes:
        block_tokens (`int`): Block forwards x tokens that distilling them took.
    """

    def __init__(self, pairs: Mapping[tuple[int, int], MergedPair] | None = None, fingerprint: str = ""):
        self.pairs = dict(pairs or {})
        self.fingerprint = fingerprint
        self.block_tokens = 0

    def __contains__(self, pair: tuple[int, int]) -> bool:
        return pair in self.pairs

    @property
    def digest(self) -> str:
        """Tells merged pairs apart whose energies may differ; empty without any."""
        digest = hashlib.sha256()
        for pair in sorted(self.pairs):
            digest.update(repr((pair, self.pairs[pair].down.shape)).encode())
            digest.update(self.pairs[pair].down.float().cpu().numpy().tobytes())
        return digest.hexdigest()[:16] if self.pairs else ""

    @classmethod
    def distil(
        cls,
        model: nn.Module,
        batches: Collection[Mapping[str, torch.Tensor]],
        absorbed_blocks: Sequence[int],
        rank: int,
        memory_bytes: int = 4 << 30,
    ) -> "MergedPairs":
        """
        Distils the pairs of `absorbed_blocks` with the block before each.

        Cost: one forward of the dense model over the batches, or several where the sums of all pairs do not fit into
        `memory_bytes` (twice the square of the layer's input size per pair).

        Args:
            model (`nn.Module`): The dense model.
            batches (`Collection[Mapping]`): Prompts and completions, as [`PromptCompletionCollator`] makes them.
            absorbed_blocks (`Sequence[int]`): Each from 1 on.
            rank (`int`): Of the corrections.
            memory_bytes (`int`): Bound for the sums of features and targets.

        Raises:
            `ValueError`: If a block's last linear layer does not write into the hidden states as it is (a norm comes
                between, or experts), or if hidden states are not finite.
        """
        made = cls(fingerprint=model_fingerprint(model))
        todo = sorted(absorbed_blocks)
        if not todo:
            return made
        layers = {block: last_linear(get_blocks(model)[block - 1]) for block in todo}
        for block, layer in layers.items():
            if layer is None:
                raise ValueError(f"block {block - 1} has no linear layer, so it cannot absorb block {block}")
        _check_last_layer(model, todo[0] - 1, layers[todo[0]], next(iter(batches)))
        size = max(_in_features(layer) for layer in layers.values())
        group = max(1, memory_bytes // (2 * 4 * size * size))
        groups = [todo[begin : begin + group] for begin in range(0, len(todo), group)]
        with tqdm(
            total=len(todo), desc="Distilling pairs", unit="pair", disable=not PartialState().is_main_process
        ) as progress:
            for blocks in groups:
                observer = _PairSums(model, {block: layers[block] for block in blocks})
                made.block_tokens += observer.observe(batches)
                for block in blocks:
                    made.pairs[block - 1, block] = _fit(*observer.halves(block), rank, model.dtype)
                    progress.update()
        left = {pair: round(merged.error_left, 3) for pair, merged in made.pairs.items()}
        logger.info("merged pairs: part of the squared error that is left: %s", left)
        return made

    @contextmanager
    def active(self, model: nn.Module, pairs: Iterable[tuple[int, int]]) -> Iterator[None]:
        """
        Within this context the kept blocks of `pairs` stand for both. The absorbed ones are not bypassed by it.

        Raises:
            `ValueError`: If a pair has not been distilled.
        """
        with ExitStack() as hooks:
            for pair in pairs:
                if pair not in self.pairs:
                    raise ValueError(f"the plan merges the pair {list(pair)}, which has not been distilled")
                layer = last_linear(get_blocks(model)[pair[0]])
                hooks.callback(layer.register_forward_hook(_adding(self.pairs[pair])).remove)
            yield

    @torch.no_grad()
    def start_adapter(self, model: nn.Module, adapter: str, pairs: Iterable[tuple[int, int]]) -> None:
        """
        Sets what `adapter` starts with in the kept blocks of `pairs`.

        Args:
            model (`nn.Module`): The dense model with LoRA adapters.
            adapter (`str`): The stage's.
            pairs (`Iterable[tuple[int, int]]`): The stage plan's `merged_blocks`.

        Raises:
            `ValueError`: If the adapter leaves out the layer that a merged block needs, or has a smaller rank.
        """
        for pair in pairs:
            merged, kept = self.pairs[pair], get_blocks(model)[pair[0]]
            layer = list(adapter_layers(kept).values())[-1:]
            if not layer or adapter not in layer[0].lora_A:
                raise ValueError(f"adapter {adapter!r} has no LoRA in block {pair[0]}, where a merged pair needs one")
            rank = len(merged.down)
            if layer[0].r[adapter] < rank:
                raise ValueError(f"adapter {adapter!r} has rank {layer[0].r[adapter]}, the merged pair needs {rank}")
            layer[0].lora_B[adapter].weight.zero_()
            layer[0].lora_A[adapter].weight[:rank].copy_(merged.down / layer[0].scaling[adapter])
            layer[0].lora_B[adapter].weight[:, :rank].copy_(merged.up)

    # The artefact

    def save_pretrained(self, save_directory: str | os.PathLike) -> Path:
        """Writes `merged_pairs.safetensors` into the folder, as a whole or not at all; returns its path."""
        tensors = {}
        for (kept, absorbed), merged in self.pairs.items():
            tensors[f"{kept}.{absorbed}.down"] = merged.down.contiguous()
            tensors[f"{kept}.{absorbed}.up"] = merged.up.contiguous()
            tensors[f"{kept}.{absorbed}.error_left"] = torch.tensor(merged.error_left)
        metadata = {"fingerprint": self.fingerprint, "block_tokens": str(self.block_tokens)}
        return write_artefact(Path(save_directory) / MERGED_PAIRS_FILE_NAME, save(tensors, metadata))

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike, model: nn.Module) -> "MergedPairs":
        """
        Reads what [`save_pretrained`] wrote.

        Raises:
            `ValueError`: If it is not such a file, or of another model.
        """
        path = Path(folder) / MERGED_PAIRS_FILE_NAME
        try:
            with safe_open(path, "pt", device=str(model.device)) as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            pairs = {tuple(map(int, name.split(".")[:2])) for name in tensors}
            read = cls(
                {
                    (kept, absorbed): MergedPair(
                        tensors[f"{kept}.{absorbed}.down"],
                        tensors[f"{kept}.{absorbed}.up"],
                        float(tensors[f"{kept}.{absorbed}.error_left"]),
                    )
                    for kept, absorbed in pairs
                },
                metadata["fingerprint"],
            )
            read.block_tokens = int(metadata["block_tokens"])
        except (SafetensorError, KeyError, ValueError) as error:
            raise ValueError(f"{path} holds no merged pairs: {error}") from error
        if read.fingerprint != model_fingerprint(model):
            raise ValueError(f"{path} holds the merged pairs of another model")
        return read


class _PairSums:
    """Gathers, in a forward of the dense model, what the least-squares problems of some pairs need."""

    def __init__(self, model: nn.Module, layers: Mapping[int, nn.Module]):
        self.model = model
        self.layers = layers
        self._sums: dict[tuple[int, int], Sums] = {}
        self._features: dict[int, torch.Tensor] = {}

    def observe(self, batches: Collection[Mapping[str, torch.Tensor]]) -> int:
        """Runs the batches; returns the block forwards x tokens."""
        blocks, spent = get_blocks(self.model), 0
        with evaluating(self.model), active_adapter(self.model, None):
            for number, tensors in enumerate(batches):
                mask = torch.cat([tensors["prompt_mask"], tensors["completion_mask"]], dim=1)
                ids = torch.cat([tensors["prompt_ids"], tensors["completion_ids"]], dim=1)
                with ExitStack() as hooks:
                    for block, layer in self.layers.items():
                        hooks.callback(layer.register_forward_pre_hook(self._keep_features(block)).remove)
                        hook = self._add_sums(block, number % 2, mask.bool())
                        hooks.callback(blocks[block].register_forward_hook(hook, with_kwargs=True).remove)
                    self.model(
                        input_ids=ids,
                        attention_mask=mask,
                        position_ids=position_ids(mask),
                        use_cache=False,
                        logits_to_keep=1,
                    )
                spent += len(blocks) * int(mask.sum())
        return int(_summed(torch.tensor(spent, dtype=torch.float64)))

    def halves(self, block: int) -> tuple[Sums, Sums]:
        """The sums over every second batch, and over the others, of all processes."""
        halves = []
        for half in (0, 1):
            sums = self._sums.pop((block, half), None)
            if sums is None:  # a process without such a batch
                other = self._sums.get((block, 1 - half)) or halves[0]
                sums = Sums(torch.zeros_like(other.gram), torch.zeros_like(other.cross), 0.0)
            squares = float(_summed(torch.tensor(sums.squares, dtype=torch.float64)))
            halves.append(Sums(_summed(sums.gram), _summed(sums.cross), squares))
        return halves[0], halves[1]

    def _keep_features(self, block: int) -> Any:
        def hook(module: nn.Module, args: tuple) -> None:
            self._features[block] = args[0]

        return hook

    def _add_sums(self, block: int, half: int, mask: torch.Tensor) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: torch.Tensor | tuple) -> None:
            inputs = (args[0] if args else kwargs["hidden_states"])[mask].float()
            outputs = (output[0] if isinstance(output, tuple) else output)[mask].float()
            if not bool(torch.isfinite(outputs).all()):
                raise ValueError(f"block {block}: its hidden states hold NaN or infinity (a dtype too narrow for it?)")
            weight = 1 / outputs.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
            features = self._features.pop(block).reshape(*mask.shape, -1)[mask].float()  # some blocks flatten
            sums = Sums.of(features * weight, (outputs - inputs) * weight)
            there = self._sums.get((block, half))
            self._sums[block, half] = sums if there is None else there + sums

        return hook


def _fit(half: Sums, other: Sums, rank: int, dtype: torch.dtype) -> MergedPair:
    ridge, error_left = best_ridge(half, other, _RIDGES) if other.squares else (_RIDGES[-1], 1.0)
    sums = half + other
    down, up = reduced_rank(sums, ridge_regression(sums, ridge), rank)
    return MergedPair(down.to(dtype), up.to(dtype), error_left)


def last_linear(block: nn.Module) -> nn.Module | None:
    """A block's last linear layer (within an adapter's wrapping), which writes into the hidden states; or `None`."""
    layers = [module for module in block.modules() if isinstance(module, (nn.Linear, Conv1D))]
    adapters = [layer.get_base_layer() for layer in adapter_layers(block).values()]
    if adapters:  # what lies beside the base layer in an adapted module belongs to adapters
        inner = {id(m) for layer in adapter_layers(block).values() for m in layer.modules()}
        layers = [m for m in layers if id(m) not in inner or any(m is base for base in adapters)]
    return layers[-1] if layers else None


def _check_last_layer(model: nn.Module, block: int, layer: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raises a `ValueError` unless what is added to the layer's output comes out of the block, on a few tokens."""
    ids, outputs = tensors["prompt_ids"][:1, -8:], []

    def record(module: nn.Module, args: tuple, output: torch.Tensor | tuple) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    def add(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        return output + 0.1 * outputs[0].std() if output.numel() == outputs[0].numel() else output

    with ExitStack() as hooks, evaluating(model), active_adapter(model, None):
        hooks.callback(get_blocks(model)[block].register_forward_hook(record).remove)
        model(input_ids=ids, use_cache=False)
        hooks.callback(layer.register_forward_hook(add).remove)
        model(input_ids=ids, use_cache=False)
    added = 0.1 * outputs[0].std()
    if not torch.allclose(outputs[1] - outputs[0], added.expand_as(outputs[0]), rtol=1e-2):
        raise ValueError(
            f"the last linear layer of {type(model).__name__}'s blocks does not write into the hidden states as it is "
            "(a norm comes between, or experts), so pairs cannot be merged: merge_pairs has to be false"
        )


def _in_features(layer: nn.Module) -> int:
    return layer.weight.shape[0] if isinstance(layer, Conv1D) else layer.weight.shape[1]


def _adding(merged: MergedPair) -> Any:
    def hook(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        return output + F.linear(F.linear(args[0], merged.down), merged.up)

    return hook


def _summed(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over all processes."""
    if PartialState().num_processes == 1:
        return tensor
    return reduce(tensor.to(PartialState().device), "sum")
