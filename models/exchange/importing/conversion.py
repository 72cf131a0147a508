"""An ONNX generator becomes a bundle: its inputs are given their roles, its nodes are read, and the result is proven.

What is proven, before anything is written, on 256 images with every label in turn: the bundle's net, as a CPU and as a
GPU compute it, is within one grey level of what onnxruntime makes of the file itself; one, two, seven and 64 rows give
each row what it gets in any other company; and the values lie in the range that was named.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, cast

import numpy as np
import onnxruntime
import torch
from onnx import ModelProto, ValueInfoProto
from torch import Tensor

from models.bundle import Bundle, write_bundle
from models.exchange.importing.folding import fold_normalisations
from models.exchange.importing.parsing import FLOATS, INTEGERS, Refused, opset_of, parse
from models.exchange.importing.reading import Made, Net, Reader, Value
from models.inference.drawing import images_of
from models.inference.fast_nets import FastGenerator, Verdicts, fast_discriminator, fast_generator, most_rows_of
from models.inference.noise import LatentRange, beside_noise, draw_latents
from models.inference.pixels import grey_levels, grid
from models.inference.tiles import REFERENCE_TILE
from models.networks import GraphDiscriminator, GraphGenerator, build_networks
from models.networks.operators import GraphError
from models.spec import GraphInput, GraphNode, GraphSpec, ImageSpec, LatentSpec

Role = Literal["latent", "label", "onehot", "noise"]
Range = Literal["signed", "unit"]
CHECKED_ROWS, PART = 256, 16
COMPANIES = (1, 2, 7, REFERENCE_TILE)
MOST_LEVELS = 1  # that two ways of computing a pixel may differ by
RANGE_SLACK = 1e-3  # of the range, for rounding
MOST_SAMPLE_PIXELS = 2**22
_CHANNELS = (1, 3, 4)
_CLASS_WORDS = ("label", "class", "cond", "onehot", "one_hot")


@dataclass(frozen=True)
class Options:
    """What the command line says of a file.

    Attributes:
        labels: Names of classes; none where the file says how many there are.
        roles: Of inputs, by their names; others are guessed.
        output: Which one is the image.
        discriminator: Another file's content.
    """

    name: str
    latent: Literal["normal", "uniform"] = "normal"
    range: Range = "signed"
    labels: tuple[str, ...] = ()
    roles: Mapping[str, Role] = field(default_factory=dict)
    output: str | None = None
    discriminator: bytes | None = None


@dataclass(frozen=True)
class Imported:
    """What has become of a file, and what is to be known of it."""

    bundle: Bundle
    nodes: int
    largest_difference: int
    warning: str


def import_onnx(content: bytes, file_name: str, folder: Path, options: Options) -> Imported:
    """Read a file, prove what comes of it, and write the bundle at `folder`.

    Raises:
        Refused: Something of it; nothing is written.
        BundleError: A reader of bundles would refuse it, likewise.
        OSError: The disk, likewise.
    """
    made = read_onnx(content, options)
    read, generator, discriminator = made.read, made.generator, made.discriminator
    difference, warning = _Proof(content, generator, read, options).run()
    samples = _samples(generator, read)
    if discriminator is not None:
        _try_discriminator(discriminator, samples, len(read.labels))
    facts = {
        "name": options.name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "network": made.network,
        "image": read.image,
        "latent": read.latent,
        "labels": read.labels or None,
        "calibration": None,
        "training": {
            "imported": {
                "file": file_name,
                "sha256": hashlib.sha256(content).hexdigest(),
                "opset": made.opset,
                "producer": made.producer,
                "range": options.range,
            }
        },
        "evaluation": {"parity": {"images": CHECKED_ROWS, "largest_difference_grey_levels": difference}},
    }
    columns = max(1, math.isqrt(len(samples)))
    weights = None if made.judge is None else made.judge.weights
    bundle = write_bundle(folder, facts, read.net.weights, weights, grid(samples, columns))
    return Imported(bundle, len(made.network.nodes), difference, warning)


def read_onnx(content: bytes, options: Options) -> "Candidate":
    """Read a file without computing any image.

    Raises:
        Refused: Something of it.
    """
    model = parse(content)
    read = _read_generator(model, options)
    network = GraphSpec(family="graph", **dict(read.net.body))
    judge = None
    if options.discriminator is not None:
        if read.image.channels == 4:
            raise Refused("a discriminator of RGBA images: uploads are judged without transparency; leave it out")
        judge = _read_discriminator(parse(options.discriminator), read.image, len(read.labels), options.range)
        network = network.model_copy(update={"discriminator": judge.body})
    producer = f"{model.producer_name} {model.producer_version}".strip()[:100]
    return Candidate(read, judge, network, *_built(network, read, judge), opset_of(model), producer)


@dataclass(frozen=True)
class _Read:
    """A generator that has been read. `given` says what the file's own inputs are, by name."""

    net: Net
    image: ImageSpec
    latent: LatentSpec
    labels: tuple[str, ...]
    given: Mapping[str, GraphInput]
    output: str
    is_nhwc: bool


