"""The records in messages, and the checks of what they hold."""

import json
from collections.abc import Collection
from typing import Any, TypeVar

from flwr.app import Message
from pydantic import BaseModel, ValidationError

from fedgradnorm.errors import MessageError, printable

Checked = TypeVar("Checked", bound=BaseModel)
ARRAYS, BUFFERS, CONFIG, METRICS, CONTROL = "arrays", "buffers", "config", "metrics", "fedgradnorm"
REFUSAL = "refusal"
HEADER = 4096
"""Bytes that an array in a message may have beyond its numbers: the header of its format."""


def one_line(text: object) -> str:
    """The beginning of a foreign text as one line for logs and records."""
    return printable(" ".join(str(text)[:10_000].split()))[:300]


def checked(model: type[Checked], message: Message, record: str) -> Checked:
    """A message's record of this name as a model. Raises MessageError where it does not fit."""
    fields = message.content.config_records.get(record)
    if fields is None:
        found = f"found {sorted(message.content)}: both sides have to be FedGradNorm's"
        raise MessageError(f"expected a record '{record}', {found}")
    try:
        return model.model_validate(dict(fields))
    except ValidationError as error:
        first = error.errors()[0]
        found, where = first["input"], ".".join(map(str, first["loc"]))
        if isinstance(found, str | bytes | list):  # it may be of any length
            found = found[:100]
        text = f"{record}.{where}: {first['msg']}, found {found!r:.100}"
        raise MessageError(text) from error


def check_records(reply: Message, known: Collection[str]) -> None:
    """Raise MessageError for a record that nobody reads: it may be of any size."""
    check_known("records", reply.content.keys(), known)


def check_known(what: str, names: Collection[str], known: Collection[str]) -> None:
    """Raise MessageError for a name that is not among the known ones."""
    unknown = sorted(set(names) - set(known))
    if unknown:
        expected = f"expected none but {', '.join(known)}"
        raise MessageError(f"{what}: {expected}, found {unknown[0]!r:.100}")


def check_size(what: str, found: int, expected: int) -> None:
    """Raise MessageError for more bytes than the numbers need, plus a header."""
    if found > expected + HEADER:
        raise MessageError(f"{what}: expected at most {expected + HEADER:,} bytes, found {found:,}")


def read_json(text: str, name: str) -> dict[str, Any]:
    """A JSON object. Raises MessageError for any other text."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise MessageError(f"{name}: expected JSON; {error}") from error
    if not isinstance(value, dict):
        raise MessageError(f"{name}: expected an object, found {text[:100]!r}")
    return value
