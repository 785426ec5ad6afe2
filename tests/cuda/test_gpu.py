"""What only a real GPU shows: graphs, streams, several devices, compiled code, and what a replayed sampler draws."""

from __future__ import annotations

import pytest
import torch

from memdec import SparseDistributions, build_info, ops

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or build_info()["cuda"] != "on",
    reason="needs a GPU, and a memdec with CUDA kernels",
)

ROWS, VOCAB = 6, 5003


def draws(*shape: int, seed: int = 0, device: str = "cuda") -> torch.Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3).to(device)


def teacher(device: str = "cuda") -> SparseDistributions:
    dense = torch.zeros(ROWS, VOCAB)
    dense[:, 3::400] = 0.05
    return SparseDistributions.from_dense(dense).to(device)


LABELS = torch.arange(ROWS) * 7
NEIGHBOURS = torch.rand(ROWS, 90, generator=torch.Generator().manual_seed(0)) * 40
TOKENS = torch.randint(VOCAB, (ROWS, 90), generator=torch.Generator().manual_seed(1))

NAMES = [
    "token_log_prob",
    "interpolate",
    "interpolate_log_prob",
    "interpolate_argmax",
    "interpolate_sample",
    "interpolate_sample, warped",
    "interpolate_sparse",
    "alignment_loss",
    "verify_draft",
    "verify_draft, warped",
    "verify_draft, greedy",
]


def op_named(name: str, device: str = "cuda"):
    """A function of two logit tensors; what else it needs is on their device already."""
    labels, q = LABELS.to(device), teacher(device)
    drafts = (LABELS * 3).reshape(2, 3)[:, :2].to(device)

    def verify(a, b, **settings):
        two = (x.reshape(2, 3, VOCAB) for x in (a, b))
        return torch.stack(ops.verify_draft(*two, drafts, 0.3, seed=5, **settings))

    return {
        "token_log_prob": lambda a, b: ops.token_log_prob(a, labels),
        "interpolate": lambda a, b: ops.interpolate(a, b, 0.3),
        "interpolate_log_prob": lambda a, b: ops.interpolate_log_prob(a, b, labels, 0.3),
        "interpolate_argmax": lambda a, b: ops.interpolate_argmax(a, b, 0.3),
        "interpolate_sample": lambda a, b: ops.interpolate_sample(a, b, 0.3, seed=5),
        "interpolate_sample, warped": lambda a, b: ops.interpolate_sample(a, b, 0.3, seed=5, top_k=50, top_p=0.9),
        "interpolate_sparse": lambda a, b: ops.interpolate_sparse(a, q, 0.3),
        "alignment_loss": lambda a, b: ops.alignment_loss(a, labels, q).total,
        "verify_draft": verify,
        "verify_draft, warped": lambda a, b: verify(a, b, temperature=0.9, top_k=50, top_p=0.9),
        "verify_draft, greedy": lambda a, b: verify(a, b, greedy=True),
    }[name]


@pytest.mark.parametrize("name", NAMES)
def test_a_replayed_graph_computes_what_an_eager_call_does(name):
    """The graph is captured over one pair of logits, and replayed over another that was copied in their place."""
    a, b = draws(ROWS, VOCAB), draws(ROWS, VOCAB, seed=1)
    call = op_named(name)
    call(a, b)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call(a, b)
    for seed in (2, 3):
        a.copy_(draws(ROWS, VOCAB, seed=seed))
        b.copy_(draws(ROWS, VOCAB, seed=seed + 10))
        graph.replay()
        assert torch.equal(result, call(a, b))


def test_forward_and_backward_in_a_graph():
    logits, labels, q = draws(ROWS, VOCAB).requires_grad_(), LABELS.cuda(), teacher()

    def step():
        (gradient,) = torch.autograd.grad(ops.alignment_loss(logits, labels, q).total, logits)
        return gradient

    wanted = step()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gradient = step()
    gradient.zero_()
    graph.replay()
    assert torch.equal(gradient, wanted)


