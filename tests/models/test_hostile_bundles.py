"""Bundles that were made to hurt their reader: each is refused in one line, and in memory that its size explains."""

import copy
import hashlib
import json
import struct
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models.bundle import GENERATOR, MANIFEST, Bundle, BundleError, read_bundle, read_manifest, version_of

Json = dict[str, Any]
shares_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def original(tiny_bundles: Mapping[str, Bundle]) -> Bundle:
    return tiny_bundles["cond"]


@pytest.fixture
def folder(original: Bundle, tmp_path: Path) -> Path:
    """A folder in which `put` makes a bundle of what is drawn."""
    for file in original.folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def manifest_of(bundle: Bundle) -> Json:
    raw: Json = json.loads((bundle.folder / MANIFEST).read_bytes())
    return raw


def forge(folder: Path, original: Bundle, weights: bytes) -> None:
    """A bundle with other weights, whose checksum is right: only a look inside can tell."""
    raw = manifest_of(original)
    raw["files"][GENERATOR] = {"sha256": hashlib.sha256(weights).hexdigest(), "bytes": len(weights)}
    (folder / MANIFEST).write_text(json.dumps(raw))
    (folder / GENERATOR).write_bytes(weights)


def refusal(folder: Path) -> str:
    """Why it is refused: in one line of bounded length."""
    with pytest.raises(BundleError) as caught:
        read_bundle(folder)
    assert str(caught.value).isprintable()
    assert len(caught.value.reason) <= 400
    return caught.value.reason


def read_if_possible(folder: Path) -> Bundle | None:
    """The bundle, or nothing where it is refused."""
    try:
        return read_bundle(folder)
    except BundleError:
        refusal(folder)
        return None


# Weights

DTYPES = (
    "F32",
    "F64",
    "F16",
    "BF16",
    "I8",
    "U8",
    "I64",
    "U64",
    "BOOL",
    "F8_E4M3",
    "F8_E5M2",
    "F8_E8M0",
    "F4",
    "C64",
    "X",
)
NUMBERS = st.sampled_from(
    [0, 1, 2, 3, 4, 8, 32, 2**31, 2**32, 2**62, 2**63, 2**64 - 1, 2**64, -1, 1.5, "8", None, True]
)


def with_header(header: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A file of this header, as JSON or as it is, or one that claims to be of another length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(dtype: str = "F32", shape: object = (1,), offsets: object = (0, 4)) -> Json:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def weights_of(bundle: Bundle) -> tuple[Json, bytes]:
    """The header of the generator's file, and what follows it."""
    content = (bundle.folder / GENERATOR).read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:start]), content[start:]


HOSTILE_WEIGHTS: dict[str, bytes] = {
    "overlapping": with_header({"a": tensor(), "b": tensor(offsets=(2, 6))}, bytes(6)),
    "the same bytes twice": with_header({"a": tensor(), "b": tensor()}, bytes(4)),
    "a hole": with_header({"a": tensor(), "b": tensor(offsets=(8, 12))}, bytes(12)),
    "bytes to spare": with_header({"a": tensor()}, bytes(400)),
    "beyond the end": with_header({"a": tensor(offsets=(0, 2**40), shape=(2**38,))}, bytes(4)),
    "backwards": with_header({"a": tensor(offsets=(4, 0))}, bytes(4)),
    "sizes that overflow": with_header({"a": tensor(shape=(2**32, 2**32))}, bytes(4)),
    "sizes that come to nothing": with_header({"a": tensor(shape=(2**62, 4, 0), offsets=(0, 0))}),
    "a size beyond 64 bits": with_header({"a": tensor(shape=(2**70,))}, bytes(4)),
    "a negative size": with_header({"a": tensor(shape=(-1,))}, bytes(4)),
    "a hundred thousand axes": with_header({"a": tensor(shape=(1,) * 100_000)}, bytes(4)),
    "a key twice": with_header(b'{"a":%b,"a":%b}' % ((json.dumps(tensor()).encode(),) * 2), bytes(4)),
    "a huge header": with_header(b"{}", length=2**63 - 1),
    "a header of the whole file": with_header(b"{}", bytes(100), length=102),
    "a header beyond the limit": with_header(b"{", length=10**8),
    "a deep header": with_header(b'{"__metadata__":' + b"[" * 100_000),
    "metadata that are no texts": with_header({"__metadata__": {"a": 1}, "a": tensor()}, bytes(4)),
    "fifty thousand tensors": with_header({str(n): tensor(shape=(0,), offsets=(0, 0)) for n in range(50_000)}),
    "another type": with_header({"a": tensor("F4", (8,))}, bytes(4)),
    "no type": with_header({"a": tensor("pickle")}, bytes(4)),
    "no UTF-8": with_header(b'{"\xff":{}}'),
    "surrogates": with_header(b'{"\\ud800":%b}' % json.dumps(tensor()).encode(), bytes(4)),
    "a list": with_header([tensor()], bytes(4)),
    "NaN for a size": with_header(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}', bytes(4)),
    "seven bytes": b"\2\0\0\0\0\0\0",
}


@pytest.mark.parametrize("name", HOSTILE_WEIGHTS)
def test_weights_that_lie_are_refused(folder: Path, original: Bundle, name: str) -> None:
    """Whatever their header claims, and though their checksum is right."""
    forge(folder, original, HOSTILE_WEIGHTS[name])
    assert refusal(folder).startswith(("not a safetensors file", "tensors missing", "surplus tensors"))


