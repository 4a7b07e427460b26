"""The registry holds what was published about the benchmarks."""

import statistics

import pytest

from moeclip_hf.data import ABLATION, BENCHMARKS, PUBLISHED_MEAN, REPRODUCED_MEAN, get_benchmark
from moeclip_hf.errors import DatasetError


def test_there_are_fourteen_benchmarks_of_two_domains():
    assert len(BENCHMARKS) == 14
    assert sum(one.domain == "industrial" for one in BENCHMARKS.values()) == 5
    assert sum(one.normal for one in BENCHMARKS.values()) == 5238
    assert sum(one.anomalous for one in BENCHMARKS.values()) == 10933
    assert [name for name, one in BENCHMARKS.items() if not one.has_masks] == ["headct"]
    assert sum(one.groups for one in BENCHMARKS.values()) == 15 + 12 + 3 + 1 + 12 + 9


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("MVTec", "mvtec"),
        ("VisA", "visa"),
        ("BTAD", "btad"),
        ("RSDD", "rsdd"),
        ("DTD-Synthetic", "dtd-synthetic"),
        ("Brain", "brain"),
        ("Liver", "liver"),
        ("Retina", "retina"),
        ("headct", "headct"),
        ("Colon_clinicDB", "clinicdb"),
        ("Colon_colonDB", "colondb"),
        ("Colon_cvc300", "cvc300"),
        ("Colon_Kvasir", "kvasir"),
        ("Endo", "endo"),
        ("dtd_synthetic", "dtd-synthetic"),
        ("MVTEC_AD", "mvtec"),
    ],
)
def test_benchmarks_are_found_by_the_names_of_the_index_files(alias, name):
    assert get_benchmark(alias).name == name


def test_an_unknown_name_is_answered_with_the_nearest_and_all():
    with pytest.raises(DatasetError, match=r"did you mean 'kvasir'\? Known are mvtec, visa, .* endo"):
        get_benchmark("kvassir")


@pytest.mark.parametrize(
    ("stated", "column", "measure", "count"),
    [
        (PUBLISHED_MEAN, "published", "image_auroc", 9),
        (PUBLISHED_MEAN, "published", "image_ap", 9),
        (REPRODUCED_MEAN, "reproduced", "image_auroc", 9),
        (REPRODUCED_MEAN, "reproduced", "image_ap", 9),
        (REPRODUCED_MEAN, "reproduced", "pixel_auroc", 13),
        (REPRODUCED_MEAN, "reproduced", "pixel_ap", 13),
    ],
)
def test_the_stated_means_are_the_means_of_the_rows(stated, column, measure, count):
    values = [getattr(getattr(one, column), measure) for one in BENCHMARKS.values()]
    known = [value for value in values if value is not None]

    assert len(known) == count
    assert statistics.mean(known) == pytest.approx(getattr(stated, measure), abs=0.051)


def test_every_part_of_the_method_helps_in_the_published_ablation():
    full, *without = ABLATION

    assert full.variant == "full"
    assert all(one.pixel_auroc < full.pixel_auroc and one.image_auroc < full.image_auroc for one in without)


def test_classes_spelt_otherwise_still_find_their_prompt():
    assert get_benchmark("dtd").prompt_name("Blotchy_099") == "Blotchy"
    assert get_benchmark("mvtec").prompt_name("Metal_Nut") == "metal nut which has four notched edges"
    assert get_benchmark("rsdd").prompt_name("rail") == "metal"
    assert get_benchmark("visa").prompt_name("new_part") == "new part"


def test_the_registry_cannot_be_changed():
    with pytest.raises(TypeError):
        BENCHMARKS["mine"] = BENCHMARKS["mvtec"]
    with pytest.raises(TypeError):
        BENCHMARKS["mvtec"].classes["bottle"] = "flask"
    with pytest.raises(AttributeError):
        BENCHMARKS["mvtec"].normal = 0
