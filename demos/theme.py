"""The page's colours and type, as a Gradio theme; `assets/style.css` takes them from here as variables."""

from __future__ import annotations

import gradio as gr
from gradio.themes.utils import colors, fonts, sizes

# One accent, the red of a stage curtain, on warm paper and warm black.
CURTAIN = colors.Color(
    name="curtain",
    c50="#fdf4f1",
    c100="#fae5de",
    c200="#f5cabd",
    c300="#eda793",
    c400="#ff9474",
    c500="#d9502f",
    c600="#b5371a",
    c700="#962c14",
    c800="#792613",
    c900="#5f2113",
    c950="#331009",
)
PAPER = colors.Color(
    name="paper",
    c50="#faf8f5",
    c100="#f3f0ea",
    c200="#e6e1d8",
    c300="#d3ccbf",
    c400="#a49c8f",
    c500="#756e64",
    c600="#5c564d",
    c700="#3b3732",
    c800="#272421",
    c900="#1c1a18",
    c950="#131211",
)
# Gradio's bundled semibold files hold no ASCII: only regular and bold are named here.
SANS = fonts.LocalFont("IBM Plex Sans", weights=(400, 700))
MONO = fonts.LocalFont("IBM Plex Mono", weights=(400, 700))


def theme() -> gr.themes.Base:
    """Both modes of the page; every pair of text and ground has a contrast of 4.5 or more."""
    look = gr.themes.Base(
        primary_hue=CURTAIN,
        secondary_hue=PAPER,
        neutral_hue=PAPER,
        radius_size=sizes.radius_md,
        text_size=sizes.text_md,
        font=(SANS, "ui-sans-serif", "system-ui", "sans-serif"),
        font_mono=(MONO, "ui-monospace", "Consolas", "monospace"),
    )
    both = {
        "block_border_width": "1px",
        "block_shadow": "none",
        "block_label_text_weight": "700",
        "block_title_text_weight": "700",
        "block_title_text_size": "*text_sm",
        "block_info_text_size": "*text_sm",
        "button_large_text_weight": "700",
        "button_transition": "background-color 120ms ease",
        "checkbox_border_radius": "*radius_xs",
        "input_shadow": "none",
        "layout_gap": "*spacing_xl",
        "form_gap_width": "0px",
        "section_header_text_weight": "700",
    }
    light = {
        "body_background_fill": "*neutral_50",
        "body_text_color": "*neutral_900",
        "body_text_color_subdued": "*neutral_600",
        "background_fill_primary": "#ffffff",
        "background_fill_secondary": "*neutral_100",
        "block_background_fill": "#ffffff",
        "block_border_color": "*neutral_200",
        "block_title_text_color": "*neutral_900",
        "block_label_text_color": "*neutral_600",
        "block_info_text_color": "*neutral_600",
        "border_color_primary": "*neutral_200",
        "color_accent_soft": "*primary_50",
        "input_background_fill": "#ffffff",
        "input_border_color": "*neutral_300",
        "input_border_color_focus": "*primary_600",
        "input_placeholder_color": "*neutral_500",
        "button_primary_background_fill": "*primary_600",
        "button_primary_background_fill_hover": "*primary_700",
        "button_primary_text_color": "#ffffff",
        "button_secondary_background_fill": "#ffffff",
        "button_secondary_background_fill_hover": "*neutral_100",
        "button_secondary_border_color": "*neutral_300",
        "button_border_width": "1px",
        "checkbox_background_color_selected": "*primary_600",
        "checkbox_border_color_selected": "*primary_600",
        "checkbox_border_color": "*neutral_400",
        "slider_color": "*primary_600",
        "loader_color": "*primary_600",
        "link_text_color": "*primary_700",
    }
    dark = {
        "body_background_fill_dark": "*neutral_950",
        "body_text_color_dark": "#f2efe9",
        "body_text_color_subdued_dark": "#b3aba0",
        "background_fill_primary_dark": "*neutral_900",
        "background_fill_secondary_dark": "*neutral_800",
        "block_background_fill_dark": "*neutral_900",
        "block_border_color_dark": "*neutral_700",
        "block_title_text_color_dark": "#f2efe9",
        "block_label_text_color_dark": "#b3aba0",
        "block_info_text_color_dark": "#b3aba0",
        "border_color_primary_dark": "*neutral_700",
        "color_accent_soft_dark": "*primary_950",
        "input_background_fill_dark": "*neutral_950",
        "input_border_color_dark": "*neutral_700",
        "input_border_color_focus_dark": "*primary_400",
        "input_placeholder_color_dark": "#958d82",
        "button_primary_background_fill_dark": "*primary_400",
        "button_primary_background_fill_hover_dark": "*primary_300",
        "button_primary_text_color_dark": "*neutral_950",
        "button_secondary_background_fill_dark": "*neutral_900",
        "button_secondary_background_fill_hover_dark": "*neutral_800",
        "button_secondary_border_color_dark": "*neutral_700",
        "checkbox_background_color_dark": "*neutral_900",
        "checkbox_background_color_selected_dark": "*primary_400",
        "checkbox_border_color_selected_dark": "*primary_400",
        "checkbox_border_color_dark": "*neutral_500",
        "slider_color_dark": "*primary_400",
        "loader_color_dark": "*primary_400",
        "link_text_color_dark": "*primary_400",
    }
    return look.set(**both, **light, **dark)
