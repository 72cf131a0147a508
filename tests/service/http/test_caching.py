"""Which validators a client's copy has."""

import pytest

from service.http.caching import client_has_it

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
