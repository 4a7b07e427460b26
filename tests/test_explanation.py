"""What `moeclip explain` says about experts, against plain computations on the same hidden states."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from moeclip_hf.cli import app
from moeclip_hf.data.textures import render
from moeclip_hf.errors import CheckpointError, MoECLIPError
from moeclip_hf.explanation import Explanation, LayerExplanation, explain
from moeclip_hf.pretrained import Pretrained, load_pretrained
from moeclip_hf.visualization import draw_attributions, draw_routing

IMAGE = Image.fromarray(render("wire_mesh", "hole", 256, seed=2)[0])


@pytest.fixture(scope="module")
def pretrained() -> Pretrained:
    return load_pretrained(device="cpu", dtype="float64")


@pytest.fixture(scope="module")
def explanation(pretrained) -> Explanation:
    return explain(pretrained, IMAGE, "wire mesh")


@pytest.fixture(scope="module")
def inputs(pretrained) -> dict[str, torch.Tensor]:
    pixel_values = pretrained.processor(images=IMAGE, return_tensors="pt")["pixel_values"].double()
    return {"pixel_values": pixel_values, "text_embeds": pretrained.encode_class("wire mesh")}


@pytest.fixture(scope="module")
def hidden_states(pretrained, inputs) -> list[torch.Tensor]:
    """(N + 1, d) of each block that is adapted, before its experts."""
    seen: list[torch.Tensor] = []
    hooks = [
        pretrained.model.vision_model.encoder.layers[block].register_forward_hook(
            lambda block, arguments, output: seen.append(output[0])
        )
        for block in pretrained.model.config.moe_layers
    ]
    with torch.no_grad():
        pretrained.model(**inputs)
    for hook in hooks:
        hook.remove()
    return seen


def answers(experts, hidden_states: torch.Tensor) -> torch.Tensor:
    """Every expert's output, expert by expert: (K, N + 1, d)."""
    pairs = zip(experts.lora_A, experts.lora_B, strict=True)
    return torch.stack([experts.scaling * (B @ (A @ hidden_states.T)).T for A, B in pairs])


