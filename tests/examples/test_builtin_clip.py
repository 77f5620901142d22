from __future__ import annotations

import importlib.util
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from conftest import ROOT
from transformers import AutoProcessor, CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor

from vlmenv.core.spaces import Image
from vlmenv.envs.data.captions import PLACES, describe
from vlmenv.envs.data.scenes import COLOURS, SHAPES, SIDES, sample_scene
from vlmenv.envs.rewards.clip import ClipScore

SHIPPED = ROOT / "envs" / "rewards" / "builtin_clip"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("builtin_clip", ROOT / "examples" / "builtin_clip.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["builtin_clip"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_it_makes_a_model_that_scores_and_prints_how_well(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    script.main(script.Args(output=tmp_path, steps=2, scenes=2, measured=34))
    printed = capsys.readouterr().out
    assert all(sort in printed for sort in script.SORTS)
    assert "own description is nearest of 32" in printed
    assert {file.name for file in tmp_path.iterdir()} == {file.name for file in SHIPPED.iterdir()}
    assert (tmp_path / "tokenizer.json").read_text() == (SHIPPED / "tokenizer.json").read_text()
    for part in (CLIPConfig, CLIPImageProcessorPil):
        assert part.from_pretrained(tmp_path).to_dict() == part.from_pretrained(SHIPPED).to_dict()
    assert isinstance(AutoProcessor.from_pretrained(tmp_path), CLIPProcessor)
    (cosine,) = ClipScore(str(tmp_path)).cosines(["a red star"], [(sample_scene("eval", 0)[0].image,)])
    assert -1 <= cosine <= 1


def test_the_shipped_model_is_small() -> None:
    assert sum(file.stat().st_size for file in SHIPPED.iterdir()) < 2 * 2**20


@pytest.mark.slow
def test_teaching_lowers_the_loss(script: ModuleType) -> None:
    """On the same scenes, from random weights."""
    torch.manual_seed(0)
    model, processor = script.new_model(), script.new_processor()
    rng = np.random.default_rng(0)
    scenes = [script.draw(rng, single=True) for _ in range(4)]
    optimizers = script.new_optimizers(model, 3e-3)
    losses = []
    for _ in range(25):
        loss = script.contrast(model, processor, scenes, np.random.default_rng(0))
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert model.logit_scale.exp().item() == pytest.approx(script.LOGIT_SCALE)


def test_training_draws_training_scenes(script: ModuleType) -> None:
    for seed in range(20):
        index = int(np.random.default_rng(seed).integers(2**62))
        assert script.draw(np.random.default_rng(seed), single=False).shapes == sample_scene("train", index)[0].shapes


def test_what_is_said_of_a_scene_is_true_or_wrong_as_meant(script: ModuleType) -> None:
    for seed in range(300):
        rng = np.random.default_rng(seed)
        scene = script.draw(rng, single=seed % 4 == 0)
        truth = script.whole(scene, rng)
        assert Counter((c.colour, c.kind) for c in truth) == Counter((s.colour, s.kind) for s in scene.shapes)
        part = script.partial(truth, rng)
        if len(truth) > 1:
            assert 0 < len(part) < len(truth)
            assert not Counter(part) - Counter(truth)
        assert len(script.faulty(truth, rng)) == len(truth)
        assert Counter(script.faulty(truth, rng)) != Counter(truth)
        assert Counter(script.crowded(truth, rng)) != Counter(truth)
        said = script.say(truth, rng)
        assert all(claim.colour in said and claim.kind in said for claim in truth)


def test_every_word_of_descriptions_and_of_training_is_known(script: ModuleType) -> None:
    tokenizer, rng = script.new_processor().tokenizer, np.random.default_rng(0)
    texts = [describe(sample_scene("train", index)[0]) for index in range(50)]
    texts += [script.say(script.whole(script.draw(rng, single=False), rng), rng) for _ in range(50)]
    texts += [" ".join([*COLOURS, *SHAPES, *SIDES, *(name for row in PLACES for name in row)])]
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert ids[0] == tokenizer.bos_token_id
        assert ids[-1] == tokenizer.eos_token_id
        assert len(ids) <= script.MAX_TOKENS
    assert tokenizer("a quark")["input_ids"].count(tokenizer.unk_token_id) == 1


def test_training_and_scoring_embed_alike(script: ModuleType) -> None:
    scenes = [sample_scene("eval", index)[0] for index in range(9)]
    texts = [describe(scene) for scene in scenes]
    model, processor = CLIPModel.from_pretrained(SHIPPED, dtype=torch.float32).eval(), script.new_processor()
    with torch.no_grad():
        shown = script.embed_images(model, processor, [scene.image for scene in scenes])
        cosines = (shown * script.embed_texts(model, processor, texts)).sum(dim=1)
    expected = ClipScore().cosines(texts, [(scene.image,) for scene in scenes])
    np.testing.assert_allclose(cosines.numpy(), expected, atol=1e-5)


def test_the_table_compares_with_the_true_description(script: ModuleType) -> None:
    """With a stand-in that gives the share of the image's own words in a text."""
    scenes = [sample_scene("eval", index)[0] for index in range(40)]
    own = {scene.image.tobytes(): set(describe(scene).replace(",", "").split()) for scene in scenes}

    def overlap(text: str, image: Image) -> float:
        words = set(text.replace(",", "").split())
        return len(words & own[image.tobytes()]) / len(words | own[image.tobytes()])

    class Overlap(ClipScore):
        def cosines(self, descriptions: Sequence[str], images: Sequence[tuple[Image, ...]]) -> list[float]:
            return [overlap(text, image) for text, (image,) in zip(descriptions, images, strict=True)]

    rows = {row.sort: row for row in script.measure(Overlap(), scenes)}
    assert rows["true"].beaten == 0
    assert rows["true"].cosine == rows["true"].reward == 1
    assert rows["of another scene"].beaten > 0.9
    assert rows["an image"].cosine < 0.1
    assert script.retrieval(Overlap(), scenes) > 0.9
