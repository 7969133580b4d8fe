import copy

import pytest
import torch
from masked_reference import random_prompts
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from hf_pdprune.blocks import (
    BypassedBlock,
    blocks_path,
    bypass_blocks,
    get_blocks,
    get_decoder,
    num_blocks,
    remove_blocks,
    shortened_config,
)


SMALL = {"vocab_size": 256, "initializer_range": 0.2}
# Blocks of these return tuples.
TUPLES = {
    "falcon": {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4},
    "bloom": {"hidden_size": 64, "n_layer": 4, "n_head": 4},
    "gptj": {"n_embd": 64, "n_layer": 4, "n_head": 4, "rotary_dim": 8},
    "codegen": {"n_embd": 64, "n_layer": 4, "n_head": 4, "rotary_dim": 8},
    "gpt_neo": {"hidden_size": 64, "num_layers": 4, "num_heads": 4, "attention_types": [[["global"], 4]]},
    "openai-gpt": {"n_embd": 64, "n_layer": 4, "n_head": 4},  # a list, that is
}


@torch.no_grad()
def logits_of(model, lengths=(20, 20)):
    input_ids, mask = random_prompts(lengths)
    return model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits


class TestFinding:
    def test_every_architecture(self, tiny_model, architecture):
        model = tiny_model(architecture)
        assert num_blocks(model.config) == len(get_blocks(model)) == 6
        assert get_blocks(model) is model.get_submodule(blocks_path(model))
        assert get_blocks(model) in list(get_decoder(model).children())

    def test_under_an_adapter(self, tiny_llama):
        blocks = get_blocks(tiny_llama)
        model = get_peft_model(tiny_llama, LoraConfig(target_modules=["q_proj"]))
        assert get_blocks(model) is blocks
        assert blocks_path(model) == "base_model.model.model.layers"

    def test_other_lists_of_the_same_length(self, tiny_model):
        # As many experts as blocks: the outermost list is meant.
        model = tiny_model("llama", num_hidden_layers=4)
        model.model.layers[0].experts = torch.nn.ModuleList(torch.nn.Identity() for _ in range(4))
        assert blocks_path(model) == "model.layers"

    def test_a_model_without_a_list_of_blocks(self, tiny_llama):
        tiny_llama.config.num_hidden_layers = 5
        with pytest.raises(ValueError, match="LlamaForCausalLM has no list of 5 decoder blocks"):
            get_blocks(tiny_llama)


