import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from hf_pdprune.adapters import active_adapter
from hf_pdprune.blocks import bypass_blocks
from hf_pdprune.hub import build_stage, export_stage, export_stages, load_stages
from hf_pdprune.hub import folder_swap as folder_swap_module
from hf_pdprune.inference import DecodeStage, PrefillStage
from hf_pdprune.plan import KVPlan, PruningPlan, StagePlan


EXPORTED = ["llama", "qwen3", "gemma2", "gemma3_text", "smollm3", "gpt2", "opt", "gpt_neox"]
IDS = torch.randint(3, 256, (2, 24), generator=torch.Generator().manual_seed(1))


def plan_of(model, prefill=(2,), decode=(2, 4), **kv):
    return PruningPlan.empty(model, "tiny", prefill=StagePlan(prefill), decode=StagePlan(decode), kv=KVPlan(**kv))


def with_adapters(model, seed=0):
    """Two adapters, "prefill" and "decode", whose effect is large."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, config, adapter_name="prefill")
    model.add_adapter("decode", config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def greedy(model, **kwargs):
    return model.generate(
        IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=8, do_sample=False, eos_token_id=None, **kwargs
    )


@pytest.mark.invariant
@pytest.mark.parametrize("removed", [(0,), (3,), (5,), (0, 2, 3, 5)], ids=str)
@pytest.mark.parametrize("name", EXPORTED)
@torch.no_grad()
def test_exported_and_reloaded_equals_bypassed(tiny_model, name, removed, tmp_path):
    model = tiny_model(name)
    export_stage(model, plan_of(model, (), removed), "decode", tmp_path / "decode")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "decode")
    assert type(reloaded) is type(model) and reloaded.config.num_hidden_layers == 6 - len(removed)
    with bypass_blocks(model, removed):
        expected = model(IDS, use_cache=False).logits
    torch.testing.assert_close(reloaded(IDS, use_cache=False).logits, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(
        reloaded(IDS, past_key_values=DynamicCache(config=reloaded.config)).logits, expected, atol=1e-5, rtol=0
    )
    assert torch.equal(greedy(reloaded, use_cache=True), greedy(reloaded, use_cache=False))


@pytest.mark.invariant
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2", "opt", "gpt_neox", "mixtral", "qwen3_moe"])
@torch.no_grad()
def test_merged_adapter_equals_applied_adapter(tiny_model, name, tmp_path):
    # In float64, since a merged weight is rounded otherwise than an applied one; experts have no such products.
    dtype, atol = (torch.float32, 5e-3) if name in ("mixtral", "qwen3_moe") else (torch.float64, 1e-9)
    model = with_adapters(tiny_model(name).to(dtype))
    plan = plan_of(model.get_base_model())
    dense_before = {key: value.clone() for key, value in model.state_dict().items()}
    export_stages(model, plan, tmp_path, {"prefill": "prefill", "decode": "decode"})
    for stage, removed in (("prefill", (2,)), ("decode", (2, 4))):
        reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / stage, dtype=dtype)
        with bypass_blocks(model, removed), active_adapter(model, stage):
            expected = model(input_ids=IDS, use_cache=False).logits
        with bypass_blocks(model, removed), active_adapter(model, None):
            dense = model(input_ids=IDS, use_cache=False).logits
        assert (expected - dense).abs().max() > 0.1
        torch.testing.assert_close(reloaded(IDS, use_cache=False).logits, expected, atol=atol, rtol=0)
        assert not [key for key in reloaded.state_dict() if "lora" in key or "base_layer" in key]
        assert not (tmp_path / stage / "adapter_config.json").exists()
    assert all(torch.equal(value, dense_before[key]) for key, value in model.state_dict().items())


@torch.no_grad()
def test_pair_generates_what_views_of_the_dense_model_generate(tiny_model, tmp_path):
    model = with_adapters(tiny_model("llama"))
    plan = plan_of(model.get_base_model(), token_aware_blocks=(0, 3), first_tokens=2, last_tokens=4)
    export_stages(model, plan, tmp_path, {"prefill": "prefill", "decode": "decode"})
    generated = []
    views = PrefillStage(model, plan, "prefill"), DecodeStage(model, plan, "decode")
    for prefill, decode in (views, load_stages(tmp_path)):
        payload = prefill(IDS, torch.ones_like(IDS), do_sample=False)
        generated.append(decode.generate(payload, max_new_tokens=8, do_sample=False))
    assert torch.equal(*generated)


def test_fresh_process_without_hf_pdprune_generates_the_same(tiny_model, tiny_tokenizer, tmp_path):
    model = tiny_model("gemma2")
    export_stages(model, plan_of(model), tmp_path, tokenizer=tiny_tokenizer)
    script = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
assert not any(name.startswith("hf_pdprune") for name in sys.modules)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
inputs = tokenizer("How are you?", return_tensors="pt")
print(json.dumps(model.generate(**inputs, max_new_tokens=8, do_sample=False)[0].tolist()))
"""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    for stage, removed in (("prefill", (2,)), ("decode", (2, 4))):
        command = [sys.executable, "-c", script, str(tmp_path / stage)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=True)
        inputs = tiny_tokenizer("How are you?", return_tensors="pt")
        with bypass_blocks(model, removed):
            expected = model.generate(**inputs, max_new_tokens=8, do_sample=False, use_cache=False)
        assert json.loads(done.stdout.splitlines()[-1]) == expected[0].tolist()


