"""AdamW (arXiv 1711.05101) with less memory: fewer bits of state, state on the CPU, or weights in bfloat16.

Bytes per trained parameter, of the optimizer's state on the device, on the CPU, and in a checkpoint:

| optimizer | weights | device | CPU | checkpoint |
|---|---|---|---|---|
| `adamw` | float32 | 8 | | 8 |
| `adamw` | bfloat16 | 4 | | 4 |
| `adamw_8bit` | any | 2.03 | | 2.03 |
| `adamw_offload` | float32 | | 8 | 8 |
| `adamw_offload` | bfloat16 | | 12 | 12 |

With bfloat16 weights, an update smaller than half the distance of neighbouring numbers would be lost. So results are
rounded up or down at random, right in the mean (stochastic rounding). `adamw_offload` keeps float32 weights instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Final, Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from vlmenv.core.errors import ConfigError

OptimizerName = Literal["adamw", "adamw_8bit", "adamw_offload"]
_BETAS: Final = (0.9, 0.999)
_CHUNK: Final = 1 << 24
"""Weights that are updated at a time, so that float32 copies stay small; a multiple of `_BLOCK`."""
_BLOCK: Final = 256
"""Numbers with a common scale in 8 bits."""
_SMALL: Final = 4096
"""Weights with fewer numbers keep 32 bits of state, as in bitsandbytes."""


def make_optimizer(
    name: OptimizerName,
    groups: list[dict[str, Any]],
    *,
    lr: float,
    weight_decay: float,
    device: torch.device,
) -> torch.optim.Optimizer:
    """Makes an optimizer.

    Args:
        name: "adamw", "adamw_8bit" or "adamw_offload".
        groups: Trained parameters with their options.
        lr: Learning rate of groups that have none.
        weight_decay: Weight decay.
        device: Device of the parameters.

    Raises:
        ConfigError: Bitsandbytes is missing, or there is no GPU to move state from.
    """
    options: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay}
    if name == "adamw_8bit":
        return AdamW8bit(groups, **options)
    if name == "adamw_offload":
        if device.type == "cpu":
            raise ConfigError("optimizer adamw_offload moves state to the CPU, where this model is already: take adamw")
        return OffloadedAdamW(groups, **options)
    if any(one.dtype == torch.bfloat16 for group in groups for one in group["params"]):
        return RoundingAdamW(groups, **options)
    # PyTorch's own choice on GPUs holds four more bytes of each weight during a step.
    return torch.optim.AdamW(groups, fused=True if device.type == "cuda" else None, **options)


def state_bytes(name: OptimizerName, dtype: torch.dtype) -> float:
    """Bytes of the optimizer's state per trained parameter of a data type, on disk and in memory."""
    if name == "adamw_8bit":
        return 2 + 2 * torch.float32.itemsize / _BLOCK
    narrow = dtype == torch.bfloat16
    return (12.0 if narrow else 8.0) if name == "adamw_offload" else 2.0 * dtype.itemsize


