"""The figures of a test set, against scikit-learn, an exact AUPRO over all thresholds, and reference values."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reduced_metrics import reduce_metrics
from safetensors.numpy import load_file
from skimage import measure
from sklearn.metrics import auc, average_precision_score, precision_recall_curve, roc_auc_score, roc_curve

from moeclip_hf import histogram
from moeclip_hf.errors import MoECLIPError
from moeclip_hf.metrics import CURVE_POINTS, AnomalyMetrics, area_under

FIXTURES = Path(__file__).parent / "fixtures" / "metrics"
IMAGE_FIGURES = ("image_auroc", "image_ap", "image_f1_max")
PIXEL_FIGURES = ("pixel_auroc", "pixel_ap", "pixel_f1_max", "pixel_aupro")


def exact_aupro(maps, masks, limit=0.3):
    """Region by region, over all thresholds."""
    thresholds = np.unique(maps)[::-1]

    def share_at_or_above(scores):
        return 1 - np.searchsorted(np.sort(scores), thresholds) / scores.size

    overlap, count = 0, 0
    for anomaly_map, mask in zip(maps, masks, strict=True):
        regions = measure.label(mask, connectivity=2)
        for number in range(1, regions.max() + 1):
            overlap = overlap + share_at_or_above(anomaly_map[regions == number])
            count += 1
    x = np.append(0, share_at_or_above(maps[masks == 0]))
    y = np.append(0, overlap / count)
    beyond = np.argmax(x > limit)
    y_limit = np.interp(limit, x[beyond - 1 : beyond + 1], y[beyond - 1 : beyond + 1])
    return auc(np.append(x[:beyond], limit), np.append(y[:beyond], y_limit)) / limit


def exact_f1_max(labels, scores):
    precision, recall, _ = precision_recall_curve(labels, scores)
    return np.max(2 * precision * recall / np.maximum(precision + recall, 1e-300))


def exact_pixel_figures(maps, masks):
    labels, scores = masks.ravel(), maps.ravel()
    return {
        "pixel_auroc": roc_auc_score(labels, scores),
        "pixel_ap": average_precision_score(labels, scores),
        "pixel_f1_max": exact_f1_max(labels, scores),
        "pixel_aupro": exact_aupro(maps, masks),
    }


def figures_of(maps, masks, batch=4):
    metrics = measured(maps, masks, batch)
    figures = metrics.compute()
    return {name: figures[name] for name in PIXEL_FIGURES}


def measured(maps, masks, batch=4):
    metrics = AnomalyMetrics("medical")
    for start in range(0, len(maps), batch):
        part = slice(start, start + batch)
        labels = masks[part].any(axis=(1, 2)).astype(int)
        metrics.update(maps[part], np.zeros(len(labels)), masks[part], labels)
    return metrics


def random_masks(rng, images=8, size=32):
    """Normal images, and ones with rectangles that may touch, and single pixels."""
    masks = np.zeros((images, size, size), np.uint8)
    for mask in masks[1:]:
        for _ in range(rng.integers(1, 4)):
            top, left = rng.integers(0, size - 4, 2)
            height, width = rng.integers(1, 9, 2)
            mask[top : top + height, left : left + width] = 1
        mask[tuple(rng.integers(0, size, (2, 3)))] = 1
    return masks


SCORES = {
    "gaussian": lambda x: x.astype(np.float32),
    "tied": lambda x: np.round(2 * x),
    "constant": lambda x: np.full_like(x, -3.5),
    "float16": lambda x: x.astype(np.float16),
    "integers": lambda x: np.round(20 * x).astype(np.int64),
    "tiny": lambda x: (1e-30 * x).astype(np.float32),
    "subnormal": lambda x: (1e-41 * x).astype(np.float32),
    "extreme": lambda x: (1e30 * x).astype(np.float32),
    "extreme in float64": lambda x: 1e300 * x,
    "within 1e-7": lambda x: 0.5 + 1e-7 / (1 + np.exp(-x)),
    "skewed": lambda x: np.exp(30 * x),
    "saturated": lambda x: (1 / (1 + np.exp(-8 * x - 12))).astype(np.float32),
    "one outlier": lambda x: np.where(x == x.min(), 1e30, x).astype(np.float32),
    "mostly zero": lambda x: np.maximum(x - 1.5, 0).astype(np.float32),
    "two scales": lambda x: np.where(abs(x) < 0.5, 1 + 1e-9 * x, x),
}


def scored(kind, rng, images=8, size=32):
    masks = random_masks(rng, images, size)
    return SCORES[kind](rng.standard_normal(masks.shape) + masks), masks


@pytest.mark.parametrize("domain", ["industrial", "medical"])
def test_reference_figures(domain):
    data = load_file(FIXTURES / "scores.safetensors")
    expected = json.loads((FIXTURES / "expected.json").read_text())
    metrics = AnomalyMetrics(domain)
    for start in range(0, 24, 7):
        part = slice(start, start + 7)
        metrics.update(*(data[name][part] for name in ("pixel_scores", "image_scores", "masks", "labels")))
    figures = metrics.compute()
    of_domain = expected[domain.capitalize()]
    for name in IMAGE_FIGURES + PIXEL_FIGURES[:3]:
        assert figures[name] == pytest.approx(of_domain[name], abs=1e-9), name
    for name, percentage in (("image_auroc", "image AUC"), ("image_ap", "image AP"), ("pixel_auroc", "pixel AUC")):
        assert round(100 * figures[name], 2) == pytest.approx(of_domain[percentage])
    assert figures["pixel_aupro"] == pytest.approx(expected["aupro_30"], abs=1e-9)
    assert metrics.num_regions == expected["regions"]
    assert metrics.num_images == 24


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kind", SCORES)
def test_pixel_figures_are_exact_while_the_scores_fit(kind, seed):
    maps, masks = scored(kind, np.random.default_rng(seed))
    assert figures_of(maps, masks) == pytest.approx(exact_pixel_figures(maps, masks), abs=1e-10)
    assert measured(maps, masks).error_bound == 0


@given(st.lists(st.tuples(st.floats(allow_nan=False, allow_infinity=False, width=32), st.booleans()), min_size=2))
@settings(max_examples=200)
def test_any_finite_scores_are_ranked_as_scikit_learn_ranks_them(pixels):
    scores, labels = (np.array(column) for column in zip(*pixels, strict=True))
    metrics = AnomalyMetrics("medical")
    metrics.update(scores.reshape(-1, 1, 1), np.zeros(len(scores)), labels.reshape(-1, 1, 1), labels)
    figures = metrics.compute()
    if labels.all() or not labels.any():
        assert set(figures.values()) == {None}
    else:
        assert figures["pixel_auroc"] == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
        assert figures["pixel_ap"] == pytest.approx(average_precision_score(labels, scores), abs=1e-12)
        assert figures["pixel_f1_max"] == pytest.approx(exact_f1_max(labels, scores), abs=1e-12)
        assert figures["pixel_aupro"] == pytest.approx(
            exact_aupro(scores.reshape(-1, 1, 1), labels.reshape(-1, 1, 1)), abs=1e-12
        )


@pytest.fixture
def coarse(monkeypatch):
    """Budgets so small that a few thousand pixels pass through several levels of coarsening."""
    monkeypatch.setattr(histogram, "TOLERANCE", 2e-3)
    monkeypatch.setattr(histogram, "EXACT_BINS", 256)
    monkeypatch.setattr(histogram, "CHUNK_BYTES", 2**14)


@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.usefixtures("coarse")
def test_coarsened_figures_keep_to_the_bound_they_report(kind):
    maps, masks = scored(kind, np.random.default_rng(5), images=24, size=96)
    metrics = measured(maps, masks)
    figures, expected = metrics.compute(), exact_pixel_figures(maps, masks)
    many_scores = np.unique(maps).size > 10_000
    assert metrics.error_bound > 0 if many_scores else metrics.error_bound >= 0
    assert metrics.error_bound < 0.03
    for name, value in expected.items():
        assert abs(figures[name] - value) <= metrics.error_bound + 1e-12, name


@pytest.mark.usefixtures("coarse")
def test_the_top_of_the_ranking_stays_exact_however_many_pixels_lie_below():
    rng = np.random.default_rng(6)
    maps, masks = rng.standard_normal((24, 96, 96)), np.zeros((24, 96, 96), np.uint8)
    masks[3, 5, 10:30] = 1
    maps[masks == 1] += 5
    metrics = measured(maps, masks)
    assert metrics.error_bound > 0
    figures, expected = metrics.compute(), exact_pixel_figures(maps, masks)
    assert figures["pixel_ap"] == pytest.approx(expected["pixel_ap"], abs=1e-9)
    assert figures["pixel_f1_max"] == pytest.approx(expected["pixel_f1_max"], abs=1e-9)


@pytest.mark.usefixtures("coarse")
def test_small_regions_keep_their_weight_below_large_ones():
    """A handful of pixels below the large regions' 60,000 is little by count, but nearly all regions."""
    rng = np.random.default_rng(7)
    masks = np.zeros((24, 96, 96), np.uint8)
    masks[::2, 4:20:2, 4:20:2] = 1  # 64 regions of one pixel each
    maps = rng.random(masks.shape)
    masks[:, 30:80, 30:80] = 1
    maps[:, 30:80, 30:80] += 1
    metrics = measured(maps, masks)
    assert metrics.num_regions == 24 + 12 * 64
    assert metrics.error_bound < 0.03
    assert metrics.compute()["pixel_aupro"] == pytest.approx(exact_aupro(maps, masks), abs=metrics.error_bound)


