"""Prompts for a policy: which each format gives, their tokens, their counts, their order."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_cli.data.prompt_rows import cut_document
from rlhf_cli.data.prompts import PreparedPrompts, prepare_prompts, prompt_order
from rlhf_cli.data.rows import DialogueRow, Message, TextRow
from rlhf_cli.data.templates import TEMPLATES, Template, reply_frame
from rlhf_cli.data.tokenize import encode_prompt, encode_rows, make_encoder, row_segments
from rlhf_cli.errors import DataError
from rlhf_cli.schema import PromptDataConfig
from tests.data_tokenizers import byte_bpe, sentencepiece_like
from tests.tiny_models import tiny_tokenizer

TOKENIZER, LLAMA = byte_bpe(), sentencepiece_like()
Run = Callable[..., PreparedPrompts]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Prompts of rows, or of a path; lines: what is reported."""

    def run(
        rows: Any, template: str = "hh", tokenizer: Any = TOKENIZER, lines: list[str] | None = None, **keys: Any
    ) -> PreparedPrompts:
        path = rows if isinstance(rows, str) else write(tmp_path / "rows.jsonl", rows)
        report = (lambda line: None) if lines is None else lines.append
        return prepare_prompts(PromptDataConfig(path=path, **keys), tokenizer, TEMPLATES[template], report)

    return run


ASK, ANSWER = {"role": "user", "content": "What?"}, {"role": "assistant", "content": "That."}
HH = "\n\nHuman: What?\n\nAssistant: That.\n\nHuman: Why?\n\nAssistant:"
ASKED = (Message("user", "What?"),)
AGAIN = (*ASKED, Message("assistant", "That."), Message("user", "Why?"))


@pytest.mark.parametrize(
    ("row", "messages", "text", "columns"),
    [
        ({"prompt": "What?", "gold": 2}, ASKED, "What?", {"gold": 2}),
        ({"prompt": "What?", "system": "Be."}, (Message("system", "Be."), *ASKED), "System: Be.\n\nUser: What?", {}),
        ({"text": "\n"}, None, "\n", {}),
        ({"text": "To be", "by": "W."}, None, "To be", {"by": "W."}),
        ({"text": "To be", "label": "sad"}, None, "To be", {"label": "sad"}),
        ({"prompt": "What?", "response": "That."}, ASKED, "What?", {"reference": "That."}),
        ({"prompt": "What?", "response": "That.", "reference": "Own."}, ASKED, "What?", {"reference": "Own."}),
        ({"messages": [ASK, ANSWER, {**ASK, "content": "Why?"}, ANSWER]}, AGAIN, None, {"reference": "That."}),
        ({"messages": [ASK, ANSWER, {**ASK, "content": "Why?"}]}, ASKED, "What?", {"reference": "That."}),
        ({"messages": [ASK]}, ASKED, "What?", {}),
        ({"prompt": "What?", "chosen": "That.", "rejected": "No."}, ASKED, "What?", {}),
        ({"chosen": HH + " A.", "rejected": HH + " B."}, AGAIN, None, {}),
        ({"prompt": "What?", "responses": ["a", "b"], "ranks": [1, 2], "by": 3}, ASKED, "What?", {"by": 3}),
        ({"prompt": HH}, AGAIN, None, {}),
    ],
)  # fmt: skip
def test_what_each_format_asks(
    run: Run, row: dict[str, Any], messages: tuple[Message, ...] | None, text: str | None, columns: dict[str, Any]
) -> None:
    (prompt,) = run([row]).train
    assert prompt.messages == messages
    assert prompt.text == (text or "User: What?\n\nAssistant: That.\n\nUser: Why?")
    assert dict(prompt.columns) == columns
    assert prompt.source.endswith("rows.jsonl:1")


