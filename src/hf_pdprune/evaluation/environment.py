"""Environment: what a measurement depends on beside the models."""

import platform
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from ..version import __version__


def describe_environment(model: nn.Module) -> dict[str, Any]:
    """Device, threads, dtype and versions, for the record beside a measurement of `model`."""
    device = model.get_input_embeddings().weight.device
    return {
        "device": _device_name(device),
        "device_type": device.type,
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": model.config._attn_implementation,
        "hf_pdprune": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cpu":
        return cpu_name()
    return torch.get_device_module(device).get_device_name(device)


def cpu_name() -> str:
    """The processor's name as its system gives it."""
    path = Path("/proc/cpuinfo")
    if path.is_file():
        for line in path.read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()