@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.usefixtures("coarse")
def test_counts_never_fall_short_and_exceed_by_no_more_than_the_stated_error(kind):
    scores, _ = scored(kind, np.random.default_rng(22), images=24, size=96)
    seen = histogram.ScoreHistogram()
    for part in np.split(scores.ravel(), 36):
        seen.add(part)
    thresholds = np.unique(scores).astype(np.float64)
    _, at_or_above = seen.count_from(thresholds)
    exact = scores.size - np.searchsorted(np.sort(scores.ravel()), thresholds)
    assert (at_or_above >= exact).all()
    assert (at_or_above <= exact * (1 + seen.relative_error)).all()


@pytest.mark.usefixtures("coarse")
def test_memory_does_not_grow_with_the_pixels():
    rng = np.random.default_rng(8)
    metrics = AnomalyMetrics("medical")
    sizes = []
    for images in (64, 64, 128):
        masks = random_masks(rng, images, 96)
        for anomaly_map, mask in zip(rng.standard_normal(masks.shape), masks, strict=True):
            metrics.update(anomaly_map[None], [0.5], mask[None], [1])
        state = metrics.state_dict()
        sizes.append(state["normal.scores"].size + state["anomalous.scores"].size)
    pixels = 256 * 96 * 96
    assert max(sizes) < pixels / 100
    assert sizes[2] < 2 * sizes[0]


