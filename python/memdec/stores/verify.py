"""Whether what lies on the disk is what was written: any artefact, any memory, and a folder of them as ``fit`` makes
one."""

from __future__ import annotations

from pathlib import Path

from memdec.errors import MemdecError
from memdec.stores import manifest, memory

PARTS = ("corpus", "datastore", "distributions", "memory")  # what `fit` makes, and what its folder is judged by


def verify(folder: str | Path) -> list[str]:
    """Read every byte of the artefact, the memory, or the folder of artefacts, and compare it with the checksums.

    Returns:
        The problems, one line each with the file's path relative to ``folder``; empty when all is whole.

    Raises:
        MemdecError: nothing of memdec is there.
    """
    folder = Path(folder)
    if memory.is_memory(folder):
        return memory.verify_memory(folder)
    if (folder / manifest.MANIFEST_NAME).is_file():
        return manifest.verify(folder)
    parts = [*artefacts(folder), *artefacts(folder / "adapted")]  # what `fit --adapt-epochs` adds
    if not parts:
        raise MemdecError(
            f"{folder} holds no artefact of memdec: no {manifest.MANIFEST_NAME}, no {memory.CARD_NAME}. Check the path."
        )
    problems = []
    for part in parts:
        name = part.relative_to(folder).as_posix()
        try:
            problems += [f"{name}/{problem}" for problem in verify(part)]
        except MemdecError as error:  # one that cannot even be read must not hide what is wrong with the others
            problems.append(str(error))
    for name in PARTS:
        if folder / name not in parts and any((folder / name).glob("*.safetensors")):
            lost = memory.CARD_NAME if name == "memory" else manifest.MANIFEST_NAME
            problems.append(f"{name}/{lost} is missing, so nothing tells whether the rest of {name} is whole")
    return problems


def artefacts(folder: str | Path) -> list[Path]:
    """The folders directly within ``folder`` that are artefacts or memories."""
    folder = Path(folder)
    if not folder.is_dir():
        return []
    names = (manifest.MANIFEST_NAME, memory.CARD_NAME)
    return [path for path in sorted(folder.iterdir()) if any((path / name).is_file() for name in names)]
