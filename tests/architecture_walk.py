"""
Every causal LM class of the installed transformers, as a tiny random model: what becomes of it without some blocks.

    python tests/architecture_walk.py                 # writes docs/architectures.md
    python tests/architecture_walk.py llama gemma3    # looks at these alone, writes nothing
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from tqdm import tqdm
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hf_pdprune.blocks import bypass_blocks, remove_blocks


DOCUMENT = Path(__file__).parents[1] / "docs" / "architectures.md"
NUM_BLOCKS = 6
# First, last and middle block, and several.
CASES = ((0,), (5,), (2,), (1, 2, 4))
IDS = torch.randint(3, 256, (2, 12), generator=torch.Generator().manual_seed(0))
NEW_TOKENS = 3
TOLERANCE = 1e-4

# Values for whichever of these entries a config has.
SMALL = {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "is_decoder": True,
    # Large enough that a random model has clear preferences: with flat logits, errors would not show.
    "initializer_range": 0.2,
    "index_topk": 64,  # every token: with ties, a cached forward may choose others than one without
    "pad_token_id": 0,
    "tie_word_embeddings": False,
    "use_cache": True,
    "vocab_size": 256,
    "vocab_size_per_layer_input": 256,
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "word_embed_proj_dim"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "dim_ff", "dff"), 96),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), NUM_BLOCKS),
    **dict.fromkeys(("num_decoder_layers", "num_encoder_layers", "encoder_layers"), NUM_BLOCKS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_encoder_attention_heads", "num_decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_target_positions", "n_ctx"), 512),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "num_key_value_heads"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 48),
    **dict.fromkeys(("head_dim", "kv_lora_rank", "q_lora_rank", "o_lora_rank", "v_head_dim", "qk_nope_head_dim"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_head_dim", "global_head_dim", "index_head_dim"), 16),
    **dict.fromkeys(("hidden_size_per_layer_input", "mamba_d_head"), 16),
    **dict.fromkeys(("sliding_window", "rotary_dim", "mamba_d_state", "mamba_chunk_size"), 8),
    **dict.fromkeys(("mamba_n_heads", "state_size", "chunk_size"), 8),
    **dict.fromkeys(("n_group", "topk_group", "index_n_heads"), 2),
    **dict.fromkeys(("mamba_n_groups", "n_groups", "num_kv_shared_layers"), 1),
}
# What some architectures need besides, or instead.
_SLIDING, _FULL = "sliding_attention", "full_attention"
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
VALUES = {
    "cohere_compass_text": {"layer_types": [_SLIDING, _FULL] * 3, "rope_parameters": {_SLIDING: _ROPE, _FULL: _ROPE}},
    "gemma3n_text": {"layer_types": [_SLIDING, _FULL] * 3, "num_kv_shared_layers": 2},
    "gemma4_text": {"layer_types": [_SLIDING, _FULL] * 3, "num_kv_shared_layers": 2},
    "gemma4_unified_text": {"layer_types": [_SLIDING, _FULL] * 3},
    "gpt_neo": {"attention_types": [[["global", "local"], 3]]},
    "bamba": {"attn_layer_indices": [0, 3]},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "falcon_h1": {"mamba_d_ssm": 128},
    "dots1": {"n_shared_experts": 1, "first_k_dense_replace": 1},
    "xmod": {"default_language": "en_XX"},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 3},
    "zaya": {"num_experts_per_tok": 1},
    "lfm2_moe": {"layer_types": ["conv", _FULL] * 3},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 96, "moe_top_k": 2},
    },
    "longcat_flash": {
        "qk_head_dim": 32,
        "ffn_hidden_size": 96,
        "expert_ffn_hidden_size": 48,
        "zero_expert_num": 2,
    },
    "reformer": {"axial_pos_embds_dim": [16, 48], "axial_pos_shape": [16, 32], "feed_forward_size": 96},
    "qwen4_exp_text": {
        "layer_types": ["linear_attention", "indexed_attention"] * 3,
        "ple_layer_ids": [3],
        "ngram_vocab_size_base": 256,
        "hc_lowrank": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "indexer_head_dim"), 16),
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_budget": 64,
        "indexer_compress_ratio": 8,
    },
}


TOO_LARGE = frozenset({"blt", "moss_transcribe_diarize", "phi4_multimodal"})


@dataclass
class Finding:
    """
    What was seen of one architecture.

    Args:
        model_type (`str`): As in `config.model_type`.
        class_name (`str`): The model class.
        outcome (`str`): `"works"`, `"refused"` (with a reason, and nothing changed), `"absent"` (transformers cannot
            build or run it here), `"open"` (nobody has looked) or `"wrong"`, which must not be.
        detail (`str`): Reason, or what holds with restrictions.
    """

    model_type: str
    class_name: str
    outcome: str
    detail: str = ""


def tiny_model(model_type: str) -> PreTrainedModel:
    """A random float32 model of six blocks in eval mode, the same for the same type."""
    default = CONFIG_MAPPING[model_type]()
    part = next(
        (name for name, value in vars(default).items() if value is default.get_text_config(decoder=True)), None
    )
    text_config = default if part is None else getattr(default, part)
    known = text_config.to_dict().keys() | text_config.attribute_map.keys()
    values = {name: value for name, value in SMALL.items() if name in known}
    if model_type in TOO_LARGE:
        raise ValueError("not even a small one is small: its other parts have hundreds of millions of parameters")
    if "kv_lora_rank" in known:  # latent attention has as many key heads as query heads
        values["num_key_value_heads"] = 4
    values |= VALUES.get(model_type) or VALUES.get(f"{model_type}_text", {})
    config = AutoConfig.for_model(model_type, **(values if part is None else {part: values}))
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@torch.no_grad()
def logits_of(model: PreTrainedModel) -> torch.Tensor:
    return model(input_ids=IDS, attention_mask=torch.ones_like(IDS), use_cache=False).logits


def continuation(model: PreTrainedModel, use_cache: bool) -> torch.Tensor:
    return model.generate(
        IDS,
        attention_mask=torch.ones_like(IDS),
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        use_cache=use_cache,
    )


# Runs in a process of its own that never imports hf_pdprune.
RELOAD = f"""
import json, sys, torch
from pathlib import Path
from safetensors.torch import save_file
import transformers
from transformers import AutoConfig, AutoModelForCausalLM
torch.set_num_threads(1)
ids = torch.tensor(json.loads(sys.argv[2]))
for folder in sorted(Path(sys.argv[1]).iterdir()):
    try:
        config = AutoConfig.from_pretrained(folder)
        # Some composite models' text configs are not known to AutoModelForCausalLM, of the dense model neither.
        known = type(config) in AutoModelForCausalLM._model_mapping
        load = AutoModelForCausalLM if known else getattr(transformers, config.architectures[0])
        model = load.from_pretrained(folder).eval()
        mask = torch.ones_like(ids)
        with torch.no_grad():
            result = {{"logits": model(input_ids=ids, attention_mask=mask, use_cache=False).logits}}
        for cached in json.loads((folder / "generate.json").read_text()):
            result[f"tokens, cache {{cached}}"] = model.generate(
                ids, attention_mask=mask, max_new_tokens={NEW_TOKENS}, min_new_tokens={NEW_TOKENS},
                do_sample=False, use_cache=cached)
        save_file({{key: value.contiguous() for key, value in result.items()}}, folder / "result.bin")
    except Exception as error:
        (folder / "error.txt").write_text(f"{{type(error).__name__}}: {{error}}")
