"""What the distributed tests run on each rank: a tiny Llama and a few steps on ragged rows."""

from __future__ import annotations

import random
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_cli.errors import CheckpointError, RunFailed
from rlhf_cli.runtime import checkpoint, engine_state
from rlhf_cli.runtime import engine as engines
from rlhf_cli.runtime.distributed import Ranks, barrier, broadcast_object, sum_over_ranks
from rlhf_cli.runtime.engine import Engine, param_groups
from rlhf_cli.runtime.engine_state import export_state, hold_state, import_state, restore_state, saved_steps
from rlhf_cli.runtime.seed import seed_everything
from rlhf_cli.schema import DeepspeedConfig, OptimConfig

VOCABULARY = 33
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LEARNING_RATES = [1e-2, 3e-3, 2e-2, 1e-2, 5e-3, 1e-2, 1e-2, 1e-2]
# What a model of billions meets with DeepSpeed's defaults, a tiny one (4755 elements) meets with these: norms (15) stay
# whole and matrices are sharded, weights are let go of between forward and backward, and gathered ahead of their use.
SMALL_STAGE_3 = {
    "stage3_param_persistence_threshold": 20,
    "stage3_max_reuse_distance": 1000,
    "stage3_prefetch_bucket_size": 400,
}


def tiny_llama(tied: bool = False, spread: float = 0.3) -> LlamaForCausalLM:
    """Odd sizes on purpose (33 * 15 and 15 elements), so that no parameter divides evenly among ranks."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=15,
            head_dim=6,
            intermediate_size=25,
            num_hidden_layers=2,
            num_attention_heads=3,
            num_key_value_heads=1,
            max_position_embeddings=64,
            initializer_range=spread,
            tie_word_embeddings=tied,
            eos_token_id=None,
            use_cache=False,
        )
    )


def rows(step: int) -> list[torch.Tensor]:
    """The ragged rows of a global batch: 8 of them, or 16 in every third step."""
    generator = torch.Generator().manual_seed(1000 + step)
    count = 16 if step % 3 == 2 else 8
    lengths = torch.randint(3, 13, (count,), generator=generator)
    return [torch.randint(0, VOCABULARY, (int(n),), generator=generator) for n in lengths]


def token_loss_sum(forward: Any, batch: list[torch.Tensor]) -> torch.Tensor:
    """Sum of the next-token losses of some rows, padded on the right: ()."""
    width = max(len(row) for row in batch)
    tokens = torch.stack([torch.nn.functional.pad(row, (0, width - len(row))) for row in batch])
    mask = torch.stack([torch.arange(width) < len(row) for row in batch])
    logits = forward(input_ids=tokens, attention_mask=mask.long()).logits.float()
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
    return (losses * mask[:, 1:]).sum()


def optim_config(**changes: Any) -> OptimConfig:
    return OptimConfig(**{"weight_decay": 0.1, "max_grad_norm": 1.0, "betas": [0.9, 0.95], **changes})


def deepspeed_config(stage: int, offload: bool = False, **zero: Any) -> DeepspeedConfig:
    more: dict[str, Any] = dict(SMALL_STAGE_3) if stage == 3 else {}
    if offload:
        more["offload_optimizer"] = {"device": "cpu"}
        if stage == 3:
            more["offload_param"] = {"device": "cpu"}
    return DeepspeedConfig(name=f"zero{stage}", json={"zero_optimization": {"stage": stage, **more, **zero}})


def make(ranks: Ranks, stage: int, dtype: str = "fp32", model: Any = None, steps: Any = None, **changes: Any) -> Engine:
    offload = changes.pop("offload", False)
    optim = optim_config(**changes)
    model = tiny_llama() if model is None else model
    return engines.make_engine(
        model,
        engines.param_groups(model, optim.weight_decay, steps),
        optim,
        deepspeed_config(stage, offload),
        DTYPES[dtype],
        ranks,
    )


def one_step(engine: Engine, step: int, micro: int, rate: float = 1.0) -> tuple[float, float]:
    """(loss, gradient norm) of one step on this rank's rows of the global batch."""
    batch = rows(step)
    total = sum(len(row) - 1 for row in batch)
    share = len(batch) // engine.ranks.world_size
    own = batch[engine.ranks.rank * share : (engine.ranks.rank + 1) * share]
    loss = torch.zeros(())
    for start in range(0, len(own), micro):
        part = token_loss_sum(engine.forward, own[start : start + micro]) / total
        engine.backward(part)
        loss += part.detach()
    norm = engine.step(LEARNING_RATES[step] * rate)
    return float(sum_over_ranks(loss)), norm


