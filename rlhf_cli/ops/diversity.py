"""How varied texts are: measures over a corpus of samples.

A sample is a list of tokens, each a str or an int (anything that can be hashed). An n-gram is n consecutive tokens of
one sample; none crosses from a sample to the next. Measures of nothing are 0.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Sequence
from itertools import chain

import numpy as np

Sample = Sequence[Hashable]

SEPARATORS: frozenset[Hashable] = frozenset(("\n", " ", ",", "."))
"""Tokens that structure a text; a policy that chases single words of a reward model drops them."""


def distinct_n(samples: Iterable[Sample], n: int) -> float:
    """Different n-grams / all n-grams (Li et al., arXiv 1510.03055)."""
    counts = _ngrams(samples, n)
    return len(counts) / max(1, counts.total())


def expectation_adjusted_distinct(samples: Iterable[Sample], n: int, vocab_size: int) -> float:
    """Different n-grams / the expected number of different ones among as many uniform draws from vocab_size^n.

    So it does not fall with the length of the texts, as distinct_n does (Liu et al., arXiv 2202.13587, eq. 2, where
    n = 1). 1 for uniformly random tokens.
    """
    counts = _ngrams(samples, n)
    draws, possible = counts.total(), float(vocab_size) ** n
    if draws == 0:
        return 0.0
    # possible · (1 − (1 − 1/possible)^draws), which loses all digits as it stands when there are many possible ones
    expected = 1.0 if possible == 1 else possible * -math.expm1(draws * math.log1p(-1 / possible))
    return len(counts) / expected


def unique_n(samples: Iterable[Sample], n: int) -> int:
    """Number of n-grams that occur exactly once in the corpus."""
    return sum(count == 1 for count in _ngrams(samples, n).values())


def ngram_entropy(samples: Iterable[Sample], n: int) -> float:
    """Entropy of the corpus' n-gram frequencies, in bits."""
    counts = np.fromiter(_ngrams(samples, n).values(), np.float64)
    shares = counts / counts.sum()
    return float((shares * np.log2(1 / shares)).sum())


def msttr(samples: Iterable[Sample], window: int = 100) -> float:
    """Mean share of different tokens in consecutive windows of the samples put one after the other.

    Mean segmental type-token ratio (Johnson 1944). The rest after the last full window is left out; a corpus of less
    than one window is its own, and then its figure cannot be compared with others.
    """
    tokens = list(chain.from_iterable(samples))
    window = max(1, min(window, len(tokens)))
    starts = range(0, len(tokens) - window + 1, window)
    return sum(len(set(tokens[s : s + window])) for s in starts) / (window * max(1, len(starts)))


def separator_ratio(samples: Iterable[Sample], separators: Collection[Hashable] = SEPARATORS) -> float:
    """Share of the tokens that are separators. Of token ids, give the ids that decode to one."""
    counts = _ngrams(samples, 1)
    return sum(counts[(token,)] for token in set(separators)) / max(1, counts.total())


def repetition(samples: Iterable[Sample], n: int = 4) -> float:
    """Share of the n-grams of a sample that stood in it before, averaged over the samples that have n tokens.

    seq-rep-n of Welleck et al. (arXiv 1908.04319, section 6.1), with their n.
    """
    counts = [_ngrams([sample], n) for sample in samples if len(sample) >= n]
    return sum(1 - len(c) / c.total() for c in counts) / max(1, len(counts))


def self_bleu(groups: Iterable[Sequence[Sample]], max_n: int = 4) -> float:
    """Mean BLEU of each sample against the others of its group (the answers to one prompt); high = all alike.

    Zhu et al., arXiv 1802.01886, there over the whole corpus. Groups of one sample are left out. BLEU of one sentence,
    with one added to counts of n-grams from n = 2 on, so that short texts have a score (Lin & Och 2004).
    """
    scores = [
        _sentence_bleu(sample, [*group[:i], *group[i + 1 :]], max_n)
        for group in groups
        if len(group) > 1
        for i, sample in enumerate(group)
    ]
    return sum(scores) / max(1, len(scores))


def _sentence_bleu(sample: Sample, references: Sequence[Sample], max_n: int) -> float:
    """BLEU (Papineni et al. 2002): the brevity penalty looks at the reference nearest in length, the shorter of two."""
    if not sample:
        return 0.0
    log_precision = 0.0
    for n in range(1, max_n + 1):
        counts, allowed = _ngrams([sample], n), Counter[tuple[Hashable, ...]]()
        for reference in references:
            allowed |= _ngrams([reference], n)
        matches, total, extra = (counts & allowed).total(), counts.total(), int(n > 1)
        if matches + extra == 0:
            return 0.0
        log_precision += math.log((matches + extra) / (total + extra)) / max_n
    nearest = min((len(r) for r in references), key=lambda length: (abs(length - len(sample)), length))
    return math.exp(log_precision + min(0.0, 1 - nearest / len(sample)))


def _ngrams(samples: Iterable[Sample], n: int) -> Counter[tuple[Hashable, ...]]:
    """n-gram -> how often it occurs."""
    assert n >= 1, n
    counts: Counter[tuple[Hashable, ...]] = Counter()
    for sample in samples:
        counts.update(zip(*(sample[i:] for i in range(n)), strict=False))
    return counts
