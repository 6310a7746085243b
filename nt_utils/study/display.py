"""Tables as notebooks show them."""

from __future__ import annotations

import html
import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd
    from pandas.io.formats.style import Styler

LONG = 20  # rows beyond which a table scrolls in a box of its own
SHORT = 20  # letters up to which a cell stays on one line


def styled(frame: pd.DataFrame, caption: str, formats: Mapping[str, str] | None = None, name: str = "") -> Styler:
    """A table for display: a caption, no index, words at the left; more than LONG rows scroll.

    Whatever the cells, column names and caption hold is shown as it is: prompts and answers are strangers' text, so
    nothing in them is read as HTML or as a formula.

    Args:
        caption: what the rows are, and what the numbers mean.
        formats: format strings of single columns; other fractions have three digits, and what is missing is empty.
        name: with the caption it makes the table's identifier, which is the same in every run.
    """
    frame = frame.reset_index(drop=True)
    words = [c for c in frame.columns if not frame[c].map(lambda v: isinstance(v, (int, float))).all()]
    left, line = [("text-align", "left"), ("vertical-align", "top")], [("white-space", "nowrap")]
    title = [("caption-side", "top"), ("white-space", "normal"), ("font-style", "italic"), ("padding", "4px 0")]
    styles = [{"selector": "caption", "props": [*left, *title]}]
    if len(frame) > LONG:
        head = [("position", "sticky"), ("top", "0"), ("background", "var(--jp-layout-color0, white)")]
        box = [("display", "block"), ("max-height", "32em"), ("overflow-y", "auto")]
        styles += [{"selector": "", "props": box}, {"selector": "thead th", "props": head}]
    short = {c for c in words if frame[c].astype(str).str.len().max() <= SHORT}
    columns = {c: [{"selector": "", "props": left + line * (c in short)}] for c in words}
    styler = frame.style.set_caption(html.escape(caption, quote=False))
    styler = styler.format(formats, precision=3, na_rep="", escape="html").format_index(escape="html", axis=1).hide()
    styler = styler.set_uuid(f"{name}-{zlib.crc32(caption.encode()):08x}")
    styler = styler.set_table_attributes('class="mathjax_ignore tex2jax_ignore"')
    return styler.set_table_styles(styles).set_table_styles(columns, overwrite=False)
