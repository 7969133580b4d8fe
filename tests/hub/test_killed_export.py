import os
import random
import signal
import time

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_pdprune.hub import export_stages, load_stages
from hf_pdprune.pair_layout import STAGES
from hf_pdprune.plan import PruningPlan, StagePlan


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a process that was forked")
@pytest.mark.parametrize("moments", [6, pytest.param(20, marks=pytest.mark.slow)])
@torch.no_grad()
def test_what_loads_is_whole(tiny_model, tmp_path, moments):
    """One export after the other, of a model and of the same times two; kill -9 at any moment."""
    model = tiny_model("llama")
    plan = PruningPlan.empty(model, "tiny", prefill=StagePlan((2,)), decode=StagePlan((2, 4)))
    dense = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    export_stages(model, plan, tmp_path / "pair")  # what is slow the first time
    begun = time.perf_counter()
    export_stages(model, plan, tmp_path / "pair")
    seconds = time.perf_counter() - begun
    moment, outcomes = random.Random(0), []
    for _ in range(moments):
        child = os.fork()
        if child == 0:
            try:
                for scale in (2.0, 0.5) * 1000:
                    for parameter in model.parameters():
                        parameter.mul_(scale)
                    export_stages(model, plan, tmp_path / "pair", max_shard_size="100KB")
            finally:
                os._exit(1)
        time.sleep(moment.uniform(0, 3 * seconds))
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        scales = [scale_of(tmp_path / "pair" / stage, dense, plan.kept_blocks(stage)) for stage in STAGES]
        try:
            load_stages(tmp_path / "pair")
        except (FileNotFoundError, ValueError):
            outcomes.append("error")
            continue
        outcomes.append("pair")
        assert scales[0] == scales[1] is not None
    print(outcomes)
    assert "pair" in outcomes
    export_stages(model, plan, tmp_path / "pair")  # and the next export puts everything right
    load_stages(tmp_path / "pair")
    assert {path.name for path in (tmp_path / "pair").iterdir()} == {"decode", "prefill", "pruning_plan.json"}


def scale_of(folder, dense, kept):
    """The factor by which all of a stage's weights are those of the dense model; `None` where there is no stage."""
    if not folder.is_dir():
        return None
    model = AutoModelForCausalLM.from_pretrained(folder)
    expected = {}
    for name, tensor in dense.items():
        if not name.startswith("model.layers."):
            expected[name] = tensor
    for index, number in enumerate(kept):
        old = f"model.layers.{number}."
        expected |= {f"model.layers.{index}.{n[len(old) :]}": t for n, t in dense.items() if n.startswith(old)}
    scale = 2.0 if not torch.equal(model.lm_head.weight, dense["lm_head.weight"]) else 1.0
    state = model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], tensor * scale) for name, tensor in expected.items())
    return scale
