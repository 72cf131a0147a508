"""The page as a whole: accessible, never wider than a phone, errors told in place, and nothing that a bundle lacks."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.settings import Settings

pytestmark = pytest.mark.slow
OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
READY = {
    "seed=7": "[role=gridcell].is-there",
    "seed=7&image=12": "#neighbours button >> nth=7",
    "view=interpolate&from=7:1&to=7:4": "#film[aria-busy=false]",
    "view=judge": "#inks label",
}
BUSY = {"status": 429, "json": {"code": "queue_full", "detail": "Later."}, "headers": {"Retry-After": "1"}}


def choose_image(page: Any, embedded: Any) -> None:
    """Give one of the service's images to the judge, as a file called 1.png."""
    content = httpx.get(f"{embedded.url}/sample?seed=1").content
    page.set_input_files("#files", [{"name": "1.png", "mimeType": "image/png", "buffer": content}])


@pytest.mark.parametrize("state", READY)
@pytest.mark.parametrize(("size", "scheme"), [((360, 740), "dark"), ((1400, 900), "light")])
def test_every_view_is_accessible(
    open_tab: Callable[..., Any], embedded: Any, state: str, size: tuple[int, int], scheme: str
) -> None:
    """axe-core finds nothing, on a phone in the dark and on a desk by day; nothing scrolls sideways."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe-playwright-python")
    tab = open_tab(embedded.page, size, color_scheme=scheme, reduced_motion="reduce")
    page = tab.open(state)
    page.wait_for_selector(READY[state])
    if page.is_hidden("#detail") or size[0] > 900:  # on a phone an image covers the rest
        page.click("#code-toggle")
    found = axe.Axe().run(page)
    assert len(found.response["passes"]) > 10  # it did look
    assert [(one["id"], [node["html"] for node in one["nodes"]]) for one in found.response["violations"]] == []
    assert page.evaluate(OVERFLOW) == 0


@pytest.mark.parametrize("language", ["curl", "Python"])
@pytest.mark.parametrize("state", READY)
def test_the_lines_of_code_do_what_is_shown(
    open_tab: Callable[..., Any], embedded: Any, tmp_path: Path, state: str, language: str
) -> None:
    """They are copied by a button, name the address below the prefix, and run as they are."""
    tab = open_tab(embedded.page, permissions=["clipboard-read", "clipboard-write"])
    page = tab.open(state)
    page.wait_for_selector(READY[state])
    page.click("#code-toggle")
    page.click(f"#languages label:has-text('{language}')")
    tab.until("document.getElementById('code-lines').textContent.includes('http')")
    page.click("#code button[aria-label='Copy the lines']")
    page.wait_for_selector("#announcer >> text=Copied.")
    lines = page.evaluate("navigator.clipboard.readText()")
    assert lines == page.text_content("#code-lines")
    assert embedded.page in lines
    (tmp_path / "image.png").write_bytes(httpx.get(f"{embedded.url}/sample?seed=1").content)
    command = ["bash", "-c", f"NO_PROXY='*' {lines}"] if language == "curl" else [sys.executable, "-c", lines]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    made = [path for path in tmp_path.iterdir() if path.name != "image.png" or "judge" not in state]
    assert made or "probability_real" in done.stdout


def test_lines_in_javascript_run_on_the_page(open_tab: Callable[..., Any], embedded: Any) -> None:
    """Those of the wall fetch its picture."""
    tab = open_tab(embedded.page)
    page = tab.open("seed=7&label=3&truncation=0.5")
    page.wait_for_selector("[role=gridcell].is-there")
    page.click("#code-toggle")
    page.click("#languages label:has-text('JavaScript')")
    tab.until("document.getElementById('code-lines').textContent.includes('await')")
    lines = page.text_content("#code-lines")
    assert page.evaluate(f"(async () => {{ {lines}\nreturn picture.type; }})()") == "image/png"


def test_the_strip_shows_the_services_own_state(open_tab: Callable[..., Any], embedded: Any) -> None:
    """Images a second, batch, queue and the 95th percentile; not asked for while the page is hidden."""
    tab = open_tab(embedded.page)
    tab.page.clock.install()
    page = tab.open("seed=7")
    page.clock.fast_forward(1000)
    page.wait_for_selector("#strip[data-state=ready]")
    shown: list[str] = []
    wanted = [r"[\d,.]+"] * 3 + [r"[\d,.]+ ms"]
    for _ in range(10):  # what a request took counts once its last byte is sent, perhaps after the page has asked
        with page.expect_event("requestfinished", lambda one: "/sample?" in one.url):
            page.click("#fresh")
        with page.expect_event("requestfinished", lambda one: one.url.endswith("/metrics")):
            page.clock.fast_forward(5000)
        shown = [page.text_content(f"#strip-{figure}") for figure in ("images", "batch", "queue", "p95")]
        if all(map(re.fullmatch, wanted, shown)):
            break
    assert all(map(re.fullmatch, wanted, shown)), shown


def test_a_service_with_keys_asks_for_one(
    open_tab: Callable[..., Any], live_server: Any, tiny_settings: Callable[..., Settings]
) -> None:
    """In place; a wrong one is told so; it is kept nowhere but in the page's memory, and no line of code shows it."""
    with live_server(tiny_settings(api_keys="secret", default_bundle="rgb")).running() as server:
        tab = open_tab(server.url)
        tab.expected.append("status of 401")
        page = tab.open("seed=1")
        for key in ("wrong", "secret"):
            page.fill(".secret", key)
            with page.expect_response("**/bundles"):
                page.click("text=Use key")
        page.wait_for_selector("[role=gridcell].is-there")
        kept = page.evaluate(
            "JSON.stringify([{ ...localStorage }, { ...sessionStorage }, document.cookie, location.href])"
        )
        assert "secret" not in kept
        page.click("#code-toggle")
        assert "$GAN_KEY" in page.text_content("#code-lines")
        assert "secret" not in page.content()
        page.click("[role=gridcell] >> nth=0")
        page.wait_for_selector("#neighbours button")
        with page.expect_download() as waiting:
            page.click("#files-of-image >> text=npy")
        assert Path(waiting.value.path()).read_bytes().startswith(b"\x93NUMPY")


