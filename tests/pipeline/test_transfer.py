"""Transfer: every new row against a brute-force reading of both vocabularies, and a run that was killed against one
that was not."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from memdec import MemdecError, MemoryModel
from memdec.modeling.tokenizers import width
from memdec.pipeline.fit import fit
from memdec.pipeline.transfer import token_bytes, transfer, transfer_vocabulary
from memdec.stores.memory import MemoryCard, read_memory_card, verify_memory, write_memory_card

TEXT = [
    "the court granted a motion before noon, and the tenant's lease (section 12) was recorded.",
    "a witness measured the northern boundary; the clerk withdrew “seven letters” — naïve, at 3.50 € a day…",
    "every juror forgot the deposit: “the old judge” denied an appeal in the second hearing 🙂.",
] * 40
LETTERS = {character: byte for byte, character in bytes_to_unicode().items()}
# GPT-2's way of cutting text before the merges, for the characters of these texts.
WORDS = re.compile(r"'(?:[sdmt]|ll|ve|re)| ?[^\W\d_]+| ?\d+| ?[^\s\w]+|\s+(?!\S)|\s+")


def byte_level(vocab_size: int, special: list[str], texts: list[str] = TEXT) -> Any:
    """GPT-2's kind: every byte a character, words cut apart, tokens of half a character among the merges."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special,
                                                           initial_alphabet=alphabet, show_progress=False))  # fmt: skip
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=special[0])


def sentence_piece(vocab_size: int, *, prefix: bool = False, byte_tokens: bool = True) -> Any:
    """Gemma's kind: ▁ for a space, <0xNN> for what has no token; with `prefix` a space before each text, as Llama 2."""
    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.Replace(" ", "▁")
    learner.pre_tokenizer = pre_tokenizers.Split(Regex("▁?[^▁]+"), "isolated")
    # No €, no 🙂: these are left to the byte tokens.
    plain = [re.sub("[€🙂]", "", text) for text in TEXT]
    learner.train_from_iterator(plain, trainers.BpeTrainer(vocab_size=vocab_size, show_progress=False))
    learned = json.loads(learner.to_str())["model"]
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<reserved>"]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)] if byte_tokens else []
    tokens = [*special, *bytes_, *sorted(learned["vocab"], key=learned["vocab"].get)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = [tuple(merge) for merge in learned["merges"]]
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=byte_tokens))
    if prefix:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
        backend.decoder = decoders.Sequence(
            [decoders.ByteFallback(), decoders.Metaspace(replacement="▁", prepend_scheme="always")]
        )
    else:
        backend.normalizer = normalizers.Replace(" ", "▁")
        backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", bos_token="<bos>", pad_token="<pad>", unk_token="<unk>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<reserved>"]})
    return tokenizer


KINDS: dict[str, Callable[[], Any]] = {
    "bytes": lambda: byte_level(420, ["<|end|>"]),
    "other bytes": lambda: byte_level(480, ["<|end|>", "<|chat|>"], [text.title() for text in TEXT]),
    "pieces": lambda: sentence_piece(200),
    "pieces, prefixed": lambda: sentence_piece(150, prefix=True),
    "pieces, no bytes": lambda: sentence_piece(190, byte_tokens=False),
}
PAIRS = [
    ("bytes", "pieces"),
    ("pieces", "bytes"),
    ("pieces, prefixed", "bytes"),
    ("pieces, no bytes", "bytes"),
    ("bytes", "other bytes"),
    ("pieces, prefixed", "pieces"),
]


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Any]:
    return {name: make() for name, make in KINDS.items()}


def save(folder: Path, model: Any, tokenizer: Any) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# -- brute force -------------------------------------------------------------------------------------------------------


def read_bytes(token: str, kind: str) -> bytes | None:
    """What a token of the tokenizers above stands for, by the rules by which they were built."""
    if token in ("<|end|>", "<|chat|>", "<pad>", "<eos>", "<bos>", "<unk>", "<reserved>"):
        return None
    if "bytes" in kind and "pieces" not in kind:
        return bytes(LETTERS[character] for character in token)
    if len(token) == 6 and token.startswith("<0x"):
        return bytes.fromhex(token[3:5])
    return token.replace("▁", " ").encode()


