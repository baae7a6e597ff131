"""Responses: the same in any batch, equal to drawing token by token, and where they end."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from rlhf_cli.errors import ModelError
from rlhf_cli.models.head import enable_loss
from rlhf_cli.models.lora import add_lora
from rlhf_cli.ops.sampling import Draw, draw_tokens, row_keys, token_hashes
from rlhf_cli.rollout import attention, rows
from rlhf_cli.rollout import decoder as decoders
from rlhf_cli.rollout.attention import QUICK_ATTENTION, quick_attention
from rlhf_cli.rollout.decoder import InPlaceDecoder, PaddedDecoder, open_decoder
from rlhf_cli.rollout.sampler import Request, Response, Stopped, generate, starting_order
from rlhf_cli.schema import LoraConfig, RolloutConfig
from tests.tiny_models import ARCHS, noisy, tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
EOS = TOKENIZER.eos_token_id
VOCAB = len(TOKENIZER)
SEED = 5

# What decoders derive from columns or masks: windows, of all layers or of some; alibi; layers with another state.
OTHERS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 6},
    "gemma2": {"sliding_window": 6, "query_pre_attn_scalar": 8},
    "qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 4},
    "bloom": {"n_layer": 2, "n_head": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
}


def other_model(kind: str) -> PreTrainedModel:
    shape = {
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "bos_token_id": None, "eos_token_id": EOS, "pad_token_id": TOKENIZER.pad_token_id,
    }  # fmt: skip
    torch.manual_seed(0)
    return noisy(AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape | OTHERS[kind])))


def requests(num: int, longest: int = 14, max_prompt: int = 12) -> list[Request]:
    """Ragged prompts and limits; the last one asks again what the fourth did."""
    rng = np.random.default_rng(1)
    prompt = lambda: rng.integers(3, VOCAB, rng.integers(1, max_prompt + 1)).astype(np.int32)
    found = [Request(prompt(), 100 + i, int(rng.integers(1, longest + 1))) for i in range(num - 1)]
    return [*found, Request(found[3].prompt, 7, longest)]


def settings(**changes: Any) -> RolloutConfig:
    return RolloutConfig(**{"max_new_tokens": 14, "batch_size": 4} | changes)


def run(model: nn.Module, asked: list[Request], stops: tuple[str, ...] = (), **changes: Any) -> list[Response]:
    return generate(model, TOKENIZER, asked, settings(**changes), stops, SEED)


def assert_same(a: list[Response], b: list[Response]) -> None:
    assert [r.token_ids.tolist() for r in a] == [r.token_ids.tolist() for r in b]
    assert [r[1:] for r in a] == [r[1:] for r in b]


@torch.no_grad()
def one_by_one(model: nn.Module, request: Request, draw: Draw = Draw(), min_new: int = 0) -> list[int]:  # noqa: B008
    """Token after token from whole forward passes of one sequence without a cache; ends at EOS or the limit."""
    ids, hashes = request.prompt.tolist(), token_hashes(VOCAB, torch.device("cpu"))
    for position in range(request.max_new_tokens):
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[:, -1].float()
        if position < min_new:
            logits[:, EOS] = float("-inf")
        key = row_keys(SEED, np.array([request.sample], np.uint64), np.array([position]))
        ids.append(int(draw_tokens(logits, torch.from_numpy(key), hashes, draw)))
        if ids[-1] == EOS:
            break
    return ids[len(request.prompt) :]


@pytest.mark.parametrize("kind", [*ARCHS, *OTHERS])
def test_responses_are_the_same_in_any_batch_and_token_by_token(kind: str) -> None:
    model, asked = (tiny_model(kind) if kind in ARCHS else other_model(kind)), requests(16)
    alone = run(model, asked, batch_size=1)
    for response, request in zip(alone, asked, strict=True):
        assert response.token_ids.tolist() == one_by_one(model, request)
    assert {r.ending for r in alone} == {"eos", "length"}
    for changes in ({"batch_size": 4}, {"batch_size": 32}, {"batch_size": 3, "refill": True}):
        assert_same(alone, run(model, asked, **changes))
    assert_same(alone, run(model, asked[::-1], batch_size=5)[::-1])


def test_which_models_keep_their_rows_in_place() -> None:
    kinds = {kind: type(open_decoder(other_model(kind), 2, 8)) for kind in OTHERS}
    assert kinds.pop("lfm2") is PaddedDecoder, "its convolutions remember padding"
    assert set(kinds.values()) == {InPlaceDecoder}
    with pytest.raises(ModelError, match="past_key_values"):
        open_decoder(nn.Linear(2, 2), 2, 8)


@pytest.mark.parametrize(("batch_size", "refill"), [(2, True), (3, True), (8, False)])
def test_rows_move_when_the_cache_is_full(batch_size: int, refill: bool) -> None:
    """Short prompts first, then one that reaches beyond the columns in use, over several lengths of the cache."""
    model, rng = tiny_model("llama"), np.random.default_rng(2)
    lengths = [2, 3, 1, 2, 25, 2, 3, 30, 1, 1, 24, 2]
    prompts = [rng.integers(3, VOCAB, n).astype(np.int32) for n in lengths]
    asked = [Request(p, i, limit) for i, (p, limit) in enumerate(zip(prompts, [9, 20, 18] * 4, strict=True))]
    endless = {"min_new_tokens": 20, "max_new_tokens": 20}
    found = run(model, asked, batch_size=batch_size, refill=refill, **endless)
    for response, request in zip(found, asked, strict=True):
        assert response.token_ids.tolist() == one_by_one(model, request, min_new=20)


def test_adapter_is_used() -> None:
    model = add_lora(tiny_model("llama"), LoraConfig(enabled=True, r=4), seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    model.eval()
    asked = requests(6)
    found = run(model, asked)
    assert [r.token_ids.tolist() for r in found] == [one_by_one(model, request) for request in asked]
    with model.disable_adapter():
        without = run(model, asked)
    assert [r.token_ids.tolist() for r in without] != [r.token_ids.tolist() for r in found]


def test_a_model_that_was_taught_to_train_writes_the_same() -> None:
    model, asked = tiny_model("llama"), requests(5)
    before = run(model, asked)
    enable_loss(model)
    assert_same(before, run(model, asked))


@pytest.mark.parametrize("draw", [Draw(0.0), Draw(0.6, top_k=5), Draw(1.3, top_p=0.7)])
def test_temperature_and_filters(draw: Draw) -> None:
    model, asked = tiny_model("gpt2"), requests(6)
    found = run(model, asked, temperature=draw.temperature, top_k=draw.top_k, top_p=draw.top_p)
    assert [r.token_ids.tolist() for r in found] == [one_by_one(model, request, draw) for request in asked]


def test_seed_and_sample_change_the_text() -> None:
    model, prompt = tiny_model("llama"), np.array([5, 6, 7], np.int32)
    texts = lambda seed: [
        tuple(r.token_ids.tolist())
        for r in generate(model, TOKENIZER, [Request(prompt, i - 1, 14) for i in range(5)], settings(), (), seed)
    ]
    assert len(set(texts(0) + texts(1))) == 10
    assert texts(0) == texts(0)


# --- ends


def test_stop_strings_end_rows() -> None:
    """Characters as tokens: the response ends with the last letter of the first stop string."""
    model, asked = tiny_model("llama"), requests(40)
    free = run(model, asked, min_new_tokens=0)
    stop = "e", "ll"
    found = run(model, asked, stop)
    assert_same(found, run(model, asked, ("ll",), stop=["e"]))
    assert sum(r.ending == "stop" for r in found) >= 5
    for whole, cut in zip(free, found, strict=True):
        ends = [whole.text.find(s) + len(s) for s in stop if s in whole.text]
        if not ends:
            assert cut[1:] == whole[1:]
            continue
        letters = [TOKENIZER.decode([t]) for t in cut.token_ids]
        assert cut.ending == "stop"
        assert "".join(letters) == whole.text[: min(ends)]
        assert not any(s in cut.text for s in stop)
        assert "".join(letters[: cut.num_text_tokens]) == cut.text


def test_all_end_tokens_of_the_model_count() -> None:
    model, asked = tiny_model("llama"), requests(12)
    before = run(model, asked)
    common = int(np.bincount(np.concatenate([r.token_ids for r in before])).argmax())
    model.generation_config.eos_token_id = [EOS, common]
    for old, new in zip(before, run(model, asked), strict=True):
        at = np.flatnonzero(np.isin(old.token_ids, [EOS, common]))
        assert new.token_ids.tolist() == old.token_ids[: at[0] + 1 if len(at) else None].tolist()
        assert new.ending == ("eos" if len(at) else "length")
    model.generation_config.eos_token_id = common
    assert {r.ending for r in run(model, asked)} >= {"eos"}


def test_nothing_ends_before_min_new_tokens() -> None:
    model = tiny_model("llama")
    asked = [Request(r.prompt, r.sample, 14) for r in requests(60)]
    stop = ("e", "ll", "o")
    short = [len(r.token_ids) for r in run(model, asked, stop)]
    assert min(short) == 1
    found = run(model, asked, stop, min_new_tokens=6)
    assert min(len(r.token_ids) for r in found) == 7, "six tokens that end nothing, then an end"
    for response in found:
        text = TOKENIZER.decode(response.token_ids[:6])
        assert EOS not in response.token_ids[:6]
        assert not any(s in text for s in stop)


def test_long_prompts_leave_fewer_tokens_and_lose_their_beginning() -> None:
    """64 positions."""
    model = tiny_model("gpt2")
    model.config.n_positions = 64
    prompt = np.arange(3, 3 + 80, dtype=np.int32) % VOCAB
    asked = [Request(prompt[:n], 1, 10) for n in (50, 60, 63, 64, 80)]
    found = run(model, asked, min_new_tokens=10, batch_size=8)
    assert [len(r.token_ids) for r in found] == [10, 4, 1, 1, 1]
    assert found[4].token_ids.tolist() == one_by_one(model, Request(prompt[-63:], 1, 1), min_new=1)


# --- the batch


def test_equal_prompts_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rng = tiny_model("llama"), np.random.default_rng(0)
    prompts = [rng.integers(3, VOCAB, n).astype(np.int32) for n in (9, 9, 5)]
    asked = [Request(p.copy(), 10 * k + i, 3) for i in range(4) for k, p in enumerate(prompts)]
    shapes: list[tuple[int, ...]] = []
    model.model.register_forward_pre_hook(
        lambda _m, _a, inputs: shapes.append(inputs["input_ids"].shape), with_kwargs=True
    )
    found = run(model, asked, batch_size=12, min_new_tokens=3)
    assert shapes == [(3, 8), (12, 1), (12, 1), (12, 1)]
    shapes.clear()
    monkeypatch.setitem(decoders.READ_TOKENS, "cpu", 16)
    assert_same(found, run(model, asked, batch_size=12, min_new_tokens=3))
    assert shapes[:2] == [(2, 8), (1, 4)], "at most 16 tokens at a time"


def test_rows_that_end_leave_the_batch() -> None:
    model = tiny_model("llama")
    sizes: list[int] = []
    model.model.register_forward_pre_hook(
        lambda _m, _a, inputs: sizes.append(len(inputs["input_ids"])), with_kwargs=True
    )
    asked = [Request(np.array([5], np.int32), i, limit) for i, limit in enumerate([3, 1, 4, 1, 5])]
    run(model, asked, batch_size=8, min_new_tokens=5)
    assert sizes == [5, 3, 3, 2, 1]
    sizes.clear()
    # the longest first: 5 4 | 3 1 1; a row of two is free at once
    run(model, asked, batch_size=2, min_new_tokens=5, refill=True)
    assert sizes == [2, 2, 2, 2, 2, 2, 2]
    sizes.clear()
    run(model, asked, batch_size=2, min_new_tokens=5, refill=False)
    assert sizes == [2, 2, 2, 2, 1, 2, 1, 1, 1]


@pytest.mark.parametrize("refill", [False, True])
def test_looking_seldom_at_what_has_ended_changes_nothing(refill: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: rows run on for some steps behind their end."""
    model, asked, stop = tiny_model("llama"), requests(24), ("e", "ll")
    every_step = run(model, asked, stop, refill=refill)
    monkeypatch.setitem(rows.STEPS_PER_LOOK, "cpu", 4)
    assert_same(every_step, run(model, asked, stop, refill=refill))
    assert {r.ending for r in every_step} == {"eos", "stop", "length"}


