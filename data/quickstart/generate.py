#!/usr/bin/env python3
"""Make the embedded data of the quickstart: short dialogues in Anthropic's HH layout, with a preference to learn.

    python data/quickstart/generate.py      rewrites the .jsonl files beside it; the same bytes every time

What is preferred is not a marker word. A good answer is right, is one whole sentence about what was asked, and has the
tone that suits the asker; worse ones break one of these rules or several, as careless people and tiny models do.
`true_score` is that preference as a function of prompt and response, for measuring what training a reward model and a
policy has really changed. No stage of the pipeline sees it.
"""

from __future__ import annotations

import json
import random
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

SEED = 20260101
HELD_OUT_PROMPTS = 80  # in no other file
# Of the pairs, the last ones, about prompts that sft has not seen; conf/recipe/rm/quickstart.yaml evaluates on them.
HELD_OUT_PERCENT = 15
DEMONSTRATIONS_PER_PROMPT = 3
PAIRS_PER_PROMPT = 3
POOR_DEMONSTRATIONS = 0.5  # so that there is something left for the reward to improve
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight")
COLOURS = {
    "a banana": "yellow", "the grass": "green", "the sky": "blue", "snow": "white", "coal": "black", "a tomato": "red",
    "an orange": "orange", "chocolate": "brown", "an elephant": "grey", "a lemon": "yellow", "a frog": "green",
}  # fmt: skip
SOUNDS = {
    "a dog": "barks", "a cat": "meows", "a cow": "moos", "a sheep": "bleats", "a horse": "neighs", "a duck": "quacks",
    "a lion": "roars", "a bee": "buzzes",
}  # fmt: skip
OPPOSITES = {
    "hot": "cold", "big": "small", "fast": "slow", "old": "young", "happy": "sad", "full": "empty", "light": "dark",
    "high": "low",
}  # fmt: skip
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
# How somebody asks, and the tone of the answer that suits this.
TONES = {
    "": "", "Quick question. ": "",
    "Please tell me: ": "Gladly! ", "Hello! ": "Gladly! ", "Could you help me? ": "Gladly! ",
    "My son asks: ": "For your child: ", "My daughter asks: ": "For your child: ",
}  # fmt: skip
EVASIONS = ("I do not know.", "Why do you ask?", "That is a silly question.", "Ask somebody else.", "Who cares?")


class Question(NamedTuple):
    """text: what is asked; answer: the whole sentence; key: its last word, which makes it right; wrong: other keys."""

    text: str
    answer: str
    key: str
    wrong: tuple[str, ...]


class Faults(NamedTuple):
    """How often (0 to 1) a poor answer evades the question; if it does not, how often its key, its tone and its
    sentence are wrong, and how often a wrong sentence is one word only, or about something else, or else broken."""

    evasive: float
    key: float
    tone: float
    sentence: float
    curt: float
    other: float


# Demonstrations are by people who know, but do not always care; pairs hold what a tiny model makes of that.
CARELESS = Faults(evasive=0.1, key=0.06, tone=0.5, sentence=0.3, curt=0.9, other=0.1)
CLUMSY = Faults(evasive=0.06, key=0.15, tone=0.35, sentence=0.4, curt=0.3, other=0.3)
GOOD_CHOSEN = 0.7  # of the pairs have a good answer on the better side
SAME_BUT_WRONG = 0.4  # of the pairs differ in the key alone, which is the hardest to learn


@cache
def questions() -> tuple[Question, ...]:
    """Every question of this small world, in a fixed order."""
    found: list[Question] = []
    for a in range(1, 5):
        for b in range(1, 5):
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
        others = tuple(sorted({w for pair in pairs for w in pair} - {opposite}))
        for text in (f"What is the opposite of {word}?", f"Which word means not {word}?"):
            found.append(Question(text, f"The opposite of {word} is {opposite}.", opposite, others))
    for i, day in enumerate(DAYS):
        after = DAYS[(i + 1) % 7]
        others = tuple(d for d in DAYS if d != after)
        for text in (f"Which day comes after {day}?", f"What day follows {day}?"):
            found.append(Question(text, f"After {day} comes {after}.", after, others))
    return tuple(found)


def good_response(question: Question, opener: str) -> str:
    """The preferred answer: right, whole, in the tone that suits the asker."""
    return TONES[opener] + question.answer


def poor_response(question: Question, opener: str, faults: Faults, draw: random.Random) -> str:
    """An answer with at least one fault."""
    if draw.random() < faults.evasive:
        return draw.choice(EVASIONS)
    while True:
        tone, answer = TONES[opener], question.answer
        if draw.random() < faults.tone:
            tone = draw.choice(sorted(set(TONES.values()) - {tone}))
        if draw.random() < faults.sentence:
            answer = poor_sentence(question, faults, draw)
        if draw.random() < faults.key:
            answer = with_wrong_key(answer, question, draw)
        if tone + answer != good_response(question, opener):
            return tone + answer


