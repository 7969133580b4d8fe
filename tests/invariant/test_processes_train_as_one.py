from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch.testing import assert_close
from training_process import losses_of, result_of, start_training


ZERO = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_allow_untested_optimizer": True,
}
# Nothing stays whole: every parameter is partitioned, and gathered only for those who use it.
ZERO_3 = {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True, "stage3_param_persistence_threshold": 0}
KINDS = {
    "ddp": {},
    "fsdp2": {
        "fsdp": True,
        "fsdp_config": {
            "version": 2,
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "reshard_after_forward": True,
            "cpu_ram_efficient_loading": False,
            "state_dict_type": "FULL_STATE_DICT",
        },
    },
    "zero2": {"deepspeed": ZERO | {"zero_optimization": {"stage": 2}}},
    "zero3": {"deepspeed": ZERO | {"zero_optimization": ZERO_3}},
}


@pytest.fixture(scope="module")
def of_one_process():
    """What one process comes to, for all that is compared with it."""
    return {}


def train(folder, processes, **options):
    """The log and the weights of a training of eight rows per step."""
    options.setdefault("output_dir", str(folder / f"run-{processes}"))
    result = result_of(start_training(folder, processes, **options), folder)
    checkpoint = Path(options["output_dir"]) / "checkpoint-3"
    assert not list(checkpoint.glob("model*")), "the dense weights are in the checkpoint"
    weights = {
        f"{stage} {name}": tensor
        for stage in ("prefill", "decode")
        for path in (checkpoint / stage / "adapter_model.safetensors", checkpoint.parent / "stages" / stage)
        for name, tensor in load_file(path / "model.safetensors" if path.is_dir() else path).items()
    }
    return result, weights


@pytest.mark.invariant
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_train_as_one_with_twice_the_batch(training_folder, of_one_process, kind):
    if "deepspeed" in KINDS[kind]:
        pytest.importorskip("deepspeed")
    if not of_one_process:
        of_one_process["result"] = train(training_folder, 1)
    result, weights = of_one_process["result"]
    two, weights_of_two = train(training_folder, 2, **KINDS[kind])
    log, log_of_two = ([entry for entry in r["log"] if "loss" in entry] for r in (result, two))
    assert len(log) == 3
    for name in ("loss", "kl", "prefill_kl", "decode_kl", "perplexity", "num_tokens", "decode_blocks"):
        for one, other in zip(log, log_of_two, strict=True):
            assert other[name] == pytest.approx(one[name], rel=1e-4), name
    for name in ("eval_loss", "eval_kl", "eval_perplexity"):
        assert two["eval"][name] == pytest.approx(result["eval"][name], rel=1e-3), name
    assert weights_of_two.keys() == weights.keys()
    for name, tensor in weights.items():  # of the checkpoint's adapters, and of the exported stages
        assert_close(weights_of_two[name], tensor, atol=1e-5, rtol=1e-3)


@pytest.mark.invariant
@pytest.mark.parametrize("kind", KINDS)
def test_training_in_two_processes_goes_on_where_it_was_interrupted(training_folder, kind):
    if "deepspeed" in KINDS[kind]:
        pytest.importorskip("deepspeed")
    # What was fitted is frozen, and DeepSpeed's own files leave it out.
    options = KINDS[kind] | {"optim": "adamw_torch"}
    first, second = training_folder / "whole", training_folder / "resumed"
    whole, weights = train(training_folder, 2, **options, save_steps=2, output_dir=str(first))
    options |= {"output_dir": str(second), "resume": str(first / "checkpoint-2")}
    resumed, weights_of_resumed = train(training_folder, 2, **options)
    assert len(losses_of(whole)) == 3
    assert losses_of(resumed) == pytest.approx(losses_of(whole), rel=1e-5)
    for name, tensor in weights.items():
        assert_close(weights_of_resumed[name], tensor, atol=1e-6, rtol=1e-4)


@pytest.mark.invariant
def test_all_processes_end_where_the_loss_of_one_is_no_number(training_folder):
    process = start_training(training_folder, 2, poisoned_process=1)
    try:
        assert process.wait(timeout=240) != 0
    finally:
        process.kill()
    for number in range(2):
        assert "training diverged at step 2: the loss is nan" in (training_folder / f"diverged-{number}").read_text()
