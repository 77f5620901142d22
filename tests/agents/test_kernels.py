"""Attention over a part of the keys: the kernels of each device against explicit softmax."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cuda_operators import cuda_operators

from vlmenv.agents import kernels
from vlmenv.agents.kernels import (
    CPUKernel,
    EfficientKernel,
    ExplicitKernel,
    FlashKernel,
    Kernel,
    Part,
    backward_in_rows,
    kernel_for,
)
from vlmenv.agents.packing import Packing
from vlmenv.agents.trials import Trial, largest_difference

FOR_CUDA = [FlashKernel(), EfficientKernel()]


CASES = ["causal", "unequal", "fewer"]


def part(case: str, dtype: torch.dtype, device: str = "cpu", keys: int = 6) -> Part:
    """Two rows of two heads of size 8: as many queries as keys, or two; of one row two keys are not there."""
    query, key, value = torch.randn(3, 2, 2, keys, 8, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    padding = Packing(torch.tensor([keys, keys - 2]), query.device) if case == "unequal" else None
    return Part(query[:, :, : 2 if case == "fewer" else keys], key, value, padding, case == "causal", 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("keys", [6, 150])
def test_on_cpus(dtype: torch.dtype, case: str, keys: int) -> None:
    """By matrix products where there are few keys, and flash attention where there are many."""
    compare(CPUKernel(), part(case, dtype, keys=keys), 1e-5 if dtype == torch.float32 else 5e-2)


@pytest.mark.parametrize(("case", "keys"), [("causal", 32), ("unequal", 64), ("fewer", 128)])
def test_where_cpus_go_over_to_flash_attention(case: str, keys: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise NotImplementedError

    monkeypatch.setattr(ExplicitKernel, "forward", refuse)
    CPUKernel().forward(part(case, torch.float32, keys=keys + 1))
    CPUKernel().forward(part(case, torch.bfloat16, keys=keys))
    with pytest.raises(NotImplementedError):
        CPUKernel().forward(part(case, torch.float32, keys=keys))


@pytest.mark.parametrize("kernel", FOR_CUDA, ids=["flash", "efficient"])
@pytest.mark.parametrize("case", CASES)
def test_for_cuda(kernel: Kernel, case: str) -> None:
    """Called as PyTorch's operators want it, and what they give is read rightly."""
    with cuda_operators():
        compare(kernel, part(case, torch.float64), 1e-12)


