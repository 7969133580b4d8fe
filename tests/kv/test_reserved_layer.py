import copy

import pytest
import torch
from transformers.cache_utils import DynamicLayer

from hf_pdprune.kv.reserved_layer import ReservedLayer


def states(tokens, seed=0, rows=2):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn((rows, 3, tokens, 4), generator=generator) for _ in range(2))


def run(layer, actions):
    """What a layer returns and holds after each of the actions, as tensors of their own."""
    seen = []
    for seed, (name, value) in enumerate(actions):
        if name == "update":
            returned = layer.update(*states(value, seed, rows=layer.keys.shape[0] if layer.is_initialized else 2))
            seen += [tensor.clone() for tensor in returned]
        else:
            getattr(layer, name)(value) if value is not None else getattr(layer, name)()
        if layer.is_initialized:
            seen += [layer.keys.clone(), layer.values.clone()]
    return seen


@pytest.mark.parametrize(
    "actions",
    [
        [("update", 5)] + [("update", 1)] * 80,
        [("update", 300)] + [("update", 1)] * 50,
        [("update", 5), ("update", 3), ("update", 100), ("update", 2), ("update", 31)],
        [("update", 5), ("update", 4), ("crop", -3), ("update", 1), ("crop", -1), ("crop", 0), ("update", 6)],
        [("update", 5), ("update", 1), ("reorder_cache", torch.tensor([1, 1])), ("update", 1), ("update", 1)],
        [("update", 5), ("update", 1), ("batch_repeat_interleave", 2), ("update", 1), ("update", 1)],
        [("update", 5), ("update", 1), ("batch_select_indices", torch.tensor([1])), ("update", 1), ("update", 1)],
        [("update", 5), ("update", 1), ("reset", None), ("update", 7), ("update", 1)],
        [("update", 1)] * 5,
    ],
    ids=lambda actions: "-".join(dict.fromkeys(name for name, _ in actions)) + str(actions[0][1]),
)
def test_equals_the_layer_that_concatenates(actions):
    expected, actual = run(DynamicLayer(), actions), run(ReservedLayer(), actions)
    assert len(actual) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_appending_copies_nothing_while_the_reserve_lasts():
    layer = ReservedLayer()
    layer.update(*states(1000))
    assert layer.reserved_tokens == 1000  # nothing in reserve before decode begins
    layer.update(*states(1))
    assert layer.reserved_tokens == 1001 + 125
    memory = layer.keys.data_ptr(), layer.values.data_ptr()
    for _ in range(125):
        layer.update(*states(1))
        assert (layer.keys.data_ptr(), layer.values.data_ptr()) == memory
    layer.update(*states(1))
    assert layer.keys.data_ptr() != memory[0]


@pytest.mark.parametrize(("held", "reserve"), [(8, 32), (400, 50), (4000, 256)])
def test_reserve_is_bounded(held, reserve):
    layer = ReservedLayer()
    layer.update(*states(held))
    layer.update(*states(1))
    assert layer.reserved_tokens == held + 1 + reserve
    layer.reset()
    assert layer.reserved_tokens == 0


def test_a_long_piece_gets_no_reserve():
    layer = ReservedLayer()
    layer.update(*states(40))
    layer.update(*states(40))
    assert layer.reserved_tokens == layer.keys.shape[-2] == 80
    assert layer.keys.untyped_storage().nbytes() == layer.keys.numel() * 4


def test_a_copy_does_not_write_into_its_origin():
    layer = ReservedLayer()
    layer.update(*states(5))
    layer.update(*states(1))
    duplicate = copy.deepcopy(layer)
    layer.update(*states(1, seed=1))
    before = layer.keys.clone()
    assert duplicate.reserved_tokens == layer.reserved_tokens
    duplicate.update(*states(1, seed=2))
    assert torch.equal(layer.keys, before)
    assert torch.equal(duplicate.keys[:, :, :6], before[:, :, :6])
    assert torch.equal(duplicate.keys[:, :, 6:], states(1, seed=2)[0])


def test_tensors_from_elsewhere_are_not_written_to():
    # What a payload brings belongs to the payload.
    layer, (keys, values) = ReservedLayer(), states(5)
    layer.lazy_initialization(keys, values)
    layer.keys, layer.values = keys, values
    before = keys.clone()
    layer.update(*states(1, seed=1))
    layer.crop(-3)
    layer.update(*states(2, seed=2))
    assert torch.equal(keys, before)


def test_a_turn_outside_of_the_inference_mode_of_the_first_one():
    with torch.inference_mode():
        layer = ReservedLayer()
        for seed, tokens in enumerate((6, 1, 1)):
            layer.update(*states(tokens, seed))
    keys, values = layer.update(*states(1, seed=3))
    parts = [states(tokens, seed) for seed, tokens in enumerate((6, 1, 1, 1))]
    for actual, expected in zip((keys, values), zip(*parts, strict=True), strict=True):
        assert torch.equal(actual, torch.cat(expected, dim=-2))


def test_gradients_flow_through_what_is_appended():
    layer = ReservedLayer()
    layer.update(*states(5))
    layer.update(*states(1))
    keys, values = (tensor.requires_grad_() for tensor in states(2, seed=1))
    all_keys, all_values = layer.update(keys, values)
    (all_keys.square().sum() + all_values.sum()).backward()
    assert torch.allclose(keys.grad, 2 * keys.detach())
    assert torch.equal(values.grad, torch.ones_like(values))
    first = all_keys.detach().clone()
    layer.update(*states(1, seed=2))
    assert torch.equal(all_keys, first)
