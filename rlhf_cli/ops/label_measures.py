"""From a classifier's logits to one number per text."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Measure = Literal["log_prob", "probability", "margin"]
MEASURES: tuple[Measure, ...] = ("log_prob", "probability", "margin")


def measured(logits: Tensor, label: int, measure: Measure, *, multi_label: bool = False) -> Tensor:
    """What of label number `label` is the reward: (N, C) logits -> (N,) float32 (float64 of float64).

    log_prob, probability: over all labels (softmax), or of this label alone (sigmoid) when a text may have several
    (multi_label). margin: its logit minus the best other one.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if measure == "margin":
        others = logits.clone()
        others[:, label] = -torch.inf
        return logits[:, label] - others.max(-1).values
    if multi_label:
        log_prob = F.logsigmoid(logits[:, label])
    else:
        log_prob = F.log_softmax(logits, -1)[:, label]
    return log_prob if measure == "log_prob" else log_prob.exp()
