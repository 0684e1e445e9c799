"""Pieces of a self-contained HTML page: text from data is escaped, images are inside."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from io import BytesIO
from typing import Any

from PIL import Image

THUMBNAIL = 160  # pixels of its longer side
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; color: #222 }
h2 { margin: 2.2rem 0 .2rem; font-size: 1.15rem } h3 { font-size: 1rem; margin: 1.2rem 0 .3rem }
table { border-collapse: collapse } td, th { padding: .15rem .8rem .15rem 0; text-align: left }
td + td, th + th { text-align: right } .note { color: #666; margin: 0 0 .6rem }
.row { display: flex; flex-wrap: wrap; gap: 2.5rem }
"""


def document(title: str, body: Sequence[str], *, style: str = "") -> str:
    """A page; `body` is HTML."""
    head = f"<!doctype html><meta charset=utf-8><title>{escape(title)}</title><style>{STYLE}{style}</style>"
    return head + "\n".join(body) + "\n"


def table(headings: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table of texts and numbers."""
    head = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
    lines = ("".join(f"<td>{escape(str(value))}</td>" for value in row) for row in rows)
    return f"<table><tr>{head}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def thumbnail(image: Image.Image) -> str:
    """A small copy of an RGB image."""
    small = image.copy()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    data = BytesIO()
    small.save(data, "JPEG", quality=80)
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}">'
