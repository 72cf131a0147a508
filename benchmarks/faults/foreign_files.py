"""Damaged ONNX files are read in one process; reports what became of them, the slowest one and the memory.

    python -m benchmarks.faults.foreign_files --files 100000 --seed 0

Each is one of a few sound files with one to four changes: of its bytes, or of one field of its message, towards what
breaks readers (sizes of 2⁶², names of other values, paths in place of numbers, nodes in a circle). A file is refused,
with one line, or is a net; anything else, a file that was opened, or memory over the bound is a failure.
"""

import random
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx
import torch
from google.protobuf.message import DecodeError, Message  # type: ignore[import-untyped]
from onnx import TensorProto, helper, numpy_helper

from benchmarks.tools.report import Check, finish, parser
from models.exchange.importing.conversion import Options, read_onnx
from models.exchange.importing.parsing import Refused
from models.networks.operators import OPERATORS

SLOWEST_S, MOST_MIB = 5, 1024
MORE_OPERATORS = ("Constant", "ConstantOfShape", "Shape", "Squeeze", "Split", "Range", "Loop", "If", "RandomNormal", "")
NUMBERS = (-(2**63), -(2**31), -2, -1, 0, 1, 2, 3, 255, 65537, 2**31 - 1, 2**31, 2**62, 2**63 - 1)
FRACTIONS = (0.0, -1.0, 1e-45, 1e38, float("nan"), float("inf"))
TEXTS = ("", "z", "image", "SAME_UPPER", "linear", "../../../../etc/passwd", "\n\x1b[31m", "é" * 70000)
OPTIONS = Options("net", range="unit")


@dataclass
class Outcome:
    """What has become of some files. `wrong` are the seeds of those that were neither refused nor nets."""

    refused: Counter[str] = field(default_factory=Counter)
    nets: int = 0
    slowest_s: float = 0.0
    wrong: list[str] = field(default_factory=list)


def sound_files() -> list[bytes]:
    """Nets that are read as they are: a DCGAN; one of classes with computed shapes; one with most other operators."""
    node = helper.make_node

    def net(nodes: Sequence[onnx.NodeProto], inputs: dict[str, tuple[int, list[Any]]], **weights: Any) -> bytes:
        rng = torch.Generator().manual_seed(0)
        numbers = {
            name: torch.randn(*given, generator=rng) if isinstance(given, tuple) else torch.tensor(given)
            for name, given in weights.items()
        }
        graph = helper.make_graph(
            nodes,
            "net",
            [helper.make_tensor_value_info(name, kind, axes) for name, (kind, axes) in inputs.items()],
            [helper.make_tensor_value_info("image", TensorProto.FLOAT, None)],
            [numpy_helper.from_array(tensor.numpy(), name) for name, tensor in numbers.items()],
        )
        return bytes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]).SerializeToString())

    latent = {"z": (int(TensorProto.FLOAT), ["n", 6, 1, 1])}
    dcgan = [
        node("ConvTranspose", ["z", "first"], ["a"]),
        node("BatchNormalization", ["a", "gain", "gain", "gain", "gain"], ["b"]),
        node("LeakyRelu", ["b"], ["c"], alpha=0.2),
        node("ConvTranspose", ["c", "last"], ["d"], strides=[2, 2], pads=[1, 1, 1, 1]),
        node("Sigmoid", ["d"], ["image"]),
    ]
    classes = [
        node("Gather", ["table", "label"], ["e"]),
        node("Shape", ["z"], ["shape"]),
        node("Slice", ["shape", "zero", "one"], ["rows"]),
        node("Concat", ["rows", "rest"], ["target"], axis=0),
        node("Squeeze", ["z", "axes"], ["flat"]),
        node("Concat", ["flat", "e"], ["both"], axis=1),
        node("Gemm", ["both", "dense"], ["f"]),
        node("Reshape", ["f", "target"], ["g"]),
        node("Sigmoid", ["g"], ["image"]),
    ]
    many = [
        node("Flatten", ["z"], ["a"]),
        node("MatMul", ["a", "dense"], ["b"]),
        node("ReduceMean", ["b"], ["m"], axes=[1], keepdims=1),
        node("Sub", ["b", "m"], ["c"]),
        node("Reshape", ["c", "square"], ["d"]),
        node("Resize", ["d", "", "scales"], ["e"], mode="linear"),
        node("Pad", ["e", "pads"], ["p"], mode="reflect"),
        node("Conv", ["p", "kernel"], ["q"], auto_pad="SAME_UPPER"),
        node("InstanceNormalization", ["q", "gain", "gain"], ["i"]),
        node("MaxPool", ["i"], ["o"], kernel_shape=[2, 2]),
        node("DepthToSpace", ["o"], ["s"], blocksize=2),
        node("Transpose", ["s"], ["t"], perm=[0, 2, 3, 1]),
        node("Split", ["t", "halves"], ["u", "v"], axis=3),
        node("Softmax", ["u"], ["w"], axis=3),
        node("Clip", ["w"], ["image"]),
    ]
    return [
        net(dcgan, latent, first=(6, 8, 4, 4), gain=[1.0] * 8, last=(8, 3, 4, 4)),
        net(
            classes, latent | {"label": (int(TensorProto.INT64), ["n"])},
            table=(3, 4), zero=[0], one=[1], rest=[1, 4, 4], axes=[2, 3], dense=(10, 16),
        ),
        net(
            many, latent, dense=(6, 64), square=[0, 4, 4, 4], scales=[1.0, 1.0, 2.0, 2.0],
            pads=[0, 0, 1, 1, 0, 0, 1, 1], kernel=(16, 4, 3, 3), gain=[1.0] * 16, halves=[3, 1],
        ),
    ]  # fmt: skip


