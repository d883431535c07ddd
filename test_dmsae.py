"""Tests of dmsae.py and eval.py: every name is a claim. No network, no GPU; tiny sizes.

`python test_dmsae.py` instead times a training step, and with --model a whole run.
"""

import ast
import copy
import inspect
import itertools
import json
import math
import os
import random
import re
import resource
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from dataclasses import fields
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

os.environ["HF_HUB_OFFLINE"] = "1"  # else `datasets` asks s3.amazonaws.com, even for a local file

import dmsae
import eval as ev
from dmsae import (
    Config,
    Core,
    EncodeAt,
    MatryoshkaSAE,
    SparseActs,
    Text,
    attribute,
    evaluate,
    load_sae,
    loss_and_grad,
    mean_loss,
    nested_decode,
    nested_loss,
    next_core,
    segment_sum,
    select_core,
    spliced_loss,
    update,
)

HERE = Path(__file__).parent


# ---- Helpers ------------------------------------------------------------------------------------
def random_sae(d_model=8, widths=(13, 25, 64), n_core=0, n_exempt=0, dtype=torch.float64, seed=0):
    """An SAE in which nothing is at its initial value: biases at zero hide bugs."""
    torch.manual_seed(seed)
    sae = MatryoshkaSAE(d_model, widths, n_core, n_exempt).to(dtype)
    for p in (sae.b_enc, sae.b_dec, sae.W_enc):
        nn.init.normal_(p)
    sae.threshold.uniform_(0.1, 0.5)
    return sae


