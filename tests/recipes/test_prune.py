import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from made_text import write_rows
from transformers import AutoModelForCausalLM
from trl import TrlParser

from hf_pdprune import PruningPlan
from hf_pdprune.evaluation import read_results
from hf_pdprune.evaluation.dense_model_of_pair import check_dense_model, load_dense_model
from hf_pdprune.hub import load_stages


ROOT = Path(__file__).parents[2]
DEMO = ROOT / "recipes" / "smollm2-135m" / "demo.yaml"


@pytest.fixture
def prune(load_recipe):
    return load_recipe("prune")


@pytest.fixture
def options(tiny_llama, tiny_tokenizer, tmp_path):
    """A run on a tiny model, from its beginning to its end."""
    tiny_llama.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    words = "the quick brown fox jumps over the lazy dog while an old cat sleeps under a warm red stone wall ".split()
    rows = [{"text": " ".join(words[(i * j) % len(words)] for j in range(1, 60))} for i in range(1, 25)]
    write_rows(tmp_path / "text.jsonl", rows)
    write_rows(tmp_path / "held_out.jsonl", [{"text": f"and {row['text']}"} for row in rows[:10]])
    text = str(tmp_path / "text.jsonl")
    return {
        "model_name_or_path": str(tmp_path / "model"),
        "base_model": "tiny/llama",
        "output_dir": str(tmp_path / "run"),
        "num_prefill_blocks": 1,
        "num_decode_blocks": 2,
        "merge_pairs": True,
        "merge_rank": 4,
        "num_token_aware_blocks": 2,
        "distillation_threshold": -1.0,
        "first_tokens": 2,
        "last_tokens": 6,
        "calibration_dataset": text,
        "calibration_examples": 4,
        "calibration_prompt_tokens": 24,
        "calibration_completion_tokens": 17,
        "kv_calibration_examples": 4,
        "kv_calibration_prompt_tokens": 40,
        "train_dataset": text,
        "packing": True,
        "packing_strategy": "wrapped",
        "max_length": 48,
        "per_device_train_batch_size": 2,
        "max_steps": 2,
        "logging_steps": 1,
        "local_distillation_tokens": 384,
        "local_distillation_rank": 8,
        "lora_rank": 4,
        "save_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "validation_dataset": str(tmp_path / "held_out.jsonl"),
        "validation_examples": 4,
        "validation_prompt_tokens": 40,
        "validation_completion_tokens": 8,
        "benchmark_prompt_tokens": 64,
        "sample_prompt": "the quick",
        "sample_tokens": 4,
    }


def run(prune, options, **changes):
    parser = TrlParser((prune.PruneArguments, prune.SearchConfig, prune.PDPruneConfig))
    arguments = []
    for name, value in {**options, **changes}.items():
        arguments += [f"--{name}", str(value)]
    prune.main(*parser.parse_args_and_config(arguments))


def test_from_a_dense_model_to_the_report_and_again(prune, options, tmp_path, capsys, monkeypatch):
    run(prune, options)
    folder = tmp_path / "run"
    plan = PruningPlan.from_pretrained(folder)
    assert (plan.base_model, len(plan.decode.missing_blocks)) == ("tiny/llama", 2)
    results = read_results(folder)
    command = results["commands"]["prune"]
    assert command.startswith("accelerate launch recipes/prune.py --model_name_or_path <model_name_or_path> ")
    for part in ("quality", "quality_all_tokens"):
        assert set(results[part]) == {"dense", "unhealed", "healed"}
        assert results[part]["dense"]["kl"] == pytest.approx(0, abs=1e-6)
    assert {"ttft_ratio", "tpot_ratio", "prefill_share_removed", "decode_share_removed"} <= set(results["speed"])
    assert {"prompt_tokens", "bytes_dense", "bytes_sent", "ratio"} <= set(results["kv"])
    assert results["handover"]["nbytes"] > 0
    assert plan.decode.merged_blocks
    for name in (
        "block_statistics.json",
        "merged_pairs.safetensors",
        "pareto_front.png",
        "report.md",
        "pruning_plan.png",
        "decode/README.md",
    ):
        assert (folder / name).is_file(), name
    assert AutoModelForCausalLM.from_pretrained(folder / "decode").config.num_hidden_layers == 4
    assert "KL to dense" in capsys.readouterr().out

    def not_again(*args, **kwargs):
        raise AssertionError("a finished step was done again")

    for step in ("search", "train", "compare_hand_overs", "handover_between_processes"):
        monkeypatch.setattr(prune, step, not_again)
    run(prune, options)
    assert "KL to dense" in capsys.readouterr().out

    with pytest.raises(ValueError, match="num_decode_blocks=2, not 3"):
        run(prune, options, num_decode_blocks=3)
    load_stages(folder)  # nothing of it was touched


