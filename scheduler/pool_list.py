"""Lists of pools as people and programs keep them: lines, CSV or JSON. Pure.

A list is read whole before anything is done with it, and every line that is not as it must be is
told with its number: half a list is no list.
"""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, NoReturn

from worker.modelarts import validate_pool_name

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping

    ProjectOf = Callable[[str], str]

LARGEST = 256 << 20
MOST_POOLS = 1_000_000
LONGEST_LINE = 4 << 10
LONGEST_ROW = 64 << 10
MOST_TOLD = 20
POOL_KEYS = ("pool_name", "pool_id", "id", "pool")
PROJECT_KEY = "project_id"
LIST_KEYS = ("jobs", "pools")
TARGETS_KEY = "targets"
ACCEPTED = (
    "accepted: pool ids (metadata.name: 36 to 63 lowercase letters, digits and hyphens), one a "
    "line, alone or as project/pool; CSV with a header; or JSON"
)
_LONGEST_SHOWN = 80
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_BLANK = re.compile(r"[ \t\r\n]*")
_BOM = b"\xef\xbb\xbf"


class Form(StrEnum):
    """How a list is written."""

    LINES = "lines"
    CSV = "csv"
    JSON = "json"


@dataclass(frozen=True, slots=True)
class PoolList:
    """What a list names.

    Attributes:
        pools: by project id, the ids of the pools, each once, in the order of the list.
        entries: how many entries there are, those that are there twice counted twice.
        faults: what is wrong, by the number of the line; of many only the first.
        more: how many other lines are wrong.
    """

    pools: Mapping[str, Collection[str]]
    entries: int
    faults: Mapping[int, str]
    more: int = 0

    def sentences(self, name: str) -> list[str]:
        """What is wrong with the list, a line each; none: nothing is.

        Args:
            name: what the list is called.
        """
        if not self.faults:
            return []
        said = [f"{name}:{line}: {what}" for line, what in self.faults.items()]
        if self.more:
            said.append(f"and {self.more} more lines")
        return [*said, ACCEPTED]


def form_of(name: str, raw: bytes) -> Form:
    """How a list is written, by its file's name, or else by how it begins.

    Args:
        name: the file's; empty: it has none.
        raw: the list.
    """
    match PurePath(name).suffix.lower():
        case ".csv":
            return Form.CSV
        case ".json" | ".jsonl" | ".ndjson":
            return Form.JSON
        case ".txt":
            return Form.LINES
    first = raw.removeprefix(_BOM).lstrip()[:LONGEST_LINE].partition(b"\n")[0].strip()
    if first[:1] in {b"[", b"{"}:
        return Form.JSON
    heading = first.strip(b'"').lower().decode(errors="replace")
    if first[:1] != b"#" and ("," in heading or heading in POOL_KEYS):
        return Form.CSV
    return Form.JSON if first[:1] == b'"' else Form.LINES


def parse(raw: bytes, form: Form, project_of: ProjectOf) -> PoolList:
    """Read a list.

    Args:
        raw: the list, in UTF-8; at most 256 MiB with a million entries.
        form: how it is written.
        project_of: the id of the project that an entry says it is in (empty: it says none); it
            raises a ValueError whose text is a phrase if that is not accepted.
    """
    found = _Found(project_of)
    raw = raw.removeprefix(_BOM)
    try:
        if len(raw) > LARGEST:
            found.refuse(1, f"it is larger than {LARGEST >> 20} MiB")
        match form:
            case Form.LINES:
                _read_lines(raw, found)
            case Form.CSV:
                _read_csv(raw, found)
            case Form.JSON:
                _read_json(raw, found)
    except _UnusableError:
        pass  # the reason is among the faults
    return found.all()


class _UnusableError(Exception):
    """Nothing that follows in the list can be made sense of."""


