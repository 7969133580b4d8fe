"""
Strategies against each other on the same objective: strategy x seed x calibration text, for several numbers of removed
blocks (the same ones out of both stages), nothing healed. Writes search_study.json and table.md into `output_dir`;
recipes/compare.py puts them into a report.

    python recipes/search_study.py --output_dir outputs/search_study --model_name_or_path <model> \\
        --calibration piqa+mmlu=piqa.calibration.jsonl,mmlu.calibration.jsonl \\
        --validation piqa+mmlu=piqa.validation.jsonl,mmlu.validation.jsonl wikitext2=wikitext2.validation.jsonl

A text is `name=source`, the source a data set as recipes/prune.py takes it (`source:split` for a split of it). With
several calibration texts, what was found on one is measured on the others too. Every energy is kept in a journal: an
interrupted study goes on where it stopped, a finished row is not made again with the same options, and what one search
has measured another one does not measure again (its cost is counted as if it did, its minutes are not).
"""

import time
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import PreTrainedModel

from hf_pdprune.artefact_file import read_json, write_artefact
from hf_pdprune.blocks import num_blocks
from hf_pdprune.data import load_text, pack_tokens, source_digest, tokenize_rows
from hf_pdprune.evaluation.command_line import command_line
from hf_pdprune.evaluation.dense_model_of_pair import load_dense_model, load_tokenizer
from hf_pdprune.evaluation.overlap_config import OverlapConfig
from hf_pdprune.evaluation.recipe_main import run_recipe
from hf_pdprune.evaluation.results import record_command
from hf_pdprune.evaluation.search_study_report import (
    PLACE_KEYS,
    SEARCH_KEYS,
    SEARCH_STUDY_FILE_NAME,
    search_study_table,
)
from hf_pdprune.evaluation.text_overlap import shown_text
from hf_pdprune.hub.dense_fingerprint import dense_fingerprint
from hf_pdprune.plan import PruningPlan, StagePlan
from hf_pdprune.search import (
    BlockCounts,
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
from hf_pdprune.shortened_config import context_length


SIMPLE = {"one_shot": one_shot, "random": random_blocks, "end_group": end_group, "contiguous": contiguous_group}
STEPWISE = ("greedy", "annealing", "annealing+merges")
SEEDED = ("random", "annealing", "annealing+merges")
ORIGIN_FILE_NAME = "search_study_origin.json"
PLACES = ("model_name_or_path", "output_dir")


@dataclass
class StudyArguments(OverlapConfig):
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
            "help": "Texts that pairs are distilled on, a row of each in turn, not the others': source[:split]. "
            "Default: the calibration texts."
        },
    )
    merge_tokens: int = field(default=32768, metadata={"help": "As for recipes/prune.py."})

    def __post_init__(self):
        super().__post_init__()
        self.merge_text = self.merge_text or [split_name(named)[1] for named in self.calibration]