def preactivations(sae, x):
    """The definition: (B, F)"""
    return ((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc).detach()


def full_sort(sae, pre, k, floor):
    """The definition of the training activations, by a sort of everything: mask (B, F)"""
    E, B = sae.n_exempt, len(pre)
    core = pre[:, :E] > sae.threshold[:E]
    rest = pre[:, E:].flatten()
    budget = max(B * k - int(core.sum()), B * floor)
    order = rest.argsort(descending=True, stable=True)[:budget]
    mask = torch.zeros_like(rest, dtype=torch.bool)
    mask[order] = rest[order] > 0
    return torch.cat([core, mask.view(B, -1)], 1)


def sparse(acts):
    """Activations (B, F) as SparseActs."""
    row, col = acts.nonzero(as_tuple=True)
    return SparseActs(acts[row, col], row, col)


def dense_loss(params, x, k, floor, sae, dead):
    """The definition of the loss, written densely, for autograd."""
    W_enc, b_enc, W_dec, b_dec = params
    pre = (x - b_dec) @ W_enc.T + b_enc
    acts = pre * full_sort(sae, pre.detach(), k, floor)
    x_hats = [acts[:, :w] @ W_dec[:w] + b_dec for w in sae.widths]
    loss = sum(((x - x_hat) ** 2).sum(1).mean() for x_hat in x_hats)
    loss = loss / (len(x_hats) * x.shape[1])
    if len(dead):
        residual = (x - x_hats[-1]).detach()
        a = pre[:, dead].relu()
        kth = min(x.shape[1] // 2, len(dead)) - 1
        a = a * (a >= a.sort(dim=1, descending=True).values[:, kth, None])
        error = residual - a @ W_dec[dead]
        loss = loss + (error**2).sum() / ((residual - residual.mean(0)) ** 2).sum() / 32
    return loss


def fit(sae, batch, k, steps, lr=3e-3):
    """Train on batch(step) -> (B, D): the loop a reader would write around the pieces."""
    adam = torch.optim.Adam(sae.parameters())
    since = torch.zeros(len(sae.W_enc))
    for step in range(steps):
        dead = (since > 20).nonzero()[:, 0]
        _, acts, cut = loss_and_grad(sae, batch(step), k, dead=dead)
        update(sae, adam, dmsae.learning_rate(step, steps, lr))
        sae.update_threshold(cut, step)
        since += 1
        since[acts.col] = 0


class Toy(nn.Module):
    """A one-layer 'language model': embedding, an identity layer to splice, a linear head."""

    def __init__(self, embedding, head):
        super().__init__()
        self.embedding, self.head = embedding, head
        self.layers = nn.ModuleList([nn.Identity()])
        text_config = SimpleNamespace(num_hidden_layers=1, vocab_size=len(embedding))
        self.config = SimpleNamespace(get_text_config=lambda: text_config)
        self.device = torch.device("cpu")

    def get_decoder(self):
        return self

    def forward(self, ids, use_cache=False):
        return SimpleNamespace(logits=self.layers[0](self.embedding[ids]) @ self.head)


@pytest.fixture(scope="session")
def lm(tmp_path_factory):
    """An ordinary Hugging Face folder with a tiny random Gemma-2, its tokenizer, and a text."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("lm")
    words = "the cat dog sat on mat and ran to house while bird sang loud song of spring".split()
    docs = [" ".join(random.Random(i).choices(words, k=60)) for i in range(400)]
    special = dict(pad_token="<pad>", eos_token="<eos>", bos_token="<bos>")  # ids 0, 1, 2
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(docs, 300, special_tokens=[*special.values()], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, **special)
    tokenizer.save_pretrained(folder)
    config = Gemma2Config(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        query_pre_attn_scalar=16,
        initializer_range=0.2,
        max_position_embeddings=64,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    torch.manual_seed(0)
    Gemma2ForCausalLM(config).save_pretrained(folder)
    (folder / "text.txt").write_text("|||".join(docs))
    return folder


def load_tiny(lm):
    return dmsae.load_model(Config(model=str(lm), layer=0, ctx=32, device="cpu"))[0]


def replace_weights(folder):
    """Put another model of the same shape into a model folder."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(1)
    config = AutoConfig.from_pretrained(folder)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def command(lm, out, **changes):
    """A command line of a run that takes about a second."""
    words = dict(
        model=lm,
        text=lm / "text.txt",
        separator="|||",
        layer=0,
        ctx=32,
        tokens=12_800,
        d_sae=128,
        k=6,
        batch=128,
        lr=3e-3,
        cycles=1,
        attribution_tokens=1000,
        device="cpu",
        out=out,
    )
    words |= changes
    given = {f"--{name.replace('_', '-')}": v for name, v in words.items() if v is not None}
    return [word for flag, value in given.items() for word in (flag, str(value))]


def refusal(capsys, argv):
    """The one line with which a command must end, with exit code 2."""
    capsys.readouterr()
    try:
        code = dmsae.main(argv)
    except SystemExit as e:
        code = e.code
    *before, line = capsys.readouterr().err.splitlines()
    assert code == 2
    assert line.startswith("dmsae: ")
    assert not [other for other in before if "dmsae:" in other or "Traceback" in other]
    return line


def weights(out, cycle):
    return load_file(Path(out) / f"cycle{cycle}" / "sae_weights.safetensors")


def spied(monkeypatch, owner, name):
    """The arguments of each call of owner.name from now on, a list that grows."""
    calls, real = [], getattr(owner, name)

    def spy(*words):
        calls.append(words)
        return real(*words)

    monkeypatch.setattr(owner, name, spy)
    return calls


def saved_core(out, cycle):
    return load_file(Path(out) / f"cycle{cycle}" / "core.safetensors")


def result(out, cycle):
    cfg = json.loads((Path(out) / f"cycle{cycle}" / "cfg.json").read_text())
    return cfg["metadata"]["result"]


def assert_same(a, b, labels=(0, 1)):
    """SAEs and cores of two runs must be bitwise the same."""
    for label in labels:
        for read in (weights, saved_core):
            x, y = read(a, label), read(b, label)
            assert x.keys() == y.keys()
            assert all(torch.equal(x[name], y[name]) for name in x), label


@pytest.fixture(scope="session")
def story(lm, tmp_path_factory):
    """A whole run of three cycles through the real main, in gated mode."""
    out = tmp_path_factory.mktemp("run") / "out"
    assert dmsae.main(command(lm, out, cycles=3, core_sparsity="gated")) == 0
    return out


@pytest.fixture(scope="session")
def whole(lm, tmp_path_factory):
    """A run with a transfer that is never interrupted, of four blocks a training."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert dmsae.main(command(lm, out, tokens=25_600, transfer_k=3)) == 0
    return out


# ---- BatchTopK ----------------------------------------------------------------------------------
@pytest.mark.parametrize("factor", [0.0, 0.5, 1.0, 1.04, 1.3, 30.0])
@pytest.mark.parametrize("n_exempt, floor", [(0, 1), (5, 1), (5, 6)])
def test_batch_topk_equals_a_full_sort(factor, n_exempt, floor):
    """Whatever the threshold (`factor` times the cut), the active entries must be the largest of
    the whole batch, in order of place, and the cut the least that competed."""
    sae = random_sae(n_core=5, n_exempt=n_exempt)
    pre = preactivations(sae, torch.randn(16, 8).double())
    want = full_sort(sae, pre, 6, floor)
    least = pre[:, n_exempt:][want[:, n_exempt:]].min()
    sae.threshold[n_exempt:] = factor * least
    acts, cut = sae.batch_topk(pre, 6, floor)
    assert torch.equal(torch.stack([acts.row, acts.col], 1), want.nonzero())
    assert torch.equal(acts.value, pre[want])
    assert cut == least


def test_batch_topk_equals_a_full_sort_where_thresholds_differ():
    """A high threshold among low ones must not hide an entry that is among the largest."""
    sae = random_sae()
    sae.threshold[:] = torch.tensor([0.0, 6.0]).repeat(32)
    pre = preactivations(sae, torch.randn(16, 8).double())
    acts, _ = sae.batch_topk(pre, 10)
    want = full_sort(sae, pre, 10, 1)
    assert torch.equal(torch.stack([acts.row, acts.col], 1), want.nonzero())


def test_batch_topk_breaks_ties_by_place():
    """Of equal entries at the cut the earlier must survive, and never more than fit."""
    sae = MatryoshkaSAE(8, [3])
    acts, cut = sae.batch_topk(torch.tensor([[1.0, 2.0, 1.0], [1.0, 3.0, 1.0]]), 2)
    assert acts.value.tolist() == [1, 2, 1, 3]
    assert acts.row.tolist() == [0, 0, 0, 1]
    assert acts.col.tolist() == [0, 1, 2, 1]
    assert cut == 1


@pytest.mark.parametrize("n_exempt", [0, 5])
def test_many_ties_equal_a_stable_sort(n_exempt):
    """With three values alone in a whole batch, the active entries must be the first of them."""
    sae = random_sae(n_core=5, n_exempt=n_exempt)
    pre = torch.randint(-1, 3, (200, 64)).double()
    acts, cut = sae.batch_topk(pre, 20)
    want = full_sort(sae, pre, 20, 1)
    assert torch.equal(torch.stack([acts.row, acts.col], 1), want.nonzero())
    assert cut == pre[:, n_exempt:][want[:, n_exempt:]].min() == 1


def test_no_zero_or_negative_entry_survives():
    """With fewer positive entries than asked for, all of those and no others must survive."""
    sae = MatryoshkaSAE(8, [2])
    sae.threshold.fill_(1.0)
    acts, cut = sae.batch_topk(torch.tensor([[-1.0, 2.0], [0.0, 5.0]]), 2)
    assert acts.row.tolist() == [0, 1]
    assert acts.col.tolist() == [1, 1]
    assert cut == 2


def test_a_batch_without_a_positive_entry_is_no_error():
    """Nothing must be active, the cut finite, and the loss that of b_dec alone."""
    sae, x = random_sae(), torch.randn(16, 8).double()
    nn.init.constant_(sae.b_enc, -99.0)
    acts, cut = sae.batch_topk(preactivations(sae, x), 3)
    assert len(acts.value) == len(acts.row) == len(acts.col) == 0
    assert cut == 0
    loss, _, _ = loss_and_grad(sae, x, 3)
    assert torch.allclose(loss, (x - sae.b_dec).pow(2).mean())
    assert not sae.W_enc.grad.any()


def test_a_batch_where_only_the_core_is_on_has_a_finite_cut():
    """The cut must be 0, and so move no threshold to infinity, where nothing competes above 0."""
    sae = random_sae(n_core=2, n_exempt=2)
    with torch.no_grad():
        sae.b_enc[:2] = 99
        sae.b_enc[2:] = -99
    acts, cut = sae.batch_topk(preactivations(sae, torch.randn(4, 8).double()), 3)
    assert acts.col.tolist() == [0, 1] * 4
    assert cut == 0


def test_budget_is_exact_and_shared_by_the_whole_batch():
    """Exactly B*k latents must fire in all, not k in each row."""
    sae = random_sae()
    acts, _ = sae.batch_topk(preactivations(sae, torch.randn(16, 8).double()), 3)
    assert len(acts.row) == 16 * 3
    assert len(set(acts.row.bincount().tolist())) > 1


@pytest.mark.parametrize("n_exempt, floor, beside", [(0, 1, False), (5, 1, False), (5, 6, True)])
def test_core_budget(n_exempt, floor, beside):
    """compete and dynamic must hold the total at B*k; exempt (floor = k) must give the others B*k
    beside the core; an exempt core must be on wherever it exceeds its threshold."""
    sae = random_sae(n_core=5, n_exempt=n_exempt)
    pre = preactivations(sae, torch.randn(16, 8).double())
    acts, cut = sae.batch_topk(pre, 6, floor)
    n_core = int((acts.col < 5).sum())
    assert n_core > 0
    assert len(acts.row) == 16 * 6 + n_core * beside
    if n_exempt:
        assert n_core == int((pre[:, :5] > sae.threshold[:5]).sum())
    assert cut == acts.value[acts.col >= n_exempt].min()


def test_budget_of_the_rest_never_falls_below_the_floor():
    """Where the core takes more than B*k, the other latents must still get B*floor."""
    sae = random_sae(n_core=12, n_exempt=12)
    acts, _ = sae.batch_topk(preactivations(sae, torch.randn(16, 8).double()), 2, floor=1)
    assert (acts.col < 12).sum() > 16 * 2
    assert (acts.col >= 12).sum() == 16


def test_a_negative_threshold_lets_no_negative_activation_through():
    """In training as at inference: a foreign core may bring one."""
    sae = MatryoshkaSAE(4, [2, 8], 2, 2)
    sae.threshold.fill_(-1)
    acts, _ = sae.batch_topk(torch.full((3, 8), -0.5).index_fill(1, torch.tensor([5]), 2.0), 2)
    assert acts.col.tolist() == [5, 5, 5]
    assert (acts.value > 0).all()


# ---- The sparse step ----------------------------------------------------------------------------
@pytest.mark.parametrize("n_core, n_exempt", [(0, 0), (5, 5), (5, 0)])
@pytest.mark.parametrize("n_dead", [0, 3, 20, 40])
@pytest.mark.parametrize("case", ["plain", "ties", "few positive"])
def test_loss_and_gradients_equal_dense_autograd(n_core, n_exempt, n_dead, case):
    """Loss and all four gradients must equal the dense definition to 1e-12 in float64."""
    sae = random_sae(n_core=n_core, n_exempt=n_exempt)
    x = torch.randn(16, 8).double()
    if case == "ties":  # equal latents and equal tokens
        with torch.no_grad():
            sae.W_enc[30:40] = sae.W_enc[30].clone()
            sae.b_enc[30:40] = sae.b_enc[30].clone()
        x[8:] = x[:8]
    if case == "few positive":
        nn.init.constant_(sae.b_enc, -8.0)
    dead = torch.arange(64 - n_dead, 64)
    loss, acts, _ = loss_and_grad(sae, x, 4, 1, dead)
    params = [p.detach().clone().requires_grad_() for p in sae.parameters()]
    want = dense_loss(params, x, 4, 1, sae, dead)
    want.backward()
    mask = full_sort(sae, preactivations(sae, x), 4, 1)
    assert len(acts.col) == int(mask.sum())
    assert case != "few positive" or len(acts.col) < 64
    assert abs(loss - want) < 1e-12
    for p, reference in zip(sae.parameters(), params, strict=True):
        assert reference.grad.abs().max() > 1e-4
        assert (p.grad - reference.grad).abs().max() < 1e-12


def test_gradients_are_added_to_what_is_there():
    """Two calls must give twice the gradient of one, with dead latents too."""
    sae, x = random_sae(), torch.randn(16, 8).double()
    dead = torch.arange(40, 64)
    loss_and_grad(sae, x, 4, dead=dead)
    once = [p.grad.clone() for p in sae.parameters()]
    loss_and_grad(sae, x, 4, dead=dead)
    for p, g in zip(sae.parameters(), once, strict=True):
        assert torch.allclose(p.grad, 2 * g)


def test_values_of_encode_at_are_differentiable():
    """A penalty that a reader puts on the activations must reach all three encoder parameters as
    it does in dense autograd."""
    sae, x = random_sae(), torch.randn(4, 8).double()
    acts, _ = sae.batch_topk(preactivations(sae, x), 3)
    value = EncodeAt.apply(sae.W_enc, sae.b_enc, sae.b_dec, x, acts)
    weight = torch.arange(len(value)).double()  # no two alike: each must reach its own latent
    (value * weight).sum().backward()
    params = [p.detach().clone().requires_grad_() for p in (sae.W_enc, sae.b_enc, sae.b_dec)]
    dense = (x - params[2]) @ params[0].T + params[1]
    (dense[acts.row, acts.col] * weight).sum().backward()
    assert torch.equal(value, acts.value)
    for p, reference in zip((sae.W_enc, sae.b_enc, sae.b_dec), params, strict=True):
        assert (p.grad - reference.grad).abs().max() < 1e-12


def test_segment_sum_equals_a_loop():
    """Each segment must get the weighted sum of its rows; one without entries must be zero."""
    table, weight = torch.randn(5, 3).double(), torch.randn(6).double()
    index, segment = torch.tensor([4, 0, 4, 2, 1, 1]), torch.tensor([0, 0, 2, 2, 2, 5])
    want = torch.zeros(7, 3).double()
    for i, s, w in zip(index, segment, weight, strict=True):
        want[s] += w * table[i]
    got = segment_sum(table, index, weight, segment, 7)
    assert (got - want).abs().max() < 1e-14
    empty = torch.zeros(0).long()
    assert torch.equal(segment_sum(table, empty, weight[:0], empty, 2), torch.zeros(2, 3).double())


@pytest.mark.parametrize("d", [3, 32])
def test_dead_latents_of_which_none_is_positive_have_no_gradient(d):
    """The dead-latent loss must be the residual's own size over its variance, and nothing of them
    may move."""
    sae, x = random_sae(), torch.randn(16, 8).double()
    with torch.no_grad():
        sae.b_enc[-d:] = -99
    without, acts, _ = loss_and_grad(sae, x, 4)
    sae.zero_grad()
    loss, _, _ = loss_and_grad(sae, x, 4, dead=torch.arange(64 - d, 64))
    dense = torch.zeros(16, 64).double().index_put((acts.row, acts.col), acts.value)
    residual = (x - sae.decode(dense)).detach()
    variance = (residual - residual.mean(0)).pow(2).sum()
    assert abs(loss - without - residual.pow(2).sum() / variance / 32) < 1e-12
    assert not any(p.grad[-d:].any() for p in (sae.W_enc, sae.b_enc, sae.W_dec))


# ---- One step of the optimiser ------------------------------------------------------------------
def seen_by_adam(sae, lr=1e-3):
    """An Adam, and the list of the gradients that reach it, a list for each step."""
    adam, seen = torch.optim.Adam(sae.parameters(), lr), []
    adam.register_step_pre_hook(lambda *_: seen.append([p.grad.clone() for p in sae.parameters()]))
    return adam, seen


def test_two_steps_on_one_batch_have_the_gradient_of_one():
    """update must leave no gradient behind."""
    sae, x = random_sae(), torch.randn(16, 8, dtype=torch.float64)
    adam, seen = seen_by_adam(sae)
    for _ in range(3):  # the first step gives the decoder rows their norm in float64
        loss_and_grad(sae, x, 4)
        update(sae, adam, 0.0)
        assert all(p.grad is None for p in sae.parameters())
    for first, second in zip(*seen[1:], strict=True):
        assert first.any()
        assert torch.allclose(first, second, rtol=1e-12, atol=1e-12)


def test_decoder_rows_have_unit_norm_and_no_gradient_along_themselves():
    """|W_dec_i| must be 1 to 1e-6 after a step; Adam must never see the part along the row."""
    sae, x = random_sae(dtype=torch.float32), torch.randn(64, 8)
    rows = sae.W_dec.detach().clone()
    adam, _ = seen_by_adam(sae)
    loss_and_grad(sae, x, 4)
    before = sae.W_dec.grad.clone()
    update(sae, adam, 1e-2)
    assert (sae.W_dec.norm(dim=1) - 1).abs().max() < 1e-6
    assert not torch.equal(sae.W_dec, rows)
    assert (before * rows).sum(1).abs().max() > 1e-3
    assert (adam.state[sae.W_dec]["exp_avg"] * rows).sum(1).abs().max() < 1e-6


@pytest.mark.parametrize("size", [1e-4, 0.02, 10.0])  # norms far below 1, above it, far above
def test_the_gradient_reaches_adam_whole(size):
    """What Adam sees: the decoder rows' own part gone, nothing else scaled or clipped."""
    sae = MatryoshkaSAE(8, [600, 1300])
    adam, seen = seen_by_adam(sae)
    rows = sae.W_dec.detach().clone()
    for p in sae.parameters():
        p.grad = size * torch.randn_like(p)
    want = {name: p.grad.clone() for name, p in sae.named_parameters()}
    want["W_dec"] -= (want["W_dec"] * rows).sum(1, keepdim=True) * rows
    update(sae, adam, 1e-3)
    for got, w in zip(seen[0], want.values(), strict=True):
        assert torch.allclose(got, w, atol=1e-6 * size, rtol=1e-4)
    assert (sae.W_dec.norm(dim=1) - 1).abs().max() < 1e-6


@pytest.mark.parametrize("n_exempt", [5, 0])
def test_core_rows_stay_bitwise_through_the_optimiser(n_exempt):
    """Their gradient is there after the loss; Adam must nevertheless never move them, whereas
    their decoder rows and biases are trained."""
    sae = random_sae(n_core=5, n_exempt=n_exempt, dtype=torch.float32)
    nn.init.constant_(sae.b_enc, 1.0)
    adam, seen = seen_by_adam(sae)
    before = [p.detach().clone() for p in sae.parameters()]
    for step in range(20):
        loss_and_grad(sae, torch.randn(64, 8), 16, dead=torch.arange(50, 64))
        assert step or sae.W_enc.grad[:5].any(dim=1).all()
        update(sae, adam, 1e-2)
    W_enc, b_enc, W_dec, _ = before
    assert torch.equal(sae.W_enc[:5], W_enc[:5])
    assert not any(step[0][:5].any() for step in seen)
    assert (sae.W_enc[5:] != W_enc[5:]).any(dim=1).sum() > 40
    assert (sae.W_dec[:5] != W_dec[:5]).any(dim=1).all()
    assert (sae.b_enc[:5] != b_enc[:5]).all()


def test_learning_rate_warms_up_holds_and_falls_to_zero():
    """A tenth of a short run (of a long one 1000 steps) up, a constant, the last fifth down."""
    rates = [dmsae.learning_rate(step, 100, 2.0) for step in range(101)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert set(rates[9:81]) == {2.0}
    assert rates[81:] == pytest.approx([2.0 * i / 20 for i in range(19, -1, -1)])
    assert dmsae.learning_rate(499, 100_000, 2.0) == 1.0


# ---- The SAE ------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["W_enc", "b_enc", "W_dec", "b_dec", "threshold"])
def test_each_parameter_is_used(name):
    """Changing any one of the four parameters or the threshold must change the output."""
    sae, x = random_sae(), torch.randn(16, 8).double()
    before = sae(x)
    with torch.no_grad():
        getattr(sae, name).add_(0.3)
    assert not torch.allclose(before, sae(x))


def test_nested_loss_by_hand():
    """x = (3, 4), prefix 0 gives (3, 0), prefix 1 (3, 3): the loss must be (16 + 1) / (2 * 2)."""
    x_hats = torch.tensor([[[3.0, 0.0], [3.0, 3.0]]])
    assert nested_loss(torch.tensor([[3.0, 4.0]]), x_hats) == 17 / 4


def test_one_prefix_is_a_plain_sae():
    """With a single prefix the loss must be the mean squared error of the one reconstruction."""
    sae, x = random_sae(widths=(64,)), torch.randn(16, 8).double()
    loss, acts, _ = loss_and_grad(sae, x, 4)
    dense = torch.zeros(16, 64).double()
    dense[acts.row, acts.col] = acts.value
    assert torch.allclose(loss, (x - sae.decode(dense)).pow(2).mean())


def test_nested_reconstructions_are_those_of_the_truncated_saes():
    """Prefix j must reconstruct what its first latents alone give, the last what the SAE gives."""
    sae, x = random_sae(n_core=5, n_exempt=5), torch.randn(16, 8).double()
    x_hats = nested_decode(sparse(sae.encode(x)), sae.W_dec, sae.b_dec, sae.edges, 16)
    for j, width in enumerate(sae.widths):
        assert torch.allclose(x_hats[:, j], sae.decode(sae.encode(x, width)))
    assert torch.allclose(x_hats[:, -1], sae(x))


def test_3d_input_is_refused():
    """A (batch, sequence, D) tensor must be refused with the mend in the message."""
    with pytest.raises(ValueError, match="flatten"):
        random_sae().encode(torch.randn(2, 3, 8).double())


def test_folding_the_scale_gives_the_same_function_on_raw_activations():
    """sae(s * x) / s before must equal sae(x) after, with rows bit for bit as they were."""
    sae, x = random_sae(), torch.randn(16, 8).double()
    want = sae(2.5 * x) / 2.5
    W_enc, W_dec = sae.W_enc.clone(), sae.W_dec.clone()
    sae.fold_scale(2.5)
    assert torch.allclose(sae(x), want)
    assert torch.equal(sae.W_enc, W_enc)
    assert torch.equal(sae.W_dec, W_dec)


def planted(parents=6, children=3, d_model=32):
    """Hierarchical data: a child is only there with its parent. Parent directions, batch(step)."""
    g = torch.Generator().manual_seed(0)
    rows = torch.linalg.qr(torch.randn(d_model, d_model, generator=g)).Q
    rows = rows[: parents * (1 + children)]

    def batch(step, n=512):
        g = torch.Generator().manual_seed(1000 + step)
        on = torch.rand(n, parents, generator=g) < 0.25
        child = F.one_hot(torch.randint(0, children, (n, parents), generator=g), children)
        acts = torch.cat([on.float(), (on[..., None] * child * 0.6).flatten(1)], 1)
        return acts * (1 + 0.1 * torch.randn(acts.shape, generator=g)) @ rows

    return rows[:parents], batch


def test_planted_parents_are_found_in_the_first_prefix():
    """Where a child only comes with its parent, prefix 0 must hold every parent; a plain SAE of
    the same size and budget must not (its latents are parent + child, at a cosine of
    1 / sqrt(1 + 0.6^2) = 0.857: absorption)."""
    parents, batch = planted()
    worst = []
    for widths in ([10, 48], [48]):
        torch.manual_seed(0)
        sae = MatryoshkaSAE(32, widths)
        fit(sae, lambda step: batch(step, 256), k=2, steps=600, lr=5e-3)
        best = (sae.W_dec[: widths[0]] @ parents.T).max(0)  # over latents, for each parent
        assert len(set(best.indices.tolist())) == 6
        worst.append(best.values.min().item())
    assert worst[0] > 0.9
    assert worst[1] < 0.87


def test_inference_l0_is_the_trained_l0():
    """On data not trained on, the fixed threshold must give k active latents within 5 %."""
    _, batch = planted()
    torch.manual_seed(1)
    sae = MatryoshkaSAE(32, [6, 48])
    fit(sae, batch, k=3, steps=300)
    l0 = (sae.encode(batch(10_000, 4096)) > 0).sum(1).float().mean()
    assert l0 == pytest.approx(3, rel=0.05)


def test_threshold_follows_the_last_tenth_of_the_steps():
    """A cut that doubles half-way must be forgotten by the end; latents outside BatchTopK must
    not be touched; in a long run the last 100 steps weigh 1 - 0.99^100 = 0.634."""
    sae = random_sae(n_core=5, n_exempt=5)
    gates = sae.threshold[:5].clone()
    for step in range(100):
        sae.update_threshold(torch.tensor(1.0 if step < 50 else 2.0).double(), step)
    assert (sae.threshold[5:] - 2).abs().max() < 0.01
    assert torch.equal(sae.threshold[:5], gates)
    for step in range(5000, 5100):
        sae.update_threshold(torch.tensor(3.0).double(), step)
    assert sae.threshold[-1] == pytest.approx(2 + 0.634, abs=0.01)


def test_dead_latents_come_back():
    """Latents that lose every BatchTopK must win some after training with the dead-latent loss,
    and fewer without."""
    _, batch = planted()
    wins = []
    for dead in (torch.arange(24, 48), ()):
        torch.manual_seed(0)
        sae = MatryoshkaSAE(32, [6, 48])
        sae.b_enc.data[24:] = -0.6
        adam = torch.optim.Adam(sae.parameters())
        for step in range(101):
            _, acts, _ = loss_and_grad(sae, batch(step % 100), 3, dead=dead)
            if step in (0, 100):  # both times on batch(0)
                wins.append(int((acts.col >= 24).sum()))
            update(sae, adam, 3e-3)
    assert wins[0] == wins[2] < wins[1]
    assert wins[3] < wins[1]


# ---- The language model -------------------------------------------------------------------------
def test_residual_stream_is_the_layers_output_and_stops_there(lm):
    """It must equal transformers' own hidden states, and run neither later layers nor the head."""
    model, ids = load_tiny(lm), torch.randint(3, 300, (2, 10))
    want = model(ids, output_hidden_states=True).hidden_states[1]
    ran = []
    for m in (dmsae.decoder_layers(model)[1], model.lm_head):
        m.register_forward_hook(lambda *_: ran.append(1))
    assert torch.equal(dmsae.residual_stream(model, 0, ids), want)
    assert not ran
    assert model.config._attn_implementation == "eager", "soft-capping needs eager attention"


@pytest.mark.parametrize("as_tuple", [False, True])
def test_splicing_takes_tensors_and_tuples(as_tuple):
    """transformers 4 returns a tuple from a decoder layer, transformers 5 a tensor: both must be
    replaced while open, and left alone after."""

    class Layer(nn.Module):
        def forward(self, h):
            return (h, "cache") if as_tuple else h

    toy = Toy(torch.randn(5, 3), torch.randn(3, 5))
    toy.layers[0] = Layer()
    with dmsae.spliced(toy, 0, lambda h: 2 * h):
        inside = toy.layers[0](torch.ones(3))
    after = toy.layers[0](torch.ones(3))
    if as_tuple:
        assert inside[1] == after[1] == "cache"
        inside, after = inside[0], after[0]
    assert torch.equal(inside, 2 * torch.ones(3))
    assert torch.equal(after, torch.ones(3))


def test_gemma_2_2b_shape():
    """Gemma2Config()'s defaults are Gemma-2-2B: 26 layers of width 2304 must be found (on the
    meta device: no weights)."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    with torch.device("meta"):
        layers = dmsae.decoder_layers(Gemma2ForCausalLM(Gemma2Config()))
    assert len(layers) == 26
    assert layers[12].mlp.down_proj.out_features == 2304


class Mixing(Toy):
    """A Toy whose layer sees later positions; and one whose layer is replaced by `edit`."""

    def __init__(self, edit):
        super().__init__(torch.randn(9, 4), torch.randn(4, 9))
        self.layers[0].register_forward_hook(lambda module, args, out: edit(out))
        text_config = SimpleNamespace(num_hidden_layers=1, hidden_size=4)
        self.config = SimpleNamespace(get_text_config=lambda: text_config)


@pytest.mark.parametrize(
    "edit, words",
    [
        (lambda h: h + h.mean(1, keepdim=True), "causal"),
        (lambda h: h.flip(1), "causal"),
        (lambda h: h * math.nan, "not finite"),
        (lambda h: h[:, :, :3], "(2, 6, 3), not (2, 6, 4)"),
        (lambda h: h, None),
    ],
)
def test_a_model_that_cannot_be_read_is_refused(edit, words):
    """Another shape, NaN, and an output that a later token changes must each be told apart from a
    causal model, whose fingerprint is its layer's output at the sentence's end."""
    torch.manual_seed(0)
    toy = Mixing(edit)

    def tokenizer(text):
        return dict(input_ids=[1, 5, 7])

    if words is None:
        print_of_it = dmsae.check_model(toy, tokenizer, 0, 6)
        assert print_of_it == pytest.approx(toy.embedding[7].tolist())
    else:
        with pytest.raises(dmsae.BadInput) as error:
            dmsae.check_model(toy, tokenizer, 0, 6)
        assert words in str(error.value)


def test_a_vision_tower_is_not_the_language_model():
    """A vision tower of as many layers as the text model must not be hooked."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    text = dict(sizes, vocab_size=50, num_key_value_heads=1, head_dim=8)
    vision = dict(sizes, image_size=16, patch_size=8)
    tokens = dict(boi_token_index=47, eoi_token_index=48, image_token_index=49)
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, **tokens)
    model = Gemma3ForConditionalGeneration(config).eval()
    assert dmsae.residual_stream(model, 1, torch.arange(6)[None]).shape == (1, 6, 16)
    inside = {id(m) for m in model.get_decoder().modules()}
    assert id(dmsae.decoder_layers(model)) in inside


def test_nan_at_some_tokens_is_refused_and_can_be_mended(lm, tmp_path, capsys, monkeypatch):
    """What the probe does not see must be seen before anything not finite is in config.json."""
    words, harvest = command(lm, tmp_path / "out", cycles=0), dmsae.harvest
    monkeypatch.setattr(
        dmsae, "harvest", lambda *at: harvest(*at).index_fill(0, torch.tensor([5]), math.nan)
    )
    assert "nan or inf" in refusal(capsys, words)
    assert "measured" not in json.loads((tmp_path / "out" / "config.json").read_text())
    monkeypatch.undo()
    assert dmsae.main(words) == 0


def test_nan_in_the_weights_is_refused_before_the_text_is_read(lm, tmp_path, capsys):
    """Also behind the layer that is read; mended, the same command must go through."""
    shutil.copytree(lm, tmp_path / "lm")
    w = load_file(lm / "model.safetensors")
    w["model.layers.1.mlp.down_proj.weight"][0, 0] = math.nan
    save_file(w, tmp_path / "lm" / "model.safetensors", {"format": "pt"})
    words = command(tmp_path / "lm", tmp_path / "out", cycles=0)
    assert "not finite" in refusal(capsys, words)
    assert not (tmp_path / "out").exists()
    shutil.copy(lm / "model.safetensors", tmp_path / "lm")
    assert dmsae.main(words) == 0


def test_the_longest_context_of_a_model_is_read(lm):
    """Its max_position_embeddings, and the last layer, must be allowed."""
    model, _, _ = dmsae.load_model(Config(str(lm), layer=1, ctx=64, device="cpu"))
    assert model.config.max_position_embeddings == 64


# ---- Text ---------------------------------------------------------------------------------------
def test_documents_are_packed_with_bos_first_and_between(lm, tmp_path):
    """The stream must be doc BOS doc BOS..., every context must start with BOS, and no token may
    be lost up to the limit."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(lm)
    docs = ["the cat sat", "", "a dog ran to the house"]
    plain = [tokenizer(d, add_special_tokens=False)["input_ids"] for d in docs if d]
    want = [i for doc in plain for i in (*doc, 2)]
    path = tmp_path / "t"
    dmsae.tokenize(iter(docs), tokenizer, 2, 1000, path, 10**6)
    flat = np.fromfile(path, np.int32)
    assert flat.tolist() == want
    text = Text(flat[:9].reshape(3, 3), 2, torch.tensor([0, 1, 2]), 1, 1)
    ids, keep = text.contexts(slice(3))
    assert ids.tolist() == [[2, *want[3 * i : 3 * i + 3]] for i in range(3)]
    assert torch.equal(keep, ids > 2)
    dmsae.tokenize(iter(docs), tokenizer, 2, 4, path, 10**6)
    assert np.fromfile(path, np.int32).tolist() == want[:4]
    assert list(tmp_path.iterdir()) == [path]


def write_documents(docs, path):
    """A text file of the kind that its suffix says."""
    if path.suffix == ".txt":
        path.write_text("<sep>".join(docs))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"text": d}) + "\n" for d in docs))
    else:
        from datasets import Dataset

        Dataset.from_dict({"text": docs}).to_parquet(path)


def read_documents(path, **changes):
    return list(dmsae.documents(Config(text=str(path), **changes)))


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
def test_local_files_give_their_documents(suffix, tmp_path):
    """.txt must be split at the separator, and be one document without it; .jsonl and .parquet
    must give a row each."""
    docs, path = ["one\ntwo", "three"], tmp_path / ("t" + suffix)
    write_documents(docs, path)
    if suffix == ".txt":
        assert read_documents(path) == ["one\ntwo<sep>three"]
        assert read_documents(path, separator="<sep>") == docs
    else:
        assert read_documents(path) == docs


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_separator_splits_the_rows_of_any_source(suffix, tmp_path):
    """With --separator each row must give the documents between."""
    path = tmp_path / ("t" + suffix)
    write_documents(["one|two", "three"], path)
    assert read_documents(path, separator="|") == ["one", "two", "three"]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_null_documents_count_as_empty(suffix, tmp_path):
    """A row without a text must stop nothing, with a separator and without."""
    path = tmp_path / ("t" + suffix)
    write_documents(["one", None, "three"], path)
    assert read_documents(path) == ["one", "three"]
    assert read_documents(path, separator="|") == ["one", "three"]


def test_long_documents_come_in_pieces_cut_at_white_space(tmp_path):
    """Nothing may be lost, no piece be longer than 100,000 characters, nor a word be cut where
    there is white space; without any, a piece is cut anyway."""
    text = " ".join(str(i) for i in range(60_000)) + "\n\n" + "x" * 250_000
    (tmp_path / "t.txt").write_text(text)
    pieces = read_documents(tmp_path / "t.txt")
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= 100_000
    assert all(piece[0] == " " for piece in pieces[1:3])


def test_a_separator_as_a_shell_hands_it_over(tmp_path):
    """A backslash and an n must split at new lines, as a new line itself does."""
    (tmp_path / "t.txt").write_text("one\n\ntwo\nlines\n\nthree")
    for separator in ("\n\n", r"\n\n"):
        assert read_documents(tmp_path / "t.txt", separator=separator) == [
            "one",
            "two\nlines",
            "three",
        ]


def test_how_many_documents_is_said(lm, tmp_path, capsys):
    """A separator that splits nothing must show."""
    assert dmsae.main(command(lm, tmp_path, separator="@@", cycles=0, tokens=128)) == 0
    assert re.search(r"text: \d+ tokens in 1 documents", capsys.readouterr().out)


def test_a_dataset_can_name_a_configuration(monkeypatch):
    """name:configuration must reach load_dataset as its two arguments."""
    import datasets

    def load_dataset(path, name, split, streaming):
        return [{"text": f"{path} {name} {split}"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert list(dmsae.documents(Config(dataset="wikitext:raw"))) == ["wikitext raw train"]
    assert list(dmsae.documents(Config(dataset="a/b"))) == ["a/b None train"]


class Broken(Exception):
    pass


def test_tokenizing_goes_on_where_a_stream_broke_off(lm, tmp_path):
    """What a second start writes must be what one without an error writes, and documents that are
    there must not be tokenised again."""
    from transformers import AutoTokenizer

    tokenizer, docs = AutoTokenizer.from_pretrained(lm), [f"cat {i} dog sat" for i in range(200)]
    asked = []

    def counting(some, **words):
        asked.extend(some)
        return tokenizer(some, **words)

    def stream(n):
        yield from docs[:n]
        if n < len(docs):
            raise Broken

    dmsae.tokenize(stream(200), tokenizer, 2, 10**6, tmp_path / "whole", 10**6)
    for n in (70, 150):
        with pytest.raises(Broken):
            dmsae.tokenize(stream(n), counting, 2, 10**6, tmp_path / "broken", 10**6)
        assert not (tmp_path / "broken").exists()
    dmsae.tokenize(stream(200), counting, 2, 10**6, tmp_path / "broken", 10**6)
    assert (tmp_path / "broken").read_bytes() == (tmp_path / "whole").read_bytes()
    assert len(asked) == 200


@pytest.mark.parametrize("left", [1, 7, 402])
def test_half_a_document_is_not_kept(lm, tmp_path, left):
    """As a full disk leaves the file: what comes out must be what one whole start writes."""
    from transformers import AutoTokenizer

    tokenizer, docs = AutoTokenizer.from_pretrained(lm), [f"cat {i} dog sat" for i in range(90)]
    dmsae.tokenize(iter(docs), tokenizer, 2, 10**6, tmp_path / "whole", 10**6)
    whole = (tmp_path / "whole").read_bytes()
    (tmp_path / "broken.part").write_bytes(whole[:left])
    dmsae.tokenize(iter(docs), tokenizer, 2, 10**6, tmp_path / "broken", 10**6)
    assert (tmp_path / "broken").read_bytes() == whole


def test_what_another_tokenizer_left_is_not_continued(lm, tmp_path, capsys):
    """A start that ended in the text, then another tokenizer: a fresh run's text must come out."""
    shutil.copytree(lm, tmp_path / "lm")
    rows = [json.dumps(dict(text=f"cat {i} dog sat")) for i in range(2000)]
    (tmp_path / "t.jsonl").write_text("\n".join([*rows[:900], '{"text": 7}', *rows]))
    words = command(tmp_path / "lm", tmp_path / "a", text=tmp_path / "t.jsonl", separator=None)
    assert "no text" in refusal(capsys, words)
    (tmp_path / "t.jsonl").write_text("\n".join(rows))
    path = tmp_path / "lm" / "tokenizer.json"
    data = json.loads(path.read_text())
    vocab = data["model"]["vocab"]
    vocab["s"], vocab["n"] = vocab["n"], vocab["s"]
    path.write_text(json.dumps(data))
    for out in ("a", "b"):
        words = command(tmp_path / "lm", tmp_path / out, text=tmp_path / "t.jsonl", separator=None)
        assert dmsae.main([*words, "--cycles", "0", "--tokens", "128"]) == 0
    a, b = ((tmp_path / out / "tokens.bin").read_bytes() for out in ("a", "b"))
    assert a == b


def test_ids_beyond_the_embedding_are_refused(lm, tmp_path, capsys):
    """A word added to the tokenizer alone must be refused where it occurs, and only there."""
    from transformers import AutoTokenizer

    shutil.copytree(lm, tmp_path / "lm")
    tokenizer = AutoTokenizer.from_pretrained(lm)
    tokenizer.add_tokens(["sat on"])
    tokenizer.save_pretrained(tmp_path / "lm")
    line = refusal(capsys, command(tmp_path / "lm", tmp_path / "out"))
    assert re.search(r"token id \d+: the model has only 300 embeddings", line)
    (tmp_path / "t.jsonl").write_text(json.dumps(dict(text="the cat ran to house " * 2000)))
    words = command(tmp_path / "lm", tmp_path / "b", text=tmp_path / "t.jsonl", cycles=0)
    assert dmsae.main([*words, "--tokens", "1000"]) == 0


def test_tokens_of_enormous_norm_are_warned_of(lm, tmp_path, capsys, monkeypatch):
    """One line must give their share and size; without them there must be none."""
    words = dict(cycles=0, tokens=128)
    assert dmsae.main(command(lm, tmp_path / "a", **words)) == 0
    assert "median norm" not in capsys.readouterr().out
    stream = dmsae.residual_stream

    def with_sinks(model, layer, ids):
        h = stream(model, layer, ids)
        return torch.where((ids % 17 == 0)[..., None], 100 * h, h)

    monkeypatch.setattr(dmsae, "residual_stream", with_sinks)
    dmsae.main(command(lm, tmp_path / "b", **words))
    out = capsys.readouterr().out
    assert re.search(r"warning: \d+\.\d\d% of tokens have 10 to \d+ x the median norm", out)


def test_a_file_name_is_no_pattern(tmp_path):
    """t[1].txt beside t1.txt must be read itself."""
    (tmp_path / "t[1].txt").write_text("this")
    (tmp_path / "t1.txt").write_text("not this")
    assert read_documents(tmp_path / "t[1].txt") == ["this"]


@pytest.mark.parametrize("column", ["words", "number"])
def test_a_column_that_holds_no_text_is_refused(lm, tmp_path, capsys, column):
    """One that is missing, or that holds numbers: one line with the flag and the file."""
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "the cat", "number": 5}\n' * 9)
    changes = dict(text=path, text_column=column, separator=None)
    line = refusal(capsys, command(lm, tmp_path / "out", **changes))
    assert f"--text-column {column}" in line
    assert str(path) in line


def test_a_short_text_is_tokenized_once_and_held_out_by_a_tenth(lm, tmp_path):
    """A tenth of its contexts must be held out, half for evaluation and half for attribution; a
    second call must read the file of the first."""
    cfg = Config(str(lm), 0, text=str(lm / "text.txt"), separator="|||", ctx=32, tokens=12_800)
    model, tokenizer, _ = dmsae.load_model(cfg)
    text = dmsae.open_text(cfg, model, tokenizer, tmp_path)
    assert text.rows.shape[1] == 31
    assert text.n_eval == len(text.rows) // 10 // 2
    assert text.n_eval + text.n_attribution == len(text.rows) // 10
    assert (text.bos, text.special.tolist()) == (2, [2, 1, 0])
    before = (tmp_path / "tokens.bin").stat().st_mtime_ns
    again = dmsae.open_text(cfg, model, tokenizer, tmp_path)
    assert np.array_equal(again.rows, text.rows)
    assert (tmp_path / "tokens.bin").stat().st_mtime_ns == before


def test_held_out_contexts_are_the_first_and_split_in_two():
    """Evaluation must get the first n_eval contexts, attribution the next n_attribution."""
    rows = np.arange(3, 13, dtype=np.int32)[:, None].repeat(3, 1)
    text = Text(rows, 2, torch.tensor([2, 7]), 3, 2)
    (ids, keep), (other, other_keep) = text.held_out()
    assert ids.tolist() == [[2, i, i, i] for i in (3, 4, 5)]
    assert other.tolist() == [[2, i, i, i] for i in (6, 7)]
    assert keep.tolist() == [[False, True, True, True]] * 3
    assert other_keep.tolist() == [[False, True, True, True], [False] * 4]


def test_blocks_are_fixed_by_number_and_seed_and_never_held_out():
    """The same number and seed must give the same contexts; every training context once a pass;
    no held-out one; after a pass the text must start again."""
    rows = np.arange(20, dtype=np.int32)[:, None].repeat(3, 1)
    text = Text(rows, 99, torch.tensor([99]), 2, 3)

    def block(number, seed=0):
        return text.block(number, 5, seed)[0]

    assert torch.equal(block(1), block(1))
    assert not torch.equal(block(1), block(1, seed=1))
    seen = torch.cat([block(i)[:, 1] for i in range(3)])
    assert sorted(seen.tolist()) == list(range(5, 20))
    assert torch.equal(block(3), block(0))


def test_special_tokens_never_reach_the_sae(lm):
    """Positions of BOS, EOS and PAD must be dropped from what is harvested."""
    model, row = load_tiny(lm), np.array([[5, 1, 7, 0, 9, 2, 8]])
    ids, keep = Text(row, 2, torch.tensor([0, 1, 2]), 1, 1).contexts(slice(1))
    acts = dmsae.harvest(model, 0, ids, keep)
    assert torch.equal(acts, dmsae.residual_stream(model, 0, ids)[0, [1, 3, 5, 7]])


def stream_of(model, rows, *position):
    """Batches of 16 tokens from contexts of 8, from the given position."""
    cfg = Config(layer=0, ctx=8, batch=16, device="cpu")
    text = Text(rows.astype(np.int32), 2, torch.tensor([0, 1, 2]), 2, 3)
    run = SimpleNamespace(cfg=cfg, model=model, text=text, scale=2.0)
    return dmsae.batches(run, 0, *position)


def test_batches_resume_from_their_position(lm):
    """The batch that follows a position must be the same whether or not the ones before were
    drawn, within a block and at its end."""
    model, rows = load_tiny(lm), np.random.default_rng(0).integers(3, 300, (400, 7))
    stream = stream_of(model, rows)
    drawn = [next(stream) for _ in range(70)]  # more than a block
    for i in (0, 30, 62, 63, 64, 68):
        _, position = drawn[i]
        x, _ = next(stream_of(model, rows, *position))
        assert torch.equal(x, drawn[i + 1][0])


def test_each_training_and_block_has_an_order_of_its_own(lm):
    """The activations of a block must be the same in every training, their order must not; nor may
    two blocks be shuffled alike."""
    rows = np.random.default_rng(0).integers(3, 300, (133, 7)).astype(np.int32)
    text = Text(rows, 2, torch.tensor([0, 1, 2]), 2, 3)  # 128 contexts: block 1 is block 0 again
    cfg = Config(layer=0, ctx=8, batch=14, device="cpu")
    run = SimpleNamespace(cfg=cfg, model=load_tiny(lm), text=text, scale=2.0)
    a, b = (itertools.islice(dmsae.batches(run, training), 128) for training in (0, 1))
    a, b = (torch.cat([x for x, _ in some]).split(64 * 14) for some in (a, b))
    assert not (torch.equal(a[0], b[0]) or torch.equal(a[0], a[1]))
    assert torch.equal(a[0].sort(0).values, b[0].sort(0).values)


def test_what_was_resumed_keeps_its_limit(lm, tmp_path):
    """Ids that are there already count: in all there must be `limit` of them."""
    from transformers import AutoTokenizer

    np.array([5, 6, 7, 2, 8, 2], np.int32).tofile(tmp_path / "t.part")
    docs, tokenizer = iter(["the cat sat"] * 50), AutoTokenizer.from_pretrained(lm)
    dmsae.tokenize(docs, tokenizer, 2, 40, tmp_path / "t", 300)
    assert (tmp_path / "t").stat().st_size == 4 * 40


# ---- Evaluation and attribution -----------------------------------------------------------------
def tiny_case():
    """A GPT-2 in float64 (Gemma's norms always compute in float32), contexts with a BOS and an
    EOS inside: model, ids, keep; and an SAE."""
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = dict(vocab_size=300, n_embd=32, n_layer=2, n_head=2, n_positions=16)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**shape, initializer_range=0.3))
    model = model.double().eval().requires_grad_(False)
    ids = torch.randint(3, 300, (3, 9))
    ids[:, 0] = 2
    ids[1, 4] = 1
    keep = ids > 2
    sae = random_sae(32, (12, 40), n_core=4, n_exempt=4)
    sae.b_dec.data = dmsae.harvest(model, 0, ids, keep).mean(0)
    return model, ids, keep, sae


