import pytest
from accelerate import PartialState

from hf_pdprune.search.block_progress import BlockProgress


def test_blocks_are_counted_on_a_terminal_or_not(capsys):
    with BlockProgress(2, "Blocks") as progress:
        progress.update(0)  # after a batch
        progress.update()
        progress.update()
    assert "Blocks: 100%" in capsys.readouterr().err


@pytest.mark.parametrize("is_main", [True, False])
def test_no_bar_without_blocks_and_in_other_processes(capsys, monkeypatch, is_main):
    monkeypatch.setattr(PartialState, "is_main_process", is_main)
    with BlockProgress(0 if is_main else 2) as progress:
        progress.update()
    assert capsys.readouterr().err == ""


def test_blocks_are_counted_where_their_number_is_not_known(capsys):
    with BlockProgress(None, "Blocks") as progress:
        progress.update()
    assert "Blocks: 1block" in capsys.readouterr().err
