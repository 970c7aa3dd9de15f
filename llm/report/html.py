"""The few pieces that a page is made of. Every text passes through `esc`: a run's name or a document's text is not HTML."""

import base64
import html
import json
import math
from pathlib import Path

# nothing is ever loaded from anywhere, whatever a text in the page may have become
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def esc(value) -> str:
    return html.escape(str(value))


def document(title: str, body: list[str]) -> str:
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<meta http-equiv="Content-Security-Policy" content="{esc(POLICY)}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{esc(title)}</title>\n<style>\n{style}</style>\n</head>\n'
        f"<body><main>\n{chr(10).join(part for part in body if part)}\n</main></body>\n</html>\n"
    )


def section(title: str, *parts: str) -> str:
    """Nothing when all of its parts are nothing."""
    inside = "\n".join(part for part in parts if part)
    return f"<h2>{esc(title)}</h2>\n{inside}" if inside else ""


def table(heads: list[str], rows: list[list]) -> str:
    """Numbers to the right; a column in which nothing is known is left out."""
    rows = [[cell(value) for value in row] for row in rows]
    kept = [i for i in range(len(heads)) if any(row[i][0] for row in rows)]
    numeric = {i for i in kept if all(row[i][1] for row in rows if row[i][0])}
    if not kept:
        return ""

    def line(tag: str, texts: list[str]) -> str:
        return "<tr>" + "".join(f"<{tag}{' class=number' * (i in numeric)}>{esc(texts[i])}</{tag}>" for i in kept) + "</tr>"

    body = "\n".join(line("td", [text for text, _ in row]) for row in rows)
    return f"<div class=wide><table>\n<thead>{line('th', heads)}</thead>\n<tbody>\n{body}\n</tbody>\n</table></div>"


def cell(value) -> tuple[str, bool]:
    """(how a value is written, whether it is a number)."""
    if value is None:
        return "", True
    if isinstance(value, bool):
        return str(value).lower(), False
    if isinstance(value, int):
        return f"{value:,}", True
    if isinstance(value, float):
        if not math.isfinite(value) or abs(value) < 0.1:
            return f"{value:.4g}", True
        return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:,.4f}".rstrip("0").rstrip("."), True
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False), False


def tiles(figures: dict[str, object]) -> str:
    shown = {name: cell(value)[0] for name, value in figures.items()}
    return "<div class=tiles>" + "".join(f"<div class=tile><b>{esc(v)}</b><span>{esc(k)}</span></div>" for k, v in shown.items() if v) + "</div>"


def images(pngs: dict[str, bytes]) -> str:
    """`pngs`: description -> image."""
    tags = [f'<img alt="{esc(what)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">' for what, png in pngs.items()]
    return f"<div class=plots>\n{chr(10).join(tags)}\n</div>" if tags else ""


def details(summary: str, inside: str, is_open: bool = False) -> str:
    return f"<details{' open' * is_open}><summary>{esc(summary)}</summary>\n{inside}\n</details>" if inside else ""
