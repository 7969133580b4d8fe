import copy
import json
from dataclasses import FrozenInstanceError, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig

from hf_pdprune import PruningPlan
from hf_pdprune.plan import PLAN_FILE_NAME, KVPlan, StagePlan
from hf_pdprune.version import __version__


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


@pytest.fixture
def data(plan):
    return plan.to_dict()


class TestArtefact:
    def test_file_is_what_the_format_says(self, plan, tmp_path):
        path = plan.save_pretrained(tmp_path / "new" / "folder")
        assert path == tmp_path / "new" / "folder" / PLAN_FILE_NAME
        assert json.loads(path.read_text()) == {
            "format_version": 1,
            "hf_pdprune_version": __version__,
            "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
            "base_revision": None,
            "model_type": "llama",
            "num_hidden_layers": 30,
            "prefill": {"removed_blocks": [13, 17], "merged_blocks": []},
            "decode": {"removed_blocks": [13, 16, 17], "merged_blocks": [[20, 21]]},
            "kv": {
                "token_aware_blocks": [5, 6, 9],
                "first_tokens": 16,
                "last_tokens": 112,
                "token_choice": "first_last",
            },
            "provenance": {"seed": 42, "data": ["wikitext"], "objective": {"start": 0.5}},
        }

    def test_round_trip(self, plan, tmp_path):
        path = plan.save_pretrained(tmp_path)
        for where in (tmp_path, str(tmp_path), path):
            assert PruningPlan.from_pretrained(where) == plan
        revised = replace(plan, base_revision="abc")
        revised.save_pretrained(tmp_path)
        assert PruningPlan.from_pretrained(tmp_path) == revised

    def test_a_failed_save_leaves_the_old_file(self, plan, tmp_path):
        plan.save_pretrained(tmp_path)
        with pytest.raises(TypeError):
            replace(plan, provenance={"not json": {1, 2}}).save_pretrained(tmp_path)
        assert PruningPlan.from_pretrained(tmp_path) == plan

    def test_nothing_is_left_beside_it(self, plan, tmp_path):
        plan.save_pretrained(tmp_path)
        plan.save_pretrained(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [PLAN_FILE_NAME]

    def test_missing(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=PLAN_FILE_NAME):
            PruningPlan.from_pretrained(tmp_path)

    def test_neither_folder_nor_repo(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"neither a folder nor a repo that can be read \(.+\)"):
            PruningPlan.from_pretrained(tmp_path / "missing" / "folder")

    @pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"not json"])
    def test_no_json(self, tmp_path, content):
        (tmp_path / PLAN_FILE_NAME).write_bytes(content)
        with pytest.raises(ValueError, match="not valid JSON"):
            PruningPlan.from_pretrained(tmp_path)

    @pytest.mark.parametrize("content", [[], "text", 3, None])
    def test_no_object(self, content):
        with pytest.raises(ValueError, match="must be a JSON object"):
            PruningPlan.from_dict(content)


