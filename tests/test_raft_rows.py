"""Which responses are learnt from, in which order of rank, and as which tokens."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_cli.align.collect import Answer, Judged, rule_hits
from rlhf_cli.assemble import Text
from rlhf_cli.data.prompts import Prompt
from rlhf_cli.data.rows import Message
from rlhf_cli.data.templates import TEMPLATES
from rlhf_cli.ops.diversity import self_bleu
from rlhf_cli.raft.figures import diversity_figures, reward_figures
from rlhf_cli.raft.models import Models
from rlhf_cli.raft.samples import Samples, unselected
from rlhf_cli.raft.selection import describe_choice, select, training_rows
from rlhf_cli.reward.answers import writer_of
from rlhf_cli.reward.rules import Rules
from rlhf_cli.rollout.sampler import Response
from rlhf_cli.rollout.stops import Ending
from rlhf_cli.schema import RaftConfig, build
from tests.data_tokenizers import byte_bpe, sentencepiece_like
from tests.tiny_models import tiny_model, tiny_tokenizer

LETTERS = tiny_tokenizer()


def config(rules: list[dict[str, Any]] | None = None, **raft: Any) -> RaftConfig:
    """Two prompts with three responses each, if nothing else is said."""
    values = {
        "stage": "raft", "model": {"path": "m"}, "data": {"path": "p"}, "reward": {"rules": rules or []},
        "raft": {"batch_size": 2, "top_fraction": 1 / 3} | raft,
    }  # fmt: skip
    return build(RaftConfig, values)


def response(text: str, ending: Ending = "length", tokenizer: Any = LETTERS, stop: str = "") -> Response:
    """A text as tokens; with the tokens of `stop` behind it, which never share one with it."""
    encode = lambda text: tokenizer(text, add_special_tokens=False).input_ids
    ids = encode(text)
    end = [tokenizer.eos_token_id] if ending == "eos" else encode(stop) if ending == "stop" else []
    return Response(np.array(ids + end, np.int32), text, len(ids), ending)


def prompt(text: str = "to", dialogue: bool = False, tokenizer: Any = LETTERS) -> Prompt:
    ids = np.array(tokenizer(text, add_special_tokens=False).input_ids, np.int32)
    return Prompt(ids, (Message("user", text),) if dialogue else None, text, {}, "p:1")


def samples(
    settings: RaftConfig, texts: list[str], rewards: list[float], kl: list[float] | None = None
) -> Samples:  # fmt: skip
    groups = settings.raft.samples_per_prompt
    answers = [Answer(prompt(), response(text), i // groups) for i, text in enumerate(texts)]
    hits = rule_hits(Rules(settings.reward.rules), [answer.response for answer in answers])
    reward = torch.tensor(rewards, dtype=torch.float64)
    measured = torch.tensor([0.0] * len(texts) if kl is None else kl, dtype=torch.float64)
    return Samples(answers, Judged(reward, hits, {"own": reward}), measured, -10 - measured, 7)


TEXTS, REWARDS = ["as", "cd", "ef", "ho", "in", "kl"], [1.0, 3.0, 2.0, 6.0, 5.0, 4.0]
HASH = {"pattern": "#", "name": "hash"}


def test_the_best_to_each_prompt_or_of_all() -> None:
    local = config()
    found = select(samples(local, TEXTS, REWARDS), local)
    assert found.chosen.tolist() == [1, 3], "3 of (1, 3, 2) and 6 of (6, 5, 4)"
    assert found.ranks.tolist() == [3, 1, 2, 1, 2, 3]
    assert found.weights is None
    top = config(strategy="top")
    found = select(samples(top, TEXTS, REWARDS), top)
    assert found.chosen.tolist() == [3, 4], "the best third of all six"
    assert found.ranks.tolist() == [6, 4, 5, 1, 2, 3]


def test_kl_takes_from_the_reward() -> None:
    settings = config(kl_coef=0.5)
    kl = [0.0, 3.0, 0.5, -1.0, 5.0, 9.0]
    given = samples(settings, TEXTS, REWARDS, kl)
    found = select(given, settings)
    # 1 - 0, 3 - 1.5, 2 - 0.25; 6 + 0.5, 5 - 2.5, 4 - 4.5
    assert found.scores.tolist() == [1.0, 1.5, 1.75, 6.5, 2.5, -0.5]
    assert found.chosen.tolist() == [2, 3]
    assert [row["score"] for row in describe_choice(found, given, settings)] == found.scores.tolist()
    assert select(given, config()).chosen.tolist() == [1, 3], "without kl_coef it only is watched"


def test_what_a_rule_discards_is_never_chosen() -> None:
    settings = config([HASH])
    given = samples(settings, ["as", "c#", "ef", "#", "i#", "##"], REWARDS)
    found = select(given, settings)
    assert found.chosen.tolist() == [2], "the second of the first prompt; the other prompt has none left"
    assert found.num_skipped(given.groups) == 1
    rows = describe_choice(found, given, settings)
    assert [row["kept"] for row in rows] == [False, False, True, False, False, False]
    assert [row["why_not"] for row in rows][:3] == ["others rank higher", "discarded: hash", None]
    assert [row["rank"] for row in rows] == [2, None, 1, None, None, None]
    assert [row["score"] for row in rows][:3] == [1.0, None, 2.0]
    assert [row["rules"] for row in rows][:2] == [[], ["hash"]]
    figures = reward_figures(given, found, settings)
    assert figures["raft/discarded"] == 4 / 6
    assert figures["rules/hash"] == 4 / 6
    assert figures["raft/skipped_prompts"] == 1


def test_the_score_of_a_rule_stands_for_the_reward() -> None:
    settings = config([{**HASH, "action": "score", "score": 1.5}], kl_coef=1.0)
    given = samples(settings, ["a#", "c#", "ef", "gh", "ij", "kl"], REWARDS, [0.0, 0.25, 0.75, 0.0, 0.0, 0.0])
    found = select(given, settings)
    assert found.scores.tolist() == [1.5, 1.25, 1.25, 6.0, 5.0, 4.0], "and pays for its KL like a reward"
    assert found.chosen.tolist() == [0, 3]
    figures = reward_figures(given, found, settings)
    assert figures["raft/discarded"] == 0.0
    # The first to each prompt as the policy writes them, 1.5 and 6; the same are selected here.
    assert figures["raft/reward_policy"] == 3.75
    assert figures["raft/reward_selected"] == 3.75
    assert figures["reward/own"] == 3.5, "what the source itself says of them, 1 and 6"


def test_soft_weights_within_a_prompt_and_among_all() -> None:
    rewards = [0.0, math.log(3), -100.0, 1.0, 1.0, 1.0]
    local = config([HASH], soft_temperature=1.0)
    given = samples(local, ["as", "cd", "ef", "gh", "i#", "kl"], rewards)
    found = select(given, local)
    # 1 : 3 : e^-100, which is not worth its pass; 1 : discarded : 1
    assert found.chosen.tolist() == [0, 1, 3, 5]
    assert found.weights is not None
    assert found.weights.tolist() == pytest.approx([0.25, 0.75, 0.5, 0.5])
    assert [row.get("weight") for row in describe_choice(found, given, local)] == [
        *found.weights.tolist()[:2], None, found.weights[2].item(), None, found.weights[3].item()
    ]  # fmt: skip
    # (0.25 x 0 + 0.75 x ln 3 + 0.5 x 1 + 0.5 x 1) / 2
    assert reward_figures(given, found, local)["raft/reward_selected"] == pytest.approx((0.75 * math.log(3) + 1) / 2)
    top = config([HASH], soft_temperature=2.0, strategy="top")
    found = select(samples(top, ["as", "cd", "ef", "gh", "i#", "kl"], rewards), top)
    assert found.weights is not None
    raw = [1.0, math.sqrt(3), math.exp(0.5), math.exp(0.5)]  # exp(reward / 2) of those that are left
    assert found.weights.tolist() == pytest.approx([w / sum(raw) for w in raw])


def test_figures_of_what_the_policy_writes() -> None:
    """The first to each prompt, whatever its rank: `as` of 1 and `ho` of 6."""
    settings = config()
    given = samples(settings, TEXTS, REWARDS, [0.5, math.nan, math.nan, 1.5, math.nan, math.nan])
    selection = select(given, settings)
    figures = reward_figures(given, selection, settings)
    assert list(unselected(settings)) == [0, 3]
    assert figures["raft/reward_policy"] == 3.5
    assert figures["raft/reward_policy_std"] == pytest.approx(5 / math.sqrt(2))
    assert figures["raft/reward_selected"] == 4.5
    assert figures["raft/selected"] == 2
    assert figures["raft/kl"] == 1.0
    assert figures["raft/kl_stderr"] == pytest.approx(math.sqrt(0.5) / math.sqrt(2))
    # log reference: -10.5 - 11.5 over 2 + 2 tokens
    assert figures["raft/perplexity"] == pytest.approx(math.exp(22 / 4))
    texts = diversity_figures(given, selection, settings, LETTERS, len(LETTERS))
    assert texts["raft/length"] == 2
    assert texts["raft/unique_1"] == 4, "a s h o"
    assert texts["raft/entropy_1"] == 2.0
    assert texts["raft/distinct_2_selected"] == 1.0
    assert texts["raft/self_bleu"] == pytest.approx(self_bleu([TEXTS[:3], TEXTS[3:]])), "of all responses to a prompt"
    assert list(unselected(config(strategy="top"))) == list(range(6))


def test_the_work_of_an_iteration_by_hand() -> None:
    """Each weight is 2 FLOPs for a token that is read or written, and 6 for one that is trained; embeddings are looked
    up."""
    model = tiny_model()
    weights = sum(p.numel() for name, p in model.named_parameters() if "embed" not in name)
    models: Any = SimpleNamespace(policy=SimpleNamespace(module=model), read_params=1000)
    assert Models.work(models, 7, 5) == 7 * 2 * (weights + 1000) + 5 * 6 * weights


# --- tokens


def rows(
    answers: list[Answer], tokenizer: Any = LETTERS, template: str = "none", always: bool = True, longest: int = 99
) -> list[tuple[list[int], list[int]]]:
    """(prompt's tokens, trained tokens) of each row; nothing is trained before something that is not."""
    text = Text(tokenizer, TEMPLATES[template], 0)
    made = training_rows(answers, text, writer_of(tokenizer, text.template).closing, always, longest)
    found = []
    for i in range(len(made)):
        ids, trained = made.row(i)
        first = len(ids) - int(trained.sum())
        assert trained.tolist() == [False] * first + [True] * (len(ids) - first)
        found.append((ids[:first].tolist(), ids[first:].tolist()))
    return found


@pytest.mark.parametrize(("ending", "always", "eos"), [
    ("eos", True, 1), ("eos", False, 1), ("stop", True, 1), ("stop", False, 1), ("length", True, 1),
    ("length", False, 0),
])  # fmt: skip
def test_the_response_is_trained_and_its_end(ending: Ending, always: bool, eos: int) -> None:
    found = response("we all", ending, stop="!?")
    ((before, trained),) = rows([Answer(prompt("speak"), found, 0)], always=always)
    assert LETTERS.decode(before) == "speak"
    assert trained == LETTERS("we all").input_ids + [LETTERS.eos_token_id] * eos
    assert trained.count(LETTERS.eos_token_id) == eos


def test_no_letter_of_a_stop_string_that_begins_inside_a_token() -> None:
    """` floor` is one token, the stop string is `or`: the text is tokenised again."""
    tokenizer = byte_bpe()
    (token,) = tokenizer(" floor").input_ids
    cut = Response(np.array([token], np.int32), " flo", None, "stop")
    ((_, trained),) = rows([Answer(prompt("a", tokenizer=tokenizer), cut, 0)], tokenizer)
    assert tokenizer.decode(trained) == " flo<|end|>"
    nothing = Response(np.array([token], np.int32), "", None, "stop")
    ((_, trained),) = rows([Answer(prompt("a", tokenizer=tokenizer), nothing, 0)], tokenizer)
    assert trained == [tokenizer.eos_token_id]


def test_text_that_is_tokenised_again_gets_no_blank_in_front() -> None:
    tokenizer = sentencepiece_like()
    ids = tokenizer("a floor", add_special_tokens=False).input_ids
    cut = Response(np.array([ids[-1]], np.int32), "flo", None, "stop")
    ((_, trained),) = rows([Answer(prompt("a", tokenizer=tokenizer), cut, 0)], tokenizer)
    assert tokenizer.convert_ids_to_tokens(trained[:1])[0][0] == "f"
    assert "".join(tokenizer.convert_ids_to_tokens(trained)) == "flo</s>"


def test_a_dialogue_is_closed_as_its_template_does() -> None:
    """A response that stops before <|im_end|> gets it, and one that was cut off; one with an EOS of its own does not;
    nor does a plain text."""
    tokenizer = byte_bpe()
    ask = lambda dialogue: prompt("<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n", dialogue, tokenizer)
    answers = [
        Answer(ask(True), response("It is so.", "stop", tokenizer, "<|im_end|>"), 0),
        Answer(ask(True), response("It is so.", "length", tokenizer), 0),
        Answer(ask(True), response("It is so.", "eos", tokenizer), 0),
        Answer(ask(False), response("It is so.", "stop", tokenizer, "<|im_end|>"), 0),
    ]
    found = [tokenizer.decode(trained) for _, trained in rows(answers, tokenizer, "chatml")]
    assert found == ["It is so.<|im_end|><|end|>", "It is so.<|im_end|><|end|>", "It is so.<|end|>", "It is so.<|end|>"]
    cut = [tokenizer.decode(trained) for _, trained in rows(answers, tokenizer, "chatml", always=False)]
    assert cut == [found[0], "It is so.", *found[2:]]


def test_rows_end_where_the_models_positions_do() -> None:
    found = rows([Answer(prompt("speak"), response("we all"), 0)], longest=8)
    assert [(LETTERS.decode(before), LETTERS.decode(trained)) for before, trained in found] == [("speak", "we ")]
