import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from hf_pdprune.adapters import active_adapter
from hf_pdprune.blocks import bypass_blocks, get_blocks
from hf_pdprune.search.gap_regression import GapRegression
from hf_pdprune.search.least_squares import LeastSquares
from hf_pdprune.trainer import ResidualFit
from hf_pdprune.trainer.residual_fit import blocks_beside_gaps


def adapted(model, rank=64):
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config, adapter_name="stage").eval()


def hidden_states(model, ids, missing, adapter):
    with torch.no_grad(), bypass_blocks(model, missing), active_adapter(model, adapter):
        return model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states[-1]


@pytest.fixture
def ids():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, 250, (24, 32), generator=generator)


@pytest.mark.parametrize("missing", [(2,), (2, 3), (0,), (5,), (0, 3, 5)], ids=str)
def test_hidden_states_come_nearer_to_the_dense_models(tiny_llama, ids, missing):
    model = adapted(tiny_llama)
    dense = hidden_states(model, ids, (), None)
    before = (hidden_states(model, ids, missing, None) - dense).pow(2).mean()
    left = ResidualFit(model, ids.split(8)).fit(missing, "stage")
    after = (hidden_states(model, ids, missing, "stage") - dense).pow(2).mean()
    assert after < before
    assert all(0 <= value < 1 for value in left.values())


