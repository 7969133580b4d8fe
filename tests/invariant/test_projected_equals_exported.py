import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from hf_pdprune.adapters import active_adapter
from hf_pdprune.blocks import bypass_blocks, get_blocks
from hf_pdprune.hub import export_stage, export_stages
from hf_pdprune.inference import PrefillStage
from hf_pdprune.plan import PruningPlan, StagePlan
from hf_pdprune.projected_blocks import ProjectedBlock, project_blocks


pytestmark = pytest.mark.invariant

IDS = torch.randint(3, 256, (2, 24), generator=torch.Generator().manual_seed(1))


def plan_of(model, *projected):
    stages = {"prefill": StagePlan((2,), (), projected), "decode": StagePlan((2, 4))}
    return PruningPlan.empty(model, "tiny", **stages)


@torch.no_grad()
def test_projected_blocks_hand_on_what_they_get_in_any_tool(tiny_model, adapted, architecture, tmp_path):
    dense = tiny_model(architecture)
    plan, model = plan_of(dense, 1, 5), adapted(dense)
    export_stage(model, plan, "prefill", tmp_path / "prefill", "prefill")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "prefill")
    assert reloaded.config.num_hidden_layers == 5
    caches = [DynamicCache(config=each.config) for each in (dense, reloaded)]
    with bypass_blocks(model, (2,)), project_blocks(model, (1, 5)), active_adapter(model, "prefill"):
        expected = model(input_ids=IDS, past_key_values=caches[0], use_cache=True).logits
    actual = reloaded(IDS, past_key_values=caches[1], use_cache=True).logits
    torch.testing.assert_close(actual, expected, atol=1e-3, rtol=1e-4)
    for index, block in enumerate((0, 1, 3, 4, 5)):
        torch.testing.assert_close(caches[1].layers[index].keys, caches[0].layers[block].keys, atol=1e-3, rtol=1e-4)
    # And the stage leaves the work out.
    with PrefillStage(reloaded, plan).active():
        assert all(isinstance(get_blocks(reloaded)[index], ProjectedBlock) for index in (1, 4))
        cache = DynamicCache(config=reloaded.config)
        assert torch.equal(reloaded(IDS, past_key_values=cache, use_cache=True).logits, actual)


def test_blocks_that_cannot_be_projected_are_refused_before_anything_is_written(tiny_model, tmp_path):
    model = tiny_model("opt", do_layer_norm_before=False)
    with pytest.raises(ValueError, match="block 1 of OPTForCausalLM cannot be projected"):
        export_stages(model, plan_of(model, 1), tmp_path / "pair")
    assert not (tmp_path / "pair").exists()
