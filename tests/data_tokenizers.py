"""Tiny tokenizers for the data tests, each of a kind that real models have."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SENTENCES = [
    "###Human: What is a floor?###Assistant: It is the lower side of a room.",
    "How do I make a floor slippery? I found something that would work.\n\n",
    "Below is an instruction that describes a task.\n\n### Instruction:\nSay it.\n\n### Response:\nIt is so.",
]


def byte_bpe(vocab_size: int = 340) -> PreTrainedTokenizerFast:
    """Like GPT-2's: byte-level, adds no special tokens itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|end|>", "<|pad|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>")


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """Like Llama 2's: a blank in front of every text, no pre-tokenizer, and BOS added by the tokenizer itself."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(
        vocab_size=120,
        special_tokens=["<unk>", "<s>", "</s>", "<pad>"],
        initial_alphabet=[chr(c) for c in range(33, 127)] + ["▁", "\n"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(["a b c d e f g h", "a floor of a room"], trainer)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )
