"""``memdec corpus``, ``datastore``, ``distributions``, ``train``, ``fit``, which runs the four of them, and
``transfer``, which fits a memory to another tokenizer."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from memdec.cli.guard import guarded, remark
from memdec.cli.recipes import AsJson, DryRun, On, RecipeFile, Tokens, Utilisation, complete, estimate
from memdec.errors import MemdecError

Model = Annotated[str, typer.Argument(help="A causal LM: a transformers folder, a hub id, or a .gguf file.")]
Source = Annotated[
    str, typer.Argument(help="A file or folder of .txt, .md, .html, .jsonl(.gz) or .parquet, or a dataset as hf:NAME.")
]
Out = Annotated[Path, typer.Option("--out", help="Folder to make; a run that was stopped there is continued.")]
Fractions = Annotated[str, typer.Option(help="Shares of the documents for training, validation and test.")]
Seed = Annotated[
    int, typer.Option(min=0, max=2**63 - 1, help="Another seed holds out other documents and shuffles otherwise.")
]
TextField = Annotated[str, typer.Option(help="The field or column with the text, in .jsonl, .parquet and datasets.")]
Workers = Annotated[int, typer.Option(min=1, help="Processes that tokenise; the result does not depend on it.")]
MaxTokens = Annotated[int | None, typer.Option(help="Use at most so many tokens of the text.")]
ValidationText = Annotated[str | None, typer.Option(help="Validate on this text; none of SOURCE is then held out.")]
TestText = Annotated[str | None, typer.Option(help="Keep this text for the test; none of SOURCE is then held out.")]
Context = Annotated[
    int | None, typer.Option(help="Tokens in a window; default: 512, or what the model has positions for.")
]
Stride = Annotated[
    int | None, typer.Option(help="How far windows are apart; default: they overlap by one token. The paper's is 512.")
]
Layer = Annotated[str | None, typer.Option(help="Module whose input is the key; default: the last block's MLP.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Windows in one forward.")]
Device = Annotated[str | None, typer.Option(help="Such as cpu or cuda:0; default: an accelerator if there is one.")]
Dtype = Annotated[str, typer.Option(help="auto (bfloat16 where the machine has it), float32, bfloat16 or float16.")]
Neighbours = Annotated[
    int | None, typer.Option("--k", min=1, help="Neighbours of a position; default: 1024 as in the paper, or all.")
]
Temperature = Annotated[float | None, typer.Option(help="T of exp(-distance/T); default: chosen on validation text.")]
Backend = Annotated[str, typer.Option(help="exact, or with faiss: flat, ivfflat, ivfpq.")]
SameDocument = Annotated[
    bool, typer.Option("--exclude-same-document", help="No neighbours from the position's own document.")
]
Codec = Annotated[str, typer.Option(help="How probabilities are stored: log8 (one byte) or float16.")]
MemoryLimit = Annotated[str, typer.Option(help="Working memory of the search, such as 1GiB.")]
TEACHERS = "knn (the retriever), lm (a model's own distribution), knn-lm (both, mixed) or one-hot (the text itself)"
Teacher = Annotated[str, typer.Option(help=f"What the memory imitates: {TEACHERS}.")]
FitTeacher = Annotated[
    str | None,
    typer.Option(
        "--teacher",
        help=f"What the memory imitates: {TEACHERS}; default: knn-lm, adapted, for a whole copy of the base, knn for a "
        "smaller memory.",
    ),
]
TeacherModel = Annotated[
    str | None,
    typer.Option(
        help="The model that teaches, by its keys (knn) or its own distributions (lm); default: the base model."
    ),
]
AdaptEpochs = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Fine-tune a copy of the model that teaches on the text first, so many epochs by plain cross-entropy "
        "(kept at OUT/adapted); 0: it teaches as it is; default: 3 for a whole copy of the base whose teacher is not "
        "named, else 0.",
    ),
]
TopK = Annotated[int, typer.Option(min=1, help="Tokens kept of the language model's distribution, for lm and knn-lm.")]
Ablate = Annotated[
    list[str] | None,
    typer.Option(
        help="Make a memory for each of several values of a setting, as beta=0,0.5,1, and compare them; repeated, for "
        "every combination."
    ),
]
Init = Annotated[
    str | None, typer.Option(help="Model that the memory starts from, same tokenizer; default: the base model.")
]
Layers = Annotated[int | None, typer.Option(min=1, help="Blocks that the memory keeps of it; default: all.")]
Epochs = Annotated[int, typer.Option(min=1, help="Times the training text is read.")]
MaxSteps = Annotated[int | None, typer.Option(min=1, help="Number of steps, whatever --epochs says.")]
Beta = Annotated[float, typer.Option(help="Weight of KL(teacher, memory) against cross-entropy, 0 to 1.")]
TrainBatch = Annotated[int, typer.Option(min=1, help="Training windows in one forward.")]
Accumulation = Annotated[int, typer.Option(min=1, help="Forwards in one training step.")]
Rate = Annotated[float, typer.Option(help="Highest learning rate.")]
Schedule = Annotated[str, typer.Option(help="cosine, linear or constant.")]
SaveEvery = Annotated[
    int | None, typer.Option(min=1, help="Steps between checkpoints; default: every evaluation and five minutes.")
]
EvalEvery = Annotated[
    int | None,
    typer.Option(min=1, help="Steps between evaluations; default: an epoch, or a quarter of the run if that is less."),
]
Patience = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="End training after so many evaluations in a row without a better one; default: go on to the last "
        "step. The best checkpoint is kept either way.",
    ),
]


def register(app: typer.Typer) -> None:
    """Add the commands to ``app``."""
    app.command(short_help="From text to a memory in one go.")(fit)
    app.command(short_help="Stage 1: documents to tokens, split and deduplicated.")(corpus)
    app.command(short_help="Stage 2: run the model, keep a key a token.")(datastore)
    app.command(short_help="Stage 3: search neighbours, store what followed them.")(distributions)
    app.command(short_help="Stage 4: train the memory, tune its weight.")(train)
    app.command(short_help="A memory for another tokenizer, from a trained one.")(transfer)


@guarded(resumable=True)
def fit(
    model: Model,
    source: Source,
    out: Out,
    fractions: Fractions = "0.9,0.05,0.05",
    seed: Seed = 0,
    text_field: TextField = "text",
    workers: Workers = 1,
    max_tokens: MaxTokens = None,
    validation: ValidationText = None,
    test: TestText = None,
    context: Context = None,
    stride: Stride = None,
    layer: Layer = None,
    k: Neighbours = None,
    temperature: Temperature = None,
    backend: Backend = "exact",
    exclude_same_document: SameDocument = False,
    memory_limit: MemoryLimit = "1GiB",
    teacher: FitTeacher = None,
    teacher_model: TeacherModel = None,
    adapt_epochs: AdaptEpochs = None,
    top_k: TopK = 64,
    init: Init = None,
    layers: Layers = None,
    epochs: Epochs = 8,
    max_steps: MaxSteps = None,
    beta: Beta = 0.5,
    batch_size: TrainBatch = 4,
    gradient_accumulation: Accumulation = 1,
    learning_rate: Rate = 1e-4,
    schedule: Schedule = "cosine",
    eval_every: EvalEvery = None,
    patience: Patience = None,
    save_every: SaveEvery = None,
    ablate: Ablate = None,
    recipe: RecipeFile = None,
    dry_run: DryRun = False,
    on: On = "cpu",
    tokens: Tokens = None,
    utilisation: Utilisation = None,
    as_json: AsJson = False,
    device: Device = None,
    dtype: Dtype = "auto",
) -> None:
    """From a model and a folder of text to a memory, in one go: corpus, datastore, distributions, training.

    Stopped at any point, even by kill -9, the same command continues and ends with the same bytes. OUT holds corpus,
    datastore, distributions, training and, at the end, memory: attach that with `memdec generate` or MemoryModel.

    \b
    Examples:
      memdec fit path/to/model path/to/text --out run
      memdec fit path/to/model notes.jsonl --out run --context 512 --epochs 1 --max-tokens 100000
      memdec fit path/to/large-model text --init path/to/small-model --out run      a small memory for a large base
      memdec fit path/to/model text --out run --teacher knn     taught by the base as it is, by its retriever alone
      memdec fit path/to/model text --out grid --ablate beta=0,0.5,1 --ablate epochs=1,3     which settings matter
      memdec fit --recipe recipes/wikitext103-gpt2.toml --dry-run --on h100     what a published run would cost
    """
    options = _given(locals(), but="model source out ablate recipe dry_run on tokens utilisation as_json")
    from memdec.pipeline.fit import fit as run_fit

    options = complete(recipe, options)
    if dry_run or as_json:
        if ablate:
            raise MemdecError("--dry-run estimates one memory, --ablate makes several. Leave one of them out.")
        estimate(model, source, recipe, options, on=on, tokens=tokens, utilisation=utilisation, as_json=as_json)
        return
    if ablate:
        ablate_settings(model, source, out, ablate, options)
        return
    memory = run_fit(model, source, out, **options)
    typer.echo(f"Memory: {memory}")
    typer.echo(f'Try it: memdec generate --base {model} --memory {memory} --side-by-side "..."')


def ablate_settings(model: str, source: str, out: Path, parts: list[str], options: dict[str, Any]) -> None:
    """``fit --ablate``: a memory for every combination, and a table."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from memdec.evaluation.ablation import ablate, parse_grid

    grid = parse_grid(parts)
    runs = ablate(model, source, out, grid, say=remark, **options)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in (*(name.replace("_", "-") for name in grid), "alpha", "validation", "test", "memory alone"):
        table.add_column(column, justify="right", no_wrap=True)
    best = min(run.validation_perplexity for run in runs)
    for run in runs:
        figures = (run.validation_perplexity, run.perplexity, run.memory_perplexity)
        cells = [*(str(run.settings[name]) for name in grid), f"{run.alpha:g}", *(f"{value:.3f}" for value in figures)]
        table.add_row(*cells, style="bold" if run.validation_perplexity == best else None)
    Console(highlight=False).print(table)
    typer.echo(f"Perplexity of base + memory; the base alone: {runs[0].base_perplexity:.3f} on the test text.")
    typer.echo(f"Page: {out / 'ablation.html'}   a line a run: {out / 'ablation.jsonl'}")


