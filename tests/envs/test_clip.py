from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from conftest import ROOT
from growth import growth
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PILImage
from transformers import (
    AltCLIPConfig,
    AltCLIPModel,
    AutoTokenizer,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    Siglip2Config,
    Siglip2ImageProcessorPil,
    Siglip2Model,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
)

from vlmenv.agents.vlm import find_model
from vlmenv.core.errors import ConfigError, ModelError
from vlmenv.core.formats import AnswerFormat
from vlmenv.core.spaces import Image
from vlmenv.envs.data.captions import describe, keywords
from vlmenv.envs.data.scenes import COLOURS, SHAPES, SIDES, Scene, sample_scene
from vlmenv.envs.rewards import clip
from vlmenv.envs.rewards.clip import ClipScore

BUILTIN = ROOT / "envs" / "rewards" / "builtin_clip"
TAGS, SECTIONS = AnswerFormat.TAGS, AnswerFormat.SECTIONS
SCENES = [sample_scene("eval", index)[0] for index in range(100)]
IMAGES = [(scene.image,) for scene in SCENES]
TRUE = [describe(scene) for scene in SCENES]


def rewards(descriptions: list[str], images: list[tuple[Image, ...]] = IMAGES) -> list[float]:
    texts = [TAGS.write("3", description) for description in descriptions]
    return ClipScore().batch(texts, [None] * len(texts), images, TAGS)


# What the shipped model knows. The bounds are below what was measured; the script's table tells that.


def test_true_descriptions_score_high() -> None:
    assert np.mean(rewards(TRUE)) > 0.8
    assert np.quantile(rewards(TRUE), 0.1) > 0.6


def test_true_descriptions_are_found_among_those_of_other_scenes() -> None:
    candidates = [TRUE[(i + j) % 100] for i in range(100) for j in range(16)]
    cosines = ClipScore().cosines(candidates, [images for images in IMAGES for _ in range(16)])
    assert np.mean(np.reshape(cosines, (100, 16)).argmax(axis=1) == 0) >= 0.9


def with_one_wrong(scene: Scene, name: str, values: Any) -> str:
    first = scene.shapes[0]
    wrong = next(value for value in values if value != getattr(first, name))
    return describe(replace(scene, shapes=(replace(first, **{name: wrong}), *scene.shapes[1:])))


@pytest.mark.parametrize(("name", "values", "least"), [("colour", COLOURS, 0.9), ("kind", SHAPES, 0.8)])
def test_true_descriptions_score_higher_than_with_one_fault(name: str, values: Any, least: float) -> None:
    wrong = ClipScore().cosines([with_one_wrong(scene, name, values) for scene in SCENES], IMAGES)
    assert np.mean(np.less(wrong, ClipScore().cosines(TRUE, IMAGES))) >= least


def test_leaving_a_shape_out_costs() -> None:
    short = rewards([describe(replace(scene, shapes=scene.shapes[1:])) for scene in SCENES])
    assert np.mean(short) < np.mean(rewards(TRUE)) - 0.1


@pytest.mark.parametrize(
    "spam", ["an image", " ".join([*SIDES, *COLOURS, *SHAPES]), "lorem ipsum dolor sit amet", "a red circle and " * 10]
)
def test_what_fits_every_image_scores_low(spam: str) -> None:
    assert np.mean(rewards([spam] * 100)) < np.mean(rewards(TRUE)) - 0.4


def test_heaping_up_keywords_does_not_pay() -> None:
    everything = " ".join([*SIDES, *COLOURS, *SHAPES])
    assert np.mean(rewards([f"{text} {everything}" for text in TRUE])) < np.mean(rewards(TRUE)) - 0.4
    own = [" ".join(keywords(scene)) for scene in SCENES]
    assert np.mean(rewards(own)) < np.mean(rewards(TRUE)) - 0.05


# The reward


def test_the_reward_is_the_cosine_up_to_its_ceiling() -> None:
    cosines = ClipScore().cosines(TRUE[:50] + TRUE[50:][::-1], IMAGES)
    found = rewards(TRUE[:50] + TRUE[50:][::-1])
    assert min(cosines) < 0
    assert max(cosines) > 0.4
    np.testing.assert_allclose(found, [min(1, max(0, cosine) / 0.4) for cosine in cosines], atol=1e-6)


