import gc
from functools import partial

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import CompileConfig, DynamicCache, StaticCache

from hf_pdprune.evaluation import BenchmarkConfig, SpeedBenchmark, benchmark
from hf_pdprune.evaluation.benchmark import compared, in_turns, steady_process
from hf_pdprune.evaluation.result_table import ResultTable
from hf_pdprune.hub import build_stage
from hf_pdprune.inference import DecodeStage, PrefillStage
from hf_pdprune.kv import StaticDecodeCache, TokenAwareCache
from hf_pdprune.plan import KVPlan, PruningPlan, StagePlan


@pytest.fixture
def plan(tiny_llama):
    kv = KVPlan((0, 3), first_tokens=2, last_tokens=6)
    return PruningPlan.empty(tiny_llama, "tiny", prefill=StagePlan((2,)), decode=StagePlan((2, 4)), kv=kv)


def small(**values):
    return BenchmarkConfig(
        **{"prompt_tokens": [32], "decode_tokens": 3, "answer_tokens": 10, "repeats": 2, "warmup": 1} | values
    )


@pytest.mark.parametrize("as_checkpoints", [True, False])
def test_result_is_complete(tiny_llama, plan, as_checkpoints):
    stages = {"prefill": PrefillStage, "decode": DecodeStage}
    pair = [
        kind(build_stage(tiny_llama, plan, stage) if as_checkpoints else tiny_llama, plan)
        for stage, kind in stages.items()
    ]
    result = SpeedBenchmark(tiny_llama, *pair, small(prompt_tokens=[32, 16], batch_sizes=[1, 2])).run()
    sizes = [(case["prompt_tokens"], case["batch_size"]) for case in result["cases"]]
    assert sizes == [(32, 1), (32, 2), (16, 1), (16, 2)]
    for case in result["cases"]:
        for what, number in (("ttft", 2), ("tpot", 3)):
            for name in ("dense", "pruned"):
                times = case[what][name]
                assert 0 < times["quartiles"][0] <= times["median"] <= times["quartiles"][1]
                assert times["measurements"] == number
            assert case[what]["ratio_quartiles"][0] <= case[what]["ratio"] <= case[what]["ratio_quartiles"][1]
        seconds = case["ttft"]["dense"]["median"] + 9 * case["tpot"]["dense"]["median"]
        assert case["latency"]["dense"] == pytest.approx(seconds) and case["latency"]["answer_tokens"] == 10
        assert case["throughput"]["dense"] == pytest.approx(case["batch_size"] * 10 / seconds)
        assert case["throughput"]["ratio"] == pytest.approx(1 / case["latency"]["ratio"])
        for stage, peak in case["memory"].items():
            assert peak["dense"] > 4 * sum(parameter.numel() for parameter in tiny_llama.parameters()), stage
        held = case["kv"]["bytes_held"]
        assert (held["dense"], held["pruned"]) == (case["kv"]["bytes_dense"], case["kv"]["bytes_kv"])
        for what, limit in (("ttft", "prefill_flops"), ("tpot", "decode_bytes")):
            saved = (1 - case[what]["ratio"]) / case["roofline"][f"{limit}_removed"]
            assert case[what][f"time_saved_over_{limit.split('_')[1]}"] == pytest.approx(saved)
    first, speed = result["cases"][0], result["speed"]
    assert speed["ttft_ratio"] == first["ttft"]["ratio"] and speed["tpot_ratio"] == first["tpot"]["ratio"]
    # One and two of six equal blocks, beside an LM head.
    block = sum(parameter.numel() for parameter in tiny_llama.model.layers[0].parameters())
    assert speed["prefill_share_removed"] == pytest.approx(1 / 6)
    assert speed["decode_share_removed"] == pytest.approx(2 * block / (6 * block + 256 * 64))
    saved = (1 - speed["tpot_ratio"]) / speed["decode_share_removed"]
    assert speed["tpot_time_saved_over_share"] == pytest.approx(saved)
    assert result["environment"]["dtype"] == "float32" and result["environment"]["threads"] >= 1


def test_bytes_are_those_of_the_payload(tiny_llama, plan):
    kv = SpeedBenchmark(tiny_llama, PrefillStage(tiny_llama, plan), DecodeStage(tiny_llama, plan), small()).run()["kv"]
    per_token = 2 * 2 * 16 * 4  # keys and values, 2 heads of 16 numbers, float32
    assert kv["prompt_tokens"] == 32
    assert kv["bytes_dense"] == 6 * 32 * per_token
    assert kv["bytes_kv"] == (2 * 32 + 2 * 8) * per_token
    assert kv["bytes_sent"] > kv["bytes_kv"] and kv["ratio"] == kv["bytes_dense"] / kv["bytes_sent"]
    assert kv["ratio_by_blocks"] * kv["ratio_by_tokens"] == pytest.approx(kv["bytes_dense"] / kv["bytes_kv"])


