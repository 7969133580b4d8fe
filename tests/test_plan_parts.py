import json
from dataclasses import replace

import pytest

from hf_pdprune.plan import KVPlan, PruningPlan, StagePlan


@pytest.fixture
def plan():
    return PruningPlan(
        base_model="HuggingFaceTB/SmolLM2-135M-Instruct",
        model_type="llama",
        num_hidden_layers=30,
        prefill=StagePlan((17, 13)),
        decode=StagePlan((13, 16, 17), ((20, 21),)),
        kv=KVPlan((9, 5, 6), 16, 112),
        provenance={"seed": 42, "data": ["wikitext"], "objective": {"start": 0.5}},
    )


class TestProjectedBlocks:
    """The relaxed subset rule."""

    @pytest.fixture
    def relaxed(self, plan):
        return replace(plan, prefill=StagePlan((17, 13), (), (9, 3)))

    def test_prefill_has_them_and_skips_their_work(self, relaxed):
        assert relaxed.prefill.projected_blocks == (3, 9)
        assert relaxed.prefill.missing_blocks == (13, 17) and relaxed.prefill.skipped_blocks == (3, 9, 13, 17)
        assert {3, 9} <= set(relaxed.kept_blocks("prefill")) and len(relaxed.kept_blocks("prefill")) == 28

    def test_round_trip_and_digest(self, plan, relaxed):
        assert PruningPlan.from_dict(relaxed.to_dict()) == relaxed
        assert relaxed.digest != plan.digest
        # Plans without any are what versions that know nothing of it have written, and read.
        assert "projected_blocks" not in plan.to_dict()["prefill"]

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                {"prefill": StagePlan((13,), (), (13,))},
                "prefill.projected_blocks: block 13 is removed or merged there",
            ),
            ({"prefill": StagePlan((), (), (16,))}, "prefill.projected_blocks: block 16 is missing in decode"),
            ({"prefill": StagePlan((), (), (30,))}, "prefill.projected_blocks: block 30 is not one of the 30 blocks"),
            ({"prefill": StagePlan((13,), (), tuple(set(range(30)) - {13, 16, 17, 21}))}, None),
            ({"decode": StagePlan((13, 17), (), (3,))}, "decode.projected_blocks: only prefill"),
            (
                {"kv": KVPlan((3,), token_choice="attention")},
                "block 3 is token-aware, and with token_choice attention",
            ),
        ],
    )
    def test_wrong_ones_are_named(self, relaxed, change, message):
        if message is None:  # prefill may skip all blocks but one
            assert len(replace(relaxed, **change).prefill.skipped_blocks) == 27
            return
        with pytest.raises(ValueError, match=message):
            replace(relaxed, **change)

    def test_one_block_has_to_run(self):
        with pytest.raises(ValueError, match="prefill removes or projects all 3 blocks"):
            PruningPlan("base", "llama", 3, prefill=StagePlan((0,), (), (1, 2)), decode=StagePlan((0,)))

    def test_they_are_handed_over_like_others(self, plan, relaxed):
        assert relaxed.kv_reduction(1024) == plan.kv_reduction(1024)

    def test_the_stages_of_a_unified_model_are_the_same(self, relaxed):
        with pytest.raises(ValueError, match="a unified model needs a plan"):
            replace(relaxed, decode=relaxed.prefill and StagePlan((13, 17))).stage("unified")


class TestTokenChoice:
    def test_round_trip(self, plan):
        by_attention = replace(plan, kv=replace(plan.kv, token_choice="attention"))
        assert PruningPlan.from_dict(json.loads(json.dumps(by_attention.to_dict()))) == by_attention

    @pytest.mark.parametrize(("last_tokens", "observed"), [(1, 1), (31, 31), (32, 32), (112, 32)])
    def test_same_number_of_tokens(self, last_tokens, observed):
        kv = KVPlan((5,), 16, last_tokens)
        by_attention = replace(kv, token_choice="attention")
        assert (kv.observed_tokens, by_attention.observed_tokens) == (0, observed)
        assert kv.windows == by_attention.windows == {5: (16, last_tokens)}

    def test_in_words(self):
        assert KVPlan().to_text() == "the first 16 and the last 112 prompt tokens"
        assert KVPlan(token_choice="attention").to_text() == (
            "the last 32 prompt tokens and, per head, the 96 that these attend to most"
        )