@pytest.mark.parametrize("answer_format", [TAGS, SECTIONS])
def test_only_the_description_is_scored(answer_format: AnswerFormat) -> None:
    term, images = ClipScore(), IMAGES[:1]
    plain = answer_format.write("3", TRUE[0])
    said_elsewhere = answer_format.write(TRUE[0], "")
    noisy = answer_format.write(" ".join(COLOURS), TRUE[0]) + "\na green square"
    assert term.batch([plain], [None], images, answer_format) == term.batch([noisy], [None], images, answer_format)
    for nothing in (said_elsewhere, TRUE[0], ""):
        assert term.batch([nothing], [None], images, answer_format) == [0.0]


def test_of_several_images_the_mean_counts_and_without_any_nothing() -> None:
    term = ClipScore()
    each = term.cosines([TRUE[0]] * 2, IMAGES[:2])
    assert term.cosines([TRUE[0]], [IMAGES[0] + IMAGES[1]]) == pytest.approx([np.mean(each)])
    assert rewards([TRUE[0], TRUE[0]], [(), IMAGES[0]])[0] == 0.0
    assert term.cosines([], []) == []


@pytest.mark.slow
def test_scores_do_not_depend_on_what_else_is_scored() -> None:
    texts = [TRUE[0], "a star", TRUE[1], *(TRUE[i % 100] + " and a red star" * (i % 9) for i in range(150)), "a star"]
    images = [IMAGES[i % 100] for i in range(len(texts))]
    clip._load("builtin")._cache.clear()  # the images too are embedded together, and then each alone
    together = ClipScore().cosines(texts, images)
    alone = []
    for text, image in zip(texts, images, strict=True):
        clip._load("builtin")._cache.clear()
        alone += ClipScore().cosines([text], [image])
    assert together == alone  # to the last digit: a resumed run remembers other images than one that went through


