"""What all tests share: tiny models with random weights, a tiny tokenizer, a tiny corpus, and the one real model."""

from __future__ import annotations

import importlib.util
import itertools
import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Test processes share two cores. OpenMP's threads spin while they wait for each other, and where one of them waits for
# a core the others burn it: a test of seconds takes minutes. Asleep they cost nothing. Read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

SUBJECTS = ["the court", "a tenant", "the clerk", "one witness", "the old judge", "every juror", "the surveyor"]
VERBS = ["granted", "denied", "recorded", "questioned", "withdrew", "measured", "forgot"]
OBJECTS = ["the lease", "a motion", "seven letters", "the northern boundary", "an appeal", "the deposit", "his notes"]
ENDS = ["before noon", "without delay", "in the second hearing", "under section 12", "at 3.50 a day", "twice"]
EOS = "<|end|>"
PAD = "<|pad|>"


def sentences(count: int, seed: int) -> str:
    """Text with structure enough that a tiny model can learn something of it."""
    draw = random.Random(seed)
    return " ".join(
        f"{draw.choice(SUBJECTS)} {draw.choice(VERBS)} {draw.choice(OBJECTS)} {draw.choice(ENDS)}.".capitalize()
        for _ in range(count)
    )


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--cuda",
        choices=["auto", "host"],
        default="auto",
        help="host: run the CUDA kernels on the CPU, as built by `make test-cuda-host`",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--cuda") == "host":
        run_kernels_on_the_host(config.rootpath / "build" / "cuda-host")


def run_kernels_on_the_host(build: Path) -> None:
    """Give CPU tensors to the CUDA kernels, which csrc/cuda and tests/cuda/host make run on the CPU.

    Threads and blocks run forwards, backwards and in random orders by turns, so that no result can lean on one of them;
    MEMDEC_EXECUTOR_ORDER asks for one order. float64 has no CUDA kernels and stays with the CPU's.
    """
    (extension,) = build.glob("_C.*.so")
    spec = importlib.util.spec_from_file_location("memdec._C", extension)
    assert spec is not None and spec.loader is not None
    sys.modules["memdec._C"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["memdec._C"])

    from memdec.ops import launch

    turns = itertools.chain.from_iterable(("forward", "reverse", str(seed)) for seed in itertools.count())
    on_cpu = launch.run
    name = "MEMDEC_EXECUTOR_ORDER"

    def run(op: Callable[..., int], device: torch.device, *arguments: Any) -> None:
        if any(isinstance(value, tuple) and len(value) == 7 and value[1] == 3 for value in arguments):
            return on_cpu(op, device, *arguments)
        asked_for = os.environ.get(name)
        os.environ[name] = asked_for or next(turns)
        try:
            wanted = op(*arguments, (0, 0, 0, 0))
            if wanted:
                workspace = torch.full((wanted,), 255, dtype=torch.uint8)  # NaN, -1: nobody counts on zeros
                op(*arguments, (0, 0, workspace.data_ptr(), wanted))
        finally:
            if asked_for is None:
                del os.environ[name]

    launch.run = run


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what CUDA kernels have no part in: float64, and with --cuda=host every test that has no `device`."""
    host = config.getoption("--cuda") == "host"

    def is_wanted(item: pytest.Item) -> bool:
        values = list(item.callspec.params.values()) if hasattr(item, "callspec") else []
        if host and "device" not in getattr(item, "fixturenames", ()):
            return False
        return not ((host or "cuda" in values) and any(value is torch.float64 for value in values))

    kept = [item for item in items if is_wanted(item)]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
    items[:] = kept


@pytest.fixture(autouse=True)
def two_threads() -> None:
    """The tests run on two cores, and their figures must not depend on the machine's number of them."""
    torch.set_num_threads(2)


