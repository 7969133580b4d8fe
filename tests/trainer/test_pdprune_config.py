from dataclasses import fields

import pytest
from trl import SFTConfig

from hf_pdprune.plan import PruningPlan, StagePlan
from hf_pdprune.trainer import PDPruneConfig


# Those of trl and transformers are documented there; where the default is another one, the docstring begins with it.
OWN_FIELDS = [f for f in fields(PDPruneConfig) if f.name not in SFTConfig.__dataclass_fields__]


@pytest.mark.parametrize("option", OWN_FIELDS, ids=lambda f: f.name)
def test_every_option_is_documented_twice(option):
    assert option.metadata["help"]
    assert f"{option.name} (`" in PDPruneConfig.__doc__


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("removal_rounds", 0),
        ("removal_fraction", 1.5),
        ("distillation_loss", "mse"),
        ("distillation_temperature", 0.0),
        ("local_distillation_tokens", -1),
        ("local_distillation_rank", 0),
        ("lora_rank", 0),
        ("lora_alpha", 0),
        ("padding_free", True),
        ("first_token", "both"),
        ("label_smoothing_factor", 0.1),
        ("loss_type", "dft"),
        ("router_aux_loss_coef", 0.01),
        ("hub_strategy", "every_save"),
        ("include_for_metrics", ["inputs", "loss"]),
        ("activation_checkpointing_kwargs", {"use_reentrant": True}),
    ],
)
def test_bad_value_is_an_error_that_names_it(tmp_path, name, value):
    with pytest.raises(ValueError, match=name):
        PDPruneConfig(str(tmp_path), **{name: value})


def test_packing_is_that_which_makes_plain_rows(tmp_path):
    for option in ("packing", "eval_packing"):
        with pytest.raises(ValueError, match="packing_strategy='wrapped'"):
            PDPruneConfig(str(tmp_path), **{option: True})
    assert PDPruneConfig(str(tmp_path), packing=True, packing_strategy="wrapped").packing


def test_float32_is_the_default_on_cpu(tmp_path):
    assert not PDPruneConfig(str(tmp_path), use_cpu=True).bf16
    assert PDPruneConfig(str(tmp_path), use_cpu=True, bf16=True).bf16


def test_fading_and_the_closed_form_exclude_each_other(tmp_path):
    with pytest.raises(ValueError, match="removal_fade_steps needs local_distillation_tokens=0"):
        PDPruneConfig(str(tmp_path), removal_fade_steps=3)
    assert PDPruneConfig(str(tmp_path), removal_fade_steps=3, local_distillation_tokens=0)
    assert PDPruneConfig(str(tmp_path), removal_fade_steps=3, stage="decode", full_finetuning=True)


@pytest.mark.parametrize("metric", ["eval_kl", "kl", "eval_decode_kl", "eval_a_perplexity", "eval_loss"])
def test_less_is_better_of_distances_and_losses(tmp_path, metric):
    assert PDPruneConfig(str(tmp_path), metric_for_best_model=metric).greater_is_better is False
    assert PDPruneConfig(str(tmp_path), metric_for_best_model=metric, greater_is_better=True).greater_is_better
    assert PDPruneConfig(str(tmp_path), metric_for_best_model="eval_top1_agreement").greater_is_better
    assert PDPruneConfig(str(tmp_path)).greater_is_better is None


def test_rounds_are_not_searched_where_all_weights_learn(tmp_path):
    options = {"stage": "decode", "removal_rounds": 2, "search_in_rounds": True}
    with pytest.raises(ValueError, match="search_in_rounds does not go with full_finetuning"):
        PDPruneConfig(str(tmp_path), full_finetuning=True, **options)
    assert PDPruneConfig(str(tmp_path), **options)


def test_the_old_name_of_activation_checkpointing_is_known(tmp_path):
    assert PDPruneConfig(str(tmp_path)).activation_checkpointing is False
    with pytest.warns(FutureWarning, match="gradient_checkpointing"):
        assert PDPruneConfig(str(tmp_path), gradient_checkpointing=True).activation_checkpointing
    assert PDPruneConfig(str(tmp_path), activation_checkpointing_kwargs={"use_reentrant": False})


@pytest.mark.parametrize("block", [-1, 12, 3])
def test_hidden_states_are_matched_after_blocks_that_prefill_keeps(tmp_path, block):
    plan = PruningPlan("base", "llama", 12, prefill=StagePlan((3,)), decode=StagePlan((3,)))
    args = PDPruneConfig(str(tmp_path), hidden_matching_weight=1.0, hidden_matching_blocks=[0, block])
    with pytest.raises(ValueError, match=f"hidden_matching_blocks: block {block} is not one that prefill keeps"):
        args.check_plan(plan)
