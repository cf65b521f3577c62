"""docs/outcomes.md has every outcome and every reason that the code can give, and no others."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from worker.ledger import JobState
from worker.ledger.keys import OUTCOMES

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parent.parent
PAGE = re.sub(r"^```.*?^```$", "", (ROOT / "docs/outcomes.md").read_text(), flags=re.M | re.S)

# Where reasons are made; and what in there makes other texts.
MODULES: dict[str, set[str]] = {
    "worker/modelarts/answers.py": {"_unrepeated"},
    "worker/modelarts/auth.py": set(),
    "worker/modelarts/client.py": {"show_pool_tags"},
    "worker/modelarts/pool.py": {"parse", "__init__"},
    "worker/modelarts/precondition.py": set(),
    "worker/breaker.py": set(),
    "worker/deletion.py": set(),
    "worker/executor.py": set(),
    "worker/limiter.py": set(),
    "worker/pause.py": set(),
    "worker/reconciler.py": set(),
    "worker/retry.py": set(),
    "worker/verifier.py": set(),
    "scheduler/brakes.py": set(),
    "scheduler/dispatch.py": set(),
    "scheduler/facts.py": set(),
    "scheduler/intake/desk.py": {"_weigh"},
    "scheduler/intake/planning.py": set(),
    "scheduler/marks.py": set(),
    "scheduler/matchers.py": {"longest_window"},
    "scheduler/planner.py": set(),
    "scheduler/rota.py": {"_missing", "_found"},
    "scheduler/selection.py": set(),
    "scheduler/sweep.py": set(),
    "scheduler/durations.py": set(),
    "scheduler/cli/retry.py": {"retry", "_retry", "_same_place", "_not_too_old"},
}
SCRIPTS = sorted(ROOT.glob("worker/ledger/scripts/*.lua"))

# Calls whose texts are for others: mistakes in the policy file, types, metrics.
OTHER_CALLS = {
    "Counter",
    "Gauge",
    "Histogram",
    "gauge",
    "PydanticCustomError",
    "Discriminator",
    "Field",
    "cast",
    "_Or",
    "WithJsonSchema",
}
# `not decided` is never the last word: what it lacks is read, and then it is decided.
OTHER_TEXTS = re.compile(
    r"not decided: its |%a %H:%M|POST|security token|\\d|\(\[0-9\]|accepted: \{accepted\}|`, or"
)


def python_texts(path: str) -> Iterator[str]:
    """The text literals of a module, in f-strings those between the fields."""
    besides = MODULES[path]

    def walk(node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.Constant):
            if isinstance(node.value, str):
                yield node.value
            return
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name in besides:
            return
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
            name = node.func.id if isinstance(node.func, ast.Name) else name
            if name in OTHER_CALLS:
                return
        for each in ast.iter_child_nodes(node):
            if isinstance(each, ast.Expr) and isinstance(each.value, ast.Constant):
                continue  # a docstring
            yield from walk(each)

    yield from walk(ast.parse((ROOT / path).read_text()))


def lua_texts(path: Path) -> Iterator[str]:
    """The text literals of a script."""
    lines = (line.partition("--")[0] for line in path.read_text().splitlines())
    yield from re.findall(r"'([^']*)'", "\n".join(lines))


def bare(text: str) -> str:
    """A text without what joins it to others."""
    return " ".join(text.split()).strip(" :;,.()…=")


def spans() -> list[str]:
    """The reasons on the page: in the first column of its tables, after the outcomes'."""
    tables = PAGE.partition("## The pool goes")[2]
    rows = [line for line in tables.splitlines() if line.startswith("|")]
    return [span for row in rows for span in re.findall(r"`([^`]+)`", row.split(" | ")[0])]


TOLD = [*spans(), *re.findall(r"`([^`]+)`", PAGE)]


@pytest.mark.parametrize("path", MODULES)
def test_every_reason_of_a_module_is_on_the_page(path: str) -> None:
    texts = {bare(text) for text in python_texts(path) if not OTHER_TEXTS.search(text)}
    reasons = {text for text in texts if " " in text}
    assert {text for text in reasons if not any(text in span for span in TOLD)} == set()


def test_every_reason_of_the_ledgers_scripts_is_on_the_page() -> None:
    texts = {bare(text) for path in SCRIPTS for text in lua_texts(path)}
    reasons = {text for text in texts if " " in text}
    assert len(reasons) >= 8
    assert {text for text in reasons if not any(text in span for span in TOLD)} == set()


def test_no_reason_is_on_the_page_that_the_code_does_not_give() -> None:
    texts = [text for path in MODULES for text in python_texts(path)]
    texts += [text for path in SCRIPTS for text in lua_texts(path)]
    parts = sorted({bare(text) for text in texts if bare(text)}, key=len, reverse=True)
    made = re.compile(rf"(?:{'|'.join(map(re.escape, parts))}|[\W_])+")
    assert len(spans()) > 100
    assert [span for span in spans() if not made.fullmatch(span)] == []


def test_the_outcomes_are_those_of_the_ledger() -> None:
    table = PAGE.partition("| outcome |")[2].partition("\n\n")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == set(OUTCOMES)
    assert set(OUTCOMES) == set(JobState) - {JobState.PENDING, JobState.LEASED}
