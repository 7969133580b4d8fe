import json

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model

from hf_pdprune.blocks import get_blocks
from hf_pdprune.inference.stage import position_ids
from hf_pdprune.search import BlockStatistics


@torch.no_grad()
def plain_redundancy(model, batches):
    """The definition, from hidden states that hooks keep."""
    blocks = get_blocks(model)
    sums, tokens = [0.0] * len(blocks), 0
    for batch in batches:
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        inputs, outputs = {}, {}

        def keep(number, inputs=inputs, outputs=outputs):
            def hook(module, args, kwargs, output):
                inputs[number] = args[0] if args else kwargs["hidden_states"]
                outputs[number] = output[0] if isinstance(output, tuple) else output

            return hook

        handles = [block.register_forward_hook(keep(i), with_kwargs=True) for i, block in enumerate(blocks)]
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        model(input_ids=ids, attention_mask=mask, position_ids=position_ids(mask))
        for handle in handles:
            handle.remove()
        for i in range(len(blocks)):
            sums[i] += F.cosine_similarity(inputs[i], outputs[i], dim=-1)[mask.bool()].sum().item()
        tokens += int(mask.sum())
    return [value / tokens for value in sums], tokens


def test_redundancy_is_the_mean_cosine_over_real_tokens(tiny_model, architecture, calibration):
    model = tiny_model(architecture)
    batches = list(calibration(model).batches)
    expected, tokens = plain_redundancy(model, batches)
    statistics = BlockStatistics.measure(model, batches)
    assert statistics.num_tokens == tokens
    assert statistics.redundancy == pytest.approx(expected, abs=1e-5)
    assert [statistics.redundancy[block] for block in statistics.ranking] == sorted(
        statistics.redundancy, reverse=True
    )
    assert not any(module._forward_hooks for module in model.modules())


def test_batches_of_one_text_give_the_same_as_prompt_and_completion(tiny_llama, calibration):
    batches = list(calibration(tiny_llama).batches)
    joined = [
        {
            "input_ids": torch.cat([b["prompt_ids"], b["completion_ids"]], dim=1),
            "attention_mask": torch.cat([b["prompt_mask"], b["completion_mask"]], dim=1),
        }
        for b in batches
    ]
    assert (
        BlockStatistics.measure(tiny_llama, joined).redundancy
        == BlockStatistics.measure(tiny_llama, batches).redundancy
    )


def test_parts_merge_to_the_whole(tiny_llama, calibration):
    batches = list(calibration(tiny_llama).batches)
    whole = BlockStatistics.measure(tiny_llama, batches)
    merged = BlockStatistics.measure(tiny_llama, batches[:1])
    merged.merge(BlockStatistics.measure(tiny_llama, batches[1:]))
    assert merged.num_tokens == whole.num_tokens
    assert merged.redundancy == pytest.approx(whole.redundancy, abs=1e-12)
    with pytest.raises(ValueError, match="cannot be merged"):
        whole.merge(BlockStatistics("other", "llama", 3))


def test_adapters_do_not_count(tiny_model, calibration):
    model = tiny_model("llama")
    batches = list(calibration(model).batches)
    expected = BlockStatistics.measure(model, batches).redundancy
    wrapped = get_peft_model(model, LoraConfig(target_modules="all-linear", init_lora_weights=False), "prefill")
    assert BlockStatistics.measure(wrapped, batches).redundancy == pytest.approx(expected, abs=1e-6)


def test_nan_names_the_block(tiny_llama, calibration):
    batches = list(calibration(tiny_llama).batches)
    tiny_llama.model.layers[3].mlp.down_proj.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="block 3: its output hidden states hold NaN"):
        BlockStatistics.measure(tiny_llama, batches)


def test_no_batch_is_an_error(tiny_llama):
    with pytest.raises(ValueError, match="no calibration batch"):
        BlockStatistics.measure(tiny_llama, [])


def test_saved_statistics_come_back(tiny_llama, calibration, tmp_path):
    statistics = BlockStatistics.measure(tiny_llama, calibration(tiny_llama).batches, base_model="org/tiny")
    statistics.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["block_statistics.json"]
    loaded = BlockStatistics.from_pretrained(tmp_path)
    assert loaded.redundancy == pytest.approx(statistics.redundancy, abs=1e-12)
    assert (loaded.base_model, loaded.num_tokens, loaded.ranking) == (
        "org/tiny",
        statistics.num_tokens,
        statistics.ranking,
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra": 1}, "'extra' is unknown"),
        ({"num_tokens": None}, "num_tokens must be"),
        ({"redundancy": [1.0]}, "redundancy must be a list of 6"),
        ({"redundancy": [float("nan")] * 6}, "redundancy must be a list of 6"),
        ({"format_version": 2}, "format_version 2 is not known"),
    ],
)
def test_a_wrong_file_names_the_key(statistics, tmp_path, change, message):
    path = statistics([0.9] * 6).save_pretrained(tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        BlockStatistics.from_pretrained(tmp_path)


def test_a_missing_or_broken_file(statistics, tmp_path):
    with pytest.raises(FileNotFoundError, match="block_statistics.json"):
        BlockStatistics.from_pretrained(tmp_path)
    path = statistics([0.9] * 6).save_pretrained(tmp_path)
    data = json.loads(path.read_text())
    del data["model_type"]
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match="'model_type' is missing"):
        BlockStatistics.from_pretrained(path)
    path.write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        BlockStatistics.from_pretrained(tmp_path)
