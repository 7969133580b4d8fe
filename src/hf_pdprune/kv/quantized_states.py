"""QuantizedStates: keys or values of a block in 8 or 4 bits, with scales per token."""

import functools
from dataclasses import dataclass

import torch


QUANTIZATIONS = ("fp8", "int8", "int4")
_FP8_MAX = 448.0  # of torch.float8_e4m3fn
# Numbers that share a scale in 4 bits, the first of these that divides a head; 8 bits share one per token and head.
_INT4_GROUPS = (64, 32)


@dataclass
class QuantizedStates:
    """
    Keys or values of a block, quantised per token and head. int8 and fp8 are symmetric, `x = scale * code`. int4 has
    an offset, `x = offset + scale * code`, and a scale for every 64 (or 32) numbers of a head. These are rotated
    before, by signs and a Hadamard matrix (QuaRot, arXiv 2404.00456), so that no channel is much larger than others.

    Args:
        codes (`torch.Tensor`): Shape `(batch_size, num_heads, tokens, head_dim)`, int8 or float8_e4m3fn; for int4
            uint8 of shape `(batch_size, num_heads, tokens, head_dim / 2)`, two numbers in a byte, the first one low.
        scales (`torch.Tensor`): bfloat16, shape `(batch_size, num_heads, tokens, groups)`.
        dtype (`torch.dtype`): Of the states that were quantised, and that come out again.
        offsets (`torch.Tensor`, *optional*): bfloat16, shape as `scales`; int4 has them.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    dtype: torch.dtype
    offsets: torch.Tensor | None = None

    @classmethod
    def quantize(cls, states: torch.Tensor, kind: str) -> "QuantizedStates":
        """
        Args:
            states (`torch.Tensor`): Floating point, of shape `(batch_size, num_heads, tokens, head_dim)`.
            kind (`str`): `"fp8"`, `"int8"` or `"int4"`.

        Raises:
            `ValueError`: If `kind` is unknown, if int4 cannot pack an odd `head_dim`, or if states are not finite.
        """
        if kind not in QUANTIZATIONS:
            raise ValueError(f"quantization must be one of {', '.join(QUANTIZATIONS)}, got {kind!r}")
        states = states.detach()
        if not torch.isfinite(states).all():
            raise ValueError("keys or values hold NaN or infinity: they cannot be quantised")
        if kind == "int4":
            return cls._int4(states)
        numbers = states.float()
        largest = 127.0 if kind == "int8" else _FP8_MAX
        # The scale is rounded before it is used, so that its rounding costs nothing; no scale is 0.
        scales = _bfloat16_at_least(numbers.abs().amax(dim=-1, keepdim=True) / largest)
        scaled = numbers / scales.float()
        codes = scaled.round().to(torch.int8) if kind == "int8" else scaled.to(torch.float8_e4m3fn)
        return cls(codes, scales, states.dtype)

    @classmethod
    def _int4(cls, states: torch.Tensor) -> "QuantizedStates":
        head_dim = states.shape[-1]
        if head_dim % 2:
            raise ValueError(f"int4 packs two numbers in a byte: head_dim must be even, got {head_dim}")
        numbers = _rotated(states.float()).unflatten(-1, (-1, int4_group(head_dim)))
        low = numbers.amin(dim=-1, keepdim=True)
        offsets = _bfloat16_at_most(low)
        scales = _bfloat16_at_least((numbers.amax(dim=-1, keepdim=True) - offsets.float()) / 15)
        codes = ((numbers - offsets.float()) / scales.float()).round().clamp(0, 15).to(torch.uint8).flatten(-2)
        packed = codes[..., ::2] | codes[..., 1::2] << 4
        return cls(packed, scales.squeeze(-1), states.dtype, offsets.squeeze(-1))

    def dequantize(self) -> torch.Tensor:
        """The states, shape `(batch_size, num_heads, tokens, head_dim)`, of the dtype that they had."""
        if self.offsets is None:
            return (self.codes.float() * self.scales.float()).to(self.dtype)
        codes = torch.stack([self.codes & 15, self.codes >> 4], dim=-1).flatten(-2)
        groups = codes.float().unflatten(-1, (self.scales.shape[-1], -1))
        rotated = groups * self.scales.float()[..., None] + self.offsets.float()[..., None]
        return _rotated_back(rotated.flatten(-2)).to(self.dtype)

    @property
    def shape(self) -> torch.Size:
        """Shape of the states."""
        packed = 1 if self.offsets is None else 2
        return torch.Size((*self.codes.shape[:-1], self.codes.shape[-1] * packed))

    def tensors(self) -> dict[str, torch.Tensor]:
        """What is sent, by name."""
        sent = {"codes": self.codes, "scales": self.scales, "offsets": self.offsets}
        return {name: tensor for name, tensor in sent.items() if tensor is not None}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors().values())

    def is_valid(self, kind: str) -> bool:
        """Whether the tensors are what quantising to `kind` gives: what comes over a wire may be anything."""
        dtype = {"fp8": torch.float8_e4m3fn, "int8": torch.int8, "int4": torch.uint8}[kind]
        if self.codes.dtype != dtype or self.codes.dim() != 4 or (self.offsets is None) != (kind != "int4"):
            return False
        head_dim = self.shape[-1]
        groups = head_dim // int4_group(head_dim) if kind == "int4" else 1
        expected = (*self.codes.shape[:-1], groups)
        parts = [part for part in (self.scales, self.offsets) if part is not None]
        return all(part.dtype == torch.bfloat16 and part.shape == expected for part in parts)

    def to(self, device: torch.device | str) -> "QuantizedStates":
        """The same with its tensors on `device`."""
        moved = {name: tensor.to(device) for name, tensor in self.tensors().items()}
        return QuantizedStates(dtype=self.dtype, **moved)


def int4_group(head_dim: int) -> int:
    """How many numbers of a head share a scale in int4: 64 or 32 where that fits, else all."""
    return next((size for size in _INT4_GROUPS if head_dim % size == 0), head_dim)


def _rotated(numbers: torch.Tensor) -> torch.Tensor:
    """The numbers of each head, some of them negated, times a Hadamard matrix."""
    return _hadamard(numbers * _signs(numbers))


def _rotated_back(numbers: torch.Tensor) -> torch.Tensor:
    return _hadamard(numbers) * _signs(numbers)


def _signs(numbers: torch.Tensor) -> torch.Tensor:
    """Rudin and Shapiro's sequence. Without it, what all numbers have in common would end up in one of them."""
    signs = [1 - 2 * ((index & index >> 1).bit_count() % 2) for index in range(numbers.shape[-1])]
    return torch.tensor(signs, dtype=numbers.dtype, device=numbers.device)