@dataclass(frozen=True)
class Candidate:
    """A file that has been read, and the nets that are built of it: nothing is proven yet."""

    read: _Read
    judge: Net | None
    network: GraphSpec
    generator: GraphGenerator
    discriminator: GraphDiscriminator | None
    opset: int
    producer: str


def _read_generator(model: ModelProto, options: Options) -> _Read:
    reader = Reader(model)
    found = _inputs_of(model)
    if unknown := [name for name in options.roles if name not in found]:
        raise Refused(f"--input {unknown[0]}: the file's inputs are {', '.join(found)}")
    roles = _guess(found, options)
    given = {}
    for name, value in found.items():
        given[name] = GraphInput(name=reader.name_of(name), role=roles[name], shape=_row_shape(value))
        made = reader.add_input(name, given[name], is_whole=roles[name] == "label")
        reader.values[name] = _fed(reader, made, value, roles[name], options)
    output = _output_of(model, options.output)
    image, is_nhwc = _finish(reader, _made(reader, output), options.range)
    net = Net(reader.net.inputs, *_pruned(reader.net))
    fold_normalisations(net)
    labels = options.labels or tuple(str(number) for number in range(_classes_of(net)))
    _check_classes(net, labels)
    sizes = {
        role: sum(math.prod(one.shape) for one in given.values() if one.role == role) for role in ("latent", "noise")
    }
    if not 1 <= sizes["latent"] <= 65536 or sizes["noise"] > 2**24:
        raise Refused(f"{sizes['latent']} latents and {sizes['noise']} numbers of noise")
    frequencies = tuple([1 / len(labels)] * len(labels)) if labels else None
    latent = LatentSpec(
        dim=sizes["latent"], distribution=options.latent, noise=sizes["noise"], label_frequencies=frequencies
    )
    return _Read(net, image, latent, labels, given, output, is_nhwc)


def _fed(reader: Reader, made: Made, value: ValueInfoProto, role: Role, options: Options) -> Made:
    """What the file's input is, made of the net's."""
    if role in {"latent", "noise"} and options.latent == "uniform":
        # Bundles have latents of variance 1; whoever trains with uniform noise means −1 … 1.
        third = reader.same(torch.tensor(math.sqrt(1 / 3), dtype=torch.float32))
        return _as_made(reader.emit("Mul", [made, third], {}))
    if role == "label" and value.type.tensor_type.elem_type in FLOATS:
        return _as_made(reader.emit("Cast", [made], {"to": "float"}))
    if role == "onehot" and value.type.tensor_type.elem_type in INTEGERS:
        return _as_made(reader.emit("Cast", [made], {"to": "int"}))
    return made


def _inputs_of(model: ModelProto) -> dict[str, ValueInfoProto]:
    """The inputs that have to be fed; older files list their weights there too."""
    weights = {tensor.name for tensor in model.graph.initializer}
    found = {value.name: value for value in model.graph.input if value.name not in weights}
    if not found:
        raise Refused("the graph has no inputs")
    for name, value in found.items():
        kind = value.type.tensor_type.elem_type
        if kind not in FLOATS | INTEGERS:
            raise Refused(f"input {name[:120]!r} is no tensor of floats or integers")
    return found


