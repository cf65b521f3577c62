"""What nodes cost: a YAML file of prices, and the money that deletions free."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from worker.yaml_source import YamlError, read_yaml

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

HOURS_A_DAY = 24


class Prices(BaseModel):
    """Prices of a node by flavor."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    currency: str = Field(pattern=r"^[A-Z]{3}$", description="Such as EUR.")
    per_node_hour: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]] = Field(
        min_length=1, description="Flavor, or a glob over flavors -> price; the first that fits."
    )

    def per_day(self, nodes: Mapping[str, int]) -> tuple[float, list[str]]:
        """What nodes cost.

        Args:
            nodes: how many of each flavor.

        Returns:
            The money for a day, in the currency, and the flavors that have no price.
        """
        total, unknown = 0.0, []
        for flavor, count in sorted(nodes.items()):
            prices = (
                price for glob, price in self.per_node_hour.items() if fnmatchcase(flavor, glob)
            )
            price = next(prices, None)
            if price is None:
                unknown.append(flavor)
            else:
                total += HOURS_A_DAY * count * price
        return total, unknown


def load(path: Path) -> Prices:
    """Read a price file.

    Raises:
        YamlError: all that is wrong with it, each with its line.
    """
    source = read_yaml(path)
    try:
        return Prices.model_validate(source.data)
    except ValidationError as error:
        said = source.sentences(error, schema=Prices.model_json_schema())
        raise YamlError(said) from None
