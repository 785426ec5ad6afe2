"""Compile every CUDA kernel for every architecture and fail if one spills registers: check_kernels.py BUILD.

BUILD is a configured build folder. ptxas says for each kernel and architecture what it uses; a spill means traffic to
local memory that no kernel here has a use for.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys

KERNEL = re.compile(r"Compiling entry function '(?P<name>\w+)' for '(?P<arch>\w+)'")
STACK = re.compile(r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill")
REGISTERS = re.compile(r"Used (?P<registers>\d+) registers")


def demangled(name: str) -> str:
    if shutil.which("c++filt") is None:
        return name
    whole = subprocess.run(["c++filt", name], capture_output=True, text=True, check=True).stdout.strip()
    return re.sub(r"memdec::|cuda::|\(anonymous namespace\)::", "", whole.split("(memdec")[0])


def main(build: str) -> int:
    """Build the target with the kernels from scratch, print what each uses, and count those that spill."""
    command = ["cmake", "--build", build, "--target", "memdec_cuda", "--clean-first"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        print(done.stdout)
        return 1
    if "warning" in done.stdout:
        print("\n".join(line for line in done.stdout.splitlines() if "warning" in line))
    kernel, stack, spilling = "", (0, 0, 0), 0
    arches: dict[str, dict[str, int]] = {}
    for line in done.stdout.splitlines():
        if found := KERNEL.search(line):
            kernel, arch = found["name"], found["arch"]
        elif found := STACK.search(line):
            stack = tuple(int(value) for value in found.groups())
        elif found := REGISTERS.search(line):
            arches.setdefault(kernel, {})[arch] = int(found["registers"])
            if any(stack):
                spilling += 1
                print(f"{demangled(kernel)} for {arch}: {stack[0]} bytes of stack, {sum(stack[1:])} of spills")
    for name, registers in sorted(arches.items(), key=lambda item: demangled(item[0])):
        print(f"{demangled(name)}: registers {registers}")
    print(f"{len(arches)} kernels, {len({a for r in arches.values() for a in r})} architectures, {spilling} that spill")
    return 1 if spilling or not arches else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