def test_attribution_equals_finite_differences():
    """a_i(t) must be the derivative of the loss when latent i at token t is scaled, the rest of
    the narrowest reconstruction held fixed."""
    model, ids, keep, sae = tiny_case()
    score, density = attribute(model, 0, ids, keep, sae)
    f = sae.encode(dmsae.harvest(model, 0, ids, keep), 12).detach()
    x_hat, h = sae.decode(f).detach(), 1e-4

    def loss(step):
        with torch.no_grad():
            return spliced_loss(model, 0, ids, keep, lambda x: x_hat + step).item()

    a = torch.zeros_like(f)
    for t, i in f.nonzero().tolist():
        step = torch.zeros_like(x_hat)
        step[t] = h * f[t, i] * sae.W_dec[i].detach()
        a[t, i] = (loss(step) - loss(-step)) / (2 * h)
    assert (a.abs() > 1e-4).sum() > 20
    assert torch.allclose(a.abs().mean(0), score, rtol=1e-6, atol=1e-8)
    assert torch.allclose(density, (f > 0).float().mean(0))


def test_attribution_in_several_batches_is_exact():
    """Score and density must be those of all tokens at once, although the contexts come 1024
    tokens at a time."""
    torch.manual_seed(0)
    toy = Toy(torch.randn(1000, 8).double(), torch.randn(8, 1000).double())
    ids, sae = torch.randint(1, 1000, (600, 10)), random_sae()  # hardly a pair of tokens twice
    keep = ids > 3
    parts = []

    def replace(x):
        f = sae.encode(x, 13).detach()
        parts.append((f, sae.decode(f).detach().requires_grad_()))
        return parts[-1][1]

    spliced_loss(toy, 0, ids, keep, replace).backward()
    ((f, leaf),) = parts
    a = (f * (leaf.grad @ sae.W_dec[:13].T)).abs().detach()
    mean, density = attribute(toy, 0, ids, keep, sae)
    assert torch.allclose(mean, a.mean(0), rtol=1e-12)
    assert torch.allclose(density, (f > 0).float().mean(0))


def test_attribution_ranks_the_directions_that_the_loss_reads_first():
    """Where the head reads 3 of 8 directions, the latents of those must get all of the
    attribution, in order of use."""
    torch.manual_seed(0)
    head = torch.zeros(8, 50)
    head[:3] = torch.randn(3, 50) * torch.tensor([[4.0], [2.0], [1.0]])
    toy, ids = Toy(torch.rand(50, 8), head), torch.randint(1, 50, (30, 10))
    sae = MatryoshkaSAE(8, [8, 16])
    sae.W_enc.data[:8] = sae.W_dec.data[:8] = torch.eye(8)[[5, 0, 6, 1, 7, 2, 3, 4]]
    score, density = attribute(toy, 0, ids, ids > 0, sae)
    assert score.argsort(descending=True)[:3].tolist() == [1, 3, 5]
    assert select_core(score, 0.999).tolist() == [1, 3, 5]
    assert density[0] > 0.9
    assert score[[0, 2, 4, 6, 7]].max() < 1e-6


def test_evaluation_by_hand():
    """FVU of each prefix, L0 and the core's L0 must equal their definitions, in batches too."""
    sae = random_sae(n_core=5, n_exempt=5, dtype=torch.float32)
    x = torch.randn(5000, 8)
    acts = sae.encode(x)
    variance = (x - x.mean(0)).pow(2).sum()
    fvu = [(x - sae.decode(acts[:, :w])).pow(2).sum() / variance for w in sae.widths]
    got = evaluate(sae, x)
    assert got["fvu"] == pytest.approx([f.item() for f in fvu], rel=1e-4)
    assert got["l0"] == pytest.approx((acts > 0).sum(1).float().mean().item())
    assert got["core_l0"] == pytest.approx((acts[:, :5] > 0).sum(1).float().mean().item())


def test_evaluation_loses_no_digits_to_a_constant():
    """1e4 added to x and b_dec must change no FVU by more than 1e-3 of itself."""
    sae, x = random_sae(dtype=torch.float32), torch.randn(5000, 8)
    before = evaluate(sae, x)["fvu"]
    sae.b_dec.data += 1e4
    assert evaluate(sae, x + 1e4)["fvu"] == pytest.approx(before, rel=1e-3)


def test_mean_loss_by_hand():
    """It must be the cross-entropy at kept positions, where the kept outputs are replaced."""
    torch.manual_seed(0)
    toy, sae = Toy(torch.randn(50, 8), torch.randn(8, 50)), random_sae(dtype=torch.float32)
    ids = torch.randint(1, 50, (600, 10))
    ids[:, 0] = 0
    ids[7, 3:6] = 0
    keep = ids > 0
    h = toy.embedding[ids]

    def loss(h):
        logits = (h @ toy.head)[:, :-1][keep[:, :-1]]
        return F.cross_entropy(logits, ids[:, 1:][keep[:, :-1]]).item()

    with_sae = h.clone()
    with_sae[keep] = sae(h[keep]).detach()
    assert mean_loss(toy, 0, ids, keep, sae) == pytest.approx(loss(with_sae), rel=1e-5)
    assert mean_loss(toy, 0, ids, keep, lambda x: x) == pytest.approx(loss(h), rel=1e-5)
    assert mean_loss(toy, 0, ids, keep, torch.zeros_like) == pytest.approx(math.log(50), rel=1e-5)


def test_evaluation_and_attribution_change_nothing():
    """SAE, threshold and language model must be bit for bit what they were, and carry no
    gradients or hooks."""
    model, ids, keep, sae = tiny_case()
    before = {n: t.clone() for m in (sae, model) for n, t in m.state_dict().items()}
    evaluate(sae, dmsae.harvest(model, 0, ids, keep))
    mean_loss(model, 0, ids, keep, sae)
    attribute(model, 0, ids, keep, sae)
    after = {n: t for m in (sae, model) for n, t in m.state_dict().items()}
    assert all(torch.equal(t, after[n]) for n, t in before.items())
    assert all(p.grad is None for p in (*sae.parameters(), *model.parameters()))
    assert not dmsae.decoder_layers(model)[0]._forward_hooks


# ---- The core -----------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", range(20))
def test_selection_is_the_smallest_set(seed):
    """No smaller set of latents may hold the coverage (brute force over all subsets)."""
    scores = torch.rand(8, generator=torch.Generator().manual_seed(seed)) ** 3
    coverage = [0.5, 0.8, 0.9, 0.99, 1.0][seed % 5]
    chosen = select_core(scores, coverage)
    needed = coverage * scores.double().sum() - 1e-12

    def some_set_holds(n):
        sets = itertools.combinations(range(8), n)
        return any(scores[list(c)].double().sum() >= needed for c in sets)

    assert len(chosen) == min(n for n in range(1, 9) if some_set_holds(n))
    assert scores[chosen].double().sum() >= needed
    assert scores[chosen].tolist() == sorted(scores[chosen].tolist(), reverse=True)


def test_selection_leaves_out_latents_without_score():
    """Full coverage must not select zeros."""
    assert select_core(torch.tensor([0.0, 3.0, 0.0, 1.0]), 1.0).tolist() == [1, 3]


@pytest.mark.parametrize("scores", [[0.0, 0.0], [1.0, math.nan], [1.0, math.inf]])
def test_selection_refuses_where_there_is_nothing_to_share_out(scores):
    """Zeros and what is not finite must be refused."""
    with pytest.raises(dmsae.BadInput, match="no core"):
        select_core(torch.tensor(scores), 0.9)


def test_identity_votes_and_gates_travel():
    """Old members must keep row, gate and birth, and gain a vote; newcomers must get theirs; the
    unchosen must be gone."""
    sae = random_sae(widths=(6, 64), n_core=2, n_exempt=2, dtype=torch.float32)
    old = Core(
        W_enc=torch.randn(2, 8),
        bias=torch.tensor([7.0, 8.0]),
        threshold=torch.tensor([0.1, 0.2]),
        birth=torch.tensor([[0, 11], [1, 5]]),
        votes=torch.tensor([3, 1]),
        score=torch.zeros(2),
        density=torch.zeros(2),
        index=torch.tensor([0, 1]),
    )
    sae.W_enc.data[:2] = old.W_enc
    scores, density = torch.arange(6.0).double(), torch.arange(6.0) / 10
    new = next_core(old, sae, torch.tensor([4, 1]), scores, density, 2)
    assert new.birth.tolist() == [[2, 4], [1, 5]]
    assert new.votes.tolist() == [1, 2]
    assert new.index.tolist() == [4, 1]
    assert torch.equal(new.W_enc, torch.stack([sae.W_enc[4], old.W_enc[1]]))
    assert new.score.tolist() == [4, 1]
    assert torch.equal(new.density, density[[4, 1]])
    gate = (sae.b_enc[4] - sae.W_enc[4] @ sae.b_dec).item()
    assert new.bias.tolist() == pytest.approx([gate, 8.0])
    assert torch.equal(new.threshold, torch.stack([sae.threshold[4], old.threshold[1]]))


def core_of(sae, n):
    """A first core: the first n latents of an SAE."""
    M, D = sae.widths[0], sae.W_enc.shape[1]
    nothing, scores = Core(torch.zeros(0, D)), torch.ones(M)
    return next_core(nothing, sae, torch.arange(n), scores, scores, 0)


@pytest.mark.parametrize("mode", ["dynamic", "exempt", "compete", "gated"])
def test_a_new_sae_carries_encoder_rows_and_nothing_else(mode):
    """Core rows must be there bit by bit; decoder, biases and the other latents must be fresh;
    gated must keep the function, the others have gates at zero."""
    donor, x = random_sae(dtype=torch.float32), torch.randn(200, 8)
    core = core_of(donor, 5)
    cfg = Config(d_sae=64, core_sparsity=mode)
    sae, other = (dmsae.new_sae(cfg, core, x * 3, 3.0, training) for training in (1, 2))
    assert torch.equal(sae.W_enc[:5], donor.W_enc[:5])
    assert torch.allclose(sae.W_dec[:5], F.normalize(donor.W_enc[:5]))
    assert not torch.equal(sae.W_enc[5:], other.W_enc[5:]), "a new seed each training"
    assert torch.equal(sae.W_enc[5:], sae.W_dec[5:])
    assert torch.allclose(sae.b_dec, 3 * x.mean(0), atol=1e-6)
    assert sae.n_core == 5
    assert sae.n_exempt == (0 if mode == "compete" else 5)
    assert sae.widths == [7, 11, 19, 35, 64]
    assert not sae.b_enc[5:].any()
    assert not sae.threshold[5:].any()
    if mode == "gated":
        got, want = sae.encode(3 * x)[:, :5], donor.encode(x)[:, :5]
        assert torch.equal(got > 0, want > 0)
        assert torch.allclose(got, 3 * want, atol=1e-4)
    else:
        assert not sae.b_enc.any()
        assert not sae.threshold.any()


def test_core_takes_its_place_inside_d_sae():
    """Widths must grow by the core except the last; a core that leaves no room is refused."""
    cfg = Config(d_sae=64, prefixes=(1 / 8, 1 / 2))
    assert cfg.widths() == [8, 32, 64]
    assert cfg.widths(10) == [18, 42, 64]
    assert cfg.widths(31) == [39, 63, 64]
    for n_core in (32, 62, 64):
        with pytest.raises(dmsae.BadInput, match=f"--d-sae 64 above a core of {n_core}"):
            cfg.widths(n_core)
    assert Config().widths() == [2048, 6144, 14336, 30720, 65536]


# ---- Whole runs ---------------------------------------------------------------------------------
def test_frozen_rows_are_bitwise_unchanged_and_everything_is_on_disk(story):
    """Each training's core rows must be those of the core chosen before, bit by bit; identities,
    files and figures must be complete."""
    for cycle in (1, 2, 3):
        core, now, w = saved_core(story, cycle - 1), saved_core(story, cycle), weights(story, cycle)
        C = len(core["W_enc"])
        assert C > 0
        assert torch.equal(w["W_enc"].T[:C], core["W_enc"])
        assert not torch.allclose(w["W_dec"][:C], F.normalize(core["W_enc"])), "it is trained"
        old = {tuple(b): row for b, row in zip(core["birth"].tolist(), core["W_enc"], strict=True)}
        members = zip(now["birth"].tolist(), now["W_enc"], now["votes"].tolist(), strict=True)
        for birth, row, votes in members:
            if birth[0] < cycle:
                assert torch.equal(old[tuple(birth)], row)
                assert votes > 1
            else:
                assert votes == 1
        r, kept = result(story, cycle), int((now["index"] < C).sum())
        new, dropped = len(now["index"]) - kept, C - kept
        assert (r["core"], r["kept"], r["new"], r["dropped"]) == (kept + new, kept, new, dropped)
        assert len(r["fvu"]) == 5
        assert r["tokens"] == 12_800
        assert 0 <= r["dead"] < 0.5, "most latents fire in ten steps"
    assert [result(story, n)["cycle"] for n in range(4)] == [0, 1, 2, 3]
    assert not list(story.glob("*.safetensors"))
    assert not list(story.glob("*.part"))


def test_figures_of_a_run_are_those_of_its_saved_sae(lm, story):
    """FVU, L0, CE and CE recovered must come out again from the files, on the held-out text."""
    cfg = Config(model=str(lm), layer=0, ctx=32, device="cpu", attribution_tokens=1000)
    model, tokenizer, _ = dmsae.load_model(cfg)
    (ids, keep), _ = dmsae.open_text(cfg, model, tokenizer, story).held_out()
    sae, r = load_sae(story / "cycle3"), result(story, 3)
    x = dmsae.harvest(model, 0, ids, keep)
    acts, source = sae.encode(x), keep[:, :-1]
    error, variance = (x - sae.decode(acts)).pow(2).sum(), (x - x.mean(0)).pow(2).sum()
    assert r["fvu"][-1] == pytest.approx((error / variance).item(), rel=1e-4)
    assert r["l0"] == pytest.approx((acts > 0).sum(1).float().mean().item(), rel=1e-4)

    def ce(edit):
        with torch.no_grad(), dmsae.spliced(model, 0, edit):
            logits = model(ids).logits[:, :-1][source]
        return F.cross_entropy(logits, ids[:, 1:][source]).item()

    def with_sae(h):
        return h.masked_scatter(keep[..., None], sae(h[keep]))

    original, spliced, zero = ce(lambda h: h), ce(with_sae), ce(torch.zeros_like)
    assert r["ce"] == pytest.approx(spliced, rel=1e-5)
    recovered = (zero - spliced) / (zero - original)
    assert r["ce_recovered"] == pytest.approx(recovered, rel=1e-4)


