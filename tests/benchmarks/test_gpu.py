"""The sections of the benchmark for a card run on a CPU at a tiny size, and what fails in one stays there."""

from __future__ import annotations

import importlib
import re
import shutil
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ROOT
from torch.utils.flop_counter import FlopCounterMode

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


def part(name: str) -> ModuleType:
    return importlib.import_module(f"gpu_parts.{name}")


@pytest.fixture
def script() -> ModuleType:
    return importlib.import_module("gpu")


@pytest.fixture
def case() -> Any:
    return importlib.import_module("common").Case("tiny", 100, 2, 1, 6, 0.9)


@pytest.fixture
def source(qwen2_5_vl_folder: Path, tmp_path: Path) -> Path:
    """A folder without weights, as the script finds it on the hub."""
    without = shutil.ignore_patterns("*.safetensors")
    return Path(shutil.copytree(qwen2_5_vl_folder, tmp_path / "source", ignore=without))


@pytest.fixture
def context(case: Any, source: Path, tmp_path: Path) -> Any:
    """What a section is given, for passes in float32."""
    options = {"device": "cpu", "dtype": "float32", "rounds": 1, "cases": (case,), "small": ("tiny",), "peak": 1e11}
    args = part("context").Args(model=str(source), **options)
    return part("context").Context(args, source, tmp_path, time.time() + 600)


def cells(lines: Any, first: str) -> list[str]:
    """The row of a table that begins so."""
    (found,) = [line for line in lines if line.startswith(f"| {first} |")]
    return [one.strip() for one in found.split("|")[1:-1]]


