"""Dialogues -> text and segments. Golden strings, and equality with transformers."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerFast

from rlhf_cli.data.rows import Message
from rlhf_cli.data.templates import (
    TEMPLATES,
    Segment,
    Template,
    TemplateRefusal,
    prompt_text,
    resolve_template,
    segments,
)
from rlhf_cli.errors import DataError, ModelError
from tests.data_tokenizers import byte_bpe

SYSTEM = Message("system", "Be kind.")
TALK = (Message("user", "Hi"), Message("assistant", "Hello"), Message("user", "Bye"), Message("assistant", "Ciao"))
ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"

GOLDEN = {
    "hh": "###Human: Hi###Assistant:[ Hello]###Human: Bye###Assistant:[ Ciao]",
    "chatml": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n[Hello<|im_end|>]\n"
    "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n[Ciao<|im_end|>]\n",
    "alpaca": ALPACA
    + "### Instruction:\nHi\n\n### Response:\n[Hello]\n\n### Instruction:\nBye\n\n### Response:\n[Ciao]",
    "none": "Hi[Hello]Bye[Ciao]",
}  # what is learned stands in brackets
GOLDEN_PROMPT = {
    "hh": "Be kind.###Human: Hi###Assistant:",
    "chatml": "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "alpaca": "Be kind.\n\n### Instruction:\nHi\n\n### Response:\n",
    "none": "Be kind.Hi",
}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_bpe()


def shown(parts: list[Segment]) -> str:
    return "".join(f"[{text}]" if trained else text for text, trained in parts)


@pytest.mark.parametrize("name", list(TEMPLATES))
def test_golden(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    template = TEMPLATES[name]
    assert shown(segments(template, tokenizer.special_tokens_map, TALK)) == GOLDEN[name]
    assert prompt_text(template, tokenizer, (SYSTEM, TALK[0])) == GOLDEN_PROMPT[name]


@pytest.mark.parametrize("name", list(TEMPLATES))
@pytest.mark.parametrize(
    "messages",
    [
        TALK,
        (SYSTEM, *TALK),
        TALK[:3],
        TALK[1:],  # the assistant speaks first
        (TALK[0], TALK[1], TALK[3]),  # and twice in a row
        (TALK[0], SYSTEM, TALK[1]),
        (Message("user", ""), Message("assistant", " {{ x }} <b>\n ")),
    ],
)
def test_the_text_is_what_transformers_writes(
    name: str, messages: tuple[Message, ...], tokenizer: PreTrainedTokenizerFast
) -> None:
    template = TEMPLATES[name]
    tokenizer.chat_template = template.jinja
    chat = [message._asdict() for message in messages]
    for with_prompt in (False, True):
        parts = segments(template, tokenizer.special_tokens_map, messages, generation_prompt=with_prompt)
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=with_prompt)
        assert "".join(part.text for part in parts) == text
    assert prompt_text(template, tokenizer, messages) == text
    # each reply is learned exactly once, with nothing of other messages
    replies = [m.content for m in messages if m.role == "assistant"]
    trained = [text for text, is_trained in parts if is_trained]
    assert [text.removesuffix("<|im_end|>").strip() for text in trained] == [reply.strip() for reply in replies]


def test_context_is_not_trained_but_cut_alike(tokenizer: PreTrainedTokenizerFast) -> None:
    parts = segments(TEMPLATES["hh"], tokenizer.special_tokens_map, TALK, num_context=3)
    assert parts == [
        Segment("###Human: Hi###Assistant:", False),
        Segment(" Hello", False),
        Segment("###Human: Bye###Assistant:", False),
        Segment(" Ciao", True),
    ]
    prompt = segments(TEMPLATES["hh"], tokenizer.special_tokens_map, TALK[:3], generation_prompt=True)
    assert [text for text, _ in prompt] == [text for text, _ in parts[:3]]


def test_the_end_marker_of_a_foreign_template_is_its_eos(tokenizer: PreTrainedTokenizerFast) -> None:
    jinja = (
        "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] | trim }}"
        "{% if m['role'] == 'assistant' %}{{ eos_token }}\n\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    parts = segments(Template("tokenizer", jinja), special, TALK)
    text = "".join(part.text for part in parts)
    assert text == "<s>[user]Hi[assistant]Hello</s>\n\n[user]Bye[assistant]Ciao</s>\n\n"
    assert [p.text for p in parts if p.trained] == ["Hello</s>", "Ciao</s>"]


def test_a_template_that_rewrites_earlier_replies(tokenizer: PreTrainedTokenizerFast) -> None:
    """As Qwen3's: only the last reply keeps its (empty) thoughts."""
    jinja = (
        "{% for m in messages %}<{{ m['role'] }}>"
        "{% if m['role'] == 'assistant' and loop.last %}<think></think>{% endif %}"
        "{{ m['content'] }}<|im_end|>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    parts = segments(Template("tokenizer", jinja, ("<|im_end|>",)), {}, TALK)
    assert shown(parts) == (
        "<user>Hi<|im_end|><assistant>[Hello<|im_end|>]<user>Bye<|im_end|><assistant>[<think></think>Ciao<|im_end|>]"
    )


def test_templates_that_cannot_be_trained_on_say_so() -> None:
    lost = Template("tokenizer", TEMPLATES["none"].jinja + "{% if add_generation_prompt %}<think>{% endif %}")
    with pytest.raises(DataError, match=r"data\.template: the chat template .* another text than it is generated"):
        segments(lost, {}, TALK)
    strict = Template("tokenizer", "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(TemplateRefusal, match="roles must alternate"):
        segments(strict, {}, TALK)


def test_resolve_template(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = None
    assert resolve_template("auto", None, tokenizer).name == "none"
    assert resolve_template("auto", "hh", tokenizer).stop == ("###Human",)
    assert resolve_template("chatml", "hh", tokenizer).name == "chatml"
    with pytest.raises(ModelError, match=r"has no chat template; set data\.template"):
        resolve_template("tokenizer", None, tokenizer)
    with pytest.raises(ModelError, match="'vicuna', which this version does not know"):
        resolve_template("auto", "vicuna", tokenizer)
    tokenizer.chat_template = "{{ messages }}"
    assert resolve_template("auto", None, tokenizer) == Template("tokenizer", "{{ messages }}")
    assert resolve_template("none", None, tokenizer).name == "none"
