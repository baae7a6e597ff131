"""Most memory that this process ever held."""

from __future__ import annotations

from pathlib import Path

import torch


def peak_memory_gb(device: torch.device) -> float:
    """Allocated on this rank's GPU, or resident on CPU (with what its imports take). In GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    # proc(5). Not getrusage: its maximum begins with that of the process which started this one.
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    return int(status.split("VmHWM:")[1].split()[0]) / 2**20
