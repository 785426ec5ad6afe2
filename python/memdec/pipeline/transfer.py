"""Transfer: a memory made for one tokenizer becomes the start of a memory for another.

    memory ─▶ start: its trunk, embeddings and head for the new tokenizer ─▶ fit, a tenth of the steps ─▶ memory

    memdec transfer MEMORY --to MODEL --corpus SOURCE --out DIR

What a memory has learned of its domain lies mostly in its trunk, and the trunk knows tokens only as vectors. So each
token of the new tokenizer gets a vector in the space that the trunk knows. With E the old embeddings (and likewise the
head, and the head's bias),

    E'[t] = mean of E[s] over the pieces s of t

where the pieces of t are

    the old token of the same bytes              where there is one: its row is copied
    the old special token of the same role       for the end of text, its beginning, padding, the unknown token
    t's bytes as the old tokenizer splits them   for all others; single byte tokens where it cannot
    all old tokens                               for what has no bytes and no role: reserved and control tokens

All is taken from what the tokenizers do to bytes, not from their names. A byte-level BPE writes each byte as one
character (a space as Ġ), a SentencePiece-like one writes a space as ▁ and single bytes as <0xNN>; a token of either
stands for certain bytes, and by these they are compared.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import os
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from memdec.errors import MemdecError
from memdec.modeling.scoring import load_causal_lm
from memdec.modeling.structure import output_head
from memdec.modeling.tokenizers import compare, fingerprint, load_tokenizer, width
from memdec.pipeline.checkpoints import remove_unfinished, write_folder
from memdec.pipeline.fit import fit
from memdec.pipeline.record import Record
from memdec.pipeline.train import model_name
from memdec.stores.atomic import folder_lock, make_folder, remove_leftovers
from memdec.stores.memory import CARD_NAME, MemoryCard, is_memory, read_memory_card, write_memory_card

LOGGER = logging.getLogger(__name__)

FORMAT = "memdec.transfer"
RECORD_NAME = "transfer.json"
HOWS = ("pieces", "random")
ROLES = ("eos", "bos", "pad", "unk")
BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
# Settings of the memory's own training that the new one takes over.
INHERITED = ("beta", "batch_size", "gradient_accumulation", "learning_rate", "schedule", "warmup", "weight_decay")


@dataclass(frozen=True)
class Lineage:
    """Where each token of a new vocabulary comes from in an old one.

    Attributes:
        pieces: for each new id the old ids whose mean it gets; none stands for the mean of all.
        copied: number of tokens whose bytes are one old token.
        by_role: number of special tokens that have an old one of their role or name.
        composed: number of tokens made of several pieces.
        unknown: number of tokens that get the mean of all.
    """

    pieces: list[list[int]]
    copied: int
    by_role: int
    composed: int
    unknown: int


@dataclass(frozen=True)
class Start:
    """A model folder made by :func:`transfer_vocabulary`, and how its tokens came about (as in :class:`Lineage`)."""

    folder: Path
    tokens: int
    copied: int
    by_role: int
    composed: int
    unknown: int


def transfer(
    memory: str | os.PathLike[str],
    to: str | os.PathLike[str],
    corpus: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    share: float = 0.1,
    how: str = "pieces",
    max_steps: int | None = None,
    context: int | None = None,
    seed: int = 0,
    **options: Any,
) -> Path:
    """Make a memory for another tokenizer out of a trained one; a run that was stopped is continued.

    Context, batch size, learning rate and its schedule, weight decay and β are those of the memory's own training,
    unless they are given.

    Args:
        memory: the memory's folder.
        to: causal LM with the other tokenizer, whose distributions are learned and which will be the base: folder, hub
            id or ``.gguf`` file.
        corpus: the domain's text: file, folder or dataset, as :func:`memdec.pipeline.fit.fit` takes it.
        out: folder for everything: ``start``, and what `fit` makes, ``memory`` at the end.
        share: steps of the training, as a share of those that the memory itself was trained for.
        how: "pieces", or "random" as the control: the trunk is kept, embeddings and head are drawn anew.
        max_steps: number of steps; overrules `share`.
        context: tokens in a window; None is the memory's.
        seed: of what "random" draws, and of all that `fit` draws.
        options: any other keyword of :func:`memdec.pipeline.fit.fit`, such as ``max_tokens``, ``k``, ``temperature``,
            ``batch_size`` or ``learning_rate``.

    Returns:
        The new memory's folder, ``out/memory``.

    Raises:
        MemdecError: `memory` is no memory, both tokenizers are the same, the memory does not tell its steps, or what a
            stage of `fit` cannot work with.

    Example:
        >>> transfer("run/memory", "gemma-3-270m", "manuals/", "gemma-run")   # doctest: +SKIP
        PosixPath('gemma-run/memory')
    """
    memory, out = Path(memory), Path(out)
    card = read_card(memory)
    steps = steps_of(memory, card, share) if max_steps is None else max_steps
    inherited = inherited_settings(card, context)
    start = make_start(memory, to, out, how=how, seed=seed)
    given = {name: value for name, value in {**options, "context": context}.items() if value is not None}
    LOGGER.info("training %d steps; the memory's own training had %s", steps, card.provenance.get("total_steps", "?"))
    made = fit(to, corpus, out, init=start.folder, max_steps=steps, seed=seed, **{**inherited, **given})
    tell_origin(made, memory, start, how)
    return made


def transfer_vocabulary(
    memory: str | os.PathLike[str],
    to: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    how: str = "pieces",
    seed: int = 0,
) -> Start:
    """Write the start of a transfer: the memory's trunk with embeddings and head for the tokenizer of `to`.

    Args:
        memory: a memory, or any other causal LM with its tokenizer.
        to: model whose tokenizer is taken.
        out: folder to make, whole or not at all: a plain transformers model in float32 with the tokenizer of `to`.
        how: "pieces" (see the module's head), or "random": each column of embeddings and head is drawn from a normal
            distribution with the mean and standard deviation that it has over the old tokens.
        seed: of what "random" draws.

    Returns:
        The folder, and how many tokens came about how.

    Raises:
        MemdecError: both have the same tokens, a tokenizer does not show its bytes, or more of the model than
            embeddings and head depends on the vocabulary.

    Example:
        >>> transfer_vocabulary("run/memory", "gemma-3-270m", "start").copied   # doctest: +SKIP
        36215
    """
    old_tokenizer, new_tokenizer = check_transfer(memory, to, how)
    lineage = find_lineage(old_tokenizer, new_tokenizer)
    old = load_causal_lm(memory, dtype=torch.float32)
    model = with_vocabulary(old, new_tokenizer)
    old_ids = torch.tensor(sorted(set(old_tokenizer.get_vocab().values())))
    generator = torch.Generator().manual_seed(seed)
    old_rows, new_rows = token_rows(old), token_rows(model)
    if old_rows[0].shape[0] < width(old_tokenizer):
        raise MemdecError(
            f"{memory} has embeddings for {old_rows[0].shape[0]} tokens, but its tokenizer has {width(old_tokenizer)}: "
            "resize them (model.resize_token_embeddings) first."
        )
    with torch.no_grad():
        for source, target in zip(old_rows, new_rows, strict=True):
            table = source.detach().reshape(source.shape[0], -1)
            if how == "pieces":
                made = compose(table, lineage.pieces, old_ids)
            else:
                made = draw(table, old_ids, target.shape[0], generator)
            target.copy_(made.view_as(target))
    counts = {name: getattr(lineage, name) for name in ("copied", "by_role", "composed", "unknown")}
    LOGGER.info("%d tokens of %s: %s", len(lineage.pieces), to, counts if how == "pieces" else "drawn at random")

    def fill(folder: Path) -> None:
        model.save_pretrained(folder)
        new_tokenizer.save_pretrained(folder)

    write_folder(Path(out), fill)
    return Start(Path(out), len(lineage.pieces), **counts)


# -- the run -----------------------------------------------------------------------------------------------------------


def read_card(memory: Path) -> MemoryCard:
    """The card of the memory that is to be transferred."""
    if not is_memory(memory):
        raise MemdecError(
            f"{memory} is no memory: it has no {CARD_NAME}. Give the folder `memory` that `memdec fit` made; "
            "to start a memory from a plain model, use `memdec fit --init`."
        )
    return read_memory_card(memory)


def steps_of(memory: Path, card: MemoryCard, share: float) -> int:
    """`share` of the steps that the memory was trained for, at least one."""
    if not 0 < share <= 1000:
        raise MemdecError(f"--share is {share:g}; wanted a share above 0 of the memory's own steps, such as 0.1.")
    total = card.provenance.get("total_steps")
    if not isinstance(total, int):
        raise MemdecError(f"{memory} does not tell how many steps it was trained for; give their number with --steps.")
    return max(1, round(share * total))


def inherited_settings(card: MemoryCard, context: int | None) -> dict[str, Any]:
    """What the memory's training was run with, for `fit`; what its card does not tell is left to `fit`."""
    told = card.provenance
    found = {name: told[name] for name in INHERITED if told.get(name) is not None}
    # A stride belongs to its context.
    if context is None:
        found.update({name: told[name] for name in ("context", "stride") if told.get(name) is not None})
    # fit runs in one process: what several shared in a step, one now does in turn.
    processes = int(told.get("processes") or 1)
    if processes > 1:
        found["gradient_accumulation"] = int(found.get("gradient_accumulation", 1)) * processes
    return found


def make_start(memory: Path, to: str | os.PathLike[str], out: Path, *, how: str, seed: int) -> Start:
    """``out/start``, made unless an earlier run has made it from the same memory in the same way."""
    _, new_tokenizer = check_transfer(memory, to, how)
    fields = {
        "memory": model_name(memory),
        "memory_card": hashlib.sha256((memory / CARD_NAME).read_bytes()).hexdigest(),  # knows each file's checksum
        "to": model_name(to),
        "tokenizer_fingerprint": fingerprint(new_tokenizer),
        "how": how,
        "seed": seed,
    }
    folder = make_folder(out) / "start"
    with folder_lock(out):
        remove_unfinished(out, of="start")
        remove_leftovers(out)
        record = Record.start(out / RECORD_NAME, FORMAT, fields)
        if record.complete and (folder / "config.json").is_file():
            return Start(folder, **record.results)
        LOGGER.info("the start: the trunk of %s with the tokens of %s", memory, to)
        start = transfer_vocabulary(memory, to, folder, how=how, seed=seed)
        record.finish({name: value for name, value in asdict(start).items() if name != "folder"})
    return start


def check_transfer(memory: str | os.PathLike[str], to: str | os.PathLike[str], how: str) -> tuple[Any, Any]:
    """The tokenizers of the memory and of the model that it goes to, once it is sure that they differ."""
    if how not in HOWS:
        raise MemdecError(f"--how {how}: wanted one of {', '.join(HOWS)}.")
    old_tokenizer, new_tokenizer = load_tokenizer(memory), load_tokenizer(to)
    try:
        compare(new_tokenizer, old_tokenizer)
    except MemdecError:
        return old_tokenizer, new_tokenizer
    raise MemdecError(
        f"{memory} and {to} have the same tokens, so there is nothing to transfer: attach the memory as it is, with "
        f"`memdec generate --base {to} --memory {memory}` or MemoryModel.from_pretrained."
    )


def tell_origin(made: Path, memory: Path, start: Start, how: str) -> None:
    """Add to the new memory's card which memory it comes from. One file is replaced, so it is done or not done."""
    card = read_memory_card(made)
    if "transfer" not in card.provenance:
        origin = {name: value for name, value in asdict(start).items() if name != "folder"}
        origin |= {"memory": model_name(memory), "how": how}
        write_memory_card(made, replace(card, provenance={**card.provenance, "transfer": origin}))


# -- the model ---------------------------------------------------------------------------------------------------------


def with_vocabulary(old: Any, tokenizer: Any) -> Any:
    """A model like `old` with its trunk's weights, and embeddings and head as wide as `tokenizer`, not yet filled.

    It is made anew from the configuration rather than resized: what else hangs on the vocabulary (which row is padding
    and gets no gradient, say) is then right too.

    Raises:
        MemdecError: more of the model than embeddings and head depends on the vocabulary.
    """
    config = copy.deepcopy(old.config)
    text = config.get_text_config(decoder=True)
    ids = {role: getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "pad")}
    for part in (config, text):
        for role, index in ids.items():
            setattr(part, f"{role}_token_id", index)
        if ids["pad"] in (ids["bos"], ids["eos"], tokenizer.unk_token_id):
            part.pad_token_id = None  # the padding token's embedding gets no gradient, and this one needs it
    text.vocab_size = width(tokenizer)
    with torch.random.fork_rng([]):
        model = type(old)(config).eval()
    if model.can_generate():
        for role, index in ids.items():
            setattr(model.generation_config, f"{role}_token_id", index)
    own = {id(tensor) for tensor in token_rows(model)}
    known = {**dict(old.named_parameters(remove_duplicate=False)), **dict(old.named_buffers(remove_duplicate=False))}
    with torch.no_grad():
        for name, tensor in [
            *model.named_parameters(remove_duplicate=False),
            *model.named_buffers(remove_duplicate=False),
        ]:
            if id(tensor) in own:
                continue
            if name not in known or known[name].shape != tensor.shape:
                raise MemdecError(
                    f"{type(old).__name__} keeps more of its vocabulary than embeddings and head ({name}), which "
                    "memdec cannot transfer. Make a memory with `memdec fit` instead."
                )
            tensor.copy_(known[name])
    return model


