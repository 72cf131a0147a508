"""Requests are parsed exactly, or refused with the field's name before anything is queued."""

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.spec import ImageSpec
from service.codecs.encode import MEDIA_TYPES
from service.codecs.time_slices import run_steps
from service.errors import Invalid, Malformed, NotAcceptable
from service.http.images.resolving import SamplePlan, choose_format, fingerprint, resolve_labels, resolve_sample
from service.http.images.verdicts import DiscriminatorOutput, discriminate_reply
from service.http.problems import problem
from service.http.requests.json_limits import JsonLimits
from service.http.requests.parsing import SchemaT, parse_body, parse_query
from service.http.requests.route_context import timeout_s
from service.http.schemas import (
    SEED_LIMIT,
    DiscriminateQuery,
    DiscriminateReply,
    DiscriminateRequest,
    DiscriminateResult,
    SampleRequest,
)
from service.http.v2.messages import RepositoryLoad, RepositoryQuery, RepositoryUnload
from service.settings import Settings

IMAGE = ImageSpec(channels=1, height=28, width=20)
NAMES = ("cat", "dog", "owl")


def plan(settings: Settings | None = None, accept: str | None = None, **fields: Any) -> SamplePlan:
    return resolve_sample(SampleRequest(**fields), IMAGE, NAMES, accept, settings or Settings())


def body(schema: type[SchemaT], text: bytes) -> SchemaT:
    return run_steps(parse_body(schema, text, JsonLimits(values=99)))


def test_an_empty_request_asks_for_one_new_image() -> None:
    """All fields have defaults, and each request without a seed gets a new one."""
    first, second = (resolve_sample(body(SampleRequest, b""), IMAGE, None, None, Settings()) for _ in "ab")
    assert (first.count, first.first_index, first.labels, first.truncation) == (1, 0, None, 1.0)
    assert (first.render.format, first.render.columns, first.render.scale) == ("png", 1, 1)
    assert first.seed != second.seed


def test_query_and_body_say_the_same() -> None:
    """A query and a JSON body with the same fields give the same plan."""
    query = b"count=2&seed=7&first_index=3&labels=[2,%22dog%22]&truncation=0.5&bundle=b%40v"
    query += b"&format=npy&layout=grid&columns=2&scale=3"
    same = {
        "count": 2, "seed": 7, "first_index": 3, "labels": [2, "dog"], "truncation": 0.5, "bundle": "b@v",
        "format": "npy", "layout": "grid", "columns": 2, "scale": 3,
    }  # fmt: skip
    assert parse_query(SampleRequest, query) == body(SampleRequest, json.dumps(same).encode())


def test_a_whole_number_may_be_written_with_a_point() -> None:
    """JSON has one kind of number, and JSON Schema counts 2.0 as an integer."""
    pointed = b'{"count": 2.0, "seed": 9007199254740991.0, "first_index": 0e0, "labels": [1.0, "cat"], "scale": 20e-1}'
    plain = b'{"count": 2, "seed": 9007199254740991, "first_index": 0, "labels": [1, "cat"], "scale": 2}'
    assert body(SampleRequest, pointed) == body(SampleRequest, plain)
    assert body(SampleRequest, b'{"labels": 2.0}').labels == 2
    for wrong in b'{"seed": 9007199254740992.0}', b'{"seed": 1e300}', b'{"labels": -1.0}', b'{"labels": [0.5]}':
        with pytest.raises(Invalid):
            body(SampleRequest, wrong)


