"""What recipes in pictures cost, and what they are worth: requests a second with and without, and a thousand verdicts.

    python -m benchmarks.serving.recipes [--seconds 3] [--rounds 7] [--pictures 1000]

First the service draws pictures of every bundle, format and layout, each with its recipe. /verify has to find all of
them identical; different once one pixel of each is changed by two levels; and unknown once their recipe names another
version. Then wrk asks for one PNG over 64 connections, in turns with and without a recipe. Each round gives a ratio.
"""

import argparse
import asyncio
import base64
import io
import itertools
import json
import statistics
import sys
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from benchmarks.tools import wrk
from benchmarks.tools.client import Request
from benchmarks.tools.process import Service, running
from benchmarks.tools.report import Check, finish, parser, table
from service.codecs.recipe import Recipe, find_recipe, mark
from service.codecs.time_slices import run_steps

LAYOUTS = ("", "&scale=3&truncation=0.7", "&count=4", "&count=6&layout=strip", "&count=3&columns=2&scale=2")
FORMATS = ("png", "jpeg", "webp", "zip", "json")
TOGETHER = 200  # pictures in one request, which together are fewer images than it may ask for
CONNECTIONS, WARM_S = 64, 1
MOST_COST = 0.05  # of requests a second


def split(body: bytes, form: str) -> list[bytes]:
    """The pictures of a reply."""
    if form == "zip":
        with zipfile.ZipFile(io.BytesIO(body)) as archive:
            return [archive.read(name) for name in archive.namelist()]
    if form == "json":
        return [base64.b64decode(text) for text in json.loads(body)["images"]]
    return [body]


async def drawn(service: Service, count: int) -> list[bytes]:
    """So many pictures, of every kind in turn."""
    bundles = [one["name"] for one in json.loads((await service.get("/bundles")).body)["bundles"]]
    found: list[bytes] = []
    for seed, (layout, form, bundle) in enumerate(itertools.cycle(itertools.product(LAYOUTS, FORMATS, bundles))):
        reply = await service.get(f"/sample?seed={seed}&recipe=true&bundle={bundle}&format={form}{layout}")
        found += split(reply.body, form)
        if len(found) >= count:
            return found[:count]
    raise AssertionError


def recipe_of(file: bytes) -> Recipe:
    """The recipe in a picture."""
    return Recipe.model_validate_json(run_steps(find_recipe(file)) or b"")


def with_one_pixel_changed(file: bytes) -> bytes:
    """The picture without loss, one of its numbers two levels off, with its recipe."""
    with Image.open(io.BytesIO(file)) as picture:
        pixels = np.asarray(picture).copy()
    flat, recipe = pixels.reshape(-1), recipe_of(file)
    place = recipe.seed % flat.size
    flat[place] ^= 2
    Image.fromarray(pixels).save(out := io.BytesIO(), "png")
    return mark(out.getvalue(), "png", recipe.model_dump_json().encode())


def of_another_version(file: bytes) -> bytes:
    """The picture, whose recipe names a version that is not here."""
    recipe = recipe_of(file)
    version = recipe.bundle.rpartition("@")[2].encode()
    return file.replace(version, bytes(reversed(version)))


async def verdicts(service: Service, files: Sequence[bytes]) -> Counter[str]:
    """How often /verify says what."""
    found: Counter[str] = Counter()
    for start in range(0, len(files), TOGETHER):
        texts = [base64.b64encode(file).decode() for file in files[start : start + TOGETHER]]
        asked = Request(
            "POST", "/verify", 0, json.dumps({"images": texts}).encode(), (("Content-Type", "application/json"),)
        )
        results = json.loads((await service.ask(asked)).body)["results"]
        found.update(one.get("verdict", "error") for one in results)
    return found


async def judged(service: Service, count: int) -> list[Check]:
    """Whether all verdicts are what they should be."""
    files = await drawn(service, count)
    changes: dict[str, Callable[[bytes], bytes]] = {
        "identical": bytes,
        "different": with_one_pixel_changed,
        "unknown_bundle": of_another_version,
    }
    checks = []
    for wanted, change in changes.items():
        found = await verdicts(service, [change(file) for file in files])
        checks.append(Check(f"{count} pictures are {wanted}", str(dict(found)), found == {wanted: count}))
    return checks


def rates(service: Service, seconds: float, rounds: int) -> tuple[list[float], list[float]]:
    """Requests a second without recipes, and with them, round by round."""
    ways = [Request("GET", target) for target in ("/sample?seed=7", "/sample?seed=7&recipe=true")]
    found: tuple[list[float], list[float]] = [], []
    for asked in ways:
        wrk.measure(service.port, asked, CONNECTIONS, WARM_S, 0)
    for _ in range(rounds):
        for asked, rate in zip(ways, found, strict=True):
            rate.append(wrk.measure(service.port, asked, CONNECTIONS, seconds, 0).per_s)
    return found


def measure(arguments: argparse.Namespace) -> int:
    """Verdicts, then rates; returns the exit code."""
    with running(bundles=arguments.bundles) as service:
        checks = asyncio.run(judged(service, arguments.pictures))
        without, with_it = rates(service, arguments.seconds, arguments.rounds)
    ratios = [one / other for one, other in zip(with_it, without, strict=True)]
    cost = 1 - statistics.median(ratios)
    rows: list[dict[str, object]] = [
        {"one PNG": name, "per_s": round(statistics.median(found))}
        for name, found in (("without a recipe", without), ("with one", with_it))
    ]
    table(rows)
    shown = f"{cost:.1%} ({1 - max(ratios):.1%} to {1 - min(ratios):.1%})"
    checks.append(Check(f"a recipe costs at most {MOST_COST:.0%} of requests a second", shown, cost <= MOST_COST))
    return finish("recipes", {"seconds": arguments.seconds, "rounds": arguments.rounds, "cost": cost}, checks)


def main() -> int:
    """Read the arguments and measure."""
    made = parser("Recipes in pictures.", seconds=3)
    made.add_argument("--rounds", type=int, default=7, help="how often each is measured")
    made.add_argument("--pictures", type=int, default=1000, help="how many are verified")
    arguments = made.parse_args()
    if not wrk.is_there():
        made.error(f"{wrk.PROGRAM} is not installed; Debian has it as a package of that name")
    return measure(arguments)


if __name__ == "__main__":
    sys.exit(main())
