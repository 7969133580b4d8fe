"""
Several runs side by side, from their artefacts alone: no model is loaded.

    python recipes/compare.py --runs outputs/demo outputs/other study=outputs/ablation --output docs/results.md

A run is a folder in which prune.py, evaluate.py, benchmark.py, handover.py, ablation.py, token_choice.py or
search_study.py has left its results; name=folder calls it otherwise in the tables. Prints the table of runs; the last
line on stdout is JSON.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from hf_pdprune.evaluation.recipe_main import run_recipe
from hf_pdprune.evaluation.run_comparison import compare_runs


@dataclass
class CompareArguments:
    """Which runs are compared, and where the result goes."""

    runs: list[str] = field(metadata={"help": "Folders, or name=folder."})
    output: str = field(default="outputs/comparison.md", metadata={"help": "The Markdown file to write."})
    title: str = field(default="Results", metadata={"help": "Its heading."})
    notes: str | None = field(
        default=None, metadata={"help": "A Markdown file that is put below the comparison: what it says, in words."}
    )


def main(args: CompareArguments) -> None:
    folders = {}
    for entry in args.runs:
        name, separator, folder = entry.partition("=")
        name, folder = (name, folder) if separator and not Path(entry).is_dir() else (Path(entry).name, entry)
        if name in folders:
            raise ValueError(f"runs: two are called {name!r}; call one otherwise with name=folder")
        folders[name] = folder
    notes = "" if args.notes is None else Path(args.notes).read_text(encoding="utf-8")
    print(compare_runs(folders, args.output, args.title, notes), "\n")
    print(json.dumps({"output": args.output, "runs": list(folders)}))


if __name__ == "__main__":
    run_recipe(main, CompareArguments, description=__doc__)
