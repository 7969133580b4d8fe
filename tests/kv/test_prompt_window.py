import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from masked_reference import dropped_columns

from hf_pdprune.kv import PromptWindow
from hf_pdprune.plan import KVPlan


lengths = st.lists(st.integers(1, 12), min_size=1, max_size=4)
first_tokens = st.integers(0, 6)
last_tokens = st.integers(1, 6)
padding_sides = st.sampled_from(["left", "right"])


def padding_mask(row_lengths, side):
    width = max(row_lengths)
    rows = [[1] * length + [0] * (width - length) for length in row_lengths]
    return torch.tensor(rows if side == "right" else [row[::-1] for row in rows])


@settings(deadline=None)
@given(lengths, first_tokens, last_tokens, padding_sides)
def test_keeps_first_and_last_real_tokens_of_each_row(row_lengths, first, last, side):
    mask = padding_mask(row_lengths, side)
    window = PromptWindow.of_prompt(mask.shape[1], mask, first, last)
    dropped = [of_row[0] for of_row in dropped_columns(mask, KVPlan(), (first, last))]
    if window is None:
        assert not any(dropped)
        return
    columns = window.columns.expand(len(mask), -1)
    assert window.kept_tokens == columns.shape[1] < mask.shape[1]
    for row, kept in enumerate(columns.tolist()):
        assert kept == sorted(set(kept))
        assert not set(kept) & set(dropped[row])
        real = {column for column in range(mask.shape[1]) if mask[row, column]}
        assert real - set(dropped[row]) <= set(kept)
    # No wider than the row that keeps most.
    assert window.kept_tokens == max(int(row.sum()) - len(d) for row, d in zip(mask, dropped, strict=True))


@settings(deadline=None)
@given(lengths, first_tokens, last_tokens, padding_sides, st.integers(0, 3))
def test_states_and_masks_are_selected_alike(row_lengths, first, last, side, since):
    mask = padding_mask(row_lengths, side)
    window = PromptWindow.of_prompt(mask.shape[1], mask, first, last)
    if window is None:
        return
    rows, tokens = len(mask), mask.shape[1] + since
    columns = torch.cat([window.columns.expand(rows, -1), torch.arange(mask.shape[1], tokens).expand(rows, -1)], dim=1)
    # A value that tells row, head and column.
    states = torch.arange(rows * 2 * tokens).view(rows, 2, tokens, 1).expand(-1, -1, -1, 3)
    expected = torch.stack([states[row, :, columns[row]] for row in range(rows)])
    assert torch.equal(window.select(states), expected)
    for heads, queries in ((1, 1), (2, 3)):
        masks = torch.arange(rows * heads * queries * tokens).view(rows, heads, queries, tokens)
        expected = torch.stack([masks[row, :, :, columns[row]] for row in range(rows)])
        assert torch.equal(window.select_mask(masks), expected)
        shared = window.select_mask(masks[:1])  # one mask for all rows
        assert torch.equal(shared.expand(rows, -1, -1, -1)[-1], masks[0][:, :, columns[-1]])
    flat = torch.arange(rows * tokens).view(rows, tokens)  # as flash attention takes it
    assert torch.equal(window.select_mask(flat), torch.gather(flat, 1, columns))


@settings(deadline=None)
@given(lengths, first_tokens, last_tokens, st.integers(0, 12), st.integers(1, 8))
def test_dropped_columns_are_hidden_from_queries_after_the_prompt(row_lengths, first, last, first_query, queries):
    mask = padding_mask(row_lengths, "left")
    window = PromptWindow.of_prompt(mask.shape[1], mask, first, last)
    tokens = first_query + queries
    if window is None or tokens < mask.shape[1]:
        return
    dropped = [of_row[0] for of_row in dropped_columns(mask, KVPlan(), (first, last))]
    causal = torch.ones(tokens, tokens).tril().bool()[first_query:]
    padding = torch.nn.functional.pad(mask, (0, tokens - mask.shape[1]), value=1).bool()
    whole = (causal & padding[:, None])[:, None]
    expected = whole.clone()
    for row, columns in enumerate(dropped):
        for query in range(max(mask.shape[1] - first_query, 0), queries):
            expected[row, :, query, columns] = False
    # Among real columns; what a row shows of its padding is up to the mask that it is given.
    assert torch.equal(window.hide_dropped(whole, first_query, queries), expected)
    least = torch.finfo(torch.float32).min
    additive = torch.zeros(whole.shape).masked_fill(~whole, least)
    hidden = window.hide_dropped(additive, first_query, queries)
    assert torch.equal(hidden, torch.zeros(expected.shape).masked_fill(~expected, least))
    without_mask = window.hide_dropped(None, first_query, queries)
    assert torch.equal(without_mask.expand_as(expected) & padding[:, None, None], expected)


def test_no_padding_keeps_the_same_columns_in_all_rows():
    for mask in (None, torch.ones(3, 10)):
        window = PromptWindow.of_prompt(10, mask, 2, 3)
        assert window.columns.tolist() == [0, 1, 7, 8, 9]
        assert window.index_rows(torch.tensor([2, 0])) is window


def test_rows_are_reordered_with_the_batch():
    mask = padding_mask([10, 7, 2], "left")
    window = PromptWindow.of_prompt(10, mask, 1, 2)
    rows = torch.tensor([2, 0, 0, 1])
    assert torch.equal(window.index_rows(rows).columns, PromptWindow.of_prompt(10, mask[rows], 1, 2).columns)


def test_a_prompt_as_long_as_the_window_keeps_all():
    assert PromptWindow.of_prompt(10, None, 4, 6) is None
    assert PromptWindow.of_prompt(10, padding_mask([10, 4], "left"), 4, 6) is None
    assert PromptWindow.of_prompt(10, None, 4, 5).kept_tokens == 9
