"""What the machine is asked for, and given back."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest
import torch

from mixtools import machine

FRAGMENTS = """
import numpy as np
from mixtools import machine

def resident():
    return int(machine._fields("/proc/self/status")["RssAnon"].split()[0])

pieces = [np.ones(1 << 13) for _ in range(2000)]  # 64 kB each, from the heap
del pieces[:-1]  # the last lies above all others: the heap cannot shrink
before = resident()
machine.give_back_memory()
print(before - resident())
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="GNU's C library alone keeps it")
def test_what_was_freed_in_pieces_goes_back() -> None:
    done = subprocess.run([sys.executable, "-c", FRAGMENTS], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 80_000  # of 128,000 kB


def test_what_torch_keeps_of_a_card_is_free_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in (("mem_get_info", (1000, 5000)), ("memory_reserved", 700), ("memory_allocated", 200)):
        monkeypatch.setattr(torch.cuda, name, lambda device, size=size: size)
    assert machine.memory_for(torch.device("cuda", 1), None) == 1350
    assert machine.memory_for(torch.device("cuda", 1), 1 << 60) > 1 << 59  # a limit of the user's own stands
