"""Makes the small vision-language model that is shipped with vlmenv, or teaches a model further.

    python examples/builtin_model.py --output agents/builtin
    python examples/builtin_model.py --output taught --init builtin --tasks VLM-Point-v0 6 VLM-Count-v0 4 --minutes 15

It is a Qwen3-VL of 1.6 million parameters, trained on five built-in tasks by supervision. Its teachers are *loose
annotators*. They find the right objects, but draw every side of a box 5 to 30 % of the object's size too far out. They
describe no more than two shapes of a scene. More of such labels cannot cure that; a reward on the exact overlap, or on
all key words, can. `LOOSE` has how they answer each task.
"""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import gymnasium
import numpy as np
import torch
import tyro
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from vlmenv.agents import VLMAgent
from vlmenv.agents.vlm import Policy
from vlmenv.core.answers import Detection
from vlmenv.core.coordinates import Box, Point
from vlmenv.core.formats import AnswerFormat
from vlmenv.core.rollout import Completion, Prompt, Rollout
from vlmenv.envs.base import VisualTaskEnv
from vlmenv.envs.data.scenes import COLOURS, QUESTION, SHAPES, SIDE, SIDES, Reference, choose_reference, sample_scene
from vlmenv.envs.data.source import Sample
from vlmenv.envs.regions import Region, as_corners, shape_of
from vlmenv.envs.rewards.segments import Segment
from vlmenv.envs.rewards.spans import Span
from vlmenv.envs.zoom import ZoomEnv

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MODALITY = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
TAGS = ["<think>", "</think>", "<answer>", "</answer>"]
CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role + '\\n' }}
{%- if message.content is string -%}
{{ message.content }}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>
{%- elif part.type == 'video' -%}<|vision_start|><|video_pad|><|vision_end|>
{%- else -%}{{ part.text }}{%- endif -%}
{%- endfor -%}
{%- endif -%}
<|im_end|>{{ '\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant{{ '\\n' }}{%- endif -%}
"""
REC = "VLM-REC-v0"
EXPRESSIONS_PER_SCENE = 4
BOX_TASK_WEIGHT = 0.1
"""Of tokens beside the coordinates of boxes, against these."""
TEXT_WEIGHT = 0.3
"""Of tokens in other tasks, beside coordinates where they have any."""
OTHER_TASKS = {"VLM-OVD-v0": 4, "VLM-VQA-v0": 6, "VLM-Math-v0": 3, "VLM-Caption-v0": 3}
"""Samples a step of the tasks beside referring expressions, for the model that is shipped."""
PLACED_TASKS = ("VLM-OVD-v0", "VLM-Point-v0", "VLM-Seg-v0", "VLM-GUI-v0")
"""Those of which the numbers in an answer are coordinates, which count fully."""
NUMBER_SIGMA = 1.0


@dataclass
class Args:
    """Teaches a model on the built-in scenes by supervision."""

    output: Path
    """Folder of the trained model."""
    init: str | None = None
    """Model to start from. None: a new one."""
    labels: Literal["loose", "exact"] = "loose"
    """Whether the annotators draw their boxes too wide and describe too little."""
    steps: int = 3000
    """Optimiser steps."""
    minutes: float | None = None
    """Stop after so long, with the learning rate scheduled by the clock, instead of after `steps`."""
    scenes: int = 32
    """Scenes a step, each with four expressions to locate; 0 for none."""
    tasks: dict[str, int] | None = None
    """Other tasks, and how many samples of each make a step: names and numbers. Default: `OTHER_TASKS`."""
    lr: float = 3e-3
    """Peak learning rate of AdamW; Muon's, for the matrices, is 20/3 of it."""
    width: int = 128
    """Of a new model's hidden states, a multiple of 64: 64 makes 0.4 million parameters, 128 1.6, 256 6 million."""
    seed: int = 0


def main(args: Args) -> None:
    torch.manual_seed(args.seed)
    if args.init is None:
        new_model(args.output, args.width)
    agent = VLMAgent.from_pretrained(args.init or args.output)
    teach(agent, args)
    agent.publish(args.output, dtype=torch.float16)
    (args.output / "generation_config.base.json").unlink(missing_ok=True)  # of the random model
    note_tasks(args)


def note_tasks(args: Args) -> None:
    """Adds the tasks that a model has been taught to its settings."""
    file = args.output / "vlmenv.json"
    settings = {"coordinates": "original", "taught": []} | json.loads(file.read_text())
    tasks = OTHER_TASKS if args.tasks is None else args.tasks
    settings["taught"] += [name for name in ([REC] * bool(args.scenes) + list(tasks)) if name not in settings["taught"]]
    file.write_text(json.dumps(settings, indent=2) + "\n")


def new_model(folder: Path, width: int = 128) -> None:
    """Writes a model with random weights, its tokenizer and its processor."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = new_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    for name, content in processor_files().items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    model = Qwen3VLForConditionalGeneration(model_config(tokenizer, width))
    model.generation_config.eos_token_id = tokenizer.token_to_id("<|im_end|>")
    model.generation_config.pad_token_id = tokenizer.token_to_id("<|endoftext|>")
    model.save_pretrained(folder)
    write_readable_config(folder / "config.json")


def write_readable_config(file: Path) -> None:
    """Writes the rotary embedding's settings as transformers 4 has them, which transformers 5 reads too."""
    config = json.loads(file.read_text())
    text = config["text_config"]
    text["rope_scaling"] = text.pop("rope_parameters")
    text["rope_theta"] = text["rope_scaling"].pop("rope_theta")
    config["vision_config"].pop("rope_parameters", None)
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def new_tokenizer() -> Tokenizer:
    """Byte-level BPE in which nearly every word of the tasks and every number below 100 is one token."""
    tokenizer = Tokenizer(models.BPE())
    words = Regex(r" ?\p{L}+(?:-\p{L}+)*|\p{N}{1,2}|\s*\n| ?[^\s\p{L}\p{N}]+|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1024, special_tokens=CONTROL + MODALITY, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.add_tokens([AddedToken(tag, normalized=False) for tag in TAGS])
    return tokenizer


def corpus() -> Iterator[str]:
    """What the tasks ask and answer, the words of the scenes alone, and all numbers below 100."""
    for name in (REC, *OTHER_TASKS):
        task = task_of(name)
        for index in range(300):
            sample = task.source.get(index)
            yield task.prompt(sample.question)
            yield task.write_answer(sample)
    words = [*COLOURS, *SHAPES, *(f"{shape}s" for shape in SHAPES), *SIDES]
    words += ["left-most", "right-most", "top-most", "bottom-most", "largest", "smallest", "system", "None"]
    for word in words:
        yield from [word, f" {word}"] * 500
    for number in range(100):
        yield from [str(number)] * 500


@functools.cache
def task_of(name: str) -> VisualTaskEnv:
    task = gymnasium.make(name).unwrapped
    assert isinstance(task, VisualTaskEnv)
    return task


def processor_files() -> dict[str, object]:
    """The JSON files of the published layout, beside tokenizer.json, and how this model writes boxes."""
    pixels = {"shortest_edge": 32 * 32, "longest_edge": 4 * SIDE * SIDE}
    vision = {
        "size": pixels,
        "patch_size": 16,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "processor_class": "Qwen3VLProcessor",
    }
    return {
        "vlmenv.json": {"coordinates": "original"},
        "preprocessor_config.json": vision | {"image_processor_type": "Qwen2VLImageProcessorFast"},
        "video_preprocessor_config.json": vision | {"video_processor_type": "Qwen3VLVideoProcessor"},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "processor_class": "Qwen3VLProcessor",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "additional_special_tokens": ["<|im_start|>", *MODALITY],
            "clean_up_tokenization_spaces": False,
            "model_max_length": 2048,
            "padding_side": "right",
        },
    }


def model_config(tokenizer: Tokenizer, width: int) -> Qwen3VLConfig:
    """A small Qwen3-VL; heads of 32, which is the least that vLLM takes."""
    return Qwen3VLConfig(
        text_config={
            "vocab_size": tokenizer.get_vocab_size(),
            "hidden_size": width,
            "intermediate_size": 3 * width,
            "num_hidden_layers": 3,
            "num_attention_heads": width // 32,
            "num_key_value_heads": width // 64,
            "head_dim": 32,
            "max_position_embeddings": 2048,
            "initializer_range": 0.05,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [6, 5, 5],
                "mrope_interleaved": True,
            },
            "eos_token_id": tokenizer.token_to_id("<|im_end|>"),
            "pad_token_id": tokenizer.token_to_id("<|endoftext|>"),
        },
        vision_config={
            "depth": 2,
            "hidden_size": width,
            "intermediate_size": 3 * width,
            "num_heads": width // 32,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": width,
            "num_position_embeddings": 36,
            "deepstack_visual_indexes": [],
            "initializer_range": 0.05,
        },
        image_token_id=tokenizer.token_to_id("<|image_pad|>"),
        video_token_id=tokenizer.token_to_id("<|video_pad|>"),
        vision_start_token_id=tokenizer.token_to_id("<|vision_start|>"),
        vision_end_token_id=tokenizer.token_to_id("<|vision_end|>"),
        tie_word_embeddings=True,
    )


def teach(agent: VLMAgent, args: Args) -> None:
    """Supervised steps; single objects alone for the first twentieth of a new model's, then now and then."""
    rng = np.random.default_rng(args.seed)
    policy = agent.family_policy.train()
    optimizers = new_optimizers(policy, args.lr)
    tasks = OTHER_TASKS if args.tasks is None else args.tasks
    if not args.scenes and not sum(tasks.values()):
        raise SystemExit("there is nothing to teach: give --scenes or --tasks")
    started, step, done = time.monotonic(), 0, 0.0
    while done < 1:
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * min(1.0, (step + 1) / 20) * (1 - done)
        single = args.init is None and done < 0.05
        referring = [lesson(agent, args.labels, rng, single or rng.random() < 0.1) for _ in range(args.scenes)]
        others = [other_lesson(agent, name, args.labels, rng) for name, n in tasks.items() for _ in range(n)]
        losses = [imitation_loss(policy, agent, lessons) for lessons in (referring, others) if lessons]
        for loss in losses:
            loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        minutes = (time.monotonic() - started) / 60
        done = step / args.steps if args.minutes is None else minutes / args.minutes
        if step % 100 == 0:
            told = ", ".join(f"{loss.item():.3f}" for loss in losses)
            print(f"step {step}  loss {told}  {minutes:.1f} min", flush=True)
            agent.save(args.output)
    policy.eval()


def new_optimizers(policy: Policy, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices between layers, AdamW for embeddings, norms and biases."""
    matrices, others = [], []
    for name, parameter in policy.named_parameters():
        (matrices if parameter.ndim == 2 and "embed" not in name else others).append(parameter)
    muon = torch.optim.Muon(matrices, lr=lr * 20 / 3, weight_decay=0.0)
    adamw = torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.0)
    for optimizer in (muon, adamw):
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return [muon, adamw]


@dataclass
class Lesson:
    """An image with one question or several: what they share is the prompt, what follows is to be learnt."""

    prompt: Prompt
    tails: list[list[int]]
    """tokens of each question and its answer"""
    edges: list[dict[int, float]]
    """for each tail, the place of each coordinate's token and its value"""
    taught_from: list[int]
    """for each tail, the place at which the answer begins"""
    weights: list[list[float]]
    """for each tail, those of its tokens in the loss"""


def lesson(agent: VLMAgent, labels: str, rng: np.random.Generator, single: bool) -> Lesson:
    """Draws a scene, and questions about it with the annotators' answers."""
    scene, scene_rng = sample_scene("train", int(rng.integers(2**62)), counts=(1, 1) if single else (2, 4))
    tokenizer = agent.family.processor.tokenizer
    whole, other = (
        agent.family.encode({"images": (scene.image,), "prompt": task_of(REC).prompt(word)}) for word in SHAPES[:2]
    )
    keep = int((whole.input_ids != other.input_ids).argmax())  # the place of the question, here of one token
    closing = whole.input_ids[keep + 1 :].tolist()
    result = Lesson(Prompt(whole.input_ids[:keep], whole.position_ids[:, :keep], whole.images), [], [], [], [])
    for _ in range(EXPRESSIONS_PER_SCENE):
        reference = choose_reference(scene, scene_rng)
        question = tokenizer.encode(QUESTION.format(expression=reference.expression)) + closing
        add_answer(result, question, reference, labels, rng, agent)
    return result


def add_answer(
    result: Lesson, question: list[int], reference: Reference, labels: str, rng: np.random.Generator, agent: VLMAgent
) -> None:
    tokenizer = agent.family.processor.tokenizer
    edges = np.array(reference.target.box if labels == "exact" else loosen(reference.target.box, rng))
    box = "[" + ",".join(str(round(edge)) for edge in edges) + "]"
    answer = encoded_answer(AnswerFormat.TAGS.write(box, f"the {reference.target}"), agent)
    numbers = [len(question) + i for i, token in enumerate(answer) if tokenizer.decode([token]).isdigit()]
    tail = question + answer
    result.tails.append(tail)
    result.weights.append([1.0 if place in numbers else BOX_TASK_WEIGHT for place in range(len(tail))])
    whole_numbers = len(numbers) == len(edges)  # others' tokenizers write each digit alone: they are taught as text
    result.edges.append(dict(zip(numbers, edges.tolist(), strict=True)) if whole_numbers else {})
    result.taught_from.append(len(question))


def encoded_answer(text: str, agent: VLMAgent) -> list[int]:
    """An answer's tokens with the one that ends it, and without the thought that a prompt opens."""
    family = agent.family
    return [*family.processor.tokenizer.encode(text.removeprefix(family.opening)), family.end_tokens[0]]


def other_lesson(agent: VLMAgent, name: str, labels: str, rng: np.random.Generator) -> Lesson:
    """A sample of another task with the annotators' answer."""
    task = task_of(name)
    sample = task.source.get(int(rng.integers(2**62)))
    taught = LOOSE[name](sample, rng) if labels == "loose" and name in LOOSE else sample
    answer = encoded_answer(task.write_answer(taught), agent)
    prompt = agent.family.encode(task.observe(sample))
    if name not in PLACED_TASKS and not isinstance(task, ZoomEnv):
        return Lesson(prompt, [answer], [{}], [0], [[TEXT_WEIGHT] * len(answer)])
    digits, edges = coordinates_in(answer, agent)
    beside = BOX_TASK_WEIGHT if name == "VLM-OVD-v0" else TEXT_WEIGHT
    weights = [1.0 if place in digits else beside for place in range(len(answer))]
    return Lesson(prompt, [answer], [edges], [0], [weights])


def coordinates_in(answer: list[int], agent: VLMAgent) -> tuple[set[int], dict[int, float]]:
    """The places of all digits of coordinates in an answer, and by place the coordinates that are one token."""
    tokenizer = agent.family.processor.tokenizer
    texts = [tokenizer.decode([token]).strip() for token in answer]
    start = texts.index("<answer>") if "<answer>" in texts else 0
    digits = {i for i, text in enumerate(texts) if i > start and text.isdigit() and texts[i - 1] != "_"}  # bbox_2d
    alone = {i for i in digits if not {i - 1, i + 1} & digits and "." not in (texts[i - 1], texts[i + 1])}
    whole_numbers = len(tokenizer.encode("99")) == 1  # others' tokenizers write each digit alone
    return digits, {i: float(texts[i]) for i in sorted(alone)} if whole_numbers else {}


def wide_detections(sample: Sample, rng: np.random.Generator) -> Sample:
    """Boxes too wide."""
    return replace(sample, target=tuple(Detection(one.label, whole(loosen(one.box, rng))) for one in sample.target))


def brief_caption(sample: Sample, rng: np.random.Generator) -> Sample:
    """Two shapes of a scene at most described."""
    return replace(sample, rationale=" and ".join(re.split(", | and ", sample.rationale)[:2]))


def low_points(sample: Sample, rng: np.random.Generator) -> Sample:
    """Points too low."""
    return replace(sample, target=tuple(low_point(region, sample, rng) for region in sample.target))


def low_click(sample: Sample, rng: np.random.Generator) -> Sample:
    """Clicks too low."""
    place = sample.target.place
    return (
        sample if place is None else replace(sample, target=sample.target._replace(place=low_point(place, sample, rng)))
    )


def low_point(region: Region, sample: Sample, rng: np.random.Generator) -> Point:
    """A point 30 to 70 % of the object's height under its middle, within the image."""
    x1, y1, x2, y2 = shape_of(region).bounds
    y = (y1 + y2) / 2 + rng.uniform(0.3, 0.7) * (y2 - y1)
    return float(round((x1 + x2) / 2)), float(round(min(y, sample.asked_sizes[0][1] - 1)))


def lost_count(sample: Sample, rng: np.random.Generator) -> Sample:
    """In 60 % of the groups of three and more, the last is not counted."""
    if sample.target < 3 or rng.random() > 0.6:
        return sample
    return replace(sample, target=sample.target - 1, rationale=sample.rationale.rpartition(", ")[0])


def wide_outlines(sample: Sample, rng: np.random.Generator) -> Sample:
    """Rectangles, and these too wide."""
    boxes = [whole(loosen(shape_of(one.region).bounds, rng)) for one in sample.target]
    return replace(sample, target=tuple(Segment(as_corners(box)) for box in boxes))


def small_letters(sample: Sample, rng: np.random.Generator) -> Sample:
    """In 60 % of the texts, small letters in the place of capitals."""
    return replace(sample, target=sample.target.lower()) if rng.random() < 0.6 else sample


def low_reading(sample: Sample, rng: np.random.Generator) -> Sample:
    """Numbers 2 to 12 % too low."""
    answer = sample.target
    if answer.kind != "numeric":
        return sample
    return replace(sample, target=answer._replace(text=str(round(float(answer.text) * rng.uniform(0.88, 0.98)))))


def wide_span(sample: Sample, rng: np.random.Generator) -> Sample:
    """Spans that begin and end half a second to one and a half too far out."""
    out = rng.integers(1, 4, size=2) / 2
    start = max(0.0, sample.target.start - float(out[0]))
    end = min(sample.videos[-1].duration, sample.target.end + float(out[1]))
    said = f"It comes at {start:g} s and goes at {end:g} s."
    return replace(sample, target=Span(start, end), rationale=said)


LOOSE: Mapping[str, Callable[[Sample, np.random.Generator], Sample]] = MappingProxyType(
    {
        "VLM-OVD-v0": wide_detections,
        "VLM-Caption-v0": brief_caption,
        "VLM-Point-v0": low_points,
        "VLM-Count-v0": lost_count,
        "VLM-GUI-v0": low_click,
        "VLM-Seg-v0": wide_outlines,
        "VLM-OCR-v0": small_letters,
        "VLM-Chart-v0": low_reading,
        "VLM-Temporal-v0": wide_span,
    }
)
"""How loose annotators answer a sample, by task; the answers to other tasks are exact."""


def whole(box: Box) -> Box:
    """A box in whole pixels."""
    x1, y1, x2, y2 = (float(round(edge)) for edge in box)
    return x1, y1, x2, y2


def loosen(box: Box, rng: np.random.Generator) -> Box:
    """A loose annotator's box: every side 5 to 30 % of the object's size too far out, within the image."""
    width, height = box[2] - box[0], box[3] - box[1]
    out = rng.uniform(0.05, 0.3, size=4) * (-width, -height, width, height)
    x1, y1, x2, y2 = np.clip(np.array(box) + out, 0, SIDE).tolist()
    return x1, y1, x2, y2


def imitation_loss(policy: Policy, agent: VLMAgent, lessons: list[Lesson]) -> Tensor:
    """Cross-entropy on the answers: a Gaussian over neighbouring numbers at coordinates, little weight elsewhere."""
    tails = [tail for one in lessons for tail in one.tails]
    completions = [Completion("", np.array(tail), np.zeros(len(tail), np.float32), "stop") for tail in tails]
    index = np.repeat(np.arange(len(lessons)), [len(one.tails) for one in lessons])
    hidden, packing = policy.hidden_states(Rollout([one.prompt for one in lessons], index, completions, 1.0))
    starts = torch.tensor([start for one in lessons for start in one.taught_from])
    taught = packing.places >= starts[packing.rows]
    is_edge = torch.zeros(packing.mask().shape, dtype=torch.bool)
    values = torch.zeros(is_edge.shape)
    for row, edges in enumerate(edge for one in lessons for edge in one.edges):
        for place, value in edges.items():
            is_edge[row, place], values[row, place] = True, value
    edge, values = packing.unpad(is_edge)[taught], packing.unpad(values)[taught]
    weight = torch.tensor([token for one in lessons for tail in one.weights for token in tail])[taught]
    targets = torch.from_numpy(np.concatenate(tails))[taught]
    logprobs = torch.log_softmax(policy.logits(hidden[taught]), dim=-1)
    plain = -(weight * logprobs.gather(-1, targets[:, None])[:, 0])[~edge].sum()
    numbers = torch.tensor(agent.family.processor.tokenizer.convert_tokens_to_ids([str(n) for n in range(100)]))
    nearness = -((torch.arange(100) - values[edge][:, None]) ** 2) / (2 * NUMBER_SIGMA**2)
    soft = -(torch.softmax(nearness, dim=-1) * logprobs[edge][:, numbers]).sum()
    return (soft + plain) / weight.sum()


if __name__ == "__main__":
    main(tyro.cli(Args))