def test_other_data_or_another_model_of_the_same_name_is_another_run(prune, options, tiny_model, tmp_path):
    options |= {"merge_pairs": False, "num_token_aware_blocks": 0, "local_distillation_tokens": 0}
    run(prune, options)
    kl = read_results(tmp_path / "run")["quality"]["healed"]["kl"]
    held_out = Path(options["validation_dataset"])
    before = held_out.read_text()
    held_out.write_text(before.replace("and ", "but "))
    with pytest.raises(ValueError, match="a run with validation_dataset_digest='[0-9]+ bytes, sha256 .*', not '"):
        run(prune, options)
    held_out.write_text(before)
    shutil.rmtree(tmp_path / "run" / "decode")  # what is lost is made again, of the same plan
    (tmp_path / "run" / "results.json").unlink()
    run(prune, options)
    load_stages(tmp_path / "run")
    assert read_results(tmp_path / "run")["quality"]["healed"]["kl"] == pytest.approx(kl)
    dense = load_dense_model(options["model_name_or_path"])
    check_dense_model(dense, "dense", tmp_path / "run")
    other = tiny_model("llama", seed=1)
    with pytest.raises(ValueError, match="other is not the dense model of"):
        check_dense_model(other, "other", tmp_path / "run")
    other.save_pretrained(options["model_name_or_path"])
    with pytest.raises(ValueError, match="holds a run with dense_fingerprint='"):
        run(prune, options)


