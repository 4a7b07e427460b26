"""Evaluations: the protocol held to a plain computation; the same figures however the work is cut; what is written."""

import csv
import io
import json
import os
import shutil
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmark_trees import ALL, DTD_FOLDERS, write_folder, write_tree
from PIL import Image
from sklearn.metrics import average_precision_score, roc_auc_score
from typer.testing import CliRunner

from moeclip_hf.cli import app
from moeclip_hf.data import BENCHMARKS, load_data, read_mask
from moeclip_hf.errors import DatasetError, MoECLIPError, MoECLIPWarning, UnreadableImageError
from moeclip_hf.evaluation import EvaluationResult, GroupResult, evaluate, scoring
from moeclip_hf.evaluation.results import METRICS, caveats, dataset_table, mean_metrics, summary_table
from moeclip_hf.plots import draw_captioned, draw_curves, outline_mask
from moeclip_hf.pretrained import EMBEDDED_CHECKPOINT, load_pretrained

EDGE = 32


@pytest.fixture(scope="module")
def pretrained():
    return load_pretrained(device="cpu")


@pytest.fixture(scope="module")
def benchmarks(tmp_path_factory) -> Path:
    """All 14, with two normal and two anomalous images a class where a benchmark has them."""
    root = tmp_path_factory.mktemp("benchmarks")
    for name in ALL:
        write_tree(name, root / name, normal=2, anomalous=2)
    return root


def run(*arguments: str | Path):
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments), "--device", "cpu", "--image-size", str(EDGE)])


def plain_scores(pretrained, rows, size: int):
    """Maps, image scores and masks, one image at a time."""
    model, processor = pretrained
    maps, scores, masks = [], [], []
    for row in rows:
        inputs = processor(
            images=row["image"],
            text=[row["prompt_name"]],
            size={"height": size, "width": size},
            return_tensors="pt",
        )
        with torch.no_grad():
            outputs = model(**inputs)
        maps.append(processor.post_process_anomaly_maps(outputs, (size, size), row["domain"])[0].numpy())
        scores.append((outputs.logits_per_image[0, 1].item() + 1) / 2)
        mask = Image.fromarray(read_mask(row).astype(np.uint8) * 255).resize((size, size), Image.Resampling.NEAREST)
        masks.append(np.asarray(mask) > 0)
    return np.array(maps), np.array(scores), np.array(masks)


def scaled(values: np.ndarray) -> np.ndarray:
    if values.min() >= 0 and values.max() <= 1:
        return values
    return (values - values.min()) / (values.max() - values.min())


@pytest.mark.parametrize(("name", "batch_size"), [("btad", 2), ("brain", 3), ("brain", 8)])
def test_figures_are_those_of_a_plain_computation_over_whole_groups(pretrained, tmp_path, name, batch_size):
    write_tree(name, tmp_path, normal=4, anomalous=3, size=(41, 30))
    rows = load_data(name, tmp_path)
    result = evaluate(pretrained, rows, batch_size=batch_size, image_size=40)
    assert (result.dataset, result.domain) == (name, rows[0]["domain"])
    assert [group.group for group in result.groups] == sorted(set(rows["group"]))
    for group in result.groups:
        members = [index for index, of in enumerate(rows["group"]) if of == group.group]
        maps, scores, masks = plain_scores(pretrained, rows.select(members), 40)
        labels = np.array(rows["label"])[members]
        fused = scaled(maps).max(axis=(1, 2))
        if result.domain == "industrial":
            fused = (fused + scaled(scores)) / 2
        assert (group.normal, group.anomalous) == (4, 3)
        assert [(index, label) for index, label, _ in group.scores] == list(zip(members, labels, strict=True))
        assert [score for *_, score in group.scores] == pytest.approx(fused, abs=2e-4)
        truth, pixels = masks.ravel(), maps.ravel()
        for figure, expected in (
            ("image_auroc", roc_auc_score(labels, fused)),
            ("image_ap", average_precision_score(labels, fused)),
            ("pixel_auroc", roc_auc_score(truth, pixels)),
            ("pixel_ap", average_precision_score(truth, pixels)),
        ):
            assert group.metrics[figure] == pytest.approx(expected, abs=1e-4), figure