@dataclass(slots=True)
class _Found:
    """What has been read of a list so far."""

    project_of: ProjectOf
    within: str = ""
    """The id of the project that the list being read says all its entries are in; empty: none."""
    projects: dict[str, str] = field(default_factory=dict)
    pools: dict[str, dict[str, None]] = field(default_factory=dict)
    entries: int = 0
    faults: dict[int, str] = field(default_factory=dict)
    more: int = 0
    last_fault: int = 0

    def all(self) -> PoolList:
        return PoolList(self.pools, self.entries, self.faults, self.more)

    def fault(self, line: int, what: str) -> None:
        """Note what is wrong with a line: the first of it is enough."""
        if line == self.last_fault:
            return
        self.last_fault = line
        if len(self.faults) < MOST_TOLD:
            self.faults[line] = what
        else:
            self.more += 1

    def refuse(self, line: int, what: str) -> NoReturn:
        """Note what makes the rest of the list useless.

        Raises:
            _UnusableError: always.
        """
        self.fault(line, what)
        raise _UnusableError

    def text(self, line: int, text: str) -> None:
        """An entry such as `pool` or `project/pool`."""
        project, slash, pool = text.rpartition("/")
        if slash and not project:
            self.fault(line, f"{_shown(text)} names no project before its slash")
        else:
            self.add(line, project.strip(), pool.strip())

    def value(self, line: int, value: Any) -> None:
        """An entry of a JSON list."""
        if isinstance(value, str):
            self.text(line, value)
            return
        if not isinstance(value, dict):
            self.fault(line, f"a text, or an object with {POOL_KEYS[0]}, is needed")
            return
        pool = next((value[key] for key in POOL_KEYS if value.get(key) is not None), None)
        project = value.get(PROJECT_KEY)
        if pool is None:
            self.fault(line, f"the object has no {POOL_KEYS[0]}")
        elif not isinstance(pool, str):
            self.fault(line, "the pool's id is no text")
        elif not isinstance(project, str | None):
            self.fault(line, f"{PROJECT_KEY} is no text")
        else:
            self.add(line, project or "", pool)

    def enter(self, line: int, project: Any) -> None:
        """What follows is in a project, unless that is None or empty.

        Raises:
            _UnusableError: it is not accepted, or not the one that this is in already.
        """
        if not isinstance(project, str | None):
            self.refuse(line, f"{PROJECT_KEY} is no text")
        if project:
            try:
                self.within = self._resolved(project)
            except ValueError as error:
                self.refuse(line, str(error))

    def _resolved(self, project: str) -> str:
        if not project and self.within:
            return self.within
        if project not in self.projects:
            self.projects[project] = self.project_of(project)
        if self.within and self.projects[project] != self.within:
            raise ValueError(f"project {_shown(project)} is not {self.within}, which it stands in")
        return self.projects[project]

    def add(self, line: int, project: str, pool: str) -> None:
        """One pool, in a project unless that is empty."""
        self.entries += 1
        if self.entries > MOST_POOLS:
            self.refuse(line, f"more than {MOST_POOLS} pools are named")
        try:
            validate_pool_name(pool)
        except ValueError:
            self.fault(line, f"{_shown(pool)} is no pool id" if pool else "the pool's id is empty")
            return
        try:
            resolved = self._resolved(project)
        except ValueError as error:
            self.fault(line, str(error))
            return
        self.pools.setdefault(resolved, {})[pool] = None


def _shown(text: str) -> str:
    return repr(text if len(text) <= _LONGEST_SHOWN else text[:_LONGEST_SHOWN] + "…")


def _texts(raw: bytes, found: _Found, longest: int) -> Iterator[str]:
    """Every line as text. One that cannot be used is noted, and comes all the same, cut short."""
    for number, line in enumerate(io.BytesIO(raw), 1):
        text = line.decode(errors="replace")
        if len(text) > longest:
            found.fault(number, f"it is longer than {longest} characters")
            text = text[:longest]
        elif "\ufffd" in text and not _is_utf8(line):
            found.fault(number, "it is not UTF-8")
        elif _CONTROL.search(text):
            found.fault(number, "it holds control characters")
        yield text


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True


def _read_lines(raw: bytes, found: _Found) -> None:
    for number, line in enumerate(_texts(raw, found, LONGEST_LINE), 1):
        if entry := line.partition("#")[0].strip():
            found.text(number, entry)


def _read_csv(raw: bytes, found: _Found) -> None:
    rows = _rows(raw, found)
    line, header = next(rows, (1, []))
    names = [name.strip().lower() for name in header]
    key = next((key for key in POOL_KEYS if key in names), None)
    if header and key is None:
        found.refuse(line, f"the header names no column {' or '.join(POOL_KEYS)}")
    for name in (key, PROJECT_KEY):
        if names.count(str(name)) > 1:
            found.refuse(line, f"the header names the column {name} twice")
    for line, row in rows:
        if len(row) > len(names):
            found.fault(line, f"it has {len(row)} cells, and the header {len(names)}")
            continue
        cells = dict(zip(names, row, strict=False))
        found.add(line, cells.get(PROJECT_KEY, "").strip(), cells.get(str(key), "").strip())


def _rows(raw: bytes, found: _Found) -> Iterator[tuple[int, list[str]]]:
    """Every row that is not blank, with the line that it begins in."""
    reader = csv.reader(_texts(raw, found, LONGEST_ROW), strict=True)
    while True:
        line = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            found.fault(line, f"it is not CSV: {error}")
            continue
        if any(cell.strip() for cell in row):
            yield line, row


def _read_json(raw: bytes, found: _Found) -> None:
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        for _ in _texts(raw, found, LARGEST):
            pass  # notes the lines that are not
        return
    if _is_json_lines(text):
        for number, line in enumerate(io.StringIO(text, newline="\n"), 1):
            if line.strip():
                _json_line(line, number, found)
    elif text.strip():
        _Document(text, found).read()