def weights(engine: Engine) -> dict[str, np.ndarray]:
    """Whole weights in fp32, on rank 0."""
    return {n: t.numpy() for n, t in engines.gathered_state_dict(engine, dtype=torch.float32).items()}


def train(ranks: Ranks, stage: int, dtype: str = "fp32", micro: int = 2, steps: int = 5, **changes: Any) -> Any:
    """(losses, norms, weights) of a short training."""
    model = tiny_llama(spread=changes.pop("spread", 0.3))
    if changes.pop("recompute", False):
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    rate = changes.pop("rate", 1.0)
    engine = make(ranks, stage, dtype, model=model, **changes)
    done = [one_step(engine, step, micro, rate) for step in range(steps)]
    result = [loss for loss, _ in done], [norm for _, norm in done], weights(engine)
    engine.destroy()
    return result


def train_and_read(ranks: Ranks, stage: int, micro: int = 2, steps: int = 5) -> Any:
    """As train, with every way to read the model after each step, and whether ZeRO-3's recorded trace outlived that."""
    engine = make(ranks, stage)
    tokens = torch.arange(10)[None]
    done = []
    for step in range(steps):
        done.append(one_step(engine, step, micro))
        engine.eval()
        with torch.no_grad():
            logits = engine.forward(input_ids=tokens).logits
        whole = weights(engine)
        with engines.gathered_for_generation(engine) as module, torch.inference_mode():
            assert torch.equal(module(input_ids=tokens).logits, logits)
        with torch.inference_mode():
            assert torch.equal(engine.forward(input_ids=tokens).logits, logits)
        with engines.gathered(list(engine.module.parameters())):
            pass
        engine.train()
    offload = getattr(engine.inner.optimizer, "parameter_offload", None)
    traced = offload is None or offload.get_param_coordinator().is_complete_trace()
    engine.destroy()
    return [loss for loss, _ in done], [norm for _, norm in done], whole, traced


def train_plain(steps: int = 5, **changes: Any) -> Any:
    """The same training without DeepSpeed: one process, one batch, torch's own AdamW and clipping."""
    optim, model = optim_config(**changes), tiny_llama()
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": optim.weight_decay},
            {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
        ],
        betas=(optim.betas[0], optim.betas[1]),
        eps=optim.eps,
    )
    losses, norms = [], []
    for step in range(steps):
        batch = rows(step)
        loss = token_loss_sum(model, batch) / sum(len(row) - 1 for row in batch)
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), optim.max_grad_norm or float("inf"))))
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATES[step]
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses, norms, {n: p.detach().numpy() for n, p in model.state_dict().items()}


def train_and_save(
    ranks: Ranks, stage: int, dtype: str, run_dir: str, before: int = 3, after: int = 3, micro: int = 2
) -> Any:
    """Train, save a checkpoint, go on: (losses, weights, a random number) at the end."""
    seed_everything(5, ranks.rank)
    engine = make(ranks, stage, dtype)
    losses = [one_step(engine, step, micro)[0] for step in range(before)]
    checkpoint.save(
        Path(run_dir), before, ranks, {"engine": partial(export_state, engine)}, {"losses": losses}, 2, 10_000
    )
    losses += [one_step(engine, step, micro)[0] for step in range(before, before + after)]
    result = losses, weights(engine), draw()
    engine.destroy()
    return result


