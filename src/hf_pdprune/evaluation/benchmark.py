"""SpeedBenchmark: TTFT and TPOT of a pair of stages against the dense model, interleaved in one run, and KV bytes."""

import copy
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import Cache, CompileConfig, DynamicCache, StaticCache

from ..adapters import adapter_layers
from ..inference import DecodeStage, PrefillStage
from ..kv import KVPayload, StaticDecodeCache, TokenAwareCache
from ..shortened_config import context_length
from .benchmark_config import BenchmarkConfig
from .environment import describe_environment
from .parameter_share import parameter_shares
from .peak_memory import PeakMemory, cache_tensors
from .roofline import roofline


class SpeedBenchmark:
    """
    Times a pair of stages and the dense model in turns: a prefill of the one, then of the other; a decode step of the
    one, then of the other. What else the machine does meets both alike, and medians leave out what meets only one.

    TTFT is the time from the prompt's ids to the first token, for the pair with its payload made, and where decode
    generates that token, read; TPOT that of one greedy decode step on the cache of the prompt, the pair's made from
    the payload. Latency and throughput of an answer follow from both; time on a link is not in them.

    Args:
        dense_model ([`~transformers.PreTrainedModel`]): The dense model.
        prefill ([`PrefillStage`]): The prefill stage, best a checkpoint (a view of the dense model counts the same).
        decode ([`DecodeStage`]): The decode stage.
        config ([`BenchmarkConfig`], *optional*): The options.

    Raises:
        `ValueError`: If a prompt with what is generated is longer than the model's context, or if the dense model has
            adapters.

    Example:

    ```python
    result = SpeedBenchmark(dense_model, *load_stages("outputs/demo"), BenchmarkConfig(prompt_tokens=[1024])).run()
    result["speed"]["ttft_ratio"]
    ```
    """

    def __init__(
        self,
        dense_model: nn.Module,
        prefill: PrefillStage,
        decode: DecodeStage,
        config: BenchmarkConfig | None = None,
    ):
        if adapter_layers(dense_model):
            raise ValueError("the dense model has adapters, which cost time: load it without them")
        self.dense_model = dense_model.eval()
        self.prefill = prefill
        self.decode = decode
        self.config = config or BenchmarkConfig()
        self.device = dense_model.get_input_embeddings().weight.device
        self.vocab_size = dense_model.config.get_text_config(decoder=True).vocab_size
        longest = max(self.config.prompt_tokens) + self._decode_steps + 1
        context = context_length(dense_model.config)
        if context is not None and longest > context:
            raise ValueError(
                f"prompt_tokens: {max(self.config.prompt_tokens)} and {self._decode_steps + 1} generated tokens are "
                f"more than the model's context, {context}"
            )

    @property
    def _decode_steps(self) -> int:
        return self.config.decode_tokens + 4 * self.config.warmup

    @property
    def _meets_lengths_first(self) -> bool:
        """
        Whether all steps are done once before those that are timed. On accelerators attention may be planned anew for
        every number of tokens held (cuDNN's is), and blocks of the pair hold different ones; whoever serves has met
        them all.
        """
        return self.device.type != "cpu" and not self.config.compile_decode

    @torch.no_grad()
    def run(self) -> dict[str, Any]:
        """
        Returns:
            `dict[str, Any]`: `cases`, one per prompt length and batch size, each with `ttft` and `tpot` (seconds of
            `dense` and `pruned`: median, quartiles; their `ratio`, pruned / dense), `latency` (seconds) and
            `throughput` (tokens per second of all rows) of an answer, `memory` (peak bytes by stage, see
            [`PeakMemory`]; `None` where a CPU has no turn for it: without warm-up, and for compiled steps), `kv` and
            `roofline` (see [`roofline`]); `shares` (see [`parameter_shares`]); `environment`; and for the first case,
            as `results.json` has them, `speed` and `kv`.
        """
        shares = parameter_shares(self.dense_model, self.prefill, self.decode)
        sizes = [(tokens, rows) for tokens in self.config.prompt_tokens for rows in self.config.batch_sizes]
        per_case = self.config.repeats + self.config.warmup + self._decode_steps
        with tqdm(total=len(sizes) * per_case, desc="Benchmark", unit="turn") as progress, steady_process():
            cases = [self._case(tokens, rows, progress) for tokens, rows in sizes]
        for case in cases:
            for what, stage, limit in (("ttft", "prefill", "flops"), ("tpot", "decode", "bytes")):
                saved, removed = 1 - case[what]["ratio"], case["roofline"][f"{stage}_{limit}_removed"]
                share = shares[f"{stage}_share_removed"]
                # None, and not infinity, where nothing was removed: JSON has no infinity.
                case[what]["time_saved_over_share"] = saved / share if share > 0 else None
                case[what][f"time_saved_over_{limit}"] = saved / removed if removed > 0 else None
        first = cases[0]
        return {
            "speed": {
                "ttft_ratio": first["ttft"]["ratio"],
                "tpot_ratio": first["tpot"]["ratio"],
                **shares,
                "ttft_time_saved_over_share": first["ttft"]["time_saved_over_share"],
                "tpot_time_saved_over_share": first["tpot"]["time_saved_over_share"],
                "prefill_flops_removed": first["roofline"]["prefill_flops_removed"],
                "decode_bytes_removed": first["roofline"]["decode_bytes_removed"],
                "prompt_tokens": first["prompt_tokens"],
                "batch_size": first["batch_size"],
            },
            "kv": {"prompt_tokens": first["prompt_tokens"], **first["kv"]},
            "cases": cases,
            "shares": shares,
            "environment": {
                **describe_environment(self.dense_model),
                "compiled_decode": self.config.compile_decode,
                "first_token": self.config.first_token,
            },
        }

    def _case(self, prompt_tokens: int, batch_size: int, progress: tqdm) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(self.config.seed)
        prompt_ids = torch.randint(self.vocab_size, (batch_size, prompt_tokens), generator=generator).to(self.device)
        progress.set_postfix(prompt_tokens=prompt_tokens, batch_size=batch_size)

        # Time to first token
        memory = {"prefill": {"dense": PeakMemory(self.dense_model), "pruned": PeakMemory(self.prefill.model)}}
        ttft: dict[str, list[float]] = {"dense": [], "pruned": []}
        for turn in range(-self.config.warmup, self.config.repeats):
            cache, payload = None, None  # freed before the next ones are made
            for name in in_turns(turn):
                gc.collect()
                with self._watched(memory["prefill"][name], turn):
                    if name == "dense":
                        seconds, cache, first_token = self._timed(self._dense_prefill, prompt_ids)
                    else:
                        seconds, payload, pruned_token = self._timed(self._pruned_prefill, prompt_ids)
                if turn >= 0:
                    ttft[name].append(seconds)
            progress.update()
        kv = kv_bytes(payload, self.prefill)

        # Time per output token
        payload = payload.prompt_to(self.decode.model.device)
        pruned_token = pruned_token.to(self.decode.model.device)
        tokens = {"dense": first_token, "pruned": pruned_token}
        # Columns of the prompts' ids so far: with strides of their own the first step would be compiled for itself.
        tokens = {name: ids.clone(memory_format=torch.contiguous_format) for name, ids in tokens.items()}
        if self._meets_lengths_first:
            with self._pair_cache(payload) as pruned_cache:
                models = {
                    "dense": (self.dense_model, appendable_copy(cache)),
                    "pruned": (self.decode.module, pruned_cache),
                }
                self._steps(prompt_ids, models, tokens)
        with self._pair_cache(payload) as pruned_cache:
            payload = None  # entries that both hold would not be freed when the cache replaces them
            models = {"dense": (self.dense_model, cache), "pruned": (self.decode.module, pruned_cache)}
            if self.config.compile_decode:
                models = self._compiled(cache, pruned_cache)
            held = {"dense": cache_bytes(cache), "pruned": cache_bytes(pruned_cache)}
            memory["decode"] = {
                "dense": PeakMemory(self.dense_model, models["dense"][1]),
                "pruned": PeakMemory(self.decode.model, models["pruned"][1]),
            }
            tpot = self._steps(prompt_ids, models, tokens, memory["decode"], progress)
        times = {"ttft": compared(ttft), "tpot": compared(tpot)}
        peaks = {stage: {name: peak.nbytes for name, peak in both.items()} for stage, both in memory.items()}
        return {
            "prompt_tokens": prompt_tokens,
            "batch_size": batch_size,
            **times,
            **answer_speed(times, self.config.answer_tokens, batch_size),
            "memory": peaks,
            "kv": {**kv, "bytes_held": held},
            "roofline": roofline(self.dense_model, self.prefill, self.decode, prompt_tokens, batch_size, held),
        }

    def _pair_cache(self, payload: KVPayload) -> TokenAwareCache:
        """What decode goes on with from the first token on, a context that takes its hooks away again."""
        return self._read(payload)[0]

    def _read(self, payload: KVPayload) -> tuple[TokenAwareCache, torch.LongTensor]:
        """The cache of a payload, in which all of the prompt has been read, and the first token."""
        with self.decode.active():
            cache = TokenAwareCache.from_payload(
                payload, self.decode.plan, self.decode.model, self.decode.running_blocks
            )
            if payload.last_token is None:
                return cache, payload.first_token
            return cache, self._step(self.decode.module, cache, payload.last_token, None)

    def _steps(
        self,
        prompt_ids: torch.LongTensor,
        models: dict[str, tuple[Callable, Cache]],
        tokens: dict[str, torch.LongTensor],
        peaks: dict[str, PeakMemory] | None = None,
        progress: tqdm | None = None,
    ) -> dict[str, list[float]]:
        """Seconds of decode steps in turns, those of the warm-up left out."""
        seconds: dict[str, list[float]] = {name: [] for name in models}
        tokens = dict(tokens)
        batch_size, prompt_tokens = prompt_ids.shape
        for turn in range(-4 * self.config.warmup, self.config.decode_tokens):
            length = prompt_tokens + 4 * self.config.warmup + turn + 1
            mask = None  # nothing is padded
            if not self.config.compile_decode:
                mask = torch.ones((batch_size, length), dtype=torch.long, device=self.device)
            for name in in_turns(turn):
                # Where the stage is a view of the dense model, the dense steps must not see it.
                is_stage = self.decode.active() if name == "pruned" else nullcontext()
                watched = nullcontext()
                if peaks is not None:
                    watched = self._watched(peaks[name], turn, self.config.compile_decode)
                with is_stage, watched:
                    taken, tokens[name] = self._timed(self._step, *models[name], tokens[name], mask)
                if turn >= 0:
                    seconds[name].append(taken)
            if progress is not None:
                progress.update()
        return seconds

    def _compiled(self, cache: Cache, pruned_cache: TokenAwareCache) -> dict[str, tuple[Callable, Cache]]:
        """Compiled models, as `generate` compiles them, with what the caches hold in tensors of one shape."""
        # Anew in each case: dynamo gives up after a few versions of one function, or takes sizes for variable.
        torch.compiler.reset()
        static = StaticCache(config=self.dense_model.config, max_cache_len=cache.get_seq_length() + self._decode_steps)
        for index, layer in enumerate(cache.layers):
            static.update(layer.keys, layer.values, index)
        pruned = StaticDecodeCache(pruned_cache, self.decode.model, self._decode_steps)
        config = CompileConfig(fullgraph=True)
        return {
            "dense": (self.dense_model.get_compiled_call(config), static),
            "pruned": (self.decode.model.get_compiled_call(config), pruned),
        }

    def _watched(self, peak: PeakMemory, turn: int, is_compiled: bool = False) -> AbstractContextManager:
        """
        The peak's context, in every turn on an accelerator. On a CPU it takes time, so that only the last turn of the
        warm-up has it, and compiled steps, into which it cannot look, have none.
        """
        is_free = self.device.type != "cpu"
        return peak if is_free or (turn == -1 and not is_compiled) else nullcontext()

    def _timed(self, function: Callable, *args: Any) -> tuple:
        """Seconds that the function takes, and what it returns."""
        synchronize(self.device)
        start = time.perf_counter()
        result = function(*args)
        synchronize(self.device)
        return time.perf_counter() - start, *(result if isinstance(result, tuple) else (result,))

    def _dense_prefill(self, prompt_ids: torch.LongTensor) -> tuple[Cache, torch.LongTensor]:
        cache = DynamicCache(config=self.dense_model.config)
        mask = torch.ones_like(prompt_ids)
        # By way of generate, as the prefill stage does it.
        sequences = self.dense_model.generate(
            input_ids=prompt_ids, attention_mask=mask, past_key_values=cache, max_new_tokens=1, do_sample=False
        )
        return cache, sequences[:, -1:]

    def _pruned_prefill(self, prompt_ids: torch.LongTensor) -> tuple[KVPayload, torch.LongTensor]:
        first_token = self.config.first_token
        payload = self.prefill(prompt_ids, torch.ones_like(prompt_ids), first_token=first_token, do_sample=False)
        if first_token == "prefill":
            return payload, payload.first_token
        payload = payload.prompt_to(self.decode.model.device)
        cache, token = self._read(payload)
        cache.close()
        return payload, token

    def _step(
        self, model: Callable, cache: Cache, tokens: torch.LongTensor, mask: torch.LongTensor | None
    ) -> torch.LongTensor:
        output = model(input_ids=tokens, attention_mask=mask, past_key_values=cache, use_cache=True)
        return output.logits[:, -1:].argmax(dim=-1)


