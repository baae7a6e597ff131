#!/usr/bin/env python3
"""Make the embedded data of the quickstart: short dialogues in Anthropic's HH layout, with a preference to learn.

    python data/quickstart/generate.py      rewrites the .jsonl files beside it; the same bytes every time

What is preferred is not a marker word. A good answer is right, is a whole sentence about what was asked, and keeps the
tone of the asker; the bad side of a pair breaks one of these. `true_score` is that preference as a function of prompt
and response, for measuring what training a reward model and a policy has really changed.
"""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import NamedTuple

SEED = 20260101
HELD_OUT_PROMPTS = 120
HELD_OUT_PAIRS = 162  # the last 15 % of the pairs, which conf/recipe/rm/quickstart.yaml evaluates on
NUMBERS = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen",
]  # fmt: skip
COLOURS = {
    "a banana": "yellow", "the grass": "green", "the sky": "blue", "snow": "white", "coal": "black", "a tomato": "red",
    "an orange": "orange", "a plum": "purple", "chocolate": "brown", "an elephant": "grey", "a lemon": "yellow",
    "a frog": "green", "the sea": "blue", "milk": "white", "a cherry": "red", "a carrot": "orange", "a bear": "brown",
}  # fmt: skip
SOUNDS = {
    "a dog": "barks", "a cat": "meows", "a cow": "moos", "a sheep": "bleats", "a horse": "neighs", "a pig": "grunts",
    "a duck": "quacks", "a lion": "roars", "an owl": "hoots", "a bee": "buzzes", "a wolf": "howls", "a snake": "hisses",
}  # fmt: skip
OPPOSITES = {
    "hot": "cold", "big": "small", "fast": "slow", "old": "young", "happy": "sad", "full": "empty", "hard": "soft",
    "light": "dark", "high": "low", "early": "late", "open": "closed", "clean": "dirty", "loud": "quiet",
    "rich": "poor",
}  # fmt: skip
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
OPENERS = ("", "", "Please tell me: ", "Quick question. ", "My son asks: ", "Hello! ", "I wonder, ")
POLITE = ("Please tell me: ", "Hello! ")
EVASIONS = ("I do not know.", "Why do you ask?", "That is a silly question.", "Ask somebody else.", "Who cares?")


class Question(NamedTuple):
    """text: what is asked; answer: the whole sentence; key: the word that makes it right; wrong: other keys."""

    text: str
    answer: str
    key: str
    wrong: tuple[str, ...]


def questions() -> list[Question]:
    """Every question of this small world, in a fixed order."""
    found = []
    for a in range(9):
        for b in range(8):
            key = NUMBERS[a + b]
            others = tuple(n for n in NUMBERS if n != key)
            answer = f"{NUMBERS[a].capitalize()} plus {NUMBERS[b]} is {key}."
            found.append(Question(f"What is {NUMBERS[a]} plus {NUMBERS[b]}?", answer, key, others))
    for thing, colour in COLOURS.items():
        others = tuple(sorted(set(COLOURS.values()) - {colour}))
        for text in (f"What colour is {thing}?", f"Which colour does {thing} have?"):
            found.append(Question(text, f"The colour of {thing} is {colour}.", colour, others))
    for animal, sound in SOUNDS.items():
        others = tuple(sorted(set(SOUNDS.values()) - {sound}))
        for text in (f"What does {animal} do?", f"Which sound does {animal} make?"):
            found.append(Question(text, f"{animal.capitalize()} {sound}.", sound, others))
    pairs = list(OPPOSITES.items()) + [(b, a) for a, b in OPPOSITES.items()]
    for word, opposite in pairs:
        others = tuple(sorted({w for pair in pairs for w in pair} - {word, opposite}))
        for text in (f"What is the opposite of {word}?", f"Which word means not {word}?"):
            found.append(Question(text, f"The opposite of {word} is {opposite}.", opposite, others))
    for i, day in enumerate(DAYS):
        after = DAYS[(i + 1) % 7]
        others = tuple(d for d in DAYS if d != after)
        for text in (f"Which day comes after {day}?", f"What day follows {day}?"):
            found.append(Question(text, f"After {day} comes {after}.", after, others))
    return found


def good_response(question: Question, opener: str) -> str:
    """The preferred answer: right, whole, and friendly to a friendly asker."""
    return f"Gladly! {question.answer}" if opener in POLITE else question.answer


def bad_response(question: Question, opener: str, draw: random.Random) -> str:
    """An answer that breaks one of the rules."""
    kind = draw.choice(("wrong", "wrong", "wrong", "evasive", "curt", "unfriendly"))
    good = good_response(question, opener)
    if kind == "wrong":
        return good.replace(f"{question.key}.", f"{draw.choice(question.wrong)}.")
    if kind == "evasive":
        return draw.choice(EVASIONS)
    if kind == "unfriendly" and opener in POLITE:
        return question.answer
    return f"{question.key.capitalize()}."


def true_score(prompt: str, response: str) -> float:
    """The preference itself, from 0 to 1: half for the right key, a quarter each for the sentence and the tone.

    prompt, response: as in the files; text after the end of the first answer counts against the sentence.
    """
    asked = next((q for q in questions() if q.text in prompt), None)
    if asked is None:
        raise ValueError(f"no question of this world in {prompt!r}")
    polite = any(opener in prompt for opener in POLITE)
    body = response.strip()
    friendly = body.startswith("Gladly! ")
    words = set(re.findall(r"[A-Za-z]+", body.removeprefix("Gladly! ").replace(asked.text, "")))
    right = asked.key in words and not words & set(asked.wrong) - set(re.findall(r"[A-Za-z]+", asked.answer))
    whole = body.removeprefix("Gladly! ") == asked.answer
    return 0.5 * right + 0.25 * whole + 0.25 * (friendly == polite and right)


def dialogue(question: Question, opener: str, response: str) -> str:
    """Anthropic's raw layout."""
    return f"\n\nHuman: {opener}{question.text}\n\nAssistant: {response}"


def generate() -> dict[str, list[dict[str, str]]]:
    """The files: sft (imperfect answers, as people write them), pairs, of which sft has not seen the last ones, and
    prompts that neither of them holds."""
    draw = random.Random(SEED)
    asked = [(q, o) for q in questions() for o in sorted(set(OPENERS))]
    draw.shuffle(asked)
    held_out, rest = asked[:HELD_OUT_PROMPTS], asked[HELD_OUT_PROMPTS:]
    sft = []
    for question, opener in rest[:-HELD_OUT_PAIRS]:
        # A third of the demonstrations are poor, so that there is something left for the reward to improve.
        bad = draw.random() < 0.33
        response = bad_response(question, opener, draw) if bad else good_response(question, opener)
        sft.append({"text": dialogue(question, opener, response)})
    pairs = []
    for question, opener in rest:
        chosen, rejected = good_response(question, opener), bad_response(question, opener, draw)
        pairs.append({"chosen": dialogue(question, opener, chosen), "rejected": dialogue(question, opener, rejected)})
    shown = pairs[:-HELD_OUT_PAIRS]
    draw.shuffle(shown)
    pairs[:-HELD_OUT_PAIRS] = shown
    prompts = [{"prompt": f"{o}{q.text}"} for q, o in rest]
    held = [{"prompt": f"{o}{q.text}"} for q, o in held_out]
    return {"sft": sft, "pairs": pairs, "prompts": prompts, "prompts_held_out": held}


def main() -> None:
    for name, rows in generate().items():
        path = Path(__file__).parent / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        print(f"{path.name}: {len(rows)} rows, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