@guarded(resumable=True)
def corpus(
    model: Annotated[str, typer.Argument(help="The model whose tokenizer to use.")],
    source: Source,
    out: Out,
    fractions: Fractions = "0.9,0.05,0.05",
    seed: Seed = 0,
    text_field: TextField = "text",
    workers: Workers = 1,
    max_tokens: MaxTokens = None,
    validation: ValidationText = None,
    test: TestText = None,
) -> None:
    """Stage 1: read the documents, drop exact copies, split them by document, tokenise.

    \b
    Example:
      memdec corpus path/to/model path/to/text --out run/corpus
    """
    options = _given(locals(), but="model source out")
    from memdec.pipeline.corpus import build_corpus

    made = build_corpus(source, model, out, **options)
    counts = ", ".join(
        f"{made.split(name).num_tokens:,} tokens in {made.split(name).num_documents:,} documents for {name}"
        for name in ("train", "validation", "test")
    )
    typer.echo(f"Corpus: {out} ({counts})")


@guarded(resumable=True)
def datastore(
    model: Model,
    corpus: Annotated[Path, typer.Argument(help="The corpus that `memdec corpus` made.")],
    out: Out,
    context: Context = None,
    stride: Stride = None,
    layer: Layer = None,
    batch_size: BatchSize = 8,
    validation_rows: Annotated[int, typer.Option(min=0, help="Validation positions kept for choosing T.")] = 8192,
    device: Device = None,
    dtype: Dtype = "auto",
) -> None:
    """Stage 2: run the model over the training text and keep, for every position, its key and the token that came.

    \b
    Example:
      memdec datastore path/to/model run/corpus --out run/datastore
    """
    options = _given(locals(), but="model corpus out")
    from memdec.pipeline.embed import build_datastore

    made = build_datastore(model, open_corpus(corpus), out, **options)
    typer.echo(f"Datastore: {out} ({made.num_rows:,} keys of {made.dim} numbers)")


