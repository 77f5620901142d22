"""The doctor on models in health, and on faults that were planted, without vLLM."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import OTHER_ROLE, SMALLER, CopyEngine, copied, examined, failed, unchecked
from safetensors.torch import load_file, save_file
from torch import Tensor

from vlmenv import building as tasks
from vlmenv.agents import saving
from vlmenv.agents.sampling import Sampled
from vlmenv.agents.vlm import VLMAgent, find_model
from vlmenv.cli import main
from vlmenv.core.errors import EngineError, RewardError
from vlmenv.doctor import CHECKS
from vlmenv.envs.rec import RECEnv
from vlmenv.options.fields import flatten
from vlmenv.options.files import to_yaml
from vlmenv.options.train import default_config

pytestmark = pytest.mark.slow

NUMBERS = {"log-probs", "greedy answers", "after an update", "weights put back"}
"""checks that compare log-probabilities"""
NEEDS_ENGINE = NUMBERS | {"weight checksums"}


MACHINE = {"versions", "device"}


def renaming(convert: Callable[..., dict[str, Tensor]]) -> Callable[..., dict[str, Tensor]]:
    """Publishes a weight by another name, as a version of transformers might."""

    def renamed(*args: Any) -> dict[str, Tensor]:
        return {name.replace("blocks.0.norm1", "layers.0.norm1"): one for name, one in convert(*args).items()}

    return renamed


@pytest.fixture
def with_engine(monkeypatch: pytest.MonkeyPatch) -> Callable[[type[CopyEngine]], None]:
    """Puts an engine in vLLM's place."""

    def put(engine: Callable[..., CopyEngine]) -> None:
        monkeypatch.setattr(tasks, "require_vllm", lambda: None)
        monkeypatch.setattr(tasks, "VLLMEngine", engine)

    return put


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"env": "VLM-OVD-v0", "precision": "bf16"},
        {"lora_rank": 4, "lora_vision": True, "temperature": 0.7, "top_k": 20},
        {"freeze_vision": True, "share_prefixes": False, "beta": 0.1},
    ],
    ids=["defaults", "detection in bf16", "adapters", "frozen vision"],
)
def test_the_builtin_model_is_in_health(options: Mapping[str, Any]) -> None:
    if options and "adaptation" in options and options["adaptation"].lora_rank:
        pytest.importorskip("peft")
    findings = examined(**options)
    assert list(findings) == [check.name for check in CHECKS]
    assert {name: one for name, one in findings.items() if not one.passed} == {}
    moved = float(re.search(r"moved them by ([\d.]+)", findings["after an update"].figure)[1])
    assert moved > 0.3


def test_an_engine_in_step_is_in_health(with_engine: Callable[..., None]) -> None:
    with_engine(CopyEngine)
    findings = examined(engine="vllm")
    assert {name: one for name, one in findings.items() if not one.passed} == {}
    assert findings["engine"].figure == "vllm, with room for 2048 tokens"


@pytest.mark.parametrize("env", ["VLM-VQA-v0", "VLM-Math-v0"])
def test_tasks_without_boxes_have_no_convention(env: str) -> None:
    findings = examined(env=env)
    assert unchecked(findings) == {"coordinates"}
    assert failed(findings) <= {"answers read"}


