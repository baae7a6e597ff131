"""The responses of an iteration and all that PPO knows of them.

Shapes: R responses, T tokens of the longest response.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor


@dataclass
class Experience:
    """What an iteration learns from: the same on every rank, tensors in fp32 on the CPU.

    prompts[i] (P_i,), responses[i] (T_i,) token ids, ends included. keep_mask (R, T) bool: response tokens that are
    learnt from; what the other tensors hold elsewhere never matters. logprobs, ref_logprobs (R, T): of the policy that
    answered and of the reference. values (R, T): before each token, None without a critic. scores (R,): of whole
    responses. groups (R,) int64: responses of the same number answer the same prompt.
    """

    prompts: list[np.ndarray]
    responses: list[np.ndarray]
    keep_mask: Tensor
    logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor | None
    scores: Tensor
    groups: Tensor

    def __len__(self) -> int:
        return len(self.responses)
