import pytest
import torch
import torch.distributed as dist

from hf_pdprune.inference import choose_backend, init_handover_group, nccl_gpus


@pytest.mark.parametrize(("num_gpus", "backend"), [(0, "gloo"), (1, "gloo"), (2, "nccl"), (8, "nccl")])
def test_a_gpu_for_each_or_gloo(num_gpus, backend):
    for rank in (0, 1):
        device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
        assert choose_backend(rank, num_gpus) == (backend, device)


def test_there_are_two_processes():
    with pytest.raises(ValueError, match="rank must be 0 .* got 2"):
        choose_backend(2, 8)


def test_gpus_count_where_nccl_is_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for has_nccl, expected in ((True, 4), (False, 0)):
        monkeypatch.setattr(dist, "is_nccl_available", lambda has_nccl=has_nccl: has_nccl)
        assert nccl_gpus() == expected


@pytest.mark.parametrize(("num_gpus", "backend", "device"), [(1, "gloo", "cpu"), (2, "nccl", "cuda:1")])
def test_group_is_made_for_the_device_that_comes_back(monkeypatch, num_gpus, backend, device):
    made, current = {}, []
    monkeypatch.setattr("hf_pdprune.inference.handover_group.nccl_gpus", lambda: num_gpus)
    monkeypatch.setattr(dist, "init_process_group", lambda *args, **kwargs: made.update(kwargs, backend=args[0]))
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert init_handover_group(1, store="a store") == torch.device(device)
    expected = {"backend": backend, "rank": 1, "world_size": 2, "store": "a store"}
    if backend == "nccl":
        expected["device_id"] = torch.device(device)
    assert made == expected
    assert current == ([torch.device(device)] if backend == "nccl" else [])
