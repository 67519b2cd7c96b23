"""Fixtures that every room's tests may use."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def asset() -> Callable[[str], Path]:
    """The path of a packaged asset, fetched on first use; skips with the reason where it cannot be had."""
    from downriver.core import assets

    def get(name: str) -> Path:
        try:
            return assets.path(name)
        except assets.AssetUnavailable as error:
            pytest.skip(str(error))

    return get


@pytest.fixture(scope="session")
def shared_data() -> Callable[[str], Path]:
    """A folder of public result tables: ``$DOWNRIVER_SHARED_DATA``, or ``shared/data`` beside the checkout."""
    root = Path(os.environ.get("DOWNRIVER_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))

    def get(name: str) -> Path:
        if not (root / name).exists():
            pytest.skip(f"public table {name} is not at {root}: set DOWNRIVER_SHARED_DATA to a folder that holds it")
        return root / name

    return get
