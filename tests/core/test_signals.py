"""Signals reach loading processes too, at any moment of theirs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from neco_bench.core.signals import leave_signals_to_the_parent, start_loading


def signalled_before_and_after(worker: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(os.getpid(), number)
    leave_signals_to_the_parent(worker)
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(os.getpid(), number)


def test_a_loading_process_outlives_signals() -> None:
    numbers: Any = torch.arange(4)
    loader: DataLoader[Any] = DataLoader(numbers, num_workers=1, worker_init_fn=signalled_before_and_after)
    assert torch.cat(list(start_loading(loader))).tolist() == [0, 1, 2, 3]
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())


DYING = """
import os, signal, sys, torch
from torch.utils.data import DataLoader
from neco_bench.core.signals import leave_signals_to_the_parent, start_loading
class Data(torch.utils.data.Dataset):
    def __len__(self): return 8
    def __getitem__(self, i):
        if i == 3: os.kill(os.getpid(), signal.SIGKILL)
        return i
loading = start_loading(DataLoader(Data(), num_workers=2, worker_init_fn=leave_signals_to_the_parent))
try:
    list(loading)
except RuntimeError as error:
    kept = error  # as a command that ends with an error keeps it, and with it the loader
    sys.exit(5)
"""


@pytest.mark.slow
def test_a_command_ends_although_a_loading_process_died() -> None:
    done = subprocess.run([sys.executable, "-c", DYING], timeout=60, check=False)  # it hung for ever
    assert done.returncode == 5
