import json

import pytest

from hf_pdprune.evaluation.link_report import (
    gain_table,
    link_lines,
    link_table,
    milliseconds,
    read_handover,
    verdicts,
)


def row(link, kind, sent, prefill, hand_over, nbytes=1000):
    step = 0.05
    ttft_decode = prefill + hand_over + step
    return {
        "link": link,
        "kind": kind,
        "sent": sent,
        "bytes_sent": nbytes,
        "ttft": prefill,
        "second_token": ttft_decode,
        "ttft_decode": ttft_decode,
        "hand_over": hand_over,
        "hand_over_share": hand_over / ttft_decode,
        "tpot": step,
    }


WHOLE, STREAMED = "in one piece", "block by block"
ROWS = [
    row("slow", "dense", WHOLE, 2.0, 1.95, 47_000_000),
    row("slow", "dense", STREAMED, 2.0, 0.2),
    row("slow", "plan", WHOLE, 1.6, 0.45, 9_000_000),
    row("slow", "plan", STREAMED, 1.6, 0.1),
    row("slow", "plan + int4", WHOLE, 1.6, 0.15, 2_000_000),
    row("slow", "plan + int4", STREAMED, 1.6, 0.1),
    row("fast", "dense", WHOLE, 2.0, 0.02),
    row("fast", "plan", WHOLE, 1.6, 0.005),
    row("fast", "plan + int4", WHOLE, 1.6, 0.105),
]
HANDOVER = {
    "settings": {"prompt_tokens": 1024, "repeats": 2},
    "environment": {"device": "two cores", "dtype": "float32"},
    "measured": ROWS[:6],
    "modelled": ROWS,
}


def test_a_row_tells_both_ttfts_and_the_share_of_the_transfer():
    text = link_table(ROWS).to_markdown()
    for title in ("TTFT, from prefill", "TTFT, from decode", "second token", "hand-over time", "share", "TPOT"):
        assert title in text
    expected = "| slow | dense | in one piece | 47.00 MB | 2,000 ms | 4,000 ms | 4,000 ms | 1,950 ms | 48.8% | 50 ms |"
    assert expected in text


def test_what_fewer_bytes_save_stands_beside_what_fewer_blocks_save():
    text = gain_table(ROWS).to_markdown()
    whole = "| slow | in one piece | 4,000 ms | 1,950 ms | x 0.525 | 1,500 ms | 400 ms | x 0.450 | 1,800 ms | 400 ms |"
    streamed = "| slow | block by block | 2,250 ms | 200 ms | x 0.778 | 100 ms | 400 ms | x 0.778 | 100 ms | 400 ms |"
    fast = "| fast | in one piece | 2,070 ms | 20 ms | x 0.800 | 15 ms | 400 ms | x 0.848 | -85 ms | 400 ms |"
    for line in (whole, streamed, fast):
        assert line in text


def test_where_it_pays_and_where_not():
    assert verdicts(ROWS) == [
        "plan instead of dense, in one piece: the hand-over takes from TTFT 37.5% (slow); "
        "changes TTFT by less than 1% (fast).",
        "plan instead of dense, block by block: the hand-over takes from TTFT 4.4% (slow).",
        "plan + int4 instead of plan, in one piece: the hand-over takes from TTFT 14.3% (slow); "
        "adds to TTFT 6.0% (fast).",
        "plan + int4 instead of plan, block by block: the hand-over changes TTFT by less than 1% (slow).",
    ]


def test_lines_of_a_report():
    text = "\n".join(link_lines(HANDOVER))
    for part in ("1,024 tokens, two cores, float32", "medians of 2 in turns", "| fast | plan |", "instead of dense"):
        assert part in text, part


def test_files_are_read_or_refused(tmp_path):
    path = tmp_path / "handover.json"
    assert read_handover(path) is None
    path.write_text(json.dumps(HANDOVER))
    assert read_handover(path) == HANDOVER
    path.write_text('{"settings": {}, "environment": {}, "measured": []}')
    with pytest.raises(ValueError, match="handover.json has no modelled"):
        read_handover(path)


def test_milliseconds():
    assert [milliseconds(value) for value in (12.3456, 0.1, 0.0123456, 0.00000123, 0.0)] == [
        "12,346 ms",
        "100 ms",
        "12.3 ms",
        "0.00123 ms",
        "0 ms",
    ]
