from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_pdprune.plan import PruningPlan, StagePlan


pytestmark = pytest.mark.invariant

TOTAL = 6


@st.composite
def stage_plans(draw, may_project=None):
    """Any stage plan of six blocks that is not wrong by itself."""
    order = draw(st.permutations(range(TOTAL)))
    removed = draw(st.integers(0, TOTAL - 1))
    pairs = draw(st.integers(0, (TOTAL - removed) // 2))
    in_pairs = order[removed : removed + 2 * pairs]
    free = [] if may_project is None else order[removed + 2 * pairs :]
    projected = free[: draw(st.integers(0, max(len(free) - 1, 0)))]
    return StagePlan(tuple(order[:removed]), tuple(zip(in_pairs[::2], in_pairs[1::2], strict=True)), tuple(projected))


@given(stage_plans(may_project=True), stage_plans())
def test_a_plan_exists_only_if_decode_misses_what_prefill_misses(prefill, decode):
    allowed = set(prefill.missing_blocks) <= set(decode.missing_blocks)
    if allowed and not set(prefill.projected_blocks).isdisjoint(decode.missing_blocks):
        with pytest.raises(ValueError, match="is missing in decode, which needs none of its keys"):
            PruningPlan("some/model", "llama", TOTAL, prefill, decode)
    elif allowed:
        plan = PruningPlan("some/model", "llama", TOTAL, prefill, decode)
        assert set(plan.kept_blocks("decode")) <= set(plan.kept_blocks("prefill"))
        assert PruningPlan.from_dict(plan.to_dict()) == plan
    else:
        with pytest.raises(ValueError, match="missing in prefill but not in decode"):
            PruningPlan("some/model", "llama", TOTAL, prefill, decode)


@given(stage_plans(), stage_plans())
def test_edits_and_loaded_files_are_checked_too(prefill, decode):
    plan = PruningPlan("some/model", "llama", TOTAL)
    data = plan.to_dict() | {"prefill": prefill.to_dict(), "decode": decode.to_dict()}
    if set(prefill.missing_blocks) <= set(decode.missing_blocks):
        assert replace(plan, prefill=prefill, decode=decode) == PruningPlan.from_dict(data)
        return
    with pytest.raises(ValueError, match="missing in prefill but not in decode"):
        replace(plan, prefill=prefill, decode=decode)
    with pytest.raises(ValueError, match="missing in prefill but not in decode"):
        PruningPlan.from_dict(data)
