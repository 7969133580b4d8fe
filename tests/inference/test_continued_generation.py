import pytest
import torch
from masked_reference import random_prompts
from transformers import LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from hf_pdprune.inference import DecodeStage, PrefillStage
from hf_pdprune.plan import PruningPlan


@pytest.fixture
def compare(model):
    """`compare(**settings)` asserts that a hand-over gives what `model.generate` does, and returns the new tokens."""
    plan = PruningPlan.empty(model)

    def check(lengths=(16, 9, 12), max_new_tokens=8, **settings):
        input_ids, mask = random_prompts(list(lengths))
        settings = {"do_sample": False, "pad_token_id": 0, **settings}
        expected = model.generate(input_ids=input_ids, attention_mask=mask, max_new_tokens=max_new_tokens, **settings)
        payload = PrefillStage(model, plan)(input_ids, mask, max_new_tokens=max_new_tokens, **settings)
        actual = DecodeStage(model, plan).generate(payload, max_new_tokens=max_new_tokens, **settings)
        assert torch.equal(actual, expected)
        return actual[:, input_ids.shape[1] :]

    return check


class TestWhatCountsFromThePromptsEnd:
    @pytest.mark.parametrize("max_new_tokens", [1, 2, 8])
    def test_forced_end(self, compare, max_new_tokens):
        free = compare(max_new_tokens=max_new_tokens)
        forced = compare(max_new_tokens=max_new_tokens, forced_eos_token_id=200)
        assert (forced[:, -1] == 200).all()
        assert torch.equal(forced[:, :-1], free[:, :-1])

    def test_tokens_that_may_not_come_first(self, compare):
        settings = {"lengths": [16], "repetition_penalty": 3.0}  # the second token is another one
        first, second = compare(**settings)[0, :2].tolist()
        assert compare(begin_suppress_tokens=[second], **settings)[0, :2].tolist() == [first, second]
        assert compare(begin_suppress_tokens=[first], **settings)[0, 0] != first

    def test_penalty_for_length(self, compare):
        lengths = {
            (compare(exponential_decay_length_penalty=(start, 1.8), eos_token_id=5) != 0).sum().item()
            for start in (0, 1, 3)
        }
        assert len(lengths) == 3  # so each of them is heard


class EndsWith(StoppingCriteria):
    def __init__(self, *tokens):
        self.tokens = torch.tensor(tokens)

    def __call__(self, input_ids, scores, **kwargs):
        return torch.isin(input_ids[:, -1], self.tokens)


class TestStoppingCriteria:
    def test_rows_that_end_with_the_first_token(self, compare):
        first = compare()[:, 0].tolist()
        for count in (1, 2, 3):
            criteria = StoppingCriteriaList([EndsWith(*first[:count])])
            tokens = compare(stopping_criteria=criteria, eos_token_id=255)
            assert (tokens[:count, 1:] == 0).all()
            assert tokens.shape[1] == (1 if count == 3 else 8)

    def test_without_an_end_token_all_rows_end_together(self, compare):
        first = compare()[:, 0].tolist()
        assert compare(stopping_criteria=[EndsWith(*first[:2])]).shape[1] == 8
        assert compare(stopping_criteria=[EndsWith(*first)]).shape[1] == 1


def test_rows_keep_their_numbers(compare):
    def allowed(row, input_ids):
        return [2] if row == 0 else list(range(40 * row, 40 * row + 40))

    tokens = compare(prefix_allowed_tokens_fn=allowed, eos_token_id=2)
    assert tokens[0].tolist() == [2] + [0] * 7  # it ends at once, and the others are rows 1 and 2 all the same
    assert ((tokens[1:] // 40) == torch.tensor([[1], [2]])).all()


def test_the_callers_processors_are_heard(compare):
    def never_the_likeliest(input_ids, scores):
        return scores.scatter(1, scores.argmax(dim=-1, keepdim=True), float("-inf"))

    changed = compare(logits_processor=LogitsProcessorList([never_the_likeliest]))
    assert not torch.equal(changed, compare())


class TestWhatCannotBeDone:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"guidance_scale": 2.0}, "guidance_scale"),
            ({"use_cache": False}, "use_cache=False leaves nothing"),
        ],
        ids=str,
    )
    def test_in_both_stages(self, model, settings, message):
        plan, prompts = PruningPlan.empty(model), random_prompts([8])
        with pytest.raises(ValueError, match=message):
            PrefillStage(model, plan)(*prompts, **settings)
        with pytest.raises(ValueError, match=message):
            DecodeStage(model, plan).generate(PrefillStage(model, plan)(*prompts), **settings)

    def test_guidance_where_decode_generates_all(self, model):
        plan, (input_ids, mask) = PruningPlan.empty(model), random_prompts([8])
        settings = {"guidance_scale": 2.0, "do_sample": False, "max_new_tokens": 6}
        payload = PrefillStage(model, plan)(input_ids, mask, first_token="decode", **settings)
        expected = model.generate(input_ids=input_ids, attention_mask=mask, **settings)
        assert torch.equal(DecodeStage(model, plan).generate(payload, **settings), expected)
