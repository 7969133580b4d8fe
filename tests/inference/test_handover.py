import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing

from hf_pdprune.hub import export_stages, load_stages
from hf_pdprune.inference import (
    DecodeStage,
    PrefillStage,
    choose_backend,
    handover_between_processes,
    nccl_gpus,
    receive_payload,
    send_payload,
)
from hf_pdprune.kv import PayloadError
from hf_pdprune.plan import KVPlan, PruningPlan, StagePlan


PROMPTS = ["Once upon a time there was a dragon who", "How?", "What is a prompt window and how long is it?"]


@pytest.mark.invariant
def test_keeping_every_token_equals_generate(tiny_model, tiny_tokenizer, tmp_path):
    model = tiny_model("gemma3_text")
    export_stages(model, PruningPlan.empty(model, "tiny"), tmp_path, tokenizer=tiny_tokenizer)
    result = handover_between_processes(tmp_path, PROMPTS, 10, num_threads=1)
    inputs = tiny_tokenizer(PROMPTS, return_tensors="pt", padding=True)
    assert (inputs["attention_mask"] == 0).any()
    expected = model.generate(**inputs, max_new_tokens=10, do_sample=False)
    assert result["sequences"] == expected.tolist()
    prompt_tokens = inputs["input_ids"].shape[1]
    assert result["text"] == tiny_tokenizer.batch_decode(expected[:, prompt_tokens:], skip_special_tokens=True)


@pytest.mark.invariant
def test_two_processes_equal_one(tiny_llama, tiny_tokenizer, tmp_path):
    plan = PruningPlan.empty(
        tiny_llama,
        "tiny",
        prefill=StagePlan((3,)),
        decode=StagePlan((1, 3)),
        kv=KVPlan((0, 2, 4), first_tokens=2, last_tokens=6),
    )
    export_stages(tiny_llama, plan, tmp_path, tokenizer=tiny_tokenizer)
    result = handover_between_processes(tmp_path, PROMPTS, 10, num_threads=1)
    inputs = tiny_tokenizer(PROMPTS, return_tensors="pt", padding=True)
    prefill, decode = load_stages(tmp_path)
    payload = prefill(**inputs, do_sample=False)
    nbytes, nbytes_dense = payload.nbytes, payload.nbytes_dense
    expected = decode.generate(payload, max_new_tokens=10, do_sample=False)
    assert result["sequences"] == expected.tolist()
    assert (result["nbytes"], result["nbytes_dense"]) == (nbytes, nbytes_dense)
    assert result["ratio"] == pytest.approx(nbytes_dense / nbytes)
    assert set(result["seconds"]) == {"prefill", "transfer", "decode"}
    assert result["backend"] == choose_backend(0, nccl_gpus())[0]


def test_decode_may_generate_the_first_token(tiny_llama, tiny_tokenizer, tmp_path):
    stages = {"prefill": StagePlan((1, 3)), "decode": StagePlan((1, 3))}
    plan = PruningPlan.empty(tiny_llama, "tiny", **stages, kv=KVPlan((2,), 2, 6))
    export_stages(tiny_llama, plan, tmp_path, tokenizer=tiny_tokenizer)
    result = handover_between_processes(tmp_path, PROMPTS, 6, num_threads=1, first_token="decode")
    inputs = tiny_tokenizer(PROMPTS, return_tensors="pt", padding=True)
    prefill, decode = load_stages(tmp_path)
    payload = prefill(**inputs, first_token="decode")
    assert result["sequences"] == decode.generate(payload, max_new_tokens=6, do_sample=False).tolist()
    assert result["prompt_tokens"] == inputs["input_ids"].shape[1]
    with pytest.raises(ValueError, match="first_token must be prefill or decode, got 'both'"):
        handover_between_processes(tmp_path, PROMPTS, 6, first_token="both")


def test_both_processes_load_a_unified_model(tiny_llama, tiny_tokenizer, tmp_path):
    plan = PruningPlan.empty(tiny_llama, "tiny", prefill=StagePlan((3,)), decode=StagePlan((3,)))
    export_stages(tiny_llama, plan, tmp_path, tokenizer=tiny_tokenizer, layout=("unified",))
    result = handover_between_processes(tmp_path, PROMPTS[:1], 6, num_threads=1)
    inputs = tiny_tokenizer(PROMPTS[:1], return_tensors="pt")
    expected = load_stages(tmp_path)[0].model.generate(**inputs, max_new_tokens=6, do_sample=False)
    assert result["sequences"] == expected.tolist()


def test_failure_in_a_process_is_one_line(tiny_llama, tiny_tokenizer, tmp_path):
    tiny_llama.config.max_position_embeddings = 16
    export_stages(tiny_llama, PruningPlan.empty(tiny_llama, "tiny"), tmp_path, tokenizer=tiny_tokenizer)
    with pytest.raises(RuntimeError, match="the prefill process failed.*the model's context is 16") as error:
        handover_between_processes(tmp_path, PROMPTS, 4, num_threads=1)
    assert "\n" not in str(error.value)


