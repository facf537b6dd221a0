"""Settings that say how a model is loaded, among others: pydantic models from plain values."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, TypeVar

from pydantic import BaseModel, Field, ValidationError

from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.loading.options import Loading

Settings = TypeVar("Settings", bound=BaseModel)


def loading_field(name: str) -> Any:
    """A field of `Loading`, with its default and its help."""
    (field,) = (field for field in fields(Loading) if field.name == name)
    return Field(field.default, description=field.metadata["help"])


def loading_of(settings: BaseModel) -> Loading:
    """How settings that have all these fields load a model.

    Raises:
        SafeguardError: as `Loading` does.
    """
    return Loading(**{field.name: getattr(settings, field.name) for field in fields(Loading)})


def validated(kind: type[Settings], values: dict[str, Any], where: str) -> Settings:
    """Settings from plain values, which no message repeats: keys may be among them.

    Args:
        where: they come from, for messages.

    Raises:
        SafeguardError: what is wrong in it, by the field's name.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        reason = first["msg"].removeprefix("Value error, ")
        raise SafeguardError(f"{where}: {place + ': ' if place else ''}{reason}") from None
