"""Which validators a client's copy has, and what is kept in memory of replies: never more than was said."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.http.caching import ENTRY_BYTES, ReplyCache, client_has_it

TAG = '"0123"'


@pytest.mark.parametrize("etag", [TAG, f"W/{TAG}"])
@pytest.mark.parametrize(
    "field",
    ["*", TAG, f"W/{TAG}", f'"a", {TAG}', f' {TAG} , W/"b" ', f",, {TAG},", f'"a,b",{TAG}', '"a", ' * 9000 + TAG],
    ids=lambda field: field[:20],
)
def test_a_list_that_names_the_validator_has_it(field: str, etag: str) -> None:
    """Weak or strong, among others, with the white space and the empty elements that lists may have."""
    assert client_has_it(field, etag)


@pytest.mark.parametrize(
    "field",
    [
        "", "0123", '"0123', '0123"', "'0123'", f"w/{TAG}", f"W/ {TAG}", f"x{TAG}", f"{TAG}x", f"{TAG} {TAG}",
        f"*, {TAG}", '"a"0123"b"', f'"a" {TAG}', f"{TAG},x", '"', '"a b"', f'W/W/{TAG}',
        '"01234"', '"a", ' * 9000 + "x" + TAG,
    ],
    ids=lambda field: field[:20] or "nothing",
)  # fmt: skip
def test_what_is_no_list_of_entity_tags_names_nothing(field: str) -> None:
    """It may look much like one: the reply is sent again, which harms nobody."""
    assert not client_has_it(field, TAG)


def test_what_was_not_asked_for_longest_makes_room() -> None:
    """To ask for a reply is to use it."""
    cache = ReplyCache(2 * (ENTRY_BYTES + 10))
    cache.put("a", b"a" * 10)
    cache.put("b", b"b" * 10)
    assert cache.get("a") == b"a" * 10
    cache.put("c", b"c" * 10)
    assert (cache.get("a"), cache.get("b"), cache.get("c")) == (b"a" * 10, None, b"c" * 10)


def test_what_has_no_name_or_no_room_is_not_kept() -> None:
    """And drives out nothing."""
    cache = ReplyCache(ENTRY_BYTES + 10)
    cache.put("a", b"a")
    cache.put(None, b"b")
    cache.put("c", b"c" * 11)
    assert (cache.get("a"), cache.get(None), cache.get("c")) == (b"a", None, None)
    none = ReplyCache(0)
    none.put("a", b"")
    assert none.get("a") is None


@given(st.integers(0, 4000), st.lists(st.integers(0, 900), min_size=10, max_size=10), st.lists(st.integers(0, 9)))
def test_it_never_holds_more_than_it_may(most: int, sizes: list[int], puts: list[int]) -> None:
    """Whatever comes, and what was put last is there unless it is too large by itself."""
    cache = ReplyCache(most)
    for name in puts:
        cache.put(str(name), bytes(sizes[name]))
        assert (cache.get(str(name)) is not None) is (sizes[name] + ENTRY_BYTES <= most)
        kept = [reply for other in range(10) if (reply := cache.get(str(other))) is not None]
        assert sum(len(reply) + ENTRY_BYTES for reply in kept) <= most
