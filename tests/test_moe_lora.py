"""The parts of the experts' maths, each against a computation of its own."""

import pytest
import torch

from moeclip_hf.modeling.moe_lora import (
    MoELora,
    balance_loss,
    etf_loss,
    expert_codes,
    expert_gram,
    fofs_projection,
    mix_experts,
    norm_matched_residual,
    route,
)


@pytest.mark.parametrize(("features", "experts", "rank"), [(32, 4, 8), (33, 4, 8), (47, 5, 3), (8, 1, 8)])
def test_fofs_projections_are_orthonormal_and_read_chunks_of_their_own(features, experts, rank):
    projection = fofs_projection(features, experts, rank)
    rows = projection.flatten(0, 1)
    assert torch.allclose(rows @ rows.T, torch.eye(experts * rank), atol=1e-5)
    lengths = [features // experts + (i < features % experts) for i in range(experts)]
    start = 0
    for expert, length in enumerate(lengths):
        outside = torch.ones(features, dtype=torch.bool)
        outside[start : start + length] = False
        assert (projection[expert][:, outside] == 0).all()
        assert (projection[expert][:, ~outside] != 0).all()
        start += length


def test_fofs_refuses_a_rank_that_a_chunk_cannot_hold():
    with pytest.raises(ValueError, match=r"rank \(9\).*8 features.*num_experts \(4\)"):
        fofs_projection(32, 4, 9)


def test_fofs_projections_follow_their_generator():
    draws = [fofs_projection(16, 2, 4, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_routing_keeps_the_k_likeliest_experts_and_scales_their_weights_to_one():
    logits = torch.tensor([[1.0, 3.0, 2.0, -1.0]])
    probabilities, weights = route(logits, 2)
    e = torch.tensor([1.0, 3.0, 2.0, -1.0]).exp()
    assert torch.allclose(probabilities, e / e.sum())
    assert torch.allclose(weights, torch.tensor([[0, e[1] / (e[1] + e[2]), e[2] / (e[1] + e[2]), 0]]))
    assert torch.allclose(route(logits, 4)[1], probabilities)


def test_weights_have_no_gradient_whatever_with_respect_to_experts_that_are_not_chosen():
    logits = torch.randn(200, 5, requires_grad=True)
    _, weights = route(logits, 2)
    (weights * torch.randn(200, 5)).sum().backward()
    assert (logits.grad[weights == 0] == 0).all()
    assert (logits.grad[weights > 0] != 0).all()


def test_tied_routers_choose_k_experts_all_the_same():
    _, weights = route(torch.zeros(5, 4), 2)
    assert (weights.count_nonzero(dim=-1) == 2).all()
    assert torch.allclose(weights.sum(dim=-1), torch.ones(5))


def test_stacked_experts_equal_one_at_a_time():
    x, a, b = torch.randn(3, 7, 20), torch.randn(4, 2, 20), torch.randn(4, 20, 2)
    weights = torch.rand(3, 7, 4)
    expected = sum(weights[..., i : i + 1] * (x @ a[i].T @ b[i].T) for i in range(4))
    assert torch.allclose(mix_experts(expert_codes(x, a), b, weights), expected, atol=1e-4)


def test_gram_from_codes_equals_the_cosines_of_the_outputs():
    x, a, b = torch.randn(6, 20), torch.randn(4, 2, 20), torch.randn(4, 20, 2)
    outputs = torch.stack([x @ a[i].T @ b[i].T for i in range(4)], dim=1)
    expected = torch.nn.functional.cosine_similarity(outputs.unsqueeze(1), outputs.unsqueeze(2), dim=-1)
    codes = expert_codes(x, a)
    assert torch.allclose(expert_gram(codes, b), expected, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # cosines are not rounded
        assert torch.allclose(expert_gram(codes, b), expected, atol=1e-5)


def test_etf_loss_is_zero_for_a_simplex_and_known_for_equal_outputs():
    # Three directions at 120 degrees form the simplex frame of K = 3.
    angles = torch.tensor([0.0, 2 * torch.pi / 3, 4 * torch.pi / 3])
    simplex = torch.stack([angles.cos(), angles.sin()], dim=-1)
    codes = torch.ones(1, 3, 1)
    assert etf_loss(codes, simplex.unsqueeze(-1)).item() == pytest.approx(0, abs=1e-10)
    # Equal outputs: cosines of 1 where -1/2 is due, in 6 of 9 entries.
    assert etf_loss(codes, torch.ones(3, 2, 1)).item() == pytest.approx(6 / 9 * 1.5**2)


def test_etf_loss_and_its_gradient_are_finite_where_experts_answer_with_zero():
    lora_B = torch.zeros(4, 20, 2, requires_grad=True)
    loss = etf_loss(torch.randn(5, 4, 2), lora_B)
    loss.backward()
    assert loss.item() == pytest.approx((4 * 1 + 12 / 9) / 16)
    assert torch.isfinite(lora_B.grad).all()


def test_balance_loss_is_the_squared_coefficient_of_variation_of_the_load():
    assert balance_loss(torch.full((6, 4), 0.25)).item() == pytest.approx(0)
    # Loads 4, 0, 0, 0: mean 1, unbiased variance 4.
    assert balance_loss(torch.tensor([[1.0, 0, 0, 0]] * 4)).item() == pytest.approx(4, rel=1e-5)
    assert balance_loss(torch.ones(5, 1)).item() == 0


def test_the_residual_keeps_lengths_and_mixes_by_its_weight():
    x, update = torch.randn(4, 10), 50 * torch.randn(4, 10)
    assert torch.allclose(norm_matched_residual(x, update, 1.0).norm(dim=-1), x.norm(dim=-1), rtol=1e-4)
    assert torch.equal(norm_matched_residual(x, update, 0.0), x)
    direction = update / update.norm(dim=-1, keepdim=True)
    expected = 0.3 * direction * x.norm(dim=-1, keepdim=True) + 0.7 * x
    assert torch.allclose(norm_matched_residual(x, update, 0.3), expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_residual_survives_lengths_that_half_precision_cannot_hold(dtype):
    x = torch.full((1, 4096), 2000.0, dtype=dtype)  # of length 128,000: beyond float16
    adapted = norm_matched_residual(x, torch.ones_like(x), 0.1)
    assert adapted.dtype == dtype
    assert torch.allclose(adapted.float(), x.float(), rtol=0.01)


@pytest.mark.parametrize(("experts", "chosen"), [(1, 1), (4, 2), (4, 4), (5, 3)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("recorded", [True, False], ids=["gradients", "no gradients"])
def test_the_layer_equals_its_equations_in_float64_a_token_and_an_expert_at_a_time(
    experts, chosen, dtype, tolerance, recorded
):
    layer = MoELora(40, num_experts=experts, num_experts_per_tok=chosen, rank=3, alpha=6, residual_weight=0.3).eval()
    for parameter in (layer.router.weight, layer.lora_A, layer.lora_B):
        torch.nn.init.normal_(parameter)
    layer.to(dtype)
    x = torch.randn(2, 9, 40).to(dtype)
    x[0, 0] = 0  # all experts answer with zero
    with torch.set_grad_enabled(recorded):
        adapted = layer(x).hidden_states
    assert adapted.dtype == dtype

    x, router, a, b = (t.double() for t in (x, layer.router.weight.detach(), layer.lora_A, layer.lora_B.detach()))
    for token, result in zip(x.flatten(0, 1), adapted.detach().double().flatten(0, 1), strict=True):
        likelihood = (router @ token).exp()
        best = likelihood.argsort(descending=True)[:chosen]
        answer = sum(2 * likelihood[i] / likelihood[best].sum() * (b[i] @ a[i] @ token) for i in best)
        expected = 0.3 * answer * token.norm() / (answer.norm() + 1e-6) + 0.7 * token
        assert (result - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("recorded", [True, False], ids=["gradients", "no gradients"])
def test_experts_that_answer_with_zero_leave_the_rest_of_the_token(recorded):
    layer = MoELora(20, rank=2).eval()
    layer.reset_parameters()
    x = torch.randn(3, 20)
    with torch.set_grad_enabled(recorded):
        adapted = layer(x).hidden_states
    assert torch.allclose(adapted, 0.9 * x, rtol=1e-6)


def test_the_gradient_of_the_residual_is_the_one_of_finite_differences():
    x, update = (torch.randn(4, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda x, update: norm_matched_residual(x, update, 0.3), (x, update))


def test_dropout_acts_on_the_experts_in_training_and_never_on_the_router():
    layer = MoELora(20, rank=2, dropout=0.5)
    torch.nn.init.normal_(layer.router.weight)
    torch.nn.init.normal_(layer.lora_B)
    torch.nn.init.normal_(layer.lora_A)
    x = torch.randn(3, 20)
    first, second = layer.train()(x), layer(x)
    assert torch.equal(first.router_logits, second.router_logits)
    assert not torch.allclose(first.hidden_states, second.hidden_states)
    layer.eval()
    assert torch.equal(layer(x).hidden_states, layer(x).hidden_states)