def test_the_longest_begin_first_and_equal_prompts_together() -> None:
    a, b, c = (np.full(n, n, np.int32) for n in (2, 3, 3))
    c = c + 1
    assert starting_order([a, b, c, a, b], np.array([4, 4, 9, 9, 4])) == [2, 3, 0, 1, 4]


def test_responses_are_told_as_they_end_and_stopping() -> None:
    model, asked = tiny_model("llama"), requests(20)
    told: list[tuple[int, Response]] = []
    made = generate(model, TOKENIZER, asked, settings(), (), SEED, ended=lambda *pair: told.append(pair))
    assert sorted(number for number, _ in told) == list(range(20))
    assert [number for number, _ in told] != list(range(20)), "as they end, not as they were asked for"
    assert all(response.text == made[number].text for number, response in told)
    polls: list[int] = []
    with pytest.raises(Stopped):
        generate(
            model, TOKENIZER, asked, settings(), (), SEED, should_stop=lambda: bool(polls.append(1)) or len(polls) == 3
        )
    assert len(polls) == 3
    assert generate(model, TOKENIZER, [], settings(), (), SEED) == []


# --- low precision


@pytest.mark.parametrize("kind", ["llama", "gpt_neox"])
def test_bf16_steps_are_as_exact_as_the_fused_kernel(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "has_tiles", lambda: False)
    model = tiny_model(kind).to(torch.bfloat16)
    exact = tiny_model(kind)
    exact.load_state_dict(model.state_dict())
    prompts = [np.arange(3, 3 + n, dtype=np.int32) for n in (9, 20, 2)]

    def steps(of: PreTrainedModel) -> torch.Tensor:
        opened = open_decoder(of, 3, 40)
        opened.admit(prompts)
        tokens = torch.tensor([int(p[-1]) for p in prompts])
        return torch.stack([opened.step(tokens) for _ in range(8)])

    with torch.no_grad():
        fused, wanted = steps(model), steps(exact)
        with quick_attention(exact):
            assert exact.config._attn_implementation == "sdpa"
        with quick_attention(model):
            assert model.config._attn_implementation == QUICK_ATTENTION
            quick = steps(model)
        monkeypatch.setattr(attention, "has_tiles", lambda: True)
        with quick_attention(model):
            assert model.config._attn_implementation == "sdpa"
    assert model.config._attn_implementation == "sdpa"
    error = lambda found: (found - wanted).abs().mean().item()
    assert 0 < error(quick) < 1.2 * error(fused)
    assert not torch.equal(quick, fused), "two kernels, two roundings"
