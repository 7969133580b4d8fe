"""BlockStatistics: how redundant each block is, from one pass over any text."""

import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import reduce
from torch import nn
from tqdm.auto import tqdm

from ..adapters import active_adapter
from ..artefact_file import read_json, write_artefact
from ..blocks import get_blocks, num_blocks
from ..evaluating import evaluating
from ..inference.stage import position_ids
from ..spread_weights import gathering, in_step, input_device
from ..version import __version__


logger = logging.getLogger(__name__)

STATISTICS_FILE_NAME = "block_statistics.json"
FORMAT_VERSION = 1
_KEYS = (
    "format_version",
    "hf_pdprune_version",
    "base_model",
    "model_type",
    "num_hidden_layers",
    "num_tokens",
    "redundancy",
)


class BlockStatistics:
    """
    Mean cosine similarity of every block's input and output hidden states over real tokens: the redundancy by which
    ShortGPT (arXiv 2403.03853) ranks blocks and PDTrim (arXiv 2509.04467) divides them. Accumulators only: no hidden
    state is kept.

    Args:
        base_model (`str`): Repo id or name of the dense model.
        model_type (`str`): `config.model_type` of it.
        num_hidden_layers (`int`): Its blocks.

    Example:

    ```python
    statistics = BlockStatistics.measure(model, calibration.batches)
    statistics.save_pretrained("outputs/demo")
    most_redundant = statistics.ranking[0]
    ```
    """

    def __init__(self, base_model: str, model_type: str, num_hidden_layers: int):
        self.base_model = base_model
        self.model_type = model_type
        self.num_hidden_layers = num_hidden_layers
        self.num_tokens = 0
        self._sums = torch.zeros(num_hidden_layers, dtype=torch.float64)

    # Accumulating

    def update(self, block: int, inputs: torch.Tensor, outputs: torch.Tensor, mask: torch.Tensor) -> None:
        """
        Adds what one block does to a batch. The tokens of the batch are counted with block 0.

        Args:
            block (`int`): Its number.
            inputs (`torch.Tensor`): Hidden states before it, shape `(batch_size, tokens, hidden_size)`.
            outputs (`torch.Tensor`): Hidden states after it, of the same shape.
            mask (`torch.Tensor`): Shape `(batch_size, tokens)`, 0 for padding.

        Raises:
            `ValueError`: If a real token's hidden states are not finite; it names the block.
        """
        real = mask.to(outputs.device).bool()
        inputs, outputs = inputs.to(outputs.device)[real].float(), outputs[real].float()
        for name, states in (("input", inputs), ("output", outputs)):
            if not bool(torch.isfinite(states).all()):
                raise ValueError(
                    f"block {block}: its {name} hidden states hold NaN or infinity (a dtype too narrow for it?)"
                )
        self._sums[block] += F.cosine_similarity(inputs, outputs, dim=-1).double().sum().cpu()
        if block == 0:
            self.num_tokens += int(real.sum())

    def merge(self, other: "BlockStatistics") -> None:
        """Adds what `other`, of the same model, has seen."""
        if (self.model_type, self.num_hidden_layers) != (other.model_type, other.num_hidden_layers):
            raise ValueError(
                f"statistics of {other.model_type} with {other.num_hidden_layers} blocks cannot be merged into those "
                f"of {self.model_type} with {self.num_hidden_layers}"
            )
        self._sums += other._sums
        self.num_tokens += other.num_tokens

    @contextmanager
    def observe(self, model: nn.Module, mask: torch.Tensor) -> Iterator[None]:
        """Within this context a forward of `model` over tokens with this `mask` updates the statistics."""
        with ExitStack() as hooks:
            for number, block in enumerate(get_blocks(model)):
                handle = block.register_forward_hook(self._hook(number, mask), with_kwargs=True)
                hooks.callback(handle.remove)
            yield

    def _hook(self, number: int, mask: torch.Tensor) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: torch.Tensor | tuple) -> None:
            inputs = args[0] if args else kwargs["hidden_states"]
            self.update(number, inputs, output[0] if isinstance(output, tuple) else output, mask)

        return hook

    @classmethod
    def measure(
        cls, model: nn.Module, batches: Iterable[Mapping[str, torch.Tensor]], base_model: str | None = None
    ) -> "BlockStatistics":
        """
        One pass of the dense model, without adapters. Where several processes run, each passes its share of the
        batches, and all get the same result.

        Args:
            model (`nn.Module`): The dense model, wrapped by peft or not.
            batches (`Iterable[Mapping]`): Either `input_ids` and `attention_mask`, or `prompt_ids`, `prompt_mask`,
                `completion_ids` and `completion_mask`; each of shape `(batch_size, tokens)`.
            base_model (`str`, *optional*): Repo id to record. Default: what the config says.

        Raises:
            `ValueError`: If there is no batch, or if hidden states are not finite.
        """
        config = model.config
        statistics = cls(
            base_model or config._name_or_path or config.model_type, config.model_type, num_blocks(config)
        )
        device = input_device(model)
        disable = not PartialState().is_main_process
        progress = tqdm(in_step(model, batches), desc="Block statistics", unit="batch", disable=disable)
        with gathering(model), evaluating(model), active_adapter(model, None):
            for batch in progress:
                counts = batch is not None
                tokens = _tokens_of(batch) if counts else [torch.ones((1, 1), dtype=torch.long)] * 2
                ids, mask = (tensor.to(device) for tensor in tokens)
                with statistics.observe(model, mask) if counts else nullcontext():
                    model(input_ids=ids, attention_mask=mask, position_ids=position_ids(mask), use_cache=False)
                progress.set_postfix(tokens=statistics.num_tokens)
        statistics._reduce(device)
        if not statistics.num_tokens:
            raise ValueError("block statistics: there is no calibration batch")
        logger.info("block statistics: %d tokens", statistics.num_tokens)
        return statistics

    def _reduce(self, device: torch.device) -> None:
        """Adds up what all processes have seen."""
        if PartialState().num_processes > 1:
            counted = torch.cat([self._sums, torch.tensor([self.num_tokens], dtype=torch.float64)]).to(device)
            *sums, tokens = reduce(counted, "sum").tolist()
            self._sums, self.num_tokens = torch.tensor(sums, dtype=torch.float64), int(tokens)

    # Result

    @property
    def redundancy(self) -> tuple[float, ...]:
        """Mean cosine similarity of input and output per block, 1 for a block that changes no direction."""
        if not self.num_tokens:
            raise ValueError("block statistics: no token has been seen")
        return tuple((self._sums / self.num_tokens).tolist())

    @property
    def ranking(self) -> tuple[int, ...]:
        """Block numbers, the most redundant first."""
        redundancy = self.redundancy
        return tuple(sorted(range(self.num_hidden_layers), key=lambda block: (-redundancy[block], block)))

    # The artefact

    def save_pretrained(self, save_directory: str | os.PathLike) -> Path:
        """Writes `block_statistics.json` into the folder, as a whole or not at all; returns its path."""
        data = {
            "format_version": FORMAT_VERSION,
            "hf_pdprune_version": __version__,
            "base_model": self.base_model,
            "model_type": self.model_type,
            "num_hidden_layers": self.num_hidden_layers,
            "num_tokens": self.num_tokens,
            "redundancy": list(self.redundancy),
        }
        return write_artefact(Path(save_directory) / STATISTICS_FILE_NAME, data)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike) -> "BlockStatistics":
        """
        Reads `block_statistics.json` from a folder (or the file itself).

        Raises:
            `FileNotFoundError`: If there is none.
            `ValueError`: If it is not valid; it names the key.
        """
        path = Path(folder)
        path = path / STATISTICS_FILE_NAME if path.is_dir() else path
        if not path.is_file():
            raise FileNotFoundError(f"no {STATISTICS_FILE_NAME} in {folder!s}")
        data = read_json(path)
        _check(data, path)
        statistics = cls(data["base_model"], data["model_type"], data["num_hidden_layers"])
        statistics.num_tokens = data["num_tokens"]
        statistics._sums = torch.tensor(data["redundancy"], dtype=torch.float64) * data["num_tokens"]
        return statistics


