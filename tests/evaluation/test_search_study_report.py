from hf_pdprune.evaluation.search_study_report import search_study_table


SEARCH = {
    "strategy": "annealing",
    "num_blocks": 2,
    "calibration": "first",
    "calibration_digest": "d",
    "removable_blocks": [1, 2, 3, 4],
    "annealing_share": 0.15,
    "merge_source": None,
    "calibration_examples": 8,
    "prompt_tokens": 12,
    "completion_tokens": 20,
    "batch_size": 4,
    "merge_tokens": None,
    "merge_rank": None,
    "block_tokens": 600,
    "plain_greedy_block_tokens": 2400,
    "dense_forward_block_tokens": 100,
}


def row(seed, validation, kl, removed, **changed):
    found = {"seed": seed, "kl_calibration": kl / 2, "seconds": 60.0, "removed_blocks": removed, "merged_blocks": []}
    where = {"validation": validation, "validation_source": f"{validation}.jsonl", "validation_examples": 4}
    return SEARCH | found | where | {"kl": kl} | changed


SEARCHES = [row(0, "held-out", 0.4, [1, 2]), row(0, "other", 1.0, [1, 2]), row(1, "held-out", 0.6, [2, 3])]


def cells(table, line=1):
    return dict(zip(table.rows[0], table.rows[line], strict=True))


def test_means_and_spread_over_seeds():
    table = search_study_table(SEARCHES)
    assert len(table.rows) == 2
    assert cells(table) == {
        "calibration": "first",
        "blocks": "2",
        "strategy": "annealing",
        "KL, calibration": "0.2500",
        "KL, held-out": "0.5000",
        "KL, other": "1.0000",
        "spread": "40.0%",
        "overlap of sets": "33%",
        "cost / dense forwards": "6.0",
        "of plain greedy": "25%",
        "minutes": "1.0",
        "missing blocks (first seed)": "1, 2",
    }


def test_one_draw_has_no_spread_and_merges_are_named():
    merged = row(None, "held-out", 0.4, [1], merged_blocks=[[2, 3]], plain_greedy_block_tokens=None)
    own = cells(search_study_table([merged]))
    assert own["spread"] == own["overlap of sets"] == own["of plain greedy"] == ""
    assert own["missing blocks (first seed)"] == "1, 3 into 2"


def test_options_have_columns_where_they_differ():
    longer = row(0, "held-out", 0.3, [1, 2], calibration_examples=16, calibration_digest="e")
    table = search_study_table([*SEARCHES, longer])
    assert [line[3] for line in table.rows] == ["calibration_examples", "8", "16"]
    # The same name for another text is another column.
    other = row(0, "held-out", 0.3, [1, 2], validation_examples=9)
    assert "KL, held-out (9 of held-out.jsonl)" in search_study_table([*SEARCHES, other]).rows[0]


def test_rows_that_do_not_say_what_they_were_made_with_are_left_out():
    old = {key: value for key, value in SEARCHES[0].items() if key != "calibration_digest"}
    assert search_study_table([old, *SEARCHES]).rows == search_study_table(SEARCHES).rows
