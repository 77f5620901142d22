"""On-policy distillation: the gradient is that of the reverse KL divergence, and a student becomes its teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium
import pytest
import torch
from accelerate import Accelerator
from helpers import scored

from vlmenv.agents.vlm import VLMAgent
from vlmenv.algos import GRPO, OPD, GRPOConfig, LossInputs, OPDConfig, Trainer, TrainerConfig
from vlmenv.algos.bandit import TAUGHT, Table, learn
from vlmenv.algos.losses import BOUND
from vlmenv.building import load_teacher
from vlmenv.core.errors import ConfigError, DataError
from vlmenv.options.train import default_config

OLD = torch.tensor([[-1.0, -2.0], [-0.5, -3.0]], dtype=torch.float64)
TEACHER = torch.tensor([[-2.0, -0.5], [-0.5, -80.0]], dtype=torch.float64)


def test_advantages_by_hand() -> None:
    """The teacher's log-probability less the student's, at most 20 nats, and the rewards' advantages by weight."""
    given = scored([0.0, 1.0], old_logprobs=OLD, teacher_logprobs=TEACHER)
    found = OPD(OPDConfig(group_size=2)).credit(given).advantages
    torch.testing.assert_close(found, torch.tensor([[-1.0, 1.5], [0.0, -BOUND]], dtype=torch.float64))
    mixed = OPD(OPDConfig(group_size=2, reward_weight=0.5)).credit(given).advantages
    torch.testing.assert_close(
        mixed - found, 0.5 * GRPO(GRPOConfig(group_size=2)).credit(given).advantages.expand(2, 2)
    )


def test_the_expected_gradient_is_that_of_the_reverse_divergence() -> None:
    """Over all tokens of a small vocabulary, each as often as the student samples it."""
    logits = torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    teacher = torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).log_softmax(0)
    logprobs = logits.log_softmax(0)
    (wanted,) = torch.autograd.grad((logprobs.exp() * (logprobs - teacher)).sum(), logits, retain_graph=True)
    old = logprobs.detach()[:, None]
    mask = torch.ones(6, 1, dtype=torch.bool)
    given = scored([0.0] * 6, mask=mask, old_logprobs=old, teacher_logprobs=teacher[:, None])
    algorithm = OPD(OPDConfig(group_size=2))
    inputs = LossInputs(logprobs[:, None], old, algorithm.credit(given).advantages, mask, old.exp())
    (found,) = torch.autograd.grad(algorithm.loss(inputs).loss, logits)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


@pytest.mark.slow
def test_a_student_becomes_its_teacher_where_rewards_say_otherwise() -> None:
    found = learn(OPD(OPDConfig()), steps=150)
    teacher = Table(TAUGHT, critic=False).answers().sum(dim=-1).exp().double()
    assert ((found - teacher).abs().sum(dim=1) / 2 < 0.05).all(), found


@pytest.mark.parametrize(
    "options",
    [
        {"reward_weight": -1.0},
        {"objective": "gmpo"},
        {"ratio": "sequence"},
        {"most_rounds": 4},
        {"scale": "none"},
        {"scale": "batch"},
        {"per_term": True},
    ],
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        OPDConfig(**options)


def test_a_teacher_is_needed(builtin: VLMAgent) -> None:
    envs = gymnasium.make_vec("VLM-VQA-v0", num_envs=4, group_size=2)
    with pytest.raises(ConfigError, match="opd needs a teacher"):
        Trainer(builtin, envs, OPD(OPDConfig(group_size=2)), TrainerConfig(), Accelerator(cpu=True))


@pytest.mark.slow
def test_a_model_teaches_another(builtin: VLMAgent) -> None:
    """It is loaded frozen, and the divergence of a student that has lost its way falls."""
    teacher = load_teacher("builtin", default_config("opd"), builtin, torch.device("cpu"))
    assert not teacher.parameters()
    before = {name: one.clone() for name, one in teacher.policy.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in builtin.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    envs = gymnasium.make_vec("VLM-VQA-v0", num_envs=16, group_size=2)
    config = TrainerConfig(steps=8, lr=1e-3, lr_schedule="constant", warmup_steps=0)
    trainer = Trainer(builtin, envs, OPD(OPDConfig(group_size=2)), config, Accelerator(cpu=True), teacher)
    found = [one.metrics["policy/teacher_kl"] for one in trainer.train(seed=0)]
    assert sum(found[-3:]) / 3 < 0.8 * found[0], found
    assert all(torch.equal(before[name], one) for name, one in teacher.policy.named_parameters())


@pytest.mark.slow
def test_a_prompt_without_room_in_the_teacher_is_named(builtin: VLMAgent) -> None:
    teacher = VLMAgent.from_pretrained("builtin", sampling=builtin.sampling)
    teacher.max_length = 100
    rows = [{"id": f"row {i}", "question": "How many?" + " word" * 20 * i, "answer": "3"} for i in range(2)]
    envs = gymnasium.make_vec("VLM-VQA-v0", num_envs=4, group_size=2, dataset=rows)
    made = Trainer(builtin, envs, OPD(OPDConfig(group_size=2)), TrainerConfig(steps=1), Accelerator(cpu=True), teacher)
    with pytest.raises(
        DataError, match=r"^sample row 1, for the teacher: the prompt has \d+ tokens, which leaves no room"
    ):
        next(made.train(seed=0))


def test_a_teacher_with_another_tokenizer_is_refused(builtin: VLMAgent, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = builtin.family.processor.tokenizer
    monkeypatch.setattr(tokenizer, "get_vocab", lambda: {"a": 0})
    with pytest.raises(ConfigError, match="another tokenizer than the model"):
        load_teacher("builtin", default_config("opd"), builtin, torch.device("cpu"))


def test_the_name_of_a_teacher_holds_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "teacher").mkdir()
    monkeypatch.chdir(tmp_path)
    config = default_config("opd")
    given = type(config)(algo="opd", algorithm=OPDConfig(teacher="teacher"))
    assert given.located().algorithm.teacher == str(tmp_path / "teacher")
