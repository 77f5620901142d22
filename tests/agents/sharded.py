"""Run by `torch.distributed.run`: a policy sharded over two processes, and a whole one for comparison."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from batches import logprobs_of, loss_of, optimizer_of, rollout_of
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard

from vlmenv.agents.vlm import Sampling, VLMAgent
from vlmenv.processes import leave


def check(folder: Path, lora: bool) -> None:
    rank = dist.get_rank()
    agent, whole = build(lora), build(lora)
    rollout, reference = rollout_of(agent), agent.reference()
    halves = rollout[:4], rollout[4:]
    (sum(loss_of(whole, half) for half in halves) / 2).backward()
    expected = whole.reference().logprobs(halves[rank]).values
    blocks = [*agent.family.language_model().layers, *agent.family.vision_tower().blocks]
    for module in (*blocks, agent.policy):
        fully_shard(module, mesh=dist.init_device_mesh("cpu", (2,)))
    loss = loss_of(agent, halves[rank])
    if lora:
        assert torch.equal(reference.logprobs(halves[rank]).values, expected)
    loss.backward()
    for name, parameter in agent.policy.named_parameters():
        if parameter.requires_grad:
            gradient = whole.policy.get_parameter(name).grad
            torch.testing.assert_close(parameter.grad.full_tensor(), gradient, atol=1e-6, rtol=1e-5)
    optimizer_of(agent).step()
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    gathered = get_model_state_dict(agent.policy, options=options)
    if rank == 0:
        optimizer_of(whole).step()
        agent.save(folder, gathered)
        again = build(lora)
        again.load(folder)
        torch.testing.assert_close(logprobs_of(again, rollout), logprobs_of(whole, rollout), atol=1e-3, rtol=1e-3)
    dist.barrier()


def build(lora: bool) -> VLMAgent:
    torch.manual_seed(0)
    agent = VLMAgent.from_pretrained("builtin", sampling=Sampling(0.8))
    if lora:
        agent.add_lora(rank=4, alpha=8, vision=True)
    agent.add_value_head()
    agent.enable_gradient_checkpointing()
    return agent


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for case in sys.argv[2:]:
        check(Path(sys.argv[1]) / case, lora=case == "lora")
    leave()
