import copy

import pytest
import torch

from hf_pdprune.evaluation.draft_acceptance import draft_acceptance
from hf_pdprune.hub import build_stage
from hf_pdprune.plan import PruningPlan, StagePlan


def prompts(count):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 256, (1, 6 + index), generator=generator) for index in range(count)]


def test_the_dense_model_is_its_own_perfect_draft(tiny_llama):
    found = draft_acceptance(tiny_llama, copy.deepcopy(tiny_llama), prompts(2), new_tokens=12)
    assert found["tokens_per_forward"] > 1.2 and found["same_text"] == 1 and found["prompts"] == 2
    assert found["time_ratio"] > 0


def test_a_pruned_draft_is_accepted_less(tiny_llama):
    plan = PruningPlan.empty(tiny_llama, "tiny", decode=StagePlan((1, 2, 3)))
    found = draft_acceptance(tiny_llama, build_stage(tiny_llama, plan, "decode"), prompts(2), new_tokens=12)
    perfect = draft_acceptance(tiny_llama, copy.deepcopy(tiny_llama), prompts(2), new_tokens=12)
    assert 1 <= found["tokens_per_forward"] < perfect["tokens_per_forward"] and found["same_text"] == 1
    assert not tiny_llama._forward_hooks


def test_no_prompt_is_an_error(tiny_llama):
    with pytest.raises(ValueError, match="at least one prompt"):
        draft_acceptance(tiny_llama, copy.deepcopy(tiny_llama), [])
    with pytest.raises(ValueError, match="itself"):
        draft_acceptance(tiny_llama, tiny_llama, prompts(1))
