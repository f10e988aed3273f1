"""Where a run runs: what its bytes may depend on, and how to make them depend on nothing else."""
from __future__ import annotations

import os
import platform

import torch


def be_deterministic() -> None:
    """Same seed, machine and number of threads, same bytes: torch refuses kernels that may differ, cuBLAS takes a fixed workspace."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # read when the first CUDA context is made
    torch.use_deterministic_algorithms(True)


def hardware(device: str) -> dict:
    """device: cpu or cuda."""
    gpu = torch.cuda.get_device_name() if device == "cuda" else None
    return {"gpu": gpu, "machine": platform.machine(), "cpus": os.cpu_count(), "threads": torch.get_num_threads(),
            "deterministic": torch.are_deterministic_algorithms_enabled()}