# Texts that nobody expects


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(st.text(st.characters(), max_size=200))
def test_no_text_raises(text: str) -> None:
    for wrapped in (text, TAGS.write(text, text), SECTIONS.write(text, text)):
        for answer_format in (TAGS, SECTIONS):
            (found,) = ClipScore().batch([wrapped], [None], IMAGES[:1], answer_format)
            assert 0 <= found <= 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "text",
    ["\ud800", "a red \udfff circle", "\0", "\0\0 a red circle", "<|endoftext|>", "\u202e", "e" + "\u0301" * 5000]
    + [unit * (10_000_000 // len(unit)) for unit in ("a", " ", "a red circle ", "é", "😀", "<think>", "\n\0\ud800")],
    ids=lambda text: ascii(text[:12]),
)
def test_hostile_texts_are_scored_quickly(text: str) -> None:
    (found,) = rewards([text], IMAGES[:1])
    assert 0 <= found <= 1
    assert growth(lambda size: rewards([text[:size]], IMAGES[:1]), max(1, len(text) // 8), tries=1) < 24


def test_control_tokens_in_a_text_are_words() -> None:
    """An end token that is spelled out does not hide what follows."""
    honest, hiding = f"{TRUE[0]} and a xyz", f"{TRUE[0]} <|endoftext|> {' '.join(COLOURS)}"
    visible = hiding.replace("<|endoftext|>", "<|anything|>")
    found = rewards([honest, hiding, visible], IMAGES[:1] * 3)
    assert found[1] == pytest.approx(found[2], abs=1e-5)
    assert found[1] < found[0]


def test_texts_are_cut_to_what_the_model_reads() -> None:
    long = "a red circle and " * 30
    assert rewards([long], IMAGES[:1]) == pytest.approx(rewards([long + "a blue star"], IMAGES[:1]), abs=1e-6)


# How the model is kept


def count_calls(monkeypatch: pytest.MonkeyPatch, tower: str) -> list[int]:
    """Numbers of different inputs that each call of the built-in model's tower gets from now on."""
    model, calls = clip._load("builtin")._model, []
    real = getattr(model, tower)

    def counted(**inputs: Any) -> Any:
        calls.append(len(next(iter(inputs.values())).unique(dim=0)))
        return real(**inputs)

    monkeypatch.setattr(model, tower, counted)
    return calls


def fresh_images(count: int) -> list[Image]:
    return [np.full((20, 30, 3), (count, value, 7), np.uint8) for value in range(count)]


def test_an_image_is_embedded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_calls(monkeypatch, "get_image_features")
    images = fresh_images(70)
    group = [(image,) for image in images for _ in range(4)]
    first = rewards(["a red star"] * 280, group)
    assert calls == [8] * 8 + [6]
    copies = [(image.copy(),) for image in images for _ in range(4)]
    assert rewards(["a red star"] * 280, copies) == first
    assert calls == [8] * 8 + [6]


def test_equal_texts_are_embedded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_calls(monkeypatch, "get_text_features")
    rewards(["red " * (i % 52) + "star" for i in range(260)], [IMAGES[0]] * 260)
    assert calls == [8] * 6 + [4]


def test_a_changed_image_is_embedded_anew() -> None:
    image = SCENES[0].image.copy()
    before = rewards([TRUE[0]], [(image,)])
    image[:] = SCENES[1].image
    assert rewards([TRUE[0]], [(image,)]) == rewards([TRUE[0]], [IMAGES[1]]) != before


def test_images_of_equal_bytes_and_other_shape_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_calls(monkeypatch, "get_image_features")
    image = np.arange(8 * 18 * 3, dtype=np.uint8).reshape(8, 18, 3)
    rewards(["a red star"] * 2, [(image,), (image.reshape(18, 8, 3),)])
    assert calls == [2]


def test_the_oldest_images_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_calls(monkeypatch, "get_image_features")
    monkeypatch.setattr(clip, "_REMEMBERED", 3)
    a, b, c, d = fresh_images(4)
    for image in (a, b, c, a, d, a, c, d):  # b is the oldest when d comes
        rewards(["a star"], [(image,)])
    assert len(calls) == 4
    rewards(["a star"], [(b,)])
    assert len(calls) == 5
    assert len(clip._load("builtin")._cache) == 3


def test_a_revision_of_a_model_on_the_hub_is_scored_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the hub's cache on disk."""
    commit, repository = "0123456789" * 4, tmp_path / "models--some--clip"
    shutil.copytree(BUILTIN, repository / "snapshots" / commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    named = ClipScore(f"some/clip@{commit}").cosines(TRUE[:2], IMAGES[:2])
    assert named == ClipScore().cosines(TRUE[:2], IMAGES[:2])
    with pytest.raises(ModelError, match="some/clip@other"):
        ClipScore("some/clip@other").cosines(TRUE[:2], IMAGES[:2])


def test_a_term_travels_as_its_models_name() -> None:
    term = ClipScore()
    before = term.cosines(TRUE[:1], IMAGES[:1])
    packed = pickle.dumps(term)
    assert len(packed) < 200
    assert pickle.loads(packed).cosines(TRUE[:1], IMAGES[:1]) == before


@pytest.mark.slow
def test_threads_share_one_model(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = ClipScore().cosines(TRUE, IMAGES)
    made: list[str] = []

    class Counted(clip._Towers):
        def __init__(self, name: str, remote_code: bool = False) -> None:
            made.append(name)
            super().__init__(name, remote_code)

    monkeypatch.setattr(clip, "_Towers", Counted)
    monkeypatch.setattr(clip, "_loaded", {})
    barrier = threading.Barrier(4)

    def score(part: int) -> list[float]:
        barrier.wait()
        return [c for i in range(part, 100, 4) for c in ClipScore().cosines([TRUE[i]], [IMAGES[i]])]

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(score, range(4)))
    assert made == ["builtin"]
    for part in range(4):
        np.testing.assert_allclose(found[part], expected[part::4], atol=1e-5)


def test_threads_take_turns_with_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inside, most = clip._load("builtin")._model, [], []
    real = model.get_text_features

    def slow(**inputs: Any) -> Any:
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.02)
        inside.pop()
        return real(**inputs)

    monkeypatch.setattr(model, "get_text_features", slow)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: rewards([f"{i} stars"], IMAGES[:1]), range(8)))
    assert most == [1] * 8


def test_importing_the_term_is_light() -> None:
    code = "import sys, vlmenv.envs.rewards.clip as c; c.ClipScore(); print({'torch', 'transformers'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path("/"))
    assert done.stdout.strip() == "set()"


# Other models

TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = TOWER | {"image_size": 32, "patch_size": 8}
SMALL = {"height": 32, "width": 32}


def save_tiny(kind: str, folder: Path) -> None:
    """A random model with 16 positions for text, the built-in tokenizer, and an image processor of its kind."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(BUILTIN, model_max_length=10**30)
    text = TOWER | {"vocab_size": len(tokenizer), "max_position_embeddings": 16, "pad_token_id": 0, "eos_token_id": 1}
    if kind == "clip":
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=VISION, projection_dim=24))
        images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=SMALL)
    elif kind == "altclip":
        roberta = text | {"max_position_embeddings": 17, "project_dim": 24}  # the padding's own comes first
        model = AltCLIPModel(AltCLIPConfig(text_config=roberta, vision_config=VISION, projection_dim=24))
        images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=SMALL)
    elif kind == "siglip":
        model = SiglipModel(SiglipConfig(text_config=text | {"projection_size": 32}, vision_config=VISION))
        images = SiglipImageProcessorPil(size=SMALL)
    else:
        vision = TOWER | {"patch_size": 8, "num_patches": 16}
        model = Siglip2Model(Siglip2Config(text_config=text | {"projection_size": 32}, vision_config=vision))
        images = Siglip2ImageProcessorPil(patch_size=8, max_num_patches=16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    for part in (model, tokenizer, images):
        part.save_pretrained(folder)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["clip", "altclip", "siglip", "siglip2"])
def test_other_models_score_as_transformers_computes(kind: str, tmp_path: Path) -> None:
    save_tiny(kind, tmp_path)
    texts = ["a star", "a large red circle on the left", "a red circle and " * 10]
    images = [SCENES[0].image, np.tile(SCENES[1].image, (1, 2, 1)), SCENES[2].image[:50]]
    term, shown = ClipScore(str(tmp_path)), [(image,) for image in images]
    found = term.cosines(texts[:2], shown[:2]) + term.cosines(texts[2:], shown[2:])
    expected = [direct_cosine(kind, tmp_path, text, image) for text, image in zip(texts, images, strict=True)]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.std(found) > 1e-3


def direct_cosine(kind: str, folder: Path, text: str, image: Image) -> float:
    """As the models' documentation computes it, one text and one image at a time."""
    models = {"clip": CLIPModel, "altclip": AltCLIPModel, "siglip": SiglipModel, "siglip2": Siglip2Model}
    processors = {"siglip": SiglipImageProcessorPil, "siglip2": Siglip2ImageProcessorPil}
    model = models[kind].from_pretrained(folder).eval()
    tokens = AutoTokenizer.from_pretrained(folder)(text, truncation=True, max_length=16)["input_ids"]
    if kind.startswith("siglip"):
        tokens += [0] * (16 - len(tokens))
    pixels = processors.get(kind, CLIPImageProcessorPil).from_pretrained(folder)(images=image, return_tensors="pt")
    with torch.no_grad():
        out = model(input_ids=torch.tensor([tokens]), **pixels)
    return float((out.text_embeds * out.image_embeds).sum())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["siglip", "siglip2"])
