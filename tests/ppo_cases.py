"""What the tests of the PPO update run on each rank: tiny models, ragged responses, the production update.

Shapes: R responses, T tokens of the longest.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from rlhf_cli.align.forward import response_logprobs, response_values
from rlhf_cli.data.token_rows import TokenRows
from rlhf_cli.models.head import enable_loss
from rlhf_cli.models.lora import add_lora
from rlhf_cli.models.reward import enable_scores, new_reward_model
from rlhf_cli.ppo.experience import Experience
from rlhf_cli.ppo.ptx import PtxTerm
from rlhf_cli.ppo.update import update
from rlhf_cli.runtime.distributed import Ranks
from rlhf_cli.runtime.engine import Engine, gathered_state_dict, make_engine, param_groups
from rlhf_cli.runtime.engine_fragments import ensure_moments, trainable, whole
from rlhf_cli.schema import (
    AlgorithmConfig,
    DeepspeedConfig,
    LoraConfig,
    OptimConfig,
    PpoConfig,
    PtxConfig,
    RlTrainConfig,
    RolloutConfig,
)
from tests.ppo_reference import naive_logprobs, naive_values
from tests.tiny_models import noisy, tiny_config, tiny_model

PAD = 0
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def whole_mask(responses: Sequence[np.ndarray]) -> Tensor:
    """keep_mask (R, T) of responses that are kept from their first token to their last."""
    lengths = torch.tensor([len(r) for r in responses])
    return torch.arange(int(lengths.max())) < lengths[:, None]


def ppo_config(
    optim: dict[str, Any] | None = None, micro: int = 2, temperature: float = 0.8, ptx: str | None = None, **ppo: Any
) -> PpoConfig:
    """Two epochs of two mini-batches, in the second of three iterations if nothing else is said."""
    settings = {"num_iterations": 3, "ppo_epochs": 2, "num_mini_batches": 2, "rollout_batch_size": 12} | ppo
    rates = {"lr": 2e-3, "eps": 1e-5, "schedule": "linear", "min_lr_ratio": 0.0, "warmup_ratio": 0.0}
    return PpoConfig(
        generation=RolloutConfig(temperature=temperature),
        ppo=AlgorithmConfig(
            critic_lr=3e-3, ptx=PtxConfig(coef=0.7 if ptx else 0.0, batch_size=5, reduction=ptx or "token_mean"),  # type: ignore[arg-type]
            **settings,
        ),
        optim=OptimConfig(**(rates | {"weight_decay": 0.1, "max_grad_norm": 0.5} | (optim or {}))),  # type: ignore[arg-type]
        train=RlTrainConfig(micro_batch_size=micro, seed=7),
    )  # fmt: skip


def make_policy(kind: str = "llama", dtype: str = "fp32") -> nn.Module:
    """kind: an architecture, or "lora": an adapter whose both factors are random."""
    model = tiny_model("llama" if kind == "lora" else kind, tie=kind == "gpt2").to(DTYPES[dtype])
    if kind == "lora":
        model = noisy_adapter(add_lora(model, LoraConfig(enabled=True, r=4, target_modules="all-linear")))
    enable_loss(model)
    return model


def noisy_adapter(model: Any) -> Any:
    draw = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=draw)
    return model


def make_critic() -> nn.Module:
    model = noisy(new_reward_model(tiny_config("llama"), None, torch.float32, seed=5), seed=5)
    enable_scores(model)
    return model


def engine_of(model: nn.Module, config: PpoConfig, stage: int, ranks: Ranks, dtype: str = "fp32") -> Engine:
    # At this threshold ZeRO-3 shards the matrices and keeps the norms whole, as in real models.
    more = {"stage3_param_persistence_threshold": 40} if stage == 3 else {}
    zero = DeepspeedConfig(name=f"zero{stage}", json={"zero_optimization": {"stage": stage, **more}})
    groups = param_groups(model, config.optim.weight_decay)
    return make_engine(model, groups, config.optim, zero, DTYPES[dtype], ranks)


class Given(NamedTuple):
    """What an update is given. advantages, returns (R, T)."""

    experience: Experience
    advantages: Tensor
    returns: Tensor | None


def ragged(num: int, seed: int = 0, vocab: int = 20) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Prompts of one to six tokens, responses of one to seven."""
    draw = np.random.default_rng(seed)
    make = lambda most: [draw.integers(3, vocab, draw.integers(1, most + 1)) for _ in range(num)]
    return make(6), make(7)