def parts(experts, hidden_states: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """What every expert adds to an adapted block's output: (K, N + 1, d)."""
    weighted = answers(experts, hidden_states) * weights.unsqueeze(-1)
    lengths = hidden_states.norm(dim=-1) / (weighted.sum(dim=0).norm(dim=-1) + 1e-6)
    return experts.residual_weight * lengths.unsqueeze(-1) * weighted


def test_scores_and_maps_are_those_of_a_prediction(pretrained, inputs, explanation):
    with torch.no_grad():
        outputs = pretrained.model(**inputs)
    expected = pretrained.processor.post_process_anomaly_detection(outputs, [(256, 256)])[0]
    assert explanation.score == pytest.approx(expected["score"])
    assert np.allclose(explanation.anomaly_map, expected["map"].numpy())
    assert explanation.is_anomalous is expected["is_anomalous"]


def test_a_model_in_training_mode_is_explained_as_in_use(pretrained, explanation):
    pretrained.model.train()
    again = explain(pretrained, IMAGE, "wire mesh")
    assert not pretrained.model.training
    assert again.score == explanation.score and np.array_equal(again.anomaly_map, explanation.anomaly_map)


def test_blocks_are_counted_from_1_and_maps_have_the_grid_of_patches(explanation):
    assert [layer.block for layer in explanation.layers] == [2, 4, 6, 8]
    for layer in explanation.layers:
        for values in (layer.probabilities, layer.weights, layer.attributions):
            assert values.shape == (4, 40, 40)
        assert layer.top_1.shape == (40, 40)


def test_weights_are_those_of_the_two_most_probable_experts(pretrained, hidden_states, explanation):
    for layer, experts, states in zip(explanation.layers, pretrained.model.moe_layers, hidden_states, strict=True):
        probabilities = torch.softmax(states @ experts.router.weight.T, dim=-1)[1:].detach().numpy()
        assert np.allclose(layer.probabilities.reshape(4, -1).T, probabilities)
        weights = layer.weights.reshape(4, -1).T
        for token, token_weights in zip(probabilities, weights, strict=True):
            chosen = np.sort(np.argsort(token)[-2:])
            assert np.flatnonzero(token_weights).tolist() == chosen.tolist()
            assert np.allclose(token_weights[chosen], token[chosen] / token[chosen].sum())
        assert (layer.top_1.ravel() == probabilities.argmax(axis=1)).all()


def test_cosines_are_those_of_the_experts_outputs(pretrained, hidden_states, explanation):
    for layer, experts, states in zip(explanation.layers, pretrained.model.moe_layers, hidden_states, strict=True):
        outputs = torch.nn.functional.normalize(answers(experts, states[1:]), dim=-1)
        expected = torch.einsum("ind,jnd->ij", outputs, outputs).detach().numpy() / (40 * 40)
        assert np.allclose(layer.output_cosine, expected, atol=1e-6)
        assert layer.mean_output_cosine == pytest.approx((expected.sum() - 4) / 12, abs=1e-6)


@pytest.mark.parametrize("index", [0, 2, 3])
@pytest.mark.parametrize("expert", [0, 2])
def test_attributions_are_what_the_map_gains_when_an_expert_says_more(
    pretrained, inputs, hidden_states, explanation, index, expert
):
    experts = pretrained.model.moe_layers[index]
    weights = torch.from_numpy(explanation.layers[index].weights[:]).flatten(1)
    with torch.no_grad():
        added = parts(experts, hidden_states[index][1:], weights)[expert]

    def mean_probability(step: float) -> float:
        def say_more(experts, arguments, output):
            adapted = output.hidden_states.clone()
            adapted[0, 1:] += step * added
            return output._replace(hidden_states=adapted)

        hook = experts.register_forward_hook(say_more)
        with torch.no_grad():
            outputs = pretrained.model(**inputs)
        hook.remove()
        return outputs.anomaly_logits.sigmoid().mean().item()

    step = 1e-4
    slope = (mean_probability(step) - mean_probability(-step)) / (2 * step)
    assert explanation.layers[index].attributions[expert].sum() == pytest.approx(slope, rel=1e-4, abs=1e-9)


def test_explaining_leaves_the_model_as_it_was(pretrained, explanation):
    assert all(parameter.grad is None for parameter in pretrained.model.parameters())
    assert all(parameter.requires_grad for parameter in pretrained.model.parameters())
    assert not any(layer._forward_hooks for layer in pretrained.model.moe_layers)


def layer_of(weights: list[list[float]], cosine: list[list[float]]) -> LayerExplanation:
    """A layer over a single row of patches; probabilities are the weights."""
    grid = np.array(weights).T[:, np.newaxis]
    return LayerExplanation(18, grid, grid, np.zeros_like(grid), np.array(cosine))


def test_loads_and_shares_are_counted_over_patches():
    layer = layer_of([[0.9, 0.1, 0], [0.6, 0, 0.4], [0, 0.7, 0.3], [1, 0, 0]], np.eye(3).tolist())
    assert layer.load == pytest.approx([0.625, 0.2, 0.175])
    assert layer.chosen_share == [0.75, 0.5, 0.5]
    assert layer.top_1_share == [0.75, 0.25, 0]


def test_a_single_expert_has_no_other_to_be_unlike():
    assert layer_of([[1.0], [1.0]], [[1.0]]).mean_output_cosine is None
    assert layer_of([[1, 0]], [[1, -0.2], [-0.2, 1]]).mean_output_cosine == pytest.approx(-0.2)


def test_a_model_without_experts_is_refused_with_the_remedy(pretrained):
    from moeclip_hf.adapters import full_to_adapter

    adapted = full_to_adapter(pretrained.model, base="clip")
    with pytest.raises(CheckpointError, match="adapter_to_full"):
        explain(pretrained._replace(model=adapted), IMAGE)


def test_a_joined_adapter_is_explained_as_the_model_it_came_from(pretrained, explanation):
    from moeclip_hf.adapters import adapter_to_full, full_to_adapter

    joined = adapter_to_full(full_to_adapter(pretrained.model, base="clip"))
    again = explain(pretrained._replace(model=joined.eval()), IMAGE, "wire mesh")
    for layer, expected in zip(again.layers, explanation.layers, strict=True):
        assert np.allclose(layer.attributions, expected.attributions)


# Pictures


def colours_of(sheet: Image.Image, row: int, column: int, edge: int) -> np.ndarray:
    """The pixels of a picture on a sheet without its caption and margins."""
    left, top = column * (edge + 4), row * (edge + 4)
    return np.asarray(sheet.crop((left + 12, top + 21, left + edge - 12, top + edge - 1))).astype(int)


def test_patches_take_the_colour_of_their_top_expert_and_heat_where_it_is_chosen():
    half = np.zeros((2, 4, 4))
    half[0, :, :2], half[1, :, 2:] = 1, 1
    layer = LayerExplanation(18, half, half, half - half[::-1], np.eye(2))
    image = Image.new("RGB", (80, 80), "white")
    found = Explanation(image, "metal", 0.2, False, np.zeros((80, 80), dtype=np.float32), [], (layer, layer))

    sheet = draw_routing(found, edge=120)
    assert sheet.size == (4 * 124 - 4, 2 * 124 - 4)
    for row in (0, 1):
        for expert, hot in ((0, np.s_[:, 5:40]), (1, np.s_[:, 55:90])):
            picture = colours_of(sheet, row, 1 + expert, 120)
            cold = picture[:, 55:90] if expert == 0 else picture[:, 5:40]
            assert (picture[hot] == picture[hot][0, 0]).all()
            assert (np.abs(cold - 128) <= 1).all()
            assert picture[hot].sum(axis=-1).min() > 500
        assert (colours_of(sheet, row, 0, 120) == 255).all()  # nothing anomalous
        top_1 = colours_of(sheet, row, 3, 120)
        assert (top_1[:, 5:40] == top_1[0, 5]).all()
        assert (top_1[:, 55:90] == top_1[0, 60]).all()
        assert np.abs(top_1[0, 5] - top_1[0, 60]).sum() > 100

    first = colours_of(draw_attributions(found, edge=120), 0, 1, 120)
    assert (first[:, 5:40, 0] > first[:, 5:40, 2] + 100).all()  # red: raises the map
    assert (first[:, 55:90, 2] > first[:, 55:90, 0] + 100).all()  # blue: lowers it
    indifferent = replace(found, layers=(replace(layer, attributions=np.zeros((2, 4, 4))),))
    assert (colours_of(draw_attributions(indifferent, edge=120), 0, 1, 120) == 255).all()


# The command


def run(*arguments):
    return CliRunner().invoke(app, ["explain", *map(str, arguments), "--device", "cpu"])


def test_the_command_writes_pictures_and_figures(tmp_path, explanation):
    IMAGE.save(tmp_path / "mesh.png")
    arguments = (tmp_path / "mesh.png", "--class-name", "wire mesh", "--output-dir", tmp_path / "out")
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts == json.loads((tmp_path / "out" / "mesh_experts.json").read_text())
    assert facts["score"] == pytest.approx(explanation.score, abs=1e-4)
    assert [layer["block"] for layer in facts["layers"]] == [2, 4, 6, 8]
    for layer, expected in zip(facts["layers"], explanation.layers, strict=True):
        assert [expert["load"] for expert in layer["experts"]] == pytest.approx(expected.load, abs=1e-4)
        assert sum(expert["chosen_share"] for expert in layer["experts"]) == pytest.approx(2)
        assert sum(expert["top_1_share"] for expert in layer["experts"]) == pytest.approx(1)
    for name in ("routing", "attributions"):
        assert Image.open(facts[name]).size[0] > 1000
    table = run(*arguments)
    assert table.exit_code == 0
    assert "wire mesh" in table.stdout


def test_what_cannot_be_scored_is_told(pretrained):
    processor = copy.deepcopy(pretrained.processor)
    processor.image_processor.size = {"shortest_edge": 32}
    with pytest.raises(MoECLIPError, match="too long a strip"):
        explain(Pretrained(pretrained.model, processor), Image.new("RGB", (90, 10)))
    spoilt = load_pretrained(device="cpu")
    with torch.no_grad():
        spoilt.model.depthwise_adapter.pointwise.weight.fill_(float("nan"))
    with pytest.raises(MoECLIPError, match="NaN"):
        explain(spoilt, Image.new("RGB", (64, 64)))


def test_an_image_that_cannot_be_read_is_named(tmp_path):
    result = run(tmp_path / "gone.png")
    assert "gone.png: no such file" in str(result.exception)