@pytest.mark.parametrize(
    ("status", "code", "told"),
    [
        (429, "queue_full", "The service is busy."),
        (429, "rate_limited", "This key's limit is used up."),
        (503, "draining", "The service is shutting down."),
    ],
)
def test_errors_are_told_in_place_and_tried_again(
    open_tab: Callable[..., Any], embedded: Any, status: int, code: str, told: str
) -> None:
    """After as many seconds as Retry-After says, by itself; then the images come, and the words go."""
    tab = open_tab(embedded.page)
    tab.expected.append(f"status of {status}")
    refused = []

    def refuse(route: Any) -> None:
        refused.append(route.request.url)
        route.fulfill(**BUSY | {"status": status, "json": {"code": code, "detail": "Later."}})

    tab.page.route("**/sample?*", refuse)
    page = tab.open("seed=7")
    page.wait_for_selector(f"#wall-notice >> text={told}")
    assert page.is_disabled("#wall-notice button")
    page.unroute("**/sample?*")
    page.wait_for_selector("[role=gridcell].is-there")
    page.wait_for_selector("#wall-notice .notice", state="detached")
    assert refused


def test_one_refusal_among_answers_stops_nothing(open_tab: Callable[..., Any], embedded: Any) -> None:
    """Images that come in the meantime do not make the page forget to ask again for those that were refused."""
    tab = open_tab(embedded.page)
    tab.expected.append("status of 429")
    tab.page.route("**/sample?*", lambda route: route.fulfill(**BUSY), times=1)
    page = tab.open("seed=7")
    page.wait_for_selector("#wall-notice button")
    tab.until("!document.querySelector('[role=row]:not([hidden]) [role=gridcell]:not(.is-there)')")
    assert page.is_hidden("#wall-notice")