@pytest.mark.parametrize(
    ("query", "error", "says"),
    [
        (b"color=red", Invalid, r"^color: unknown field\.$"),
        (b"cuont=2", Invalid, r"^cuont: unknown field; did you mean count\?$"),
        (b"firstIndex=2", Invalid, r"did you mean first_index\?"),
        (b"SEED=2", Invalid, r"did you mean seed\?"),
        (b"label=2", Invalid, r"did you mean labels\?"),
        (b"labels%5B%5D=2&labels%5B%5D=3", Invalid, r"did you mean labels\?"),
        (b"seed" * 9000 + b"=2", Invalid, r"seed: unknown field\.$"),
        (b"count=1&count=2", Invalid, r"^count: given more than once\.$"),
        (b"labels=3&labels=1", Invalid, r"^labels: given more than once; join several by commas, as in labels=3,1\.$"),
        (b"count=many", Invalid, "count: "),
        (b"count=0", Invalid, "count: "),
        (b"seed=-1", Invalid, "seed: "),
        (b"seed=1_0", Invalid, "seed: "),
        (b"seed=%2B1", Invalid, "seed: "),
        (b"count=%201", Invalid, "count: "),
        (b"seed=9007199254740992", Invalid, "seed: "),
        (b"seed=" + b"9" * 9000, Invalid, "seed: "),
        (b"truncation=0", Invalid, "truncation: "),
        *(
            (b"truncation=" + number, Invalid, "truncation: ")
            for number in (
                b"nan",
                b"inf",
                b"1_0e-1",
                b"%20.5",
                b".5",
                b"1.",
                b"%2B0.5",
                b"0x1",
                b"1e400",
                b"1e-400",
                b"%D9%A1",
            )
        ),
        (b"format=gif", Invalid, "format: "),
        (b"scale=17", Invalid, "scale: "),
        (b"bundle=", Invalid, "^bundle: must be a bundle's name, or name@version\\.$"),
        (b"bundle=mnist@", Invalid, "^bundle: must be a bundle's name, or name@version\\.$"),
        (b"count=x&seed=y", Invalid, "seed: "),
        (b"bundle=%ff", Malformed, "query"),
        (b"a=1" + b"&a=1" * 99, Malformed, "query"),
    ],
)
def test_a_bad_query_is_refused_by_name(query: bytes, error: type[Exception], says: str) -> None:
    """The error names the wrong field and the reason."""
    with pytest.raises(error, match=says):
        parse_query(SampleRequest, query)


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        (b"{", Malformed, "not JSON"),
        (b"\xff\xfe", Malformed, "not JSON"),
        (b'{"seed": ' + b"7" * 65 + b"}", Invalid, "longer than any"),
        (b"[" * 9, Invalid, "nested more than 8 deep"),
        (b'{"labels": [' + b"{}," * 98, Invalid, "arrays and objects"),
        (b'{"labels": [' + b"1," * 999_999 + b"1]}", Invalid, "more than 99 values"),
        (b'{"labels": [' + b"1," * 9 + b'"1",' * 9 + b"[]]}", Invalid, "labels: must be an index"),
        (b"{" + b",".join(b'"a%d":1' % n for n in range(99)) + b"}", Invalid, "more than 64 fields"),
        (b"[]", Invalid, "body: "),
        (b'{"count": "3"}', Invalid, "count: "),
        (b'{"count": true}', Invalid, "count: "),
        (b'{"truncation": NaN}', Invalid, "truncation: "),
        (b'{"labels": {"a": 1}}', Invalid, "labels: must be an index, a name, or a list"),
        (b'{"labels": [1.5]}', Invalid, "labels: must be an index, a name, or a list"),
        (b'{"labels": []}', Invalid, "labels: must be an index, a name, or a list of one or more"),
        (b'{"labels": [""]}', Invalid, "labels: must be an index, a name, or a list"),
        (b'{"labels": -1}', Invalid, "labels: must be an index, a name, or a list"),
        (b'{"nested": {"deep": 1}}', Invalid, r"nested: unknown field\.$"),
        (b'{"sede": 1, "Truncation": 1}', Invalid, r"^sede: unknown field; did you mean seed\? Truncation: "),
    ],
)
def test_a_bad_body_is_refused_by_name(text: bytes, error: type[Exception], says: str) -> None:
    """Types in JSON are not converted: a string is not accepted as a number."""
    with pytest.raises(error, match=says):
        body(SampleRequest, text)