@pytest.mark.parametrize("cycle", [0, 3])
def test_saved_folder_is_a_jumprelu_sae(story, tmp_path, cycle):
    """A few lines that know only SAELens's jumprelu must give our forward; saving and loading
    again must be bitwise."""
    cfg = json.loads((story / f"cycle{cycle}" / "cfg.json").read_text())
    meta, w = cfg["metadata"], weights(story, cycle)
    assert cfg["architecture"] == "jumprelu"
    assert w["W_enc"].shape == (cfg["d_in"], cfg["d_sae"])
    x = torch.randn(50, cfg["d_in"]) * 5
    pre = (x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    acts = torch.where(pre > w["threshold"], pre.relu(), torch.tensor(0.0))
    sae = load_sae(story / f"cycle{cycle}")
    assert (sae(x) - (acts @ w["W_dec"] + w["b_dec"])).abs().max() < 1e-4
    assert (sae.encode(x) > 0).any()
    assert (w["W_dec"].norm(dim=1) - 1).abs().max() < 1e-6
    assert w["threshold"].min() >= 0
    assert (sae.widths, sae.n_core) == (meta["widths"], meta["n_core"])
    dmsae.save_sae(sae, tmp_path, model_name=meta["model_name"])
    again = load_sae(tmp_path)
    assert torch.equal(again.encode(x), sae.encode(x))
    assert torch.equal(again(x), sae(x))
    assert (again.widths, again.n_core, again.n_exempt) == (sae.widths, sae.n_core, sae.n_exempt)


@pytest.mark.parametrize("metadata", [None, {"sae_lens_version": "6.0.0"}])
def test_a_plain_sae_of_saelens_loads(tmp_path, metadata):
    """A folder without our metadata, as SAELens writes it, must load as one prefix, no core."""
    sae, x = random_sae(dtype=torch.float32), torch.randn(9, 8)
    dmsae.save_sae(sae, tmp_path)
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    dmsae.write_json(dict(cfg, metadata=metadata), tmp_path / "cfg.json")
    again = load_sae(tmp_path)
    assert (again.widths, again.n_core) == ([64], 0)
    assert torch.equal(again(x), sae(x))


def test_a_scaling_factor_of_ones_is_none(tmp_path):
    """Older versions of SAELens write one; any other value is refused."""
    sae, x = random_sae(dtype=torch.float32), torch.randn(9, 8)
    dmsae.save_sae(sae, tmp_path)
    path = tmp_path / "sae_weights.safetensors"
    w = load_file(path)
    save_file(dict(w, scaling_factor=torch.ones(64)), path)
    assert torch.equal(load_sae(tmp_path)(x), sae(x))
    save_file(dict(w, scaling_factor=torch.full((64,), 2.0)), path)
    with pytest.raises(dmsae.BadInput, match="scaling_factor"):
        load_sae(tmp_path)


def test_a_missing_key_is_named(tmp_path):
    """cfg.json without d_in must be refused with that name."""
    dmsae.save_sae(random_sae(dtype=torch.float32), tmp_path)
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    del cfg["d_in"]
    dmsae.write_json(cfg, tmp_path / "cfg.json")
    with pytest.raises(dmsae.BadInput, match="KeyError.*d_in"):
        load_sae(tmp_path)


OLD_CONFIG = dict(
    model="runs/demo/model",
    layer=1,
    separator=None,
    prefixes=[0.03125, 0.09375, 0.21875, 0.46875, 1.0],
    core_in_prefixes=False,
    core_decoder="encoder",
    attribution_error=False,
    cache_gb=None,
    compile=True,
    dry_run=False,
    demo=True,
)


def test_an_sae_of_the_first_version_loads(tmp_path):
    """A folder as commit bfa42cb wrote it must give the function that its weights define."""
    torch.manual_seed(0)
    w = dict(W_enc=torch.randn(4, 9), W_dec=torch.randn(9, 4), b_enc=torch.randn(9))
    w |= dict(b_dec=torch.randn(4), threshold=torch.rand(9))
    save_file(w, tmp_path / "sae_weights.safetensors")
    ours = dict(config=OLD_CONFIG, result=dict(cycle=1, core=2), widths=[5, 9], n_core=3)
    cfg = dict(
        architecture="jumprelu",
        d_in=4,
        d_sae=9,
        dtype="float32",
        device="cpu",
        apply_b_dec_to_input=True,
        normalize_activations="none",
        reshape_activations="none",
        metadata=dict(sae_lens_version="6.0.0", model_name="m", n_exempt=2, **ours),
    )
    (tmp_path / "cfg.json").write_text(json.dumps(cfg, indent=1))
    sae, x = load_sae(tmp_path), torch.randn(20, 4)
    pre = (x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    acts = pre.relu() * (pre > w["threshold"])
    assert torch.allclose(sae(x), acts @ w["W_dec"] + w["b_dec"], atol=1e-6)
    assert torch.equal(sae.W_enc, w["W_enc"].T)
    assert (sae.widths, sae.n_core, sae.n_exempt) == ([5, 9], 3, 2)


def test_a_core_of_the_first_version_loads(tmp_path):
    """A core.safetensors as commit bfa42cb wrote it must load with its training's number."""
    want = dict(
        W_enc=torch.randn(3, 4),
        bias=torch.randn(3),
        threshold=torch.rand(3),
        birth=torch.tensor([[0, 5], [1, 7], [1, 2]]),
        votes=torch.tensor([2, 1, 1]),
        score=torch.rand(3),
        density=torch.rand(3),
        index=torch.tensor([0, 7, 2]),
    )
    meta = json.dumps(dict(training=1, **OLD_CONFIG))
    save_file(want, tmp_path / "core.safetensors", {"dmsae": meta})
    core, origin = dmsae.load_core(tmp_path / "core.safetensors")
    assert origin["training"] == 1
    assert vars(core).keys() == want.keys()
    assert all(torch.equal(t, want[name]) for name, t in vars(core).items())


def popen(*words):
    """A process of its own group that runs Python on `words`."""
    return subprocess.Popen(
        [sys.executable, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for(path, process, seconds=300):
    end = time.time() + seconds
    while not path.exists():
        assert time.time() < end and process.poll() is None, process.communicate()
        time.sleep(0.01)


def test_the_dead_of_a_step_are_those_of_the_last_tenth_step(lm, tmp_path, monkeypatch):
    """Latents that have not fired for a tenth of the tokens, looked for before steps 1, 11, 21,
    ...; never a core latent."""
    seen, real = [], dmsae.loss_and_grad

    def spy(sae, x, k, floor, dead):
        loss, acts, cut = real(sae, x, k, floor, dead)
        seen.append((set(dead.tolist()), set(acts.col.tolist()), sae.n_core))
        return loss, acts, cut

    monkeypatch.setattr(dmsae, "loss_and_grad", spy)
    words = command(lm, tmp_path, k=1, prefixes=0.5, select="random", tokens=25_600)
    words += ["--core-sparsity", "compete"]  # this core is silent for long
    assert dmsae.main(words) == 0
    for training in (seen[:200], seen[200:]):
        since, want = {i: 0 for i in range(128)}, set()
        for step, (dead, fired, n_core) in enumerate(training):
            if step % 10 == 0:
                want = {i for i, n in since.items() if n >= 2560 and i >= n_core}
            assert dead == want
            silent = any(n >= 2560 for i, n in since.items() if i < n_core)
            since = {i: 0 if i in fired else n + 128 for i, n in since.items()}
        assert want
    assert silent


@pytest.mark.parametrize(
    "how, when",
    [
        (signal.SIGKILL, "config.json"),
        (signal.SIGKILL, "checkpoint1.safetensors"),
        (signal.SIGKILL, "checkpoint1_k3.safetensors"),
        (signal.SIGINT, "checkpoint1.safetensors"),
    ],
)
def test_killed_and_resumed_equals_uninterrupted(lm, whole, tmp_path, how, when):
    """Killed or interrupted at any time and started again, a run must end with bitwise the same
    weights and cores, those of transfers too."""
    words = command(lm, tmp_path, tokens=25_600, transfer_k=3)
    process = popen(HERE / "dmsae.py", *words, "--checkpoint-minutes", 0)
    wait_for(tmp_path / when, process)
    process.send_signal(how)
    _, errors = process.communicate(timeout=60)
    assert (tmp_path / when).exists()
    if how == signal.SIGINT:
        assert process.returncode == 130
        assert errors.splitlines()[-1].startswith("dmsae: interrupted; the same command")
        assert "Traceback" not in errors
    else:
        assert process.returncode == -9
    assert dmsae.main(words) == 0
    assert_same(tmp_path, whole, (0, 1, "1_k3"))
    assert not list(tmp_path.glob("checkpoint*"))


def test_a_run_stopped_between_its_folder_and_its_checkpoint_goes_on(lm, whole, tmp_path):
    """A checkpoint that a finished training left behind must disturb nothing."""
    shutil.copytree(whole, tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "cycle1_k3")
    (tmp_path / "out" / "checkpoint0.safetensors").write_bytes(b"left behind")
    words = command(lm, tmp_path / "out", tokens=25_600, transfer_k=3)
    assert dmsae.main(words) == 0
    assert_same(tmp_path / "out", whole, (0, 1, "1_k3"))


def test_a_run_from_a_core_file_is_the_transfer_of_that_core(lm, whole, tmp_path):
    """--core FILE --cycles 0 --k 3 must start as anew as --transfer-k 3 does: bitwise the same; and
    both must say that their k is 3."""
    path = whole / "cycle1" / "core.safetensors"
    out = tmp_path / "out"
    assert dmsae.main(command(lm, out, tokens=25_600, core=path, cycles=0, k=3)) == 0
    for read in (weights, saved_core):
        here, there = read(out, "0"), read(whole, "1_k3")
        assert all(torch.equal(here[name], there[name]) for name in here)
    for folder in (out / "cycle0", whole / "cycle1_k3"):
        cfg = json.loads((folder / "cfg.json").read_text())["metadata"]["config"]
        assert cfg["k"] == dmsae.load_core(folder / "core.safetensors")[1]["config"]["k"] == 3


def test_another_configuration_in_the_same_folder_is_refused(lm, story, capsys):
    """What differs must be named with both values, and nothing may be touched."""
    before = {p: p.stat().st_mtime_ns for p in story.rglob("*")}
    words = command(lm, story, cycles=3, k=7, lr=0.1)
    line = refusal(capsys, words)
    (story / "tokens.bin").rename(story / "away.bin")  # to save room, perhaps
    assert refusal(capsys, words) == line
    (story / "away.bin").rename(story / "tokens.bin")
    assert "k 6 there, 7 here" in line
    assert "lr 0.003 there, 0.1 here" in line
    assert "d_sae" not in line
    assert before == {p: p.stat().st_mtime_ns for p in story.rglob("*")}


def test_fewer_cycles_are_no_other_configuration(lm, story, capsys):
    """A finished run must just print its table, and lose nothing that a longer one has begun."""
    path = story / "checkpoint3.safetensors"
    path.write_text("of a later cycle")
    assert dmsae.main(command(lm, story, cycles=2)) == 0
    assert path.exists()
    path.unlink()
    capsys.readouterr()
    assert dmsae.main(command(lm, story, cycles=3)) == 0
    rows = re.findall(r"(?m)^(\d) +(\d+) ", capsys.readouterr().out)
    assert rows == [(str(n), str(result(story, n)["core"])) for n in range(4)]


def test_another_model_behind_the_same_name_is_refused(lm, tmp_path, capsys):
    """Where the folder's weights were replaced, the same command must not go on."""
    shutil.copytree(lm, tmp_path / "lm")
    words = command(tmp_path / "lm", tmp_path / "out", cycles=0)
    assert dmsae.main(words) == 0
    replace_weights(tmp_path / "lm")
    line = refusal(capsys, words)
    assert "another model" in line
    assert str(tmp_path / "lm") in line


def test_another_tokenizer_behind_the_same_name_is_refused(lm, tmp_path, capsys):
    """Other ids for the same words must be noticed, as other weights are."""
    shutil.copytree(lm, tmp_path / "lm")
    words = command(tmp_path / "lm", tmp_path / "out", cycles=0)
    assert dmsae.main(words) == 0
    path = tmp_path / "lm" / "tokenizer.json"
    data = json.loads(path.read_text())
    vocab = data["model"]["vocab"]
    vocab["s"], vocab["n"] = vocab["n"], vocab["s"]
    path.write_text(json.dumps(data))
    assert "another model" in refusal(capsys, words)


def test_a_core_from_another_model_is_warned_of(lm, story, tmp_path, capsys):
    """From this one it is not, though text and seed be others."""
    path = story / "cycle3" / "core.safetensors"
    words = dict(core=path, cycles=0, seed=3)
    assert dmsae.main(command(lm, tmp_path / "same", **words)) == 0
    assert "another model" not in capsys.readouterr().out
    shutil.copytree(lm, tmp_path / "lm")
    replace_weights(tmp_path / "lm")
    assert dmsae.main(command(tmp_path / "lm", tmp_path / "other", **words)) == 0
    assert f"warning: --core {path} is of another model" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["", "null", "[1]"])
@pytest.mark.parametrize("name", ["config.json", "cycle0/cfg.json", "tokens.bin"])
def test_an_emptied_file_of_a_run_is_named(lm, story, tmp_path, capsys, name, content):
    """As a power cut or an editor leaves it: one line with the file, no traceback."""
    shutil.copytree(story, tmp_path / "out")
    (tmp_path / "out" / name).write_text(content)
    words = command(lm, tmp_path / "out", cycles=3, core_sparsity="gated")
    line = refusal(capsys, words)
    assert str(tmp_path / "out" / name) in line
    if name == "tokens.bin":  # what can be made again is: the same command goes on
        assert "removed, try again" in line
        assert dmsae.main(words) == 0


def test_a_disk_that_is_full_is_one_line(lm, tmp_path):
    """Also where safetensors raises an error of its own."""
    words = command(lm, tmp_path / "out", d_sae=4096, cycles=0)

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))

    line = [sys.executable, HERE / "dmsae.py", *words]
    done = subprocess.run(line, capture_output=True, text=True, preexec_fn=limit)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert re.search("^dmsae: .*File too large", done.stderr, re.M)


def test_files_are_on_disk_before_they_take_their_names(tmp_path, monkeypatch):
    """Every file of a folder must be synced before the rename: a power cut leaves the old one."""
    seen, sync = [], os.fsync

    def spy(descriptor):
        seen.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        assert not (tmp_path / "sae").exists()
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", spy)
    with dmsae.written_whole(tmp_path / "sae") as part:
        part.mkdir()
        (part / "a").write_text("a")
        (part / "b").write_text("b")
    assert sorted(seen) == ["a", "b"]
    assert (tmp_path / "sae" / "a").read_text() == "a"


@pytest.mark.parametrize("damage", ["cut", "text", "empty", "foreign"])
def test_a_damaged_checkpoint_is_refused(lm, tmp_path, capsys, damage):
    """A short file and another kind of file must be noticed, and the message must say which file
    it is and what to do."""
    path = tmp_path / "checkpoint0.safetensors"
    dmsae.save_tensors({"since": torch.arange(1000)}, path, step=3, position=[0, 3])
    content = path.read_bytes()
    damaged = dict(cut=content[:-100], text=b"hello", empty=b"")
    if damage == "foreign":
        save_file({"a": torch.arange(9)}, path)
    else:
        path.write_bytes(damaged[damage])
    line = refusal(capsys, command(lm, tmp_path))
    assert "damaged" in line
    assert "move it away" in line
    assert str(path) in line


@pytest.mark.parametrize("lr", [1e30, 1e38, 1e40])  # the last: weights before the loss
def test_what_is_not_finite_stops_and_keeps_the_last_good_checkpoint(lm, tmp_path, capsys, lr):
    """Exit 2 with the step; the checkpoint on disk must hold finite numbers only."""
    words = command(lm, tmp_path, lr=lr, checkpoint_minutes=0, cycles=0)
    line = refusal(capsys, words)
    assert re.search(r"diverged by step \d+: try a smaller --lr", line)
    path = tmp_path / "checkpoint0.safetensors"
    assert not path.exists() or all(t.isfinite().all() for t in load_file(path).values())
    assert not (tmp_path / "cycle0").exists()


@pytest.mark.parametrize("mode", ["dynamic", "exempt", "compete", "gated"])
def test_every_core_sparsity_holds_its_budget(lm, tmp_path, mode):
    """The core's rows must be frozen; the total L0 must be k, and beside an exempt core k more."""
    assert dmsae.main(command(lm, tmp_path, core_sparsity=mode, tokens=25_600)) == 0
    core = saved_core(tmp_path, 0)["W_enc"]
    assert torch.equal(weights(tmp_path, 1)["W_enc"].T[: len(core)], core)
    r, sae = result(tmp_path, 1), load_sae(tmp_path / "cycle1")
    assert sae.n_core == len(core) > 0
    assert sae.n_exempt == (0 if mode == "compete" else len(core))
    assert r["core_l0"] > 0
    others = max(6, r["core_l0"] + 1) if mode != "exempt" else 6 + r["core_l0"]
    assert r["l0"] == pytest.approx(others, rel=0.15)


def test_a_saved_core_starts_another_sparsity(lm, story, tmp_path, capsys):
    """--core FILE --cycles 0 must train one SAE at another k around the rows of the file, its
    identities kept; a newcomer is born in training 4, not again in 0."""
    path = story / "cycle3" / "core.safetensors"
    out = tmp_path / "out"
    assert dmsae.main(command(lm, out, core=path, cycles=0, k=3, core_sparsity="compete")) == 0
    core, now = saved_core(story, 3), saved_core(out, 0)
    C = len(core["W_enc"])
    assert torch.equal(weights(out, 0)["W_enc"].T[:C], core["W_enc"])
    old = {tuple(b) for b in core["birth"].tolist()}
    assert all(tuple(b) in old or b[0] == 4 for b in now["birth"].tolist())
    assert f"core {C}\n" in capsys.readouterr().out
    assert not list(out.glob("cycle1*"))


@pytest.mark.parametrize("how", ["frequency", "random"])
def test_controls_are_as_many_and_others(lm, tmp_path, how):
    """The same training 0 with another selector must give as many latents, but others, and by
    frequency none that is on less often than one left out."""
    words = dict(cycles=0, prefixes=0.25, coverage=0.5)  # with room for others in prefix 0
    for select in "attribution", how:
        assert dmsae.main(command(lm, tmp_path / select, select=select, **words)) == 0
    ours, control = saved_core(tmp_path / "attribution", 0), saved_core(tmp_path / how, 0)
    assert len(ours["index"]) == len(control["index"]) == len(set(control["index"].tolist()))
    left_out = ~torch.isin(ours["index"], control["index"])
    assert left_out.any()
    if how == "frequency":
        assert control["density"].min() >= ours["density"][left_out].max()
        assert control["density"].tolist() == sorted(control["density"].tolist(), reverse=True)


def test_transfers_equal_transfers_alone(lm, tmp_path, capsys):
    """Each k of --transfer-k must give an SAE of the last core, bitwise the same whether others
    were trained before it or none; what is there must not be trained again; its L0 must be k."""
    alone, both = tmp_path / "alone", tmp_path / "both"
    for k in ("9", "3"):
        words = command(lm, alone, core_sparsity="compete")
        assert dmsae.main([*words, "--transfer-k", k]) == 0
    before = (alone / "cycle1_k9" / "cfg.json").stat().st_mtime_ns
    words = command(lm, both, core_sparsity="compete")
    assert dmsae.main([*words, "--transfer-k", "3", "9"]) == 0
    assert_same(alone, both, (0, 1, "1_k3", "1_k9"))
    assert (alone / "cycle1_k9" / "cfg.json").stat().st_mtime_ns == before
    core = saved_core(both, 1)["W_enc"]
    for k in (3, 9):
        assert torch.equal(weights(both, f"1_k{k}")["W_enc"].T[: len(core)], core)
        r = result(both, f"1_k{k}")
        assert r["l0"] == pytest.approx(k, rel=0.15)
        assert r["cycle"] == f"1_k{k}"
    assert re.search(r"(?m)^1_k9 ", capsys.readouterr().out)


def test_a_training_counts_its_steps_from_0(lm, tmp_path, monkeypatch):
    """Rate and threshold must be those of steps 0 to 99; Adam's eps far below our gradients."""
    updates = spied(monkeypatch, dmsae, "update")
    thresholds = spied(monkeypatch, MatryoshkaSAE, "update_threshold")
    assert dmsae.main(command(lm, tmp_path, cycles=0)) == 0
    assert [lr for _, _, lr in updates] == [dmsae.learning_rate(i, 100, 3e-3) for i in range(100)]
    assert {adam.defaults["eps"] for _, adam, _ in updates} == {1e-12}
    assert [step for _, _, step in thresholds] == list(range(100))


def test_a_tenth_of_k_is_left_beside_any_core(lm, tmp_path, monkeypatch):
    """BatchTopK's floor must be k / 10, at least 1."""
    steps = spied(monkeypatch, dmsae, "loss_and_grad")
    assert dmsae.main(command(lm, tmp_path, cycles=0, k=40, transfer_k=3)) == 0
    assert {(k, floor) for _, _, k, floor, _ in steps} == {(40, 4), (3, 1)}


def test_checkpoints_are_the_minutes_apart(lm, tmp_path, monkeypatch):
    """Of steps that take 4 s each every twentieth must be kept, where a minute is asked for."""
    updates, kept, save = spied(monkeypatch, dmsae, "update"), [], dmsae.save_tensors

    def spy(tensors, path, **meta):
        kept.append(meta.get("step"))
        save(tensors, path, **meta)

    monkeypatch.setattr(dmsae, "save_tensors", spy)
    monkeypatch.setattr(dmsae, "time", SimpleNamespace(time=lambda: 4 * len(updates)))
    assert dmsae.main(command(lm, tmp_path, cycles=0, checkpoint_minutes=1)) == 0
    assert [step for step in kept if step] == [20, 40, 60, 80, 100]


def test_weights_that_break_at_a_checkpoint_are_not_kept(lm, tmp_path, capsys, monkeypatch):
    """The loss of a step is that before its update, which may be what breaks the weights."""
    done, update = [], dmsae.update

    def breaking(sae, adam, lr):
        update(sae, adam, lr)
        done.append(1)
        if len(done) == 20:
            sae.W_dec.data[0, 0] = math.nan

    monkeypatch.setattr(dmsae, "update", breaking)
    words = command(lm, tmp_path, checkpoint_minutes=0, cycles=0)
    assert "diverged by step 20:" in refusal(capsys, words)
    assert dmsae.load_tensors(tmp_path / "checkpoint0.safetensors")[1]["step"] == 10


def test_a_latent_is_dead_after_ten_million_tokens(lm, tmp_path, monkeypatch):
    """However long the training is; of a short one a tenth is enough."""
    words, calls = command(lm, tmp_path, tokens=10**9, checkpoint_minutes=0), []
    real, path = dmsae.loss_and_grad, tmp_path / "checkpoint0.safetensors"

    def until_step_11(sae, x, k, floor, dead):
        calls.append(dead.tolist())
        if len(calls) >= 11:
            signal.raise_signal(signal.SIGINT)
        return real(sae, x, k, floor, dead)

    monkeypatch.setattr(dmsae, "loss_and_grad", until_step_11)
    assert dmsae.main(words) == 130
    tensors, at = dmsae.load_tensors(path)
    tensors["since"][:2] = torch.tensor([10**7 - 1, 10**7])
    dmsae.save_tensors(tensors, path, **at)
    assert dmsae.main(words) == 130
    assert calls[-1] == [1]


def test_the_dead_share_of_a_result_is_that_of_its_last_step(lm, tmp_path, monkeypatch):
    """Latents that did not fire in the last tenth of the tokens, ten steps of a hundred."""
    fired, real = [], dmsae.loss_and_grad

    def spy(*words):
        loss, acts, cut = real(*words)
        fired.append(set(acts.col.tolist()))
        return loss, acts, cut

    monkeypatch.setattr(dmsae, "loss_and_grad", spy)
    assert dmsae.main(command(lm, tmp_path, cycles=0, k=1)) == 0
    assert result(tmp_path, 0)["dead"] == pytest.approx(1 - len(set().union(*fired[-10:])) / 128)


def test_each_setting_of_a_training_is_compared(lm, story, capsys):
    """What would train otherwise must be refused, and named, by whichever flag it comes."""
    others = dict(core=story / "cycle0" / "core.safetensors", select="random", coverage=0.8, seed=1)
    others |= dict(core_sparsity="exempt", prefixes=0.5, attribution_tokens=999, tokens=12_801)
    others |= dict(ctx=31, d_sae=127, k=7, batch=127, lr=0.1, layer=1, separator="the")
    for name, value in others.items():
        assert f"({name} " in refusal(capsys, command(lm, story, **{name: value}))


def test_tokens_that_somebody_left_are_not_read(lm, tmp_path, capsys):
    """A tokens.bin without the config.json of its run may be of any text and tokenizer."""
    np.full(4000, 5, np.int32).tofile(tmp_path / "tokens.bin")
    assert "other settings" in refusal(capsys, command(lm, tmp_path))


def test_scaled_activations_have_unit_variance_about_their_means(lm, story):
    """The mean over channels of the variance of each, of the first block, must be 1."""
    cfg = Config(model=str(lm), layer=0, ctx=32, device="cpu", attribution_tokens=1000)
    model, tokenizer, _ = dmsae.load_model(cfg)
    text = dmsae.open_text(cfg, model, tokenizer, story)
    x = dmsae.harvest(model, 0, *text.block(0, 65536 // 32, 0))
    scale = json.loads((story / "config.json").read_text())["measured"]["scale"]
    assert (scale * x).var(0).mean().item() == pytest.approx(1, rel=1e-4)


def test_a_core_that_takes_half_of_k_is_warned_of(lm, story, tmp_path, capsys):
    """Where the core alone has more than half of k, but less than k, both must be said."""
    core = story / "cycle3" / "core.safetensors"
    assert dmsae.main(command(lm, tmp_path, core=core, cycles=0, k=3)) == 0
    l0 = result(tmp_path, 0)["core_l0"]
    assert 1.5 < l0 < 3
    assert f"warning: the core alone has L0 {l0:.1f}, above half of k 3" in capsys.readouterr().out


# ---- The cache ----------------------------------------------------------------------------------
@pytest.fixture(scope="session")
def filled(lm, whole, tmp_path_factory):
    """A cache that holds the four blocks of `whole`, and the run that filled it."""
    folder = tmp_path_factory.mktemp("filled")
    words = dict(tokens=25_600, transfer_k=3, cache=folder / "cache")
    real, blocks = dmsae.harvest, []

    def count(model, layer, ids, keep):
        blocks.append(len(ids))
        return real(model, layer, ids, keep)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dmsae, "harvest", count)
        assert dmsae.main(command(lm, folder / "with", **words)) == 0
        n = len(blocks)
        assert dmsae.main(command(lm, folder / "again", **words | dict(k=5, cycles=0))) == 0
    return SimpleNamespace(folder=folder, first=blocks[:n], second=blocks[n:])


def test_cache_changes_no_result_and_spares_the_harvest(filled, whole):
    """With --cache, weights must be bitwise those without; every block must be harvested once, and
    by another run with another k not at all."""
    files = list((filled.folder / "cache").iterdir())
    assert len(files) == 4
    assert_same(filled.folder / "with", whole, (0, 1, "1_k3"))
    scale_and_three_evaluations = 4
    assert len(filled.first) == len(files) + scale_and_three_evaluations
    assert len(filled.second) == 3, "scale, and two evaluations"


def test_a_constant_added_to_the_activations_changes_no_fvu(lm, tmp_path, monkeypatch):
    """Where a layer's output is shifted for the SAE alone, by thirty of its deviations, held-out
    FVU of every prefix, and the loss, must stay within 1 %."""
    assert dmsae.main(command(lm, tmp_path / "as it is", cycles=0)) == 0
    as_it_is = result(tmp_path / "as it is", 0)
    scale = json.loads((tmp_path / "as it is" / "config.json").read_text())["measured"]["scale"]
    real = dmsae.spliced

    def shifted(model, layer, edit):
        def edit_shifted(h):
            return edit(h + 30 / scale) - 30 / scale

        return real(model, layer, edit_shifted)

    monkeypatch.setattr(dmsae, "spliced", shifted)
    assert dmsae.main(command(lm, tmp_path / "shifted", cycles=0)) == 0
    there = result(tmp_path / "shifted", 0)
    assert there["fvu"] == pytest.approx(as_it_is["fvu"], rel=0.01)
    assert there["ce"] == pytest.approx(as_it_is["ce"], rel=0.01)


@pytest.mark.parametrize("what", ["seed", "model"])
def test_what_harvests_otherwise_never_gets_cached_activations(lm, filled, tmp_path, what):
    """With another seed, or another model behind the same name, a run with a filled cache must be
    bitwise the one without."""
    shutil.copytree(filled.folder / "cache", tmp_path / "cache")
    changes = dict(tokens=25_600, cycles=0)
    shutil.copytree(lm, tmp_path / "lm")
    if what == "model":
        replace_weights(tmp_path / "lm")
    else:
        changes["seed"] = 1
    cached = command(tmp_path / "lm", tmp_path / "a", cache=tmp_path / "cache", **changes)
    assert dmsae.main(cached) == 0
    assert len(list((tmp_path / "cache").iterdir())) == 4 + 4
    assert dmsae.main(command(tmp_path / "lm", tmp_path / "b", **changes)) == 0
    assert_same(tmp_path / "a", tmp_path / "b", [0])


@pytest.mark.parametrize("damage", ["cut", "text"])
def test_a_damaged_block_is_refused(lm, filled, tmp_path, capsys, damage):
    """The file must be named, and what to do."""
    shutil.copytree(filled.folder / "cache", tmp_path / "cache")
    path = next((tmp_path / "cache").iterdir())
    path.write_bytes(path.read_bytes()[:-9] if damage == "cut" else b"hello")
    changes = dict(tokens=25_600, cycles=0, cache=tmp_path / "cache")
    line = refusal(capsys, command(lm, tmp_path / "out", **changes))
    assert str(path) in line
    assert "damaged" in line
    assert "move it away" in line


# ---- Bad input ----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(k=128), ["--k 128", "from 1 to 127", "for example 1"]),
        (dict(k=0), ["--k 0", "from 1"]),
        (dict(coverage=0), ["--coverage 0", "to 1", "0.9"]),
        (dict(coverage=1.5), ["--coverage 1.5", "to 1", "0.9"]),
        (dict(coverage="nan"), ["--coverage nan", "to 1", "0.9"]),
        (dict(layer=2), ["--layer 2", "at most 1"]),
        (dict(layer=-1), ["--layer -1", "from 0"]),
        (dict(text="no.txt"), ["--text no.txt", "existing file"]),
        (dict(text=__file__), ["--text", ".py", ".txt, .jsonl, .parquet"]),
        (dict(core="no.safetensors"), ["no.safetensors: is damaged or foreign"]),
        (dict(cycles=-1), ["--cycles -1", "from 0", "5"]),
        (dict(lr="inf"), ["--lr inf", "0.0003"]),
        (dict(tokens=5), ["--tokens 5", "from 128", "128000"]),
        (dict(batch=0), ["--batch 0", "4096"]),
        (dict(attribution_tokens=0), ["--attribution-tokens 0", "1000000"]),
        (dict(batch=-128), ["--batch -128", "4096"]),
        (dict(model="/no/such/folder"), ["--model /no/such/folder", "--demo"]),
        (dict(ctx=65), ["--ctx 65", "64"]),
        (dict(ctx=3), ["--ctx 3", "from 4"]),
        (dict(lr=-1), ["--lr -1", "from 1e-09", "0.0003"]),
        (dict(lr=0), ["--lr 0", "from 1e-09", "0.0003"]),
        (dict(device="cuda:77"), ["--device cuda:77", "must be cpu, cuda or cuda:N"]),
        (dict(device="mps"), ["--device mps", "must be cpu, cuda or cuda:N"]),
        (dict(device="toaster"), ["--device toaster", "must be cpu, cuda or cuda:N"]),
        (dict(d_sae="many"), ["--d-sae", "invalid int", "many"]),
        (dict(d_sae=0), ["--d-sae 0", "65536"]),
        (dict(d_sae=10**12), ["--d-sae", "65536"]),
        (dict(colour="red"), ["--colour"]),
        (dict(select="best"), ["--select", "best", "attribution", "frequency", "random"]),
        (dict(core_sparsity="no"), ["--core-sparsity", "gated", "dynamic", "exempt", "compete"]),
        (dict(transfer_k="128"), ["--transfer-k 128", "from 1 to 127"]),
        (dict(transfer_k="5,6"), ["--transfer-k", "invalid int"]),
        (dict(cache=__file__), ["--cache", __file__, "must be a folder"]),
    ],
)
def test_bad_input_is_one_line_and_exit_2(lm, tmp_path, capsys, changes, words):
    """What was given and what is allowed must be said; no traceback, nothing written."""
    try:
        code = dmsae.main(command(lm, tmp_path / "out", **changes))
    except SystemExit as e:
        code = e.code
    error = capsys.readouterr().err
    assert code == 2
    assert error.count("\n") == 1
    assert all(w in error for w in words), error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "tokenizer.json", "bos"])
