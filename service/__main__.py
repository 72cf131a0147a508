"""`python -m service`: reads the settings, then serves.

Exit codes: 0 after SIGTERM or SIGINT and a drain; 1 where the port can't be had or we failed for good; 2 for a bad
setting; 3 where the default bundle or every bundle can't be loaded; 128 + the signal's number where a second signal cut
the drain short.
"""

from service.server.signals import take_first

if __name__ == "__main__":  # before the other imports, which take half a second
    take_first()

import argparse
import asyncio
import gc
import logging
import os
import socket
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from service.http.auth import Keys, read_keys
from service.logs import set_up_logs
from service.server import process_memory as memory
from service.server.listener import HostError, listen, url
from service.server.supervisor import Supervisor
from service.settings import Settings, SettingsError, check_names, flag, read_settings, variable
from service.worker_group import WorkerGroup

PROGRAM = "gan-service"
FAILED, BAD_SETTING = 1, 2

log = logging.getLogger(__name__)


def main() -> NoReturn:
    """Serve until told to stop, and end the process."""
    run_process(start, sys.argv[1:])


def run_process(start: Callable[[Sequence[str]], int], arguments: Sequence[str]) -> NoReturn:
    """Do this with the command line, and end the process with the code that it returns."""
    try:
        code = start(arguments)
    except Exception:
        log.critical("unexpected error", exc_info=True)
        code = FAILED
    take_first(code)  # those who can't wait until the log is written
    logging.shutdown()
    # Not through the interpreter's own end, which aborts when it takes threads down that are inside torch: one may be
    # loading a bundle, or be stuck in a batch. All that had to be finished is.
    os._exit(code)


def start(arguments: Sequence[str]) -> int:
    """Serve until told to stop; returns the exit code."""
    prepared = prepare(arguments)
    if isinstance(prepared, int):
        return prepared
    settings, keys, warnings = prepared
    for warning in warnings:
        log.warning(warning)
    try:
        listener = listen(settings.host, settings.port)
    except HostError as error:
        return _complain(f"{variable('host')} (or {flag('host')}) is {settings.host!r}: {error}", BAD_SETTING)
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        return _complain(f"cannot listen on {settings.host} port {settings.port}: {reason}", FAILED)
    if settings.workers > 1:
        return asyncio.run(Supervisor(listener, url(listener), arguments, settings.workers).run())
    return serve(settings, keys, [listener], WorkerGroup())


def prepare(arguments: Sequence[str]) -> tuple[Settings, Keys, list[str]] | int:
    """Read the settings and begin to log; an exit code where they can't be used. The last are warnings, a line each."""
    try:
        settings = read_settings(vars(_parser().parse_args(arguments)))
        keys = read_keys(settings)
        warnings = check_names(os.environ)
    except SettingsError as error:
        return _complain(str(error), BAD_SETTING)
    set_up_logs(settings.log_format, settings.log_level)
    return settings, keys, warnings


def serve(settings: Settings, keys: Keys, listeners: list[socket.socket], worker_group: WorkerGroup) -> int:
    """Answer requests until told to stop; returns the exit code."""
    memory.share_one_heap()
    # Imports make hundreds of thousands of objects that stay, and the collector would look at them over and over: a
    # sixth of the time. It begins once the bundles are loaded.
    gc.disable()
    # Only now: torch takes seconds to import, and --help or a bad setting need not wait for it, nor those who only
    # start others that do this.
    from service.app import create_app  # noqa: PLC0415
    from service.engine.device import NoSuchPrecision  # noqa: PLC0415
    from service.server.server import run  # noqa: PLC0415

    try:
        app = create_app(settings, keys, worker_group)
    except ValueError as error:
        for listener in listeners:
            listener.close()
        field = "precision" if isinstance(error, NoSuchPrecision) else "device"
        return _complain(f"{variable(field)} (or {flag(field)}): {error}", BAD_SETTING)
    return run(app, settings, listeners, worker_group)


def _complain(message: str, code: int) -> int:
    print(f"{PROGRAM}: {message}", file=sys.stderr)
    return code


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, without the usage in front of it."""
        self.exit(BAD_SETTING, f"{self.prog}: {message}\n")


def _parser() -> argparse.ArgumentParser:
    """A flag for every setting. Values stay text: the settings check them, wherever they come from."""
    parser = _Parser(
        prog=PROGRAM,
        description="Serve the images of a generative adversarial net over HTTP.",
        epilog="A flag wins over its variable. Exit codes: 0 stopped in order, 1 failed, 2 bad setting, 3 bad bundle.",
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32, width=120),
    )
    for name, field in Settings.model_fields.items():
        text = f"{field.description} [{variable(name)}, default {shown(field.default)}]"
        parser.add_argument(
            flag(name), dest=name, metavar="VALUE", default=argparse.SUPPRESS, help=text.replace("%", "%%")
        )
    return parser


def shown(default: object) -> str:
    """A default as people write it: unset, on, 32MiB, 25."""
    if default is None:
        return "unset"
    if isinstance(default, bool):
        return "on" if default else "off"
    if isinstance(default, int) and default >= 2**20:
        return f"{default // 2**20}MiB" if default % 2**20 == 0 else f"{default // 10**6}M"
    return f"{default:g}" if isinstance(default, float) else str(default)


if __name__ == "__main__":
    main()
