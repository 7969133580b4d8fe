import pytest

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


def test_nothing_removed_is_no_share(tiny_llama):
    plan = PruningPlan.empty(tiny_llama)
    found = roofline(
        tiny_llama, PrefillStage(tiny_llama, plan), DecodeStage(tiny_llama, plan), 8, 1, {"dense": 5, "pruned": 5}
    )
    assert found["prefill_flops_removed"] == found["decode_bytes_removed"] == 0