class TestBlockWindows:
    @pytest.fixture
    def varied(self, plan):
        return replace(plan, kv=KVPlan((5, 6, 9), 16, 112, block_windows=((9, 64, 448), (5, 16, 112))))

    def test_every_token_aware_block_has_a_window(self, varied):
        assert varied.kv.windows == {5: (16, 112), 6: (16, 112), 9: (64, 448)}
        assert varied.kv.block_windows == ((9, 64, 448),)  # 5 has the common one
        assert varied.kv.with_windows(varied.kv.windows) == KVPlan(
            (5, 6, 9), 16, 112, block_windows=((5, 16, 112), (6, 16, 112), (9, 64, 448))
        )
        assert varied.kv.with_windows({}) == KVPlan()

    def test_round_trip_and_digest(self, plan, varied):
        assert PruningPlan.from_dict(json.loads(json.dumps(varied.to_dict()))) == varied
        assert varied.digest != plan.digest and "block_windows" not in plan.to_dict()["kv"]

    def test_entries_handed_over(self, plan, varied):
        assert [varied.kept_prompt_tokens(block, 1024) for block in (5, 9, 13, 0)] == [128, 512, 0, 1024]
        assert varied.kept_prompt_tokens(9, 300) == 300
        assert 30 * 1024 / varied.kv_reduction(1024)["total"] == pytest.approx(
            30 * 1024 / plan.kv_reduction(1024)["total"] + 512 - 128
        )

    def test_in_words(self, varied):
        assert varied.kv.to_text() == "between 128 and 512 of the first and last prompt tokens"
        assert replace(varied.kv, token_choice="attention").to_text() == (
            "the last 32 prompt tokens and, per head, 96 to 480 that these attend to most"
        )
        same = replace(varied.kv, token_aware_blocks=(9,))
        assert same.to_text() == "the first 64 and the last 448 prompt tokens"

    @pytest.mark.parametrize(
        ("block_windows", "message"),
        [
            (((7, 1, 1),), "kv.block_windows: block 7 is not token-aware"),
            (((31, 1, 1),), "kv.block_windows: block 31 is not one of the 30 blocks"),
            (((9, 1, 1), (9, 2, 2)), "kv.block_windows: block 9 is named twice"),
            (((9, 4, 0),), "kv.block_windows: block 9, last_tokens must be at least 1"),
            (((9, -1, 4),), "kv.block_windows: block 9, first_tokens must be a whole number"),
            (((9, 4, 8.0),), "kv.block_windows: block 9, last_tokens must be a whole number"),
        ],
    )
    def test_wrong_ones_are_named(self, plan, block_windows, message):
        with pytest.raises(ValueError, match=message):
            replace(plan, kv=replace(plan.kv, block_windows=block_windows))

    def test_the_tokens_that_choose_are_kept(self, plan):
        kv = KVPlan((5,), 16, 112, "attention", ((5, 4, 27),))
        with pytest.raises(ValueError, match="block 5 keeps 31 tokens, fewer than the 32 at the end of the prompt"):
            replace(plan, kv=kv)
        assert replace(plan, kv=replace(kv, block_windows=((5, 4, 28),))).kv.observed_tokens == 32

    @pytest.mark.parametrize("value", [3, [[1, 2]], [3], [{"5": [1, 2]}]])
    def test_wrong_json_is_named(self, plan, value):
        data = plan.to_dict()
        data["kv"]["block_windows"] = value
        with pytest.raises(ValueError, match="kv.block_windows"):
            PruningPlan.from_dict(data)