def appendable_copy(cache: Cache) -> Cache:
    """A `DynamicCache` that shares what is held, and grows by itself: its layers concatenate, and change no tensor."""
    shared = copy.copy(cache)
    shared.layers = [copy.copy(layer) for layer in cache.layers]
    return shared


def in_turns(turn: int) -> tuple[str, str]:
    """Who comes first changes from turn to turn, so that neither always follows the other."""
    return ("dense", "pruned") if turn % 2 == 0 else ("pruned", "dense")


def compared(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """
    Median, quartiles and number of the dense and of the pruned times, and of their ratio, pruned / dense: the median
    over turns, whose two times were measured next to each other, so that a machine that gets slower or faster while
    the benchmark runs does not shift it.
    """
    ratios = [pruned / dense for dense, pruned in zip(seconds["dense"], seconds["pruned"], strict=True)]
    result = {name: summary(values) for name, values in seconds.items()}
    return {**result, "ratio": statistics.median(ratios), "ratio_quartiles": summary(ratios)["quartiles"]}


def answer_speed(times: dict[str, Any], answer_tokens: int, batch_size: int) -> dict[str, Any]:
    """
    `latency` (seconds to the end of an answer: TTFT and as many TPOT as follow) and `throughput` (tokens of all rows
    per second of it) of the dense model and the pair, from the medians, with `answer_tokens` beside them.
    """
    latency = {
        name: times["ttft"][name]["median"] + (answer_tokens - 1) * times["tpot"][name]["median"]
        for name in ("dense", "pruned")
    }
    throughput = {name: batch_size * answer_tokens / seconds for name, seconds in latency.items()}
    return {
        "latency": {**latency, "ratio": latency["pruned"] / latency["dense"], "answer_tokens": answer_tokens},
        "throughput": {**throughput, "ratio": throughput["pruned"] / throughput["dense"]},
    }


def cache_bytes(cache: Cache) -> int:
    """Bytes of keys and values that a cache holds."""
    return sum(tensor.numel() * tensor.element_size() for tensor in cache_tensors(cache))


def summary(values: list[float]) -> dict[str, Any]:
    """Median, quartiles and number of measurements."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": median, "quartiles": [low, high], "measurements": len(values)}


def kv_bytes(payload: KVPayload, prefill: PrefillStage) -> dict[str, Any]:
    """
    Bytes of a hand-over beside those of the dense model's KV entries: `bytes_sent` is all of the payload, header and
    prompt included, `bytes_kv` its keys and values. `ratio_by_blocks` and `ratio_by_tokens` say how the plan comes to
    fewer entries.
    """
    reduction = prefill.plan.kv_reduction(payload.prompt_tokens)
    sent = payload.nbytes
    return {
        "bytes_dense": payload.nbytes_dense,
        "bytes_sent": sent,
        "bytes_kv": payload.nbytes_kv,
        "ratio": payload.nbytes_dense / sent,
        "ratio_by_blocks": reduction["blocks"],
        "ratio_by_tokens": reduction["tokens"],
    }


@torch.no_grad()
def kv_bytes_of_prompt(prefill: PrefillStage, prompt_tokens: int) -> dict[str, Any]:
    """[`kv_bytes`] of what a stage hands over of a prompt of so many tokens, whatever they are."""
    prompt = torch.zeros((1, prompt_tokens), dtype=torch.long, device=prefill.model.device)
    return kv_bytes(prefill.forward(prompt, torch.ones_like(prompt)), prefill)


def synchronize(device: torch.device) -> None:
    """Waits until the accelerator has done what it was given; nothing to do for a CPU."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@contextmanager
def steady_process() -> Iterator[None]:
    """Within this context the garbage collector does not run, so that no measurement pays for another's garbage."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
