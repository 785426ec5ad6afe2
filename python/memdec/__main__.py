"""``python -m memdec``: the same as ``memdec``, for launchers such as torchrun."""

from memdec.cli import main

main()