def given(config: PpoConfig, seed: int = 0, critic: bool = True, kind: str = "llama") -> Given:
    """Ragged responses, with old log-probabilities and values near enough to the models' own that some are clipped and
    some are not; nan wherever no token is kept."""
    num = config.ppo.rollout_batch_size
    prompts, responses = ragged(num, seed)
    keep = whole_mask(responses)
    draw = torch.Generator().manual_seed(seed)
    random = lambda scale: scale * torch.randn(keep.shape, generator=draw)
    logprobs = naive_logprobs(make_policy(kind), prompts, responses, config.generation.temperature) + random(0.2)
    values = naive_values(make_critic(), prompts, responses) + random(0.2)
    blank = lambda tokens: tokens.masked_fill(~keep, float("nan"))
    experience = Experience(
        prompts, responses, keep, blank(logprobs), blank(logprobs + random(0.1)), blank(values) if critic else None,
        torch.randn(num, generator=draw), torch.arange(num),
    )  # fmt: skip
    return Given(experience, blank(random(1.0)), blank(values + random(0.5)) if critic else None)


def text_rows(num: int = 8, vocab: int = 20) -> TokenRows:
    """Ragged text; some of its tokens are not trained."""
    draw = np.random.default_rng(11)
    rows = [draw.integers(3, vocab, draw.integers(3, 9)) for _ in range(num)]
    trained = [np.concatenate([[False], draw.random(len(row) - 1) < 0.7]) for row in rows]
    offsets = np.cumsum([0, *map(len, rows)])
    return TokenRows(
        np.concatenate(rows), np.concatenate(trained), offsets, np.arange(num, dtype=np.uint64), np.ones(num, np.int64)
    )


# --- on the ranks


class Trained(NamedTuple):
    """figures, steps, stopped: of UpdateStats. weights, moments: of policy and critic by name, whole, the moments as
    Adam holds them (fp32, flat); weights on rank 0 only."""

    figures: dict[str, float]
    steps: int
    stopped: bool
    weights: list[dict[str, np.ndarray]]
    moments: list[dict[str, np.ndarray]]


def train(
    ranks: Ranks,
    stage: int = 2,
    kind: str = "llama",
    critic: bool = True,
    dtype: str = "fp32",
    seed: int = 0,
    change: str | None = None,
    iteration: int = 1,
    **settings: Any,
) -> Trained:
    """The production update on the responses of given(seed), after `change` (a name in CHANGES) was done to them."""
    torch.set_num_threads(1)
    config = ppo_config(advantage="gae" if critic else "rloo", samples_per_prompt=None if critic else 2, **settings)
    material = given(config, seed, critic, kind)
    if change is not None:
        material = CHANGES[change](material)
    engines = [engine_of(make_policy(kind, dtype), config, stage, ranks, dtype)]
    if critic:
        engines.append(engine_of(make_critic(), config, stage, ranks))
    ptx = PtxTerm(text_rows(), config.ppo.ptx, config.train.seed) if config.ppo.ptx.coef else None
    for engine in engines:
        ensure_moments(engine)
    taken: list[int] = []
    stats = update(
        engines[0], engines[1] if critic else None, *material, config, iteration, ranks, PAD, ptx,
        lambda: taken.append(count_steps(engines[0])),
    )  # fmt: skip
    assert taken == list(range(1, stats.steps + 1)), "one step of the optimizer before each call"
    weights = [{n: t.float().numpy() for n, t in gathered_state_dict(e).items()} for e in engines]
    moments = [{n: whole(e, p, "exp_avg").numpy() for n, p in trainable(e).items()} for e in engines]
    for engine in engines:
        engine.destroy()
    return Trained(*stats, weights, moments)


def count_steps(engine: Engine) -> int:
    """Steps that AdamW itself has counted."""
    return max(int(state["step"]) for state in engine.inner.optimizer.optimizer.state.values())


def written_on_after_the_end(material: Given) -> Given:
    """Every response goes on with tokens that are not kept, of which the tensors hold garbage."""
    experience, draw = material.experience, np.random.default_rng(2)
    longer = [np.concatenate([r, draw.integers(3, 20, 1 + i % 4)]) for i, r in enumerate(experience.responses)]
    width = max(map(len, longer)) - experience.keep_mask.shape[1]
    pad = lambda tokens: torch.nn.functional.pad(tokens, (0, width), value=1e9)
    keep = torch.nn.functional.pad(experience.keep_mask, (0, width), value=False)
    assert experience.values is not None
    assert material.returns is not None
    return Given(
        Experience(
            experience.prompts, longer, keep, pad(experience.logprobs), pad(experience.ref_logprobs),
            pad(experience.values), experience.scores, experience.groups,
        ),
        pad(material.advantages), pad(material.returns),
    )  # fmt: skip


