"""The layers of the tuner against plain computations, on a block and on a linear layer."""

from types import SimpleNamespace

import pytest
import torch
from plain_moeclip import plain_experts
from torch import nn

from moeclip_hf.tuner import MoELoraBlock, MoELoraConfig, MoELoraLinear, record_outputs

WIDTH = 20


class Block(nn.Module):
    """A block that returns its attention too, or its hidden states alone."""

    def __init__(self, returns_tuple: bool = False):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.mlp = nn.Linear(WIDTH, WIDTH)
        self.returns_tuple = returns_tuple

    def forward(self, hidden_states, scale=1.0):
        hidden_states = hidden_states + scale * self.mlp(self.norm(hidden_states))
        return (hidden_states, "attention") if self.returns_tuple else hidden_states


def randomise(layer, adapter_name: str = "default"):
    with torch.no_grad():
        layer.moe_lora_experts[adapter_name].router.weight.normal_()
        layer.moe_lora_experts[adapter_name].lora_B.normal_()
    return layer.eval()


def plain_block(layer, config: MoELoraConfig, hidden_states, adapter_name: str = "default"):
    names = SimpleNamespace(
        lora_alpha=config.lora_alpha,
        lora_rank=config.r,
        num_experts=config.num_experts,
        num_experts_per_tok=config.num_experts_per_tok,
        residual_weight=config.residual_weight,
    )
    return plain_experts(layer.moe_lora_experts[adapter_name], hidden_states, names)


def plain_linear(layer: MoELoraLinear, config: MoELoraConfig, hidden_states):
    """Token by token and expert by expert."""
    experts, base = layer.moe_lora_experts["default"], layer.base_layer
    output = hidden_states @ base.weight.T + base.bias
    probabilities = torch.softmax(hidden_states @ experts.router.weight.T, dim=-1)
    for index in torch.cartesian_prod(*(torch.arange(n) for n in hidden_states.shape[:-1])):
        position = tuple(index.tolist())
        best = probabilities[position].argsort(descending=True)[: config.num_experts_per_tok]
        for expert in best:
            weight = probabilities[position][expert] / probabilities[position][best].sum()
            answer = experts.lora_B[expert] @ (experts.lora_A[expert] @ hidden_states[position])
            output[position] += weight * config.lora_alpha / config.r * answer
    return output


@pytest.mark.parametrize("use_fofs", [True, False])
@pytest.mark.parametrize("returns_tuple", [True, False])
@torch.no_grad()
def test_a_block_is_adapted_as_the_equations_say(use_fofs, returns_tuple):
    torch.manual_seed(0)
    config = MoELoraConfig(r=3, lora_alpha=5, num_experts=3, residual_weight=0.3, use_fofs=use_fofs)
    layer = randomise(MoELoraBlock(Block(returns_tuple), "default", config))
    inputs = torch.randn(2, 7, WIDTH)
    base = layer.base_layer(inputs, scale=0.5)
    output = layer(inputs, scale=0.5)
    if returns_tuple:
        assert output[1] == "attention"
        base, output = base[0], output[0]
    expected, _, _ = plain_block(layer, config, base)
    torch.testing.assert_close(output, expected)
    assert not torch.allclose(output, base, atol=0.1)


@pytest.mark.parametrize("use_fofs", [True, False])
@torch.no_grad()
def test_a_linear_layer_gets_plain_routed_lora_without_a_residual(use_fofs):
    torch.manual_seed(0)
    config = MoELoraConfig(r=2, lora_alpha=5, num_experts=4, num_experts_per_tok=3, use_fofs=use_fofs)
    layer = randomise(MoELoraLinear(nn.Linear(WIDTH, 6), "default", config))
    inputs = torch.randn(2, 7, WIDTH)
    torch.testing.assert_close(layer(inputs), plain_linear(layer, config, inputs))


@torch.no_grad()
def test_fresh_experts_leave_a_linear_layer_alone_and_shorten_a_block():
    inputs = torch.randn(2, 7, WIDTH)
    linear = MoELoraLinear(nn.Linear(WIDTH, 6), "default", MoELoraConfig(r=2)).eval()
    assert torch.equal(linear(inputs), linear.base_layer(inputs))
    block = MoELoraBlock(Block(), "default", MoELoraConfig(r=2, residual_weight=0.25)).eval()
    torch.testing.assert_close(block(inputs), 0.75 * block.base_layer(inputs))


def test_experts_are_drawn_with_the_deviation_asked_for_and_then_have_no_spike_of_gradient():
    torch.manual_seed(0)
    inputs, norms = torch.randn(2, 50, WIDTH), {}
    for deviation in (0.0, 0.02):
        config = MoELoraConfig(r=5, num_experts=4, lora_dropout=0.0, initializer_range=deviation)
        layer = MoELoraBlock(Block(), "default", config)
        experts = layer.moe_lora_experts["default"]
        for weight in (experts.lora_B, experts.router.weight):
            assert weight.std().item() == pytest.approx(deviation, rel=0.2)
        (layer(inputs) * torch.randn(2, 50, WIDTH)).sum().backward()
        norms[deviation] = experts.lora_B.grad.norm()
    assert norms[0.0] > 1e4 * norms[0.02]


