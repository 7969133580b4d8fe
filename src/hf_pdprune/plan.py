"""PruningPlan: what each stage removes or merges, which blocks are token-aware. It alone translates block numbers."""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from transformers.utils import cached_file

from .artefact_file import read_json, write_artefact
from .blocks import check_block_numbers, num_blocks
from .pair_layout import served_stages
from .version import __version__


PLAN_FILE_NAME = "pruning_plan.json"
TOKEN_CHOICES = ("first_last", "attention")
# With the choice by attention: the queries that choose, SnapKV's observation window. They are kept, too.
_MOST_OBSERVED_TOKENS = 32
FORMAT_VERSION = 1
_PLAN_KEYS = (
    "format_version",
    "hf_pdprune_version",
    "base_model",
    "base_revision",
    "model_type",
    "num_hidden_layers",
    "prefill",
    "decode",
    "kv",
    "provenance",
)


def _check_keys(data: Any, allowed: Iterable[str], where: str) -> None:
    """Raises a `ValueError` that names the first key of `data` which is unknown or missing."""
    allowed = list(allowed)
    if not isinstance(data, dict):
        raise ValueError(f"{where} must be a JSON object, got {type(data).__name__}")
    for key in data:
        if key not in allowed:
            raise ValueError(f"{where}: unknown key {key!r}; known keys: {', '.join(allowed)}")
    for key in allowed:
        if key not in data:
            raise ValueError(f"{where}: key {key!r} is missing")


@dataclass(frozen=True)
class StagePlan:
    """
    What one stage does without.

    Args:
        removed_blocks (`tuple[int, ...]`): Blocks removed outright.
        merged_blocks (`tuple[tuple[int, int], ...]`): Pairs [kept, absorbed]: one distilled block at the kept one's
            place stands for both.
        projected_blocks (`tuple[int, ...]`): Blocks of which prefill computes keys and values alone, from the hidden
            states that pass by, since decode keeps the block (the relaxed subset rule).
    """

    removed_blocks: tuple[int, ...] = ()
    merged_blocks: tuple[tuple[int, int], ...] = ()
    projected_blocks: tuple[int, ...] = ()

    @property
    def missing_blocks(self) -> tuple[int, ...]:
        """Blocks that this stage does not run: the removed and the absorbed ones, rising."""
        return tuple(sorted((*self.removed_blocks, *(absorbed for _, absorbed in self.merged_blocks))))

    @property
    def skipped_blocks(self) -> tuple[int, ...]:
        """Blocks that add nothing to this stage's hidden states: the missing and the projected ones, rising."""
        return tuple(sorted((*self.missing_blocks, *self.projected_blocks)))

    def to_dict(self) -> dict[str, Any]:
        data = {
            "removed_blocks": list(self.removed_blocks),
            "merged_blocks": [list(pair) for pair in self.merged_blocks],
        }
        # Only where there are some: other plans stay readable for versions that know nothing of it.
        return data | ({"projected_blocks": list(self.projected_blocks)} if self.projected_blocks else {})

    @classmethod
    def from_dict(cls, data: dict[str, Any], where: str) -> "StagePlan":
        if isinstance(data, dict):
            data = {"projected_blocks": [], **data}
        _check_keys(data, ("removed_blocks", "merged_blocks", "projected_blocks"), where)
        for key, value in data.items():
            if not isinstance(value, list):
                raise ValueError(f"{where}.{key} must be a list, got {value!r}")
        for pair in data["merged_blocks"]:
            if not isinstance(pair, list) or len(pair) != 2:
                raise ValueError(f"{where}.merged_blocks: {pair!r} is not a pair [kept, absorbed]")
        return cls(
            tuple(data["removed_blocks"]),
            tuple((kept, absorbed) for kept, absorbed in data["merged_blocks"]),
            tuple(data["projected_blocks"]),
        )

    def checked(self, total: int, where: str) -> "StagePlan":
        """This plan with sorted numbers, or a `ValueError` that names the key which is wrong."""
        removed = check_block_numbers(self.removed_blocks, total, f"{where}.removed_blocks")
        in_pairs = [number for pair in self.merged_blocks for number in pair]
        check_block_numbers(in_pairs, total, f"{where}.merged_blocks")
        both = sorted(set(removed) & set(in_pairs))
        if both:
            raise ValueError(f"{where}.merged_blocks: block {both[0]} is in {where}.removed_blocks too")
        projected = check_block_numbers(self.projected_blocks, total, f"{where}.projected_blocks")
        both = sorted(set(projected) & {*removed, *in_pairs})
        if both:
            raise ValueError(f"{where}.projected_blocks: block {both[0]} is removed or merged there too")
        checked = StagePlan(removed, tuple(sorted(tuple(pair) for pair in self.merged_blocks)), projected)
        if len(checked.missing_blocks) >= total:
            raise ValueError(f"{where} removes all {total} blocks; at least one has to stay")
        if len(checked.skipped_blocks) >= total:
            raise ValueError(f"{where} removes or projects all {total} blocks; at least one has to run")
        return checked


