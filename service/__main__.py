"""`python -m service`: reads the settings, then serves; `python -m service capacity` says what a load needs.

Exit codes: 0 after SIGTERM or SIGINT and a drain; 1 if the port is not available or the service failed for good; 2 for
a bad setting; 3 if the default bundle or every bundle can't be loaded; 128 + the signal's number if a second signal cut
the drain short.
"""

from service.server.signals import exit_on_signals

if __name__ == "__main__":  # before the other imports, which take half a second
    exit_on_signals()

import argparse
import asyncio
import gc
import logging
import os
import socket
import ssl
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import NoReturn

from service.engine.bundles.keys import read_bundle_keys
from service.errors import did_you_mean
from service.http.layers.auth import Keys, read_keys
from service.logs import set_up_logs
from service.machine.worker_group import WorkerGroup
from service.server import process_memory as memory
from service.server.listener import HostError, in_words, listen
from service.server.supervisor import Supervisor
from service.server.tls import read_tls
from service.server.worker_count import Machine, choose_workers, weights_bytes
from service.settings import Settings, SettingsError, check_limits, check_names, flag, read_settings, variable

PROGRAM = "gan-service"
CAPACITY = "capacity"
FAILED, BAD_SETTING = 1, 2

log = logging.getLogger(__name__)


def main() -> NoReturn:
    """Serve until told to stop, and end the process."""
    run_process(start, sys.argv[1:])


def run_process(start: Callable[[Sequence[str]], int], arguments: Sequence[str]) -> NoReturn:
    """Call `start` with the command line, and end the process with the exit code that it returns."""
    try:
        code = start(arguments)
    except Exception:
        log.critical("unexpected error", exc_info=True)
        code = FAILED
    exit_on_signals(code)  # a signal now ends the process without waiting for the log
    logging.shutdown()
    # Not by sys.exit: the interpreter aborts if threads are inside torch when it ends, and one may be loading a bundle
    # or be stuck in a batch. Everything that had to finish has finished.
    os._exit(code)


def start(arguments: Sequence[str]) -> int:
    """Serve until told to stop, or measure where the first word says so; returns the exit code."""
    if arguments[:1] == [CAPACITY]:
        return _measure_capacity(arguments[1:])
    prepared = prepare(arguments)
    if isinstance(prepared, int):
        return prepared
    settings, keys, tls, warnings = prepared
    for warning in warnings:
        log.warning(warning)
    try:
        listener = listen(settings.host, settings.port)
    except HostError as error:
        return _print_error(f"{variable('host')} (or {flag('host')}) is {settings.host!r}: {error}", BAD_SETTING)
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        return _print_error(f"cannot listen on {settings.host} port {settings.port}: {reason}", FAILED)
    workers = settings.worker_count
    size: dict[str, object] = {"workers": workers}
    if settings.workers == "auto":
        weights = weights_bytes(settings.bundles, settings.max_resident_bundles)
        workers, why = choose_workers(settings, Machine.here(settings.device, settings.processors), weights)
        size = {"workers": workers, "because": why}
        arguments = [*arguments, flag("workers"), str(workers)]
    if workers > 1:
        address = in_words(listener, has_tls=tls is not None)
        return asyncio.run(Supervisor(listener, address, arguments, workers, size).run())
    return serve(settings, keys, [listener], WorkerGroup(size), tls)


def prepare(arguments: Sequence[str]) -> tuple[Settings, Keys, ssl.SSLContext | None, list[str]] | int:
    """Read the settings and set up the log; returns settings, keys, TLS and warnings, or the exit code for bad ones."""
    try:
        settings = read_settings(vars(_parser().parse_args(arguments)))
        keys = read_keys(settings)
        read_bundle_keys(settings)  # raises now; they are read again with the bundles
        tls = read_tls(settings)
        warnings = [*check_names(os.environ), *check_limits(settings)]
        _check_extra(settings)
    except SettingsError as error:
        return _print_error(str(error), BAD_SETTING)
    set_up_logs(settings.log_format, settings.log_level)
    return settings, keys, tls, warnings


