"""Raw columns -> typed rows: which format a file has, and how each format is read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from rlhf_cli.data.columns import RowFormat, render_row
from rlhf_cli.data.fields import ALIASES, BESIDE_A_LABEL, Fields, find_column, has_columns
from rlhf_cli.data.hh import looks_like_hh, parse_hh, split_common_prompt
from rlhf_cli.data.rows import (
    DOCUMENT,
    DialogueRow,
    LabelledRow,
    Message,
    PairRow,
    ParsedRow,
    PromptRow,
    RankedRow,
    Row,
    RowError,
    TextRow,
    TrainingRow,
)
from rlhf_cli.errors import DataError

# format: (columns it needs, columns it also explains). A format gives way to another one that explains its columns.
SHAPES: dict[str, tuple[set[str], set[str]]] = {
    "text_only": ({"text"}, set()),
    "labelled": ({"text", "label"}, set()),
    "prompts": ({"prompt"}, {"system"}),
    "text2text": ({"prompt", "response"}, {"system"}),
    "ranked": ({"prompt", "responses"}, {"system", "ranks", "scores"}),
    "paired": ({"chosen", "rejected"}, {"system", "prompt", "margin"}),
    "conversation": ({"messages"}, {"system", "prompt"}),
}
# LMFlow's words in "type" (docs/source/examples/DATASETS.md); our own names are understood too.
DECLARED = {name: name for name in SHAPES} | {
    "paired_conversation": "paired",
    "paired_text_to_text": "paired",
    "text_to_scored_textlist": "ranked",
}


def detect_format(row: Row) -> str:
    """The format of a file from its first row. Raises DataError when the columns fit none, or more than one."""
    if row.kind == DOCUMENT:
        return "text_only"
    present = {name for name in ALIASES if has_columns(row.values, name)}
    declared = DECLARED.get(row.kind or "")
    if declared and SHAPES[declared][0] <= present:
        return _refine_hh(declared, row.values)
    fits = [name for name, (needs, _) in SHAPES.items() if needs <= present]
    found = [
        name for name in fits if not any(SHAPES[name][0] <= SHAPES[o][0] | SHAPES[o][1] for o in fits if o != name)
    ]
    if len(found) == 1:
        return _refine_hh(found[0], row.values)
    columns = ", ".join(row.values) or "(none)"
    if found:
        raise DataError(
            f"{row.source}: the columns {columns} fit {' and '.join(found)}; choose one with data.format={found[0]}"
        )
    if row.kind and not declared:
        columns += f' (declared "type": "{row.kind}", which is none of {", ".join(DECLARED)})'
    raise DataError(
        f"{row.source}: cannot tell the format from the columns {columns}.\n{describe_formats()}\n"
        "Map the file's names onto these with data.columns={our name: its name}, or make the text with"
        " data.row_format='{column} {column}'."
    )


def describe_formats(names: Iterable[str] = SHAPES) -> str:
    """What each format needs, one line each."""
    lines = []
    for name in names:
        needs, _ = SHAPES[name]
        hidden = () if name == "labelled" else (BESIDE_A_LABEL,)
        known = {
            field: [a for a in ALIASES[field] if a not in hidden] for field in sorted(needs, key=list(ALIASES).index)
        }
        columns = " + ".join(" or ".join(aliases) for aliases in known.values())
        lines.append(f"  {name}: {columns}" + (" + ranks or scores" if name == "ranked" else ""))
    return "\n".join([*lines, "  hh: chosen + rejected, or text, each '\\n\\nHuman: ...\\n\\nAssistant: ...'"])


def parse_row(row: Row, format: str, row_format: RowFormat | None = None) -> ParsedRow:
    """One typed row. Raises RowError with file, row, field and reason."""
    if row_format is not None:
        return TextRow(render_row(row_format, row.values, row.source), row.source, row.values)
    if row.kind == DOCUMENT and format not in ("text_only", "prompts"):
        raise DataError(
            f"{row.source}: a .txt file is one plain text, but data.format is {format}; use text_only or auto"
        )
    return PARSERS[format](Fields(row))


def to_training(row: ParsedRow) -> TrainingRow:
    """What supervised fine-tuning learns from a row: a text, a dialogue, the chosen side, or the best-ranked answer."""
    match row:
        case TextRow():
            return row
        case DialogueRow():
            return _training_dialogue(row.messages, row.num_context, row)
        case PairRow():
            return answer_row(row, row.chosen)
        case RankedRow():
            return answer_row(row, row.responses[row.ranks.index(min(row.ranks))])
        case LabelledRow():
            raise DataError(
                f"{row.source}: a labelled row has a text and a label; say what to train on:"
                " data.row_format='{text}{label}' for both, data.format=text_only for the text alone"
            )
        case PromptRow():
            raise DataError(
                f"{row.source}: a prompt without an answer cannot be trained on; name the answer's column with"
                " data.columns={response: ...}, or make the text with data.row_format"
            )


def answer_row(row: PairRow | RankedRow, answer: tuple[Message, ...] | str) -> TrainingRow:
    """One answer of a comparison as supervised training has it: raw text, or a dialogue of prompt and answer."""
    if row.prompt is None:
        assert isinstance(answer, str)
        return TextRow(answer, row.source, row.columns)
    messages = (Message("assistant", answer),) if isinstance(answer, str) else answer
    return _training_dialogue(row.prompt + messages, len(row.prompt), row)


def _training_dialogue(messages: tuple[Message, ...], num_context: int, row: ParsedRow) -> DialogueRow:
    """Without what follows the assistant's last word: there is nothing to learn from a question left open."""
    end = max((i + 1 for i, m in enumerate(messages) if m.role == "assistant"), default=0)
    return DialogueRow(messages[:end], row.source, row.columns, min(num_context, end))