def damaged(content: bytes, rng: random.Random) -> bytes:
    """The file with one to four changes."""
    for _ in range(rng.randint(1, 4)):
        content = rng.choice([_bytes_changed, _field_changed, _field_changed])(content, rng)
    return content


def _bytes_changed(content: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(content) + 1)
    end = min(len(content), start + rng.choice([0, 1, 1, 4, 100]))
    new = rng.choice([b"", rng.randbytes(1), rng.randbytes(4), content[end : end + 50], b"\xff" * 9])
    return content[:start] + new + content[end:]


def _field_changed(content: bytes, rng: random.Random) -> bytes:
    try:
        model = onnx.load_from_string(content)
    except (DecodeError, ValueError, RuntimeError):
        return content
    places = list(_places(model))
    if places:
        message, name = rng.choice(places)
        _change(message, name, rng)
    return bytes(model.SerializeToString())


def _places(message: Message) -> list[tuple[Message, Any]]:
    """Every field of a message and of what it holds. Numbers of weights are one place, not thousands."""
    found = []
    for one, value in message.ListFields():
        found.append((message, one))
        if one.message_type is not None:
            for part in value if one.is_repeated else [value]:
                found += _places(part)
    return found


def _change(message: Message, one: Any, rng: random.Random) -> None:
    if isinstance(message, onnx.NodeProto) and one.name == "op_type" and rng.random() < 0.7:
        message.op_type = rng.choice([*OPERATORS, *MORE_OPERATORS])
        return
    if isinstance(message, TensorProto) and rng.random() < 0.1:
        message.data_location = TensorProto.EXTERNAL
        message.external_data.add(key="location", value=rng.choice(TEXTS[:6]))
        return
    if not one.is_repeated:
        if one.message_type is not None or rng.random() < 0.2:
            message.ClearField(one.name)
        else:
            _set(lambda value: setattr(message, one.name, value), one, rng)
        return
    values = getattr(message, one.name)
    place = rng.randrange(len(values))
    match rng.choice(["drop", "double", "swap", "set"]):
        case "drop":
            del values[place]
        case "double" if one.message_type is not None:
            values.add().CopyFrom(values[place])
        case "double":
            values.extend([values[place]] * rng.choice([1, 8]))
        case "swap":
            kept = list(values)
            rng.shuffle(kept)
            del values[:]
            values.extend(kept)
        case _ if one.message_type is None:
            _set(lambda value: values.__setitem__(place, value), one, rng)


def _set(put: Callable[[Any], None], one: Any, rng: random.Random) -> None:
    """Another value of the field's type."""
    kinds = {one.CPPTYPE_STRING: TEXTS, one.CPPTYPE_FLOAT: FRACTIONS, one.CPPTYPE_DOUBLE: FRACTIONS}
    value: Any = rng.choice(kinds.get(one.cpp_type, NUMBERS))
    try:
        put(value.encode() if one.type == one.TYPE_BYTES else value)
    except (ValueError, TypeError):  # more than an int32 holds, or no value of an enumeration
        put(1)


def try_files(seeds: range) -> Outcome:
    """Read a damaged file for each seed."""
    sound, outcome = sound_files(), Outcome()
    for seed in seeds:
        rng = random.Random(seed)  # noqa: S311 - no secret
        content = damaged(rng.choice(sound), rng)
        started = time.perf_counter()
        try:
            read_onnx(content, OPTIONS)
            outcome.nets += 1
        except Refused as error:
            if not str(error) or any(not character.isprintable() for character in str(error)) or len(str(error)) > 1000:
                outcome.wrong.append(f"{seed}: refused with {str(error)[:300]!r}")
            outcome.refused[type(error).__name__] += 1
        except MemoryError:
            outcome.refused["MemoryError"] += 1
        except Exception as error:  # noqa: BLE001 - that is what is looked for
            outcome.wrong.append(f"{seed}: {type(error).__name__}: {str(error)[:300]}")
        outcome.slowest_s = max(outcome.slowest_s, time.perf_counter() - started)
    return outcome


def opened_files() -> list[str]:
    """From now on, the names of the files that the interpreter opens, without Python's own modules."""
    found: list[str] = []

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and not str(arguments[0]).endswith((".py", ".pyc")):
            found.append(str(arguments[0]))

    sys.addaudithook(watch)
    return found


def main() -> int:
    """Try as many as are asked for."""
    arguments = parser(__doc__ or "")
    arguments.add_argument("--files", type=int, default=100_000, help="how many")
    arguments.add_argument("--seed", type=int, default=0, help="of the first")
    given = arguments.parse_args()
    torch.set_num_threads(1)
    try_files(range(-50, 0))  # imports what is imported late
    opened = opened_files()
    outcome = try_files(range(given.seed, given.seed + given.files))
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    facts = {
        "files": given.files,
        "nets": outcome.nets,
        "refused": dict(outcome.refused),
        "slowest_s": round(outcome.slowest_s, 3),
        "peak_mib": peak_mib,
        "wrong": outcome.wrong[:20],
        "opened": opened[:20],
    }
    checks = [
        Check("each file is a net, or refused in one line", f"{len(outcome.wrong)} are not", not outcome.wrong),
        Check("no file is opened", f"{len(opened)}", not opened),
        Check(f"each takes {SLOWEST_S} s at most", f"{outcome.slowest_s:.2f} s", outcome.slowest_s <= SLOWEST_S),
        Check(f"the process takes {MOST_MIB} MiB at most", f"{peak_mib} MiB", peak_mib <= MOST_MIB),
    ]
    return finish("foreign_files", facts, checks)


if __name__ == "__main__":
    sys.exit(main())
