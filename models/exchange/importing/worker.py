"""The process in which a foreign file is read: bounded in memory and processor time, and nothing if it dies.

It takes its options as JSON on stdin and answers with one JSON object on stdout: `{"done": …}` or `{"refused": …}`.
"""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from models.bundle import BundleError
from models.exchange.importing.conversion import Options, import_onnx
from models.exchange.importing.parsing import MOST_BYTES, Refused


def main() -> None:
    """Import one file, within the limits that the options name."""
    asked = json.load(sys.stdin)
    _limit(asked["memory_bytes"], asked["seconds"])
    try:
        answer: dict[str, Any] = {"done": _import(asked)}
    except (Refused, BundleError) as error:
        answer = {"refused": str(error)}
    except MemoryError:
        answer = {"refused": f"it takes more than {asked['memory_bytes'] >> 20} MiB (--memory)"}
    except OSError as error:
        answer = {"refused": ": ".join(str(part) for part in (error.filename, error.strerror) if part) or str(error)}
    except RuntimeError as error:
        is_memory = any(words in str(error) for words in ("can't allocate memory", "bad_alloc", "llocate"))
        reason = f"it takes more than {asked['memory_bytes'] >> 20} MiB (--memory)" if is_memory else _line(error)
        answer = {"refused": reason}
    except Exception as error:  # noqa: BLE001 - whatever a foreign file does, it is refused
        answer = {"refused": f"{type(error).__name__}: {_line(error)}"}
    print(json.dumps(answer), flush=True)


def _import(asked: dict[str, Any]) -> dict[str, Any]:
    options = Options(**{**asked["options"], "labels": tuple(asked["options"]["labels"])})
    if asked["discriminator"]:
        options = replace(options, discriminator=_read(Path(asked["discriminator"])))
    path = Path(asked["file"])
    made = import_onnx(_read(path), path.name, Path(asked["out"]), options)
    manifest = made.bundle.manifest
    return {
        "bundle": f"{made.bundle.name}@{made.bundle.version}",
        "image": [manifest.image.width, manifest.image.height, manifest.image.channels],
        "labels": len(manifest.labels or ()),
        "parameters": sum(weight.numel() for weight in made.bundle.generator.parameters()),
        "nodes": made.nodes,
        "largest_difference": made.largest_difference,
        "warning": made.warning,
    }


def _read(path: Path) -> bytes:
    if not path.is_file():
        raise Refused("there is no such file" if not path.exists() else "not a regular file")
    with path.open("rb") as file:
        return file.read(MOST_BYTES + 1)


def _limit(memory_bytes: int, seconds: int) -> None:
    """Bound the process, where its system can. Every processor may be busy for as long as the import may take."""
    try:
        import resource  # noqa: PLC0415 - Windows has none
    except ImportError:
        return
    resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, memory_bytes))
    busy = seconds * (os.cpu_count() or 1)
    resource.setrlimit(resource.RLIMIT_CPU, (busy, busy + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]


if __name__ == "__main__":
    main()
