"""A reward model reads a policy's own tokens where it can, and what it then reads is what its text would give."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_cli.data.prompts import Prompt, prepare_prompts
from rlhf_cli.data.rows import Message
from rlhf_cli.data.templates import TEMPLATES
from rlhf_cli.data.tokenize import encode_pieces, make_encoder
from rlhf_cli.models.tokenizer import tokenizer_digest
from rlhf_cli.reward.answers import Writer, scored_text, writer_of
from rlhf_cli.reward.combine import has_running_moments, open_rewards
from rlhf_cli.reward.inputs import Inputs, decoder_inputs, encoder_inputs
from rlhf_cli.reward.source import ScoredText, no_progress
from rlhf_cli.schema import PolicyRewardConfig, PromptDataConfig, RewardSourceConfig
from tests.data_tokenizers import byte_bpe, sentencepiece_like
from tests.reward_models import word_tokenizer, write_decoder, write_run

TOKENIZERS = {"byte": byte_bpe(), "llama": sentencepiece_like()}
DIALOGUES = [
    [{"role": "user", "content": "a b?"}],
    [
        {"role": "system", "content": "Be of a room."},
        {"role": "user", "content": "a b?"},
        {"role": "assistant", "content": "c d."},
        {"role": "user", "content": "e?"},
    ],
]
REPLIES = ["a floor of a room", "a", "It is so.\n\nSo it is."]


def prompts(tmp_path: Path, rows: list[dict[str, Any]], tokenizer: Any, template: str) -> list[Prompt]:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = PromptDataConfig(path=str(path))
    return prepare_prompts(data, tokenizer, TEMPLATES[template], lambda line: None).train


def read(tokenizer: Any, template: str, texts: list[ScoredText], max_length: int = 999) -> Inputs:
    return decoder_inputs(
        make_encoder(tokenizer), TEMPLATES[template], texts, max_length, tokenizer_digest=tokenizer_digest(tokenizer)
    )


def written(tokenizer: Any, writer: Writer, reply: str) -> tuple[str, np.ndarray]:
    """What a policy that learnt the template writes: text and tokens."""
    text = writer.lead + reply
    return text, encode_pieces(make_encoder(tokenizer), [text], first=False)[0]


@pytest.mark.parametrize("kind", list(TOKENIZERS))
@pytest.mark.parametrize("template", list(TEMPLATES))
def test_tokens_and_text_give_the_same_input(tmp_path: Path, kind: str, template: str) -> None:
    tokenizer = TOKENIZERS[kind]
    if kind == "llama" and template == "chatml":
        # a marker that is not one token grows together with the words before it: no canonical tokens to compare
        tokenizer = sentencepiece_like()
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    writer = writer_of(tokenizer, TEMPLATES[template])
    for prompt in prompts(tmp_path, [{"prompt": dialogue} for dialogue in DIALOGUES], tokenizer, template):
        for reply in REPLIES:
            text, ids = written(tokenizer, writer, reply)
            by_tokens = scored_text(prompt, text, ids, writer)
            by_text = scored_text(prompt, text, None, writer)
            assert by_tokens.response == by_text.response == reply
            assert by_tokens.token_ids is not None
            assert by_text.token_ids is None
            (found,), (expected,) = (read(tokenizer, template, [t]).token_ids for t in (by_tokens, by_text))
            assert found == expected
            assert found[-1] == tokenizer.eos_token_id
            assert found[: len(prompt.token_ids)] == prompt.token_ids.tolist()
            together = read(tokenizer, template, [by_text, by_tokens, by_text])
            assert together.token_ids == [expected] * 3


@pytest.mark.parametrize("kind", list(TOKENIZERS))
def test_raw_text_goes_on(tmp_path: Path, kind: str) -> None:
    tokenizer = TOKENIZERS[kind]
    writer = writer_of(tokenizer, TEMPLATES["hh"])
    (prompt,) = prompts(tmp_path, [{"text": "a floor\n"}], tokenizer, "hh")
    ids = encode_pieces(make_encoder(tokenizer), ["of a room"], first=False)[0]
    by_tokens, by_text = scored_text(prompt, "of a room", ids, writer), scored_text(prompt, "of a room", None, writer)
    assert (by_tokens.prompt, by_tokens.lead, by_tokens.response) == (None, "a floor\n", "of a room")
    whole = [*tokenizer("a floor\nof a room").input_ids, tokenizer.eos_token_id]
    for template in ("hh", "chatml"):  # a template says nothing of raw text
        assert read(tokenizer, template, [by_tokens, by_text]).token_ids == [whole, whole]


def test_tokens_are_read_only_by_a_model_that_has_the_same(tmp_path: Path) -> None:
    tokenizer = TOKENIZERS["byte"]
    writer = writer_of(tokenizer, TEMPLATES["hh"])
    (prompt,) = prompts(tmp_path, [{"prompt": "a b?"}], tokenizer, "hh")
    rare = np.array([tokenizer.convert_tokens_to_ids(c) for c in "floor"], np.int32)  # not how the text is cut
    text = scored_text(prompt, "floor", rare, writer)
    plain = replace(text, token_ids=None)
    (own,) = read(tokenizer, "hh", [text]).token_ids
    assert own == [*prompt.token_ids.tolist(), *rare.tolist(), tokenizer.eos_token_id]
    assert own != read(tokenizer, "hh", [plain]).token_ids[0]
    assert read(tokenizer, "alpaca", [text]) == read(tokenizer, "alpaca", [plain])
    other = byte_bpe(330)
    assert read(other, "hh", [text]) == read(other, "hh", [plain])
    # the same template under another name is the same
    named = text.template._replace(name="tokenizer", stop=()) if text.template else None
    assert read(tokenizer, "hh", [replace(text, template=named)]).token_ids == [own]


def test_an_empty_answer_reads_the_same_for_every_model(tmp_path: Path) -> None:
    tokenizer = TOKENIZERS["byte"]
    writer = writer_of(tokenizer, TEMPLATES["hh"])
    (prompt,) = prompts(tmp_path, [{"prompt": "a b?"}], tokenizer, "hh")
    assert scored_text(prompt, "", np.zeros(0, np.int32), writer).token_ids is None


def test_too_long_tokens_lose_their_start(tmp_path: Path) -> None:
    tokenizer = TOKENIZERS["llama"]
    writer = writer_of(tokenizer, TEMPLATES["hh"])
    (prompt,) = prompts(tmp_path, [{"prompt": "a b?"}], tokenizer, "hh")
    text = scored_text(prompt, *written(tokenizer, writer, "a floor of a room"), writer)
    (whole,) = read(tokenizer, "hh", [text]).token_ids
    short = read(tokenizer, "hh", [text, replace(text, token_ids=None)], max_length=5)
    assert short == Inputs([[whole[0], *whole[-4:]]] * 2, None, 2)


def test_encoders_functions_and_messages_see_the_lead(tmp_path: Path) -> None:
    text = ScoredText(None, "is low", {}, "f:1", lead="the floor ")
    tokenizer = word_tokenizer()
    for template in ("none", "hh"):
        ids = encoder_inputs(tokenizer, TEMPLATES[template], [text], 99).token_ids
        assert ids == [tokenizer("the floor is low").input_ids]
    (tmp_path / "f.py").write_text("def f(prompts, responses): return [len(prompts[0]) * 10 + len(responses[0])]\n")
    source = RewardSourceConfig(type="function", path=str(tmp_path / "f.py"), function="f")
    rewards = open_rewards(PolicyRewardConfig(sources=[source]), torch.device("cpu"))
    assert rewards.score([text]).total.tolist() == [10 * 10 + 6]
    assert ScoredText((Message("user", "Why?"),), "a", lead="x").asked == "Why?"


def test_a_model_scores_tokens_and_text_alike(tmp_path: Path) -> None:
    tokenizer = byte_bpe()
    write_decoder(tmp_path / "rm" / "model", tokenizer=tokenizer)
    write_run(tmp_path / "rm", template="hh")
    (prompt,) = prompts(tmp_path, [{"prompt": "a b?"}], tokenizer, "hh")
    writer = writer_of(tokenizer, TEMPLATES["hh"])
    good = scored_text(prompt, *written(tokenizer, writer, "a room."), writer)
    other = replace(good, token_ids=(*prompt.token_ids.tolist(), 9, 10, 11))
    whole = RewardSourceConfig(path=str(tmp_path / "rm"))
    sees = {"dialogue": whole, "response": replace(whole, sees="response")}
    for kind, source in sees.items():
        (opened,) = open_rewards(PolicyRewardConfig(sources=[source]), torch.device("cpu")).sources
        by_tokens, by_text, changed = opened.score([good, replace(good, token_ids=None), other], no_progress)
        assert by_tokens == pytest.approx(by_text, abs=1e-6)
        assert (abs(changed - by_tokens) > 1e-4) is (kind == "dialogue")  # the response alone is read as text


def test_running_moments_leave_normalising_and_clipping_to_their_keeper(tmp_path: Path) -> None:
    write_decoder(tmp_path / "rm" / "model")
    write_run(tmp_path / "rm")  # without moments of its own
    source = RewardSourceConfig(path=str(tmp_path / "rm"), weight=1000.0)
    config = PolicyRewardConfig(sources=[source], normalize=True, moments="running", clip=0.01)
    assert has_running_moments(config)
    assert not has_running_moments(replace(config, normalize=False))
    scores = open_rewards(config, torch.device("cpu")).score([ScoredText(None, "a room")])
    assert abs(scores.total.item()) > 0.01
    plain = open_rewards(PolicyRewardConfig(sources=[source]), torch.device("cpu")).score([ScoredText(None, "a room")])
    assert torch.equal(plain.total, scores.total)
