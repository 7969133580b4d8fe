import pytest
import torch
from masked_reference import random_prompts
from transformers import AutoModelForCausalLM

from hf_pdprune.blocks import bypass_blocks, remove_blocks
from hf_pdprune.inference.stage import position_ids


pytestmark = pytest.mark.invariant

FIRST, LAST, MIDDLE, SEVERAL = (0,), (5,), (2,), (1, 2, 4)


@torch.no_grad()
def logits_of(model):
    input_ids, mask = random_prompts([20, 7, 12])
    output = model(input_ids=input_ids, attention_mask=mask, position_ids=position_ids(mask), use_cache=False)
    return output.logits[mask.bool()]


@pytest.mark.parametrize("blocks", [FIRST, LAST, MIDDLE, SEVERAL], ids=["first", "last", "middle", "several"])
def test_removed_saved_and_reloaded(tiny_model, architecture, blocks, tmp_path):
    model = tiny_model(architecture)
    dense = logits_of(model)
    with bypass_blocks(model, blocks):
        bypassed = logits_of(model)
    assert (bypassed - dense).abs().max() > 1e-2
    shorter = remove_blocks(model, blocks)
    assert torch.equal(logits_of(shorter), bypassed)
    shorter.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=model.config._attn_implementation)
    assert torch.equal(logits_of(reloaded), bypassed)
    assert torch.equal(logits_of(model), dense)


@pytest.mark.parametrize("blocks", [FIRST, LAST, MIDDLE, SEVERAL], ids=["first", "last", "middle", "several"])
def test_generation_after_removal(tiny_model, architecture, blocks):
    # With its cache, whose slots are those of the shorter model.
    model = tiny_model(architecture)
    input_ids, mask = random_prompts([20, 7, 12])
    settings = {"input_ids": input_ids, "attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    with bypass_blocks(model, blocks):
        expected = model.generate(use_cache=False, **settings)
    assert torch.equal(remove_blocks(model, blocks).generate(**settings), expected)