def test_a_drawing_does_not_push_files_out(open_tab: Callable[..., Any], embedded: Any) -> None:
    """Files that were refused for now are judged later, whatever is drawn meanwhile."""
    tab = open_tab(embedded.page)
    tab.expected.append("status of 429")
    tab.page.clock.install()
    page = tab.open("view=judge")
    page.wait_for_selector("#inks label")
    refusal = BUSY | {"headers": {"Retry-After": "60"}}
    page.route("**/discriminate?*", lambda route: route.fulfill(**refusal), times=1)
    choose_image(page, embedded)
    page.wait_for_selector("#judge-notice button")
    page.click("#drawing")
    page.wait_for_selector("#drawing-card .card")
    page.clock.run_for(60_000)
    page.wait_for_selector("#cards .card >> text=1.png")


def test_a_service_that_is_gone_is_told(open_tab: Callable[..., Any], embedded: Any) -> None:
    """The strip says so too, and all comes back with the service."""
    tab = open_tab(embedded.page)
    tab.expected.append("net::ERR_FAILED")
    tab.page.clock.install()
    page = tab.open("seed=7")
    page.wait_for_selector("[role=gridcell].is-there")
    page.route("**/*", lambda route: route.abort())
    page.click("#fresh")
    page.wait_for_selector("#wall-notice >> text=No connection.")
    page.clock.fast_forward(5000)
    page.wait_for_selector("#strip[data-state=gone]")
    page.unroute("**/*")
    page.clock.fast_forward(5000)
    page.wait_for_selector("#wall-notice .notice", state="detached")
    page.wait_for_selector("#strip[data-state=ready]")


def test_what_a_bundle_lacks_is_hidden(open_tab: Callable[..., Any], others: Any) -> None:
    """Classes, discriminator and encoder; the rest of the page works without them and asks for nothing of theirs."""
    tab = open_tab(others.page)
    asked: list[str] = []
    tab.page.on("request", lambda request: asked.append(request.url))

    def without(route: Any) -> None:
        reply = route.fetch()
        listed = reply.json()
        for bundle in listed["bundles"]:
            bundle["networks"] = ["generator"]
        route.fulfill(response=reply, json=listed)

    tab.page.route("**/bundles", without)
    page = tab.open("bundle=oblong&seed=1&image=2")
    page.wait_for_selector("#neighbours button")
    assert page.is_hidden("[data-view=judge]")
    assert page.is_hidden("#detail-verdict")
    assert page.is_hidden("#classes")
    tab.open("bundle=oblong&seed=1&view=judge")
    page.wait_for_selector("[role=gridcell].is-there")
    assert not [url for url in asked if "/discriminate" in url or "/encode" in url]


def test_an_encoder_shows_what_g_makes_of_an_image(open_tab: Callable[..., Any], embedded: Any) -> None:
    """Its reconstruction stands beside the image; a service that has none after all hides it."""
    tab = open_tab(embedded.page)
    image = httpx.get(f"{embedded.url}/sample?seed=1&format=json").json()["images"][0]
    reply = {"bundle": "mnist", "version": "", "results": [{"latent": [], "error": 0.0123, "image": image}]}

    def with_encoder(route: Any) -> None:
        listed = route.fetch()
        bundles = listed.json()
        for bundle in bundles["bundles"]:
            bundle["networks"].append("encoder")
        route.fulfill(response=listed, json=bundles)

    tab.page.route("**/bundles", with_encoder)
    tab.page.route("**/encode?*", lambda route: route.fulfill(json=reply))
    page = tab.open("view=judge")
    page.wait_for_selector("#inks label")
    choose_image(page, embedded)
    page.wait_for_selector("text=as G draws it (error 0.0123)")


def test_states_that_cannot_be_are_told_or_left_out(open_tab: Callable[..., Any], embedded: Any) -> None:
    """A bundle that is not there is named, and the default one shown; numbers that make no sense count as left out."""
    tab = open_tab(embedded.page)
    tab.expected.append("status of 404")
    page = tab.open("bundle=nope&seed=1")
    page.wait_for_selector("#page-notice >> text=nope")
    page.wait_for_selector("[role=gridcell].is-there")
    tab.until("location.hash.includes('bundle=mnist@')")
    tab.open("seed=-1&truncation=7&label=99&image=1e3&view=nowhere&walk=x")
    page.wait_for_selector("[role=gridcell].is-there")


