"""What is kept in memory of replies: never more than was said, and the newest use last."""

from hypothesis import given
from hypothesis import strategies as st

from service.caching import ENTRY_BYTES, ReplyCache


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
