"""
Strategies against each other on the same objective: strategy x seed x calibration text, for several numbers of removed
blocks (the same ones out of both stages), nothing healed. Writes results.json and table.md into `output_dir`.

    python recipes/search_study.py --output_dir outputs/search_study --model_name_or_path <model> \\
        --calibration piqa+mmlu=piqa.calibration.jsonl,mmlu.calibration.jsonl \\
        --validation piqa+mmlu=piqa.validation.jsonl,mmlu.validation.jsonl wikitext2=wikitext2.validation.jsonl

A text is `name=source`, the source a data set as recipes/prune.py takes it (`source:split` for a split of it). Every
energy is kept in a journal: an interrupted study goes on where it stopped, a finished row is not made again, and what
one search has measured another one does not measure again (its cost is counted as if it did, its seconds are not).
"""

import statistics as stats
import sys
import time
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, PreTrainedModel

from hf_pdprune.artefact_file import read_json, write_artefact
from hf_pdprune.data import load_text, pack_tokens, tokenize_rows
from hf_pdprune.search import (
    BlockStatistics,
    Calibration,
    MergedPairs,
    Objective,
    Operations,
    ParetoFront,
    SearchConfig,
    SearchJournal,
    StepwiseSearch,
)
from hf_pdprune.search.baselines import contiguous_group, end_group, one_shot, random_blocks
from hf_pdprune.search.merged_pairs import MERGED_PAIRS_FILE_NAME
from hf_pdprune.search.operations import removable_blocks, unprotected_blocks
from hf_pdprune.search.pareto_front import ParetoPoint


SIMPLE = {"one_shot": one_shot, "random": random_blocks, "end_group": end_group, "contiguous": contiguous_group}
STEPWISE = ("greedy", "annealing", "annealing+merges")
SEEDED = ("random", "annealing", "annealing+merges")


@dataclass
class StudyArguments:
    """What is compared, and on which text."""

    model_name_or_path: str = field(metadata={"help": "The dense model: repo id or folder."})
    calibration: list[str] = field(metadata={"help": "Texts to search on: name=source[:split]."})
    validation: list[str] = field(metadata={"help": "Texts to compare on: name=source[:split]."})
    output_dir: str = field(default="outputs/search_study", metadata={"help": "Where rows and journals go."})
    strategies: list[str] = field(
        default_factory=lambda: [*SIMPLE, *STEPWISE], metadata={"help": "Which ones, in this order."}
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "For those that draw."})
    num_blocks: list[int] = field(default_factory=lambda: [3, 5, 8], metadata={"help": "Blocks removed."})
    calibration_examples: int = field(default=256, metadata={"help": "Examples of each calibration text."})
    validation_examples: list[int] = field(
        default_factory=lambda: [64], metadata={"help": "Examples of each validation text, or one number for all."}
    )
    prompt_tokens: int = field(default=192, metadata={"help": "Most prompt tokens of an example."})
    completion_tokens: int = field(default=64, metadata={"help": "Most completion tokens of an example."})
    batch_size: int = field(default=4, metadata={"help": "Examples per forward."})
    annealing_share: float = field(default=0.15, metadata={"help": "As for recipes/prune.py."})
    merge_rank: int = field(default=64, metadata={"help": "As for recipes/prune.py."})
    merge_text: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Texts that pairs are distilled on, a row of each in turn, not the others': source[:split]."
        },
    )
    merge_tokens: int = field(default=32768, metadata={"help": "As for recipes/prune.py."})


class Text:
    """One text: its examples with the dense model's predictions, and an objective that measures plans on it."""

    def __init__(self, args: StudyArguments, model: PreTrainedModel, tokenizer: Any, named: str, examples: int):
        self.name, _, source = named.partition("=")
        if not source:
            raise ValueError(f"{named!r} is not name=source")
        source, _, split = source.partition(":")
        try:
            self.calibration = Calibration.from_rows(
                model,
                tokenizer,
                load_text(source, split or "train"),
                args.prompt_tokens,
                args.completion_tokens,
                examples,
                batch_size=args.batch_size,
                name=self.name,
            )
        except ValueError as error:
            raise ValueError(f"{named}: {error}") from error


