"""Keys and values of a running batch, in place: rows come, grow by one column together, and leave.

All rows end at the same column, as if their prompts were padded on the left, so that whatever a model derives from
columns (sliding windows, alibi) is right for each. Attention sees a view from the first column that any row uses to the
last. Rows 0..num_rows-1 are alive; one that leaves is replaced by the last, so that little is copied.

Shapes: R rows that there is room for, n rows alive, m prompts read together, K key/value heads, C columns, P prompt
tokens, D width of a head.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer


class Arrival(NamedTuple):
    """A new row and what it goes on from: `length` tokens of prompt `source` in the batch that is read."""

    row: int
    source: int
    length: int


class Window:
    """Which rows and columns are in use; all layers share it.

    first, end: columns first..end-1 hold tokens of some row. While `arrivals` is set, the model reads prompts.
    """

    def __init__(self, num_rows: int, num_columns: int):
        self.room, self.num_columns = num_rows, num_columns
        self.num_rows = self.first = self.end = 0
        self.arrivals: list[Arrival] | None = None


class InPlaceLayer(DynamicLayer):
    """One layer's keys and values (R, K, C, D), allocated when their shape is first seen."""

    def __init__(self, window: Window):
        super().__init__()
        self.window = window

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Room for all rows; zeros, because what is masked is still multiplied, and NaN would get through."""
        size = self.window.room, key_states.shape[1], self.window.num_columns
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = key_states.new_zeros(*size, key_states.shape[3])
        self.values = value_states.new_zeros(*size, value_states.shape[3])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take in (m, K, P, D) of prompts, or (n, K, 1, D) of a new column; returns what attention may see."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        window = self.window
        if window.arrivals is not None:
            self._place(self.keys, key_states, window.arrivals)
            self._place(self.values, value_states, window.arrivals)
            return key_states, value_states
        rows, first, end = window.num_rows, window.first, window.end
        self.keys[:rows, :, end] = key_states[:, :, 0]
        self.values[:rows, :, end] = value_states[:, :, 0]
        return self.keys[:rows, :, first : end + 1], self.values[:rows, :, first : end + 1]

    def get_seq_length(self) -> int:
        """Columns that attention sees beside the new ones."""
        return 0 if self.window.arrivals is not None else self.window.end - self.window.first

    def move_rows(self, moves: list[tuple[int, int]]) -> None:
        """Overwrite rows: (to, source) each. One by one: they are few, and indexing with tensors takes five times as
        long."""
        for buffer in (self.keys, self.values):
            used = buffer[:, :, self.window.first : self.window.end]
            for to, source in moves:
                used[to].copy_(used[source])

    def move_columns(self, by: int) -> None:
        """Shift the used columns."""
        window = self.window
        for buffer in (self.keys, self.values):
            used = buffer[: window.num_rows, :, window.first : window.end].clone()
            buffer[: window.num_rows, :, window.first + by : window.end + by] = used

    def _place(self, buffer: Tensor, states: Tensor, arrivals: list[Arrival]) -> None:
        """Copy states (m, K, P, D), padded behind, to the new rows, so that they end at the window's end."""
        end = self.window.end
        for row, source, length in arrivals:
            buffer[row, :, end - length : end] = states[source, :, :length]


class InPlaceCache(Cache):
    """Layers that share a window."""

    def __init__(self, num_layers: int, num_rows: int, num_columns: int):
        self.window = Window(num_rows, num_columns)
        super().__init__(layers=[InPlaceLayer(self.window) for _ in range(num_layers)])

    def move_rows(self, moves: list[tuple[int, int]]) -> None:
        """Overwrite rows, (to, source) each, in all layers."""
        for layer in self.layers:
            if layer.is_initialized:
                layer.move_rows(moves)

    def align(self, end: int) -> None:
        """Shift what is used so that it ends at column `end`."""
        by = end - self.window.end
        if by and self.window.num_rows:
            for layer in self.layers:
                if layer.is_initialized:
                    layer.move_columns(by)
        self.window.first += by
        self.window.end = end
