import copy

import pytest
import torch
import torch.distributed as dist
from masked_reference import random_prompts
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from hf_pdprune.trainer.whole_weights import set_sharded, whole_weights


@pytest.fixture
def sharded(tiny_llama):
    """A model that FSDP2 has sharded over one process, and its weights before."""
    before = {name: tensor.clone() for name, tensor in tiny_llama.state_dict().items()}
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    mesh = dist.init_device_mesh("cpu", (1,))
    for block in tiny_llama.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(tiny_llama, mesh=mesh)
    yield tiny_llama, before
    dist.destroy_process_group()


@pytest.fixture
def partitioned(tiny_llama, monkeypatch):
    """A model that ZeRO-3 has partitioned over one process (a hook of it must not be called), and its weights."""
    deepspeed = pytest.importorskip("deepspeed")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(deepspeed.comm.comm, "cdb", None)  # what it knows of processes is this test's
    # It would be compiled, for minutes and behind a lock, on every fresh machine; gloo does the same.
    monkeypatch.setitem(deepspeed.ops.__compatible_ops__, "deepspeed_shm_comm", False)
    before = {name: tensor.clone() for name, tensor in tiny_llama.state_dict().items()}
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed("gloo")
    deepspeed.zero.Init(
        module=tiny_llama, config_dict_or_path={"train_batch_size": 1, "zero_optimization": {"stage": 3}}
    )
    handle = tiny_llama.model.embed_tokens.register_forward_pre_hook(
        lambda *_: pytest.fail("a hook of ZeRO-3 would gather")
    )
    yield tiny_llama, before
    handle.remove()
    dist.destroy_process_group()


@torch.no_grad()
def logits_of(model):
    ids, mask = random_prompts([9, 4])
    return model(input_ids=ids, attention_mask=mask).logits[mask.bool()]


def test_an_ordinary_model_is_left_as_it_is(tiny_llama):
    parameters = list(tiny_llama.parameters())
    with whole_weights(tiny_llama):
        assert all(a is b for a, b in zip(tiny_llama.parameters(), parameters, strict=True))


def test_what_fsdp_has_sharded_is_an_ordinary_model_for_a_while(sharded, tiny_model):
    model, before = sharded
    expected = logits_of(model)  # leaves weights of the root gathered
    torch.testing.assert_close(expected, logits_of(tiny_model("llama")))
    with pytest.raises(RuntimeError), whole_weights(model):
        assert not any(isinstance(parameter, DTensor) for parameter in model.parameters())
        assert not any(isinstance(module, FSDPModule) for module in model.modules())
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, before[name]), name
        torch.testing.assert_close(logits_of(model), expected)
        torch.testing.assert_close(logits_of(copy.deepcopy(model)), expected)
        raise RuntimeError
    with whole_weights(model, keep=False):
        assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    assert isinstance(model, FSDPModule) and isinstance(model.model.layers[0], FSDPModule)
    torch.testing.assert_close(logits_of(model), expected)


def test_what_zero_has_partitioned_is_an_ordinary_model_for_a_while(partitioned, tiny_model):
    model, before = partitioned
    assert all(parameter.numel() == 0 for parameter in model.parameters())
    with pytest.raises(RuntimeError), whole_weights(model):
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, before[name]), name
        torch.testing.assert_close(logits_of(model), logits_of(tiny_model("llama")))
        raise RuntimeError
    with whole_weights(model, keep=False):
        assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert all(parameter.numel() == 0 and hasattr(parameter, "ds_status") for parameter in model.parameters())
    with pytest.raises(pytest.fail.Exception, match="would gather"):
        logits_of(model)


def test_tied_weights_stay_tied(sharded):
    model, _ = sharded
    model.lm_head.weight = model.model.embed_tokens.weight
    with whole_weights(model):
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert not isinstance(model.lm_head.weight, DTensor)


def test_sharded_weights_are_set(sharded):
    model, before = sharded
    values = {name: torch.full_like(tensor, 0.5) for name, tensor in before.items()}
    set_sharded(dict(model.named_parameters()), values)
    with whole_weights(model):
        assert all(bool((parameter == 0.5).all()) for parameter in model.parameters())
