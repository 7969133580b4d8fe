import json
import os

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from hf_pdprune.hub import export_stage, export_stages
from hf_pdprune.hub.shard_writer import shard_bytes
from hf_pdprune.plan import PruningPlan, StagePlan


def weights_in(folder):
    weights = {}
    for path in sorted(folder.glob("*.safetensors")):
        assert not weights.keys() & load_file(path).keys()
        weights |= load_file(path)
    return weights


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "mixtral", "gpt2", "qwen3_moe"])
def test_shards_hold_what_one_file_holds(tiny_model, architecture, tmp_path):
    # gemma2 and gpt2 tie weights; experts are one tensor in memory and many on disk
    model = tiny_model(architecture)
    plan = PruningPlan.empty(model, "tiny", decode=StagePlan((2, 4)))
    export_stage(model, plan, "decode", tmp_path / "one", fingerprint="0")
    export_stage(model, plan, "decode", tmp_path / "many", fingerprint="0", max_shard_size="150KB")
    one, many = weights_in(tmp_path / "one"), weights_in(tmp_path / "many")
    assert one.keys() == many.keys() and all(torch.equal(one[name], many[name]) for name in one)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    files = {path.name for path in (tmp_path / "many").glob("*.safetensors")}
    assert len(files) > 2 and set(index["weight_map"].values()) == files
    assert index["weight_map"].keys() == many.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in many.values())
    names = [{path.name for path in (tmp_path / kind).iterdir()} for kind in ("one", "many")]
    assert names[1] - names[0] == files | {"model.safetensors.index.json"}


@pytest.mark.parametrize("max_shard_size", ["2GB", "100KB"])
def test_weights_can_be_read_by_whom_the_config_can(tiny_model, tmp_path, max_shard_size):
    model = tiny_model("llama")
    previous = os.umask(0o027)
    try:
        export_stage(model, PruningPlan.empty(model), "decode", tmp_path / "decode", max_shard_size=max_shard_size)
    finally:
        os.umask(previous)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "decode").iterdir()}
    assert len(modes) > 4 and set(modes.values()) == {0o640}, modes


def test_sizes():
    assert [shard_bytes(size) for size in ("2GB", "500 MiB", "3kb", 17)] == [2 * 10**9, 500 * 2**20, 3000, 17]
    for size in ("0GB", "2TB", "-1", "big", 1.5):
        with pytest.raises(ValueError, match="max_shard_size"):
            shard_bytes(size)


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="peaks are measured through /proc")
def test_export_makes_no_second_copy(tiny_model, tmp_path):
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 24}
    dense = tiny_model("llama", **sizes)
    total = sum(parameter.nbytes for parameter in dense.parameters())
    config = LoraConfig(r=2, target_modules="all-linear")
    model = get_peft_model(dense, config, "prefill")
    model.add_adapter("decode", config)
    plan = PruningPlan.empty(dense, "tiny", prefill=StagePlan((2,)), decode=StagePlan((2,)))
    child = os.fork()
    if child == 0:
        try:
            before = memory("VmRSS")
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")  # the peak is counted from here
            names = {"prefill": "prefill", "decode": "decode"}
            export_stages(model, plan, tmp_path / "pair", names, max_shard_size="20MB")
            (tmp_path / "growth").write_text(str(memory("VmHWM") - before))
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    growth = int((tmp_path / "growth").read_text())
    print(f"model {total / 1e6:.0f} MB, peak of the export {growth / 1e6:.0f} MB above it")
    # Every linear layer is adapted: a merged copy at once would be as large as the model.
    assert growth < 0.5 * total


def memory(kind):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(kind))
