"""Hand-over: a KVPayload from the process that prefills to the process that decodes, over torch.distributed."""

import json
import os
import socket
import time
import warnings
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from ..kv import KVPayload, PayloadError
from ..pair_layout import check_first_token, stage_folders
from ..plan import PruningPlan
from ..weight_files import check_weight_index
from .decode_stage import DecodeStage
from .handover_group import init_handover_group
from .link import MOST_BYTES
from .prefill_stage import PrefillStage


PREFILL_RANK, DECODE_RANK = 0, 1
_LOCALHOST = "127.0.0.1"
# Loading a model is part of what the other side waits for.
_TIMEOUT = timedelta(minutes=10)


def send_payload(
    payload: KVPayload,
    dst: int,
    group: dist.ProcessGroup | None = None,
    device: torch.device | str = "cpu",
) -> int:
    """
    Sends a payload to another process: its length, then its bytes.

    Args:
        payload ([`KVPayload`]): What prefill hands over.
        dst (`int`): Rank of the process that decodes.
        group (`ProcessGroup`, *optional*): Where it is not the default one.
        device (`torch.device`, defaults to `"cpu"`): Where the backend takes tensors from: `"cpu"` for gloo, an
            accelerator for NCCL.

    Returns:
        `int`: Bytes sent.
    """
    data = payload.to_bytes()
    with warnings.catch_warnings():
        # torch warns that the bytes are read-only: nobody writes to them, and a copy would cost time and memory.
        warnings.simplefilter("ignore", UserWarning)
        buffer = torch.frombuffer(data, dtype=torch.uint8)
    dist.send(torch.tensor([len(data)], device=device), dst, group=group)
    dist.send(buffer.to(device), dst, group=group)
    return len(data)


def receive_payload(
    src: int,
    group: dist.ProcessGroup | None = None,
    device: torch.device | str = "cpu",
    most_bytes: int = MOST_BYTES,
) -> KVPayload:
    """
    Receives what [`send_payload`] sends.

    Args:
        src (`int`): Rank of the process that prefills.
        group (`ProcessGroup`, *optional*): Where it is not the default one.
        device (`torch.device`, defaults to `"cpu"`): As for [`send_payload`].
        most_bytes (`int`, defaults to 16 GiB): A payload that claims to be longer is refused before any memory is
            taken for it.

    Raises:
        `PayloadError`: If the bytes are no payload, claim to be too many or fewer than none, or arrive altered.
    """
    claimed = torch.zeros(1, dtype=torch.int64, device=device)
    dist.recv(claimed, src, group=group)
    length = claimed.item()
    if not 0 <= length <= most_bytes:
        raise PayloadError(f"a payload of {length} bytes was announced; at most {most_bytes} are taken")
    buffer = torch.empty(length, dtype=torch.uint8, device=device)
    dist.recv(buffer, src, group=group)
    return KVPayload.from_bytes(buffer.cpu().numpy().data)