def test_a_replayed_sampler_draws_anew_and_in_the_right_proportions():
    """Chi-square of 64 replays of 4096 rows against the mixture; by chance alone it fails once in a million runs."""
    vocab, rows, replays, alpha = 12, 4096, 64, 0.4
    base, memory = draws(1, vocab).expand(rows, vocab), draws(1, vocab, seed=1).expand(rows, vocab)
    seed, offset = torch.tensor(11, device="cuda"), torch.tensor(0, device="cuda")
    seeds = seed + torch.arange(rows, device="cuda") * 7919
    ops.interpolate_sample(base, memory, alpha, seed=seeds, offset=offset)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        offset.add_(1)
        tokens = ops.interpolate_sample(base, memory, alpha, seed=seeds, offset=offset)
    counts, before = torch.zeros(vocab, dtype=torch.int64), None
    for _ in range(replays):
        graph.replay()
        drawn = tokens.cpu()
        assert before is None or not torch.equal(drawn, before)
        counts += drawn.bincount(minlength=vocab)
        before = drawn
    expected = ops.interpolate(base[:1], memory[:1], alpha).exp().double().cpu()[0] * rows * replays
    assert expected.min() > 5
    statistic = ((counts - expected) ** 2 / expected).sum()
    tail = 1 - torch.special.gammainc(torch.tensor((vocab - 1) / 2, dtype=torch.float64), statistic / 2)
    assert tail > 1e-6, (counts, expected)


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.8}, {"top_k": 9, "top_p": 0.9}], ids=str)
def test_a_replayed_round_drafts_and_verifies_anew(settings):
    """A captured round, drafts and verification, at a counter on the device: each replay is the eager round there."""
    texts, gamma, vocab = 64, 3, 200
    base, memory = draws(texts, gamma + 1, vocab), draws(texts, gamma + 1, vocab, seed=1)
    memory = 0.7 * base + 0.3 * memory
    seeds = torch.arange(texts, device="cuda") * 7919

    def round_at(offset):
        rows = [memory[:, i].contiguous() for i in range(gamma)]
        drafts = [
            ops.interpolate_sample(row, row, 1.0, seed=seeds, offset=offset + i, **settings)
            for i, row in enumerate(rows)
        ]
        return ops.verify_draft(base, memory, torch.stack(drafts, 1), 0.4, seed=seeds, offset=offset, **settings)

    offset = torch.tensor(100, device="cuda")
    round_at(offset)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        offset.add_(gamma + 1)
        captured = round_at(offset)
    rounds = []
    for replay in range(1, 5):
        graph.replay()
        wanted = round_at(100 + replay * (gamma + 1))
        assert all(torch.equal(x, y) for x, y in zip(captured, wanted, strict=True))
        rounds.append(captured.next_token.tolist())
    assert len({tuple(tokens) for tokens in rounds}) == len(rounds)
    assert 0 < int(captured.num_accepted.sum()) < texts * gamma


def test_work_is_queued_on_the_caller_s_stream():
    """A stream that sleeps, then fills the logits: an op queued elsewhere would read them before."""
    side = torch.cuda.Stream()
    wanted_logits, logits = draws(ROWS, VOCAB), torch.zeros(ROWS, VOCAB, device="cuda")
    labels = LABELS.cuda()
    wanted = ops.token_log_prob(wanted_logits, labels)
    wanted_q = ops.aggregate_neighbors(NEIGHBOURS.cuda(), TOKENS.cuda(), temperature=2.0, vocab_size=VOCAB)
    distances, tokens = torch.zeros(ROWS, 90, device="cuda"), TOKENS.cuda()
    neighbours = NEIGHBOURS.cuda()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        logits.copy_(wanted_logits)
        distances.copy_(neighbours)
        got = ops.token_log_prob(logits, labels)
        q = ops.aggregate_neighbors(distances, tokens, temperature=2.0, vocab_size=VOCAB)
    side.synchronize()
    assert torch.equal(got, wanted)
    assert torch.equal(q.probs, wanted_q.probs) and torch.equal(q.token_ids, wanted_q.token_ids)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("name", NAMES)