@pytest.mark.parametrize("wrong", [b"1", b"null", b"[]", b"{}", b'{"a":[]}'], ids=repr)
def test_a_list_ends_at_its_first_mistake(wrong: bytes) -> None:
    """A list of many wrong values costs, and reports, no more than one."""
    for schema, field in ((DiscriminateRequest, b"images"), (SampleRequest, b"labels"), (DiscriminateQuery, b"labels")):
        wrong_one = b"1.5" if field == b"labels" and wrong == b"1" else wrong
        refusals = []
        for count in (2, 5000):
            many = b'{"%b":[%b]}' % (field, b",".join([wrong_one] * count))
            steps = parse_body(schema, many, JsonLimits(values=9999, containers=99_999, keys=9999))
            with pytest.raises(Invalid) as refused:
                run_steps(steps)
            refusals.append(str(refused.value))
        assert refusals[0] == refusals[1]


def test_null_counts_as_left_out() -> None:
    """Every optional field may be null, at every depth; an unknown field is refused even if it is null."""
    for schema in (SampleRequest, DiscriminateQuery, RepositoryQuery, RepositoryLoad, RepositoryUnload):
        nulls = json.dumps(dict.fromkeys(schema.model_fields)).encode()
        assert body(schema, nulls) == body(schema, b"{}")
    nested = b'{"parameters": {"unload_dependents": null}}'
    assert body(RepositoryUnload, nested) == body(RepositoryUnload, b"{}")
    with pytest.raises(Invalid, match=r"^images: must hold at least one\.$"):
        body(DiscriminateRequest, b'{"images": []}')
    for nothing in (b'{"images": null}', b"null"):
        with pytest.raises(Invalid, match="images: "):
            body(DiscriminateRequest, nothing)
    assert body(SampleRequest, b" null ") == body(SampleRequest, b"")
    other = b'{"parameters": {"unload_dependants": true}}'  # clients of the protocol may send more than we know
    assert body(RepositoryUnload, other) == body(RepositoryUnload, b"{}")
    with pytest.raises(Invalid, match="colour: unknown field"):
        body(SampleRequest, b'{"colour": null}')


@given(st.binary(max_size=200))
def test_any_query_and_any_body_is_parsed_or_refused(noise: bytes) -> None:
    """Any bytes give a request, Malformed or Invalid."""
    for parse in (parse_query, body):
        for schema in (SampleRequest, DiscriminateQuery):
            with suppress(Malformed, Invalid):
                parse(schema, noise)


@pytest.mark.parametrize(
    ("accept", "chosen"),
    [
        (None, "png"),
        ("*/*", "png"),
        ("image/*", "png"),
        ("application/json", "json"),
        ("image/webp, image/png;q=0.9", "webp"),
        ("image/png;q=0.5, application/x-npy;q=0.6", "npy"),
        ("application/*", "json"),
        ("*/*;q=0.1, application/zip", "zip"),
        ("image/*, image/png;q=0", "webp"),
        ("text/html,application/xhtml+xml,image/avif,image/webp,*/*;q=0.8", "webp"),
        ("image/avif,image/webp,image/apng,image/*,*/*;q=0.8", "png"),
        ("IMAGE/JPEG", "jpeg"),
        ("image/jpg;q=0.9, image/png;q=0.8", "jpeg"),
        ("nonsense, image/jpeg ; q=0.3", "jpeg"),
    ],
)
def test_accept_chooses_as_rfc_9110_says(accept: str | None, chosen: str) -> None:
    """The most specific range gives a type its quality; the highest quality wins, then our own order."""
    assert choose_format(None, accept) == chosen


@pytest.mark.parametrize("accept", ["text/html", "image/png;q=0", "*/*;q=0", "video/*, text/*", ";;,"])
def test_what_cannot_be_made_is_not_acceptable(accept: str) -> None:
    """If Accept allows none of the formats, the error lists them; a format by name still wins."""
    with pytest.raises(NotAcceptable, match="image/png"):
        choose_format(None, accept)
    assert choose_format("npy", accept) == "npy"


