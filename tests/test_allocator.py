"""Freed memory stays with the process: counted in page faults, each process its own."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import torch
from marginclip.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory() is True
torch.set_num_threads(1)
kept = torch.ones(1000)
def take_and_free():
    blocks = [torch.ones(megabytes << 18) for megabytes in (4, 20, 70)]
    return sum(float(block[-1]) for block in blocks)
for _ in range(20):  # the heap finds its size
    take_and_free()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    assert take_and_free() == 3
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(choice):
    done = subprocess.run([sys.executable, "-c", PROGRAM, choice], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is glibc's")
def test_freed_memory_is_used_again_without_new_pages():
    returned, kept = faults("return"), faults("keep")
    assert returned > 5 * 70 * 2**20 // 4096 // 512  # at the very least huge pages of the largest block
    assert kept < returned / 10