def test_figures_of_millions_of_distinct_scores_are_within_1e_4():
    rng = np.random.default_rng(9)
    masks = random_masks(rng, images=6, size=512)
    masks[1:, 100:300, 100:300] = 1
    maps = rng.standard_normal(masks.shape) * rng.uniform(0.5, 2, (6, 1, 1)) + masks
    metrics = measured(maps, masks, batch=1)
    figures = metrics.compute()
    assert 0 < metrics.error_bound < 1e-4
    labels, scores = masks.ravel(), maps.ravel()
    assert figures["pixel_auroc"] == pytest.approx(roc_auc_score(labels, scores), abs=1e-5)
    assert figures["pixel_ap"] == pytest.approx(average_precision_score(labels, scores), abs=1e-5)
    assert figures["pixel_aupro"] == pytest.approx(exact_aupro(maps, masks), abs=1e-5)


def fused(domain, maps, scores):
    """The protocol's image scores, from whole arrays."""
    if maps.min() < 0 or maps.max() > 1:
        maps = (maps - maps.min()) / (maps.max() - maps.min())
    if scores.min() < 0 or scores.max() > 1:
        scores = (scores - scores.min()) / (scores.max() - scores.min())
    peaks = maps.max(axis=(1, 2))
    return (peaks + scores) / 2 if domain == "industrial" else peaks


