"""Layers with a convolution and a gated delta rule (arXiv 2412.06464), over packed sequences that share prompts.

A prompt leaves a state of fixed size and its last inputs of the convolution. All completions begin with both. Nothing
is changed in place, so that gradients of all completions add up in the prompt's. The rule is that of transformers,
which is flash-linear-attention's where that is installed. It computes in float32 whatever the type of the weights.

Shapes: P prompts of up to T tokens; M packed tokens; C channels of the convolution, of K taps; H heads.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from vlmenv.agents.packing import Packing
from vlmenv.agents.passes import Groups, Mixer, Pass, Past, Prefixes, Steps

_NAMES = ("GatedDeltaNet",)
"""Ends of the names of classes of transformers that compute so."""


class States(Past):
    """The state of each row after its last token.

    Args:
        inputs: [P, K - 1, C], the last inputs of the convolution, with zeros before the first token.
        rule: [P, H, D, E], the state of the delta rule.
    """

    def __init__(self, inputs: Tensor, rule: Tensor) -> None:
        self.inputs, self.rule = inputs, rule

    @property
    def latest(self) -> States:
        """Those after the last token."""
        return self

    def select(self, rows: Tensor) -> States:
        latest = self.latest
        return States(latest.inputs[rows], latest.rule[rows])

    @classmethod
    def joined(cls, parts: Sequence[States]) -> States:
        return cls(torch.cat([part.inputs for part in parts]), torch.cat([part.rule for part in parts]))


class _Fixed(States):
    """States in memory that stays where it is, for steps of fixed shapes.

    Such a step may be computed again, as each graph is once. So the states before the last token are held beside those
    after it, and become these when another place is computed.

    Args:
        states: Those before the next token.
        place: int64 [1], the place of that token.
        packing: Packing of one token of each row.
    """

    def __init__(self, states: States, place: Tensor, packing: Packing) -> None:
        super().__init__(states.inputs.clone(), states.rule.clone())
        self._next_inputs, self._next_rule = states.inputs.clone(), states.rule.clone()
        self._place, self.packing = place.clone(), packing

    @property
    def latest(self) -> States:
        return States(self._next_inputs, self._next_rule)

    def before(self, place: Tensor) -> States:
        """Those before the token at a place: the last one again, or the one after it."""
        goes_on = place > self._place
        torch.where(goes_on, self._next_inputs, self.inputs, out=self.inputs)
        torch.where(goes_on, self._next_rule, self.rule, out=self.rule)
        self._place.copy_(place)
        return self

    def keep(self, states: States) -> None:
        """Notes those after the token."""
        self._next_inputs.copy_(states.inputs)
        self._next_rule.copy_(states.rule)


class DeltaRule(Mixer):
    """A convolution, and a gated delta rule on what it gives.

    Its tensors are queries, keys and values before the convolution [M, C], the log of the decay [M, H], and the rate
    of the update [M, H].

    Args:
        layer: The layer with the weights.
    """

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    def prompts(self, prefixes: Prefixes, *packed: Tensor) -> tuple[Tensor, States]:
        return self._run(prefixes.packing, None, *packed)

    def groups(self, groups: Groups, *packed: Tensor) -> Tensor:
        prompts, completions = groups.split(*packed)
        before, states = self._run(groups.prompts, None, *prompts)
        after, _ = self._run(groups.completions, states.select(groups.index), *completions)
        return torch.cat([before, after])

    def step(self, steps: Steps, block: int, *packed: Tensor) -> Tensor:
        own = steps.own.get(block)
        if own is None:  # the first token: until now the prompt's state has served all its completions
            own = steps.prefixes.past.pop(block).select(steps.index)
        assert isinstance(own, States)
        if steps.place is None:
            out, steps.own[block] = self._run(_of_one_token(packed[0]), own.latest, *packed)
            return out
        fixed = own if isinstance(own, _Fixed) else _Fixed(own, steps.place, _of_one_token(packed[0]))
        out, after = self._run(fixed.packing, fixed.before(steps.place), *packed)
        fixed.keep(after)
        steps.own[block] = fixed
        return out

    def _run(
        self, packing: Packing, states: States | None, mixed: Tensor, decay: Tensor, rate: Tensor
    ) -> tuple[Tensor, States]:
        """Computes sequences from their states on: outputs [M, H, E], and their states afterwards."""
        taps, padded = self.layer.conv_kernel_size - 1, packing.pad(mixed)
        before = padded.new_zeros(len(padded), taps, padded.shape[2]) if states is None else states.inputs
        inputs = torch.cat([before.to(padded.dtype), padded], dim=1)
        query, key, value = self._heads(self._convolved(inputs)[:, taps:])
        # Padding at the right has decay 1 and rate 0, which leave the state as it is.
        with torch.autocast(mixed.device.type, enabled=False):
            rule = self._function("torch_recurrent_gated_delta_rule" if packing.longest == 1 else _CHUNKED)
            out, state = rule(
                *(query, key, value),
                g=packing.pad(decay),
                beta=packing.pad(rate),
                initial_state=None if states is None else states.rule,
                output_final_state=True,
                use_qk_l2norm_in_kernel=True,
            )
        return packing.unpad(out), States(_last(inputs, packing, taps), state)

    def _convolved(self, inputs: Tensor) -> Tensor:
        """[P, K - 1 + T, C], of which the first K - 1 are of no use."""
        layer = self.layer
        weight, bias = layer.conv1d.weight.squeeze(1), layer.conv1d.bias
        out: Tensor = self._function("causal_conv1d_fn")(
            inputs.transpose(1, 2), weight, bias, activation=layer.activation
        )
        return out.transpose(1, 2)

    def _heads(self, convolved: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [P, T, H, D]; those of a key head serve several value heads."""
        layer = self.layer
        query, key, value = torch.split(convolved, [layer.key_dim, layer.key_dim, layer.value_dim], dim=-1)
        query, key, value = (
            one.reshape(*one.shape[:-1], -1, size)
            for one, size in ((query, layer.head_k_dim), (key, layer.head_k_dim), (value, layer.head_v_dim))
        )
        shared = layer.num_v_heads // layer.num_k_heads
        if shared > 1:
            query, key = (one.repeat_interleave(shared, dim=2) for one in (query, key))
        return query, key, value

    def _function(self, name: str) -> Callable[..., Any]:
        """A function of the layer's own module in transformers."""
        return cast(Callable[..., Any], getattr(sys.modules[type(self.layer).published.__module__], name))


