# ruff: noqa: T201
"""
What the options of a training bring: the same plan healed in several ways, on the same text and (but for the closed
form alone) as many tokens, each from the dense model. A row of rows.jsonl for each as soon as it is known, which is
not made again. A fit in closed form that several variants start from is made once and kept.

    python dev/training_table.py --model <folder> --plan outputs/demo --output_dir outputs/training_table \\
        --train <sources, separated by commas> --validation <source> ...

Others than those below: `--more variants.json`, options by name.
"""

import argparse
import json
import math
import time
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import PartialState
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_pdprune import DecodeStage, PrefillStage, PruningPlan
from hf_pdprune.data import PromptCompletionCollator, load_text, tokenize_examples
from hf_pdprune.evaluation import compare_hand_overs
from hf_pdprune.trainer import PDPruneConfig, PDPruneTrainer


# Tokens of the closed form, and of gradient steps of 512 tokens each: 56k in all, whatever the variant.
FITTED, STEP_TOKENS, STEPS = 40960, 512, 30
COMMON = {
    "max_steps": STEPS,
    "local_distillation_tokens": FITTED,
    "packing": True,
    "packing_strategy": "wrapped",
    "max_length": STEP_TOKENS,
    "per_device_train_batch_size": 1,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 8,
    "logging_steps": 10,
    "save_strategy": "no",
    "report_to": "none",
    "bf16": False,
    "seed": 0,
}
ALL_STEPS = {"local_distillation_tokens": 0, "max_steps": STEPS + FITTED // STEP_TOKENS}
VARIANTS = {
    "unhealed": {"max_steps": 0},
    "default (closed form, then steps; abrupt, one round)": {},
    "closed form alone": {"max_steps": 1, "learning_rate": 1e-9},
    "steps alone": ALL_STEPS,
    "steps alone, 2 rounds": ALL_STEPS | {"removal_rounds": 2},
    "steps alone, 2 rounds, searched again": ALL_STEPS | {"removal_rounds": 2, "search_in_rounds": True},
    "steps alone, 4 rounds": ALL_STEPS | {"removal_rounds": 4},
    "steps alone, 4 rounds, searched again": ALL_STEPS | {"removal_rounds": 4, "search_in_rounds": True},
    "steps alone, faded over 30": ALL_STEPS | {"removal_fade_steps": 30},
    "2 rounds": {"removal_rounds": 2},
    "reverse KL": {"distillation_loss": "reverse_kl"},
    "Jensen-Shannon": {"distillation_loss": "jensen_shannon"},
    "skewed KL": {"distillation_loss": "skewed_forward_kl"},
    "temperature 2": {"distillation_temperature": 2.0},
    "top 64 of the teacher": {"distillation_top_k": 64},
    "with cross-entropy, 0.5": {"cross_entropy_weight": 0.5, "distillation_weight": 0.5},
    "hidden states matched, 0.1": {"hidden_matching_weight": 0.1},
    "hidden states matched, 1": {"hidden_matching_weight": 1.0},
    "distilled without the token-aware cache": {"token_aware_distillation": False},
    "fitted layers learn too": {"train_fitted_layers": True},
    "unhealed, prefill's blocks out of both": {"same_blocks": True, "max_steps": 0},
    "prefill's blocks out of both, two adapters": {"same_blocks": True},
    "prefill's blocks out of both, one adapter": {"same_blocks": True, "stage": "unified"},
}


class TableTrainer(PDPruneTrainer):
    """Takes the fit in closed form that an earlier variant has made from as much text for the same blocks."""

    def _distil_locally(self):
        plan, args = self.removal.plan_of_round(1), self.args
        own = f"{plan.digest[:16]}-{args.stage}-{args.local_distillation_tokens}-{args.local_distillation_rank}"
        folder = Path(args.output_dir).parent / f"fit-{own}-{args.max_length}"
        adapters = {name: value.data for name, value in self.model.named_parameters() if "lora_" in name}
        is_kept = folder.is_dir()
        if is_kept:
            kept = load_file(folder / "adapters.safetensors")
            # Adapters of another rank are the same but where they were fitted.
            for name, value in adapters.items():
                if kept[name].shape == value.shape:
                    value.copy_(kept[name])
            self.local_distillation.load(folder)
        super()._distil_locally()
        if args.local_distillation_tokens and not is_kept:
            folder.mkdir()
            save_file({name: value.clone() for name, value in adapters.items()}, folder / "adapters.safetensors")
            self.local_distillation.save(folder)


def held_out(tokenizer, sources, examples):
    """Batches of each source, the same number of examples."""
    collator, batches = PromptCompletionCollator(tokenizer.pad_token_id), {}
    for source in sources:
        rows = tokenize_examples(load_text(source, "validation"), tokenizer, 320, 64, examples)
        name = Path(source).name.split(".")[0]
        batches[name] = [collator(rows[begin : begin + 4]) for begin in range(0, len(rows), 4)]
    return batches


def measure(model, prefill, decode, batches):
    """KL and the like, with what the plan hands over and with all tokens; KL of each source by itself, too."""
    parts = {
        source: [quality["pair"] for quality in compare_hand_overs(model, {"pair": (prefill, decode)}, own)]
        for source, own in batches.items()
    }
    result = {}
    for place, prefix in enumerate(("", "all_tokens_")):
        own = [part[place] for part in parts.values()]
        tokens = sum(part["tokens"] for part in own)
        for name in ("kl", "top1_agreement"):
            result[prefix + name] = sum(part[name] * part["tokens"] for part in own) / tokens
        nll = sum(math.log(part["perplexity"]) * part["tokens"] for part in own) / tokens
        result[prefix + "perplexity"] = math.exp(nll)
    return result | {"kl_of_source": {source: part[0]["kl"] for source, part in parts.items()}}


def main(args):
    path = Path(args.output_dir) / "rows.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    plan, tokenizer = PruningPlan.from_pretrained(args.plan), AutoTokenizer.from_pretrained(args.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    batches, train_dataset = held_out(tokenizer, args.validation, args.examples), load_text(args.train, "train")
    variants = VARIANTS if args.more is None else VARIANTS | json.loads(Path(args.more).read_text())
    if unknown := set(args.variants or ()) - variants.keys():
        raise SystemExit(f"error: no variant {min(unknown)!r}")
    for name in args.variants or variants:
        if any(row["variant"] == name for row in rows):
            continue
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
        model.to(PartialState().device).eval()
        begun, tokens = time.perf_counter(), 0
        options = COMMON | variants[name]
        own = replace(plan, decode=plan.prefill) if options.pop("same_blocks", False) else plan
        if options["max_steps"] == 0:
            result = measure(model, PrefillStage(model, own), DecodeStage(model, own), batches)
        else:
            rows_of_step = options["per_device_train_batch_size"] * options.get("gradient_accumulation_steps", 1)
            tokens = options["local_distillation_tokens"]
            tokens += options["max_steps"] * rows_of_step * options["max_length"]
            trainer = TableTrainer(
                model,
                own,
                args=PDPruneConfig(str(path.parent / "run"), **options),
                train_dataset=train_dataset,
                processing_class=tokenizer,
            )
            trainer.train()
            trainer.model.eval()
            result = measure(trainer.model, *trainer.stages(), batches)
        row = {"variant": name, "tokens": tokens, "seconds": round(time.perf_counter() - begun), **result}
        rows.append(row)
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)
    print("| variant | tokens | KL | of unhealed | KL, all tokens | perplexity | top-1 |")
    print("|---|---|---|---|---|---|---|")
    kl = {row["variant"]: row["kl"] for row in rows}
    for row in rows:
        same_blocks = variants.get(row["variant"], {}).get("same_blocks", False)
        unhealed = kl.get("unhealed, prefill's blocks out of both" if same_blocks else "unhealed", float("nan"))
        print(
            f"| {row['variant']} | {row['tokens']:,} | {row['kl']:.4f} | {row['kl'] / unhealed:.0%} | "
            f"{row['all_tokens_kl']:.4f} | {row['perplexity']:.2f} | {row['top1_agreement']:.1%} |"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the dense model")
    parser.add_argument("--plan", required=True, help="folder of the plan")
    parser.add_argument("--output_dir", required=True, help="folder for rows.jsonl")
    parser.add_argument("--train", default="pydoc-topics,pydoc-docstrings", help="text that is learnt from")
    parser.add_argument("--validation", nargs="+", default=["pydoc-topics"], help="held-out texts")
    parser.add_argument("--examples", type=int, default=8, help="examples of each held-out text")
    parser.add_argument("--variants", nargs="*", help="only these")
    parser.add_argument("--more", help="JSON file with more variants")
    main(parser.parse_args())
