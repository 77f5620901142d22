"""Names of options: aliases from other trainers, and messages about unknown names."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from vlmenv.core.errors import nearest_name

ALIASES: Final = {
    # TRL
    "learning_rate": "lr",
    "num_generations": "group_size",
    "max_completion_length": "max_new_tokens",
    "num_iterations": "mu",
    "max_steps": "steps",
    "num_train_epochs": "epochs",
    "warmup_ratio": "warmup_share",
    "lr_scheduler_type": "lr_schedule",
    "output_dir": "output",
    "save_steps": "checkpoint_every",
    "save_total_limit": "keep",
    "eval_steps": "eval_every",
    "report_to": "tracker",
    "resume_from_checkpoint": "resume",
    "model_name_or_path": "model",
    "lora_r": "lora_rank",
    "num_mini_batches": "minibatches",
    "kl_coef": "beta",
    "cliprange": "epsilon",
    "cliprange_value": "value_epsilon",
    "vf_coef": "value_weight",
    "vllm_server_base_url": "server",
    "vllm_gpu_memory_utilization": "engine_memory",
    "vllm_tensor_parallel_size": "tensor_parallel",
    "vllm_max_model_length": "engine_length",
    "mask_truncated_completions": "mask_truncated",
    "router_aux_loss_coef": "router_loss",
    # ms-swift
    "vllm_max_model_len": "engine_length",
    "overlong_filter": "mask_truncated",
    "freeze_vit": "freeze_vision",
    "freeze_aligner": "freeze_projector",
    "system": "system_prompt",
    # VLM-R1
    "data_file_paths": "dataset",
    "image_folders": "image_root",
    "freeze_vision_modules": "freeze_vision",
    # verl and EasyR1
    "actor_rollout_ref.model.path": "model",
    "actor_rollout_ref.actor.optim.lr": "lr",
    "actor_rollout_ref.actor.clip_ratio": "epsilon",
    "actor_rollout_ref.actor.clip_ratio_high": "epsilon_high",
    "actor_rollout_ref.actor.kl_loss_coef": "beta",
    "actor_rollout_ref.actor.ppo_epochs": "mu",
    "actor_rollout_ref.actor.ppo_max_token_len_per_gpu": "micro_batch_tokens",
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu": "micro_batch_size",
    "actor_rollout_ref.rollout.n": "group_size",
    "actor_rollout_ref.rollout.temperature": "temperature",
    "actor_rollout_ref.rollout.top_p": "top_p",
    "actor_rollout_ref.rollout.top_k": "top_k",
    "actor_rollout_ref.rollout.name": "engine",
    "actor_rollout_ref.rollout.gpu_memory_utilization": "engine_memory",
    "actor_rollout_ref.rollout.tensor_model_parallel_size": "tensor_parallel",
    "worker.actor.model.model_path": "model",
    "worker.actor.optim.lr": "lr",
    "worker.actor.clip_ratio": "epsilon",
    "worker.actor.clip_ratio_low": "epsilon",
    "worker.actor.clip_ratio_high": "epsilon_high",
    "worker.actor.clip_ratio_dual": "dual_clip",
    "worker.actor.ppo_epochs": "mu",
    "worker.actor.optim.lr_warmup_ratio": "warmup_share",
    "worker.actor.micro_batch_size_per_device_for_update": "micro_batch_size",
    "worker.actor.model.freeze_vision_tower": "freeze_vision",
    "worker.actor.model.lora.rank": "lora_rank",
    "worker.actor.model.lora.alpha": "lora_alpha",
    "worker.rollout.n": "group_size",
    "worker.rollout.temperature": "temperature",
    "worker.rollout.top_p": "top_p",
    "worker.rollout.gpu_memory_utilization": "engine_memory",
    "worker.rollout.tensor_parallel_size": "tensor_parallel",
    "algorithm.adv_estimator": "algo",
    "algorithm.kl_coef": "beta",
    "algorithm.gamma": "gamma",
    "algorithm.lam": "lam",
    "data.train_files": "dataset",
    "data.val_files": "eval_dataset",
    "data.image_dir": "image_root",
    "data.train_batch_size": "prompts_per_step",
    "data.rollout_batch_size": "prompts_per_step",
    "data.max_response_length": "max_new_tokens",
    "data.max_prompt_length": "max_prompt_tokens",
    "data.max_pixels": "max_pixels",
    "data.min_pixels": "min_pixels",
    "trainer.total_epochs": "epochs",
    "trainer.save_freq": "checkpoint_every",
    "trainer.test_freq": "eval_every",
    "trainer.val_freq": "eval_every",
    "trainer.save_limit": "keep",
    "trainer.default_local_dir": "output",
    "trainer.save_checkpoint_path": "output",
    # This project, before its options had one name in all commands
    "limit": "eval_limit",
    "data": "suite_data",
    "precision": "weights",
    "dtype": "weights",
}
"""Aliases of options. An alias counts if its option exists and no option has that name."""

HINTS: Final = {
    "per_device_train_batch_size": "prompts_per_step is the batch over all ranks, micro_batch_size one pass on one",
    "gradient_accumulation_steps": "micro_batch_size divides a batch into passes, and changes no result",
    "train_batch_size": "prompts_per_step is the batch over all ranks, in prompts",
    "batch_size": "prompts_per_step is the batch over all ranks, in prompts",
    "bf16": "give precision bf16",
    "fp16": "give precision fp16",
    "use_vllm": "give engine vllm, or engine vllm-server with server",
    "vllm_mode": "give engine vllm (the same process) or vllm-server",
    "use_peft": "give lora_rank",
    "lora_target_modules": "LoRA adapts all linear layers of the language model, with lora_vision the tower's too",
    "attn_implementation": "the kernel of attention is chosen by device and precision",
    "deepspeed": "several processes are configured by `accelerate launch`: docs/distributed.md",
    "fsdp": "several processes are configured by `accelerate launch`: docs/distributed.md",
    "reward_funcs": "give rewards with weights, as in `--rewards iou 1 format 0.5`",
    "reward_weights": "give rewards with weights, as in `--rewards iou 1 format 0.5`",
    "logging_steps": "every step is logged",
    "loss_type": "grpo has aggregation: token, sequence or constant; dr_grpo and dapo are algorithms of their own",
    "scale_rewards": "grpo has scale: group, batch or none",
    "dynamic_sample": "give most_rounds, one more than the number of repetitions",
    "external_plugins": "give rewards as module:function, and import for other plug-ins",
    "importance_sampling_level": "gspo is an algorithm of its own: give algo gspo",
}
"""Advice for names of other trainers whose setting is made otherwise here."""


def own_name(name: str, known: Iterable[str]) -> str:
    """The option that a name means: the name itself, or the option that it is an alias of."""
    plain = name.replace("-", "_")
    options = set(known)
    return ALIASES[plain] if plain not in options and ALIASES.get(plain) in options else plain


def unknown_option(name: str, known: Iterable[str]) -> str:
    """A message about a name that no option has."""
    if (hint := HINTS.get(name)) is not None:
        return f"unknown option '{name}': {hint}"
    near = nearest_name(name, known)
    return f"unknown option '{name}'." + (f" Did you mean '{near}'?" if near else " --help lists all options.")