def poor_sentence(question: Question, faults: Faults, draw: random.Random) -> str:
    """Not the whole sentence, or another one."""
    kind = draw.random()
    if kind < faults.curt:
        return f"{question.key.capitalize()}."
    if kind < faults.curt + faults.other:
        return draw.choice([q.answer for q in questions() if q.key in question.wrong])
    return broken(question.answer, draw)


def with_wrong_key(answer: str, question: Question, draw: random.Random) -> str:
    """The answer with another key in place of the right one, where it ends on that."""
    wrong, end = draw.choice(question.wrong), f"{question.key}."
    if answer == end.capitalize():
        return f"{wrong.capitalize()}."
    return f"{answer.removesuffix(end)}{wrong}." if answer.endswith(end) else answer


def broken(sentence: str, draw: random.Random) -> str:
    """The sentence with a word lost, doubled, misspelt or from elsewhere, without its end, or with that of another."""
    words, other = sentence.split(" "), draw.choice(questions()).answer.split(" ")
    i = draw.choice([n for n, word in enumerate(words) if len(word) > 1])
    kind = draw.choice(("lose", "double", "misspell", "replace", "replace", "end", "jump"))
    if kind == "lose":
        return " ".join(words[:i] + words[i + 1 :])
    if kind == "double":
        return " ".join(words[: i + 1] + words[i:])
    if kind == "end":
        return " ".join(words[: max(1, i)])
    if kind == "jump":
        return " ".join(words[: i + 1] + other[-draw.randint(1, len(other)) :])
    if kind == "replace":
        return " ".join([*words[:i], draw.choice(other), *words[i + 1 :]])
    letter = draw.randrange(len(words[i]))
    return " ".join([*words[:i], words[i][:letter] + words[i][letter + 1 :], *words[i + 1 :]])


def true_score(prompt: str, response: str) -> float:
    """The preference itself, from 0 to 1: half for ending on the right word, a quarter each for sentence and tone;
    of a wrong answer neither counts.

    prompt, response: as in the files; text after the end of the first answer counts against it.
    """
    asked = next((q for q in questions() if q.text in prompt), None)
    if asked is None:
        raise ValueError(f"no question of this world in {prompt!r}")
    wanted = next(tone for opener, tone in reversed(TONES.items()) if opener in prompt)
    body = response.strip()
    tone = next(tone for tone in sorted(TONES.values(), key=len, reverse=True) if body.startswith(tone))
    answer = body.removeprefix(tone)
    if re.findall(r"[a-z]+", answer.lower())[-1:] != [asked.key.lower()]:
        return 0.0
    return 0.5 + 0.25 * (answer == asked.answer) + 0.25 * (tone == wanted)


def dialogue(question: Question, opener: str, response: str) -> str:
    """Anthropic's raw layout."""
    return f"\n\nHuman: {opener}{question.text}\n\nAssistant: {response}"


def make_pair(question: Question, opener: str, draw: random.Random) -> dict[str, str]:
    """Two answers, the better one first: mostly a good one, or two poor ones of which one is less so."""
    while True:
        good = draw.random() < GOOD_CHOSEN
        first = good_response(question, opener) if good else poor_response(question, opener, CLUMSY, draw)
        if draw.random() < SAME_BUT_WRONG:
            texts = [first, with_wrong_key(first, question, draw)]
        else:
            texts = [first, poor_response(question, opener, CLUMSY, draw)]
        rows = [dialogue(question, opener, text) for text in texts]
        scores = [true_score(row, text) for row, text in zip(rows, texts, strict=True)]
        if scores[0] != scores[1]:
            better = int(scores[1] > scores[0])
            return {"chosen": rows[better], "rejected": rows[1 - better]}


def generate() -> dict[str, list[dict[str, str]]]:
    """The files: sft (imperfect answers, as people write them), pairs (about the prompts of sft, then about others),
    the prompts of all pairs (those that sft lacks come last here, too), and prompts that no other file holds."""
    draw = random.Random(SEED)
    asked = [(question, opener) for question in questions() for opener in TONES]
    draw.shuffle(asked)
    held_out, rest = asked[:HELD_OUT_PROMPTS], asked[HELD_OUT_PROMPTS:]
    shown = rest[: -(len(rest) * HELD_OUT_PERCENT // 100)]
    sft = []
    for question, opener in shown * DEMONSTRATIONS_PER_PROMPT:
        poor = draw.random() < POOR_DEMONSTRATIONS
        response = poor_response(question, opener, CARELESS, draw) if poor else good_response(question, opener)
        sft.append({"text": dialogue(question, opener, response)})
    pairs = [make_pair(question, opener, draw) for question, opener in rest for _ in range(PAIRS_PER_PROMPT)]
    train = pairs[: len(shown) * PAIRS_PER_PROMPT]
    draw.shuffle(train)
    pairs[: len(train)] = train
    prompts = [{"prompt": opener + question.text} for question, opener in rest]
    held = [{"prompt": opener + question.text} for question, opener in held_out]
    return {"sft": sft, "pairs": pairs, "prompts": prompts, "prompts_held_out": held}


def main() -> None:
    for name, rows in generate().items():
        path = Path(__file__).parent / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        print(f"{path.name}: {len(rows)} rows, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
