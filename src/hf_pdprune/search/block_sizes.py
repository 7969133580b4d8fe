"""Block sizes: parameters that stand for time, and how many blocks a speedup takes."""

from torch import nn

from ..blocks import get_blocks
from ..projected_blocks import idle_layers
from ..spread_weights import num_parameters


def head_size(model: nn.Module) -> int:
    """Parameters of the LM head, tied to the embeddings or not."""
    head = model.get_output_embeddings()
    return 0 if head is None else num_parameters(head)


def idle_sizes(model: nn.Module) -> list[int]:
    """By block, the parameters that are left out where it is projected."""
    sizes = []
    for number, block in enumerate(get_blocks(model)):
        idle = [block.get_submodule(name) for name in idle_layers(model, number)]
        sizes.append(sum(map(num_parameters, idle)))
    return sizes


def fewest_blocks(name: str, speedup: float, total: float, block: float, most: int) -> int:
    """
    The fewest blocks without which something is `speedup` times faster.

    Args:
        name (`str`): The option that asks for it, for the error.
        speedup (`float`): How many times faster.
        total (`float`): What it takes with all blocks.
        block (`float`): What one of them takes, on average.
        most (`int`): Blocks that can go.

    Raises:
        `ValueError`: If all of these are not enough.
    """
    for count in range(most + 1):
        if total / (total - count * block) >= speedup - 1e-9:  # speedups are given as rounded numbers
            return count
    raise ValueError(
        f"{name} {speedup} cannot be met: without all {most} blocks that are not protected it is "
        f"{total / (total - most * block):.2f}"
    )