@guarded(resumable=True)
def distributions(
    source: Annotated[
        Path,
        typer.Argument(help="The datastore that `memdec datastore` made; for the teachers lm and one-hot, the corpus."),
    ],
    out: Out,
    k: Neighbours = None,
    temperature: Temperature = None,
    backend: Backend = "exact",
    exclude_same_document: SameDocument = False,
    min_prob: Annotated[float, typer.Option(help="Probabilities below this are cut; their sum is kept.")] = 1e-6,
    codec: Codec = "log8",
    memory_limit: MemoryLimit = "1GiB",
    teacher: Teacher = "knn",
    model: Annotated[str | None, typer.Option(help="The language model of the teachers lm and knn-lm.")] = None,
    corpus: Annotated[Path | None, typer.Option(help="For knn-lm: the corpus that the datastore is of.")] = None,
    weight: Annotated[float | None, typer.Option(help="For knn-lm: lambda; default: tuned on validation text.")] = None,
    top_k: TopK = 64,
    context: Annotated[
        int | None,
        typer.Option(help="Tokens in a window, for lm and one-hot; default: 512. knn takes its datastore's."),
    ] = None,
    stride: Stride = None,
    device: Device = None,
    dtype: Annotated[
        str, typer.Option(help="Of the language model, for lm and knn-lm: auto, float32, bfloat16 or float16.")
    ] = "auto",
) -> None:
    """Stage 3: for every position find its nearest others and store what tokens followed them, as a distribution.

    With another --teacher the distributions are a language model's own (lm), or the two mixed (knn-lm, for which the
    retriever's are kept in OUT-knn), or the text itself (one-hot).

    \b
    Examples:
      memdec distributions run/datastore --out run/distributions --k 1024
      memdec distributions run/corpus --teacher lm --model path/to/model --out run/teacher-lm
      memdec distributions run/datastore --teacher knn-lm --model path/to/model --corpus run/corpus --out run/teacher
    """
    options = _given(locals(), but="source out teacher corpus")
    from memdec.modeling.scoring import check_device
    from memdec.pipeline.distributions import build_distributions
    from memdec.pipeline.embed import default_device
    from memdec.pipeline.teachers import build_teacher
    from memdec.stores.datastore import Datastore

    options.setdefault("device", default_device())
    check_device(options["device"])
    if teacher in ("knn", "knn-lm"):
        if context is not None or stride is not None:
            raise MemdecError(f"The teacher {teacher} reads the datastore's windows: leave out --context and --stride.")
        if teacher == "knn-lm" and corpus is None:
            raise MemdecError("The teacher knn-lm also needs the text: --corpus RUN/corpus.")
        found = out if teacher == "knn" else out.with_name(f"{out.name}-knn")
        made = build_distributions(Datastore.open(source), found, **_known(options, build_distributions))
        if corpus is not None and teacher == "knn-lm":
            made = build_teacher(teacher, open_corpus(corpus), out, knn=made, **_known(options, build_teacher))
    else:
        made = build_teacher(teacher, open_corpus(source), out, **_known(options, build_teacher))
    typer.echo(f"Distributions: {out} ({made.num_rows:,} rows, {made.nnz / max(made.num_rows, 1):.0f} tokens a row)")


