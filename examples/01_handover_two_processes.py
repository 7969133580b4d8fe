"""
One process reads the prompt, another one writes the answer; between them, the KV cache crosses a socket, or NCCL
where there are two GPUs: each process takes one.

    python examples/01_handover_two_processes.py        (after make demo; STAGES=<folder> for another pair)

Each process loads its own stage only. On two machines, start the same two functions with torchrun, after an
`init_process_group` of your own; `device` is what its backend takes tensors from.
"""

import os
import sys

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_pdprune import PruningPlan
from hf_pdprune.inference import DecodeStage, PrefillStage, init_handover_group, receive_payload, send_payload
from hf_pdprune.pair_layout import stage_folders


STAGES = os.environ.get("STAGES", "outputs/demo")
PROMPT = "Give me three reasons to write tests for a program."
NEW_TOKENS = 64
PREFILL, DECODE = 0, 1


def prefill(device: torch.device) -> None:
    folder = stage_folders(STAGES)["prefill"]
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder).to(device)
    stage = PrefillStage(model, PruningPlan.from_pretrained(STAGES))

    messages = [{"role": "user", "content": PROMPT}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    inputs = inputs.to(device)
    payload = stage(inputs["input_ids"], inputs["attention_mask"], do_sample=False)
    nbytes = send_payload(payload, dst=DECODE, device=device)
    print(f"{payload.prompt_tokens} prompt tokens: {nbytes:,} bytes sent; dense model: {payload.nbytes_dense:,}")


def decode(device: torch.device) -> None:
    folder = stage_folders(STAGES)["decode"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).to(device)
    stage = DecodeStage(model, PruningPlan.from_pretrained(STAGES))

    payload = receive_payload(src=PREFILL, device=device)
    sequences = stage.generate(payload, max_new_tokens=NEW_TOKENS, do_sample=False)
    answer = tokenizer.decode(sequences[0, payload.prompt_tokens :], skip_special_tokens=True)
    print(f"{PROMPT}\n{answer}")


def main(rank: int) -> None:
    torch.set_num_threads(max(1, torch.get_num_threads() // 2))
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    os.environ.setdefault("MASTER_PORT", "29511")
    device = init_handover_group(rank)
    (prefill, decode)[rank](device)
    dist.barrier()  # NCCL sends in the background: what is sent stays until it has arrived
    dist.destroy_process_group()


if __name__ == "__main__":
    try:
        stage_folders(STAGES)
    except FileNotFoundError as error:
        sys.exit(f"no stages in {STAGES}: {error} (STAGES=<folder> names another one)")
    torch.multiprocessing.spawn(main, nprocs=2)
