"""One image, the way between two, and what D says of images from outside: each view in a real browser."""

import base64
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from models.inference.pixels import UInt8

pytestmark = pytest.mark.slow
DIGITS = Path(__file__).parents[2] / "data" / "mnist-2000.npz"
SHOWN = "document.getElementById('image').complete && document.getElementById('image').naturalWidth > 0"
NEIGHBOURS = "document.querySelectorAll('#neighbours button').length === 8"
FILM = """(() => {
  const film = document.getElementById('film');
  return film.width > 1 && film.ariaBusy === 'false';
})()"""


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


def files(*given: tuple[str, bytes]) -> list[dict[str, Any]]:
    return [{"name": name, "mimeType": "image/png", "buffer": content} for name, content in given]


# ------------------------------------------------------------------------------------------------------- one image


def image_pixels(page: Any) -> list[int]:
    """What the large image shows, as RGBA."""
    pixels: list[int] = page.evaluate("""(() => {
      const image = document.getElementById('image');
      const pen = new OffscreenCanvas(image.naturalWidth, image.naturalHeight).getContext('2d');
      pen.drawImage(image, 0, 0);
      return [...pen.getImageData(0, 0, image.naturalWidth, image.naturalHeight).data];
    })()""")
    return pixels


def test_one_image_says_where_it_comes_from(open_tab: Callable[..., Any], embedded: Any) -> None:
    """Its address gives it again; seed, index and class are told; D's verdict stands beside its others."""
    tab = open_tab(embedded.page)
    page = tab.open("seed=7&image=12")
    tab.until(SHOWN)
    page.wait_for_selector("#verdict .probability")
    link = page.get_attribute("#facts a", "href")
    with Image.open(io.BytesIO(httpx.get(link).content)) as image:
        assert image_pixels(page) == np.asarray(image.convert("RGBA")).ravel().tolist()
    told = httpx.get(f"{embedded.url}/sample?seed=7&first_index=12&format=json").json()
    facts = dict(
        zip(page.locator("#facts dt").all_text_contents(), page.locator("#facts dd").all_text_contents(), strict=True)
    )
    assert (facts["Seed"], facts["Index"], facts["Class"]) == ("7", "12", told["label_names"][0])
    assert facts["Bundle"] == f"mnist@{told['version']}"
    verdict = httpx.post(f"{embedded.url}/discriminate?labels={told['labels'][0]}", content=httpx.get(link).content,
                         headers={"Content-Type": "image/png"}).json()["results"][0]  # fmt: skip
    assert f"{100 * verdict['probability_real']:.1f} %" in page.text_content("#verdict")
    assert float(page.get_attribute("#verdict .mark", "x1")) == pytest.approx(320 * verdict["probability_real"])
    auc = httpx.get(f"{embedded.url}/bundles/mnist").json()["calibration"]["auc"]
    assert f"in {100 * auc:.0f} of 100 cases" in page.text_content("#verdict")


def test_it_downloads_in_every_format(open_tab: Callable[..., Any], embedded: Any) -> None:
    """A link for each, which other programs can fetch too."""
    tab = open_tab(embedded.page)
    page = tab.open("seed=7&image=3")
    tab.until(SHOWN)
    for name in ("png", "webp", "jpeg", "json", "zip", "npy"):
        with page.expect_download() as waiting:
            page.click(f"#files-of-image >> text={name}")
        content = Path(waiting.value.path()).read_bytes()
        assert content == httpx.get(f"{embedded.url}/sample?seed=7&first_index=3&format={name}").content
        assert waiting.value.suggested_filename.endswith(f".{name}")


@contextmanager
def other_neighbours(tab: Any) -> Iterator[None]:
    """Wait until what is done has drawn the neighbours anew."""
    tab.page.evaluate("window.before = document.querySelector('#neighbours button')")
    yield
    tab.until(f"document.querySelector('#neighbours button') !== window.before && {NEIGHBOURS}")