def test_examining_leaves_the_weights_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit, those of adapters at 0 among them."""
    pytest.importorskip("peft")
    agents: list[VLMAgent] = []
    load = VLMAgent.from_pretrained

    def keeping(*args: Any, **options: Any) -> VLMAgent:
        agents.append(load(*args, **options))
        return agents[-1]

    monkeypatch.setattr(VLMAgent, "from_pretrained", keeping)
    examined(lora_rank=4)
    (agent,) = agents
    state = agent.family.model.state_dict()
    base = load("builtin").family.model.state_dict()
    assert {name for name in state if "lora_B" in name and state[name].any()} == set()
    assert any("lora_A" in name and tensor.any() for name, tensor in state.items())
    for name, tensor in base.items():
        adapted = name.removesuffix(".weight") + ".base_layer.weight"
        assert torch.equal(state[adapted if adapted in state else name], tensor), name


# Planted faults


def test_another_image_processor_is_found(tmp_path: Path, with_engine: Callable[..., None]) -> None:
    other = copied(tmp_path / "other", SMALLER)
    findings = examined(published=str(other))
    assert failed(findings) == {"prompt images"}
    assert re.match(r"11 image tokens are the trainer's, 6 the published", findings["prompt images"].figure)
    assert f"Copy preprocessor_config.json from {other}" in findings["prompt images"].remedy
    with_engine(lambda folder, family, **options: CopyEngine(other, family))
    findings = examined(engine="vllm")
    assert failed(findings) == {"prompt images"}
    assert findings["prompt images"].figure == "11 image tokens are the trainer's, 6 the engine's"
    assert unchecked(findings) == NEEDS_ENGINE


def test_other_pixels_in_as_many_tokens_are_found(tmp_path: Path, with_engine: Callable[..., None]) -> None:
    other = copied(tmp_path / "other", {"image_mean": [0.4, 0.5, 0.6]})
    findings = examined(published=str(other))
    assert failed(findings) == {"prompt images"}
    assert "pixels differ by 0.2 from the published" in findings["prompt images"].figure
    with_engine(lambda folder, family, **options: CopyEngine(other, family))
    assert {"log-probs", "after an update"} <= failed(examined(engine="vllm")) <= NEEDS_ENGINE


def test_patches_that_the_vision_tower_does_not_merge_are_found(tmp_path: Path) -> None:
    folder = copied(tmp_path / "model", {"merge_size": 1})
    findings = examined(model=str(folder))
    assert failed(findings) == {"image features"}
    assert {"prompt text", "prompt images", "answers read", "memory"} | NEEDS_ENGINE <= unchecked(findings)
    assert findings["image features"].figure.startswith("36 image tokens for 9 features, of sample scene-train-")
    assert str(folder) in findings["image features"].remedy


def test_another_chat_template_is_found(tmp_path: Path) -> None:
    other = copied(tmp_path / "other", template=OTHER_ROLE)
    findings = examined(published=str(other))
    assert failed(findings) == {"prompt text"}
    assert re.search(r"assistant.* is the trainer's, .*robot.* the published", findings["prompt text"].figure)
    assert f"Copy chat_template.jinja and the tokenizer's files from {other}" in findings["prompt text"].remedy


def test_a_renamed_weight_is_found(monkeypatch: pytest.MonkeyPatch, with_engine: Callable[..., None]) -> None:
    monkeypatch.setattr(saving, "convert_back", renaming(saving.convert_back))
    findings = examined()
    assert failed(findings) == {"weight names"}
    assert "2 are not in the model's folder, model.visual.layers.0.norm1.bias" in findings["weight names"].figure
    with_engine(CopyEngine)
    findings = examined(engine="vllm")
    assert failed(findings) == {"weight names", "after an update"}
    assert "2 are missing ['model.visual.blocks.0.norm1.bias'" in findings["after an update"].figure
    assert unchecked(findings) == {"weights put back", "weight checksums"}


def test_a_renamed_weight_in_the_files_is_found(tmp_path: Path) -> None:
    folder = copied(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["model.visual.merger.extra.weight"] = weights.pop("model.visual.merger.norm.weight")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    findings = examined(model=str(folder))
    assert failed(findings) == {"model"}
    assert "model.visual.merger.norm.weight among them" in findings["model"].figure
    assert "published layout" in findings["model"].remedy
    assert {name for name, one in findings.items() if one.passed} == {"versions", "device", "samples", "right answers"}


@pytest.mark.parametrize("weight", ["model.visual.blocks.1.attn.qkv.bias", "model.language_model.norm.weight"])
def test_a_single_weight_that_is_not_taken_over_is_found(weight: str, with_engine: Callable[..., None]) -> None:
    class Forgetful(CopyEngine):
        def sync(self, weights: Mapping[str, Tensor], *, vision: tuple[int, ...] | None = None) -> None:
            own = self.copy.family.model.state_dict()[weight].clone()
            super().sync({name: own if name == weight else tensor for name, tensor in weights.items()})

    with_engine(Forgetful)
    found = failed(examined(engine="vllm"))
    assert (
        {"after an update", "weight checksums"} <= found <= {"after an update", "weights put back", "weight checksums"}
    )


@pytest.mark.parametrize("part", [slice(None), slice(8)], ids=["all of it", "a part of it"])
def test_an_old_weight_that_bfloat16_hides_is_found(part: slice, with_engine: Callable[..., None]) -> None:
    weight = "model.visual.blocks.1.attn.qkv.bias"

    class Forgetful(CopyEngine):
        def sync(self, weights: Mapping[str, Tensor], *, vision: tuple[int, ...] | None = None) -> None:
            given = weights[weight].clone()
            given[part] = self.copy.family.model.state_dict()[weight][part]
            super().sync({**weights, weight: given})

    with_engine(Forgetful)
    findings = examined(engine="vllm", precision="bf16")
    assert failed(findings) == {"weight checksums"}
    assert f"1 ({weight} among them)" in findings["weight checksums"].figure
    assert findings["coordinates"].passed  # by the model itself


def test_a_weight_that_is_handed_over_as_it_was_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    published, first, name = VLMAgent._published_weights, {}, "model.language_model.norm.weight"

    def with_an_old_one(self: VLMAgent) -> dict[str, Tensor]:
        weights = published(self)
        return weights | {name: first.setdefault(name, weights[name].clone())}

    monkeypatch.setattr(VLMAgent, "_published_weights", with_an_old_one)
    findings = examined()
    assert failed(findings) == {"weight checksums"}
    assert f"1 ({name} among them)" in findings["weight checksums"].figure


def test_a_stale_cache_is_found(with_engine: Callable[..., None]) -> None:
    """Features of images are kept over an update."""

    class Caching(CopyEngine):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            see, seen = self.copy.family.model.model.get_image_features, {}

            def cached(pixel_values: Tensor, **more: Any) -> Any:
                key = pixel_values.numpy().tobytes()
                if key not in seen:
                    seen[key] = see(pixel_values=pixel_values, **more)
                return seen[key]

            self.copy.family.model.model.get_image_features = cached

    with_engine(Caching)
    findings = examined(engine="vllm")
    assert failed(findings) == {"after an update"}
    assert "a cache of old weights (of prompts or image features)" in findings["after an update"].remedy


def test_another_convention_of_coordinates_is_found() -> None:
    findings = examined(coordinates="norm1000")
    assert failed(findings) == {"coordinates"}
    assert findings["coordinates"].figure.startswith("asked for norm1000, taught original; read as original: IoU 0.")
    assert findings["coordinates"].remedy == ("The answers are in coordinates 'original': give --coordinates original.")


def test_answers_that_cannot_be_read_or_do_not_end_are_found() -> None:
    findings = examined(answer_format="sections", max_new_tokens=4)
    assert failed(findings) == {"answers read", "answers cut off"}
    assert findings["rewards"].passed is None
    assert "greedy 0 of 8, sampled 0 of 16; for example '" in findings["answers read"].figure
    assert findings["answers cut off"].figure == "16 of 16 sampled, at 4 tokens"
    assert findings["answers cut off"].remedy == "Give more room: --max-new-tokens 8."


def test_rewards_that_are_all_alike_are_found() -> None:
    findings = examined(rewards={"format": 1.0})
    assert failed(findings) == {"rewards"}
    assert findings["rewards"].figure == "1.00 in the mean: format 1.00; different within 0 of 8 pairs of answers"
    assert "All answers have the same reward" in findings["rewards"].remedy


def test_a_step_beyond_the_memory_is_found() -> None:
    findings = examined(prompts_per_step=2**16)
    assert failed(findings) == {"memory"}
    found = findings["memory"]
    assert re.match(r"[\d.]{4,} GB of [\d.]+ GB at the update: weights 6 MB, optimizer 12 MB, gr", found.figure)
    assert re.match(r"`vlmenv doctor --card \d+GB` with these options names those that help", found.remedy)


# Errors


def test_an_engine_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What can do without it is looked at all the same."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    findings = examined(engine="vllm", engine_length=512, engine_memory=0.5, tensor_parallel=2)
    assert failed(findings) == {"engine"}
    assert 'needs the extra "vllm"' in findings["engine"].figure
    assert unchecked(findings) == NEEDS_ENGINE


def test_an_engine_that_answers_nothing(with_engine: Callable[..., None]) -> None:
    """The model itself answers in its place, so that the rest can be looked at."""

    class Broken(CopyEngine):
        def generate(self, *args: Any) -> list[Sampled]:
            raise EngineError("out of order")

    with_engine(Broken)
    findings = examined(engine="vllm")
    assert failed(findings) == {"engine"}
    assert findings["engine"].figure == "out of order"
    assert unchecked(findings) == NEEDS_ENGINE
    assert findings["answers read"].passed


def test_an_engine_that_fails(with_engine: Callable[..., None]) -> None:
    class Failing(CopyEngine):
        def sync(self, weights: Mapping[str, Tensor], *, vision: tuple[int, ...] | None = None) -> None:
            raise RuntimeError("no such worker")

    with_engine(Failing)
    findings = examined(engine="vllm")
    assert failed(findings) == {"after an update"}
    assert findings["after an update"].figure == "RuntimeError: no such worker"
    assert "cannot load new weights" in findings["after an update"].remedy
    assert unchecked(findings) == {"weights put back", "weight checksums"}


def test_an_error_in_one_check_fails_that_one_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def parse(self: RECEnv, text: str) -> None:
        raise RewardError("no such answer")

    monkeypatch.setattr(RECEnv, "parse", parse)
    findings = examined()
    assert failed(findings) == {"right answers", "coordinates", "answers read", "rewards"}
    assert findings["answers read"].figure == "no such answer"
    assert "fix its parse()" in findings["answers read"].remedy


def test_without_a_model_or_samples_the_rest_is_told_apart() -> None:
    findings = examined(env="VLM-RCE-v0")
    assert failed(findings) == {"samples"}
    assert "Did you mean 'VLM-REC-v0'?" in findings["samples"].figure
    assert {name for name, one in findings.items() if one.passed} == {
        *MACHINE,
        *("model", "fast paths", "engine", "weight names", "weight checksums"),
    }
    findings = examined(model="./nowhere")
    assert failed(findings) == {"model", "samples"}
    assert {name for name, one in findings.items() if one.passed} == MACHINE


def test_weights_are_put_back_where_the_check_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error in the middle of the update leaves the model as it was for the checks that follow."""
    calls = []

    def sync(self: VLMAgent) -> None:
        calls.append(self.family.model.state_dict()["model.language_model.norm.weight"].clone())
        raise MemoryError("full")

    monkeypatch.setattr(VLMAgent, "sync", sync)
    findings = examined()
    assert failed(findings) == {"after an update"}
    stored = VLMAgent.from_pretrained(find_model("builtin")).family.model.state_dict()
    assert not torch.equal(calls[0], stored["model.language_model.norm.weight"])
    assert findings["coordinates"].passed