def merge(symbols: list[str], merges: list[list[str]]) -> list[str]:
    """Byte-pair encoding as first described: the earliest learned pair that is there, its leftmost place, again."""
    order = {tuple(pair): place for place, pair in enumerate(merges)}
    while True:
        pairs = [(order[pair], place) for place, pair in enumerate(itertools.pairwise(symbols)) if pair in order]
        if not pairs:
            return symbols
        _, place = min(pairs)
        symbols = [*symbols[:place], symbols[place] + symbols[place + 1], *symbols[place + 2 :]]


def expected_pieces(old: Any, old_kind: str, new: Any, new_kind: str) -> list[list[int]]:
    """For each new id the old ids whose mean it should get; empty for the mean of all."""
    vocabulary = old.get_vocab()
    merges = json.loads(old.backend_tokenizer.to_str())["model"]["merges"]
    spelled: dict[bytes, list[str]] = {}
    for token in vocabulary:
        data = read_bytes(token, old_kind)
        if data is not None:
            spelled.setdefault(data, []).append(token)
    letters = bytes_to_unicode()
    wanted: list[list[int]] = [[] for _ in range(width(new))]
    for token, index in new.get_vocab().items():
        data = read_bytes(token, new_kind)
        if data is None:
            for role in ("eos", "bos", "pad", "unk"):
                if getattr(new, f"{role}_token_id") == index and getattr(old, f"{role}_token_id") is not None:
                    wanted[index] = [getattr(old, f"{role}_token_id")]
                    break
            else:
                if token in vocabulary and read_bytes(token, old_kind) is None:
                    wanted[index] = [vocabulary[token]]
            continue
        if data in spelled:
            names = sorted(spelled[data], key=lambda name: name.startswith("<0x"))  # a byte token is the last choice
            wanted[index] = [vocabulary[names[0]]]
            continue
        text = data.decode(errors="replace")
        valid = text.encode() == data
        if "pieces" not in old_kind:
            # Text is cut into words first; half a character is no text, and is merged as it is.
            parts = [word.encode() for word in WORDS.findall(text)] if valid else [data]
            found = [piece for part in parts for piece in merge([letters[byte] for byte in part], merges)]
            wanted[index] = [vocabulary[piece] for piece in found]
            continue
        found = merge(list(text.replace(" ", "▁")), merges) if valid else []
        if not valid or (any(piece not in vocabulary for piece in found) and "no bytes" in old_kind):
            found = [name for byte in data for name in byte_names(bytes([byte]), spelled)]
        for piece in found:
            single = [f"<0x{byte:02X}>" for byte in piece.encode()]
            wanted[index] += [vocabulary[name] for name in ([piece] if piece in vocabulary else single)]
    return wanted


def byte_names(byte: bytes, spelled: dict[bytes, list[str]]) -> list[str]:
    """The token of a single byte, a plain one rather than <0xNN>; none where there is none."""
    return sorted(spelled.get(byte, []), key=lambda name: name.startswith("<0x"))[:1]


def expected_rows(table: torch.Tensor, old: Any, wanted: list[list[int]]) -> torch.Tensor:
    """The rows that follow from the pieces, one after another in float64."""
    known = sorted(old.get_vocab().values())
    return torch.stack(
        [sum(table[index].double() for index in row or known) / len(row or known) for row in wanted]  # type: ignore[misc]
    )


# -- tokens and rows ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_each_token_stands_for_its_bytes(kind: str, tokenizers: dict[str, Any]) -> None:
    tokenizer = tokenizers[kind]
    found = token_bytes(tokenizer)
    assert len(found) == width(tokenizer)
    for token, index in tokenizer.get_vocab().items():
        assert found[index] == read_bytes(token, kind), token
    # And what they spell is the text.
    for text in ["“seven letters” — 3.50 € a day 🙂", "\tnaïve\n\n", "the  tenant"]:
        if "no bytes" in kind:
            continue
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        spelled = b"".join(found[index] or b"?" for index in ids)
        assert spelled == (" " if "prefixed" in kind else "").encode() + text.encode()