def test_neighbours_lead_on_and_the_address_leads_back(open_tab: Callable[..., Any], embedded: Any) -> None:
    """Eight images near it; each has neighbours of its own, and the address of such a walk ends at the same image."""
    tab = open_tab(embedded.page)
    page = tab.open("seed=7&image=12")
    tab.until(NEIGHBOURS)
    with other_neighbours(tab):
        page.click("#neighbours button:nth-child(3)")
        tab.until("location.hash.includes('walk=2.25')")
        page.wait_for_selector("text=1 step away")
    with other_neighbours(tab):
        tab.slide("reach", 60)
    page.click("#neighbours button:nth-child(1)")
    tab.until("location.hash.includes('walk=2.25,0.60')")
    page.wait_for_selector("text=2 steps away")
    page.wait_for_selector("#verdict .probability")
    other = open_tab(embedded.page)
    other.open(page.evaluate("location.hash.slice(1)"))
    other.page.wait_for_selector("#verdict .probability")
    assert image_pixels(other.page) == image_pixels(page)
    page.go_back()
    page.wait_for_selector("text=1 step away")


def test_steps_through_images(open_tab: Callable[..., Any], embedded: Any) -> None:
    """Buttons and arrow keys; none comes before the first."""
    tab = open_tab(embedded.page)
    page = tab.open("seed=7&image=1")
    page.click("#detail-next")
    page.wait_for_selector("#detail-title >> text=Image 2")
    page.focus("#detail-title")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    page.wait_for_selector("#detail-title >> text=Image 0")
    assert page.is_disabled("#detail-previous")
    page.click("#detail-close")
    assert page.is_hidden("#detail")


# --------------------------------------------------------------------------------------------------- interpolation


def test_an_interpolation_plays_from_end_to_end(open_tab: Callable[..., Any], embedded: Any) -> None:
    """Its first and last frames are the images chosen; it plays, pauses and can be scrubbed."""
    tab = open_tab(embedded.page)
    page = tab.open("view=interpolate&from=7:1&to=7:4&steps=8")
    tab.until(FILM)
    tab.until("document.getElementById('play').textContent === 'Pause'")
    tab.until("Number(document.getElementById('scrubber').value) > 0")
    page.click("#play")
    assert page.text_content("#play") == "Play"
    for end, index in (("from", 1), ("to", 4)):
        image = np.load(io.BytesIO(httpx.get(f"{embedded.url}/sample?seed=7&first_index={index}&format=npy").content))
        pixels = page.evaluate(
            f"[...document.getElementById('picture-{end}').getContext('2d').getImageData(0, 0, 28, 28).data]"
        )
        off = np.abs(np.array(pixels).reshape(28, 28, 4)[..., 0] - image[0, :, :, 0].astype(int))
        assert off.max() <= 1
    tab.slide("scrubber", 1)
    assert page.text_content("#shown-frame") == "8 / 8"


@pytest.mark.parametrize(("name", "kind"), [("GIF", "GIF"), ("WebP", "WEBP"), ("APNG", "PNG"), ("PNG strip", "PNG")])
def test_it_is_kept_as_a_file(open_tab: Callable[..., Any], embedded: Any, name: str, kind: str) -> None:
    """As an animation of all frames, or as a strip."""
    tab = open_tab(embedded.page)
    page = tab.open("view=interpolate&from=7:1&to=7:4&steps=5")
    tab.until(FILM)
    with page.expect_download() as waiting:
        page.click(f"#exports >> text='{name}'")
    with Image.open(waiting.value.path()) as kept:
        assert kept.format == kind
        assert (getattr(kept, "n_frames", 1), kept.size) == ((1, (5 * 28, 28)) if "strip" in name else (5, (28, 28)))


def test_ends_are_chosen_in_every_way(open_tab: Callable[..., Any], embedded: Any) -> None:
    """Typed, drawn anew, swapped, picked on the wall, taken from one image; with a class, a way and a duration."""
    tab = open_tab(embedded.page)
    page = tab.open("view=interpolate&from=7:1&to=7:4")
    tab.until(FILM)
    page.fill("#index-from", "33")
    tab.until("location.hash.includes('from=7:33')")
    page.click("#swap")
    tab.until("location.hash.includes('from=7:4&to=7:33')")
    page.click("#fresh-to")
    tab.until("!location.hash.includes('to=7:33')")
    page.select_option("#label-from", label="3")
    tab.until("location.hash.includes('label_from=3')")
    page.click("label:has-text('Linear')")
    tab.until("location.hash.includes('method=linear')")
    for control, value in (("steps", 10), ("duration", 5000)):
        tab.slide(control, value)
        tab.until(f"location.hash.includes('{control}={value}')")
    tab.until(FILM)
    page.click("#pick-to")
    page.wait_for_selector("#picking-end >> text=ends with")
    page.click("[role=gridcell] >> nth=5")
    tab.until("location.hash.includes('view=interpolate') && !location.hash.includes('pick')")
    tab.until(FILM)
    page.click("#pick-from")
    page.click("#picking-stop")
    tab.until(FILM)
    tab.open("seed=9&image=2")
    tab.until(SHOWN)
    page.click("#use-to")
    tab.until("location.hash.includes('to=9:2') && location.hash.includes('from=9:0')")
    tab.until(FILM)


