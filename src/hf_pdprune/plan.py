"""PruningPlan: what each stage removes or merges, which blocks are token-aware. It alone translates block numbers."""

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from transformers.utils import cached_file

from .artefact_file import read_json, write_artefact
from .blocks import num_blocks
from .pair_layout import served_stages
from .plan_parts import KVPlan, StagePlan, check_keys
from .version import __version__


PLAN_FILE_NAME = "pruning_plan.json"
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

    def config_entry(self, stage: str, fingerprint: str, dense_fingerprint: str | None = None) -> dict[str, Any]:
        """
        What `config.pdprune` of a stage checkpoint says: the stage's name, the plan without its provenance, the
        fingerprint that both stages of a pair share, and that of the dense model where it is known.
        """
        self.stage(stage)
        plan = {key: value for key, value in self.to_dict().items() if key != "provenance"}
        entry = {"stage": stage, "plan": plan, "fingerprint": fingerprint}
        return entry if dense_fingerprint is None else entry | {"dense_fingerprint": dense_fingerprint}

    @staticmethod
    def entry_of(config: PreTrainedConfig) -> dict[str, Any]:
        """`config.pdprune` of a stage checkpoint, checked. Raises a `ValueError` that names the key which is wrong."""
        entry = getattr(config, "pdprune", None)
        kinds = {"stage": str, "plan": dict, "fingerprint": str}
        if isinstance(entry, dict) and "dense_fingerprint" in entry:  # pairs of older versions have none
            kinds["dense_fingerprint"] = str
        check_keys(entry, kinds, "config.pdprune")
        for key, kind in kinds.items():
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
        window = self.kv.windows.get(block)
        return prompt_tokens if window is None else min(prompt_tokens, sum(window))

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
        check_keys(data, _PLAN_KEYS, "pruning plan")
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
                reason = str(error).splitlines()[0]  # there is no such repo, or nobody may read it, or no network
                where = f"{folder_or_repo!s}: neither a folder nor a repo that can be read ({reason})"
                raise FileNotFoundError(f"no {PLAN_FILE_NAME} in {where}") from error
        if not path.is_file():
            raise FileNotFoundError(f"no {PLAN_FILE_NAME} in {path.parent}")
        return cls.from_dict(read_json(path))
