import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_pdprune.kv import QUANTIZATIONS, QuantizedStates


DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def random_states(shape, dtype=torch.float32, seed=0, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(shape, generator=generator)
    # Some heads and channels are much larger than others, as keys are.
    return (states * torch.exp(spread * torch.randn(shape[-1], generator=generator))).to(dtype)


def hadamard(size):
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / size**0.5


def signs(head_dim):
    return torch.tensor([(-1.0) ** bin(i & (i >> 1)).count("1") for i in range(head_dim)], dtype=torch.float64)


def rotated(states):
    size = states.shape[-1] & -states.shape[-1]
    states = states.double() * signs(states.shape[-1])
    return (states.unflatten(-1, (-1, size)) @ hadamard(size)).flatten(-2)


def bound(states, kind):
    """The largest error that rounding to the nearest code allows, per number."""
    if kind == "int4":
        size = next(size for size in (64, 32, states.shape[-1]) if states.shape[-1] % size == 0)
        groups = rotated(states).unflatten(-1, (-1, size))
        span = groups.amax(dim=-1, keepdim=True) - groups.amin(dim=-1, keepdim=True)
        offset = groups.amin(dim=-1, keepdim=True).abs()
        # bfloat16 keeps 8 bits: scale and offset are rounded outwards by up to 1 part in 128.
        return ((span + offset / 128) / 30 * 1.02).expand_as(groups).flatten(-2)
    numbers = states.float()
    largest = numbers.abs().amax(dim=-1, keepdim=True)
    return largest / 254 * 1.02 if kind == "int8" else torch.maximum(numbers.abs() / 16 * 1.02, largest / 2**16)


@settings(deadline=None, max_examples=60)
@given(
    kind=st.sampled_from(QUANTIZATIONS),
    dtype=st.sampled_from(DTYPES),
    rows=st.integers(1, 3),
    heads=st.integers(1, 3),
    tokens=st.integers(1, 5),
    half=st.integers(1, 40),
    seed=st.integers(0, 2**16),
)
def test_error_is_that_of_rounding(kind, dtype, rows, heads, tokens, half, seed):
    states = random_states((rows, heads, tokens, 2 * half), dtype, seed)
    quantized = QuantizedStates.quantize(states, kind)
    assert quantized.is_valid(kind)
    assert quantized.shape == states.shape
    back = quantized.dequantize()
    assert back.dtype == dtype
    # int4 rounds rotated numbers; what comes back, and goes into the rotation again, is rounded to dtype.
    view = rotated if kind == "int4" else torch.Tensor.float
    rounding = states.float().abs().amax(dim=-1, keepdim=True) * torch.finfo(dtype).eps
    rounding = rounding * (2 * half) ** 0.5 if kind == "int4" else states.float().abs() * torch.finfo(dtype).eps
    assert ((view(back) - view(states)).abs() <= bound(states, kind) + rounding).all()


@pytest.mark.parametrize("kind", QUANTIZATIONS)
@pytest.mark.parametrize("value", [0.0, 1.0, -3.5, 1e-30, -1e30])
def test_constant_states(kind, value):
    states = torch.full((1, 1, 2, 64), value)
    back = QuantizedStates.quantize(states, kind).dequantize()
    assert torch.isfinite(back).all()
    assert torch.allclose(back, states, rtol=0.04 if kind == "int4" else 0.01, atol=1e-30)


def test_a_large_channel_does_not_drown_the_others():
    states = random_states((1, 1, 8, 64), spread=0.0)
    states[..., 5] *= 100
    back = QuantizedStates.quantize(states, "int4").dequantize()
    error = (back - states).abs().mean() / states.abs().mean()
    assert error < 0.5
    spread = (states.amax(-1) - states.amin(-1)).mean() / 15 / 4  # mean error of rounding without a rotation
    assert (back - states).abs().mean() < 0.6 * spread


def test_ends_of_the_range_are_reached():
    states = torch.linspace(-2, 2, 64).view(1, 1, 1, 64)
    back = QuantizedStates.quantize(states, "int8").dequantize()
    assert (back - states).abs().max() < 0.02
    codes = QuantizedStates.quantize(states, "int4").codes
    assert {0, 15} <= set((codes & 15).flatten().tolist()) | set((codes >> 4).flatten().tolist())


@pytest.mark.parametrize(("kind", "ratio"), [("fp8", 3.87), ("int8", 3.87), ("int4", 7.11)])
def test_bytes(kind, ratio):
    states = random_states((2, 3, 5, 64))
    quantized = QuantizedStates.quantize(states, kind)
    assert quantized.nbytes == sum(tensor.nbytes for tensor in quantized.tensors().values())
    assert states.nbytes / quantized.nbytes == pytest.approx(ratio, abs=0.02)


def test_tokens_do_not_change_each_other():
    # So that the window can be chosen before or after, and blocks be sent token by token.
    states = random_states((2, 3, 8, 64))
    for kind in QUANTIZATIONS:
        whole = QuantizedStates.quantize(states, kind).dequantize()
        part = QuantizedStates.quantize(states[:, :, 2:5], kind).dequantize()
        assert torch.equal(whole[:, :, 2:5], part)


def test_order_of_packed_numbers():
    # Signs and Hadamard matrix undo each other: these are 0 to 15 once they are rotated.
    states = (torch.arange(16.0).double() @ hadamard(16) * signs(16)).float().view(1, 1, 1, 16)
    assert QuantizedStates.quantize(states, "int4").codes.flatten().tolist() == [0x10 + 0x22 * i for i in range(8)]


def test_bad_input():
    states = random_states((1, 1, 2, 6))
    with pytest.raises(ValueError, match="quantization must be one of fp8, int8, int4, got 'int2'"):
        QuantizedStates.quantize(states, "int2")
    with pytest.raises(ValueError, match="head_dim must be even, got 5"):
        QuantizedStates.quantize(states[..., :5], "int4")
    for value in (float("nan"), float("inf")):
        states[0, 0, 1, 2] = value
        with pytest.raises(ValueError, match="NaN or infinity"):
            QuantizedStates.quantize(states, "int8")


def codes_of(quantized, kind):
    """What the codes stand for, without scales."""
    if kind == "int4":
        return torch.stack([quantized.codes & 15, quantized.codes >> 4], dim=-1).flatten(-2).float()
    return quantized.codes.float()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", QUANTIZATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_accelerator_rounds_as_the_cpu_does(accelerator, kind, dtype):
    states = random_states((2, 3, 64, 64), dtype)
    here = QuantizedStates.quantize(states, kind)
    there = QuantizedStates.quantize(states.to(accelerator), kind)
    assert there.is_valid(kind) and there.codes.device == accelerator
    moved = there.to("cpu")
    # Where a number lies between two codes, or a scale between two bfloat16 numbers, either may be taken.
    assert torch.allclose(moved.scales.float(), here.scales.float(), rtol=2**-7, atol=0)
    if kind == "int4":
        assert torch.allclose(moved.offsets.float(), here.offsets.float(), rtol=2**-7, atol=0)
    codes, expected = codes_of(moved, kind), codes_of(here, kind)
    step = 1.0 if kind != "fp8" else torch.maximum(codes.abs(), expected.abs()) / 8 + 2**-9
    assert ((codes - expected).abs() <= step).all()
    assert (codes == expected).float().mean() > 0.99
    # The same codes come out as the same numbers; int4 sums up 64 of them to rotate back.
    back, as_here = there.dequantize().cpu(), moved.dequantize()
    assert back.dtype == dtype
    if kind == "int4":
        torch.testing.assert_close(back, as_here, atol=1e-5 * float(states.abs().max()), rtol=torch.finfo(dtype).eps)
    else:
        assert torch.equal(back, as_here)
