from hf_pdprune.evaluation.ablation_report import ablation_tables, verdict


def result(kl, prefill=(2, 3), decode=(2, 3, 4, 5), **more):
    quality = {"perplexity": 20.0, "kl": kl, "kl_prefill": kl, "top1_agreement": 0.7} | more.pop("quality", {})
    return {"prefill": list(prefill), "decode": list(decode), "kv_reduction": 2.5, "quality": quality, **more}


def test_verdict_says_what_is_better_and_what_is_not():
    rows = [
        ("the plan", result(0.5, accuracy={"mean": 0.5, "stderr": 0.01})),
        ("one_shot", result(0.75)),
        ("unified", result(0.4, (1, 2, 3), (1, 2, 3), accuracy={"mean": 0.52, "stderr": 0.01})),
    ]
    text = verdict(rows)
    assert "KL is lower than that of one_shot (+0.250)." in text
    assert "KL is not lower than that of unified (-0.100)." in text
    assert "Accuracy against unified: -2.0 points." in text and "one_shot:" not in text
    assert "2 blocks from prefill and 4 from decode, the unified one 3 from both" in text
    assert verdict(rows[:1]) == verdict(rows[1:]) == ""


def test_more_out_of_prefill_than_out_of_decode():
    mirrored = ("mirrored", result(0.4, (1, 2, 3, 4), (2, 3)))
    text = verdict([("the plan", result(0.5)), mirrored])
    assert "4 blocks out of prefill and 2 out of decode instead: -0.100." in text
    row = {"settings": {"section": "strategies", "variant": "mirrored"}, "result": mirrored[1]}
    assert "| mirrored | 1, 2, 3, 4 | none (keeps 1, 4) |" in ablation_tables([row])


def test_tables_have_what_was_measured():
    rows = [
        {
            "settings": {"section": "strategies", "variant": "the plan"},
            "result": result(0.5, quality={"kl_stderr": 0.02}),
        },
        {"settings": {"section": "strategies", "variant": "greedy"}, "result": result(0.75, search_cost=31.26)},
        {"settings": {"search": "greedy"}, "result": {"plan": {}, "cost": 31.26}},
    ]
    text = ablation_tables(rows)
    assert "| the plan | 2, 3 | 4, 5 | 2.50x | 20.0 | 0.500 ± 0.020 | 0.500 | 70.0% |  |" in text
    assert "| greedy | 2, 3 | 4, 5 | 2.50x | 20.0 | 0.750 | 0.750 | 70.0% | 31.3 |" in text
    assert "accuracy" not in text and "KL rest" not in text and "not lower" not in text
    assert ablation_tables([]) == ""


def test_tasks_without_an_accuracy_have_a_column_of_their_own():
    others = {"wikitext2": {"metric": "word_perplexity", "value": 31.256}}
    rows = [
        {"settings": {"section": "parts", "variant": "cache only"}, "result": result(0.5, other_tasks=others)},
        {"settings": {"section": "parts", "variant": "older"}, "result": result(0.25)},
    ]
    text = ablation_tables(rows)
    assert "| top-1 | wikitext2, word_perplexity |" in text
    assert "| 70.0% | 31.26 |" in text and "| 70.0% |  |" in text