@pytest.mark.parametrize("domain", ["industrial", "medical"])
@pytest.mark.parametrize(("map_range", "score_range"), [((0, 1), (0, 1)), ((-80, -20), (0.3, 0.7)), ((0, 1), (-2, 5))])
def test_image_figures_follow_the_protocol(domain, map_range, score_range):
    rng = np.random.default_rng(10)
    labels = rng.integers(0, 2, 40)
    maps = rng.uniform(*map_range, (40, 6, 6)) * (1 - 0.1 * rng.random((40, 1, 1)))
    scores = rng.uniform(*score_range, 40)
    metrics = AnomalyMetrics(domain)
    for start in range(0, 40, 16):
        part = slice(start, start + 16)
        metrics.update(maps[part], scores[part], None, labels[part])
    figures, expected = metrics.compute(), fused(domain, maps, scores)
    assert figures["image_auroc"] == pytest.approx(roc_auc_score(labels, expected))
    assert figures["image_ap"] == pytest.approx(average_precision_score(labels, expected))
    assert figures["image_f1_max"] == pytest.approx(exact_f1_max(labels, expected))


def test_equal_maps_outside_the_unit_range_tie_instead_of_dividing_by_zero():
    metrics = AnomalyMetrics("industrial")
    metrics.update(np.full((2, 3, 3), 7.0), [5.0, 5.0], None, [0, 1])
    assert metrics.compute()["image_auroc"] == 0.5


def test_without_masks_pixel_figures_are_undefined():
    metrics = AnomalyMetrics("medical")
    metrics.update(np.random.default_rng(0).random((4, 5, 5)), np.zeros(4), None, [0, 1, 0, 1])
    figures = metrics.compute()
    assert all(figures[name] is None for name in PIXEL_FIGURES)
    assert all(figures[name] is not None for name in IMAGE_FIGURES)


def test_without_normal_images_image_figures_are_undefined():
    rng = np.random.default_rng(0)
    masks = random_masks(rng)[1:]
    figures = measured(rng.random(masks.shape), masks).compute()
    assert all(figures[name] is None for name in IMAGE_FIGURES)
    assert all(figures[name] is not None for name in PIXEL_FIGURES)


@pytest.mark.parametrize("value", [0, 1])
def test_pixels_of_one_kind_leave_pixel_figures_undefined(value):
    figures = measured(np.random.default_rng(0).random((2, 5, 5)), np.full((2, 5, 5), value)).compute()
    assert set(figures.values()) == {None}


def test_nothing_seen_is_undefined():
    metrics = AnomalyMetrics("industrial")
    assert set(metrics.compute().values()) == {None}
    assert set(metrics.curves().values()) == {None}
    assert metrics.error_bound == 0


def test_tensors_and_arrays_give_the_same_figures():
    rng = np.random.default_rng(11)
    masks = random_masks(rng)
    maps = torch.from_numpy(rng.standard_normal(masks.shape)).bfloat16().requires_grad_()
    scores, labels = torch.rand(8), torch.tensor(masks.any(axis=(1, 2)))
    of_tensors, of_arrays = AnomalyMetrics("industrial"), AnomalyMetrics("industrial")
    of_tensors.update(maps, scores, torch.from_numpy(masks).unsqueeze(1).float(), labels)
    of_arrays.update(maps.detach().double().numpy(), scores.numpy(), masks.astype(bool), labels.long().numpy())
    assert of_tensors.compute() == of_arrays.compute()