class Study:
    """Rows of results, and what is needed to make them."""

    def __init__(self, args: StudyArguments):
        for strategy in args.strategies:
            if strategy not in (*SIMPLE, *STEPWISE):
                raise ValueError(f"unknown strategy {strategy!r}; known: {', '.join((*SIMPLE, *STEPWISE))}")
        if "annealing+merges" in args.strategies and not args.merge_text:
            raise ValueError("annealing+merges needs merge_text, which pairs are distilled on")
        if len(args.validation_examples) not in (1, len(args.validation)):
            raise ValueError(f"validation_examples: {len(args.validation_examples)} for {len(args.validation)} texts")
        self.args = args
        self.folder = Path(args.output_dir)
        self.path = self.folder / "results.json"
        self.rows: list[dict[str, Any]] = read_json(self.path) if self.path.is_file() else []
        places = [named.partition(":") for named in args.merge_text]
        # Read at once: what is wrong with it should not be found out after hours.
        self.merge_text = [load_text(source, split or "train") for source, _, split in places]
        self.tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
        self.model = AutoModelForCausalLM.from_pretrained(
            args.model_name_or_path, dtype=torch.float32, use_safetensors=True
        )
        self.model.to(PartialState().device).eval()
        self.validation: dict[str, Text] = {}

    def run(self) -> None:
        """Makes all rows that are not there yet: those of the first seed first, and of few blocks first."""
        args = self.args
        for named in args.calibration:
            text = Text(args, self.model, self.tokenizer, named, args.calibration_examples)
            statistics = BlockStatistics.measure(self.model, text.calibration.batches)
            for number, seed in enumerate(args.seeds):
                for count in sorted(args.num_blocks):
                    for strategy in args.strategies:
                        if strategy in SEEDED:
                            self._search(text, statistics, strategy, seed, count)
                        elif number == 0:
                            self._search(text, statistics, strategy, None, count)
        write_artefact(self.folder / "table.md", table(self.rows))
        print((self.folder / "table.md").read_text())

    def _search(self, text: Text, statistics: BlockStatistics, strategy: str, seed: int | None, count: int) -> None:
        key = {"strategy": strategy, "seed": seed, "num_blocks": count, "calibration": text.name}
        if any(key.items() <= row.items() for row in self.rows):
            return
        args = self.args
        config = SearchConfig(count, count, search_seed=seed or 0, annealing_share=args.annealing_share)
        removable = removable_blocks(statistics, config, at_least=max(args.num_blocks))
        pairs = self._pairs(statistics, config) if strategy == "annealing+merges" else MergedPairs()
        objective = self._objective(text, pairs)
        begun = time.perf_counter()
        if strategy in SIMPLE:
            plan = SIMPLE[strategy](objective, removable, config)
            cost = {"block_tokens": objective.cost.total}
        else:
            search = StepwiseSearch(objective, Operations(removable, pairs.pairs), config, strategy != "greedy")
            steps = search.run(count, count)
            plan = steps[-1].plan
            cost = {"block_tokens": steps[-1].block_tokens, "plain_greedy_block_tokens": steps[-1].plain_block_tokens}
            points = [ParetoPoint(objective.dense_plan, 0.0), *(ParetoPoint(step.plan, step.energy) for step in steps)]
            name = "-".join(str(part) for part in (text.name, strategy, seed) if part is not None)
            ParetoFront(points).save(self.folder / "fronts" / name)
        cost |= {
            "distilling_block_tokens": pairs.block_tokens,
            "dense_forward_block_tokens": objective.dense_block_tokens,
            "evaluations": objective.cost.evaluations,
            "seconds": round(time.perf_counter() - begun, 1),
        }
        energy = objective.energy(plan)
        for place, named in enumerate(args.validation):
            name = named.partition("=")[0]
            if name not in self.validation:
                examples = args.validation_examples[place if len(args.validation_examples) > 1 else 0]
                self.validation[name] = Text(args, self.model, self.tokenizer, named, examples)
            self.rows.append(
                {
                    **key,
                    "validation": name,
                    "calibration_examples": text.calibration.num_examples,
                    "kl_calibration": energy,
                    "kl": self._objective(self.validation[name], pairs).energy(plan),
                    "removed_blocks": list(plan.decode.removed_blocks),
                    "merged_blocks": [list(pair) for pair in plan.decode.merged_blocks],
                    **cost,
                }
            )
        write_artefact(self.path, self.rows)
        write_artefact(self.folder / "table.md", table(self.rows))

    def _pairs(self, statistics: BlockStatistics, config: SearchConfig) -> MergedPairs:
        if (self.folder / MERGED_PAIRS_FILE_NAME).is_file():
            return MergedPairs.from_pretrained(self.folder, self.model)
        absorbed = [block for block in unprotected_blocks(statistics, config) if block > 0]
        rows = (row for group in zip_longest(*self.merge_text) for row in group if row is not None)
        tokens = tokenize_rows(rows, self.tokenizer)
        input_ids = pack_tokens(tokens, self.args.merge_tokens, device=self.model.device)
        pairs = MergedPairs.distil(self.model, input_ids, absorbed, self.args.merge_rank)
        pairs.save_pretrained(self.folder)
        return pairs

    def _objective(self, text: Text, pairs: MergedPairs) -> Objective:
        subject = text.calibration.round_digest + pairs.digest
        journal = SearchJournal(self.folder / "journals" / f"{subject}.jsonl", subject)
        return Objective(self.model, text.calibration, 4 << 30, journal, merged_pairs=pairs)


