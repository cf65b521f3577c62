"""A list of pools, taken apart without reading the pools: each is read when somebody looks at it.

A project's list has megabytes, of which a batch needs a few pools. Reading all of it would hold up
every other call of the process.
"""

from __future__ import annotations

import json
from typing import Any

import msgspec

from worker.modelarts.answers import Body, ErrorBody, parse_error_body
from worker.modelarts.pool import Pool, UnreadablePoolError


class _List(msgspec.Struct):
    items: list[msgspec.Raw]


class _Metadata(msgspec.Struct):
    name: str


class _Named(msgspec.Struct):
    metadata: _Metadata


_list = msgspec.json.Decoder(_List)
_named = msgspec.json.Decoder(_Named)


class ListedPool:
    """A pool of a list, not read yet.

    Attributes:
        name: the id that it gives itself; empty: none.
    """

    __slots__ = ("_document", "_text", "name")

    def __init__(self, text: memoryview | None, document: Any = None) -> None:
        self._text = text
        self._document = document
        try:
            named = msgspec.convert(document, _Named) if text is None else _named.decode(text)
        except (msgspec.DecodeError, RecursionError):
            self.name = ""
        else:
            self.name = named.metadata.name

    def document(self) -> Any:
        """The pool as the API wrote it.

        Raises:
            UnreadablePoolError: that is no JSON.
        """
        if self._text is None:
            return self._document
        try:
            return json.loads(bytes(self._text))
        except (ValueError, RecursionError) as error:
            raise UnreadablePoolError(f"it is no JSON: {error}") from None

    def read(self) -> Pool:
        """The pool.

        Raises:
            UnreadablePoolError: it cannot be read.
        """
        pool = Pool.parse(self.document())
        if pool.pool_id != self.name:
            raise UnreadablePoolError("it gives itself more than one id")
        return pool


def parse_list(raw: bytes) -> ErrorBody:
    """Take a list of pools apart; its `items` are each a `ListedPool`.

    Args:
        raw: the body of an answer.

    Returns:
        The list; what is none, as `parse_error_body` reads it.
    """
    try:
        items = _list.decode(raw).items
        document = {"items": [ListedPool(memoryview(item)) for item in items]}
    except (msgspec.DecodeError, RecursionError):
        # Also for what only the standard library reads, such as half of a surrogate pair.
        body = parse_error_body(raw)
        if body.document is not None and isinstance(body.document.get("items"), list):
            body.document["items"] = [ListedPool(None, each) for each in body.document["items"]]
        return body
    return ErrorBody(Body.OBJECT, document=document)