def test_added_tokens_stand_as_they_are() -> None:
    """What a user adds stands in plain characters, even those of the byte alphabet; special tokens for no bytes."""
    tokenizer = byte_level(420, ["<|end|>"])
    tokenizer.add_tokens(["é <tag>", "<é>"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|tool|>"]})
    found = token_bytes(tokenizer)
    assert found[tokenizer.convert_tokens_to_ids("é <tag>")] == "é <tag>".encode()
    assert found[tokenizer.convert_tokens_to_ids("<é>")] == "<é>".encode()
    assert found[tokenizer.convert_tokens_to_ids("<|tool|>")] is None


@pytest.mark.parametrize(("old", "new"), PAIRS)
def test_rows_are_the_brute_force_means(
    old: str, new: str, tokenizers: dict[str, Any], tiny_llama: Callable[..., Any], tmp_path: Path
) -> None:
    source, target = tokenizers[old], tokenizers[new]
    vocab = width(source) + 5  # padded, as many models are: these rows are no tokens
    model = tiny_llama(vocab=vocab, tie_word_embeddings=False, eos_token_id=source.eos_token_id)
    model.model.embed_tokens.weight.data[-5:] = 1e4
    save(tmp_path / "old", model, source)
    target.save_pretrained(tmp_path / "new")
    start = transfer_vocabulary(tmp_path / "old", tmp_path / "new", tmp_path / "start")
    made = AutoModelForCausalLM.from_pretrained(start.folder, dtype=torch.float32)
    wanted = expected_pieces(source, old, target, new)
    # The grid must have all four kinds of tokens somewhere, and tokens of several pieces everywhere.
    assert sum(len(row) > 1 for row in wanted) > 10
    assert start.tokens == len(wanted) == made.config.vocab_size == width(target)
    single = sum(len(row) == 1 for row in wanted) - stand_ins(wanted, source, old, target, new)
    assert start.copied + start.by_role == single
    assert start.unknown == sum(not row for row in wanted)
    assert start.copied + start.by_role + start.composed + start.unknown == start.tokens
    for before, after in [
        (model.model.embed_tokens.weight, made.model.embed_tokens.weight),
        (model.lm_head.weight, made.lm_head.weight),
    ]:
        torch.testing.assert_close(after.double(), expected_rows(before, source, wanted), rtol=1e-5, atol=1e-6)
    for name, tensor in model.model.layers.state_dict().items():
        assert torch.equal(tensor, made.model.layers.state_dict()[name]), name
    assert torch.equal(model.model.norm.weight, made.model.norm.weight)


def stand_ins(wanted: list[list[int]], source: Any, old: str, target: Any, new: str) -> int:
    """Tokens that are left one piece though their bytes are not that piece's: what is lost had no token."""
    names = {index: token for token, index in source.get_vocab().items()}
    return sum(
        len(row) == 1 and (data := read_bytes(token, new)) is not None and read_bytes(names[row[0]], old) != data
        for token, index in target.get_vocab().items()
        for row in [wanted[index]]
    )


def families() -> dict[str, Callable[[], Any]]:
    """Tiny models of 420 tokens whose embeddings and heads differ in kind."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig, PhiConfig, PhiForCausalLM

    common: dict[str, Any] = {
        "vocab_size": 420, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 3, "initializer_range": 0.3,
    }  # fmt: skip

    def phi() -> Any:
        model = PhiForCausalLM(PhiConfig(**common, tie_word_embeddings=False))
        torch.nn.init.normal_(model.lm_head.bias)
        return model

    def gemma() -> Any:  # scales its embeddings within the model
        return Gemma3ForCausalLM(Gemma3TextConfig(**common, head_dim=8, final_logit_softcapping=30.0))

    return {"phi, with a head's bias": phi, "gemma, scaled and tied": gemma}


@pytest.mark.parametrize("family", ["llama", "llama, untied", "gpt2", *families()])
def test_on_shared_tokens_it_says_what_the_memory_said(
    family: str, tokenizers: dict[str, Any], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Text of tokens that both vocabularies have gives the same logits for these, whatever the model does to them."""
    torch.manual_seed(0)
    if family in families():
        model = families()[family]().eval()
    else:
        name, _, untied = family.partition(", ")
        model = request.getfixturevalue(f"tiny_{name}")(vocab=420, tie_word_embeddings=not untied)
    source, target = tokenizers["bytes"], tokenizers["other bytes"]
    save(tmp_path / "old", model, source)
    target.save_pretrained(tmp_path / "new")
    transfer_vocabulary(tmp_path / "old", tmp_path / "new", tmp_path / "start")
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "start", dtype=torch.float32)
    shared = sorted(source.get_vocab().keys() & target.get_vocab().keys())
    olds, news = (torch.tensor([t.get_vocab()[token] for token in shared]) for t in (source, target))
    assert 256 < len(shared) < 420 and not torch.equal(olds, news)
    place = torch.randint(len(shared), (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        said, says = model(olds[place]).logits[..., olds], made(news[place]).logits[..., news]
    torch.testing.assert_close(says, said, rtol=1e-4, atol=1e-4)
    assert float(said.std()) > 0.1
    assert model.config.tie_word_embeddings == made.config.tie_word_embeddings


def test_the_configuration_speaks_of_the_new_tokens(
    tokenizers: dict[str, Any], tiny_llama: Callable[..., Any], tmp_path: Path
) -> None:
    save(tmp_path / "old", tiny_llama(vocab=420, pad_token_id=7), tokenizers["bytes"])
    for kind in ("pieces", "other bytes"):
        tokenizer = tokenizers[kind]
        tokenizer.save_pretrained(tmp_path / kind)
        transfer_vocabulary(tmp_path / "old", tmp_path / kind, tmp_path / "start")  # a second one replaces the first
        made = AutoModelForCausalLM.from_pretrained(tmp_path / "start")
        for role in ("bos", "eos", "pad"):
            name = f"{role}_token_id"
            told = [getattr(source, name) for source in (tokenizer, made.config, made.generation_config)]
            assert told[0] == told[1] == told[2], role
        # The old padding row is a token like any other now, and gets its gradient.
        assert made.model.embed_tokens.padding_idx == tokenizer.pad_token_id != 7
        assert AutoTokenizer.from_pretrained(tmp_path / "start").get_vocab() == tokenizer.get_vocab()


def test_a_token_that_ends_texts_and_pads_is_trained(
    tokenizers: dict[str, Any], tiny_llama: Callable[..., Any], tmp_path: Path
) -> None:
    save(tmp_path / "old", tiny_llama(vocab=420), tokenizers["bytes"])
    target = byte_level(440, ["<|stop|>"])
    target.pad_token = target.eos_token
    target.save_pretrained(tmp_path / "new")
    transfer_vocabulary(tmp_path / "old", tmp_path / "new", tmp_path / "start")
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "start")
    assert made.model.embed_tokens.padding_idx is None
    assert made.generation_config.pad_token_id == made.config.eos_token_id == 0


def test_random_keeps_the_trunk_and_draws_the_rest(
    tokenizers: dict[str, Any], tiny_llama: Callable[..., Any], tmp_path: Path
) -> None:
    model = tiny_llama(vocab=420)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(torch.linspace(0.5, 2, 32)).add_(torch.linspace(-3, 3, 32))
    save(tmp_path / "old", model, tokenizers["bytes"])
    tokenizers["pieces"].save_pretrained(tmp_path / "new")
    made = []
    for seed in (0, 0, 1):
        transfer_vocabulary(tmp_path / "old", tmp_path / "new", tmp_path / "start", how="random", seed=seed)
        made.append(AutoModelForCausalLM.from_pretrained(tmp_path / "start", dtype=torch.float32))
    rows = [m.model.embed_tokens.weight.detach().double() for m in made]
    assert torch.equal(rows[0], rows[1]) and not torch.equal(rows[0], rows[2])
    assert all(torch.equal(t, made[2].model.layers.state_dict()[n]) for n, t in model.model.layers.state_dict().items())
    old = model.model.embed_tokens.weight.detach().double()
    # n draws: the mean's error is s/√n, the standard deviation's s/√2n; 6 of them among 64 figures: false alarm 1e-7.
    n, spread = rows[0].shape[0], old.std(0)
    assert ((rows[0].mean(0) - old.mean(0)).abs() < 6 * spread / n**0.5).all()
    assert ((rows[0].std(0) - spread).abs() < 6 * spread / (2 * n) ** 0.5).all()
    # Drawn, not copied: no old row comes back.
    assert float(torch.cdist(rows[0], old).min()) > 1e-3


def test_what_cannot_be_transferred_is_refused(
    tokenizers: dict[str, Any], tiny_llama: Callable[..., Any], tmp_path: Path
) -> None:
    old = save(tmp_path / "old", tiny_llama(vocab=420), tokenizers["bytes"])
    tokenizers["pieces"].save_pretrained(tmp_path / "new")
    save(tmp_path / "narrow", tiny_llama(vocab=400), tokenizers["bytes"])
    words = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="[UNK]").save_pretrained(tmp_path / "words")
    for source, to, how, said in [
        (old, old, "pieces", "have the same tokens, so there is nothing to transfer"),
        (old, tmp_path / "new", "mean", "--how mean: wanted one of pieces, random"),
        (tmp_path / "narrow", tmp_path / "new", "pieces", "embeddings for 400 tokens, but its tokenizer has 413"),
        (old, tmp_path / "words", "pieces", "marks which tokens begin or end a word"),
        (old, tmp_path / "nothing", "pieces", "nothing does not exist"),
    ]:
        with pytest.raises(MemdecError, match=re.escape(said)):
            transfer_vocabulary(source, to, tmp_path / "out", how=how)
        assert not (tmp_path / "out").exists()


# -- the whole run -----------------------------------------------------------------------------------------------------

FIT: dict[str, Any] = {
    "context": 40, "k": 16, "epochs": 2, "batch_size": 2, "learning_rate": 3e-3, "beta": 0.25, "max_tokens": 2500,
    "device": "cpu", "dtype": "float32", "tensorboard": False,
}  # fmt: skip
OPTIONS: dict[str, Any] = {
    "k": 16, "device": "cpu", "dtype": "float32", "tensorboard": False, "max_tokens": 2500, "save_every": 2,
}  # fmt: skip

# Kills itself, and leaves what a power cut would, at the given moment: while the start is written, or in a step.
KILLED = """
import json, os, signal, sys
import torch
from memdec.pipeline import train, transfer

memory, to, text, out, moment, options = *sys.argv[1:6], json.loads(sys.argv[6])
torch.set_num_threads(2)
die = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
if moment == "start":
    original = transfer.write_folder
    transfer.write_folder = lambda path, fill: original(path, lambda folder: (fill(folder), die()))
else:
    step = train.one_step
    train.one_step = lambda run, *rest: die() if run.step == 5 else step(run, *rest)
transfer.transfer(memory, to, text, out, **options)
"""


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory, tokenizers: dict[str, Any], tiny_llama: Callable[..., Any]) -> Path:
    """A folder with text, a memory of byte-level tokens and another base, of SentencePiece ones. Shared."""
    folder = tmp_path_factory.mktemp("transfer")
    (folder / "text").mkdir()
    for index in range(30):
        words = " ".join(TEXT[:3]).split()[index % 11 :: 1 + index % 3]
        (folder / "text" / f"doc{index:02d}.txt").write_text(" ".join(words * 2) + f" {index}.")
    old = save(folder / "old-base", tiny_llama(vocab=420), tokenizers["bytes"])
    target = tokenizers["pieces"]
    save(folder / "new-base", tiny_llama(vocab=width(target), hidden=48, seed=3, eos_token_id=1), target)
    fit(old, folder / "text", folder / "run", fractions=(0.7, 0.15, 0.15), **FIT)
    return folder


