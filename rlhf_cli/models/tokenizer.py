"""Tokenizers: loading one, training one on the data, and the special tokens that training needs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rlhf_cli.errors import ModelError
from rlhf_cli.models.source import check_source, explain_load_error

PAD, EOS, UNK = "<|pad|>", "<|endoftext|>", "<unk>"
# Names that transformers' tokenizers, and those that come with code of their own, are kept under.
TOKENIZER_FILES = ("*token*", "*vocab*", "*.model", "*.tiktoken")
SPECIAL_TOKENS = [PAD, EOS, UNK]

# A word with its inner apostrophes (don't), one white-space character, or one other character: nothing is left out,
# so the tokens put together are the text.
WORD_OR_CHARACTER = Regex(r"\w+(?:['’]\w+)*|\s|[^\w\s]")
ANY_CHARACTER = Regex(r"[\s\S]")


def train_tokenizer(
    kind: Literal["bpe", "word", "char"], texts: Iterable[str], vocab_size: int
) -> PreTrainedTokenizerFast:
    """Learn a vocabulary of at most `vocab_size` tokens, the special ones included.

    bpe: byte-level, every text comes back exactly. word: words, single white-space and other characters; a text of
    known words comes back exactly, an unknown word is <unk>. char: likewise with characters.
    Raises ModelError when the vocabulary cannot be made.
    """
    if kind == "bpe":
        tokenizer = _train_bpe(texts, vocab_size)
    else:
        tokenizer = Tokenizer(models.WordLevel(unk_token=UNK))
        split = WORD_OR_CHARACTER if kind == "word" else ANY_CHARACTER
        tokenizer.pre_tokenizer = pre_tokenizers.Split(split, "isolated")
        tokenizer.decoder = decoders.Fuse()
        trainer = trainers.WordLevelTrainer(vocab_size=vocab_size, special_tokens=SPECIAL_TOKENS, show_progress=False)
        tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() == len(SPECIAL_TOKENS):
        raise ModelError(f"model.tokenizer.train={kind}: the data holds no text to learn a vocabulary from")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNK,
        clean_up_tokenization_spaces=False,
        padding_side="right",
    )


def _train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    smallest = len(alphabet) + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise ModelError(
            f"model.tokenizer.vocab_size: got {vocab_size}; byte-level bpe needs at least {smallest}"
            f" ({len(alphabet)} bytes and {len(SPECIAL_TOKENS)} special tokens); or use model.tokenizer.train=char"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIAL_TOKENS, initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def load_tokenizer(
    path: Path | str, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of a local directory or hub id. Raises ModelError with what to do when there is none."""
    check_source(path, "model.tokenizer.path")
    local = Path(path).expanduser()
    if local.is_dir() and not any(f for pattern in TOKENIZER_FILES for f in local.glob(pattern)):
        raise ModelError(f"{path}: holds no tokenizer files (tokenizer.json); set model.tokenizer.path to a tokenizer")
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(path), revision=revision, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise explain_load_error(error, path, "tokenizer") from error
    if len(tokenizer) == 0:
        raise ModelError(f"{path}: holds no tokenizer files (tokenizer.json); set model.tokenizer.path to a tokenizer")
    return tokenizer


def ensure_pad(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Give the tokenizer a pad token that is not its eos token. Returns whether a new token was added."""
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"{tokenizer.name_or_path or 'the tokenizer'}: has no eos token, so no text could end;"
            " set eos_token in its tokenizer_config.json"
        )
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.eos_token_id:
        return False
    before = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": PAD})
    return len(tokenizer) > before


def add_extra_tokens(tokenizer: PreTrainedTokenizerBase, extra_tokens: list[str]) -> int:
    """Add tokens such as runs of white-space for code; returns how many are new.

    Raises ModelError when one does not come back from encoding and decoding.
    """
    added = tokenizer.add_tokens(
        [AddedToken(t, normalized=False, lstrip=False, rstrip=False, single_word=False) for t in extra_tokens if t]
    )
    for token in extra_tokens:
        # Between letters, as it will stand; a tokenizer of words or characters may not know the letters themselves.
        text = f"a{token}b"
        ids = tokenizer(text, add_special_tokens=False).input_ids
        own = tokenizer.convert_tokens_to_ids(token)
        back = tokenizer.decode([own], clean_up_tokenization_spaces=False)
        if own not in ids or back != token:
            raise ModelError(
                f"model.tokenizer.extra_tokens: {token!r} does not survive this tokenizer:"
                f" {text!r} is encoded as {tokenizer.convert_ids_to_tokens(ids)}, and the token comes back as {back!r};"
                " remove it"
            )
    return int(added)


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hex digest that is equal when two tokenizers turn every text into the same ids with the same special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        core = {"class": type(tokenizer).__name__, "vocab": tokenizer.get_vocab()}
    else:
        # Padding and truncation are left behind by the last call that used them; not part of what the tokenizer is.
        core = {k: v for k, v in json.loads(backend.to_str()).items() if k not in ("padding", "truncation")}
    special = sorted((k, str(v)) for k, v in tokenizer.special_tokens_map.items())
    return hashlib.sha256(json.dumps([core, special], sort_keys=True).encode()).hexdigest()
