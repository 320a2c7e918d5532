"""What the lab's tests share: a cache of their own, one thread."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from topk_lab import data


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOPK_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("TOPK_DATA", raising=False)
    data.images.cache_clear()
    data.feature_set.cache_clear()
    torch.set_num_threads(1)