def test_neurons_move_in_a_model_of_narrow_dtype_too(tiny_llama, ids):
    with torch.no_grad():
        for block in get_blocks(tiny_llama):
            block.post_attention_layernorm.weight.uniform_(0.5, 2.0)
    exact, narrow = (
        ResidualFit(adapted(copy.deepcopy(tiny_llama).to(dtype)), ids.split(8)).fit((2, 3), "stage")
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert narrow == pytest.approx(exact, rel=0.05)


def test_only_blocks_beside_gaps_change(tiny_llama, ids):
    model = adapted(tiny_llama)
    assert set(ResidualFit(model, ids.split(8)).fit((1, 3), "stage")) == {0, 2, 4}
    changed = {n for n, p in model.named_parameters() if "lora_B" in n and p.abs().sum() > 0}
    changed = {n.split("layers.")[1].split(".lora")[0] for n in changed}
    assert changed <= {f"{block}.mlp.{name}_proj" for block in (0, 2, 4) for name in ("gate", "up", "down")}
    assert changed >= {f"{block}.mlp.down_proj" for block in (0, 2, 4)} | {"0.mlp.gate_proj", "2.mlp.gate_proj"}


def without_attention(model, *blocks):
    for block in blocks:
        model.model.layers[block].self_attn.o_proj.weight.data.zero_()


def test_a_block_that_adds_nothing_leaves_nothing_to_do(tiny_llama, ids):
    without_attention(tiny_llama, 2)
    tiny_llama.model.layers[2].mlp.down_proj.weight.data.zero_()
    model = adapted(tiny_llama)
    ResidualFit(model, ids.split(8)).fit((2,), "stage")
    dense = hidden_states(model, ids, (), None)
    torch.testing.assert_close(hidden_states(model, ids, (2,), "stage"), dense, atol=1e-4, rtol=1e-4)


def test_neurons_of_the_missing_block_are_taken_over_with_its_norm(tiny_llama, ids):
    """Block 1 adds nothing, so block 2 can be put in its place to the last digit."""
    without_attention(tiny_llama, 1, 2)
    layers = tiny_llama.model.layers
    layers[1].mlp.down_proj.weight.data.zero_()
    layers[2].post_attention_layernorm.weight.data.uniform_(0.5, 2.0)
    model = adapted(tiny_llama)
    left = ResidualFit(model, ids.split(8)).fit((2,), "stage")
    assert left[1] < 1e-6
    dense = hidden_states(model, ids, (), None)
    torch.testing.assert_close(hidden_states(model, ids, (2,), "stage"), dense, atol=1e-3, rtol=1e-3)


def test_neurons_leave_less_than_a_correction_of_the_last_layer(tiny_model, ids):
    left = {}
    for rank in (63, 64):  # 64 is what any change of the MLP's weights takes
        model = tiny_model("llama")
        without_attention(model, 2)
        left[rank] = ResidualFit(adapted(model, rank), ids.split(8)).fit((2,), "stage")[1]
    assert left[64] < 0.9 * left[63]


def test_dense_weights_and_other_adapters_stay(tiny_llama, ids):
    model = adapted(tiny_llama, rank=4)
    model.add_adapter("other", LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    before = {name: p.detach().clone() for name, p in model.named_parameters() if ".stage." not in name}
    ResidualFit(model, ids.split(8)).fit((3,), "stage")
    for name, parameter in model.named_parameters():
        if name in before:
            assert torch.equal(parameter, before[name]), name


def test_no_missing_block_leaves_the_adapter_as_it_is(tiny_llama, ids):
    model = adapted(tiny_llama, rank=4)
    before = hidden_states(model, ids, (), "stage")
    assert ResidualFit(model, ids.split(8)).fit((), "stage") == {}
    assert torch.equal(hidden_states(model, ids, (), "stage"), before)


def test_a_higher_rank_leaves_less(tiny_model, ids):
    left = {}
    for rank in (2, 16):
        fit = ResidualFit(adapted(tiny_model("llama"), rank), ids.split(8)).fit((2, 3), "stage")
        left[rank] = fit[1]
    assert left[16] < left[2]


def test_a_rank_beyond_the_layers_size_is_as_good_as_the_full_one(tiny_model, ids):
    left = [ResidualFit(adapted(tiny_model("llama"), r), ids.split(8)).fit((2, 3), "stage")[1] for r in (64, 100)]
    assert left[0] == pytest.approx(left[1], rel=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "opt", "gpt_neox", "qwen3"])
def test_the_layer_that_writes_into_the_residual_stream_is_found(tiny_model, ids, name):
    model = adapted(tiny_model(name), rank=8)
    assert set(ResidualFit(model, ids.split(8)).fit((3,), "stage")) == {2}


@pytest.mark.parametrize("name", ["gemma2", "olmo2"])
def test_blocks_with_a_norm_behind_the_mlp_are_left_to_training(tiny_model, ids, name):
    model = adapted(tiny_model(name), rank=8)
    before = hidden_states(model, ids, (3,), "stage")
    assert ResidualFit(model, ids.split(8)).fit((3,), "stage") == {}
    assert torch.equal(hidden_states(model, ids, (3,), "stage"), before)


def test_left_is_what_is_missing_behind_the_gap(tiny_llama, ids):
    """Block 1 comes right before the gap, so what reaches block 3 is what was fitted."""
    model = adapted(tiny_llama)
    left = ResidualFit(model, ids.split(8)).fit((2,), "stage")[1]

    def after_gap(missing, adapter):
        arrived = []
        handle = get_blocks(model)[3].register_forward_pre_hook(lambda module, args: arrived.append(args[0]))
        hidden_states(model, ids, missing, adapter)
        handle.remove()
        return arrived[0]

    dense = after_gap((), None)
    unhealed, healed = (
        ((after_gap((2,), adapter) - dense) / dense.norm(dim=-1, keepdim=True)).pow(2).sum()
        for adapter in (None, "stage")
    )
    assert left == pytest.approx(float(healed / unhealed), rel=1e-3)


def test_stages_share_the_fit_of_a_gap_that_both_have(tiny_llama, ids, monkeypatch):
    model = adapted(tiny_llama)
    model.add_adapter("other", LoraConfig(r=64, target_modules="all-linear", task_type="CAUSAL_LM"))
    solved = []
    solve = GapRegression._take_over_neurons
    monkeypatch.setattr(GapRegression, "_take_over_neurons", lambda self, gap: solved.append(gap) or solve(self, gap))
    fit = ResidualFit(model, ids.split(8))
    left = fit.fit((2,), "stage"), fit.fit((2, 4), "other")
    assert [gap.number for gap in solved] == [1, 3, 3, 5] and left[0][1] == left[1][1]
    both = [hidden_states(model, ids, (2,), adapter) for adapter in ("stage", "other")]
    assert not torch.equal(*both)  # "other" has changed block 3 too
    alone = ResidualFit(model, ids.split(8)).fit((2, 4), "stage")
    assert alone == pytest.approx(left[1]) and set(alone) == {1, 3, 5}


def test_neurons_are_chosen_on_some_tokens_and_counted_on_all(tiny_model, ids, monkeypatch):
    chosen_on = []
    best_features = LeastSquares.best_features

    def spy(problem, prior, count):
        chosen_on.append((problem.rows, len(prior)))
        return best_features(problem, prior, count)

    monkeypatch.setattr(LeastSquares, "best_features", spy)
    left = {}
    for tokens in (8 * 32, 16384):
        monkeypatch.setattr("hf_pdprune.search.gap_regression._SELECTION_TOKENS", tokens)
        left[tokens] = ResidualFit(adapted(tiny_model("llama")), ids.split(8)).fit((2,), "stage")[1]
    width = tiny_model("llama").config.intermediate_size
    # Before the gap and behind it.
    assert chosen_on == 2 * [(8, 2 * width), (24, width)] + 2 * [(24, 2 * width)]
    assert 0 < left[8 * 32] < 1 and 0 < left[16384] < 1


def test_the_block_behind_a_gap_mends_what_the_one_before_it_leaves(tiny_llama, ids):
    model = adapted(tiny_llama)
    both = ResidualFit(model, ids.split(8)).fit((2,), "stage")
    assert set(both) == {1, 3} and both[3] < 1
    dense = hidden_states(model, ids, (), None)
    error = (hidden_states(model, ids, (2,), "stage") - dense).pow(2).mean()
    for name, parameter in model.named_parameters():
        if "layers.3." in name and "lora_B" in name:
            parameter.data.zero_()
    assert error < (hidden_states(model, ids, (2,), "stage") - dense).pow(2).mean()


def test_blocks_beside_gaps():
    assert blocks_beside_gaps(6, (2,)) == {1: ((), (2,)), 3: ((2,), ())}
    assert blocks_beside_gaps(6, (1, 3, 4)) == {0: ((), (1,)), 2: ((1,), (3, 4)), 5: ((3, 4), ())}
    assert blocks_beside_gaps(6, (0, 1, 3)) == {2: ((), (0, 1, 3)), 4: ((3,), ())}
    assert blocks_beside_gaps(6, (0,)) == {1: ((), (0,))}
    assert blocks_beside_gaps(6, (5,)) == {4: ((), (5,))}
    assert blocks_beside_gaps(6, ()) == {}


def test_at_most_twice_as_many_neurons_as_there_is_room_for_are_candidates(tiny_llama, ids, monkeypatch):
    sizes = []
    best_features = LeastSquares.best_features
    monkeypatch.setattr(
        LeastSquares, "best_features", lambda self, prior, n: sizes.append(len(prior)) or best_features(self, prior, n)
    )
    ResidualFit(adapted(tiny_llama), ids.split(8)).fit((2, 3, 4), "stage")
    assert sizes == [2 * tiny_llama.config.intermediate_size] * 2


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("missing", [(2,), (0, 3, 5)], ids=str)
def test_what_an_accelerator_leaves_is_about_what_the_cpu_does(tiny_model, ids, accelerator, name, missing):
    left, errors = [], []
    for device in ("cpu", accelerator):
        model, there = adapted(tiny_model(name)).to(device), ids.to(device)
        dense = hidden_states(model, there, (), None)
        left.append(ResidualFit(model, there.split(8)).fit(missing, "stage"))
        errors.append(float((hidden_states(model, there, missing, "stage") - dense).pow(2).mean()))
    # Neurons that matter about equally little may be chosen otherwise.
    assert left[1] == pytest.approx(left[0], rel=2e-2)
    assert errors[1] == pytest.approx(errors[0], rel=5e-2)
