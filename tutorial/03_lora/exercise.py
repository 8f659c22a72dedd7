"""Chapter 3. Fill in the functions; `python -m pytest tutorial/03_lora` tests them."""

import torch


def lora_delta(x, A, B, alpha, use_rslora=False):
    """What a LoRA adds to a Linear's output: scaling * B A x.

    x (..., in), A (rank, in), B (out, rank) -> (..., out). The scaling is alpha / rank, with rsLoRA
    alpha / sqrt(rank).

    Hint 1: nn.Linear computes x @ W.T; here W is the product B @ A.
    Hint 2: never build the (out, in) matrix; go through the rank: first x @ A.T.
    Hint 3: the rank is the number of rows of A.
    """
    raise NotImplementedError("lora_delta is not written yet (exercise 3.1)")


def effective_norm(self):
    """Frobenius norm of scale * (alpha / rank) * B A, mean over the adapted modules; a float.

    `self` is the LoRA, since in nanoem this is a method of it: self.A and self.B are
    {name: parameter} of the adapted modules, A (rank, in) and B (out, rank); self.alpha, self.rank
    and self.use_rslora; self.scale is what `scaled` has set (1 if nothing). It and alpha may be
    negative, a norm is not.

    Hint 1: self.scaling is alpha / rank, or with rsLoRA alpha / sqrt(rank).
    Hint 2: the norm of the product B A, not the product of the two norms: at rank 1 they are equal,
        at rank 2 they are not.
    Hint 3: a norm is never negative: abs(self.scale). And .item() makes a float.
    """
    raise NotImplementedError("effective_norm is not written yet (exercise 3.2)")


@torch.no_grad()
def merge(self):
    """Add the adapter, as `scaled` has it, into the weights; merging twice is merging once.

    There it stays until `unmerge`, attached or not. (nanoem's also refuses one that is switched
    off; here self.scale is never 0.)

    `self` is the LoRA: self.sites is {name: nn.Linear}, and self.A, self.B, self.scaling and
    self.scale are as in 3.2. Afterwards self.originals, {name: tensor}, holds the weights as they
    were before, so that `unmerge` can give them back to the last bit. While it is not empty, the
    LoRA is merged, and if it is attached, its hooks rest (`acts` is false): nothing is added twice.

    Hint 1: y = W x + scale * scaling * B A x, so the new weight is W + scale * scaling * B @ A.
    Hint 2: merged already? `if self.originals: return`. And leave self.depth as it is: whoever
        attached the LoRA will detach it, and after an unmerge it must act as before.
    Hint 3: linear.weight += ... changes the weight in place (keep it the same parameter, and its
        dtype: .to(linear.weight.dtype)); so what goes to self.originals must be a clone().
    """
    raise NotImplementedError("merge is not written yet (exercise 3.3)")
