"""The chat page in a real browser, where there is one."""

import shutil
import threading
from dataclasses import replace

import pytest
from little_chat import load_little, serving
from test_server import until

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed, so no browser can be driven")
pytestmark = [pytest.mark.timeout(120), pytest.mark.skipif(not CHROMIUM, reason="there is no Chromium on this machine")]

SCRIPT = "<img src=x onerror='document.title=1'>"


class Scripted:
    """A model's tokenizer that shows `SCRIPT` a character a token, each only when it is let."""

    def __init__(self):
        self.gate, self.n = threading.Semaphore(0), 0

    def load(self, path, step=None):
        assistant = load_little(path)
        return replace(assistant, tokenizer=_Shown(assistant.tokenizer, self))


class _Shown:
    def __init__(self, tokenizer, script: Scripted):
        self._tokenizer, self._script = tokenizer, script

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)

    def token_bytes(self, token):
        assert self._script.gate.acquire(timeout=30)
        self._script.n += 1
        return SCRIPT[(self._script.n - 1) % len(SCRIPT)].encode()


@pytest.fixture
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def test_send_stream_stop_regenerate_edit_reload_and_scripts_that_stay_text(browser, tmp_path):
    script = Scripted()
    with serving(has_page=True, load=script.load) as server:
        page, complaints = browser.new_page(), []
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(server.url)
        expect, said = playwright.expect, page.locator(".assistant .said")
        expect(page.locator("#model option")).to_have_text(["little", "little/other"])
        page.fill("#text", SCRIPT)
        page.fill("#max_tokens", str(len(SCRIPT)))
        page.fill("#temperature", "0")
        page.press("#text", "Enter")
        script.gate.release(10)
        expect(said).to_have_text(SCRIPT[:10])  # streamed: the rest is not written yet
        script.gate.release(len(SCRIPT) - 10)
        expect(said).to_have_text(SCRIPT)
        expect(page.locator(".user .said")).to_have_text(SCRIPT)
        assert page.title() == "Chat" and page.locator(".said img, .said script").count() == 0

        script.n = 0
        page.click("#again")
        script.gate.release(5)
        expect(said).to_have_text(SCRIPT[:5])
        page.click("#stop")
        expect(page.locator("#send")).to_be_visible()
        until(lambda: server._free._value == server.limits.connections)  # the server has noticed
        script.gate.release(100)  # the token it was waiting for is its last
        assert said.text_content() == SCRIPT[:5]

        page.screenshot(path=str(tmp_path / "chat.png"))
        page.reload()
        expect(page.locator(".said")).to_have_text([SCRIPT, SCRIPT[:5]])
        page.click("text=Edit")
        expect(page.locator("#text")).to_have_value(SCRIPT)
        expect(page.locator(".turn")).to_have_count(0)
        page.fill("#temperature", "99")
        page.fill("#text", "hi")
        page.click("#send")
        expect(page.locator("#trouble")).to_contain_text("temperature")
        assert [text for text in complaints if "400" not in text and "favicon" not in text] == []
    assert script.n == 6
