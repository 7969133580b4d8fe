import pytest
import torch
from peft import LoraConfig, get_peft_model

from hf_pdprune.adapters import active_adapter
from hf_pdprune.blocks import get_blocks
from hf_pdprune.search.gap_fit import GapFit, TakenNeurons


INPUTS = ("mlp.gate_proj", "mlp.up_proj")
IDS = torch.randint(3, 250, (2, 16), generator=torch.Generator().manual_seed(0))


def adapted(model, rank=80):
    config = LoraConfig(r=rank, lora_alpha=rank / 2, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config, adapter_name="stage").eval()


@pytest.fixture
def neurons(tiny_llama):
    """Every second neuron of block 1, and as many of block 2."""
    width, hidden = tiny_llama.config.intermediate_size, tiny_llama.config.hidden_size
    generator = torch.Generator().manual_seed(0)
    scales = torch.stack([torch.ones(hidden), torch.rand(hidden, generator=generator)])
    columns = torch.randn(width, hidden, generator=generator)
    return TakenNeurons((1, 2), INPUTS, scales, torch.arange(0, 2 * width, 2), columns)


@pytest.fixture
def correction(tiny_llama):
    generator = torch.Generator().manual_seed(0)
    config = tiny_llama.config
    down, up = torch.randn(2, config.intermediate_size, generator=generator), torch.randn(config.hidden_size, 2)
    return down, up


@pytest.fixture
def fits(neurons, correction):
    return {
        "neurons": GapFit(0.5, "mlp.down_proj", neurons),
        "correction": GapFit(0.5, "mlp.down_proj", correction=correction),
    }


def mlp_output(block, hidden):
    with torch.no_grad():
        return block.mlp(hidden)


def test_neurons_are_rows_of_their_blocks_and_columns_of_their_own(tiny_llama, neurons):
    blocks, hidden = get_blocks(tiny_llama), torch.randn(3, tiny_llama.config.hidden_size)
    expected = torch.zeros_like(hidden)
    for block, scale, columns in zip(blocks[1:3], neurons.scales, neurons.columns.chunk(2), strict=True):
        scaled = hidden * scale
        features = torch.nn.functional.silu(block.mlp.gate_proj(scaled)) * block.mlp.up_proj(scaled)
        expected = expected + features[:, ::2] @ columns
    before = mlp_output(blocks[1], hidden)
    with GapFit(0.5, "mlp.down_proj", neurons).active(blocks, 1):
        torch.testing.assert_close(mlp_output(blocks[1], hidden), expected.detach(), atol=1e-4, rtol=1e-4)
    assert torch.equal(mlp_output(blocks[1], hidden), before)


def test_a_correction_adds_to_the_last_layer(tiny_llama, correction):
    block, features = get_blocks(tiny_llama)[1], torch.randn(3, tiny_llama.config.intermediate_size)
    before = block.mlp.down_proj(features)
    with GapFit(0.5, "mlp.down_proj", correction=correction).active(get_blocks(tiny_llama), 1):
        after = block.mlp.down_proj(features)
    down, up = correction
    torch.testing.assert_close(after - before, features @ down.T @ up.T, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["neurons", "correction"])
def test_an_adapter_that_starts_with_it_does_the_same(tiny_llama, fits, kind):
    model = adapted(tiny_llama)
    torch.nn.init.normal_(get_blocks(model)[1].mlp.down_proj.lora_B["stage"].weight)  # what it had is replaced
    before = {name: p.clone() for name, p in model.named_parameters() if "lora_" not in name}
    with torch.no_grad(), active_adapter(model, None), fits[kind].active(get_blocks(model), 1):
        expected = model(IDS).logits
    fits[kind].start_adapter(get_blocks(model), 1, "stage")
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, expected, atol=1e-3, rtol=1e-3)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters() if name in before)


def test_factors_are_of_about_one_size(tiny_llama, fits):
    model = adapted(tiny_llama)
    fits["neurons"].start_adapter(get_blocks(model), 1, "stage")
    for name in ("gate_proj", "down_proj"):  # one is wider, the other is taller
        layer = getattr(get_blocks(model)[1].mlp, name)
        rank = min(layer.weight.shape)
        down, up = layer.lora_A["stage"].weight.data[:rank], layer.lora_B["stage"].weight.data[:, :rank]
        assert float(down.norm() / up.norm()) == pytest.approx(1 / 0.5, rel=1e-3)


def test_own_neurons_as_they_were_add_nothing(tiny_llama):
    model = adapted(tiny_llama)
    block = get_blocks(model)[1]
    width, hidden = tiny_llama.config.intermediate_size, tiny_llama.config.hidden_size
    same = TakenNeurons((1,), INPUTS, torch.ones(1, hidden), torch.arange(width), block.mlp.down_proj.weight.T)
    GapFit(0.0, "mlp.down_proj", same).start_adapter(get_blocks(model), 1, "stage")
    for name in ("gate_proj", "up_proj", "down_proj"):
        assert not getattr(block.mlp, name).get_delta_weight("stage").any()


def test_an_adapter_that_cannot_hold_it_is_refused_and_left_alone(tiny_llama, tiny_model, fits):
    small = adapted(tiny_llama, rank=4)
    before = {name: p.clone() for name, p in small.named_parameters()}
    with pytest.raises(ValueError, match="has rank 4 in mlp.gate_proj of block 1, which takes over others and needs"):
        fits["neurons"].start_adapter(get_blocks(small), 1, "stage")
    assert all(torch.equal(before[name], p) for name, p in small.named_parameters())
    few = get_peft_model(tiny_model("llama"), LoraConfig(r=4, target_modules=["q_proj"]), adapter_name="stage")
    with pytest.raises(ValueError, match="no LoRA in mlp.down_proj of block 1"):
        fits["correction"].start_adapter(get_blocks(few), 1, "stage")


@pytest.mark.parametrize("kind", ["neurons", "correction"])
def test_tensors_hold_all_of_it(tiny_llama, fits, kind):
    again = GapFit.from_tensors(fits[kind].tensors(), "mlp.down_proj", INPUTS)
    outputs = []
    for fit in (fits[kind], again):
        with torch.no_grad(), fit.active(get_blocks(tiny_llama), 1):
            outputs.append(tiny_llama(IDS).logits)
    assert torch.equal(*outputs) and again.left == 0.5


@pytest.mark.parametrize("kind", ["neurons", "correction"])
def test_all_of_it_moves_to_a_device(fits, kind):
    moved = fits[kind].to("meta")
    assert moved.left == 0.5 and moved.output_layer == "mlp.down_proj"
    tensors = moved.neurons.__dict__.values() if moved.neurons else moved.correction
    assert {t.device.type for t in tensors if isinstance(t, torch.Tensor)} == {"meta"}