def test_tensors_of_a_device_that_is_not_the_current_one(name):
    wanted = op_named(name)(draws(ROWS, VOCAB), draws(ROWS, VOCAB, seed=1))
    other = op_named(name, "cuda:1")(draws(ROWS, VOCAB, device="cuda:1"), draws(ROWS, VOCAB, seed=1, device="cuda:1"))
    assert other.device.index == 1 and torch.cuda.current_device() == 0
    assert torch.equal(other.cpu(), wanted.cpu())


@pytest.mark.parametrize("name", NAMES)
def test_compiled_code_calls_the_kernels(name):
    torch.compiler.reset()  # the function below is one piece of code to dynamo, which compiles it for eight ops at most
    a, b = draws(ROWS, VOCAB), draws(ROWS, VOCAB, seed=1)
    call = op_named(name)
    compiled = torch.compile(lambda a, b: call(a * 2, b) + 1, fullgraph=True)
    torch.testing.assert_close(compiled(a, b), call(a * 2, b) + 1)


@pytest.mark.parametrize("name", NAMES)
def test_float64_is_refused_and_not_read_as_something_else(name):
    a, b = draws(ROWS, VOCAB), draws(ROWS, VOCAB, seed=1)
    call = op_named(name)
    with pytest.raises(TypeError, match=r"logits: got torch\.float64 on cuda:0, which is computed on the CPU only"):
        call(a.double(), b.double())


def test_the_reference_takes_float64_on_the_device():
    """There it is the truth as on the CPU, which the tests of the ops count on."""
    a, b, labels = draws(ROWS, VOCAB).double(), draws(ROWS, VOCAB, seed=1).double(), LABELS.cuda()
    for there, here in (
        (ops.reference.token_log_prob(a, labels), ops.reference.token_log_prob(a.cpu(), LABELS)),
        (ops.reference.interpolate(a, b, 0.3), ops.reference.interpolate(a.cpu(), b.cpu(), 0.3)),
        (
            ops.reference.alignment_loss(a, labels, teacher()).total,
            ops.reference.alignment_loss(a.cpu(), LABELS, teacher("cpu")).total,
        ),
    ):
        torch.testing.assert_close(there.cpu(), here, rtol=1e-12, atol=1e-12)


def test_distributions_on_the_device_are_those_of_the_cpu():
    generator = torch.Generator().manual_seed(0)
    dense = torch.rand(50, 40, generator=generator) * (torch.rand(50, 40, generator=generator) < 0.2)
    dense = dense / dense.sum(1, keepdim=True).clamp(min=1)
    here, there = SparseDistributions.from_dense(dense, 0.05), SparseDistributions.from_dense(dense.cuda(), 0.05)
    rows = [3, 3, 49, 0]
    pairs = {
        "from_dense": (here, there.validate()),
        "to": (here, here.to("cuda")),
        "select": (here.select(rows), there.select(rows).validate()),
        "select, of a tensor": (here.select(torch.tensor(rows)), there.select(torch.tensor(rows))),
        "cat": (SparseDistributions.cat([here, here]), SparseDistributions.cat([there, there])),
        "to, there and back": (here, here.to("cuda").to("cpu")),
    }
    for name, (mine, other) in pairs.items():
        for field in ("indptr", "token_ids", "probs"):
            assert torch.equal(getattr(mine, field), getattr(other, field).cpu()), name
        torch.testing.assert_close(mine.residual, other.residual.cpu())
        torch.testing.assert_close(mine.mass(), other.mass().cpu())
        assert torch.equal(mine.to_dense(torch.float64), other.to_dense(torch.float64).cpu())
    targets = torch.randint(40, (50,), generator=generator)
    assert torch.equal(here.lookup(targets), there.lookup(targets.cuda()).cpu())
    assert there.to("cuda") is there and there.device == torch.device("cuda", 0)
    broken = SparseDistributions(there.indptr, there.token_ids, there.probs - 1, 40)
    with pytest.raises(ValueError, match="probs: is negative"):
        broken.validate()