@pytest.mark.parametrize("tokenizer", [TOKENIZER, LLAMA], ids=["byte", "llama"])
@pytest.mark.parametrize("template", list(TEMPLATES))
def test_a_reply_in_training_follows_these_very_tokens(run: Run, template: str, tokenizer: Any) -> None:
    encoder = make_encoder(tokenizer)
    for dialogue in (ASKED, AGAIN):
        row = {"messages": [message._asdict() for message in (*dialogue, Message("assistant", "a b"))]}
        (prompt,) = run([row], template, tokenizer).train
        assert prompt.messages == dialogue
        assert prompt.token_ids.dtype == np.int32
        assert prompt.token_ids.tolist() == encode_prompt(encoder, TEMPLATES[template], prompt.messages).tolist()
        trained = DialogueRow((*prompt.messages, Message("assistant", "is so")), num_context=len(prompt.messages))
        parts = row_segments(trained, TEMPLATES[template], tokenizer.special_tokens_map, "auto")
        whole = encode_rows(encoder, [parts])[0].input_ids.tolist()
        if template != "none":
            assert whole[: len(prompt.token_ids)] == prompt.token_ids.tolist()


def test_raw_text_is_continued_and_bos_is_the_tokenizers_own(run: Run) -> None:
    (prompt,) = run([{"text": "a floor of"}], "hh", LLAMA).train
    assert prompt.token_ids.tolist() == LLAMA("a floor of").input_ids
    assert prompt.token_ids[0] == LLAMA.bos_token_id
    (prompt,) = run([{"text": "a floor of"}], "hh").train
    assert prompt.token_ids.tolist() == TOKENIZER("a floor of").input_ids


def test_overlong_prompts(run: Run) -> None:
    rows = [{"text": "a b c d e f g h"}, {"text": "a"}]
    whole = LLAMA("a b c d e f g h").input_ids
    found = run(rows, tokenizer=LLAMA, max_prompt_length=4)
    assert [p.text for p in found.train] == ["a"]
    assert found.info[0]["dropped"] == {"overlong": 1}
    assert (found.info[0]["rows"], found.info[0]["kept"], found.info[0]["tokens"]) == (2, 1, len(LLAMA("a").input_ids))
    found = run(rows, tokenizer=LLAMA, max_prompt_length=4, overlong="truncate")
    assert found.train[0].token_ids.tolist() == [whole[0], *whole[-3:]]  # BOS and the end
    assert found.train[0].text == LLAMA.decode(whole[-3:]) == "c d e f g h"  # a reward is told what the policy saw
    assert found.info[0]["overlong"] == {"truncate": 1}
    kept = run(rows, max_prompt_length=3, overlong="truncate").train[0].token_ids.tolist()
    assert kept == TOKENIZER("a b c d e f g h").input_ids[-3:]


def test_a_dialogue_that_lost_its_start_keeps_its_messages(run: Run) -> None:
    whole = run([{"prompt": "What is it?"}]).train[0]
    cut = run([{"prompt": "What is it?"}], max_prompt_length=5, overlong="truncate").train[0]
    assert cut.token_ids.tolist() == whole.token_ids[-5:].tolist()
    assert (cut.messages, cut.text) == (whole.messages, whole.text)


def test_the_split_is_the_last_prompts_and_comes_before_overlong_ones_go(run: Run, tmp_path: Path) -> None:
    rows = [{"text": t} for t in ["a", "b", "c", "long " * 50, "d"]]
    found = run(rows, validation_split_percentage=40, max_prompt_length=20)
    assert ([p.text for p in found.train], [p.text for p in found.eval or []]) == (["a", "b", "c"], ["d"])
    other = write(tmp_path / "eval.jsonl", [{"text": "e"}, {"text": "e"}])
    found = run(rows, eval_path=other, max_prompt_length=20)
    assert ([p.text for p in found.train], [p.text for p in found.eval or []]) == (["a", "b", "c", "d"], ["e", "e"])
    assert [info["kept"] for info in found.info] == [4, 2]
    assert run(rows).eval is None


