"""A task for lmms-eval: its file, and the package itself on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from adapter_rows import write_rows

from vlmenv.adapters.export import export
from vlmenv.adapters.for_lmms_eval import doc_to_messages, doc_to_text, doc_to_visual, process_results
from vlmenv.adapters.task import PortableTask
from vlmenv.agents.vlm import find_model
from vlmenv.cli import main


class Loader(yaml.SafeLoader):
    """Reads `!function` as a text."""


Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))  # type: ignore[arg-type]


def test_a_task_shows_and_scores_its_samples(tmp_path: Path) -> None:
    task = PortableTask("VLM-VQA-v0", dataset=str(write_rows(tmp_path)))
    done = export(task, "lmms-eval", tmp_path / "lmms" / "colours.yaml")
    told = yaml.load((tmp_path / "lmms" / "colours.yaml").read_text(), Loader)
    assert told["task"] == "colours"
    assert told["process_results"] == "reward.process_results"
    docs = [json.loads(line) for line in (tmp_path / "lmms" / "colours.jsonl").read_text().splitlines()]
    assert done.rows == len(docs) == 2
    for doc in docs:
        index = json.loads(doc["key"])["index"]
        shown = task.observation(index)
        turns = doc_to_messages(doc)
        pictures = [part["url"] for turn in turns for part in turn["content"] if part["type"] == "image"]
        for seen in (pictures, doc_to_visual(doc)):
            assert len(seen) == 2
            for picture, image in zip(seen, shown["images"], strict=True):
                np.testing.assert_array_equal(np.asarray(picture), image)
        assert doc_to_text(doc) == shown["prompt"]
        right = task.task.write_answer(task.task.source.get(index))
        score = task.score([right], [index])[0]
        found = process_results(doc, [right])
        assert found == {"reward": score.reward, **score.terms}
        assert found.keys() == {one["metric"] for one in told["metric_list"]}


def test_a_rows_own_term_is_a_metric(tmp_path: Path) -> None:
    rows = [{"problem": "1 + 1?", "solution": "2"}, {"problem": "x", "solution": "B", "accu_reward_method": "mcq"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = PortableTask("VLM-Math-v0", dataset=str(tmp_path / "rows.jsonl"))
    export(task, "lmms-eval", tmp_path / "sums.yaml")
    told = yaml.load((tmp_path / "sums.yaml").read_text(), Loader)
    names = {one["metric"] for one in told["metric_list"]}
    for line in (tmp_path / "sums.jsonl").read_text().splitlines():
        assert process_results(json.loads(line), ["?"]).keys() <= names


@pytest.mark.slow
def test_lmms_eval_measures_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package's own loop with its model class for Qwen3-VL; its scores are ours of the same answers."""
    pytest.importorskip("lmms_eval", reason="lmms-eval is not installed")
    main(["data", "export", str(tmp_path / "rec.yaml"), "--to", "lmms-eval", "--rows", "4", "--model", "builtin"])
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    sizes = "device_map=cpu,attn_implementation=sdpa,min_pixels=1024,max_pixels=36864,system_prompt="
    results: Any = simple_evaluate(
        model="qwen3_vl",
        model_args=f"pretrained={find_model('builtin')},{sizes}",
        tasks=["rec"],
        task_manager=TaskManager(include_path=str(tmp_path)),
        batch_size=2,
        device="cpu",
        log_samples=True,
    )
    docs = [json.loads(line) for line in (tmp_path / "rec.jsonl").read_text().splitlines()]
    rewards = []
    for one in results["samples"]["rec"]:
        expected = process_results(docs[one["doc_id"]], [one["filtered_resps"][0]])
        assert {name: one[name] for name in expected} == expected
        rewards.append(expected["reward"])
    assert len(rewards) == 4
    assert np.mean(rewards) > 0.3  # of the built-in model, whose boxes are loose