def test_an_interrupted_training_goes_on(prune, options, tmp_path, monkeypatch):
    def interrupted(self, *args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(prune.PDPruneTrainer, "save_model", _first(prune.PDPruneTrainer.save_model, interrupted))
        with pytest.raises(KeyboardInterrupt):
            run(prune, options)
    assert not (tmp_path / "run" / "decode").exists()
    monkeypatch.setattr(prune, "search", None)  # the plan is there
    (checkpoints,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert prune.last_complete_checkpoint(checkpoints).endswith("checkpoint-2")
    run(prune, options)
    distilled = json.loads((tmp_path / "run" / "distillation.json").read_text())
    assert distilled["steps"] == distilled["resumed_at_step"] == 2


def _first(save_model, interrupted):
    """Checkpoints are saved; saving the stages is what is interrupted."""

    def save(self, output_dir=None, _internal_call=False):
        return (save_model if _internal_call else interrupted)(self, output_dir, _internal_call=_internal_call)

    return save


def test_half_written_checkpoints_are_passed_over(prune, tmp_path):
    assert prune.last_complete_checkpoint(tmp_path) is None
    for step, text in ((1, '{"global_step": 1}'), (9, '{"global_st')):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(text)
    (tmp_path / "checkpoint-11").mkdir()
    assert prune.last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_prefill_blocks": 6, "num_decode_blocks": 6}, "num_prefill_blocks is 6"),
        ({"num_prefill_blocks": 2, "num_decode_blocks": 1}, "num_decode_blocks"),
        ({"benchmark_prompt_tokens": 5000}, "benchmark_prompt_tokens is too long"),
        ({"validation_prompt_tokens": 5000}, "validation_prompt_tokens is too long"),
        ({"no_such_key": 1}, "no_such_key"),
    ],
    ids=str,
)
def test_bad_input_is_an_error_before_anything_is_written(prune, options, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        run(prune, options, **changes)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("part", ["calibration", "train"])
def test_held_out_text_that_was_seen_is_refused(prune, options, tmp_path, part, monkeypatch):
    other = tmp_path / "other.jsonl"
    write_rows(
        other,
        [{"text": f"{number} is where a line of still another text begins, and goes on"} for number in range(24)],
    )
    changes = {f"{name}_dataset": str(other) for name in ("calibration", "train") if name != part}
    changes["validation_dataset"] = options[f"{part}_dataset"]
    with pytest.raises(ValueError, match="text.jsonl: 24 of the evaluation rows were seen in search or distillation"):
        run(prune, options, **changes)
    assert not (tmp_path / "run").exists()

    def searched(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(prune, "search", searched)
    with pytest.raises(KeyboardInterrupt):
        run(prune, options, **changes, allow_overlap=True)


def test_what_a_given_plan_was_found_on_counts_as_seen(prune, options, tiny_llama, tmp_path):
    PruningPlan.empty(tiny_llama, "tiny").save_pretrained(tmp_path / "plan")
    found = {"plan": {"calibration_dataset": options["validation_dataset"], "calibration_split": "validation"}}
    (tmp_path / "plan" / "run.json").write_text(json.dumps(found))
    with pytest.raises(ValueError, match="held_out.jsonl: 10 of the evaluation rows were seen"):
        run(prune, options, plan=tmp_path / "plan")


def test_empty_text_is_an_error_that_names_the_file(prune, options, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match="empty.jsonl"):
        run(prune, options, calibration_dataset=str(tmp_path / "empty.jsonl"))
    assert not (tmp_path / "run" / "pruning_plan.json").exists()


def test_text_that_cannot_be_trained_on_is_found_before_the_search(prune, options, tmp_path):
    changes = {"train_dataset": str(tmp_path / "train.jsonl"), "packing": False, "max_length": 8}
    write_rows(
        tmp_path / "train.jsonl", [{"prompt": f"A long prompt, number {i}.", "completion": " So."} for i in "ab"]
    )
    with pytest.raises(
        ValueError, match="train_dataset has no row with a completion token: every prompt fills max_len"
    ):
        run(prune, options, **changes)
    chat = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    write_rows(tmp_path / "train.jsonl", [{"messages": chat}] * 3)
    with pytest.raises(ValueError, match="chat template is not training-compatible"):
        run(prune, options, **changes, assistant_only_loss=True)
    assert not (tmp_path / "run").exists()


def test_the_option_with_too_few_examples_is_named(prune, options):
    with pytest.raises(ValueError, match="kv_calibration_examples=2: the calibration set has .* at least 64"):
        run(prune, options, kv_calibration_examples=2)


def test_more_out_of_prefill_and_windows_of_blocks(prune, options, tmp_path):
    windows = {"target_kv_reduction": 3.0, "kv_prompt_tokens": 48}
    for name in ("num_token_aware_blocks", "merge_pairs", "merge_rank"):
        del options[name]
    run(prune, options, relaxed_subset_rule=True, num_prefill_blocks=3, num_decode_blocks=1, **windows)
    folder = tmp_path / "run"
    plan, results = PruningPlan.from_pretrained(folder), read_results(folder)
    assert len(plan.prefill.skipped_blocks) == 3 and len(plan.decode.missing_blocks) == 1
    assert len(plan.prefill.projected_blocks) >= 2 and plan.kv_reduction(48)["total"] >= 3
    assert results["quality"]["healed"]["kl"] >= 0 and results["handover"]["nbytes"] > 0
    assert 2 / 6 < results["speed"]["prefill_share_removed"] < 3 / 6
    prefill, decode = load_stages(folder)
    assert prefill.model.config.num_hidden_layers == 6 - len(plan.prefill.missing_blocks)
    assert decode.model.config.num_hidden_layers == 5
    report = (folder / "report.md").read_text()
    assert (
        "only keys and values computed" in report
        and "keys and values alone" in (folder / "prefill" / "README.md").read_text()
    )


def test_the_first_token_is_decodes_from_the_search_to_the_measurement(prune, options, tmp_path):
    options |= {"merge_pairs": False, "num_token_aware_blocks": 0, "local_distillation_tokens": 0}
    found = {}
    for stage in ("prefill", "decode"):
        own = options | {"first_token": stage, "output_dir": str(tmp_path / stage)}
        run(prune, own)
        plan = json.loads((tmp_path / stage / "pruning_plan.json").read_text())
        quality = json.loads((tmp_path / stage / "results.json").read_text())["quality"]
        losses = json.loads((tmp_path / stage / "distillation.json").read_text())["losses"]
        found[stage] = plan["provenance"]["calibration"]["digest"], quality["unhealed"]["tokens"], losses[0][1]
    assert 'first_token="decode")' in (tmp_path / "decode" / "decode" / "README.md").read_text()
    (digest, tokens, loss), (other_digest, other_tokens, other_loss) = found.values()
    assert tokens == other_tokens and digest != other_digest and loss != pytest.approx(other_loss, rel=1e-4)
    with pytest.raises(ValueError, match="holds a run with first_token='decode', not 'prefill'"):
        run(prune, own | {"first_token": "prefill"})


def test_a_folder_with_a_foreign_plan_is_left_alone(prune, options, tiny_llama, tmp_path):
    path = PruningPlan.empty(tiny_llama, "other").save_pretrained(tmp_path / "run")
    before = path.read_text()
    with pytest.raises(ValueError, match="holds another plan"):
        run(prune, options)
    assert path.read_text() == before


def test_what_to_do_next_can_be_copied(prune):
    assert "\n  python examples/01_handover" in prune.next_steps(Path("outputs/demo"))
    steps = prune.next_steps(Path("outputs/my run"))
    assert "cat 'outputs/my run/report.md'\n" in steps
    assert "\n  STAGES='outputs/my run' python examples/01_handover" in steps


def test_every_key_of_the_demo_is_known(prune):
    parser = TrlParser((prune.PruneArguments, prune.SearchConfig, prune.PDPruneConfig))
    args, search, training = parser.parse_args_and_config(["--config", str(DEMO)])
    written = yaml.safe_load(DEMO.read_text())
    assert search.num_decode_blocks == written["num_decode_blocks"]
    assert training.max_steps == written["max_steps"]


@pytest.mark.parametrize("recipe", ["prune.py", "benchmark.py"])
def test_help_helps(recipe):
    result = subprocess.run(
        [sys.executable, str(ROOT / "recipes" / recipe), "--help"], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert "prompt_tokens" in result.stdout