assert not any(name.startswith("hf_pdprune") for name in sys.modules)
"""


def walk(model_types: list[str], folder: Path) -> list[Finding]:
    """
    Looks at the architectures one after the other. Shortened models are saved to `folder`, and loaded again by one
    fresh process that does not know hf_pdprune.
    """
    findings, expected = {}, {}
    for model_type in tqdm(model_types, desc="architectures", unit="type"):
        finding, seen = look_at(model_type, folder)
        findings[model_type] = finding
        expected.update(seen)
    for name, wrong in compare_reloaded(folder, expected).items():
        model_type = name.split("@")[0]
        findings[model_type] = Finding(model_type, findings[model_type].class_name, "wrong", wrong)
    return list(findings.values())


def look_at(model_type: str, folder: Path) -> tuple[Finding, dict[str, dict[str, torch.Tensor]]]:
    """What can be seen in this process, and what each model that was saved to `folder` has to give."""
    try:
        model = tiny_model(model_type)
        dense = logits_of(model)
    except Exception as error:  # whatever transformers raises
        return Finding(model_type, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type], "absent", one_line(error)), {}
    dense_tokens = ways_to_generate(model)
    both = len(dense_tokens) == 2
    consistent = both and torch.equal(dense_tokens[True], dense_tokens[False])
    # A cache that changes what the dense model says has nothing to be compared with.
    generates = [False] if both and not consistent else list(dense_tokens)
    expected, refusals = {}, {}
    class_name = type(model).__name__
    for case in CASES:
        before = model.config.to_dict()
        try:
            with bypass_blocks(model, case):
                bypassed = {"logits": logits_of(model)}
                # Without a cache if that can be had: a bypassed block does not fill its slot.
                tokens = continuation(model, False not in generates) if generates else None
            bypassed |= {f"tokens, cache {cached}": tokens for cached in generates}
            shorter = remove_blocks(model, case)
        except ValueError as error:
            refusals[case] = one_line(error)
            continue
        finally:
            untouched = torch.equal(logits_of(model), dense) and model.config.to_dict() == before
        if not untouched:
            return Finding(model_type, class_name, "wrong", f"the dense model changed ({case})"), {}
        if (bypassed["logits"] - dense).abs().max() < TOLERANCE:
            return Finding(model_type, class_name, "wrong", f"bypassing {case} has no effect"), {}
        name = f"{model_type}@{'-'.join(map(str, case))}"
        shorter.save_pretrained(folder / name)
        (folder / name / "generate.json").write_text(json.dumps(generates))
        expected[name] = bypassed
    if not expected:
        return Finding(model_type, class_name, "refused", next(iter(refusals.values()))), {}
    details = [] if True in dense_tokens else ["the dense model does not generate with a cache either"]
    if both and not consistent:
        details.append("the dense model itself generates otherwise with a cache than without; compared without")
    if refusals:
        sets = " and ".join(str(list(case)) for case in refusals)
        details.append(f"refused for {sets} of six: {next(iter(refusals.values()))}")
    return Finding(model_type, class_name, "works", "; ".join(details)), expected


def ways_to_generate(model: PreTrainedModel) -> dict[bool, torch.Tensor]:
    """What the dense model generates with a cache and without, as far as it can."""
    tokens = {}
    for use_cache in (True, False):
        try:
            tokens[use_cache] = continuation(model, use_cache)
        except Exception:  # whatever transformers raises
            continue
    return tokens


def compare_reloaded(folder: Path, expected: dict[str, dict[str, torch.Tensor]]) -> dict[str, str]:
    """What is wrong with the models that a fresh process loads from `folder`, by name."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-W", "ignore", "-c", RELOAD, str(folder), json.dumps(IDS.tolist())]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"the fresh process failed:\n{done.stderr[-3000:]}")
    wrong = {}
    for name, tensors in expected.items():
        if (folder / name / "error.txt").exists():
            wrong[name] = one_line(f"{name}: {(folder / name / 'error.txt').read_text()}")
            continue
        actual = load_file(folder / name / "result.bin")
        for key, tensor in tensors.items():
            if key == "logits" and not torch.allclose(actual[key], tensor, atol=TOLERANCE):
                wrong[name] = f"{name}: logits differ by {(actual[key] - tensor).abs().max():.1e} when reloaded"
            elif key != "logits" and not torch.equal(actual[key], tensor):
                wrong[name] = f"{name}: generates other {key} when reloaded"
    return wrong


