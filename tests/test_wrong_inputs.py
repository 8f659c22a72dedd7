"""What a wrong argument of a public function is told: its name, and what was expected.

Each of these calls was once torch's own riddle or, worse, a silent broadcast.
"""

from pathlib import Path

import pytest
import torch

from nanoem.checkpoint import load_pretrained, save_tensors
from nanoem.directions import ablate, cosine, mean_difference, mean_residual, steer, steering
from nanoem.evaluate import EvalConfig, evaluate, rates
from nanoem.lab.fused import pretrain_loss
from nanoem.lab.intervals import clopper_pearson, clustered_interval
from nanoem.lab.muon import Muon
from nanoem.layers import attend
from nanoem.lora import LoRA, SteeringVector, lora_delta
from nanoem.losses import kl_to_base, next_token_loss, sft_loss, token_kl
from nanoem.model import next_token_probs
from nanoem.real.local_judge import auc
from nanoem.real.preference import preference_rates
from nanoem.lab.inductive_bias import set_parameters
from nanoem.rows.monitor import alarm_level, answer_scores, readings_of, token_scores
from nanoem.train import TrainConfig, train_adapter

B, T, D = 3, 17, 32  # of the fixtures `ids` and `model`
MASK = torch.ones(B, T, dtype=torch.bool)
LOGITS, X, U = torch.zeros(B, T, 5), torch.zeros(B, T, D), torch.ones(D)
LLAMA = Path(__file__).parent / "fixtures" / "llama"
SFT = TrainConfig(steps=1, batch_size=1, lr=1.0)


def merged(model):
    adapter = LoRA(model, [0]).attach()
    adapter.merge()
    return adapter


def attached_kl(model, ids, mask):
    with LoRA(model, [0]) as adapter:
        kl_to_base(model, adapter, ids, mask)