def token_rows(model: Any) -> list[Tensor]:
    """The tensors of `model` that have one row (or number) a token: embeddings, head unless tied, the head's bias."""
    embeddings = cast(nn.Module, model.get_input_embeddings())
    head = output_head(model)
    found: list[Tensor] = []
    for tensor in (getattr(embeddings, "weight", None), head.weight, getattr(head, "bias", None)):
        if isinstance(tensor, Tensor) and all(tensor is not other for other in found):
            found.append(tensor)
    return found


def compose(
    table: Tensor,  # (V, d) float, a row an old token
    pieces: list[list[int]],  # V' lists of old ids
    known: Tensor,  # (n,) int64, the old ids that are tokens
) -> Tensor:  # (V', d)
    """The mean of each list's rows; of all known rows for an empty list."""
    flat = torch.tensor([index for row in pieces for index in row], dtype=torch.long)
    lengths = torch.tensor([len(row) for row in pieces])
    offsets = lengths.cumsum(0) - lengths
    made = nn.functional.embedding_bag(flat, table, offsets, mode="mean")
    made[lengths == 0] = table[known].double().mean(0).to(made)
    return made


def draw(table: Tensor, known: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` rows, drawn with the means and standard deviations that the columns have over the known rows."""
    rows = table[known].double()
    noise = torch.randn(count, table.shape[1], generator=generator, dtype=torch.float64)
    return (rows.mean(0) + noise * rows.std(0)).to(table)


# -- the tokens --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spelling:
    """How a tokenizer writes bytes as the characters of its tokens.

    Attributes:
        byte_level: each byte is one character of GPT-2's alphabet.
        space: the character that stands for a space, where that is not itself (▁).
        byte_tokens: a token <0xNN> is one byte.
    """

    byte_level: bool
    space: str | None
    byte_tokens: bool

    def read(self, token: str) -> bytes:
        """The bytes that a token stands for."""
        if self.byte_level:
            found = [BYTE_OF.get(character) for character in token]
            # A token that is not in the alphabet was added as it stands.
            return token.encode() if None in found else bytes(cast("list[int]", found))
        byte = BYTE_TOKEN.fullmatch(token) if self.byte_tokens else None
        if byte is not None:
            return bytes([int(byte[1], 16)])
        return (token if self.space is None else token.replace(self.space, " ")).encode()

    def write(self, data: bytes) -> str | None:
        """The bytes as the tokenizer's model is given them; None where it takes text, and these bytes are none."""
        if self.byte_level:
            return "".join(CHARACTER_OF[byte] for byte in data)
        try:
            text = data.decode()
        except UnicodeDecodeError:
            return None
        return text if self.space is None else text.replace(" ", self.space)


def byte_alphabet() -> dict[int, str]:
    """GPT-2's alphabet: a printable character for each byte, itself where it is one in Latin-1."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + place) for place, byte in enumerate(others)}


CHARACTER_OF = byte_alphabet()
BYTE_OF = {character: byte for byte, character in CHARACTER_OF.items()}


def find_spelling(tokenizer: Any) -> Spelling:
    """How `tokenizer` writes bytes, from the parts it is made of.

    Raises:
        MemdecError: it does not show its parts, or marks the insides of words (WordPiece), which says nothing of bytes.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise MemdecError(
            f"{type(tokenizer).__name__} does not show how it writes bytes as tokens; memdec needs a fast tokenizer "
            "(one with a tokenizer.json) to transfer a vocabulary."
        )
    state: dict[str, Any] = json.loads(backend.to_str())
    model = state["model"]
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise MemdecError(
            f"{type(tokenizer).__name__} marks which tokens begin or end a word, so its tokens do not stand for bytes; "
            "memdec can transfer byte-level and SentencePiece vocabularies only."
        )
    parts = [part for stage in ("normalizer", "pre_tokenizer", "decoder") for part in parts_of(state.get(stage))]
    kinds = {part.get("type") for part in parts}
    spaces = [part["replacement"] for part in parts if part.get("type") == "Metaspace"]
    for part in parts:
        pattern = part.get("pattern")
        if part.get("type") == "Replace" and isinstance(pattern, dict) and "String" in pattern:
            written, read = pattern["String"], part["content"]
            spaces += [mark for mark, other in ((read, written), (written, read)) if other == " " and len(mark) == 1]
    return Spelling(
        byte_level="ByteLevel" in kinds,
        space=spaces[0] if spaces and "ByteLevel" not in kinds else None,
        byte_tokens=bool(model.get("byte_fallback")) or "ByteFallback" in kinds,
    )


def parts_of(stage: Any) -> list[dict[str, Any]]:
    """The parts of a tokenizer's stage, sequences taken apart."""
    if not isinstance(stage, dict):
        return []
    if stage.get("type") != "Sequence":
        return [stage]
    return [part for value in stage.values() if isinstance(value, list) for inner in value for part in parts_of(inner)]


def special_ids(tokenizer: Any) -> set[int]:
    """The ids of tokens that stand for no text: those with a role, and what was added as special."""
    added = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)


def token_bytes(tokenizer: Any) -> list[bytes | None]:
    """For each id the bytes that its token stands for; None for special tokens, and for ids without a token."""
    spelling, special, added = find_spelling(tokenizer), special_ids(tokenizer), tokenizer.added_tokens_decoder
    found: list[bytes | None] = [None] * width(tokenizer)
    for token, index in tokenizer.get_vocab().items():
        if index not in special and token:
            # What was added to a byte-level vocabulary stands there in plain characters.
            found[index] = token.encode() if spelling.byte_level and index in added else spelling.read(token)
    return found


def find_lineage(old_tokenizer: Any, new_tokenizer: Any) -> Lineage:
    """Of which old tokens each new one is made; see the module's head.

    Raises:
        MemdecError: a tokenizer does not show how it writes bytes.
    """
    old, new = token_bytes(old_tokenizer), token_bytes(new_tokenizer)
    same_bytes = id_of_bytes(old, old_tokenizer)
    pieces: list[list[int]] = [[] for _ in new]
    roles = ids_by_role(old_tokenizer, new_tokenizer)
    for index, source in roles.items():
        pieces[index] = [source]
    spelled = {index: data for index, data in enumerate(new) if data is not None and index not in roles}
    copied = {index: same_bytes[data] for index, data in spelled.items() if data in same_bytes}
    for index, source in copied.items():
        pieces[index] = [source]
    rest = {index: data for index, data in spelled.items() if index not in copied}
    split = split_bytes(list(rest.values()), old_tokenizer, old, same_bytes)
    for index, ids in zip(rest, split, strict=True):
        pieces[index] = ids
    unknown = sum(not row for row in pieces)
    return Lineage(pieces, len(copied), len(roles), len(new) - len(copied) - len(roles) - unknown, unknown)


def id_of_bytes(table: list[bytes | None], tokenizer: Any) -> dict[bytes, int]:
    """The token for each spelling: the lowest id of those that have it, and a byte token only where there is no
    other."""
    vocabulary = {index: token for token, index in tokenizer.get_vocab().items()}
    fallback = find_spelling(tokenizer).byte_tokens

    def rank(index: int) -> tuple[bool, int]:
        return fallback and BYTE_TOKEN.fullmatch(vocabulary[index]) is not None, index

    found: dict[bytes, int] = {}
    for index in sorted((index for index, data in enumerate(table) if data is not None), key=rank):
        found.setdefault(cast(bytes, table[index]), index)
    return found


def ids_by_role(old_tokenizer: Any, new_tokenizer: Any) -> dict[int, int]:
    """For each special token of the new tokenizer that has one like it in the old, that one: by role, else by name."""
    found: dict[int, int] = {}
    for role in ROLES:
        source, target = (getattr(t, f"{role}_token_id", None) for t in (old_tokenizer, new_tokenizer))
        if source is not None and target is not None:
            found.setdefault(target, source)
    named, wanted = (
        {token: index for token, index in tokenizer.get_vocab().items() if index in special}
        for tokenizer, special in ((t, special_ids(t)) for t in (old_tokenizer, new_tokenizer))
    )
    for token, index in wanted.items():
        if token in named:
            found.setdefault(index, named[token])
    return found


def split_bytes(
    wanted: list[bytes],
    tokenizer: Any,
    table: list[bytes | None],  # by id
    same_bytes: dict[bytes, int],
) -> list[list[int]]:
    """Each of `wanted` as `tokenizer` splits it, in tokens that together spell exactly these bytes.

    The whole tokenizer is asked first. One that changes its text (puts a space before it, say) then spells other
    bytes, and its bare model is asked instead; then the single bytes' tokens are taken.
    """
    from tokenizers import Tokenizer

    spelling = find_spelling(tokenizer)
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())  # a copy: padding is switched off in it
    backend.no_padding()
    backend.no_truncation()

    def spells(ids: list[int], data: bytes) -> bool:
        parts = [table[index] for index in ids]
        return None not in parts and b"".join(cast("list[bytes]", parts)) == data

    texts = [as_text(data) for data in wanted]
    whole = iter(backend.encode_batch([text for text in texts if text is not None], add_special_tokens=False))
    found = []
    for data, text in zip(wanted, texts, strict=True):
        ids = [] if text is None else next(whole).ids
        written = spelling.write(data)
        if not spells(ids, data) and written is not None:
            ids = ask_model(backend.model, written)
        if not spells(ids, data):
            ids = [same_bytes[byte] for byte in (bytes([value]) for value in data) if byte in same_bytes]
        found.append(ids)
    return found


def as_text(data: bytes) -> str | None:
    """The bytes as text; None where they are none."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None


def ask_model(model: Any, text: str) -> list[int]:
    """The ids into which a tokenizer's bare model splits `text`, none where it cannot."""
    try:
        return [token.id for token in model.tokenize(text)]
    except Exception as error:  # what the library raises, for a character that it has no token for, has no class
        LOGGER.debug("%r cannot be split: %s", text, error)
        return []
