import pytest

from hf_pdprune.data import PromptCompletionCollator
from hf_pdprune.plan import PruningPlan, StagePlan
from hf_pdprune.trainer.round_search import RoundSearch, round_examples


COLLATOR = PromptCompletionCollator(0)


def rows_of(completion_tokens, count=20):
    """Rows whose completion is so long."""
    tokens = list(range(3, 27))
    return [{"input_ids": tokens, "labels": [-100] * (24 - completion_tokens) + tokens[-completion_tokens:]}] * count


def test_as_many_rows_as_wanted_become_examples():
    read = []
    examples = round_examples((read.append(1) or row for row in rows_of(12)), 6, COLLATOR)
    assert examples == rows_of(12)[:6] and len(read) <= 7
    assert len(round_examples(rows_of(12), 50, COLLATOR)) == 20


def test_too_few_completion_tokens_name_the_option():
    # As eight rows of MMLU have them: a letter, and the end of the text.
    message = r"round_search_examples=8 is too small: the first 8 training rows have 16 completion tokens, .* least 64"
    with pytest.raises(ValueError, match=message):
        round_examples(rows_of(2), 8, COLLATOR)
    assert len(round_examples(rows_of(2, 40), 32, COLLATOR)) == 32


def test_a_round_takes_as_many_blocks_as_the_target_and_keeps_those_before(tiny_llama, adapted, capsys):
    model = adapted(tiny_llama)
    search = RoundSearch(
        model,
        {"prefill": "prefill", "decode": "decode"},
        round_examples(rows_of(12), 6, COLLATOR),
        COLLATOR,
    )
    before = PruningPlan.empty(tiny_llama, prefill=StagePlan((2,)), decode=StagePlan((2,)))
    found = search(before, PruningPlan.empty(tiny_llama, prefill=StagePlan((1, 3)), decode=StagePlan((1, 3, 4))))
    prefill, decode = found.prefill.missing_blocks, found.decode.missing_blocks
    assert len(prefill) == 2 and len(decode) == 3 and 2 in prefill and {0, 5}.isdisjoint(decode)
    assert "Search in rounds: 100%" in capsys.readouterr().err  # a terminal or not


def test_rounds_choose_with_what_is_healed(tiny_llama, make_trainer):
    options = {"removal_rounds": 2, "search_in_rounds": True, "round_search_examples": 6, "max_steps": 6}
    trainer = make_trainer(tiny_llama, **options)
    trainer.train()
    first, last = trainer.removal.plans
    assert len(last.decode.removed_blocks) == 2 and set(first.decode.removed_blocks) < set(last.decode.removed_blocks)
    assert trainer.plan == last


def test_too_few_completion_tokens_for_rounds_are_found_before_the_first_step(tiny_llama, make_trainer):
    trainer = make_trainer(tiny_llama, removal_rounds=2, search_in_rounds=True, round_search_examples=1, max_steps=6)
    with pytest.raises(ValueError, match="round_search_examples=1 is too small"):
        trainer.train()
    assert trainer.state.global_step == 0