def test_numbers_are_held_within_bounds(open_tab: Callable[..., Any], embedded: Any) -> None:
    """One that is too large is told of where it is typed, and asked of nobody; a link without a seed gets one."""
    tab = open_tab(embedded.page)
    asked: list[str] = []
    page = tab.open("seed=7&image=9007199254740991")
    page.wait_for_selector("#neighbours button")
    assert page.is_disabled("#detail-next")
    page.on("request", lambda request: asked.append(request.url))
    for field in ("seed", "index"):
        page.fill(f"#{field}", "9007199254740992")
        page.press(f"#{field}", "Enter")
        assert "9007199254740991 at most" in page.evaluate(f"document.getElementById('{field}').validationMessage")
    assert "seed=7&" in page.url
    assert not [url for url in asked if "/sample" in url]
    page.evaluate("location.hash = 'truncation=0.5'")
    tab.until("/seed=[0-9]+/.test(location.hash)")
    assert re.findall(r"seed=(\d+)", page.url) == [page.input_value("#seed")]


def test_what_is_closed_stays_closed(open_tab: Callable[..., Any], embedded: Any) -> None:
    """A retry that was to come does not open it again; Escape closes an image wherever the keyboard is."""
    tab = open_tab(embedded.page)
    tab.expected.append("status of 429")
    page = tab.open("seed=7")
    page.wait_for_selector("[role=gridcell].is-there")
    page.route("**/sample?*format=json*", lambda route: route.fulfill(**BUSY))
    page.click("[role=gridcell] >> nth=3")
    page.wait_for_selector("#detail-notice button")
    page.click("#seed")
    page.keyboard.press("Escape")
    page.wait_for_selector("#detail", state="hidden")
    assert not page.locator("#detail-notice button").count()  # nor anything else that would open it


def test_a_bundle_that_is_taken_away_is_replaced(open_tab: Callable[..., Any], others: Any) -> None:
    """By another version of it, as the service lists it then; the page says so."""
    tab = open_tab(others.page)
    tab.expected.append("status of 404")
    gone = "oblong@000000000000"

    def with_one_more(route: Any) -> None:
        reply = route.fetch()
        listed = reply.json()
        (oblong,) = (one for one in listed["bundles"] if one["name"] == "oblong")
        listed["bundles"].append(oblong | {"version": gone[-12:]})
        route.fulfill(response=reply, json=listed)

    tab.page.route("**/bundles", with_one_more)
    page = tab.open(f"seed=1&bundle={gone}&view=interpolate")
    page.wait_for_selector("#interpolation-notice >> text=not here")
    page.unroute("**/bundles")
    page.click("[data-view=wall]")
    page.wait_for_selector(f"#page-notice >> text={gone}")
    page.wait_for_selector("[role=gridcell].is-there")
    assert re.search("bundle=oblong@(?!0000)", page.url)


@pytest.mark.parametrize("size", [(740, 360), (350, 225)], ids=["telephone on its side", "enlarged four times"])
def test_a_low_window_keeps_room_for_the_wall(
    open_tab: Callable[..., Any], embedded: Any, size: tuple[int, int]
) -> None:
    """A row of images at least is seen whole."""
    page = open_tab(embedded.page, size).open("seed=7")
    page.wait_for_selector("[role=gridcell].is-there")
    assert page.evaluate("document.getElementById('scroller').clientHeight") > 80
    assert page.evaluate(OVERFLOW) == 0


@pytest.mark.parametrize("width", [360, 1280])
def test_the_documentation_fits_with_everything_open(open_tab: Callable[..., Any], embedded: Any, width: int) -> None:
    """Neither the page nor any part of it scrolls sideways, and names in its text are set as code."""
    tab = open_tab(embedded.page, (width, 900))
    page = tab.page
    page.goto(f"{embedded.page}/docs")
    tab.until("document.querySelectorAll('details').length > 20")
    page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    assert page.evaluate(OVERFLOW) == 0
    inner = "[...document.querySelectorAll('details > div')].filter((one) => one.scrollWidth > one.clientWidth).length"
    assert page.evaluate(inner) == 0
    assert "`" not in page.evaluate("document.body.innerText")