def test_fofs_rows_are_orthonormal_and_no_parameter():
    experts = MoELoraBlock(Block(), "default", MoELoraConfig(r=5, num_experts=3)).moe_lora_experts["default"]
    rows = experts.lora_A.flatten(0, 1)
    torch.testing.assert_close(rows @ rows.T, torch.eye(15))
    assert "lora_A" not in dict(experts.named_parameters())


@torch.no_grad()
def test_active_adapters_work_one_behind_the_other():
    torch.manual_seed(0)
    first, second = MoELoraConfig(r=3, num_experts=3), MoELoraConfig(r=2, num_experts=5)
    layer = randomise(MoELoraBlock(Block(), "first", first), "first")
    layer.update_layer("second", second)
    randomise(layer, "second")
    inputs = torch.randn(2, 7, WIDTH)
    expected, _, _ = plain_block(layer, first, layer.base_layer(inputs), "first")
    torch.testing.assert_close(layer(inputs), expected)
    layer.set_adapter(["first", "second"])
    expected, _, _ = plain_block(layer, second, expected, "second")
    torch.testing.assert_close(layer(inputs), expected)


@torch.no_grad()
def test_experts_answer_in_float32_and_in_the_type_asked_in():
    torch.manual_seed(0)
    config = MoELoraConfig(r=3, num_experts=3)
    layer = randomise(MoELoraBlock(Block().bfloat16(), "default", config))
    inputs = torch.randn(2, 7, WIDTH, dtype=torch.bfloat16)
    experts = layer.moe_lora_experts["default"]
    assert {t.dtype for t in (experts.lora_A, experts.lora_B, experts.router.weight)} == {torch.float32}
    expected, _, _ = plain_block(layer, config, layer.base_layer(inputs).float())
    assert torch.equal(layer(inputs), expected.bfloat16())


def test_recorded_terms_equal_the_plain_ones_and_nothing_is_recorded_outside():
    torch.manual_seed(0)
    config = MoELoraConfig(r=3, num_experts=3, lora_dropout=0.0)
    layer = randomise(MoELoraBlock(Block(), "default", config)).train()
    inputs = torch.randn(2, 7, WIDTH)
    with record_outputs(layer) as outputs:
        layer(inputs)
    layer(inputs)
    (output,) = outputs
    _, etf, balance = plain_block(layer, config, layer.base_layer(inputs))
    torch.testing.assert_close(output.etf_loss, etf)
    torch.testing.assert_close(output.balance_loss, balance)
    assert output.router_logits.shape == (2, 7, 3)


def test_terms_of_the_loss_are_for_training_alone():
    layer = MoELoraBlock(Block(), "default", MoELoraConfig(r=3)).eval()
    with record_outputs(layer) as outputs:
        layer(torch.randn(2, 7, WIDTH))
    assert (outputs[0].etf_loss, outputs[0].balance_loss) == (None, None)


@pytest.mark.parametrize("within_block", [True, False], ids=["linear within", "block around"])
def test_experts_that_checkpointing_runs_twice_are_recorded_once_and_with_their_gradient(within_block):
    torch.manual_seed(0)
    config = MoELoraConfig(r=3, num_experts=3, lora_dropout=0.0)
    block = Block()
    if within_block:
        block.mlp = randomise(MoELoraLinear(block.mlp, "default", config))
        model, experts = block, block.mlp.moe_lora_experts["default"]
    else:
        model = randomise(MoELoraBlock(block, "default", config))
        experts = model.moe_lora_experts["default"]
    model.train()
    inputs = torch.randn(2, 7, WIDTH)

    def gradient_of_terms(run):
        experts.zero_grad()
        with record_outputs(model) as outputs:
            run(inputs)
        (output,) = outputs
        (output.etf_loss + output.balance_loss).backward()
        assert len(outputs) == 1
        return experts.lora_B.grad.clone(), experts.router.weight.grad.clone()

    plain = gradient_of_terms(model)
    checkpointed = gradient_of_terms(lambda x: torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False))
    for expected, actual in zip(plain, checkpointed, strict=True):
        assert expected.any()
        assert torch.equal(expected, actual)


def test_what_has_no_normalisation_is_refused_as_a_block():
    with pytest.raises(TypeError, match=r"Conv2d cannot be adapted: targets are nn\.Linear and transformer blocks"):
        MoELoraBlock(nn.Conv2d(3, 3, 1), "default", MoELoraConfig())


def test_a_rank_beyond_an_experts_chunk_is_refused_with_both_values():
    with pytest.raises(ValueError, match=r"rank \(6\) exceeds the 5 features that each of num_experts \(4\)"):
        MoELoraBlock(Block(), "default", MoELoraConfig(r=6, num_experts=4))


def test_merging_a_layer_is_refused_with_the_reason():
    layer = MoELoraBlock(Block(), "default", MoELoraConfig(r=3))
    with pytest.raises(ValueError, match="cannot be merged: a token's experts depend on the token"):
        layer.merge()
