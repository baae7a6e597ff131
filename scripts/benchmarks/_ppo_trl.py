"""TRL's last PPOTrainer (trl.experimental.ppo in 1.9.0) on the same policy, reward model and prompts.

Runs in an environment of its own, which need not have our package. What is changed of TRL, so that both programs do the
same: it takes the prompts in file order instead of shuffling them, and the reward model reads an EOS at the end of each
text, as it did in its training, also where the policy wrote none. Everything else is as it comes.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
import trl
from _probe import Probe, high_water_mib, job_from_argv
from datasets import Dataset
from peft import LoraConfig
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from transformers.models.llama import modeling_llama  # noqa: F401  before memory is read: the import is lazy
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer


class Watch(TrainerCallback):
    """Notes of each iteration: what TRL reports, when its phases ended, what its reward model was given."""

    def __init__(self, probe: Probe, pad: int, eos: int):
        self.probe, self.pad, self.eos = probe, pad, eos
        self.reward_model: Any = None
        self.started = self.written = self.scored = 0.0
        self.lengths: list[int] = []
        self.scores: list[float] = []

    def install(self, trainer: PPOTrainer) -> None:
        """Stand before the two functions of TRL's module whose calls mark its phases."""
        self.reward_model = trainer.reward_model
        generate, get_reward = ppo_trainer.batch_generation, ppo_trainer.get_reward

        def timed_generation(*args: Any) -> Any:
            made = generate(*args)
            self.written = time.time()
            return made

        def closed_reward(model: Any, texts: torch.Tensor, pad: int, start: int) -> Any:
            if model is not self.reward_model:
                return get_reward(model, texts, pad, start)
            lengths, closed = close(texts, start, pad, self.eos)
            found = get_reward(model, closed, pad, start)
            self.lengths += lengths.tolist()
            self.scores += found[1].tolist()
            self.scored = time.time()
            return found

        ppo_trainer.batch_generation, ppo_trainer.get_reward = timed_generation, closed_reward

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.started = time.time()

    def on_log(self, *_: Any, logs: dict[str, Any], optimizer: Any, **__: Any) -> None:
        if "objective/kl" not in logs:
            return
        # TRL counts a log-probability of 1 for each place behind a response.
        behind = max(self.lengths) * len(self.lengths) - sum(self.lengths)
        entropy = (logs["objective/entropy"] * len(self.lengths) + behind) / sum(self.lengths)
        now = time.time()
        self.probe.figures.append(
            {
                "scores": logs["objective/scores"],
                "scores_std": torch.tensor(self.scores).std().item(),
                "kl": logs["objective/kl"],
                "nats_per_token": entropy,
                "length": sum(self.lengths) / len(self.lengths),
                "value_loss": logs["loss/value_avg"],
                "optimizer_steps": max(float(state["step"]) for state in optimizer.state.values()),
                "generate_s": self.written - self.started,
                "score_s": self.scored - self.written,
                "train_s": now - self.scored,
            }
        )

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.probe.tokens.append(sum(self.lengths))
        self.probe.samples.append(len(self.lengths))
        self.probe.step_ended()
        self.lengths, self.scores, self.started = [], [], time.time()


def close(texts: torch.Tensor, start: int, pad: int, eos: int) -> tuple[torch.Tensor, torch.Tensor]:
    """texts (B, S) with responses from column `start` on, padded at the right -> their lengths (B,), and the texts
    (B, S + 1) with an EOS behind each response that has none."""
    responses = F.pad(texts[:, start:], (0, 1), value=pad)
    lengths = (responses == pad).int().argmax(1)  # the first pad
    places = torch.arange(responses.shape[1])
    kept = torch.where(places < lengths[:, None], responses, pad)  # TRL, too, ends a text at a pad that was sampled
    ended = kept.gather(1, (lengths - 1).clamp(min=0)[:, None])[:, 0] == eos
    closed = kept.scatter(1, lengths[:, None], torch.where(ended, pad, eos)[:, None])
    return lengths, torch.cat([texts[:, :start], closed], dim=1)


def settings(job: dict[str, Any], scratch: str) -> dict[str, Any]:
    """TRL's own defaults, except for what all compared programs must have in common."""
    shared = {
        "output_dir": scratch,
        "response_length": job["response"],
        "stop_token": "eos",
        "temperature": 1.0,
        "num_ppo_epochs": job["epochs"],
        "num_mini_batches": job["mini_batches"],
        "per_device_train_batch_size": job["micro_batch"],
        "gradient_accumulation_steps": job["batch"] // job["micro_batch"],
        "local_rollout_forward_batch_size": min(job["batch"], 64),
        "total_episodes": job["batch"] * job["steps"],
        "learning_rate": job["lr"],
        "lr_scheduler_type": "constant",
        "kl_coef": job["kl_coef"],
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": job["seed"],
    }
    return shared if job["defaults"] else shared | {"gradient_checkpointing": False, "bf16": False}


def open_trainer(job: dict[str, Any], scratch: str, watch: Watch, tokenizer: Any) -> PPOTrainer:
    classifier = lambda: AutoModelForSequenceClassification.from_pretrained(job["reward"], dtype=torch.float32)
    policy = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    lines = Path(job["data"]).read_text(encoding="utf-8").splitlines()
    rows = Dataset.from_dict({"input_ids": [tokenizer(json.loads(line)["text"]).input_ids for line in lines]})
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = PPOTrainer(
        args=PPOConfig(**settings(job, scratch)),
        processing_class=tokenizer,
        model=policy,
        ref_model=None,  # a copy of the policy; with LoRA the policy without its adapter
        reward_model=classifier(),
        value_model=classifier(),
        train_dataset=rows,
        callbacks=[watch],
        peft_config=lora if job["lora"] else None,
    )
    in_order = DataLoader(rows, job["batch"], shuffle=False, collate_fn=trainer.data_collator, drop_last=True)
    trainer.dataloader = trainer.accelerator.prepare(in_order)
    return trainer


def main(job: dict[str, Any]) -> None:
    versions = {m.__name__: m.__version__ for m in (torch, transformers, trl)}
    probe = Probe(high_water_mib(), versions=versions)
    tokenizer = AutoTokenizer.from_pretrained(job["model"], padding_side="left")
    watch = Watch(probe, tokenizer.pad_token_id, tokenizer.eos_token_id)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = open_trainer(job, scratch, watch, tokenizer)
        watch.install(trainer)
        trainer.train()
    probe.write(job["result"])


if __name__ == "__main__":
    main(job_from_argv())
