import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM


@pytest.fixture
def uneven_rows():
    generator = torch.Generator().manual_seed(0)
    return Dataset.from_list(
        [{"input_ids": torch.randint(3, 240, (n,), generator=generator).tolist()} for n in (24, 9, 17, 30)]
    )


def test_end_of_text_pads_where_the_tokenizer_has_no_token_for_it(
    tiny_llama, make_trainer, uneven_rows, tiny_tokenizer, losses
):
    tiny_tokenizer.pad_token = None
    tiny_llama.config.eos_token_id = [2, 7]  # as in Llama 3 Instruct
    trainer = make_trainer(tiny_llama, train_dataset=uneven_rows, max_steps=2)
    assert trainer.data_collator.pad_token_id == tiny_tokenizer.eos_token_id == 2
    trainer.train()
    assert len(losses(trainer)) == 2


def test_the_models_tokenizer_is_taken_where_none_is_given(
    tiny_llama, make_trainer, uneven_rows, tiny_tokenizer, tmp_path
):
    tiny_llama.save_pretrained(tmp_path / "dense")
    tiny_tokenizer.save_pretrained(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    trainer = make_trainer(model, train_dataset=uneven_rows, processing_class=None, max_steps=1)
    assert trainer.data_collator.pad_token_id == tiny_tokenizer.pad_token_id == 0
    trainer.train()


def test_option_names_the_token(tiny_llama, make_trainer, tiny_tokenizer):
    with pytest.warns(FutureWarning, match="pad_token"):
        trainer = make_trainer(tiny_llama, pad_token="<|unk|>")
    assert trainer.data_collator.pad_token_id == tiny_tokenizer.convert_tokens_to_ids("<|unk|>") == 3


def test_a_collator_of_ones_own_is_refused(tiny_llama, make_trainer):
    with pytest.raises(ValueError, match="data_collator is not supported"):
        make_trainer(tiny_llama, data_collator=list)
