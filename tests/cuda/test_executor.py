"""The executor that runs CUDA kernels on the CPU: it computes what a GPU would, and a wrong kernel does not pass."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

HOST = Path(__file__).parent / "host"
ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

# Each kernel is right but for what its name says; `main` prints its output, or the error.
KERNELS = r"""
#include <cstdio>
#include "cuda/reductions.cuh"
using namespace memdec::cuda;

struct Scratch { int value[64]; };
__global__ void right(int* out) {
  int& mine = shared<Scratch>().value[threadIdx.x];
  mine = static_cast<int>(threadIdx.x * threadIdx.x);
  __syncthreads();
  out[threadIdx.x] = shared<Scratch>().value[63 - threadIdx.x] + sum_over_block<64>(static_cast<int>(blockIdx.x) + 1);
}
__global__ void missing_barrier(int* out) {
  shared<Scratch>().value[threadIdx.x] = static_cast<int>(threadIdx.x);
  out[threadIdx.x] = shared<Scratch>().value[63 - threadIdx.x];
}
__global__ void missing_barrier_between_two_uses(int* out) {
  int& word = shared<Scratch>().value[threadIdx.x / 32];
  int sum = 0;
  for (int round = 1; round < 3; ++round) {
    const int mine = reduce_warp(round, [](int a, int b) { return a + b; });
    if (threadIdx.x % 32 == 0) word = mine;
    __syncthreads();
    sum = 10 * sum + shared<Scratch>().value[0] + shared<Scratch>().value[1];
  }
  out[threadIdx.x] = sum;
}
__global__ void diverging_barrier(int* out) {
  if (threadIdx.x < 40) __syncthreads();
  else __syncthreads();
  out[threadIdx.x] = 0;
}
__global__ void early_exit(int* out) {
  if (threadIdx.x == 5) return;
  __syncthreads();
  out[threadIdx.x] = 0;
}
__global__ void half_a_warp(int* out) {
  if (threadIdx.x % 32 < 16) out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1, 1);
}
__global__ void out_of_bounds(int* out) { shared<Scratch>().value[threadIdx.x + 1] = 0; out[threadIdx.x] = 0; }
__global__ void two_blocks_one_place(int* out) { out[0] = static_cast<int>(blockIdx.x); }

int main(int, char** argument) {
  const struct { const char* name; void (*kernel)(int*); } all[] = {
      {"right", right}, {"missing_barrier", missing_barrier},
      {"missing_barrier_between_two_uses", missing_barrier_between_two_uses}, {"diverging_barrier", diverging_barrier},
      {"early_exit", early_exit}, {"half_a_warp", half_a_warp}, {"out_of_bounds", out_of_bounds},
      {"two_blocks_one_place", two_blocks_one_place}};
  int out[64] = {};
  for (const auto& one : all)
    if (!strcmp(one.name, argument[1])) launch(one.kernel, 2, 64, 0, nullptr, static_cast<int*>(out));
  if (const cudaError_t error = cudaGetLastError()) return printf("%s", cudaGetErrorString(error)), 0;
  for (const int value : out) printf("%d ", value);
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("executor")
    (folder / "kernels.cpp").write_text(KERNELS)
    flags = ["-std=c++20", "-O1", "-g", "-fsanitize=address,undefined", f"-I{HOST}", f"-I{ROOT / 'csrc'}"]
    sources = [folder / "kernels.cpp", HOST / "executor.cpp"]
    subprocess.run(["g++", *flags, *map(str, sources), "-o", str(folder / "kernels")], check=True)
    return folder / "kernels"


def output(program: Path, kernel: str, order: str = "forward") -> str:
    environment = {**os.environ, "MEMDEC_EXECUTOR_ORDER": order, "ASAN_OPTIONS": "detect_leaks=0", "LD_PRELOAD": ""}
    done = subprocess.run([str(program), kernel], env=environment, capture_output=True, text=True, timeout=60)
    return done.stdout + done.stderr


def outputs(program: Path, kernel: str) -> list[str]:
    return [output(program, kernel, order) for order in ("forward", "reverse", "1", "2")]


def test_a_right_kernel_gives_the_same_in_every_order(program):
    """Block 1 runs last, forwards: 128 is added to its squares; backwards block 0 does, which adds 64."""
    for blocks, out in zip((2, 1), outputs(program, "right")[:2], strict=True):
        assert [int(value) for value in out.split()] == [(63 - i) ** 2 + 64 * blocks for i in range(64)]


def test_a_missing_barrier_shows_as_a_result_that_depends_on_the_order(program):
    results = outputs(program, "missing_barrier")
    assert len(set(results)) > 1 and "-1" in results[0].split()  # what was not written yet is poison


def test_a_warp_runs_ahead_of_another_into_what_that_one_still_reads(program):
    assert len(set(outputs(program, "missing_barrier_between_two_uses"))) > 1


def test_blocks_that_write_one_place_show_too(program):
    assert len(set(outputs(program, "two_blocks_one_place"))) > 1


def test_waiting_threads_are_reported_with_kernel_and_line(program):
    report = output(program, "diverging_barrier")
    assert "diverging_barrier" in report and "40 threads (the first is 0) wait at the barrier kernels.cpp:" in report
    assert "63 threads" in output(program, "early_exit") and "have ended" in output(program, "early_exit")
    assert "wait for their warp at kernels.cpp:" in output(program, "half_a_warp")


def test_shared_memory_ends_where_it_ends(program):
    assert "heap-buffer-overflow" in output(program, "out_of_bounds")
