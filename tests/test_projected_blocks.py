import pytest
import torch
from masked_reference import random_prompts
from peft import LoraConfig, get_peft_model
from transformers import DynamicCache

from hf_pdprune.adapters import adapter_parameters
from hf_pdprune.blocks import bypass_blocks, get_blocks
from hf_pdprune.inference.stage import position_ids
from hf_pdprune.projected_blocks import ProjectedBlock, check_projectable, idle_layers, project_blocks


LLAMA_IDLE = [
    "self_attn.q_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
    "post_attention_layernorm",
]


def read(model):
    """Logits of a padded batch's real tokens, and the cache."""
    input_ids, mask = random_prompts([20, 7, 12])
    cache = DynamicCache(config=model.config)
    output = model(
        input_ids=input_ids,
        attention_mask=mask,
        position_ids=position_ids(mask),
        past_key_values=cache,
        use_cache=True,
    )
    return output.logits[mask.bool()], cache


def hands_on(module, args, kwargs, output):
    """As a forward hook: the block's work is thrown away."""
    given = args[0] if args else kwargs["hidden_states"]
    return (given, *output[1:]) if isinstance(output, tuple) else given


@torch.no_grad()
@pytest.mark.parametrize("blocks", [(0,), (2, 3), (5,)], ids=str)
def test_keys_and_values_are_the_blocks_own_and_its_output_is_its_input(tiny_model, architecture, blocks):
    model = tiny_model(architecture)
    dense, _ = read(model)
    handles = [get_blocks(model)[block].register_forward_hook(hands_on, with_kwargs=True) for block in blocks]
    expected, full = read(model)
    for handle in handles:
        handle.remove()
    with project_blocks(model, blocks):
        actual, cache = read(model)
    assert torch.equal(actual, expected) and (actual - dense).abs().max() > 1e-2
    for layer, other in zip(cache.layers, full.layers, strict=True):
        assert torch.equal(layer.keys, other.keys) and torch.equal(layer.values, other.values)
    assert torch.equal(read(model)[0], dense)


def test_idle_layers_do_not_run(tiny_llama):
    ran = []
    with project_blocks(tiny_llama, (2,)):
        for name, module in tiny_llama.model.layers[2].stands_for.named_modules():
            module.register_forward_hook(lambda *_, name=name: ran.append(name))
        read(tiny_llama)
    # The query projection is called and gives zeros without looking at its weights.
    assert ran == ["input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
    assert idle_layers(tiny_llama, 2) == LLAMA_IDLE
    weight = get_blocks(tiny_llama)[2].self_attn.q_proj.weight
    with torch.no_grad(), project_blocks(tiny_llama, (2,)):
        before, _ = read(tiny_llama)
        weight.fill_(float("nan"))
        assert torch.equal(read(tiny_llama)[0], before)


def test_one_layer_for_queries_keys_and_values_runs(tiny_model):
    assert idle_layers(tiny_model("gpt2"), 1) == ["attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"]
    assert "mlp.experts" in idle_layers(tiny_model("mixtral"), 1)


def test_idle_layers_of_a_model_with_adapters(tiny_llama, adapted):
    model = adapted(tiny_llama)
    assert sorted(idle_layers(model, 2)) == sorted(LLAMA_IDLE)
    check_projectable(model, (0, 2))


def test_everything_is_restored(tiny_llama):
    blocks = list(get_blocks(tiny_llama))
    layer = blocks[1].self_attn.q_proj
    own = layer.forward = lambda states: torch.nn.Linear.forward(layer, states)  # as hooks of accelerate do
    with pytest.raises(RuntimeError, match="within"), project_blocks(tiny_llama, (1, 4)):
        assert isinstance(get_blocks(tiny_llama)[1], ProjectedBlock)
        _, cache = read(tiny_llama)
        assert "update" not in vars(cache)
        raise RuntimeError("within")
    assert list(get_blocks(tiny_llama)) == blocks and layer.forward is own


@torch.no_grad()
def test_contexts_nest(tiny_llama):
    with project_blocks(tiny_llama, (1, 2)):
        with bypass_blocks(tiny_llama, (0, 1)):
            actual, cache = read(tiny_llama)
    assert cache.layers[1].keys is None and cache.layers[2].keys is not None
    with bypass_blocks(tiny_llama, (0, 1)), project_blocks(tiny_llama, (2,)):
        assert torch.equal(read(tiny_llama)[0], actual)


@torch.no_grad()
def test_without_a_cache_there_is_nothing_to_do(tiny_llama):
    ids = torch.arange(5, 12)[None]
    with project_blocks(tiny_llama, (2,)):
        projected = tiny_llama(ids, use_cache=False).logits
    with bypass_blocks(tiny_llama, (2,)):
        assert torch.equal(tiny_llama(ids, use_cache=False).logits, projected)


def test_only_what_makes_keys_and_values_learns(tiny_llama):
    model = get_peft_model(
        tiny_llama, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False), "prefill"
    )
    with project_blocks(model, (2,)):
        _, cache = read(model)
    (cache.layers[2].keys.square().mean() + cache.layers[2].values.square().mean()).backward()
    learned = {
        name.rpartition("_proj")[0].rpartition(".")[2]
        for name, parameter in adapter_parameters(get_blocks(model)[2], "prefill").items()
        if parameter.grad is not None
    }
    assert learned == {"k", "v"}


def test_what_cannot_be_projected_is_refused(tiny_model):
    # The norm behind the sum changes what passes by.
    model = tiny_model("opt", do_layer_norm_before=False)
    with pytest.raises(ValueError, match="block 1 of OPTForCausalLM cannot be projected"):
        check_projectable(model, (1,))
    with pytest.raises(ValueError, match="project_blocks: block 6 is not one of the 6 blocks"):
        with project_blocks(model, (6,)):
            pass
    # A block whose keys and values somebody else computes.
    shared = tiny_model("llama")
    shared.model.layers[3].self_attn.forward = lambda hidden_states, past_key_values=None, **_: (hidden_states, None)
    with torch.no_grad(), project_blocks(shared, (3,)), pytest.raises(ValueError, match="does not write into the KV"):
        read(shared)
