"""A memory of four blocks for the demo's domain, to measure decoding with: a step of it costs a third of the base's.

    python bench/small_memory.py OUT

The demo's memory is a copy of the whole model and so as slow as the base. This one keeps four of SmolLM2-135M's 30
blocks; a cut start needs thousands of steps, an hour or more on two cores. Stopped, the same command continues. Then:

    memdec bench-decode --base ~/.cache/memdec/smollm2-… --memory OUT/memory --text OUT/test.txt --out speed.json
"""

from __future__ import annotations

import argparse
from pathlib import Path

from memdec.demo.model import default_cache_dir, smollm2_folder
from memdec.demo.run import CONTEXT, FRACTIONS, domain_text
from memdec.modeling.tokenizers import load_tokenizer
from memdec.pipeline.fit import fit
from memdec.stores.atomic import write_file
from memdec.stores.corpus import Corpus


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to make; a run that was stopped there is continued")
    parser.add_argument("--tokens", type=int, default=90_000, help="of text, all splits together")
    parser.add_argument("--layers", type=int, default=4, help="blocks of the base's 30")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--beta", type=float, default=0.5, help="weight of the retriever; 0 is plain fine-tuning")
    options = parser.parse_args()

    base = smollm2_folder(default_cache_dir())
    text, _ = domain_text(options.out, options.tokens, print)
    fit(
        base,
        text,
        options.out,
        fractions=FRACTIONS,
        context=CONTEXT,
        max_tokens=options.tokens,
        layers=options.layers,
        epochs=options.epochs,
        learning_rate=options.learning_rate,
        beta=options.beta,
        batch_size=1,
        eval_every=100,
        validation_tokens=4096,
    )
    held_out = Corpus.open(options.out / "corpus").split("test").tokens
    write_file(options.out / "test.txt", load_tokenizer(base).decode(held_out).encode())
    print(f"base {base}\nmemory {options.out / 'memory'}\nheld-out text {options.out / 'test.txt'}")


if __name__ == "__main__":
    main()