def test_repeats_and_prompts_on_both_sides(run: Run, tmp_path: Path) -> None:
    rows = [{"prompt": "a"}, {"prompt": "b"}, {"prompt": "a", "gold": 1}, {"text": "a"}]
    path = [write(tmp_path / "a.jsonl", rows[:3]), write(tmp_path / "b.jsonl", rows[3:])]
    data = PromptDataConfig(path=path, deduplicate=True)
    found = prepare_prompts(data, TOKENIZER, TEMPLATES["hh"], lambda line: None)
    assert [(p.text, p.messages is None) for p in found.train] == [("a", False), ("b", False), ("a", True)]
    assert found.info[0]["dropped"] == {"duplicate": 1}
    lines: list[str] = []
    found = run(rows[:3], lines=lines, eval_path=write(tmp_path / "c.jsonl", [*rows[:2], {"prompt": "c"}]))
    assert any("2 of 3 evaluation prompts are trained on, too" in line for line in lines)
    lines.clear()
    run(rows[:2], lines=lines, eval_path=path[1])
    assert not any("trained on, too" in line for line in lines)


def test_rows_that_ask_nothing(run: Run, tmp_path: Path) -> None:
    found = run([{"text": ""}, {"text": "a"}])
    assert found.info[0]["dropped"] == {"empty": 1}
    pair = {"chosen": "a", "rejected": "b"}
    with pytest.raises(DataError, match=r"rows.jsonl:1: two raw texts without a prompt.*data.on_bad_row=skip"):
        run([pair])
    found = run([{"prompt": "a"}, {"prompt": 3}, {"prompt": "\ud800"}], on_bad_row="skip")
    assert found.info[0]["dropped"] == {"field 'prompt' is no text": 1, "half a character": 1}
    refusing = Template("strict", "{{ raise_exception('no system') }}")
    rows = write(tmp_path / "r.jsonl", [{"prompt": "a"}])
    with pytest.raises(DataError, match=r"r.jsonl:1: refused by the chat template.*no system"):
        prepare_prompts(PromptDataConfig(path=rows), TOKENIZER, refusing, print)


def test_nothing_left(run: Run) -> None:
    with pytest.raises(DataError, match=r"no prompt is left to answer; of 2 rows overlong: 2. Check data.max_prompt"):
        run([{"text": "a b c"}, {"text": "d e f"}], max_prompt_length=1)
    with pytest.raises(DataError, match="no prompt is left to evaluate on"):
        run([{"text": "a"}, {"text": "long " * 9}], max_prompt_length=9, validation_split_percentage=50)


def test_limit_comes_first(run: Run, tmp_path: Path) -> None:
    found = run([{"text": t} for t in ["", "b", "c", "d"]], limit=3, validation_split_percentage=1)
    assert ([p.text for p in found.train], [p.text for p in found.eval or []]) == (["b"], ["c"])
    (tmp_path / "t.txt").write_text("Say it.\nIt is so.\nA floor.\n")
    found = run(str(tmp_path / "t.txt"), limit=2, prompt_tokens=2)
    assert (len(found.train), found.info[0]["rows"]) == (2, 2)


