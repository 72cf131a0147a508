"""Parses bodies and queries as their schemas say, and says in a sentence what is wrong with a field."""

from typing import Any, TypeVar
from urllib.parse import parse_qsl

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from service.codecs.time_slices import Steps, run_steps
from service.errors import Invalid, Malformed, did_you_mean
from service.http.requests.json_limits import JsonLimits, check_json
from service.http.schemas import Labels, QueryDigits, Schema

MAX_QUERY_FIELDS = 32
MAX_REASONS = 8  # in one error
_REPEATED = {"labels": "; join several by commas, as in labels=3,1"}
_REASONS = {  # in place of pydantic's words for these mistakes
    "string_pattern_mismatch": "must be a bundle's name, or name@version",  # of `BundleName`, the only pattern
    "too_short": "must hold at least one",
}
_LABELS: TypeAdapter[Labels] = TypeAdapter(Labels)
_LABELS_LIMITS = JsonLimits(values=2**16, keys=0, containers=1, depth=1)

LABEL_FIELDS = frozenset({"labels", "label", "label_to"})

SchemaT = TypeVar("SchemaT", bound=Schema)


def parse_body(schema: type[SchemaT], body: bytes, limits: JsonLimits) -> Steps[SchemaT]:
    """Parse a JSON body without converting types; an empty body counts as an empty object.

    Raises:
        Malformed: Not JSON.
        Invalid: Over the limits, or does not match the schema.
    """
    yield from check_json(body, limits)
    try:
        return schema.model_validate_json(body or b"{}", strict=True)
    except ValidationError as error:
        raise _refusal(error, schema) from None


def parse_query(schema: type[SchemaT], query: bytes, body: type[Schema] = Schema) -> SchemaT:
    """Parse a query string. Each field may be given once; lists are joined by commas.

    Args:
        schema: Of the query.
        query: As it was sent.
        body: Of the body: a field that belongs there is refused by saying so.

    Raises:
        Malformed: Not percent-encoded UTF-8, or more than `MAX_QUERY_FIELDS` fields.
        Invalid: A field is unknown, out of range or given twice.
    """
    try:
        pairs = parse_qsl(
            query.decode("ascii"), keep_blank_values=True, errors="strict", max_num_fields=MAX_QUERY_FIELDS
        )
    except ValueError:
        raise Malformed(f"The query is not percent-encoded UTF-8 of at most {MAX_QUERY_FIELDS} fields.") from None
    known, fields = schema.model_fields, dict[str, Any]()
    for name, value in pairs:
        if name not in known and name in body.model_fields:
            raise Invalid(f"{name}: belongs in the JSON body, not in the query.")
        if name in fields and name in known:
            raise Invalid(f"{name}: given more than once{_REPEATED.get(name, '')}.")
        fields[name] = _query_labels(value, name) if name in LABEL_FIELDS else value
    return validate(schema, fields)


def validate(schema: type[SchemaT], fields: dict[str, Any], *, strict: bool = False) -> SchemaT:
    """Check fields against their schema. `strict` takes no text for a number.

    Raises:
        Invalid: They do not match.
    """
    try:
        return schema.model_validate(fields, strict=strict)
    except ValidationError as error:
        raise _refusal(error, schema) from None


def _query_labels(text: str, field: str) -> Labels:
    """Labels in a query: JSON if they begin as such, else joined by commas, where the field holds several.

    Raises:
        Invalid: They begin as JSON but are none.
    """
    if not text.startswith(("[", '"')):
        parts = text.split(",") if field == "labels" else [text]
        return [QueryDigits(part) if part.isascii() and part.isdecimal() else part for part in parts]
    try:
        run_steps(check_json(text.encode(), _LABELS_LIMITS))
        return _LABELS.validate_json(text, strict=True)
    except (Invalid, ValidationError):
        raise Invalid(
            f"{field}: begins as JSON but is no index, name or list of these in JSON, such as {field}=[3], "
            f'{field}="a" or {field}=["a,b"].'
        ) from None


def _refusal(error: ValidationError, schema: type[Schema]) -> Malformed | Invalid:
    """The error for a client: one sentence for each wrong field, up to `MAX_REASONS`."""
    mistakes: dict[str, ErrorDetails] = {}
    for mistake in error.errors(include_url=False, include_context=False, include_input=False):
        if mistake["type"] == "json_invalid":
            return Malformed(f"The body is not JSON: {mistake['msg'].removeprefix('Invalid JSON: ')}.")
        mistakes.setdefault(".".join(str(part)[:100] for part in mistake["loc"]) or "body", mistake)
    shown = list(mistakes.items())[:MAX_REASONS]
    return Invalid(" ".join(f"{field}: {_reason(mistake, schema)}" for field, mistake in shown), shown[0][0])


def _reason(mistake: ErrorDetails, schema: Any) -> str:
    """What is wrong with a field of this schema, or of one within it."""
    if mistake["type"] != "extra_forbidden":
        return _REASONS.get(mistake["type"], mistake["msg"].removeprefix("Value error, ")) + "."
    *outer, name = map(str, mistake["loc"])
    for field in outer:
        schema = schema.model_fields[field].annotation
    return f"unknown field{did_you_mean(name, schema.model_fields) or '.'}"