def _refine_hh(format: str, values: Mapping[str, Any]) -> str:
    """Text in Anthropic's layout is a dialogue."""
    telling = {"paired": ("chosen", "rejected"), "text_only": ("text",), "prompts": ("prompt",)}.get(format)
    if telling is None:
        return format
    found = [find_column(values, name) for name in telling]
    return "hh" if all(column is not None and looks_like_hh(values[column]) for column in found) else format


def _text_only(fields: Fields) -> ParsedRow:
    return TextRow(fields.text("text"), fields.source, fields.others("text"), fields.row.kind == DOCUMENT)


def _labelled(fields: Fields) -> ParsedRow:
    return LabelledRow(fields.text("text"), fields.label("label"), fields.source, fields.others("text", "label"))


def _prompts(fields: Fields) -> ParsedRow:
    if "prompt" not in fields and "text" in fields:
        return PromptRow((Message("user", fields.text("text")),), fields.source, fields.others("text"))
    return PromptRow(fields.prompt(), fields.source, fields.others("prompt", "system"))


def _text2text(fields: Fields) -> ParsedRow:
    prompt, response = fields.prompt(), fields.answer("response")
    others = fields.others("prompt", "response", "system")
    return DialogueRow(prompt + response, fields.source, others, len(prompt))


def _conversation(fields: Fields) -> ParsedRow:
    messages = fields.system() + fields.messages("messages")
    return DialogueRow(messages, fields.source, fields.others("messages", "system"))


def _paired(fields: Fields) -> ParsedRow:
    others = fields.others("prompt", "chosen", "rejected", "margin", "system")
    margin = fields.number("margin") if "margin" in fields else None
    if "prompt" not in fields and fields.is_text("chosen") and fields.is_text("rejected"):
        return PairRow(None, fields.text("chosen"), fields.text("rejected"), margin, fields.source, others)
    chosen, rejected = fields.answer("chosen"), fields.answer("rejected")
    if (chosen[0].role, rejected[0].role) != ("assistant", "assistant"):  # whole dialogues, which repeat the prompt
        return _pair_of_dialogues(fields, fields.system() + chosen, fields.system() + rejected, margin, others)
    return PairRow(fields.prompt(), chosen, rejected, margin, fields.source, others)


def _pair_of_dialogues(
    fields: Fields,
    chosen: tuple[Message, ...],
    rejected: tuple[Message, ...],
    margin: float | None,
    others: dict[str, Any],
) -> PairRow:
    parts = split_common_prompt(chosen, rejected)
    if parts is None:
        raise RowError(
            fields.source,
            "fields 'chosen' and 'rejected' share no prompt",
            "both must start alike up to an answer of the assistant",
        )
    return PairRow(*parts, margin, fields.source, others)


def _ranked(fields: Fields) -> ParsedRow:
    others = fields.others("prompt", "responses", "ranks", "scores", "system")
    responses, ranks = fields.ranking()
    return RankedRow(fields.prompt(), responses, ranks, fields.source, others)


def _hh(fields: Fields) -> ParsedRow:
    source = fields.source
    if "chosen" in fields or "rejected" in fields:
        others = fields.others("prompt", "chosen", "rejected", "margin")
        margin = fields.number("margin") if "margin" in fields else None
        if "prompt" in fields:
            prompt = _open_dialogue(parse_hh(fields.text("prompt"), source, "prompt"))
            sides = [(Message("assistant", fields.text(name).strip()),) for name in ("chosen", "rejected")]
            return PairRow(prompt, sides[0], sides[1], margin, source, others)
        chosen = parse_hh(fields.text("chosen"), source, "chosen")
        rejected = parse_hh(fields.text("rejected"), source, "rejected")
        return _pair_of_dialogues(fields, chosen, rejected, margin, others)
    if "text" in fields:
        return DialogueRow(parse_hh(fields.text("text"), source, "text"), source, fields.others("text"))
    return PromptRow(_open_dialogue(parse_hh(fields.text("prompt"), source, "prompt")), source, fields.others("prompt"))


def _open_dialogue(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """A prompt often ends with an empty "\\n\\nAssistant:", which the template writes itself."""
    return messages[:-1] if messages[-1] == Message("assistant", "") else messages


PARSERS: dict[str, Callable[[Fields], ParsedRow]] = {
    "text_only": _text_only,
    "labelled": _labelled,
    "prompts": _prompts,
    "text2text": _text2text,
    "conversation": _conversation,
    "paired": _paired,
    "ranked": _ranked,
    "hh": _hh,
}
