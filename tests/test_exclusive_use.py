import threading

import pytest

from hf_pdprune.exclusive_use import exclusive_use


def others_get_it(model):
    """Whether another thread gets exclusive use of the model at once."""
    done = threading.Event()

    def work():
        with exclusive_use(model):
            done.set()

    threading.Thread(target=work, daemon=True).start()
    return done.wait(0.2)


def test_other_threads_wait_until_it_ends(tiny_llama, tiny_model):
    with exclusive_use(tiny_llama), exclusive_use(tiny_llama):
        assert not others_get_it(tiny_llama)
        assert others_get_it(tiny_model("llama"))
    assert others_get_it(tiny_llama)
    with pytest.raises(KeyError), exclusive_use(tiny_llama):
        raise KeyError
    assert others_get_it(tiny_llama)


def test_a_wrapped_model_is_the_same_one(tiny_llama, adapted):
    model = adapted(tiny_llama)
    with exclusive_use(model):
        assert not others_get_it(tiny_llama)