def test_a_folder_that_is_no_whole_model_is_refused(lm, tmp_path, capsys, missing):
    """Without configuration, weights, tokenizer or special tokens: one line with the folder."""
    shutil.copytree(lm, tmp_path / "lm")
    if missing == "bos":
        path = tmp_path / "lm" / "tokenizer_config.json"
        path.write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    else:
        (tmp_path / "lm" / missing).unlink()
    line = refusal(capsys, command(tmp_path / "lm", tmp_path / "out"))
    assert f"--model {tmp_path / 'lm'}" in line


@pytest.mark.parametrize("name, value", [("out", "file"), ("out", "file/run"), ("cache", "file/c")])
def test_a_folder_inside_a_file_is_refused(lm, tmp_path, capsys, name, value):
    """--out and --cache where a file stands: one line that names it."""
    (tmp_path / "file").write_text("in the way")
    changes = {"out": tmp_path / "out", name: tmp_path / value, "cycles": 0}
    line = refusal(capsys, command(lm, **changes))
    assert str(tmp_path / "file") in line


@pytest.mark.parametrize(
    "prefixes, example",
    [(p, "0.1 0.3") for p in ("0.5 0.2", "0.5 1", "0 0.5", "0.5 0.5")]
    + [(p, "from 0 to 1, for example 0.1") for p in ("32 64", "-0.1 0.5", "nan")],
)
def test_prefixes_must_ascend_between_0_and_d_sae(lm, tmp_path, capsys, prefixes, example):
    """Wrong prefixes must be refused with an example that works."""
    words = [*command(lm, tmp_path / "out"), "--prefixes", *prefixes.split()]
    line = refusal(capsys, words)
    assert "--prefixes" in line
    assert example in line
    assert not (tmp_path / "out").exists()
    assert Config(d_sae=128, prefixes=(0.1, 0.3)).widths() == [13, 38, 128]


@pytest.mark.parametrize("content", ["", "the cat sat on the mat"])
def test_too_little_text_is_refused_and_can_be_mended(lm, tmp_path, capsys, content):
    """Empty text, or less than three contexts: exit 2 with the numbers, and the same folder must
    work afterwards."""
    (tmp_path / "t.txt").write_text(content)
    line = refusal(capsys, command(lm, tmp_path / "out", text=tmp_path / "t.txt"))
    assert "three contexts of 32" in line
    assert str(tmp_path / "t.txt") in line
    assert dmsae.main(command(lm, tmp_path / "out", cycles=0, tokens=128)) == 0


def test_text_of_special_tokens_alone_is_refused(lm, tmp_path, capsys):
    """Where every token is an EOS there is nothing to train on: one line must say so."""
    (tmp_path / "t.txt").write_text("<eos>" * 30_000)
    line = refusal(capsys, command(lm, tmp_path / "out", text=tmp_path / "t.txt"))
    assert "special tokens" in line


def test_a_core_of_another_width_is_refused(lm, tmp_path, capsys):
    """The message must give the file and both widths."""
    path = tmp_path / "c.safetensors"
    dmsae.save_tensors(vars(core_of(random_sae(dtype=torch.float32), 3)), path, training=0)
    line = refusal(capsys, command(lm, tmp_path / "out", core=path))
    assert f"--core {path}" in line
    assert "width 8, not 32" in line
    assert not (tmp_path / "out").exists()


def test_a_core_as_wide_as_the_sae_is_refused(lm, tmp_path, capsys):
    """d_sae must be above the core and the inner prefixes."""
    path, sae = tmp_path / "c.safetensors", random_sae(32, (120, 200), dtype=torch.float32)
    dmsae.save_tensors(vars(core_of(sae, 120)), path, training=0)
    line = refusal(capsys, command(lm, tmp_path / "out", core=path))
    assert "--d-sae 128 above a core of 120" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", ["text", "an SAE"])
def test_a_file_that_holds_no_core_is_refused(lm, story, tmp_path, capsys, content):
    """A file of another kind, and an SAE's weights: the file must be named."""
    path = story / "cycle0" / "sae_weights.safetensors"
    if content == "text":
        path = tmp_path / "c.safetensors"
        path.write_text("hello")
    line = refusal(capsys, command(lm, tmp_path / "out", core=path))
    assert str(path) in line
    assert "damaged or foreign" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("case", ["nothing", "no weights", "cut weights", "topk", "list"])
def test_a_folder_that_is_no_sae_is_refused(tmp_path, case):
    """load_sae must say what it needs, for a missing file, a cut one, and a foreign one."""
    weights_path, cfg_path = tmp_path / "sae_weights.safetensors", tmp_path / "cfg.json"
    if case != "nothing":
        dmsae.save_sae(random_sae(dtype=torch.float32), tmp_path)
    if case == "no weights":
        weights_path.unlink()
    if case == "cut weights":
        weights_path.write_bytes(weights_path.read_bytes()[:-9])
    if case == "topk":
        cfg = json.loads(cfg_path.read_text())
        dmsae.write_json(dict(cfg, architecture="topk"), cfg_path)
    if case == "list":
        dmsae.write_json([1, 2], cfg_path)
    with pytest.raises(dmsae.BadInput, match="no SAE folder of cfg.json and sae_weights") as error:
        load_sae(tmp_path)
    assert str(tmp_path) in str(error.value)
    assert case != "topk" or "'topk'" in str(error.value)


# ---- Files --------------------------------------------------------------------------------------
def test_what_is_there_stays_whole_where_writing_fails(tmp_path):
    """A file must keep its old content until the new one is complete."""
    path = tmp_path / "a.json"
    dmsae.write_json([1], path)
    with pytest.raises(KeyError), dmsae.written_whole(path) as part:
        part.write_text("half")
        raise KeyError
    assert path.read_text() == "[\n 1\n]"
    dmsae.write_json([2], path)
    assert json.loads(path.read_text()) == [2]
    assert list(tmp_path.iterdir()) == [path]


def test_tensors_and_metadata_come_back(tmp_path):
    """Views, integers and metadata must be read as they were written."""
    tensors = dict(view=torch.arange(6.0).view(2, 3).T, scalar=torch.tensor(3))
    dmsae.save_tensors(tensors, tmp_path / "new" / "t.safetensors", step=3, position=(1, 2))
    got, meta = dmsae.load_tensors(tmp_path / "new" / "t.safetensors")
    assert got.keys() == tensors.keys()
    assert all(torch.equal(got[name], t) for name, t in tensors.items())
    assert meta == dict(step=3, position=[1, 2])


def test_a_scaling_factor_of_which_one_differs_is_refused(tmp_path):
    """It must be all ones to be none."""
    dmsae.save_sae(random_sae(dtype=torch.float32), tmp_path)
    path, factor = tmp_path / "sae_weights.safetensors", torch.ones(64)
    factor[5] = 2
    save_file(dict(load_file(path), scaling_factor=factor), path)
    with pytest.raises(dmsae.BadInput, match="scaling_factor"):
        load_sae(tmp_path)


def test_saelens_is_told_all_that_its_jumprelu_needs(story):
    """Its config must say what the SAE reads, and that nothing is reshaped or normalised."""
    cfg = json.loads((story / "cycle3" / "cfg.json").read_text())
    want = dict(dmsae.SAELENS, dtype="float32", device="cpu", reshape_activations="none")
    assert want.items() <= cfg.items()
    meta = cfg["metadata"]
    assert (meta["hook_name"], meta["context_size"]) == ("blocks.0.hook_resid_post", 32)
    assert meta["prepend_bos"] is True


# ---- Command line -------------------------------------------------------------------------------
def test_flags_follow_the_dataclass():
    """Every field must be a flag, underscores accepted; the defaults are Config's."""
    assert dmsae.parse([]) == Config()
    words = ["--d_sae", "256", "--attribution_tokens=9", "--core-sparsity", "exempt"]
    want = Config(d_sae=256, attribution_tokens=9, core_sparsity="exempt")
    assert dmsae.parse(words) == want
    lists = dmsae.parse("--prefixes 0.1 0.3 --transfer-k 5 6".split())
    assert (lists.prefixes, lists.transfer_k) == ([0.1, 0.3], [5, 6])


def test_the_demo_changes_defaults_only():
    """What the command line gives must win over the demo's settings."""
    demo = dmsae.parse(["--demo"])
    assert all(getattr(demo, name) == value for name, value in dmsae.DEMO.items())
    assert demo.out == f"runs/demo_k{demo.k}_seed0"
    assert demo.model == f"{demo.out}/model"
    assert demo.text == f"{demo.out}/model/text.jsonl"
    assert dmsae.parse(["--demo", "--k", "5"]).k == 5


@pytest.mark.parametrize("words", ["--cover 0.5", "--attribution-t 9", "--k"])
def test_abbreviations_and_missing_values_are_refused(words, capsys):
    """One line with the flag as it was given must end the program, with exit code 2."""
    line = refusal(capsys, words.split())
    assert words.split()[0] in line
    assert "--help" in line


def test_help_of_each_flag_is_its_comment(capsys):
    """Every field must be in --help with the comment beside it, and that must not be empty."""
    with pytest.raises(SystemExit) as end:
        dmsae.parse(["--help"])
    assert end.value.code == 0
    shown = "".join(capsys.readouterr().out.split())
    lines = inspect.getsource(Config).splitlines()
    for field in fields(Config):
        (line,) = [line for line in lines if line.startswith(f"    {field.name}:")]
        comment = "".join(line.partition(" # ")[2].split())
        assert len(comment) > 5, field.name
        assert comment in shown, field.name
        assert f"--{field.name.replace('_', '-')}" in shown


def test_importing_has_no_side_effects():
    """import dmsae must not import transformers or datasets, nor print."""
    code = "import sys, dmsae; print([m for m in ('transformers', 'datasets') if m in sys.modules])"
    words = [sys.executable, "-c", code]
    out = subprocess.run(words, capture_output=True, text=True, cwd=HERE)
    assert out.stdout.strip() == "[]"
    assert not out.stderr


# ---- eval.py: each metric on a planted case, and against a naive reference ----------------------
def ready_sae(W_enc, W_dec, threshold=0.0, widths=None, n_core=0):
    """An SAE with given rows and no biases."""
    sae = MatryoshkaSAE(W_enc.shape[1], widths or [len(W_enc)], n_core)
    with torch.no_grad():
        sae.W_enc.copy_(W_enc)
        sae.W_dec.copy_(W_dec)
        sae.threshold.fill_(threshold)
    return sae


def both_signs(D):
    """The identity as an SAE: latents for +e_i and -e_i."""
    rows = torch.cat([torch.eye(D), -torch.eye(D)])
    return ready_sae(rows, rows)


class Sum(nn.Module):
    """A language model of one layer: its output is the embedding, and its logits are the running
    sum of that times `readout`."""

    def __init__(self, table, readout):
        super().__init__()
        self.embed = nn.Embedding.from_pretrained(table)
        self.layers = nn.ModuleList([nn.Identity()])
        self.readout = readout
        self.device = torch.device("cpu")
        config = SimpleNamespace(num_hidden_layers=1, vocab_size=len(table))
        self.config = SimpleNamespace(get_text_config=lambda: config)

    def get_decoder(self):
        return self

    def forward(self, ids, use_cache=False):
        return SimpleNamespace(logits=self.layers[0](self.embed(ids)).cumsum(1) @ self.readout)


class Words:
    """A tokenizer whose tokens are words between spaces, and newlines; token 0 is BOS, 1
    unknown."""

    bos_token_id, eos_token_id, pad_token_id = 0, None, None

    def __init__(self, words):
        self.words = ["<bos>", "<unk>", *words]
        self.ids = {w: i for i, w in enumerate(self.words)}

    def __len__(self):
        return len(self.words)

    def convert_ids_to_tokens(self, ids):
        return [self.words[i] for i in ids]

    def __call__(self, text, **_):
        if isinstance(text, list):
            return {"input_ids": [self(t)["input_ids"] for t in text]}
        return {"input_ids": [self.ids.get(w, 1) for w in re.findall(r"\n|[^ \n]+", text)]}


def held(folder):
    """The tiny language model, and ten contexts of random tokens: ids, and keep, where they are not
    special."""
    from transformers import Gemma2ForCausalLM

    model = Gemma2ForCausalLM.from_pretrained(folder, attn_implementation="eager")
    ids = torch.randint(3, 300, (10, 16), generator=torch.Generator().manual_seed(0))
    ids[:, 0], ids[3, 7], ids[5, 15] = 2, 2, 1
    return model.eval().requires_grad_(False), ids, ids > 2


def test_core_of_the_identity_is_perfect(lm):
    """An SAE that is the identity must recover everything, whatever the definition."""
    model, ids, keep = held(lm)
    r = ev.core_metrics(model, 0, ids, keep, both_signs(32))
    for key in (
        "ce_loss_score",
        "kl_div_score",
        "explained_variance_legacy",
        "explained_variance_0_6_0",
        "cossim",
        "l2_ratio",
        "relative_reconstruction_bias",
        "frac_alive",
    ):
        assert abs(r[key] - 1) < 1e-4, key
    assert (
        abs(r["fvu"]) < 1e-6
        and abs(r["l0"] - 32) < 1e-3
        and abs(r["kl_div_with_sae"]) < 1e-5
        and r["ce_loss_with_sae"] == pytest.approx(r["ce_loss_without_sae"])
    )
    assert r["tokens"] == int(keep.sum()) and r["core_l0"] == 0


def test_core_of_the_silent_sae_is_its_bias(lm):
    """An SAE that never fires must have L0 0, no latent alive, and the loss of zeros at kept
    positions; what is 0/0 has no number."""
    model, ids, keep = held(lm)
    r = ev.core_metrics(model, 0, ids, keep, ready_sae(torch.eye(32), torch.eye(32), math.inf))
    with dmsae.spliced(model, 0, lambda h: h.masked_fill(keep[..., None], 0)):
        logits = model(ids).logits
    source = keep[:, :-1]
    assert r["ce_loss_with_sae"] == pytest.approx(
        F.cross_entropy(logits[:, :-1][source], ids[:, 1:][source]).item(), rel=1e-5
    )
    assert (
        r["l0"]
        == r["l1"]
        == r["frac_alive"]
        == r["cossim"]
        == r["l2_ratio"]
        == r["freq_over_1_percent"]
        == 0
        and r["fvu"] >= 1
    )
    assert r["relative_reconstruction_bias"] is None and r["normalized_freq_over_1_percent"] is None


def naive_losses(model, ids, keep, sae, widths):
    """{width, None or "zero": mean next-token loss, mean KL to the model's own} over kept
    positions."""
    x, logits, out = dmsae.residual_stream(model, 0, ids), {}, {}
    layer_outputs = {None: x, "zero": torch.zeros_like(x)}
    for w in widths:
        x_hat = sae.decode(sae.encode(x.flatten(0, 1), w)).detach().view_as(x)
        layer_outputs[w] = torch.where(keep[..., None], x_hat, x)
    for w, y in layer_outputs.items():
        with dmsae.spliced(model, 0, lambda h, y=y: y):
            logits[w] = model(ids).logits.double().log_softmax(-1)
    at = keep.nonzero().tolist()
    for w, q in logits.items():
        ce = [-q[i, t, ids[i, t + 1]].item() for i, t in at if t < ids.shape[1] - 1]
        kl = []
        for i, t in at:
            p = logits[None][i, t]
            kl.append((p.exp() * (p - q[i, t])).sum().item())
        out[w] = np.mean(ce), np.mean(kl)
    return out


def naive_figures(batches, f, y):
    """SAEBench's definitions of what a reconstruction is: lists of x, f, y of each batch."""
    tokens, x_hat = torch.cat(batches), torch.cat(y)
    r2 = [((b - z) ** 2).sum(1) for b, z in zip(batches, y, strict=True)]
    variance, S = ((tokens - tokens.mean(0)) ** 2).sum(), (tokens**2).sum(1).mean()
    of_batch = [((b - b.mean(0)) ** 2).sum(1) for b in batches]
    bias = [(z**2).sum(1).mean() / (b * z).sum(1).mean() for b, z in zip(batches, y, strict=True)]
    return dict(
        explained_variance_legacy=(1 - torch.cat(r2) / torch.cat(of_batch)).mean(),
        explained_variance_0_6_0=1 - torch.cat(r2).mean() / (S - (S / 32) ** 2),
        fvu=torch.cat(r2).sum() / variance,
        mse_saebench=torch.cat([e / len(e) for e in r2]).mean(),
        cossim=F.cosine_similarity(tokens, x_hat).mean(),
        l0=(torch.cat(f) != 0).double().sum(1).mean(),
        l1=torch.cat(f).sum(1).mean(),
        l2_norm_out=x_hat.norm(dim=1).mean(),
        l2_ratio=(x_hat.norm(dim=1) / tokens.norm(dim=1)).mean(),
        relative_reconstruction_bias=torch.stack(bias).mean(),
    )


@pytest.mark.parametrize("n_core", [0, 7])
def test_core_equals_a_naive_reference(lm, n_core, monkeypatch):
    """Every figure, of the whole SAE and of each prefix alone, must equal loops over tokens written
    from SAEBench's definitions."""
    model, ids, keep = held(lm)
    torch.manual_seed(1)
    sae = ready_sae(torch.randn(50, 32), F.normalize(torch.randn(50, 32)), 0.5, [20, 50], n_core)
    with torch.no_grad():
        sae.W_enc[0] *= 0  # a dead latent, and one that is always on
        sae.b_enc[1], sae.b_dec[:] = 1e3, torch.randn(32) / 9
    whole = torch.Tensor.split

    def split(t, n, dim=0):
        return whole(t, 4 if t.shape == ids.shape else n, dim)  # 3 batches

    monkeypatch.setattr(torch.Tensor, "split", split)
    widths = n_core, 20, 50
    losses = naive_losses(model, ids, keep, sae, widths)
    (ce, _), (ce_zero, kl_zero) = losses[None], losses["zero"]
    x = dmsae.residual_stream(model, 0, ids)
    batches = [x[i : i + 4][keep[i : i + 4]].double() for i in (0, 4, 8)]
    wide, tokens = copy.deepcopy(sae).double(), torch.cat(batches)
    for w in widths:
        f = [sae.encode(b.float(), w).detach().double() for b in batches]
        want = naive_figures(batches, f, [wide.decode(a).detach() for a in f])
        want |= dict(ce_loss_with_sae=losses[w][0], kl_div_with_sae=losses[w][1])
        want["ce_loss_score"] = (ce_zero - losses[w][0]) / (ce_zero - ce)
        want["kl_div_score"] = 1 - losses[w][1] / kl_zero
        alone = copy.deepcopy(sae)
        alone.threshold[w:] = math.inf
        r = ev.core_metrics(model, 0, ids, keep, alone)
        for key, value in want.items():
            assert r[key] == pytest.approx(float(value), rel=1e-4, abs=1e-6), (key, w)
    density = (torch.cat(f) > 0).double().mean(0)
    often = density > 0.1
    want = dict(
        l2_norm_in=tokens.norm(dim=1).mean(),
        core_l0=density[:n_core].sum(),
        frac_alive=(density > 0).double().mean(),
        ce_loss_without_sae=ce,
        ce_loss_with_ablation=ce_zero,
        kl_div_with_ablation=kl_zero,
        freq_over_10_percent=often.double().mean(),
        freq_over_1_percent=(density > 0.01).double().mean(),
        normalized_freq_over_10_percent=density[often].sum() / density.sum(),
    )
    for name, rows in ("encoder", sae.W_enc.detach()), ("decoder", sae.W_dec.detach()):
        cosine = F.normalize(rows) @ F.normalize(rows).T
        cosine[rows.norm(dim=1) > 0] -= 2 * torch.eye(50)[rows.norm(dim=1) > 0]  # not itself
        want[f"average_max_{name}_cosine_sim"] = cosine.amax(1).mean()
    for key, value in want.items():
        assert r[key] == pytest.approx(float(value), rel=1e-4), key


def test_an_evaluation_changes_no_sae(lm, story):
    """core, pooled and absorption must leave the SAE's state bitwise as it was."""
    (model, ids, keep), sae = held(lm), load_sae(story / "cycle3")
    before = {name: t.clone() for name, t in sae.state_dict().items()}
    ev.core_metrics(model, 0, ids, keep, sae)
    assert all(torch.equal(t, before[name]) for name, t in sae.state_dict().items())


def letters_world(absorbed="s"):
    """26 x 40 words, each with its letter's direction and its own; an SAE with a latent for
    each letter, blind to a third of the words of one letter, and for these a latent each.
    Returns model, tokenizer, SAE and the blind words' ids."""
    words = [f"{chr(97 + c)}{'x' * j}q" for c in range(26) for j in range(40)]
    tokenizer, n = Words([*words, "has", "the", "first", "letter:"]), len(words)
    letters = torch.arange(n) // 40
    table = torch.cat([5 * F.one_hot(letters, 26).float(), torch.eye(n)], 1)
    blind = [i for i in range(n) if chr(97 + letters[i]) == absorbed and i % 40 < 14]
    W_enc = torch.cat([torch.eye(26 + n)[:26], 5 * torch.eye(26 + n)[[26 + i for i in blind]]])
    W_enc[ord(absorbed) - 97, [26 + i for i in blind]] = -10
    W_dec = torch.cat([torch.eye(26 + n)[:26], F.normalize(table[blind])])
    table = torch.cat([torch.zeros(2, 26 + n), table, torch.zeros(4, 26 + n)])
    return (
        Sum(table, torch.zeros(26 + n, len(table))),
        tokenizer,
        ready_sae(W_enc, W_dec),
        {i + 2 for i in blind},
    )


