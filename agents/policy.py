"""The policy module. A group's images and prompt run through the model once, in rollouts and in updates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from vlmenv.agents.attention import enable_packing, no_mask
from vlmenv.agents.base import LogProbs
from vlmenv.agents.delta_rule import keep_states_apart
from vlmenv.agents.families.base import Family
from vlmenv.agents.lean_layers import make_lean
from vlmenv.agents.linear_logprobs import capped, linear_logprobs
from vlmenv.agents.packing import Excerpt, Packing
from vlmenv.agents.passes import Groups, Pass, Prefixes
from vlmenv.agents.patch_embedding import embed_patches_by_matmul
from vlmenv.agents.rotary import keep_frequencies, rotate_at_once
from vlmenv.agents.routing import balancing_loss, recorded_logits, routers_of
from vlmenv.agents.saved_activations import dropping_recomputable
from vlmenv.agents.sending import send
from vlmenv.agents.vision_attention import attend_by_segments
from vlmenv.agents.wide_gradients import widen_gradients
from vlmenv.core.errors import ModelError
from vlmenv.core.rollout import Completion, Pictured, Prompt, Rollout, marked_ids


class ValueHead(nn.Linear):
    """A linear value head on the final hidden states, in float32 under any precision.

    Its weights start at 0, so that neither values nor their gradient disturb a trained model at first.

    Args:
        hidden_size: H.
        detach: If true, the critic's loss trains only the head, not the model.
        device: Device of the weights.
    """

    def __init__(self, hidden_size: int, *, detach: bool, device: torch.device) -> None:
        super().__init__(hidden_size, 1, device=device, dtype=torch.float32)
        self.detach = detach
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, input: Tensor) -> Tensor:
        """Computes values [...] of hidden states [..., H]."""
        with torch.autocast(input.device.type, enabled=False):
            return super().forward((input.detach() if self.detach else input).float())[..., 0]


class Policy(nn.Module):
    """The distribution over completions under a model's present weights.

    Shapes: P prompts; N completions with M tokens in all, up to L tokens each; hidden states of size H.

    Args:
        family: The model with its processor.

    Attributes:
        share_prefixes: If true, the prompt of a group runs through the model once. This is exact, in value and in
            gradient. If false, each completion repeats images and prompt with padding: slow, for comparison.
        sharded: True if ranks hold shards of the weights. Then each pass runs the vision tower, also a frozen one, so
            that the collectives of all ranks match.
        value_head: The critic's head; None without a critic.
        routers: Routers of the language model's experts.
        graph_fault: Why steps of sampling are not replayed as CUDA graphs; empty if they are. None: not tried. See
            `vlmenv.agents.step_graphs`.
    """

    def __init__(self, family: Family) -> None:
        super().__init__()
        self.family = family
        self.model = family.model
        self.share_prefixes = True
        self.sharded = False
        self.value_head: ValueHead | None = None
        self.graph_fault: str | None = None
        self._axes: int | None = None
        banned = torch.from_numpy(family.banned_tokens).to(family.model.device)
        self.register_buffer("banned", banned, persistent=False)
        enable_packing(cast(PreTrainedModel, family.language_model()))
        keep_states_apart(family.language_model())
        keep_frequencies(family.language_model())
        self.routers = routers_of(family.language_model())
        embed_patches_by_matmul(family.vision_tower())
        if family.packs_images:
            attend_by_segments(cast(PreTrainedModel, family.vision_tower()))
        self.lean_layers = make_lean(family.model)
        self.rotations = rotate_at_once(family.model)
        widen_gradients(family.model)

    def forward(self, rollout: Rollout) -> LogProbs:
        """Computes log-probabilities and entropies of a rollout's completions, and values if there is a value head."""
        with dropping_recomputable(), recorded_logits(self.routers if self.share_prefixes else []) as routed:
            hidden, packing = self.hidden_states(rollout)
        targets = self._tokens([completion.written_ids for completion in rollout.completions])
        head, temperature = self._head(), rollout.temperature or 1.0
        given = hidden, head.weight, head.bias, targets, self._banned(), temperature, self.family.logit_cap
        logprobs, entropy = linear_logprobs(*given)
        values = None if self.value_head is None else packing.pad(self.value_head(hidden))
        balance = balancing_loss(routed, self.family.experts_per_token) if routed else None
        return LogProbs(packing.pad(logprobs), packing.pad(entropy), packing.mask(), values, balance)

    def hidden_states(self, rollout: Rollout) -> tuple[Tensor, Packing]:
        """Computes the final hidden states [M, H] that predict the policy's tokens, and the packing of these."""
        packing = _packing_of(rollout.completions, self.device)
        if self.share_prefixes:
            return self._sharing(rollout, packing), packing
        return self._repeating(rollout, packing), packing

    def logits(self, hidden: Tensor) -> Tensor:
        """Computes float32 logits of hidden states [..., H]. Banned tokens have -inf."""
        logits = capped(self._head()(hidden).float(), self.family.logit_cap)
        return logits.index_fill_(-1, self._banned(), -torch.inf)

    def prefill(self, prompts: Sequence[Prompt]) -> tuple[Prefixes, Tensor]:
        """Runs prompts through the model.

        Returns:
            What completions go on from, and the final hidden states [P, H] that predict their first tokens.
        """
        packing = Packing(torch.tensor([len(prompt.input_ids) for prompt in prompts]), self.device)
        prefixes = Prefixes(packing, self._images(prompts))
        return prefixes, self._run(prompts, prefixes)[packing.ends]

    def _run(
        self,
        prompts: Sequence[Prompt],
        through: Pass,
        completions: Sequence[Completion] = (),
        after: Tensor | None = None,
    ) -> Tensor:
        """Runs images, packed prompts, and completions behind them, through the model.

        Args:
            prompts: P.
            through: The pass, which tells which tokens see which.
            completions: Completions, which run without their last token: it predicts nothing. Default: none.
            after: int64, positions of the completions' tokens. Default: none.

        Returns:
            Final hidden states of the prompts' tokens, then of the completions'.

        Raises:
            ModelError: Some of the model's blocks do not use the pass.
        """
        features = self._features([*prompts, *completions])
        later = (completion.token_ids[:-1] for completion in completions)
        output = self.model.model(
            input_ids=self.family.as_seen(self._tokens([*(prompt.input_ids for prompt in prompts), *later])[None]),
            position_ids=self._positions(prompts, after),
            attention_mask=no_mask(self.device),
            mm_encoder_outputs=None if features is None else {"image": features},
            use_cache=False,
            packed=through,
        )
        if len(through.ran) < self._layers:
            raise ModelError(
                f"{self._layers - len(through.ran)} of the language model's {self._layers} blocks have not used the "
                "packed tokens' own pass: this version of transformers computes them in another way. Install a version "
                "that vlmenv's requirements name"
            )
        hidden: Tensor = output.last_hidden_state
        return hidden.squeeze(0)  # whose backward pass, unlike that of an index, copies nothing

    def extend(self, tokens: Tensor, positions: Tensor, through: Pass) -> Tensor:
        """Runs tokens of completions through the language model.

        Args:
            tokens: int64 [M], packed.
            positions: int64 [M].
            through: The pass, which goes on from the prompts and earlier tokens.

        Returns:
            Final hidden states [M, H].

        Raises:
            RuntimeError: `prefill` has not run any prompt.
        """
        output = self.family.language_model()(
            input_ids=tokens[None],
            position_ids=self._on_axes(positions),
            attention_mask=no_mask(self.device),
            use_cache=False,
            packed=through,
        )
        hidden: Tensor = output.last_hidden_state
        return hidden.squeeze(0)  # whose backward pass, unlike that of an index, copies nothing

    @property
    def _layers(self) -> int:
        """Number of the language model's blocks."""
        return len(list(self.family.language_model().get_submodule("layers").children()))

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self._banned().device

    def _sharing(self, rollout: Rollout, packing: Packing) -> Tensor:
        """Computes `hidden_states` in one pass, with each prompt once."""
        index = torch.from_numpy(rollout.prompt_index)
        prompts = Packing(torch.tensor([len(prompt.input_ids) for prompt in rollout.prompts]), self.device)
        inputs = Packing(packing.lengths - 1, self.device)  # the last token predicts nothing
        images = self._images(rollout.prompts)
        later_images = self._later_images(rollout.completions)
        hidden = self._run(
            rollout.prompts,
            Groups(prompts, inputs, index, images, later_images) if inputs.total else Prefixes(prompts, images),
            rollout.completions,
            self._later_positions(rollout, inputs),
        )
        firsts = prompts.ends[send(index, self.device)][packing.rows]
        later = prompts.total + packing.tokens - packing.rows - 1  # the token before
        return hidden[torch.where(packing.places == 0, firsts, later)]

    def _later_positions(self, rollout: Rollout, inputs: Packing) -> Tensor:
        """Positions of the completions' tokens without each last one, [M] or [axes, M]."""
        pairs = [(rollout.prompts[i], one) for i, one in zip(rollout.prompt_index, rollout.completions, strict=True)]
        if any(completion.position_ids is not None for _, completion in pairs):
            positions = [later_positions(*pair)[:, :-1] for pair in pairs]
            return send(torch.from_numpy(np.concatenate(positions, axis=1)), self.device)
        starts = torch.tensor([next_position(prompt) for prompt, _ in pairs])
        return send(starts, self.device)[inputs.rows] + inputs.places

    def _repeating(self, rollout: Rollout, packing: Packing) -> Tensor:
        """Computes `hidden_states` with the prompt repeated for each completion, in one padded batch."""
        bare = np.setdiff1d(np.arange(len(rollout.prompts)), rollout.prompt_index)  # without any completion
        prompts = [rollout.prompts[i] for i in rollout.prompt_index]
        pairs = zip(prompts, rollout.completions, strict=True)
        rows = [*(joined(self.family, *pair) for pair in pairs), *(rollout.prompts[i] for i in bare)]
        lengths = torch.tensor([len(row.input_ids) for row in rows])
        positions = [torch.from_numpy(row.position_ids).T for row in rows]
        padded = nn.utils.rnn.pad_sequence(positions, batch_first=True).permute(2, 0, 1).to(self.device)
        features = self._look(rows) if any(row.images for row in rows) else None
        ids = [torch.from_numpy(row.input_ids) for row in rows]
        input_ids = self.family.as_seen(nn.utils.rnn.pad_sequence(ids, True).to(self.device))
        output = self.model.model(
            input_ids=input_ids,
            attention_mask=(torch.arange(int(lengths.max())) < lengths[:, None]).long().to(self.device),
            position_ids=padded if len(padded) > 1 else padded[0],
            mm_encoder_outputs=None if features is None else {"image": features},
            use_cache=False,
            **self.family.unpacked_arguments(input_ids),
        )
        starts = torch.tensor([len(prompt.input_ids) - 1 for prompt in prompts], device=self.device)
        hidden: Tensor = output.last_hidden_state
        return hidden[packing.rows, starts[packing.rows] + packing.places]

    def _features(self, holders: Sequence[Pictured]) -> Any:
        """Computes features of images, joined. Those of a frozen tower are cached per prompt or completion."""
        shown = [one for one in holders if one.images]
        if not shown:
            return None
        if self.sharded or self.family.sees_by_trained_weights():
            return self._look(shown)
        return self.family.join_features([self._frozen_features(one) for one in shown])

    def _frozen_features(self, holder: Pictured) -> Any:
        """Features of images by the frozen vision tower, which a reference may share."""
        tower = self.family.vision_tower()
        known = _FEATURES.get(holder)
        if known is None or known[0] is not tower:
            known = _FEATURES[holder] = tower, self._look([holder])
        return known[1]

    def _look(self, holders: Sequence[Pictured]) -> Any:
        """Runs images through the vision tower."""
        inputs = self.family.vision_inputs(self.family.join_images(holders), self.device)
        return self.model.model.get_image_features(**inputs, return_dict=True)

    def _images(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        """Images whose tokens attend to each other in both directions, as `Prefixes` takes them."""
        if not self.family.sees_both_ways or not any(prompt.images for prompt in prompts):
            return {}
        return self._seen_both_ways([prompt.input_ids for prompt in prompts])

    def _later_images(self, completions: Sequence[Completion]) -> dict[str, Tensor]:
        """The same of completions, each without its last token."""
        if not self.family.sees_both_ways or not any(completion.images for completion in completions):
            return {}
        return self._seen_both_ways([completion.token_ids[:-1] for completion in completions])

    def _seen_both_ways(self, rows: Sequence[NDArray[np.int64]]) -> dict[str, Tensor]:
        images = self._tokens([self.family.images_seen_both_ways(row) for row in rows])
        return dict.fromkeys(self.family.sees_both_ways, images)

    def _tokens(self, rows: Sequence[NDArray[np.int64]]) -> Tensor:
        """Concatenates rows of token ids to [M]."""
        return send(torch.from_numpy(np.concatenate(rows)), self.device)

    def _positions(self, prompts: Sequence[Prompt], after: Tensor | None) -> Tensor:
        """Positions of packed prompts and what follows, [axes, 1, M], or [1, M] for a single axis."""
        positions = torch.from_numpy(np.concatenate([prompt.position_ids for prompt in prompts], axis=1))
        self._axes, positions = len(positions), send(positions, self.device)
        return self._on_axes(positions if after is None else torch.cat([positions, after.expand(self._axes, -1)], 1))

    def _on_axes(self, positions: Tensor) -> Tensor:
        """Positions [M] or [axes, M] in the shape that the model takes."""
        if self._axes is None:
            raise RuntimeError("extend() continues prompts: call prefill() first")
        return positions.expand(self._axes, -1)[:, None] if self._axes > 1 else positions.view(1, -1)

    def _head(self) -> nn.Linear:
        head = self.model.get_output_embeddings()
        assert head is not None
        return cast(nn.Linear, head)

    def _banned(self) -> Tensor:
        return self.get_buffer("banned")


_FEATURES: WeakKeyDictionary[Pictured, tuple[nn.Module, Any]] = WeakKeyDictionary()
"""Cache by prompt or completion of a frozen vision tower and its features; an entry is dropped with its key."""


def _packing_of(completions: Sequence[Completion], device: torch.device) -> Packing:
    """Packing of the policy's tokens."""
    packing = Packing(torch.tensor([len(one.token_ids) for one in completions]), device)
    if all(one.written is None for one in completions):
        return packing
    written = [np.ones(len(one.token_ids), np.bool_) if one.written is None else one.written for one in completions]
    return Excerpt(packing, torch.from_numpy(np.concatenate(written)))


def next_position(prompt: Prompt) -> int:
    """Position of the first token after a prompt, the same on all axes."""
    return int(prompt.position_ids[0, -1]) + 1


def later_positions(prompt: Prompt, completion: Completion) -> NDArray[np.int64]:
    """Positions [axes, L] of a completion's tokens."""
    if completion.position_ids is not None:
        return completion.position_ids
    places = next_position(prompt) + np.arange(len(completion.token_ids))
    return np.tile(places, (len(prompt.position_ids), 1))


def joined(family: Family, prompt: Prompt, completion: Completion) -> Prompt:
    """A prompt with its completion, as one prompt."""
    return Prompt(
        np.concatenate([prompt.input_ids, completion.token_ids]),
        np.concatenate([prompt.position_ids, later_positions(prompt, completion)], axis=1),
        family.join_images([prompt, completion]) if completion.images else prompt.images,
        marked_ids([prompt, completion]),
    )
