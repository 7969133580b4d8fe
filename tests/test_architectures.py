import pytest
import torch
import transformers
from architecture_walk import DOCUMENT, continuation, document, look_at, tiny_model, walk
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hf_pdprune.blocks import bypass_blocks, remove_blocks


MAINSTREAM = (
    "llama mistral mixtral qwen2 qwen2_moe qwen3 qwen3_moe gemma gemma2 gemma3_text phi phi3 olmo2 granite smollm3 "
    "gpt2 opt gpt_neox falcon stablelm cohere starcoder2 deepseek_v3 gpt_oss glm4 ernie4_5_moe"
).split()


@pytest.fixture(autouse=True)
def random_numbers_as_before():
    with torch.random.fork_rng(devices=[]):
        yield


def test_mainstream_works(tmp_path):
    """Saved, reloaded in a fresh process, compared: see architecture_walk.py."""
    findings = {finding.model_type: finding for finding in walk(MAINSTREAM, tmp_path)}
    assert {name: finding.detail for name, finding in findings.items()} == dict.fromkeys(MAINSTREAM, "")
    assert {finding.outcome for finding in findings.values()} == {"works"}


@pytest.mark.parametrize("model_type", ["diffllama", "minicpm3"])
def test_refused_with_a_reason(model_type, tmp_path):
    finding, saved = look_at(model_type, tmp_path)
    assert "this architecture derives it from the block's number" in finding.detail and len(saved) <= 1


def test_weights_of_blocks_in_several_lists():
    with pytest.raises(ValueError, match="XLMWithLMHeadModel has weights of its blocks outside of"):
        remove_blocks(tiny_model("xlm"), (2,))


def test_blocks_that_return_more_than_hidden_states():
    with pytest.raises(ValueError, match="ReformerModelWithLMHead cannot be bypassed: they return ReformerOutput"):
        with bypass_blocks(tiny_model("reformer"), (2,)):
            pass


@pytest.mark.parametrize("model_type", ["xlnet", "zaya"])
def test_what_blocks_hand_on_beside_hidden_states(model_type):
    """What a bypassed block is given, and does not change, reaches the next block, as if it were removed."""
    model = tiny_model(model_type)
    shorter = remove_blocks(model, (1, 2, 4))
    with bypass_blocks(model, (1, 2, 4)):
        assert torch.equal(continuation(model, False), continuation(shorter, False))


def test_kv_entries_that_other_blocks_reuse():
    model = tiny_model("gemma3n_text")  # the last two reuse those of blocks 2 and 3
    for act in (lambda: remove_blocks(model, (2,)), lambda: bypass_blocks(model, (2,)).__enter__()):
        with pytest.raises(ValueError, match="block 2 cannot be removed: block 4 reuses the KV entries"):
            act()
    assert len(remove_blocks(model, (1,)).model.layers) == 5


def test_document_lists_every_architecture():
    text = DOCUMENT.read_text(encoding="utf-8")
    assert transformers.__version__ in text and "## Wrong" not in text
    listed = {line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")}
    assert listed - {"model_type"} == set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    works = text.partition("## Works")[2].partition("\n## ")[0]
    looked_at = text.partition("## Not looked at yet")[0]
    assert all(f"| {name} |" in works for name in MAINSTREAM if f"| {name} |" in looked_at)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_document_is_true(tmp_path):
    findings = walk(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES), tmp_path)
    assert DOCUMENT.read_text(encoding="utf-8") == document(findings)
