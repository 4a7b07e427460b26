"""Data sets: the 14 benchmarks, index files, the Hub and folders of one's own, all as one kind of `datasets.Dataset`.

Augmentation (`moeclip_hf.data.augmentation`) and synthetic textures (`moeclip_hf.data.textures`) are imported by their
own names: they need torch and scipy, and nothing here does.
"""

from moeclip_hf.data.check import CheckReport, Problem, check_benchmark, check_rows
from moeclip_hf.data.loading import load_benchmark, load_data, load_folder, load_hub, load_index
from moeclip_hf.data.records import LABELS, Record, binarize_mask, read_mask
from moeclip_hf.data.registry import (
    ABLATION,
    ABLATION_BENCHMARKS,
    BENCHMARKS,
    EXPERT_SIMILARITY,
    PUBLISHED_MEAN,
    REPRODUCED_MEAN,
    Benchmark,
    Results,
    find_benchmark,
    get_benchmark,
)

__all__ = [
    "ABLATION",
    "ABLATION_BENCHMARKS",
    "BENCHMARKS",
    "EXPERT_SIMILARITY",
    "LABELS",
    "PUBLISHED_MEAN",
    "REPRODUCED_MEAN",
    "Benchmark",
    "CheckReport",
    "Problem",
    "Record",
    "Results",
    "binarize_mask",
    "check_benchmark",
    "check_rows",
    "find_benchmark",
    "get_benchmark",
    "load_benchmark",
    "load_data",
    "load_folder",
    "load_hub",
    "load_index",
    "read_mask",
]