def test_absorption_scores_equal_a_naive_reference():
    """Word by word, both scores must equal SAEBench's definitions written as plain
    arithmetic."""
    rng = np.random.default_rng(0)
    seen = Counter()
    for _ in range(300):
        n, D, F_ = 4, 5, 8
        f, x = rng.random((n, F_)) * (rng.random((n, F_)) < 0.4) * 2, rng.normal(size=(n, D)) + 0.5
        W_dec, w, main = (
            rng.normal(size=(F_, D)),
            rng.normal(size=D) + 0.5,
            list(rng.choice(F_, rng.integers(1, 3), replace=False)),
        )
        got = ev.absorption_scores(*(torch.tensor(t) for t in (f, x, W_dec, w)), torch.tensor(main))
        u = w / np.linalg.norm(w)
        c = [W_dec[i] @ u / np.linalg.norm(W_dec[i]) for i in range(F_)]
        for i in range(n):
            p, A = [f[i, j] * c[j] for j in range(F_)], x[i] @ u
            m, top = sum(p[j] for j in main), int(np.argmax(p))
            full = (
                all(f[i, j] < 1e-8 for j in main)
                and c[top] >= 0.025
                and A >= 0
                and p[top] / A >= 0.4
            )
            t = sum(
                sorted(
                    (p[j] for j in range(F_) if j not in main and c[j] >= 0.1 and p[j] > 0),
                    reverse=True,
                )[:3]
            )
            now = (
                0 if m >= A or t / A < 0.4 else 1 if m <= 0 else min(t, A - m) / (min(t, A - m) + m)
            )
            assert (bool(got[0][i]), got[1][i].item()) == (full, pytest.approx(now))
            seen.update(
                full=int(full),
                part=int(0 < now < 1),
                whole=int(now == 1),
                zero=int(now == 0),
            )
    assert min(seen.values()) > 20  # every branch was met


def test_one_vs_rest_is_balanced_and_disjoint():
    """Positives must be of the class, negatives of the others in equal shares, as many; no text
    may be in train and test."""
    labels = np.array(list("abc" * 50) + ["a"] * 30)
    for c, (train, test) in zip("abc", ev.one_vs_rest(labels, 1), strict=True):
        assert (
            (labels[train[0]] == c).all()
            and (labels[train[1]] != c).all()
            and (labels[test[0]] == c).all()
            and (labels[test[1]] != c).all()
        )
        assert (
            not set(train.flatten().tolist()) & set(test.flatten().tolist())
            and len(set(train.flatten().tolist())) == train.numel()
        )
        others = Counter(labels[train[1]])
        assert (
            len(others) == 2
            and max(others.values()) - min(others.values()) <= 1
            and train.shape[1] in (40, 64)
        )


def planted_texts():
    """120 texts of 3 classes: latent c fires on class c only, latents 3 to 5 on nothing in
    particular; decoder rows orthogonal."""
    torch.manual_seed(0)
    labels = np.array(list("abc") * 40)
    A = torch.cat(
        [
            F.one_hot(torch.arange(120) % 3, 3).float() * (1 + torch.rand(120, 3)),
            torch.rand(120, 3),
        ],
        1,
    )
    W_dec = torch.eye(8)[:6]
    return A @ W_dec, A, labels, W_dec


def test_sparse_probing_finds_planted_classes():
    """One latent must be enough for a planted class; a silent SAE must be at chance; the
    residual channels must be probed as such."""
    X, A, labels, _ = planted_texts()
    r = ev.sparse_probing(X @ torch.linalg.qr(torch.randn(8, 8))[0], A, labels)
    assert r["sae_top_1_test_accuracy"] == 1 and r["llm_top_1_test_accuracy"] < 1
    always = torch.cat([A, 9 + torch.rand(120, 1)], 1)  # large, and the same for all classes
    assert ev.sparse_probing(X, always, labels)["sae_top_1_test_accuracy"] == 1
    assert ev.sparse_probing(X, torch.zeros_like(A), labels)["sae_top_5_test_accuracy"] == 0.5
    assert (
        ev.sparse_probing(A, A, labels)["llm_top_2_test_accuracy"]
        == ev.sparse_probing(A, A, labels)["sae_top_2_test_accuracy"]
    )


def test_labels_may_be_a_list(story):
    """In a notebook labels are lists or tensors, folders strings; the figures must be the same."""
    X, A, labels, _ = planted_texts()
    number = torch.from_numpy(np.unique(labels, return_inverse=True)[1])
    for same in (labels.tolist(), labels.astype(object), number):
        assert ev.sparse_probing(X, A, same) == ev.sparse_probing(X, A, labels)
    A, names, values = biased_texts(160)
    cells = ev.scr_cells(names.tolist(), values.tolist())
    assert np.array_equal(cells, ev.scr_cells(names, values)) and len(cells[0]) == 4
    assert ev.stability(f"{story}/cycle3") == ev.stability(story / "cycle3")


def test_a_reason_names_its_file_as_it_is():
    """An underscore of a file's name must stay in the table."""
    metrics = {"scr a_b.csv": dict(cannot_run="no_x"), "core": dict(l0=None, fvu=0.5, tokens=3)}
    report = dict(saes=[dict(folder="a", metrics=metrics)], agreement={})
    lines = list(ev.table(report, True))
    assert lines[-1] == "scr a_b.csv: cannot run: no_x"
    assert [line.split()[-1] for line in lines[1:-1]] == ["-", "0.5", "-", "0.5", "3"]


def test_a_probe_equals_a_naive_reference():
    """It must equal nn.Linear trained on BCE and L1 at its epoch of best test accuracy."""
    torch.manual_seed(0)
    x = torch.randn(80, 5)
    train, test = torch.randint(0, 80, (2, 24)), torch.randint(0, 80, (2, 8))
    x[train[0]] += 0.3
    got = ev.train_probe(x, train, test, seed=2)
    rng, probe, best = dmsae.generator(2, "probes"), nn.Linear(5, 1), (-1,)
    nn.init.zeros_(probe.weight)
    nn.init.zeros_(probe.bias)
    adam = torch.optim.AdamW(probe.parameters(), 1e-3)
    rows, y = torch.cat([train[0], train[1]]), torch.tensor([1.0] * 24 + [0.0] * 24)
    for _ in range(20):
        for at in torch.randperm(48, generator=rng).split(16):
            adam.zero_grad()
            loss = nn.BCEWithLogitsLoss()(probe(x[rows[at]])[:, 0], y[at])
            (loss + 1e-3 * probe.weight.abs().sum()).backward()
            adam.step()
        right = sum((probe(x[i]) > 0).item() for i in test[0])
        right += sum((probe(x[i]) <= 0).item() for i in test[1])
        if right > best[0]:
            best = right, linear(probe).clone()
    assert torch.allclose(best[1], got, atol=1e-5)
    assert ev.accuracy(x, test, got) == pytest.approx(best[0] / 16)


def test_tpp_of_planted_classes_hits_only_its_own_probe():
    """Ablating a planted class's latents must cost its own probe its accuracy, and the others'
    nothing."""
    X, A, labels, W_dec = planted_texts()
    A[:, 3:] = 0  # for each negative effect SAEBench also takes a latent of none: another class's
    r, key = ev.tpp(X, A, labels, W_dec, seeds=(0, 1)), "tpp_threshold_2"
    for row in r["details"]:
        assert row["probe_accuracy"] > 0.95
        assert row[f"{key}_intended"] > 0.3 and abs(row[f"{key}_unintended"]) < 0.1
        gap = row[f"{key}_intended"] - row[f"{key}_unintended"]
        assert row[f"{key}_total_metric"] == pytest.approx(gap)
    values = [row[f"{key}_total_metric"] for row in r["details"]]
    assert r[f"{key}_total_metric"] == pytest.approx(np.mean(values))
    assert r[f"{key}_total_metric_std"] == pytest.approx(np.std(values, ddof=1))
    one = ev.tpp(X, A, labels, W_dec, seeds=(0,))
    assert one[f"{key}_total_metric_std"] is None


def test_tpp_equals_a_naive_reference():
    """With the same probes, every figure must equal ablation text by text."""
    torch.manual_seed(3)
    labels = np.array(list("abcd") * 25)
    A = torch.rand(100, 30) * (torch.rand(100, 30) < 0.5)
    A += 0.4 * F.one_hot(torch.arange(100) % 4, 30)
    W_dec = F.normalize(torch.randn(30, 6))
    X = A @ W_dec + 0.1 * torch.randn(100, 6)
    row = ev.tpp(X, A, labels, W_dec, seeds=(5,))["details"][0]
    tasks = ev.one_vs_rest(labels, 5)
    probes = torch.cat([ev.train_probe(X, *task, 5) for task in tasks])
    W, b = probes[:, :-1], probes[:, -1]

    def score(j, gone):
        hits = []
        for positive, rows in zip((True, False), tasks[j][1], strict=True):
            for t in rows:
                x = X[t] - sum((A[t, k] * W_dec[k] for k in gone), torch.zeros(6))
                hits.append((x @ W[j] + b[j] > 0) == positive)
        return np.mean([float(h) for h in hits])

    for n in (2, 10, 500):
        own, others = [], []
        for i in range(4):
            on, off = (A[rows].mean(0) for rows in tasks[i][0])
            effect = [max(0, (on - off)[k].item()) * (W_dec[k] @ W[i]).item() for k in range(30)]
            most = min(n, sum(e != 0 for e in effect))  # as many as are not 0: then also others
            gone = torch.tensor(effect).topk(most).indices.tolist()
            for j in range(4):
                (own if i == j else others).append(score(j, []) - score(j, gone))
        assert row[f"tpp_threshold_{n}_intended"] == pytest.approx(np.mean(own), abs=1e-6)
        assert row[f"tpp_threshold_{n}_unintended"] == pytest.approx(np.mean(others), abs=1e-6)


def test_a_large_ablation_takes_latents_without_positive_effect():
    """Of effects 3, 2, 0, 0, -1, -2 four are not zero, so up to four latents go, the largest first:
    two of effect 0 among them, as in SAEBench."""
    rows = F.pad(torch.eye(6), (0, 0, 0, 1))  # the last text has no latent
    effect = torch.tensor([3.0, 2, 0, 0, -1, -2])
    kept = {n: x.sum(0).tolist() for n, x in ev.ablations(rows, rows, torch.eye(6), effect)}
    assert kept[2] == [0, 0, 1, 1, 1, 1]
    for n in 5, 10, 500:
        assert kept[n] == [0, 0, 0, 0, 1, 1]


def biased_texts(n=400):
    """Texts of a class and a spurious value, of which the spurious one is the easier."""
    torch.manual_seed(0)
    label, spurious = torch.arange(n) % 2, torch.arange(n) // 2 % 2
    A = torch.stack([label, 1 - label, spurious, 1 - spurious], 1)
    A = A * (1 + 0.3 * torch.rand(n, 4))
    A[:, 2:] *= 1.4
    names = np.array(["a", "b"])[label]
    values = np.array(["u", "v"])[spurious]
    return A, names, values


def test_scr_removes_a_planted_correlation():
    """Ablating the planted spurious latent must turn the biased probe into one of the class: 1;
    without latents nothing moves: 0."""
    A, names, values = biased_texts()
    r = ev.scr(A, A, names, values, torch.eye(4), seeds=(0, 1))
    assert r["pairs"] == 1 and len(r["details"]) == 2
    for row in r["details"]:
        assert row["scr_metric_threshold_2"] == row["scr_dir1_threshold_2"] > 0.9
    silent = ev.scr(A, torch.zeros_like(A), names, values, torch.eye(4))
    assert silent["scr_metric_threshold_20"] == 0
    one_value, always_with_a = np.array(["u"] * 400), names
    for bad in None, one_value, always_with_a:
        with pytest.raises(ev.CannotRun):
            ev.scr(A, A, names, bad, torch.eye(4))


def naive_accuracy(task, probe, X, A, W_dec, gone=()):
    """Text by text, of a task's positives and the rest, without the latents `gone`."""
    hits = []
    for positive, rows in zip((True, False), task, strict=True):
        for t in rows:
            x = X[t] - sum(A[t, k] * W_dec[k] for k in gone)
            hits.append((x @ probe[:-1] + probe[-1] > 0) == positive)
    return np.mean(hits)


def test_scr_equals_a_naive_reference():
    """With the same probes, both directions and the metric must equal loops over texts and latents
    written from SAEBench's definitions."""
    torch.manual_seed(4)
    label, spurious = torch.arange(240) % 2, torch.arange(240) // 2 % 2
    A = torch.rand(240, 12) * (torch.rand(240, 12) < 0.5)
    A[:, 0] += 0.3 * label
    A[:, 1] += 0.6 * spurious
    W_dec = F.normalize(torch.randn(12, 5))
    X = A @ W_dec + 0.1 * torch.randn(240, 5)
    names, values = np.array(["a", "b"])[label], np.array(["u", "v"])[spurious]
    (row,) = ev.scr(X, A, names, values, W_dec, seeds=(3,))["details"]
    rng, train, test = np.random.default_rng(3), {}, {}
    for c, v in "au", "av", "bu", "bv":
        cell = rng.permutation(np.flatnonzero((names == c) & (values == v)))
        train[c + v], test[c + v] = cell[:48].tolist(), cell[48:].tolist()

    def tasks(part, half):
        au, av, bu, bv = (part[cell][:half] for cell in ("au", "av", "bu", "bv"))
        biased = part["au"][: 2 * half], part["bv"][: 2 * half]
        return [(au + av, bu + bv), (au + bu, av + bv), biased]

    train, test = tasks(train, 24), tasks(test, 6)
    pairs = [tuple(map(torch.tensor, pair)) for pair in zip(train, test, strict=True)]
    probes = [ev.train_probe(X, *pair, 3)[0].numpy() for pair in pairs]
    data = X.numpy(), A.numpy(), W_dec.numpy()
    before = [naive_accuracy(test[i], probes[2], *data) for i in (0, 1)]
    assert before[0] != before[1]
    for n in (2, 5, 500):
        scores = []
        for asked, other in (0, 1), (1, 0):
            w, (on, off) = probes[other][:-1], train[other]
            effect = (A[on].mean(0) - A[off].mean(0)).numpy() * (data[2] @ w)
            gone = sorted(range(12), key=lambda k: -abs(effect[k]))[:n]
            room = naive_accuracy(test[asked], probes[asked], *data) - before[asked]
            gain = naive_accuracy(test[asked], probes[2], *data, gone) - before[asked]
            scores.append(gain / room if room >= 0.001 else 0)
        assert scores == pytest.approx([row[f"scr_dir{i}_threshold_{n}"] for i in (1, 2)], abs=1e-5)
        assert row[f"scr_metric_threshold_{n}"] == pytest.approx(
            scores[np.argmin(before)], abs=1e-5
        )


def test_scr_has_no_value_in_a_tie(monkeypatch):
    """Where the biased probe reads class and spurious label equally well there must be no value,
    and a mean must leave it out."""
    A, names, values = biased_texts()
    tie = ev.scr(torch.zeros_like(A), A, names, values, torch.eye(4))
    assert tie["scr_metric_threshold_2"] is tie["scr_metric_threshold_2_std"] is None
    assert tie["scr_dir1_threshold_2"] == 0
    train = ev.train_probe

    def of_no_use(x, train_at, test_at, seed):
        return train(x * (seed != 1), train_at, test_at, seed)

    monkeypatch.setattr(ev, "train_probe", of_no_use)
    r = ev.scr(A, A, names, values, torch.eye(4), seeds=(0, 1, 2))
    metrics = [row["scr_metric_threshold_2"] for row in r["details"]]
    assert metrics[1] is None and r["scr_metric_threshold_2"] == np.mean(metrics[::2])


def test_stability_equals_sets_of_births(story):
    """Kept, Jaccard and overlap must equal those of the sets of identities in the saved cores,
    and votes the counts there."""
    rows, before = [ev.stability(folder) for folder in ev.cycles(story)], set()
    assert len(rows) == 4
    for n, r in enumerate(rows):
        core = load_file(story / f"cycle{n}" / "core.safetensors")
        now = {tuple(b) for b in core["birth"].tolist()}
        assert r["kept"] == len(now & before) and r["jaccard"] == pytest.approx(
            len(now & before) / len(now | before)
        )
        assert r["identity_overlap"] == pytest.approx(
            len(now & before) / len(before) if before else 0
        )
        assert r["votes"] == Counter(core["votes"].tolist())
        assert r["births"] == Counter(training for training, _ in now)
        before = now


def test_stability_of_a_written_case(tmp_path):
    """{a, b, c} -> {b, c, d, e}: two of five identities in common, two of three kept."""
    births = [[(0, 1), (0, 2), (0, 3)], [(0, 2), (0, 3), (1, 4), (1, 5)]]
    for n, birth in enumerate(births):
        (tmp_path / f"cycle{n}").mkdir()
        result = dict(cycle=n, core=len(birth), kept=2 * n, new=3 - n, dropped=n)
        metadata = dict(hook_name="blocks.0.hook_resid_post", result=result)
        (tmp_path / f"cycle{n}" / "cfg.json").write_text(json.dumps(dict(metadata=metadata)))
        core = Core(
            torch.zeros(len(birth), 2),
            birth=torch.tensor(birth),
            votes=torch.tensor([2, 2, 1, 1][: len(birth)]),
        )
        dmsae.save_tensors(
            vars(core), tmp_path / f"cycle{n}" / "core.safetensors", training=n, model="m", layer=0
        )
    rows = [ev.stability(folder) for folder in ev.cycles(tmp_path)]
    assert (
        rows[1]["jaccard"] == 2 / 5
        and rows[1]["identity_overlap"] == 2 / 3
        and rows[1]["votes"] == {1: 2, 2: 2}
        and rows[0]["jaccard"] == 0
    )


def evaluation(*words):
    """eval.py's command line: its exit code."""
    return dmsae.main([str(w) for w in words], "eval", ev.parse, ev.run)


def linear(probe):
    """nn.Linear's own weights as a probe of eval.py: weights, then bias."""
    return torch.cat([probe.weight, probe.bias[:, None]], 1).detach()


@pytest.mark.parametrize("balanced", [False, True])
def test_logistic_regression_is_the_minimum(balanced):
    """At the result the gradient of scikit-learn's objective, written out here, must vanish."""
    torch.manual_seed(0)
    x, y = torch.randn(60, 3, dtype=torch.float64), torch.rand(60) < 0.2
    probe = ev.logistic_regression(x, y, balanced)
    p = torch.sigmoid(ev.probe_logits(x, probe)[:, 0])
    weight = torch.ones(60)
    if balanced:
        weight = torch.where(y, 60 / (2 * y.sum()), 60 / (2 * (~y).sum()))
    error = weight * (p - y.double())
    assert (x.T @ error + probe[0, :-1]).abs().max() < 1e-3
    assert error.sum().abs() < 1e-3


def test_letter_probes_equal_a_naive_reference():
    """26 separate probes with torch's own schedule, loss by loss, must end in the same weights; a
    planted letter must be read."""
    y = torch.cat([torch.arange(26), torch.zeros(100, dtype=torch.long)])
    noise = torch.randn(126, 4, generator=torch.Generator().manual_seed(0))
    x = torch.cat([3 * F.one_hot(y, 26).float(), noise], 1)
    got = ev.train_letter_probes(x, y, 50, 1e-4, l1=0.02, seed=4)
    assert (ev.probe_logits(x, got).argmax(1) == y).all()
    rng, probes = dmsae.generator(4, "letters"), [nn.Linear(30, 1) for _ in range(26)]
    parameters = [p for probe in probes for p in probe.parameters()]
    for p in parameters:
        nn.init.zeros_(p)
    adam = torch.optim.Adam(parameters, 1e-2, weight_decay=1e-4)
    decay = torch.optim.lr_scheduler.ExponentialLR(adam, (1e-5 / 1e-2) ** (1 / 50))
    for _ in range(50):
        for at in torch.randperm(126, generator=rng).split(6):  # 50 would be 3 batches; 20 is least
            loss = 0
            for c, probe in enumerate(probes):
                weight = torch.where(y == c, (y != c).sum() / (y == c).sum(), 1.0)[at]
                p = torch.sigmoid(probe(x[at])[:, 0])
                bce = -(weight * torch.where(y[at] == c, p, 1 - p).log()).mean()
                loss = loss + bce / 26 + 0.02 * probe.weight.abs().sum() / 26
            adam.zero_grad()
            loss.backward()
            adam.step()
        decay.step()
    assert torch.allclose(got, torch.cat([linear(probe) for probe in probes]), atol=2e-3)


@pytest.mark.parametrize("words, least", [(110, 1000), (2000, 1600), (500, 1000)])
def test_letter_probes_take_a_thousand_steps(words, least, monkeypatch):
    """However few the words are, a probe must get at least 1000 steps; batches never grow."""
    steps, step = [], torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", lambda adam: steps.append(1) or step(adam))
    x, y = torch.randn(words, 3), torch.arange(words) % 26
    ev.train_letter_probes(x, y, 64, 0.0)
    assert least <= len(steps) <= 1600


def test_letter_task_reads_the_word():
    """The residual must be that of the word itself, in both prompts; letters must be right; train
    and test words must differ."""
    model, tokenizer, _, _ = letters_world()
    task = ev.spelling_task(model, 0, tokenizer)
    x, y, x_test, y_test = task.x_train, task.y_train, task.x_test, task.y_test
    assert len(x) + len(x_test) == 1043  # 1040 words and has, the, first; "letter:" is none
    for rows, labels in (x, y), (x_test, y_test):
        known = rows.any(1)  # `has`, `the` and `first` have no direction
        assert torch.equal(rows[known, :26].argmax(1), labels[known])
    assert torch.equal(x_test, task.x_fresh)
    in_train = set(x[:, 26:].argmax(1)[x.any(1)].tolist())
    assert not in_train & set(x_test[:, 26:].argmax(1)[x_test.any(1)].tolist())
    right = ev.probe_logits(x_test, task.probes).argmax(1) == y_test
    assert right[x_test.any(1)].float().mean() > 0.95


def test_letter_prompts_are_as_documented(monkeypatch):
    """BOS, newline, ten lines of examples that never show the word, and the word, where it must be
    read."""
    model, tokenizer, _, _ = letters_world()
    seen = []

    def read(model, layer, prompts):
        seen.extend(prompts)
        return [model.embed.weight[prompt] for prompt in prompts]

    monkeypatch.setattr(ev, "residuals", read)
    tokenizer.ids["\n"] = 1
    ev.spelling_task(model, 0, tokenizer)
    tail = [tokenizer.ids[w] for w in "has the first letter:".split()]
    for prompt in seen:
        lines = prompt[2:-1]  # example, tail, letter (unknown here), newline
        assert prompt[0] == 0 and len(lines) == 70 and prompt[-1] not in lines[::7]
        assert all(lines[j + 1 : j + 5] == tail for j in range(0, 70, 7))


def test_absorption_finds_the_planted_words():
    """Full absorption must be the share of blind words among the test words of the planted letter,
    and zero elsewhere; a notebook needs no run folder and no Config."""
    model, tokenizer, sae, blind = letters_world()
    r = ev.absorption(model, 0, tokenizer, sae)
    task = ev.spelling_task(model, 0, tokenizer, 10**6, 0)
    own = task.x_test[:, 26:].argmax(1) + 2  # token ids of the test words
    of_s = [i for i, y in zip(own.tolist(), task.y_test.tolist(), strict=True) if y == 18]
    rows = r["details"]
    hits = ev.probe_logits(task.x_test, task.probes)[:, 18] > 0
    share = sum(i in blind for i in of_s) / int((hits & (task.y_test == 18)).sum())
    assert 0 < share < 1 and rows["s"]["full_absorption_rate"] == pytest.approx(share)
    assert rows["s"]["fraction_0_6_0"] == pytest.approx(share, abs=1e-4)
    assert rows["s"]["num_split_features"] == 1
    assert all(row["full_absorption_rate"] == 0 for c, row in rows.items() if c != "s")
    assert r["letters"] == len(rows) >= 20
    for key in "full_absorption_rate", "main_f1":
        assert r[key] == pytest.approx(np.mean([row[key] for row in rows.values()]))