def test_prompts_cut_from_a_text(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "play.txt"
    tokenizer = tiny_tokenizer("word")  # words, single blanks and signs; unknown words are <unk>
    path.write_text("All:\nSpeak, speak.\n\nFirst Citizen:\n  Before\nSpeak.\n")
    lines: list[str] = []
    found = run(str(path), "none", tokenizer, lines, prompt_tokens=4)
    # "All" ":" "\n" "Speak" | "Speak" "," " " "speak" | "First" " " "Citizen" ":" | "Speak" "." "\n" is too short
    assert [p.text for p in found.train] == ["All:\nSpeak", "Speak, speak", "First Citizen:"]
    assert [p.source for p in found.train] == [f"{path}:1", f"{path}:2", f"{path}:4"]
    assert all(p.messages is None and len(p.token_ids) == 4 for p in found.train)
    assert (found.info[0]["rows"], found.info[0]["kept"]) == (3, 3)
    assert any("from the start of each line that begins with a word" in line for line in lines)
    with pytest.raises(DataError, match=r"is one plain text, from which prompts are cut; use data.format=auto"):
        run(str(path), format="prompts")
    with pytest.raises(DataError, match=r"no prompt is left to answer; of 0 rows none was dropped.*prompt_tokens=99"):
        run(str(path), "none", tokenizer, prompt_tokens=99)


@settings(max_examples=40, deadline=None)
@given(st.text(alphabet="ab c\n", max_size=60), st.integers(2, 6), st.sampled_from([TOKENIZER, LLAMA]))
def test_a_cut_has_the_tokens_of_the_text_from_there_on(text: str, length: int, tokenizer: Any) -> None:
    """Independent: the rest of the text tokenised whole, for texts in which no token spans a line end."""
    encoder = make_encoder(tokenizer)
    lines = text.split("\n")
    expected = []
    for number, line in enumerate(lines):
        ids = tokenizer("\n".join(lines[number:])).input_ids
        if line[:1].strip() and len(ids) >= length:
            expected.append((f"t:{number + 1}", ids[:length]))
    found = [(row.source, ids.tolist()) for row, ids in cut_document(TextRow(text, "t"), encoder, length)]
    assert found == expected


def test_a_cut_does_not_end_inside_a_character() -> None:
    encoder = make_encoder(TOKENIZER)  # it knows bytes, "é" is two of them
    assert len(TOKENIZER("é").input_ids) == 2
    ((row, ids),) = cut_document(TextRow("zé zé", "t"), encoder, 2)
    assert (row.text, len(ids)) == ("z", 1)
    ((row, ids),) = cut_document(TextRow("zé zé", "t"), encoder, 3)
    assert (row.text, len(ids)) == ("zé", 3)


def test_the_digest_tells_what_a_run_depends_on(run: Run, tmp_path: Path) -> None:
    rows = [{"prompt": "a", "gold": 1}, {"prompt": "b", "gold": 2}]
    first = run(rows).digest
    assert run(rows).digest == first
    changed = [
        run(rows[::-1]), run([rows[0], {"prompt": "b", "gold": 3}]), run(rows, "chatml"), run(rows, tokenizer=LLAMA),
        run(rows, validation_split_percentage=50), run(rows, max_prompt_length=99),
    ]  # fmt: skip
    assert len({first, *(found.digest for found in changed)}) == 7


@given(st.integers(1, 20), st.integers(0, 3))
def test_each_pass_takes_every_prompt_once(count: int, seed: int) -> None:
    order = prompt_order(count, seed)
    taken = [order(cursor) for cursor in range(3 * count)]
    for start in range(0, 3 * count, count):
        assert sorted(taken[start : start + count]) == list(range(count))
    again = prompt_order(count, seed)
    assert [again(cursor) for cursor in reversed(range(3 * count))] == taken[::-1]  # nothing but the cursor matters


def test_passes_and_seeds_differ() -> None:
    order = prompt_order(50, 0)
    assert [order(i) for i in range(50)] != [order(i) for i in range(50, 100)]
    assert [order(i) for i in range(50)] != [prompt_order(50, 1)(i) for i in range(50)]
    assert Counter(order(i) for i in range(100)) == dict.fromkeys(range(50), 2)


def test_what_a_template_writes_around_a_reply() -> None:
    special = TOKENIZER.special_tokens_map
    frames = {name: tuple(reply_frame(template, special)) for name, template in TEMPLATES.items()}
    assert frames == {"hh": (" ", ""), "chatml": ("", "<|im_end|>"), "alpaca": ("", ""), "none": ("", "")}
    marked = Template("own", "{% for m in messages %}[{{ m.content }}]</x>{% endfor %}!")
    with pytest.raises(DataError, match="that its own dialogues do not start with"):
        reply_frame(marked, special)
    padded = Template("own", "{% for m in messages %}<{{ m.role }}> {{ m.content }} {{ eos_token }}\n{% endfor %}"
                             "{% if add_generation_prompt %}<assistant>{% endif %}")  # fmt: skip
    assert reply_frame(padded, special) == (" ", " <|end|>")