def test_index_that_leads_elsewhere_starts_no_process(tiny_llama, tmp_path):
    export_stages(tiny_llama, PruningPlan.empty(tiny_llama, "tiny"), tmp_path)
    index = tmp_path / "decode" / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"lm_head.weight": "../../other.safetensors"}}')
    with pytest.raises(ValueError, match="no safetensors file beside it"):
        handover_between_processes(tmp_path, PROMPTS, 4)


def test_bad_input_starts_no_process(tmp_path):
    with pytest.raises(FileNotFoundError, match="no prefill stage"):
        handover_between_processes(tmp_path, PROMPTS, 4)
    for stage in ("prefill", "decode"):
        (tmp_path / stage).mkdir()
        (tmp_path / stage / "config.json").write_text("{}")
    for prompts, tokens, message in ((PROMPTS, 0, "max_new_tokens"), ([], 4, "prompts"), ("a text", 4, "prompts")):
        with pytest.raises(ValueError, match=message):
            handover_between_processes(tmp_path, prompts, tokens)


# What a stranger may say that it is about to send: more than there is, more than is taken, fewer than none.
CLAIMED_LENGTHS = (1 << 60, 1001, -1)


def _exchange(rank, port):
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    if rank == 0:
        store.set("sent", str(send_payload(_payload(), 1)))
        dist.send(torch.tensor([64]), 1)
        dist.send(torch.arange(64, dtype=torch.uint8), 1)
        for length in CLAIMED_LENGTHS:
            dist.send(torch.tensor([length]), 1)
    else:
        store.set("received", receive_payload(0).to_bytes())
        for number, most_bytes in enumerate((64, *(1000 for _ in CLAIMED_LENGTHS))):
            try:
                receive_payload(0, most_bytes=most_bytes)
            except PayloadError as error:
                store.set(f"error {number}", str(error))
    dist.barrier()
    dist.destroy_process_group()


def _payload():
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=64, eos_token_id=None, **size)
    model = AutoModelForCausalLM.from_config(config).eval()
    return PrefillStage(model, PruningPlan.empty(model, "tiny"))(torch.arange(20)[None], do_sample=False)


def test_payload_arrives_as_it_was_sent_or_is_refused():
    store = dist.TCPStore("127.0.0.1", 0, world_size=None, is_master=True, wait_for_workers=False)
    multiprocessing.spawn(_exchange, args=(store.port,), nprocs=2)
    expected = _payload().to_bytes()
    assert store.get("received") == expected
    assert int(store.get("sent")) == len(expected)
    assert b"payload" in store.get("error 0")
    for number, length in enumerate(CLAIMED_LENGTHS, 1):
        assert f"a payload of {length} bytes was announced; at most 1000" in store.get(f"error {number}").decode()


def test_stage_of_wrong_kind_is_refused(tiny_llama, tmp_path):
    export_stages(tiny_llama, PruningPlan.empty(tiny_llama, "tiny"), tmp_path)
    prefill, _ = load_stages(tmp_path)
    with pytest.raises(ValueError, match="is a prefill stage, not a decode stage"):
        DecodeStage(prefill.model, prefill.plan)


@pytest.mark.parametrize("rank", [0, 1])
def test_what_is_sent_goes_by_the_device(monkeypatch, rank):
    """The backend takes and gives tensors of the device that it is for; `meta` stands for a GPU."""
    devices = []
    monkeypatch.setattr(dist, "send", lambda tensor, dst, group=None: devices.append(tensor.device.type))
    monkeypatch.setattr(dist, "recv", lambda tensor, src, group=None: devices.append(tensor.device.type))
    if rank == 0:
        send_payload(_payload(), 1, device="meta")
    else:
        with pytest.raises(RuntimeError, match="meta"):  # which has no numbers to give
            receive_payload(0, device="meta")
    assert set(devices) == {"meta"}


@pytest.mark.gpu
@pytest.mark.skipif(nccl_gpus() < 2, reason="needs two GPUs")
def test_two_gpus_hand_over_by_nccl(tiny_llama, tiny_tokenizer, tmp_path):
    export_stages(tiny_llama, PruningPlan.empty(tiny_llama, "tiny"), tmp_path, tokenizer=tiny_tokenizer)
    result = handover_between_processes(tmp_path, PROMPTS, 10)
    assert result["backend"] == "nccl"
    inputs = tiny_tokenizer(PROMPTS, return_tensors="pt", padding=True).to(0)
    expected = tiny_llama.to(0).generate(**inputs, max_new_tokens=10, do_sample=False)
    assert result["sequences"] == expected.tolist()