@dataclass(frozen=True)
class KVPlan:
    """
    Which KV entries of the prompt the decode stage receives.

    A token-aware block hands over `first_tokens + last_tokens` real prompt tokens per KV head (a shorter prompt: all).
    Which ones, `token_choice` says:

    - `"first_last"`: the first `first_tokens` and the last `last_tokens`.
    - `"attention"` (SnapKV, arXiv 2404.14469): the last `min(32, last_tokens)`, which are observed, and of those
      before them the ones to which the observed tokens' queries attend most, each with the mean of its five
      neighbours. Every block and KV head chooses for itself, so nothing but the bytes is the same. It costs prefill a
      few percent, and pays where the stages are otherwise dense (dev/LOG.md, "Token choice at equal bytes").

    Args:
        token_aware_blocks (`tuple[int, ...]`): Blocks that hand over only these; all others hand over everything.
        first_tokens (`int`, defaults to 16): Prompt tokens at the beginning that the window keeps.
        last_tokens (`int`, defaults to 112): Prompt tokens at the end that the window keeps.
        token_choice (`str`, defaults to `"first_last"`): `"first_last"` or `"attention"`.
    """

    token_aware_blocks: tuple[int, ...] = ()
    first_tokens: int = 16
    last_tokens: int = 112
    token_choice: str = "first_last"

    @property
    def kept_tokens(self) -> int:
        """Prompt tokens that a token-aware block hands over of each row and KV head."""
        return self.first_tokens + self.last_tokens

    @property
    def observed_tokens(self) -> int:
        """Prompt tokens at the end whose queries choose, and that are kept; 0 where nothing is chosen by attention."""
        return min(_MOST_OBSERVED_TOKENS, self.last_tokens) if self.token_choice == "attention" else 0

    def to_text(self) -> str:
        """The tokens that a token-aware block hands over, in words."""
        if self.token_choice == "first_last":
            return f"the first {self.first_tokens} and the last {self.last_tokens} prompt tokens"
        chosen = self.kept_tokens - self.observed_tokens
        return f"the last {self.observed_tokens} prompt tokens and, per head, the {chosen} that these attend to most"

    def to_dict(self) -> dict[str, Any]:
        return {
            "token_aware_blocks": list(self.token_aware_blocks),
            "first_tokens": self.first_tokens,
            "last_tokens": self.last_tokens,
            "token_choice": self.token_choice,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "KVPlan":
        if isinstance(data, dict):  # plans from before there was a choice
            data = {"token_choice": "first_last", **data}
        _check_keys(data, ("token_aware_blocks", "first_tokens", "last_tokens", "token_choice"), "kv")
        if not isinstance(data["token_aware_blocks"], list):
            raise ValueError(f"kv.token_aware_blocks must be a list, got {data['token_aware_blocks']!r}")
        return cls(**{**data, "token_aware_blocks": tuple(data["token_aware_blocks"])})

    def checked(self, total: int) -> "KVPlan":
        for name in ("first_tokens", "last_tokens"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"kv.{name} must be a whole number of tokens, got {value!r}")
        if self.last_tokens < 1:
            raise ValueError("kv.last_tokens must be at least 1: decode has to see the end of the prompt")
        if self.token_choice not in TOKEN_CHOICES:
            raise ValueError(f"kv.token_choice must be one of {', '.join(TOKEN_CHOICES)}, got {self.token_choice!r}")
        blocks = check_block_numbers(self.token_aware_blocks, total, "kv.token_aware_blocks")
        return replace(self, token_aware_blocks=blocks)


@dataclass(frozen=True)
class PruningPlan:
    """
    What each stage of a disaggregated model does without (arXiv 2509.04467). Block numbers are always those of the
    dense model; the methods of this class are the only place that translates them to a stage's own numbers.

    Blocks missing in prefill are missing in decode too (the subset rule): decode would otherwise look for KV entries
    that nobody computed. A block that prefill is to skip and decode to keep is projected in prefill instead (the
    relaxed subset rule): its keys and values are computed, its attention and MLP are not.

    Args:
        base_model (`str`): Repo id or name of the dense model.
        model_type (`str`): `config.model_type` of the dense model.
        num_hidden_layers (`int`): Blocks of the dense model.
        prefill (`StagePlan`): What the prefill stage does without.
        decode (`StagePlan`): What the decode stage does without.
        kv (`KVPlan`): What the hand-over keeps of the prompt's KV entries.
        base_revision (`str`, *optional*): Revision of the dense model.
        provenance (`dict`): How the plan was found: data, tokens, seed, objective, cost. The only free-form part.

    Raises:
        `ValueError`: Names the key that is out of range, contradictory, or breaks the subset rule.
    """

    base_model: str
    model_type: str
    num_hidden_layers: int
    prefill: StagePlan = field(default_factory=StagePlan)
    decode: StagePlan = field(default_factory=StagePlan)
    kv: KVPlan = field(default_factory=KVPlan)
    base_revision: str | None = None
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        total = self.num_hidden_layers
        if isinstance(total, bool) or not isinstance(total, int) or total < 1:
            raise ValueError(f"num_hidden_layers must be a positive whole number, got {total!r}")
        object.__setattr__(self, "prefill", self.prefill.checked(total, "prefill"))
        object.__setattr__(self, "decode", self.decode.checked(total, "decode"))
        object.__setattr__(self, "kv", self.kv.checked(total))
        extra = sorted(set(self.prefill.missing_blocks) - set(self.decode.missing_blocks))
        if extra:
            raise ValueError(
                f"prefill.removed_blocks: block {extra[0]} is missing in prefill but not in decode; blocks missing in "
                "prefill must be missing in decode too"
            )
        if self.decode.projected_blocks:
            raise ValueError("decode.projected_blocks: only prefill computes keys and values for somebody else")
        unneeded = sorted(set(self.prefill.projected_blocks) & set(self.decode.missing_blocks))
        if unneeded:
            raise ValueError(
                f"prefill.projected_blocks: block {unneeded[0]} is missing in decode, which needs none of its keys "
                "and values"
            )
        silent = sorted(set(self.prefill.projected_blocks) & set(self.kv.token_aware_blocks))
        if silent and self.kv.observed_tokens:
            raise ValueError(
                f"prefill.projected_blocks: block {silent[0]} is token-aware, and with token_choice attention its "
                "queries have to choose tokens; a projected block has none"
            )

    @classmethod
    def empty(cls, model_or_config: Any, base_model: str | None = None, **parts: Any) -> "PruningPlan":
        """The plan that removes nothing from `model_or_config`; `parts` (`prefill=`, `kv=`, ...) are filled in."""
        config: PreTrainedConfig = getattr(model_or_config, "config", model_or_config)
        return cls(
            base_model=base_model or config._name_or_path or config.model_type,
            model_type=config.model_type,
            num_hidden_layers=num_blocks(config),
            **parts,
        )

    # Block numbers

    def stage(self, name: str) -> StagePlan:
        """
        The stage's part by its name, `"prefill"` or `"decode"`; `"unified"` is that of both.

        Raises:
            `ValueError`: If the name is unknown, or the stages of a unified model differ.
        """
        parts = [getattr(self, stage) for stage in served_stages(name)]
        if any(part != parts[0] for part in parts):
            raise ValueError(
                f"a {name} model needs a plan in which prefill and decode miss the same blocks; this one misses "
                f"{list(self.prefill.missing_blocks)} and {list(self.decode.missing_blocks)}"
            )
        return parts[0]

    def kept_blocks(self, stage: str) -> tuple[int, ...]:
        """
        Dense numbers of the blocks that a stage has, projected ones among them, in order: entry i is the stage
        checkpoint's block i.
        """
        missing = set(self.stage(stage).missing_blocks)
        return tuple(number for number in range(self.num_hidden_layers) if number not in missing)

    def blocks_of(self, config: PreTrainedConfig) -> tuple[int, ...]:
        """
        Dense numbers of the blocks that a model has, in order: all of them for the dense model, the kept ones for a
        stage checkpoint (whose config carries `pdprune.stage`).

        Raises:
            `ValueError`: If the model is not one of this plan.
        """
        entry = None if getattr(config, "pdprune", None) is None else self.entry_of(config)
        blocks = tuple(range(self.num_hidden_layers)) if entry is None else self.kept_blocks(entry["stage"])
        actual = num_blocks(config)
        if config.model_type != self.model_type or actual != len(blocks):
            what = "a dense model" if entry is None else f"a {entry['stage']} stage"
            raise ValueError(
                f"the plan is for {self.base_model} ({self.model_type}, {len(blocks)} blocks in {what}), but the "
                f"model is {config.model_type} with {actual} blocks"
            )
        if entry is not None:
            there = PruningPlan.from_config(config)
            # The KV part may differ: what is handed over can be chosen anew for the same checkpoints.
            if (there.prefill, there.decode) != (self.prefill, self.decode):
                raise ValueError(f"the {entry['stage']} stage checkpoint was made with another plan than this one")
        return blocks

    def config_entry(self, stage: str, fingerprint: str) -> dict[str, Any]:
        """
        What `config.pdprune` of a stage checkpoint says: the stage's name, the plan without its provenance, and the
        fingerprint that both stages of a pair share.
        """
        self.stage(stage)
        plan = {key: value for key, value in self.to_dict().items() if key != "provenance"}
        return {"stage": stage, "plan": plan, "fingerprint": fingerprint}

    @staticmethod
    def entry_of(config: PreTrainedConfig) -> dict[str, Any]:
        """`config.pdprune` of a stage checkpoint, checked. Raises a `ValueError` that names the key which is wrong."""
        entry = getattr(config, "pdprune", None)
        _check_keys(entry, ("stage", "plan", "fingerprint"), "config.pdprune")
        for key, kind in (("stage", str), ("plan", dict), ("fingerprint", str)):
            if not isinstance(entry[key], kind):
                raise ValueError(f"config.pdprune.{key} must be a {kind.__name__}, got {entry[key]!r}")
        return entry

    @classmethod
    def from_config(cls, config: PreTrainedConfig) -> "PruningPlan":
        """The plan (without provenance) that a stage checkpoint's config carries; see [`config_entry`]."""
        return cls.from_dict({**cls.entry_of(config)["plan"], "provenance": {}})

    # What the plan saves

    def kept_prompt_tokens(self, block: int, prompt_tokens: int) -> int:
        """Prompt tokens whose KV entries `block` hands over to decode; 0 for a block that decode does not have."""
        if block in self.decode.missing_blocks:
            return 0
        if block not in self.kv.token_aware_blocks:
            return prompt_tokens
        return min(prompt_tokens, self.kv.kept_tokens)

    def kv_reduction(self, prompt_tokens: int) -> dict[str, float]:
        """How many times fewer KV entries cross the wire: by `blocks`, by `tokens`, and their product `total`."""
        dense = self.num_hidden_layers * prompt_tokens
        by_blocks = len(self.kept_blocks("decode")) * prompt_tokens
        sent = sum(self.kept_prompt_tokens(block, prompt_tokens) for block in range(self.num_hidden_layers))
        return {"blocks": dense / by_blocks, "tokens": by_blocks / sent, "total": dense / sent}

    # The artefact

    @property
    def digest(self) -> str:
        """Hex digest of what the plan does, without its provenance: the same in every stage and payload of a plan."""
        data = self.to_dict()
        for key in ("provenance", "hf_pdprune_version", "base_model", "base_revision"):
            del data[key]
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:32]

    def to_dict(self) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "hf_pdprune_version": __version__,
            "base_model": self.base_model,
            "base_revision": self.base_revision,
            "model_type": self.model_type,
            "num_hidden_layers": self.num_hidden_layers,
            "prefill": self.prefill.to_dict(),
            "decode": self.decode.to_dict(),
            "kv": self.kv.to_dict(),
            "provenance": self.provenance,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "PruningPlan":
        """The plan in `data` (the parsed JSON). An unknown key or a newer format raises a `ValueError` naming it."""
        if isinstance(data, dict) and "format_version" in data:
            version = data["format_version"]
            if not isinstance(version, int) or isinstance(version, bool) or not 1 <= version <= FORMAT_VERSION:
                raise ValueError(
                    f"format_version {version!r} is not known to hf_pdprune {__version__} (1 to {FORMAT_VERSION}); "
                    "a newer hf_pdprune reads it"
                )
        _check_keys(data, _PLAN_KEYS, "pruning plan")
        for key, kind in (("base_model", str), ("model_type", str), ("provenance", dict)):
            if not isinstance(data[key], kind):
                raise ValueError(f"{key} must be a {kind.__name__}, got {data[key]!r}")
        if not isinstance(data["base_revision"], str | None):
            raise ValueError(f"base_revision must be a str or null, got {data['base_revision']!r}")
        return cls(
            base_model=data["base_model"],
            base_revision=data["base_revision"],
            model_type=data["model_type"],
            num_hidden_layers=data["num_hidden_layers"],
            prefill=StagePlan.from_dict(data["prefill"], "prefill"),
            decode=StagePlan.from_dict(data["decode"], "decode"),
            kv=KVPlan.from_dict(data["kv"]),
            provenance=data["provenance"],
        )

    def save_pretrained(self, save_directory: str | os.PathLike) -> Path:
        """Writes `pruning_plan.json` into the folder (made if need be), as a whole or not at all; returns its path."""
        return write_artefact(Path(save_directory) / PLAN_FILE_NAME, self.to_dict())

    @classmethod
    def from_pretrained(cls, folder_or_repo: str | os.PathLike, **hub_kwargs: Any) -> "PruningPlan":
        """
        Reads `pruning_plan.json` from a folder or a Hub repo.

        Args:
            folder_or_repo (`str` or `os.PathLike`): Folder (or the file itself), or repo id.
            hub_kwargs: `revision`, `token`, `cache_dir` and so on, for a repo.

        Raises:
            `FileNotFoundError`: If there is no plan.
            `ValueError`: If the file is not a valid plan; it names the key.
        """
        path = Path(folder_or_repo)
        if path.is_dir():
            path = path / PLAN_FILE_NAME
        elif not path.is_file():
            try:
                path = Path(cached_file(str(folder_or_repo), PLAN_FILE_NAME, **hub_kwargs))
            except OSError as error:
                where = f"{folder_or_repo!s}: neither a folder nor a repo"
                raise FileNotFoundError(f"no {PLAN_FILE_NAME} in {where}") from error
        if not path.is_file():
            raise FileNotFoundError(f"no {PLAN_FILE_NAME} in {path.parent}")
        return cls.from_dict(read_json(path))
