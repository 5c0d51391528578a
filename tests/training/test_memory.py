import resource
import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys
from lmkit.training.memory import keep_freed_pages
if sys.argv[1] == "kept":
    assert keep_freed_pages()
for _ in range(10):
    bytes([len(sys.argv)]) * (1 << 26)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    bytes([len(sys.argv)]) * (1 << 26)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
def test_freed_pages_are_used_again():
    faults = {}
    for how in ("kept", "returned"):
        done = subprocess.run([sys.executable, "-c", SCRIPT, how], capture_output=True, text=True, check=True)
        faults[how] = int(done.stdout)
    pages = (1 << 26) // resource.getpagesize()
    assert faults["kept"] < pages < 4 * pages <= faults["returned"]
