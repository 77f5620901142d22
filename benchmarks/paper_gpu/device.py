"""A CUDA device without numbers, for PyTorch's build for CPUs. It must be made before torch is imported."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

_SOURCE = Path(__file__).with_name("device.cpp")


class NoDevice(Exception):
    """Why the device cannot be made here."""


def make_device() -> None:
    """Compiles `device.cpp` once for each version of PyTorch, and loads it.

    Raises:
        NoDevice: There is no C++ compiler, or PyTorch is no build for CPUs, or is imported already.
    """
    if "torch" in sys.modules:
        raise NoDevice("the device must be made before torch is imported")
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        raise NoDevice("PyTorch is not installed")
    folder = Path(found.origin).parent
    if (folder / "lib" / "libtorch_cuda.so").exists():
        raise NoDevice(
            "PyTorch's build for CUDA has hooks of its own. Install the build for CPUs in an environment: "
            "pip install torch --index-url https://download.pytorch.org/whl/cpu"
        )
    ctypes.CDLL(str(_library(folder)))
    _let_begin()


def _library(folder: Path) -> Path:
    """The compiled library, from the cache or made now."""
    version = importlib.metadata.version("torch")
    key = hashlib.sha256(_SOURCE.read_bytes() + str(folder).encode() + version.encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vlmenv" / "paper_gpu"
    library = cache / f"device-{key}.so"
    if not library.exists():
        cache.mkdir(parents=True, exist_ok=True)
        _compile(folder, library)
    return library


def _compile(folder: Path, library: Path) -> None:
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        raise NoDevice("there is no C++ compiler: install g++, or name one in CXX")
    libraries = folder / "lib"
    with tempfile.TemporaryDirectory(dir=library.parent) as made:
        built = Path(made) / library.name
        links = [f"-L{libraries}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{libraries}"]
        command = [compiler, "-shared", "-fPIC", "-std=c++20", f"-I{folder / 'include'}", str(_SOURCE), *links]
        done = subprocess.run([*command, "-o", str(built)], capture_output=True, text=True)
        if done.returncode:
            raise NoDevice(f"the device does not compile with this version of PyTorch: {done.stderr.strip()[-2000:]}")
        built.replace(library)


def _let_begin() -> None:
    """Lets tensors and autocast be of the device, which PyTorch would set up first."""
    import torch
    import torch.cuda.amp.common as amp

    torch.cuda._lazy_init = lambda: None
    amp.amp_definitely_not_available = lambda: False
    torch.cuda.is_bf16_supported = lambda including_emulation=True: True
