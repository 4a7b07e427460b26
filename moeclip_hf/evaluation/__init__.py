"""The benchmark protocol: every image scored once, on any number of processes; figures, tables and pictures."""

from moeclip_hf.evaluation.protocol import evaluate
from moeclip_hf.evaluation.results import EvaluationResult, GroupResult, write_reports

__all__ = ["EvaluationResult", "GroupResult", "evaluate", "write_reports"]
