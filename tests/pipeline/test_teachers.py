"""Teachers other than the retriever, against dense distributions computed here window by window."""

from __future__ import annotations

import pytest
import torch

from memdec.distributions import SparseDistributions
from memdec.errors import MemdecError
from memdec.pipeline import teachers
from memdec.pipeline.corpus import build_corpus
from memdec.pipeline.distributions import build_distributions
from memdec.pipeline.embed import build_datastore
from memdec.pipeline.teachers import build_teacher, interpolated, most_probable, one_hot
from memdec.stores.distribution_store import DistributionStore
from memdec.stores.windows import windows

CONTEXT = 24
TOP_K = 20
# float16 keeps eleven bits, and the writer rescales a row to what it should sum to.
CODED = {"rtol": 2e-3, "atol": 1e-6}


@pytest.fixture(scope="module")
def parts(tmp_path_factory, tiny_model_dir, make_text):
    """A corpus, and the retriever's distributions over it."""
    root = tmp_path_factory.mktemp("teachers")
    (root / "text").mkdir()
    for index in range(12):
        (root / "text" / f"d{index:02d}.txt").write_text(make_text(8, index))
    corpus = build_corpus(root / "text", str(tiny_model_dir), root / "corpus", fractions=(0.7, 0.3, 0.0))
    datastore = build_datastore(str(tiny_model_dir), corpus, root / "datastore", context=CONTEXT)
    knn = build_distributions(datastore, root / "distributions", k=16)
    return corpus, knn


def dense_of_model(model, tokens: torch.Tensor, context: int) -> torch.Tensor:
    """softmax of the model's logits at every row, each window by itself, float64 (rows, V)."""
    rows = []
    for window in windows(tokens.numel(), context):
        with torch.no_grad():
            logits = model(input_ids=tokens[None, window.start : window.stop - 1].long()).logits[0]
        rows.append(logits[window.score_from - window.start :].double().softmax(1))
    return torch.cat(rows)


def kept(dense: torch.Tensor, top_k: int) -> torch.Tensor:
    """The `top_k` largest of each row, zero elsewhere."""
    values, ids = dense.topk(top_k, dim=1)
    return torch.zeros_like(dense).scatter_(1, ids, values)


def test_the_language_model_s_own_distribution(parts, tmp_path, tiny_model_dir, tiny_llama):
    corpus, _ = parts
    train = corpus.split("train").tokens
    made = build_teacher("lm", corpus, tmp_path / "lm", model=tiny_model_dir, top_k=TOP_K, context=CONTEXT,
                         dtype="float32", codec="float16")  # fmt: skip
    whole = made.slice(0, made.num_rows)
    expected = kept(dense_of_model(tiny_llama(), train, CONTEXT), TOP_K)
    assert made.num_rows == train.numel() - 1
    torch.testing.assert_close(whole.to_dense(torch.float64), expected, **CODED)
    torch.testing.assert_close(whole.residual.double(), 1 - expected.sum(1), rtol=0, atol=1e-5)


def test_the_interpolated_knn_lm(parts, tmp_path, tiny_model_dir, tiny_llama):
    corpus, knn = parts
    train = corpus.split("train").tokens
    made = build_teacher("knn-lm", corpus, tmp_path / "mixed", model=tiny_model_dir, knn=knn, weight=0.3, top_k=TOP_K,
                         dtype="float32", codec="float16")  # fmt: skip
    lm = kept(dense_of_model(tiny_llama(), train, CONTEXT), TOP_K)
    near = knn.slice(0, knn.num_rows).to_dense(torch.float64)
    expected = torch.where((near.sum(1) > 0)[:, None], 0.3 * near + 0.7 * lm, lm)
    torch.testing.assert_close(made.slice(0, made.num_rows).to_dense(torch.float64), expected, **CODED)


def test_the_tuned_weight_is_the_default(parts, tmp_path, tiny_model_dir):
    corpus, knn = parts
    made = build_teacher("knn-lm", corpus, tmp_path / "mixed", model=tiny_model_dir, knn=knn)
    assert made.manifest.fields["weight"] == knn.manifest.results["knn_lm"]["weight"]
    assert made.manifest.fields["context"] == CONTEXT


def test_a_row_without_neighbours_is_the_model_s_alone():
    lm = SparseDistributions.from_dense(torch.tensor([[0.5, 0.25, 0.25], [0.25, 0.75, 0.0]]))
    knn = SparseDistributions.from_dense(torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.5, 0.5]]))
    expected = torch.tensor([[0.5, 0.25, 0.25], [0.125, 0.625, 0.25]])
    torch.testing.assert_close(interpolated(knn, lm, 0.5).validate().to_dense(), expected)