def handover_between_processes(
    stages_folder: str | os.PathLike,
    prompts: Sequence[str],
    max_new_tokens: int,
    num_threads: int | None = None,
    first_token: str = "prefill",
    **generate_kwargs: Any,
) -> dict[str, Any]:
    """
    Generates text with prefill in one process of its own and decode in another one on this machine: each loads its
    stage checkpoint alone. Where there are two GPUs each has one of them, and the KV entries go over NCCL; else both
    run on the CPU, with a socket between them. Greedy, unless `generate_kwargs` say otherwise.

    A script that calls it needs the usual `if __name__ == "__main__":`, since both processes import it.

    Args:
        stages_folder (`str`): Folder of a pair, tokenizer included (see [`export_stages`]).
        prompts (`Sequence[str]`): Prompts of one batch.
        max_new_tokens (`int`): Tokens to generate, the first one included.
        num_threads (`int`, *optional*): CPU threads per process. Default: half of this process's.
        first_token (`str`, defaults to `"prefill"`): Which stage generates the first token.
        generate_kwargs: As for `model.generate`, in both stages; only what JSON can hold.

    Returns:
        `dict[str, Any]`: `text` (what is generated, per prompt), `sequences` (token ids, prompts included, padded),
        `prompt_tokens` (length of the padded prompts), `nbytes` (bytes that were sent), `nbytes_dense` (what the
        dense model's KV entries take), `ratio`, `backend` (`"nccl"` or `"gloo"`), and the seconds that `prefill`,
        `transfer` and `decode` took.

    Raises:
        `FileNotFoundError`: If a stage is not there.
        `ValueError`: If there is no prompt, or the index of the weight files leads out of a stage's folder.
        `RuntimeError`: If one of the processes fails; it names the stage and its error.
    """
    folders = stage_folders(stages_folder)
    for folder in folders.values():
        if (folder / SAFE_WEIGHTS_INDEX_NAME).is_file():
            check_weight_index(folder / SAFE_WEIGHTS_INDEX_NAME, str(folder))
    if isinstance(prompts, str) or not prompts:
        raise ValueError("prompts must be a list of at least one text")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    check_first_token(first_token)
    job = {
        "folders": {stage: str(folder) for stage, folder in folders.items()},
        "prompts": list(prompts),
        "generate_kwargs": {"do_sample": False, **generate_kwargs, "max_new_tokens": max_new_tokens},
        "first_token": first_token,
        "num_threads": num_threads or max(1, torch.get_num_threads() // 2),
    }
    # The store takes any free port; both processes find each other, and leave the result, there.
    store = dist.TCPStore(_LOCALHOST, 0, world_size=None, is_master=True, timeout=_TIMEOUT, wait_for_workers=False)
    try:
        multiprocessing.spawn(_run_stage, args=(store.port, json.dumps(job)), nprocs=2)
    except (multiprocessing.ProcessRaisedException, multiprocessing.ProcessExitedException) as error:
        reason = store.get("error").decode() if store.check(["error"]) else str(error).strip().splitlines()[-1]
        raise RuntimeError(reason) from error
    return json.loads(store.get("result"))


def _run_stage(rank: int, port: int, job: str) -> None:
    """What each of the two processes does."""
    job = json.loads(job)
    torch.set_num_threads(job["num_threads"])
    _use_loopback()
    store = dist.TCPStore(_LOCALHOST, port, is_master=False, timeout=_TIMEOUT)
    device = init_handover_group(rank, store=store, timeout=_TIMEOUT)
    stage_class = (PrefillStage, DecodeStage)[rank]
    try:
        folder = job["folders"][stage_class.name]
        model = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True).eval().to(device)
        stage, tokenizer = stage_class(model, PruningPlan.from_pretrained(folder)), load_tokenizer(folder)
        dist.barrier()  # so that the transfer is not charged with the time that loading takes
        if rank == PREFILL_RANK:
            _prefill(stage, tokenizer, job, device)
        else:
            store.set("result", json.dumps(_decode(stage, tokenizer, job, device)))
    except Exception as error:
        # The first error is the one to tell: when a process ends, the other one fails too, for lack of its partner.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        store.compare_set("error", "", f"the {stage_class.name} process failed: {reason}")
        raise


def _leave_group() -> None:
    """
    Ends the connection when the payload has arrived: NCCL sends in the background, and both processes are needed to
    take it down, so this is not done after an error. Nor later: how long decode generates, nobody has to wait for.
    """
    dist.barrier()
    dist.destroy_process_group()


def _prefill(
    stage: PrefillStage, tokenizer: PreTrainedTokenizerBase, job: dict[str, Any], device: torch.device
) -> None:
    batch = tokenizer(job["prompts"], return_tensors="pt", padding=True).to(device)
    start = time.perf_counter()
    first_token = job["first_token"]
    payload = stage(batch["input_ids"], batch["attention_mask"], first_token=first_token, **job["generate_kwargs"])
    if device.type != "cpu":
        torch.cuda.synchronize(device)  # what is still computed belongs to prefill, not to the transfer
    seconds = time.perf_counter() - start
    dist.send(torch.tensor([seconds], dtype=torch.float64, device=device), DECODE_RANK)
    send_payload(payload, DECODE_RANK, device=device)
    _leave_group()


def _decode(
    stage: DecodeStage, tokenizer: PreTrainedTokenizerBase, job: dict[str, Any], device: torch.device
) -> dict[str, Any]:
    prefill_seconds = torch.zeros(1, dtype=torch.float64, device=device)
    dist.recv(prefill_seconds, PREFILL_RANK)
    seconds = {"prefill": prefill_seconds.item()}
    start = time.perf_counter()
    payload = receive_payload(PREFILL_RANK, device=device)
    seconds["transfer"] = time.perf_counter() - start
    backend = dist.get_backend()
    _leave_group()
    nbytes, nbytes_dense = payload.nbytes, payload.nbytes_dense
    prompt_tokens = payload.prompt_tokens + (payload.last_token is not None)  # which is handed over beside the others
    start = time.perf_counter()
    sequences = stage.generate(payload, **job["generate_kwargs"]).cpu()
    seconds["decode"] = time.perf_counter() - start
    return {
        "text": tokenizer.batch_decode(sequences[:, prompt_tokens:], skip_special_tokens=True),
        "sequences": sequences.tolist(),
        "prompt_tokens": prompt_tokens,
        "nbytes": nbytes,
        "nbytes_dense": nbytes_dense,
        "ratio": nbytes_dense / nbytes,
        "backend": backend,
        "seconds": seconds,
    }


def load_tokenizer(folder: str | os.PathLike) -> PreTrainedTokenizerBase:
    """A stage's tokenizer, set to pad on the left."""
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _use_loopback() -> None:
    """Has gloo connect over the loopback interface, unless the environment says otherwise."""
    names = [name for _, name in socket.if_nameindex() if name.startswith("lo")]
    if names:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", names[0])