def test_the_sigmoid_score_is_the_probability_that_transformers_computes(kind: str, tmp_path: Path) -> None:
    save_tiny(kind, tmp_path)
    model = {"siglip": SiglipModel, "siglip2": Siglip2Model}[kind].from_pretrained(tmp_path)
    texts, images = (
        ["a star", "a large red circle on the left", ""],
        [SCENES[0].image, SCENES[1].image, SCENES[2].image],
    )
    found = ClipScore(str(tmp_path), "sigmoid").batch(
        [TAGS.write("3", text) for text in texts], [None] * 3, [(image,) for image in images], TAGS
    )
    for text, image, probability in zip(texts[:2], images, found, strict=False):
        logit = direct_cosine(kind, tmp_path, text, image) * model.logit_scale.exp() + model.logit_bias
        assert probability == pytest.approx(torch.sigmoid(logit).item(), abs=1e-5)
    assert found[2] == 0
    assert found[0] != pytest.approx(found[1], abs=1e-4)


def test_a_score_that_the_model_does_not_have(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="has no sigmoid score"):
        ClipScore(score="sigmoid").load()
    with pytest.raises(ConfigError, match="unknown score 'softmax'"):
        ClipScore(score="softmax")  # type: ignore[arg-type]


def save_fg_clip(folder: Path) -> CLIPModel:
    """A random FG-CLIP with 24 short positions and 248 long ones, as it is stored; its own code ends the process."""
    torch.manual_seed(0)
    save_tiny("clip", folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.model_max_length = 24
    tokenizer.save_pretrained(folder)
    text = TOWER | {"vocab_size": len(tokenizer), "max_position_embeddings": 24, "pad_token_id": 0, "eos_token_id": 1}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=VISION, projection_dim=24)).eval()
    for name in ("ori", "res"):
        model.text_model.embeddings.add_module(f"position_embedding_{name}", torch.nn.Embedding(248, 32))
    model.text_filip_projection = torch.nn.Linear(32, 24, bias=False)
    model.logit_scale_hardneg = torch.nn.Parameter(torch.zeros(()))
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["FGCLIPModel"], "auto_map": {"AutoModelForCausalLM": "modeling_fgclip.FGCLIPModel"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_fgclip.py").write_text("import os\nos._exit(3)\n")
    return model


def test_fg_clip_reads_long_texts_without_its_own_code(tmp_path: Path) -> None:
    model = save_fg_clip(tmp_path)
    text, image = "a large red circle on the left and a star and " * 30, np.tile(SCENES[1].image, (1, 2, 1))
    ids = torch.tensor([AutoTokenizer.from_pretrained(tmp_path)(text, truncation=True, max_length=248)["input_ids"]])
    assert ids.shape == (1, 248)
    parts = model.text_model.embeddings
    places = torch.arange(248)[:, None]
    positions = torch.where(places < 20, parts.position_embedding_ori.weight, parts.position_embedding_res.weight)
    embedded = parts.token_embedding(ids) + positions
    parts.forward = lambda **inputs: embedded
    square = PILImage.fromarray(image).resize((32, 32))
    pixels = CLIPImageProcessorPil.from_pretrained(tmp_path)(images=square, return_tensors="pt")
    with torch.no_grad():
        a = model.text_filip_projection(model.text_model(ids).pooler_output)[0]
        b = model.get_image_features(**pixels).pooler_output[0]
    (found,) = ClipScore(str(tmp_path)).cosines([text], [(image,)])
    assert found == pytest.approx(float(torch.nn.functional.cosine_similarity(a, b, dim=0)), abs=1e-5)


@pytest.mark.slow
def test_code_of_a_checkpoint_runs_only_where_it_is_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CLIP of a kind of its own, whose class is named for another purpose, as FG-CLIP 2's is."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    save_tiny("clip", tmp_path)
    expected = ClipScore(str(tmp_path)).cosines(TRUE[:1], IMAGES[:1])
    other = tmp_path / "other"
    shutil.copytree(tmp_path, other)
    config = json.loads((other / "config.json").read_text()) | {"model_type": "own_clip", "architectures": ["OwnCLIP"]}
    config["auto_map"] = {"AutoConfig": "own_clip.OwnConfig", "AutoModelForCausalLM": "own_clip.OwnCLIP"}
    (other / "config.json").write_text(json.dumps(config))
    (other / "own_clip.py").write_text(
        "from pathlib import Path\n"
        "from transformers import CLIPConfig, CLIPModel\n"
        f"Path({str(tmp_path / 'ran')!r}).touch()\n"
        "class OwnConfig(CLIPConfig):\n    model_type = 'own_clip'\n"
        "class OwnCLIP(CLIPModel):\n    config_class = OwnConfig\n"
    )
    with pytest.raises(ModelError, match="run only where remote_code"):
        ClipScore(str(other)).load()
    assert not (tmp_path / "ran").exists()
    found = ClipScore(str(other), remote_code=True).cosines(TRUE[:1], IMAGES[:1])
    assert (tmp_path / "ran").exists()
    assert found == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
def test_what_cannot_score_descriptions_is_refused(tmp_path: Path) -> None:
    def copy_without(name: str, *dropped: str) -> str:
        folder = tmp_path / name
        shutil.copytree(BUILTIN, folder)
        for file in dropped:
            (folder / file).unlink()
        return str(folder)

    refused = {
        "nobody/no-such-model": "nobody/no-such-model",
        str(tmp_path / "nowhere"): "nowhere",
        str(find_model("builtin")): "has no get_text_features",
        copy_without("a", "tokenizer.json", "tokenizer_config.json"): "tokenizer knows no words",
        copy_without("b", "processor_config.json"): "image processor",
        copy_without("c", "model.safetensors"): "model.safetensors",
    }
    for model, reason in refused.items():
        for use in (ClipScore(model).load, lambda model=model: ClipScore(model).cosines(["a"], IMAGES[:1])):
            with pytest.raises(ModelError, match=reason) as caught:
                use()
            assert "Give 'builtin'" in str(caught.value)


def test_missing_weights_are_not_made_up(tmp_path: Path) -> None:
    save_tiny("clip", tmp_path)
    model = CLIPModel.from_pretrained(tmp_path)
    weights = {name: value for name, value in model.state_dict().items() if "text_projection" not in name}
    model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(ModelError, match="1 of its weights"):
        ClipScore(str(tmp_path)).load()