def test_every_image_goes_through_the_model_once_in_batches_of_one_group(pretrained, benchmarks, monkeypatch):
    rows = load_data("dtd-synthetic", benchmarks)
    reads: Counter[int] = Counter()
    read_row = scoring.read_row
    monkeypatch.setattr(scoring, "read_row", lambda rows, index: (reads.update([index]), read_row(rows, index))[1])
    result = evaluate(pretrained, rows, batch_size=3, image_size=EDGE)
    assert reads == Counter(range(len(rows)))
    assert [group.group for group in result.groups] == DTD_FOLDERS
    assert result.normal == result.anomalous == 2 * len(DTD_FOLDERS)
    for batch in scoring.plan_batches(list(rows["group"]), 3):
        assert {rows[index]["group"] for index in batch.indices} == {batch.group}


def test_a_model_that_was_left_in_training_mode_is_evaluated_without_dropout(pretrained, tmp_path):
    write_tree("btad", tmp_path, normal=2, anomalous=2)
    rows = load_data("btad", tmp_path)
    expected = evaluate(pretrained, rows, image_size=EDGE)
    pretrained.model.train()
    assert evaluate(pretrained, rows, image_size=EDGE).metrics == expected.metrics
    inputs = torch.randn(2, 3, EDGE, EDGE), pretrained.encode_class("wood")
    maps, _ = pretrained.patch_maps(*inputs)
    pretrained.model.train()
    assert torch.equal(pretrained.patch_maps(*inputs)[0], maps)


def test_undefined_figures_are_none_and_left_out_of_means(pretrained, benchmarks):
    scans, polyps = (
        evaluate(pretrained, load_data(name, benchmarks), image_size=EDGE) for name in ("headct", "clinicdb")
    )
    for figure in METRICS:
        undefined, defined = (scans, polyps) if figure.startswith("pixel") else (polyps, scans)
        assert undefined.metrics[figure] is None
        assert mean_metrics([undefined.metrics, defined.metrics])[figure] == defined.metrics[figure] is not None
    *_, mean, published, reproduced = dataset_table(polyps)
    assert mean[:5] == ["mean", "0/2", "—", "—", "—"]
    assert published[5:7] == ["89.7", "49.9"]
    assert reproduced[5:7] == ["89.1", "48.5"]
    assert "0/612" in caveats(polyps)[-1]


