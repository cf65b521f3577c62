"""What nodes cost: by flavor or by a pattern over flavors, the first that fits."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler import prices
from scheduler.prices import Prices
from worker.yaml_source import YamlError

NEGATIVE = "input should be greater than or equal to 0"
NO_NUMBER = "input should be a valid number, unable to parse string as a number"
EXAMPLE = Path(__file__).parents[2] / "examples" / "prices.yaml"
PRICES = Prices(
    currency="EUR", per_node_hour={"gpu.big": 10, "gpu.*": 2.5, "cpu.?": 0.25, "*.free": 0}
)


def said(text: str, directory: Path) -> list[str]:
    path = directory / "p.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(YamlError) as error:
        prices.load(path)
    return [sentence.removeprefix(f"{path}:") for sentence in error.value.sentences]


@pytest.mark.parametrize(
    ("nodes", "money", "unknown"),
    [
        ({}, 0, []),
        ({"gpu.big": 1}, 240, []),
        ({"gpu.small": 2}, 120, []),
        ({"gpu.big": 1, "gpu.small": 2, "cpu.a": 4}, 384, []),
        ({"npu": 1, "cpu.ab": 3, "cpu.a": 1}, 6, ["cpu.ab", "npu"]),
        ({"tpu.free": 9}, 0, []),
        ({"GPU.big": 1}, 0, ["GPU.big"]),
    ],
)
def test_a_day_costs_what_all_its_nodes_cost(
    nodes: dict[str, int], money: float, unknown: list[str]
) -> None:
    assert PRICES.per_day(nodes) == (money, unknown)


def test_the_first_pattern_that_fits_counts() -> None:
    reversed_order = Prices(currency="EUR", per_node_hour={"gpu.*": 2.5, "gpu.big": 10})
    assert reversed_order.per_day({"gpu.big": 1}) == (60, [])


@given(st.dictionaries(st.sampled_from(["gpu.big", "gpu.a", "cpu.a", "npu"]), st.integers(0, 9)))
def test_every_flavor_is_priced_or_told_to_be_unknown(nodes: dict[str, int]) -> None:
    money, unknown = PRICES.per_day(nodes)
    assert money == sum(PRICES.per_day({flavor: count})[0] for flavor, count in nodes.items())
    assert set(unknown) == nodes.keys() & {"npu"}


def test_the_example_is_accepted_and_its_order_is_kept() -> None:
    found = prices.load(EXAMPLE)
    assert found.currency == "EUR"
    assert next(iter(found.per_node_hour)) == "modelarts.bm.gpu.8a100"
    assert found.per_day({"modelarts.bm.gpu.8a100": 1}) == (24 * 28.5, [])


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("", ["1: the document: null is not accepted: a map is needed"]),
        ("currency: EUR", ["1: per_node_hour: it is missing"]),
        (
            "currency: euro\nper_node_hour: {a: 1}",
            ["1: currency: 'euro' is not accepted: string should match pattern '^[A-Z]{3}$'"],
        ),
        ("currency: EUR\nper_node_hour: {}", ["2: per_node_hour: it must not be empty"]),
        (
            "currency: EUR\nper_node_hour:\n  a: -1\n  b: .inf\n  c: cheap\n  d:",
            [
                f"3: per_node_hour.a: -1 is not accepted: {NEGATIVE}",
                "4: per_node_hour.b: inf is not accepted: input should be a finite number",
                f"5: per_node_hour.c: 'cheap' is not accepted: {NO_NUMBER}",
                "6: per_node_hour.d: null is not accepted: input should be a valid number",
            ],
        ),
        (
            "currency: EUR\nper_node_hour: {a: 1}\nper_hour: {a: 1}",
            ["3: per_hour: there is no such field; accepted: currency, per_node_hour"],
        ),
        (
            "currency: EUR\nper_node_hour: {a: 1, a: 2}",
            ["2: per_node_hour.a: the key is there twice"],
        ),
    ],
)
def test_a_price_file_that_is_not_as_it_must_be_is_refused_with_lines(
    text: str, sentences: list[str], tmp_path: Path
) -> None:
    assert said(text, tmp_path) == sentences
