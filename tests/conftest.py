"""What a machine lacks is said where a test skips: LIBERO's assets, a CUDA device."""

import pytest

from vlatune.launch.check import check_libero_assets


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