def test_one_process_and_two_come_to_the_same_figures_on_all_layouts(benchmarks, tmp_path):
    options = ["--dataset", "all", "--data-dir", str(benchmarks), "--image-size", str(EDGE), "--device", "cpu"]
    options += ["--batch-size", "1", "--json", "--no-pictures", "--output-dir"]
    one = CliRunner().invoke(app, ["evaluate", *options, str(tmp_path / "one")])
    assert one.exit_code == 0, one.exception
    # Its `--cpu` would start one process only, and `--multi_gpu` starts any number.
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--main_process_port", str(29_500 + os.getpid() % 500), "--mixed_precision", "no"]
    launch += ["--dynamo_backend", "no"]
    two = subprocess.run(
        [sys.executable, *launch, "-m", "moeclip_hf.cli", "evaluate", *options, str(tmp_path / "two")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert two.returncode == 0, two.stderr
    documents = [json.loads(done.stdout) for done in (one, two)]
    for name, document in zip(("one", "two"), documents, strict=True):
        assert json.loads((tmp_path / name / "results.json").read_text())["datasets"] == document["datasets"]
        assert not (tmp_path / name / ".unfinished").exists()
    one, two = documents
    assert [found["dataset"] for found in one["datasets"]] == list(ALL)
    assert len(one["datasets"][4]["groups"]) == 12
    assert one["datasets"] == two["datasets"]
    assert one["metrics"] == two["metrics"]


class InterruptionError(Exception):
    pass


def test_an_interrupted_evaluation_goes_on_where_it_was(pretrained, tmp_path, monkeypatch):
    write_tree("btad", tmp_path / "data", normal=3, anomalous=3)
    rows = load_data("btad", tmp_path / "data")
    whole = evaluate(pretrained, rows, batch_size=2, image_size=EDGE)

    def interrupt(done: int, total: int) -> None:
        assert total == 18
        if done == 8:
            raise InterruptionError

    folder = tmp_path / "unfinished"
    with pytest.raises(InterruptionError):
        evaluate(pretrained, rows, batch_size=2, image_size=EDGE, resume_dir=folder, progress=interrupt)
    read: list[int] = []
    read_row = scoring.read_row
    monkeypatch.setattr(scoring, "read_row", lambda rows, index: (read.append(index), read_row(rows, index))[1])
    resumed = evaluate(pretrained, rows, batch_size=2, image_size=EDGE, resume_dir=folder)
    assert sorted(read) == list(range(8, 18))
    assert resumed.to_dict() == whole.to_dict()
    assert [group.scores for group in resumed.groups] == [group.scores for group in whole.groups]

    with pytest.raises(MoECLIPError, match="batch_size 2, not 3"):
        evaluate(pretrained, rows, batch_size=3, image_size=EDGE, resume_dir=folder)
    with pytest.raises(MoECLIPError, match="images"):
        evaluate(pretrained, rows.select(range(17)), batch_size=2, image_size=EDGE, resume_dir=folder)
    damaged = sorted(folder.glob("*.npz"))[0]
    damaged.write_bytes(damaged.read_bytes()[:100])
    with pytest.raises(MoECLIPError, match="is damaged"):
        evaluate(pretrained, rows, batch_size=2, image_size=EDGE, resume_dir=folder)


@pytest.mark.parametrize(
    "change",
    [lambda mask: Image.new("L", (24, 18), 255).save(mask), lambda mask: os.utime(mask, (0, 0)), Path.unlink],
    ids=["drawn-anew", "of-another-time", "removed"],
)
def test_scores_of_a_mask_that_was_changed_are_not_gone_on_with(pretrained, tmp_path, change):
    write_folder(tmp_path / "data")

    def interrupt(done: int, total: int) -> None:
        if done == 2:
            raise InterruptionError

    options = {"batch_size": 2, "image_size": EDGE, "resume_dir": tmp_path / "unfinished"}
    with pytest.raises(InterruptionError):
        evaluate(pretrained, load_data(tmp_path / "data"), **options, progress=interrupt)
    change(tmp_path / "data" / "masks" / "0.png")
    with pytest.raises(MoECLIPError, match=r"other settings \(images "):
        evaluate(pretrained, load_data(tmp_path / "data"), **options)


def test_scores_of_another_domain_are_not_gone_on_with(pretrained, tmp_path):
    """Maps are smoothed by the domain before they are kept."""
    write_folder(tmp_path / "data")
    evaluate(pretrained, load_data(tmp_path / "data"), image_size=EDGE, resume_dir=tmp_path / "unfinished")
    with pytest.raises(MoECLIPError, match="domain industrial, not medical"):
        evaluate(
            pretrained,
            load_data(tmp_path / "data", domain="medical"),
            image_size=EDGE,
            resume_dir=tmp_path / "unfinished",
        )


def test_settings_under_which_nothing_was_scored_bind_nobody(pretrained, tmp_path, monkeypatch):
    write_folder(tmp_path / "data")
    rows = load_data(tmp_path / "data")

    def run_out_of_memory(*arguments, **options):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(type(pretrained.model), "forward", run_out_of_memory)
        with pytest.raises(MemoryError):
            evaluate(pretrained, rows, batch_size=64, image_size=EDGE, resume_dir=tmp_path / "unfinished")
    resumed = evaluate(pretrained, rows, batch_size=2, image_size=EDGE, resume_dir=tmp_path / "unfinished")
    assert resumed.settings["batch_size"] == 2


def test_a_finished_evaluation_leaves_what_others_have_scored(tmp_path):
    for name in ("parts", "scans"):
        write_folder(tmp_path / name)
    others = tmp_path / "out" / ".unfinished" / "scans"
    others.mkdir(parents=True)
    (others / "000000.npz").touch()
    arguments = ("--data-dir", tmp_path / "parts", "--output-dir", tmp_path / "out", "--no-pictures")
    assert run(*arguments).exit_code == 0
    assert (others / "000000.npz").exists() and not (others.parent / "parts").exists()
    (others / "000000.npz").unlink()
    others.rmdir()
    assert run(*arguments).exit_code == 0
    assert not others.parent.exists()


def test_other_weights_do_not_go_on_with_these_scores(pretrained, tmp_path):
    write_folder(tmp_path / "data")
    rows = load_data(tmp_path / "data")
    evaluate(pretrained, rows, image_size=EDGE, resume_dir=tmp_path / "unfinished")
    other = load_pretrained(device="cpu")
    with torch.no_grad():
        next(other.model.text_adapter.parameters())[0, 0] += 1
    with pytest.raises(MoECLIPError, match="weights"):
        evaluate(other, rows, image_size=EDGE, resume_dir=tmp_path / "unfinished")


@pytest.mark.parametrize(
    ("file", "change", "told"),
    [
        ("config.json", {"residual_weight": 0.3}, "residual_weight 0.03, not 0.3"),
        ("config.json", {"num_experts_per_tok": 1}, "num_experts_per_tok 2, not 1"),
        ("config.json", {"aggregation_sizes": [1, 5]}, r"aggregation_sizes \[1, 3\], not \[1, 5\]"),
        ("config.json", {"vision_config": {"hidden_act": "relu"}}, "vision_config.hidden_act gelu, not relu"),
        ("config.json", {"text_config": {"layer_norm_eps": 0.1}}, "text_config.layer_norm_eps 1e-05, not 0.1"),
        ("processor_config.json", {"image_processor": {"image_mean": [0.5] * 3}}, r"image_mean \[.*\], not \["),
    ],
)
def test_other_settings_of_the_model_do_not_go_on_with_these_scores(pretrained, tmp_path, file, change, told):
    write_folder(tmp_path / "data")
    rows = load_data(tmp_path / "data")
    evaluate(pretrained, rows, image_size=EDGE, resume_dir=tmp_path / "unfinished")
    shutil.copytree(EMBEDDED_CHECKPOINT, tmp_path / "model")
    settings = json.loads((tmp_path / "model" / file).read_text())
    for name, value in change.items():
        settings[name] = settings[name] | value if isinstance(value, dict) else value
    (tmp_path / "model" / file).write_text(json.dumps(settings))
    with pytest.raises(MoECLIPError, match=rf"other settings \({told}.*\):"):
        evaluate(load_pretrained(tmp_path / "model", "cpu"), rows, image_size=EDGE, resume_dir=tmp_path / "unfinished")


def test_the_results_of_an_earlier_evaluation_are_kept(tmp_path):
    for name in ("parts", "scans"):
        write_folder(tmp_path / name)
    out = tmp_path / "out"
    assert run("--data-dir", tmp_path / "parts", "--output-dir", out).exit_code == 0
    written = {path.name: path.read_bytes() for path in out.iterdir()}
    (out / "notes.txt").write_text("mine")
    (out / "my_images.png").write_bytes(b"mine")
    (out / ".unfinished" / "third").mkdir(parents=True)  # of an evaluation that was given up
    done = run("--data-dir", tmp_path / "scans", "--output-dir", out, "--no-pictures")
    assert done.exit_code == 0
    (kept,) = (path for path in out.iterdir() if path.is_dir() and path.name != ".unfinished")
    assert done.stderr == f"The results that were in {out} are kept in {kept}.\n"
    assert {path.name: path.read_bytes() for path in kept.iterdir()} == written
    assert {path.name for path in out.iterdir()} == {
        *("results.json", "results.csv", "results.md"),
        *(kept.name, "notes.txt", "my_images.png", ".unfinished"),
    }
    assert [one["dataset"] for one in json.loads((out / "results.json").read_text())["datasets"]] == ["scans"]
    again = run("--data-dir", tmp_path / "scans", "--output-dir", out, "--no-pictures")
    assert (again.exit_code, again.stderr) == (0, "")
    assert [path for path in out.iterdir() if path.is_dir() and path.name != ".unfinished"] == [kept]


def test_people_get_tables_reports_and_pictures(tmp_path):
    write_folder(tmp_path / "parts", normal=3, anomalous=3)
    result = run("--data-dir", tmp_path / "parts", "--output-dir", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "parts (industrial)" in result.stdout
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("results.json", "results.csv", "results.md"),
        *("parts_curves.png", "parts_images.png"),
    }
    document = json.loads((tmp_path / "out" / "results.json").read_text())
    assert document["model"]["name"].endswith("moeclip-tiny-textures")
    assert document["versions"].keys() == {"moeclip-hf", "torch", "transformers"}
    (found,) = document["datasets"]
    assert (found["dataset"], found["normal"], found["anomalous"]) == ("parts", 3, 3)
    assert found["settings"]["image_size"] == [EDGE, EDGE]
    (row,) = csv.DictReader((tmp_path / "out" / "results.csv").open())
    assert {name: float(row[name]) for name in METRICS} == found["groups"][0]["metrics"]
    report = (tmp_path / "out" / "results.md").read_text()
    assert f"| object | 3/3 | {100 * found['metrics']['image_auroc']:.1f} |" in report
    for name in ("parts_curves.png", "parts_images.png"):
        assert Image.open(tmp_path / "out" / name).width > 500


def test_a_folder_of_one_class_is_scored_under_the_name_it_is_given(tmp_path):
    write_folder(tmp_path / "parts")
    scored = [
        json.loads(run("--data-dir", tmp_path / "parts", *name, "--output-dir", tmp_path / "out", "--json").stdout)
        for name in ((), ("--class-name", "brick wall"), ("--class-name", "object"))
    ]
    groups = [document["datasets"][0]["groups"][0] for document in scored]
    assert [group["group"] for group in groups] == ["object", "brick wall", "object"]
    assert groups[0]["metrics"] == groups[2]["metrics"] != groups[1]["metrics"]


def test_several_data_sets_and_some_classes_are_evaluated_at_once(benchmarks, tmp_path):
    out = ("--output-dir", tmp_path / "out", "--no-pictures", "--json")
    document = json.loads(run("--dataset", "MVTec,btad", "--data-dir", benchmarks, *out).stdout)
    assert [found["dataset"] for found in document["datasets"]] == ["mvtec", "btad"]
    assert document["datasets"][1]["published"]["image_auroc"] == 0.931
    pair = ("--classes", "carpet,wood", "--dataset", "mvtec", "--data-dir", benchmarks)
    (found,) = json.loads(run(*pair, *out).stdout)["datasets"]
    assert [group["group"] for group in found["groups"]] == ["carpet", "wood"]
    assert not found["is_whole_benchmark"]


@pytest.mark.parametrize("name", ["mvtec", "headct"])
def test_a_folder_that_only_bears_a_benchmarks_name_is_not_compared_with_it(benchmarks, name):
    benchmark = BENCHMARKS[name]
    counts = (benchmark.normal, benchmark.anomalous)
    all_images = GroupResult("all", *counts, dict.fromkeys(METRICS, 0.5), 0.0, {}, (), (), {})
    whole = []
    for source in (name, benchmarks / name):
        rows = load_data(source, benchmarks)
        prompts = tuple(sorted(set(rows["prompt_name"])))
        result = EvaluationResult(name, rows["domain"][0], (all_images,), {}, prompts)
        whole.append(result.is_whole_benchmark)
        told = [note for note in caveats(result) if "own prompts and domain" in note]
        assert len(told) == (source != name)
    assert whole == [True, False]


def test_the_command_says_how_a_folder_is_evaluated_as_the_benchmark_that_it_is_named_after(benchmarks, tmp_path):
    out = ("--output-dir", tmp_path / "out", "--no-pictures", "--json")
    with pytest.warns(MoECLIPWarning, match=f"say --dataset headct --data-dir {benchmarks / 'headct'}"):
        (folder,) = json.loads(run("--data-dir", benchmarks / "headct", *out).stdout)["datasets"]
    assert (folder["prompt_names"], folder["domain"]) == (["object"], "industrial")
    with warnings.catch_warnings():
        warnings.simplefilter("error", MoECLIPWarning)
        asked = ("--dataset", "headct", "--data-dir", benchmarks / "headct")
        (found,) = json.loads(run(*asked, *out).stdout)["datasets"]
    assert (found["prompt_names"], found["domain"]) == (["scan"], "medical")


def test_a_data_set_without_images_is_refused(benchmarks, tmp_path, monkeypatch):
    nothing = load_data("headct", benchmarks).select([])
    monkeypatch.setattr("moeclip_hf.data.load_data", lambda *given, **options: nothing)
    failure = run("--dataset", "someone/parts", "--output-dir", tmp_path / "out").exception
    assert isinstance(failure, DatasetError)
    assert str(failure) == "someone/parts: holds no images"


def test_mistakes_are_named_before_anything_is_scored(benchmarks, tmp_path, monkeypatch, pretrained):
    out = ("--output-dir", tmp_path / "out")
    assert run().exit_code == 2
    assert run("--data-dir", benchmarks, "--domain", "naval").exit_code == 2
    error = run("--dataset", "btad,mvtek", "--data-dir", benchmarks, *out).exception
    assert isinstance(error, DatasetError)
    assert "did you mean 'mvtec'" in str(error)
    assert "one by one" in str(run("--dataset", "btad,BTAD", "--data-dir", benchmarks, *out).exception)
    monkeypatch.setattr("moeclip_hf.evaluation.pictures.find_spec", lambda name: None)
    assert "need matplotlib" in str(run("--dataset", "btad", "--data-dir", benchmarks, *out).exception)
    assert not (tmp_path / "out").exists()

    rows = load_data("btad", benchmarks)
    with pytest.raises(MoECLIPError, match="images of 4 pixels hold no patch of 8"):
        evaluate(pretrained, rows, image_size=4, resume_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()

    import datasets

    mixed = datasets.concatenate_datasets([load_data(name, benchmarks) for name in ("btad", "rsdd")])
    with pytest.raises(DatasetError, match=r"one data set.*btad, rsdd"):
        evaluate(pretrained, mixed)


def test_an_image_that_cannot_be_read_is_named(pretrained, tmp_path):
    write_folder(tmp_path, normal=3)
    (tmp_path / "normal" / "1.png").write_bytes(b"no image")
    with pytest.raises(UnreadableImageError, match=r"normal/1\.png"):
        evaluate(pretrained, load_data(tmp_path), image_size=EDGE)


def test_published_means_stand_beside_all_fourteen_only():
    figures = dict.fromkeys(METRICS, 0.5)
    one = GroupResult("x", 1, 1, figures, 0.0, {}, (), (), {})
    results = [EvaluationResult(name, "industrial", (one,), {}) for name in ALL]
    assert [row[0] for row in summary_table(results)[-3:]] == ["mean", "published", "reproduced"]
    assert summary_table(results)[-2][2:4] == ["89.6", "90.6"]
    assert summary_table(results[:2])[-1][0] == "mean"


def test_curves_that_are_undefined_are_left_out():
    defined = (np.array([0.0, 0.2, 1.0]), np.array([0.0, 0.9, 1.0]))
    of_image, of_pixel = ("image_roc", "image_pr"), ("pixel_roc", "pixel_pr", "pixel_pro")
    whole = dict.fromkeys((*of_image, *of_pixel), defined)
    figure = draw_curves({"a": whole, "b": whole | dict.fromkeys(of_pixel)}, "title")
    assert [len(axes.lines) for axes in figure.axes] == [2, 2, 1, 1, 1]
    figure = draw_curves({"a": dict.fromkeys(of_image) | dict.fromkeys(of_pixel, defined)}, "title")
    assert [axes.get_title() for axes in figure.axes] == ["ROC, pixels", "precision-recall, pixels", "PRO"]


def test_names_are_written_as_they_are_in_pictures():
    names = ["a_$1_$2", "_x", "b"]
    curve = (np.array([0.0, 0.2, 1.0]), np.array([0.0, 0.9, 1.0]))
    kinds = ("image_roc", "image_pr", "pixel_roc", "pixel_pr", "pixel_pro")
    figure = draw_curves({name: dict.fromkeys(kinds, curve) for name in names}, "a_$1_$2")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == names
    figure.savefig(io.BytesIO())
    picture = Image.new("RGB", (8, 8))
    draw_captioned({"$_": [("0.5  a_$1_$2/_x.png", picture)]}, "a_$1_$2").savefig(io.BytesIO())


def test_an_outline_runs_around_its_mask():
    mask = np.zeros((30, 40), dtype=bool)
    mask[10:20, 10:20] = True
    pixels = np.asarray(outline_mask(Image.new("RGB", (40, 30)), mask)).any(axis=2)
    assert pixels[9, 9:21].all()
    assert not pixels[mask].any()
    assert pixels.sum() == 12 * 12 - 10 * 10


def test_the_example_evaluates_a_benchmark(benchmarks, tmp_path, monkeypatch, capsys):
    from examples import evaluate as example

    arguments = ["--dataset", "rsdd", "--data-dir", str(benchmarks), "--output-dir", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *arguments])
    example.main()
    assert "Metal15" in capsys.readouterr().out
    assert (tmp_path / "out" / "results.json").exists()
