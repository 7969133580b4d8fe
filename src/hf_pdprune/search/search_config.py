"""SearchConfig: the options of a search."""

import math
from dataclasses import dataclass, field

from ..plan_parts import TOKEN_CHOICES


# These take one block after the other.
STEPWISE_STRATEGIES = ("annealing", "greedy")
STRATEGIES = ("annealing", "greedy", "one_shot", "contiguous", "end_group", "random")

CACHE_DTYPES = ("float32", "bfloat16", "float16")

TOKEN_AWARE_CRITERIA = ("kl", "attention_mass", "random")

# Which windows a block may have where bytes are what is asked for (dev/LOG.md, "Windows of blocks").
_WINDOW_FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)


@dataclass
class SearchConfig:
    """
    Options of [`search_plan`].

    Parameters:
        > What is removed

        num_prefill_blocks (`int`, *optional*, defaults to `0`):
            Blocks that the prefill stage loses.
        num_decode_blocks (`int`, *optional*, defaults to `0`):
            Blocks that the decode stage loses, those that prefill loses among them.
        target_ttft_speedup (`float`, *optional*):
            Instead of `num_prefill_blocks`: how many times faster prefill is to be. As many blocks go as it takes, by
            the blocks' parameters.
        target_tpot_speedup (`float`, *optional*):
            Instead of `num_decode_blocks`: how many times faster a decode step is to be, by the parameters of blocks
            and LM head.
        target_latency_speedup (`float`, *optional*):
            Instead of both: how many times faster an answer is to be, from the first token of its prompt to its own
            last one. How many blocks each stage loses is then searched for, too: the next one goes from where it costs
            least KL for the time that it saves. Best with `relaxed_subset_rule`, under which prefill may lose more
            than decode.
        prefill_latency_share (`float`, *optional*):
            With it: prefill's share of that time on the dense model, 0 to 1, for prompts and answers as they are to
            be served (`recipes/benchmark.py` measures it). The larger it is, the more blocks go out of prefill.
        max_kl (`float`, *optional*):
            KL to the dense model per completion token, on the calibration set and before healing, that is not to be
            passed: blocks go as long as it is kept, from prefill too at first and then from decode alone. The numbers
            of blocks, where they are given, are then the most that go. Token-aware blocks count too: where they take
            KL above it, fewer blocks go, or none.
        relaxed_subset_rule (`bool`, *optional*, defaults to `False`):
            Whether prefill may skip blocks that decode keeps, and more of them than decode. Prefill then projects the
            hidden states that pass by to such a block's keys and values, a twentieth to a sixth of the block's work,
            and leaves out the rest; in targets and numbers of blocks it counts as lost.
        distillation_threshold (`float`, *optional*, defaults to `0.95`):
            Blocks at least as redundant as this (mean cosine similarity of input and output) may be removed outright.
            Where these are too few, the next most redundant ones may be too.
        num_protected_first_blocks (`int`, *optional*, defaults to `1`):
            Blocks at the beginning that are never removed.
        num_protected_last_blocks (`int`, *optional*, defaults to `1`):
            Blocks at the end that are never removed.
        merge_pairs (`bool`, *optional*, defaults to `False`):
            Whether a block may also be merged with the one before it into one distilled block, which then learns what
            both do. The pairs are distilled once, before the search; distillation of the stages starts from them.
        merge_rank (`int`, *optional*, defaults to `64`):
            Rank of what a merged block learns where its MLP cannot take over neurons of the other one. The adapters of
            the stages need at least this rank there.
        merge_tokens (`int`, *optional*, defaults to `32768`):
            Tokens of training text that pairs are distilled on.

        > How they are chosen

        strategy (`str`, *optional*, defaults to `"annealing"`):
            `"annealing"` (greedy, and annealing after each block), `"greedy"` (SLEB: one block after the
            other), `"one_shot"` (ShortGPT: the most redundant ones), `"contiguous"` (the best run of neighbours),
            `"end_group"` (Shortened LLaMA: the last ones) or `"random"`.
        search_seed (`int`, *optional*, defaults to `0`):
            Seed of everything random.
        annealing_share (`float`, *optional*, defaults to `0.15`):
            What annealing may spend, in block forwards x tokens, as a share of what a plain greedy loop would (every
            candidate, on all examples and from block 0 to the end).
        num_restarts (`int`, *optional*, defaults to `1`):
            Annealings from the same start, each with its own seed, among which what annealing may spend is divided.
        search_confidence (`float`, *optional*, defaults to `3.0`):
            Annealing gives a candidate up before it has been measured on all examples where its loss, guessed from
            those measured so far, is so many standard errors above what could be accepted. `0`: only where that is
            certain.
        search_share (`float`, *optional*, defaults to `0.9`):
            Annealing measures candidates on the examples that tell most for what they cost, up to this share of the
            completion tokens, and only what it finds on all of them.
        initial_temperature (`float`, *optional*, defaults to `0.05`):
            Temperature at which annealing begins, as a share of the energy of its start.
        final_temperature (`float`, *optional*, defaults to `0.002`):
            Temperature at which it ends, likewise; it falls geometrically with the budget spent.
        hidden_cache_gb (`float`, *optional*, defaults to `4.0`):
            Memory for the hidden states and KV entries that make evaluations start at the first block that differs, in
            GB per process. With less, more is computed again; the result is the same.
        hidden_cache_dtype (`str`, *optional*):
            Dtype in which these are kept: `"bfloat16"` takes half of the memory of `"float32"`, and rounds. Default:
            the model's.

        > Token-aware cache

        num_token_aware_blocks (`int`, *optional*):
            Blocks that hand over only `first_tokens + last_tokens` tokens of the prompt. Default: none, or as
            `target_kv_reduction` says.
        target_kv_reduction (`float`, *optional*):
            Instead: how many times fewer KV entries cross the wire, removed blocks and dropped tokens together.
        kv_prompt_tokens (`int`, *optional*, defaults to `1024`):
            Prompt length at which `target_kv_reduction` is to be met.
        first_tokens (`int`, *optional*, defaults to `16`):
            Prompt tokens at the beginning that token-aware blocks keep.
        last_tokens (`int`, *optional*, defaults to `112`):
            Prompt tokens at the end that they keep.
        window_factors (`list[float]`, *optional*):
            Windows that a block may have, so many times `first_tokens + last_tokens`. With several of them, blocks
            that need more of the prompt get more of it, and others less, with the same number of tokens in all: as
            many as `target_kv_reduction` says, or as `num_token_aware_blocks` with the plain window hand over.
            Default: 0.25, 0.5, 1, 2 and 4 with a `target_kv_reduction` that is met by KL, else 1 alone.
        token_choice (`str`, *optional*):
            Which tokens are kept: `"first_last"`, or `"attention"`, as many of each KV head, the last 32 and those to
            which these attend most (SnapKV). `"attention"` pays where the stages are otherwise dense (KL 0.073 against
            0.107 on SmolLM2-135M); on a pruned and distilled pair it gained nothing (0.240 either way). Default:
            `"attention"` where no block is to go, blocks are chosen by `"kl"` and the model's attention can be
            observed; else `"first_last"`.
        token_aware_criterion (`str`, *optional*, defaults to `"kl"`):
            `"kl"` (what dropping costs, measured), `"attention_mass"` (PDTrim: blocks whose attention rests on the
            ends of the prompt) or `"random"`.
        refine_token_aware_blocks (`bool`, *optional*, defaults to `True`):
            Whether the blocks that `"kl"` finds one by one are then annealed jointly.
    """

    num_prefill_blocks: int = field(default=0, metadata={"help": "Blocks that the prefill stage loses."})
    num_decode_blocks: int = field(
        default=0, metadata={"help": "Blocks that the decode stage loses, those that prefill loses among them."}
    )
    target_ttft_speedup: float | None = field(
        default=None, metadata={"help": "Instead of num_prefill_blocks: how many times faster prefill is to be."}
    )
    target_tpot_speedup: float | None = field(
        default=None, metadata={"help": "Instead of num_decode_blocks: how many times faster a decode step is to be."}
    )
    target_latency_speedup: float | None = field(
        default=None,
        metadata={
            "help": "Instead of both: how many times faster an answer is to be, first to last token; the search "
            "chooses how many blocks each stage loses."
        },
    )
    prefill_latency_share: float | None = field(
        default=None,
        metadata={"help": "With target_latency_speedup: prefill's share of the dense model's time, 0 to 1."},
    )
    max_kl: float | None = field(
        default=None,
        metadata={"help": "KL per completion token, before healing, up to which blocks go, as many as are allowed."},
    )
    relaxed_subset_rule: bool = field(
        default=False,
        metadata={
            "help": "Whether prefill may skip blocks that decode keeps; it then computes their keys and values alone."
        },
    )
    distillation_threshold: float = field(
        default=0.95, metadata={"help": "Blocks at least as redundant as this may be removed outright."}
    )
    num_protected_first_blocks: int = field(
        default=1, metadata={"help": "Blocks at the beginning that are never removed."}
    )
    num_protected_last_blocks: int = field(default=1, metadata={"help": "Blocks at the end that are never removed."})
    merge_pairs: bool = field(
        default=False,
        metadata={"help": "Whether a block may also be merged with the one before it into one distilled block."},
    )
    merge_rank: int = field(
        default=64, metadata={"help": "Rank of what a merged block learns where neurons cannot move."}
    )
    merge_tokens: int = field(default=32768, metadata={"help": "Tokens of training text that pairs are distilled on."})
    strategy: str = field(
        default="annealing", metadata={"help": "How blocks are chosen.", "choices": list(STRATEGIES)}
    )
    search_seed: int = field(default=0, metadata={"help": "Seed of everything random in the search."})
    annealing_share: float = field(
        default=0.15, metadata={"help": "What annealing may spend, as a share of what a plain greedy loop would."}
    )
    num_restarts: int = field(
        default=1, metadata={"help": "Annealings from the same start, each with its own seed, that share the budget."}
    )
    search_confidence: float = field(
        default=3.0,
        metadata={
            "help": "Standard errors at which a candidate is given up before it is measured on all examples. 0: only "
            "where it is certain to lose."
        },
    )
    search_share: float = field(
        default=0.9,
        metadata={"help": "Share of the completion tokens, those that cost least first, that annealing measures on."},
    )
    initial_temperature: float = field(
        default=0.05, metadata={"help": "Temperature at which annealing begins, as a share of its start's energy."}
    )
    final_temperature: float = field(
        default=0.002, metadata={"help": "Temperature at which annealing ends, as a share of its start's energy."}
    )
    hidden_cache_gb: float = field(
        default=4.0,
        metadata={"help": "Memory per process for hidden states and KV entries that save computing, in GB."},
    )
    hidden_cache_dtype: str | None = field(
        default=None,
        metadata={"help": "Dtype in which these are kept. Default: the model's.", "choices": list(CACHE_DTYPES)},
    )
    num_token_aware_blocks: int | None = field(
        default=None, metadata={"help": "Blocks that hand over only first_tokens + last_tokens tokens of the prompt."}
    )
    target_kv_reduction: float | None = field(
        default=None,
        metadata={"help": "Instead of num_token_aware_blocks: how many times fewer KV entries cross the wire."},
    )
    kv_prompt_tokens: int = field(
        default=1024, metadata={"help": "Prompt length at which target_kv_reduction is to be met."}
    )
    first_tokens: int = field(
        default=16, metadata={"help": "Prompt tokens at the beginning that token-aware blocks keep."}
    )
    last_tokens: int = field(default=112, metadata={"help": "Prompt tokens at the end that token-aware blocks keep."})
    window_factors: list[float] | None = field(
        default=None,
        metadata={
            "help": "Windows that a block may have, as multiples of first_tokens + last_tokens. Default: 0.25 0.5 1 2 "
            "4 with target_kv_reduction, else 1."
        },
    )
    token_choice: str | None = field(
        default=None,
        metadata={
            "help": "Which tokens are kept: the first and last, or as many by attention of the last 32. Default: by "
            "attention where no block is to go, which is where it pays.",
            "choices": list(TOKEN_CHOICES),
        },
    )
    token_aware_criterion: str = field(
        default="kl",
        metadata={"help": "How token-aware blocks are chosen.", "choices": list(TOKEN_AWARE_CRITERIA)},
    )
    refine_token_aware_blocks: bool = field(
        default=True, metadata={"help": "Whether token-aware blocks found one by one are then annealed jointly."}
    )

    def __post_init__(self):
        for name, value in vars(self).items():
            numbers = value if isinstance(value, list) else [value]
            # NaN would pass every check below, and be below every energy.
            if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
                raise ValueError(f"{name} must be finite, got {value}")
        for name in (
            "num_prefill_blocks",
            "num_decode_blocks",
            "num_protected_first_blocks",
            "num_protected_last_blocks",
        ):
            _check_count(name, getattr(self, name))
        for name in ("first_tokens", "last_tokens", "kv_prompt_tokens"):
            _check_count(name, getattr(self, name), 0 if name == "first_tokens" else 1)
        for name in ("merge_rank", "merge_tokens", "num_restarts"):
            _check_count(name, getattr(self, name), 1)
        for target, count in (
            ("target_ttft_speedup", "num_prefill_blocks"),
            ("target_tpot_speedup", "num_decode_blocks"),
        ):
            speedup = getattr(self, target)
            if speedup is not None and speedup < 1:
                raise ValueError(f"{target} must be at least 1, got {speedup}")
            if speedup is not None and getattr(self, count):
                raise ValueError(f"{target} and {count} exclude each other")
        self._check_latency()
        if (
            self.target_tpot_speedup is None
            and self.num_decode_blocks < self.num_prefill_blocks
            and not self.relaxed_subset_rule
        ):
            raise ValueError(
                f"num_decode_blocks ({self.num_decode_blocks}) must be at least num_prefill_blocks "
                f"({self.num_prefill_blocks}): blocks missing in prefill are missing in decode too (but with "
                "relaxed_subset_rule)"
            )
        if self.strategy not in STRATEGIES:
            raise ValueError(f"strategy must be one of {', '.join(STRATEGIES)}, got {self.strategy!r}")
        if self.token_aware_criterion not in TOKEN_AWARE_CRITERIA:
            raise ValueError(
                f"token_aware_criterion must be one of {', '.join(TOKEN_AWARE_CRITERIA)}, got "
                f"{self.token_aware_criterion!r}"
            )
        if self.window_factors is None:
            varies = self.target_kv_reduction is not None and self.token_aware_criterion == "kl"
            self.window_factors = list(_WINDOW_FACTORS if varies else (1.0,))
        if not self.window_factors or any(factor <= 0 for factor in self.window_factors):
            raise ValueError(f"window_factors must be positive numbers, got {self.window_factors}")
        if self.window_factors != [1.0] and self.token_aware_criterion != "kl":
            raise ValueError(f"window_factors need the token_aware_criterion kl, got {self.token_aware_criterion!r}")
        if self.token_choice is None and not (self.keeps_all_blocks and self.token_aware_criterion == "kl"):
            self.token_choice = "first_last"  # else the model says whether its attention can be observed
        if self.token_choice not in (None, *TOKEN_CHOICES):
            raise ValueError(f"token_choice must be one of {', '.join(TOKEN_CHOICES)}, got {self.token_choice!r}")
        if not -1 <= self.distillation_threshold <= 1:
            raise ValueError(f"distillation_threshold must be between -1 and 1, got {self.distillation_threshold}")
        if self.max_kl is not None and self.max_kl <= 0:
            raise ValueError(f"max_kl must be positive, got {self.max_kl}")
        if self.max_kl is not None and self.strategy not in STEPWISE_STRATEGIES:
            raise ValueError(f"max_kl needs a strategy that goes block by block: {', '.join(STEPWISE_STRATEGIES)}")
        for name in ("merge_pairs", "relaxed_subset_rule"):
            if getattr(self, name) and self.strategy != "annealing":
                raise ValueError(f"{name} needs the strategy annealing, got {self.strategy!r}")
        for name in ("annealing_share", "search_confidence"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0 < self.search_share <= 1:
            raise ValueError(f"search_share must be above 0 and at most 1, got {self.search_share}")
        if self.hidden_cache_dtype not in (None, *CACHE_DTYPES):
            raise ValueError(
                f"hidden_cache_dtype must be one of {', '.join(CACHE_DTYPES)}, got {self.hidden_cache_dtype!r}"
            )
        if not 0 < self.final_temperature <= self.initial_temperature:
            raise ValueError(
                "temperatures must be positive and fall, got initial_temperature "
                f"{self.initial_temperature} and final_temperature {self.final_temperature}"
            )
        if self.hidden_cache_gb < 0:
            raise ValueError(f"hidden_cache_gb must not be negative, got {self.hidden_cache_gb}")
        if self.num_token_aware_blocks is not None and self.target_kv_reduction is not None:
            raise ValueError("num_token_aware_blocks and target_kv_reduction exclude each other")
        if self.num_token_aware_blocks is not None:
            _check_count("num_token_aware_blocks", self.num_token_aware_blocks)
        if self.target_kv_reduction is not None and self.target_kv_reduction < 1:
            raise ValueError(f"target_kv_reduction must be at least 1, got {self.target_kv_reduction}")

    @property
    def keeps_all_blocks(self) -> bool:
        """Whether no block is to go: then only tokens are left out."""
        counts = (self.num_prefill_blocks, self.num_decode_blocks)
        targets = (self.target_ttft_speedup, self.target_tpot_speedup, self.target_latency_speedup)
        return not any((*counts, *targets, self.max_kl))

    def _check_latency(self) -> None:
        """Raises a `ValueError` where the target for the latency of answers does not make sense."""
        speedup, share = self.target_latency_speedup, self.prefill_latency_share
        if (speedup is None) != (share is None):
            raise ValueError("target_latency_speedup and prefill_latency_share belong together: give both or neither")
        if speedup is None:
            return
        if speedup < 1:
            raise ValueError(f"target_latency_speedup must be at least 1, got {speedup}")
        if not 0 <= share <= 1:
            raise ValueError(f"prefill_latency_share must be between 0 and 1, got {share}")
        for name in ("num_prefill_blocks", "num_decode_blocks", "target_ttft_speedup", "target_tpot_speedup"):
            if getattr(self, name):
                raise ValueError(f"target_latency_speedup and {name} exclude each other")
        if self.strategy not in STEPWISE_STRATEGIES:
            raise ValueError(
                f"target_latency_speedup needs a strategy that goes block by block: {', '.join(STEPWISE_STRATEGIES)}"
            )

    def check_model(self, total: int) -> None:
        """Raises a `ValueError` where a model of `total` blocks has too few for what is to be removed."""
        protected = self.num_protected_first_blocks + self.num_protected_last_blocks
        removable = max(total - protected, 0)
        for name in ("num_prefill_blocks", "num_decode_blocks"):
            if getattr(self, name) > removable:
                raise ValueError(
                    f"{name} is {getattr(self, name)}, but of the model's {total} blocks only {removable} may be "
                    f"removed ({protected} are protected)"
                )
            if getattr(self, name) >= total:
                raise ValueError(f"{name} is {getattr(self, name)}, but the model has {total} blocks; one has to stay")


def _check_count(name: str, value: int, least: int = 0) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
