from contextlib import ExitStack
from functools import partial

import pytest
import torch
from masked_reference import masked_blocks
from peft import LoraConfig, get_peft_model

from hf_pdprune.adapters import adapter_parameters
from hf_pdprune.blocks import bypass_blocks, get_blocks
from hf_pdprune.inference import DecodeStage, PrefillStage, dense_forward, disaggregated_forward
from hf_pdprune.inference.stage import position_ids
from hf_pdprune.kv import KVPayload
from hf_pdprune.plan import KVPlan, PruningPlan, StagePlan


def pruned_plan(model, token_choice="first_last"):
    return PruningPlan.empty(
        model,
        prefill=StagePlan((1,)),
        decode=StagePlan((1, 4), ((2, 3),)),
        kv=KVPlan((0, 2, 5), 2, 4, token_choice, ((2, 1, 6),)),
    )


def relaxed_plan(model):
    """Prefill skips blocks that decode keeps, a token-aware one among them."""
    return PruningPlan.empty(
        model, prefill=StagePlan((1,), (), (2, 3)), decode=StagePlan((1, 4)), kv=KVPlan((0, 2, 5), 2, 4)
    )


def forward(model, plan, batch, **stage_settings):
    prefill, decode = PrefillStage(model, plan, **stage_settings), DecodeStage(model, plan, **stage_settings)
    return disaggregated_forward(prefill, decode, batch)


def reference(model, plan, batch):
    """
    The same in one forward without a cache: blocks that only decode does without are skipped by the completion, and
    projected ones by the prompt.
    """
    prompt_tokens = batch["prompt_ids"].shape[1]
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)

    def skip(module, args, kwargs, output, in_prompt=False):
        before = args[0] if args else kwargs["hidden_states"]
        after = output[0] if isinstance(output, tuple) else output
        prompt, completion = (before, after) if in_prompt else (after, before)
        mixed = torch.cat([prompt[:, :prompt_tokens], completion[:, prompt_tokens:]], dim=1)
        return (mixed, *output[1:]) if isinstance(output, tuple) else mixed

    with ExitStack() as stack:
        for block in set(plan.decode.missing_blocks) - set(plan.prefill.missing_blocks):
            hook = get_blocks(model)[block].register_forward_hook(skip, with_kwargs=True)
            stack.callback(hook.remove)
        for block in plan.prefill.projected_blocks:
            hook = get_blocks(model)[block].register_forward_hook(partial(skip, in_prompt=True), with_kwargs=True)
            stack.callback(hook.remove)
        stack.enter_context(masked_blocks(model, plan, batch["prompt_ids"], batch["prompt_mask"]))
        stack.enter_context(bypass_blocks(model, plan.prefill.missing_blocks))
        logits = model(
            input_ids=torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
            attention_mask=mask,
            position_ids=position_ids(mask),
            use_cache=False,
        ).logits
    return logits[:, prompt_tokens - 1 : -1]


@torch.no_grad()
@pytest.mark.parametrize("make_plan", [pruned_plan, partial(pruned_plan, token_choice="attention"), relaxed_plan])
def test_logits_of_every_architecture(tiny_model, architecture, batch, make_plan):
    model = tiny_model(architecture, initializer_range=0.1)
    plan = make_plan(model)
    actual, real = forward(model, plan, batch), batch["completion_mask"].bool()
    expected = reference(model, plan, batch)
    torch.testing.assert_close(actual[real], expected[real], atol=1e-5, rtol=0)
    assert (expected - dense_forward(model, batch))[real].abs().max() > 1e-1


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("make_plan", [pruned_plan, partial(pruned_plan, token_choice="attention"), relaxed_plan])
def test_gradients_flow_through_the_hand_over(tiny_model, architecture, batch, make_plan):
    model = tiny_model(architecture, initializer_range=0.1)
    plan, real = make_plan(model), batch["completion_mask"].bool()
    weights = torch.randn(int(real.sum()), 256, generator=torch.Generator().manual_seed(0))
    gradients = []
    for logits in (forward(model, plan, batch), reference(model, plan, batch)):
        model.zero_grad()
        (logits[real].log_softmax(-1) * weights).mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-6, rtol=1e-3, msg=name)


def test_decode_teaches_prefill(tiny_llama, batch, adapted):
    # From the completion tokens after the first alone, which decode predicts.
    model = adapted(tiny_llama)
    plan = pruned_plan(tiny_llama)
    prefill, decode = PrefillStage(model, plan, "prefill"), DecodeStage(model, plan, "decode")
    disaggregated_forward(prefill, decode, batch)[:, 1:].square().mean().backward()
    kv_weights = [f"layers.{block}.self_attn.{kind}_proj" for block in (0, 2, 5) for kind in "kv"]
    for name, parameter in adapter_parameters(model, "prefill").items():
        if any(weight in name for weight in kv_weights):
            assert parameter.grad.abs().max() > 0, name
        if "layers.1." in name:
            assert parameter.grad is None
    assert any(p.grad is not None and p.grad.any() for p in adapter_parameters(model, "decode").values())


