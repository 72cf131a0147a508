"""gan-client, or python -m gan_client: the client from a shell."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from gan_client.async_client import AsyncClient
from gan_client.commands import bundles, discriminate, mcp_server, sample
from gan_client.commands.folder import FolderError
from gan_client.errors import GanServiceError

COMMANDS = {"sample": sample, "discriminate": discriminate, "bundles": bundles, "mcp": mcp_server}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. 0: done; 1: the service or a file; 2: what was asked for; 130: stopped by Ctrl-C."""
    asked = command_parser().parse_args(arguments)
    try:
        return int(COMMANDS[asked.command].run(asked, _client(asked)))
    except BrokenPipeError:  # whoever read the output has enough; what is still in the buffer has nowhere to go
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (GanServiceError, OSError) as error:
        print(f"gan-client: {error}", file=sys.stderr)
        return 1
    except (ValueError, FolderError) as error:
        print(f"gan-client: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def command_parser() -> argparse.ArgumentParser:
    """The commands and their flags."""
    parser = argparse.ArgumentParser(prog="gan-client", description="The client of gan-service, from a shell.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        summary = str(command.__doc__).partition(": ")[2].splitlines()[0].rstrip(".")
        one = commands.add_parser(name, help=summary, description=summary)
        one.add_argument("--url", help="where the service is; default: GAN_CLIENT_URL, else http://127.0.0.1:8000")
        one.add_argument("--key-file", type=Path, help="a file with the key in it; default: GAN_CLIENT_KEY has it")
        one.add_argument("--timeout", type=float, default=60.0, help="seconds that a request may take; default 60")
        one.add_argument("--retries", type=int, default=10, help="attempts after a request's first; default 10")
        one.add_argument("--in-flight", type=int, default=4, help="requests under way at once; default 4")
        command.add_to(one)
    return parser


def _client(asked: argparse.Namespace) -> AsyncClient:
    """A key is no flag, because everybody on a machine can read the arguments of its programs."""
    key = asked.key_file.read_text("utf-8").strip() if asked.key_file else os.environ.get("GAN_CLIENT_KEY") or None
    url = asked.url or os.environ.get("GAN_CLIENT_URL") or "http://127.0.0.1:8000"
    return AsyncClient(url, key, timeout_s=asked.timeout, retries=asked.retries, in_flight=asked.in_flight)


if __name__ == "__main__":
    sys.exit(main())