def test_the_mass_that_is_cut_is_mixed_too():
    lm = most_probable(torch.tensor([[2.0, 1.0, 0.0, -1.0]]), 2)
    knn = SparseDistributions(torch.tensor([0, 1]), torch.tensor([3], dtype=torch.int32), torch.tensor([0.8]), 4,
                              torch.tensor([0.2]))  # fmt: skip
    mixed = interpolated(knn, lm, 0.25)
    cut = float(torch.tensor([2.0, 1.0, 0.0, -1.0]).softmax(0)[2:].sum())
    assert float(mixed.residual[0]) == pytest.approx(0.25 * 0.2 + 0.75 * cut, abs=1e-6)
    assert float(mixed.probs.sum()) == pytest.approx(1 - float(mixed.residual[0]), abs=1e-6)


def test_one_hot_rows_are_the_labels(parts, tmp_path):
    corpus, _ = parts
    train = corpus.split("train").tokens
    made = build_teacher("one-hot", corpus, tmp_path / "one-hot")
    whole = made.slice(0, made.num_rows)
    assert whole.token_ids.tolist() == train[1:].tolist()
    assert whole.probs.tolist() == [1.0] * made.num_rows
    assert one_hot(torch.tensor([2, 0]), 3).to_dense().tolist() == [[0, 0, 1], [1, 0, 0]]


def test_a_killed_run_ends_with_the_same_bytes(parts, tmp_path, tiny_model_dir, monkeypatch):
    corpus, _ = parts
    monkeypatch.setattr(teachers, "DistributionWriter", short_shards(teachers.DistributionWriter))

    def build(name: str) -> DistributionStore:
        return build_teacher("lm", corpus, tmp_path / name, model=tiny_model_dir, top_k=TOP_K, context=CONTEXT,
                             batch_size=3)  # fmt: skip

    build("whole")
    real = teachers.most_probable
    calls = []

    def failing(logits: torch.Tensor, top_k: int) -> SparseDistributions:
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return real(logits, top_k)

    monkeypatch.setattr(teachers, "most_probable", failing)
    with pytest.raises(KeyboardInterrupt):
        build("killed")
    done = len(list((tmp_path / "killed").glob("shard-*")))
    monkeypatch.setattr(teachers, "most_probable", real)
    build("killed")
    names = sorted(path.name for path in (tmp_path / "whole").iterdir() if not path.name.startswith("."))
    assert 0 < done < len(names) - 1, "the run was not stopped half way"
    for name in names:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes(), name


def short_shards(writer):
    """The writer with shards of 100 rows, so that a tiny corpus has several, cut within batches."""
    return lambda *arguments, **named: writer(*arguments, **named, rows_per_shard=100)


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("nonsense", {}, "--teacher is 'nonsense'"),
        ("lm", {}, "--model"),
        ("lm", {"model": "M", "top_k": 0}, "--top-k is 0"),
        ("lm", {"model": "M", "top_k": 385}, "--top-k is 385"),
        ("knn-lm", {"model": "M"}, "retriever"),
        ("knn-lm", {"model": "M", "knn": "K", "weight": 1.5}, "--weight is 1.5"),
    ],
)
def test_refusals(parts, tmp_path, tiny_model_dir, kind, options, words):
    corpus, knn = parts
    given = {"M": tiny_model_dir, "K": knn}
    options = {name: given.get(value, value) for name, value in options.items()}
    with pytest.raises(MemdecError, match=words):
        build_teacher(kind, corpus, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_another_tokenizer_is_refused(parts, tmp_path, make_tokenizer, tiny_llama):
    corpus, _ = parts
    tiny_llama().save_pretrained(tmp_path / "other")
    make_tokenizer(seed=3).save_pretrained(tmp_path / "other")
    with pytest.raises(MemdecError, match="another tokenizer"):
        build_teacher("lm", corpus, tmp_path / "out", model=tmp_path / "other")


@pytest.mark.parametrize(("teacher", "needs_datastore"), [("lm", False), ("one-hot", False), ("knn-lm", True)])
def test_fit_with_another_teacher(tmp_path, tiny_model_dir, make_text, teacher, needs_datastore):
    from memdec.pipeline.fit import fit
    from memdec.stores.memory import is_memory

    (tmp_path / "text").mkdir()
    for index in range(10):
        (tmp_path / "text" / f"d{index:02d}.txt").write_text(make_text(8, index))
    memory = fit(tiny_model_dir, tmp_path / "text", tmp_path / "run", fractions=(0.7, 0.3, 0.0), context=CONTEXT, k=8,
                 teacher=teacher, max_steps=2)  # fmt: skip
    assert is_memory(memory)
    assert (tmp_path / "run" / "datastore").exists() == needs_datastore
    assert DistributionStore.open(tmp_path / "run" / f"teacher-{teacher}").manifest.fields["teacher"] == teacher