@given(st.text(max_size=80))
def test_any_accept_header_chooses_or_refuses(accept: str) -> None:
    """Any header gives a format or NotAcceptable."""
    with suppress(NotAcceptable):
        assert choose_format(None, accept) in MEDIA_TYPES


@pytest.mark.parametrize(
    ("labels", "count", "indices"),
    [
        (None, 3, None),
        (2, 3, [2, 2, 2]),
        ("dog", 2, [1, 1]),
        (["owl"], 3, [2, 2, 2]),
        ([0, "owl", 1], 3, [0, 2, 1]),
    ],
)
def test_labels_come_by_index_or_name_for_one_or_all(labels: Any, count: int, indices: list[int] | None) -> None:
    """One label stands for every image, several stand for one each."""
    assert resolve_labels(labels, NAMES, count) == indices


@pytest.mark.parametrize(
    ("labels", "names", "says"),
    [
        (3, NAMES, "'3' is not one of 0 .cat., 1 .dog., 2 .owl."),
        (-1, NAMES, "'-1' is not one of"),
        ("cow", NAMES, "'cow' is not one of"),
        ("cow", ("x" * 9000,) * 9000, "'cow' is not one of (. .x{100}., ){10}(.. .x{100}., ){10}…\\.$"),
        ([0, 1, 2], NAMES, "3 labels for 2 images"),
        ([], NAMES, "0 labels for 2 images"),
        (0, None, "no labels"),
    ],
)
def test_labels_that_do_not_fit_are_refused(labels: Any, names: tuple[str, ...] | None, says: str) -> None:
    """Unknown classes, a wrong number of labels, and labels for a bundle without are refused."""
    with pytest.raises(Invalid, match=says):
        resolve_labels(labels, names, 2)


def test_the_number_of_labels_is_the_default_count() -> None:
    """Three labels without a count give three images."""
    assert plan(labels=["cat", "dog", 2]).count == 3
    assert plan(labels="cat").count == 1
    assert plan(labels="cat", count=5).labels == [0] * 5


@pytest.mark.parametrize(("count", "columns"), [(1, 1), (2, 2), (4, 2), (5, 3), (9, 3), (10, 4), (64, 8), (4096, 64)])
def test_a_grid_is_about_square(count: int, columns: int) -> None:
    """By default a grid has as many columns as rows, or one row fewer."""
    assert plan(count=count).render.columns == columns


def test_columns_and_strips() -> None:
    """Columns are capped at the count; a strip is one row and does not allow columns."""
    assert plan(count=5, columns=3).render.columns == 3
    assert plan(count=2, columns=8).render.columns == 2
    assert plan(count=5, layout="strip").render.columns == 5
    with pytest.raises(Invalid, match="columns: "):
        plan(count=5, layout="strip", columns=2)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"count": 4097}, "count: 4097 images; one request may ask for 1 to 4096. .* first_index=4096"),
        ({"count": 10_000, "first_index": 4096}, "with the same seed and first_index=8192"),
        ({"count": 10_000, "first_index": SEED_LIMIT - 10_000}, f"first_index={SEED_LIMIT - 10_000 + 4096}"),
        ({"count": 10_000, "first_index": SEED_LIMIT - 9999}, "may ask for 1 to 4096\\.$"),  # there are no others
        ({"labels": ["cat"] * 5000}, "count: 5000 images"),
        ({"first_index": SEED_LIMIT - 1, "count": 2}, "first_index: "),
        ({"count": 4096, "scale": 16}, "pixels; the most is 64000000"),
        ({"count": 4096, "scale": 16, "format": "json"}, "pixels; the most is 64000000"),
        ({"count": 820, "layout": "strip", "format": "webp"}, "webp holds up to 16383 pixels a side"),
        ({"count": 3276, "layout": "strip", "format": "jpeg"}, "jpeg holds up to 65500 pixels a side"),
    ],
)
def test_what_is_too_much_is_refused_before_it_is_queued(fields: dict[str, Any], says: str) -> None:
    """Count, index, pixels and a format's longest side are checked when the request is resolved."""
    with pytest.raises(Invalid, match=says):
        plan(**fields)


