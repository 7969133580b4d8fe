from accelerate import PartialState

from hf_pdprune.evaluation import process_group


def test_processes_wait_for_the_main_one_for_a_day(monkeypatch):
    handlers = []
    monkeypatch.setattr(process_group, "Accelerator", lambda kwargs_handlers: handlers.extend(kwargs_handlers))
    assert process_group.join_processes().num_processes == PartialState().num_processes == 1
    assert [handler.to_kwargs()["timeout"].days for handler in handlers] == [1]
