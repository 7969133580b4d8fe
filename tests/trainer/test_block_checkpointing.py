import pytest
import torch
from peft import LoraConfig, get_peft_model

from hf_pdprune.inference import DecodeStage, PrefillStage, disaggregated_forward
from hf_pdprune.plan import KVPlan, PruningPlan, StagePlan
from hf_pdprune.trainer.block_checkpointing import CheckpointedBlock, checkpointed_blocks


def stages_of(model, token_choice="first_last", projected=()):
    """A pair with random adapters, of which the parameters are the model's only trainable ones."""
    kv = KVPlan((0, 4), 2, 4, token_choice)
    plan = PruningPlan.empty(model, prefill=StagePlan((3,), (), projected), decode=StagePlan((2, 3)), kv=kv)
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(model, config, adapter_name="prefill")
    model.add_adapter("decode", config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return model, PrefillStage(model, plan, "prefill"), DecodeStage(model, plan, "decode")


def gradients(model, stages, batch, checkpointed):
    model.zero_grad()
    if checkpointed:
        with checkpointed_blocks(model):
            logits = disaggregated_forward(*stages, batch)
    else:
        logits = disaggregated_forward(*stages, batch)
    logits.log_softmax(-1)[..., 7].sum().backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("plan", [("first_last",), ("attention",), ("first_last", (1, 4))], ids=str)
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2", "falcon", "qwen3_moe"])
def test_gradients_are_those_without_it(tiny_model, batch, architecture, plan):
    model, *stages = stages_of(tiny_model(architecture), *plan)
    logits, expected = gradients(model, stages, batch, checkpointed=False)
    again, actual = gradients(model, stages, batch, checkpointed=True)
    torch.testing.assert_close(again, logits)
    assert actual.keys() == expected.keys() and len(expected) > 20
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], atol=1e-6, rtol=1e-4)


def test_blocks_are_restored_and_less_is_kept(tiny_llama, batch):
    model, *stages = stages_of(tiny_llama)
    blocks = list(tiny_llama.model.layers)

    def kept(checkpointed):
        sizes = []

        def pack(tensor):
            sizes.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            if checkpointed:
                with checkpointed_blocks(model):
                    assert all(isinstance(block, CheckpointedBlock) for block in tiny_llama.model.layers)
                    disaggregated_forward(*stages, batch)
            else:
                disaggregated_forward(*stages, batch)
        return sum(sizes)

    assert kept(True) < 0.2 * kept(False)
    assert list(tiny_llama.model.layers) == blocks


def test_nothing_is_kept_to_be_computed_again_without_gradients(tiny_llama, batch):
    model, *stages = stages_of(tiny_llama)
    with torch.no_grad(), checkpointed_blocks(model):
        assert not disaggregated_forward(*stages, batch).requires_grad
