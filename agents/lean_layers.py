"""Layers that keep fewer activations for the backward pass, with bit-identical results in float32 or narrower.

They replace a model's own where a trial on small random weights shows that both compute the same.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from vlmenv.agents.fusing import ROWS, fused, fuses, numbers
from vlmenv.agents.saved_activations import drops, make_anew
from vlmenv.agents.wide_gradients import both
from vlmenv.compat.torch import without_modes

_log = logging.getLogger(__name__)


class GatedMLP(nn.Module):
    """`down(silu(gate(x)) * up(x))`, which keeps two tensors of its inner width per token.

    Transformers' own keeps four, which are most of a block's activations. Here the backward pass recomputes two of them
    by elementwise operations.
    """

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module
    kind: ClassVar[str] = "silu"

    def forward(self, hidden: Tensor) -> Tensor:
        return _down(*both(hidden, self.gate_proj, self.up_proj), self.down_proj, self.kind)


class GeluGatedMLP(GatedMLP):
    """A `GatedMLP` with GELU (arXiv 1606.08415)."""

    kind: ClassVar[str] = "gelu"


class TanhGeluGatedMLP(GatedMLP):
    """A `GatedMLP` with GELU's approximation by tanh."""

    kind: ClassVar[str] = "tanh"


class FusedGatedMLP(nn.Module):
    """A `GatedMLP` whose `gate` and `up` are the halves of one product."""

    gate_up_proj: nn.Module
    down_proj: nn.Module

    def forward(self, hidden: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(hidden).chunk(2, dim=-1)
        return _down(gate, up, self.down_proj)


class PlainMLP(nn.Module):
    """`second(activation(first(x)))`, which keeps one tensor of its inner width per token, and not two."""

    def forward(self, hidden: Tensor) -> Tensor:
        first, second, activation = _parts(self)
        inner = first(hidden)
        product: Tensor = activation(inner)
        if drops():
            kept = inner.detach()
            make_anew(product, lambda: activation(kept))
        return second(product)  # type: ignore[no-any-return]


class RMSNorm(nn.Module):
    """`weight * x / sqrt(mean(x²) + eps)`, which keeps its input and one number per token (arXiv 1910.07467, eq. 4).

    Transformers' own also keeps `x / sqrt(…)`, and the next layer keeps the output.
    """

    weight: nn.Parameter
    variance_epsilon: float
    feeds_products: bool = False
    """True if only linear layers read the output, so that it may have autocast's data type"""

    def forward(self, hidden: Tensor) -> Tensor:
        dtype = _output_type(self, hidden)
        if not torch.is_grad_enabled():
            return _norm(hidden, self.weight, self.variance_epsilon, dtype)[0]  # type: ignore[no-any-return]
        epsilon = self.variance_epsilon
        normed, inverse = _Normed.apply(hidden, hidden, self.weight, epsilon, dtype)  # type: ignore[no-untyped-call]
        if drops():
            weight, kept = self.weight.detach().clone(), hidden.detach()  # a clone: sharding may free the weight before
            make_anew(normed, lambda: _norm_again(kept, inverse, weight, dtype))
        return cast(Tensor, normed)


def _output_type(norm: RMSNorm, hidden: Tensor) -> torch.dtype:
    """That of the product with the weight. Where it is computed at once, linear layers get what they would cast to, so
    that nothing is cast for each of them."""
    device = hidden.device
    if getattr(norm, "feeds_products", False) and fuses(device) and torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return torch.result_type(hidden, norm.weight)


class CentredRMSNorm(nn.Module):
    """`(1 + weight) * x / sqrt(mean(x²) + eps)` in float32, which keeps as little as `RMSNorm`."""

    weight: nn.Parameter
    eps: float

    def forward(self, hidden: Tensor) -> Tensor:
        kept = hidden.detach()
        inverse = _wide(kept).pow(2).mean(-1, keepdim=True).add_(self.eps).rsqrt_()
        if not torch.is_grad_enabled():
            return _centred(hidden, inverse, self.weight)
        normed: Tensor = _CentredNormed.apply(hidden, hidden, inverse, self.weight)  # type: ignore[no-untyped-call]
        if drops():
            weight = self.weight.detach().clone()  # a clone: sharding may free the weight before the backward pass
            make_anew(normed, lambda: _centred(kept, inverse, weight))
        return normed


class PowerRMSNorm(nn.Module):
    """`weight * x * (mean(x²) + eps) ** -0.5` in float32, which keeps as little as `RMSNorm`; without a weight too."""

    weight: nn.Parameter
    eps: float

    def forward(self, hidden: Tensor) -> Tensor:
        weight = self.weight if hasattr(self, "weight") else None
        kept = hidden.detach()
        size = _wide(kept).pow(2).mean(-1, keepdim=True).add_(self.eps)
        if not torch.is_grad_enabled():
            return _powered(hidden, size, weight)
        normed: Tensor = _PowerNormed.apply(hidden, hidden, size, weight)  # type: ignore[no-untyped-call]
        if drops():
            own = None if weight is None else weight.detach().clone()  # a clone: sharding may free the weight before
            make_anew(normed, lambda: _powered(kept, size, own))
        return normed


class GatedRMSNorm(nn.Module):
    """An `RMSNorm` times `silu(gate)` in float32, which keeps its two inputs and one number per token."""

    weight: nn.Parameter
    variance_epsilon: float

    def forward(self, hidden: Tensor, gate: Tensor) -> Tensor:
        normed = RMSNorm.forward(cast(RMSNorm, self), hidden)
        gate = gate.to(torch.float32)
        if not torch.is_grad_enabled():
            return _gated(gate, normed, "silu").to(hidden.dtype)  # type: ignore[no-any-return]
        product: Tensor = _Gated.apply(gate, normed, "silu")  # type: ignore[no-untyped-call]
        return product.to(hidden.dtype)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, kind: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.kind, ctx.activated = kind, None
        return _gated(gate, up, kind)  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        activated, ctx.activated = ctx.activated, None
        if activated is None:
            return *_gated_backward(gate, up, grad, ctx.kind), None
        return _activation_backward(grad * up, gate, ctx.kind), _times(activated, grad), None


class _Normed(torch.autograd.Function):
    """Takes its input twice, so that autograd sums the two parts of its gradient in the same order as without it."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, again: Tensor, weight: Tensor, epsilon: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        normed, inverse = _norm(hidden, weight, epsilon, dtype)
        ctx.save_for_backward(hidden, inverse, weight)
        ctx.mark_non_differentiable(inverse)
        ctx.set_materialize_grads(False)  # or that of the inverse is made of zeros
        return normed, inverse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, inverse, weight = ctx.saved_tensors
        grad_weight = None
        if ctx.needs_input_grad[2]:
            grad_weight = _weight_grad(hidden, inverse, weight, grad)
        if not ctx.needs_input_grad[0]:
            return None, None, grad_weight, None, None
        if fuses(hidden.device):
            return _norm_backward(hidden, inverse, weight, grad), None, grad_weight, None, None
        parts = _through_norm(hidden, inverse, _wide((grad * weight).to(hidden.dtype)))
        return *parts, grad_weight, None, None


def _norm_examples() -> Callable[[], tuple[Tensor, ...]]:
    """Makes hidden states, their inverse sizes, a norm's weight, and a gradient."""
    return lambda: (
        numbers(ROWS, 64),
        numbers(ROWS, 1).abs(),
        numbers(64),
        numbers(ROWS, 64, dtype=torch.bfloat16, seed=1),
    )


@fused(lambda: (numbers(ROWS, 64), numbers(64), 1e-6, torch.bfloat16))
def _norm(hidden: Tensor, weight: Tensor, epsilon: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The norm, and the inverse size of each token."""
    inverse = _wide(hidden).pow(2).mean(-1, keepdim=True).add_(epsilon).rsqrt_()
    return _times(_scaled(hidden, inverse), weight).to(dtype), inverse


@fused(lambda: (numbers(ROWS, 64), numbers(ROWS, 1).abs(), numbers(64), torch.bfloat16))
def _norm_again(hidden: Tensor, inverse: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    return _times(_scaled(hidden, inverse), weight).to(dtype)


@fused(_norm_examples(), kernels=2)
def _weight_grad(hidden: Tensor, inverse: Tensor, weight: Tensor, grad: Tensor) -> Tensor:
    return _times(_scaled(hidden, inverse), grad).sum_to_size(weight.shape).to(weight.dtype)


@fused(_norm_examples())
def _norm_backward(hidden: Tensor, inverse: Tensor, weight: Tensor, grad: Tensor) -> Tensor:
    """The gradient of a norm's input."""
    wide, grad = _wide(hidden), _wide((grad * weight).to(hidden.dtype))
    grad_mean = -0.5 * (grad * wide).sum(-1, keepdim=True) * inverse.pow(3)
    return (grad * inverse + wide * (grad_mean / hidden.shape[-1] * 2)).to(hidden.dtype)


class _CentredNormed(torch.autograd.Function):
    """As `_Normed`, for `CentredRMSNorm`."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, again: Tensor, inverse: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, inverse, weight)
        return _centred(hidden, inverse, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, inverse, weight = ctx.saved_tensors
        return _norm_grads(ctx, hidden, weight, grad, inverse, 1.0 + _wide(weight))


class _PowerNormed(torch.autograd.Function):
    """As `_Normed`, for `PowerRMSNorm`."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, again: Tensor, size: Tensor, weight: Tensor | None) -> Tensor:
        ctx.save_for_backward(hidden, size, weight)
        return _powered(hidden, size, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, size, weight = ctx.saved_tensors
        given = hidden, weight, grad, size.pow(-0.5), 1.0 if weight is None else _wide(weight)
        return _norm_grads(ctx, *given, lambda total: total * (-0.5 * size.pow(-1.5)))


def _powered(hidden: Tensor, size: Tensor, weight: Tensor | None) -> Tensor:
    normed = _wide(hidden) * size.pow(-0.5)
    return (normed if weight is None else normed.mul_(_wide(weight))).to(hidden.dtype)


def _norm_grads(
    ctx: Any,
    hidden: Tensor,
    weight: Tensor | None,
    grad: Tensor,
    inverse: Tensor,
    factor: Tensor | float,
    through_root: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor | None, ...]:
    """The gradients of what `_CentredNormed` and `_PowerNormed` take.

    Args:
        ctx: Tells which gradients are needed.
        hidden: The norm's input.
        weight: Its weight, or None.
        grad: Gradient of the output.
        inverse: [..., 1], by which the input is multiplied.
        factor: What multiplies the normed input.
        through_root: See `_through_norm`.
    """
    grad, grad_weight = _wide(grad), None
    if weight is not None and ctx.needs_input_grad[3]:
        grad_weight = (_wide(hidden) * inverse).mul_(grad).sum_to_size(weight.shape).to(weight.dtype)
    if not ctx.needs_input_grad[0]:
        return None, None, None, grad_weight
    return *_through_norm(hidden, inverse, grad * factor, through_root), None, grad_weight


def _through_norm(
    hidden: Tensor, inverse: Tensor, grad: Tensor, through_root: Callable[[Tensor], Tensor] | None = None
) -> tuple[Tensor, Tensor | None]:
    """The two parts of the gradient of a norm's input, from that of `x / sqrt(mean(x²) + eps)`.

    The latter must be float32 or finer, and serves as room. `through_root` turns the gradient of the root's inverse
    into that of the mean, and rounds as the model's own. Default: by `inverse`.
    """
    wide = _wide(hidden)
    product = grad * wide
    total = product.sum(-1, keepdim=True)
    grad_mean = -0.5 * total * inverse.pow(3) if through_root is None else through_root(total)
    parts = grad.mul_(inverse), torch.mul(wide, grad_mean / hidden.shape[-1] * 2, out=product)
    if wide.dtype == hidden.dtype:
        return parts
    return (parts[0] + parts[1]).to(hidden.dtype), None


def _centred(hidden: Tensor, inverse: Tensor, weight: Tensor) -> Tensor:
    return (_wide(hidden) * inverse).mul_(1.0 + _wide(weight)).to(hidden.dtype)


def _down(gate: Tensor, up: Tensor, down: nn.Module, kind: str = "silu") -> Tensor:
    """The end of a gated MLP."""
    if not torch.is_grad_enabled():
        return down(_gated(gate, up, kind))  # type: ignore[no-any-return]
    product: Tensor = _Gated.apply(gate, up, kind)  # type: ignore[no-untyped-call]
    if drops():
        node, gate, up = product.grad_fn, gate.detach(), up.detach()
        make_anew(product, lambda: _gated_again(node, gate, up, kind))
    return down(product)  # type: ignore[no-any-return]


def _gated_again(node: Any, gate: Tensor, up: Tensor, kind: str) -> Tensor:
    """`_gated`, which leaves the activation to the backward pass of `_Gated`, the next one: CPUs take long for it."""
    if node is None or fuses(gate.device):
        return _gated(gate, up, kind)  # type: ignore[no-any-return]
    node.activated = _activated(gate, kind)
    return cast(Tensor, node.activated * up)


def _gate_examples(count: int) -> Callable[[], tuple[Any, ...]]:
    return lambda: (*(numbers(ROWS, 64, dtype=torch.bfloat16, seed=seed) for seed in range(count)), "silu")


@fused(_gate_examples(2))
def _gated(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    return _times(_activated(gate, kind), up)


_APPROXIMATIONS: Final = {"gelu": "none", "tanh": "tanh"}


def _activated(gate: Tensor, kind: str) -> Tensor:
    if kind == "silu":
        return nn.functional.silu(gate)
    return nn.functional.gelu(gate, approximate=_APPROXIMATIONS[kind])


def _activation_backward(grad: Tensor, gate: Tensor, kind: str) -> Tensor:
    if kind == "silu":
        return cast(Tensor, torch.ops.aten.silu_backward(grad, gate))
    return cast(Tensor, torch.ops.aten.gelu_backward(grad, gate, approximate=_APPROXIMATIONS[kind]))


@fused(_gate_examples(3))
def _gated_backward(gate: Tensor, up: Tensor, grad: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    return _activation_backward(grad * up, gate, kind), _times(_activated(gate, kind), grad)


def _scaled(hidden: Tensor, inverse: Tensor) -> Tensor:
    return (_wide(hidden) * inverse).to(hidden.dtype)


def _times(own: Tensor, other: Tensor) -> Tensor:
    """The product, in place of the first factor if dtypes allow: on CPUs new memory costs more than multiplying."""
    return own.mul_(other) if torch.promote_types(own.dtype, other.dtype) == own.dtype else own * other


def _wide(hidden: Tensor) -> Tensor:
    return hidden.to(torch.promote_types(hidden.dtype, torch.float32))


def _parts(module: nn.Module) -> tuple[nn.Module, nn.Module, nn.Module]:
    """The linear layers of a `PlainMLP`, and its activation."""
    named = dict(module.named_children())
    first, second = (named.pop(name) for name in (("fc1", "fc2") if "fc1" in named else ("linear_fc1", "linear_fc2")))
    (activation,) = named.values()
    return first, second, activation


@dataclass(frozen=True)
class _Form:
    """A lean layer, and the parts of a module that may be the same."""

    lean: type[nn.Module]
    linear: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """linear layers, with their sizes in a trial"""
    weights: Mapping[str, int] = field(default_factory=dict)
    """own weights, with their sizes in a trial"""
    activations: int = 0
    """number of activations"""

    def fits(self, module: nn.Module) -> bool:
        """True if a module has these parts and no others."""
        layers, own = dict(module.named_children()), dict(module.named_parameters(recurse=False))
        return (
            self.linear.keys() <= layers.keys()
            and len(layers) == len(self.linear) + self.activations
            and own.keys() == self.weights.keys()
        )

    def small(self, module: nn.Module) -> nn.Module:
        """A copy of a module with few random weights, on the CPU in float32."""
        random, smaller = torch.Generator().manual_seed(0), dict[int, nn.Module | nn.Parameter]()
        for name, size in self.weights.items():
            weight = torch.empty(size, device="cpu", dtype=torch.float32)
            smaller[id(module.get_parameter(name))] = nn.Parameter(weight)
        for name, (inner, outer) in self.linear.items():
            layer = module.get_submodule(name)
            bias = getattr(layer, "bias", None) is not None
            # Drawn from `random` alone: a trial, which a process makes once, leaves the global generator as it is.
            empty = nn.Linear(inner, outer, bias=bias, device="meta", dtype=torch.float32)
            smaller[id(layer)] = empty.to_empty(device="cpu")
        made = copy.deepcopy(module, smaller)
        for parameter in made.parameters():
            nn.init.normal_(parameter, generator=random)
        return made


_IN, _OUT = (8, 12), (12, 8)
_FORMS: Final = (
    *(
        _Form(kind, {"gate_proj": _IN, "up_proj": _IN, "down_proj": _OUT}, activations=1)
        for kind in (GatedMLP, GeluGatedMLP, TanhGeluGatedMLP)
    ),
    _Form(FusedGatedMLP, {"gate_up_proj": (8, 24), "down_proj": _OUT}, activations=1),
    _Form(PlainMLP, {"fc1": _IN, "fc2": _OUT}, activations=1),
    _Form(PlainMLP, {"linear_fc1": _IN, "linear_fc2": _OUT}, activations=1),
    _Form(RMSNorm, weights={"weight": 8}),
    _Form(CentredRMSNorm, weights={"weight": 8}),
    _Form(PowerRMSNorm, weights={"weight": 8}),
    _Form(PowerRMSNorm),
    _Form(GatedRMSNorm, weights={"weight": 8}),
)
_LEAN: Final = (GatedMLP, FusedGatedMLP, PlainMLP, RMSNorm, CentredRMSNorm, PowerRMSNorm, GatedRMSNorm)


@dataclass(frozen=True)
class LeanLayers:
    """How many of a model's MLPs and norms are lean."""

    on: int
    of: int
    faults: Mapping[str, str]
    """why those of a class are not"""


def make_lean(model: nn.Module) -> LeanLayers:
    """Replaces the MLPs and RMS norms of a model that are shown to compute the same as a lean one.

    Weights keep their names. A class that is not replaced is told once, in a warning.
    """
    on, of, faults = 0, 0, dict[str, str]()
    for module in model.modules():
        _note_readers(module)
        if not isinstance(module, _LEAN) and not _is_expected(module):
            continue
        of += 1
        fault = _replace(module)
        if fault:
            faults[type(module).__name__] = fault
        else:
            on += 1
    return LeanLayers(on, of, faults)


_BEFORE_PRODUCTS: Final = ({"input_layernorm", "post_attention_layernorm"}, {"norm1", "norm2"})
"""The norms of a block before attention and before its MLP, which begin with linear layers."""


def _note_readers(block: nn.Module) -> None:
    """Notes which norms of a block only linear layers read: both, if it has no others."""
    norms = {name: one for name, one in block.named_children() if "norm" in name.lower()}
    if norms.keys() in _BEFORE_PRODUCTS:
        for one in norms.values():
            one.feeds_products = True  # type: ignore[assignment]


def _is_expected(module: nn.Module) -> bool:
    """True if a module is a norm or an MLP of several layers, by the name of its class."""
    name, parts = type(module).__name__, len(list(module.children()))
    return "RMSNorm" in name or ("mlp" in name.lower() and parts > 1)


def _replace(module: nn.Module) -> str:
    """Makes a module lean; the reason if it cannot be."""
    if isinstance(module, _LEAN):
        return ""
    names = frozenset(name for name, _ in module.named_children())
    own = frozenset(name for name, _ in module.named_parameters(recurse=False))
    key = type(module), type(module).forward, names, own, *(type(child) for child in module.children())
    if key not in _tried:
        _tried[key] = _first_right(module)
    lean, fault = _tried[key]
    if lean is not None:
        module.__class__ = lean
    elif type(module) not in _told:
        _told.add(type(module))
        _log.warning(
            "%s keeps all its activations: %s. Training is the same, and takes more memory; vlmenv is tested with the "
            "versions of transformers that its requirements name",
            type(module).__name__,
            fault,
        )
    return fault


_tried: dict[tuple[object, ...], tuple[type[nn.Module] | None, str]] = {}
"""by the classes of a module and of its parts: the lean one that computes the same, or how the first one differs"""
_told: set[type] = set()


def _first_right(module: nn.Module) -> tuple[type[nn.Module] | None, str]:
    """The first lean layer that computes the same as a module; None, and how the first that fits differs."""
    fault = ""
    for form in _FORMS:
        if form.fits(module):
            found = _trial(form, module)
            if not found:
                return form.lean, ""
            fault = fault or found
    return None, fault or "it has other parts than those that are known"


def _trial(form: _Form, module: nn.Module) -> str:
    """How outputs and gradients of a small module differ from those of the lean one; empty if they are equal."""
    with without_modes(), torch.enable_grad(), torch.autocast("cpu", enabled=False):
        try:
            plain = form.small(module)
            lean = copy.copy(plain)
            lean.__class__ = form.lean
            for dtype in (torch.float32, torch.bfloat16):
                for scale in (1.0, 1e-3):  # of the size of a norm's epsilon
                    found, right = (_passes(one.to(dtype), scale, dtype) for one in (lean, plain))
                    if not all(torch.equal(a, b) for a, b in zip(found, right, strict=True)):
                        return f"it does not compute the same as {form.lean.__name__}"
        except (RuntimeError, AttributeError, TypeError, ValueError, KeyError) as error:
            return f"it cannot be tried: {type(error).__name__}: {error}"
    return ""


def _passes(module: nn.Module, scale: float, dtype: torch.dtype) -> list[Tensor]:
    """Output and gradients for random input."""
    parameters = list(module.parameters())
    *inputs, push = torch.randn(3, 3, 5, 8, generator=torch.Generator().manual_seed(1), device="cpu")
    given = [(scale * one).to(dtype).requires_grad_() for one in inputs[: _inputs(module)]]
    out = module(*given)
    return [out, *torch.autograd.grad(out, [*given, *parameters], push.to(out.dtype))]


def _inputs(module: nn.Module) -> int:
    """The number of tensors that a module takes: 2 of a norm with a gate, else 1."""
    return 2 if "gate" in inspect.signature(module.forward).parameters else 1