def resume(ranks: Ranks, stage: int, dtype: str, run_dir: str, after: int = 3, micro: int = 2) -> Any:
    """Load the newest checkpoint into a model that starts with other weights, and go on."""
    path = broadcast_object(checkpoint.newest_valid(Path(run_dir), print) if ranks.is_main else None)
    model = tiny_llama()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    engine = make(ranks, stage, dtype, model=model, steps=saved_steps(path / "engine"))
    loaded = checkpoint.load(path, {"engine": partial(import_state, engine)}, ranks, seed=5)
    losses = loaded.loop_state["losses"]
    losses += [one_step(engine, step, micro)[0] for step in range(loaded.step, loaded.step + after)]
    result = losses, weights(engine), draw(), loaded.rng_restored
    engine.destroy()
    return result


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def held_over_change(ranks: Ranks, stage: int, dtype: str = "fp32") -> dict[str, np.ndarray]:
    """Two steps on everything but block 1, then two on everything but block 0 (as LISA does), then save and load."""
    model = tiny_llama()
    freeze(model, "layers.1.")
    engine = make(ranks, stage, dtype, model=model)
    for step in range(2):
        one_step(engine, step, 2)
    held = hold_state(engine)
    engine.destroy()
    freeze(model, "layers.0.")
    engine = make(ranks, stage, dtype, model=model, steps=held.steps)
    restore_state(engine, held)
    for step in range(2, 4):
        one_step(engine, step, 2)
    result = weights(engine)
    engine.destroy()
    return result


def engines_alive(ranks: Ranks, stage: int, dtype: str) -> list[tuple[int, int]]:
    """(engines of DeepSpeed in memory, hooks on the model) each time that a new engine has been trained in."""
    model, held, engine = tiny_llama(), None, None
    inners: list[Any] = []
    found = []
    for draw in range(3):
        if engine is not None:
            held = hold_state(engine)
            engine.destroy()  # and `engine` stays, as it does in the loop's callers
        freeze(model, f"layers.{draw % 2}.")
        engine = make(ranks, stage, dtype, model=model, steps=held.steps if held else None)
        one_step(engine, draw, 2)
        inners.append(weakref.ref(engine.inner))
        hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
        found.append((sum(inner() is not None for inner in inners), hooks))
    assert engine is not None
    engine.destroy()
    return found


def held_over_change_plain() -> dict[str, np.ndarray]:
    """The same with one torch AdamW, which skips a parameter whose gradient is None."""
    model, optim = tiny_llama(), optim_config()
    optimizer = torch.optim.AdamW(param_groups(model, optim.weight_decay), betas=(0.9, 0.95), eps=optim.eps)
    for step in range(4):
        freeze(model, "layers.1." if step < 2 else "layers.0.")
        batch = rows(step)
        (token_loss_sum(model, batch) / sum(len(row) - 1 for row in batch)).backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 1.0)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATES[step]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return {n: p.detach().numpy() for n, p in model.state_dict().items()}


def freeze(model: torch.nn.Module, part: str) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part not in name)


def lora(ranks: Ranks, stage: int, model_dir: str | None = None, dtype: str = "fp32") -> Any:
    """(all weights before, adapter after, names changed, dtypes of the adapter) of two LoRA steps.

    The base is loaded from model_dir, sharded under stage 3, or made at random without one.
    """
    from peft import LoraConfig, get_peft_model

    with engines.sharded_loading(deepspeed_config(stage), DTYPES[dtype]):
        base = LlamaForCausalLM.from_pretrained(model_dir, dtype=DTYPES[dtype]) if model_dir else tiny_llama()
    torch.manual_seed(ranks.rank)  # adapters differ between ranks until the engine makes them one
    model = get_peft_model(base, LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "down_proj"]))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # PEFT keeps adapters in fp32 or not, by version and options
    engine = make(ranks, stage, dtype, model=model)
    before = weights(engine)
    for step in range(2):
        one_step(engine, step, 2)
    after = weights(engine)
    tensors = engines.gathered_state_dict(engine, only_trainable=True)
    adapter = {n: t.float().numpy() for n, t in tensors.items()}
    changed = sorted(n for n in after if not np.array_equal(before[n], after[n]))
    engine.destroy()
    return before, adapter, changed, sorted({str(t.dtype) for t in tensors.values()})


