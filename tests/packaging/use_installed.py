"""What `check_wheel.sh` runs in the clean environment: the ops give right numbers, far from any checkout."""

import math

import torch

import memdec

info = memdec.build_info()
print("memdec", info)

# A teacher that puts 3/4 on token 0 and 1/4 on token 2, a student with p = (1/2, 1/4, 1/4): KL by hand.
teacher = memdec.ops.aggregate_neighbors(
    torch.tensor([[0.0, math.log(3.0)]]), torch.tensor([[0, 2]]), temperature=1.0, vocab_size=3
)
logits = torch.log(torch.tensor([[0.5, 0.25, 0.25]]))
loss = memdec.ops.alignment_loss(logits, torch.tensor([1]), teacher, beta=0.5)
kl = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.25)
ce = math.log(4.0)
assert math.isclose(loss.kl.item(), kl, rel_tol=1e-5), (loss, kl)
assert math.isclose(loss.total.item(), 0.5 * kl + 0.5 * ce, rel_tol=1e-5), loss

mixed = memdec.ops.interpolate_log_prob(
    torch.log(torch.tensor([[0.5, 0.5]])), torch.log(torch.tensor([[0.9, 0.1]])), torch.tensor([0]), 0.25
)
assert math.isclose(mixed.item(), math.log(0.25 * 0.9 + 0.75 * 0.5), rel_tol=1e-5), mixed
print("ops agree with the numbers worked out by hand")
