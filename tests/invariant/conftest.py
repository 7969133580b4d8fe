import json

import pytest


@pytest.fixture
def training_folder(tmp_path, tiny_llama, tiny_tokenizer):
    """What `training_process.start_training` reads, and a place for what it writes."""
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "model.json").write_text(json.dumps(tiny_llama.config.to_dict()))
    return tmp_path