def load_and_train(ranks: Ranks, stage: int, model_dir: str, dtype: str) -> Any:
    """(losses, weights, buffers) with weights loaded under sharded_loading."""
    config = deepspeed_config(stage)
    with engines.sharded_loading(config, DTYPES[dtype]):
        model = LlamaForCausalLM.from_pretrained(model_dir, dtype=DTYPES[dtype])
    sharded = all(hasattr(p, "ds_id") for p in model.parameters())
    engine = make(ranks, stage, dtype, model=model)
    losses = [one_step(engine, step, 2)[0] for step in range(3)]
    buffers = {n: (str(b.dtype), b.float().numpy()) for n, b in engine.module.named_buffers()}
    result = losses, weights(engine), buffers, sharded
    engine.destroy()
    return result


def generate(ranks: Ranks, stage: int) -> Any:
    """Logits inside gathered_for_generation with another number of passes on each rank, and whether training goes on.

    With an engine made a second time on the same model, as LISA does.
    """
    model = tiny_llama()
    make(ranks, stage, model=model).destroy()
    engine = make(ranks, stage, model=model)
    one_step(engine, 0, 2)
    tokens = torch.arange(10)[None]
    engine.train()
    with engines.gathered_for_generation(engine) as module, torch.no_grad():
        assert not module.training
        for _ in range(1 + 3 * ranks.rank):
            logits = module(input_ids=tokens).logits
        text = module.generate(tokens[:, :3], do_sample=False, max_new_tokens=2 + 4 * ranks.rank, pad_token_id=0)
    still_training = engine.module.training
    engine.eval()
    with torch.no_grad():
        hooked = engine.forward(input_ids=tokens).logits
    engine.train()
    loss, norm = one_step(engine, 1, 2)
    engine.destroy()
    return logits.numpy(), hooked.numpy(), text.tolist(), still_training, loss, norm


def broken_step(ranks: Ranks, stage: int, dtype: str) -> Any:
    """A step with a NaN gradient on the last rank, then a good one: what each reports, and the weights between."""
    engine = make(ranks, stage, dtype)
    before = weights(engine)
    loss = token_loss_sum(engine.forward, rows(0)[:2]) / 50
    engine.backward(loss * (float("nan") if ranks.rank == ranks.world_size - 1 else 1.0))
    norm, skipped = engine.step(1e-2), engine.skipped
    unchanged = all(np.array_equal(before[n], w) for n, w in weights(engine).items())
    good_loss, good_norm = one_step(engine, 0, 2)
    result = norm, skipped, unchanged, good_loss, good_norm, engine.skipped
    engine.destroy()
    return result


def tied(ranks: Ranks, stage: int) -> Any:
    """Names of a model with tied embeddings after a step, and whether both names carry the one trained weight."""
    engine = make(ranks, stage, model=tiny_llama(tied=True))
    one_step(engine, 0, 4)
    tensors = engines.gathered_state_dict(engine)
    same = not tensors or tensors["lm_head.weight"] is tensors["model.embed_tokens.weight"]
    engine.destroy()
    return sorted(tensors), same


def scaler_over_resume(ranks: Ranks, directory: str) -> Any:
    """fp16: the loss scale after some skipped steps, and after loading into a fresh engine.

    DeepSpeed refuses fp16 on a CPU because it is slow there; the arithmetic works.
    """
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True
    engine = make(ranks, 2, "fp16")
    skips = []
    for step in range(4):
        engine.backward(token_loss_sum(engine.forward, rows(step)[:2]) * (float("inf") if step < 2 else 0.01))
        engine.step(1e-3)
        skips.append(engine.skipped)
    export_state(engine, Path(directory))
    scaler = engine.inner.optimizer.loss_scaler
    scale, iteration = scaler.cur_scale, scaler.cur_iter
    engine.destroy()
    engine = make(ranks, 2, "fp16", steps=saved_steps(Path(directory)))
    fresh = engine.inner.optimizer.loss_scaler.cur_scale
    import_state(engine, Path(directory))
    scaler = engine.inner.optimizer.loss_scaler
    result = skips, scale, iteration, fresh, scaler.cur_scale, scaler.cur_iter
    engine.destroy()
    return result


