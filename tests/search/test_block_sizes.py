import pytest

from hf_pdprune.search.block_sizes import fewest_blocks, head_size, idle_sizes


def test_as_few_blocks_as_a_speedup_takes():
    assert [fewest_blocks("x", speedup, 8, 1, 6) for speedup in (1.0, 1.1, 8 / 7, 8 / 6, 4.0)] == [0, 1, 1, 2, 6]
    with pytest.raises(ValueError, match="target_x 4.1 cannot be met: without all 6 blocks .* it is 4.00"):
        fewest_blocks("target_x", 4.1, 8, 1, 6)


def test_what_is_read_for_every_token_and_what_a_projected_block_leaves_out(tiny_llama):
    assert head_size(tiny_llama) == tiny_llama.lm_head.weight.numel()
    for size, block in zip(idle_sizes(tiny_llama), tiny_llama.model.layers, strict=True):
        runs = (block.input_layernorm, block.self_attn.k_proj, block.self_attn.v_proj)
        left = sum(p.numel() for module in runs for p in module.parameters())
        assert size == sum(p.numel() for p in block.parameters()) - left
