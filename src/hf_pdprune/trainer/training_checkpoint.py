"""Checkpoints of a training: which of them are complete, and whether they fit the model."""

import json
import os
from contextlib import suppress
from pathlib import Path

from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers.trainer import TRAINER_STATE_NAME

from .whole_weights import set_sharded


ADAPTER_FILE_NAME = "adapter_model.safetensors"


class DivergenceError(RuntimeError):
    """
    The loss or the weights are no numbers any more.

    Args:
        what (`str`): What is wrong.
        step (`int`): The step, counted from 1.
        output_dir (`str`): Where checkpoints are; the last good one is named.
    """

    def __init__(self, what: str, step: int, output_dir: str | os.PathLike):
        checkpoint = last_complete_checkpoint(output_dir)
        good = f"the last good checkpoint is {checkpoint}" if checkpoint else "no checkpoint was saved before"
        super().__init__(
            f"training diverged at step {step}: {what}; {good}. Try a lower learning_rate or max_grad_norm"
        )


def last_complete_checkpoint(folder: str | os.PathLike) -> str | None:
    """
    The latest checkpoint in a folder that was written to the end, if any. A kill while one is written leaves it
    without its last file, `trainer_state.json`; the ones before it are whole.
    """
    complete = []
    for path in Path(folder).glob("checkpoint-*"):
        with suppress(OSError, ValueError, KeyError):
            complete.append((json.loads((path / TRAINER_STATE_NAME).read_text())["global_step"], str(path)))
    return max(complete)[1] if complete else None


def begin_checkpoint(folder: str | os.PathLike) -> None:
    """Marks a checkpoint of an earlier run as incomplete before its files are replaced."""
    (Path(folder) / TRAINER_STATE_NAME).unlink(missing_ok=True)


def load_adapters(folder: str | os.PathLike, model: PeftModel, trained: tuple[str, ...]) -> None:
    """
    Sets a model's adapters to those of a checkpoint, in all processes, and changes nothing else of them.

    Args:
        folder (`str`): The checkpoint.
        model ([`~peft.PeftModel`]): The model; FSDP may have sharded it.
        trained (`tuple[str, ...]`): Names of the adapters that learn, which the checkpoint must have.

    Raises:
        `ValueError`: Unless the checkpoint's adapters are the model's, with exactly their weights: peft leaves out
            what does not fit, and training would go on from something else.
    """
    there = {path.parent.name for path in Path(folder).glob(f"*/{ADAPTER_FILE_NAME}")}
    for adapter in trained:
        if adapter not in there:
            path = Path(folder) / adapter / ADAPTER_FILE_NAME
            raise ValueError(f"the checkpoint {folder} has no adapter {adapter!r} ({path} is missing)")
    for adapter in sorted(there):
        if adapter not in model.peft_config:
            raise ValueError(
                f"the checkpoint {folder} has an adapter {adapter!r}, which the model lacks: its training began with "
                "a model that had one"
            )
        _check_adapter(Path(folder) / adapter / ADAPTER_FILE_NAME, model, adapter)
    for adapter in sorted(there):
        weights = load_file(Path(folder) / adapter / ADAPTER_FILE_NAME)
        if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
            # These share memory with the model's parameters, and have the names that peft gives them in a file.
            set_sharded(get_peft_model_state_dict(model, adapter_name=adapter), weights)
        else:
            set_peft_model_state_dict(model, weights, adapter_name=adapter)


def _check_adapter(path: Path, model: PeftModel, adapter: str) -> None:
    expected = {
        name: tuple(tensor.shape) for name, tensor in get_peft_model_state_dict(model, adapter_name=adapter).items()
    }
    with safe_open(path, framework="pt") as file:
        there = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    for name in sorted(expected.keys() | there.keys()):
        if expected.get(name) != there.get(name):
            raise ValueError(
                f"the checkpoint's adapter {path} is not that of this model: {name} has shape {there.get(name)} "
                f"there and {expected.get(name)} here (None: it is missing); the same plan, lora_rank and "
                "peft_config are needed"
            )