def test_peaks_have_the_cache_in_them(tiny_llama, plan):
    pair = [kind(build_stage(tiny_llama, plan, kind.name), plan) for kind in (PrefillStage, DecodeStage)]
    (case,) = SpeedBenchmark(tiny_llama, *pair, small(prompt_tokens=[480], batch_sizes=[4])).run()["cases"]
    held = case["kv"]["bytes_held"]
    for name, model in (("dense", tiny_llama), ("pruned", pair[1].model)):
        parameters = 4 * sum(parameter.numel() for parameter in model.parameters())
        layer = held["dense"] / 6
        assert parameters + held[name] < case["memory"]["decode"][name] < parameters + held[name] + 2 * layer
    # Without a warm-up a CPU has no turn for it, since a step that is timed must not be followed.
    (case,) = SpeedBenchmark(tiny_llama, *pair, small(warmup=0)).run()["cases"]
    assert case["memory"]["prefill"] == case["memory"]["decode"] == {"dense": None, "pruned": None}
    assert ResultTable.of_speed_cases([case]).rows[1][-1] == "not measured"


def test_dense_steps_run_every_block_also_where_the_stage_is_a_view_of_the_dense_model(tiny_llama, plan, monkeypatch):
    ran = {}
    step = SpeedBenchmark._step

    def watched(self, model, cache, *args):
        calls = []
        handles = [layer.mlp.register_forward_hook(lambda *_: calls.append(1)) for layer in blocks]
        tokens = step(self, model, cache, *args)
        for handle in handles:
            handle.remove()
        ran.setdefault(type(cache), set()).add(len(calls))
        return tokens

    blocks = list(tiny_llama.model.layers)
    monkeypatch.setattr(SpeedBenchmark, "_step", watched)
    SpeedBenchmark(tiny_llama, PrefillStage(tiny_llama, plan), DecodeStage(tiny_llama, plan), small()).run()
    assert ran == {DynamicCache: {6}, TokenAwareCache: {4}}


