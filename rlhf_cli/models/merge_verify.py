"""Base + adapter through PEFT against the merged model: the same inputs, one model after the other, in fp32."""

from __future__ import annotations

import copy
import gc
import math
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_cli.models.adapter import Adapter
from rlhf_cli.models.load import auto_class, grow_embeddings
from rlhf_cli.models.merge_base import Base
from rlhf_cli.models.merge_plan import MergePlan

LENGTHS = (24, 17, 11, 7, 3, 1)
NEWEST = 4  # of the tokens, the last rows of the embeddings, where added ones are
# Relative to the largest logit. Merging adds in another order, which moves the last of fp32's 24 bits; a weight rounded
# to bf16's 8 bits moves logits by about a percent. Another order of magnitude is a mistake.
LARGEST_DIFFERENCE = {torch.float32: 1e-3, torch.float64: 1e-3}
LARGEST_DIFFERENCE_ROUNDED = 0.1
MODELS_IN_MEMORY = 2.5  # one model, what loading it takes, and room to spare


class Verification(NamedTuple):
    """max_abs_difference: of logits or scores; max_logit: the largest of base + adapter; inputs: sequences compared."""

    max_abs_difference: float
    max_logit: float
    inputs: int
    seconds: float

    def is_rounding(self, dtype: torch.dtype) -> bool:
        """Whether merged weights of this dtype explain the difference."""
        allowed = LARGEST_DIFFERENCE.get(dtype, LARGEST_DIFFERENCE_ROUNDED) * self.max_logit
        return self.max_abs_difference <= allowed  # also False for NaN


def memory_needed(plan: MergePlan) -> int:
    """Bytes that a comparison takes."""
    return int(MODELS_IN_MEMORY * 4 * sum(torch.Size(t.shape).numel() for t in plan.targets))


def available_memory(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that can be had without swapping (proc(5), MemAvailable), and without being killed by the limit of a
    container or a batch job (cgroup v2)."""
    lines = (proc / "meminfo").read_text(encoding="ascii").splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    membership = proc / "self" / "cgroup"
    groups = membership.read_text().splitlines() if membership.is_file() else []
    own = next((cgroups / line[3:].strip("/") for line in groups if line.startswith("0::")), cgroups)
    return int(min([free, *(_room(place) for place in (own, *own.parents) if place.is_relative_to(cgroups))]))


def _room(group: Path) -> float:
    """Bytes below a control group's limit; what it holds of files read or written once does not count."""
    limit = group / "memory.max"
    if not limit.is_file() or limit.read_text().strip() == "max":
        return math.inf
    held = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    return int(limit.read_text()) - int((group / "memory.current").read_text()) + int(held["inactive_file"])


def verify(
    plan: MergePlan, adapter: Adapter, base: Base, merged: Path, seed: int = 0, trust_remote_code: bool = False
) -> Verification:
    """Compare a merged model on disk with what it was made of. merged: its directory."""
    started = time.monotonic()
    rows = random_inputs(plan, seed)
    wanted = _logits(_base_with_adapter(plan, adapter, base, trust_remote_code), rows)
    gc.collect()  # the first model goes before the second one comes
    found = _logits(_load(plan.config, merged, trust_remote_code), rows)
    difference = float((wanted - found).abs().max())
    return Verification(difference, float(wanted.abs().max()), len(rows), round(time.monotonic() - started, 3))


def random_inputs(plan: MergePlan, seed: int) -> list[Tensor]:
    """Ragged rows of token ids (T,), the newest tokens among them; not the pad token, where a classifier would see the
    end of the text."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(plan.rows, (length,), generator=generator) for length in LENGTHS]
    newest = torch.arange(max(0, plan.rows - NEWEST), plan.rows)
    rows[0][: len(newest)] = newest
    pad = plan.config.get_text_config().pad_token_id
    return rows if pad is None else [torch.where(row == pad, (pad + 1) % plan.rows, row) for row in rows]


@torch.no_grad()
def _logits(model: Any, rows: list[Tensor]) -> Tensor:
    """Logits (all positions, V) or scores (rows, C). One row at a time: nothing here depends on padding."""
    model.eval()
    outputs = [model(input_ids=row[None], use_cache=False).logits[0].float() for row in rows]
    return torch.cat([output.reshape(-1, output.shape[-1]) for output in outputs])


def _base_with_adapter(plan: MergePlan, adapter: Adapter, base: Base, trust_remote_code: bool) -> Any:
    config = copy.deepcopy(base.config)
    if plan.task == "sequence_classification":
        config.num_labels, config.architectures = plan.config.num_labels, plan.config.architectures
        config.get_text_config().pad_token_id = plan.config.get_text_config().pad_token_id
    model = _load(config, base.directory, trust_remote_code)
    if plan.rows > plan.base_rows:
        grow_embeddings(model, plan.rows)
    elif plan.rows < plan.base_rows:  # the adapter brings all rows
        model.resize_token_embeddings(plan.rows)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about tied embeddings, which the plan has looked at
        return PeftModel.from_pretrained(model, str(adapter.folder))


def _load(config: Any, directory: Path, trust_remote_code: bool) -> PreTrainedModel:
    model: PreTrainedModel = auto_class(config).from_pretrained(
        str(directory), config=config, dtype=torch.float32, trust_remote_code=trust_remote_code, use_safetensors=True
    )
    return model
