"""gan-client discriminate: says of image files how real they look."""

import argparse
import asyncio
import json
from dataclasses import asdict
from pathlib import Path

from gan_client.async_client import AsyncClient
from gan_client.results import Verdict


def add_to(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="PNG, JPEG, WebP or BMP")
    parser.add_argument("--bundle", help="whose discriminator judges: name or name@version")
    parser.add_argument("--json", action="store_true", help="a JSON object on each line, with every field")


def run(arguments: argparse.Namespace, client: AsyncClient) -> int:
    """Print a line for each file; 1 where one of them can't be judged."""

    async def judge() -> list[Verdict]:
        async with client:
            return await client.discriminate(arguments.files, bundle=arguments.bundle)

    verdicts = asyncio.run(judge())
    for path, verdict in zip(arguments.files, verdicts, strict=True):
        print(json.dumps({"file": str(path), **asdict(verdict)}) if arguments.json else _line(path, verdict))
    return int(any(verdict.error for verdict in verdicts))


def _line(path: Path, verdict: Verdict) -> str:
    if verdict.error:
        return f"    -  {path}: {verdict.error.detail}"
    label = f" as {verdict.label!r}" if verdict.label is not None else ""
    hint = f" ({verdict.hint})" if verdict.hint else ""
    return f"{verdict.probability_real:5.2f}  {path}{label}{hint}"
