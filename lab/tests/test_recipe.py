"""Chapter 18's script for ImageNet on several processes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

CHAPTER = Path(__file__).parents[2] / "notebooks" / "18_imagenet.md"
SMALLER = {
    "5, 1024, 1e-4, 224": "2, 16, 1e-4, 32",
    'resnet50(weights="DEFAULT")': "resnet18(weights=None)",
    '"num_workers": 8': '"num_workers": 0',
}


@pytest.mark.slow
def test_the_recipe_for_imagenet_runs_as_printed(tmp_path: Path) -> None:
    """But for its sizes, on two processes and a tree of few small images; started again it goes on."""
    text = CHAPTER.read_text(encoding="utf-8")
    found = re.search(r"```bash\n(torchrun .*?)\n```\n\n```python\n# train_imagenet\.py\n(.*?)```", text, re.DOTALL)
    assert found
    command, script = found[1], found[2]
    for size, small in SMALLER.items():
        assert script.count(size) == 1
        script = script.replace(size, small)
    (tmp_path / "train_imagenet.py").write_text(script)
    draw = np.random.default_rng(0)
    for part, name, row in ((p, n, r) for p in ("train", "val") for n in range(20) for r in range(3)):
        folder = tmp_path / "imagenet" / part / f"n{name:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (40, 36, 3), dtype=np.uint8)).save(folder / f"{row}.JPEG")
    program, option, _, *rest = command.split()
    assert [program, option, *rest] == ["torchrun", "--nproc-per-node", "train_imagenet.py", "/data/imagenet"]
    words = ["--standalone", option, "2", rest[0], str(tmp_path / "imagenet")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def run() -> list[str]:
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", *words], cwd=tmp_path, capture_output=True, text=True,
            timeout=400, env=environment, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-5000:]
        return done.stdout.splitlines()

    assert [line.split()[0] for line in run()] == ["1", "2"]
    saved = torch.load(tmp_path / "last.pt", weights_only=True)
    assert saved["epochs"] == 2
    saved["epochs"], saved["schedule"]["last_epoch"] = 1, 3  # as after the first epoch, of three steps
    torch.save(saved, tmp_path / "last.pt")
    assert [line.split()[0] for line in run()] == ["2"]
