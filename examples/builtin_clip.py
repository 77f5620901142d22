"""Makes the small CLIP that is shipped with vlmenv, which scores descriptions of the built-in scenes.

    python examples/builtin_clip.py --output envs/rewards/builtin_clip

It is a CLIP of 0.8 million parameters, trained by contrast on training scenes. Each image with its description is
compared with descriptions of other images, and with faulty ones of its own. The table at the end has its scores on
evaluation scenes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.progress import Progress, TextColumn
from rich.table import Table
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor, PreTrainedTokenizerFast

from vlmenv.core.coordinates import Box
from vlmenv.core.spaces import Image
from vlmenv.envs.data.captions import PLACES, describe, keywords, place
from vlmenv.envs.data.scenes import COLOURS, SHAPES, SIDE, SIDES, Scene, Shape, sample_scene
from vlmenv.envs.rewards.clip import CEILING, ClipScore

LOGIT_SCALE = 25.0
"""Inverse temperature, fixed. At CLIP's own, 100, a fault would cost so little cosine that rewards hardly differ."""
ANCHOR = 0.36
"""Where the cosines of true descriptions are held; the contrast itself only sees differences."""
ANCHOR_WEIGHT = 20.0
MAX_TOKENS = 64
SPECIAL = ["<|pad|>", "<|endoftext|>", "<|startoftext|>", "<|unknown|>"]
ALL_PLACES = [name for row in PLACES for name in row]
VALUES = {"size": list(SIDES), "colour": list(COLOURS), "kind": list(SHAPES), "place": ALL_PLACES}
ARTICLES = ("a", "a", "a", "one", "the", "")
LEADS = ("", "", "the image shows ", "there is ", "a picture of ", "i see ", "this image contains ")
JOINERS = (" and ", ", ", ". ", ", and ", " ")
VAGUE = ("an image", "a picture", "there is a shape", "some shapes", "the image shows several coloured shapes", "a")
FILLERS = "a an the and with of is are in on at to it this that image picture shape shapes object objects colour"
FAULTS = ("colour", "kind", "kind", "size", "place")  # how often each is wrong; kinds are the hardest to learn
SPAM = 8


@dataclass
class Args:
    """Makes a CLIP for the built-in scenes."""

    output: Path
    """Folder of the model."""
    steps: int = 2400
    """Optimiser steps."""
    scenes: int = 32
    """Scenes a step, each with five descriptions."""
    lr: float = 3e-3
    """Peak learning rate of AdamW; Muon's, for the matrices, is 20/3 of it."""
    measured: int = 512
    """Evaluation scenes behind the table."""
    seed: int = 0


def main(args: Args) -> None:
    torch.manual_seed(args.seed)
    model, processor = new_model(), new_processor()
    teach(model, processor, args)
    model.half().save_pretrained(args.output)
    processor.save_pretrained(args.output)
    term, scenes = ClipScore(str(args.output)), [sample_scene("eval", i)[0] for i in range(args.measured)]
    Console().print(table(measure(term, scenes), retrieval(term, scenes)))


# The model


def new_processor() -> CLIPProcessor:
    """A tokenizer of whole words, and an image processor that leaves scenes at their size."""
    # The light background comes out near zero, so that where there is a shape is plain from the start.
    pixels = {"image_mean": [0.94] * 3, "image_std": [0.25] * 3}
    images = CLIPImageProcessorPil(size={"height": SIDE, "width": SIDE}, do_center_crop=False, **pixels)
    names = dict(zip(("pad_token", "eos_token", "bos_token", "unk_token"), SPECIAL, strict=True))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=new_tokenizer(), model_max_length=MAX_TOKENS, **names)
    return CLIPProcessor(images, tokenizer)


def new_tokenizer() -> Tokenizer:
    words = [*SIDES, *COLOURS, *SHAPES, *(f"{kind}s" for kind in SHAPES), ",", "."]
    words += " ".join([*ALL_PLACES, *ARTICLES, *LEADS, *VAGUE, FILLERS]).split()
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys([*SPECIAL, *words]))}
    _, end, start, unknown = SPECIAL
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+|[^\w\s]"), "removed", invert=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}", special_tokens=[(token, vocabulary[token]) for token in (start, end)]
    )
    return tokenizer