@pytest.fixture
def simd(request: pytest.FixtureRequest) -> Iterator[str]:
    """The SIMD level that a test is parametrised with; skipped where it was not built or the machine has not got it."""
    from memdec import _C, build_info

    before = build_info()["simd"]
    try:
        _C.set_simd_level(request.param)
    except ValueError:
        pytest.skip(f"no {request.param} here")
    yield request.param
    _C.set_simd_level(before)


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., Any]:
    """make_tokenizer(vocab_size=384, seed=0, pad=False): a byte-level BPE tokenizer trained here, with an EOS token.

    `vocab_size` counts the special tokens; other seeds train on other text and so give other tokens.
    """

    def make(vocab_size: int = 384, seed: int = 0, pad: bool = False) -> Any:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
        from transformers import PreTrainedTokenizerFast

        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        special = [EOS, PAD] if pad else [EOS]
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator([sentences(400, seed)], trainer)
        assert backend.get_vocab_size() == vocab_size, "the text is too small for so many tokens"
        return PreTrainedTokenizerFast(
            tokenizer_object=backend, eos_token=EOS, pad_token=PAD if pad else None, padding_side="left"
        )

    return make


@pytest.fixture(scope="session")
def tiny_tokenizer(make_tokenizer: Callable[..., Any]) -> Any:
    """A byte-level BPE tokenizer of 384 tokens, EOS among them (id 0), no padding token."""
    return make_tokenizer()


@pytest.fixture(scope="session")
def tiny_llama() -> Callable[..., Any]:
    """tiny_llama(vocab=384, layers=2, hidden=32, seed=0, **config): a LlamaForCausalLM, random weights, float32."""

    def make(vocab: int = 384, layers: int = 2, hidden: int = 32, seed: int = 0, **config: Any) -> Any:
        from transformers import LlamaConfig, LlamaForCausalLM

        settings: dict[str, Any] = {
            "vocab_size": vocab,
            "hidden_size": hidden,
            "intermediate_size": 2 * hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "tie_word_embeddings": True,
            "bos_token_id": None,
            "eos_token_id": 0,
            "initializer_range": 0.3,  # wide enough that the distributions are far from flat
        }
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**{**settings, **config})).eval()

    return make


@pytest.fixture(scope="session")
def tiny_gpt2() -> Callable[..., Any]:
    """tiny_gpt2(vocab=384, layers=2, hidden=32, seed=0, **config): a GPT2LMHeadModel, random weights, float32."""

    def make(vocab: int = 384, layers: int = 2, hidden: int = 32, seed: int = 0, **config: Any) -> Any:
        from transformers import GPT2Config, GPT2LMHeadModel

        settings: dict[str, Any] = {
            "vocab_size": vocab,
            "n_embd": hidden,
            "n_layer": layers,
            "n_head": 4,
            "n_positions": 256,
            "bos_token_id": None,
            "eos_token_id": 0,
            "initializer_range": 0.3,
        }
        torch.manual_seed(seed)
        return GPT2LMHeadModel(GPT2Config(**{**settings, **config})).eval()

    return make


@pytest.fixture(scope="session")
def tiny_model_dir(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any, tiny_llama: Callable[..., Any]
) -> Path:
    """A transformers folder: tiny llama (2 layers, 32 wide, 384 tokens) with its tokenizer. Shared: do not write."""
    folder = tmp_path_factory.mktemp("tiny-model")
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def make_text() -> Callable[[int, int], str]:
    """make_text(count, seed): so many sentences that a tiny model can learn something of."""
    return sentences


@pytest.fixture
def tiny_corpus_dir(tmp_path: Path) -> Path:
    """A folder of 40 small .txt documents, all different, about 25,000 characters in all."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for index in range(40):
        (folder / f"doc{index:02d}.txt").write_text(sentences(8 + index % 9, seed=1000 + index) + "\n")
    return folder


@pytest.fixture(scope="session")
def smollm2_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M as a plain transformers folder in bfloat16 (tests marked `real` only)."""
    from memdec.demo import smollm2_folder

    return Path(smollm2_folder(tmp_path_factory.mktemp("smollm2")))


@pytest.fixture(scope="session")
def small_demo(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, dict[str, Path]]:
    """The demo on 26k tokens, all of it: its folder, its evaluation, the files of that (`real` tests only)."""
    from memdec.demo import run as demo_run

    folder = tmp_path_factory.mktemp("demo") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_run, "smollm2_folder", lambda cache: smollm2_path)
        result, paths = demo_run.run_demo(folder, max_tokens=26_000, say=lambda line: None)
    return folder, result, paths