def one_line(error: Exception | str) -> str:
    return (" ".join(str(error).split()) or type(error).__name__).replace("|", "\\|")


def document(findings: list[Finding]) -> str:
    """The text of docs/architectures.md."""
    lines = [
        "# Architectures",
        "",
        "<!-- written by `make docs` (tests/architecture_walk.py); a slow test compares it with a fresh walk -->",
        "",
        f"Every causal language model class of transformers {transformers.__version__}, as a tiny random model of six "
        "blocks, without its",
        "first, last, a middle and several blocks: saved, loaded again in a fresh process without hf_pdprune, and "
        "compared with the dense",
        "model whose blocks are bypassed. Logits must agree, and what is generated with and without a cache. An "
        "architecture **works** where",
        "they do for every set that is not refused; it is **refused** where a reason is given instead. Nothing may be "
        "silently wrong.",
        "",
    ]
    titles = {
        "works": "Works",
        "refused": "Refused, with the reason",
        "absent": "Not looked at: transformers cannot build it here",
        "wrong": "Wrong",
        "open": "Not looked at yet: `make docs` does",
    }
    for outcome, title in titles.items():
        chosen = [finding for finding in findings if finding.outcome == outcome]
        if not chosen:
            continue
        lines += [f"## {title} ({len(chosen)})", "", "| model_type | class | |", "|---|---|---|"]
        lines += [f"| {f.model_type} | {f.class_name} | {f.detail} |" for f in chosen]
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def main(model_types: list[str]) -> int:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        findings = walk(model_types or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES), Path(folder))
    if model_types:
        print(document(findings))
    else:
        DOCUMENT.parent.mkdir(exist_ok=True)
        DOCUMENT.write_text(document(findings), encoding="utf-8")
        print(DOCUMENT)
    return int(any(finding.outcome == "wrong" for finding in findings))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