def test_updating_does_not_depend_on_what_becomes_of_the_arrays():
    rng = np.random.default_rng(12)
    masks = random_masks(rng)
    maps = rng.standard_normal(masks.shape).astype(np.float32)
    expected = exact_pixel_figures(maps, masks)
    metrics = measured(maps, masks)
    maps[:], masks[:] = 0, 0
    assert {name: metrics.compute()[name] for name in PIXEL_FIGURES} == pytest.approx(expected)


def parts_of(rng, images=24, size=96):
    maps, masks = scored("gaussian", rng, images, size)
    bounds = [0, images // 4, images // 2, images // 2, images]
    return [(maps[a:b], masks[a:b]) for a, b in pairwise(bounds)], measured(maps, masks)


def test_merged_parts_equal_a_single_pass_in_any_order():
    parts, single = parts_of(np.random.default_rng(13), size=32)
    for order in ((0, 1, 2, 3), (3, 1, 0, 2)):
        total = AnomalyMetrics("medical")
        for index in order:
            total.merge(measured(*parts[index]))
        assert total.compute() == pytest.approx(single.compute(), abs=1e-12)
        assert total.num_images == single.num_images


@pytest.mark.usefixtures("coarse")
def test_merged_coarse_parts_keep_to_the_bound_in_any_order():
    parts, _ = parts_of(np.random.default_rng(14))
    expected = exact_pixel_figures(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
    for order in ((0, 1, 2, 3), (3, 2, 1, 0)):
        total = AnomalyMetrics("medical")
        for index in order:
            total.merge(measured(*parts[index]))
        figures = total.compute()
        assert 0 < total.error_bound < 0.04
        for name, value in expected.items():
            assert abs(figures[name] - value) <= total.error_bound


def test_merging_leaves_the_other_as_it_was():
    parts, _ = parts_of(np.random.default_rng(15), size=32)
    one, other = measured(*parts[0]), measured(*parts[1])
    before = other.compute()
    one.merge(other)
    one.update(*(np.zeros(shape) for shape in ((1, 4, 4), 1, (1, 4, 4), 1)))
    assert other.compute() == before


def test_metrics_of_different_domains_do_not_merge():
    with pytest.raises(MoECLIPError, match="medical metrics into industrial"):
        AnomalyMetrics("industrial").merge(AnomalyMetrics("medical"))


@pytest.mark.parametrize("budget", ["exact", "coarse"])
def test_an_interrupted_evaluation_goes_on_from_its_state(budget, request, tmp_path):
    if budget == "coarse":
        request.getfixturevalue("coarse")
    parts, _ = parts_of(np.random.default_rng(16))
    whole = measured(*parts[0])
    np.savez(tmp_path / "state.npz", **whole.state_dict())
    resumed = AnomalyMetrics("medical")
    with np.load(tmp_path / "state.npz") as state:
        resumed.load_state_dict(state)
    for metrics in (whole, resumed):
        metrics.merge(measured(*parts[1]))
    assert resumed.compute() == whole.compute()
    assert resumed.error_bound == whole.error_bound
    assert resumed.num_images == whole.num_images


def test_a_state_of_the_other_domain_is_refused():
    parts, _ = parts_of(np.random.default_rng(17), size=32)
    metrics = measured(*parts[0])
    other = AnomalyMetrics("industrial")
    with pytest.raises(MoECLIPError, match="not a state of industrial metrics"):
        other.load_state_dict(metrics.state_dict())
    assert other.num_images == 0


def test_an_incomplete_state_is_refused_and_changes_nothing():
    parts, _ = parts_of(np.random.default_rng(17), size=32)
    state = measured(*parts[0]).state_dict()
    del state["anomalous.weights"]
    metrics = measured(*parts[1])
    before = metrics.compute()
    with pytest.raises(MoECLIPError, match=r"'anomalous\.weights' is missing"):
        metrics.load_state_dict(state)
    assert metrics.compute() == before


def test_every_process_gets_what_all_have_seen(tmp_path):
    """Three processes, the last of which has seen nothing."""
    parts, _ = parts_of(np.random.default_rng(18), size=32)
    for rank, (maps, masks) in enumerate(parts[:2]):
        np.savez(tmp_path / f"{rank}.npz", **measured(maps, masks).state_dict())
    torch.multiprocessing.spawn(reduce_metrics, args=(3, tmp_path), nprocs=3)
    expected = measured(*(np.concatenate(arrays) for arrays in zip(*parts[:2], strict=True))).compute()
    figures = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3)]
    assert figures[0] == pytest.approx(expected, abs=1e-12)
    assert figures[0] == figures[1] == figures[2]