@guarded(resumable=True)
def train(
    init: Annotated[str, typer.Argument(help="Model that the memory starts from.")],
    corpus: Annotated[Path, typer.Argument(help="The corpus that `memdec corpus` made.")],
    distributions: Annotated[Path, typer.Argument(help="What `memdec distributions` made.")],
    out: Annotated[Path, typer.Option("--out", help="Folder that gets `training` and `memory`.")],
    base: Annotated[
        str | None, typer.Option(help="Model that the memory will be mixed with; default: the one it starts from.")
    ] = None,
    layers: Layers = None,
    epochs: Epochs = 8,
    max_steps: MaxSteps = None,
    beta: Beta = 0.5,
    batch_size: TrainBatch = 4,
    gradient_accumulation: Accumulation = 1,
    context: Annotated[int | None, typer.Option(help="Tokens in a window; default: as in the datastore.")] = None,
    stride: Annotated[int | None, typer.Option(help="How far windows are apart; default: as in the datastore.")] = None,
    learning_rate: Rate = 1e-4,
    schedule: Schedule = "cosine",
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of the order of the windows, and of dropout.")] = 0,
    eval_every: EvalEvery = None,
    patience: Patience = None,
    save_every: SaveEvery = None,
    device: Device = None,
    dtype: Dtype = "auto",
) -> None:
    """Stage 4: train the memory on text and distributions, keep the best by the mixture's perplexity, tune alpha.

    \b
    Examples:
      memdec train path/to/model run/corpus run/distributions --out run
      torchrun --nproc-per-node 4 -m memdec train path/to/model run/corpus run/distributions --out run
    """
    options = _given(locals(), but="init corpus distributions out")
    from memdec.pipeline.train import train_memory

    made = train_memory(init, open_corpus(corpus), distributions, out, **options)
    typer.echo(f"Memory: {made}")


