"""Run by `accelerate launch`: two processes train together, and each check has a process alone to compare with."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch.distributed.tensor import DTensor
from transformers import AutoModelForImageTextToText

import vlmenv  # noqa: F401
from vlmenv.agents.vlm import Sampling, VLMAgent
from vlmenv.algos import GRPO, GRPOConfig, Trainer, TrainerConfig
from vlmenv.algos.batch import Batch, micro_batches
from vlmenv.core.rollout import Observation, Rollout
from vlmenv.evaluation import evaluate
from vlmenv.processes import leave
from vlmenv.runs.checkpoints import load_checkpoint, save_checkpoint
from vlmenv.runs.run_folder import RunFolder

TOKENS = 120  # of a micro-batch


def main(kind: str, sorts: list[str], folder: Path, models: list[str]) -> None:
    torch.set_num_threads(1)
    handlers = [DistributedDataParallelKwargs(find_unused_parameters=True)]
    accelerator = Accelerator(cpu=True, kwargs_handlers=handlers)
    assert accelerator.num_processes == 2
    for sort in sorts:
        if sort != "bf16":  # whose gradient is that of "full"
            check_gradient(accelerator, sort)
        check_run(accelerator, sort, RunFolder(folder / sort))
    for sort in ("frozen", *["lora without vision"] * ("lora" in sorts), *models):
        check_uneven_passes(accelerator, sort)
    assert trainer_of(build("full"), accelerator).processes.name == kind
    leave()


def build(sort: str) -> VLMAgent:
    torch.manual_seed(0)
    name = os.environ["BF16_BASE"] if sort == "bf16" else sort if Path(sort).is_dir() else "builtin"
    agent = VLMAgent.from_pretrained(name, sampling=Sampling(max_new_tokens=20))
    if sort == "frozen":
        agent.freeze(vision=True, projector=True)
    if sort.startswith("lora"):
        agent.add_lora(rank=2, alpha=4, vision=sort == "lora")
        for parameter in agent.parameters():  # an untrained adapter hides the gradient of its first half
            torch.nn.init.normal_(parameter, std=0.1)
    agent.seed(0)
    return agent


def trainer_of(agent: VLMAgent, accelerator: Accelerator, beta: float = 0.0, **options: Any) -> Trainer:
    shard = {"shard": accelerator.process_index, "num_shards": accelerator.num_processes}
    envs = gymnasium.make_vec("VLM-REC-v0", num_envs=8, group_size=4, **shard)
    config = TrainerConfig(**({"micro_batch_tokens": TOKENS, "steps": 2, "warmup_steps": 0} | options))
    return Trainer(agent, envs, GRPO(GRPOConfig(group_size=4, beta=beta)), config, accelerator)


def check_gradient(accelerator: Accelerator, sort: str) -> None:
    """The gradient of halves of a batch, of which only one has images, and at first, is that of the whole."""
    alone, rank = build(sort), accelerator.process_index
    rollout, advantages = alone.rollout(observations()), torch.linspace(-1, 1, 16)
    expected = plain_gradient(alone, rollout, advantages)
    agent = build(sort)
    trainer = trainer_of(agent, accelerator)
    half = slice(8 * rank, 8 * rank + 8)
    batch = Batch.of(rollout[half], agent.device, advantages[half])
    with trainer.processes.gathered():
        if rank == 0:  # what one has done alone must not tell on what follows
            agent.act(observations()[:1])
    passes = trainer.processes.collect([len(micro_batches(batch.rollout, None, TOKENS))])
    assert passes[0] > passes[1] > 1
    trainer.backward(batch)
    assert_gradient(agent, expected)
    assert max(gradient.abs().max() for name, gradient in expected.items() if "visual" in name) > 1e-3


def observations() -> list[Observation]:
    """A group with an image and one without for one process, and two groups without any for the other."""
    envs = gymnasium.make_vec("VLM-REC-v0", num_envs=4, group_size=4)
    batch, _ = envs.reset(seed=0)
    seen: Observation = {"images": batch["images"][0], "prompt": batch["prompt"][0]}
    unseen: list[Observation] = [{"images": (), "prompt": f"Locate the {name} circle."} for name in ("red", "blue", "")]
    return [one for one in (seen, *unseen) for _ in range(4)]


def assert_gradient(agent: VLMAgent, expected: dict[str, torch.Tensor]) -> None:
    found = {name: p for name, p in agent.family_policy.named_parameters() if p.requires_grad}
    assert found.keys() == expected.keys()
    for name, parameter in found.items():
        torch.testing.assert_close(gradient(parameter), expected[name], atol=1e-6, rtol=0, msg=name)


def check_uneven_passes(accelerator: Accelerator, sort: str) -> None:
    """Gradients and the reference are those of one process, though one could leave out what the other cannot.

    In the first pass one process sees two images that nobody has looked at, the other one; in the second, one has seen
    its images already and has answers of one token, which need none before them, and the other has no images.
    """
    alone, agent, rank = build(sort), build(sort), accelerator.process_index
    trainer = trainer_of(agent, accelerator, beta=0.1, micro_batch_tokens=None, micro_batch_size=8)
    with trainer.processes.gathered():
        rollout = agent.rollout(uneven_observations())
    rollout.prompts[:2] = unseen(rollout).prompts[:2]
    rollout.completions[8:16] = [
        replace(one, token_ids=one.token_ids[:1], logprobs=one.logprobs[:1]) for one in rollout.completions[8:16]
    ]
    half, advantages = rollout[16 * rank : 16 * rank + 16], torch.linspace(-1, 1, 32)
    expected = alone.reference().logprobs(unseen(half)).values
    for rows in (slice(0, 8), slice(8, 16)):
        values = trainer.reference.logprobs(half[rows]).values
        torch.testing.assert_close(values, expected[rows, : values.shape[1]], atol=1e-4, rtol=0)
    expected_gradient = plain_gradient(alone, unseen(rollout), advantages)
    trainer.backward(Batch.of(half, agent.device, advantages[16 * rank : 16 * rank + 16]))
    assert_gradient(agent, expected_gradient)


def uneven_observations() -> list[Observation]:
    """Four groups for each of the processes: all with an image, and the first alone."""
    envs = gymnasium.make_vec("VLM-REC-v0", num_envs=8, group_size=4)
    batch, _ = envs.reset(seed=0)
    a, b = ({"images": batch["images"][i], "prompt": batch["prompt"][i]} for i in (0, 4))
    texts = [{"images": (), "prompt": f"Locate the {name} circle."} for name in ("red", "blue", "green")]
    return [one for one in (a, b, a, b, a, *texts) for _ in range(4)]


def unseen(rollout: Rollout) -> Rollout:
    """With nothing of what a frozen tower saw."""
    return replace(rollout, prompts=[replace(prompt) for prompt in rollout.prompts])


def plain_gradient(agent: VLMAgent, rollout: Rollout, advantages: torch.Tensor) -> dict[str, torch.Tensor]:
    """On the sampler's own weights the ratio is 1, so the loss's gradient is that of -A log p over all tokens."""
    now = agent.logprobs(rollout)
    (-(advantages[:, None] * now.values)[now.mask].sum() / now.mask.sum()).backward()
    return {name: p.grad for name, p in agent.policy.named_parameters() if p.requires_grad}


def gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
    """The whole one, of which this process may hold a share."""
    if hasattr(parameter, "_hp_mapping") or hasattr(parameter, "ds_id"):
        from deepspeed.utils import safe_get_full_grad

        return safe_get_full_grad(parameter)
    return parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad


def check_run(accelerator: Accelerator, sort: str, run: RunFolder) -> None:
    """Processes stay in step, whatever each samples; their checkpoints hold it all, and go on bit for bit."""
    agent = build(sort)
    trainer = trainer_of(agent, accelerator, beta=0.1)
    metrics = follow(trainer, run)
    assert metrics[0] == metrics[1] != metrics[2]
    weights = weights_of(trainer)
    again = trainer_of(build(sort), accelerator, beta=0.1)
    save_aside = run.checkpoint(2).rename(run.path / "last") if accelerator.is_main_process else run.path / "last"
    accelerator.wait_for_everyone()
    load_checkpoint(again, run)
    assert again.step == 1
    assert follow(again, run) == metrics
    for name, weight in weights_of(again).items():
        assert torch.equal(weight, weights[name]), name
    if accelerator.is_main_process:
        check_saved(sort, save_aside, weights)
    agent.sampling = Sampling(max_new_tokens=20)
    count = 2 * 3 + 1  # of samples, in batches of 2: one process has more than the other
    envs = gymnasium.make_vec("VLM-REC-v0", num_envs=2, split="eval")
    together = evaluate(agent, envs, count, greedy=True, title="", processes=trainer.processes)
    if trainer.processes.name == "FSDP2":  # what was gathered to sample has been let go
        assert all(isinstance(parameter, DTensor) for parameter in agent.policy.parameters())
    if accelerator.is_main_process:
        alone = build(sort)
        alone.load(save_aside)
        assert together.answers == evaluate(alone, envs, count, greedy=True, title="").answers


def follow(trainer: Trainer, run: RunFolder) -> list[dict[str, float]]:
    """Trains to the end, one process's answers longer than the other's, and saves every step.

    Returns:
        The metrics of the last step in each process, and of another process's samples.
    """
    rank, results = trainer.accelerator.process_index, []
    trainer.agent.sampling = Sampling(max_new_tokens=20 if rank == 0 else 10)
    for result in trainer.train(seed=0):
        results.append(result)
        if rank == 0:
            run.path.mkdir(parents=True, exist_ok=True)
            run.write_step(result)
        save_checkpoint(trainer, run)
    ids = trainer.processes.collect([{record["id"] for record in results[-1].rollouts.records}])
    assert ids[0].isdisjoint(ids[1])
    lengths = [len(completion.token_ids) for completion in results[-1].rollouts.rollout.completions]
    assert len(set(trainer.processes.collect([max(lengths)]))) == 2
    last = {k: v for k, v in results[-1].metrics.items() if not k.startswith(("time/", "tokens"))}
    return [*trainer.processes.collect([last]), results[-1].rollouts.metrics()]


def weights_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    """In the main process those of the policy, by name, in a copy."""
    state = trainer.processes.weights()
    own = trainer.agent.family_policy.state_dict() if state is None else state
    return {name: tensor.clone() for name, tensor in own.items()}


def check_saved(sort: str, folder: Path, weights: dict[str, torch.Tensor]) -> None:
    """What was saved are the weights after training, in the published layout."""
    if sort == "bf16":
        check_rounded(folder, weights)
    first, again = build(sort).policy.state_dict(), build(sort)
    again.load(folder)
    for name, weight in again.policy.state_dict().items():
        assert torch.equal(weight, weights[name]), name
    trained = [name for name, _ in again.policy.named_parameters() if not torch.equal(weights[name], first[name])]
    assert trained == [name for name, parameter in again.policy.named_parameters() if parameter.requires_grad]
    published = VLMAgent.from_pretrained(folder, sampling=Sampling(max_new_tokens=24))
    rollout = again.rollout(observations())
    torch.testing.assert_close(published.logprobs(rollout).values, again.logprobs(rollout).values, atol=1e-4, rtol=0)


def check_rounded(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    """The model's file has the weights rounded to bfloat16, which loses something of nearly all."""
    loaded = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto").state_dict()
    assert {tensor.dtype for tensor in loaded.values()} == {torch.bfloat16}
    lost = 0
    for name, tensor in loaded.items():
        exact = weights[f"model.{name}"]
        assert exact.dtype == torch.float32
        assert torch.equal(tensor, exact.bfloat16()), name
        lost += int((tensor.float() != exact).sum())
    assert lost > 0.9 * sum(tensor.numel() for tensor in loaded.values())
    assert (folder / "float32").is_dir()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2].split(","), Path(sys.argv[3]), sys.argv[4:])
