"""`vlmenv eval`: measures a model on one data set or on a paper's."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

from rich.console import Console

from vlmenv.building import (
    DTYPES,
    load_agent,
    prepared,
    report_broken_rows,
    report_skipped,
    report_untaught,
    task_arguments,
)
from vlmenv.commands.suite import make_eval_envs, run_suite
from vlmenv.evaluation import Evaluation, evaluate, metrics_table, sample_count, write_evaluation
from vlmenv.looking import SHOWN, measure_sight
from vlmenv.options.command_line import Asked, parse_with_files
from vlmenv.options.evaluate import EvalConfig
from vlmenv.processes import Processes, leave
from vlmenv.runs.claim import alone_in
from vlmenv.runs.fitting import fit_prompts
from vlmenv.runs.models import with_checkpoint


def parse(args: Sequence[str], program: str) -> Asked:
    """The options of a command line."""
    return parse_with_files(args, lambda algo: EvalConfig(), program)


def run(asked: Asked) -> Any:
    """Measures a model, and returns the evaluation; for a suite, the metrics of each data set."""
    measure = run_evaluation if asked.config.suite is None else run_suite
    return measure(asked.config, asked.notes)


def run_evaluation(config: EvalConfig, notes: Sequence[str] = ()) -> Evaluation:
    """Measures a model on one data set."""
    processes, console = prepared(config, notes)
    with alone_in(config.output, processes.accelerator, console):
        return _measured(config, processes, console)


def _measured(config: EvalConfig, processes: Processes, console: Console) -> Evaluation:
    config, accelerator = with_checkpoint(config, console), processes.accelerator
    data = config.data
    if data.dataset is None and data.split is None:
        data = replace(data, split="eval")
    envs = make_eval_envs(config, config.env, **data.arguments(), **task_arguments(config))
    fit_prompts(config, envs, accelerator, console, first=config.eval_limit)
    report_broken_rows(envs, console)
    report_untaught(config, console)
    count, greedy = sample_count(envs, config.eval_limit), config.samples is None
    with closing(load_agent(config, accelerator.device, DTYPES[config.weights])) as agent:
        sight = None
        if config.visual_dependence:
            sight = measure_sight(
                agent,
                envs,
                count,
                greedy=greedy,
                mask_share=config.mask_share,
                seed=config.seed,
                console=console,
                processes=processes,
            )
            evaluation = sight.evaluations[SHOWN]
        else:
            agent.seed(config.seed + accelerator.process_index)
            evaluation = evaluate(
                agent, envs, count, greedy=greedy, title="evaluating", console=console, processes=processes
            )
    envs.close()
    if config.output is not None and accelerator.is_main_process:
        write_evaluation(evaluation, config.output)
        if sight is not None:
            sight.write(config.output)
    how = "greedy" if greedy else f"{config.samples} sampled answers each"
    report_skipped(evaluation.skipped, count, console)
    shown = count - len(evaluation.skipped)
    title = f"{config.env}, {shown} samples, {how}"
    if sight is not None:
        sight.show(title, console)
    else:
        console.print(metrics_table(title, {config.model: evaluation}, width=console.width))
    leave()
    return evaluation