@torch.no_grad()
def test_one_model_for_both_stages(tiny_model, tiny_tokenizer, tmp_path):
    model = with_adapters(tiny_model("llama"))
    plan = plan_of(model.get_base_model(), (2, 4), (2, 4), token_aware_blocks=(0, 3), first_tokens=2, last_tokens=4)
    export_stages(model, plan, tmp_path, {"unified": "decode"}, tiny_tokenizer, layout=("unified",))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pruning_plan.json", "unified"]
    prefill, decode = load_stages(tmp_path)
    assert prefill.model is decode.model and prefill.model.config.pdprune["stage"] == "unified"
    with bypass_blocks(model, (2, 4)), active_adapter(model, "decode"):
        expected = model(input_ids=IDS, use_cache=False).logits
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "unified")
    torch.testing.assert_close(reloaded(IDS, use_cache=False).logits, expected, atol=1e-3, rtol=1e-5)
    generated = []
    for stages in ((prefill, decode), (PrefillStage(model, plan, "decode"), DecodeStage(model, plan, "decode"))):
        payload = stages[0](IDS, torch.ones_like(IDS), do_sample=False)
        generated.append(stages[1].generate(payload, max_new_tokens=8, do_sample=False))
    assert torch.equal(*generated)


def test_one_model_needs_the_same_blocks_in_both_stages(tiny_llama, tmp_path):
    with pytest.raises(ValueError, match="a unified model needs a plan in which prefill and decode miss the same"):
        export_stages(tiny_llama, plan_of(tiny_llama), tmp_path, layout=("unified",))
    with pytest.raises(ValueError, match="layout must be one of"):
        export_stages(tiny_llama, plan_of(tiny_llama), tmp_path, layout=("prefill", "unified"))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_holds_one_pair(tiny_llama, tmp_path):
    plan = plan_of(tiny_llama, (2,), (2,))
    for layout in (("prefill", "decode"), ("unified",), ("prefill", "decode"), ("unified",)):
        export_stages(tiny_llama, plan, tmp_path, layout=layout)
        assert {path.name for path in tmp_path.iterdir()} == {*layout, "pruning_plan.json"}
        load_stages(tmp_path)
    other = plan_of(tiny_llama, (3,), (3,))
    with pytest.raises(ValueError, match="holds another plan"):
        export_stages(tiny_llama, other, tmp_path)
    export_stages(tiny_llama, other, tmp_path, overwrite=True)
    assert not (tmp_path / "unified").exists() and load_stages(tmp_path)[0].plan == other
    shutil.copytree(tmp_path / "prefill", tmp_path / "unified")
    with pytest.raises(ValueError, match="prefill and unified are both for the prefill stage"):
        load_stages(tmp_path)