@guarded(resumable=True)
def transfer(
    memory: Annotated[Path, typer.Argument(help="The trained memory, a folder.")],
    to: Annotated[
        str, typer.Option("--to", help="Causal LM with the other tokenizer, the new base: a folder, hub id or .gguf.")
    ],
    corpus: Annotated[str, typer.Option("--corpus", help="The domain's text, as `memdec fit` takes its SOURCE.")],
    out: Out,
    share: Annotated[float, typer.Option(help="Training steps, as a share of the memory's own.")] = 0.1,
    steps: Annotated[int | None, typer.Option(min=1, help="Number of steps, whatever --share says.")] = None,
    how: Annotated[
        str, typer.Option(help="pieces (new tokens from the old ones' vectors), or random (a control).")
    ] = "pieces",
    fractions: Fractions = "0.9,0.05,0.05",
    seed: Seed = 0,
    text_field: TextField = "text",
    workers: Workers = 1,
    max_tokens: MaxTokens = None,
    validation: ValidationText = None,
    test: TestText = None,
    context: Annotated[int | None, typer.Option(help="Tokens in a window; default: the memory's.")] = None,
    layer: Layer = None,
    k: Neighbours = None,
    temperature: Temperature = None,
    backend: Backend = "exact",
    memory_limit: MemoryLimit = "1GiB",
    beta: Annotated[float | None, typer.Option(help="Weight of the KL term; default: the memory's.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Training windows in one forward; default: the memory's.")
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Highest learning rate; default: the memory's.")] = None,
    eval_every: EvalEvery = None,
    save_every: SaveEvery = None,
    device: Device = None,
    dtype: Dtype = "auto",
) -> None:
    """A memory for another tokenizer: keep a trained memory's trunk, replace its vocabulary, train some steps more.

    The new tokens get vectors made of the old ones': the same where the bytes are the same, else the mean of their
    pieces. Distributions are built with the new model; a tenth of the memory's own steps is trained, with its own
    settings. Stopped, the same command continues.

    \b
    Examples:
      memdec transfer run/memory --to path/to/other-model --corpus path/to/text --out other-run
      memdec transfer run/memory --to path/to/other-model --corpus path/to/text --out other-run --share 0.3
      memdec transfer run/memory --to path/to/other-model --corpus path/to/text --out control --how random
    """
    options = _given(locals(), but="memory to corpus out steps")
    from memdec.pipeline.transfer import transfer as run_transfer

    made = run_transfer(memory, to, corpus, out, max_steps=steps, **options)
    typer.echo(f"Memory: {made}")
    typer.echo(f'Try it: memdec generate --base {to} --memory {made} --side-by-side "..."')


def open_corpus(folder: Path) -> Any:
    """The corpus in ``folder``, or an error that names the command that makes one."""
    from memdec.stores.corpus import Corpus
    from memdec.stores.manifest import MANIFEST_NAME

    if not (folder / MANIFEST_NAME).is_file():
        raise MemdecError(
            f"{folder} is no corpus of memdec's. Make one of it with `memdec corpus MODEL {folder} --out run/corpus` "
            "and give that, or run all stages with `memdec fit`."
        )
    return Corpus.open(folder)


def parse_fractions(text: str) -> tuple[float, float, float]:
    """``"0.9,0.05,0.05"`` as three numbers.

    Raises:
        MemdecError: these are not three numbers.
    """
    try:
        train, validation, test = (float(part) for part in text.split(","))
    except ValueError:
        raise MemdecError(f"--fractions wants three numbers such as 0.9,0.05,0.05; got {text!r}.") from None
    return train, validation, test


def _given(parameters: Mapping[str, Any], but: str) -> dict[str, Any]:
    """A command's parameters that its stage knows by the same names, but for those that are None: there the stage's own
    default holds."""
    options = {name: value for name, value in parameters.items() if value is not None and name not in but.split()}
    if "fractions" in options:
        options["fractions"] = parse_fractions(options["fractions"])
    return options


def _known(options: Mapping[str, Any], stage: Callable[..., Any]) -> dict[str, Any]:
    """Those of the options that the stage takes."""
    return {name: value for name, value in options.items() if name in inspect.signature(stage).parameters}