@pytest.mark.slow
def test_what_fails_stays_in_its_section(script: ModuleType, context: Any, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    context.args.model, context.args.output = str(tmp_path / "empty"), tmp_path / "page.md"
    context.args.sections = ("kernels", "equality")  # the first of which needs the model, and the second does not
    assert script.main(context.args) == 1
    page = context.args.output.read_text().splitlines()
    assert "**failed**: " in cells(page, "Kernels against the ways that they replace")[1]
    assert float(cells(page, "CPUKernel | 64")[2]) < 1e-5  # what it had found
    assert cells(page, "Shared prompts against plain rows")[1].startswith("done, ")
    assert cells(page, "tiny | float32")[-1] == "yes"
    assert cells(page, "tiny | bfloat16 autocast")[-1] == "yes"
    assert any("no GPU; " in line and f"torch {torch.__version__}" in line for line in page)


@pytest.mark.slow
def test_no_section_outlasts_the_limit(script: ModuleType, context: Any, tmp_path: Path) -> None:
    context.args.minutes, context.args.sections = 1 / 60, ("kernels", "equality")
    context.args.output = tmp_path / "page.md"
    started = time.time()
    assert script.main(context.args) == 0
    assert time.time() - started < 10
    page = context.args.output.read_text().splitlines()
    assert cells(page, "Kernels against the ways that they replace")[1].startswith("stopped at the limit")
    assert cells(page, "Shared prompts against plain rows")[1].startswith("left out: ")


def test_states_of_sections(script: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "part.md"
    for text, status, told in (
        ("| a | b |\n", 0, "done"),
        ("| a | **no**: it differs |\n| **failed**: it broke | |\n", 0, "done, **faults told: 2**"),
        ("skipped: vLLM is not installed\n", 0, "skipped: vLLM is not installed"),
        ("| a | b |\n\n**failed**: ValueError: no\n", 0, "**failed**: ValueError: no"),
        ("| a | b |\n", -11, "**failed**: its process ended with status -11"),
    ):
        file.write_text(text)
        assert script.state(SimpleNamespace(is_alive=lambda: False, exitcode=status), file) == told


def test_options_that_cannot_be(script: ModuleType, context: Any, tmp_path: Path) -> None:
    context.args.sections = ("kernel",)
    with pytest.raises(SystemExit, match="no section kernel; there are kernels, equality"):
        script.main(context.args)
    context.args.sections, context.args.models = (), tmp_path
    with pytest.raises(SystemExit, match=r"--model is one of .*Qwen2\.5-VL-3B"):
        script.main(context.args)
    context.args.model = "Qwen/Qwen2.5-VL-3B-Instruct"
    with pytest.raises(SystemExit, match=r"qwen2_5_vl has no configuration of Qwen2\.5-VL-3B"):
        script.main(context.args)
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="no CUDA GPU"):
            script.main(part("context").Args())


def test_every_kernel_of_cuda_is_tried() -> None:
    kernels = part("kernels")
    names = {"FlashKernel", "EfficientKernel", "EfficientKernel, masked", "FlashKernel, packed"}
    assert set(kernels.trials("cuda")) == names


def test_the_reason_of_a_fall_back_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels, fusing = part("kernels"), importlib.import_module("vlmenv.agents.fusing")
    monkeypatch.setattr(fusing.Fused, "every", [])
    for function, compiled in ((torch.square, lambda x: x * x), (torch.sqrt, lambda x: x), (torch.exp, None)):
        one = fusing.Fused(function, lambda: (torch.tensor([4.0]),), 1, 1)
        one.compiled = compiled
    found = list(kernels.functions(CPU))
    rows = {line.split("`")[1].rpartition(".")[2]: line for line in found if "`" in line}
    assert "| 0.0e+00 |" in rows["square"]
    assert "**no**: its compiled form computes something else (1.0e+00)" in rows["sqrt"]
    assert "**no**: TypeError: 'NoneType' object is not callable" in rows["exp"]
    assert cells(found, "products with float32 results")[1].startswith("**no**: ")  # for CPUs have none


def test_what_is_not_equal_is_told() -> None:
    equality, one = part("equality"), torch.ones(4)
    truth = one, one
    assert equality.line("m", None, truth, (one + 5e-5, one), truth).endswith("| yes |")
    assert equality.line("m", None, truth, (one, one + 1e-3), truth).endswith("| **no** |")
    plain = one + 0.01, one + 0.01
    assert equality.line("m", torch.bfloat16, truth, (one - 0.015, one), plain).endswith("| yes |")
    assert equality.line("m", torch.bfloat16, truth, (one - 0.03, one), plain).endswith("| **no** |")


def test_every_way_of_training_has_options(context: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    training, context.args.dtype = part("training"), "bfloat16"
    monkeypatch.setattr(part("context").Context, "folder", lambda self: Path("model"))
    found = [training.configuration(way, context.args.cases[0], context) for way in training.WAYS.values()]
    assert len({repr(one) for one in found}) == len(found)
    assert {one.trainer.optimizer for one in found} == {"adamw", "adamw_8bit", "adamw_offload"}
    assert all(one.batches.precision == "bf16" and one.sampling.max_new_tokens == 6 for one in found)


@pytest.mark.slow
def test_memory_is_that_of_the_forecast(context: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    training, context.args.dtype = part("training"), "bfloat16"
    assert training.WAYS["full"] == {}
    monkeypatch.setattr(training, "WAYS", {"unknown": {"optimizer": "sgd"}, "full": {}})
    found = list(training.training(context))
    forecast, _, measured, more = cells(found, "full")[1:5]
    assert float(more.strip("%")) == pytest.approx(100 * (float(measured) / float(forecast) - 1), abs=15)
    assert abs(float(more.strip("%"))) < 30  # the CPU's allocator sees neither NumPy's images nor mapped files
    assert cells(found, "unknown")[1].startswith("**failed**: ConfigError: optimizer")
    assert "fast paths: shared prompts yes" in found[-1]
    stored = importlib.import_module("vlmenv.agents.checkpoints").stored_weights(context.folder())
    assert {kind for kind, _ in stored.values()} == {torch.bfloat16}  # as published, or no frozen weights would be


@pytest.mark.slow
def test_steps_beside_trl(context: Any) -> None:
    pytest.importorskip("trl", "1.16.0", reason="TRL is what is compared with")
    found = list(part("steps").steps(context))
    for name in ("vlmenv", "TRL"):
        seconds = cells(found, f"{name} | 100 (81) | 2 | 1 | 6")[5:]
        assert all(re.fullmatch(r"[\d.,]+%?", one) for one in seconds), found
    assert float(cells(found, r"backward")[1]) > 0


def test_a_contestant_that_fails_is_told(context: Any, case: Any) -> None:
    steps = part("steps")

    def broken(*_: Any) -> Any:
        raise ImportError("No module named 'trl'")

    told = steps.alone("TRL", broken, case, context)
    assert steps.figures(told, context)[0] == "**failed**: ImportError: No module named 'trl'"


@pytest.mark.vllm
def test_vllm(context: Any) -> None:
    engines = part("engines")
    found = list(engines.vllm(context))
    hf, vllm, ratio, *around, apart = [one.strip("×") for one in cells(found, "100 (81) | 2 | 1 | 6")[4:]]
    assert float(ratio) == pytest.approx(float(vllm.replace(",", "")) / float(hf.replace(",", "")), abs=0.1)
    assert len([float(seconds) for seconds in around]) == 3
    assert float(apart) < 1e-3
    found = list(engines.servers(context))
    for way in ("file", "direct"):
        *numbers, apart = cells(found, way)[1:]
        assert all(float(one.replace(",", "")) >= 0 for one in numbers), found
        assert float(apart) < 1e-3


@pytest.mark.parametrize("shared", [True, False])
def test_operations_are_those_of_the_matrix_products(context: Any, shared: bool) -> None:
    common, steps = importlib.import_module("common"), part("steps")
    case = common.Case("tiny", 100, 4, 2, 8, 0.9)
    family = context.family()
    agent = common.new_agent(family, "shared" if shared else "plain", case.new_tokens)
    shown = [one for one in common.observations(family, case) for _ in range(case.group_size)]
    rollout = agent.rollout(shown)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        agent.logprobs(rollout)
    counted = sum(found for name, found in counter.get_flop_counts()["Global"].items() if "attention" not in str(name))
    text = family.model.config.get_text_config()
    pairs = (1 if shared else 4) * 100**2 / 2 + 4 * 8 * (100 + 8 / 2)
    attention = 2 * 2 * 2 * pairs * text.num_attention_heads * 32 * text.num_hidden_layers
    expected = steps.forward_operations(family.model, case, shared=shared) - attention
    assert expected == pytest.approx(counted, rel=0.02)
