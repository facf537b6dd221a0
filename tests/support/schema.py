"""Values that a JSON schema allows, of the kinds of schema that pydantic writes."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

Values = st.SearchStrategy[Any]

_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=4,
)


def values(schema: dict[str, Any], parts: dict[str, dict[str, Any]]) -> Values:
    """Of a schema.

    Args:
        parts: those that `$ref` names.
    """
    if "$ref" in schema:
        return values(parts[schema["$ref"].rpartition("/")[2]], parts)
    if "const" in schema:
        return st.just(schema["const"])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    for several in ("oneOf", "anyOf"):
        if several in schema:
            return st.one_of([values(each, parts) for each in schema[several]])
    match schema.get("type"):
        case "object":
            return _objects(schema, parts)
        case "array":
            most = min(schema.get("maxItems", 3), 3)
            items = values(schema.get("items", {}), parts)
            return st.lists(items, min_size=schema.get("minItems", 0), max_size=most)
        case "string" if "pattern" in schema:
            return st.from_regex(schema["pattern"], fullmatch=True)
        case "string":
            return st.text(min_size=schema.get("minLength", 0), max_size=12)
        case "integer":
            return st.integers(schema.get("minimum"), schema.get("maximum"))
        case "number":
            low, high = schema.get("minimum"), schema.get("maximum")
            above = schema.get("exclusiveMinimum")
            return st.floats(low if above is None else above, high, exclude_min=above is not None)
        case "boolean":
            return st.booleans()
        case "null":
            return st.none()
        case None:
            return _JSON
        case other:
            raise NotImplementedError(other)


def _objects(schema: dict[str, Any], parts: dict[str, dict[str, Any]]) -> Values:
    """With few of the fields that may be left out."""
    if "properties" not in schema:
        inner = schema.get("additionalProperties")
        of = values(inner, parts) if isinstance(inner, dict) else _JSON
        return st.dictionaries(st.text(max_size=6), of, max_size=3)
    fields = {name: values(each, parts) for name, each in schema["properties"].items()}
    required = {name: fields.pop(name) for name in schema.get("required", [])}

    @st.composite
    def objects(draw: st.DrawFn) -> dict[str, Any]:
        names = draw(st.lists(st.sampled_from(sorted(fields)), max_size=4)) if fields else []
        return {
            **{name: draw(each) for name, each in required.items()},
            **{name: draw(fields[name]) for name in names},
        }

    return objects()
