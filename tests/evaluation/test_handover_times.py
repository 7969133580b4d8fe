from dataclasses import replace

import pytest

from hf_pdprune.evaluation.handover_times import HandoverTimes, measured_and_modelled, summarize_hand_overs
from hf_pdprune.inference import Link


# Prefill takes 2 s; 3 bytes are ready after 1 s, 2 more at the end; the link carries a byte per second.
STREAMED = HandoverTimes(2.0, ((1.0, 3), (2.0, 2)), 6.0, 6.5, (7.5, 8.0, 8.5))
BYTE_PER_SECOND = Link("slow", 8e-9)


def test_parts_of_a_hand_over():
    assert STREAMED.bytes_sent == 5
    assert STREAMED.hand_over == 4.5
    assert STREAMED.steps == [0.5, 0.5]
    # The last frame may be there before this process knows that prefill is done.
    assert replace(STREAMED, prefilled=6.6).hand_over == 0.0
    for broken in ({"frames": ()}, {"tokens": (7.5,)}):
        values = {"prefilled": 2.0, "frames": ((2.0, 5),), "arrived": 6.0, "unpacked": 6.5, "tokens": (7.0, 8.0)}
        with pytest.raises(ValueError, match="frames and two tokens"):
            HandoverTimes(**values | broken)


def test_the_same_hand_over_over_another_link():
    assert STREAMED.over(BYTE_PER_SECOND) == STREAMED
    fast = STREAMED.over(Link("fast", 80e-9, 0.25))  # ten bytes per second
    # Only the last frame is left when prefill is done; unpacking and computing take as long.
    assert fast.arrived == pytest.approx(2.0 + 0.2 + 0.25)
    assert fast.hand_over == pytest.approx(0.95)
    assert fast.tokens == pytest.approx((3.95, 4.45, 4.95))
    assert (fast.prefilled, fast.frames) == (STREAMED.prefilled, STREAMED.frames)


def test_medians_tell_who_waits_for_the_transfer():
    def times(prefilled, hand_over, step):
        ready = prefilled + hand_over
        tokens = (ready + step, ready + 2 * step, ready + 3 * step)
        return HandoverTimes(prefilled, ((prefilled, 7),), ready, ready, tokens)

    from_prefill = [times(2.0, 1.0, 0.5), times(2.5, 1.0, 0.5), times(9.0, 1.0, 0.5)]
    from_decode = [times(1.5, 2.0, 0.5)]
    assert summarize_hand_overs(from_prefill, from_decode) == {
        "bytes_sent": 7,
        "ttft": 2.5,  # contains no transfer
        "second_token": 4.0,
        "ttft_decode": 4.0,
        "hand_over": 2.0,
        "hand_over_share": 0.5,
        "tpot": 0.5,
    }


def test_rows_by_link_kind_and_way():
    runs = [
        {"link": link, "kind": kind, "sent": sent, "first_token": first, "times": STREAMED}
        for kind in ("dense", "plan")
        for link in ("a", "b")
        for sent in ("whole", "streamed")
        for first in ("prefill", "decode")
    ]
    measured, modelled = measured_and_modelled(runs, [Link("fast", 80e-9), BYTE_PER_SECOND])
    kinds = [("dense", "whole"), ("dense", "streamed"), ("plan", "whole"), ("plan", "streamed")]
    assert [(row["link"], row["kind"], row["sent"]) for row in measured] == [
        (x, *kind) for x in "ab" for kind in kinds
    ]
    assert [row["link"] for row in modelled] == ["fast"] * 4 + ["slow"] * 4
    assert {row["ttft_decode"] for row in measured} == {7.5}
    assert [row["ttft_decode"] for row in modelled] == pytest.approx([3.7] * 4 + [7.5] * 4)
    assert {row["ttft"] for row in modelled} == {2.0}  # no link changes it