def new_model() -> CLIPModel:
    """A CLIP of 0.8 million random parameters and a fixed temperature."""
    tower = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "projection_dim": 128}
    text = {"num_hidden_layers": 2, "max_position_embeddings": MAX_TOKENS}
    ids = {"vocab_size": new_tokenizer().get_vocab_size(), "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    vision = {"num_hidden_layers": 3, "image_size": SIDE, "patch_size": 12}
    config = CLIPConfig(
        text_config=tower | text | ids,
        vision_config=tower | vision,
        projection_dim=128,
        logit_scale_init_value=float(np.log(LOGIT_SCALE)),
        initializer_factor=2.0,
    )
    model = CLIPModel(config)
    model.logit_scale.requires_grad_(False)
    torch.nn.init.normal_(model.vision_model.embeddings.position_embedding.weight, std=0.1)
    return model


# Teaching


def teach(model: CLIPModel, processor: CLIPProcessor, args: Args) -> None:
    """Contrastive steps; single shapes alone for the first tenth, then now and then."""
    rng = np.random.default_rng(args.seed)
    optimizers = new_optimizers(model, args.lr)
    with Progress(*Progress.get_default_columns(), TextColumn("loss {task.fields[loss]:.3f}")) as progress:
        task = progress.add_task("teaching", total=args.steps, loss=float("nan"))
        for step in range(args.steps):
            done = step / args.steps
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["peak"] * min(1.0, (step + 1) / 20) * (1 - done)
            lesson = [draw(rng, single=done < 0.1 or rng.random() < 0.1) for _ in range(args.scenes)]
            loss = contrast(model, processor, lesson, rng)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            progress.update(task, advance=1, loss=loss.item())


def new_optimizers(model: CLIPModel, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices, AdamW for embeddings, norms and biases."""
    matrices, patches, others = [], [], []
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "embed" not in name:
            matrices.append(parameter)
        elif parameter.requires_grad:
            (patches if "patch_embedding" in name else others).append(parameter)
    muon = torch.optim.Muon(matrices, lr=lr * 20 / 3, weight_decay=0.0)
    # Each output of the patch embedding sums 432 inputs: at the full rate it soon drowns the positions.
    groups = [{"params": others}, {"params": patches, "lr": lr / 10}]
    adamw = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), weight_decay=0.0)
    for optimizer in (muon, adamw):
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return [muon, adamw]


def draw(rng: np.random.Generator, single: bool) -> Scene:
    return sample_scene("train", int(rng.integers(2**62)), counts=(1, 1) if single else (2, 4))[0]


def contrast(model: CLIPModel, processor: CLIPProcessor, scenes: Sequence[Scene], rng: np.random.Generator) -> Tensor:
    """Contrastive loss: images are to find their true descriptions, and these their images."""
    truths = [whole(scene, rng) for scene in scenes]
    texts = [say(truth, rng) for truth in truths]
    texts += [say(style(truth, rng), rng) for style in (partial, faulty, faulty, crowded) for truth in truths]
    texts += [spam(rng) for _ in range(SPAM)]
    cosines = embed_images(model, processor, [scene.image for scene in scenes]) @ embed_texts(model, processor, texts).T
    logits = model.logit_scale.exp() * cosines
    n = len(scenes)
    own = torch.arange(n)
    # What is said of a part of one image may well be true of another.
    uncertain = torch.zeros_like(logits, dtype=torch.bool)
    uncertain[:, n : 2 * n] = ~torch.eye(n, dtype=torch.bool)
    by_image = cross_entropy(logits.masked_fill(uncertain, -torch.inf), own)
    by_text = cross_entropy(logits[:, : 2 * n].T, own.repeat(2))
    return by_image + by_text / 2 + ANCHOR_WEIGHT * (cosines[own, own] - ANCHOR).square().mean()


def embed_images(model: CLIPModel, processor: CLIPProcessor, images: Sequence[Image]) -> Tensor:
    """Embeddings [N, D] of unit length."""
    inputs = processor.image_processor(images=list(images), return_tensors="pt", input_data_format="channels_last")
    return normalize(model.get_image_features(**inputs).pooler_output, dim=-1)


def embed_texts(model: CLIPModel, processor: CLIPProcessor, texts: Sequence[str]) -> Tensor:
    """Embeddings [N, D] of unit length; texts of like lengths go together, which spares padding."""
    order = np.argsort([len(text) for text in texts])
    found = []
    for chunk in np.array_split(order, 4):
        inputs = processor.tokenizer([texts[i] for i in chunk], padding=True, truncation=True, return_tensors="pt")
        # Attention is causal and the padding comes last: no mask is needed.
        found.append(normalize(model.get_text_features(inputs["input_ids"]).pooler_output, dim=-1))
    return torch.cat(found)[torch.from_numpy(np.argsort(order))]


# What is said of scenes in training


class Claim(NamedTuple):
    """What a description says about one shape; empty where it does not say."""

    size: str
    colour: str
    kind: str
    place: str


Claims = tuple[Claim, ...]


def say(claims: Claims, rng: np.random.Generator) -> str:
    """Claims in words."""
    article, lead, joiner = (str(rng.choice(choices)) for choices in (ARTICLES, LEADS, JOINERS))
    told = [" ".join(word for word in (article, *claim) if word).replace("a orange", "an orange") for claim in claims]
    if rng.random() < 0.3 and len(told) > 1:
        told = [", ".join(told[:-1]) + " and " + told[-1]]
    return lead + joiner.join(told)


def whole(scene: Scene, rng: np.random.Generator) -> Claims:
    """All shapes of a scene, from left to right or in any order, with or without sizes and places."""
    shapes = sorted(scene.shapes, key=lambda shape: shape.box[0] + shape.box[2])
    if rng.random() < 0.5:
        shapes = [shapes[i] for i in rng.permutation(len(shapes))]
    sized, placed = rng.random(2) < 0.6
    return tuple(Claim(s.size if sized else "", s.colour, s.kind, place(s) if placed else "") for s in shapes)


def partial(truth: Claims, rng: np.random.Generator) -> Claims:
    """True claims about some of the shapes; about a single one, less."""
    if len(truth) == 1:
        return (truth[0]._replace(kind="shape", place=""),)
    keep = rng.permutation(len(truth))[: rng.integers(1, len(truth))]
    return tuple(truth[i] for i in sorted(keep))


def faulty(truth: Claims, rng: np.random.Generator) -> Claims:
    """Claims of which one is wrong in one respect, or two have swapped theirs."""
    name = str(rng.choice([name for name in FAULTS if getattr(truth[0], name)]))
    i, j = rng.permutation(len(truth))[:2] if len(truth) > 1 else (0, 0)
    found = list(truth)
    if rng.random() < 0.3:
        found[i], found[j] = (found[a]._replace(**{name: getattr(found[b], name)}) for a, b in ((i, j), (j, i)))
    if sorted(found) == sorted(truth):
        others = [value for value in VALUES[name] if value != getattr(truth[i], name)]
        found = [*truth[:i], truth[i]._replace(**{name: str(rng.choice(others))}), *truth[i + 1 :]]
    return tuple(found)


def crowded(truth: Claims, rng: np.random.Generator) -> Claims:
    """True claims with invented or repeated ones among them, or taken apart into colours and kinds."""
    if rng.random() < 0.2:
        apart = {Claim("", c.colour, "", "") for c in truth} | {Claim("", "", c.kind, "") for c in truth}
        return shuffled(sorted(apart), rng)
    extra = 1 if rng.random() < 0.6 else int(rng.integers(2, 6))
    told = [bool(value) for value in truth[0]]
    added = [truth[rng.integers(len(truth))] if rng.random() < 0.3 else invented(told, rng) for _ in range(extra)]
    return shuffled([*truth, *added], rng)


def shuffled(claims: Sequence[Claim], rng: np.random.Generator) -> Claims:
    return tuple(claims[i] for i in rng.permutation(len(claims)))


def invented(told: Sequence[bool], rng: np.random.Generator) -> Claim:
    """A claim about a shape that nobody has seen, told in the given respects."""
    return Claim(*(str(rng.choice(values)) if so else "" for values, so in zip(VALUES.values(), told, strict=True)))


def spam(rng: np.random.Generator) -> str:
    """A text that fits no image: keywords heaped up, shapes without end, hardly a word, or no words known."""
    kind = rng.integers(4)
    if kind == 0:
        words = rng.permutation([word for values in VALUES.values() for value in values for word in value.split()])
        return " ".join(words[: rng.integers(4, len(words) + 1)])
    if kind == 1:
        told = [rng.random() < 0.5, True, True, rng.random() < 0.5]
        return say(tuple(invented(told, rng) for _ in range(rng.integers(5, 13))), rng)
    if kind == 2:
        return str(rng.choice(VAGUE))
    return " ".join(rng.choice([*FILLERS.split(), *["xyz"] * 10], size=rng.integers(1, 30)))


# Measuring


@dataclass
class Row:
    """How one sort of descriptions does on evaluation scenes."""

    sort: str
    cosine: float
    spread: float
    """standard deviation of the cosines"""
    reward: float
    beaten: float
    """how often the true description scores higher"""


def measure(term: ClipScore, scenes: Sequence[Scene]) -> list[Row]:
    """Scores descriptions in the words of the built-in captions."""
    rng = np.random.default_rng(0)
    images = [(scene.image,) for scene in scenes]
    true = np.array(term.cosines([describe(scene) for scene in scenes], images))
    rows = []
    for sort, text in SORTS.items():
        scores = np.array(term.cosines([text(scene, rng) for scene in scenes], images))
        reward = np.clip(scores / CEILING, 0, 1).mean()
        rows.append(Row(sort, scores.mean(), scores.std(), reward, (scores < true).mean()))
    return rows


def retrieval(term: ClipScore, scenes: Sequence[Scene], choices: int = 32) -> float:
    """How often a scene is nearest to its own description among those of `choices` scenes."""
    texts = [describe(scene) for scene in scenes]
    candidates = [texts[(i + j) % len(texts)] for i in range(len(texts)) for j in range(choices)]
    cosines = term.cosines(candidates, [(scene.image,) for scene in scenes for _ in range(choices)])
    return float((np.reshape(cosines, (-1, choices)).argmax(axis=1) == 0).mean())


def altered(change: Callable[[Shape, np.random.Generator], list[Shape]]) -> Callable[[Scene, np.random.Generator], str]:
    """Descriptions of scenes with one of their shapes changed, left out, or joined by another."""

    def description(scene: Scene, rng: np.random.Generator) -> str:
        chosen = int(rng.integers(len(scene.shapes)))
        changed = change(scene.shapes[chosen], rng)
        return describe(replace(scene, shapes=(*scene.shapes[:chosen], *changed, *scene.shapes[chosen + 1 :])))

    return description


def wrong(name: str) -> Callable[[Scene, np.random.Generator], str]:
    """Descriptions with one size, colour or kind wrong."""

    def change(shape: Shape, rng: np.random.Generator) -> list[Shape]:
        others = [value for value in VALUES[name] if value != getattr(shape, name)]
        return [replace(shape, **{name: str(rng.choice(others))})]

    return altered(change)


def moved(shape: Shape, rng: np.random.Generator) -> Shape:
    """A shape in another place."""
    found = replace(shape, box=any_box(rng))
    return moved(shape, rng) if place(found) == place(shape) else found


def any_shape(rng: np.random.Generator) -> Shape:
    size, colour, kind = (str(rng.choice(VALUES[name])) for name in ("size", "colour", "kind"))
    return Shape(size, colour, kind, any_box(rng))


def any_box(rng: np.random.Generator) -> Box:
    x, y = rng.uniform(0, SIDE - 30, size=2).tolist()
    return x, y, x + 30, y + 30


def any_scene(rng: np.random.Generator) -> Scene:
    return sample_scene("eval", int(rng.integers(2**32, 2**62)))[0]


EVERY_KEYWORD = " ".join([*SIDES, *COLOURS, *SHAPES])
SORTS: dict[str, Callable[[Scene, np.random.Generator], str]] = {
    "true": lambda scene, rng: describe(scene),
    "true, without sizes and places": lambda scene, rng: " and ".join(f"a {s.colour} {s.kind}" for s in scene.shapes),
    "one size wrong": wrong("size"),
    "one colour wrong": wrong("colour"),
    "one kind wrong": wrong("kind"),
    "one place wrong": altered(lambda shape, rng: [moved(shape, rng)]),
    "one shape missing": altered(lambda shape, rng: []),
    "one shape too many": altered(lambda shape, rng: [shape, any_shape(rng)]),
    "one shape twice": altered(lambda shape, rng: [shape, shape]),
    "of another scene": lambda scene, rng: describe(any_scene(rng)),
    "an image": lambda scene, rng: "an image",
    "every keyword": lambda scene, rng: EVERY_KEYWORD,
    "its own keywords": lambda scene, rng: " ".join(keywords(scene)),
    "true, then every keyword": lambda scene, rng: f"{describe(scene)} {EVERY_KEYWORD}",
}


def table(rows: Sequence[Row], retrieved: float) -> Table:
    found = Table("description", "cosine", "reward", "true scores higher", title="Evaluation scenes")
    for row in rows:
        found.add_row(row.sort, f"{row.cosine:.3f} ± {row.spread:.3f}", f"{row.reward:.2f}", f"{row.beaten:.1%}")
    found.caption = f"own description is nearest of 32: {retrieved:.1%}"
    return found


if __name__ == "__main__":
    main(tyro.cli(Args))
