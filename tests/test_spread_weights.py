import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from torch import nn

from hf_pdprune import spread_weights
from hf_pdprune.blocks import bypass_blocks, get_blocks
from hf_pdprune.fingerprint import model_fingerprint
from hf_pdprune.spread_weights import (
    execution_device,
    in_step,
    input_device,
    is_partitioned,
    is_readable,
    num_parameters,
    whole_embeddings,
)


@pytest.fixture
def offloaded(tiny_model, tmp_path):
    """A model with its embeddings and every second block on disk."""
    places = {f"model.layers.{block}": "cpu" if block % 2 else "disk" for block in range(6)}
    places |= {"model.embed_tokens": "disk", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "disk"}
    return dispatch_model(tiny_model("llama"), places, offload_dir=str(tmp_path), skip_keys="past_key_values")


def partition(module):
    """Marks weights as ZeRO-3 does, and takes them away."""
    for parameter in module.parameters():
        parameter.ds_status, parameter.ds_numel = "NOT_AVAILABLE", parameter.numel()
        parameter.data = torch.empty(0)
    return module


def test_numbers_in_weights_are_counted_where_they_are_partitioned_too():
    layer = nn.Linear(3, 5)
    assert num_parameters(layer) == 20 and not is_partitioned(layer)
    assert num_parameters(partition(layer)) == 20 and is_partitioned(layer)


def test_weights_are_readable_where_they_are_here(tiny_llama, offloaded):
    blocks, others = get_blocks(tiny_llama), get_blocks(offloaded)
    assert is_readable(blocks[0], blocks[1]) and is_readable(others[1], others[3])
    assert not is_readable(others[0]) and not is_readable(others[0], others[1])
    assert not is_readable(partition(blocks[2]))


def test_tokens_go_to_where_embeddings_are_computed(tiny_model, tiny_llama, offloaded):
    assert input_device(tiny_llama) == torch.device("cpu")
    assert execution_device(get_blocks(offloaded)[0]) == torch.device("cpu")
    assert execution_device(nn.Linear(2, 2, device="meta")) == torch.device("meta")
    for model in (offloaded, cpu_offload(tiny_model("llama"), execution_device=torch.device("cpu"))):
        assert model.get_input_embeddings().weight.device == torch.device("meta")
        assert input_device(model) == torch.device("cpu")


def test_what_is_offloaded_is_the_same_model(tiny_model, offloaded):
    model = tiny_model("llama")
    assert model_fingerprint(offloaded) == model_fingerprint(model)
    ids = torch.arange(3, 20)[None]
    with torch.no_grad(), bypass_blocks(offloaded, (2, 3)), bypass_blocks(model, (2, 3)):
        assert torch.equal(offloaded(ids).logits, model(ids).logits)
    with whole_embeddings(model):  # nothing has to be done
        pass


@pytest.mark.parametrize("processes", [1, 2])
def test_processes_with_fewer_batches_keep_in_step_where_weights_are_partitioned(tiny_llama, monkeypatch, processes):
    class Processes:
        num_processes, device = processes, torch.device("cpu")

    monkeypatch.setattr(spread_weights, "PartialState", Processes)
    monkeypatch.setattr(spread_weights, "gather", lambda counts: torch.cat([counts, torch.tensor([3])]))
    assert list(in_step(tiny_llama, ["a"])) == ["a"]
    partition(get_blocks(tiny_llama)[1])
    assert list(in_step(tiny_llama, ["a"])) == ["a", None, None][: 1 if processes == 1 else 3]
    assert list(in_step(tiny_llama, [])) == [None] * (0 if processes == 1 else 3)