def _row_shape(value: ValueInfoProto) -> tuple[int, ...]:
    """An input's shape without its first axis.

    Raises:
        Refused: The first axis is frozen, or another one is free.
    """
    axes = value.type.tensor_type.shape.dim
    if not axes:
        raise Refused(f"input {value.name[:120]!r} has no batch axis")
    if axes[0].HasField("dim_value"):
        raise Refused(
            f"input {value.name[:120]!r}: its batch axis is frozen at {axes[0].dim_value}; "
            "export it with a dynamic first axis"
        )
    if any(not 1 <= axis.dim_value <= 65536 for axis in axes[1:]) or len(axes) > 5:
        raise Refused(f"input {value.name[:120]!r}: an axis beside the first has no fixed length")
    return tuple(axis.dim_value for axis in axes[1:])


def _guess(found: Mapping[str, ValueInfoProto], options: Options) -> dict[str, Role]:
    """What each input is: as the command line says, else where name and shape leave no doubt."""
    roles: dict[str, Role] = dict(options.roles)
    left = []
    for name, value in found.items():
        shape = [axis.dim_value for axis in value.type.tensor_type.shape.dim][1:]
        lower = name.lower()
        if name in roles:
            continue
        if value.type.tensor_type.elem_type in INTEGERS and math.prod(shape) == 1:
            roles[name] = "label"
        elif len(shape) >= 3 and shape[-1] > 1 and shape[-2] > 1:
            roles[name] = "noise"
        elif any(word in lower for word in _CLASS_WORDS) or lower in {"y", "c"}:
            roles[name] = "label" if math.prod(shape) == 1 else "onehot"
        else:
            left.append(name)
    if "latent" not in roles.values() and len(left) == 1:
        roles[left.pop()] = "latent"
    if len(left) == 2 and options.labels and "latent" not in roles.values():
        wide = [one for one in left if math.prod(_row_shape(found[one])) == len(options.labels)]
        if len(wide) == 1:
            roles[wide[0]] = "onehot"
            left.remove(wide[0])
            roles[left.pop()] = "latent"
    if left or "latent" not in roles.values():
        raise Refused(
            f"which input is which? Say --input {(left or list(found))[0][:60]}=latent, label, onehot or noise"
        )
    return roles


def _output_of(model: ModelProto, wanted: str | None) -> str:
    names = [value.name for value in model.graph.output]
    if wanted is not None and wanted not in names:
        raise Refused(f"--output {wanted[:120]}: the file's outputs are {', '.join(names)[:200]}")
    if wanted is None and len(names) != 1:
        raise Refused(f"which output is the image? Say --output with one of {', '.join(names)[:200]}")
    return wanted or names[0]


def _made(reader: Reader, output: str) -> Made:
    value = reader.read(output)
    if not isinstance(value, Made):
        raise Refused(f"output {output[:120]!r} does not depend on the inputs")
    return value


def _as_made(value: Value) -> Made:
    return cast("Made", value)  # what is emitted of a made value is one


def _finish(reader: Reader, made: Made, span: Range) -> tuple[ImageSpec, bool]:
    """Make the output pixels (n, c, h, w) in [0, 1]; returns what images they are, and whether channels were last."""
    shape, is_nhwc = made.shapes[0], False
    value = made
    if len(shape) == 3:
        value = _as_made(reader.reshaped(made, [(one[0], 1, *one[1:]) for one in made.shapes]))
    elif len(shape) == 4 and shape[1] not in _CHANNELS and shape[3] in _CHANNELS:
        is_nhwc = True
        value = _as_made(reader.emit("Transpose", [made], {"perm": (0, 3, 1, 2)}))
    shape = value.shapes[0]
    if len(shape) != 4 or shape[1] not in _CHANNELS:
        raise Refused(
            f"the output is {made.shapes[0][1:]} a row, which is no image: "
            "(channels, height, width) with 1, 3 or 4 channels, or channels last"
        )
    if span == "signed":
        half = reader.same(torch.tensor(0.5))
        value = _as_made(reader.emit("Add", [reader.emit("Mul", [value, half], {}), half], {}))
    reader.emit("Clip", [value], {"min": 0.0, "max": 1.0})  # a level over 255 would come out as black
    if max(shape[2:]) > 1024:
        raise Refused(f"images of {shape[3]}×{shape[2]} pixels; the limit is 1024 a side")
    return ImageSpec(channels=cast("Literal[1, 3, 4]", shape[1]), height=shape[2], width=shape[3]), is_nhwc


