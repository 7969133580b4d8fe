"""BenchmarkConfig: the options of SpeedBenchmark."""

from dataclasses import dataclass, field

from ..pair_layout import STAGES, check_first_token


@dataclass
class BenchmarkConfig:
    """
    Options of [`SpeedBenchmark`].

    Parameters:
        prompt_tokens (`list[int]`, *optional*, defaults to `[1024]`):
            Lengths of the prompts.
        batch_sizes (`list[int]`, *optional*, defaults to `[1]`):
            Prompts per batch. Every length is measured with every batch size.
        decode_tokens (`int`, *optional*, defaults to `32`):
            Decode steps that are timed, one token each.
        answer_tokens (`int`, *optional*, defaults to `128`):
            Length of the answer for which latency and throughput are given, from the medians of first and further
            tokens.
        repeats (`int`, *optional*, defaults to `12`):
            Prefills that are timed.
        warmup (`int`, *optional*, defaults to `1`):
            Prefills, and four times as many decode steps, that run before and are not counted.
        compile_decode (`bool`, *optional*, defaults to `False`):
            Whether decode steps are compiled (`torch.compile`), those of the dense model on a `StaticCache`, the
            pair's on a [`StaticDecodeCache`]. It takes minutes that are not counted.
        first_token (`str`, *optional*, defaults to `"prefill"`):
            Which stage of the pair generates the first token. With `"decode"`, TTFT has the decode step in it that
            reads the prompt's last token.
        seed (`int`, *optional*, defaults to `0`):
            Of the random prompts.
    """

    prompt_tokens: list[int] = field(default_factory=lambda: [1024], metadata={"help": "Lengths of the prompts."})
    batch_sizes: list[int] = field(
        default_factory=lambda: [1],
        metadata={"help": "Prompts per batch. Every length is measured with every batch size."},
    )
    decode_tokens: int = field(default=32, metadata={"help": "Decode steps that are timed, one token each."})
    answer_tokens: int = field(
        default=128, metadata={"help": "Length of the answer for which latency and throughput are given."}
    )
    repeats: int = field(default=12, metadata={"help": "Prefills that are timed."})
    warmup: int = field(
        default=1, metadata={"help": "Prefills, and four times as many decode steps, that run before, uncounted."}
    )
    compile_decode: bool = field(
        default=False, metadata={"help": "Compile decode steps, on caches whose shapes stay the same."}
    )
    first_token: str = field(
        default="prefill",
        metadata={
            "help": "Which stage of the pair generates the first token; decode's step for it is part of TTFT.",
            "choices": list(STAGES),
        },
    )
    seed: int = field(default=0, metadata={"help": "Of the random prompts."})

    def __post_init__(self):
        check_first_token(self.first_token)
        for name in ("prompt_tokens", "batch_sizes"):
            values = getattr(self, name)
            if not values or any(isinstance(v, bool) or not isinstance(v, int) or v < 1 for v in values):
                raise ValueError(f"{name} must be positive whole numbers, got {values!r}")
        for name, least in (("decode_tokens", 1), ("answer_tokens", 1), ("repeats", 1), ("warmup", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.compile_decode and not self.warmup:
            raise ValueError("compile_decode needs a warmup of at least 1, in which steps are compiled")
