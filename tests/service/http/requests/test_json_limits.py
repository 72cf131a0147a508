"""What a JSON body holds is counted as a parser would find it, and a body that holds too much is refused."""

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.codecs.time_slices import run_steps
from service.errors import Invalid
from service.http.requests import json_limits as jsonlimits
from service.http.requests.json_limits import JsonLimits, check_json

TRICKY = st.text(st.sampled_from('"\\[]{},:u0041/é\n'), max_size=12)
DOCUMENTS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TRICKY,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(TRICKY, inner, max_size=5),
    max_leaves=30,
)


def count(node: Any) -> JsonLimits:
    """Counts of a parsed document, in the terms of the limits. Commas are counted, so the first value is free."""
    if not isinstance(node, list | dict):
        return JsonLimits(0, 0, 0, 0)
    inner = [count(one) for one in (node.values() if isinstance(node, dict) else node)]
    return JsonLimits(
        values=max(0, len(inner) - 1) + sum(one.values for one in inner),
        keys=(len(inner) if isinstance(node, dict) else 0) + sum(one.keys for one in inner),
        containers=1 + sum(one.containers for one in inner),
        depth=1 + max((one.depth for one in inner), default=0),
    )


@given(
    document=DOCUMENTS,
    form=st.fixed_dictionaries({"indent": st.sampled_from([None, 1]), "ensure_ascii": st.booleans()}),
    piece=st.integers(1, 40),
)
def test_all_that_is_counted_is_counted_right(document: Any, form: dict[str, Any], piece: int) -> None:
    """With limits of exactly its counts it passes, with one less of any it is refused, wherever pieces are cut."""
    body = json.dumps(document, **form).encode()
    holds = count(document)
    enough = holds._replace(values=holds.values + 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jsonlimits, "PIECE_BYTES", piece)
        run_steps(check_json(body, enough))
        for field in ("values", "keys", "containers", "depth"):
            if getattr(holds, field):
                with pytest.raises(Invalid):
                    run_steps(check_json(body, enough._replace(**{field: getattr(enough, field) - 1})))


@given(st.lists(st.sampled_from([b'"', b"\\", b"[", b"]", b"{", b"}", b",", b":", b"1", b" "]), max_size=60))
def test_what_is_no_json_is_left_to_the_parser_or_refused(tokens: list[bytes]) -> None:
    """Any sequence of JSON's tokens passes or raises Invalid, and nothing else."""
    with suppress(Invalid):
        run_steps(check_json(b"".join(tokens), JsonLimits(values=20, keys=5, containers=10, depth=4)))


def test_a_million_quotes_are_too_many_values() -> None:
    """Strings without commas between them are refused before all are counted."""
    steps = check_json(b'"' * 10**6, JsonLimits(values=100))
    with pytest.raises(Invalid, match="more than 100 values"):
        next(steps)


def test_a_large_body_is_looked_at_in_steps() -> None:
    """The check can be interrupted between two pieces, and a long string is quick to count."""
    body = b'{"images":["' + b"A" * 2**20 + b'"]}'
    assert len(list(check_json(body, JsonLimits(values=1, keys=1, containers=2, depth=2)))) == 1 + 2**20 // 2**14


LONG = b"A" * 3 * 2**14


@pytest.mark.parametrize(
    "text",
    [
        "é".encode() + LONG,
        LONG + b"\\u0041",
        b"\\ud83d\\ude00" + LONG,
        LONG + "é".encode() + LONG,
        b"\\\\" * 99 + b"\\u00e9" + LONG,
    ],
    ids=["first", "escaped, last", "a pair", "between", "after escapes"],
)
@pytest.mark.parametrize(
    "form", [b'{"images":["%b"]}', b'{"%b":1}', b'{"bundle":"%b"}'], ids=["image", "name", "value"]
)
def test_a_long_string_is_plain(form: bytes, text: bytes) -> None:
    """One wide character would make Python take four bytes for each; only short strings may have one."""
    limits = JsonLimits(values=5)
    with pytest.raises(Invalid, match="not plain ASCII"):
        run_steps(check_json(form % text, limits))
    run_steps(check_json(form % LONG, limits))
    run_steps(check_json(b'{"labels":["%b"],"images":["%b"]}' % (("é" * 4000).encode(), LONG), limits))


@pytest.mark.parametrize("escape", [b"\\n", b"\\\\", b'\\"', b"\\/"])
def test_a_body_of_escapes_is_refused_and_line_ends_are_not(escape: bytes) -> None:
    """An escape costs a parser as much as a hundred plain characters."""
    with pytest.raises(Invalid, match="escapes"):
        run_steps(check_json(b'{"images":["' + escape * 2**18 + b'"]}', JsonLimits(values=5)))
    wrapped = (b"A" * 76 + b"\\r\\n") * 2**14
    run_steps(check_json(b'{"images":["' + wrapped + b'"]}', JsonLimits(values=5)))
