import torch

from hf_pdprune.evaluation.live_tensors import LiveTensors


def test_what_is_freed_counts_no_more():
    with LiveTensors() as live:
        first = torch.zeros(1000)
        second = first.view(10, 100)[:5]  # no memory of its own
        assert live.nbytes == live.peak == 4000
        del first
        assert live.nbytes == 4000
        del second
        third = torch.zeros(500, dtype=torch.float64)
        third += torch.ones(500)
    assert live.nbytes == 4000 and live.peak == 6000 and third.sum() == 500


def test_what_was_there_before_counts_when_it_goes():
    before, other = torch.zeros(1000), torch.zeros(1000)
    with LiveTensors([before, before[:10]]) as live:
        before = torch.cat([before, before[:1]])
        assert live.peak == 4004 and live.nbytes == 4
        before = torch.cat([before, before[:1]])
        other = other + 1
    assert live.nbytes == 4008 and live.peak == 4012 and len(other) == 1000


def test_a_view_of_what_was_there_before_is_nothing_new():
    weight = torch.ones(100, 10)
    with LiveTensors() as live, torch.no_grad():
        assert torch.nn.functional.linear(torch.ones(1, 10), weight.t().contiguous().t()).shape == (1, 100)
    assert live.peak == 40 + 4000 + 400
    with LiveTensors() as live:
        turned = weight.t()
    assert live.peak == 0 and turned.shape == (10, 100)


def test_results_are_the_same():
    numbers = torch.arange(12.0).reshape(3, 4)
    with LiveTensors():
        values, places = torch.nn.functional.linear(numbers, numbers).topk(2)
    assert values.tolist() == torch.nn.functional.linear(numbers, numbers).topk(2).values.tolist()
    assert places.shape == (3, 2)