class TestBypass:
    def test_everything_is_restored(self, tiny_model, architecture):
        model = tiny_model(architecture)
        blocks, names = list(get_blocks(model)), [name for name, _ in model.named_modules()]
        dense = logits_of(model)
        with bypass_blocks(model, (0, 3)):
            assert [isinstance(block, BypassedBlock) for block in get_blocks(model)] == [
                number in (0, 3) for number in range(6)
            ]
            assert not torch.equal(logits_of(model), dense)
        assert all(a is b for a, b in zip(get_blocks(model), blocks, strict=True))
        assert [name for name, _ in model.named_modules()] == names
        assert torch.equal(logits_of(model), dense)

    @pytest.mark.parametrize("where", ["context", "forward"])
    def test_also_after_an_exception(self, tiny_llama, where):
        blocks = list(get_blocks(tiny_llama))
        with pytest.raises((KeyError, IndexError)), bypass_blocks(tiny_llama, (1, 2)):
            if where == "forward":
                tiny_llama(input_ids=torch.tensor([[1000]]))  # no such token
            raise KeyError
        assert all(a is b for a, b in zip(get_blocks(tiny_llama), blocks, strict=True))

    def test_contexts_nest(self, tiny_llama):
        with bypass_blocks(tiny_llama, (1, 3)):
            expected = logits_of(tiny_llama)
        with bypass_blocks(tiny_llama, (1,)):
            one = logits_of(tiny_llama)
            with bypass_blocks(tiny_llama, (3,)):
                assert torch.equal(logits_of(tiny_llama), expected)
                with bypass_blocks(tiny_llama, (1, 3)):  # again
                    assert torch.equal(logits_of(tiny_llama), expected)
            assert torch.equal(logits_of(tiny_llama), one)

    def test_all_blocks(self, tiny_llama):
        with bypass_blocks(tiny_llama, range(6)):
            actual = logits_of(tiny_llama)
        embeddings = tiny_llama.model.embed_tokens(random_prompts((20, 20))[0])
        assert torch.equal(actual, tiny_llama.lm_head(tiny_llama.model.norm(embeddings)))

    @pytest.mark.parametrize("architecture", TUPLES)
    def test_blocks_that_return_tuples(self, architecture):
        values = SMALL | TUPLES[architecture]
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **values)).eval()
        block = get_blocks(model)[2]
        outputs = []
        handle = block.register_forward_hook(lambda module, args, output: outputs.append(output))
        dense = logits_of(model)
        handle.remove()
        assert isinstance(outputs[0], (tuple, list))
        # A block that adds nothing: what bypassing it must equal.
        handle = block.register_forward_hook(lambda module, args, output: (args[0], *output[1:]))
        expected = logits_of(model)
        handle.remove()
        with bypass_blocks(model, (2,)):
            assert torch.equal(logits_of(model), expected)
        assert torch.equal(logits_of(model), dense)

    @pytest.mark.parametrize(
        ("blocks", "message"),
        [
            ((6,), "block 6 is not one of the 6 blocks 0 to 5"),
            ((-1,), "block -1 is not"),
            ((0, 2, 2), "block 2 is named twice"),
            ((True,), "block True is not"),
            (("1",), "block '1' is not"),
            ((1.0,), "block 1.0 is not"),
        ],
    )
    def test_wrong_numbers(self, tiny_llama, blocks, message):
        before = list(get_blocks(tiny_llama))
        with pytest.raises(ValueError, match=message), bypass_blocks(tiny_llama, blocks):
            pytest.fail("the context was entered")
        with pytest.raises(ValueError, match=message):
            remove_blocks(tiny_llama, blocks)
        assert all(a is b for a, b in zip(get_blocks(tiny_llama), before, strict=True))

    def test_no_hook_of_a_bypassed_block_runs(self, tiny_llama):
        # FSDP and ZeRO-3 gather a block's parameters in such hooks.
        def fail(*args):
            raise AssertionError("the block was called")

        with bypass_blocks(tiny_llama, (2,)):  # the first time, one token goes through all blocks
            pass
        get_blocks(tiny_llama)[2].register_forward_pre_hook(fail)
        with bypass_blocks(tiny_llama, (2,)):
            logits_of(tiny_llama)
            assert "model.layers.2.mlp.up_proj.weight" not in tiny_llama.state_dict()

    def test_random_numbers_of_a_training_stay_the_same(self, tiny_model):
        # Whether this is the first bypass of a process or not: a resumed training must drop out the same units.
        def draws(model):
            torch.manual_seed(0)
            with bypass_blocks(model, (2,)):
                return logits_of(model)

        model = tiny_model("gpt2").train()
        first = draws(model)
        assert torch.equal(draws(model), first)
        assert not torch.equal(logits_of(model), logits_of(model))

    def test_generation_with_a_cache(self, tiny_llama):
        input_ids, mask = random_prompts([8, 3])
        settings = {"input_ids": input_ids, "attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
        with bypass_blocks(tiny_llama, (1, 4)):
            assert torch.equal(tiny_llama.generate(**settings), tiny_llama.generate(use_cache=False, **settings))


class TestRemoval:
    def test_parameters_are_shared_and_the_dense_model_is_untouched(self, tiny_model, architecture):
        model = tiny_model(architecture)
        config = copy.deepcopy(model.config.to_dict())
        dense, parameters = logits_of(model), dict(model.named_parameters())
        shorter = remove_blocks(model, (1, 4))
        own = {id(parameter) for parameter in model.parameters()}
        assert all(id(parameter) in own for parameter in shorter.parameters())
        kept = get_blocks(shorter)
        for index, number in enumerate((0, 2, 3, 5)):
            expected = list(get_blocks(model)[number].parameters())
            assert all(a is b for a, b in zip(kept[index].parameters(), expected, strict=True))
        assert model.config.to_dict() == config
        assert {name: id(p) for name, p in model.named_parameters()} == {n: id(p) for n, p in parameters.items()}
        assert torch.equal(logits_of(model), dense)
        with torch.no_grad():
            next(kept[1].parameters()).zero_()
        assert not torch.equal(logits_of(model), dense)

    def test_class_settings_and_mode(self, tiny_llama):
        tiny_llama.generation_config.max_new_tokens = 7
        tiny_llama.set_attn_implementation("eager")
        tiny_llama.train()
        shorter = remove_blocks(tiny_llama, (1,))
        assert type(shorter) is type(tiny_llama)
        assert not shorter.training
        assert tiny_llama.training
        assert shorter.generation_config.max_new_tokens == 7
        assert shorter.config._attn_implementation == "eager"
        assert num_blocks(shorter.config) == 5
        assert [block.self_attn.layer_idx for block in get_blocks(shorter)] == list(range(5))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_dtype(self, tiny_llama, dtype):
        shorter = remove_blocks(tiny_llama.to(dtype), (1,))
        assert shorter.dtype == dtype
        assert {parameter.dtype for parameter in shorter.parameters()} == {dtype}

    def test_tied_weights_stay_tied(self, tiny_model):
        shorter = remove_blocks(tiny_model("gemma2"), (1,))
        assert shorter.lm_head.weight is shorter.get_input_embeddings().weight

    def test_other_weights(self, tiny_model):
        model, other = tiny_model("llama"), tiny_model("llama", seed=1)
        expected = logits_of(remove_blocks(other, (1,)))
        assert torch.equal(logits_of(remove_blocks(model, (1,), other.state_dict())), expected)

    def test_one_block_has_to_stay(self, tiny_llama):
        assert num_blocks(remove_blocks(tiny_llama, range(5)).config) == 1
        with pytest.raises(ValueError, match="all 6 blocks would be removed"):
            remove_blocks(tiny_llama, range(6))

    def test_twice(self, tiny_llama):
        expected = logits_of(remove_blocks(tiny_llama, (1, 4)))
        assert torch.equal(logits_of(remove_blocks(remove_blocks(tiny_llama, (1,)), (3,))), expected)


class TestSettingsPerBlock:
    """What an architecture derives from a block's number is right in the shorter model, or removal is refused."""

    @pytest.mark.parametrize(
        ("architecture", "values"),
        [
            ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3}),
            ("gemma2", {}),
            ("gemma3_text", {}),
            ("smollm3", {"no_rope_layer_interval": 2}),
            ("smollm3", {"no_rope_layers": [1, 0, 0, 1, 1, 0]}),
            ("qwen3_moe", {"mlp_only_layers": [0, 1]}),  # in front of what is removed
            ("qwen3_moe", {"mlp_only_layers": [3]}),
            ("qwen3_moe", {"mlp_only_layers": [0, 1, 2, 3, 4, 5]}),
            ("qwen3_moe", {"decoder_sparse_step": 2}),
        ],
    )
    @pytest.mark.parametrize("blocks", [(2,), (2, 3), (5,)])
    def test_right(self, tiny_model, architecture, values, blocks, tmp_path):
        model = tiny_model(architecture, **values)
        with bypass_blocks(model, blocks):
            expected = logits_of(model)
        shorter = remove_blocks(model, blocks)
        assert torch.equal(logits_of(shorter), expected)
        shorter.save_pretrained(tmp_path)
        implementation = model.config._attn_implementation
        reloaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=implementation)
        assert torch.equal(logits_of(reloaded), expected)

    @pytest.mark.parametrize(
        ("architecture", "values", "reason"),
        [
            ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "block 3 would change when it becomes block 2"),
        ],
    )
    def test_refused(self, tiny_model, architecture, values, reason):
        model = tiny_model(architecture, **values)
        dense = logits_of(model)
        with pytest.raises(ValueError, match=reason):
            remove_blocks(model, (2,))
        assert torch.equal(logits_of(model), dense)

    def test_lists_with_an_entry_per_block(self):
        config = AutoConfig.for_model("smollm3", num_hidden_layers=4, no_rope_layers=[1, 0, 1, 1])
        config.layer_types = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
        before = copy.deepcopy(config.to_dict())
        shorter = shortened_config(config, (0, 3))
        assert shorter.num_hidden_layers == 2
        assert shorter.no_rope_layers == [1, 1]
        assert shorter.layer_types == ["full_attention", "sliding_attention"]
        assert config.to_dict() == before

    def test_lists_that_only_happen_to_be_as_long(self):
        config = AutoConfig.for_model("llama", num_hidden_layers=3)
        config.eos_token_id = [1, 2, 3]
        assert shortened_config(config, (0, 2)).eos_token_id == [1, 2, 3]


def test_blocks_are_found_again_where_a_model_was_changed(tiny_llama):
    blocks = tiny_llama.model.layers
    assert get_blocks(tiny_llama) is blocks
    tiny_llama.decoder, tiny_llama.model.layers = torch.nn.Module(), None
    tiny_llama.decoder.blocks = blocks
    assert blocks_path(tiny_llama) == "decoder.blocks" and get_blocks(tiny_llama) is blocks
    tiny_llama.config.num_hidden_layers += 1
    with pytest.raises(ValueError, match="has no list of 7 decoder blocks"):
        blocks_path(tiny_llama)