@shares_folder
@given(data=st.data())
def test_weights_with_another_header_are_the_same_or_refused(
    folder: Path, original: Bundle, data: st.DataObject
) -> None:
    """Types, shapes and offsets of some tensors are others, or tensors go by other names."""
    header, content = weights_of(original)
    for name in data.draw(
        st.lists(st.sampled_from([name for name in header if name[0] != "_"]), min_size=1, max_size=3)
    ):
        match data.draw(st.sampled_from(["dtype", "shape", "data_offsets", "name"])):
            case "dtype":
                header[name]["dtype"] = data.draw(st.sampled_from(DTYPES))
            case "name":
                header[data.draw(st.sampled_from([*header, "", "x" * 10_000]))] = header[name]
            case field:
                header[name][field] = data.draw(st.lists(NUMBERS, max_size=4) | st.just(header[name][field][::-1]))
    forge(folder, original, with_header(header, content))
    if read := read_if_possible(folder):
        for name, numbers in read.generator.state_dict().items():
            assert torch.equal(numbers, original.generator.state_dict()[name])


# Manifests

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.sampled_from([0, -1, 1, 2, 65_536, 65_537, 2**31, 2**53, 2**64, 10**400, 1e308, 1e-320, -0.0])
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=10)
    | st.sampled_from(
        ["", "../..", "a" * 10_000, "\0", "mlp", "conv", "generator.safetensors", "2026-01-01T00:00:00Z"]
    ),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


def places(node: object, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to each value in a document."""
    inner = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in inner:
        yield (*path, key)
        yield from places(value, (*path, key))


def put(raw: Json, path: tuple[Any, ...], value: object) -> None:
    """Set the value in a place, where it still is one."""
    node: Any = raw
    with suppress(LookupError, TypeError):
        for key in path[:-1]:
            node = node[key]
        node[path[-1]] = value


@shares_folder
@given(data=st.data())
def test_a_manifest_with_other_values_is_read_or_refused(folder: Path, original: Bundle, data: st.DataObject) -> None:
    """In each place may stand anything: what is read all the same says what stands there."""
    raw = manifest_of(original)
    for path in data.draw(st.lists(st.sampled_from(list(places(raw))), min_size=1, max_size=3)):
        put(raw, path, data.draw(JSON))
    (folder / MANIFEST).write_text(json.dumps(raw))
    if read := read_if_possible(folder):
        assert read.version == version_of(raw) == read_manifest(folder)[1]
        assert read.manifest.model_dump(mode="json", exclude_unset=True) == raw


LABELS = st.lists(st.text(max_size=20), min_size=3, max_size=3, unique=True)


@shares_folder
@given(
    labels=LABELS,
    facts=st.dictionaries(
        st.text(max_size=9),
        JSON,
        max_size=3,
    ),
    name=st.from_regex(r"[a-z0-9][a-z0-9._-]{0,63}", fullmatch=True).filter(
        lambda name: not name.endswith(".discriminator")
    ),
    scale=st.floats(1e-3, 1e3),
)
def test_any_valid_facts_are_read_as_they_were_written(
    folder: Path, original: Bundle, labels: list[str], facts: Json, name: str, scale: float
) -> None:
    """Labels in any script, and whatever a training run says of itself."""
    raw = manifest_of(original) | {"labels": labels, "training": facts, "evaluation": facts, "name": name}
    raw["calibration"]["scale"] = scale
    (folder / MANIFEST).write_text(json.dumps(raw))
    manifest, version = read_manifest(folder)
    assert manifest.model_dump(mode="json", exclude_unset=True) == raw
    assert version == version_of(raw)


LIMIT = 1 << 20  # of a manifest


@pytest.mark.parametrize(
    "content",
    [
        b'{"a":' * (LIMIT // 5),
        b'{"format":1,"training":{"a":' + b"9" * (LIMIT - 100) + b"}}",
        b'{"format":1,"training":{"a":1e' + b"9" * (LIMIT - 100) + b"}}",
        b'{"format":1,"training":{"a":0.' + b"9" * (LIMIT - 100) + b"}}",
        b'{"format":1,"name":"' + b"\\u0000" * (LIMIT // 6 - 10) + b'"}',
        b"{" + b",".join(b'"%06d":0' % number for number in range(LIMIT // 11)) + b"}",
        b'{"format":1,"labels":[' + b",".join(b'"%06d"' % number for number in range(LIMIT // 9 - 10)) + b"]}",
        b'{"format":1,"latent":{"label_frequencies":[' + b"1," * (LIMIT // 2 - 40) + b"1]}}",
        b'{"format":1,"signature":[' + b"{}," * (LIMIT // 3 - 20) + b"{}]}",
        b'{"format":1,"network":{"family":"mlp","generator":{"hidden":[' + b"1," * (LIMIT // 2 - 60) + b"1]}}}",
    ],
    ids=["depth", "digits", "exponent", "decimals", "escapes", "fields", "labels", "frequencies", "signatures",
         "layers"],
)  # fmt: skip
def test_a_manifest_of_a_megabyte_of_anything_is_refused(folder: Path, content: bytes) -> None:
    """The largest that is read, all of it of one kind."""
    assert len(content) <= LIMIT
    (folder / MANIFEST).write_bytes(content)
    refusal(folder)


@pytest.mark.parametrize("field", ["width", "hidden", "dim"])
def test_nets_that_no_memory_holds_are_refused(folder: Path, original: Bundle, field: str) -> None:
    """They are built without memory, and the weights that would fill them are not there."""
    raw = copy.deepcopy(manifest_of(original))
    match field:
        case "width":
            raw["image"] |= {"width": 4096, "height": 4096}
        case "hidden":
            raw["network"]["generator"]["hidden"] = [65_536] * 16
        case "dim":
            raw["latent"]["dim"] = 65_536
    (folder / MANIFEST).write_text(json.dumps(raw))
    assert "shape" in refusal(folder) or "missing" in refusal(folder)
