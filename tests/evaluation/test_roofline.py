import pytest

from hf_pdprune.evaluation.parameter_share import parameter_shares
from hf_pdprune.evaluation.roofline import roofline
from hf_pdprune.hub import build_stage
from hf_pdprune.inference import DecodeStage, PrefillStage
from hf_pdprune.plan import PruningPlan, StagePlan


def test_shares_are_those_counted_by_hand(tiny_llama):
    plan = PruningPlan.empty(tiny_llama, "tiny", prefill=StagePlan((2,)), decode=StagePlan((2, 4)))
    block = sum(parameter.numel() for parameter in tiny_llama.model.layers[0].parameters())
    head, tokens, rows = 256 * 64, 32, 3
    per_block = 2 * block * tokens + 4 * 64 * (tokens * (tokens + 1) // 2)
    held = {"dense": 6000, "pruned": 1000}
    views = PrefillStage(tiny_llama, plan), DecodeStage(tiny_llama, plan)
    checkpoints = [kind(build_stage(tiny_llama, plan, kind.name), plan) for kind in (PrefillStage, DecodeStage)]
    for pair in (views, checkpoints):
        found = roofline(tiny_llama, *pair, tokens, rows, held)
        assert found["prefill_flops"] == {
            "dense": rows * (6 * per_block + 2 * head),
            "pruned": rows * (5 * per_block + 2 * head),
        }
        assert found["decode_bytes"] == {
            "dense": 4 * (6 * block + head) + 6000,
            "pruned": 4 * (4 * block + head) + 1000,
        }
        for what in ("prefill_flops", "decode_bytes"):
            values = found[what]
            assert found[f"{what}_removed"] == pytest.approx(1 - values["pruned"] / values["dense"])


def test_projected_blocks_cost_their_keys_and_values(tiny_llama):
    plan = PruningPlan.empty(tiny_llama, "tiny", prefill=StagePlan((2,), (), (1, 3)), decode=StagePlan((2,)))
    block = sum(parameter.numel() for parameter in tiny_llama.model.layers[0].parameters())
    projection = 64 + 2 * 64 * 32  # the norm, and a matrix each
    views = PrefillStage(tiny_llama, plan), DecodeStage(tiny_llama, plan)
    checkpoints = [kind(build_stage(tiny_llama, plan, kind.name), plan) for kind in (PrefillStage, DecodeStage)]
    for prefill, decode in (views, checkpoints):
        found = roofline(tiny_llama, prefill, decode, 32, 1, {"dense": 5, "pruned": 5})["prefill_flops"]
        assert found["pruned"] == 2 * 32 * (3 * block + 2 * projection) + 3 * 4 * 64 * (32 * 33 // 2) + 2 * 256 * 64
        shares = parameter_shares(tiny_llama, prefill, decode)
        assert shares["prefill_share_removed"] == pytest.approx(1 - (3 * block + 2 * projection) / (6 * block))
        assert shares["decode_share_removed"] == pytest.approx(block / (6 * block + 256 * 64))


def test_nothing_removed_is_no_share(tiny_llama):
    plan = PruningPlan.empty(tiny_llama)
    found = roofline(
        tiny_llama, PrefillStage(tiny_llama, plan), DecodeStage(tiny_llama, plan), 8, 1, {"dense": 5, "pruned": 5}
    )
    assert found["prefill_flops_removed"] == found["decode_bytes_removed"] == 0
