"""Wrong answers to chapter 3's exercises: (exercise, what its message must say, the answer)."""

import torch


def no_rslora(x, A, B, alpha, use_rslora=False):
    return alpha / len(A) * x @ A.T @ B.T


def built(x, A, B, alpha, use_rslora=False):
    return x @ (alpha / (len(A) ** 0.5 if use_rslora else len(A)) * B @ A).T


def norms(self, norm):
    return [norm(self.A[n].detach(), self.B[n].detach()) for n in self.sites]


def mean(values):
    return float(sum(values) / len(values))


def no_scale(self):
    return self.scaling * mean(norms(self, lambda A, B: (B @ A).norm()))


def summed(self):
    return float(abs(self.scale) * self.scaling * sum(norms(self, lambda A, B: (B @ A).norm())))


def resets_scale(self):
    norm = no_scale(self) * abs(self.scale)
    self.scale = 1.0
    return norm


@torch.no_grad()
def merging(self, scaling=None, detach=False, once=True, clone=True, in_place=True):
    if self.originals and once:
        return
    if detach:
        self.depth = 0
        self.detach()
    for name, linear in self.sites.items():
        change = (self.scaling * self.scale if scaling is None else scaling(self)) * (
            self.B[name] @ self.A[name])
        self.originals[name] = linear.weight.clone() if clone else linear.weight
        if in_place:
            linear.weight += change.to(linear.weight.dtype)
        else:
            linear.weight = torch.nn.Parameter(linear.weight + change, requires_grad=False)


PLANTED = [
    ("lora_delta", "divide alpha by the rank",
     lambda x, A, B, alpha, use_rslora=False: alpha * x @ A.T @ B.T),
    ("lora_delta", r"with rsLoRA divide by sqrt\(rank\)", no_rslora),
    ("lora_delta", r"whole \(out, in\) matrix", built),
    ("effective_norm", "self.scale is missing", no_scale),
    ("effective_norm", "not the sum", summed),
    ("effective_norm", "self.scale was changed", resets_scale),
    ("merge", "divide alpha by the rank",
     lambda self: merging(self, lambda adapter: adapter.scale * adapter.alpha)),
    ("merge", "self.scale is missing", lambda self: merging(self, lambda adapter: adapter.scaling)),
    ("merge", "leave that to whoever attached it", lambda self: merging(self, detach=True)),
    ("merge", "merging twice adds twice", lambda self: merging(self, once=False)),
    ("merge", "clone", lambda self: merging(self, clone=False)),
    ("merge", "in place", lambda self: merging(self, in_place=False)),
]