def test_on_an_accelerator_every_length_has_been_met_before_a_step_is_timed(tiny_llama, plan, monkeypatch):
    lengths = {DynamicCache: [], TokenAwareCache: []}
    step = SpeedBenchmark._step

    def watched(self, model, cache, tokens, mask):
        lengths[type(cache)].append((cache.get_seq_length(), mask.shape[1], int(tokens)))
        return step(self, model, cache, tokens, mask)

    monkeypatch.setattr(SpeedBenchmark, "_step", watched)
    monkeypatch.setattr(SpeedBenchmark, "_meets_lengths_first", True)
    config = small(prompt_tokens=[20], batch_sizes=[1])
    (case,) = SpeedBenchmark(tiny_llama, PrefillStage(tiny_llama, plan), DecodeStage(tiny_llama, plan), config).run()[
        "cases"
    ]
    for met in lengths.values():
        first, second = met[: len(met) // 2], met[len(met) // 2 :]
        assert first == second  # the same tokens on the same caches
        assert [before for before, _, _ in first] == list(range(20, 20 + len(first)))
    held = case["kv"]["bytes_held"]
    assert held == {"dense": case["kv"]["bytes_dense"], "pruned": case["kv"]["bytes_kv"]}


def test_where_decode_generates_the_first_token_its_step_is_part_of_ttft(tiny_llama, plan, monkeypatch):
    pair = [kind(build_stage(tiny_llama, plan, kind.name), plan) for kind in (PrefillStage, DecodeStage)]
    benchmark, calls = SpeedBenchmark(tiny_llama, *pair, small(first_token="decode")), []
    step, timed = SpeedBenchmark._step, SpeedBenchmark._timed

    def watched_step(self, model, cache, tokens, mask):
        calls.append(("step", cache.get_seq_length(), tokens[:, 0].tolist()))
        return step(self, model, cache, tokens, mask)

    def watched_timing(self, function, *args):
        calls.append(("timed", function.__name__))
        return timed(self, function, *args)

    monkeypatch.setattr(SpeedBenchmark, "_step", watched_step)
    monkeypatch.setattr(SpeedBenchmark, "_timed", watched_timing)
    result = benchmark.run()
    last = torch.randint(256, (1, 32), generator=torch.Generator().manual_seed(0))[:, -1].tolist()
    at = calls.index(("timed", "_pruned_prefill"))
    assert calls[at + 1] == ("step", 31, last)
    # Both caches hold all of the prompt where decode steps begin, and go on from what their own model said.
    prefill, decode = pair
    prompt = torch.randint(256, (1, 32), generator=torch.Generator().manual_seed(0))
    wanted = decode.generate(prefill(prompt, first_token="decode"), max_new_tokens=1, do_sample=False)[:, -1].tolist()
    steps = [call for call in calls[calls.index(("timed", "watched_step")) :] if call[0] == "step"]
    first_steps = [step for step in steps if step[1] == 32]
    assert len(first_steps) == 2 and first_steps[1][2] == wanted
    assert result["environment"]["first_token"] == "decode"


def test_nothing_removed_has_no_saved_over_share(tiny_llama):
    plan = PruningPlan.empty(tiny_llama)
    result = SpeedBenchmark(tiny_llama, PrefillStage(tiny_llama, plan), DecodeStage(tiny_llama, plan), small()).run()
    assert result["speed"]["ttft_time_saved_over_share"] is None
    assert result["cases"][0]["tpot"]["time_saved_over_bytes"] is None


def test_ratio_does_not_follow_a_machine_that_slows_down():
    dense = [1.0, 1.0, 4.0, 4.0, 4.0]
    pruned = [0.8, 0.8, 3.2, 3.2, 3.2]
    assert compared({"dense": dense, "pruned": pruned})["ratio"] == pytest.approx(0.8)
    assert {in_turns(turn)[0] for turn in range(2)} == {"dense", "pruned"}


def test_garbage_collector_is_as_before():
    with pytest.raises(KeyError):
        with steady_process():
            assert not gc.isenabled()
            raise KeyError
    assert gc.isenabled()


def test_prompt_longer_than_the_context_is_refused(tiny_llama, plan):
    with pytest.raises(ValueError, match="prompt_tokens: 510 and 8 generated tokens.*context, 512"):
        SpeedBenchmark(
            tiny_llama, PrefillStage(tiny_llama, plan), DecodeStage(tiny_llama, plan), small(prompt_tokens=[510])
        )


def test_decode_steps_can_be_compiled(tiny_llama, plan, monkeypatch):
    # inductor, the default backend, needs a C++ compiler
    monkeypatch.setattr(benchmark, "CompileConfig", partial(CompileConfig, backend="eager"))
    pair = [PrefillStage(build_stage(tiny_llama, plan, "prefill"), plan)]
    pair.append(DecodeStage(build_stage(tiny_llama, plan, "decode"), plan))
    seen = []
    step = SpeedBenchmark._step

    def watched(self, model, cache, *args):
        tokens = step(self, model, cache, *args)
        seen.append((type(cache), tokens.tolist()))
        return tokens

    monkeypatch.setattr(SpeedBenchmark, "_step", watched)
    counters.clear()
    for compiled in (False, True):
        SpeedBenchmark(tiny_llama, *pair, small(compile_decode=compiled)).run()
    assert counters["stats"]["unique_graphs"] == 2  # one step of each model
    plain, compiled = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    assert {kind for kind, _ in plain} == {DynamicCache, TokenAwareCache}
    assert {kind for kind, _ in compiled} == {StaticCache, StaticDecodeCache}
    assert [tokens for _, tokens in compiled] == [tokens for _, tokens in plain]


@pytest.mark.parametrize(
    "values",
    [
        {"prompt_tokens": []},
        {"prompt_tokens": [0]},
        {"batch_sizes": [-1]},
        {"repeats": 0},
        {"answer_tokens": 0},
        {"warmup": -1},
        {"first_token": "both"},
    ],
)
def test_bad_options_are_named(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        BenchmarkConfig(**values)


@pytest.mark.gpu
def test_the_environment_names_the_accelerator_and_every_peak_is_measured(tiny_llama, plan, accelerator):
    model = tiny_llama.to(accelerator)
    pair = [kind(build_stage(model, plan, kind.name), plan) for kind in (PrefillStage, DecodeStage)]
    assert {stage.model.device for stage in pair} == {accelerator}
    result = SpeedBenchmark(model, *pair, small(prompt_tokens=[480], batch_sizes=[4], warmup=0)).run()
    environment = result["environment"]
    assert environment["device"] == torch.get_device_module(accelerator).get_device_name(accelerator)
    assert environment["device_type"] == accelerator.type and environment["cpu"] != environment["device"]
    (case,) = result["cases"]
    held = case["kv"]["bytes_held"]
    assert held == {"dense": case["kv"]["bytes_dense"], "pruned": case["kv"]["bytes_kv"]}
    for name, parts in (("dense", model), ("pruned", pair[1].model)):
        parameters = 4 * sum(parameter.numel() for parameter in parts.parameters())
        assert parameters + held[name] < case["memory"]["decode"][name]
        assert parameters < case["memory"]["prefill"][name]
        assert case["ttft"][name]["median"] > 0 and case["tpot"][name]["median"] > 0
