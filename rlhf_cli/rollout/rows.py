"""The rows that run: drawing their next tokens, finding out which have ended, keeping what was written.

Shapes: R requests, n rows that run, k steps, L the largest limit, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rlhf_cli.ops.sampling import Draw, draw_tokens, row_keys, token_hashes
from rlhf_cli.rollout.decoder import Decoder
from rlhf_cli.rollout.stops import Stops

# Steps between two looks at what has ended, by device. A GPU's program has to wait at each look; a row that has ended
# runs on in vain for half of them on average. A CPU computes in step with the program anyway.
STEPS_PER_LOOK = {"cpu": 1, "cuda": 4}


class Drawing(NamedTuple):
    """How tokens are drawn; before min_new_tokens none that ends a text."""

    draw: Draw
    min_new_tokens: int
    seed: int


class Work(NamedTuple):
    """prompts: R of (P,); limits (R,): longest responses; samples (R,) uint64: what the noise is hashed with."""

    prompts: list[np.ndarray]
    limits: np.ndarray
    samples: np.ndarray


class Rows:
    """Running rows and finished responses.

    token_ids (R, L), lengths (R,), final_states (R,): of the responses, as far as they have ended.
    """

    def __init__(self, decoder: Decoder, stops: Stops, drawing: Drawing, work: Work):
        self.decoder, self.stops, self.drawing, self.work = decoder, stops, drawing, work
        device = decoder.device
        self.table = torch.from_numpy(stops.table).to(device)
        self.hashes = token_hashes(self.table.shape[1], device)
        self.steps_per_look = STEPS_PER_LOOK.get(device.type, 1)
        num_requests = len(work.prompts)
        self.token_ids = np.zeros((num_requests, int(work.limits.max())), np.int32)
        self.lengths, self.final_states = np.zeros((2, num_requests), np.int64)
        self.requests, self.written = np.zeros((2, 0), np.int64)  # (n,) whose row it is, tokens it has
        self.tokens = self.states = torch.zeros(0, dtype=torch.int64, device=device)  # (n,) newest token, stop state

    @property
    def num_rows(self) -> int:
        """n."""
        return len(self.requests)

    def begin(self, requests: list[int]) -> None:
        """New rows for these requests."""
        self.decoder.admit([self.work.prompts[i] for i in requests])
        last = torch.tensor([int(self.work.prompts[i][-1]) for i in requests], device=self.tokens.device)
        self.tokens = torch.cat([self.tokens, last])
        self.states = torch.cat([self.states, torch.zeros_like(last)])
        self.requests = np.concatenate([self.requests, np.array(requests, np.int64)])
        self.written = np.concatenate([self.written, np.zeros(len(requests), np.int64)])

    def advance(self) -> list[int]:
        """Some more tokens for every row; those that have ended leave. Returns their requests."""
        steps = min(self.steps_per_look, int((self.work.limits[self.requests] - self.written).min()))
        tokens, states = self._draw(steps)
        self.token_ids[self.requests[:, None], self.written[:, None] + np.arange(steps)] = tokens.T
        closed = states >= self.stops.num_open  # (k, n), True from the end on
        at_limit = self.written + steps == self.work.limits[self.requests]
        ended = closed[-1] | at_limit
        if not ended.any():
            self.written += steps
            return []
        gone = np.flatnonzero(ended)
        open_steps = (~closed[:, gone]).sum(0)
        requests = self.requests[gone]
        self.lengths[requests] = self.written[gone] + np.minimum(open_steps + 1, steps)
        self.final_states[requests] = states[-1, gone]
        self.written += steps
        self._keep(np.flatnonzero(~ended))
        return requests.tolist()

    def _draw(self, steps: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and stop states (k, n) of the next steps."""
        device = self.tokens.device
        samples, n = self.work.samples[self.requests], self.num_rows
        positions = (self.written + np.arange(steps)[:, None]).ravel()  # step by step
        keys = torch.from_numpy(row_keys(self.drawing.seed, np.tile(samples, steps), positions)).to(device)
        drawn: list[Tensor] = []
        for step, step_keys in enumerate(keys.split(n)):
            logits = self.decoder.step(self.tokens)
            self._ban_ends(logits, step)
            self.tokens = draw_tokens(logits, step_keys, self.hashes, self.drawing.draw)
            self.states = self.table[self.states, self.tokens].long()
            drawn += [self.tokens, self.states]
        host = torch.stack(drawn).cpu().numpy().reshape(steps, 2, n)
        return host[:, 0], host[:, 1]

    def _ban_ends(self, logits: Tensor, step: int) -> None:
        """Take away what would end a row too early: end tokens, and tokens that complete a stop string."""
        early = self.written + step < self.drawing.min_new_tokens
        if early.any():
            ends = self.table[self.states] >= self.stops.num_open  # (n, V)
            logits.masked_fill_(ends & torch.from_numpy(early).to(ends.device)[:, None], float("-inf"))

    def _keep(self, alive: np.ndarray) -> None:
        """Rows that go on; the last ones take the places of those that left, so that little is moved."""
        count = len(alive)
        order = np.arange(count)
        order[np.setdiff1d(order, alive)] = alive[alive >= count]
        self.decoder.keep(order)
        rows = torch.from_numpy(order).to(self.tokens.device)
        self.tokens, self.states = self.tokens[rows], self.states[rows]
        self.requests, self.written = self.requests[order], self.written[order]
