"""Files for verl, EasyR1 and ms-swift: what they read, and how they are scored."""

from __future__ import annotations

import importlib.util
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
from adapter_rows import write_rows
from PIL import Image
from transformers import AutoTokenizer

from vlmenv.adapters.export import export
from vlmenv.adapters.task import PortableTask, judged
from vlmenv.agents.families import resize_rule
from vlmenv.agents.vlm import find_model
from vlmenv.cli import main
from vlmenv.core.errors import ConfigError, DataError


def loaded(file: Path) -> Any:
    spec = importlib.util.spec_from_file_location("reward", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parquet(file: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pyarrow.parquet.read_table(file).to_pylist()
    return rows


@pytest.mark.slow
def test_verl(tmp_path: Path) -> None:
    task = PortableTask("VLM-VQA-v0", dataset=str(write_rows(tmp_path)))
    done = export(task, "verl", tmp_path / "out" / "train.parquet")
    rows = {row["extra_info"]["index"]: row for row in parquet(tmp_path / "out" / "train.parquet")}
    assert done.rows == len(rows) == 2
    assert [turn["role"] for turn in rows[0]["prompt"]] == ["system", "user"]
    assert rows[1]["prompt"][0] == {"role": "user", "content": "<image>Colour?"}
    assert sum(turn["content"].count("<image>") for turn in rows[1]["prompt"]) == len(rows[1]["images"]) == 2
    first = np.asarray(Image.open(io.BytesIO(rows[0]["images"][0]["bytes"])))
    np.testing.assert_array_equal(first, task.observation(0)["images"][0])
    score = loaded(done.reward).compute_score
    for index, row in rows.items():
        right = task.task.write_answer(task.task.source.get(index))
        for text in (right, "blue", ""):
            truth = row["reward_model"]["ground_truth"]
            found = score(data_source=row["data_source"], solution_str=text, ground_truth=truth, extra_info={})
            expected = task.score([text], [index])[0]
            assert found == {"score": expected.reward, **expected.terms}


@pytest.mark.slow
def test_easyr1(tmp_path: Path) -> None:
    task = PortableTask("VLM-REC-v0", coordinates="norm1000")
    done = export(task, "easyr1", tmp_path / "train.parquet", rows=70)  # more than are held at a time
    rows = parquet(tmp_path / "train.parquet")
    assert done.rows == len(rows) == 70
    assert rows[0]["problem"].startswith("<image>")
    indices = task.indices(70, seed=0)
    texts = [task.task.write_answer(task.task.source.get(index)) if index % 2 else "?" for index in indices]
    reward = loaded(done.reward)
    given = [
        {"response": text, "response_length": 1, "ground_truth": row["answer"]}
        for text, row in zip(texts, rows, strict=True)
    ]
    assert [one["overall"] for one in reward.compute_score(given)] == [
        score.reward for score in task.score(texts, indices)
    ]
    assert reward.REWARD_TYPE == "batch"
    assert "worker.reward.reward_function=" in done.options


@pytest.mark.parametrize("to", ["verl", "easyr1", "swift", "lmms-eval"])
def test_episodes_of_several_turns_are_refused_by_name(to: Any, tmp_path: Path) -> None:
    named = {"verl": "verl", "easyr1": "EasyR1", "swift": "ms-swift", "lmms-eval": "lmms-eval"}[to]
    told = rf"VLM-Zoom-v0 has episodes of several turns, and {named}.* a single (completion|answer): give max_turns=1"
    with pytest.raises(ConfigError, match=told):
        export(PortableTask("VLM-Zoom-v0"), to, tmp_path / "rows", rows=2)
    assert not list(tmp_path.iterdir())


def test_easyr1_takes_one_turn(tmp_path: Path) -> None:
    task = PortableTask("VLM-REC-v0", system_prompt="Look twice.")
    with pytest.raises(ConfigError, match="earlier turns"):
        export(task, "easyr1", tmp_path / "train.parquet", rows=1)


@pytest.mark.parametrize(("to", "name"), [("verl", "x.parquet"), ("swift", "x.jsonl")])
def test_rows_that_are_all_broken_are_told(to: Any, name: str, tmp_path: Path) -> None:
    task = PortableTask("VLM-VQA-v0", dataset=str(write_rows(tmp_path)), skip_broken=True)
    for file in tmp_path.glob("*.png"):
        file.write_bytes(b"no image")
    with pytest.raises(DataError, match="2 of 2 samples cannot be read"):
        export(task, to, tmp_path / name)
    assert not (tmp_path / name).exists()


def test_rows_of_texts_alone(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"id": 1, "problem": "What is 2 + 2?", "solution": "4"}\n' * 2)
    task = PortableTask("VLM-Math-v0", dataset=str(tmp_path / "rows.jsonl"))
    export(task, "verl", tmp_path / "verl" / "rows.parquet")
    export(task, "swift", tmp_path / "swift" / "rows.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "swift" / "rows.jsonl").read_text().splitlines()]
    assert [row["images"] for row in (*parquet(tmp_path / "verl" / "rows.parquet"), *lines)] == [[]] * 4
    assert "2 + 2" in lines[0]["messages"][-1]["content"]


def test_the_rewards_of_another_trainer_stay(tmp_path: Path) -> None:
    task = PortableTask("VLM-Math-v0")
    for _ in range(2):
        export(task, "verl", tmp_path / "rows.parquet", rows=1)
    before = (tmp_path / "reward.py").read_text()
    with pytest.raises(ConfigError, match=r"reward.py is there already, and is not what easyr1 needs"):
        export(task, "easyr1", tmp_path / "others.parquet", rows=1)
    assert (tmp_path / "reward.py").read_text() == before
    assert not (tmp_path / "others.parquet").exists()


@pytest.mark.slow
def test_swift(tmp_path: Path, qwen2_5_vl_folder: Path) -> None:
    """Qwen2.5-VL's boxes are in pixels of the image at the model's size."""
    model = ["--model", str(qwen2_5_vl_folder)]
    main(["data", "export", str(tmp_path / "train.jsonl"), "--to", "swift", "--rows", "3", *model])
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    task = PortableTask("VLM-REC-v0", coordinates="resized", resize=resize_rule(qwen2_5_vl_folder))
    assert len(rows) == 3
    for row, index in zip(rows, task.indices(3, seed=0), strict=True):
        assert json.loads(row["solution"])["index"] == index
        np.testing.assert_array_equal(np.asarray(Image.open(row["images"][0])), task.observation(index)["images"][0])
        right = task.task.write_answer(task.task.source.get(index))
        assert judged([right], [row["solution"]])[0].reward == task.score([right], [index])[0].reward > 1
    assert (tmp_path / "reward.py").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x.json", "--to", "verl", "--rows", "1"], "verl reads .parquet"),
        (["x.parquet", "--to", "swift", "--rows", "1"], "swift reads .jsonl"),
        (["x.parquet"], "say how many rows"),
        (["x.parquet", "--rows", "0"], "rows must be at least 1"),
        (["x.parquet", "--rows", "1", "--coordinates", "resized"], "go with model"),
        (["x.parquet", "--rows", "1", "--chat-template-kwargs", "a", "1"], "trainer's own"),
        ([], "name the file to write"),
    ],
)
def test_wrong_options_are_refused(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    placed = [str(tmp_path / one) if one.startswith("x.") else one for one in arguments]
    with pytest.raises(SystemExit):
        main(["data", "export", *placed])
    assert message in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_verl_scores_alike(tmp_path: Path) -> None:
    """By verl's own loader of reward functions and its reward manager, from the options that are told."""
    protocol = pytest.importorskip("verl.protocol", reason="verl is not installed")
    manager = pytest.importorskip("verl.experimental.reward_loop.reward_manager.naive").NaiveRewardManager
    load = pytest.importorskip("verl.trainer.ppo.reward").get_custom_reward_fn
    from omegaconf import OmegaConf

    task = PortableTask("VLM-REC-v0", coordinates="norm1000")
    done = export(task, "verl", tmp_path / "train.parquet", rows=20)
    rows = parquet(tmp_path / "train.parquet")
    config = OmegaConf.from_dotlist(re.findall(r"\S*custom_reward_function\.\S+", done.options))
    tokenizer = AutoTokenizer.from_pretrained(find_model("builtin"))
    scorer = manager(config, tokenizer, load(config))
    indices = task.indices(20, seed=0)
    texts = [task.task.write_answer(task.task.source.get(index)) if index % 3 else "?" for index in indices]
    for row, text, expected in zip(rows, texts, task.score(texts, indices), strict=True):
        ids = torch.tensor([tokenizer.encode(text)])
        fields = {name: np.array([row[name]], object) for name in ("data_source", "reward_model", "extra_info")}
        tensors = {"responses": ids, "attention_mask": torch.ones_like(ids)}
        data = protocol.DataProto.from_dict(tensors=tensors, non_tensors=fields)
        found = scorer.loop.run_until_complete(scorer.run_single(data))
        assert found["reward_score"] == pytest.approx(expected.reward, abs=1e-9)
        assert found["reward_extra_info"] == {"score": found["reward_score"], **expected.terms}


@pytest.mark.slow
def test_easyr1_scores_alike(tmp_path: Path) -> None:
    """By EasyR1's own reward manager, from the option that is told. Its package has the name of verl."""
    managers = pytest.importorskip("verl.workers.reward.function", reason="EasyR1 is not installed")
    from verl.protocol import DataProto
    from verl.workers.reward.config import RewardConfig

    task = PortableTask("VLM-REC-v0", coordinates="norm1000")
    done = export(task, "easyr1", tmp_path / "train.parquet", rows=20)
    (function,) = re.findall(r"worker\.reward\.reward_function=(\S+)", done.options)
    config = RewardConfig(function)
    config.post_init()
    tokenizer = AutoTokenizer.from_pretrained(find_model("builtin"))
    indices = task.indices(20, seed=0)
    texts = [task.task.write_answer(task.task.source.get(index)) if index % 3 else "?" for index in indices]
    ids = [torch.tensor(tokenizer.encode(text)) for text in texts]
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(one) for one in ids], batch_first=True)
    truths = np.array([row["answer"] for row in parquet(tmp_path / "train.parquet")], object)
    data = DataProto.from_dict({"responses": padded, "response_mask": mask}, {"ground_truth": truths})
    _, metrics = managers.AutoRewardManager(config, tokenizer).compute_reward(data)
    expected = task.score(texts, indices)
    np.testing.assert_allclose(metrics["overall"], [one.reward for one in expected], rtol=0, atol=1e-9)
    assert metrics["iou"] == [one.terms["iou"] for one in expected]