def test_limits_are_reached_exactly() -> None:
    """A request exactly at the limits is allowed."""
    assert plan(count=4096).count == 4096
    assert plan(first_index=SEED_LIMIT - 2, count=2, seed=SEED_LIMIT - 1).seed == SEED_LIMIT - 1
    exact = Settings(max_output_pixels=2 * 28 * 20 * 9)
    assert plan(exact, count=2, scale=3).count == 2
    assert plan(count=819, layout="strip", format="webp").count == 819


def test_plans_have_equal_fingerprints_only_if_they_are_equal() -> None:
    """Every field that can change a byte changes the fingerprint."""
    same: dict[str, Any] = {"count": 4, "seed": 1}
    variants: list[dict[str, Any]] = [
        {}, {"count": 3}, {"seed": 2}, {"first_index": 1}, {"labels": 0}, {"truncation": 0.5}, {"format": "npy"},
        {"columns": 1}, {"scale": 2},
    ]  # fmt: skip
    prints = [fingerprint(plan(**same | variant)) for variant in variants]
    assert len(set(prints)) == len(variants)
    assert fingerprint(plan(**same)) == fingerprint(plan(**same, columns=2, layout="grid", format="png"))


def test_timeouts_are_bounded_by_the_operator() -> None:
    """A header shortens or lengthens the deadline, never past the operator's limit."""
    settings = Settings(deadline_s=10, max_deadline_s=20)
    assert timeout_s(None, settings) == 10
    assert timeout_s("250", settings) == 0.25
    assert timeout_s("15000", settings) == 15
    assert timeout_s("999999999", settings) == 20


@pytest.mark.parametrize("header", ["", "0", "-1", "1.5", "1e3", "soon", "9999999999", "١"])
def test_a_bad_timeout_is_refused(header: str) -> None:
    """Only whole milliseconds from 1 are accepted."""
    with pytest.raises(Invalid, match="X-Timeout-Ms"):
        timeout_s(header, Settings())


def test_results_are_written_as_their_schema_says() -> None:
    """The reply, written without models, is what the models of its schema would serialize to."""
    broken = problem(Invalid("images: not an image."), "the-id")
    probabilities, logits = [0.25, 1.0], [-1.5, 3e-9]
    first, last = {"probability_real": 0.25, "logit": -1.5}, {"probability_real": 1.0, "logit": 3e-9}

    def check(written: bytes, results: list[DiscriminateResult]) -> None:
        expected = DiscriminateReply(bundle="tiny", version="0123456789ab", results=results)
        assert DiscriminateReply.model_validate_json(written) == expected
        assert json.loads(written) == json.loads(expected.model_dump_json(exclude_none=True))

    plain = DiscriminatorOutput(probabilities, logits, None, is_calibrated=True, converted=[False, False])
    check(
        discriminate_reply("tiny", "0123456789ab", plain, {}),
        [DiscriminateResult.model_validate(first), DiscriminateResult.model_validate(last)],
    )
    named = DiscriminatorOutput(
        probabilities,
        logits,
        ["cat", "dog"],
        is_calibrated=False,
        converted=[False, True],
        hints={1: 'It is "blank".'},
    )
    check(
        discriminate_reply("tiny", "0123456789ab", named, {3: broken, 1: broken, 4: broken}),
        [
            DiscriminateResult.model_validate(first | {"label": "cat", "calibrated": False}),
            DiscriminateResult(error=broken),
            DiscriminateResult.model_validate(
                last | {"label": "dog", "calibrated": False, "converted": True, "hint": 'It is "blank".'}
            ),
            DiscriminateResult(error=broken),
            DiscriminateResult(error=broken),
        ],
    )
