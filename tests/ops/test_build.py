"""The extension itself: how it chooses its SIMD level, and its threads under callers that share it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
import torch

from memdec import _C, build_info, ops


def test_build_info_says_what_runs():
    info = build_info()
    assert info["cuda"] in ("on", "off")
    assert (info["cuda"] == "on") == bool(info["arches"]) == (info["nvcc"] is not None)
    assert "portable" in info["simd_levels"] and info["simd"] in info["simd_levels"]
    assert info["threads"] == torch.get_num_threads()


def level_in_use(asked: str | None) -> str:
    """What a fresh process runs where MEMDEC_SIMD is `asked`, or is not set."""
    environment = {name: value for name, value in os.environ.items() if name != "MEMDEC_SIMD"}
    if asked is not None:
        environment["MEMDEC_SIMD"] = asked
    code = "from memdec import _C; print(_C.build_info()['simd'])"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_the_environment_forces_a_level():
    """A level that is not there leaves the best one in use; the best of a machine is the last that it has."""
    assert level_in_use("portable") == "portable"
    assert level_in_use("nonsense") == level_in_use(None)


def test_an_unknown_level_is_refused():
    with pytest.raises(ValueError, match="set_simd_level: name is 'sse9'"):
        _C.set_simd_level("sse9")


def test_two_python_threads_at_once():
    """Each caller gets its own rows' results while the other one has the pool."""
    torch.manual_seed(0)
    inputs = [torch.randn(64, 20000) for _ in range(2)]
    targets = torch.arange(64)
    wanted = [ops.token_log_prob(logits, targets) for logits in inputs]
    wrong = []

    def call(i):
        torch.set_num_threads(2)
        wrong.extend(i for _ in range(50) if not torch.equal(ops.token_log_prob(inputs[i], targets), wanted[i]))

    callers = [threading.Thread(target=call, args=(i,)) for i in range(2)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_has_a_pool_of_its_own():
    code = """
import os, torch
from memdec import ops
torch.set_num_threads(2)
logits, targets = torch.randn(64, 20000), torch.arange(64)
wanted = ops.token_log_prob(logits, targets).tolist()   # the parent's pool has its workers now
child = os.fork()
if child == 0:
    os._exit(0 if ops.token_log_prob(logits, targets).tolist() == wanted else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert ops.token_log_prob(logits, targets).tolist() == wanted
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_an_error_leaves_the_pool_working():
    logits = torch.randn(64, 20000)
    for _ in range(3):
        with pytest.raises(ValueError, match="targets holds"):
            ops.token_log_prob(logits, torch.full((64,), 20000))
    assert ops.token_log_prob(logits, torch.arange(64)).isfinite().all()


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="no /proc here")
def test_idle_workers_sleep():
    """After a call nothing spins: the process uses next to no processor time."""
    code = """
import time, torch
from memdec import ops
torch.set_num_threads(2)
logits, targets = torch.randn(64, 20000), torch.arange(64)
time.sleep(0.5)   # torch's own threads have gone to sleep
for _ in range(20):
    ops.token_log_prob(logits, targets)
before = time.process_time()
time.sleep(1)
print(time.process_time() - before)
"""
    used = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert float(used.stdout) < 0.1