def table(rows: list[dict[str, Any]]) -> str:
    """A line for each calibration text, number of blocks and strategy: means over seeds, and their spread."""
    names = list(dict.fromkeys(row["validation"] for row in rows))
    lines = [
        f"| calibration | blocks | strategy | KL, calibration | {' | '.join(f'KL, {name}' for name in names)} "
        "| spread | overlap of sets | cost / dense forwards | of plain greedy | missing blocks (first seed) |",
        "|---|---|---|" + "---|" * (len(names) + 5),
    ]
    keys = dict.fromkeys((row["calibration"], row["num_blocks"], row["strategy"]) for row in rows)
    for key in sorted(keys, key=lambda key: key[:2]):
        own = [row for row in rows if (row["calibration"], row["num_blocks"], row["strategy"]) == key]
        first = [row for row in own if row["validation"] == names[0]]
        means = [stats.mean(row["kl"] for row in own if row["validation"] == name) for name in names]
        kls = [row["kl"] for row in first]
        cost = stats.mean(row["block_tokens"] / row["dense_forward_block_tokens"] for row in first)
        plain = [
            row["block_tokens"] / row["plain_greedy_block_tokens"]
            for row in first
            if "plain_greedy_block_tokens" in row
        ]
        # One draw has no spread.
        spread = f"{(max(kls) - min(kls)) / stats.mean(kls):.1%}" if len(kls) > 1 else ""
        best = first[0]
        merged = (f"{absorbed} into {kept}" for kept, absorbed in best["merged_blocks"])
        missing = ", ".join([*map(str, best["removed_blocks"]), *merged])
        lines.append(
            f"| {key[0]} | {key[1]} | {key[2]} | {stats.mean(row['kl_calibration'] for row in first):.4f} | "
            + " | ".join(f"{mean:.4f}" for mean in means)
            + f" | {spread} | {overlap(first)} | {cost:.1f} | "
            + (f"{stats.mean(plain):.0%}" if plain else "")
            + f" | {missing} |"
        )
    return "\n".join(lines) + "\n"


def overlap(rows: list[dict[str, Any]]) -> str:
    """Mean share of missing blocks that two seeds have in common."""
    sets = [{*row["removed_blocks"], *(absorbed for _, absorbed in row["merged_blocks"])} for row in rows]
    shares = [len(a & b) / len(a | b) for i, a in enumerate(sets) for b in sets[i + 1 :]]
    return f"{stats.mean(shares):.0%}" if shares else ""


if __name__ == "__main__":
    try:
        Study(HfArgumentParser(StudyArguments).parse_args_into_dataclasses()[0]).run()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