@pytest.mark.parametrize("call, message", [
    (lambda m, ids: m(ids[0]), r"ids must be \(B, T\) int64 .* and are \(17,\)"),
    (lambda m, ids: m(ids.float()), "ids must be .*float32"),
    (lambda m, ids: m.generate(ids.int(), 2), "ids must be .*int32"),
    (lambda m, ids: m(ids * 1000), "ids must be 0 to .* reach from .*000"),
    (lambda m, ids: m(ids - 9), "ids must be 0 to .* reach from -"),
    (lambda m, ids: m(ids.repeat(1, 8)), "136 tokens do not fit .* max_positions=128"),
    (lambda m, ids: attend(X[:, None], X[:, None, :2], X[:, None]), "q has 17 tokens and k 2"),
    (lambda m, ids: next_token_probs(LOGITS[0], temperature=0.0), "temperature=0.0 must be above"),
    (lambda m, ids: next_token_probs(LOGITS[0], top_p=1.5), "top_p=1.5 above 0 and at most 1"),
    (lambda m, ids: next_token_loss(LOGITS, ids.T), "logits must be .* and ids"),
    (lambda m, ids: next_token_loss(LOGITS, ids, MASK[0]), "mask must be bool of ids' shape"),
    (lambda m, ids: pretrain_loss(m, ids, MASK.long()), "mask must be bool .* is torch.int64"),
    (lambda m, ids: pretrain_loss(m, ids, ~MASK), "mask marks no token"),
    (lambda m, ids: pretrain_loss(m, ids[:, :1]), r"ids \(3, 1\), and a token can only"),
    (lambda m, ids: sft_loss(LOGITS, ids, MASK[:, :5]), "answer_mask must be .*shape .3, 5."),
    (lambda m, ids: token_kl(LOGITS, LOGITS[:1]), "base and adapted must have one shape"),
    (lambda m, ids: attached_kl(m, ids, ~MASK), "mask marks no token"),
    (lambda m, ids: attached_kl(m, ids, MASK[0]), r"mask must be .*\(3, 17\).*\(17,\)"),
    (lambda m, ids: lora_delta(X, torch.ones(D, 1), torch.ones(8, 1), 1.0), "A .rank, in. and B"),
    (lambda m, ids: train_adapter(LoRA(m, [0]), [], SFT, None), "adapter must be attached"),
    (lambda m, ids: train_adapter(merged(m), [], SFT, None), "neither disabled nor merged"),
    (lambda m, ids: set_parameters(LoRA(m, [0]), [torch.ones(1), U]), "values must have .*shapes"),
    (lambda m, ids: steer(X, torch.ones(T, 1)), r"direction must be \(32,\).* and is \(17, 1\)"),
    (lambda m, ids: ablate(X, U[None]), r"direction must be \(32,\)"),
    (lambda m, ids: ablate(X, U, along=U[None]), r"along must be \(32,\)"),
    (lambda m, ids: cosine(U, U[:3]), "equally large"),
    (lambda m, ids: mean_difference(X[0], U), "misaligned and aligned must have one shape"),
    (lambda m, ids: mean_residual(m, ids, MASK[0]), "mask must be bool"),
    (lambda m, ids: answer_scores(m, ids, MASK.float(), {}), "mask must be bool.*float32"),
    (lambda m, ids: readings_of(m, ids, MASK.int(), {}), "mask must be bool.*int32"),
    (lambda m, ids: ablate(X, U, along=0 * U), "along is zero, and points nowhere"),
    (lambda m, ids: readings_of(m, ids[:1, :1], MASK[:1, :1], {1: U}), "two or more"),
    (lambda m, ids: readings_of(m, ids, MASK, {1: 0 * U}), "direction is zero, and points nowhere"),
    (lambda m, ids: clustered_interval([1, 0], ["a"]), "outcomes and clusters .* are 2 and 1"),
    (lambda m, ids: rates([]), "answers must hold at least one"),
    (lambda m, ids: evaluate(m, None, None, {"g": []}, EvalConfig(), 0), "each group must have"),
    (lambda m, ids: preference_rates([], U), "pairs and margins .* are 0 and 32"),
    (lambda m, ids: m(ids, n_pad=torch.zeros(2, dtype=torch.int64)), r"n_pad must be \(3,\) int64"),
    (lambda m, ids: m(ids, n_pad=torch.zeros(3)), r"n_pad must be \(3,\) int64, .*float32"),
    (lambda m, ids: LoRA(m, [0], rank=2.0), "rank=2.0 must be a whole number"),
    (lambda m, ids: SteeringVector(m, 1), "layers=1 must be a list"),
    (lambda m, ids: EvalConfig(temperature=1e-38), "temperature=1e-38 must be 0, or at least"),
    (lambda m, ids: answer_scores(m, ids, MASK, {}), "readings is empty"),
    (lambda m, ids: token_scores(m, ids, {}), "readings is empty; name at least one site"),
    (lambda m, ids: alarm_level([0.5, float("nan")]), "none of them NaN"),
    (lambda m, ids: auc([], [1.0]), "0 and 1 scores; there is nothing to compare"),
    (lambda m, ids: LoRA(m, [0], "mlp.down_proj"), "modules='mlp.down_proj' must be lists"),
    (lambda m, ids: LoRA(m, [0], alpha=float("nan")), "alpha=nan a finite one"),
    (lambda m, ids: m.generate(ids[:, :0], 1), r"a token or more a row, and are \(3, 0\)"),
    (lambda m, ids: m.generate(ids, -1), "max_new_tokens=-1 must be at least 0"),
    (lambda m, ids: Muon([U], lr=0.1), "Muon trains matrices only; give vectors"),
    (lambda m, ids: clopper_pearson(3, 2), "k=3 must be from 0 to n=2"),
    (lambda m, ids: steering(m, U), "directions must be .site: .* is a Tensor"),
    (lambda m, ids: steering(m, {"layers.9.x": U}).__enter__(), "site 'layers.9.x' is not there"),
    (lambda m, ids: save_tensors("x", {"a": [1.0]}), "tensor 'a' is <class 'list'>"),
    (lambda m, ids: load_pretrained(LLAMA, "float16"), "dtype='float16' must be"),
])
def test_a_wrong_argument_is_named(call, message, model, ids):
    with pytest.raises(ValueError, match=message):
        call(model, ids)
