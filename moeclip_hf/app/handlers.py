"""What the page does when something is dropped, chosen, moved or pressed."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.utils import get_upload_folder
from PIL import Image

from moeclip_hf.app import markup
from moeclip_hf.app.inspector import (
    BatchRow,
    Inspection,
    Inspector,
    ModelChoice,
    batch_csv,
    shown_threshold,
    threshold_meant,
)
from moeclip_hf.app.samples import Sample
from moeclip_hf.errors import MoECLIPError

# A batch holds the model for as long as it runs.
LARGEST_BATCH = 256

Row = list[str | float]
Result = tuple[Inspection | None, str, Image.Image | None, Image.Image | None, Any]


class Handlers:
    """
    The page's event handlers. What a visitor has loaded and found is handed in and out: nothing of it is kept here.

    Args:
        inspector ([`Inspector`])
        samples: to choose from.
    """

    def __init__(self, inspector: Inspector, samples: list[Sample]):
        self.inspector = inspector
        self.samples = samples

    def load(self, name: str, current: ModelChoice) -> tuple[ModelChoice, str, Any, Any]:
        """Load a model: the choice, a line about it, and its thresholds for the sliders."""
        try:
            choice = self.inspector.choose(name)
        except MoECLIPError as error:
            refusal = markup.model_in_use(current) + markup.notice(str(error), is_error=True)
            return current, refusal, gr.skip(), gr.skip()
        thresholds = shown_threshold(choice.image_threshold), shown_threshold(choice.pixel_threshold)
        return choice, markup.model_in_use(choice), *thresholds

    def receive(self, upload: str | None, *settings: Any) -> tuple[Any, ...]:
        """Inspect a file that was just uploaded."""
        source = Path(upload) if upload else None
        return source, *self.inspect(source, *settings)

    def choose_sample(self, event: gr.SelectData, *settings: Any) -> tuple[Any, ...]:
        """Inspect a sample, as what it shows; the upload makes room for it."""
        sample = self.samples[event.index]
        return sample.path, sample.class_name, None, *self.inspect(sample.path, sample.class_name, *settings)

    def inspect(
        self, source: Path | None, class_name: str, model: ModelChoice, threshold: float, pixel_threshold: float
    ) -> Result:
        """Score an image, and show what was found: the one step in which the model runs."""
        if source is None:
            return None, markup.notice(markup.INVITATION), None, None, _table([])
        try:
            inspection = self.inspector.inspect(source, class_name, model)
        except MoECLIPError as error:
            return None, markup.notice(str(error), is_error=True), None, None, _table([])
        verdict, overlay, regions = self.redraw(inspection, threshold, pixel_threshold)
        return inspection, verdict, inspection.picture, overlay, regions

    def redraw(self, inspection: Inspection | None, threshold: float, pixel_threshold: float) -> tuple[Any, ...]:
        """Show the same finding at other thresholds."""
        if inspection is None:
            return gr.skip(), gr.skip(), gr.skip()
        pixel_threshold = threshold_meant(pixel_threshold, inspection.model.pixel_threshold)
        regions = inspection.detection.regions(pixel_threshold)
        rows: list[Row] = [[*region["box"], region["area"], f"{region['score']:.4f}"] for region in regions]
        verdict = markup.verdict(inspection, threshold_meant(threshold, inspection.model.image_threshold))
        return verdict, inspection.overlay(regions, pixel_threshold), _table(rows)

    def explain(self, inspection: Inspection | None, explained: Inspection | None) -> tuple[Any, ...]:
        """Show what the experts did with the image inspected last, unless that is what is shown."""
        if inspection is None:
            return None, markup.notice(markup.INVITATION), None, None
        if inspection is explained:
            return explained, gr.skip(), gr.skip(), gr.skip()
        try:
            pictures = self.inspector.explain(inspection)
        except MoECLIPError as error:
            return None, markup.notice(str(error), is_error=True), None, None
        return inspection, markup.notice(f"{inspection.class_name} · {inspection.path.name}"), *pictures

    def score(
        self, files: list[str] | None, class_name: str, model: ModelChoice, threshold: float
    ) -> Iterator[tuple[Any, ...]]:
        """Score files, the table growing with each."""
        paths = [Path(file) for file in files or ()]
        if not paths or len(paths) > LARGEST_BATCH:
            text = (
                f"{len(paths)} files are more than the {LARGEST_BATCH} taken at once." if paths else "Add files first."
            )
            yield [], markup.notice(text, is_error=True), _table([]), gr.update(visible=False)
            return
        rows: list[BatchRow] = []
        yield rows, markup.progress(0, len(paths)), _table([]), gr.update(visible=False)
        try:
            for row in self.inspector.score(paths, class_name, model):
                rows = [*rows, row]
                table = _batch_table(rows, threshold_meant(threshold, model.image_threshold))
                yield rows, markup.progress(len(rows), len(paths)), table, gr.skip()
        except MoECLIPError as error:
            yield [], markup.notice(str(error), is_error=True), _table([]), gr.skip()

    def conclude(self, rows: list[BatchRow], model: ModelChoice, threshold: float) -> tuple[Any, ...]:
        """Show a batch at a threshold, with a table to download."""
        if not rows:
            return gr.skip(), gr.skip(), gr.skip()
        threshold = threshold_meant(threshold, model.image_threshold)
        verdicts = [row.verdict(threshold) for row in rows]
        counts = {kind: verdicts.count(kind) for kind in ("anomalous", "normal", "unreadable")}
        summary = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count or kind != "unreadable")
        # Gradio serves what lies in this folder, and empties it by and by.
        path = Path(get_upload_folder()) / secrets.token_hex(16) / "moeclip.csv"
        path.parent.mkdir(parents=True)
        # With a mark of its encoding, without which spreadsheets garble letters beyond ASCII.
        path.write_text(batch_csv(rows, threshold), encoding="utf-8-sig", newline="")
        return markup.notice(summary), _batch_table(rows, threshold), gr.update(value=str(path), visible=True)


def _batch_table(rows: list[BatchRow], threshold: float) -> Any:
    return _table(
        [
            [row.verdict(threshold), "" if row.score is None else f"{row.score:.4f}", row.file, row.error or ""]
            for row in rows
        ]
    )


def _table(rows: list[Row]) -> Any:
    """An empty table takes no room."""
    return gr.update(value=rows, visible=bool(rows))


__all__ = ["LARGEST_BATCH", "Handlers"]
