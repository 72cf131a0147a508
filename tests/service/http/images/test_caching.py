"""Comparison of If-None-Match with an entity tag."""

import pytest

from service.http.images.caching import has_current_copy

TAG = '"0123"'


@pytest.mark.parametrize("etag", [TAG, f"W/{TAG}"])
@pytest.mark.parametrize(
    "field",
    ["*", TAG, f"W/{TAG}", f'"a", {TAG}', f' {TAG} , W/"b" ', f",, {TAG},", f'"a,b",{TAG}', '"a", ' * 9000 + TAG],
    ids=lambda field: field[:20],
)
def test_a_list_that_names_the_validator_has_it(field: str, etag: str) -> None:
    """A tag is found weak or strong, among others, with the white space and empty elements that lists may have."""
    assert has_current_copy(field, etag)


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
    """A malformed list names no tag, so the reply is sent again."""
    assert not has_current_copy(field, TAG)
