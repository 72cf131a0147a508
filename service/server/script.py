"""The command `gan-service`: `python -m service`, with signals handled as early as there."""

from typing import NoReturn

from service.server.signals import exit_on_signals


def main() -> NoReturn:
    """Serve until told to stop, and end the process."""
    exit_on_signals()
    from service.__main__ import main as serve  # noqa: PLC0415 - takes half a second

    serve()
