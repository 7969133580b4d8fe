"""PeakMemory: the most memory that one model needs, where several lie on the same accelerator."""

from typing import Any

import torch
from torch import nn


class PeakMemory:
    """
    Context around what a model does. The peak is that of the model alone: its weights, and the most that was allocated
    beyond what lay on the accelerator before. Over several uses the largest counts. On a CPU nobody counts: `None`.

    Args:
        model (`nn.Module`): The model.

    Attributes:
        nbytes (`int`, *optional*): The peak in bytes.
    """

    def __init__(self, model: nn.Module):
        self.device = model.get_input_embeddings().weight.device
        tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        self.weights = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        self.nbytes: int | None = None
        self._before = 0

    def __enter__(self) -> "PeakMemory":
        if self.device.type != "cpu":
            torch.accelerator.reset_peak_memory_stats(self.device)
            self._before = torch.accelerator.memory_allocated(self.device)
        return self

    def __exit__(self, *exception: Any) -> None:
        if self.device.type != "cpu":
            more = torch.accelerator.max_memory_allocated(self.device) - self._before
            self.nbytes = max(self.nbytes or 0, self.weights + more)
