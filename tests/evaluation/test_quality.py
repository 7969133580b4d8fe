import math

import pytest
import torch

from hf_pdprune.data import PromptCompletionCollator
from hf_pdprune.evaluation import compare_hand_overs, compare_quality, evaluate_quality, handing_over_all_tokens
from hf_pdprune.hub import build_stage
from hf_pdprune.inference import DecodeStage, PrefillStage, dense_forward, disaggregated_forward
from hf_pdprune.plan import KVPlan, PruningPlan, StagePlan


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(0)
    rows = []
    for prompt, completion in ((12, 6), (20, 3), (7, 9), (16, 5)):
        ids = torch.randint(3, 256, (prompt + completion,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    rows[0]["labels"][-2] = -100
    collator = PromptCompletionCollator(0)
    return [collator(rows[:2]), collator(rows[2:])]


def plan_of(model):
    kv = KVPlan((0, 3), first_tokens=1, last_tokens=2)
    return PruningPlan.empty(model, "tiny", prefill=StagePlan((2,)), decode=StagePlan((2, 4)), kv=kv)


def views(model, plan):
    return PrefillStage(model, plan), DecodeStage(model, plan)


def test_equals_the_mean_over_labelled_tokens(tiny_llama, batches):
    pair = views(tiny_llama, plan_of(tiny_llama))
    result = evaluate_quality(*pair, tiny_llama, batches)
    nll, kl, agreeing, by_stage = [], [], [], {"prefill": [], "decode": []}
    by_example = {}
    with torch.no_grad():
        for batch in batches:
            dense = dense_forward(tiny_llama, batch).log_softmax(-1)
            pruned = disaggregated_forward(*pair, batch).log_softmax(-1)
            for row, token in (batch["labels"] != -100).nonzero().tolist():
                nll.append(-pruned[row, token, batch["labels"][row, token]].item())
                kl.append((dense[row, token].exp() * (dense[row, token] - pruned[row, token])).sum().item())
                by_stage["decode" if token else "prefill"].append(kl[-1])
                by_example.setdefault((id(batch), row), []).append(kl[-1])
                agreeing.append(dense[row, token].argmax() == pruned[row, token].argmax())
    assert result["tokens"] == len(nll) == 22
    assert result["perplexity"] == pytest.approx(math.exp(sum(nll) / len(nll)), rel=1e-4)
    assert result["kl"] == pytest.approx(sum(kl) / len(kl), rel=1e-4)
    assert result["top1_agreement"] == pytest.approx(sum(agreeing) / len(agreeing))
    means = [sum(values) / len(values) for values in by_example.values()]
    assert len(means) == 4
    assert result["kl_stderr"] == pytest.approx(torch.tensor(means).std().item() / 2, rel=1e-4)
    for stage, values in by_stage.items():
        assert result[f"kl_{stage}"] == pytest.approx(sum(values) / len(values), rel=1e-4), stage


def test_empty_plan_is_the_dense_model(tiny_llama, batches):
    empty = views(tiny_llama, PruningPlan.empty(tiny_llama))
    result = compare_quality(tiny_llama, {"empty": empty}, batches)
    assert result["empty"]["kl"] < 1e-6 and result["dense"]["kl"] == 0
    assert result["empty"]["top1_agreement"] == result["dense"]["top1_agreement"] == 1
    assert result["empty"]["perplexity"] == pytest.approx(result["dense"]["perplexity"], rel=1e-5)


def test_handing_over_all_tokens_is_the_plan_without_token_aware_blocks(tiny_llama, batches):
    plan = plan_of(tiny_llama)
    everything = PruningPlan.empty(tiny_llama, "tiny", prefill=plan.prefill, decode=plan.decode)
    by_plan, all_tokens = compare_hand_overs(tiny_llama, {"pair": views(tiny_llama, plan)}, batches)
    assert all_tokens == compare_quality(tiny_llama, {"pair": views(tiny_llama, everything)}, batches)
    assert by_plan == compare_quality(tiny_llama, {"pair": views(tiny_llama, plan)}, batches)
    assert by_plan["pair"]["kl"] != all_tokens["pair"]["kl"]


def test_checkpoints_and_views_agree_and_stay_as_they_are(tiny_llama, batches):
    plan = plan_of(tiny_llama)
    models = [build_stage(tiny_llama, plan, stage) for stage in ("prefill", "decode")]
    pair = PrefillStage(models[0], plan), DecodeStage(models[1], plan)
    pairs = {"views": views(tiny_llama, plan), "checkpoints": pair}
    for found in compare_hand_overs(tiny_llama, pairs, batches):
        for key, value in found["views"].items():
            assert found["checkpoints"][key] == pytest.approx(value, rel=1e-4)
    assert PruningPlan.from_config(models[1].config).digest == plan.digest
    same_weights = handing_over_all_tokens(pair[1]).model.lm_head.weight
    assert same_weights is models[1].lm_head.weight


def test_training_mode_is_restored(tiny_llama, batches):
    tiny_llama.train()
    evaluate_quality(*views(tiny_llama, plan_of(tiny_llama)), tiny_llama, batches)
    assert tiny_llama.training and tiny_llama.model.layers[0].training


def test_nan_is_an_error_that_says_whose(tiny_llama, batches):
    plan = plan_of(tiny_llama)
    broken = build_stage(tiny_llama, plan, "decode", fingerprint="x")
    broken.model.norm.weight = torch.nn.Parameter(broken.model.norm.weight * float("nan"))
    prefill = PrefillStage(build_stage(tiny_llama, plan, "prefill", fingerprint="x"), plan)
    with pytest.raises(ValueError, match="healed: logits hold NaN"):
        compare_quality(tiny_llama, {"healed": (prefill, DecodeStage(broken, plan))}, batches)
    tiny_llama.lm_head.weight.data.fill_(float("inf"))
    with pytest.raises(ValueError, match="dense: logits hold NaN"):
        compare_quality(tiny_llama, {}, batches)


def test_nothing_to_evaluate_is_an_error(tiny_llama, batches):
    with pytest.raises(ValueError, match="no completion token"):
        compare_quality(tiny_llama, {}, [])
    with pytest.raises(ValueError, match="'dense' is the dense model's name"):
        compare_quality(tiny_llama, {"dense": views(tiny_llama, plan_of(tiny_llama))}, batches)


@pytest.mark.gpu
def test_quality_on_an_accelerator_is_that_of_the_cpu(tiny_llama, batches, accelerator):
    plan = plan_of(tiny_llama)
    expected = compare_hand_overs(tiny_llama, {"pair": views(tiny_llama, plan)}, batches)
    model = tiny_llama.to(accelerator)  # the batches stay where they are
    actual = compare_hand_overs(model, {"pair": views(model, plan)}, batches)
    for here, there in zip(expected, actual, strict=True):
        for name in ("dense", "pair"):
            assert there[name] == pytest.approx(here[name], rel=1e-3, abs=1e-6)
