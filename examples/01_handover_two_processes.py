"""
One process reads the prompt, another one writes the answer; between them, the KV cache crosses a socket.

    python examples/01_handover_two_processes.py        (after make demo)

Each process loads its own stage only. On two machines, start the same two functions with torchrun.
"""

import os

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_pdprune import PruningPlan
from hf_pdprune.inference import DecodeStage, PrefillStage, receive_payload, send_payload


STAGES = os.environ.get("STAGES", "outputs/demo")
PROMPT = "Give me three reasons to write tests for a program."
NEW_TOKENS = 64
PREFILL, DECODE = 0, 1


def prefill() -> None:
    tokenizer = AutoTokenizer.from_pretrained(f"{STAGES}/prefill", padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(f"{STAGES}/prefill")
    stage = PrefillStage(model, PruningPlan.from_pretrained(STAGES))

    messages = [{"role": "user", "content": PROMPT}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    payload = stage(inputs["input_ids"], inputs["attention_mask"], do_sample=False)
    nbytes = send_payload(payload, dst=DECODE)
    print(f"{payload.prompt_tokens} prompt tokens: {nbytes:,} bytes sent; dense model: {payload.nbytes_dense:,}")


def decode() -> None:
    tokenizer = AutoTokenizer.from_pretrained(f"{STAGES}/decode")
    model = AutoModelForCausalLM.from_pretrained(f"{STAGES}/decode")
    stage = DecodeStage(model, PruningPlan.from_pretrained(STAGES))

    payload = receive_payload(src=PREFILL)
    sequences = stage.generate(payload, max_new_tokens=NEW_TOKENS, do_sample=False)
    answer = tokenizer.decode(sequences[0, payload.prompt_tokens :], skip_special_tokens=True)
    print(f"{PROMPT}\n{answer}")


def main(rank: int) -> None:
    torch.set_num_threads(max(1, torch.get_num_threads() // 2))
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    os.environ.setdefault("MASTER_PORT", "29511")
    dist.init_process_group("gloo", rank=rank, world_size=2)
    (prefill, decode)[rank]()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.multiprocessing.spawn(main, nprocs=2)
