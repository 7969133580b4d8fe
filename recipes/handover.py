"""
What a hand-over costs over slow links: bytes, time to the first token, time per further token.

    python recipes/handover.py --stages outputs/demo --dense HuggingFaceTB/SmolLM2-135M-Instruct

Three hand-overs are compared: of the dense model, by the plan, and by the plan with quantised KV entries. Compute is
timed, prefill here and decode in a process of its own, over a loopback socket that keeps to each link's pace
(`measured`); a model of the link gives the times where it is faster than this loopback (`modelled`). Into the
folder of the stages goes `handover.json`; the last line on stdout is JSON.
"""

import json
import socket
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import multiprocessing
from transformers import AutoModelForCausalLM
from trl import TrlParser

from hf_pdprune import PruningPlan
from hf_pdprune.artefact_file import write_artefact
from hf_pdprune.evaluation.result_table import ResultTable, megabytes
from hf_pdprune.inference import LINKS, DecodeStage, Link, PrefillStage, ThrottledSender, receive_frame
from hf_pdprune.kv import QUANTIZATIONS, PayloadReader
from hf_pdprune.pair_layout import stage_folders


@dataclass
class HandoverArguments:
    """
    What is handed over, and over which links.

    Parameters:
        stages (`str`):
            Folder of the pair, as recipes/prune.py writes it.
        dense (`str`, *optional*):
            The dense model: repo id or folder. Default: the one that the plan names.
        prompt_tokens (`int`, *optional*, defaults to `1024`):
            Length of the prompt.
        decode_tokens (`int`, *optional*, defaults to `16`):
            Tokens after the first one.
        quantization (`str`, *optional*, defaults to `"int4"`):
            Of the third hand-over: fp8, int8 or int4.
        gbit_per_second (`list[float]`, *optional*, defaults to `[0.2, 1, 10]`):
            Links that are measured through the socket.
        latency_ms (`float`, *optional*, defaults to `0.05`):
            Their latency.
        repeats (`int`, *optional*, defaults to `3`):
            Hand-overs of each kind; the median is told.
        threads (`int`, *optional*, defaults to `1`):
            CPU threads of each process.
    """

    stages: str = field(metadata={"help": "Folder of the pair, as recipes/prune.py writes it."})
    dense: str | None = field(
        default=None, metadata={"help": "The dense model: repo id or folder. Default: the one that the plan names."}
    )
    prompt_tokens: int = field(default=1024, metadata={"help": "Length of the prompt."})
    decode_tokens: int = field(default=16, metadata={"help": "Tokens after the first one."})
    quantization: str = field(default="int4", metadata={"help": "Of the third hand-over: fp8, int8 or int4."})
    gbit_per_second: list[float] = field(
        default_factory=lambda: [0.2, 1.0, 10.0], metadata={"help": "Links that are measured through the socket."}
    )
    latency_ms: float = field(default=0.05, metadata={"help": "Their latency."})
    repeats: int = field(default=3, metadata={"help": "Hand-overs of each kind; the median is told."})
    threads: int = field(default=1, metadata={"help": "CPU threads of each process."})

    def __post_init__(self):
        if self.quantization not in QUANTIZATIONS:
            raise ValueError(f"quantization must be one of {', '.join(QUANTIZATIONS)}, got {self.quantization!r}")
        for name, least in (("prompt_tokens", 2), ("decode_tokens", 2), ("repeats", 1), ("threads", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        for rate in self.gbit_per_second:
            Link("", rate, self.latency_ms / 1000)


@dataclass(frozen=True)
class Case:
    """One kind of hand-over: what each process loads, and how the entries are sent."""

    name: str
    prefill: str
    decode: str
    plan: PruningPlan
    quantization: str | None = None


def cases(args: HandoverArguments) -> list[Case]:
    """The three that are compared."""
    folder = Path(args.stages)
    plan = PruningPlan.from_pretrained(folder)
    dense = args.dense or plan.base_model
    empty = PruningPlan.empty(AutoModelForCausalLM.from_pretrained(dense, use_safetensors=True), dense)
    stages = [str(path) for path in stage_folders(folder).values()]
    return [
        Case("dense", dense, dense, empty),
        Case("plan", *stages, plan),
        Case(f"plan + {args.quantization}", *stages, plan, args.quantization),
    ]


def decode_process(case: Case, port: int, args: HandoverArguments) -> None:
    """Takes payloads, whole ones and streams, and answers with the times at which it had what."""
    torch.set_num_threads(args.threads)
    model = AutoModelForCausalLM.from_pretrained(case.decode, dtype="float32", use_safetensors=True).eval()
    stage = DecodeStage(model, case.plan)
    with socket.create_connection(("127.0.0.1", port)) as connection:
        reader = PayloadReader(case.plan.digest)
        while frame := receive_frame(connection):
            payload = reader.feed(frame)
            if payload is None:
                continue
            reader, times = PayloadReader(case.plan.digest), [time.monotonic()]
            stage.generate(payload, max_new_tokens=2, do_sample=False, eos_token_id=None)
            times.append(time.monotonic())
            stage.generate(payload, max_new_tokens=1 + args.decode_tokens, do_sample=False, eos_token_id=None)
            times.append(time.monotonic())
            connection.sendall(json.dumps(times).encode() + b"\n")


def measure(case: Case, links: list[Link], args: HandoverArguments) -> dict[str, Any]:
    """The times of one kind of hand-over over each link, medians in seconds."""
    model = AutoModelForCausalLM.from_pretrained(case.prefill, dtype="float32", use_safetensors=True).eval()
    stage = PrefillStage(model, case.plan, quantization=case.quantization)
    prompt = torch.randint(3, model.config.vocab_size, (1, args.prompt_tokens), generator=torch.manual_seed(0))
    with socket.create_server(("127.0.0.1", 0)) as server:
        process = multiprocessing.get_context("spawn").Process(
            target=decode_process, args=(case, server.getsockname()[1], args), daemon=True
        )
        process.start()
        server.settimeout(300)  # loading a model is part of it; a process that failed never comes
        connection, _ = server.accept()
        connection.settimeout(None)
    times: dict[str, dict[str, list[float]]] = {link.name: {} for link in links}
    with connection, connection.makefile() as answers:
        for repeat in range(args.repeats + 1):
            for link in links:
                result, frames = hand_over(stage, prompt, connection, answers, link)
                if repeat == 0:  # warms up both processes
                    continue
                for name, seconds in result.items():
                    times[link.name].setdefault(name, []).append(seconds)
        connection.sendall(bytes(8))
    process.join()
    measured = {link: {name: statistics.median(v) for name, v in values.items()} for link, values in times.items()}
    steps = [(values["decode"] - values["decode_first"]) / (args.decode_tokens - 1) for values in measured.values()]
    return {
        "bytes_sent": sum(nbytes for _, nbytes in frames),
        "bytes_dense": stage(prompt, do_sample=False).nbytes_dense,
        "frames": frames,
        "tpot": statistics.median(steps),
        "measured": measured,
    }


def hand_over(
    stage: PrefillStage, prompt: torch.Tensor, connection: socket.socket, answers: Any, link: Link
) -> tuple[dict[str, float], list[tuple[float, int]]]:
    """One hand-over, streamed block by block: its times, and when each frame was ready with how many bytes."""
    frames: list[tuple[float, int]] = []
    sender = ThrottledSender(connection, link)
    begun = time.monotonic()

    def send(frame: bytes) -> None:
        frames.append((time.monotonic() - begun, len(frame)))
        sender.send(frame)

    stage(prompt, do_sample=False, send=send)
    prefilled = time.monotonic()
    sender.close()
    received, first, last = json.loads(answers.readline())
    return {
        "prefill": prefilled - begun,
        "arrival": received - begun,
        "exposed_transfer": received - prefilled,
        "second_token": first - begun,
        "decode_first": first - received,
        "decode": last - first,
    }, frames


def modelled(result: dict[str, Any], links: tuple[Link, ...]) -> dict[str, dict[str, float]]:
    """What each link adds to prefill, block by block and in one piece after it, in seconds."""
    prefill = statistics.median(values["prefill"] for values in result["measured"].values())
    return {
        link.name: {
            "prefill": prefill,
            "transfer": link.seconds(result["bytes_sent"]),
            "exposed_transfer": max(0.0, link.arrival(result["frames"]) - prefill),
            "share_of_prefill": link.seconds(result["bytes_sent"]) / prefill,
        }
        for link in links
    }


def table(results: dict[str, Any]) -> ResultTable:
    """One row per link and kind of hand-over."""
    rows = [["link", "hand-over", "sent", "prefill", "not hidden", "second token", "TPOT"]]
    for name, result in results.items():
        for link, values in result["measured"].items():
            columns = [f"{1000 * values[key]:.0f} ms" for key in ("prefill", "exposed_transfer", "second_token")]
            rows.append([link, name, megabytes(result["bytes_sent"]), *columns, f"{1000 * result['tpot']:.1f} ms"])
    return ResultTable([rows[0], *sorted(rows[1:], key=lambda row: row[0])])


def main(args: HandoverArguments) -> None:
    torch.set_num_threads(args.threads)
    links = [Link(f"{rate:g} Gbit/s", rate, args.latency_ms / 1000) for rate in args.gbit_per_second]
    results = {}
    for case in cases(args):
        results[case.name] = measure(case, links, args)
        results[case.name]["modelled"] = modelled(results[case.name], LINKS)
    write_artefact(Path(args.stages) / "handover.json", results)
    print(table(results).to_text(), "\n")
    summary = {name: {"bytes_sent": r["bytes_sent"], "tpot": r["tpot"]} for name, r in results.items()}
    print(json.dumps(summary))


if __name__ == "__main__":
    try:
        main(*TrlParser(HandoverArguments).parse_args_and_config())
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