def test_folders_hold_all_that_a_checkpoint_needs(tiny_llama, tiny_tokenizer, tmp_path):
    plan = plan_of(tiny_llama)
    tiny_llama.generation_config.temperature = 0.7
    tiny_llama.generation_config.do_sample = True
    export_stages(tiny_llama, plan, tmp_path, tokenizer=tiny_tokenizer)
    assert PruningPlan.from_pretrained(tmp_path) == plan
    assert sorted(path.name for path in tmp_path.iterdir()) == ["decode", "prefill", "pruning_plan.json"]
    for stage in ("prefill", "decode"):
        names = {path.name for path in (tmp_path / stage).iterdir()}
        assert {"config.json", "model.safetensors", "generation_config.json", "tokenizer.json", "README.md"} <= names
        assert not any(name.endswith((".bin", ".pt", ".py", ".partial")) for name in names)
        config = json.loads((tmp_path / stage / "config.json").read_text())
        assert config["pdprune"]["stage"] == stage and "auto_map" not in config
        assert json.loads((tmp_path / stage / "generation_config.json").read_text())["temperature"] == 0.7
        assert AutoTokenizer.from_pretrained(tmp_path / stage).chat_template == tiny_tokenizer.chat_template


def test_export_copies_no_weights_and_leaves_the_model_as_it_was(tiny_llama):
    before = tiny_llama.config.to_dict()
    stage = build_stage(tiny_llama, plan_of(tiny_llama), "decode")
    assert (
        stage.model.layers[-1].mlp.up_proj.weight.data_ptr()
        == tiny_llama.model.layers[5].mlp.up_proj.weight.data_ptr()
    )
    assert tiny_llama.config.to_dict() == before and len(tiny_llama.model.layers) == 6


def test_model_loaded_from_a_quantised_file_is_exported(tiny_llama, tmp_path):
    # What from_pretrained(gguf_file=...) leaves on a model whose weights it has dequantised.
    tiny_llama.hf_quantizer = object()
    tiny_llama.is_quantized = True
    tiny_llama.config.quantization_config = {"quant_method": "gguf"}
    export_stages(tiny_llama, plan_of(tiny_llama), tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "decode" / "config.json").read_text())
    assert tiny_llama.config.quantization_config == {"quant_method": "gguf"}
    load_stages(tmp_path)


def test_offloaded_weights_are_named(tiny_llama, tmp_path):
    model = cpu_offload(tiny_llama, execution_device="cpu")
    with pytest.raises(ValueError, match=r"weight \S+ is offloaded: load the model into memory"):
        export_stages(model, plan_of(model), tmp_path)
    assert not list(tmp_path.iterdir())


def test_adapter_on_one_of_two_tied_weights_is_refused(tiny_model):
    model = tiny_model("llama", tie_word_embeddings=True)
    config = LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)
    model = get_peft_model(model, config, adapter_name="decode")
    with pytest.raises(ValueError, match="tied weights"):
        build_stage(model, plan_of(model.get_base_model()), "decode", "decode")


def test_unknown_adapter_is_named(tiny_llama, tmp_path):
    with pytest.raises(ValueError, match="no adapter 'x'"):
        export_stages(tiny_llama, plan_of(tiny_llama), tmp_path, {"decode": "x"})
    with pytest.raises(ValueError, match="unknown stage 'decod'"):
        export_stages(tiny_llama, plan_of(tiny_llama), tmp_path, {"decod": "x"})
    assert list(tmp_path.iterdir()) == []


# Another plan, or something else, in the folder


def test_folder_with_another_plan_is_refused_unless_overwritten(tiny_llama, tmp_path):
    first, second = plan_of(tiny_llama), plan_of(tiny_llama, (1,), (1, 3))
    export_stages(tiny_llama, first, tmp_path)
    with pytest.raises(ValueError, match=rf"{first.digest[:8]}.*{second.digest[:8]}"):
        export_stages(tiny_llama, second, tmp_path)
    assert load_stages(tmp_path)[0].plan == first
    export_stages(tiny_llama, second, tmp_path, overwrite=True)
    assert load_stages(tmp_path)[0].plan == second


def test_files_that_are_no_stage_checkpoint_are_not_replaced(tiny_llama, tmp_path):
    (tmp_path / "prefill").mkdir()
    (tmp_path / "prefill" / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="not a stage checkpoint"):
        export_stages(tiny_llama, plan_of(tiny_llama), tmp_path, overwrite=True)
    assert (tmp_path / "prefill" / "thesis.tex").read_text() == "years of work"


# Interrupted, or out of disk


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def stage_contents(folder):
    return [contents(folder / stage) for stage in ("prefill", "decode")]