def initial_weights(ranks: Ranks, stage: int) -> dict[str, np.ndarray]:
    engine = make(ranks, stage)
    result = weights(engine)
    engine.destroy()
    return result


def import_into_other_model(ranks: Ranks, directory: str) -> str:
    """What import_state says to a model with fewer trainable parameters than were stored."""
    engine = make(ranks, 2)
    export_state(engine, Path(directory))
    engine.destroy()
    model = tiny_llama()
    freeze(model, "layers.1.mlp")
    engine = make(ranks, 2, model=model)
    try:
        import_state(engine, Path(directory))
    except CheckpointError as error:
        return str(error)
    finally:
        engine.destroy()
    return "no error"


def export_changed_weights(ranks: Ranks, stage: int, directory: str) -> str:
    """What export_state says when weights no longer follow from the optimizer's."""
    engine = make(ranks, stage)
    parameter = engine.module.model.norm.weight if stage < 3 else engine.module.model.norm.weight.ds_tensor
    parameter.data.add_(1.0)
    try:
        export_state(engine, Path(directory))
    except AssertionError as error:
        return str(error)
    finally:
        engine.destroy()
    return "no error"


def unwritable_shard(ranks: Ranks, run_dir: str) -> str:
    """The last rank cannot write its shard: what each rank is told."""
    engine = make(ranks, 2)

    def write(directory: Path) -> None:
        if ranks.rank == ranks.world_size - 1:
            (directory / f"state-{ranks.rank:05d}-000.safetensors").mkdir()
        export_state(engine, directory)

    try:
        checkpoint.save(Path(run_dir), 7, ranks, {"engine": write}, {}, keep=1, bytes_needed=1)
    except RunFailed as error:
        return str(error)
    finally:
        engine.destroy()
    return "no error"


def load_and_save(ranks: Ranks, stage: int, dtype: str, run_dir: str) -> dict[str, Any]:
    """Load the newest checkpoint and write it again under the same step."""
    path = broadcast_object(checkpoint.newest_valid(Path(run_dir), print) if ranks.is_main else None)
    engine = make(ranks, stage, dtype, steps=saved_steps(path / "engine"))
    loaded = checkpoint.load(path, {"engine": partial(import_state, engine)}, ranks, seed=5)
    writers = {"engine": partial(export_state, engine)}
    checkpoint.save(Path(run_dir), loaded.step, ranks, writers, loaded.loop_state, 2, 10_000)
    engine.destroy()
    return loaded.loop_state


def export_in_small_shards(ranks: Ranks, directory: str, shard_bytes: int) -> list[str]:
    """The files of an export with a small limit, after checking that they load again."""
    engine = make(ranks, 2)
    one_step(engine, 0, 4)
    usual, engine_state.SHARD_BYTES = engine_state.SHARD_BYTES, shard_bytes
    try:
        export_state(engine, Path(directory))
    finally:
        engine_state.SHARD_BYTES = usual
    barrier()
    before = weights(engine)
    one_step(engine, 1, 4)
    import_state(engine, Path(directory))
    after = weights(engine)
    engine.destroy()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    return sorted(path.name for path in Path(directory).iterdir())


def bucket_sizes(ranks: Ranks, stage: int) -> list[int]:
    """Elements of DeepSpeed's buffer for gradients: with its default size, and with a smaller one that is asked for."""
    sizes = []
    for zero in ({}, {"reduce_bucket_size": 100}):
        model = tiny_llama()
        config = deepspeed_config(stage, **zero)
        engine = engines.make_engine(model, param_groups(model, 0.0), optim_config(), config, DTYPES["fp32"], ranks)
        sizes.append(int(engine.inner.optimizer.reduce_bucket_size))
        engine.destroy()
    return sizes
