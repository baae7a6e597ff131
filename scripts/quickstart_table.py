#!/usr/bin/env python3
"""What each stage of the quickstart has changed, on prompts that none of them has learnt from.

    python scripts/quickstart_table.py runs/quickstart

Every policy answers the held-out prompts once, at temperature 1 and with the same noise. Rewards are those of the
trained reward model, which PPO and RAFT learn from, and the preference that made the data (`true_score` of
data/quickstart/generate.py, 0 to 1), which no stage has seen. KL is to the sft policy, in nats per answer.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, logging

from rlhf_cli.data.prompts import Prompt, prepare_prompts
from rlhf_cli.data.templates import TEMPLATES
from rlhf_cli.errors import RlhfError
from rlhf_cli.models.scratch import new_model
from rlhf_cli.ops.diversity import distinct_n
from rlhf_cli.reward import Scorer, open_reward
from rlhf_cli.rollout.sampler import Request, Response, generate
from rlhf_cli.rundir import output_dir
from rlhf_cli.schema import PromptDataConfig, RolloutConfig

DATA = Path(__file__).resolve().parent.parent / "data" / "quickstart"
SAMPLING = RolloutConfig(max_new_tokens=32)
POLICIES = ("sft", "ppo", "raft")
SHOWN = 3  # prompts whose answers are printed


class Row(NamedTuple):
    """Means over the prompts; errors: the standard error of the one before."""

    name: str
    reward: float
    reward_error: float
    true: float
    true_error: float
    kl: float
    distinct_2: float
    length: float
    answers: list[str]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="the folder that scripts/quickstart.sh has filled")
    parser.add_argument("--data", type=Path, default=DATA, help="where generate.py and its files are")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        rows, prompts = measure(options.runs, options.data)
    except (RlhfError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{len(prompts)} held-out prompts, answered at temperature 1")
    print(table(rows))
    for i in range(min(SHOWN, len(prompts))):
        print(f"\n{prompts[i].text.strip()}")
        for row in rows:
            print(f"  {row.name:>6}: {row.answers[i].strip()!r}")
    return 0


def measure(runs: Path, data: Path) -> tuple[list[Row], list[Prompt]]:
    """A row for the untrained model and for each policy. Raises RlhfError where a stage is not finished."""
    folders = {name: output_dir(runs / name, ("policy",), str(runs / name)) for name in POLICIES}
    tokenizer = AutoTokenizer.from_pretrained(folders["sft"])
    settings = PromptDataConfig(path=str(data / "prompts_held_out.jsonl"))
    prompts = prepare_prompts(settings, tokenizer, TEMPLATES["hh"], lambda line: None).train
    reward, world = open_reward(runs / "rm_merged"), load_generator(data / "generate.py")
    start = AutoModelForCausalLM.from_pretrained(folders["sft"]).eval()
    untrained = new_model(AutoConfig.from_pretrained(folders["sft"]), torch.float32, 0)
    models = {"base": untrained} | {name: AutoModelForCausalLM.from_pretrained(path) for name, path in folders.items()}
    return [judge(name, m.eval(), start, tokenizer, prompts, reward, world) for name, m in models.items()], prompts


def judge(name: str, model: Any, start: Any, tokenizer: Any, prompts: list[Prompt], reward: Scorer, world: Any) -> Row:
    """One policy. start: the one that KL is measured to; world: the generator of the data."""
    requests = [Request(prompt.token_ids, i, SAMPLING.max_new_tokens) for i, prompt in enumerate(prompts)]
    responses = generate(model, tokenizer, requests, SAMPLING, TEMPLATES["hh"].stop, 0)
    texts = [response.text for response in responses]
    rewards = torch.tensor(reward.score([p.messages[-1].content if p.messages else p.text for p in prompts], texts))
    true = torch.tensor([world.true_score(p.text, text) for p, text in zip(prompts, texts, strict=True)])
    kl = [
        log_prob(model, prompt, response) - log_prob(start, prompt, response)
        for prompt, response in zip(prompts, responses, strict=True)
    ]
    error = lambda values: values.std().item() / len(values) ** 0.5
    tokens = [response.token_ids[: response.num_text_tokens].tolist() for response in responses]
    length = sum(len(response.token_ids) for response in responses) / len(responses)
    return Row(
        name, rewards.mean().item(), error(rewards), true.mean().item(), error(true), sum(kl) / len(kl),
        distinct_n(tokens, 2), length, texts,
    )  # fmt: skip


@torch.no_grad()
def log_prob(model: Any, prompt: Prompt, response: Response) -> float:
    """Of a whole response, its end included."""
    ids = torch.tensor([*prompt.token_ids.tolist(), *response.token_ids.tolist()])
    logits = model(input_ids=ids[None]).logits[0, len(prompt.token_ids) - 1 : -1].double()
    answer = ids[len(prompt.token_ids) :, None]
    return logits.log_softmax(-1).gather(1, answer).sum().item()


def load_generator(path: Path) -> Any:
    """generate.py as a module: a program of this checkout, found by its place."""
    spec = importlib.util.spec_from_file_location("quickstart_generator", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def table(rows: list[Row]) -> str:
    """Markdown."""
    lines = [
        "| policy | reward model | true preference | KL to sft | distinct-2 | length |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        reward, true = f"{row.reward:.2f} ± {row.reward_error:.2f}", f"{row.true:.3f} ± {row.true_error:.3f}"
        lines.append(f"| {row.name} | {reward} | {true} | {row.kl:.2f} | {row.distinct_2:.2f} | {row.length:.1f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
