"""Checks that trainer, published processor, engine and vision tower agree on prompts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from vlmenv.doctor.subject import GROUP, Seen, Subject, Unchecked
from vlmenv.runs.fitting import prompt_faults
from vlmenv.runs.lengths import can_be_counted

Ids = list[int]


def lengths(subject: Subject) -> Seen:
    """Checks that all prompts leave room for the answer."""
    found, room, task = subject.lengths, subject.room, subject.task
    told = f"{found}; there is room for {room.prompt:,}"
    faults = dict(prompt_faults(task, found, room)) if can_be_counted(task) else {}
    if not faults:
        return told, ""
    first = next(iter(faults.values()))
    left_out = f"{len(faults):,} of {len(found.tokens):,} prompts cannot be taken, the first: {first}. {told}"
    return (left_out, "") if task.skip_broken else (left_out, f"What helps: {room.help}.")


def image_features(subject: Subject) -> Seen:
    """Checks that the vision tower gives one feature per image token."""
    family, total = subject.agent.family, 0
    for name, observation in zip(subject.ids, subject.shown[::GROUP], strict=True):
        if not observation["images"] and not observation.get("videos"):
            continue
        inputs, written = family.process_shown([*observation["images"], *observation.get("videos", ())])
        pads = [family.image_token, *([family.video_token] if family.takes_videos else [])]
        tokens = sum(text.count(pad) for text in written for pad in pads)
        features = _count_features(subject, inputs)
        if features != tokens:
            subject.blocked = "the image processor does not go with the vision tower"
            wrong = "The image processor does not go with this vision tower (its patch_size and merge_size, for one)."
            told = f"{tokens} image tokens for {features} features, of sample {name}"
            return told, _remedy(subject, wrong, "preprocessor_config.json")
        total += tokens
    if not total:
        raise Unchecked("these samples have no images")
    return f"{total} features for {total} image tokens", ""


@torch.no_grad()
def _count_features(subject: Subject, inputs: dict[str, Tensor]) -> int:
    model: Any = subject.agent.family.model
    on_device = {name: tensor.to(subject.device) for name, tensor in inputs.items()}
    found = model.get_image_features(**on_device, return_dict=True).pooler_output
    return sum(one.shape[:-1].numel() for one in found)


def prompt_text(subject: Subject) -> Seen:
    """Compares the text tokens of prompts."""
    for whose, ours, theirs in _readings(subject):
        if told := _difference(subject, _text(subject, ours), _text(subject, theirs)):
            return f"{told} {whose}", _remedy(
                subject, "Chat template or tokenizer differ.", "chat_template.jinja and the tokenizer's files"
            )
    count = sum(len(_text(subject, one.input_ids.tolist())) for one in subject.prompts)
    return f"{count} tokens in {len(subject.prompts)} prompts", ""


def prompt_images(subject: Subject) -> Seen:
    """Compares the image tokens of prompts, and their pixels."""
    remedy = _remedy(
        subject, "Image processors differ (min_pixels and max_pixels, for one).", "preprocessor_config.json"
    )
    total = 0
    for whose, *readings in _readings(subject):
        ours, theirs = (sum(token in _modality(subject) for token in ids) for ids in readings)
        if ours != theirs:
            return f"{ours} image tokens are the trainer's, {theirs} {whose}", remedy
        total += ours
    for prompt, (_, inputs), name in zip(subject.prompts, subject.published, subject.ids, strict=True):
        if gap := max((_gap(prompt.images[key], inputs[key]) for key in prompt.images), default=0.0):
            return f"pixels differ by {gap:.2g} from the published processor's, of sample {name}", remedy
    return f"{total} tokens in {len(subject.prompts)} prompts, of the same pixels", ""


def _readings(subject: Subject) -> Iterator[tuple[str, Ids, Ids]]:
    """Encodings to compare: the owner's name, the trainer's tokens, and the owner's."""
    if (found := subject.engine_reading) is not None:
        yield "the engine's", list(found.ours), list(found.theirs)
    for prompt, (theirs, _), name in zip(subject.prompts, subject.published, subject.ids, strict=True):
        yield f"the published processor's, of sample {name}", prompt.input_ids.tolist(), theirs.tolist()


def _difference(subject: Subject, ours: Ids, theirs: Ids) -> str:
    """The first difference of two encodings, to be followed by the owner's name; empty if there is none."""
    if ours == theirs:
        return ""
    pairs = zip(ours, theirs, strict=False)
    place = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(theirs)))
    decode = subject.agent.family.processor.tokenizer.decode
    shown = [repr(decode(ids[max(0, place - 2) : place + 6])) for ids in (ours, theirs)]
    return f"from text token {place} on, {shown[0]} is the trainer's, {shown[1]}"


def _modality(subject: Subject) -> set[int]:
    return subject.agent.family.modality_tokens()


def _text(subject: Subject, ids: Ids) -> list[int]:
    """The tokens of a prompt, with one token per image."""
    kinds, mark = _modality(subject), subject.agent.family.model.config.image_token_id
    firsts = [i for i, token in enumerate(ids) if token not in kinds or i == 0 or ids[i - 1] not in kinds]
    return [mark if ids[i] in kinds else ids[i] for i in firsts]


def _gap(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference of two tensors, which may have different shapes."""
    if ours.numel() != theirs.numel():
        return float("inf")
    return float((ours.reshape(theirs.shape).double() - theirs.double()).abs().max())


def _remedy(subject: Subject, wrong: str, files: str) -> str:
    source = subject.config.published or "the published model"
    served = "" if subject.config.generation.engine == "hf" else ", and let the engine serve that folder"
    return f"{wrong} Copy {files} from {source} into {subject.agent.folder}{served}."