class TestKeys:
    @pytest.mark.parametrize("part", ["", "prefill", "decode", "kv"])
    def test_unknown_keys_are_named(self, data, part):
        (data[part] if part else data)["removed_layers"] = []
        with pytest.raises(ValueError, match=f"{part or 'pruning plan'}: unknown key 'removed_layers'"):
            PruningPlan.from_dict(data)

    @pytest.mark.parametrize("part", ["", "prefill", "decode", "kv"])
    def test_missing_keys_are_named(self, data, part):
        section = data[part] if part else data
        for key in set(section) - {"token_choice"}:
            broken = copy.deepcopy(data)
            del (broken[part] if part else broken)[key]
            with pytest.raises(ValueError, match=f"{part or 'pruning plan'}: key '{key}' is missing"):
                PruningPlan.from_dict(broken)

    def test_plans_from_before_there_was_a_choice_of_tokens(self, plan, data):
        del data["kv"]["token_choice"]
        assert PruningPlan.from_dict(data) == plan
        assert PruningPlan.from_dict(data).kv.token_choice == "first_last"

    @pytest.mark.parametrize("version", [2, 0, -1, "1", 1.5, None, True])
    def test_other_formats(self, data, version):
        # A newer format may have keys that this one does not know: it is the version that is named.
        data |= {"format_version": version, "new_key": 1}
        with pytest.raises(ValueError, match=r"format_version .* is not known to hf_pdprune"):
            PruningPlan.from_dict(data)

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("base_model", 3),
            ("base_revision", 3),
            ("model_type", None),
            ("provenance", []),
            ("num_hidden_layers", 0),
            ("num_hidden_layers", "30"),
            ("num_hidden_layers", True),
            ("num_hidden_layers", 30.0),
            ("prefill", [13]),
            ("decode", None),
            ("kv", "all"),
            ("prefill.removed_blocks", 13),
            ("prefill.removed_blocks", [30]),
            ("prefill.removed_blocks", [-1]),
            ("prefill.removed_blocks", [13, 13]),
            ("prefill.removed_blocks", ["13"]),
            ("prefill.removed_blocks", [True]),
            ("prefill.removed_blocks", [13.0]),
            ("decode.removed_blocks", [13, 16, 17, 31]),
            ("decode.removed_blocks", {"13": 1}),
            ("decode.removed_blocks", None),
            ("decode.merged_blocks", [[20]]),
            ("decode.merged_blocks", [[20, 21, 22]]),
            ("decode.merged_blocks", [20, 21]),
            ("decode.merged_blocks", [[20, 20]]),
            ("decode.merged_blocks", [[20, 21], [21, 22]]),
            ("decode.merged_blocks", [[20, 30]]),
            ("decode.merged_blocks", [[16, 21]]),
            ("decode.merged_blocks", [[20, "21"]]),
            ("kv.token_aware_blocks", [30]),
            ("kv.token_aware_blocks", [5, 5]),
            ("kv.token_aware_blocks", 5),
            ("kv.token_aware_blocks", [[5]]),
            ("kv.first_tokens", -1),
            ("kv.first_tokens", 1.5),
            ("kv.first_tokens", True),
            ("kv.first_tokens", None),
            ("kv.last_tokens", 0),
            ("kv.last_tokens", "112"),
            ("kv.token_choice", "h2o"),
            ("kv.token_choice", None),
            ("kv.token_choice", ["attention"]),
        ],
    )
    def test_wrong_values_are_named(self, data, key, value):
        part, _, name = key.rpartition(".")
        (data[part] if part else data)[name] = value
        with pytest.raises(ValueError, match=key.replace(".", r"\.")):
            PruningPlan.from_dict(data)

    @pytest.mark.parametrize("stage", ["prefill", "decode"])
    def test_a_stage_keeps_at_least_one_block(self, stage):
        everything = StagePlan((0, 1), ((2, 3),))
        with pytest.raises(ValueError, match=r"prefill removes all 3 blocks"):
            PruningPlan("some/model", "llama", 3, StagePlan((0, 1, 2)), StagePlan((0, 1, 2)))
        plan = PruningPlan("some/model", "llama", 4, **{"decode": everything})
        assert plan.kept_blocks("decode") == (2,)

    def test_plans_do_not_change(self, plan):
        with pytest.raises(FrozenInstanceError):
            plan.num_hidden_layers = 3


class TestBlockNumbers:
    def test_kept_blocks(self, plan):
        assert plan.prefill.missing_blocks == (13, 17)
        assert plan.decode.missing_blocks == (13, 16, 17, 21)
        assert plan.kept_blocks("prefill") == tuple(b for b in range(30) if b not in (13, 17))
        assert plan.kept_blocks("decode")[13:18] == (14, 15, 18, 19, 20)
        with pytest.raises(ValueError, match="unknown stage 'both'"):
            plan.kept_blocks("both")

    def test_unified_is_the_part_of_both_stages(self, plan):
        with pytest.raises(ValueError, match="unified model needs a plan in which prefill and decode miss the same"):
            plan.kept_blocks("unified")
        same = replace(plan, prefill=plan.decode)
        assert same.stage("unified") == same.decode
        config = AutoConfig.for_model("llama", num_hidden_layers=26)
        config.pdprune = same.config_entry("unified", "f" * 32)
        assert same.blocks_of(config) == same.kept_blocks("decode")

    def test_blocks_of_dense_model_and_stages(self, plan):
        config = AutoConfig.for_model("llama", num_hidden_layers=30)
        assert plan.blocks_of(config) == tuple(range(30))
        for stage in ("prefill", "decode"):
            kept = plan.kept_blocks(stage)
            config = AutoConfig.for_model("llama", num_hidden_layers=len(kept))
            config.pdprune = plan.config_entry(stage, "f" * 32)
            assert plan.blocks_of(config) == kept
            # The stage's config carries the plan, but not how it was found.
            assert PruningPlan.from_config(config) == replace(plan, provenance={})

    def test_models_of_other_plans_are_refused(self, plan):
        for config in (
            AutoConfig.for_model("llama", num_hidden_layers=29),
            AutoConfig.for_model("qwen2", num_hidden_layers=30),
        ):
            with pytest.raises(ValueError, match=r"the plan is for .*SmolLM2.* \(llama, 30 blocks in a dense model\)"):
                plan.blocks_of(config)
        config = AutoConfig.for_model("llama", num_hidden_layers=28)
        config.pdprune = plan.config_entry("decode", "f" * 32)
        with pytest.raises(ValueError, match=r"26 blocks in a decode stage\), but the model is llama with 28"):
            plan.blocks_of(config)
        config.pdprune = replace(plan, prefill=StagePlan((13, 16))).config_entry("prefill", "f" * 32)
        with pytest.raises(ValueError, match="prefill stage checkpoint was made with another plan"):
            plan.blocks_of(config)

    def test_another_window_for_the_same_checkpoints(self, plan):
        config = AutoConfig.for_model("llama", num_hidden_layers=28)
        config.pdprune = replace(plan, kv=KVPlan()).config_entry("prefill", "f" * 32)
        assert plan.blocks_of(config) == plan.kept_blocks("prefill")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda entry: entry.pop("stage"), "key 'stage' is missing"),
            (lambda entry: entry.update(rank=3), "unknown key 'rank'"),
            (lambda entry: entry.update(stage=3), "pdprune.stage must be a str"),
            (lambda entry: entry.update(plan=[]), "pdprune.plan must be a dict"),
            (lambda entry: entry.update(stage="both"), "unknown stage 'both'"),
            (lambda entry: entry.update(stage="unified"), "a unified model needs a plan"),
            (lambda entry: entry["plan"].update(format_version=9), "format_version 9"),
            (lambda entry: entry["plan"].pop("kv"), "key 'kv' is missing"),
        ],
    )
    def test_damaged_stage_configs(self, plan, change, message):
        config = AutoConfig.for_model("llama", num_hidden_layers=28)
        config.pdprune = plan.config_entry("prefill", "f" * 32)
        change(config.pdprune)
        with pytest.raises(ValueError, match=message):
            plan.blocks_of(config)

    def test_empty_plan_of_a_model(self, tiny_llama):
        plan = PruningPlan.empty(tiny_llama)
        assert (plan.model_type, plan.num_hidden_layers) == ("llama", 6)
        assert plan.kept_blocks("prefill") == plan.kept_blocks("decode") == tuple(range(6))
        assert plan == PruningPlan.empty(tiny_llama.config)
        assert PruningPlan.empty(tiny_llama, base_model="some/model").base_model == "some/model"