def _pruned(net: Net) -> tuple[list[GraphNode], dict[str, Tensor]]:
    """The nodes and weights that the last node needs: shapes were computed with others."""
    wanted, kept = {net.nodes[-1].output}, []
    for node in reversed(net.nodes):
        if node.output in wanted:
            kept.append(node)
            wanted.update(node.inputs)
    if len(kept) > 4096:
        raise Refused(f"{len(kept)} nodes are left; the limit is 4096")
    return kept[::-1], {name: tensor for name, tensor in net.weights.items() if name in wanted}


def _classes_of(net: Net) -> int:
    """How many classes the net takes, as far as its inputs and its tables of them say."""
    for one in net.inputs:
        if one.role == "onehot":
            return math.prod(one.shape)
        if one.role == "label":
            made_of = {one.name}
            for node in net.nodes:
                if node.op in {"Reshape", "Cast"} and made_of & set(node.inputs):
                    made_of.add(node.output)
                if node.op == "Gather" and node.inputs[1] in made_of and node.inputs[0] in net.weights:
                    return net.weights[node.inputs[0]].shape[0]
                if node.op == "OneHot" and node.inputs[0] in made_of:
                    return int(str(node.attributes["depth"]))
            raise Refused("how many classes are there? Name them with --labels")
    return 0


def _check_classes(net: Net, labels: Sequence[str]) -> None:
    roles = [one for one in net.inputs if one.role in {"label", "onehot"}]
    if labels and not roles:
        raise Refused("--labels: the net takes none")
    for one in roles:
        if one.role == "onehot" and math.prod(one.shape) != len(labels):
            raise Refused(f"{len(labels)} labels, and the input {one.name} takes {math.prod(one.shape)}")
    if len(labels) != len(set(labels)) or any(not 1 <= len(label) <= 255 for label in labels):
        raise Refused("--labels: each needs a name of its own, of 1 to 255 characters")
    if len(labels) > 65536:
        raise Refused(f"{len(labels)} labels; the limit is 65536")


def _read_discriminator(model: ModelProto, image: ImageSpec, classes: int, span: Range) -> Net:
    """D: its input is the image as the generator's file makes it, its output one number, before any sigmoid."""
    reader = Reader(model)
    for name, value in _inputs_of(model).items():
        shape = _row_shape(value)
        if len(shape) == 3:
            is_nhwc = shape != image.shape
            if is_nhwc and (shape[2], *shape[:2]) != image.shape:
                raise Refused(f"the discriminator takes {shape}, and the images are {image.shape}")
            pixels = reader.add_input(name, GraphInput(name="pixels", role="image", shape=image.shape))
            seen: Made = pixels
            if span == "signed":
                two, one = reader.same(torch.tensor(2.0)), reader.same(torch.tensor(1.0))
                seen = _as_made(reader.emit("Sub", [reader.emit("Mul", [pixels, two], {}), one], {}))
            if is_nhwc:
                seen = _as_made(reader.emit("Transpose", [seen], {"perm": (0, 2, 3, 1)}))
            reader.values[name] = seen
        elif classes:
            role: Role = "onehot" if math.prod(shape) == classes else "label"
            made = reader.add_input(
                name, GraphInput(name=reader.name_of(name), role=role, shape=shape), is_whole=role == "label"
            )
            if role == "label" and value.type.tensor_type.elem_type in FLOATS:
                reader.values[name] = _as_made(reader.emit("Cast", [made], {"to": "float"}))
        else:
            raise Refused(f"the discriminator's input {name[:120]!r} is no image")
    if classes and len(reader.net.inputs) < 2:
        raise Refused("the discriminator takes no label, and the generator does; leave it out")
    output = next(iter(value.name for value in model.graph.output), "")
    made = _made(reader, output)
    if any(math.prod(shape) != rows for shape, rows in zip(made.shapes, (2, 3), strict=True)):
        raise Refused(f"the discriminator's output is {made.shapes[0][1:]} a row, not one number")
    reader.emit("Reshape", [made], {"shape": (-1,)})
    net = Net(reader.net.inputs, _without_sigmoid(reader.net.nodes), reader.net.weights)
    net = Net(net.inputs, *_pruned(net))
    fold_normalisations(net)
    return net


