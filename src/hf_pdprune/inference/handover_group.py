"""Hand-over group: the process group of the two stages, over NCCL where each has a GPU of its own, else over gloo."""

from typing import Any

import torch
import torch.distributed as dist


def choose_backend(rank: int, num_gpus: int) -> tuple[str, torch.device]:
    """
    How one of the two processes of a hand-over talks to the other one, and where its model runs.

    Args:
        rank (`int`): 0 for prefill, 1 for decode.
        num_gpus (`int`): GPUs that NCCL can use on this machine, see [`nccl_gpus`].

    Returns:
        `tuple[str, torch.device]`: `"nccl"` and the process's own GPU where there is one for each, else `"gloo"` and
        the CPU: NCCL does not connect two processes that share a GPU.
    """
    if rank not in (0, 1):
        raise ValueError(f"rank must be 0 (prefill) or 1 (decode), got {rank}")
    return ("nccl", torch.device("cuda", rank)) if num_gpus >= 2 else ("gloo", torch.device("cpu"))


def nccl_gpus() -> int:
    """How many GPUs of this machine NCCL can use."""
    return torch.cuda.device_count() if dist.is_nccl_available() else 0


def init_handover_group(rank: int, **kwargs: Any) -> torch.device:
    """
    `torch.distributed.init_process_group` for one of the two processes on this machine, by [`choose_backend`].

    Args:
        rank (`int`): 0 for prefill, 1 for decode.
        kwargs: As for `init_process_group` (`store`, `timeout`, ...).

    Returns:
        `torch.device`: Where this process's model belongs, and what [`send_payload`] and [`receive_payload`] take.
    """
    backend, device = choose_backend(rank, nccl_gpus())
    if backend == "nccl":
        torch.cuda.set_device(device)
        kwargs["device_id"] = device
    dist.init_process_group(backend, rank=rank, world_size=2, **kwargs)
    return device
