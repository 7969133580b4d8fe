import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from masked_reference import random_prompts
from peft import LoraConfig, get_peft_model
from tiny_configs import ARCHITECTURES, COMMON
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast


ROOT = Path(__file__).parents[1]

# Tiny models gain nothing from threads, and those of several test processes take each other's cores: up to 8x slower.
torch.set_num_threads(1)


@pytest.fixture(params=list(ARCHITECTURES))
def architecture(request):
    """Every architecture that `tiny_model` can build, one after the other."""
    return request.param


@pytest.fixture
def tiny_model():
    """
    Factory: `tiny_model("qwen3", num_hidden_layers=6, seed=0, **config_values)` gives a random float32 model in eval
    mode, the same for the same arguments.
    """

    def make(architecture, num_hidden_layers=6, seed=0, **config_values):
        values = COMMON | ARCHITECTURES[architecture] | {"num_hidden_layers": num_hidden_layers} | config_values
        config = AutoConfig.for_model(values.pop("model_type", architecture), **values)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        return model.eval()

    return make


@pytest.fixture
def tiny_llama(tiny_model):
    return tiny_model("llama")


@pytest.fixture
def accelerator():
    """The accelerator's device, which multiplies float32 in full (no TF32) as long as the test runs."""
    if not torch.accelerator.is_available():
        pytest.skip("this machine has no accelerator that torch can use")
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield torch.device(torch.accelerator.current_accelerator().type, torch.accelerator.current_device_index())
    torch.set_float32_matmul_precision(precision)


@pytest.fixture
def tiny_tokenizer():
    """Byte-level, lossless for any text, with ids below the tiny models' vocabulary size and a chat template."""
    specials = ["<|pad|>", "<|im_start|>", "<|im_end|>", "<|unk|>"]
    # No UTF-8 text contains these bytes: without them, all others and the special tokens fit into 256 ids.
    never = {chr(byte) for byte in (0xC0, 0xC1, *range(0xF5, 0x100))}
    letters = [letter for letter in sorted(pre_tokenizers.ByteLevel.alphabet()) if letter not in never]
    vocabulary = {token: number for number, token in enumerate(specials + letters)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<|unk|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<|unk|>",
        padding_side="left",
        model_max_length=512,
        chat_template=(
            "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
            "+ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
        ),
    )


@pytest.fixture
def load_recipe(monkeypatch):
    """Factory: `load_recipe("prune")` is recipes/prune.py as a module."""

    def load(name):
        spec = importlib.util.spec_from_file_location(f"{name}_recipe", ROOT / "recipes" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def smollm2():
    """Folder of SmolLM2-135M-Instruct as the recipe makes it, or the one that HF_PDPRUNE_SMOLLM2 names."""
    folder = os.environ.get("HF_PDPRUNE_SMOLLM2")
    if folder:
        if not (Path(folder) / "config.json").is_file():
            pytest.skip(f"HF_PDPRUNE_SMOLLM2: no model in {folder}")
        return Path(folder)
    script = ROOT / "recipes" / "smollm2-135m" / "get_model.py"
    try:
        # Less than the time limit of a test, so that a slow network skips the test and does not fail it.
        done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=240)
    except subprocess.TimeoutExpired:
        pytest.skip("SmolLM2-135M-Instruct could not be had within 240 s")
    if done.returncode != 0:
        pytest.skip(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "get_model.py failed")
    return Path(done.stdout.splitlines()[-1])


@pytest.fixture
def batch():
    """Prompts and completions of different lengths, as the disaggregated forward takes them."""
    prompt_ids, prompt_mask = random_prompts([16, 3, 9, 6])
    completion_ids, completion_mask = (tensor.flip(1) for tensor in random_prompts([8, 1, 5, 8], seed=1))
    return {
        "prompt_ids": prompt_ids,
        "prompt_mask": prompt_mask,
        "completion_ids": completion_ids,
        "completion_mask": completion_mask,
    }


@pytest.fixture
def adapted():
    """Factory: the model with an adapter of each stage, both of which do something and learn."""

    def make(model):
        generator = torch.Generator().manual_seed(0)
        model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"), "prefill").eval()
        model.add_adapter("decode", LoraConfig(r=2, target_modules="all-linear"))
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
                parameter.requires_grad_(True)
        return model

    return make