def zeros_instead_of_nan(material: Given) -> Given:
    """What stands where no token is kept."""
    experience = material.experience
    clean = lambda tokens: None if tokens is None else tokens.nan_to_num(0.0)
    changed = {n: clean(getattr(experience, n)) for n in ("logprobs", "ref_logprobs", "values")}
    return Given(replace(experience, **changed), clean(material.advantages), clean(material.returns))


def without_a_number(material: Given) -> Given:
    """One kept advantage is nan."""
    material.advantages[0, 0] = float("nan")
    return material


CHANGES = {f.__name__: f for f in (written_on_after_the_end, zeros_instead_of_nan, without_a_number)}


class Measured(NamedTuple):
    """logprobs, values (R, T) by the production code and by the slow way."""

    logprobs: Tensor
    values: Tensor
    slow_logprobs: Tensor
    slow_values: Tensor


def measure(ranks: Ranks, stage: int, micro: int, kind: str = "llama", num: int = 9) -> Measured:
    torch.set_num_threads(1)
    config = ppo_config()
    prompts, responses = ragged(num)
    temperature = config.generation.temperature
    slow = naive_logprobs(make_policy(kind), prompts, responses, temperature)
    slow_values = naive_values(make_critic(), prompts, responses)
    policy = engine_of(make_policy(kind), config, stage, ranks)
    critic = engine_of(make_critic(), config, stage, ranks)
    logprobs = response_logprobs(policy.forward, prompts, responses, PAD, micro, ranks, temperature=temperature)
    values = response_values(critic.forward, prompts, responses, PAD, micro, ranks)
    policy.destroy()
    critic.destroy()
    return Measured(logprobs, values, slow, slow_values)


class Against(NamedTuple):
    """Largest differences. start: of policy and reference log-probabilities before training; policy, reference: of each
    between before and after."""

    start: float
    policy: float
    reference: float


def reference_over_training(ranks: Ranks, kind: str, dtype: str, stage: int) -> Against:
    """kind lora: the reference is the policy without its adapter, which starts as all adapters do."""
    torch.set_num_threads(1)
    config = ppo_config(rollout_batch_size=12)
    material = given(config)
    prompts, responses = material.experience.prompts, material.experience.responses
    model = tiny_model("llama").to(DTYPES[dtype])
    frozen = copy.deepcopy(model)
    if kind == "lora":
        model = add_lora(model, LoraConfig(enabled=True, r=4, target_modules="all-linear"))
    enable_loss(model)
    enable_loss(frozen)
    policy, critic = engine_of(model, config, stage, ranks, dtype), engine_of(make_critic(), config, stage, ranks)

    def measured() -> tuple[Tensor, Tensor]:
        common = (prompts, responses, PAD, config.train.micro_batch_size, ranks)
        of_policy = response_logprobs(policy.forward, *common, temperature=0.8)
        if kind != "lora":
            return of_policy, response_logprobs(frozen, *common, temperature=0.8)
        flags = [p.requires_grad for p in model.parameters()]
        with model.disable_adapter():
            of_reference = response_logprobs(policy.forward, *common, temperature=0.8)
        assert flags == [p.requires_grad for p in model.parameters()]
        return of_policy, of_reference

    before = measured()
    update(policy, critic, *material, config, 0, ranks, PAD)
    after = measured()
    for engine in (policy, critic):
        engine.destroy()
    largest = lambda a, b: (a - b).abs().max().item()
    return Against(largest(*before), largest(before[0], after[0]), largest(before[1], after[1]))


def first_ratio(ranks: Ranks, stage: int, forward_micro: int, micro: int) -> dict[str, float]:
    """Figures of the first step, whose old log-probabilities come from micro-batches of another size."""
    torch.set_num_threads(1)
    config = ppo_config(micro=micro, ppo_epochs=1, num_mini_batches=1)
    material = given(config)
    experience = material.experience
    policy, critic = (
        engine_of(make_policy(), config, stage, ranks), engine_of(make_critic(), config, stage, ranks)
    )  # fmt: skip
    experience.logprobs = response_logprobs(
        policy.forward, experience.prompts, experience.responses, PAD, forward_micro, ranks, temperature=0.8
    )
    stats = update(policy, critic, *material, config, 0, ranks, PAD)
    for engine in (policy, critic):
        engine.destroy()
    return stats.figures