def test_letters_that_cannot_be_read_are_left_out(monkeypatch):
    """A letter that is not read must not count; where too few are, there must be a reason that
    says how many, and no number."""
    model, tokenizer, sae, _ = letters_world()
    task = ev.spelling_task(model, 0, tokenizer, 10**6, 0)
    probes = task.probes.clone()
    probes[[0, 25]] = torch.cat([torch.zeros(probes.shape[1] - 1), torch.tensor([-1.0])])
    monkeypatch.setattr(ev, "spelling_task", lambda *words: task._replace(probes=probes))
    read = "bcdefghijklmnopqrstuvwxy"
    assert "".join(ev.absorption(model, 0, tokenizer, sae)["details"]) == read
    monkeypatch.setattr(ev, "MIN_LETTERS", 25)
    with pytest.raises(ev.CannotRun, match="read 24 of 26"):
        ev.absorption(model, 0, tokenizer, sae)


def test_absorption_of_what_tells_no_letter_is_refused():
    """Main latents that tell no letter must give no figure, but a reason with their F1; a silent
    SAE too."""
    model, tokenizer, sae, _ = letters_world()
    noise = torch.randn(30, sae.W_enc.shape[1], generator=torch.Generator().manual_seed(0))
    noise[:, :26] = 0  # of single words only, none of which is in train and test
    with pytest.raises(ev.CannotRun, match="mean F1 is 0.[0-5]"):
        ev.absorption(model, 0, tokenizer, ready_sae(noise, noise))
    silent = ready_sae(sae.W_enc.detach(), sae.W_dec.detach(), math.inf)
    with pytest.raises(ev.CannotRun, match="mean F1 is 0.00"):
        ev.absorption(model, 0, tokenizer, silent)


def test_assignment_equals_brute_force():
    """The matching must have the least cost of all one-to-one matchings, ties and rectangles
    too."""
    rng = np.random.default_rng(0)
    for n, m, whole in itertools.product(range(1, 6), range(1, 7), (True, False)):
        if n <= m:
            cost = rng.integers(0, 4, (n, m)) if whole else rng.normal(size=(n, m))
            row_of = ev.assignment(cost.astype(float))
            taken = row_of >= 0
            assert sorted(row_of[taken].tolist()) == list(range(n))
            columns = itertools.permutations(range(m), n)
            best = min(cost[np.arange(n), list(c)].sum() for c in columns)
            assert cost[row_of, np.arange(m)][taken].sum() == pytest.approx(best)


def test_assignment_of_a_shuffle_is_the_shuffle():
    """As many rows as a core has: the planted order must be found, whatever the noise about it."""
    torch.manual_seed(0)
    a, order = torch.randn(200, 24), torch.randperm(200)
    b = a[order] + 0.1 * torch.randn(200, 24)
    cosine = (F.normalize(a) @ F.normalize(b).T).double().numpy()
    assert np.array_equal(ev.assignment(-cosine), order.numpy())
    assert ev.pw_mcc(a, a[order]) == pytest.approx(1)
    assert ev.pw_mcc(a[:1], -a[:1]) == pytest.approx(-1)
    assert 0.9 < ev.pw_mcc(a, b[:50]) == pytest.approx(ev.pw_mcc(b[:50], a))


def planted_run(folder, rows, core):
    """A run of one training: an SAE with these decoder rows, prefix 0 of 60, and a core in it."""
    sae = ready_sae(rows, F.normalize(rows), 0.0, [60, len(rows)])
    (folder / "cycle0").mkdir(parents=True)
    dmsae.save_sae(sae, folder / "cycle0")
    core = Core(rows[core], votes=torch.ones(len(core)), index=torch.tensor(core))
    core.birth = torch.zeros(len(core.index), 2).long()
    dmsae.save_tensors(vars(core), folder / "cycle0" / "core.safetensors", training=0)
    return folder


def test_agreement_of_planted_runs_beside_its_baselines(tmp_path):
    """Two runs that share their cores and nothing else must have a PW-MCC of 1 for the cores, near
    that of random directions for what is drawn from prefix 0, and in between for all of it."""
    torch.manual_seed(0)
    shared, core = torch.randn(20, 64), list(range(20))
    a, b = (torch.cat([shared, torch.randn(80, 64)]) for _ in range(2))
    runs = planted_run(tmp_path / "a", a, core), planted_run(tmp_path / "b", b, core)
    r = ev.agreement(*runs)
    for kind in "encoder", "decoder":
        assert r["core"]["n"] == [20, 20] and r["prefix 0"]["n"] == [60, 60]
        assert r["core"][kind] == pytest.approx(1, abs=1e-5)
        assert r["core"][f"{kind}_random"] < 0.4
        assert r["prefix 0"][f"{kind}_random"] < r["prefix 0"][kind] < 0.8
        drawn = r["drawn from prefix 0"]
        assert drawn["n"] == [20, 20] and drawn[kind] < 0.6
    assert ev.agreement(*runs) == r and ev.agreement(*runs, seed=1) != r
    same = ev.agreement(runs[0], runs[0])
    assert same["prefix 0"]["decoder"] == pytest.approx(1, abs=1e-5)


def test_labelled_reads_files_evenly(tmp_path):
    """A class of fewer than ten texts must be left out, empty texts too, the others cut to the
    budget; columns can be named."""
    rows = []
    for c, n in ("a", 40), ("b", 21), ("c", 9):
        rows += [dict(words=f"{c} {i}" if i else "", topic=c) for i in range(n)]
    path = tmp_path / "t.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    texts, labels, spurious = ev.labelled(ev.read_rows(path), ("words", "topic"), budget=30)
    assert spurious is None
    assert Counter(labels) == {"a": 15, "b": 15} and len(set(texts)) == 30
    assert all(t.split()[0] == c for t, c in zip(texts, labels, strict=True))
    texts, labels, same = ev.labelled(ev.read_rows(path), ("words", "topic", "topic"))
    assert Counter(labels) == {"a": 39, "b": 20} and (same == labels).all()
    (tmp_path / "t[1].csv").write_text("text,label\n" + "a text,1\n" * 12 + '"one, two",2\n' * 10)
    texts, labels, _ = ev.labelled(ev.read_rows(tmp_path / "t[1].csv"))
    assert Counter(labels) == {"1": 12, "2": 10} and "one, two" in texts
    for columns, says in (("words", "theme"), "has only"), (("topic", "words"), "two are needed"):
        with pytest.raises(dmsae.BadInput, match=says):
            ev.labelled(ev.read_rows(path), columns)


def test_missing_labels_make_no_classes(tmp_path):
    """Rows without text or label must be left out, and one missing label must not turn 1 into
    1.0."""
    rows = [f"text {i},{i % 2}" for i in range(12_000)]
    rows[11_000], rows[3] = "text,", ",1"
    (tmp_path / "t.csv").write_text("text,label\n" + "\n".join(rows))
    texts, labels, _ = ev.labelled(ev.read_rows(tmp_path / "t.csv"), budget=10**6)
    assert Counter(labels) == {"0": 2500, "1": 2500} and "" not in texts


def test_pooled_equals_text_by_text(lm):
    """Means over kept tokens must equal those of each text on its own."""
    from transformers import AutoTokenizer

    model, _, _ = held(lm)
    sae = random_sae(n_core=0, d_model=32).float()
    tokenizer = AutoTokenizer.from_pretrained(lm)
    texts = ["the cat sat", "dog", "a bird sang a loud song of spring " * 20]
    X, A = ev.pooled(model, 0, tokenizer, sae, texts, ctx=12)
    for i, t in enumerate(texts):
        ids = torch.tensor([[2, *tokenizer(t, add_special_tokens=False)["input_ids"]][:12]])
        x = dmsae.residual_stream(model, 0, ids)[0, 1:]
        f = sae.encode(x)
        assert torch.allclose(X[i], x.mean(0), atol=1e-5)
        assert torch.allclose(A[i], f.mean(0), atol=1e-5)
        less = f.clone()
        less[:, [3, 5]] = 0
        ablated = sae.decode(less) + (x - sae.decode(f))  # what `ablations` takes it to be
        moved = X[i] - A[i, [3, 5]] @ sae.W_dec[[3, 5]]
        assert torch.allclose(ablated.mean(0), moved, atol=1e-5)


@pytest.mark.parametrize("kind", ["Bloom", "OPT", "Gemma2"])
def test_raised_tokens_are_the_models_own(kind):
    """Whatever a model calls its final norm or projection (BLOOM has one of that name after the
    embedding, OPT projects to another width), the tokens must be those of its own head's input."""
    import transformers

    small = dict(
        vocab_size=50,
        hidden_size=16,
        num_attention_heads=2,
        num_hidden_layers=2,
    )
    other = dict(
        Bloom=dict(n_head=2, n_layer=2),
        OPT=dict(word_embed_proj_dim=8, ffn_dim=16, do_layer_norm_before=False),
        Gemma2=dict(head_dim=8, num_key_value_heads=1, intermediate_size=16),
    )
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**small, **other[kind])
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    for name, p in model.named_parameters():
        nn.init.normal_(p, 1.0 if "norm" in name else 0.0)  # a norm of ones could be left out
    rows, seen = torch.randn(7, 16), []
    hook = model.get_output_embeddings().register_forward_hook(lambda m, x, y: seen.append(x[0]))
    ids = ev.raised_tokens(model, rows, n=5)
    hook.remove()
    logits = model.get_output_embeddings()(seen[0][:, 0])
    assert torch.equal(ids, logits.topk(5).indices) and ids.shape == (7, 5)
    norm = dict(Bloom="transformer.ln_f", Gemma2="model.norm").get(kind)
    if norm:
        assert torch.allclose(seen[0][:, 0], model.get_submodule(norm)(rows), atol=1e-5)


@pytest.fixture(scope="session")
def labels_csv(lm, tmp_path_factory):
    """Labelled texts of the tiny model's words, with a spurious label."""
    folder, rows = tmp_path_factory.mktemp("labels"), []
    for i in range(120):
        start, end = ("the cat sat", "a bird sang")[i % 2], ("song", "loud")[i // 2 % 2]
        rows.append(dict(words=f"{start} {end} of {i}", topic=i % 2, noise=i // 2 % 2))
    lines = [",".join(map(str, row.values())) for row in rows]
    (folder / "t.csv").write_text("text,label,spurious\n" + "\n".join(lines))
    (folder / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def test_eval_through_its_command_line(story, labels_csv, tmp_path, capsys):
    """Everything on a run folder: each metric has figures or a reason, JSON is strict, nothing is
    overwritten, and the terminal shows what matters first."""
    out, file = tmp_path / "eval.json", labels_csv / "t.csv"
    words = story, "--labelled", file, "--columns", "text", "label", "spurious"
    words += "--seeds", 0, 1, "--html", "--out", out, "--tokens", 20_000
    assert evaluation(*words) == 0
    printed = capsys.readouterr().out
    report = json.loads(out.read_text(), parse_constant=lambda c: pytest.fail(f"{c} is no JSON"))
    assert [Path(s["folder"]).name for s in report["saes"]] == ["cycle0", "cycle3"]
    assert report["arguments"]["seeds"] == "[0, 1]" and "held out by" in report["text"]
    plain, last = (s["metrics"] for s in report["saes"])
    of_file = [f"{metric} {file}" for metric in ("probing", "tpp", "scr")]
    assert list(plain) == list(last) == ["core", "absorption", *of_file, "stability"]
    result = json.loads((story / "cycle3" / "cfg.json").read_text())["metadata"]["result"]
    core = last["core"]
    assert core["ce_loss_score"] == pytest.approx(result["ce_recovered"], abs=1e-4)
    for key in "l0", "core_l0":
        assert core[key] == pytest.approx(result[key], rel=1e-3)
    assert core["fvu"] == pytest.approx(result["fvu"][-1], rel=1e-3)
    assert list(last["absorption"]) == ["cannot_run"] and "words of letters only" in printed
    assert last["stability"]["core"] == result["core"] and last[f"scr {file}"]["pairs"] == 1
    assert len(last[f"tpp {file}"]["details"]) == 2
    lines = printed.splitlines()
    assert lines[0].startswith("text: ")
    assert [line.split("  ")[0].split(",")[0] for line in lines[2:9]] == FIRST
    assert lines[9].startswith("probing by 1 latent, higher is better  ")
    assert "kl_div_score" not in printed and "TPP" not in printed
    data = data_of((tmp_path / "eval.html").read_text())
    names = {re.sub("[0-9]+", "N", key).removesuffix("_std") for key in keys_of(data)}
    assert not [name for name in names - data["says"].keys() if "threshold" in name]
    assert str(tmp_path) not in (tmp_path / "eval.html").read_text().replace(str(file), "")
    first = out.read_bytes()
    assert evaluation(story / "cycle0", "--only", "core", "--all", "--out", out) == 0
    assert "kl_div_score" in capsys.readouterr().out
    assert out.read_bytes() == first
    again = json.loads((tmp_path / "eval-2.json").read_text())
    assert set(again["saes"][0]["metrics"]) == {"core"}
    words = "--only", "stability", "--tokens", 2000, "--out", tmp_path / "v0.1"
    assert evaluation(story / "cycle0", *words) == 0
    assert (tmp_path / "v0.1.json").exists()


FIRST = ["L0", "core L0", "FVU", "CE recovered", "alive", "core size", "kept"]


def test_without_data_there_are_reasons_and_the_rest(story, tmp_path, capsys):
    """Without labelled texts each metric that needs them must say so, in one line each;
    TPP must stand among the first eight where probing was not asked for."""
    out = tmp_path / "eval.json"
    assert evaluation(story, "--tokens", 2000, "--out", out) == 0
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if ": cannot run: " in line]
    assert [line.split(":")[0] for line in lines] == "absorption probing tpp scr".split()
    assert printed.count("--labelled FILE") == 3
    metrics = json.loads(out.read_text())["saes"][1]["metrics"]
    assert list(metrics) == ev.METRICS and metrics["stability"]["core"] > 0
    figures = dict(tpp_threshold_20_total_metric=0.25)
    report = dict(saes=[dict(folder="a", metrics={"tpp x.csv": figures})], agreement={})
    assert [row[0] for row in ev.headline(report)] == ["TPP of 20 latents, higher is better"]


def data_of(page):
    return json.loads(re.search(r"id=data>(.*?)</script>", page, re.S)[1])


def keys_of(data):
    return [name.split(": ")[-1] for name, _ in data["all"]]


def test_the_page_holds_what_it_shows(story, tmp_path):
    """One file without network: the first figures, a card for each core latent with its peak as the
    darkest token, every figure with one line that says what it is, every chart's numbers."""
    out = tmp_path / "e.json"
    words = "--only", "core", "stability", "--html", "--tokens", 5_000, "--out", out
    assert evaluation(story, *words) == 0
    page = (tmp_path / "e.html").read_text()
    assert not re.search(r'(src|href)="?http|@import|document.write', page)
    data, core = data_of(page), load_file(story / "cycle3" / "core.safetensors")
    assert len(data["first"]) == 7 and len(*data["stability"].values()) == 4
    order = core["score"].argsort(descending=True)
    assert data["core"]["index"] == core["index"][order].tolist()
    assert len(data["contexts"]) == len(data["raises"]) == len(order)
    for raised, contexts in zip(data["raises"], data["contexts"], strict=True):
        shades = [shade for _, shades in contexts for shade in shades]
        assert len(raised) == 8 and (max(shades) == pytest.approx(1) or not any(shades))
    assert data["share"][-1] == pytest.approx(1) and sum(data["core"]["score"]) == pytest.approx(1)
    assert len(data["share"]) == len(data["density"]) == load_sae(story / "cycle3").widths[0]
    names = {re.sub(r"\d+", "N", key) for key in keys_of(data) if key not in data["says"]}
    assert names - data["says"].keys() == {"contexts"}


def test_the_page_escapes(story):
    """Tokens, names and reasons that look like HTML must not become HTML."""
    metrics = {"<u>": dict(cannot_run="because </script><b>")}
    report = dict(model="<b>", layer=0, k=1, text="<i>&", stability={}, agreement={})
    report["saes"] = [dict(folder="a<", metrics=metrics)]
    page = ev.page(report, dict(raises=[["</script>"]]))
    assert page.count("</script>") == ev.PAGE.count("</script>")
    assert page.count("<b>") == ev.PAGE.count("<b>") and "JSON.parse(at" in page
    assert data_of(page)["all"] == [["<u>: cannot_run", ["because </script><b>"]]]


def test_another_text_and_an_older_page(story, lm, tmp_path):
    """A given text must not be cut by the separator of the run's own; a page must not be
    overwritten even where its JSON is gone."""
    docs = (lm / "text.txt").read_text().split("|||")
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps(dict(text=d)) for d in docs))
    (tmp_path / "e.html").write_text("precious")
    words = "--only", "core", "stability", "--text", tmp_path / "t.jsonl", "--tokens", 5_000
    assert evaluation(story / "cycle0", *words, "--html", "--out", tmp_path / "e.json") == 0
    assert (tmp_path / "e.html").read_text() == "precious" and (tmp_path / "e-2.html").exists()
    assert not (tmp_path / "e.json").exists()
    assert "t.jsonl" in json.loads((tmp_path / "e-2.json").read_text())["text"]


def test_scaled_decoder_rows_change_nothing(story, labels_csv, tmp_path):
    """A foreign SAE whose latents are rescaled, the same function, must get the same figures; its
    folder's parent is no run."""
    sae = tmp_path / "hub" / "sae"
    shutil.copytree(story / "cycle3", sae)
    (tmp_path / "hub" / "config.json").write_text("{}")
    (sae / "core.safetensors").unlink()
    cfg = json.loads((story / "cycle3" / "cfg.json").read_text())
    cfg["metadata"]["config"]["core"] = "/gone.safetensors"  # no longer asked for
    (sae / "cfg.json").write_text(json.dumps(cfg))
    w, s = weights(story, 3), 0.2 + torch.rand(128, generator=torch.Generator().manual_seed(0))
    scaled = {name: w[name] / s for name in ("W_enc", "b_enc", "threshold")}
    scaled |= dict(W_dec=w["W_dec"] * s[:, None], b_dec=w["b_dec"])
    scaled = {k: v.contiguous() for k, v in scaled.items()}
    save_file(scaled, sae / "sae_weights.safetensors")
    words = "--only", "core", "stability", "probing", "--labelled", labels_csv / "t.csv", "--html"
    out = tmp_path / "e.json"
    assert evaluation(story / "cycle3", sae, *words, "--tokens", 20_000, "--out", out) == 0
    one, two = (s["metrics"] for s in json.loads(out.read_text())["saes"])
    for key in "l1", "fvu":
        assert one["core"][key] == pytest.approx(two["core"][key], rel=1e-4)
    name, key = f"probing {labels_csv / 't.csv'}", "sae_top_2_test_accuracy"
    assert one[name][key] == pytest.approx(two[name][key], abs=0.05)
    assert "no run folder" in two["stability"]["cannot_run"] and one["stability"]["core"] > 0


def foreign_folder(story, folder, layout):
    """An SAE folder with only SAELens's metadata, in the layout of its version."""
    shutil.copytree(story / "cycle0", folder)
    (folder / "core.safetensors").unlink()
    cfg = json.loads((folder / "cfg.json").read_text())
    meta = cfg.pop("metadata")
    for key in "config", "result", "widths", "n_core", "n_exempt":
        meta.pop(key)
    if layout == "pre":
        meta["hook_name"] = "blocks.1.hook_resid_pre"  # the output of layer 0
    cfg |= dict(metadata=meta) if layout == "6" else dict(meta, metadata=None)
    (folder / "cfg.json").write_text(json.dumps(cfg))
    return folder


@pytest.mark.parametrize("layout", ["6", "3", "pre"])
def test_foreign_folders_of_every_layout(layout, story, lm, labels_csv, tmp_path, capsys):
    """A folder with only SAELens's metadata, nested, at the top, or of a resid_pre, must be
    evaluated on a given text, and must say that it has no run; columns can be named."""
    foreign = foreign_folder(story, tmp_path / "sae", layout)
    words = "--text", lm / "text.txt", "--tokens", 20_000, "--html"
    words += "--labelled", labels_csv / "t.jsonl", "--columns", "words", "topic"
    assert evaluation(foreign, "--only", "core", "stability", "probing", "scr", *words) == 0
    report = json.loads((foreign / "eval.json").read_text())
    metrics = report["saes"][0]["metrics"]
    assert report["saes"][0]["layer"] == 0 and metrics["core"]["fvu"] > 0
    assert "first of text.txt" in report["text"] and (foreign / "eval.html").exists()
    assert "no run folder" in metrics["stability"]["cannot_run"]
    assert "third column" in metrics[f"scr {labels_csv / 't.jsonl'}"]["cannot_run"]
    assert "stability: cannot run: the SAE" in capsys.readouterr().out


def test_two_runs_are_compared(story, tmp_path, capsys):
    """Two runs must be compared by PW-MCC, beside its baselines, in the table and the JSON."""
    shutil.copytree(story, tmp_path / "run")
    out = tmp_path / "two.json"
    assert evaluation(story, tmp_path / "run", "--only", "stability", "--out", out) == 0
    report = json.loads(out.read_text())
    assert len(report["saes"]) == 4 and len(report["stability"]) == 2
    (sets,) = report["agreement"].values()
    assert sets["core"]["decoder"] == pytest.approx(1, abs=1e-5)
    printed = capsys.readouterr().out
    assert "PW-MCC" in printed and "random directions" in printed


def test_eval_from_another_folder_than_the_run(lm, tmp_path, monkeypatch):
    """A relative --model and --text must be found from the run's folder, wherever eval.py
    starts."""
    shutil.copytree(lm, tmp_path / "work" / "m" / "lm")
    monkeypatch.chdir(tmp_path / "work")
    words = command(Path("m/lm"), "runs/a", cycles=0, text="m/lm/text.txt")
    assert dmsae.main(words) == 0
    monkeypatch.chdir(tmp_path)
    assert evaluation("work/runs/a", "--only", "core", "--tokens", 2000) == 0
    (tmp_path / "work" / "runs" / "a" / "tokens.bin").unlink()
    assert evaluation("work/runs/a", "--only", "core", "--tokens", 2000) == 0


def test_runs_of_older_versions_are_read(story, tmp_path):
    """Settings that dmsae.py no longer has must not stop an evaluation."""
    shutil.copytree(story, tmp_path / "run")
    for path in (tmp_path / "run").glob("cycle*/cfg.json"):
        cfg = json.loads(path.read_text())
        gone = dict(core_in_prefixes=False, core_decoder="encoder", compile=True, cache_gb=None)
        gone["prefixes"] = [0.1, 0.5, 1.0]  # the last one was written out
        cfg["metadata"]["config"] |= gone
        path.write_text(json.dumps(cfg))
    assert evaluation(tmp_path / "run", "--only", "core", "--tokens", 2000) == 0


def other_model(folder):
    """A model of another width."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=16,
    )
    Gemma2ForCausalLM(config).save_pretrained(folder)


REFUSED = [
    (["/nowhere"], "/nowhere/cfg.json"),
    (["RUN", "--only", "speed"], "invalid choice"),
    (["RUN", "--tokens", "0"], "--tokens"),
    (["RUN", "--labelled", "/nowhere.csv"], "No such file"),
    (["RUN", "--labelled", "EMPTY"], "has only no rows"),
    (["RUN", "--labelled", "MD"], "must be a .csv or .jsonl"),
    (["RUN", "--labelled", "CUT"], "must be a .csv or .jsonl"),
    (["RUN", "--labelled", "LISTS"], "must be a .csv or .jsonl"),
    (["RUN", "--labelled", "ONE"], "two are needed"),
    (["RUN", "--labelled", "CSV", "--columns", "words", "label"], "--columns words label"),
    (["RUN", "--out", "/nowhere/eval.json"], "--out /nowhere/eval.json"),
    (["RUN", "--model", "OTHER"], "width"),
    (["RUN", "--text", "/nowhere.txt"], "existing file"),
    ([], "required"),
    (["RUN", "--device", "cuda:9"], "--device"),
    (["HOOK"], "hook"),
    (["NAMELESS"], "--model"),
    (["RUN", "LATE"], "name one by --model"),
    (["RUN", "LATE", "--model", "LM"], "--layer 9"),
    (["EARLY"], "blocks.0.hook_resid_pre: hook_name must be"),
    (["RUN", "--tokens", "x"], "invalid int"),
    (["RUN", "--seeds", "x"], "invalid int"),
    (["RUN", "--seeds", "-1"], "--seeds: 0 or above"),
    (["RUN", "--columns", "text"], "two or three"),
    (["RUN", "--labelled", "CSV", "--columns", "text", "label", "sex"], "label sex"),
    (["DAMAGED"], "cycle1/cfg.json: is missing or damaged"),
    (["FIRST"], "cycle0/cfg.json: is missing or damaged"),
    (["KEYLESS"], "'result'"),
    (["WIDTHLESS"], "'d_in'"),
    (["EMPTIED"], "tokens.bin: holds less"),
]


@pytest.mark.parametrize("words, says", REFUSED)
def test_eval_refuses_bad_input_in_one_line(words, says, story, lm, labels_csv, tmp_path, capsys):
    """One line that says what is wrong, exit code 2, and nothing written."""
    if "OTHER" in words:
        other_model(tmp_path / "other")
    hooks = dict(hook=("m", "blocks.0.hook_mlp_out"), nameless=(None, "blocks.0.hook_resid_post"))
    for name, (model, hook) in (hooks | dict(early=("m", "blocks.0.hook_resid_pre"))).items():
        (tmp_path / name).mkdir()
        cfg = dict(metadata=dict(model_name=model, hook_name=hook))
        (tmp_path / name / "cfg.json").write_text(json.dumps(cfg))
    (tmp_path / "empty.csv").write_text("text,label\n")
    (tmp_path / "one.csv").write_text("text,label\n" + "x,1\n" * 30)
    (tmp_path / "lists.jsonl").write_text('["a b", "x"]')
    late = foreign_folder(story, tmp_path / "late", "6") / "cfg.json"
    late.write_text(late.read_text().replace("blocks.0.", "blocks.9.").replace(str(lm), "m"))
    (tmp_path / "cut.jsonl").write_text('{"text": "a", "lab')
    (tmp_path / "md.md").write_text("# text,label\n")
    damaged = dict(damaged="cycle1/cfg.json", first="cycle0/cfg.json", emptied="tokens.bin")
    damaged |= dict(keyless="cycle1/cfg.json", widthless="cycle0/cfg.json")
    for name, file in damaged.items():
        if name.upper() in words:
            shutil.copytree(story, tmp_path / name)
            text = (story / file).read_text(errors="replace").replace('"result"', '"x"')
            cut = text.replace('"d_in"', '"x"') if "less" in name else ""
            (tmp_path / name / file).write_text(cut)
    files = "empty.csv one.csv cut.jsonl lists.jsonl md.md".split()
    files += ["other", "hook", "nameless", "early", "late", *damaged]
    real = {Path(file).stem.upper(): tmp_path / file for file in files}
    real |= dict(RUN=story, LM=lm, CSV=labels_csv / "t.csv")
    before = sorted(story.rglob("*"))
    capsys.readouterr()
    try:
        code = evaluation(*(real.get(w, w) for w in words))
    except SystemExit as e:
        code = e.code
    bars = "Loading weights"  # transformers' own
    err = [line for line in capsys.readouterr().err.splitlines() if line and bars not in line]
    assert code == 2 and len(err) == 1 and err[0].startswith("eval: ") and says in err[0]
    assert sorted(story.rglob("*")) == before


def test_scr_takes_the_pairs_with_the_most_texts():
    """At most four, by the smallest of their cells; 20 texts in each are enough, 19 are not."""
    sizes = dict(a=30, b=25, c=20, d=22, e=19)
    labels = [c for c, n in sizes.items() for _ in range(2 * n)]
    values = [v for n in sizes.values() for v in "uv" for _ in range(n)]
    found = ev.scr_cells(labels, values)
    pairs = ["".join(labels[cell[0]] for cell in cells[::2]) for cells in found]
    assert pairs == ["ab", "ad", "bd", "ac"]


def test_probing_takes_latents_that_are_off_for_a_class():
    """A latent that all the others have, and a class has not, must tell it as well as one of its
    own."""
    labels = np.array(list("abc") * 40)
    A = 1.0 - F.one_hot(torch.arange(120) % 3, 3).float()
    assert ev.sparse_probing(A, A, labels)["sae_top_1_test_accuracy"] == 1


def test_often_is_above_the_percentage():
    """Latents on at just 1 % or 10 % of tokens must not count as on at more."""
    density, sae = torch.tensor([0.01, 0.1, 0.5]).double(), random_sae(widths=(2, 3))
    density[:2] = torch.tensor([1, 10]).double() / 100
    figures = ev.latent_figures(density, sae)
    for percent, n, share in (1, 2, 0.6), (10, 1, 0.5):
        assert figures[f"freq_over_{percent}_percent"] == pytest.approx(n / 3)
        assert figures[f"normalized_freq_over_{percent}_percent"] == pytest.approx(share / 0.61)


def test_core_comes_in_saebenchs_batches(lm, monkeypatch):
    """2048 tokens at a time, as 16 contexts of 128 are: some figures are means over batches."""
    model, ids, keep = held(lm)
    n = 5000 // ids.numel() + 1
    calls = spied(monkeypatch, ev, "core_sums")
    ev.core_metrics(model, 0, ids.repeat(n, 1), keep.repeat(n, 1), random_sae(32).float())
    sizes = {ids.numel() for _, _, ids, _, _ in calls[:-1]}
    assert sizes == {2048 // ids.shape[1] * ids.shape[1]}


@pytest.mark.parametrize("c, absorbs", [(0.02, False), (0.03, True)])
def test_a_latent_hardly_along_the_probe_absorbs_nothing(c, absorbs):
    """However active it is, its cosine with the probe must be 0.025 at least."""
    x, main = torch.tensor([[1.0, 0.0]]), torch.tensor([0])
    W_dec = torch.tensor([[1.0, 0.0], [c, (1 - c * c) ** 0.5]])
    full, _ = ev.absorption_scores(torch.tensor([[0.0, 100.0]]), x, W_dec, x[0], main)
    assert full.tolist() == [absorbs]


def test_no_positive_is_left_out_where_shares_are_uneven():
    """Of 40 and 10 positives beside three other classes all must be there."""
    for train, test in ev.one_vs_rest(list("abcd" * 50)):
        assert (train.shape, test.shape) == ((2, 40), (2, 10))


@pytest.mark.parametrize("sizes, n", [([97, 3], 1), ([90, 10], 2), ([10] * 10, 10)])
def test_a_further_main_latent_must_add_to_the_f1(sizes, n):
    """Of latents that share 100 positives out, one that brings an F1 of .985 to 1 adds too little,
    ten that add .05 and more are all taken."""
    group = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    f = 5.0 * F.pad(F.one_hot(group).float(), (0, 0, 0, 100))
    y = torch.arange(200) < 100
    main, f1 = ev.main_latents(torch.arange(len(sizes)), f, y, f, y)
    assert main.tolist() == list(range(n))
    assert f1 > 0.94


def test_a_deviation_is_that_of_a_sample():
    """Over n - 1, as of a few seeds; of one value, none."""
    r = ev.mean_of([dict(a=1.0, b=None), dict(a=3.0, b=5.0)])
    assert (r["a"], r["b"], r["b_std"]) == (2, 5, None)
    assert r["a_std"] == pytest.approx(math.sqrt(2))


def test_a_given_text_is_not_cut_by_the_runs_separator(story, lm):
    """With --text the run's own separator and column must be forgotten, without it its text be
    kept."""
    words = [str(story), "--text", str(lm / "text.txt")]
    _, cfg, home = ev.load(ev.parse(words))
    assert (cfg.separator, cfg.text_column, home) == (None, "text", None)
    assert ev.load(ev.parse(words[:1]))[2] == story


# ---- README: its commands parse, its pieces paste, its claims hold -------------------------------
PASTE_HEAD = "import torch\nimport torch.nn.functional as F\nfrom torch import nn\n"
PASTE_IMPORTS = dict(
    math="import math",
    json="import json",
    contextlib="import contextlib",
    NamedTuple="from typing import NamedTuple",
    Path="from pathlib import Path",
    load_file="from safetensors.torch import load_file",
)


def readme_pieces():
    """The rows of README.md's table of pieces: {last name taken: (names, imports)}."""
    readme = (HERE / "README.md").read_text()
    table = re.search(r"\| piece \| take \| and import \|\n\|---.*\n((?:\|.*\n)+)", readme)[1]
    rows = [row.split("|") for row in table.splitlines()]
    names = [(re.findall("`(.*?)`", row[2]), re.findall("`(.*?)`", row[3])) for row in rows]
    return {take[-1]: (take, imports) for take, imports in names}


def paste(name):
    """An empty module with a piece of dmsae.py, and with nothing but what the table says."""
    source = (HERE / "dmsae.py").read_text()
    take, imports = readme_pieces()[name]
    code = [PASTE_HEAD, *(PASTE_IMPORTS[word] for word in imports)]
    for node in ast.parse(source).body:
        targets = getattr(node, "targets", [])
        if {getattr(node, "name", ""), *(getattr(t, "id", "") for t in targets)} & set(take):
            first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
            code.append("\n".join(source.splitlines()[first - 1 : node.end_lineno]))
    module = ModuleType("pasted")
    exec("\n\n".join(code), vars(module))
    assert all(hasattr(module, word) for word in take)
    return module


def test_the_table_names_seven_pieces():
    """The table must be found, whole."""
    names = "select_core nested_loss nested_decode update residual_stream attribute load_sae"
    assert list(readme_pieces()) == names.split()


def test_pieces_of_the_method_paste():
    """select_core, nested_loss and the sparse step must run in an empty module."""
    assert paste("select_core").select_core(torch.tensor([1.0, 3.0, 0.0]), 0.7).tolist() == [1]
    x_hats = torch.tensor([[[3.0, 0.0], [3.0, 3.0]]])
    assert paste("nested_loss").nested_loss(torch.tensor([[3.0, 4.0]]), x_hats) == 17 / 4
    piece = paste("nested_decode")
    W_enc, b_enc = torch.randn(6, 4).requires_grad_(), torch.zeros(6)
    x, b_dec = torch.randn(3, 4), torch.zeros(4)
    row, col = torch.tensor([0, 0, 2]), torch.tensor([1, 5, 0])
    acts = piece.SparseActs((x @ W_enc.T)[row, col].detach(), row, col)
    value = piece.EncodeAt.apply(W_enc, b_enc, b_dec, x, acts)
    out = piece.nested_decode(acts._replace(value=value), W_enc, b_dec, torch.tensor([2, 6]), 3)
    dense = torch.zeros(3, 6).index_put((row, col), value)
    assert torch.allclose(out[:, 1], dense @ W_enc) and torch.allclose(
        out[:, 0], dense[:, :2] @ W_enc[:2]
    )
    out.sum().backward()
    assert W_enc.grad.abs().sum() > 0


def test_the_sae_pastes_and_learns():
    """Class, loss and step must train in an empty module."""
    piece = paste("update")
    torch.manual_seed(0)
    sae = piece.MatryoshkaSAE(8, [16, 64])
    adam = torch.optim.Adam(sae.parameters())
    x = torch.randn(256, 8)
    losses = []
    for step in range(30):
        loss, active, cut = piece.loss_and_grad(sae, x, k=4, dead=torch.arange(60, 64))
        piece.update(sae, adam, lr=1e-2)
        sae.update_threshold(cut, step)
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0] and len(active.col) == 256 * 4


