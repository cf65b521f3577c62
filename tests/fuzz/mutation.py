"""Valid texts and documents, broken a little: by a slip of a hand, or a bad cable."""

from __future__ import annotations

import copy
import json
import re
from typing import TYPE_CHECKING, Any

from hypothesis import strategies as st

from tests.modelarts.pool_documents import HALVES_TOO, json_values, keys, paths

if TYPE_CHECKING:
    from collections.abc import Sequence


@st.composite
def broken_bytes(draw: st.DrawFn, whole: bytes, pieces: Sequence[bytes] = ()) -> bytes:
    """A text with up to three places cut out, doubled, or written over.

    Args:
        draw: given by hypothesis.
        whole: the text.
        pieces: what it is likely to be broken with, beside any bytes.
    """
    piece = st.binary(max_size=4)
    if pieces:
        piece = st.sampled_from(pieces) | piece
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(whole)))
        end = min(len(whole), at + draw(st.sampled_from([0, 0, 1, 2, 8, 40, 400])))
        inner = whole[at:end] * 2 if draw(st.booleans()) else draw(piece)
        whole = whole[:at] + inner + whole[end:]
    return whole


@st.composite
def broken_json(draw: st.DrawFn, whole: Any) -> Any:
    """A document with up to three parts taken away, called otherwise, or of another kind."""
    made = copy.deepcopy(whole)
    for _ in range(draw(st.integers(1, 3))):
        places = list(paths(made))
        if not places:
            break
        *above, last = draw(st.sampled_from(places))
        parent = made
        for key in above:
            parent = parent[key]
        match draw(st.sampled_from(["value", "value", "gone", "key", "again"])):
            case "gone":
                del parent[last]
            case "key" if isinstance(parent, dict):
                parent[draw(keys(HALVES_TOO))] = parent.pop(last)
            case "again" if isinstance(parent, list):
                parent.append(parent[last])
            case _:
                parent[last] = draw(json_values(HALVES_TOO))
    return made


def as_bytes(document: Any) -> bytes:
    """JSON; halves of characters are written as escapes."""
    return json.dumps(document).encode()


_UNFIT = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def is_fit_to_show(text: str) -> bool:
    """Whether nothing in a text breaks its line, turns it around, or is in no file."""
    return not _UNFIT.search(text)
