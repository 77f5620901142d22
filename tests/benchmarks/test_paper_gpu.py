"""The GPU on paper: its roofline by hand, operators' bytes and operations, and the counts of a small model."""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
import sys
from types import ModuleType

import pytest
import torch
from conftest import ROOT, shared


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


@pytest.fixture
def card() -> ModuleType:
    return importlib.import_module("paper_gpu.card")


@pytest.fixture
def operators() -> ModuleType:
    return importlib.import_module("paper_gpu.operators")


def meta(*sizes: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(sizes, dtype=dtype, device="meta")


class TestRoofline:
    def seconds(self, card: ModuleType, kind: str, moved: float, **rest: float) -> float:
        simple = card.Card("simple", 1000.0, 100.0, 10.0, 4, 0.5, 0.5, 300.0, 200.0, 0.25)
        return float(card.Kernel(card.Kind(kind), moved, **rest).seconds(simple))

    def test_the_slowest_of_bytes_operations_and_start_counts(self, card: ModuleType) -> None:
        assert self.seconds(card, "elementwise and copies", 20) == 20 / (10 * 0.5)
        assert self.seconds(card, "matrix products", 20, operations=5000) == 5000 / (1000 * 0.5)
        assert self.seconds(card, "matrix products", 20, operations=5000, half=False) == 5000 / (100 * 0.5)
        assert self.seconds(card, "elementwise and copies", 0.1, launches=3) == 0.75

    def test_few_thread_blocks_leave_processors_idle(self, card: ModuleType) -> None:
        assert self.seconds(card, "attention, backward", 0, operations=1000, blocks=1) == 1000 / (200 / 4)
        assert self.seconds(card, "attention, backward", 0, operations=1000, blocks=9) == 1000 / 200

    def test_utilization_counts_what_is_recomputed_once(self, card: ModuleType) -> None:
        assert card.utilization(forward=989.4e12, times=3, seconds=6.0, card=card.H100) == pytest.approx(0.5)


class TestOperators:
    def test_a_product(self, operators: ModuleType) -> None:
        kernel = operators.kernel_of("mm", (meta(3, 5), meta(5, 7)), {}, meta(3, 7), lambda one: None, "")
        assert kernel.operations == 2 * 3 * 5 * 7
        assert kernel.bytes == 2 * (15 + 35 + 21)

    def test_what_is_expanded_is_read_once(self, operators: ModuleType) -> None:
        wide = meta(1, 7).expand(3, 7)
        assert operators.kernel_of("mul", (meta(3, 7), wide), {}, meta(3, 7), lambda one: None, "").bytes == 2 * 49

    def test_a_lookup_reads_what_it_takes(self, operators: ModuleType) -> None:
        arguments = meta(1000, 4), meta(6, dtype=torch.int64)
        assert operators.kernel_of("embedding", arguments, {}, meta(6, 4), lambda one: None, "").bytes == 2 * 2 * 24

    def test_causal_attention_sees_half(self, operators: ModuleType) -> None:
        states = [meta(2, 4, 256, 64)] * 3
        whole, half = (
            operators.kernel_of(
                "_scaled_dot_product_flash_attention", (*states, 0.0, causal), {}, states[0], lambda one: None, ""
            )
            for causal in (False, True)
        )
        assert whole.operations == 2 * half.operations == 2 * 2 * 2 * 4 * 256 * 256 * 64
        assert whole.blocks == 2 * 4 * 2

    def test_attention_in_segments_counts_their_own_pairs(self, operators: ModuleType) -> None:
        query, key = meta(30, 4, 8), meta(50, 2, 8)
        starts, key_starts = torch.tensor([0, 10, 30]), torch.tensor([0, 20, 50])
        arguments = query, key, key, starts, key_starts, 20, 30, 0.0, False, False
        kernel = operators.kernel_of("_flash_attention_forward", arguments, {}, query, lambda one: one, "")
        assert kernel.operations == 4 * 4 * 8 * (10 * 20 + 20 * 30)

    def test_shared_keys_take_more_backward(self, operators: ModuleType) -> None:
        query, starts = meta(30, 4, 8), torch.tensor([0, 30])

        def launches(heads: int) -> int:
            key = meta(30, heads, 8)
            arguments = query, query, key, key, query, meta(4, 30), starts, starts, 30, 30, 0.0, True
            out = query, key, key
            return int(
                operators.kernel_of("_flash_attention_backward", arguments, {}, out, lambda one: one, "").launches
            )

        assert (launches(4), launches(2)) == (3, 5)


def on_paper(*options: str) -> str:
    """What the script prints."""
    if shutil.which("c++") is None and shutil.which("g++") is None:
        pytest.skip("the device on paper needs a C++ compiler")
    command = [sys.executable, str(ROOT / "benchmarks" / "paper_gpu"), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    if "no device on paper" in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_the_built_in_model_needs_no_published_files() -> None:
    told = on_paper("--model", "builtin", "--prompt", "80", "--completion", "16", "--group", "2")
    assert re.search(r"^kernels [1-9]\d\d: ", told, re.MULTILINE)
    assert "waits 1\n" in told


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["full", "lora"])
def test_a_token_of_sampling_is_one_graph(mode: str) -> None:
    """What the host starts does not depend on the kernels within; it waits where it looks at which have ended."""
    told = on_paper("--model", "builtin", "--prompt", "80", "--group", "4", "--mode", mode, "--decode")
    (counts,) = re.findall(
        r"^kernels (\d+); operators that the host starts (\d+), of which 1 graphs$", told, re.MULTILINE
    )
    kernels, calls = map(int, counts)
    assert kernels > (120 if mode == "full" else 200)
    assert calls < 40
    assert re.search(r"^waits 0\.125\n  0\.125: nonzero, .* still_going$", told, re.MULTILINE)


@pytest.mark.slow
def test_a_model_of_few_blocks() -> None:
    """Kernels, by what a block adds; one wait of the host; and gradients as large as the weights."""
    lengths = ["--prompt", "100", "--completion", "16", "--group", "2"]
    told = on_paper("--models", str(shared("models")), *lengths, "--blocks", "2")
    kernels = int(re.findall(r"^kernels (\d+)", told, re.MULTILINE)[0])
    assert 250 < kernels < 600
    assert "waits 1\n" in told
    assert "torch_compilable_check" in told
    sizes = {name: float(size) for name, size in re.findall(r"^([a-z]+): ([\d.]+) GB", told, re.MULTILINE)}
    assert sizes["weights"] == sizes["gradients"] == pytest.approx(sizes["optimizer"] / 2, abs=0.1)
