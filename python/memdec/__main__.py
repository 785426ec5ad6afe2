"""``python -m memdec``: the same as ``memdec``, for launchers such as torchrun."""

from memdec.cli import main

if __name__ == "__main__":
    main()