def _is_json_lines(text: str) -> bool:
    """Whether each line is a JSON value, by the first one."""
    first = text.lstrip().partition("\n")[0].rstrip()
    if first[:1] not in {"{", '"'} or first[-1] not in {"}", '"'}:
        return False
    try:
        value = json.loads(first)
    except (ValueError, RecursionError):
        return True
    return not (isinstance(value, dict) and any(key in value for key in (*LIST_KEYS, TARGETS_KEY)))


def _json_line(line: str, number: int, found: _Found) -> None:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        found.fault(number, f"it is not JSON: {error.msg}")
    except (ValueError, RecursionError):
        found.fault(number, "it is not JSON that can be read")
    else:
        found.value(number, value)


class _Document:
    """A JSON text, walked entry by entry: of a list of a million only one is held as objects.

    Args:
        text: the document: a list, or an object that holds one under `jobs` or `pools` and may say
            which project all of it is in, or an object with `targets`, a list of such objects.
        found: takes the entries.
    """

    def __init__(self, text: str, found: _Found) -> None:
        self._text = text
        self._found = found
        self._at = 0
        self._counted = 0
        self._line = 1
        self._decoder = json.JSONDecoder()

    def read(self) -> None:
        """Read all of it.

        Raises:
            _UnusableError: it is broken; what is wrong is noted.
        """
        match self._next():
            case "[":
                self._list(self._entry)
            case "{":
                line = self._here()
                if (alone := self._object((*LIST_KEYS, TARGETS_KEY))) is not None:
                    self._found.value(line, alone)
            case _:
                self._found.value(self._here(), self._value())
        if self._next():
            self._broken("more follows after its end")

    def _list(self, read: Callable[[], Any]) -> None:
        """Pass a list, with what reads each of its items."""
        self._at += 1
        if self._ends("]"):
            return
        while True:
            self._next()
            read()
            if self._ends("]"):
                return
            self._pass(",")

    def _entry(self) -> None:
        line = self._here()
        self._found.value(line, self._value())

    def _target(self) -> None:
        line = self._here()
        if self._next() != "{":
            self._value()
            self._found.fault(line, f"a target is needed: an object with {LIST_KEYS[-1]}")
        elif self._object(LIST_KEYS) is not None:
            self._found.fault(line, f"the target has no list {LIST_KEYS[-1]}")

    def _object(self, keys: Collection[str]) -> dict[str, Any] | None:
        """Read the lists that an object holds under certain keys; one that has none is returned."""
        line = self._here()
        own: dict[str, Any] = {}
        lists: list[tuple[int, int, Callable[[], None]]] = []
        self._at += 1
        while not self._ends("}"):
            if own or lists:
                self._pass(",")
            key = self._value()
            if not isinstance(key, str):
                self._broken("a key is no text")
            self._pass(":")
            if key in keys and self._next() == "[":
                read = self._target if key == TARGETS_KEY else self._entry
                lists.append((self._here(), self._at, read))
                self._list(self._value)
            else:
                own[key] = self._value()
        if not lists:
            return own
        # The lists are read last, since the project that they are in may stand behind them.
        end = self._here(), self._at
        outer = self._found.within
        self._found.enter(line, own.get(PROJECT_KEY))
        for *start, read in lists:
            self._go(*start)
            self._list(read)
        self._found.within = outer
        self._go(*end)
        return None

    def _go(self, line: int, at: int) -> None:
        """Read on at another place, which is in a line."""
        self._line, self._at, self._counted = line, at, at

    def _next(self) -> str:
        """The character that comes next, blanks passed over; empty: none."""
        match = _BLANK.match(self._text, self._at)
        self._at = match.end() if match else self._at
        return self._text[self._at : self._at + 1]

    def _ends(self, closing: str) -> bool:
        """Whether what is being read ends here."""
        if self._next() != closing:
            return False
        self._at += 1
        return True

    def _pass(self, mark: str) -> None:
        if self._next() != mark:
            self._broken(f"{mark!r} is missing")
        self._at += 1

    def _value(self) -> Any:
        self._next()
        try:
            value, self._at = self._decoder.raw_decode(self._text, self._at)
        except json.JSONDecodeError as error:
            self._at = error.pos
            self._broken(error.msg)
        except (ValueError, RecursionError):
            self._broken("it has a number that is too long, or is nested too deeply")
        return value

    def _here(self) -> int:
        self._line += self._text.count("\n", self._counted, self._at)
        self._counted = self._at
        return self._line

    def _broken(self, why: str) -> NoReturn:
        self._found.refuse(self._here(), f"it is not JSON: {why}")
