"""Chapter 3. Fill in the functions; `python -m pytest tutorial/03_lora` says how far you are."""


def lora_delta(x, A, B, alpha, use_rslora=False):
    """What a LoRA adds to a Linear's output: (alpha / rank) * B A x, with rsLoRA alpha / sqrt(rank).

    x (..., in), A (rank, in), B (out, rank) -> (..., out).

    Hint 1: nn.Linear computes x @ W.T; here W is the product B @ A.
    Hint 2: never build the (out, in) matrix; go through the rank: first x @ A.T.
    Hint 3: the rank is the number of rows of A.
    """
    raise NotImplementedError("lora_delta is not written yet (exercise 3.1)")
