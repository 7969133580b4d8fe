# ruff: noqa: T201
"""
What a decode step costs on a TokenAwareCache, against transformers' DynamicCache: medians of the ratios of steps in
turns. `equal`: nothing is dropped; `cut`: all blocks but the first are token-aware (16 + 112). Random weights, and
caches that are filled without a prefill: only lengths matter.

    python dev/decode_step.py --prompt_tokens 1024 8192 32768 [--padded] [--dtype bfloat16]
"""

import argparse
import statistics
import time

import torch
from accelerate import PartialState
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from hf_pdprune.evaluation.benchmark import synchronize
from hf_pdprune.kv import KVPayload, TokenAwareCache
from hf_pdprune.plan import KVPlan, PruningPlan


# Blocks of real head shapes.
SHAPE = {
    "vocab_size": 4096,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 65536,
}


def filled_caches(model, plan, mask):
    """A DynamicCache and what the plan keeps of the same random entries."""
    rows, tokens = mask.shape
    size = (rows, SHAPE["num_key_value_heads"], tokens, SHAPE["hidden_size"] // SHAPE["num_attention_heads"])
    entries = [
        tuple(torch.randn(size, device=model.device, dtype=model.dtype) for _ in "kv") for _ in model.model.layers
    ]
    dense = DynamicCache(config=model.config)
    for block, states in enumerate(entries):
        dense.update(*states, block)
    ours = TokenAwareCache(plan, model, prompt_tokens=tokens)
    ours.complete_prompt(mask)
    windows = {index: ours.layers[index].window for index in ours.token_aware_indices}
    kept = {
        block: tuple(windows[block].select(kind) for kind in states) if windows.get(block) else states
        for block, states in enumerate(entries)
    }
    ours.close()
    payload = KVPayload(kept, torch.zeros_like(mask), mask, plan.digest, "", dense.layers[0].keys.nbytes)
    return dense, TokenAwareCache.from_payload(payload, plan, model)


@torch.no_grad()
def ratios(model, plan, mask, steps, warmup):
    """Time of each step on our cache over that of the step on DynamicCache beside it."""
    dense, ours = filled_caches(model, plan, mask)
    token, found = torch.ones((len(mask), 1), dtype=torch.long, device=model.device), []
    with ours:
        for turn in range(-warmup, steps):
            mask, seconds = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1), {}
            for cache in (dense, ours) if turn % 2 else (ours, dense):
                synchronize(mask.device)
                begun = time.perf_counter()
                model(input_ids=token, attention_mask=mask, past_key_values=cache, use_cache=True)
                synchronize(mask.device)
                seconds[cache is ours] = time.perf_counter() - begun
            found.append(seconds[True] / seconds[False])
    return found[warmup:]


def main(args):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).to(PartialState().device, getattr(torch, args.dtype)).eval()
    token_aware = tuple(range(1, SHAPE["num_hidden_layers"]))
    plans = {"equal": KVPlan(), "cut": KVPlan(token_aware, 16, 112)}
    print("| prompt | padded | plan | ratio | quartiles |\n|---|---|---|---|---|")
    for tokens in args.prompt_tokens:
        mask = torch.ones((args.batch_size, tokens), dtype=torch.long, device=model.device)
        if args.padded:
            mask[0, : tokens // 4] = 0
        for name, kv in plans.items():
            plan = PruningPlan.empty(model, "random", kv=kv)
            if model.device.type != "cpu":  # attention may be planned anew for every number of keys (cuDNN's is)
                ratios(model, plan, mask, args.steps, args.warmup)
            found = ratios(model, plan, mask, args.steps, args.warmup)
            low, median, high = statistics.quantiles(found, n=4)
            print(
                f"| {tokens:,} | {'yes' if args.padded else 'no'} | {name} | {median:.3f} | {low:.3f}-{high:.3f} |",
                flush=True,
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt_tokens", type=int, nargs="+", default=[1024, 8192, 32768], help="lengths of prompts")
    parser.add_argument("--batch_size", type=int, default=2, help="prompts per batch")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of weights and caches")
    parser.add_argument("--padded", action="store_true", help="a quarter of the first prompt is padding")
    parser.add_argument("--steps", type=int, default=60, help="steps that count")
    parser.add_argument("--warmup", type=int, default=4, help="steps before them that do not")
    main(parser.parse_args())
