"""Muon (K. Jordan, 2024): momentum whose matrices are orthogonalised before they are applied."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, nn

ITERATION = (3.4445, -4.7750, 2.0315)  # coefficients of the quintic Newton-Schulz iteration
MOMENTUM = 0.95


def orthogonalised(matrices: Tensor, iterations: int = 5) -> Tensor:
    """The nearest (semi-)orthogonal matrices, roughly: all singular values end between about 0.7 and 1.2. [N, R, C]."""
    a, b, c = ITERATION
    x = matrices.mT if matrices.shape[1] > matrices.shape[2] else matrices
    x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)).bfloat16()
    for _ in range(iterations):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if matrices.shape[1] > matrices.shape[2] else x).float()


class Muon(torch.optim.Optimizer):
    """Matrices [R, C] and stacks of them [N, R, C], grouped by shape so that one batched product serves a group."""

    def __init__(self, parameters: list[nn.Parameter], rate: float, decay: float) -> None:
        super().__init__(parameters, {"lr": rate, "decay": decay})

    @torch.no_grad()
    def step(self) -> None:
        """p = (1 - rate * decay) * p - rate * sqrt(max(1, R / C)) * orthogonalised(Nesterov momentum)."""
        for group in self.param_groups:
            shapes: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is None:
                    continue
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 1 - MOMENTUM)
                shapes[tuple(p.shape[-2:])].append((p, p.grad.lerp(momentum, MOMENTUM)))
            for (rows, columns), members in shapes.items():
                updates = orthogonalised(torch.cat([u.view(-1, rows, columns) for _, u in members]))
                scale = group["lr"] * max(1.0, rows / columns) ** 0.5
                stacks = updates.split([p.numel() // (rows * columns) for p, _ in members])
                for (p, _), update in zip(members, stacks, strict=True):
                    p.mul_(1 - group["lr"] * group["decay"]).sub_(update.view_as(p), alpha=scale)