class TestDigest:
    def test_ignores_how_the_plan_was_found(self, plan):
        for other in (
            replace(plan, provenance={}),
            replace(plan, base_model="/a/copy"),
            replace(plan, base_revision="main"),
            replace(plan, prefill=StagePlan((13, 17)), kv=replace(plan.kv, token_aware_blocks=(6, 9, 5))),
        ):
            assert other.digest == plan.digest

    def test_tells_plans_apart(self, plan):
        others = [
            replace(plan, model_type="qwen2"),
            replace(plan, num_hidden_layers=31),
            replace(plan, prefill=StagePlan((13,))),
            replace(plan, decode=StagePlan((13, 16, 17, 21))),
            replace(plan, decode=StagePlan((13, 16, 17), ((22, 21),))),
            replace(plan, kv=replace(plan.kv, token_aware_blocks=(5, 6))),
            replace(plan, kv=replace(plan.kv, first_tokens=15)),
            replace(plan, kv=replace(plan.kv, last_tokens=111)),
            replace(plan, kv=replace(plan.kv, token_choice="attention")),
        ]
        assert len({plan.digest, *(other.digest for other in others)}) == len(others) + 1


class TestKVReduction:
    def test_by_blocks_and_by_tokens(self, plan):
        # 26 of 30 blocks; three of them send 128 of 1024 tokens.
        reduction = plan.kv_reduction(1024)
        sent = 23 * 1024 + 3 * 128
        assert reduction == pytest.approx({"blocks": 30 / 26, "tokens": 26 * 1024 / sent, "total": 30 * 1024 / sent})
        assert plan.kept_prompt_tokens(5, 1024) == 128
        assert plan.kept_prompt_tokens(4, 1024) == 1024
        assert plan.kept_prompt_tokens(13, 1024) == plan.kept_prompt_tokens(21, 1024) == 0

    @pytest.mark.parametrize("prompt_tokens", [1, 127, 128])
    def test_short_prompts_are_sent_whole(self, plan, prompt_tokens):
        assert plan.kv_reduction(prompt_tokens) == pytest.approx({"blocks": 30 / 26, "tokens": 1, "total": 30 / 26})
        assert plan.kept_prompt_tokens(5, prompt_tokens) == prompt_tokens

    @given(st.integers(1, 5000), st.sets(st.integers(0, 9), max_size=9), st.sets(st.integers(0, 9)))
    def test_total_is_the_product(self, prompt_tokens, removed, token_aware):
        kv = KVPlan(tuple(token_aware), 16, 112)
        reduction = PruningPlan("some/model", "llama", 10, decode=StagePlan(tuple(removed)), kv=kv).kv_reduction(
            prompt_tokens
        )
        assert reduction["total"] == pytest.approx(reduction["blocks"] * reduction["tokens"])
        assert min(reduction.values()) >= 1