def compare(kernel: Kernel, tried: Part, tolerance: float) -> None:
    grad = torch.randn(tried.query.shape, generator=torch.Generator().manual_seed(1)).to(tried.query.dtype)
    out, lse = ExplicitKernel().forward(tried)
    right = (out, lse, *ExplicitKernel().backward(tried, grad, out, lse))
    # Outputs and normalisers are put together of parts, so that they lie in any order.
    for first, second in ((0, 0), (1, 2), (0, 1)):
        laid_out = [one.transpose(first, second).contiguous().transpose(first, second) for one in (out, lse)]
        found = (*kernel.forward(tried), *kernel.backward(tried, grad, *laid_out))
        torch.testing.assert_close(found, right, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("case", ["unequal", "even"])
def test_queries_cut_into_rows_have_the_same_gradients(case: str) -> None:
    """To the last digits, and by calls with more rows."""
    tried = part(case, torch.float64)
    grad = torch.randn(tried.query.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    forward = ExplicitKernel().forward(tried)
    right = ExplicitKernel().backward(tried, grad, *forward)
    rows: list[int] = []

    class Noting(FlashKernel):
        def backward(self, part: Part, *rest: Any) -> Any:
            rows.append(len(part.query))
            return super().backward(part, *rest)

    with cuda_operators():
        found = backward_in_rows(Noting(), tried, grad, *forward, 3)
    torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-12)
    assert rows == [2 * 3]
    rows.clear()
    assert backward_in_rows(ExplicitKernel(), tried, grad, *forward, 3)[1].equal(right[1])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("room", [1, 1 << 22])
def test_explicit_against_autograd(case: str, room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its own normalisers a part is the whole attention; row by row, and all at once."""
    monkeypatch.setattr(ExplicitKernel, "_ROOM", room)
    tried = part(case, torch.float64)
    leaves = [one.clone().requires_grad_() for one in tried[:3]]
    mask = torch.tensor([[True] * 6, [True] * 4 + [case != "unequal"] * 2])[:, None, None].expand(-1, 1, 6, 6)
    mask = mask.tril() if case == "causal" else mask[:, :, : tried.query.shape[2]]
    out = torch.nn.functional.scaled_dot_product_attention(*leaves, attn_mask=mask, scale=0.5)
    scores = (leaves[0] @ leaves[1].mT * 0.5).masked_fill(~mask, -torch.inf)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found, lse = ExplicitKernel().forward(tried)
    torch.testing.assert_close((found, lse), (out.detach(), scores.detach().logsumexp(-1)))
    grads = ExplicitKernel().backward(tried, grad, found, lse)
    torch.testing.assert_close(grads, torch.autograd.grad(out, leaves, grad))


@pytest.mark.parametrize("kernel", FOR_CUDA, ids=["flash", "efficient"])
@pytest.mark.parametrize("case", CASES)
def test_shapes_by_pytorchs_own_rules(kernel: Kernel, case: str) -> None:
    """The operators' own rules of shapes, without a device, take what they are given and agree with what is read."""
    tried = part(case, torch.bfloat16, "meta")
    out, lse = kernel.forward(tried)
    assert out.shape == tried.query.shape
    assert lse.shape == tried.query.shape[:3]
    grads = kernel.backward(tried, torch.empty_like(out), out, lse)
    assert [grad.shape for grad in grads] == [one.shape for one in tried[:3]]


class TestChoice:
    def test_on_cpus(self) -> None:
        assert isinstance(kernel_for(torch.empty(8)), CPUKernel)

    @pytest.mark.parametrize("kernel", FOR_CUDA, ids=["flash", "efficient"])
    def test_what_agrees_is_right(self, kernel: Kernel) -> None:
        with cuda_operators():
            assert not kernels.try_kernel(kernel, "cpu", torch.bfloat16, 64).fault

    @pytest.mark.parametrize("kernel", FOR_CUDA, ids=["flash", "efficient"])
    def test_what_the_device_lacks_is_not(self, kernel: Kernel) -> None:
        assert kernels.try_kernel(kernel, "cpu", torch.bfloat16, 64).fault

    @pytest.mark.parametrize("which", range(5))
    @pytest.mark.parametrize("case", CASES)
    def test_what_differs_in_one_result_of_one_kind_is_not(self, which: int, case: str) -> None:
        def is_it(part: Part) -> bool:
            return {"causal": part.causal, "unequal": part.padding is not None}.get(
                case, not part.causal and part.padding is None
            )

        class Wrong(CPUKernel):
            def forward(self, part: Part) -> tuple[torch.Tensor, torch.Tensor]:
                results = super().forward(part)
                return tuple(one * 1.5 if is_it(part) and which == at else one for at, one in enumerate(results))

            def backward(self, part: Part, *rest: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
                results = super().backward(part, *rest)
                return tuple(one * 1.5 if is_it(part) and which == 2 + at else one for at, one in enumerate(results))

        assert not kernels.try_kernel(CPUKernel(), "cpu", torch.float32, 64).fault
        assert kernels.try_kernel(Wrong(), "cpu", torch.float32, 64).fault

    def test_what_takes_padding_for_keys_is_not(self) -> None:
        class Careless(CPUKernel):
            def forward(self, part: Part) -> tuple[torch.Tensor, torch.Tensor]:
                return super().forward(part._replace(padding=None))

        assert kernels.try_kernel(Careless(), "cpu", torch.float32, 64).fault

    def test_a_trial_tells_the_largest_difference(self) -> None:
        class Shifted(ExplicitKernel):
            def forward(self, part: Part) -> tuple[torch.Tensor, torch.Tensor]:
                out, lse = super().forward(part)
                shifted = out.clone()
                shifted.view(-1)[7] += 0.25 * out.abs().max()
                return shifted, lse

        trial = kernels.try_kernel(Shifted(), "cpu", torch.float32, 64)
        assert trial.difference == pytest.approx(0.25)
        assert trial.fault == "its results differ from those of matrix products"
        assert kernels.try_kernel(ExplicitKernel(), "cpu", torch.float32, 64) == Trial("", 0.0)

    def test_differences_are_shares_of_the_largest_number(self) -> None:
        right = torch.tensor([-4.0, 1.0]), torch.zeros(2)
        assert largest_difference([right[0] + 1, right[1]], right) == 0.25
        assert largest_difference([right[0], right[1] + 0.5], right) == 0.5  # nothing to be a share of

    @pytest.mark.parametrize("error", [RuntimeError, AttributeError, TypeError, ValueError])
    def test_what_fails_is_not_but_for_want_of_memory(self, error: type[Exception]) -> None:
        class Failing(CPUKernel):
            def forward(self, part: Part) -> tuple[torch.Tensor, torch.Tensor]:
                raise error

        assert kernels.try_kernel(Failing(), "cpu", torch.float32, 64).fault
        error = torch.OutOfMemoryError
        with pytest.raises(torch.OutOfMemoryError):
            kernels.try_kernel(Failing(), "cpu", torch.float32, 64)

    @pytest.mark.parametrize(("works", "chosen"), [(2, FlashKernel), (1, EfficientKernel), (0, ExplicitKernel)])
    def test_on_gpus_the_fastest_that_is_right(
        self, works: int, chosen: type[Kernel], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tried: list[tuple[Any, ...]] = []

        def try_kernel(kernel: Kernel, *how: Any) -> Trial:
            tried.append((type(kernel), *how))
            return Trial("" if len(tried) > 2 - works else "no")

        monkeypatch.setattr(kernels, "try_kernel", try_kernel)
        assert isinstance(kernels._kernel_for.__wrapped__("cuda", torch.float16, 72, False), chosen)
        order = [FlashKernel, EfficientKernel][: min(3 - works, 2)]
        assert tried == [(kind, "cuda", torch.float16, 72, False) for kind in order]

    def test_a_changed_private_operator_is_told(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        def renamed(self: CPUKernel, part: Part) -> Any:
            return torch.ops.aten._an_operator_that_is_gone(part.query)

        monkeypatch.setattr(CPUKernel, "forward", renamed)
        assert isinstance(kernels._kernel_for.__wrapped__("cpu", torch.float32, 16, False), ExplicitKernel)
        assert "falls back from CPUKernel for heads of 16 in float32" in caplog.text
        assert "_an_operator_that_is_gone" in caplog.text

    def test_what_flash_attention_is_not_for_is_not_told(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        no_flash = {FlashKernel: "no"}
        monkeypatch.setattr(kernels, "try_kernel", lambda kernel, *_: Trial(no_flash.get(type(kernel), "")))
        for dtype, told in ((torch.float32, False), (torch.bfloat16, True)):
            assert isinstance(kernels._kernel_for.__wrapped__("cuda", dtype, 64, False), EfficientKernel)
            assert ("falls back from FlashKernel" in caplog.text) == told

    def test_each_size_of_heads_has_its_own(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[tuple[Any, ...]] = []
        monkeypatch.setattr(kernels, "_kernel_for", lambda *how: asked.append(how))
        kernel_for(torch.empty(3, 72, dtype=torch.bfloat16))
        assert asked == [("cpu", torch.bfloat16, 72, False)]

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU")
    def test_on_a_gpu(self) -> None:
        flash = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
        half = kernel_for(torch.empty(64, device="cuda", dtype=torch.bfloat16))
        assert isinstance(half, FlashKernel if flash else EfficientKernel)
        assert isinstance(kernel_for(torch.empty(64, device="cuda")), EfficientKernel)
