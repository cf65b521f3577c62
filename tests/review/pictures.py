"""The pictures in docs/screenshots, made anew: `python -m tests.review.pictures`."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path

from redis.asyncio import Redis

from scheduler import prices
from tests.review import browser
from tests.review.scene import a_fortnight
from tests.review.site import serving
from worker import embedded_redis

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "screenshots"
PRICES = prices.load(ROOT / "examples" / "prices.yaml")


async def make(redis_url: str, driver: str) -> None:
    """Make them all."""
    async with (
        Redis.from_url(redis_url, decode_responses=True) as redis,
        serving(redis, prices=PRICES) as site,
    ):
        run_id = await a_fortnight(site)
        pages = {"overview": "/", "run": f"/runs/{run_id}", "job": f"/runs/{run_id}/jobs/43"}
        async with browser.tab(driver) as tab:
            for scheme in ("light", "dark"):
                await tab.prefer(scheme)
                for name, path in pages.items():
                    await tab.size(1100, 560 if name == "job" else 760)
                    await tab.send("Emulation.setScrollbarsHidden", hidden=True)
                    await tab.open(site.url + path)
                    (FOLDER / f"{name}-{scheme}.png").write_bytes(await tab.picture())


def main() -> None:
    """Make the pictures."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        embedded_redis.join(Path(folder) / "state") as server,
    ):
        profile = Path(folder) / "profile"
        profile.mkdir()
        with browser.running(profile) as driver:
            asyncio.run(make(server.url, driver))


if __name__ == "__main__":
    main()