def test_each_stage_runs_with_its_own_adapter(tiny_llama, batch, adapted):
    model = adapted(tiny_llama)
    plan, real = pruned_plan(tiny_llama), batch["completion_mask"].bool()
    stages = PrefillStage(model, plan, "prefill"), DecodeStage(model, plan, "decode")
    with torch.no_grad():
        before = disaggregated_forward(*stages, batch)[real]
        for adapter in ("prefill", "decode"):
            parameter = next(iter(adapter_parameters(model, adapter).values()))
            parameter.mul_(3)
            assert (disaggregated_forward(*stages, batch)[real] - before).abs().max() > 1e-3
            parameter.div_(3)
        without = forward(model, plan, batch)[real]
        assert (without - before).abs().max() > 1e-3
        torch.testing.assert_close(without, forward(tiny_llama, plan, batch)[real])


@torch.no_grad()
def test_the_teacher_has_all_blocks_and_no_adapter(tiny_llama, batch):
    expected = dense_forward(tiny_llama, batch)
    model = get_peft_model(tiny_llama, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False), "decode")
    assert torch.equal(dense_forward(model.eval(), batch), expected)
    calls = []
    hook = model.register_forward_hook(lambda *args: calls.append(1))
    assert torch.equal(dense_forward(tiny_llama, batch, module=model), expected)
    hook.remove()
    assert calls == [1]


@torch.no_grad()
@pytest.mark.parametrize("token_choice", ["first_last", "attention"])
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2", "mixtral"])
def test_padding_changes_nothing(tiny_model, architecture, batch, token_choice):
    # Nor do the other rows: each by itself, without its padding, gives the same.
    model = tiny_model(architecture, initializer_range=0.1)
    plan = pruned_plan(model, token_choice)
    together, teacher = forward(model, plan, batch), dense_forward(model, batch)
    for row in range(4):
        alone = {}
        for part in ("prompt", "completion"):
            real = batch[f"{part}_mask"][row].bool()
            alone[f"{part}_ids"] = batch[f"{part}_ids"][row, real][None]
            alone[f"{part}_mask"] = batch[f"{part}_mask"][row, real][None]
        real = batch["completion_mask"][row].bool()
        torch.testing.assert_close(together[row, real], forward(model, plan, alone)[0], atol=2e-5, rtol=0)
        torch.testing.assert_close(teacher[row, real], dense_forward(model, alone)[0], atol=2e-5, rtol=0)


@torch.no_grad()
def test_what_padding_holds_does_not_matter(tiny_llama, batch):
    plan, real = pruned_plan(tiny_llama), batch["completion_mask"].bool()
    before = forward(tiny_llama, plan, batch)[real]
    for part in ("prompt", "completion"):
        batch[f"{part}_ids"][batch[f"{part}_mask"] == 0] = 77
    torch.testing.assert_close(forward(tiny_llama, plan, batch)[real], before, atol=1e-5, rtol=0)


@torch.no_grad()
def test_completions_of_one_token(tiny_llama, batch):
    plan = pruned_plan(tiny_llama)
    logits = forward(tiny_llama, plan, batch)
    one = batch | {name: batch[name][:, :1] for name in ("completion_ids", "completion_mask")}
    assert torch.equal(forward(tiny_llama, plan, one), logits[:, :1])


@torch.no_grad()
@pytest.mark.parametrize("token_choice", ["first_last", "attention"])
def test_exported_pair_and_wire(tiny_model, batch, exported, token_choice):
    model = tiny_model("llama")
    plan = pruned_plan(model, token_choice)
    views = forward(model, plan, batch)
    prefill = PrefillStage(exported(model, plan, "prefill"), plan)
    decode = DecodeStage(exported(model, plan, "decode"), plan)
    real = batch["completion_mask"].bool()
    torch.testing.assert_close(disaggregated_forward(prefill, decode, batch)[real], views[real])
    payload = prefill.forward(batch["prompt_ids"], batch["prompt_mask"])
    rest = decode.forward(
        KVPayload.from_bytes(payload.to_bytes()), batch["completion_ids"][:, :-1], batch["completion_mask"][:, :-1]
    )
    torch.testing.assert_close(rest[real[:, 1:]], views[:, 1:][real[:, 1:]])


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2", "qwen3_moe"])
@pytest.mark.parametrize("make_plan", [pruned_plan, partial(pruned_plan, token_choice="attention"), relaxed_plan])
def test_logits_on_an_accelerator_are_those_of_the_cpu(tiny_model, accelerator, architecture, batch, make_plan):
    model = tiny_model(architecture, initializer_range=0.1)
    plan, real = make_plan(model), batch["completion_mask"].bool()
    expected, dense = forward(model, plan, batch)[real], dense_forward(model, batch)[real]
    model, there = model.to(accelerator), {name: tensor.to(accelerator) for name, tensor in batch.items()}
    actual = forward(model, plan, there)
    assert actual.device == accelerator
    torch.testing.assert_close(actual.cpu()[real], expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(dense_forward(model, there).cpu()[real], dense, atol=1e-4, rtol=0)
    assert (expected - dense).abs().max() > 1e-1
