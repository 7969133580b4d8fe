import json
import re
from dataclasses import replace

import pytest
import yaml
from transformers import AutoModelForCausalLM

from hf_pdprune.hub import export_stages, model_card, write_model_cards
from hf_pdprune.hub.model_card import licence_in
from hf_pdprune.plan import KVPlan, PruningPlan, StagePlan


PLAN = PruningPlan(
    base_model="some-org/model-1B",
    model_type="llama",
    num_hidden_layers=6,
    prefill=StagePlan((2,)),
    decode=StagePlan((2,), ((3, 4),)),
    kv=KVPlan((0, 2, 5), 4, 28),
)
RESULTS = {
    "quality": {"dense": {"perplexity": 12.5, "kl": 0.0}, "healed": {"perplexity": 20.25, "kl": 0.5}},
    "quality_all_tokens": {"dense": {"perplexity": 12.5, "kl": 0.0}, "healed": {"perplexity": 15.75, "kl": 0.25}},
    "speed": {"ttft_ratio": 0.8125, "tpot_ratio": 0.6875},
    "kv": {"prompt_tokens": 512, "bytes_dense": 5000, "bytes_sent": 1000, "ratio": 5.0},
}


def front_matter(card):
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", card, re.DOTALL).group(1))


@pytest.mark.parametrize("stage", ["prefill", "decode"])
def test_card_says_what_the_stage_is(stage):
    card = model_card(PLAN, stage, "my-model")
    data = front_matter(card)
    assert data["base_model"] == "some-org/model-1B" and data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "text-generation" and {"hf_pdprune", "pruned", stage} <= set(data["tags"])
    assert f"**{stage} stage** of `some-org/model-1B`" in card
    assert "| blocks removed | 2 | 2 |" in card and "| none | (3, 4) |" in card and "| 5 of 6 | 4 of 6 |" in card
    assert "first 4 and the last 28 prompt tokens of blocks 0, 5," in card  # 2 is token-aware too, but decode lacks it
    assert f"{'5' if stage == 'prefill' else '4'} of 6 decoder blocks" in card
    assert "## Limits" in card and "## Results" not in card
    assert "{{" not in card and "{%" not in card and card.endswith("\n")


def test_data_set_and_more_tags_are_in_the_metadata():
    data = front_matter(model_card(PLAN, "decode", "my-model", dataset_name="me/text", tags=("mine", "pruned")))
    assert data["datasets"] == ["me/text"] and data["tags"].count("pruned") == data["tags"].count("mine") == 1
    assert "datasets" not in front_matter(model_card(PLAN, "decode", "my-model"))


def test_projected_blocks_are_in_the_card():
    card = model_card(replace(PLAN, prefill=StagePlan((2,), (), (0, 5))), "prefill", "my-model")
    assert "| blocks of which only keys and values are computed | 0, 5 | none |" in card
    assert "prefill     k#.##k" in card and "`k` one of which prefill computes keys and values alone" in card
    assert "only keys and values" not in model_card(PLAN, "prefill", "my-model")


def test_windows_of_blocks_are_in_the_card():
    card = model_card(replace(PLAN, kv=KVPlan((0, 2, 5), 4, 28, block_windows=((5, 16, 112),))), "decode", "my-model")
    assert "between 32 and 128 of the first and last prompt tokens of blocks 0 (32), 5 (128)," in card


def test_results_are_in_the_card():
    card = model_card(PLAN, "decode", "my-model", RESULTS)
    assert "| healed | 20.25 | 0.5 | 15.75 | 0.25 |" in card
    for part in ("0.812", "0.688", "5.00 times fewer", "For a prompt of 512 tokens"):
        assert part in card


def test_results_are_in_the_metadata():
    (index,) = front_matter(model_card(PLAN, "decode", "my-model", RESULTS))["model-index"]
    metrics = {metric["type"]: metric["value"] for result in index["results"] for metric in result["metrics"]}
    assert index["name"] == "my-model"
    assert metrics == {
        "perplexity": 20.25, "kl": 0.5, "ttft_ratio": 0.8125, "tpot_ratio": 0.6875, "kv_reduction": 5.0
    }  # fmt: skip
    assert "model-index" not in front_matter(model_card(PLAN, "decode", "my-model"))


def test_picture_of_the_plan():
    card = model_card(PLAN, "decode", "my-model", picture=True)
    assert "block       012345\nprefill     ##.###\ndecode      ##.#.#\nhanded over wa.a.w\n" in card
    assert "(pruning_plan.png)" in card and "(pruning_plan.png)" not in model_card(PLAN, "decode", "my-model")