def _hadamard(numbers: torch.Tensor) -> torch.Tensor:
    """
    The numbers of each head times an orthonormal Hadamard matrix (block by block where `head_dim` is no power of two).
    It is its own inverse. For as few numbers as a head has, a product is faster than the fast transform.
    """
    head_dim = numbers.shape[-1]
    size = head_dim & -head_dim  # the largest power of two that divides it
    return (numbers.unflatten(-1, (-1, size)) @ _hadamard_matrix(size).to(numbers)).flatten(-2)


@functools.cache
def _hadamard_matrix(size: int) -> torch.Tensor:
    """Sylvester's, of shape `(size, size)`."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], dim=1), torch.cat([matrix, -matrix], dim=1)])
    return matrix / size**0.5


def _bfloat16_at_least(numbers: torch.Tensor) -> torch.Tensor:
    """The nearest positive bfloat16 numbers that are not smaller: no code then exceeds its range."""
    return -_bfloat16_at_most(-numbers.clamp(min=torch.finfo(torch.bfloat16).tiny))


def _bfloat16_at_most(numbers: torch.Tensor) -> torch.Tensor:
    """The nearest bfloat16 numbers that are not larger."""
    rounded = numbers.bfloat16()
    below = torch.nextafter(rounded, torch.full_like(rounded, -torch.inf))
    return torch.where(rounded.float() > numbers, below, rounded)