def test_large_images_have_as_many_frames_as_a_browser_decodes(open_tab: Callable[..., Any], others: Any) -> None:
    """51 of 320 pixels."""
    tab = open_tab(others.page)
    page = tab.open("bundle=large&view=interpolate&from=1:0&to=1:1&steps=256")
    tab.until(FILM)
    assert page.text_content("#shown-steps") == "51"


# ----------------------------------------------------------------------------------------------------------- judge


def test_a_drawing_is_judged_after_each_stroke(open_tab: Callable[..., Any], embedded: Any) -> None:
    """In the bundle's ink and as wide as its strokes; strokes are undone and cleared, by pointer and by keyboard."""
    tab = open_tab(embedded.page)
    page = tab.open("view=judge")
    tab.until("document.getElementById('drawing').width > 1")
    page.wait_for_selector("#drawing-card .empty")  # or the stroke would be judged half drawn
    assert 2 <= float(page.input_value("#brush")) <= 3.5
    box = page.locator("#drawing").bounding_box()
    unit = box["width"] / 28
    page.mouse.move(box["x"] + 8 * unit, box["y"] + 8 * unit)
    page.mouse.down()
    for x, y in ((19, 8), (13, 22)):
        page.mouse.move(box["x"] + x * unit, box["y"] + y * unit, steps=5)
    page.mouse.up()
    page.wait_for_selector("#drawing-card .probability")
    assert page.text_content("#drawing-card .class-name") == "looks like 7"
    page.focus("#drawing")
    for key in (" ", "ArrowRight", "ArrowRight", " "):
        page.keyboard.press(key)
    page.click("#undo")
    page.click("#undo")
    page.wait_for_selector("#drawing-card .empty")
    assert page.is_disabled("#undo")
    page.mouse.click(box["x"] + 50, box["y"] + 50)
    page.wait_for_selector("#drawing-card .probability")
    page.check("#inks input >> nth=1", force=True)
    page.click("#clear")
    page.wait_for_selector("#drawing-card .empty")


def test_one_pen_draws_at_a_time(open_tab: Callable[..., Any], embedded: Any) -> None:
    """The keyboard's stays where it is while D is asked; the mouse takes over; a second finger draws nothing."""
    tab = open_tab(embedded.page, has_touch=True)
    page = tab.open("view=judge")
    page.wait_for_selector("#inks label")
    page.focus("#drawing")
    lit = """(() => {
      const { data } = document.querySelector("#drawing-card canvas").getContext("2d").getImageData(0, 0, 28, 28);
      return Array.from({ length: 784 }, (_, at) => at).filter((at) => data[4 * at] > 128);
    })()"""

    def drawn(act: Callable[[], None]) -> set[int]:
        """The pixels that D sees after it."""
        page.evaluate("document.getElementById('drawing-card').replaceChildren()")
        act()
        page.wait_for_selector("#drawing-card .card")
        return set(page.evaluate(lit))

    def press(*keys: str) -> None:
        for key in keys:
            page.keyboard.press(key)

    first = drawn(lambda: press("ArrowUp", *["ArrowLeft"] * 8, " ", " "))
    second = drawn(lambda: press(" ", " "))
    assert first == second != set()
    press("ArrowLeft")
    box = page.locator("#drawing").bounding_box()
    left, top, step = box["x"], box["y"], box["width"] / 28

    def drag() -> None:
        page.mouse.move(left + 20 * step, top + 4 * step)
        page.mouse.down()
        page.mouse.move(left + 20 * step, top + 24 * step, steps=4)
        page.mouse.up()

    assert {28 * row + 20 for row in range(6, 22)} <= drawn(drag)
    page.click("#clear")
    hand = page.context.new_cdp_session(page)

    def touch(kind: str, *places: tuple[float, float]) -> None:
        points = [{"x": left + x * step, "y": top + y * step, "id": at} for at, (x, y) in enumerate(places)]
        hand.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

    def two_fingers() -> None:
        touch("touchStart", (4, 4))
        touch("touchStart", (4, 4), (24, 24))
        touch("touchMove", (4, 20), (24, 10))
        touch("touchEnd")

    assert {at % 28 for at in drawn(two_fingers)} <= set(range(2, 7))


