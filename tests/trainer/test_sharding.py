import pytest
from accelerate import FullyShardedDataParallelPlugin

from hf_pdprune.trainer.sharding import check_fsdp


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"fsdp_version": 1}, "set fsdp_version to 2"),
        ({"state_dict_type": "SHARDED_STATE_DICT"}, "set fsdp_state_dict_type to FULL_STATE_DICT"),
    ],
)
def test_what_is_sharded_in_another_way_is_refused(tiny_llama, change, message):
    plugin = FullyShardedDataParallelPlugin(**{"fsdp_version": 2, "state_dict_type": "FULL_STATE_DICT"} | change)
    if message is None:
        check_fsdp(plugin, tiny_llama)
        return
    with pytest.raises(ValueError, match=message):
        check_fsdp(plugin, tiny_llama)
