"""gan-client bundles: lists what the service has."""

import argparse
import asyncio

from gan_client.async_client import AsyncClient
from gan_client.results import Bundle


def add_to(parser: argparse.ArgumentParser) -> None:
    """No arguments of its own."""


def run(arguments: argparse.Namespace, client: AsyncClient) -> int:  # noqa: ARG001 - as all commands
    """Print a line for each bundle."""

    async def ask() -> list[Bundle]:
        async with client:
            return await client.bundles()

    for bundle in asyncio.run(ask()):
        mark = "*" if bundle.is_default else " "
        colour = "grey" if bundle.channels == 1 else "colour"
        classes = f", {len(bundle.labels)} classes" if bundle.labels else ""
        print(f"{mark} {bundle.pinned}  {bundle.width}×{bundle.height} {colour}{classes}")
    return 0
