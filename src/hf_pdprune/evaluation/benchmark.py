"""SpeedBenchmark: TTFT, TPOT and KV bytes of a pair of stages beside those of the dense model."""

import gc
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from accelerate import PartialState
from torch import nn
from tqdm.auto import tqdm
from transformers import DynamicCache

from ..blocks import get_blocks
from ..inference import DecodeStage, PrefillStage
from ..kv import KVPayload, TokenAwareCache


@dataclass
class BenchmarkConfig:
    """
    Options of [`SpeedBenchmark`].

    Parameters:
        prompt_tokens (`int`, *optional*, defaults to `1024`):
            Length of the prompts.
        batch_size (`int`, *optional*, defaults to `1`):
            Prompts that are read and continued at once.
        new_tokens (`int`, *optional*, defaults to `24`):
            Decode steps that are timed in each repetition.
        repetitions (`int`, *optional*, defaults to `5`):
            Counted repetitions; medians are reported.
        warmup (`int`, *optional*, defaults to `1`):
            Repetitions before those, which do not count.
    """

    prompt_tokens: int = field(default=1024, metadata={"help": "Length of the prompts."})
    batch_size: int = field(default=1, metadata={"help": "Prompts that are read and continued at once."})
    new_tokens: int = field(default=24, metadata={"help": "Decode steps that are timed in each repetition."})
    repetitions: int = field(default=5, metadata={"help": "Counted repetitions; medians are reported."})
    warmup: int = field(default=1, metadata={"help": "Repetitions before those, which do not count."})

    def __post_init__(self):
        for name in ("prompt_tokens", "batch_size", "new_tokens", "repetitions"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.warmup < 0:
            raise ValueError(f"warmup must not be negative, got {self.warmup}")


class SpeedBenchmark:
    """
    Times the dense model and the pruned pair in turn, in one process: what slows the machine down slows both, so their
    ratio can be trusted where the times cannot. TTFT is the time from the prompt to the first token (and, for the
    prefill stage, the payload); TPOT is the time of one decode step on the cache of that prompt.

    Args:
        dense ([`~transformers.PreTrainedModel`]): The dense model.
        prefill ([`PrefillStage`]): Prefill stage, best an exported checkpoint.
        decode ([`DecodeStage`]): Decode stage, best an exported checkpoint.
        config ([`BenchmarkConfig`], *optional*): The options.

    Raises:
        `ValueError`: If the prompts and new tokens are longer than the model's context.
    """

    def __init__(
        self, dense: nn.Module, prefill: PrefillStage, decode: DecodeStage, config: BenchmarkConfig | None = None
    ):
        self.dense, self.prefill, self.decode = dense, prefill, decode
        self.config = config or BenchmarkConfig()
        text_config = dense.config.get_text_config(decoder=True)
        context = getattr(text_config, "max_position_embeddings", None)
        needed = self.config.prompt_tokens + self.config.new_tokens
        if context is not None and needed > context:
            raise ValueError(
                f"a prompt of {self.config.prompt_tokens} tokens and {self.config.new_tokens} new ones are longer than "
                f"the model's context of {context}"
            )
        generator = torch.Generator().manual_seed(0)
        shape = (self.config.batch_size, self.config.prompt_tokens)
        prompt = torch.randint(1, text_config.vocab_size, shape, generator=generator)
        self.prompt = prompt.to(dense.get_input_embeddings().weight.device)
        self.mask = torch.ones_like(self.prompt)

    @torch.no_grad()
    def run(self) -> dict[str, Any]:
        """
        Returns:
            `dict`: `speed` and `kv` as results.json has them, `seconds` with medians and ranges, `environment`.
        """
        dense_cache, payload = self._dense_prefill(), self._pruned_prefill()
        sides: dict[str, Callable[[], float]] = {
            "dense_ttft": lambda: self._timed(self._dense_prefill),
            "pruned_ttft": lambda: self._timed(self._pruned_prefill),
            "dense_tpot": lambda: self._dense_decode(dense_cache),
            "pruned_tpot": lambda: self._pruned_decode(payload),
        }
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        rounds = range(self.config.warmup + self.config.repetitions)
        gc.collect()
        gc.disable()
        try:
            for number in tqdm(rounds, desc="Benchmark", unit="round", disable=not PartialState().is_main_process):
                # Each side goes first in every other round, so that neither always follows a warmer cache.
                for name in list(sides) if number % 2 else [*sides][::-1]:
                    took = sides[name]()
                    if number >= self.config.warmup:
                        seconds[name].append(took)
        finally:
            gc.enable()
        return {
            "speed": self._speed(seconds),
            "kv": self._kv(payload),
            "seconds": {name: _summary(values) for name, values in seconds.items()},
            "environment": self._environment(),
        }

    # What is timed

    def _timed(self, work: Callable[[], Any]) -> float:
        self._synchronize()
        begun = time.perf_counter()
        work()
        self._synchronize()
        return time.perf_counter() - begun

    def _dense_prefill(self) -> DynamicCache:
        cache = DynamicCache(config=self.dense.config)
        output = self.dense(input_ids=self.prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
        output.logits[:, -1].argmax(dim=-1)
        return cache

    def _pruned_prefill(self) -> KVPayload:
        payload = self.prefill.forward(self.prompt, self.mask)
        payload.first_token = payload.first_logits.argmax(dim=-1, keepdim=True)
        return payload

    def _dense_decode(self, cache: DynamicCache) -> float:
        took = self._decode_steps(self.dense, cache)
        cache.crop(-self.config.new_tokens)
        return took

    def _pruned_decode(self, payload: KVPayload) -> float:
        decode = self.decode
        with decode.active():
            with TokenAwareCache.from_payload(payload, decode.plan, decode.model, decode.running_blocks) as cache:
                return self._decode_steps(decode.model, cache)

    def _decode_steps(self, model: nn.Module, cache: Any) -> float:
        """Seconds per token of greedy decoding on `cache`."""
        token = self.prompt[:, :1]

        def steps() -> None:
            nonlocal token
            for _ in range(self.config.new_tokens):
                output = model(input_ids=token, past_key_values=cache, use_cache=True)
                token = output.logits[:, -1].argmax(dim=-1, keepdim=True)

        return self._timed(steps) / self.config.new_tokens

    def _synchronize(self) -> None:
        if self.prompt.device.type == "cuda":
            torch.cuda.synchronize(self.prompt.device)

    # What is reported

    def _speed(self, seconds: dict[str, list[float]]) -> dict[str, float]:
        shares = parameter_shares(self.dense, self.prefill, self.decode)
        speed: dict[str, float] = {}
        for figure, share in (("ttft", "prefill_share_removed"), ("tpot", "decode_share_removed")):
            # The ratio round by round: a slow spell of the machine falls on both sides of it.
            pairs = zip(seconds[f"pruned_{figure}"], seconds[f"dense_{figure}"], strict=True)
            speed[f"{figure}_ratio"] = statistics.median(pruned / dense for pruned, dense in pairs)
            speed[share] = shares[share]
            if shares[share] > 0:
                speed[f"{figure}_saved_of_share"] = (1 - speed[f"{figure}_ratio"]) / shares[share]
        return speed

    def _kv(self, payload: KVPayload) -> dict[str, float]:
        reduction = self.decode.plan.kv_reduction(self.config.prompt_tokens)
        return {
            "prompt_tokens": self.config.prompt_tokens,
            "bytes_dense": payload.nbytes_dense,
            "bytes_sent": payload.nbytes,
            "ratio": payload.nbytes_dense / payload.nbytes,
            "ratio_by_blocks": reduction["blocks"],
            "ratio_by_tokens": reduction["tokens"],
        }

    def _environment(self) -> dict[str, Any]:
        device = self.prompt.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU"
        return {
            "device": name,
            "threads": torch.get_num_threads(),
            "dtype": str(self.dense.dtype).removeprefix("torch."),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "prompt_tokens": self.config.prompt_tokens,
            "batch_size": self.config.batch_size,
            "new_tokens": self.config.new_tokens,
            "repetitions": self.config.repetitions,
        }


def parameter_shares(dense: nn.Module, prefill: PrefillStage, decode: DecodeStage) -> dict[str, float]:
    """
    What each stage saves at most: the share of block parameters that prefill does without, and the share of block and
    LM-head parameters that decode does without (it reads all of these for every token).
    """
    blocks = [sum(p.numel() for p in block.parameters()) for block in get_blocks(dense)]
    head = dense.get_output_embeddings().weight.numel()

    def missing(stage: PrefillStage | DecodeStage) -> int:
        return sum(blocks[number] for number in stage.plan.stage(stage.name).missing_blocks)

    return {
        "prefill_share_removed": missing(prefill) / sum(blocks),
        "decode_share_removed": missing(decode) / (sum(blocks) + head),
    }


def _summary(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}