def test_how_it_was_found():
    calibration = {"name": "/home/me/secret/text.jsonl", "examples": 16, "prompt_tokens": 192, "completion_tokens": 32}
    plan = replace(PLAN, provenance={"calibration": calibration})
    card = model_card(plan, "decode", "x", {"distillation": {"steps": 150, "losses": [[1, 0.75], [150, 0.25]]}})
    assert (
        "chosen on `text.jsonl`: 16 examples of 192 prompt and 32 completion tokens." in card and "secret" not in card
    )
    assert "for 150 steps; the loss went from 0.75 to 0.25." in card
    assert "## Training" not in model_card(PLAN, "decode", "x")


def test_card_of_both_stages():
    where = {stage: ("me/both", stage) for stage in ("prefill", "decode")}
    card = model_card(PLAN, None, "both", where=where)
    assert "**prefill and the decode stage**" in card and 'load_stages("me/both")' in card
    assert card.count("alone, without hf_pdprune") == 2 and {"prefill", "decode"} <= set(front_matter(card)["tags"])


def test_card_of_a_unified_model(tiny_llama, tiny_tokenizer, tmp_path, capsys):
    plan = PruningPlan.empty(tiny_llama, "tiny", prefill=StagePlan((2,)), decode=StagePlan((2,)))
    export_stages(tiny_llama, plan, tmp_path, tokenizer=tiny_tokenizer, layout=("unified",))
    for results in (None, RESULTS):
        if results:
            write_model_cards(tmp_path, results)
        card = (tmp_path / "unified" / "README.md").read_text()
        assert "**removed for both stages**" in card and "The two stages belong together" not in card
        assert "As one model, without hf_pdprune" in card and "unified" in front_matter(card)["tags"]
        blocks = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
        assert len(blocks) == 2
        for code in blocks:
            exec(code.replace("path/to/folder", json.dumps(str(tmp_path))[1:-1]), {})
    assert "| healed | 20.25 |" in card and "The capital of France is" in capsys.readouterr().out


def test_licence_is_taken_over(tiny_llama, tmp_path):
    tiny_llama.save_pretrained(tmp_path / "dense")
    (tmp_path / "dense" / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Model\n")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    export_stages(model, PruningPlan.empty(model, "tiny"), tmp_path / "pair")
    for results in (None, RESULTS):
        if results:
            write_model_cards(tmp_path / "pair", results)
        card = (tmp_path / "pair" / "decode" / "README.md").read_text()
        assert front_matter(card)["license"] == "apache-2.0" and "licence (apache-2.0)" in card
    (tmp_path / "no").write_text("---\n: [\n---\n")
    assert licence_in(tmp_path / "no") is None and licence_in(tmp_path / "missing") is None


def test_local_path_is_not_published(tmp_path):
    plan = PruningPlan(str(tmp_path / "secret" / "my-model"), "llama", 6)
    card = model_card(plan, "decode", "x")
    assert "secret" not in card and "`my-model`" in card and "base_model" not in front_matter(card)


def test_cards_of_a_pair_are_written_anew_with_results(tiny_llama, tmp_path):
    export_stages(
        tiny_llama, PruningPlan.empty(tiny_llama, "tiny", prefill=StagePlan((2,)), decode=StagePlan((2,))), tmp_path
    )
    assert "## Results" not in (tmp_path / "decode" / "README.md").read_text()
    write_model_cards(tmp_path, RESULTS)
    for stage in ("prefill", "decode"):
        assert "| healed | 20.25 |" in (tmp_path / stage / "README.md").read_text()
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize("first_token", ["prefill", "decode"])
def test_usage_code_runs(tiny_llama, tiny_tokenizer, tmp_path, capsys, first_token):
    plan = PruningPlan.empty(tiny_llama, "tiny", prefill=StagePlan((2,)), decode=StagePlan((2, 4)))
    export_stages(tiny_llama, plan, tmp_path, tokenizer=tiny_tokenizer)
    write_model_cards(tmp_path, {"serving": {"first_token": first_token}})
    for stage in ("prefill", "decode"):
        blocks = re.findall(r"```python\n(.*?)```", (tmp_path / stage / "README.md").read_text(), re.DOTALL)
        assert len(blocks) == 2
        assert ('prefill(**inputs, first_token="decode")' in blocks[0]) == (first_token == "decode")
        for code in blocks:
            exec(code.replace("path/to/folder", json.dumps(str(tmp_path))[1:-1]), {})
    assert "The capital of France is" in capsys.readouterr().out
