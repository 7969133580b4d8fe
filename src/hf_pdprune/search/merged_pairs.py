"""MergedPairs: pairs of neighbours that one distilled block replaces, distilled locally and once each."""

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn
from tqdm.auto import tqdm

from ..artefact_file import write_artefact
from ..blocks import get_blocks
from ..fingerprint import model_fingerprint
from ..spread_weights import input_device, is_partitioned, is_readable, whole_embeddings
from .gap_fit import GapFit
from .gap_regression import GapRegression, Gaps


logger = logging.getLogger(__name__)

MERGED_PAIRS_FILE_NAME = "merged_pairs.safetensors"


class MergedPairs:
    """
    Pairs of neighbours [kept, absorbed] that one distilled block replaces. The kept block learns the pair's output
    from the pair's input, in closed form and without a gradient: its MLP takes over neurons of the absorbed block's
    (see [`GapRegression`]), or, where neurons cannot move, its last linear layer is corrected by a low-rank map.

    A merged block has the shape of the one that was kept, so it costs what that one did.

    [`MergedPairs.active`] applies pairs to the dense model while candidates are measured, and
    [`MergedPairs.start_adapter`] makes them the start of a stage's adapter.

    Args:
        pairs (`Mapping[tuple[int, int], GapFit]`, *optional*): What the kept block does, by [kept, absorbed].
        fingerprint (`str`, *optional*): Of the dense model that they belong to.
        source (`str`, *optional*): Of what they were distilled from, see [`MergedPairs.source_digest`].

    Attributes:
        block_tokens (`int`): Block forwards x tokens that distilling them took.
    """

    def __init__(self, pairs: Mapping[tuple[int, int], GapFit] | None = None, fingerprint: str = "", source: str = ""):
        self.pairs = dict(pairs or {})
        self.fingerprint = fingerprint
        self.source = source
        self.block_tokens = 0

    def __contains__(self, pair: tuple[int, int]) -> bool:
        return pair in self.pairs

    @property
    def digest(self) -> str:
        """Tells merged pairs apart whose energies may differ; empty without any."""
        digest = hashlib.sha256()
        for pair in sorted(self.pairs):
            for name, tensor in self.pairs[pair].tensors().items():
                digest.update(repr((pair, name, tensor.shape)).encode())
                digest.update(tensor.float().cpu().numpy().tobytes())
        return digest.hexdigest()[:16] if self.pairs else ""

    @staticmethod
    def source_digest(
        model: nn.Module, input_ids: Sequence[torch.LongTensor], absorbed_blocks: Sequence[int], rank: int
    ) -> str:
        """Tells apart what pairs are distilled from; the arguments are those of [`MergedPairs.distil`]."""
        digest = hashlib.sha256(repr((_fingerprint(model), sorted(absorbed_blocks), rank)).encode())
        for batch in input_ids:
            digest.update(repr(tuple(batch.shape)).encode())
            digest.update(batch.cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    @classmethod
    def distil(
        cls, model: nn.Module, input_ids: Sequence[torch.LongTensor], absorbed_blocks: Sequence[int], rank: int
    ) -> "MergedPairs":
        """
        Distils the pairs of `absorbed_blocks` with the block before each. Where several processes run, each distils
        some of the pairs, but all of them together where weights are partitioned.

        Args:
            model (`nn.Module`): The dense model.
            input_ids (`Sequence[torch.LongTensor]`): Text, the same in all processes: batches of shape
                `(batch_size, tokens)`, without padding. What plans are measured on should not be in it: a search
                would take for better what is merely fitted to the text.
            absorbed_blocks (`Sequence[int]`): Each from 1 on.
            rank (`int`): Of the corrections, where neurons cannot move.

        Raises:
            `ValueError`: If a block's last linear layer does not write into the hidden states as it is (a norm comes
                between, or experts), or if hidden states are not finite.
        """
        source = cls.source_digest(model, input_ids, absorbed_blocks, rank)
        made = cls(fingerprint=_fingerprint(model), source=source)
        state = PartialState()
        regression = GapRegression(model, input_ids)
        divided = state.num_processes > 1 and not is_partitioned(model)
        own = sorted(absorbed_blocks)
        own = own[state.process_index :: state.num_processes] if divided else own
        blocks, found = get_blocks(model), []
        for absorbed in tqdm(own, desc="Distilling pairs", unit="pair", disable=not state.is_main_process):
            kept = absorbed - 1
            regression.forget_before(kept)
            takes_neurons = is_readable(blocks[kept], blocks[absorbed])
            fit = regression.fit(kept, Gaps((), (absorbed,)), rank, takes_neurons=takes_neurons)
            found.append(((kept, absorbed), fit))
            if found[-1][1] is None:
                break
        made.block_tokens = regression.block_tokens
        if divided:
            made.block_tokens = sum(gather_object([made.block_tokens]))
            # What is sent arrives on the device that it was on, which is the sender's.
            found = gather_object([(pair, fit and fit.to("cpu")) for pair, fit in found])
            found = [(pair, fit and fit.to(input_device(model))) for pair, fit in found]
        made.pairs = dict(sorted(found, key=lambda item: item[0]))
        for (kept, _), fit in made.pairs.items():  # in all processes, so that none waits for another one
            if fit is None:
                raise ValueError(
                    f"the last linear layer of {type(model).__name__}'s block {kept} does not write into the hidden "
                    "states as it is (a norm comes between, or experts), so pairs cannot be merged: merge_pairs has "
                    "to be false"
                )
        left = {pair: round(fit.left, 3) for pair, fit in made.pairs.items()}
        logger.info("merged pairs: part of the squared error that is left: %s", left)
        return made

    @contextmanager
    def active(self, model: nn.Module, pairs: Iterable[tuple[int, int]]) -> Iterator[None]:
        """
        Within this context the kept blocks of `pairs` stand for both. The absorbed ones are not bypassed by it; bypass
        them within it, since what the kept ones take over is read from them.

        Raises:
            `ValueError`: If a pair has not been distilled.
        """
        blocks = get_blocks(model)
        with ExitStack() as stack:
            for pair in pairs:
                if pair not in self.pairs:
                    raise ValueError(f"the plan merges the pair {list(pair)}, which has not been distilled")
                stack.enter_context(self.pairs[pair].active(blocks, pair[0]))
            yield

    def start_adapter(self, model: nn.Module, adapter: str, pairs: Iterable[tuple[int, int]]) -> None:
        """
        Sets what `adapter` starts with in the kept blocks of `pairs`.

        Args:
            model (`nn.Module`): The dense model with LoRA adapters.
            adapter (`str`): The stage's.
            pairs (`Iterable[tuple[int, int]]`): The stage plan's `merged_blocks`.

        Raises:
            `ValueError`: If the adapter leaves out a layer that a merged block needs, or has too small a rank there.
        """
        for pair in pairs:
            self.pairs[pair].start_adapter(get_blocks(model), pair[0], adapter)

    # The artefact

    def save_pretrained(self, save_directory: str | os.PathLike) -> Path:
        """Writes `merged_pairs.safetensors` into the folder, as a whole or not at all; returns its path."""
        tensors, layers = {}, {}
        for (kept, absorbed), fit in self.pairs.items():
            tensors |= {f"{kept}.{absorbed}.{name}": tensor for name, tensor in fit.tensors().items()}
            layers[f"{kept}.{absorbed}"] = [fit.output_layer, *(fit.neurons.input_layers if fit.neurons else ())]
        metadata = {
            "fingerprint": self.fingerprint,
            "source": self.source,
            "block_tokens": str(self.block_tokens),
            "layers": json.dumps(layers),
        }
        return write_artefact(Path(save_directory) / MERGED_PAIRS_FILE_NAME, save(tensors, metadata))

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike, model: nn.Module) -> "MergedPairs":
        """
        Reads what [`save_pretrained`] wrote.

        Raises:
            `ValueError`: If it is not such a file, or of another model.
        """
        path = Path(folder) / MERGED_PAIRS_FILE_NAME
        by_pair: dict[str, dict[str, torch.Tensor]] = {}
        try:
            with safe_open(path, "pt", device=str(input_device(model))) as file:
                metadata = file.metadata() or {}
                for name in file.keys():  # noqa: SIM118
                    pair, _, part = name.rpartition(".")
                    by_pair.setdefault(pair, {})[part] = file.get_tensor(name)
            layers = json.loads(metadata["layers"])
            pairs = {
                tuple(map(int, pair.split("."))): GapFit.from_tensors(tensors, layers[pair][0], layers[pair][1:])
                for pair, tensors in by_pair.items()
            }
            read = cls(pairs, metadata["fingerprint"], metadata.get("source", ""))
            read.block_tokens = int(metadata["block_tokens"])
        except (SafetensorError, KeyError, ValueError, IndexError) as error:
            raise ValueError(f"{path} holds no merged pairs: {error}") from error
        if read.fingerprint != _fingerprint(model):
            raise ValueError(f"{path} holds the merged pairs of another model")
        return read


def _fingerprint(model: nn.Module) -> str:
    with whole_embeddings(model):
        return model_fingerprint(model)