class Text:
    """One text: its examples with the dense model's predictions, and an objective that measures plans on it."""

    def __init__(self, args: StudyArguments, model: PreTrainedModel, tokenizer: Any, named: str, examples: int):
        self.name, source = split_name(named)
        try:
            self.calibration = Calibration.from_rows(
                model,
                tokenizer,
                load_text(*source_and_split(source)),
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
        if len(args.validation_examples) not in (1, len(args.validation)):
            raise ValueError(f"validation_examples: {len(args.validation_examples)} for {len(args.validation)} texts")
        for texts in (args.calibration, args.validation):
            if again := repeated([split_name(named)[0] for named in texts]):
                raise ValueError(f"two texts are called {again[0]!r}")
        for name in ("strategies", "seeds", "num_blocks"):
            if again := repeated(getattr(args, name)):
                raise ValueError(f"{name}: {again[0]} is named twice")
        self.args = args
        self.folder = Path(args.output_dir)
        self.path = self.folder / SEARCH_STUDY_FILE_NAME
        self.rows: list[dict[str, Any]] = read_json(self.path) if self.path.is_file() else []
        # Read at once: what is wrong with it should not be found out after hours.
        self.merge_text = [load_text(*source_and_split(source)) for source in args.merge_text]
        seen = [split_name(named)[1] for named in args.calibration]
        seen += args.merge_text if "annealing+merges" in args.strategies else []
        validation = map(split_name, args.validation)
        args.check_overlap(
            ((name, map(shown_text, load_text(*source_and_split(source)))) for name, source in validation),
            sources=[(*source_and_split(source), None) for source in seen],
        )
        self.tokenizer = load_tokenizer(args.model_name_or_path)
        self.model = load_dense_model(args.model_name_or_path, dtype="float32")
        for count in args.num_blocks:
            if count < 1:
                raise ValueError(f"num_blocks must be at least 1, got {count}")
            self._config(count).check_model(num_blocks(self.model.config))
        self.made_of = self._checked_origin()
        self.validation: dict[str, Text] = {}
        self.searches: list[dict[str, Any]] = []  # the part of their rows that is the same for every validation text
        self.pairs: MergedPairs | None = None
        self.merge_source: str | None = None  # what they are distilled from

    def _checked_origin(self) -> dict[str, str]:
        """Which weights and texts the rows come from. A table must not mix those of one name that are not the same."""
        there = read_json(self.folder / ORIGIN_FILE_NAME) if (self.folder / ORIGIN_FILE_NAME).is_file() else {}
        own = {"model": dense_fingerprint(self.model) or self.args.model_name_or_path}
        for kind in ("calibration", "validation"):
            for name, source in map(split_name, getattr(self.args, kind)):
                own[f"{kind} text {name}"] = source_digest(*source_and_split(source)) or source
        for key, value in own.items():
            if there.get(key, value) != value:
                raise ValueError(
                    f"{self.path} holds a study with another {key} ({there[key]}, not {value}): choose another "
                    "output_dir"
                )
        return there | own

    def run(self) -> None:
        """Makes all rows that are not there yet: those of the first seed first, and of few blocks first."""
        args = self.args
        if PartialState().is_main_process:
            write_artefact(self.folder / ORIGIN_FILE_NAME, self.made_of)
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
            del text  # one at a time: the dense model's predictions take memory
        for named in args.calibration:
            self._measure_others(named)
        self._save()
        if PartialState().is_main_process:
            record_command(self.folder, "search_study", command_line("recipes/search_study.py", args, folders=PLACES))
            print(search_study_table(self.rows).to_markdown())

    def _config(self, count: int, seed: int | None = None) -> SearchConfig:
        own = {key: getattr(self.args, key) for key in ("annealing_share", "merge_rank", "merge_tokens")}
        return SearchConfig(count, count, search_seed=seed or 0, **own)

    def _search(self, text: Text, statistics: BlockStatistics, strategy: str, seed: int | None, count: int) -> None:
        args = self.args
        config = self._config(count, seed)
        removable = removable_blocks(statistics, config, at_least=max(args.num_blocks))
        merges, anneals = strategy == "annealing+merges", strategy.startswith("annealing")
        if merges and self.pairs is None:
            self.pairs = self._merged_pairs(statistics, config)
        search = {
            "strategy": strategy,
            "seed": seed,
            "num_blocks": count,
            "calibration": text.name,
            "calibration_digest": text.calibration.digest,
            "removable_blocks": sorted(removable),
            "annealing_share": args.annealing_share if anneals else None,
            "merge_source": self.merge_source if merges else None,
        }
        made = [row for row in self.rows if is_of(row, search)]
        if made:
            search = {key: value for key, value in made[0].items() if key not in (*PLACE_KEYS, "kl")}
        else:
            search |= {key: getattr(args, key) for key in ("prompt_tokens", "completion_tokens", "batch_size")}
            search |= {key: getattr(args, key) if merges else None for key in ("merge_tokens", "merge_rank")}
            search |= self._found(text, removable, config, strategy, seed)
        self.searches.append(search)
        for place, named in enumerate(args.validation):
            name, source = split_name(named)
            examples = args.validation_examples[place if len(args.validation_examples) > 1 else 0]
            where = dict(zip(PLACE_KEYS, (name, source, examples), strict=True))
            if self._is_missing(search, where):
                if name not in self.validation:
                    self.validation[name] = Text(args, self.model, self.tokenizer, named, examples)
                self._measure(search, where, self.validation[name])
        self._save()

    def _found(
        self, text: Text, removable: tuple[int, ...], config: SearchConfig, strategy: str, seed: int | None
    ) -> dict[str, Any]:
        """What a search comes to."""
        count = config.num_decode_blocks
        pairs = self.pairs if strategy == "annealing+merges" else MergedPairs()
        objective = self._objective(text, pairs)
        begun = time.perf_counter()
        if strategy in SIMPLE:
            plan = SIMPLE[strategy](objective, removable, config)
            cost = {"block_tokens": objective.cost.total}
        else:
            search = StepwiseSearch(objective, Operations(removable, pairs.pairs), config, strategy != "greedy")
            steps = search.run(BlockCounts(count, count))
            plan = steps[-1].plan
            cost = {"block_tokens": steps[-1].block_tokens, "plain_greedy_block_tokens": steps[-1].plain_block_tokens}
            points = [ParetoPoint(objective.dense_plan, 0.0), *(ParetoPoint(step.plan, step.energy) for step in steps)]
            name = "-".join(str(part) for part in (text.name, strategy, seed) if part is not None)
            if PartialState().is_main_process:
                ParetoFront(points).save(self.folder / "fronts" / name)
        cost |= {
            "distilling_block_tokens": pairs.block_tokens,
            "dense_forward_block_tokens": objective.dense_block_tokens,
            "evaluations": objective.cost.evaluations,
            "seconds": round(time.perf_counter() - begun, 1),
        }
        return {
            "calibration_examples": text.calibration.num_examples,
            "kl_calibration": objective.energy(plan),
            "removed_blocks": list(plan.decode.removed_blocks),
            "merged_blocks": [list(pair) for pair in plan.decode.merged_blocks],
            **cost,
        }

    def _measure_others(self, named: str) -> None:
        """Measures on a calibration text what was found on the others."""
        name, source = split_name(named)
        where = dict(zip(PLACE_KEYS, (f"{name}, calibration", source, self.args.calibration_examples), strict=True))
        others = [search for search in self.searches if search["calibration"] != name]
        missing = [search for search in others if self._is_missing(search, where)]
        if missing:
            text = Text(self.args, self.model, self.tokenizer, named, self.args.calibration_examples)
            for search in missing:
                self._measure(search, where, text)
            self._save()

    def _is_missing(self, search: dict[str, Any], where: dict[str, Any]) -> bool:
        names = {key: search[key] for key in (*SEARCH_KEYS, "seed")}
        return not any(is_of(row, names | where) for row in self.rows)

    def _measure(self, search: dict[str, Any], where: dict[str, Any], text: Text) -> None:
        """Makes the row that says what one search is worth on a text."""
        missing = StagePlan(tuple(search["removed_blocks"]), tuple(map(tuple, search["merged_blocks"])))
        plan = PruningPlan.empty(self.model, prefill=missing, decode=missing)
        pairs = MergedPairs() if search["merge_source"] is None else self.pairs
        self.rows.append(search | where | {"kl": self._objective(text, pairs).energy(plan)})

    def _save(self) -> None:
        if PartialState().is_main_process:
            write_artefact(self.path, self.rows)
            write_artefact(self.folder / "table.md", search_study_table(self.rows).to_markdown() + "\n")

    def _merged_pairs(self, statistics: BlockStatistics, config: SearchConfig) -> MergedPairs:
        """The pairs, distilled once for all that asks for the same ones."""
        absorbed = [block for block in unprotected_blocks(statistics, config) if block > 0]
        rows = (row for group in zip_longest(*self.merge_text) for row in group if row is not None)
        tokens = tokenize_rows(rows, self.tokenizer)
        context = context_length(self.model.config)
        input_ids = pack_tokens(tokens, self.args.merge_tokens, context, self.model.device)
        self.merge_source = MergedPairs.source_digest(self.model, input_ids, absorbed, self.args.merge_rank)
        folder = self.folder / "pairs" / self.merge_source
        if (folder / MERGED_PAIRS_FILE_NAME).is_file():
            return MergedPairs.from_pretrained(folder, self.model)
        pairs = MergedPairs.distil(self.model, input_ids, absorbed, self.args.merge_rank)
        if PartialState().is_main_process:
            pairs.save_pretrained(folder)
        return pairs

    def _objective(self, text: Text, pairs: MergedPairs) -> Objective:
        subject = text.calibration.round_digest + pairs.digest
        journal = SearchJournal(self.folder / "journals" / f"{subject}.jsonl", subject)
        return Objective(self.model, text.calibration, 4 << 30, journal, merged_pairs=pairs)


def repeated(values: list[Any]) -> list[Any]:
    """Those values that are there more than once."""
    return [value for value in values if values.count(value) > 1]


def split_name(named: str) -> tuple[str, str]:
    """Name and source of a text."""
    name, _, source = named.partition("=")
    if not source:
        raise ValueError(f"{named!r} is not name=source")
    return name, source


def source_and_split(source: str) -> tuple[str, str]:
    """Of `source[:split]`, where the source can be several."""
    name, _, split = source.partition(":")
    if "," in split:
        raise ValueError(f"{source!r}: the split comes once, after the last source")
    return name, split or "train"


def is_of(row: dict[str, Any], names: dict[str, Any]) -> bool:
    """Whether a row has these values. One that was made before there were such columns has not."""
    return all(key in row and row[key] == value for key, value in names.items())


def main(args: StudyArguments) -> None:
    Study(args).run()


if __name__ == "__main__":
    run_recipe(main, StudyArguments, description=__doc__, goes_on=True)