@pytest.fixture(scope="module")
def undisturbed(room: Path) -> Path:
    torch.set_num_threads(2)
    made = transfer(room / "run/memory", room / "new-base", room / "text", room / "whole", share=0.25,
                    fractions=(0.7, 0.15, 0.15), **OPTIONS)  # fmt: skip
    assert made == room / "whole" / "memory"
    return room / "whole"


def content(folder: Path) -> dict[str, bytes]:
    """Every file with its bytes; log.jsonl without its clock's figures."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    lines = [json.loads(line) for line in found.pop("training/log.jsonl").splitlines()]
    timeless = [{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second")} for line in lines]
    return {**found, "log": json.dumps(timeless).encode()}


def test_the_run_makes_a_memory_of_the_other_model(room: Path, undisturbed: Path, tokenizers: dict[str, Any]) -> None:
    own, made = (read_memory_card(folder / "memory") for folder in (room / "run", undisturbed))
    assert made.provenance["total_steps"] == round(0.25 * own.provenance["total_steps"]) >= 6
    for name in ("context", "batch_size", "learning_rate", "beta", "schedule", "warmup", "weight_decay"):
        assert made.provenance[name] == own.provenance[name] == FIT.get(name, own.provenance[name]), name
    origin = made.provenance["transfer"]
    assert origin["memory"] == "memory" and origin["how"] == "pieces"
    assert origin["tokens"] == width(tokenizers["pieces"]) and origin["copied"] > 100
    assert verify_memory(undisturbed / "memory") == []
    # It is a memory of the other base: it can be attached to it, and not to the old one.
    mixed = MemoryModel.from_pretrained(str(room / "new-base"), str(undisturbed / "memory"))
    assert mixed.alpha == made.alpha
    ids = torch.tensor([tokenizers["pieces"]("the court")["input_ids"]])
    assert mixed.generate(input_ids=ids, max_new_tokens=3, do_sample=False).shape == (1, ids.shape[1] + 3)
    with pytest.raises(MemdecError, match="different tokenizers"):
        MemoryModel.from_pretrained(str(room / "old-base"), str(undisturbed / "memory"))
    # Six steps help the base on text that was held out.
    figures = made.provenance["figures"]
    assert made.alpha > 0 and figures["mixture_perplexity"] < figures["base_perplexity"]


@pytest.mark.parametrize("moment", ["start", "training"])
def test_killed_it_goes_on_and_ends_with_the_same_bytes(
    moment: str, room: Path, undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "killed"
    arguments = [str(room / "run/memory"), str(room / "new-base"), str(room / "text"), str(out)]
    options: dict[str, Any] = {"share": 0.25, "fractions": (0.7, 0.15, 0.15), **OPTIONS}
    done = subprocess.run(
        [sys.executable, "-c", KILLED, *arguments, moment, json.dumps(options)],
        capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "2"},
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    if moment == "start":
        assert not (out / "start").exists() and list(out.glob(".start.*.tmp"))
    else:
        assert list((out / "training").glob("checkpoint-*"))
    transfer(*arguments, **options)
    want, got = content(undisturbed), content(out)
    assert got.keys() == want.keys()
    assert [name for name in want if got[name] != want[name]] == []


def test_a_second_run_changes_nothing_and_another_is_refused(room: Path, undisturbed: Path) -> None:
    before = content(undisturbed)
    options: dict[str, Any] = {"share": 0.25, "fractions": (0.7, 0.15, 0.15), **OPTIONS}
    arguments = (room / "run/memory", room / "new-base", room / "text", undisturbed)
    written = (undisturbed / "start" / "model.safetensors").stat().st_mtime_ns
    transfer(*arguments, **options)
    assert content(undisturbed) == before
    assert (undisturbed / "start" / "model.safetensors").stat().st_mtime_ns == written
    for changed, said in [({"how": "random"}, 'how was "pieces", now "random"'), ({"share": 0.1}, "max_steps was")]:
        with pytest.raises(MemdecError, match=said):
            transfer(*arguments, **{**options, **changed})
    assert content(undisturbed) == before


def test_given_settings_overrule_the_memorys(room: Path, tmp_path: Path) -> None:
    made = transfer(room / "run/memory", room / "new-base", room / "text", tmp_path / "out", max_steps=1, context=32,
                    learning_rate=1e-3, beta=1.0, fractions=(0.7, 0.15, 0.15), **OPTIONS)  # fmt: skip
    told = read_memory_card(made).provenance
    assert (told["total_steps"], told["context"], told["learning_rate"], told["beta"]) == (1, 32, 1e-3, 1.0)
    assert told["batch_size"] == FIT["batch_size"]


def test_bad_requests_leave_nothing(room: Path, tmp_path: Path) -> None:
    silent = tmp_path / "silent"
    silent.mkdir()
    for file in (room / "run/memory").iterdir():
        if file.name != "memory_config.json":
            (silent / file.name).write_bytes(file.read_bytes())
    write_memory_card(silent, MemoryCard(0.5, "", 420))
    memory = room / "run/memory"
    cases: list[tuple[Path, Path, dict[str, Any], str]] = [
        (room / "old-base", room / "new-base", {}, "old-base is no memory: it has no memory_config.json"),
        (memory, room / "old-base", {}, "have the same tokens, so there is nothing to transfer"),
        (memory, room / "new-base", {"share": 0.0}, "--share is 0; wanted a share above 0"),
        (memory, room / "new-base", {"share": float("nan")}, "--share is nan"),
        (memory, room / "new-base", {"how": "magic"}, "--how magic: wanted one of pieces, random"),
        (memory, room / "no-base", {}, "no-base does not exist"),
        (silent, room / "new-base", {}, "how many steps it was trained for; give their number with --steps"),
    ]
    for source, to, options, said in cases:
        with pytest.raises(MemdecError, match=re.escape(said)):
            transfer(source, to, room / "text", tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()


def test_what_several_processes_shared_is_done_in_turn() -> None:
    from memdec.pipeline.transfer import inherited_settings

    told = {"batch_size": 4, "gradient_accumulation": 2, "processes": 3, "context": 64, "stride": 8}
    card = MemoryCard(0.5, "", 1, told)
    assert inherited_settings(card, None) == {"batch_size": 4, "gradient_accumulation": 6, "context": 64, "stride": 8}
    # A stride belongs to its context.
    assert inherited_settings(card, 32) == {"batch_size": 4, "gradient_accumulation": 6}


def test_the_command(room: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from memdec.cli import main

    def call(*arguments: str) -> int:
        with pytest.raises(SystemExit) as stopped:
            main(list(arguments))
        return int(stopped.value.code or 0)

    assert call("transfer", "--help") == 0
    printed = capsys.readouterr().out
    for word in ("--share", "--how", "--steps", "--learning-rate", "Examples:"):
        assert word in printed
    out = tmp_path / "out"
    rest = ["--to", str(room / "new-base"), "--corpus", str(room / "text"), "--out", str(out)]
    small = ["--steps", "2", "--k", "8", "--max-tokens", "1500", "--fractions", "0.7,0.15,0.15", "--dtype", "float32"]
    assert call("--quiet", "transfer", str(room / "run/memory"), *rest, *small) == 0
    assert f"Memory: {out / 'memory'}" in capsys.readouterr().out
    assert read_memory_card(out / "memory").provenance["total_steps"] == 2
    assert call("--quiet", "transfer", str(room / "old-base"), *rest) == 1
    assert "is no memory" in capsys.readouterr().err