class RoundingAdamW(torch.optim.Optimizer):
    """AdamW that updates a weight at a time, or this rank's shard of it.

    Its state has the data types of the weights. What bfloat16 cannot hold is rounded at random.

    Args:
        params: Parameters, or groups of them.
        lr: Learning rate.
        weight_decay: Weight decay.
    """

    names: frozenset[str] = frozenset({"step", "exp_avg", "exp_avg_sq"})
    """parts of a weight's state"""

    def __init__(self, params: Iterable[Any], lr: float = 1e-3, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "betas": _BETAS, "eps": 1e-8, "weight_decay": weight_decay})
        self._noise: dict[torch.device, torch.Generator] = {}
        self._seed = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Updates all weights that have a gradient."""
        self._begin_noise()
        for parameter, group in self._with_gradient():
            weight, grad, state = _local(parameter), _local(parameter.grad), self.state[parameter]
            if not state:
                state.update(step=0, **self._begin(weight))
            state["step"] += 1
            self._update(weight, grad, state, group)

    def _begin_noise(self) -> None:
        """Seeds rounding by the number of steps: all ranks round alike, and so does a run that is resumed."""
        self._seed = max((int(state["step"]) for state in self.state.values()), default=0)
        self._noise.clear()

    def _with_gradient(self) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        return ((one, group) for group in self.param_groups for one in group["params"] if one.grad is not None)

    def _begin(self, weight: Tensor) -> dict[str, Tensor]:
        """State of a weight before the first step."""
        return {"exp_avg": torch.zeros_like(weight), "exp_avg_sq": torch.zeros_like(weight)}

    def _update(self, weight: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """Updates weight and state in place, a chunk at a time."""
        kept = [weight, state["exp_avg"], state["exp_avg_sq"]]
        for rows in _chunks(weight):
            parts = [one.view(-1)[rows] for one in kept]
            wide = [one.float() for one in parts]
            _adam(wide, grad.reshape(-1)[rows].float(), state["step"], group)
            for part, value in zip(parts, wide, strict=True):
                self._put(part, value)

    def _put(self, part: Tensor, value: Tensor) -> None:
        """Writes float32 numbers, at random to one of the two neighbours where bfloat16 does not hold them."""
        if part.dtype != torch.bfloat16:
            if part.data_ptr() != value.data_ptr():
                part.copy_(value)
            return
        if part.device not in self._noise:
            self._noise[part.device] = torch.Generator(part.device).manual_seed(self._seed)
        generator = self._noise[part.device]
        noise = torch.randint(1 << 16, value.shape, generator=generator, dtype=torch.int32, device=part.device)
        part.copy_(((value.view(torch.int32) + noise) & -(1 << 16)).view(torch.float32))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores a state in its own data types.

        Raises:
            ValueError: It is of other parameters or of another optimizer.
        """
        groups, states = state_dict["param_groups"], state_dict["state"]
        if [len(one["params"]) for one in groups] != [len(one["params"]) for one in self.param_groups]:
            raise ValueError("the optimizer's state is of other parameters")
        if any(not kept.keys() <= self.names for kept in states.values()):
            raise ValueError("the optimizer's state is of another optimizer")
        for own, saved in zip(self.param_groups, groups, strict=True):
            own.update({name: value for name, value in saved.items() if name != "params"})
        parameters = [one for group in self.param_groups for one in group["params"]]
        self.state.clear()
        for index, kept in states.items():
            parameter = parameters[index]
            self.state[parameter] = {
                name: self._placed(_local(value), parameter) if isinstance(value, Tensor) else value
                for name, value in kept.items()
            }

    def _placed(self, value: Tensor, parameter: Tensor) -> Tensor:
        """A part of a state, where it belongs."""
        return value.to(parameter.device, copy=True)


