"""The page in Debian's Chromium, driven by Playwright; skipped where either is missing, with the reason."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from models.bundle import write_bundle
from models.networks import build_networks
from models.spec import ImageSpec, LatentSpec, MaxoutDiscriminatorSpec, MLPGeneratorSpec, MLPSpec
from service.settings import Settings

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PHONE, DESK = (360, 740), (1400, 900)
LARGE = MLPSpec(
    family="mlp",
    generator=MLPGeneratorSpec(hidden=(4,)),
    discriminator=MaxoutDiscriminatorSpec(units=(1,), pieces=1),
)


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    """One headless Chromium for a module's tests."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs Playwright, which is in the extra `test`")
    if CHROMIUM is None:
        pytest.skip("needs Chromium, which is not on this machine")
    with playwright.sync_playwright() as driver:
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--enable-precise-memory-info"]
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


@dataclass
class Tab:
    """A tab with what it said on its console; `expected` are parts of messages that a test provokes."""

    page: "Page"
    url: str
    said: list[str] = field(default_factory=list)
    expected: list[str] = field(default_factory=list)

    def open(self, fragment: str = "") -> "Page":
        """Load the page with a state."""
        self.page.goto("about:blank")  # another fragment alone would load nothing
        self.page.goto(f"{self.url}/#{fragment}")
        return self.page

    def until(self, condition: str) -> None:
        """Wait until an expression on the page is true. The page's policy forbids Playwright's own way, an eval."""
        self.page.evaluate(f"""new Promise((done, fail) => {{
          const late = performance.now() + 60_000;
          const look = () => ({condition}) ? done() : performance.now() > late ? fail("too late") : setTimeout(look, 5);
          look();
        }})""")

    def slide(self, control: str, value: float) -> None:
        """Move a slider."""
        self.page.evaluate(
            """([id, value]) => {
              const slider = document.getElementById(id);
              slider.value = value;
              slider.dispatchEvent(new Event("input"));
            }""",
            [control, value],
        )

    def surprises(self) -> list[str]:
        """What it said that no test expected."""
        return [text for text in self.said if not any(part in text for part in self.expected)]


@pytest.fixture
def open_tab(browser: "Browser") -> Iterator[Callable[..., Tab]]:
    """Opens tabs, and fails where one of them says something on its console."""
    tabs = []

    def open_one(url: str, size: tuple[int, int] = DESK, **more: Any) -> Tab:
        context = browser.new_context(viewport={"width": size[0], "height": size[1]}, **more)
        context.set_default_timeout(60_000)
        tab = Tab(context.new_page(), url)
        tab.page.on("console", lambda message: tab.said.append(f"{message.type}: {message.text}"))
        tab.page.on("pageerror", lambda error: tab.said.append(f"error: {error}"))
        tabs.append(tab)
        return tab

    yield open_one
    for tab in tabs:
        tab.page.context.close()
    assert [surprise for tab in tabs for surprise in tab.surprises()] == []


@pytest.fixture(scope="module")
def embedded(live_server: Any) -> Iterator[Any]:
    """The embedded bundles, below a prefix."""
    with live_server(Settings.model_validate({"device": "cpu", "root_path": "/gan"})).running() as server:
        server.page = f"{server.url}/gan"
        yield server


def write_large(folder: Path, side: int) -> None:
    """A bundle of smooth square images in colour, without labels or calibration."""
    image, latent = ImageSpec(channels=3, height=side, width=side), LatentSpec(dim=8, distribution="normal")
    generator, discriminator = (net.state_dict() for net in build_networks(LARGE, image, latent, 0))
    across = np.linspace(0, 1, side, dtype=np.float32)
    waves = [
        np.sin(2 * np.pi * (k * across[:, None] + (3 - k) * across[None] + c / 3)) for c in range(3) for k in range(4)
    ]
    patterns = torch.from_numpy(np.stack(waves)).float().reshape(3, 4, -1).permute(0, 2, 1).reshape(-1, 4)
    rng = torch.Generator().manual_seed(0)
    for net in (generator, discriminator):
        for name, tensor in net.items():
            net[name] = (
                0.01 * torch.ones(tensor.shape) if tensor.numel() > 1000 else torch.randn(tensor.shape, generator=rng)
            )
    (last,) = (name for name, tensor in generator.items() if tensor.shape == patterns.shape)
    generator[last] = patterns.contiguous()
    facts = {
        "name": folder.name, "created": "2026-01-02T03:04:05Z", "network": LARGE, "image": image, "latent": latent,
        "labels": None, "calibration": None, "training": {"preset": "none", "steps": 0}, "evaluation": {},
    }  # fmt: skip
    write_bundle(folder, facts, generator, discriminator, np.zeros((side, side, 3), np.uint8))


@pytest.fixture(scope="module")
def others(live_server: Any, make_tiny: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Bundles unlike the embedded ones: large and in colour; tiny and oblong; with names for classes."""
    folder = tmp_path_factory.mktemp("others")
    write_large(folder / "large", 320)  # 1,024 take a minute and a half to load on one processor
    make_tiny(folder / "oblong", ImageSpec(channels=3, height=6, width=10), None, None)
    make_tiny(folder / "cond", ImageSpec(channels=1, height=8, width=8), ("cat", "10", "owl"), None)
    settings = {"bundles": folder, "default_bundle": "cond", "device": "cpu"}
    with live_server(Settings.model_validate(settings)).running() as server:
        server.page = server.url
        yield server
