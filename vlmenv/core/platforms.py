"""The systems that vlmenv runs on. Importing this module refuses others."""

from __future__ import annotations

import os
import platform

if os.name != "posix":  # file locks, signals and process groups are POSIX's
    raise ImportError(
        f"vlmenv runs on Linux, and without GPU on macOS, but not on {platform.system()}: on Windows, use it in WSL"
    )
