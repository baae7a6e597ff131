"""How a dialogue becomes text. A template is a Jinja chat template as transformers uses it, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import jinja2
from transformers.utils.chat_template_utils import render_jinja_template

from rlhf_cli.data.rows import Message
from rlhf_cli.errors import DataError, ModelError


class Template(NamedTuple):
    """name: as in data.template; jinja: what becomes tokenizer.chat_template; stop: strings that end a reply."""

    name: str
    jinja: str
    stop: tuple[str, ...] = ()


class TemplateRefusal(DataError):
    """The template cannot write this dialogue (it may demand alternating roles, or forbid system text)."""


class Segment(NamedTuple):
    """A stretch of text whose tokens are trained, or are context."""

    text: str
    trained: bool


# LMFlow's layout of HH dialogues: no line break between turns. A prompt ends with "###Assistant:", so that the blank
# belongs to the reply's first token, as tokenizers like it.
HH = """\
{% for message in messages %}\
{% if message['role'] == 'user' %}{{ '###Human: ' + message['content'] }}\
{% elif message['role'] == 'assistant' %}{{ '###Assistant: ' + message['content'] }}\
{% else %}{{ message['content'] }}{% endif %}\
{% endfor %}\
{% if add_generation_prompt %}{{ '###Assistant:' }}{% endif %}"""

CHATML = """\
{% for message in messages %}\
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}\
{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

# github.com/tatsu-lab/stanford_alpaca, the prompt without input; a system message takes the place of its first line.
ALPACA = """\
{% if not messages or messages[0]['role'] != 'system' %}\
{{ 'Below is an instruction that describes a task. Write a response that appropriately completes the request.\\n\\n' }}\
{% endif %}\
{% for message in messages %}\
{% if loop.previtem is defined and loop.previtem['role'] == 'assistant' %}{{ '\\n\\n' }}{% endif %}\
{% if message['role'] == 'user' %}{{ '### Instruction:\\n' + message['content'] + '\\n\\n' }}\
{% elif message['role'] == 'assistant' %}{{ '### Response:\\n' + message['content'] }}\
{% else %}{{ message['content'] + '\\n\\n' }}{% endif %}\
{% endfor %}\
{% if add_generation_prompt %}\
{% if messages and messages[-1]['role'] == 'assistant' %}{{ '\\n\\n' }}{% endif %}{{ '### Response:\\n' }}\
{% endif %}"""

NONE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"

TEMPLATES = {
    "hh": Template("hh", HH, ("###Human",)),
    "chatml": Template("chatml", CHATML, ("<|im_end|>",)),
    "alpaca": Template("alpaca", ALPACA, ("### Instruction",)),
    "none": Template("none", NONE),
}


def resolve_template(choice: str, stored_name: str | None, tokenizer: Any) -> Template:
    """data.template -> the template. auto = the one stored with the model's run, else the tokenizer's, else none."""
    own = tokenizer.chat_template
    name = choice
    if choice == "auto":
        name = stored_name or ("tokenizer" if own else "none")
    if name in TEMPLATES:
        return TEMPLATES[name]
    if name != "tokenizer":
        raise ModelError(
            f"the model was trained with the template {name!r}, which this version does not know;"
            f" set data.template to one of {', '.join(TEMPLATES)}, tokenizer"
        )
    if isinstance(own, dict):  # several named ones
        own = own.get("default")
    if not own:
        raise ModelError(
            "data.template: tokenizer was asked for, but the model's tokenizer has no chat template;"
            f" set data.template to one of {', '.join(TEMPLATES)}"
        )
    return Template("tokenizer", own)


def render(
    template: Template, special_tokens: Mapping[str, str], messages: Sequence[Message], add_generation_prompt: bool
) -> str:
    """The text that tokenizer.apply_chat_template(..., tokenize=False) gives; also for no messages, which it refuses.

    special_tokens: tokenizer.special_tokens_map, which templates may mention.
    """
    return _render(template, tuple(special_tokens.items()), tuple(messages), add_generation_prompt)


# The answers to one prompt repeat it, and the end of a dialogue's last reply is mostly that of the dialogue.
@lru_cache(maxsize=64)
def _render(
    template: Template,
    special_tokens: tuple[tuple[str, str], ...],
    messages: tuple[Message, ...],
    add_generation_prompt: bool,
) -> str:
    chat = [{"role": message.role, "content": message.content} for message in messages]
    try:
        texts, _ = render_jinja_template(
            [chat], chat_template=template.jinja, add_generation_prompt=add_generation_prompt, **dict(special_tokens)
        )
    except jinja2.TemplateError as error:
        raise TemplateRefusal(f"the chat template ({template.name}) refuses the dialogue: {error}") from error
    return str(texts[0])


def prompt_text(template: Template, tokenizer: Any, messages: Sequence[Message]) -> str:
    """The dialogue so far, and the words that make the assistant speak."""
    return render(template, tokenizer.special_tokens_map, messages, True)


def segments(
    template: Template,
    special_tokens: Mapping[str, str],
    messages: Sequence[Message],
    *,
    num_context: int = 0,
    generation_prompt: bool = False,
) -> list[Segment]:
    """The dialogue's text in alternating stretches of context and of what the assistant has to learn to write.

    A reply starts where the text of the messages before it, with generation prompt, ends; so its prompt in training is
    letter by letter the prompt at generation. It ends with its end marker (template.stop or EOS), blanks after that
    belong to the template. The first num_context messages are cut the same way, but nothing in them is trained.
    Joined, the segments are `render` of the messages. Raises DataError if the template's prompt is no prefix.
    """
    full = render(template, special_tokens, messages, generation_prompt)
    markers = (*template.stop, special_tokens.get("eos_token") or "")
    pieces, done = [], 0
    for i, message in enumerate(messages):
        if message.role != "assistant":
            continue
        start = len(_prefix(template, special_tokens, messages[:i], full))
        end = _reply_end(template, special_tokens, messages[: i + 1], full, start, markers)
        pieces += [Segment(full[done:start], False), Segment(full[start:end], i >= num_context)]
        done = end
    pieces.append(Segment(full[done:], False))
    return [piece for piece in pieces if piece.text]


class ReplyFrame(NamedTuple):
    """What a template writes around the words of a last reply. lead: in front of them, after the generation prompt (the
    blank of `hh`); closing: behind them, as training ends a reply (the end marker of `chatml`)."""

    lead: str
    closing: str


def reply_frame(template: Template, special_tokens: Mapping[str, str]) -> ReplyFrame:
    """The frame, read off a dialogue. Raises DataError for a template that writes no plain question and answer."""
    words = "word"
    parts = segments(template, special_tokens, (Message("user", "question"), Message("assistant", words)))
    reply = next(number for number, part in enumerate(parts) if part.trained)
    written = "".join(part.text for part in parts[reply:])
    lead, found, closing = written.partition(words)
    if not found:
        raise TemplateRefusal(f"the chat template ({template.name}) changes the reply {words!r}")
    rest = parts[-1]
    blank = not rest.trained and not rest.text.strip()  # what stands after an end marker has no place in training
    return ReplyFrame(lead, closing[: len(closing) - len(rest.text)] if blank else closing)


def _prefix(template: Template, special_tokens: Mapping[str, str], messages: Sequence[Message], full: str) -> str:
    prefix = render(template, special_tokens, messages, True)
    if not full.startswith(prefix):
        raise DataError(
            f"data.template: the chat template ({template.name}) writes a prompt that its own dialogues do not start"
            f" with, so a reply would be learned after another text than it is generated after. The prompt ends with"
            f" {prefix[-60:]!r}. Use data.template={' or '.join(TEMPLATES)}"
        )
    return prefix


def _reply_end(
    template: Template,
    special_tokens: Mapping[str, str],
    messages: Sequence[Message],
    full: str,
    start: int,
    markers: Sequence[str],
) -> int:
    """Where in `full` the last of `messages` ends, its end marker included."""
    upto = render(template, special_tokens, messages, False)
    if full.startswith(upto):
        reply = full[start : len(upto)].rstrip()
        marked = any(marker and reply.endswith(marker) for marker in markers)
        return start + len(reply) if marked else len(upto)
    # Some templates write the last reply differently from earlier ones (Qwen3 drops earlier thoughts): find its words.
    content = messages[-1].content.strip()
    at = full.find(content, start)
    if at < 0:
        raise TemplateRefusal(f"the chat template ({template.name}) changes the reply {content[:60]!r}")
    end = at + len(content)
    rest = full[end:]
    lead = len(rest) - len(rest.lstrip())
    marker = next((m for m in markers if m and rest[lead:].startswith(m)), None)
    return end if marker is None else end + lead + len(marker)