def test_images_come_by_choice_by_drop_and_from_the_clipboard(
    open_tab: Callable[..., Any], embedded: Any, seven: UInt8
) -> None:
    """Each has a card with its verdict and class, or with what is wrong with it; the page scrolls nowhere sideways."""
    for size in ((360, 740), (1400, 900)):
        tab = open_tab(embedded.page, size)
        page = tab.open("view=judge")
        page.wait_for_selector("#inks label")
        wide, long = np.tile(seven, (1, 100)), "x" * 200
        page.set_input_files(
            "#files", files(("7.png", png(seven)), (f"{long}.png", b"broken"), ("wide.png", png(wide)))
        )
        page.wait_for_selector("#cards article >> nth=2")
        assert "looks like 7" in page.text_content("#cards article >> nth=0")
        assert "not PNG" in page.text_content("#cards article >> nth=1 >> .hint")
        assert "Converted" in page.text_content("#cards article >> nth=2")
        assert page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0
        assert (
            page.evaluate("document.getElementById('judge').scrollWidth - document.getElementById('judge').clientWidth")
            == 0
        )
    for event in ("drop", "paste"):
        tab.open("seed=7")
        page.wait_for_selector("[role=gridcell].is-there")
        page.evaluate(
            """([kind, text]) => {
              const given = new DataTransfer();
              const bytes = Uint8Array.from(atob(text), (one) => one.charCodeAt(0));
              given.items.add(new File([bytes], "7.png", { type: "image/png" }));
              const made = { dataTransfer: given, clipboardData: given, bubbles: true, cancelable: true };
              document.body.dispatchEvent(kind === "drop" ? new DragEvent(kind, made) : new ClipboardEvent(kind, made));
            }""",
            [event, base64.b64encode(png(seven)).decode()],
        )
        page.wait_for_selector("#cards .class-name >> text=looks like 7")
        assert "view=judge" in page.evaluate("location.hash")


def test_an_inverted_image_is_inverted_by_one_click(open_tab: Callable[..., Any], embedded: Any, seven: UInt8) -> None:
    """Its verdict becomes that of the image itself. A blank one gets its hint and no button: it would be as blank."""
    tab = open_tab(embedded.page)
    page = tab.open("view=judge")
    page.wait_for_selector("#inks label")
    page.set_input_files("#files", files(("right.png", png(seven))))
    right = page.text_content("#cards article >> nth=0 >> .probability")
    page.set_input_files("#files", files(("wrong.png", png(np.stack([255 - seven] * 3, axis=2)))))
    page.wait_for_selector("#cards .hint")
    assert "dark on light" in page.text_content("#cards .hint")
    page.click("#cards button >> text=Invert it")
    page.wait_for_selector("#cards .hint", state="detached")
    assert page.text_content("#cards article >> nth=0 >> .probability") == right
    page.set_input_files("#files", files(("black.png", png(np.zeros((28, 28), np.uint8)))))
    page.wait_for_selector("#cards .hint")
    page.wait_for_load_state("networkidle")
    assert page.locator("#cards button").count() == 0


def test_colour_bundles_have_colours_to_draw_with(open_tab: Callable[..., Any], others: Any) -> None:
    """Those that their images have most; the drawing is judged at its full size."""
    tab = open_tab(others.page)
    page = tab.open("bundle=large&view=judge")
    page.wait_for_selector("#inks label")
    assert page.locator("#inks label").count() > 3
    page.check("#inks input >> nth=2", force=True)
    page.mouse.click(*[page.locator("#drawing").bounding_box()[key] + 100 for key in ("x", "y")])
    page.wait_for_selector("#drawing-card .probability")
