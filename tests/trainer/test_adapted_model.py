import pytest
import torch

from hf_pdprune.blocks import get_blocks
from hf_pdprune.plan import PruningPlan, StagePlan
from hf_pdprune.search import MergedPairs
from hf_pdprune.trainer import PDPruneConfig
from hf_pdprune.trainer.adapted_model import add_adapters


@pytest.mark.parametrize("local_distillation_tokens", [0, 384])
def test_adapters_can_hold_what_a_merged_block_does(tiny_llama, tmp_path, local_distillation_tokens):
    text = list(torch.randint(3, 250, (16, 32), generator=torch.Generator().manual_seed(0)).split(8))
    pairs = MergedPairs.distil(tiny_llama, text, (2,), rank=4)
    plan = PruningPlan.empty(tiny_llama, decode=StagePlan(merged_blocks=((1, 2),)))
    args = PDPruneConfig(
        str(tmp_path), lora_rank=4, local_distillation_tokens=local_distillation_tokens, use_cpu=True, report_to="none"
    )
    model = add_adapters(tiny_llama, plan, args, None)
    ranks = [block.mlp.down_proj.r["decode"] for number, block in enumerate(get_blocks(model)) if number != 2]
    assert ranks == [4, tiny_llama.config.hidden_size, tiny_llama.config.hidden_size, 4, 4]  # 1 and 3 are beside 2
    pairs.start_adapter(model, "decode", plan.decode.merged_blocks)
    assert get_blocks(model)[1].mlp.gate_proj.get_delta_weight("decode").any()
