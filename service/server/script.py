"""What the command `gan-service` runs: `python -m service`, with signals taken as early."""

from typing import NoReturn

from service.server.signals import take_first


def main() -> NoReturn:
    """Serve until told to stop, and end the process."""
    take_first()
    from service.__main__ import main as serve  # noqa: PLC0415 - takes half a second

    serve()