# 1 to 9 write the files of both stages; 10 to 13 put prefill aside, the new one in its place, and the same for decode
@pytest.mark.parametrize("failing_call", range(1, 14))
def test_exception_in_a_renaming_leaves_the_old_pair(tiny_llama, tmp_path, monkeypatch, failing_call):
    plan = plan_of(tiny_llama)
    export_stages(tiny_llama, plan, tmp_path)
    before = stage_contents(tmp_path)
    other = with_adapters(tiny_llama)
    calls = []

    def replace(source, target):
        calls.append(source)
        if len(calls) == failing_call:
            raise KeyboardInterrupt
        return real_replace(source, target)

    real_replace = os.replace
    monkeypatch.setattr(folder_swap_module.os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        export_stages(other, plan, tmp_path, {"prefill": "prefill", "decode": "decode"})
    monkeypatch.undo()
    assert stage_contents(tmp_path) == before
    load_stages(tmp_path)
    export_stages(other, plan, tmp_path, {"prefill": "prefill", "decode": "decode"})
    load_stages(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"decode", "prefill", "pruning_plan.json"}


@pytest.mark.parametrize("stage", ["prefill", "decode"])
def test_exception_while_writing_leaves_the_old_pair(tiny_llama, tiny_tokenizer, tmp_path, monkeypatch, stage):
    plan = plan_of(tiny_llama)
    export_stages(tiny_llama, plan, tmp_path)
    before = contents(tmp_path)

    def save_pretrained(folder, *args, **kwargs):
        if stage in str(folder):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(tiny_tokenizer, "save_pretrained", save_pretrained)
    with pytest.raises(OSError, match=rf"{stage} cannot be written: No space left on device") as error:
        export_stages(with_adapters(tiny_llama), plan, tmp_path, {"decode": "decode"}, tokenizer=tiny_tokenizer)
    assert "\n" not in str(error.value)
    assert contents(tmp_path) == before


@pytest.mark.skipif(os.name != "posix", reason="file size limits are POSIX")
def test_write_error_of_safetensors_is_an_oserror_that_names_the_folder(tiny_llama, tmp_path):
    import resource
    import signal

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # the weights take more
    try:
        with pytest.raises(OSError, match="prefill cannot be written") as error:
            export_stages(tiny_llama, plan_of(tiny_llama), tmp_path / "pair")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, previous)
    assert "\n" not in str(error.value)
    assert list((tmp_path / "pair").iterdir()) == []


def test_killed_export_leaves_a_pair_or_an_error(tiny_llama, tmp_path):
    tiny_llama.save_pretrained(tmp_path / "dense")
    plan = plan_of(tiny_llama)
    plan.save_pretrained(tmp_path / "plan")
    script = """
import os, sys
from transformers import AutoModelForCausalLM
from hf_pdprune.hub import export_stages, folder_swap
from hf_pdprune.plan import PruningPlan
folder, fatal = sys.argv[1], int(sys.argv[2])
model = AutoModelForCausalLM.from_pretrained(folder + "/dense")
plan = PruningPlan.from_pretrained(folder + "/plan")
replace, calls = os.replace, []
def killing(source, target):
    calls.append(source)
    if len(calls) == fatal:
        os._exit(9)
    replace(source, target)
export_stages(model, plan, folder + "/pair")
folder_swap.os.replace = killing
for parameter in model.parameters():
    parameter.data.mul_(1.01)
export_stages(model, plan, folder + "/pair")
"""
    outcomes = []
    for fatal in (10, 11, 12):  # before the first renaming, after it, after the second
        shutil.rmtree(tmp_path / "pair", ignore_errors=True)
        done = subprocess.run([sys.executable, "-c", script, str(tmp_path), str(fatal)], capture_output=True)
        assert done.returncode == 9, done.stderr.decode()[-2000:]
        try:
            prefill, decode = load_stages(tmp_path / "pair")
            outcomes.append("pair")
            assert prefill.fingerprint == decode.fingerprint
        except (ValueError, FileNotFoundError):
            outcomes.append("error")
        export_stages(tiny_llama, plan, tmp_path / "pair")
        assert {path.name for path in (tmp_path / "pair").iterdir()} == {"decode", "prefill", "pruning_plan.json"}
        load_stages(tmp_path / "pair")
    # Between the first and the last renaming there is no whole pair: never one that is loaded and wrong.
    assert outcomes == ["pair", "error", "error"]


def test_stage_checkpoint_cannot_be_exported_again(tiny_llama, tmp_path):
    plan = plan_of(tiny_llama)
    stage = build_stage(tiny_llama, plan, "decode")
    with pytest.raises(ValueError, match="decode stage already"):
        build_stage(stage, plan, "decode")
