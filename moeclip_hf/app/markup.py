"""Pieces of HTML. Whatever comes from people, files or checkpoints is escaped here, and nowhere else put into HTML."""

from __future__ import annotations

from html import escape

from moeclip_hf.app.inspector import Inspection, ModelChoice

INVITATION = "Drop an image, or choose a sample."


def notice(text: str, is_error: bool = False) -> str:
    """A line where a result would stand."""
    role, kind = ("alert", "error") if is_error else ("status", "hint")
    return f'<p class="moeclip-notice {kind}" role="{role}">{escape(text)}</p>'


def verdict(inspection: Inspection, threshold: float) -> str:
    """The verdict in large letters, and the score on a scale of 0 to 1 with the threshold marked."""
    score, kind = inspection.detection.score, "anomalous" if inspection.is_anomalous(threshold) else "normal"
    facts = f"{escape(inspection.class_name)} · {escape(inspection.path.name)} · {escape(inspection.model.title)}"
    return (
        f'<section class="moeclip-verdict {kind}" role="status">'
        f'<div class="word">{kind.capitalize()}</div>'
        f'<div class="figures"><span>score <b class="score">{score:.4f}</b></span>'
        f"<span>anomalous from <b>{threshold:.4f}</b></span></div>"
        f'<div class="scale" aria-hidden="true"><i style="width:{100 * score:.2f}%"></i>'
        f'<u style="left:{100 * threshold:.2f}%"></u></div>'
        f'<div class="facts">{facts}</div></section>'
    )


def progress(done: int, total: int) -> str:
    """How far a batch is."""
    return (
        f'<p class="moeclip-notice hint" role="status"><progress value="{done}" max="{total}"></progress> '
        f"{done} of {total} scored</p>"
    )


def model_in_use(model: ModelChoice) -> str:
    """The model that scores."""
    return f'<p class="moeclip-model">Model: <b>{escape(model.title)}</b></p>'
