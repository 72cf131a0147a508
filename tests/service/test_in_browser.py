"""The pages in a real browser: they fit a phone, and what a user does there works. Skipped where no Chromium is."""

import base64
import io
import json
import select
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from models.inference.pixels import UInt8
from service.settings import Settings

pytestmark = pytest.mark.slow
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DIGITS = Path(__file__).parents[1] / "data" / "mnist-2000.npz"
PHONE, DESK = 360, 1280


class Browser:
    """A headless Chromium with one tab, driven by the DevTools protocol over a pipe."""

    def __init__(self, profile: Path) -> None:
        assert CHROMIUM is not None
        command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        command += ["--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"]
        # Chromium reads the protocol's messages from descriptor 3 and writes its own to 4.
        self.process = subprocess.Popen(
            ["bash", "-c", 'exec "$@" 3<&0 4>&1 0</dev/null 1>/dev/null 2>&1', "bash", *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )
        self._received = b""
        self._last = 0
        self._session: dict[str, str] = {}
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = {"sessionId": self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        self.call("Page.enable")

    def call(self, method: str, **parameters: Any) -> Any:
        """Call a method of the protocol and return its result."""
        assert self.process.stdin is not None
        self._last += 1
        message = {"id": self._last, "method": method, "params": parameters, **self._session}
        self.process.stdin.write(json.dumps(message).encode() + b"\0")
        reply = self._wait(lambda message: message.get("id") == self._last)
        assert "error" not in reply, reply
        return reply["result"]

    def _wait(self, is_wanted: Any) -> dict[str, Any]:
        assert self.process.stdout is not None
        while True:
            while b"\0" not in self._received:
                assert select.select([self.process.stdout], [], [], 60)[0], "Chromium does not answer"
                piece = self.process.stdout.read(2**16)
                assert piece, "Chromium has ended"
                self._received += piece
            message, _, self._received = self._received.partition(b"\0")
            found: dict[str, Any] = json.loads(message)
            if is_wanted(found):
                return found

    def open(self, url: str, width: int) -> None:
        """Load a page in a window of this width."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self.call("Page.navigate", url="about:blank")  # another fragment alone would load nothing
        self._wait(lambda message: message.get("method") == "Page.loadEventFired")
        self.call("Page.navigate", url=url)
        self._wait(lambda message: message.get("method") == "Page.loadEventFired")

    def run(self, script: str) -> Any:
        """The value of an expression on the page; a promise is waited for."""
        reply = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in reply, reply
        return reply["result"].get("value")

    def until(self, condition: str) -> None:
        """Wait until an expression on the page is true."""
        self.run(
            f"new Promise((done) => {{ const look = () => ({condition}) ? done() : setTimeout(look, 5); look(); }})"
        )

    def choose(self, *files: tuple[str, bytes]) -> None:
        """Give files to the page, and wait for their verdicts."""
        content = json.dumps([[name, base64.b64encode(file).decode()] for name, file in files])
        self.run(f"""(() => {{
            const given = new DataTransfer();
            for (const [name, text] of {content}) {{
              given.items.add(new File([Uint8Array.from(atob(text), (c) => c.charCodeAt(0))], name));
            }}
            $("files").files = given.files;
            $("judged").tBodies[0].replaceChildren();
            $("files").dispatchEvent(new Event("change"));
        }})()""")
        self.until(f"$('judged').rows.length === {len(files)} + 1")

    def picture(self) -> bytes:
        """The whole page as a PNG."""
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        return base64.b64decode(shot)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """One browser for all tests."""
    if CHROMIUM is None:
        pytest.skip("needs Chromium, which is not on this machine")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    try:
        yield browser
    finally:
        browser.call("Browser.close")
        browser.process.communicate(timeout=60)


@pytest.fixture(scope="module")
def url(live_server: Any) -> Iterator[str]:
    """The page on the embedded bundles, below a prefix."""
    with live_server(Settings.model_validate({"device": "cpu", "root_path": "/gan"})).running() as server:
        yield f"{server.url}/gan"


def png(image: UInt8) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "png")
    return file.getvalue()


@pytest.fixture(scope="module")
def seven() -> UInt8:
    """A real seven, white on black."""
    with np.load(DIGITS) as digits:
        image: UInt8 = digits["images"][list(digits["labels"]).index(7)].reshape(28, 28)
    return image


IS_SHOWN = "$('picture').complete && $('picture').naturalWidth > 0 && $('figure').ariaBusy === 'false'"
OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"


@pytest.mark.parametrize("width", [PHONE, DESK])
def test_the_page_never_scrolls_sideways(browser: Browser, url: str, seven: UInt8, width: int) -> None:
    """However long a bundle's name, and whatever is judged: odd files, wide ones, and such that can't be read."""
    browser.open(f"{url}/", width)
    browser.until(IS_SHOWN)
    assert browser.run(OVERFLOW) == 0
    browser.run("$('bundle').add(new Option('x'.repeat(64)), 0)")
    browser.run("for (const id of ['worth', 'caption', 'error']) $(id).textContent += 'x'.repeat(200)")
    assert browser.run(OVERFLOW) == 0
    wide = np.tile(seven, (1, 100))
    long = "x" * 200
    browser.choose(("7.png", png(seven)), ("i.png", png(255 - seven)), (long, b"broken"), ("wide.png", png(wide)))
    assert browser.run("[...document.images].every((image) => image.complete)") is True
    assert browser.run(OVERFLOW) == 0


@pytest.mark.parametrize("width", [PHONE, DESK])
def test_the_documentation_fits_with_everything_open(browser: Browser, url: str, width: int) -> None:
    """Neither the page nor any part of it scrolls sideways, and names in its text are set as code."""
    browser.open(f"{url}/docs", width)
    browser.until("document.querySelectorAll('details').length > 20")
    browser.run("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    assert browser.run(OVERFLOW) == 0
    inner = "[...document.querySelectorAll('details > div')].filter((one) => one.scrollWidth > one.clientWidth).length"
    assert browser.run(inner) == 0
    assert "`" not in browser.run("document.body.innerText")


def test_the_slider_shows_its_value(browser: Browser, url: str) -> None:
    """While it moves, and where the address brings one."""
    browser.open(f"{url}/#truncation=0.35", PHONE)
    browser.until(IS_SHOWN)
    assert browser.run("$('shown-truncation').textContent") == "0.35"
    browser.run("$('truncation').value = 0.7; $('truncation').dispatchEvent(new Event('input'))")
    assert browser.run("$('shown-truncation').textContent") == "0.7"


@pytest.mark.parametrize(
    ("names", "index", "sent"),
    [(["cat", "dog"], 1, "1"), (["0", "1", "10", "2"], 3, "3"), (["3", "2"], 1, "1"), (["1", "0"], 0, "[0]")],
)
def test_a_class_is_sent_without_doubt(browser: Browser, url: str, names: list[str], index: int, sent: str) -> None:
    """By its index, as JSON where that is also another class's name."""
    browser.open(f"{url}/", DESK)
    assert browser.run(f"labelOf({json.dumps(names)}, {index})") == sent


def test_commands_name_the_address_below_the_prefix(browser: Browser, url: str) -> None:
    """As they are copied into a shell."""
    browser.open(f"{url}/", DESK)
    browser.until(IS_SHOWN)
    assert f"'{url}/sample?count=64" in browser.run("$('curl-sample').textContent")
    assert f"'{url}/discriminate?bundle=mnist'" in browser.run("$('curl-discriminate').textContent")


def test_a_verdict_stands_beside_those_of_other_images(browser: Browser, url: str, seven: UInt8) -> None:
    """The mark lies at the probability; the text says what ½ means and how much a verdict is worth."""
    browser.open(f"{url}/", DESK)
    browser.until(IS_SHOWN)
    browser.choose(("7.png", png(seven)))
    heads, cells = (browser.run(f"$('judged').rows[{row}].innerText").split("\t") for row in (0, 1))
    assert len(heads) == len(cells) == 3
    assert all(heads)
    said = float(browser.run("$('judged').rows[1].cells[1].textContent").removesuffix(" %"))
    assert float(browser.run("document.querySelector('.mark').getAttribute('x1')")) == pytest.approx(2 * said, abs=0.1)
    assert browser.run("document.querySelectorAll('.spread path').length") == 2
    text = browser.run("document.body.innerText")
    assert "½ means that it can't tell" in text
    assert "The AUC of mnist is 0.65" in text


def test_an_inverted_image_is_inverted_by_one_click(browser: Browser, url: str, seven: UInt8) -> None:
    """Its hint goes with it, and its verdict becomes that of the image itself."""
    browser.open(f"{url}/", DESK)
    browser.until(IS_SHOWN)
    browser.choose(("right.png", png(seven)))
    right = browser.run("$('judged').rows[1].cells[1].textContent")
    browser.choose(("7.png", png(np.stack([255 - seven] * 3, axis=2))))
    assert "dark on light" in browser.run("$('judged').rows[1].cells[2].textContent")
    browser.run("document.querySelector('#judged button').click()")
    browser.until("!document.querySelector('#judged .hint')")
    assert browser.run("$('judged').rows[1].cells[1].textContent") == right


def test_a_blank_image_gets_its_hint_and_no_button(browser: Browser, url: str) -> None:
    """Inverted it would be as blank."""
    browser.open(f"{url}/", DESK)
    browser.until(IS_SHOWN)
    browser.choose(("black.png", png(np.zeros((28, 28), np.uint8))))
    assert "blank" in browser.run("document.querySelector('#judged .hint').textContent")
    assert browser.run("document.querySelectorAll('#judged button').length") == 0