def _measure_capacity(arguments: Sequence[str]) -> int:
    """Measure a service with these settings; returns the exit code."""
    from service.capacity import command  # noqa: PLC0415 - serving has no use for it

    parser = _parser(f"{PROGRAM} {CAPACITY}", command.DESCRIPTION)
    command.add_to(parser)
    asked = parser.parse_args(arguments)
    flags = {name: value for name, value in vars(asked).items() if name in Settings.model_fields}
    try:
        settings = read_settings(flags)
        check_names(os.environ)
    except SettingsError as error:
        return _print_error(str(error), BAD_SETTING)
    workers = [settings.worker_count]
    if settings.workers == "auto":
        weights = weights_bytes(settings.bundles, settings.max_resident_bundles)
        workers = sorted({1, choose_workers(settings, Machine.here(settings.device), weights).workers})
    return command.run(settings, flags, workers, asked)


def _check_extra(settings: Settings) -> None:
    """Raise SettingsError if a setting needs packages that are not installed."""
    if settings.traces == "off":
        return
    try:
        is_there = find_spec("opentelemetry.exporter.otlp.proto.http") is not None
    except ModuleNotFoundError:  # nor what it lies in
        is_there = False
    if not is_there:
        packages = "opentelemetry-sdk opentelemetry-exporter-otlp-proto-http"
        raise SettingsError(
            f"{variable('traces')} (or {flag('traces')}) is {settings.traces!r}: "
            f"install the extra otlp first (pip install {packages})"
        )


def serve(
    settings: Settings,
    keys: Keys,
    listeners: list[socket.socket],
    worker_group: WorkerGroup,
    tls: ssl.SSLContext | None = None,
) -> int:
    """Answer requests until told to stop; returns the exit code."""
    memory.share_one_heap()
    # Imports create hundreds of thousands of objects that stay, and the garbage collector would visit them repeatedly:
    # a sixth of the time. It is switched on once the bundles are loaded.
    gc.disable()
    # Imported here because torch takes seconds to import, which --help, a bad setting and the supervisor need not wait
    # for.
    from service.app import create_app  # noqa: PLC0415
    from service.engine.device import NoSuchPrecision  # noqa: PLC0415
    from service.server.server import run  # noqa: PLC0415

    try:
        app = create_app(settings, keys, worker_group)
    except ValueError as error:
        for listener in listeners:
            listener.close()
        field = "precision" if isinstance(error, NoSuchPrecision) else "device"
        reason = str(error) if isinstance(error, SettingsError) else f"{variable(field)} (or {flag(field)}): {error}"
        return BAD_SETTING if worker_group.cannot_start(reason) else _print_error(reason, BAD_SETTING)
    return run(app, settings, listeners, worker_group, tls)


def _print_error(message: str, code: int) -> int:
    print(f"{PROGRAM}: {message}", file=sys.stderr)
    return code


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Print one line, without the usage."""
        if message.startswith("unrecognized arguments: "):
            unknown = message.split()[2].partition("=")[0]
            message += did_you_mean(unknown, map(flag, Settings.model_fields))
        self.exit(BAD_SETTING, f"{self.prog}: {message}\n")


def _parser(
    prog: str = PROGRAM, description: str = "Serve the images of a generative adversarial net over HTTP."
) -> argparse.ArgumentParser:
    """A parser with a flag for every setting. Values stay text, because the settings parse them."""
    parser = _Parser(
        prog=prog,
        description=description,
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
    """A default for display: unset, on, 32MiB, 25."""
    if default is None:
        return "unset"
    if isinstance(default, bool):
        return "on" if default else "off"
    if isinstance(default, int) and default >= 2**20:
        return f"{default // 2**20}MiB" if default % 2**20 == 0 else f"{default // 10**6}M"
    return f"{default:g}" if isinstance(default, float) else str(default)


if __name__ == "__main__":
    main()
