"""Muon: an optimizer for the matrices inside a network (Keller Jordan 2024).

AdamW rescales every number of a gradient by itself. Muon treats the gradient of a matrix as a
matrix: it keeps the directions that the gradient reads and writes, and gives all of them one size.
"""

import torch


def orthogonalise(G, steps=5):
    """G (..., rows, cols) with all of its singular values brought near 1 (0.7 to 1.2).

    With G = U S V^T this is close to U V^T. Newton-Schulz iteration: an odd polynomial of X works
    on the singular values alone, and this one drives them to 1 without computing them.
    """
    X = G / (G.norm(dim=(-2, -1), keepdim=True) + 1e-7)  # no singular value above 1
    is_tall = X.size(-2) > X.size(-1)
    X = X.mT if is_tall else X  # X X^T is the smaller product
    for _ in range(steps):
        A = X @ X.mT
        X = 3.4445 * X + (2.0315 * A @ A - 4.7750 * A) @ X
    return X.mT if is_tall else X


class Muon(torch.optim.Optimizer):
    """Momentum with Nesterov's step, orthogonalised; weight decay is decoupled, as in AdamW.

    A matrix (rows, cols) moves by lr * max(1, rows / cols)^.5 in each of its directions. Matrices
    of one shape are orthogonalised together, which is faster for small ones.
    """

    def __init__(self, matrices, lr, momentum=0.95, weight_decay=0.0):
        matrices = list(matrices)
        if not all(matrix.dim() == 2 for matrix in matrices):
            raise ValueError("Muon trains matrices only; give vectors and embeddings to AdamW")
        groups = [{"params": [m for m in matrices if m.shape == shape]}
                  for shape in dict.fromkeys(matrix.shape for matrix in matrices)]
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            gradients = torch.stack([matrix.grad for matrix in group["params"]])  # (n, rows, cols)
            state = self.state[group["params"][0]]
            if "average" not in state:
                state["average"] = torch.zeros_like(gradients)
            average = state["average"]
            average.lerp_(gradients, 1 - group["momentum"])

            # Nesterov: look ahead, to where the average is going
            ahead = gradients.lerp(average, group["momentum"])
            rows, cols = gradients.shape[-2:]
            size = group["lr"] * max(1, rows / cols) ** 0.5
            for matrix, update in zip(group["params"], orthogonalise(ahead)):
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.sub_(size * update)
