"""What a machine lacks is said where a test skips (LIBERO's assets, a CUDA device); and a cache for several rooms' tests."""

from typing import TYPE_CHECKING

import pytest

from vlatune.launch.check import check_libero_assets

if TYPE_CHECKING:
    from vlatune.data.cache import Cache


@pytest.hookimpl(trylast=True)  # after `-m` has left out what is not asked for: then torch need not be imported
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reasons = {
        "libero": without_assets() if any(item.get_closest_marker("libero") for item in items) else "",
        "gpu": without_gpu() if any(item.get_closest_marker("gpu") for item in items) else "",
    }
    for item in items:
        for marker, reason in reasons.items():
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


def without_assets() -> str:
    finding = check_libero_assets()
    return "" if finding.status == "ok" else f"LIBERO's assets: {finding.found}; {finding.mend}"


def without_gpu() -> str:
    import torch

    return "" if torch.cuda.is_available() else "needs a CUDA device"


@pytest.fixture(scope="session")
def small_cache(tmp_path_factory: pytest.TempPathFactory) -> "Cache":
    """A finished cache of two tasks, 16-pixel images, with embeddings. Shared: do not write to it."""
    from small_demonstrations import write_demos

    from vlatune.data.cache import Cache
    from vlatune.data.prepare import PrepareConfig, prepare

    folder = tmp_path_factory.mktemp("small")
    write_demos(folder / "demos" / "pick_up_the_red_cube_demo.hdf5", (7, 5, 9), seed=1)
    write_demos(folder / "demos" / "pick_up_the_blue_cube_demo.hdf5", (6, 4, 8), seed=2)
    return Cache.open(prepare(PrepareConfig(demos=folder / "demos", out=folder / "cache", image_px=16)))
