from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from transformers import BitsAndBytesConfig

from hf_pdprune.adapters import is_quantized
from hf_pdprune.hub import load_stages
from hf_pdprune.trainer.dense_model import load_dense_model


@pytest.fixture
def model_id(tiny_llama, tiny_tokenizer, tmp_path):
    tiny_llama.save_pretrained(tmp_path / "dense")
    tiny_tokenizer.save_pretrained(tmp_path / "dense")
    return str(tmp_path / "dense")


def options(distributed_type=DistributedType.NO, **model_init_kwargs):
    return SimpleNamespace(
        model_init_kwargs=model_init_kwargs or None,
        trust_remote_code=False,
        distributed_state=SimpleNamespace(distributed_type=distributed_type),
    )


def test_a_model_is_trained_by_its_id(model_id, make_trainer, tmp_path, losses):
    trainer = make_trainer(
        model_id,
        processing_class=None,
        output_dir=tmp_path / "run",
        model_init_kwargs={"dtype": "bfloat16", "attn_implementation": "eager"},
    )
    assert trainer.model.config._attn_implementation == "eager"
    assert trainer.model.get_input_embeddings().weight.dtype == torch.bfloat16
    trainer.train()
    assert len(losses(trainer)) == 4
    trainer.save_model(str(tmp_path / "stages"))
    assert len(load_stages(tmp_path / "stages")) == 2
    assert (tmp_path / "stages" / "decode" / "tokenizer.json").is_file()


def test_a_model_is_quantised_where_that_is_asked_for(model_id, make_trainer, losses):
    pytest.importorskip("bitsandbytes")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    trainer = make_trainer(model_id, quantization_config=config, max_steps=2)
    layers = [module for name, module in trainer.model.named_modules() if name.endswith("proj.base_layer")]
    assert layers and all(map(is_quantized, layers))
    trainer.train()
    assert len(losses(trainer)) == 2


def test_two_quantisations_are_refused():
    config = BitsAndBytesConfig(load_in_4bit=True)
    with pytest.raises(ValueError, match="quantization_config is given twice"):
        load_dense_model("x", options(quantization_config=config), config)


@pytest.mark.parametrize("kind", [DistributedType.MULTI_GPU, DistributedType.DEEPSPEED])
def test_every_process_takes_the_whole_model(monkeypatch, kind):
    calls = []
    monkeypatch.setattr(
        "hf_pdprune.trainer.dense_model.create_model_from_path", lambda model_id, **kwargs: calls.append(kwargs)
    )
    load_dense_model("x", options(kind, device_map="auto"))
    load_dense_model("x", options(device_map="auto"))
    assert [call["device_map"] for call in calls] == [None, "auto"]
