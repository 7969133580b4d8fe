import pytest
import torch

from hf_pdprune.evaluation.continuation_scorer import ContinuationScorer
from hf_pdprune.hub import build_stage
from hf_pdprune.inference import DecodeStage, PrefillStage, disaggregated_forward
from hf_pdprune.plan import KVPlan, PruningPlan, StagePlan


def random_ids(length, seed):
    return torch.randint(3, 256, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


CONTEXTS = [random_ids(length, length) for length in (5, 23, 12, 31)]
# Several answers to some contexts, one of them of one token, contexts in no order.
REQUESTS = [
    (CONTEXTS[context], random_ids(length, 100 + index))
    for index, (context, length) in enumerate([(1, 4), (0, 1), (1, 9), (3, 2), (2, 6), (1, 1), (0, 5), (3, 3)])
]


@pytest.fixture
def plan(tiny_llama):
    kv = KVPlan((0, 3), first_tokens=2, last_tokens=6)
    return PruningPlan.empty(tiny_llama, "tiny", prefill=StagePlan((2,)), decode=StagePlan((2, 4)), kv=kv)


def pair(model, plan):
    return PrefillStage(model, plan), DecodeStage(model, plan)


def reference(stages, context, continuation):
    """One request by itself, through the disaggregated forward."""
    prompt, completion = torch.tensor([context]), torch.tensor([continuation])
    batch = {
        "prompt_ids": prompt,
        "prompt_mask": torch.ones_like(prompt),
        "completion_ids": completion,
        "completion_mask": torch.ones_like(completion),
    }
    with torch.no_grad():
        log_probs = disaggregated_forward(*stages, batch)[0].log_softmax(dim=-1)
    chosen = log_probs.gather(-1, completion[0, :, None]).sum()
    return float(chosen), log_probs.argmax(dim=-1).tolist() == continuation


@pytest.mark.parametrize("batch_size", [1, 2, 3, 16])
def test_scores_are_those_of_the_disaggregated_forward(tiny_llama, plan, batch_size):
    stages = pair(tiny_llama, plan)
    scores = sorted(ContinuationScorer(*stages, batch_size).score(REQUESTS))
    assert [score.index for score in scores] == list(range(len(REQUESTS)))
    for score, request in zip(scores, REQUESTS, strict=True):
        total, greedy = reference(stages, *request)
        assert score.log_likelihood == pytest.approx(total, abs=1e-4) and score.is_greedy == greedy


@pytest.mark.parametrize("batch_size", [1, 16])
def test_decode_can_predict_the_first_token(tiny_llama, plan, batch_size):
    stages = pair(tiny_llama, plan)
    requests = [*REQUESTS, (CONTEXTS[0][:1], random_ids(3, 7))]
    scores = sorted(ContinuationScorer(*stages, batch_size, first_token="decode").score(requests))
    for score, (context, continuation) in zip(scores, requests, strict=True):
        read = context[-1:] if len(context) > 1 else []  # a context of one token is prefill's
        total, _ = reference(stages, context[: len(context) - len(read)] if read else context, read + continuation)
        before = reference(stages, context[:-1], read)[0] if read else 0.0
        assert score.log_likelihood == pytest.approx(total - before, abs=1e-4)
    plain = sorted(ContinuationScorer(*stages, batch_size).score(requests))
    differs = [abs(a.log_likelihood - b.log_likelihood) > 1e-4 for a, b in zip(scores, plain, strict=True)]
    assert all(differs[:-1]) and not differs[-1]


def test_checkpoints_give_what_views_give(tiny_llama, plan):
    checkpoints = (
        PrefillStage(build_stage(tiny_llama, plan, "prefill"), plan),
        DecodeStage(build_stage(tiny_llama, plan, "decode"), plan),
    )
    for one, other in zip(
        sorted(ContinuationScorer(*checkpoints).score(REQUESTS)),
        sorted(ContinuationScorer(*pair(tiny_llama, plan)).score(REQUESTS)),
        strict=True,
    ):
        assert one.log_likelihood == pytest.approx(other.log_likelihood, abs=1e-4)


def test_a_shared_context_is_read_once(tiny_llama, plan, monkeypatch):
    rows = []
    forward = PrefillStage.forward
    monkeypatch.setattr(
        PrefillStage, "forward", lambda self, ids, mask: rows.append(len(ids)) or forward(self, ids, mask)
    )
    list(ContinuationScorer(*pair(tiny_llama, plan), batch_size=3).score(REQUESTS))
    assert sum(rows) == len(CONTEXTS) and max(rows) == 3


def test_greedy_continuation_is_known_as_such(tiny_llama, plan):
    stages = pair(tiny_llama, plan)
    context = torch.tensor([CONTEXTS[1]])
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    sequences = stages[1].generate(stages[0](context, **settings), max_new_tokens=5, **settings)
    greedy = sequences[0, context.shape[1] :].tolist()
    other = [*greedy[:-1], (greedy[-1] + 1) % 256]
    scores = sorted(ContinuationScorer(*stages).score([(CONTEXTS[1], greedy), (CONTEXTS[1], other)]))
    assert [score.is_greedy for score in scores] == [True, False]


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_windows_with_an_empty_plan_are_those_of_the_dense_model(tiny_llama, share):
    scorer = ContinuationScorer(*pair(tiny_llama, PruningPlan.empty(tiny_llama)), batch_size=2)
    windows = [([1], random_ids(length, length)) for length in (1, 2, 17, 9)] + [(random_ids(4, 1), random_ids(6, 2))]
    for score, (read, scored) in zip(sorted(scorer.score_windows(windows, share)), windows, strict=True):
        ids = torch.tensor([[*read, *scored]])
        with torch.no_grad():
            log_probs = tiny_llama(input_ids=ids).logits[0, len(read) - 1 : -1].log_softmax(dim=-1)
        expected = float(log_probs.gather(-1, torch.tensor(scored)[:, None]).sum())
        assert score.log_likelihood == pytest.approx(expected, abs=1e-4)


def test_windows_depend_on_who_reads_what(tiny_llama, plan):
    scorer = ContinuationScorer(*pair(tiny_llama, plan))
    window = [([1], random_ids(40, 3))]
    totals = {share: next(scorer.score_windows(window, share)).log_likelihood for share in (0.0, 0.5)}
    assert abs(totals[0.0] - totals[0.5]) > 1e-3


@pytest.mark.parametrize(
    ("request_", "message"), [(([], [1]), "request 0 has an empty context"), (([1], []), "empty continuation")]
)
def test_empty_requests_are_refused(tiny_llama, plan, request_, message):
    with pytest.raises(ValueError, match=message):
        list(ContinuationScorer(*pair(tiny_llama, plan)).score([request_]))


def test_bad_options_are_refused(tiny_llama, plan):
    with pytest.raises(ValueError, match="batch_size"):
        ContinuationScorer(*pair(tiny_llama, plan), batch_size=0)
    with pytest.raises(ValueError, match="prompt_share"):
        list(ContinuationScorer(*pair(tiny_llama, plan)).score_windows([([1], [2])], 1.0))
