"""
What a hand-over costs over slow links: bytes, time to the first token, time per further token.

    python recipes/handover.py --stages outputs/demo --dense HuggingFaceTB/SmolLM2-135M-Instruct

Three hand-overs are compared: of the dense model, by the plan, and by the plan with quantised KV entries; each in one
piece and streamed block by block, and each with the first token from prefill and from decode, whose TTFT contains the
transfer. Compute is timed, prefill here and decode in a process of its own (on a GPU each where there are two, on the
same one, or on the CPU), over a loopback socket that keeps to each link's pace (`measured`); a model of the link gives
the times over links that are faster than this loopback (`modelled`). Into the folder of the stages go `handover.json`
and the report; the last line on stdout is JSON.
"""

import json
import socket
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, TextIO

import torch
from accelerate import PartialState
from torch import multiprocessing
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from hf_pdprune import PruningPlan
from hf_pdprune.artefact_file import write_artefact
from hf_pdprune.evaluation import write_report
from hf_pdprune.evaluation.command_line import command_line
from hf_pdprune.evaluation.dense_model_of_pair import load_dense_model
from hf_pdprune.evaluation.environment import describe_environment
from hf_pdprune.evaluation.handover_times import HandoverTimes, measured_and_modelled
from hf_pdprune.evaluation.link_report import HANDOVER_FILE_NAME, gain_table, link_table, verdicts
from hf_pdprune.evaluation.recipe_main import run_recipe
from hf_pdprune.evaluation.results import record_command
from hf_pdprune.inference import LINKS, DecodeStage, Link, PrefillStage, ThrottledSender, receive_frame
from hf_pdprune.kv import QUANTIZATIONS, KVPayload, PayloadReader
from hf_pdprune.pair_layout import stage_folders
from hf_pdprune.shortened_config import context_length


