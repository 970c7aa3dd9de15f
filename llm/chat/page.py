"""The files of the chat page, read once; a request chooses among these and reaches no others."""

from pathlib import Path

_FOLDER = Path(__file__).parent / "web"
_KINDS = {".html": "text/html; charset=utf-8", ".js": "text/javascript; charset=utf-8", ".css": "text/css; charset=utf-8"}
FILES = {
    address: (_KINDS[Path(name).suffix], (_FOLDER / name).read_bytes())
    for address, name in {"/": "page.html", "/page.js": "page.js", "/page.css": "page.css"}.items()
}
HEADERS = {
    # nothing inline and nothing from elsewhere: text that a model writes stays text even if the page had a hole
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