def _tokens_of(batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and padding mask of a batch of either kind."""
    if "input_ids" in batch:
        ids = batch["input_ids"]
        return ids, batch.get("attention_mask", torch.ones_like(ids))
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    return ids, torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)


def _check(data: Any, path: Path) -> None:
    """Raises a `ValueError` that names the key of a statistics file which is wrong."""
    if not isinstance(data, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(data).__name__}")
    for key in (*data, *_KEYS):
        if key not in _KEYS or key not in data:
            raise ValueError(f"{path}: key {key!r} is {'missing' if key in _KEYS else 'unknown'}")
    if data["format_version"] != FORMAT_VERSION:
        raise ValueError(f"{path}: format_version {data['format_version']!r} is not known, only {FORMAT_VERSION}")
    for key in ("base_model", "model_type"):
        if not isinstance(data[key], str):
            raise ValueError(f"{path}: {key} must be a text, got {data[key]!r}")
    for key in ("num_hidden_layers", "num_tokens"):
        if isinstance(data[key], bool) or not isinstance(data[key], int) or data[key] < 1:
            raise ValueError(f"{path}: {key} must be a positive whole number, got {data[key]!r}")
    values = data["redundancy"]
    numbers = isinstance(values, list) and all(isinstance(v, float | int) and -1.001 <= v <= 1.001 for v in values)
    if not numbers or len(values) != data["num_hidden_layers"]:
        raise ValueError(f"{path}: redundancy must be a list of {data['num_hidden_layers']} numbers from -1 to 1")
