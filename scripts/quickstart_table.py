#!/usr/bin/env python3
"""What each stage of the quickstart has changed, on prompts that none of them has learnt from.

    python scripts/quickstart_table.py runs/quickstart
    python scripts/quickstart_table.py runs/seed_0 runs/seed_1 runs/seed_2        each of them, then means over the runs
    python scripts/quickstart_table.py runs/quickstart --policies sft ppo pushed
    python scripts/quickstart_table.py runs/quickstart --policies ppo pushed --iterations

Every policy answers each held-out prompt a few times, at temperature 1 and with the same noise as the others.

reward model      the trained one, which PPO and RAFT learn from; its scores have no scale of their own
true preference   the one that made the data (true_score of data/quickstart/generate.py, 0 to 1); no stage has seen it
agree             of two answers to one prompt that differ in true preference, how often the reward model has the better
                  one above: below its accuracy on pairs means that the policy has moved to where the model errs
KL                to the sft policy, in nats per answer
distinct-2        different bigrams / all bigrams, over the first answer to each prompt
tokens            of an answer, its end included

± is one standard error, over prompts or, in the table of means, over runs.

With --iterations: how the answers to a run's own evaluation prompts have changed while it trained.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, logging

from rlhf_cli.data.prompts import Prompt, prepare_prompts
from rlhf_cli.data.templates import TEMPLATES
from rlhf_cli.errors import RlhfError
from rlhf_cli.models.scratch import new_model
from rlhf_cli.ops.diversity import distinct_n
from rlhf_cli.report.curves import KL
from rlhf_cli.report.runs import read_run
from rlhf_cli.report.series import series
from rlhf_cli.reward import Scorer, open_reward
from rlhf_cli.rollout.sampler import Request, Response, generate
from rlhf_cli.rundir import output_dir
from rlhf_cli.schema import PromptDataConfig, RolloutConfig

DATA = Path(__file__).resolve().parent.parent / "data" / "quickstart"
SAMPLING = RolloutConfig(max_new_tokens=32)
TEMPLATE = TEMPLATES["hh"]
POLICIES = ("sft", "ppo", "raft")
ANSWERS = 4  # to each prompt: the error is a third smaller than with one, and agreement needs two
SHOWN = 3  # prompts whose answers are printed
BATCH = 64  # answers in a forward pass


class Mean(NamedTuple):
    """Of a figure, with its standard error."""

    value: float
    error: float


class Answer(NamedTuple):
    """true: its true preference."""

    text: str
    true: float


class Row(NamedTuple):
    """A line of the table, as the head of this file says; agree: nan where no two answers differ; answers: the first
    one to each prompt."""

    name: str
    reward: Mean
    true: Mean
    agree: float
    kl: float
    distinct_2: float
    tokens: float
    answers: list[Answer]


class Judges(NamedTuple):
    """What all policies of a run are measured with. start: the policy that KL is measured to; world: the generator."""

    tokenizer: Any
    start: Any
    reward: Scorer
    world: Any
    prompts: list[Prompt]


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="folders that scripts/quickstart.sh has filled")
    parser.add_argument("--policies", nargs="+", default=POLICIES, help="runs in such a folder (default: sft ppo raft)")
    parser.add_argument("--data", type=Path, default=DATA, help="where generate.py and its files are")
    parser.add_argument("--iterations", action="store_true", help="evaluations of ppo and raft runs instead")
    options = parser.parse_args(words)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    measured = []
    try:
        for runs in options.runs:
            if options.iterations:
                print(f"{runs}: answers at each evaluation; rewards as the run has them\n")
                print(over_iterations(runs, load_generator(options.data / "generate.py"), options.policies) + "\n")
                continue
            rows, prompts = measure(runs, options.data, options.policies)
            print(f"{runs}: {len(prompts)} held-out prompts, {ANSWERS} answers to each at temperature 1\n")
            print(table(rows) + "\n")
            show(rows, prompts)
            measured.append(rows)
    except (RlhfError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if len(measured) > 1:
        print(f"means of {len(measured)} runs\n\n{table(over_runs(measured))}")
    return 0


def measure(runs: Path, data: Path, policies: Sequence[str]) -> tuple[list[Row], list[Prompt]]:
    """A row for the untrained model and for each policy. Raises RlhfError where a stage is not finished."""
    advice = "; scripts/quickstart.sh makes it, and goes on where it was stopped"
    start, *folders = (output_dir(runs / name, ("policy",), str(runs / name), advice) for name in ("sft", *policies))
    tokenizer = AutoTokenizer.from_pretrained(start)
    settings = PromptDataConfig(path=str(data / "prompts_held_out.jsonl"))
    prompts = prepare_prompts(settings, tokenizer, TEMPLATE, lambda line: None).train
    judges = Judges(
        tokenizer, load(start), open_reward(runs / "rm_merged"), load_generator(data / "generate.py"), prompts
    )
    rows = [measure_policy("base", new_model(AutoConfig.from_pretrained(start), torch.float32, 0).eval(), judges)]
    rows += [measure_policy(name, load(folder), judges) for name, folder in zip(policies, folders, strict=True)]
    return rows, prompts


def over_iterations(runs: Path, world: Any, policies: Sequence[str]) -> str:
    """Markdown. A line for each file of held-out answers; KL of the responses that this iteration learnt from. Raises
    RlhfError where there is no such file."""
    lines = ["| policy | iteration | reward | true preference | KL |", "|---|---:|---:|---:|---:|"]
    for name in policies:
        kl = dict(series(read_run(runs / name, name), KL))
        for path in sorted((runs / name / "samples").glob("eval_*.jsonl")):
            answers = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            reward = sum(answer["score"] for answer in answers) / len(answers)
            true = [world.true_score(answer["prompt"], answer["response"]) for answer in answers]
            value, error = mean(torch.tensor(true, dtype=torch.float64))
            at = int(path.stem.rpartition("_")[2])
            shown_kl = f"{kl[at]:.2f}" if at in kl else "-"
            lines.append(f"| {name} | {at} | {reward:.2f} | {value:.3f} ± {error:.3f} | {shown_kl} |")
    if len(lines) == 2:
        raise RlhfError(f"{runs}: no samples/eval_*.jsonl in {', '.join(policies)}; scripts/quickstart.sh makes them")
    return "\n".join(lines)


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def measure_policy(name: str, model: Any, judges: Judges) -> Row:
    """One policy. N answers: those to a prompt stand together."""
    prompts = [prompt for prompt in judges.prompts for _ in range(ANSWERS)]
    requests = [Request(prompt.token_ids, i, SAMPLING.max_new_tokens) for i, prompt in enumerate(prompts)]
    responses = generate(model, judges.tokenizer, requests, SAMPLING, TEMPLATE.stop, 0)
    texts = [response.text for response in responses]
    rewards = torch.tensor(judges.reward.score([prompt.text for prompt in prompts], texts), dtype=torch.float64)
    true = [judges.world.true_score(prompt.text, text) for prompt, text in zip(prompts, texts, strict=True)]
    true_scores = torch.tensor(true, dtype=torch.float64)
    kl = log_probs(model, prompts, responses) - log_probs(judges.start, prompts, responses)
    return Row(
        name,
        mean(rewards.view(-1, ANSWERS).mean(1)),
        mean(true_scores.view(-1, ANSWERS).mean(1)),
        agreement(rewards.view(-1, ANSWERS), true_scores.view(-1, ANSWERS)),
        kl.mean().item(),
        distinct_n([r.token_ids[: r.num_text_tokens].tolist() for r in responses[::ANSWERS]], 2),
        sum(len(response.token_ids) for response in responses) / len(responses),
        [Answer(text, score) for text, score in zip(texts[::ANSWERS], true[::ANSWERS], strict=True)],
    )


def mean(values: Tensor) -> Mean:
    """values (N,), independent of each other; of a single one the error is nan."""
    return Mean(values.mean().item(), values.std().item() / len(values) ** 0.5)


def agreement(rewards: Tensor, true: Tensor) -> float:
    """Of the pairs in a row whose true scores differ, the share that rewards has in the same order.

    Both are (prompts, answers)."""
    first, second = torch.tensor(list(combinations(range(true.shape[1]), 2))).T
    by_truth, by_reward = true[:, first] - true[:, second], rewards[:, first] - rewards[:, second]
    return (by_truth * by_reward > 0)[by_truth != 0].double().mean().item()


@torch.no_grad()
def log_probs(model: Any, prompts: list[Prompt], responses: list[Response]) -> Tensor:
    """(N,) fp64, of whole answers, their end included. Padding stands behind, where a causal model does not see it."""
    sums = []
    for at in range(0, len(prompts), BATCH):
        heads = [prompt.token_ids.tolist() for prompt in prompts[at : at + BATCH]]
        tails = [response.token_ids.tolist() for response in responses[at : at + BATCH]]
        width = max(len(head) + len(tail) for head, tail in zip(heads, tails, strict=True))
        ids = torch.tensor([h + t + [0] * (width - len(h) - len(t)) for h, t in zip(heads, tails, strict=True)])
        # position t predicts token t + 1
        tokens = model(input_ids=ids[:, :-1]).logits.double().log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)
        sums += [
            tokens[i, len(h) - 1 : len(h) + len(t) - 1].sum() for i, (h, t) in enumerate(zip(heads, tails, strict=True))
        ]
    return torch.stack(sums)


def load_generator(path: Path) -> Any:
    """generate.py as a module: a program of this checkout, found by its place."""
    spec = importlib.util.spec_from_file_location("quickstart_generator", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def over_runs(measured: list[list[Row]]) -> list[Row]:
    """Means over runs of the same policies, with standard errors over the runs."""
    found = []
    for same in zip(*measured, strict=True):
        reward, true, agree, kl, distinct_2, tokens = (
            mean(torch.tensor(values, dtype=torch.float64))
            for values in zip(
                *((r.reward.value, r.true.value, r.agree, r.kl, r.distinct_2, r.tokens) for r in same), strict=True
            )
        )
        found.append(Row(same[0].name, reward, true, agree.value, kl.value, distinct_2.value, tokens.value, answers=[]))
    return found


def table(rows: list[Row]) -> str:
    """Markdown."""
    lines = [
        "| policy | reward model | true preference | agree | KL | distinct-2 | tokens |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for r in rows:
        reward, true = f"{r.reward.value:.2f} ± {r.reward.error:.2f}", f"{r.true.value:.3f} ± {r.true.error:.3f}"
        agree = "-" if r.agree != r.agree else f"{r.agree:.2f}"
        lines.append(f"| {r.name} | {reward} | {true} | {agree} | {r.kl:.2f} | {r.distinct_2:.2f} | {r.tokens:.1f} |")
    return "\n".join(lines)


def show(rows: list[Row], prompts: list[Prompt]) -> None:
    """The first answers to a few prompts, side by side with their true preference; those to which the policies answer
    differently come first."""
    alike = [len({row.answers[i].text for row in rows[1:]}) == 1 for i in range(len(prompts))]
    for number in sorted(range(len(prompts)), key=alike.__getitem__)[:SHOWN]:
        print(prompts[number].text.strip())
        for row in rows:
            answer = row.answers[number]
            print(f"  {row.name:>6} {answer.true:.2f} {answer.text.strip()!r}")
        print()


if __name__ == "__main__":
    sys.exit(main())
