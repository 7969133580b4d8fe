import pytest
import torch

from hf_pdprune.blocks import bypass_blocks, remove_blocks
from hf_pdprune.inference import DecodeStage, PrefillStage, dense_forward, disaggregated_forward
from hf_pdprune.inference.stage import position_ids
from hf_pdprune.plan import PruningPlan


pytestmark = pytest.mark.invariant


@torch.no_grad()
def test_bypass_removal_and_disaggregated_forward(tiny_model, architecture, batch):
    model = tiny_model(architecture, initializer_range=0.1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    inputs = {
        "input_ids": torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
        "attention_mask": mask,
        "position_ids": position_ids(mask),
        "use_cache": False,
    }
    dense = model(**inputs).logits
    with bypass_blocks(model, ()):
        assert torch.equal(model(**inputs).logits, dense)
    assert torch.equal(remove_blocks(model, ())(**inputs).logits, dense)

    # The logits that predict each completion token; what stands at padding is nobody's.
    real, prompt_tokens = batch["completion_mask"].bool(), batch["prompt_ids"].shape[1]
    expected = dense[:, prompt_tokens - 1 : -1][real]
    plan = PruningPlan.empty(model)
    disaggregated = disaggregated_forward(PrefillStage(model, plan), DecodeStage(model, plan), batch)
    assert disaggregated.shape == (*real.shape, 256)
    torch.testing.assert_close(disaggregated[real], expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(dense_forward(model, batch)[real], expected, atol=1e-5, rtol=0)