def test_without_a_process_group_all_reduce_changes_nothing():
    parts, _ = parts_of(np.random.default_rng(19), size=32)
    metrics = measured(*parts[0])
    before = metrics.compute()
    metrics.all_reduce()
    assert metrics.compute() == before


def test_curves_are_those_of_scikit_learn():
    maps, masks = scored("tied", np.random.default_rng(20))
    curves = measured(maps, masks).curves()
    labels, scores = masks.ravel(), maps.ravel()
    rate, recall, _ = roc_curve(labels, scores, drop_intermediate=False)
    at = np.linspace(0, 1, 200)
    np.testing.assert_allclose(np.interp(at, *curves["pixel_roc"]), np.interp(at, rate, recall), atol=1e-12)
    precision, recall, _ = precision_recall_curve(labels, scores)
    points = set(zip(recall.round(9), precision.round(9), strict=True))
    ours = [tuple(point) for point in np.stack(curves["pixel_pr"], axis=1).round(9)]
    assert ours[0] == (0, 1)
    assert set(ours) <= points


def test_curves_are_short_and_keep_the_area():
    maps, masks = scored("gaussian", np.random.default_rng(21), size=128)
    metrics = measured(maps, masks)
    curves, figures = metrics.curves(), metrics.compute()
    for name in ("pixel_roc", "pixel_pr", "pixel_pro", "image_roc", "image_pr"):
        x, y = curves[name]
        assert len(x) == len(y) <= CURVE_POINTS
        assert (np.diff(x) >= 0).all() and 0 <= y.min() <= y.max() <= 1 + 1e-12
    assert auc(*curves["pixel_roc"]) == pytest.approx(figures["pixel_auroc"], abs=1e-3)
    assert area_under(curves["pixel_pro"], 0.3) / 0.3 == pytest.approx(figures["pixel_aupro"], abs=1e-3)
    assert all(curves[name][0][0] == 0 and curves[name][0][-1] == 1 for name in ("pixel_roc", "pixel_pro"))


def test_a_step_right_at_the_limit_adds_no_area():
    x, y = np.array([0, 0.2, 0.3, 0.3, 1]), np.array([0, 0.5, 0.5, 0.9, 1])
    assert area_under((x, y), 0.3) == pytest.approx(0.2 * 0.25 + 0.1 * 0.5)


def test_perfect_maps_reach_exactly_1():
    rng = np.random.default_rng(23)
    masks = random_masks(rng)
    figures = measured(rng.random(masks.shape) + masks, masks).compute()
    assert {figures[name] for name in PIXEL_FIGURES} == {1.0}


def test_regions_touching_at_a_corner_are_one():
    masks = np.zeros((1, 6, 6), np.uint8)
    masks[0, [1, 2, 5], [1, 2, 5]] = 1
    assert measured(np.zeros((1, 6, 6)), masks).num_regions == 2
