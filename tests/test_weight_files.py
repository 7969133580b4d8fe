import json

import pytest

from hf_pdprune.weight_files import check_weight_index


def test_files_beside_the_index(tmp_path):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "x.safetensors"}}))
    check_weight_index(path, "here")


@pytest.mark.parametrize("name", ["../x.safetensors", "/x.safetensors", "a/x.safetensors", "model.bin", "x.py", 3, ""])
def test_other_names_are_refused(tmp_path, name):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"a": "x.safetensors", "b": name}}))
    with pytest.raises(ValueError, match="here: model.safetensors.index.json names .*, no safetensors file beside it"):
        check_weight_index(path, "here")


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": []}'])
def test_what_is_no_index(tmp_path, content):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="has no weight_map"):
        check_weight_index(path, "here")