def test_the_language_model_pieces_paste():
    """Reading and replacing a layer, and attribution, must run on a toy in an empty module."""
    torch.manual_seed(0)
    toy = Toy(torch.randn(50, 8), torch.randn(8, 50))
    ids = torch.randint(1, 50, (6, 10))
    piece = paste("residual_stream")
    assert torch.equal(piece.residual_stream(toy, 0, ids), toy.embedding[ids])
    with piece.spliced(toy, 0, torch.zeros_like):
        assert not toy(ids).logits.any()
    sae = MatryoshkaSAE(8, [8, 16])
    score, density = paste("attribute").attribute(toy, 0, ids, ids > 0, sae)
    assert len(score) == 8 and score.sum() > 0 and 0 < density.sum() < 8


def test_load_sae_pastes(story):
    """It must load our folder in an empty module, and encode the same."""
    x = torch.randn(5, 32)
    ours = load_sae(story / "cycle3").encode(x)
    assert torch.equal(paste("load_sae").load_sae(story / "cycle3").encode(x), ours)


def readme_commands():
    """Every command in README.md's plain blocks, as words, comments left out."""
    blocks = re.findall(r"(?ms)^```(\w*)\n(.*?)^```$", (HERE / "README.md").read_text())
    lines = [line for kind, block in blocks if not kind for line in block.splitlines()]
    starts = "python ", "pip "
    commands = [part for line in lines if line.startswith(starts) for part in line.split("&&")]
    return [shlex.split(command, comments=True) for command in commands]


def test_readme_commands_parse():
    """Every dmsae.py and eval.py command of README.md must parse; there must be a good many."""
    seen = Counter()
    for words in readme_commands():
        script = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
        if script is None or words[script] == "test_dmsae.py" or "--help" in words:
            continue
        {"dmsae.py": dmsae.parse, "eval.py": ev.parse}[words[script]](words[script + 1 :])
        seen[words[script]] += 1
    assert seen["dmsae.py"] >= 7 and seen["eval.py"] >= 2


def test_commands_of_the_evidence_parse(tmp_path):
    """The README's shell blocks, run with a `python` that only writes down what it is given."""
    stub = "python() {{ printf '%s\\0' \"$@\" END >> {0}; echo 0.1 0.2 0.3 0.4; }}\n"
    readme = (HERE / "README.md").read_text()
    blocks = re.findall(r"(?ms)^```sh\n(.*?)^```$", readme)
    script = stub.format(tmp_path / "log") + "\n".join(blocks)
    subprocess.run(["bash", "-euc", script], check=True, capture_output=True, cwd=tmp_path)
    calls = (tmp_path / "log").read_text().split("END\0")[:-1]
    commands = [call.split("\0")[:-1] for call in calls]
    runs = [dmsae.parse(words[1:]) for words in commands if words[0] == "dmsae.py"]
    assert len(runs) > 50
    assert {words[0] for words in commands} == {"dmsae.py", "evidence.py"}
    assert {cfg.seed for cfg in runs} == {*range(5)}
    given = {cfg.core for cfg in runs if cfg.core}
    outs = {cfg.out for cfg in runs}
    made = {words[3] for words in commands if words[:2] == ["evidence.py", "unit"]}
    assert all(core in made or str(Path(core).parents[1]) in outs for core in given)


def test_the_evidences_scripts_run(story, tmp_path, monkeypatch, capsys):
    """evidence.py must give prefixes as wide, a core of random directions, and a row."""
    (code,) = re.findall(r"(?ms)^```py\n(.*?)^```$", (HERE / "README.md").read_text())
    scope = dict(__name__="evidence")
    exec(code, scope)
    scope["wide"](story / "cycle3")
    shares = capsys.readouterr().out.split()
    sae = load_sae(story / "cycle3")
    assert Config(d_sae=128, prefixes=[*map(float, shares)]).widths() == sae.widths
    scope["unit"](story / "cycle0", tmp_path / "core.safetensors")
    core, _ = dmsae.load_core(tmp_path / "core.safetensors")
    old, _ = dmsae.load_core(story / "cycle0" / "core.safetensors")
    assert torch.allclose(core.W_enc.norm(dim=1), old.W_enc.norm(dim=1), rtol=1e-4)
    assert F.cosine_similarity(core.W_enc, old.W_enc).abs().mean() < 0.4
    capsys.readouterr()
    (tmp_path / "runs").mkdir()
    for seed in (0, 1):
        os.symlink(story, tmp_path / "runs" / f"a_{seed}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", ["a 3 core fvu0 width0"])
    scope["table"]()
    row = capsys.readouterr().out
    assert f"{result(story, 3)['core']} ± 0 |" in row and "2 seeds" in row


def test_readme_line_counts_are_true():
    """The lines of each file as claimed; dmsae.py at most 950."""
    readme = (HERE / "README.md").read_text()
    for name in ("dmsae.py", "eval.py"):
        (claimed,) = re.findall(rf"\| `{name}` \| (\d+) \|", readme)
        assert int(claimed) == len((HERE / name).read_text().splitlines())
    assert len((HERE / "dmsae.py").read_text().splitlines()) <= 950


def test_readme_snippets_run(story, tmp_path, monkeypatch):
    """The Python snippets must run as written, on a run folder of the README's name."""
    monkeypatch.chdir(tmp_path)
    readme = (HERE / "README.md").read_text()
    snippets = re.findall(r"```python\n(.*?)```", readme, re.S)
    (folder,) = set(re.findall(r'"(runs/[^"]*?)/cycle', "".join(snippets)))
    Path(folder).parent.mkdir(parents=True)
    os.symlink(story, folder)
    assert len(snippets) == 2
    scope = {"acts": torch.randn(4096, 32), "x": torch.randn(9, 32), "torch": torch}
    for code in snippets:
        exec(code, scope)


# ---- Benchmark: `python test_dmsae.py`, or with --model of a whole run on a model of that shape --
def median_ms(cases, rounds, device):
    """Median milliseconds of each case, all taken in turn so that a noisy minute hits all alike."""
    times = {name: [] for name in cases}
    for _ in range(rounds + 1):
        for name, run_case in cases.items():
            start = time.perf_counter()
            run_case()
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(t[1:]) for name, t in times.items()}


def dense_step(sae, adam, x, k, dead=()):
    """The same training step by dense autograd, as other trainers do it."""
    pre = ((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc).relu()  # (B, F)
    top = pre.flatten().topk(len(x) * k, sorted=False)
    acts = torch.zeros_like(pre).flatten().scatter(0, top.indices, top.values).view_as(pre)
    groups = acts.tensor_split(sae.widths[:-1], 1)
    rows = sae.W_dec.tensor_split(sae.widths[:-1])
    parts = [a @ W for a, W in zip(groups, rows, strict=True)]
    x_hats = torch.stack(parts, 1).cumsum(1) + sae.b_dec
    loss = dmsae.nested_loss(x, x_hats)
    if len(dead):
        residual = (x - x_hats[:, -1]).detach()
        top = pre[:, dead].topk(x.shape[1] // 2, sorted=False)
        kept = torch.zeros_like(pre[:, dead]).scatter(1, top.indices, top.values)
        aux = dmsae.dead_latent_loss(residual, kept, sae.W_dec[dead])
        loss = loss + aux / 32
    loss.backward()
    dmsae.update(sae, adam, 1e-6)


def step_cases(sae, x, k):
    """What is timed of a training step; "floor" is what no exact trainer can do without."""
    dead = torch.arange(3 * len(sae.W_enc) // 4, len(sae.W_enc), device=x.device)
    adam = torch.optim.Adam(sae.parameters(), 1e-6, fused=True)
    grads = [torch.zeros_like(p) for p in sae.parameters()]
    steps = itertools.count()

    def select():
        pre = F.linear(x - sae.b_dec.detach(), sae.W_enc, sae.b_enc).detach()
        sae.batch_topk(pre, k)

    def step(dead=()):
        _, _, cut = dmsae.loss_and_grad(sae, x, k, 1, dead)
        dmsae.update(sae, adam, 1e-6)
        sae.update_threshold(cut, next(steps))

    def product():
        F.linear(x, sae.W_enc.detach(), sae.b_enc.detach())

    def floor():
        product()
        for p, grad in zip(sae.parameters(), grads, strict=True):
            p.grad = grad
        adam.step()
        adam.zero_grad()

    return {
        "encoder product": product,
        "encoder product + Adam": floor,
        "product and selection": select,
        "step": step,
        "step, quarter dead": lambda: step(dead),
        "dense autograd": lambda: dense_step(sae, adam, x, k),
        "dense autograd, quarter dead": lambda: dense_step(sae, adam, x, k, dead),
    }


def random_model(cfg):
    """A language model of the named shape with random weights: nothing is downloaded."""
    from transformers import AutoConfig, AutoModelForCausalLM, Gemma2Config

    if Path(cfg.model).name == "gemma-2-2b":
        shape = Gemma2Config(attn_implementation="eager")  # its defaults are Gemma-2-2B's
    else:
        shape = AutoConfig.from_pretrained(cfg.model)
    dtype = torch.bfloat16 if cfg.device.startswith("cuda") else torch.float32
    with torch.device(cfg.device):
        model = AutoModelForCausalLM.from_config(shape, dtype=dtype)
    return model.eval().requires_grad_(False)


def peak_gib(device):
    """Peak memory since the start, GiB: of the GPU's allocator, or of the process."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def benchmark_model(cfg, model, sae, step_ms):
    """Harvest and attribution in tokens a second, and what the whole command would take."""
    lm = model.config.get_text_config()
    on_cuda = cfg.device.startswith("cuda")
    contexts = 4 if on_cuda else 1
    rounds = 3 if on_cuda else 1
    ids = torch.randint(1, lm.vocab_size, (contexts, cfg.ctx))
    keep = torch.ones_like(ids, dtype=torch.bool)
    size = 8192 if on_cuda else 2048
    square = torch.randn(size, size, dtype=model.dtype, device=cfg.device)
    one = ids[:1], keep[:1]
    cases = {
        "matrix product": lambda: square @ square,
        "harvest": lambda: dmsae.harvest(model, cfg.layer, ids, keep),
        "attribution": lambda: dmsae.attribute(model, cfg.layer, *one, sae),
    }
    ms = median_ms(cases, rounds, cfg.device)
    flops = 2 * size**3 / ms["matrix product"]  # per millisecond
    layers = [sum(p.numel() for p in m.parameters()) for m in dmsae.decoder_layers(model)]
    below, above = sum(layers[: cfg.layer + 1]), sum(layers[cfg.layer + 1 :])
    head = lm.vocab_size * lm.hidden_size
    floors = {  # 2 FLOP a parameter and token, twice more where gradients pass
        "harvest": 2 * ids.numel() * below / flops,
        "attribution": 2 * cfg.ctx * (below + 2 * (above + head)) / flops,
    }
    rates = {"train": 1e3 * cfg.batch / step_ms}
    for name, n in (("harvest", ids.numel()), ("attribution", cfg.ctx)):
        rates[name] = 1e3 * n / ms[name]
        print(f"{name:30s}{ms[name]:10.1f} ms {rates[name]:12,.0f} tokens/s", end="")
        print(f"{ms[name] / floors[name]:8.2f} x its matrix products")
    saes = cfg.cycles + 1 + len(cfg.transfer_k)
    seconds = saes * cfg.tokens * (1 / rates["train"] + 1 / rates["harvest"])
    seconds += saes * (cfg.attribution_tokens + 131072) / rates["attribution"]
    gigabytes = 8e-9 * cfg.d_sae * lm.hidden_size * (saes + 6) + 4e-9 * cfg.tokens
    print(f"the whole command: {seconds / 3600:.1f} hours, {gigabytes:.0f} GB on disk", end="")
    print(f", peak {peak_gib(cfg.device):.1f} GiB")


def benchmark(argv):
    """Time a training step; with --model, everything of `python dmsae.py` with these flags."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as dmsae.main does
    torch.set_float32_matmul_precision("high")
    cfg = dmsae.parse(argv or ["--d-sae", "16384", "--k", "32", "--batch", "1024"])
    D, rounds, model = 512, 15, None
    if any(word.split("=")[0] == "--model" for word in argv):
        model, rounds = random_model(cfg), 3
        D = model.config.get_text_config().hidden_size
    torch.manual_seed(0)
    sae = MatryoshkaSAE(D, cfg.widths()).to(cfg.device)
    x = torch.randn(cfg.batch, D, device=cfg.device)
    print(f"B {cfg.batch}, D {D}, F {cfg.d_sae}, k {cfg.k} | {cfg.device}, ", end="")
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, median of {rounds}")
    ms = median_ms(step_cases(sae, x, cfg.k), rounds, cfg.device)
    floor = ms["encoder product + Adam"]
    for name in ms:
        print(f"{name:30s}{ms[name]:10.1f} ms {ms[name] / floor:8.2f} x product + Adam")
    if model is not None:
        benchmark_model(cfg, model, sae, ms["step"])
    ratios = [
        f"{ms[name] / floor:.2f}" for name in ("step", "step, quarter dead", "dense autograd")
    ]
    print("ratios: step {}, quarter dead {}, dense autograd {}".format(*ratios))


if __name__ == "__main__":
    benchmark(sys.argv[1:])
