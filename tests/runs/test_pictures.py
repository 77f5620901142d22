from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from PIL import Image

DRAW = """
from pathlib import Path
from vlmenv.runs.pictures import draw_curve
draw_curve(Path("curve.png"), [{"reward/mean": 0.1, "reward/iou": 0.1}, {"reward/mean": 0.2, "reward/iou": 0.2}])
"""


def test_a_foreign_backend_hinders_no_picture(tmp_path: Path) -> None:
    """matplotlib itself fails to import with it."""
    environment = os.environ | {"MPLBACKEND": "module://nowhere", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", DRAW], cwd=tmp_path, env=environment, check=True, timeout=300)
    with Image.open(tmp_path / "curve.png") as picture:
        assert min(picture.size) > 200