_CHUNKED = "torch_chunk_gated_delta_rule"


def _of_one_token(tokens: Tensor) -> Packing:
    """The packing of rows of one token each."""
    return Packing(torch.ones(len(tokens), dtype=torch.int64), tokens.device)


def _last(inputs: Tensor, packing: Packing, taps: int) -> Tensor:
    """The last inputs [P, K - 1, C] of each row of [P, K - 1 + T, C]."""
    if packing.is_even:
        return inputs[:, packing.longest :].clone()  # of a step too, which may not send places to the device
    places = packing.counts[:, None] + torch.arange(taps, device=inputs.device)
    return inputs.gather(1, places[..., None].expand(-1, -1, inputs.shape[2]).long())


def _forward(self: Any, hidden_states: Tensor, *args: Any, packed: Pass | None = None, **arguments: Any) -> Tensor:
    """As the published layer; packed tokens [1, M, ...] by the pass, which keeps sequences apart."""
    if packed is None:
        return cast(Tensor, self.published.forward(self, hidden_states, *args, **arguments))
    hidden = hidden_states[0]
    rate, change = self.in_proj_b(hidden).sigmoid(), self.in_proj_a(hidden).float() + self.dt_bias
    decay = -self.A_log.float().exp() * nn.functional.softplus(change)
    out = packed.mix(self.layer_idx, DeltaRule(self), self.in_proj_qkv(hidden), decay, rate)
    gate = self.in_proj_z(hidden).reshape(-1, self.head_v_dim)
    normed = self.norm(out.reshape(-1, self.head_v_dim), gate)
    return cast(Tensor, self.out_proj(normed.view(len(hidden), -1))[None])


_classes: dict[type[nn.Module], type[nn.Module]] = {}


def keep_states_apart(language_model: nn.Module) -> None:
    """Makes the delta rules of a language model use the `Pass` that they are given as `packed`."""
    for module in language_model.modules():
        kind = type(module)
        if kind.__name__.endswith(_NAMES) and not hasattr(kind, "published"):
            if kind not in _classes:
                _classes[kind] = type(kind.__name__, (kind,), {"published": kind, "forward": _forward})
            module.__class__ = _classes[kind]
