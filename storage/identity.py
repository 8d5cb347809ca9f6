"""What a configuration is, for hashes and for what is stored beside results: a field added later changes neither.

A finished arm, a bank and a network are recognised by their configuration. A field that a later version adds has the
earlier behaviour as its default; declared with `added`, it is left out of a configuration's identity for as long as it
has that default, so that what an earlier version made stays what it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from pydantic import BaseModel, Field

ADDED: Final = {"added_later": True}


def added(default: Any, **constraints: Any) -> Any:
    """A pydantic field that did not exist in version 0.1.0; `default` must do what that version did."""
    return Field(default, json_schema_extra=dict(ADDED), **constraints)


def is_added(model: type[BaseModel], name: str) -> bool:
    """Whether a field of a model is declared with `added`."""
    extra = model.model_fields[name].json_schema_extra
    return isinstance(extra, dict) and extra.get("added_later") is True


def identity(model: BaseModel, exclude: Mapping[str, Any] | set[str] | None = None) -> dict[str, Any]:
    """The configuration as JSON values, without fields added later that have their default.

    `exclude` is pydantic's: names to leave out, nested ones by a dict.
    """
    document = model.model_dump(mode="json", exclude=exclude)
    _leave_out_defaults(model, document)
    return document


def _leave_out_defaults(model: BaseModel, document: dict[str, Any]) -> None:
    for name, field in type(model).model_fields.items():
        if name not in document:
            continue
        value = getattr(model, name)
        if is_added(type(model), name) and value == field.get_default(call_default_factory=True):
            del document[name]
        elif isinstance(value, BaseModel):
            _leave_out_defaults(value, document[name])