# The command


def test_the_command_ends_with_0_where_all_is_well(capsys: pytest.CaptureFixture[str]) -> None:
    main(["doctor", "--device", "cpu"])
    out = capsys.readouterr().out
    assert all(f"│ {check.name} " in out for check in CHECKS)
    assert out.count("│ passed ") == len(CHECKS)
    assert "everything adds up" in out


def test_the_command_ends_with_1_where_something_is_wrong(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as caught:
        main(["doctor", "--device", "cpu", "--coordinates", "norm1000", "--max-new-tokens", "6"])
    assert caught.value.code == 1
    out = capsys.readouterr().out
    assert "checks failed: coordinates, answers" in out or "checks failed: answers" in out
    assert "--max-new-tokens 12" in out


def test_the_options_of_a_run_are_taken_from_its_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Those of its algorithm have no bearing here, and those of neither command are refused."""
    file = tmp_path / "config.yaml"
    options = flatten(default_config("ppo"))
    written = to_yaml(
        {name: options[name] for name in options if name not in ("recipe", "config", "resume", "dry_run")}
    )
    file.write_text(written + "prompts_per_step: 1048576\n")  # the last one counts
    with pytest.raises(SystemExit):
        main(["doctor", "--config", str(file), "--device", "cpu"])
    assert "1 of 22 checks failed: memory" in capsys.readouterr().out
    file.write_text("stepz: 3\n")
    with pytest.raises(SystemExit):
        main(["doctor", "--config", str(file)])
    assert "unknown option 'stepz'" in capsys.readouterr().err
