"""How the page looks: fonts of the reader's system, so that nothing is fetched from anywhere else."""

from gradio.themes import Base
from gradio.themes.utils import colors, sizes


def theme() -> Base:
    """A sober theme, light or dark as the reader's system is."""
    calm = Base(
        primary_hue=colors.sky,
        secondary_hue=colors.sky,
        neutral_hue=colors.slate,
        radius_size=sizes.radius_md,
        font=("system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica", "Arial", "sans-serif"),
        font_mono=("ui-monospace", "Menlo", "Consolas", "monospace"),
    )
    # Dark enough on white to be read with ease.
    return calm.set(
        body_text_color_subdued="*neutral_500",
        body_text_color_subdued_dark="*neutral_400",
        block_info_text_color="*neutral_500",
        block_info_text_color_dark="*neutral_400",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover_dark="*primary_600",
    )


CSS = """
#head h1 { font-size: 1.4rem; margin: 0 0 .1rem; }
#head p { margin: 0; color: var(--body-text-color-subdued); }
#model .html-container, #verdict .html-container, #explained .html-container, #summary .html-container { padding: 0; }
#head .html-container { padding: 0 0 .3rem; }
#samples .grid-wrap { min-height: 0; max-height: 21rem; }
@media (max-width: 640px) { #samples .caption-label { display: none; } }
.moeclip-model { margin: 0 0 .4rem; }
.moeclip-notice { margin: 0; padding: .9rem 1rem; border-radius: 8px; border: 1px solid var(--border-color-primary);
  background: var(--block-background-fill); overflow-wrap: anywhere; }
.moeclip-notice.hint { color: var(--body-text-color-subdued); }
.moeclip-notice.error { --tone: #b45309; border: 1px solid var(--tone); border-left: 6px solid var(--tone);
  color: var(--body-text-color); }
.moeclip-notice progress { width: 12rem; max-width: 50%; height: 8px; vertical-align: middle; margin-right: .6rem;
  accent-color: var(--primary-600); }
.moeclip-notice progress::-webkit-progress-bar { border-radius: 4px;
  background: color-mix(in srgb, var(--body-text-color) 14%, transparent); }
.moeclip-notice progress::-webkit-progress-value { border-radius: 4px; background: var(--primary-600); }
.moeclip-verdict { --tone: #15803d; padding: .8rem 1rem; border-radius: 8px; border: 1px solid var(--tone);
  border-left: 8px solid var(--tone); background: color-mix(in srgb, var(--tone) 9%, var(--block-background-fill)); }
.moeclip-verdict.anomalous { --tone: #c2261d; }
.dark .moeclip-verdict { --tone: #4ade80; }
.dark .moeclip-verdict.anomalous { --tone: #f87171; }
.dark .moeclip-notice.error { --tone: #fbbf24; }
.moeclip-verdict .word { font-size: 1.9rem; line-height: 1.2; font-weight: 700; color: var(--tone); }
.moeclip-verdict .figures { display: flex; flex-wrap: wrap; gap: .2rem 1.4rem; font-variant-numeric: tabular-nums; }
.moeclip-verdict .score { font-size: 1.15em; }
.moeclip-verdict .scale { position: relative; height: 8px; margin: .6rem 0 .5rem; border-radius: 4px;
  background: color-mix(in srgb, var(--body-text-color) 14%, transparent); }
.moeclip-verdict .scale i { display: block; height: 100%; border-radius: 4px; background: var(--tone); }
.moeclip-verdict .scale u { position: absolute; top: -4px; width: 3px; height: 16px; margin-left: -1.5px;
  border-radius: 2px; background: var(--body-text-color); }
.moeclip-verdict .facts { color: var(--body-text-color-subdued); font-size: .9rem; overflow-wrap: anywhere; }
"""

__all__ = ["CSS", "theme"]
