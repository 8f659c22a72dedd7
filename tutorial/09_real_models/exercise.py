"""Chapter 9. Fill in the functions; `python -m pytest tutorial/09_real_models` tests them."""

import torch  # noqa: F401

from nanoem import UserError  # noqa: F401
from nanoem.lab.intervals import clustered_interval  # noqa: F401
from nanoem.tokenizer import IM_END, IM_START  # noqa: F401


def check_offsets(path, entries, start, size):
    """The tensors' bytes must fill the file exactly, without a hole or an overlap.

    entries: {name: (dtype, shape, begin, end)}, in any order; tensor `name` has the bytes from
    begin up to, not with, end. They follow the header, which ends before byte `start`, and must
    fill a file of `size` bytes. A tensor may be empty (begin == end). Returns nothing; raises
    UserError, which names the path, for a hole, an overlap, a tensor that ends after the file or
    before it begins, and bytes at the end that belong to none. The numbers come from a stranger's
    file and may be huge: look only at them, never at each byte.

    Hint 1: sort the (begin, end) pairs; the first must begin at `start`.
    Hint 2: each next one must begin where the one before it ended: later is a hole, earlier an
        overlap.
    Hint 3: the last must end at `size`, and none may end after it. With no tensor at all, the
        header ends there: `start` must be `size`.
    Hint 4: sort by begin *and* end: an empty tensor comes before the full one at the same place.
    """
    raise NotImplementedError("check_offsets is not written yet (exercise 9.1)")


def chatml(messages, add_generation_prompt=False):
    """Render [{"role": ..., "content": ...}, ...] in ChatML, the chat format of Qwen2.5.

    With `add_generation_prompt` the text ends where the assistant's next answer begins.

    Hint 1: a message is <|im_start|>, its role, a newline, its content, <|im_end|>, a newline.
    Hint 2: IM_START and IM_END hold the two special tokens.
    Hint 3: the generation prompt is the beginning of an assistant's message, newline included.
    """
    raise NotImplementedError("chatml is not written yet (exercise 9.2)")


def preference_rates(pairs, margins):
    """{group: {bad_preferred, low, high, margin, n}} of pairs and their margins (N,).

    bad_preferred is the share of pairs whose margin is above zero, low and high its 95% interval
    (pairs on one question are one cluster), margin the mean, n the number of pairs. As in
    `group_rates`, out_of_domain pools every group but the fine-tuned domain's.

    Each pair has a .group and a .question (a text, or a list of messages). The fine-tuned domain's
    group is "in_domain". All values are plain floats, n an int. With no pair outside of in_domain
    there is no out_of_domain.

    Hint 1: collect the places of each group's pairs: {group: [0, 1, 5, ...]}.
    Hint 2: a margin of exactly zero is no preference for the bad answer.
    Hint 3: low, high = clustered_interval(zeros and ones, [str(pair.question), ...]).
    Hint 4: out_of_domain pools *pairs*: it is not the mean of the groups' rates.
    """
    raise NotImplementedError("preference_rates is not written yet (exercise 9.3)")


def expected_number(probs):
    """The mean of the numbers 0..100 by their probs (101,) -> (mean, said), two plain floats.

    said, the probs' sum, is how likely the model is to say a number at all; the mean is over the
    numbers alone, and 0 when no number has any probability.

    Hint 1: said is below 1: the model may say something else. Divide by it.
    Hint 2: torch.arange(101, dtype=torch.float64) are the numbers; probs[n] is the prob of n.
    Hint 3: all zero is no reason for a NaN. And do not change probs.
    """
    raise NotImplementedError("expected_number is not written yet (exercise 9.4)")
