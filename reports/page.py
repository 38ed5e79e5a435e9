"""The report as one HTML file: no network, the canvas module inlined, nothing of the report ever read as HTML."""

from __future__ import annotations

import base64
import html as markup
import json
from pathlib import Path

from .model import Graph, Report
from .payload import pair, payload
from .text import clean, size

_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:"
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>:root{{color-scheme:light dark}}body{{margin:14px;background:#fff}}
@media(prefers-color-scheme:dark){{body{{background:#17181a}}}}</style></head>
<body><noscript>{plain}</noscript><main id="view"></main>
<script type="application/json" id="headers">{headers}</script>
{blocks}
<script type="module">
{module}
const headers = JSON.parse(document.getElementById("headers").textContent);
const parts = headers.map((header, k) => decode(document.getElementById("data" + k).textContent));
globalThis.memplan = mount(document.getElementById("view"), headers, parts);
</script></body></html>
"""


def module_source() -> str:
    """The canvas module's text: two files that make one module, since a page and a widget take one."""
    here = Path(__file__).parent
    return "".join((here / name).read_text(encoding="utf-8") for name in ("drawing.js", "view.js"))


def html(report: Report, graph: Graph | None = None, other: Report | None = None) -> str:
    """The page of a report's step (or of one of its graphs); with ``other``, both side by side."""
    payloads = [payload(report, graph or report.step)] if other is None else pair(report, other)
    headers = [p.header for p in payloads]
    blocks = "\n".join(
        f'<script type="application/octet-stream" id="data{k}">{base64.b64encode(p.data).decode()}</script>'
        for k, p in enumerate(payloads)
    )
    title = f"memplan: {clean(report.target or report.step.name)}"
    return _PAGE.format(
        policy=markup.escape(_POLICY),
        title=markup.escape(title),
        plain=markup.escape(f"{title}, peak {size(report.step.peak)}. The chart needs JavaScript."),
        headers=inert_json(headers),
        blocks=blocks,
        module=module_source(),
    )


def inert_json(value: object) -> str:
    """JSON that cannot end the script element that it stands in."""
    text = json.dumps(value, ensure_ascii=True)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
