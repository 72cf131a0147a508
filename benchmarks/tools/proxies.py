"""Runs the examples of deploy/proxies, by the real nginx and HAProxy, in front of two ports of this machine."""

import contextlib
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.tools.process import ROOT

EXAMPLES = {"nginx": ROOT / "deploy/proxies/nginx.conf", "haproxy": ROOT / "deploy/proxies/haproxy.cfg"}
PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin"
START_S, STOP_S = 30, 60
_TLS = re.compile(r"^ *ssl.*\n|(?<=listen 8443) ssl|(?<=bind :8443) ssl .*", re.MULTILINE)


def why_not(name: str) -> str | None:
    """Why this proxy can't run here; None if it can."""
    if shutil.which(name, path=PATH) is None:
        return f"needs {name}"
    if name == "nginx" and os.geteuid() != 0:
        return "nginx has its folders for temporary files to itself"
    return None


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as one:
        return int(one.getsockname()[1])


@contextlib.contextmanager
def proxying(name: str, folder: Path, ports: tuple[int, int], files: tuple[Path, Path] | None = None) -> Iterator[int]:
    """The port of a proxy while the block lasts; with TLS if there are files of a certificate and its key."""
    port = free_port()
    text = EXAMPLES[name].read_text()
    changes = {
        "listen 8443": f"listen 127.0.0.1:{port}",
        "bind :8443": f"bind 127.0.0.1:{port}",
        "/var/cache/nginx/gan": str(folder / "cache"),
        "127.0.0.1:8001": f"127.0.0.1:{ports[0]}",
        "127.0.0.1:8002": f"127.0.0.1:{ports[1]}",
    }
    if files is None:
        text = _TLS.sub("", text)
    else:
        both = folder / "tls.pem"
        both.write_bytes(files[0].read_bytes() + files[1].read_bytes())
        ours = ("/etc/ssl/gan/tls.crt", "/etc/ssl/gan/tls.key", "/etc/ssl/gan/tls.pem")
        changes |= dict(zip(ours, map(str, (*files, both)), strict=True))
    for example, ours_now in changes.items():
        text = text.replace(example, ours_now)
    config = folder / f"{name}.conf"
    config.write_text(text)
    program = str(shutil.which(name, path=PATH))
    options = f"daemon off; user root; pid {folder}/pid; error_log stderr;"
    command = {
        "nginx": [program, "-p", str(folder), "-c", str(config), "-e", "stderr", "-g", options],
        "haproxy": [program, "-db", "-f", str(config)],
    }[name]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)  # noqa: S603 - the proxies' own programs
    try:
        _wait_until_it_listens(process, port)
        yield port
    finally:
        process.terminate()
        process.communicate(timeout=STOP_S)


def _wait_until_it_listens(process: "subprocess.Popen[str]", port: int) -> None:
    give_up = time.monotonic() + START_S
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return
        if process.poll() is not None or time.monotonic() > give_up:
            process.kill()
            raise RuntimeError(process.communicate()[1])
        time.sleep(0.05)