class AdamW8bit(RoundingAdamW):
    """AdamW with 8 bits for each number of its state, in blocks of 256 (arXiv 2110.02861), by bitsandbytes.

    Small weights, such as norms, keep 32 bits.

    Raises:
        ConfigError: Bitsandbytes is missing.
    """

    names = RoundingAdamW.names | {"codes1", "scales1", "codes2", "scales2"}

    def __init__(self, params: Iterable[Any], lr: float = 1e-3, weight_decay: float = 0.0) -> None:
        try:
            from bitsandbytes import functional
        except ImportError as error:
            raise ConfigError(
                'optimizer adamw_8bit needs the extra "quantize": pip install "vlmenv[quantize]"'
            ) from error
        self._bnb: Any = functional
        self._maps = self._bnb.create_dynamic_map(signed=True), self._bnb.create_dynamic_map(signed=False)
        super().__init__(params, lr, weight_decay)

    def _begin(self, weight: Tensor) -> dict[str, Tensor]:
        if weight.numel() < _SMALL:
            wide = torch.zeros_like(weight, dtype=torch.float32)
            return {"exp_avg": wide, "exp_avg_sq": wide.clone()}
        size, device = weight.numel(), weight.device
        codes = {name: torch.zeros(size, dtype=torch.uint8, device=device) for name in ("codes1", "codes2")}
        return codes | {name: torch.zeros(-(-size // _BLOCK), device=device) for name in ("scales1", "scales2")}

    def _update(self, weight: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if "exp_avg" in state:
            super()._update(weight, grad, state, group)
            return
        beta1, beta2 = group["betas"]
        self._maps = self._maps[0].to(weight.device), self._maps[1].to(weight.device)
        for rows in _chunks(weight):
            blocks = slice(rows.start // _BLOCK, -(-rows.stop // _BLOCK))
            part, codes1, codes2 = weight.view(-1)[rows], state["codes1"][rows], state["codes2"][rows]
            wide = part.float()
            self._bnb.optimizer_update_8bit_blockwise(
                "adam",
                grad.reshape(-1)[rows].float(),
                wide,
                codes1,
                codes2,
                beta1,
                beta2,
                0.0,
                0.0,
                group["eps"],
                state["step"],
                float(group["lr"]),
                *self._maps,
                state["scales1"][blocks],
                state["scales2"][blocks],
                weight_decay=group["weight_decay"],
            )
            self._put(part, wide)


class OffloadedAdamW(RoundingAdamW):
    """AdamW whose state is on the CPU, which computes the updates. Weights and gradients stay on their device.

    The gradient of the next weight is on its way while a weight is updated. For a bfloat16 weight, the state has the
    weight in float32.
    """

    names = RoundingAdamW.names | {"weight"}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Updates all weights that have a gradient."""
        waiting = list(self._with_gradient())
        fetched = self._fetch(waiting[0][0]) if waiting else None
        for place, (parameter, group) in enumerate(waiting):
            ahead = self._fetch(waiting[place + 1][0]) if place + 1 < len(waiting) else None
            assert fetched is not None
            grad, weight, arrived = fetched
            if arrived is not None:
                arrived.synchronize()
            self._step_on_cpu(_local(parameter), weight, grad, self.state[parameter], group)
            fetched = ahead

    def _fetch(self, parameter: Tensor) -> tuple[Tensor, Tensor, torch.cuda.Event | None]:
        """Begins to copy gradient and weight to the CPU in float32; gives them and the end of the copies."""
        grad, weight = _local(parameter.grad), _local(parameter)
        if weight.device.type != "cuda":
            return grad.float().contiguous(), weight.float(), None
        stream = torch.cuda.current_stream(weight.device)
        copies = [_on_cpu(grad.float(), pinned=True)]
        known = self.state[parameter].get("weight")
        copies.append(_on_cpu(weight.float(), pinned=True) if known is None else known)
        return copies[0], copies[1], stream.record_event()

    def _step_on_cpu(
        self, weight: Tensor, copy: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        """Updates a copy of the weight in float32, and then the weight."""
        pinned = weight.device.type == "cuda"
        if not state:
            moments = [_on_cpu(torch.zeros_like(copy), pinned=pinned) for _ in range(2)]
            state.update(step=0, exp_avg=moments[0], exp_avg_sq=moments[1])
            if weight.dtype != torch.float32:
                state["weight"] = _on_cpu(copy, pinned=pinned)
        state["step"] += 1
        copy = state.get("weight", copy)
        adamw(
            [copy],
            [grad],
            [state["exp_avg"]],
            [state["exp_avg_sq"]],
            [],
            [torch.tensor(float(state["step"] - 1))],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=float(group["lr"]),
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        weight.copy_(copy, non_blocking=True)

    def _placed(self, value: Tensor, parameter: Tensor) -> Tensor:
        return _on_cpu(value, pinned=parameter.device.type == "cuda")


def _on_cpu(tensor: Tensor, *, pinned: bool) -> Tensor:
    """A copy on the CPU, in pinned memory on its way if a GPU takes part."""
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
    return copy.copy_(tensor, non_blocking=pinned)


def _adam(wide: list[Tensor], grad: Tensor, step: int, group: dict[str, Any]) -> None:
    """AdamW's update of a weight and its two moments in place, all in float32 (arXiv 1711.05101, algorithm 2)."""
    (weight, mean, square), (beta1, beta2) = wide, group["betas"]
    mean.lerp_(grad, 1 - beta1)
    square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    root = (square / (1 - beta2**step)).sqrt_().add_(group["eps"])
    weight.mul_(1 - float(group["lr"]) * group["weight_decay"])
    weight.addcdiv_(mean, root, value=-float(group["lr"]) / (1 - beta1**step))


def _chunks(weight: Tensor) -> Iterator[slice]:
    size = weight.numel()
    return (slice(start, min(size, start + _CHUNK)) for start in range(0, size, _CHUNK))


def _local(tensor: Any) -> Tensor:
    """A tensor, or this rank's shard of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