def _without_sigmoid(nodes: list[GraphNode]) -> list[GraphNode]:
    """The nodes without a sigmoid at the end: what is served is the logit."""
    by_output = {node.output: node for node in nodes}
    node = nodes[-1]
    while node.op == "Reshape" and node.inputs[0] in by_output:
        before = by_output[node.inputs[0]]
        if before.op == "Sigmoid":
            bare = node.model_copy(update={"inputs": before.inputs})
            return [bare if one is node else one for one in nodes]
        node = before
    return nodes


def _built(network: GraphSpec, read: _Read, judge: Net | None) -> tuple[GraphGenerator, GraphDiscriminator | None]:
    try:
        generator, discriminator = build_networks(network, read.image, read.latent, len(read.labels))
    except GraphError as error:
        raise Refused(str(error)) from None
    for net, weights in ((generator, read.net.weights), (discriminator, judge.weights if judge else {})):
        if net is not None:
            net.load_state_dict(weights, assign=True)
            net.requires_grad_(requires_grad=False).eval()
    return cast("GraphGenerator", generator), cast("GraphDiscriminator | None", discriminator)


class _Proof:
    """Compares a net with the file that it was read from."""

    def __init__(self, content: bytes, generator: GraphGenerator, read: _Read, options: Options) -> None:
        self.read, self.options = read, options
        self.generator = generator
        try:
            self.session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        except Exception as error:  # noqa: BLE001 - its errors have no class in common
            raise Refused(f"onnxruntime can't run the file: {_line(error)}") from None
        drawn = draw_latents(read.latent, 0, 0, CHECKED_ROWS)
        self.latents = torch.from_numpy(beside_noise(read.latent, drawn, [LatentRange(0, 0, CHECKED_ROWS)]))
        self.labels = torch.arange(CHECKED_ROWS) % len(read.labels) if read.labels else None

    @torch.inference_mode()
    def run(self) -> tuple[int, str]:
        """The largest difference in grey levels, and what is odd about the range.

        Raises:
            Refused: See the module.
        """
        fast = self._fast()
        largest, low, high = 0, math.inf, -math.inf
        rows = min(PART, most_rows_of(self.generator))  # so that a large net does not take gigabytes
        for part in (slice(start, start + rows) for start in range(0, CHECKED_ROWS, rows)):
            raw = self._from_file(part)
            low, high = min(low, float(raw.min())), max(high, float(raw.max()))
            wanted = self._levels(raw)
            for net in (fast, self.generator):
                pixels = net(*self._rows(part))
                if not pixels.isfinite().all():
                    raise Refused(f"{self._first_without_numbers(part)}: gives NaN or Inf")
                largest = max(largest, int((grey_levels(pixels).int() - wanted).abs().max()))
        least = -1 if self.options.range == "signed" else 0
        slack = RANGE_SLACK * (1 - least)
        if low < least - slack or high > 1 + slack:
            hint = (
                "--range signed"
                if self.options.range == "unit" and low >= -1 - slack and high <= 1 + slack
                else "end the net in tanh, sigmoid or a clamp"
            )
            raise Refused(f"the output lies in {low:.4g} … {high:.4g}, not in {least} … 1: {hint}")
        if largest > MOST_LEVELS:
            raise Refused(f"onnxruntime's images differ by {largest} grey levels (allowed: {MOST_LEVELS})")
        self._compare_companies(fast)
        odd = self.options.range == "signed" and low >= 0
        return largest, f"no value is below 0 (the least is {low:.3g}); is it --range unit?" if odd else ""

    def _fast(self) -> FastGenerator:
        try:
            return fast_generator(self.generator)
        except RuntimeError as error:
            raise Refused(f"onnxruntime can't run what was read: {_line(error)}") from None

    def _rows(self, part: slice) -> tuple[Tensor, Tensor | None]:
        return self.latents[part], None if self.labels is None else self.labels[part]

    def _from_file(self, part: slice) -> Tensor:
        """What onnxruntime makes of the file."""
        rows, labels = self._rows(part)
        fed, start = {}, 0
        kinds = {value.name: value.type for value in self.session.get_inputs()}
        for role in ("latent", "noise"):
            for name, one in self.read.given.items():
                if one.role == role:
                    stop = start + math.prod(one.shape)
                    drawn = rows[:, start:stop].reshape(-1, *one.shape)
                    start = stop
                    if self.options.latent == "uniform":
                        drawn = drawn * math.sqrt(1 / 3)
                    fed[name] = _typed(drawn, kinds[name])
        for name, one in self.read.given.items():
            if labels is not None and one.role in {"label", "onehot"}:
                made = labels if one.role == "label" else torch.nn.functional.one_hot(labels, len(self.read.labels))
                fed[name] = _typed(made.reshape(-1, *one.shape), kinds[name])
        try:
            (found,) = self.session.run([self.read.output], fed)
        except Exception as error:  # noqa: BLE001 - its errors have no class in common
            raise Refused(f"onnxruntime can't run the file with {len(rows)} rows: {_line(error)}") from None
        if not np.isfinite(found).all():
            raise Refused(f"{self._first_without_numbers(part)}: gives NaN or Inf")
        return torch.from_numpy(found.astype(np.float32))

    def _levels(self, raw: Tensor) -> Tensor:
        """The file's output as grey levels (n, h, w, c)."""
        pixels = (raw + 1) / 2 if self.options.range == "signed" else raw
        pixels = pixels.permute(0, 3, 1, 2) if self.read.is_nhwc else pixels
        return grey_levels(pixels.clamp(0, 1).reshape(-1, *self.read.image.shape)).int()

    def _compare_companies(self, fast: FastGenerator) -> None:
        """See that a row is the same whatever rows it is computed with."""
        largest = min(COMPANIES[-1], max(8, PART * 2**20 // math.prod(self.read.image.shape)))
        whole = fast(*self._rows(slice(0, largest)))
        for rows in COMPANIES:
            if rows < largest:
                off = float((fast(*self._rows(slice(0, rows))) - whole[:rows]).abs().max())
                if off > 0.5 / 255:
                    raise Refused(
                        f"rows depend on one another: one of {rows} differs by {off:.2g} from the same of {largest}"
                    )

    def _first_without_numbers(self, part: slice) -> str:
        """The node that is the first to give NaN or Inf."""
        seen: list[GraphNode] = []
        compute = self.generator.compute

        def watch(node: GraphNode, inputs: Sequence[Tensor]) -> Tensor:
            result = compute(node, inputs)
            if result.is_floating_point() and not result.isfinite().all():
                seen.append(node)
            return result

        self.generator.compute = watch  # type: ignore[method-assign]
        self.generator(*self._rows(part))
        return f"node {seen[0].name or seen[0].output} ({seen[0].op})" if seen else "the file"


def _typed(rows: Tensor, kind: str) -> np.ndarray[tuple[int, ...], np.dtype[np.generic]]:
    """Rows in the type that an input of onnxruntime has."""
    names = {"float": "float32", "float16": "float16", "double": "float64", "int64": "int64", "int32": "int32"}
    return rows.numpy().astype(names[kind.removeprefix("tensor(").removesuffix(")")])


def _samples(generator: GraphGenerator, read: _Read) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """The first images of seed 0, as many as make a picture that is not too large."""
    count = max(1, min(64, MOST_SAMPLE_PIXELS // (read.image.height * read.image.width)))
    count = math.isqrt(count) ** 2
    drawn = beside_noise(read.latent, draw_latents(read.latent, 0, 0, count), [LatentRange(0, 0, count)])
    labels = np.arange(count) % len(read.labels) if read.labels else None
    return images_of(generator, drawn, labels)


def _try_discriminator(
    net: GraphDiscriminator, images: np.ndarray[tuple[int, ...], np.dtype[np.uint8]], classes: int
) -> None:
    """See that D judges images, and gives numbers."""
    pixels = torch.from_numpy(images[:8]).permute(0, 3, 1, 2).float() / 255
    labels = torch.arange(len(pixels)) % classes if classes else None
    with torch.inference_mode():
        try:
            said = fast_discriminator(net)(pixels, labels), Verdicts(net)(pixels, labels)
        except (RuntimeError, IndexError) as error:
            raise Refused(f"the discriminator can't be run: {_line(error)}") from None
    if not all(one.isfinite().all() for one in said):
        raise Refused("the discriminator gives NaN or Inf")
    if (said[0] - said[1]).abs().max() > 1e-2:
        raise Refused("the discriminator's logits differ between onnxruntime and torch")


def _line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]
