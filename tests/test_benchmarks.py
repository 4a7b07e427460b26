"""The benchmarks' own machinery: timing in turn, goals, the page, and options that their modules take."""

import argparse
import json
import os
import sys
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
from tiny_models import random_anchors, random_pixels, random_prompts, tiny_model

from benchmarks import __main__ as suite
from benchmarks import alternating, experts, growth, report, training_step
from benchmarks.plain_training import PlainMoECLIP
from benchmarks.report import Goal, Report, describe, origin, publish
from moeclip_hf.modeling.moe_lora import norm_matched_residual


class Clock:
    """Seconds that pass only where a side says so."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def side(self, name: str, *seconds: float):
        """Takes the next of `seconds` at every call."""
        durations = iter(seconds)

        def run() -> None:
            self.calls.append(name)
            self.now += next(durations)

        return run


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(alternating.time, "perf_counter", lambda: clock.now)
    return clock


def test_sides_run_in_turn_and_rounds_that_fill_caches_are_not_counted(clock):
    seconds = alternating.alternate(
        {"fast": clock.side("fast", 9, 1, 3), "slow": clock.side("slow", 8, 2, 4)}, rounds=2
    )
    assert clock.calls == ["fast", "slow"] * 3
    assert seconds == {"fast": [1, 3], "slow": [2, 4]}


def test_every_round_counts_where_none_is_to_fill_caches(clock):
    assert alternating.alternate({"side": clock.side("side", 5, 6)}, rounds=2, uncounted=0) == {"side": [5, 6]}


def test_ratio_is_the_median_over_pairs_of_one_round():
    seconds = {"side": [2.0, 9.0, 4.0], "reference": [1.0, 3.0, 4.0]}
    assert alternating.ratio(seconds, "side", "reference") == 2  # of 2, 3 and 1; the medians' ratio is 4 / 3


@pytest.mark.parametrize(
    ("measured", "at_least", "held"),
    [(1.0, False, True), (1.01, False, False), (0.5, False, True), (1.0, True, True), (0.99, True, False)],
)
def test_a_goal_is_held_up_to_its_limit_and_described_with_its_direction(measured, at_least, held):
    goal = Goal("figure", measured, 1.0, at_least=at_least, unit=" s")
    assert goal.is_held == held
    direction = "at least" if at_least else "at most"
    assert describe(goal) == f"{measured:.3g} s, goal {direction} 1 s" + ("" if held else ": missed")


def test_a_goal_missed_by_little_is_told_with_the_digits_that_miss_it():
    assert describe(Goal("figure", 1.3002, 1.3, unit=" GB")) == "1.3002 GB, goal at most 1.3 GB: missed"


def test_timing_rows_tell_median_least_most_and_ratio():
    seconds = {"side": [2.0, 9.0, 4.0], "reference": [1.0, 3.0, 4.0]}
    assert report.timing_rows(seconds, "reference", digits=1) == [
        ["side", "median s", "min s", "max s", "over reference"],
        ["side", "4.0", "2.0", "9.0", "2.000"],
        ["reference", "3.0", "1.0", "4.0", "1.000"],
    ]


@pytest.mark.parametrize("output", [["--output", "a/b.json"], ["--output=a/b.json"]])
def test_origin_tells_the_command_that_a_reader_can_repeat(monkeypatch, output):
    monkeypatch.setattr(sys, "argv", ["/somewhere/benchmarks/forward.py", "--images", "1", *output, "--rounds", "2"])
    told = origin()
    assert told["command"] == "python -m benchmarks.forward --images 1 --rounds 2"
    assert told["machine"].endswith(f"{os.cpu_count()} cores, {torch.get_num_threads()} threads")
    assert told["versions"]["torch"] == torch.__version__


def document(command: str, *reports: Report) -> dict:
    return {
        "command": command,
        "date": "2026-01-02T03:04+00:00",
        "machine": "a processor, 2 cores, 2 threads",
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
        "reports": [asdict(each) for each in reports],
    }


def test_the_page_holds_every_table_goal_and_picture_and_names_what_is_missing(monkeypatch):
    monkeypatch.setattr(suite, "SUITE", {"forward": (), "startup": (), "growth": ()})
    timed = Report("Forward", [["side", "s"], ["tower", "3"]], [Goal("forward", 1.2, 1.03), Goal("rate", 2, 1, True)])
    drawn = Report("Growth", [["K", "s"], ["4", "5"]], pictures=["images/growth_experts.png"])
    page = suite.compose_page({"forward": document("first", timed), "growth": document("second", drawn)})
    for part in (
        "| forward | 1.2, goal at most 1.03: missed | no |",
        "| rate | 2, goal at least 1 | yes |",
        "Failed or not run, hence without figures: startup.",
        "## `first`\n\n2026-01-02, a processor, 2 cores, 2 threads; python 3.11.7, torch 2.13.0.",
        "**Forward**\n\n| side | s |\n| --- | ---: |\n| tower | 3 |",
        "![Growth](images/growth_experts.png)",
    ):
        assert part in page
    assert page.index("## `first`") < page.index("## `second`")


def test_what_is_published_makes_a_page(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["/somewhere/benchmarks/forward.py"])
    publish(
        [Report("Forward", [["side"], ["tower"]], [Goal("forward", 1.0, 1.03)])], tmp_path / "new" / "forward.json"
    )
    page = suite.compose_page({"forward": json.loads((tmp_path / "new" / "forward.json").read_text())})
    assert "## `python -m benchmarks.forward`" in page
    assert "| forward | 1, goal at most 1.03 | yes |" in page


def test_a_benchmark_that_fails_leaves_no_old_figures_and_the_status_says_so(monkeypatch, tmp_path):
    """The others' figures are kept: the good one's are new, and those of the one that was not run are old."""
    monkeypatch.setattr(suite, "SUITE", {"good": ("a",), "bad": ("b", "--option"), "other": ("c",)})
    for name in suite.SUITE:
        (tmp_path / f"{name}.json").write_text(json.dumps(document(f"old {name}")))
    commands = []

    def run_process(command: list[str], check: bool) -> CompletedProcess:
        commands.append(command[1:-1])
        if "benchmarks.b" in command:
            return CompletedProcess(command, 1)
        Path(command[-1]).write_text(json.dumps(document("new good")))
        return CompletedProcess(command, 0)

    monkeypatch.setattr(suite.subprocess, "run", run_process)
    page = tmp_path / "page.md"
    options = ["--only", "bad", "good", "--folder", str(tmp_path), "--page", str(page)]
    monkeypatch.setattr(sys, "argv", ["benchmarks", *options])
    with pytest.raises(SystemExit, match="failed: bad"):
        suite.main()
    assert commands == [["-m", "benchmarks.b", "--option", "--output"], ["-m", "benchmarks.a", "--output"]]
    headings = [line for line in page.read_text().splitlines() if line.startswith("## ")]
    assert headings == ["## `new good`", "## `old other`"]
    assert "without figures: bad." in page.read_text()


def test_no_benchmark_at_all_writes_the_page_anew(monkeypatch, tmp_path):
    (tmp_path / "forward.json").write_text(json.dumps(document("old")))
    page = tmp_path / "page.md"
    monkeypatch.setattr(sys, "argv", ["x", "--only", "--folder", str(tmp_path), "--page", str(page)])
    suite.main()
    assert "## `old`" in page.read_text()


class ParsedError(Exception):
    """Stops a benchmark behind its options."""


@pytest.mark.parametrize("name", suite.SUITE)
def test_every_entry_of_the_suite_is_a_module_that_takes_its_options(name, monkeypatch):
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(self: argparse.ArgumentParser):
        raise ParsedError(parse(self))

    module, *options = suite.SUITE[name]
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    monkeypatch.setattr(sys, "argv", [module, *options, "--output", "figures.json"])
    with pytest.raises(ParsedError) as stopped:
        import_module(f"benchmarks.{module}").main()
    assert stopped.value.args[0].output == Path("figures.json")


def test_numbers_of_images_grow_tenfold_up_to_a_bound_of_both():
    assert growth.counts_of("metrics", None) == (1_000, 10_000, 100_000, 1_000_000)
    assert growth.counts_of("predictions", None) == (100, 1_000, 10_000, 100_000, 1_000_000)
    assert growth.counts_of("predictions", 100_000)[-1] == 100_000
    assert growth.counts_of("metrics", 5_000) == (1_000,)


def test_a_process_apart_has_the_allocator_it_is_told_and_no_other(monkeypatch):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1")
    names = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")
    told = training_step.ALLOCATORS["given-back"]
    seen = [training_step.apart(os.getenv, name, allocator="given-back") for name in names]
    assert seen == [None, told["MALLOC_MMAP_THRESHOLD_"], None]
    assert os.environ["MALLOC_TRIM_THRESHOLD_"] == "1"


@pytest.mark.parametrize("num_experts", [1, 4])
def test_the_plain_forward_pass_and_loss_are_those_of_the_model(num_experts):
    model = tiny_model(num_experts=num_experts, num_experts_per_tok=min(2, num_experts), lora_dropout=0.0)
    plain = PlainMoECLIP(model).eval()
    pixel_values, anchors = random_pixels(), random_anchors()
    with torch.inference_mode():
        outputs = model(pixel_values, text_embeds=anchors)
        maps, logits, _ = plain.score(pixel_values, anchors[0])
    logits_of_maps = torch.stack(maps, dim=1)
    torch.testing.assert_close(
        logits_of_maps[:, :, 1] - logits_of_maps[:, :, 0], outputs.anomaly_logits, rtol=1e-4, atol=1e-3
    )
    torch.testing.assert_close(logits, outputs.logits_per_image)

    prompts = random_prompts()
    prompts.pop("attention_mask")
    targets = {"labels": torch.tensor([0, 1]), "masks": (torch.arange(800).view(2, 20, 20) > 700).float()}
    model.train()
    loss = model(pixel_values, **prompts, **targets).loss
    torch.testing.assert_close(plain.train()(pixel_values, **prompts, **targets), loss, rtol=1e-5, atol=0)


def test_variants_of_experts_have_the_papers_lambda_unless_they_set_another():
    weights = {
        name: experts.recipe_of(name, 300, 8).residual_weight for name in ("paper", "released", *experts.VARIANTS)
    }
    others = {
        name: changes["residual_weight"] for name, changes in experts.VARIANTS.items() if "residual_weight" in changes
    }
    assert weights == dict.fromkeys(weights, 0.1) | others
    assert (
        experts.recipe_of("paper, lambda 0.03", 300, 8).max_grad_norm
        == experts.recipe_of("paper", 300, 8).max_grad_norm
    )


def test_the_norm_floor_holds_within_its_context_alone():
    token, answer = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 0.01]])
    before = norm_matched_residual(token, answer.clone(), 0.1)
    with pytest.raises(ParsedError), experts.norm_floor(0.01):
        halved = norm_matched_residual(token, answer.clone(), 0.1)
        raise ParsedError
    torch.testing.assert_close(before, torch.tensor([[0.9, 0.1]]), rtol=1e-3, atol=0)
    torch.testing.assert_close(halved, torch.tensor([[0.9, 0.05]]))
    assert torch.equal(norm_matched_residual(token, answer.clone(), 0.1), before)


def test_the_table_of_experts_groups_seeds_under_equal_settings():
    def result(seed: int, ranked: float, **settings) -> dict:
        entry = {"expert_cosine": 0.5, "expert_drift": 0.1, "expert_grad_norm": 2.0}
        loads = {"expert_load/block_1/0": 0.5, "expert_load/block_3/1": 0.125}
        figures = dict.fromkeys(experts.FIGURES, ranked)
        return {
            "variant": "paper", "steps": 300, "batch_size": 8, "image_size": 112, "clip": "0123abcd", "seed": seed,
            "trained": figures, "without_experts": dict.fromkeys(experts.FIGURES, 0.5),
            "log": [entry | {"expert_grad_norm": 7.0}, entry | loads], **settings,
        }  # fmt: skip

    plain = {"variant": "plain-clip", "steps": 0, "seed": 0, "trained": dict.fromkeys(experts.FIGURES, 0.5)}
    others = [result(0, 0.6, batch_size=4), result(0, 0.6, image_size=224), result(0, 0.6, clip="ffff0000")]
    heading, first, *rest = experts.tabulate([result(0, 0.6), result(1, 0.8), *others, plain])
    assert dict(zip(heading, first, strict=True)) == {
        "variant": "paper", "steps": "300", "batch": "8", "pixels": "112", "CLIP": "0123abcd", "seeds": "2",
        "pixel AUROC": "0.700 ± 0.141", "pixel AP": "0.700 ± 0.141", "AUPRO": "0.700 ± 0.141",
        "image AUROC": "0.700 ± 0.141",
        "gain in pixel AUROC": "+0.200 ± 0.141", "gain in pixel AP": "+0.200 ± 0.141", "cosine": "0.5",
        "drift": "0.1", "smallest load": "0.125", "grad norm of B, first": "7", "last": "2",
    }  # fmt: skip
    assert [row[5] for row in rest] == ["1"] * 4
    assert rest[-1][:10] == ["plain-clip", "0", "-", "-", "-", "1", *["0.500"] * 4]
    assert set(rest[-1][10:]) == {"-"}