PLACES = ("stages", "dense")
WHOLE, STREAMED = "in one piece", "block by block"
FIRST_TOKENS = ("prefill", "decode")


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
            Tokens that decode generates.
        quantization (`str`, *optional*, defaults to `"int4"`):
            Of the third hand-over: fp8, int8 or int4.
        gbit_per_second (`list[float]`, *optional*, defaults to `[0.2, 1, 10]`):
            Bandwidths of the links that are measured through the socket.
        latency_ms (`float`, *optional*, defaults to `0.05`):
            Their latency.
        repeats (`int`, *optional*, defaults to `2`):
            Hand-overs of each kind over each link, sent each way; the median is told.
        threads (`int`, *optional*):
            CPU threads of each process: they compute one after the other. Default: those that torch takes.
    """

    stages: str = field(metadata={"help": "Folder of the pair, as recipes/prune.py writes it."})
    dense: str | None = field(
        default=None, metadata={"help": "The dense model: repo id or folder. Default: the one that the plan names."}
    )
    prompt_tokens: int = field(default=1024, metadata={"help": "Length of the prompt."})
    decode_tokens: int = field(default=16, metadata={"help": "Tokens that decode generates."})
    quantization: str = field(default="int4", metadata={"help": "Of the third hand-over: fp8, int8 or int4."})
    gbit_per_second: list[float] = field(
        default_factory=lambda: [0.2, 1.0, 10.0], metadata={"help": "Bandwidths of the links that are measured."}
    )
    latency_ms: float = field(default=0.05, metadata={"help": "Their latency."})
    repeats: int = field(
        default=2, metadata={"help": "Hand-overs of each kind over each link, sent each way; the median is told."}
    )
    threads: int | None = field(
        default=None, metadata={"help": "CPU threads of each process. Default: those that torch takes."}
    )

    def __post_init__(self):
        if self.quantization not in QUANTIZATIONS:
            raise ValueError(f"quantization must be one of {', '.join(QUANTIZATIONS)}, got {self.quantization!r}")
        for name, least in (("prompt_tokens", 2), ("decode_tokens", 2), ("repeats", 1), ("threads", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
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


def cases_and_dtype(args: HandoverArguments) -> tuple[list[Case], str]:
    """The three that are compared, and the dtype of all: that of the dense model, on a CPU float32."""
    folder = Path(args.stages)
    plan = PruningPlan.from_pretrained(folder)
    stages = [str(path) for path in stage_folders(folder).values()]
    dense = args.dense or plan.base_model
    model = load_dense_model(dense, [folder])
    context = context_length(model.config)
    tokens = args.prompt_tokens + args.decode_tokens
    if context is not None and tokens > context:
        raise ValueError(f"prompt_tokens is too long: with those after them {tokens}, the context is {context}")
    dtype = "float32" if device_of(0).type == "cpu" else str(model.dtype).removeprefix("torch.")
    cases = [
        Case("dense", dense, dense, PruningPlan.empty(model, dense)),
        Case("plan", *stages, plan),
        Case(f"plan + {args.quantization}", *stages, plan, args.quantization),
    ]
    return cases, dtype


def device_of(process: int) -> torch.device:
    """Where prefill (0) and decode (1) run: a GPU each, the same one, or the CPU, as this machine has them."""
    gpus = torch.cuda.device_count()
    return torch.device("cuda", process % gpus) if gpus else torch.device("cpu")


def load(folders: Iterable[str], dtype: str, process: int) -> dict[str, PreTrainedModel]:
    """The models by folder, each once."""
    models = {}
    for folder in dict.fromkeys(folders):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, use_safetensors=True)
        models[folder] = model.eval().to(device_of(process))
    return models


class TokenClock(BaseStreamer):
    """Notes when `generate` had each token."""

    def __init__(self):
        self._calls: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self._calls.append(time.monotonic())

    def end(self) -> None:
        pass

    @property
    def tokens(self) -> list[float]:
        return self._calls[1:]  # what is put first is the prompt


def decode_process(cases: list[Case], dtype: str, port: int, new_tokens: int, threads: int) -> None:
    """Takes payloads in one piece or block by block, and answers with the times at which it had what."""
    torch.set_num_threads(threads)
    models = load((case.decode for case in cases), dtype, 1)
    stages = {case.name: DecodeStage(models[case.decode], case.plan) for case in cases}
    with socket.create_connection(("127.0.0.1", port)) as connection:
        while order := receive_frame(connection):
            name, sent = json.loads(order)
            frame = receive_frame(connection)
            arrived = time.monotonic()
            if sent == WHOLE:
                payload = KVPayload.from_bytes(frame)
            else:
                reader = PayloadReader(stages[name].plan.digest)
                while (payload := reader.feed(frame)) is None:
                    frame = receive_frame(connection)
                    arrived = time.monotonic()
            unpacked, clock = time.monotonic(), TokenClock()
            # A first token that prefill gave counts as one of them.
            tokens = new_tokens + (payload.first_token is not None)
            stages[name].generate(
                payload, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, streamer=clock
            )
            connection.sendall(json.dumps([arrived, unpacked, clock.tokens]).encode() + b"\n")


class PrefillSide:
    """
    This process: the prefill stages, and the way to the process that decodes.

    Args:
        cases (`list[Case]`): What it loads, and how it sends.
        dtype (`str`): Of all models.
        prompt_tokens (`int`): Length of the prompt.
    """

    def __init__(self, cases: list[Case], dtype: str, prompt_tokens: int):
        models = load((case.prefill for case in cases), dtype, 0)
        self.stages = {}
        for case in cases:
            model = models[case.prefill]
            # In one piece, entries are quantised when the first token is there, not before.
            whole = PrefillStage(model, case.plan)
            self.stages[case.name, WHOLE] = whole
            self.stages[case.name, STREAMED] = PrefillStage(
                model, case.plan, fingerprint=whole.fingerprint, quantization=case.quantization
            )
        self.model = models[cases[0].prefill]
        size, generator = (1, prompt_tokens), torch.manual_seed(0)
        self.prompt = torch.randint(3, self.model.config.vocab_size, size, generator=generator).to(self.model.device)

    def hand_over(
        self, connection: socket.socket, answers: TextIO, link: Link, case: Case, sent: str, first_token: str
    ) -> HandoverTimes:
        """One hand-over over a link."""
        order = json.dumps([case.name, sent]).encode()
        connection.sendall(len(order).to_bytes(8, "little") + order)
        frames: list[tuple[float, int]] = []
        sender = ThrottledSender(connection, link)
        begun = time.monotonic()

        def send(frame: bytes) -> None:
            frames.append((time.monotonic() - begun, len(frame)))
            sender.send(frame)

        payload = self.stages[case.name, sent](
            self.prompt,
            first_token=first_token,
            send=send if sent == STREAMED else None,
            do_sample=False,
            min_new_tokens=2,  # a first token that ended the text would leave decode nothing to do
        )
        if self.prompt.device.type != "cpu":
            torch.cuda.synchronize(self.prompt.device)
        prefilled = time.monotonic() - begun
        if sent == WHOLE:
            send((payload if case.quantization is None else payload.quantized(case.quantization)).to_bytes())
        sender.close()
        answer = answers.readline()
        if not answer:
            raise ConnectionError("the decode process ended before it answered")
        arrived, unpacked, tokens = json.loads(answer)
        tokens = tuple(token - begun for token in tokens)
        return HandoverTimes(prefilled, tuple(frames), arrived - begun, unpacked - begun, tokens)


def measure(links: list[Link], args: HandoverArguments) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """
    Hand-overs of all kinds over each link, sent both ways, with the first token from either, in turns, so that what
    else the machine does meets them alike; and where they ran.
    """
    cases, dtype = cases_and_dtype(args)
    with socket.create_server(("127.0.0.1", 0)) as server:
        decode = (cases, dtype, server.getsockname()[1], args.decode_tokens, torch.get_num_threads())
        process = multiprocessing.get_context("spawn").Process(target=decode_process, args=decode, daemon=True)
        process.start()
        side = PrefillSide(cases, dtype, args.prompt_tokens)
        connection = accept(server, process)
    runs = []
    with connection, connection.makefile() as answers:
        for case in cases:  # warms up both processes
            side.hand_over(connection, answers, links[-1], case, STREAMED, "decode")
        turns = list(product(range(args.repeats), links, (WHOLE, STREAMED), FIRST_TOKENS, cases))
        for _, link, sent, first_token, case in tqdm(turns, unit="hand-over"):
            times = side.hand_over(connection, answers, link, case, sent, first_token)
            run = {"link": link.name, "kind": case.name, "sent": sent, "first_token": first_token}
            runs.append(run | {"times": times})
        connection.sendall(bytes(8))
    process.join()
    return runs, describe_environment(side.model)


def accept(server: socket.socket, process: multiprocessing.Process) -> socket.socket:
    """The connection of the process that decodes, when it has loaded its model; an error if it ends before."""
    server.settimeout(1)
    while True:
        try:
            connection, _ = server.accept()
        except TimeoutError:
            if process.exitcode is not None:
                raise ConnectionError(f"the decode process ended with exit code {process.exitcode}") from None
        else:
            connection.settimeout(None)
            return connection


def summary(measured: list[dict[str, Any]], modelled: list[dict[str, Any]]) -> dict[str, Any]:
    """The last line: of each kind the bytes, a decode step, and by link the soonest first token from decode."""
    result: dict[str, Any] = {}
    for row in measured + modelled:
        own = result.setdefault(row["kind"], {"bytes_sent": row["bytes_sent"], "tpot": row["tpot"], "ttft_decode": {}})
        soonest = own["ttft_decode"]
        soonest[row["link"]] = min(row["ttft_decode"], soonest.get(row["link"], row["ttft_decode"]))
    return result


def main(args: HandoverArguments) -> None:
    if not PartialState().is_main_process:  # a second process beside it would only disturb the measurement
        return
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    links = [Link(f"{rate:g} Gbit/s", rate, args.latency_ms / 1000) for rate in args.gbit_per_second]
    runs, environment = measure(links, args)
    measured, modelled = measured_and_modelled(runs, LINKS)
    settings = {name: value for name, value in asdict(args).items() if name not in PLACES}
    artefact = {"settings": settings, "environment": environment, "measured": measured, "modelled": modelled}
    write_artefact(Path(args.stages) / HANDOVER_FILE_NAME, artefact)
    record_command(args.stages, "handover", command_line("recipes/handover.py", args, folders=PLACES))
    write_report(args.stages)

    print("measured over a throttled loopback socket\n")
    print(link_table(measured).to_text(), "\n")
    print("by a model of the link\n")
    print(link_table(modelled).to_text(), "\n")
    print(gain_table(modelled).to_text(), "\n")
    print("\n".join(verdicts(modelled)), "\n")
    print(json.dumps(summary(measured, modelled)))


if __name__ == "__main__":
    run_recipe(main, HandoverArguments, description=__doc__)
