"""PPO's update the slow way: one sequence and one token at a time, full logits, torch's own autograd and AdamW.

What it shares with the program is the models' weights and the order of the text rows; nothing of ops, ppo or runtime.
Shapes: R responses, T tokens of the longest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rlhf_cli.data.plan import Course
from rlhf_cli.data.token_rows import TokenRows
from rlhf_cli.schema import PpoConfig


@torch.no_grad()
def naive_logprobs(
    model: Any, prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray], temperature: float
) -> Tensor:
    """(R, T), 0 where no token is."""
    found = torch.zeros(len(responses), max(len(r) for r in responses))
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        logits = model(input_ids=torch.tensor([[*prompt, *response]])).logits[0].float() / temperature
        for t, token in enumerate(response):
            found[i, t] = torch.log_softmax(logits[len(prompt) - 1 + t], -1)[token]
    return found


@torch.no_grad()
def naive_values(model: Any, prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray]) -> Tensor:
    """(R, T), likewise."""
    found = torch.zeros(len(responses), max(len(r) for r in responses))
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        hidden = model.base_model(input_ids=torch.tensor([[*prompt, *response]])).last_hidden_state[0]
        for t in range(len(response)):
            found[i, t] = (hidden[len(prompt) - 1 + t] * model.score.weight[0]).sum()
    return found


class Slow(NamedTuple):
    """figures: the same as of the update; gradients: of the last step, after clipping; weights at the end; both of
    policy and critic by name."""

    figures: dict[str, float]
    gradients: list[dict[str, Tensor]]
    weights: list[dict[str, Tensor]]


def slow_update(
    policy: Any, critic: Any, given: Any, config: PpoConfig, iteration: int, text: TokenRows | None
) -> Slow:
    """The update of one iteration. given: (experience, advantages (R, T), returns (R, T)); critic, text: or None."""
    settings, optim, (experience, advantages, returns) = config.ppo, config.optim, given
    models = [policy] if critic is None else [policy, critic]
    adams = [torch.optim.AdamW(two_groups(m, optim.weight_decay), betas=optim.betas, eps=optim.eps) for m in models]
    low, high, reach = 1 - settings.clip_range, 1 + settings.clip_range, settings.value_clip_range
    steps, size = settings.ppo_epochs * settings.num_mini_batches, len(experience) // settings.num_mini_batches
    seen: dict[str, list[float]] = {name: [] for name in ("policy", "value", "ptx", "entropy", "ratio", "clipped")}
    for s in range(steps):
        epoch, part = divmod(s, settings.num_mini_batches)
        draw = np.random.default_rng(np.random.SeedSequence([config.train.seed, iteration, epoch]))
        rows = draw.permutation(len(experience))[part * size : (part + 1) * size]
        count = sum(int(experience.keep_mask[i].sum()) for i in rows)
        loss = torch.zeros(())
        for i in rows:
            prompt, response = experience.prompts[i], experience.responses[i]
            ids = torch.tensor([[*prompt, *response]])
            logits = policy(input_ids=ids).logits[0] / config.generation.temperature
            hidden = None if critic is None else critic.base_model(input_ids=ids).last_hidden_state[0]
            for t in [t for t in range(len(response)) if experience.keep_mask[i, t]]:
                at = len(prompt) - 1 + t  # the position that predicts token t of the response
                log_p, gain = torch.log_softmax(logits[at], -1), advantages[i, t]
                ratio = torch.exp(log_p[response[t]] - experience.logprobs[i, t])
                term = torch.max(-gain * ratio, -gain * ratio.clamp(low, high))
                seen["policy"].append(term.item())
                seen["entropy"].append(-(log_p.exp() * log_p).sum().item())
                seen["ratio"].append(ratio.item())
                seen["clipped"].append(float(-gain * ratio < -gain * ratio.clamp(low, high)))
                loss = loss + term / count
                if hidden is not None:
                    value, old = hidden[at] @ critic.score.weight[0], experience.values[i, t]
                    near = old + (value - old).clamp(-reach, reach)
                    term = 0.5 * torch.max((value - returns[i, t]) ** 2, (near - returns[i, t]) ** 2)
                    seen["value"].append(term.item())
                    loss = loss + settings.value_coef * term / count
        number = iteration * steps + s
        if text is not None:
            of_text = text_loss(policy, text, config, number)
            seen["ptx"].append(of_text.item())
            loss = loss + settings.ptx.coef * of_text
        loss.backward()
        for model, adam, rate in zip(models, adams, (optim.lr, settings.critic_lr), strict=False):
            torch.nn.utils.clip_grad_norm_(model.parameters(), optim.max_grad_norm or float("inf"))
            for group in adam.param_groups:
                group["lr"] = rate * (1 - number / (settings.num_iterations * steps))
            adam.step()
        gradients = [{n: p.grad.clone() for n, p in m.named_parameters() if p.requires_grad} for m in models]
        for adam in adams:
            adam.zero_grad()
    means = {name: float(np.mean(values)) for name, values in seen.items() if values}
    means["ratio_var"] = float(np.var(seen["ratio"]))
    return Slow(means, gradients, [{n: t.detach() for n, t in m.state_dict().items()} for m in models])


def text_loss(policy: Any, text: TokenRows, config: PpoConfig, number: int) -> Tensor:
    """Of the rows of optimizer step `number`."""
    settings = config.ppo.ptx
    rows = Course(len(text), text.repeats, settings.batch_size, config.train.seed).rows(number)
    loss, count = torch.zeros(()), 0
    for i in rows:
        ids, trained = text.row(i)
        logits = policy(input_ids=torch.from_numpy(ids)[None]).logits[0]
        for t in range(1, len(ids)):
            if trained[t]:
                loss = loss - torch.log_softmax(logits[t - 1], -1)[ids[t]]
                count += 1
    return loss / (count if settings.reduction == "token_mean" else len(rows))


def two_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay."""
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    others = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
