"""A whole training step of a memory (forward, backward, AdamW): our fused loss against a careful eager one.

The model has SmolLM2-135M's shape and random weights in bfloat16, the batch two windows of 512 tokens. Both loops are
the same but for the loss: ours never has the logits of the batch, the other makes them with the output head and takes a
logsumexp and two gathers (no dense teacher). What counts is tokens/s and the peak of memory beside weights and moments;
GB/s is of the weights read and written, a lower bound that no one comes near.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from memdec import SparseDistributions
from memdec.pipeline.batches import Batch
from memdec.pipeline.master_weights import MasterWeights
from memdec.pipeline.train import Student

WINDOWS, LENGTH, VOCAB, TOKENS, BETA = 2, 512, 49152, 65, 0.5


def smollm2_shape() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            tie_word_embeddings=True,
        )
    )


def batch_of(rows: int) -> Batch:
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)
    ids = torch.randint(VOCAB // TOKENS, (rows, TOKENS), generator=generator) + torch.arange(TOKENS) * (VOCAB // TOKENS)
    probs = torch.randn(rows, TOKENS, generator=generator).mul_(2).softmax(-1)
    indptr = torch.arange(0, rows * TOKENS + 1, TOKENS)
    teacher = SparseDistributions(indptr, ids.reshape(-1).to(torch.int32), probs.reshape(-1), VOCAB)
    tokens = torch.randint(VOCAB, (2, rows), generator=generator)
    return Batch(tokens[0].view(WINDOWS, LENGTH), None, tokens[1], teacher)


class CarefulStudent(Student):
    """The same student with the loss in eager PyTorch."""

    def forward(self, batch: Batch) -> SimpleNamespace:
        logits = self.model(input_ids=batch.input_ids, use_cache=False).logits.flatten(0, 1).float()
        teacher, labels = batch.teacher, batch.labels
        rows, ids = teacher.row_ids(), teacher.token_ids.long()
        lse = logits.logsumexp(-1)
        cross = torch.zeros_like(lse).index_add(0, rows, teacher.probs * logits[rows, ids])
        entropy = torch.zeros_like(lse).index_add(0, rows, teacher.probs * teacher.probs.log())
        kl = (entropy - cross + teacher.mass() * lse).sum()
        ce = (lse - logits.gather(-1, labels[:, None])[:, 0]).sum()
        return SimpleNamespace(total=BETA * kl + (1 - BETA) * ce, kl=kl.detach(), ce=ce.detach())


def bench_training_step(compare):
    model = smollm2_shape()
    weights = MasterWeights(model, torch.bfloat16, weight_decay=0.01)
    batch = batch_of(WINDOWS * LENGTH)
    weights.step(0.0, torch.tensor(1.0))  # so that the moments exist before memory is measured

    def loop(student):
        def step():
            loss = student(batch)
            (loss.total / batch.num_rows).backward()
            weights.step(1e-5, (1.0 / weights.gradient_norm()).clamp(max=1.0))

        return step

    contestants = {
        "memdec": loop(Student(model, VOCAB, BETA)),
        "eager, careful": loop(CarefulStudent(model, VOCAB, BETA)),
    }
    case = {"shape": [WINDOWS, LENGTH, VOCAB], "teacher_tokens": TOKENS, "dtype": "bfloat16", "layers": 30}
    parameters = sum(parameter.numel() for parameter in model.parameters())
    results = compare("training", case, contestants, parameters * 28, rounds=3)
    for name, line in results.items():
        print(f"  {name}: {WINDOWS * LENGTH / line['median_ms'] * 1e3:,.0f} tokens/s")
