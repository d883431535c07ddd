"""Tests of dmsae.py and eval.py: every name is a claim. No network, no GPU; tiny sizes; a minute and a half on two cores.

`python test_dmsae.py` instead times one training step against dense autograd and against the encoder product alone."""

import itertools
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

import dmsae
import eval as ev
from dmsae import (
    Config,
    Core,
    MatryoshkaSAE,
    Text,
    apply_gradients,
    attribute,
    batch_topk,
    evaluate,
    load_sae,
    loss_and_grad,
    nested_loss,
    next_core,
    select_core,
)

HERE = Path(__file__).parent
pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR")


# ---- Helpers -----------------------------------------------------------------------------------------------------------
def random_sae(d_model=8, widths=(13, 25, 64), n_core=0, n_exempt=0, dtype=torch.float64, seed=0):
    """An SAE in which nothing is at its initial value: biases at zero hide bugs."""
    torch.manual_seed(seed)
    sae = MatryoshkaSAE(d_model, widths, n_core, n_exempt, dtype=dtype)
    for p in (sae.b_enc, sae.b_dec, sae.W_enc):
        nn.init.normal_(p)
    sae.threshold.uniform_(0.1, 0.5)
    return sae


def preactivations(sae, x):
    """The definition: (B, F)"""
    return ((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc).detach()


def fit(sae, batch, k, steps, lr=3e-3):
    """Train on batch(step) -> (B, D): the loop a reader would write around the pieces."""
    trained, guess, since = sae.trained(), 0.0, torch.zeros(len(sae.W_enc))
    adam = torch.optim.Adam(trained, lr)
    for step in range(steps):
        loss, _, cut, col, _ = loss_and_grad(
            sae, trained, batch(step), k, guess=guess, dead=(since > 20).nonzero()[:, 0]
        )
        apply_gradients(trained, adam, dmsae.learning_rate(step, steps, lr))
        sae.update_threshold(cut, step)
        guess, since = 0.9 * cut, since + 1
        since[col] = 0


def dense_loss(params, x, k, floor, sae, dead=()):
    """The definition, written densely and differentiated by autograd: loss and number of active latents."""
    W_enc, b_enc, W_dec, b_dec = params
    E, (B, D) = sae.n_exempt, x.shape
    pre = (x - b_dec) @ W_enc.T + b_enc
    core = pre[:, :E] * (pre[:, :E] > sae.threshold[:E])
    rest = pre[:, E:].relu()
    budget = max(B * k - int((core > 0).sum()), B * floor)
    order = rest.flatten().argsort(descending=True, stable=True)[:budget]
    mask = torch.zeros(rest.numel(), dtype=torch.bool)
    mask[order] = True
    acts = torch.cat([core, rest * mask.view_as(rest)], 1)
    x_hats = [acts[:, :w] @ W_dec[:w] + b_dec for w in sae.widths]
    loss = sum(((x - x_hat) ** 2).sum(1).mean() for x_hat in x_hats) / (len(x_hats) * D)
    if len(dead):
        residual = (x - x_hats[-1]).detach()
        a = ((x - b_dec) @ W_enc[dead].T + b_enc[dead]).relu()
        kth = a.sort(dim=1, descending=True).values[:, min(D // 2, len(dead)) - 1, None]
        e = residual - (a * (a >= kth)) @ W_dec[dead]
        loss = loss + 1 / 32 * (e**2).sum() / ((residual - residual.mean(0)) ** 2).sum()
    return loss, int((acts > 0).sum())


class Toy(nn.Module):
    """A one-layer 'language model': embedding, an identity layer to splice, a linear head."""

    def __init__(self, embedding, head):
        super().__init__()
        self.embedding, self.layers, self.head = embedding, nn.ModuleList([nn.Identity()]), head
        self.config = SimpleNamespace(
            get_text_config=lambda: SimpleNamespace(num_hidden_layers=1, vocab_size=len(embedding))
        )
        self.device = torch.device("cpu")

    def forward(self, ids, use_cache=False):
        return SimpleNamespace(logits=self.layers[0](self.embedding[ids]) @ self.head)


def toy_text(ids, special=(0,)):
    """A Text whose contexts are the rows of ids (R, T) without their first column, which is BOS = 0."""
    return Text(ids[:, 1:].numpy().astype(np.int32), 0, torch.tensor(special), 1, 1)


@pytest.fixture(scope="session")
def lm(tmp_path_factory):
    """An ordinary Hugging Face folder with a tiny random Gemma-2 and its tokenizer, and a text file."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("lm")
    words = "the cat dog sat on mat and ran to house while bird sang loud song of spring".split()
    docs = [" ".join(random.Random(i).choices(words, k=60)) for i in range(400)]
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        docs, vocab_size=300, special_tokens=["<pad>", "<eos>", "<bos>"], show_progress=False
    )
    PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    Gemma2ForCausalLM(
        Gemma2Config(
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
    ).save_pretrained(folder)
    (folder / "text.txt").write_text("|||".join(docs))
    return folder


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
    words.update(changes)
    return [
        w
        for name, value in words.items()
        if value is not None
        for w in (f"--{name.replace('_', '-')}", str(value))
    ]


def weights(out, cycle):
    return load_file(Path(out) / f"cycle{cycle}" / "sae_weights.safetensors")


@pytest.fixture(scope="session")
def story(lm, tmp_path_factory):
    """A whole run of three cycles through the real main, in gated mode."""
    out = tmp_path_factory.mktemp("run") / "out"
    assert dmsae.main(command(lm, out, cycles=3, core_sparsity="gated")) == 0
    return out


# ---- BatchTopK ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("guess", [0.0, 0.5, 1.0, 99.0])
@pytest.mark.parametrize("B", [16, 2**18])
def test_survivors_equal_a_full_sort(guess, B):
    """Whatever the guess, and in one slice of latents or (with 2^18 tokens) in eight, the survivors must be the B*k largest entries of
    the whole batch, in order, and the cut the least of them."""
    sae, x = random_sae(), torch.randn(B, 8, dtype=torch.float64)
    pre = preactivations(sae, x)
    value, row, col, cut, _ = sae.survivors(x, 6, guess=guess)
    expected = torch.zeros(B * 64, dtype=torch.bool)
    expected[pre.flatten().argsort(descending=True)[: 6 * B]] = True
    assert torch.equal(torch.stack([row, col], 1), expected.view(B, 64).nonzero())
    assert torch.allclose(value, pre[row, col]) and cut == value.min()


def test_batch_topk_breaks_ties_by_place():
    """Of equal entries at the cut the earlier must survive, and never more than fit."""
    mask, cut = batch_topk(torch.tensor([1.0, 2.0, 1.0, 1.0, 3.0, 1.0]), 4)
    assert mask.tolist() == [True, True, True, False, True, False] and cut == 1
    assert batch_topk(torch.ones(3), 5)[0].all() and len(batch_topk(torch.ones(0), 5)[0]) == 0


def test_no_zero_or_negative_entry_survives():
    """With fewer positive entries than asked for, all of those and no others must survive; none at all is no error."""
    sae = ready_sae(torch.eye(2), torch.eye(2))
    _, row, col, cut, _ = sae.survivors(torch.tensor([[-1.0, 2.0], [0.0, 5.0]]), 1, guess=1.0)
    assert (row.tolist(), col.tolist(), float(cut)) == ([0, 1], [1, 1], 2.0)
    assert len(sae.survivors(-torch.ones(2, 2), 1)[0]) == 0


def test_a_batch_where_only_the_core_is_on_moves_no_threshold_to_infinity():
    """The cut must stay finite where no competing latent is above 0."""
    sae = random_sae(n_core=2, n_exempt=2)
    with torch.no_grad():
        sae.b_enc[:2], sae.b_enc[2:] = 99, -99
    assert sae.survivors(torch.randn(4, 8, dtype=torch.float64), 3, guess=1.0)[3] == 0


@pytest.mark.parametrize("B, F_", [(2**19, 13), (7, 61)])
def test_candidates_are_those_of_the_dense_product(B, F_):
    """In slices of which the last is ragged, or in one: places in order, and values."""
    x, W, b, low = (
        torch.randn(B, 4).double(),
        torch.randn(F_, 4).double(),
        torch.randn(F_).double(),
        torch.rand(F_).double() * 3,
    )
    value, row, col = dmsae.candidates(x, W, b, low)
    assert torch.equal(
        torch.stack([row, col], 1), (x @ W.T + b > low).nonzero()
    ) and torch.allclose(value, (x @ W.T + b)[row, col])
    assert dmsae.candidates(x.float(), W.float(), 30 * b.float(), 0 * low.float())[0].min() > 0


def test_budget_is_exact_and_shared_by_the_whole_batch():
    """Exactly B*k latents must fire in all, not k in each row."""
    sae, x = random_sae(), torch.randn(16, 8, dtype=torch.float64)
    _, row, _, _, _ = sae.survivors(x, k=3)
    assert len(row) == 16 * 3 and len(set(row.bincount().tolist())) > 1


@pytest.mark.parametrize("n_exempt, floor, total", [(0, 1, "k"), (5, 1, "k"), (5, 6, "k + core")])
def test_core_budget(n_exempt, floor, total):
    """compete and dynamic must hold the total at B*k; exempt (floor = k) must give B*k beside the core."""
    sae, x = random_sae(n_core=5, n_exempt=n_exempt), torch.randn(16, 8, dtype=torch.float64)
    value, row, col, cut, core_l0 = sae.survivors(x, k=6, floor=floor)
    n_core = int((col < 5).sum())
    assert n_core > 0 and core_l0 * 16 == n_core
    assert len(row) == 16 * 6 + (n_core if total == "k + core" else 0)
    if n_exempt:
        assert n_core == int((preactivations(sae, x)[:, :5] > sae.threshold[:5]).sum()), (
            "an exempt core must be on wherever pre > threshold"
        )
    assert cut == value[col >= n_exempt].min()


def test_budget_of_the_rest_never_falls_below_the_floor():
    """Where the core takes more than B*k, the other latents must still get B*floor."""
    sae, x = random_sae(n_core=12, n_exempt=12), torch.randn(16, 8, dtype=torch.float64)
    _, _, col, _, core_l0 = sae.survivors(x, k=2, floor=1)
    assert core_l0 > 2 and int((col >= 12).sum()) == 16


# ---- The sparse step ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("n_core, n_exempt", [(0, 0), (5, 5), (5, 0)])
@pytest.mark.parametrize("dead", [0, 3, 20, 40])  # 40: ten times k_aux, which a CPU takes as sparse
@pytest.mark.parametrize("case", ["plain", "ties", "few positive"])
def test_sparse_loss_and_gradients_equal_dense_autograd(n_core, n_exempt, dead, case):
    """Loss and every gradient must equal the dense definition to 1e-10 in float64."""
    sae = random_sae(n_core=n_core, n_exempt=n_exempt)
    x = torch.randn(16, 8, dtype=torch.float64)
    if case == "ties":  # equal latents and equal tokens
        with torch.no_grad():
            sae.W_enc[30:40], sae.b_enc[30:40] = sae.W_enc[30], sae.b_enc[30]
        x[8:] = x[:8]
    if case == "few positive":
        nn.init.constant_(sae.b_enc, -8.0)
    dead = torch.arange(64 - dead, 64)
    trained = sae.trained()
    loss, x_hat, _, col, _ = loss_and_grad(sae, trained, x, k=4, floor=1, guess=0.3, dead=dead)
    params = [
        p.detach().clone().requires_grad_() for p in (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec)
    ]
    expected, n_active = dense_loss(params, x, 4, 1, sae, dead)
    expected.backward()
    assert len(col) == n_active and (case != "few positive" or len(col) < 64)
    assert abs(loss - expected) < 1e-10
    for got, want in zip(trained, (params[0].grad[n_core:], *(p.grad for p in params[1:]))):
        assert want.abs().max() > 1e-4 and (got.grad - want).abs().max() < 1e-10


@pytest.mark.parametrize("d", [31, 32])
def test_dead_latents_of_which_none_is_positive_have_no_gradient(d):
    """Dense or sparse: the loss must be the residual's own size, and no row may move."""
    x, W_enc, W_dec = (torch.randn(n, 8).requires_grad_() for n in (16, d, d))
    b_enc, b_dec = torch.full((d,), -99.0, requires_grad=True), torch.zeros(8, requires_grad=True)
    residual = torch.randn(16, 8)
    loss = dmsae.dead_latent_loss(x.detach(), residual, W_enc, b_enc, W_dec, b_dec, 4)
    loss.backward()
    assert torch.allclose(loss, residual.pow(2).sum() / (residual - residual.mean(0)).pow(2).sum())
    assert all(p.grad.abs().max() == 0 for p in (W_enc, b_enc, W_dec, b_dec))


def test_dead_latents_of_nan_are_not_taken_as_sparse(monkeypatch):
    """NaNs would all count as on, B x d entries of them; the loss must be NaN, so that the run stops with its one line."""
    monkeypatch.setattr(dmsae, "SparseAutoencode", None)
    x, W = torch.full((16, 8), math.nan), torch.randn(40, 8)
    assert dmsae.dead_latent_loss(x, torch.randn(16, 8), W, W[:, 0], W, W[0], 4).isnan()


@pytest.mark.parametrize("n", [9, 640])  # few, or so many that the columns are taken in pieces
def test_segment_sum_equals_the_loop(n):
    """Rows in order, a last piece that is ragged, and segments that are empty."""
    table, weight, index = (
        torch.randn(5, 300).double(),
        torch.randn(n).double(),
        torch.randint(0, 5, (n,)),
    )
    segment = torch.tensor([0, 1, 3, 3]).repeat_interleave(n)[: 4 * n : 4].sort().values
    want = torch.stack(
        [
            sum(
                (weight[i] * table[index[i]] for i in (segment == s).nonzero()[:, 0]),
                torch.zeros(300).double(),
            )
            for s in range(5)
        ]
    )
    for s in (segment, segment.int()):
        assert torch.allclose(dmsae.segment_sum(table, index, weight, s, 5), want)


def test_the_gathering_branch_of_paired_dots_equals_the_sampled_one():
    """The path that GPUs take must give what the CPU's gives."""

    class OnGPU:
        device, shape = SimpleNamespace(type="cuda"), (6, 4)

        def __getitem__(self, index):
            return a[index]

    a, b = torch.randn(6, 4), torch.randn(9, 4)
    i, j = torch.tensor([0, 0, 2, 5]), torch.tensor([1, 8, 0, 3])
    for table in (a, OnGPU()):
        for i_ in (i, i.int()):
            assert torch.allclose(
                dmsae.paired_dots(table, i_, b, j), (a[i] * b[j]).sum(1), atol=1e-6
            )


def test_survivors_values_are_differentiable_too():
    """A penalty that a reader puts on the activations must reach W_enc."""
    sae, x = random_sae(), torch.randn(4, 8, dtype=torch.float64)
    free, b_enc, W_dec, b_dec = sae.trained()
    value, row, col, _, _ = sae.survivors(x, 3)
    out, _ = dmsae.SparseAutoencode.apply(
        free, b_enc, W_dec, b_dec, sae.W_enc.detach(), x, value, row, col, sae.edges
    )
    weight = torch.arange(len(out)).double()  # no two alike, so that each must reach its own latent
    (out * weight).sum().backward()
    want = torch.zeros_like(free).index_add_(0, col, (x - b_dec.detach())[row] * weight[:, None])
    assert torch.allclose(free.grad, want) and torch.allclose(
        b_enc.grad, col.bincount(weight, minlength=64)
    )


def test_two_steps_on_one_batch_have_the_gradient_of_one():
    """apply_gradients must leave no gradient behind."""
    sae, x = random_sae(dtype=torch.float32), torch.randn(16, 8)
    trained = sae.trained()
    adam = torch.optim.Adam(trained, 0.0)
    norms = []
    for _ in range(2):
        loss_and_grad(sae, trained, x, 4)
        norms.append(apply_gradients(trained, adam, 0.0).item())
    assert norms[0] == pytest.approx(norms[1], rel=1e-5) and norms[0] > 0


def test_decoder_rows_are_unit_norm_after_a_step_and_get_no_gradient_along_themselves():
    """|W_dec_i| must be 1 to 1e-6 after the step; Adam must never see the component along the row."""
    sae, x = random_sae(dtype=torch.float32), torch.randn(64, 8)
    trained = sae.trained()
    rows = sae.W_dec.detach().clone()
    adam = torch.optim.Adam(trained, 1e-2)
    loss_and_grad(sae, trained, x, 4)
    before = sae.W_dec.grad.clone()
    apply_gradients(trained, adam, 1e-2)
    assert (sae.W_dec.norm(dim=1) - 1).abs().max() < 1e-6 and not torch.equal(sae.W_dec, rows)
    along = (adam.state[sae.W_dec]["exp_avg"] * rows).sum(1).abs().max()
    assert (before * rows).sum(1).abs().max() > 1e-3 and along < 1e-6


@pytest.mark.parametrize(
    "size", [1e-4, 0.02, 10.0]
)  # norms far below 1, little above it, far above
def test_gradients_are_clipped_to_norm_1_and_have_no_part_along_any_row(size):
    """What reaches the optimiser: every decoder row's part along the row gone (in every chunk of rows), then the whole scaled to norm 1
    where it is above; the norm before that is returned."""
    sae, seen = MatryoshkaSAE(8, [600, 1300]), []
    trained, rows = sae.trained(), sae.W_dec.detach().clone()
    for p in trained:
        p.grad = size * torch.randn_like(p)
    want = [p.grad.clone() for p in trained]
    want[2] -= (want[2] * rows).sum(1, keepdim=True) * rows
    total = torch.cat([w.flatten() for w in want]).norm()
    adam = torch.optim.Adam(trained)
    adam.register_step_pre_hook(lambda *_: seen.extend(p.grad.clone() for p in trained))
    assert apply_gradients(trained, adam, 1e-3).item() == pytest.approx(
        total.item(), rel=1e-5
    ) and (total > 1) == (size > 1e-3)
    for got, w in zip(seen, want):
        assert torch.allclose(got, w / total.clamp_min(1), atol=1e-6 * size, rtol=1e-4)
    assert (sae.W_dec.norm(dim=1) - 1).abs().max() < 1e-6, "in every chunk of rows"


# ---- The SAE -----------------------------------------------------------------------------------------------------------
def test_each_parameter_is_used():
    """Changing any one of the four parameters or the threshold must change the output."""
    for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold"):
        sae, x = random_sae(), torch.randn(16, 8, dtype=torch.float64)
        before = sae(x)
        with torch.no_grad():
            getattr(sae, name).add_(0.3)
        assert not torch.allclose(before, sae(x)), name


def test_nested_loss_by_hand():
    """Two latents, two prefixes: x = (3, 4), prefix 0 gives (3, 0), prefix 1 gives (3, 3): (16 + 1) / (2 * 2)."""
    x_hats = torch.tensor([[[3.0, 0.0], [3.0, 3.0]]])
    assert nested_loss(torch.tensor([[3.0, 4.0]]), x_hats) == 17 / 4


def test_one_prefix_is_a_plain_sae():
    """With a single prefix the loss must be the mean squared error of the one reconstruction."""
    sae, x = random_sae(widths=(64,)), torch.randn(16, 8, dtype=torch.float64)
    loss, x_hat, _, _, _ = loss_and_grad(sae, sae.trained(), x, 4)
    assert torch.allclose(loss, (x - x_hat).pow(2).mean())


def test_nested_reconstructions_are_those_of_the_truncated_saes():
    """Prefix j must reconstruct exactly what its first latents alone give, and the last what the whole SAE gives."""
    sae, x = random_sae(n_core=5, n_exempt=5), torch.randn(16, 8, dtype=torch.float64)
    x_hats, col, _ = sae.reconstruct(x)
    for j, w in enumerate(sae.widths):
        assert torch.allclose(x_hats[:, j], sae.decode(sae.encode(x, w)))
    assert torch.allclose(x_hats[:, -1], sae(x)) and len(col) == int((sae.encode(x) > 0).sum())


def test_3d_input_is_refused():
    """A (batch, sequence, D) tensor must be refused with the mend in the message."""
    with pytest.raises(ValueError, match="flatten"):
        random_sae().encode(torch.randn(2, 3, 8, dtype=torch.float64))


def test_folding_the_scale_gives_the_same_function_on_raw_activations():
    """sae(s * x) / s before must equal sae(x) after, with encoder rows bit for bit and unit decoder rows."""
    sae, x = random_sae(), torch.randn(16, 8, dtype=torch.float64)
    want, W_enc, W_dec = sae(2.5 * x) / 2.5, sae.W_enc.clone(), sae.W_dec.clone()
    sae.fold_scale(2.5)
    assert (
        torch.allclose(sae(x), want)
        and torch.equal(sae.W_enc, W_enc)
        and torch.equal(sae.W_dec, W_dec)
    )


def planted(parents=6, children=3, d_model=32, seed=0):
    """Hierarchical data: a child is only there with its parent. Returns parent directions and batch(step)."""
    g = torch.Generator().manual_seed(seed)
    rows = torch.linalg.qr(torch.randn(d_model, d_model, generator=g)).Q[: parents * (1 + children)]

    def batch(step, n=512):
        g = torch.Generator().manual_seed(1000 + step)
        on = torch.rand(n, parents, generator=g) < 0.25
        child = torch.randint(0, children, (n, parents), generator=g)
        acts = torch.cat(
            [
                on.float(),
                (on[..., None] & (child[..., None] == torch.arange(children))).flatten(1) * 0.6,
            ],
            1,
        )
        return acts * (1 + 0.1 * torch.randn(acts.shape, generator=g)) @ rows

    return rows[:parents], batch


def test_planted_parents_are_found_in_the_first_prefix():
    """Where a child only comes with its parent, prefix 0 must hold every parent; a plain SAE of the same size and budget
    must not (its latents are parent + child, at a cosine of 1 / sqrt(1 + 0.6^2) = 0.857: absorption)."""
    parents, batch = planted()
    worst = []
    for widths in ([10, 48], [48]):
        torch.manual_seed(0)
        sae = MatryoshkaSAE(32, widths)
        fit(sae, lambda step: batch(step, 256), k=2, steps=600, lr=5e-3)
        best = (sae.W_dec[: widths[0]] @ parents.T).max(0)  # over latents, for each of 6 parents
        assert len(set(best.indices.tolist())) == 6
        worst.append(best.values.min().item())
    assert worst[0] > 0.9 and worst[1] < 0.87


def test_inference_l0_is_the_trained_l0():
    """On data not trained on, the fixed threshold must give k active latents within 5 %."""
    _, batch = planted()
    torch.manual_seed(1)
    sae = MatryoshkaSAE(32, [6, 48])
    fit(sae, batch, k=3, steps=300)
    assert (sae.encode(batch(10_000, 4096)) > 0).sum(1).float().mean() == pytest.approx(3, rel=0.05)


def test_threshold_follows_the_last_tenth_of_the_steps():
    """A cut that doubles half-way must be forgotten by the end; latents outside BatchTopK must not be touched."""
    sae = random_sae(n_core=5, n_exempt=5)
    gates = sae.threshold[:5].clone()
    for step in range(100):
        sae.update_threshold(torch.tensor(1.0 if step < 50 else 2.0, dtype=torch.float64), step)
    assert (sae.threshold[5:] - 2).abs().max() < 0.01 and torch.equal(sae.threshold[:5], gates)
    for step in range(5000, 5100):  # a long run: the last 100 steps weigh 1 - 0.99^100 = 0.634
        sae.update_threshold(torch.tensor(3.0, dtype=torch.float64), step)
    assert sae.threshold[-1] == pytest.approx(2 + 0.634, abs=0.01)


def test_dead_latents_come_back():
    """Latents that lose every BatchTopK must win some after training with the dead-latent loss, and fewer without."""
    _, batch = planted()
    wins = []
    for dead in (torch.arange(24, 48), ()):
        torch.manual_seed(0)
        sae = MatryoshkaSAE(32, [6, 48])
        sae.b_enc.data[24:] = -0.6
        count = lambda: int((sae.survivors(batch(0), 3)[2] >= 24).sum())
        wins.append(count())
        trained = sae.trained()
        adam = torch.optim.Adam(trained, 3e-3)
        for step in range(100):
            loss_and_grad(sae, trained, batch(step), 3, dead=dead)
            apply_gradients(trained, adam, 3e-3)
        wins.append(count())
    assert wins[0] == wins[2] < wins[1] and wins[3] < wins[1]


# ---- The language model ------------------------------------------------------------------------------------------------
def load_tiny(lm):
    return dmsae.load_model(Config(model=str(lm), device="cpu"))


def test_residual_stream_is_the_layers_output_and_stops_there(lm):
    """It must equal transformers' own hidden states, and run neither later layers nor the head."""
    model, ids = load_tiny(lm), torch.randint(3, 300, (2, 10))
    want = model(ids, output_hidden_states=True).hidden_states[1]
    ran = []
    for m in (dmsae.decoder_layers(model)[1], model.lm_head):
        m.register_forward_hook(lambda *_: ran.append(1))
    assert torch.equal(dmsae.residual_stream(model, 0, ids), want) and not ran
    assert model.config._attn_implementation == "eager", "soft-capping needs eager attention"


def test_splicing_takes_tensors_and_tuples():
    """transformers 4 returns a tuple from a decoder layer, transformers 5 a tensor."""

    class Layer(nn.Module):
        def forward(self, h):
            return (h, "cache") if self.tuple else h

    layer = Layer()
    model = SimpleNamespace(
        config=SimpleNamespace(get_text_config=lambda: SimpleNamespace(num_hidden_layers=1)),
        modules=lambda: [nn.ModuleList([layer])],
    )
    for layer.tuple in (False, True):
        with dmsae.spliced(model, 0, lambda h: 2 * h):
            out = layer(torch.ones(3))
        assert torch.equal(out[0] if layer.tuple else out, 2 * torch.ones(3))
        assert torch.equal(
            layer(torch.ones(3))[0] if layer.tuple else layer(torch.ones(3)), torch.ones(3)
        )


def test_gemma_2_2b_shape():
    """Gemma2Config()'s defaults are Gemma-2-2B: 26 layers of width 2304 must be found (on the meta device: no weights)."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    with torch.device("meta"):
        layers = dmsae.decoder_layers(Gemma2ForCausalLM(Gemma2Config()))
    assert len(layers) == 26 and layers[12].mlp.down_proj.out_features == 2304


# ---- Text --------------------------------------------------------------------------------------------------------------
def test_documents_are_packed_with_bos_first_and_between(lm, tmp_path):
    """The stream must be doc BOS doc BOS..., every context must start with BOS, and no token may be lost."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(lm)
    docs = ["the cat sat", "", "a dog ran to the house"]
    n = dmsae.tokenize(docs, tokenizer, 2, 1000, tmp_path / "t")
    want = [i for d in docs if d for i in (*tokenizer(d, add_special_tokens=False)["input_ids"], 2)]
    flat = np.fromfile(tmp_path / "t", np.int32)
    assert flat.tolist() == want and n == len(want)
    text = Text(flat[:9].reshape(3, 3), 2, torch.tensor([0, 1, 2]), 1, 1)
    assert text.contexts(slice(3)).tolist() == [[2, *want[3 * i : 3 * i + 3]] for i in range(3)]
    assert dmsae.tokenize(docs, tokenizer, 2, 4, tmp_path / "t") == 4


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
def test_local_files_give_their_documents(suffix, tmp_path):
    """.txt must be split at the separator; .jsonl and .parquet must give a row each."""
    docs, path = ["one\ntwo", "three"], tmp_path / ("t" + suffix)
    if suffix == ".txt":
        path.write_text("<sep>".join(docs))
    elif suffix == ".jsonl":
        path.write_text("".join(json.dumps({"text": d}) + "\n" for d in docs))
    else:
        from datasets import Dataset

        Dataset.from_dict({"text": docs}).to_parquet(path)
    assert (
        list(
            dmsae.documents(Config(text=str(path), separator="<sep>" if suffix == ".txt" else None))
        )
        == docs
    )


def test_blocks_are_fixed_by_number_and_seed_and_never_held_out():
    """The same number and seed must give the same contexts; every training context once a pass; no held-out one."""
    text = Text(np.arange(20, dtype=np.int32)[:, None].repeat(3, 1), 99, torch.tensor([99]), 2, 3)
    assert torch.equal(text.block(1, 5, 0), text.block(1, 5, 0)) and not torch.equal(
        text.block(1, 5, 0), text.block(1, 5, 1)
    )
    seen = torch.cat([text.block(i, 5, 0)[:, 1] for i in range(3)])
    assert sorted(seen.tolist()) == list(range(5, 20)), "20 contexts, 5 held out"
    assert torch.equal(text.block(3, 5, 0), text.block(0, 5, 0)), (
        "after a whole pass the text starts again"
    )


def test_special_tokens_never_reach_the_sae(lm):
    """Positions of BOS, EOS and PAD must be dropped from what is harvested."""
    model, ids = load_tiny(lm), torch.tensor([[2, 5, 1, 7, 0, 9, 2, 8]])
    text = Text(ids[:, 1:].numpy(), 2, torch.tensor([0, 1, 2]), 1, 1)
    acts = dmsae.harvest(model, 0, text, ids)
    assert torch.equal(acts, dmsae.residual_stream(model, 0, ids)[0, [1, 3, 5, 7]])


def test_batches_resume_from_their_position(lm):
    """The batch that follows a position must be the same whether or not the ones before were drawn."""
    model, cfg = load_tiny(lm), Config(model=str(lm), layer=0, ctx=8, batch=16, device="cpu")
    text = Text(
        np.random.default_rng(0).integers(3, 300, (400, 7)).astype(np.int32),
        2,
        torch.tensor([0, 1, 2]),
        2,
        3,
    )
    stream = dmsae.batches(cfg, model, text, 1.0, 0)
    drawn = [next(stream) for _ in range(70)]  # more than a block
    for i in (0, 30, 64, 68):
        assert torch.equal(
            next(dmsae.batches(cfg, model, text, 1.0, 0, *drawn[i][1]))[0], drawn[i + 1][0]
        )


# ---- Evaluation and attribution ----------------------------------------------------------------------------------------
def tiny_case():
    """A GPT-2 in float64 (Gemma's norms always compute in float32), contexts with a BOS and an EOS inside, and an SAE."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=300, n_embd=32, n_layer=2, n_head=2, n_positions=16, initializer_range=0.3
        )
    )
    model, ids = model.double().eval().requires_grad_(False), torch.randint(3, 300, (3, 9))
    ids[:, 0], ids[1, 4] = 2, 1
    text = Text(ids[:, 1:].numpy(), 2, torch.tensor([0, 1, 2]), 1, 1)
    x = dmsae.harvest(model, 0, text, ids)
    sae = random_sae(32, (12, 40), n_core=4, n_exempt=4)
    sae.b_dec.data = x.mean(0)
    return model, text, ids, sae


@pytest.mark.parametrize("with_error", [False, True])
def test_attribution_equals_finite_differences(with_error):
    """a_i(t) must be the derivative of the loss when latent i at token t is scaled, the rest of x_hat held fixed."""
    model, text, ids, sae = tiny_case()
    mean, density = attribute(model, 0, text, ids, sae, with_error=with_error)
    signed, _ = attribute(model, 0, text, ids, sae, "signed", with_error)
    x, M, h = dmsae.harvest(model, 0, text, ids), 12, 1e-4
    f = sae.encode(x, M)
    base = x if with_error else sae.decode(f)

    def loss(x_hat):
        edit = lambda hidden, keep: hidden.masked_scatter(keep[..., None], x_hat)
        with torch.no_grad():
            return sum(l.item() for l, _ in dmsae.spliced_losses(model, 0, text, ids, edit))

    a = torch.zeros_like(f)
    for t, i in f.nonzero().tolist():
        step = torch.zeros_like(base)
        step[t] = h * f[t, i] * sae.W_dec[i]
        a[t, i] = (loss(base + step) - loss(base - step)) / (2 * h)
    assert (a.abs() > 1e-4).sum() > 20
    assert torch.allclose(a.abs().mean(0), mean, rtol=1e-6, atol=1e-8) and torch.allclose(
        a.mean(0).abs(), signed, rtol=1e-6, atol=1e-8
    )
    assert torch.allclose(density, (f > 0).double().mean(0))


def test_attribution_quantile_is_the_value_of_its_rank():
    """The 0.99 quantile must be exact although the contexts come in several batches (here of at most 16,384 tokens)."""
    torch.manual_seed(0)
    toy, ids = (
        Toy(torch.randn(50, 8).double(), torch.randn(8, 50).double()),
        torch.randint(1, 50, (3000, 10)),
    )
    text, sae = toy_text(ids), random_sae()
    got = attribute(toy, 0, text, ids, sae, "quantile")[0]
    f, leaves = [], []

    def edit(h, keep):
        f.append(sae.encode(h[keep], 13).detach())
        leaves.append(sae.decode(f[-1]).detach().requires_grad_())
        return h.masked_scatter(keep[..., None], leaves[-1])

    sum(loss for loss, _ in dmsae.spliced_losses(toy, 0, text, ids, edit)).backward()
    a = torch.cat([(f_ * (leaf.grad @ sae.W_dec[:13].T)).abs() for f_, leaf in zip(f, leaves)])
    assert len(leaves) == 2 and torch.allclose(
        got, a.sort(0, descending=True).values[int(0.01 * len(a))]
    )


def test_attribution_ranks_the_directions_that_the_loss_reads_first():
    """Where the head reads 3 of 8 directions, the latents of those must get all of the attribution, in order of use."""
    torch.manual_seed(0)
    head = torch.zeros(8, 50)
    head[:3] = torch.randn(3, 50) * torch.tensor([4.0, 2.0, 1.0])[:, None]
    toy, ids = Toy(torch.rand(50, 8), head), torch.randint(1, 50, (30, 10))
    sae = MatryoshkaSAE(8, [8, 16])
    sae.W_enc.data[:8] = sae.W_dec.data[:8] = torch.eye(8)[[5, 0, 6, 1, 7, 2, 3, 4]]
    score, density = attribute(toy, 0, toy_text(ids), ids, sae)
    assert score.argsort(descending=True)[:3].tolist() == [1, 3, 5]
    assert select_core(score, 0.999).tolist() == [1, 3, 5] and density[0] > 0.9
    assert score[[0, 2, 4, 6, 7]].max() < 1e-6


def test_evaluation_by_hand():
    """FVU, L0 and CE must equal their definitions written out on a toy model."""
    torch.manual_seed(0)
    toy, ids = Toy(torch.randn(50, 8), torch.randn(8, 50)), torch.randint(1, 50, (6, 10))
    ids[:, 0] = 0
    text, sae = toy_text(ids), random_sae(n_core=5, n_exempt=5, dtype=torch.float32)
    ce = lambda h: F.cross_entropy(
        (h @ toy.head)[:, 1:-1].flatten(0, 1), ids[:, 2:].flatten()
    ).item()  # BOS is no source
    original = toy.embedding[ids]
    with_sae = original.clone()
    with_sae[:, 1:] = sae(original[:, 1:].flatten(0, 1)).view(6, 9, 8)
    got = evaluate(toy, 0, text, ids, sae, ce(original), ce(0 * original))
    x, acts = original[:, 1:].flatten(0, 1), sae.encode(original[:, 1:].flatten(0, 1))
    variance = (x - x.mean(0)).pow(2).sum()
    assert got["fvu"] == pytest.approx(
        [((x - sae.decode(acts[:, :w])).pow(2).sum() / variance).item() for w in sae.widths],
        rel=1e-4,
    )
    assert got["l0"] == pytest.approx((acts > 0).sum(1).float().mean().item())
    assert got["core_l0"] == pytest.approx((acts[:, :5] > 0).sum(1).float().mean().item())
    assert got["ce"] == pytest.approx(ce(with_sae), rel=1e-5)
    assert got["ce_recovered"] == pytest.approx(
        (ce(0 * original) - ce(with_sae)) / (ce(0 * original) - ce(original)), rel=1e-4
    )


def test_evaluation_and_attribution_change_nothing():
    """SAE, threshold and language model must be bit for bit what they were, and carry no gradients or hooks."""
    model, text, ids, sae = tiny_case()
    before = {n: t.clone() for n, t in [*sae.state_dict().items(), *model.state_dict().items()]}
    evaluate(
        model.float(), 0, text, ids, sae.float(), 1.0, 2.0
    )  # after the copies: both hold float32 values
    attribute(model, 0, text, ids, sae)
    after = dict([*sae.state_dict().items(), *model.state_dict().items()])
    assert all(torch.equal(t.to(after[n].dtype), after[n]) for n, t in before.items())
    assert all(p.grad is None for p in (*sae.parameters(), *model.parameters()))
    assert not dmsae.decoder_layers(model)[0]._forward_hooks


# ---- The core ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", range(20))
def test_selection_is_the_smallest_set(seed):
    """No smaller set of latents may hold the coverage (brute force over all subsets)."""
    scores = torch.rand(8, generator=torch.Generator().manual_seed(seed)) ** 3
    coverage = [0.5, 0.8, 0.9, 0.99, 1.0][seed % 5]
    chosen = select_core(scores, coverage)
    total = scores.double().sum()
    smallest = min(
        n
        for n in range(1, 9)
        if any(
            scores[list(c)].double().sum() >= coverage * total - 1e-12
            for c in itertools.combinations(range(8), n)
        )
    )
    assert len(chosen) == smallest and scores[chosen].double().sum() >= coverage * total - 1e-12
    assert scores[chosen].tolist() == sorted(scores[chosen].tolist(), reverse=True)


def test_selection_leaves_out_latents_without_score():
    """Full coverage must not select zeros; and nothing to share out is an error."""
    assert select_core(torch.tensor([0.0, 3.0, 0.0, 1.0]), 1.0).tolist() == [1, 3]
    for bad in (torch.zeros(3), torch.tensor([1.0, float("nan")])):
        with pytest.raises(ValueError):
            select_core(bad, 0.9)


def test_identity_votes_and_gates_travel():
    """Old members keep row, gate and birth, and gain a vote; newcomers get theirs; the unchosen are gone."""
    sae = random_sae(widths=(6, 64), n_core=2, n_exempt=2, dtype=torch.float32)
    old = Core(
        torch.randn(2, 8),
        torch.tensor([7.0, 8.0]),
        torch.tensor([0.1, 0.2]),
        torch.tensor([[0, 11], [1, 5]]),
        torch.tensor([3, 1]),
        torch.zeros(2),
        torch.zeros(2),
        torch.tensor([0, 1]),
    )
    sae.W_enc.data[:2] = old.W_enc
    new = next_core(
        old, sae, torch.tensor([4, 1]), torch.arange(6.0).double(), torch.full((6,), 0.5), 2
    )
    assert (
        new.birth.tolist() == [[2, 4], [1, 5]]
        and new.votes.tolist() == [1, 2]
        and new.index.tolist() == [4, 1]
    )
    assert torch.equal(
        new.W_enc, torch.stack([sae.W_enc[4], old.W_enc[1]])
    ) and new.score.tolist() == [4, 1]
    gate = sae.b_enc[4] - sae.W_enc[4] @ sae.b_dec
    assert torch.allclose(new.bias, torch.stack([gate, torch.tensor(8.0)])) and torch.allclose(
        new.threshold, torch.stack([sae.threshold[4], torch.tensor(0.2)])
    )


@pytest.mark.parametrize("mode", ["dynamic", "exempt", "compete", "gated"])
def test_a_new_sae_carries_encoder_rows_and_nothing_else(mode):
    """Core rows must be there bit by bit; decoder, biases and the other latents must be fresh; gated keeps the function."""
    donor = random_sae(dtype=torch.float32)
    core = next_core(
        Core(torch.zeros(0, 8)), donor, torch.arange(5), torch.ones(13).double(), torch.ones(13), 0
    )
    cfg, x = Config(d_sae=64, core_sparsity=mode, device="cpu", batch=200), torch.randn(200, 8)
    sae, other = (dmsae.new_sae(cfg, core, x * 3, 3.0, training) for training in (1, 2))
    assert torch.equal(sae.W_enc[:5], donor.W_enc[:5]) and torch.allclose(
        sae.W_dec[:5], F.normalize(donor.W_enc[:5])
    )
    assert not torch.equal(sae.W_enc[5:], other.W_enc[5:]), "a new seed each training"
    assert torch.equal(sae.W_enc[5:], sae.W_dec[5:]) and torch.allclose(
        sae.b_dec, 3 * x.mean(0), atol=1e-6
    )
    assert sae.n_exempt == (0 if mode == "compete" else 5) and sae.widths == [7, 11, 19, 35, 64]
    if mode == "gated":
        assert torch.allclose(
            (sae.encode(3 * x)[:, :5] > 0).float(), (donor.encode(x)[:, :5] > 0).float()
        )
        assert torch.allclose(sae.encode(3 * x)[:, :5], 3 * donor.encode(x)[:, :5], atol=1e-4)
    else:
        assert not sae.b_enc.any() and not sae.threshold.any()


def test_core_takes_its_place_inside_d_sae():
    """Widths grow by the core except the last, or hold it where --core-in-prefixes says so; a core that leaves nothing is refused."""
    cfg = Config(d_sae=64, prefixes=(8, 32, 64))
    assert cfg.widths() == [8, 32, 64] and cfg.widths(10) == [18, 42, 64]
    held = Config(d_sae=64, prefixes=(8, 12, 64), core_in_prefixes=True)
    assert [held.widths(n) for n in (0, 5, 10, 20)] == [
        [8, 12, 64],
        [8, 12, 64],
        [11, 12, 64],
        [21, 22, 64],
    ]
    with pytest.raises(dmsae.BadInput, match="d-sae"):
        held.widths(62)
    assert Config().widths() == [2048, 6144, 14336, 30720, 65536]
    with pytest.raises(dmsae.BadInput, match="d-sae"):
        cfg.widths(32)


# ---- Whole runs --------------------------------------------------------------------------------------------------------
def test_frozen_rows_are_bitwise_unchanged_and_everything_is_on_disk(story):
    """Each training's core rows must be those of the core chosen before, bit by bit; files and figures must be complete."""
    rows = [
        json.loads((story / f"cycle{n}" / "cfg.json").read_text())["metadata"]["result"]
        for n in range(4)
    ]
    for cycle in (1, 2, 3):
        core = load_file(story / f"cycle{cycle - 1}" / "core.safetensors")
        now = load_file(story / f"cycle{cycle}" / "core.safetensors")
        W_enc = weights(story, cycle)["W_enc"].T
        C = len(core["W_enc"])
        assert C > 0 and torch.equal(W_enc[:C], core["W_enc"])
        assert not torch.allclose(weights(story, cycle)["W_dec"][:C], F.normalize(core["W_enc"])), (
            "the decoder is trained"
        )
        identity = {tuple(b): w for b, w in zip(core["birth"].tolist(), core["W_enc"])}
        for birth, row, votes in zip(now["birth"].tolist(), now["W_enc"], now["votes"].tolist()):
            assert (
                votes > 1 and torch.equal(identity[tuple(birth)], row)
                if birth[0] < cycle
                else votes == 1
            )
        r = rows[cycle]
        kept = int((now["index"] < C).sum())
        assert (r["core"], r["kept"], r["new"], r["dropped"]) == (
            len(now["index"]),
            kept,
            len(now["index"]) - kept,
            C - kept,
        )
        assert (
            sum(r["origins"].values()) == r["core"] and len(r["fvu"]) == 5 and r["tokens"] == 12_800
        )
        assert 0 <= r["dead"] < 0.5, "most latents fire in ten steps"
    assert (
        [r["cycle"] for r in rows] == [0, 1, 2, 3]
        and not list(story.glob("*.safetensors"))
        and not list(story.glob("*.part"))
    )


def test_saved_folder_is_a_jumprelu_sae(story):
    """Ten independent lines that know only SAELens's jumprelu must give our forward; loading must be bitwise."""
    for cycle in (0, 3):
        folder = story / f"cycle{cycle}"
        cfg, w = json.loads((folder / "cfg.json").read_text()), weights(story, cycle)
        assert cfg["architecture"] == "jumprelu" and w["W_enc"].shape == (cfg["d_in"], cfg["d_sae"])
        x = torch.randn(50, cfg["d_in"]) * 5
        pre = (x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
        x_hat = (
            torch.where(pre > w["threshold"], pre.relu(), torch.tensor(0.0)) @ w["W_dec"]
            + w["b_dec"]
        )
        sae = load_sae(folder)
        assert (sae(x) - x_hat).abs().max() < 1e-4 and (sae.encode(x) > 0).any()
        assert (w["W_dec"].norm(dim=1) - 1).abs().max() < 1e-6 and w["threshold"].min() >= 0
        assert sae.widths == cfg["metadata"]["widths"] and sae.n_core == cfg["metadata"]["n_core"]
        dmsae.save_sae(
            sae,
            folder.parent,
            **{
                k: v
                for k, v in cfg["metadata"].items()
                if k not in ("sae_lens_version", "widths", "n_core", "n_exempt")
            },
        )
        again = load_sae(folder.parent)
        assert torch.equal(again.encode(x), sae.encode(x)) and torch.equal(again(x), sae(x))


def test_a_plain_sae_of_saelens_loads(tmp_path):
    """A folder without our metadata, as SAELens writes it, must load as one prefix without a core."""
    sae = random_sae(dtype=torch.float32)
    dmsae.save_sae(sae, tmp_path)
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    cfg["metadata"] = {"sae_lens_version": "6.0.0"}
    (tmp_path / "cfg.json").write_text(json.dumps(cfg))
    x = torch.randn(9, 8)
    assert load_sae(tmp_path).widths == [64] and torch.equal(load_sae(tmp_path)(x), sae(x))


def run_process(lm, out, *extra, **changes):
    return subprocess.Popen(
        [sys.executable, HERE / "dmsae.py", *command(lm, out, **changes), *extra],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )


def wait_for(condition, process, seconds=300):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end and process.poll() is None, process.communicate()
        time.sleep(0.01)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_killed_and_resumed_equals_uninterrupted(lm, tmp_path, how):
    """Killed in the middle of training 1 and started again, a run must end with bitwise the same weights and cores."""
    words = dict(tokens=25_600, checkpoint_minutes=0)
    process = run_process(lm, tmp_path / "killed", **words)
    path = tmp_path / "killed" / "checkpoint1.safetensors"
    wait_for(path.exists, process)
    process.send_signal(how)
    _, errors = process.communicate()
    assert process.returncode == (-9 if how == signal.SIGKILL else 130) and path.exists()
    assert how == signal.SIGKILL or "same command" in errors
    assert dmsae.main(command(lm, tmp_path / "killed", **words)) == 0
    assert dmsae.main(command(lm, tmp_path / "whole", tokens=25_600)) == 0
    for cycle in (0, 1):
        a, b = weights(tmp_path / "killed", cycle), weights(tmp_path / "whole", cycle)
        assert all(torch.equal(a[name], b[name]) for name in a)
        a, b = (
            load_file(tmp_path / d / f"cycle{cycle}" / "core.safetensors")
            for d in ("killed", "whole")
        )
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_another_configuration_in_the_same_folder_is_refused(lm, story, capsys):
    """The keys that differ must be named, and nothing may be touched; more cycles are no other configuration."""
    before = {p: p.stat().st_mtime_ns for p in story.rglob("*")}
    assert dmsae.main(command(lm, story, cycles=3, core_sparsity="gated", k=7, lr=0.1)) == 2
    error = capsys.readouterr().err
    assert (
        "k 6 there, 7 here" in error
        and "lr" in error
        and "d_sae" not in error
        and error.count("\n") == 1
    )
    assert before == {p: p.stat().st_mtime_ns for p in story.rglob("*")}
    path = story / "checkpoint3.safetensors"
    path.write_text("of a later cycle")
    assert dmsae.main(command(lm, story, cycles=2, core_sparsity="gated")) == 0, (
        "a finished run just prints its table"
    )
    assert path.exists(), "what a longer run has begun is not lost"
    path.unlink()
    assert dmsae.main(command(lm, story, cycles=3, core_sparsity="gated")) == 0


@pytest.mark.parametrize("damage", ["cut", "text"])
def test_a_damaged_checkpoint_is_refused(lm, tmp_path, capsys, damage):
    """A short file and another kind of file must be noticed, and the message must say what to do."""
    assert dmsae.main(command(lm, tmp_path, cycles=0)) == 0
    path = tmp_path / "checkpoint1.safetensors"
    dmsae.save_tensors({"a": torch.arange(1000.0)}, path, labels=[1])
    path.write_bytes({"cut": path.read_bytes()[:-100], "text": b"hello"}[damage])
    assert dmsae.main(command(lm, tmp_path, cycles=1)) == 2
    error = capsys.readouterr().err
    assert "damaged" in error and "delete it" in error and error.count("\n") == 1


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(lm, tmp_path, capsys):
    """Exit 2 with the step; the checkpoint on disk must hold finite numbers only."""
    assert dmsae.main(command(lm, tmp_path, lr=1e30, checkpoint_minutes=0, cycles=0)) == 2
    assert "not finite" in capsys.readouterr().err
    path = tmp_path / "checkpoint0.safetensors"
    assert not path.exists() or all(t.isfinite().all() for t in load_file(path).values())


def test_a_saved_core_starts_another_sparsity(lm, story, tmp_path, capsys):
    """--core FILE --cycles 0 must train one SAE at another k around the rows of the file, its identities kept."""
    path = story / "cycle3" / "core.safetensors"
    assert (
        dmsae.main(command(lm, tmp_path / "out", core=path, cycles=0, k=3, core_sparsity="compete"))
        == 0
    )
    core, now = load_file(path), load_file(tmp_path / "out" / "cycle0" / "core.safetensors")
    C = len(core["W_enc"])
    assert torch.equal(weights(tmp_path / "out", 0)["W_enc"].T[:C], core["W_enc"])
    old = {tuple(b) for b in core["birth"].tolist()}
    assert all(tuple(b) in old or b[0] == 4 for b in now["birth"].tolist()), (
        "a newcomer is born in training 4, not again in 0"
    )
    assert f"core {C}" in capsys.readouterr().out


def test_warns_where_the_core_takes_more_than_half_of_k(lm, tmp_path, capsys):
    """One line, with the measured total L0, which must be what the saved SAE has."""
    assert dmsae.main(command(lm, tmp_path, k=2, core_sparsity="exempt")) == 0
    out = capsys.readouterr().out
    assert out.count("warning: the core alone has L0") == 1 and "more than half of k = 2" in out


@pytest.mark.parametrize("select", ["frequency", "random"])
def test_controls_have_the_size_that_attribution_would_have_chosen(lm, story, tmp_path, select):
    """The same training 0 with another selector must give as many latents, but others."""
    assert dmsae.main(command(lm, tmp_path, cycles=0, select=select, core_sparsity="gated")) == 0
    ours, control = (load_file(f / "cycle0" / "core.safetensors") for f in (story, tmp_path))
    assert len(ours["index"]) == len(control["index"]) and not torch.equal(
        ours["index"], control["index"]
    )
    if select == "frequency":
        assert control["density"].tolist() == sorted(control["density"].tolist(), reverse=True)


# ---- Fast: cache, several sparsities, several processes, compiled layers, dry run ----------------------------------------
def same_weights(a, b, labels=(0, 1)):
    for label in labels:
        x, y = weights(a, label), weights(b, label)
        assert all(torch.equal(x[name], y[name]) for name in x), label


def test_cache_changes_no_result_and_spares_the_harvest(lm, tmp_path, monkeypatch, capsys):
    """With --cache, weights must be bitwise those without; every block must be harvested once; another model in the same folder must
    not get its activations; a damaged block must be named."""
    blocks, real = [], dmsae.harvest
    monkeypatch.setattr(dmsae, "harvest", lambda *a: blocks.append(len(a[3])) or real(*a))
    assert dmsae.main(command(lm, tmp_path / "without", tokens=25_600)) == 0
    alone = len(blocks)
    assert dmsae.main(command(lm, tmp_path / "with", tokens=25_600, cache=tmp_path / "cache")) == 0
    files = list((tmp_path / "cache").glob("*/*.0.safetensors"))
    assert (
        len(blocks) - alone == 1 + len(files) and alone == 1 + 2 * len(files) and len(files) == 4
    ), "1: the scale's own"
    same_weights(tmp_path / "without", tmp_path / "with")
    assert (
        dmsae.main(
            command(
                lm, tmp_path / "other k", tokens=25_600, cache=tmp_path / "cache", k=3, cycles=0
            )
        )
        == 0
    )
    assert len(blocks) == 2 * alone - 4 + 1, "another k must find all blocks"
    assert (
        dmsae.main(
            command(
                lm, tmp_path / "seed", tokens=25_600, cache=tmp_path / "cache", seed=1, cycles=0
            )
        )
        == 0
    )
    assert dmsae.main(command(lm, tmp_path / "seed without", tokens=25_600, seed=1, cycles=0)) == 0
    same_weights(tmp_path / "seed", tmp_path / "seed without", [0])
    other = tmp_path / "lm"
    shutil.copytree(lm, other)
    model = load_file(other / "model.safetensors")
    save_file(
        {n: t * 1.01 for n, t in model.items()}, other / "model.safetensors", {"format": "pt"}
    )
    assert (
        dmsae.main(
            command(other, tmp_path / "other", tokens=25_600, cache=tmp_path / "cache", cycles=0)
        )
        == 0
    )
    assert len(list((tmp_path / "cache").iterdir())) == 3, (
        "one for each: seed 0, seed 1, the other model"
    )
    files[0].write_bytes(files[0].read_bytes()[:-9])
    assert (
        dmsae.main(
            command(lm, tmp_path / "damaged", tokens=25_600, cache=tmp_path / "cache", cycles=0)
        )
        == 2
    )
    assert str(files[0]) in capsys.readouterr().err


def test_cache_keeps_to_its_budget_and_to_the_disk(lm, tmp_path, monkeypatch, capsys):
    """--cache-gb must bound what is written, with the same result; too full a disk must be refused at the start with both numbers."""
    size = 265 * 31 * 32 * 4  # contexts of a block, tokens of a context, d_model, bytes
    assert (
        dmsae.main(
            command(
                lm,
                tmp_path / "a",
                tokens=25_600,
                cache=tmp_path / "c",
                cache_gb=2.5 * size / 1e9,
                cycles=1,
            )
        )
        == 0
    )
    assert len(list((tmp_path / "c").glob("*/*"))) == 2
    assert dmsae.main(command(lm, tmp_path / "b", tokens=25_600)) == 0
    same_weights(tmp_path / "a", tmp_path / "b")
    monkeypatch.setattr(dmsae.shutil, "disk_usage", lambda p: SimpleNamespace(free=3_000_000))
    assert dmsae.main(command(lm, tmp_path / "out", tokens=25_600, cache=tmp_path / "d")) == 2
    assert (
        "--cache" in (error := capsys.readouterr().err)
        and "0.003 GB free of the 0.00328 GB" in error
        and not (tmp_path / "d").exists()
    )


def test_transfers_side_by_side_equal_transfers_alone(lm, tmp_path, capsys):
    """Each k of --transfer-k must give an SAE of the last core, bitwise the same whether it was trained with others or alone; what is
    there must not be trained again; its L0 must be its own k."""
    assert dmsae.main(command(lm, tmp_path / "alone", core_sparsity="compete")) == 0
    for k in ("3", "9"):
        assert (
            dmsae.main(command(lm, tmp_path / "alone", core_sparsity="compete", transfer_k=k)) == 0
        )
    before = (tmp_path / "alone" / "cycle1_k3" / "cfg.json").stat().st_mtime_ns
    assert (
        dmsae.main(
            [*command(lm, tmp_path / "both", core_sparsity="compete"), "--transfer-k", "3", "9"]
        )
        == 0
    )
    same_weights(tmp_path / "alone", tmp_path / "both", (0, 1, "1_k3", "1_k9"))
    core = load_file(tmp_path / "both" / "cycle1" / "core.safetensors")["W_enc"]
    for k in (3, 9):
        assert torch.equal(weights(tmp_path / "both", f"1_k{k}")["W_enc"].T[: len(core)], core)
        result = json.loads((tmp_path / "both" / f"cycle1_k{k}" / "cfg.json").read_text())[
            "metadata"
        ]["result"]
        assert result["l0"] == pytest.approx(k, rel=0.15) and result["cycle"] == f"1_k{k}"
    assert (
        "1_k9" in capsys.readouterr().out
        and (tmp_path / "alone" / "cycle1_k3" / "cfg.json").stat().st_mtime_ns == before
    )


def test_transfers_resume_from_their_checkpoint(lm, tmp_path):
    """Killed while two SAEs train side by side, the same command must end with bitwise the same weights."""
    words = dict(tokens=25_600, checkpoint_minutes=0, cycles=0)
    process = run_process(lm, tmp_path / "killed", "--transfer-k", "3", "9", **words)
    wait_for((tmp_path / "killed" / "checkpoint0_k3.safetensors").exists, process)
    process.kill()
    process.communicate()
    for out in ("killed", "whole"):
        assert (
            dmsae.main(
                [
                    *command(lm, tmp_path / out, tokens=25_600, cycles=0, checkpoint_minutes=0),
                    "--transfer-k",
                    "3",
                    "9",
                ]
            )
            == 0
        )
    same_weights(tmp_path / "killed", tmp_path / "whole", (0, "0_k3", "0_k9"))


def test_a_checkpoint_of_other_transfers_is_not_taken_for_theirs(lm, tmp_path, monkeypatch):
    """Stopped while k = 3 trained alone, k = 3 and 9 side by side must still both be trained from their beginning."""
    words, real = dict(tokens=25_600, cycles=0), dmsae.Training.step
    assert dmsae.main(command(lm, tmp_path / "a", **words)) == 0
    monkeypatch.setattr(
        dmsae.Training,
        "step",
        lambda self, x, step: (
            os.kill(os.getpid(), signal.SIGINT) if step == 50 else real(self, x, step)
        ),
    )
    assert dmsae.main([*command(lm, tmp_path / "a", **words), "--transfer-k", "3"]) == 130
    assert (tmp_path / "a" / "checkpoint0_k3.safetensors").exists()
    monkeypatch.setattr(dmsae.Training, "step", real)
    for out in ("a", "b"):
        assert dmsae.main([*command(lm, tmp_path / out, **words), "--transfer-k", "3", "9"]) == 0
    same_weights(tmp_path / "a", tmp_path / "b", (0, "0_k3", "0_k9"))


def torchrun(lm, out, **changes):
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            HERE / "dmsae.py",
            *command(lm, out, **changes),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


@pytest.mark.parametrize("mode", ["gated", "compete"])
def test_two_processes_equal_one(lm, tmp_path, mode):
    """torchrun with two gloo processes must give the SAEs and cores of one process with the same global batch, to float tolerance; each
    process must harvest half, and only the first may print."""
    process = torchrun(lm, tmp_path / "two", core_sparsity=mode, cache=tmp_path / "cache")
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert dmsae.main(command(lm, tmp_path / "one", core_sparsity=mode)) == 0
    assert out.count("dmsae |") == 1 and "2 x cpu" in out
    for cycle in (0, 1):
        a, b = weights(tmp_path / "two", cycle), weights(tmp_path / "one", cycle)
        for name in a:
            assert (a[name] - b[name]).abs().max() < 2e-3 * b[name].abs().max(), (cycle, name)
        a, b = (
            load_file(tmp_path / d / f"cycle{cycle}" / "core.safetensors") for d in ("two", "one")
        )
        assert a["birth"].tolist() == b["birth"].tolist()
    sizes = [
        [
            len(load_file(f)["acts"])
            for f in sorted((tmp_path / "cache").glob(f"*/*.{rank}.safetensors"))
        ]
        for rank in (0, 1)
    ]
    assert (
        sizes[0] and len(sizes[0]) == len(sizes[1]) and all(abs(m - n) < 40 for m, n in zip(*sizes))
    )


def test_a_dead_process_ends_the_run_and_keeps_the_checkpoint(lm, tmp_path):
    """When one of two processes is killed, torchrun must end with an error, and one process must be able to go on from the checkpoint."""
    words = dict(tokens=256_000, checkpoint_minutes=0, cycles=0)
    process = torchrun(lm, tmp_path, **words)
    wait_for((tmp_path / "checkpoint0.safetensors").exists, process)
    children = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True
    ).stdout.split()
    os.kill(int(children[1]), signal.SIGKILL)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1 and "-9" in errors
    _, meta = dmsae.load_tensors(tmp_path / "checkpoint0.safetensors", "")
    assert meta["step"] > 0
    assert (
        dmsae.main(command(lm, tmp_path, **words)) == 0
        and weights(tmp_path, 0)["W_enc"].isfinite().all()
    )


def test_compiled_layers_give_the_same(lm, tmp_path, monkeypatch):
    """torch.compile must take the harvested layers only, once each, and (with a backend that changes no operation) change no result."""
    done, compile = [], torch.compile
    assert dmsae.main(command(lm, tmp_path / "plain")) == 0
    monkeypatch.setattr(torch, "compile", lambda f: done.append(f) or compile(f, backend="eager"))
    monkeypatch.setattr(dmsae, "can_compile", lambda cfg: True)
    assert dmsae.main(command(lm, tmp_path / "compiled")) == 0 and len(done) == 1, "layer 0 of 2"
    same_weights(tmp_path / "plain", tmp_path / "compiled")


def test_ahead_keeps_order_and_passes_errors_on():
    """All items in order, at most one made in advance; an error must come where its item would have."""
    made = []

    def items():
        for i in range(4):
            made.append(i)
            yield i
        raise KeyError("end")

    stream = dmsae.ahead(items())
    assert next(stream) == 0 and next(stream) == 1
    time.sleep(0.1)
    assert made == [0, 1, 2] and [next(stream), next(stream)] == [2, 3]
    with pytest.raises(KeyError):
        next(stream)


def test_dry_run_times_every_phase_and_leaves_nothing(lm, tmp_path, capsys, monkeypatch):
    """All phases with a share that sums to 1, floors below what is measured, hours and GB; no file; for gemma-2-2b with --random-init
    no download and its own shape."""
    import transformers

    tiny = transformers.Gemma2Config.from_pretrained(lm)
    asked = []
    monkeypatch.setattr(transformers, "Gemma2Config", lambda: asked.append(1) or tiny)
    monkeypatch.setattr(dmsae, "timed", lambda f, device, real=dmsae.timed: real(f, device, 0.05))
    dead, real_loss = [], dmsae.dead_latent_loss
    monkeypatch.setattr(
        dmsae,
        "dead_latent_loss",
        lambda x, r, W, *rest: dead.append(len(W)) or real_loss(x, r, W, *rest),
    )
    for words in (dict(), dict(model="google/gemma-2-2b", text=None, separator=None)):
        flags = [
            "--dry-run",
            "--transfer-k",
            "3",
            "9",
            "--cache",
            str(tmp_path / "c"),
            *["--random-init"] * ("model" in words),
        ]
        assert dmsae.main([*command(lm, tmp_path / "out", **words), *flags]) == 0
        out = capsys.readouterr().out
        rows = {
            m[1].strip(): [float(w.strip("%").replace(",", "")) for w in m[2].split()]
            for m in re.finditer(r"(?m)^(\D[^\n]*?|train, 1/4 dead) +((?:[\d.,]+%? *){5})$", out)
        }
        assert rows.keys() == {"train", "train, 1/4 dead", "harvest", "attribute"}, out
        assert sum(r[2] for r in rows.values()) == pytest.approx(100, abs=0.3) and all(
            min(r[:2] + r[3:]) > 0 for r in rows.values()
        )
        assert rows["train"][1] == pytest.approx(128 / rows["train"][0] * 1e3, rel=0.05)
        cfg = dmsae.parse([*command(lm, tmp_path / "out", **words), *flags])
        tokens = dict(
            train=4 * cfg.tokens,
            harvest=cfg.tokens,
            attribute=4 * (cfg.attribution_tokens + 131_072),
        )  # 2 cycles, 2 transfers
        hours = sum(n / rows[name][1] for name, n in tokens.items()) / 3600
        assert float(re.search(r"command: ([\d.e-]+) hours", out)[1]) == pytest.approx(
            hours, rel=0.02
        )
        assert "GB in" in out and list(tmp_path.iterdir()) == []
    assert asked and max(dead) == cfg.d_sae // 4, "a few may die by themselves"


# ---- Bad input ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(k=128), ["--k 128", "below d_sae"]),
        (dict(k=0), ["--k 0"]),
        (dict(coverage=0), ["--coverage 0"]),
        (dict(coverage=1.5), ["--coverage 1.5", "0.9"]),
        (dict(layer=2), ["--layer 2", "0 to 1"]),
        (dict(text="no.txt"), ["no.txt", "no such file"]),
        (dict(text=__file__, separator=None), [".parquet"]),
        (dict(core="no.safetensors"), ["no.safetensors"]),
        (dict(tokens=5), ["--tokens 5"]),
        (dict(model="/no/such/folder"), ["/no/such/folder", "--demo"]),
        (dict(ctx=65), ["--ctx 65", "64"]),
        (dict(lr=-1), ["--lr -1"]),
        (dict(device="cuda:77"), ["--device cuda:77", "cpu"]),
        (dict(device="mps"), ["--device mps", "cpu"]),
        (dict(separator=""), ["--separator"]),
        (dict(d_sae="many"), ["invalid int"]),
        (dict(colour="red"), ["--colour"]),
        (dict(select="best"), ["attribution"]),
        (dict(seed=-1), ["--seed -1"]),
        (dict(transfer_k="128"), ["--transfer-k 128", "below d_sae"]),
        (dict(transfer_k="5,6"), ["--transfer-k", "invalid int"]),
        (dict(cache_gb=5), ["--cache-gb 5", "--cache DIR"]),
        (dict(cache="c", cache_gb=0), ["--cache-gb 0"]),
        (dict(cache=__file__), ["--cache", "must be a folder"]),
    ],
)
def test_bad_input_is_one_line_and_exit_2(lm, tmp_path, capsys, changes, words):
    """What was given, what is allowed; no traceback, nothing written."""
    try:
        code = dmsae.main(command(lm, tmp_path / "out", **changes))
    except SystemExit as e:
        code = e.code
    error = capsys.readouterr().err
    assert code == 2 and error.count("\n") == 1 and all(w in error for w in words), error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "prefixes", [["32", "16", "128"], ["0.5", "0.2", "1"], ["16", "64"], ["0", "128"]]
)
def test_prefixes_must_ascend_to_d_sae(lm, tmp_path, capsys, prefixes):
    """Wrong prefixes must be refused with an example that works."""
    assert dmsae.main([*command(lm, tmp_path / "out"), "--prefixes", *prefixes]) == 2
    assert "0.0625 0.25 1" in capsys.readouterr().err
    assert Config(d_sae=128, prefixes=(0.0625, 0.25, 1)).widths() == [8, 32, 128]


@pytest.mark.parametrize("content", ["", "the cat sat on the mat"])
def test_too_little_text_is_refused_and_can_be_mended(lm, tmp_path, capsys, content):
    """Empty text, or less than three contexts: exit 2 with the numbers, and the same folder must work afterwards."""
    (tmp_path / "t.txt").write_text(content)
    assert dmsae.main(command(lm, tmp_path / "out", text=tmp_path / "t.txt")) == 2
    assert "three contexts of 32" in capsys.readouterr().err
    assert dmsae.main(command(lm, tmp_path / "out", cycles=0, tokens=128)) == 0


def test_a_core_of_another_width_is_refused(lm, tmp_path, capsys):
    """The message must give both widths and the model that the core came from."""
    core = next_core(
        Core(torch.zeros(0, 8)),
        random_sae(dtype=torch.float32),
        torch.arange(3),
        torch.ones(13),
        torch.ones(13),
        0,
    )
    dmsae.save_tensors(vars(core), tmp_path / "c.safetensors", model="other", layer=3, training=0)
    assert dmsae.main(command(lm, tmp_path / "out", core=tmp_path / "c.safetensors")) == 2
    error = capsys.readouterr().err
    assert "width 8" in error and "32" in error and "other layer 3" in error


def test_a_core_as_wide_as_the_sae_is_refused(lm, tmp_path, capsys):
    """d_sae must be above the core and the inner prefixes."""
    core = next_core(
        Core(torch.zeros(0, 32)),
        random_sae(32, (120, 200), dtype=torch.float32),
        torch.arange(120),
        torch.ones(120),
        torch.ones(120),
        0,
    )
    dmsae.save_tensors(vars(core), tmp_path / "c.safetensors", model="m", layer=0, training=0)
    assert dmsae.main(command(lm, tmp_path / "out", core=tmp_path / "c.safetensors")) == 2
    assert "--d-sae 128: must be above the core (120)" in capsys.readouterr().err


def test_no_disk_space_is_noticed_at_the_start(lm, tmp_path, capsys, monkeypatch):
    """Needed and available GB must be in the message."""
    monkeypatch.setattr(dmsae.shutil, "disk_usage", lambda p: SimpleNamespace(free=10))
    assert dmsae.main(command(lm, tmp_path / "out")) == 2
    assert "GB" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_folder_that_is_no_sae_is_refused(tmp_path):
    """load_sae must say what it needs, for a missing file, a cut one, and another architecture."""
    with pytest.raises(dmsae.BadInput, match="cfg.json"):
        load_sae(tmp_path)
    dmsae.save_sae(random_sae(dtype=torch.float32), tmp_path)
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps({**cfg, "architecture": "topk"}))
    with pytest.raises(dmsae.BadInput, match="'topk'"):
        load_sae(tmp_path)


# ---- Command line and documents ----------------------------------------------------------------------------------------
def test_flags_follow_the_dataclass():
    """Every field must be a flag, underscores accepted, abbreviations not; the defaults are Config's."""
    assert dmsae.parse([]) == Config()
    assert dmsae.parse(
        ["--d_sae", "256", "--attribution_tokens=9", "--attribution-error"]
    ) == Config(d_sae=256, attribution_tokens=9, attribution_error=True)
    assert (
        dmsae.parse(["--demo", "--k", "5"]).k == 5
        and dmsae.parse(["--demo"]).d_sae == dmsae.DEMO["d_sae"]
    )
    with pytest.raises(SystemExit):
        dmsae.parse(["--cover", "0.5"])


def test_importing_has_no_side_effects():
    """import dmsae must not import transformers or datasets, nor print."""
    code = "import sys, dmsae; print([m for m in ('transformers', 'datasets') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=HERE)
    assert out.stdout.strip() == "[]" and not out.stderr


# ---- eval.py: each metric on a planted case with a known answer, and against a naive reference ----------------------------
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
    """A language model of one layer: its output is the embedding, and its logits are the running sum of that times `readout`."""

    def __init__(self, table, readout):
        super().__init__()
        self.embed, self.layers, self.readout = (
            nn.Embedding.from_pretrained(table),
            nn.ModuleList([nn.Identity()]),
            readout,
        )
        self.device, self.config = (
            torch.device("cpu"),
            SimpleNamespace(
                get_text_config=lambda: SimpleNamespace(num_hidden_layers=1, vocab_size=len(table))
            ),
        )

    def forward(self, ids, use_cache=False):
        return SimpleNamespace(logits=self.layers[0](self.embed(ids)).cumsum(1) @ self.readout)


class Words:
    """A tokenizer whose tokens are words between spaces, and newlines; token 0 is BOS, 1 unknown."""

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


def held(model_folder):
    """The tiny language model and ten contexts of random tokens, some of them special."""
    from transformers import Gemma2ForCausalLM

    model = (
        Gemma2ForCausalLM.from_pretrained(model_folder, attn_implementation="eager")
        .eval()
        .requires_grad_(False)
    )
    ids = torch.randint(3, 300, (10, 16), generator=torch.Generator().manual_seed(0))
    ids[:, 0], ids[3, 7], ids[5, 15] = 2, 2, 1
    return model, Text(ids[:, 1:].numpy().astype(np.int32), 2, torch.tensor([0, 1, 2]), 1, 1), ids


def test_core_of_the_identity_is_perfect(lm):
    """An SAE that is the identity must recover everything, whatever the definition."""
    model, text, ids = held(lm)
    r = ev.core_metrics(model, 0, text, ids, both_signs(32))
    for key in (
        "ce_loss_score",
        "kl_div_score",
        "explained_variance",
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
    assert (
        r["tokens"] == int(text.keep(ids).sum())
        and r["core_l0"] == 0
        and r["non_core_l0"] == r["l0"]
    )
    assert (
        r["prefixes"][0]["prefix"] == "core only"
        and r["prefixes"][0]["l0"] == 0
        and r["prefixes"][1]["width"] == 64
    )


def test_core_of_the_silent_sae_is_its_bias(lm):
    """An SAE that never fires must have L0 0, no latent alive, and the loss of zeros at kept positions; what is 0/0 has no number."""
    model, text, ids = held(lm)
    r = ev.core_metrics(model, 0, text, ids, ready_sae(torch.eye(32), torch.eye(32), math.inf))
    with dmsae.spliced(model, 0, lambda h: h.masked_fill(text.keep(ids)[..., None], 0)):
        logits = model(ids).logits
    source = text.keep(ids)[:, :-1]
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


@pytest.mark.parametrize("n_core", [0, 7])
def test_core_equals_a_naive_reference(lm, n_core, monkeypatch):
    """Every figure, of the whole SAE and of each prefix, must equal loops over tokens written from SAEBench's definitions."""
    model, text, ids = held(lm)
    torch.manual_seed(1)
    sae = ready_sae(torch.randn(50, 32), F.normalize(torch.randn(50, 32)), 0.5, [20, 50], n_core)
    with torch.no_grad():
        sae.W_enc[0] *= 0  # a dead latent, and one that is always on
        sae.b_enc[1], sae.b_dec[:] = 1e3, torch.randn(32) / 9
    monkeypatch.setattr(
        torch.Tensor,
        "split",
        lambda t, n, dim=0, split=torch.Tensor.split: split(t, 4 if t is ids else n, dim),
    )  # 3 batches
    r = ev.core_metrics(model, 0, text, ids, sae)
    keep, logits = text.keep(ids), {}
    x = dmsae.residual_stream(model, 0, ids)
    for w in (None, "zero", n_core, 20, 50):
        f = sae.encode(x.flatten(0, 1), w if isinstance(w, int) else 50).detach()
        y = sae.decode(f).view_as(x).detach()
        edit = {None: lambda h: h, "zero": torch.zeros_like}.get(
            w, lambda h: torch.where(keep[..., None], y, h)
        )
        with dmsae.spliced(model, 0, edit):
            logits[w] = model(ids).logits.double().log_softmax(-1)

    def ce(w):
        return np.mean(
            [
                -logits[w][i, t, ids[i, t + 1]].item()
                for i in range(10)
                for t in range(15)
                if keep[i, t]
            ]
        )

    def kl(w):
        return np.mean(
            [
                F.kl_div(
                    logits[w][i, t], logits[None][i, t], log_target=True, reduction="sum"
                ).item()
                for i in range(10)
                for t in range(16)
                if keep[i, t]
            ]
        )

    batches = [x[i : i + 4][keep[i : i + 4]].double() for i in (0, 4, 8)]
    tokens = torch.cat(batches)
    for g, w in enumerate((n_core, 20, 50)):
        f = [sae.encode(b.float(), w).detach().double() for b in batches]
        y = [a @ sae.W_dec[:w].detach().double() + sae.b_dec.detach().double() for a in f]
        r2 = [((b - z) ** 2).sum(1) for b, z in zip(batches, y)]
        S = (tokens**2).sum(1).mean()
        want = dict(
            ce_loss_score=(ce("zero") - ce(w)) / (ce("zero") - ce(None)),
            ce_loss_with_sae=ce(w),
            kl_div_score=1 - kl(w) / kl("zero"),
            kl_div_with_sae=kl(w),
            explained_variance=1
            - sum(e.sum() for e in r2) / ((tokens - tokens.mean(0)) ** 2).sum(),
            explained_variance_legacy=torch.cat(
                [1 - e / ((b - b.mean(0)) ** 2).sum(1) for e, b in zip(r2, batches)]
            ).mean(),
            explained_variance_0_6_0=1 - torch.cat(r2).mean() / (S - (S / 32) ** 2),
            fvu=sum(e.sum() for e in r2) / ((tokens - tokens.mean(0)) ** 2).sum(),
            mse=torch.cat(r2).mean() / 32,
            mse_saebench=torch.cat([e / len(e) for e in r2]).mean(),
            cossim=torch.cat([F.cosine_similarity(b, z) for b, z in zip(batches, y)]).mean(),
            l0=(torch.cat(f) != 0).double().sum(1).mean() if w else 0.0,
            l1=torch.cat(f).sum(1).mean() if w else 0.0,
            l2_norm_out=torch.cat(y).norm(dim=1).mean(),
            l2_ratio=(torch.cat(y).norm(dim=1) / tokens.norm(dim=1)).mean(),
            relative_reconstruction_bias=np.mean(
                [((z**2).sum(1).mean() / (b * z).sum(1).mean()).item() for b, z in zip(batches, y)]
            ),
        )
        for key, value in want.items():
            assert r["prefixes"][g][key] == pytest.approx(float(value), rel=1e-4, abs=1e-6), (
                key,
                w,
            )
            assert w != 50 or r[key] == r["prefixes"][g][key]
    density = (torch.cat(f) > 0).double().mean(0)
    near = lambda W: (
        (F.normalize(W) @ F.normalize(W).T - 2 * torch.eye(50)).amax(1)[1:].mean().item()
    )  # the zero row aside
    for key, value in dict(
        l2_norm_in=tokens.norm(dim=1).mean(),
        core_l0=density[:n_core].sum(),
        non_core_l0=density[n_core:].sum(),
        frac_alive=(density > 0).double().mean(),
        ce_loss_without_sae=ce(None),
        ce_loss_with_ablation=ce("zero"),
        kl_div_with_ablation=kl("zero"),
        freq_over_10_percent=(density > 0.1).double().mean(),
        freq_over_1_percent=(density > 0.01).double().mean(),
        normalized_freq_over_10_percent=density[density > 0.1].sum() / density.sum(),
    ).items():
        assert r[key] == pytest.approx(float(value), rel=1e-4), key
    assert r["average_max_decoder_cosine_sim"] == pytest.approx(
        (F.normalize(sae.W_dec) @ F.normalize(sae.W_dec).T - 2 * torch.eye(50))
        .amax(1)
        .mean()
        .item(),
        rel=1e-4,
    )
    assert r["average_max_encoder_cosine_sim"] * 50 == pytest.approx(
        near(sae.W_enc.detach()) * 49, rel=1e-4
    )


def test_an_evaluation_changes_no_sae(lm, story):
    """core, pooled and absorption must leave the SAE's state bitwise as it was."""
    (model, text, ids), sae = held(lm), load_sae(story / "cycle3")
    before = {name: t.clone() for name, t in sae.state_dict().items()}
    ev.core_metrics(model, 0, text, ids, sae)
    assert all(torch.equal(t, before[name]) for name, t in sae.state_dict().items())


@pytest.mark.parametrize("balanced", [False, True])
def test_logistic_regression_is_the_minimum(balanced):
    """At the result the gradient of scikit-learn's objective, written out here, must vanish."""
    torch.manual_seed(0)
    x, y = torch.randn(60, 3, dtype=torch.float64), torch.rand(60) < 0.2
    w, b = ev.logistic_regression(x, y, balanced)
    p = torch.sigmoid(x.double() @ w + b)
    weight = (
        torch.where(y, 60 / (2 * y.sum()), 60 / (2 * (~y).sum())) if balanced else torch.ones(60)
    )
    error = weight * (p - y.double())
    assert (x.double().T @ error + w).abs().max() < 1e-3 and error.sum().abs() < 1e-3


def test_letter_probes_equal_a_naive_reference():
    """26 separate probes with torch's own schedule, loss by loss, must end in the same weights; a planted letter must be read."""
    y = torch.cat([torch.arange(26), torch.zeros(100, dtype=torch.long)])
    x = torch.cat(
        [
            3 * F.one_hot(y, 26).float(),
            torch.randn(126, 4, generator=torch.Generator().manual_seed(0)),
        ],
        1,
    )
    W, b = ev.train_letter_probes(x, y, 50, 1e-4, l1=0.02, seed=4)
    assert (F.linear(x, W, b).argmax(1) == y).all()
    rng, probes = dmsae.generator(4, "letters"), [nn.Linear(30, 1) for _ in range(26)]
    for p in (p for probe in probes for p in probe.parameters()):
        nn.init.zeros_(p)
    adam = torch.optim.Adam(
        [p for probe in probes for p in probe.parameters()], 1e-2, weight_decay=1e-4
    )
    decay = torch.optim.lr_scheduler.ExponentialLR(adam, (1e-5 / 1e-2) ** (1 / 49))
    for _ in range(50):
        for at in torch.randperm(126, generator=rng).split(50):
            loss = 0
            for c, probe in enumerate(probes):
                weight = torch.where(y == c, (y != c).sum() / (y == c).sum(), 1.0)[at]
                p = torch.sigmoid(probe(x[at])[:, 0])
                loss = (
                    loss
                    - (weight * torch.where(y[at] == c, p, 1 - p).log()).mean() / 26
                    + 0.02 * probe.weight.abs().sum() / 26
                )
            adam.zero_grad()
            loss.backward()
            adam.step()
        decay.step()
    assert torch.allclose(W, torch.cat([p.weight for p in probes]), atol=2e-3) and torch.allclose(
        b, torch.cat([p.bias for p in probes]), atol=2e-3
    )


def test_probes_equal_a_naive_reference():
    """Stacked probes must equal nn.Linear probes trained one at a time, each at its epoch of best test accuracy."""
    torch.manual_seed(0)
    x, train, test = (
        torch.randn(80, 5),
        torch.randint(0, 80, (3, 2, 24)),
        torch.randint(0, 80, (3, 2, 8)),
    )
    x[train[0, 0]] += 0.3
    W, b = ev.train_probes(x, train, test, seed=2)
    for p in range(3):
        rng, probe, best = dmsae.generator(2, "probes"), nn.Linear(5, 1), (-1,)
        nn.init.zeros_(probe.weight)
        nn.init.zeros_(probe.bias)
        adam = torch.optim.AdamW(probe.parameters(), 1e-3)
        rows, y = torch.cat([train[p, 0], train[p, 1]]), torch.tensor([1.0] * 24 + [0.0] * 24)
        for _ in range(20):
            for at in torch.randperm(48, generator=rng).split(16):
                adam.zero_grad()
                (
                    nn.BCEWithLogitsLoss()(probe(x[rows[at]])[:, 0], y[at])
                    + 1e-3 * probe.weight.abs().sum()
                ).backward()
                adam.step()
            right = [
                ((probe(x[i]) > 0) == (side == 0)).item() for side in (0, 1) for i in test[p, side]
            ]
            if sum(right) > best[0]:
                best = sum(right), probe.weight.detach().clone(), probe.bias.detach().clone()
        assert torch.allclose(best[1][0], W[p], atol=1e-5) and torch.allclose(
            best[2][0], b[p], atol=1e-5
        )
        assert ev.accuracy(x, test, W, b)[p].item() == pytest.approx(best[0] / 16)


def letters_world(absorbed="s"):
    """26 x 40 words, each with its letter's direction and its own; an SAE with a latent for each letter, blind to a third of the words
    of one letter, and for these a latent each. Returns model, tokenizer, SAE and the blind words' ids."""
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


def test_letter_task_reads_the_word():
    """The residual must be that of the word itself, in both prompts; letters must be right; train and test words must differ."""
    model, tokenizer, _, _ = letters_world()
    x, y, x_test, y_test, x_fresh, W, b = ev.letter_task(model, 0, tokenizer, 0)
    assert len(x) + len(x_test) == 1043  # 1040 words and has, the, first; "letter:" is none
    for rows, labels in (x, y), (x_test, y_test):
        known = rows.any(1)  # `has`, `the` and `first` have no direction
        assert torch.equal(rows[known, :26].argmax(1), labels[known])
    assert torch.equal(x_test, x_fresh) and not set(x[:, 26:].argmax(1)[x.any(1)].tolist()) & set(
        x_test[:, 26:].argmax(1)[x_test.any(1)].tolist()
    )
    assert (F.linear(x_test, W, b).argmax(1) == y_test)[x_test.any(1)].float().mean() > 0.95


def test_letter_prompts_are_as_documented(monkeypatch):
    """BOS, newline, ten lines of examples that never show the word, the word, the tail; the position must be the word's."""
    model, tokenizer, _, _ = letters_world()
    seen = []
    monkeypatch.setattr(
        ev,
        "residuals_at",
        lambda m, layer, prompts, at, fill: (
            seen.append((prompts, at))
            or torch.stack([model.embed.weight[p[i]] for p, i in zip(prompts, at)])
        ),
    )
    tokenizer.ids["\n"] = 1
    ev.letter_task(model, 0, tokenizer, 0)
    tail = [tokenizer.ids[w] for w in "has the first letter:".split()]
    for prompts, at in seen:
        for p, i in zip(prompts, at.tolist()):
            assert p[0] == 0 and p[i + 1 :] == tail and i == len(p) - 5
            lines = p[2:i]  # example, tail, letter (unknown here), newline
            assert (
                len(lines) == 70
                and all(lines[j + 1 : j + 5] == tail for j in range(0, 70, 7))
                and p[i] not in lines[::7]
            )


def test_absorption_finds_the_planted_words():
    """Full absorption must be the share of blind words among the test words of the planted letter, and zero elsewhere."""
    model, tokenizer, sae, blind = letters_world()
    task = ev.letter_task(model, 0, tokenizer, 0)
    r = ev.absorption(task, sae)
    own = task[2][:, 26:].argmax(1) + 2  # token ids of the test words
    of_s = [i for i, y in zip(own.tolist(), task[3].tolist()) if y == 18]
    rows = {row["first_letter"]: row for row in r["details"]}
    share = sum(i in blind for i in of_s) / rows["s"]["num_probe_true_positives"]
    assert 0 < share < 1 and rows["s"]["full_absorption_rate"] == pytest.approx(share)
    assert rows["s"]["fraction_0_6_0"] == pytest.approx(share, abs=1e-4) and rows["s"][
        "main_latents"
    ] == [18]
    assert all(row["num_full_absorption"] == 0 for c, row in rows.items() if c != "s")
    good = [row for row in rows.values() if row["probe_f1"] > 0.6]
    assert r["letters"] == len(good) and r["full_absorption_rate"] == pytest.approx(
        np.mean([row["full_absorption_rate"] for row in good])
    )


def test_letters_that_cannot_be_read_are_named():
    """Where too few letters are read, there must be a reason that names the others, and no number."""
    task = list(ev.letter_task(*letters_world()[:1], 0, letters_world()[1], 0))
    task[5][[0, 25]] = 0  # the probe of a and z
    task[6][[0, 25]] = -1
    sae = letters_world()[2]
    with pytest.raises(ev.CannotRun, match="a 0.00, z 0.00"):
        ev.absorption(task, sae, min_letters=25)
    assert ev.absorption(task, sae)["failed_letters"] == "a 0.00, z 0.00"


def test_absorption_scores_equal_a_naive_reference():
    """Word by word, all three scores must equal SAEBench's definitions written as plain arithmetic."""
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
            published = 0 if m >= A or sum(p) <= 0 else min(1, max(0, (sum(p) - m) / sum(p)))
            assert (bool(got[0][i]), got[1][i].item(), got[2][i].item()) == (
                full,
                pytest.approx(now),
                pytest.approx(published),
            )
            seen.update(
                full=int(full),
                part=int(0 < now < 1),
                whole=int(now == 1),
                zero=int(now == 0),
                old=int(0 < published < 1),
            )
    assert min(seen.values()) > 20  # every branch was met


def test_one_vs_rest_is_balanced_and_disjoint():
    """Positives must be of the class, negatives of the others in equal shares, as many; no text may be in train and test."""
    labels = np.array(list("abc" * 50) + ["a"] * 30)
    for c, (train, test) in zip("abc", ev.one_vs_rest(labels, 1)):
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
    """120 texts of 3 classes: latent c fires on class c only, latents 3 to 5 on nothing in particular; decoder rows orthogonal."""
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
    """One latent must be enough for a planted class; a silent SAE must be at chance; the residual channels must be probed as such."""
    X, A, labels, _ = planted_texts()
    r = ev.sparse_probing(X @ torch.linalg.qr(torch.randn(8, 8))[0], A, labels)
    assert (
        r["sae_top_1_test_accuracy"] == r["sae_test_accuracy"] == 1
        and r["llm_top_1_test_accuracy"] < 1
        and r["llm_test_accuracy"] > 0.9
    )
    always = torch.cat([A, 9 + torch.rand(120, 1)], 1)  # large, and the same for all classes
    assert ev.sparse_probing(X, always, labels)["sae_top_1_test_accuracy"] == 1
    assert ev.sparse_probing(X, torch.zeros_like(A), labels)["sae_top_5_test_accuracy"] == 0.5
    assert (
        ev.sparse_probing(A, A, labels)["llm_top_2_test_accuracy"]
        == ev.sparse_probing(A, A, labels)["sae_top_2_test_accuracy"]
    )


def test_tpp_of_planted_classes_hits_only_its_own_probe():
    """Ablating a planted class's latents must cost its own probe its accuracy, and the others' nothing."""
    X, A, labels, W_dec = planted_texts()
    r = ev.tpp(X, A, labels, W_dec, seeds=(0, 1))
    for row in r["details"]:
        assert (
            row["probe_accuracy"] > 0.95
            and row["tpp_threshold_2_intended"] > 0.3
            and abs(row["tpp_threshold_2_unintended"]) < 0.1
        )
        assert row["tpp_threshold_2_total_metric"] == pytest.approx(
            row["tpp_threshold_2_intended"] - row["tpp_threshold_2_unintended"]
        )
    values = [row["tpp_threshold_2_total_metric"] for row in r["details"]]
    assert r["tpp_threshold_2_total_metric"] == pytest.approx(np.mean(values)) and r[
        "tpp_threshold_2_total_metric_std"
    ] == pytest.approx(np.std(values, ddof=1))
    assert ev.tpp(X, A, labels, W_dec, seeds=(0,))["tpp_threshold_2_total_metric_std"] is None


def test_tpp_equals_a_naive_reference():
    """With the same probes, every figure must equal ablation text by text."""
    torch.manual_seed(3)
    labels = np.array(list("abcd") * 25)
    A = torch.rand(100, 30) * (torch.rand(100, 30) < 0.5) + 0.4 * F.one_hot(
        torch.arange(100) % 4, 30
    )
    W_dec = F.normalize(torch.randn(30, 6))
    X = A @ W_dec + 0.1 * torch.randn(100, 6)
    row = ev.tpp(X, A, labels, W_dec, seeds=(5,))["details"][0]
    tasks = ev.one_vs_rest(labels, 5)
    W, b = ev.train_probes(X, *(torch.stack(part) for part in zip(*tasks)), 5)

    def score(j, gone):
        test = tasks[j][1]
        hits = [
            (((X[t] - sum((A[t, k] * W_dec[k] for k in gone), torch.zeros(6))) @ W[j] + b[j]) > 0)
            == (side == 0)
            for side in (0, 1)
            for t in test[side]
        ]
        return np.mean([float(h) for h in hits])

    for n in (2, 10):
        own, others = [], []
        for i in range(4):
            train = tasks[i][0]
            effect = [
                max(0, (A[train[0], k].mean() - A[train[1], k].mean()).item())
                * (W_dec[k] @ W[i]).item()
                for k in range(30)
            ]
            gone = [k for k in sorted(range(30), key=lambda k: -effect[k])[:n] if effect[k] > 0]
            for j in range(4):
                (own if i == j else others).append(score(j, []) - score(j, gone))
        assert row[f"tpp_threshold_{n}_intended"] == pytest.approx(np.mean(own), abs=1e-6)
        assert row[f"tpp_threshold_{n}_unintended"] == pytest.approx(np.mean(others), abs=1e-6)


def test_scr_removes_a_planted_correlation():
    """Ablating the planted spurious latent must turn the biased probe into one of the class: 1; without latents nothing moves: 0."""
    torch.manual_seed(0)
    n = 400
    label, spurious = torch.arange(n) % 2, torch.arange(n) // 2 % 2
    A = torch.stack([label, 1 - label, spurious, 1 - spurious], 1) * (1 + 0.3 * torch.rand(n, 4))
    A[:, 2:] *= 1.4  # the spurious one is the easier
    W_dec = torch.eye(4)
    names, values = np.array(["a", "b"])[label], np.array(["u", "v"])[spurious]
    r = ev.scr(A @ W_dec, A, names, values, W_dec, seeds=(0, 1))
    assert r["pairs"] == 1 and len(r["details"]) == 2
    for row in r["details"]:
        assert (
            row["scr_metric_threshold_2"] == row["scr_dir1_threshold_2"] > 0.9
            and row["biased_accuracy"][0] < row["biased_accuracy"][1]
        )
    silent = ev.scr(A, torch.zeros_like(A), names, values, W_dec)
    assert silent["scr_metric_threshold_20"] == 0
    for bad in None, np.array(["u"] * n), np.array(["u", "v"])[label]:
        with pytest.raises(ev.CannotRun):
            ev.scr(A, A, names, bad, W_dec)


def test_labelled_reads_files_evenly(tmp_path):
    """A class of fewer than ten texts must be left out, empty texts too, the others cut to the budget; columns can be named."""
    rows = [
        dict(words=f"{c} {i}" if i else "", topic=c, era=i % 2)
        for c, n in (("a", 40), ("b", 21), ("c", 9))
        for i in range(n)
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    texts, labels, spurious = ev.labelled(
        str(tmp_path / "t.jsonl"), ("words", "topic", "era"), budget=30
    )
    assert (
        Counter(labels) == {"a": 15, "b": 15}
        and len(set(texts)) == 30
        and all(t.split()[0] == c for t, c in zip(texts, labels))
    )
    assert [str(int(t.split()[1]) % 2) for t in texts] == spurious.tolist()
    texts, labels, spurious = ev.labelled(str(tmp_path / "t.jsonl"), ("words", "topic"))
    assert Counter(labels) == {"a": 39, "b": 20} and spurious is None
    (tmp_path / "t.csv").write_text("text,label\n" + "a text,1\n" * 12 + '"one, two",2\n' * 10)
    assert (
        Counter(ev.labelled(str(tmp_path / "t.csv"))[1]) == {"1": 12, "2": 10}
        and "one, two" in ev.labelled(str(tmp_path / "t.csv"))[0]
    )
    for columns, says in (
        (("words", "theme"), "has only"),
        (("words", "topic", "gender"), "has only"),
        (("topic", "words"), "two are needed"),
    ):
        with pytest.raises(dmsae.BadInput, match=says):
            ev.labelled(str(tmp_path / "t.jsonl"), columns)


def test_missing_labels_make_no_classes(tmp_path):
    """Rows without text, label or spurious label must be left out, and one missing label must not turn 1 into 1.0."""
    rows = [f"text {i},{i % 2},{i % 3 % 2}" for i in range(12_000)]
    rows[11_000], rows[11_001], rows[3] = "text,,1", "text,1,", ",1,1"
    (tmp_path / "t.csv").write_text("text,label,era\n" + "\n".join(rows))
    texts, labels, spurious = ev.labelled(
        str(tmp_path / "t.csv"), ("text", "label", "era"), budget=10**6
    )
    assert (
        Counter(labels) == {"0": 2500, "1": 2500}
        and set(spurious) == {"0", "1"}
        and "" not in texts
    )


def test_pooled_equals_text_by_text(lm):
    """Means over kept tokens must equal each text on its own, and zeroing latents must move the mean by -A W_dec of these."""
    (model, text, _), sae = held(lm), random_sae(n_core=0, dtype=torch.float32, d_model=32)
    from transformers import AutoTokenizer

    tokenizer, texts = (
        AutoTokenizer.from_pretrained(lm),
        ["the cat sat", "dog", "a bird sang a loud song of spring " * 20],
    )
    X, A = ev.pooled(model, 0, tokenizer, text, sae, texts, ctx=12)
    for i, t in enumerate(texts):
        ids = torch.tensor([[2, *tokenizer(t, add_special_tokens=False)["input_ids"]][:12]])
        x = dmsae.residual_stream(model, 0, ids)[0, 1:]
        f = sae.encode(x)
        assert torch.allclose(X[i], x.mean(0), atol=1e-5) and torch.allclose(
            A[i], f.mean(0), atol=1e-5
        )
        less = f.clone()
        less[:, [3, 5]] = 0
        ablated = sae.decode(less) + (x - sae.decode(f))
        assert torch.allclose(ablated.mean(0), X[i] - A[i, [3, 5]] @ sae.W_dec[[3, 5]], atol=1e-5)


def ravel_world():
    """Eight entities with a colour (dims 0, 1) and a size (dims 2, 3); the question's word lifts the answers that it asks for."""
    names = [f"e{i}" for i in range(8)]
    tokenizer = Words([*names, "colour", "size", "red", "blue", "big", "small"])
    table = torch.zeros(len(tokenizer), 6)
    for i in range(8):
        table[2 + i, i % 2], table[2 + i, 2 + i // 4] = 1, 1
    table[tokenizer.ids["colour"], 4] = table[tokenizer.ids["size"], 5] = 10
    readout = torch.zeros(6, len(tokenizer))
    for j, (answer, question) in enumerate([("red", 4), ("blue", 4), ("big", 5), ("small", 5)]):
        readout[j, tokenizer.ids[answer]], readout[question, tokenizer.ids[answer]] = 1, 1
    facts = dict(
        entities={
            n: dict(colour=("red", "blue")[i % 2], size=("big", "small")[i // 4])
            for i, n in enumerate(names)
        },
        templates=dict(colour=["{entity} colour"], size=["{entity} size"]),
    )
    text = Text(np.zeros((3, 3), np.int32), 0, torch.tensor([0]), 1, 1)
    return Sum(table, readout), tokenizer, text, facts


def test_ravel_disentangles_a_planted_attribute(monkeypatch):
    """Latents of one attribute each must give cause and isolation of 1; latents of whole entities must trade them off. The mask
    must begin soft and end hard."""
    model, tokenizer, text, facts = ravel_world()
    seen, sigmoid = [], torch.sigmoid
    monkeypatch.setattr(
        torch, "sigmoid", lambda t: seen.append(t.detach().abs().max().item()) or sigmoid(t)
    )
    r = ev.ravel(model, 0, tokenizer, text, ready_sae(torch.eye(6)[:4], torch.eye(6)[:4]), facts)
    assert r["prompts"] == r["prompts_known"] == 16 and r["attributes"] == "colour, size"
    for row in r["details"]:
        assert (
            row["cause_score"] == row["isolation_score"] == row["disentanglement_score"] == 1
            and row["latents"] >= 2
        )
    assert seen[0] == 0 and seen[1] < 0.05 and max(seen) > 10
    rows = F.normalize(model.embed.weight[2:10])
    whole = ready_sae(
        rows, rows * 2**0.5, 1.2
    )  # one latent for each entity pair of colour and size
    assert ev.ravel(model, 0, tokenizer, text, whole, facts)["disentanglement_score"] < 0.8


def test_ravel_says_what_the_model_does_not_know():
    """Prompts that the model gets wrong must not count; where none is left there must be a reason, and no number."""
    model, tokenizer, text, facts = ravel_world()
    facts["entities"]["e0"]["colour"] = "blue"
    assert ev.ravel(model, 0, tokenizer, text, both_signs(6), facts)["prompts_known"] == 15
    model.readout.zero_()
    with pytest.raises(ev.CannotRun, match="answers 0 of 16"):
        ev.ravel(model, 0, tokenizer, text, both_signs(6), facts)
    with pytest.raises(ev.CannotRun, match="--ravel"):
        ev.ravel(model, 0, tokenizer, text, both_signs(6), None)


def test_stability_equals_sets_of_births(story):
    """Kept, Jaccard and overlap must equal those of the sets of identities in the saved cores, and votes the counts there."""
    rows, before = ev.stability(story), set()
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
        assert r["votes"] == Counter(core["votes"].tolist()) and sum(r["origins"].values()) == len(
            now
        )
        before = now


def test_stability_of_a_written_case(tmp_path):
    """{a, b, c} -> {b, c, d, e}: two of five identities in common, two of three kept."""
    births = [[(0, 1), (0, 2), (0, 3)], [(0, 2), (0, 3), (1, 4), (1, 5)]]
    for n, birth in enumerate(births):
        (tmp_path / f"cycle{n}").mkdir()
        result = dict(cycle=n, core=len(birth), kept=2 * n, new=3 - n, dropped=n)
        (tmp_path / f"cycle{n}" / "cfg.json").write_text(
            json.dumps(dict(metadata=dict(result=result)))
        )
        core = Core(
            torch.zeros(len(birth), 2),
            birth=torch.tensor(birth),
            votes=torch.tensor([2, 2, 1, 1][: len(birth)]),
        )
        dmsae.save_tensors(
            vars(core), tmp_path / f"cycle{n}" / "core.safetensors", training=n, model="m", layer=0
        )
    rows = ev.stability(tmp_path)
    assert (
        rows[1]["jaccard"] == 2 / 5
        and rows[1]["identity_overlap"] == 2 / 3
        and rows[1]["votes"] == {1: 2, 2: 2}
        and rows[0]["jaccard"] == 0
    )


def test_partners_are_the_greedy_matching():
    """Partners must be one to one, the closest pair first, as a plain loop over sorted pairs finds them."""
    torch.manual_seed(0)
    a = torch.randn(30, 6)
    b = torch.cat([a[:20] + 0.5 * torch.randn(20, 6), torch.randn(7, 6), a[:3]])
    cosine = F.normalize(a) @ F.normalize(b).T
    used, found = set(), []
    for value, i, j in sorted(
        ((cosine[i, j].item(), i, j) for i in range(30) for j in range(30)), reverse=True
    ):
        if ("a", i) not in used and ("b", j) not in used:
            used |= {("a", i), ("b", j)}
            found.append(value)
    assert ev.partners(a, b) == {f"above_{t}": sum(v > t for v in found) for t in (0.7, 0.9)}
    assert (
        ev.partners(a, a) == {"above_0.7": 30, "above_0.9": 30}
        and ev.partners(a[:1], -a[:1])["above_0.7"] == 0
    )


def test_a_run_agrees_with_itself_and_not_with_noise(story, monkeypatch):
    """All latents of a run must have partners in the same run, random directions hardly any; random latents are of prefix 0."""
    r = ev.agreement(story, story)
    for name in "core", "prefix 0":
        assert (
            r[name]["encoder"]["above_0.9"]
            == r[name]["decoder"]["above_0.9"]
            == r[name]["n"][0]
            == r[name]["n"][1]
        )
    pairs = []
    monkeypatch.setattr(ev, "partners", lambda a, b: pairs.append((a, b)) or {})
    ev.agreement(story, story)
    (core, _), (noise, _), (some, other), (prefix, _) = pairs[:4]
    assert len(core) == len(noise) == len(some) < len(prefix) and not torch.equal(some, other)
    assert all((prefix == row).all(1).any() for row in torch.cat([core, some, other])) and not any(
        (prefix == row).all(1).any() for row in noise
    )
    assert (
        r["random directions"]["encoder"]["above_0.9"] == 0
        and r["random directions"]["n"] == r["core"]["n"]
    )


def evaluation(*words):
    return dmsae.main([str(w) for w in words], "eval", lambda argv: ev.run(ev.parse(argv)))


@pytest.fixture(scope="session")
def labels_csv(lm, tmp_path_factory):
    """Labelled texts of the tiny model's words, with a spurious label, and facts that it cannot know."""
    folder = tmp_path_factory.mktemp("labels")
    rows = [
        f"{'the cat sat' if i % 2 else 'a bird sang'} {'loud' if i // 2 % 2 else 'song'} of {i},{i % 2},{i // 2 % 2}"
        for i in range(120)
    ]
    (folder / "t.csv").write_text("text,label,spurious\n" + "\n".join(rows))
    (folder / "t.jsonl").write_text(
        "\n".join(json.dumps(dict(words=r.split(",")[0], topic=r.split(",")[1])) for r in rows)
    )
    (folder / "facts.json").write_text(
        json.dumps(
            dict(
                entities=dict(cat=dict(a="sat"), dog=dict(a="ran")),
                templates=dict(a=["the {entity}"]),
            )
        )
    )
    return folder


def test_eval_through_its_command_line(story, labels_csv, tmp_path, capsys):
    """Everything on a run folder: each metric has figures or a reason, JSON is strict, nothing is overwritten, the page is closed."""
    out = tmp_path / "eval.json"
    words = (
        story,
        "--labelled",
        labels_csv / "t.csv",
        "--ravel",
        labels_csv / "facts.json",
        "--seeds",
        2,
        "--html",
        "--out",
        out,
        "--tokens",
        20_000,
    )
    assert evaluation(*words) == 0
    printed = capsys.readouterr().out
    report = json.loads(out.read_text(), parse_constant=lambda c: pytest.fail(f"{c} is no JSON"))
    assert (
        [Path(s["folder"]).name for s in report["saes"]] == ["cycle0", "cycle3"]
        and report["seed"] == 0
        and "held out by" in report["text"]
    )
    plain, last = (s["metrics"] for s in report["saes"])
    name = labels_csv / "t.csv"
    assert (
        plain.keys()
        == last.keys()
        == {
            "core",
            "stability",
            "absorption",
            "ravel",
            f"probing {name}",
            f"tpp {name}",
            f"scr {name}",
        }
    )
    result = json.loads((story / "cycle3" / "cfg.json").read_text())["metadata"]["result"]
    core = last["core"]
    assert core["ce_loss_score"] == pytest.approx(result["ce_recovered"], abs=1e-4) and core[
        "l0"
    ] == pytest.approx(result["l0"], rel=1e-4)
    assert [p["fvu"] for p in core["prefixes"][1:]] == pytest.approx(
        result["fvu"], rel=1e-3
    ) and core["core_l0"] == pytest.approx(result["core_l0"], rel=1e-3)
    assert (
        list(last["absorption"]) == ["cannot_run"]
        and "words of letters only" in printed
        and last[f"scr {name}"]["pairs"] == 1
    )
    assert last["stability"]["core"] == result["core"] and len(last[f"tpp {name}"]["details"]) == 2
    first = out.read_bytes()
    assert evaluation(story / "cycle0", "--only", "core", "--out", out) == 0
    assert out.read_bytes() == first and set(
        json.loads((tmp_path / "eval-2.json").read_text())["saes"][0]["metrics"]
    ) == {"core"}
    html = (tmp_path / "eval.html").read_text()
    assert (
        "<script" not in html
        and "http" not in html
        and "ce_loss_score" in html
        and html.count("<article>")
        == sum(
            len(load_file(story / c / "core.safetensors")["votes"]) for c in ("cycle0", "cycle3")
        )
    )
    assert html.count("<svg") == 3 and "born in 0" in html


def test_another_text_and_an_older_page(story, lm, tmp_path):
    """A given text must not be cut by the separator of the run's own; a page must not be overwritten even where its JSON is gone."""
    (tmp_path / "t.jsonl").write_text(
        "\n".join(json.dumps(dict(text=d)) for d in (lm / "text.txt").read_text().split("|||"))
    )
    (tmp_path / "e.html").write_text("precious")
    assert (
        evaluation(
            story / "cycle0",
            "--only",
            "core",
            "stability",
            "--text",
            tmp_path / "t.jsonl",
            "--tokens",
            5_000,
            "--html",
            "--out",
            tmp_path / "e.json",
        )
        == 0
    )
    assert (
        (tmp_path / "e.html").read_text() == "precious"
        and (tmp_path / "e-2.html").exists()
        and not (tmp_path / "e.json").exists()
    )
    assert "t.jsonl" in json.loads((tmp_path / "e-2.json").read_text())["text"]


def test_scaled_decoder_rows_change_nothing(story, labels_csv, tmp_path):
    """A foreign SAE whose latents are rescaled, the same function, must get the same figures; its folder's parent is no run."""
    shutil.copytree(story / "cycle3", tmp_path / "hub" / "sae")
    (tmp_path / "hub" / "config.json").write_text("{}")
    (tmp_path / "hub" / "sae" / "core.safetensors").unlink()
    cfg = json.loads((story / "cycle3" / "cfg.json").read_text())
    cfg["metadata"]["config"]["core"] = (
        "/gone.safetensors"  # no longer needed, so no longer asked for
    )
    (tmp_path / "hub" / "sae" / "cfg.json").write_text(json.dumps(cfg))
    w, s = weights(story, 3), 0.2 + torch.rand(128, generator=torch.Generator().manual_seed(0))
    scaled = dict(
        W_enc=w["W_enc"] / s,
        b_enc=w["b_enc"] / s,
        threshold=w["threshold"] / s,
        W_dec=w["W_dec"] * s[:, None],
        b_dec=w["b_dec"],
    )
    save_file(
        {k: v.contiguous() for k, v in scaled.items()},
        tmp_path / "hub" / "sae" / "sae_weights.safetensors",
    )
    assert (
        evaluation(
            story / "cycle3",
            tmp_path / "hub" / "sae",
            "--only",
            "core",
            "stability",
            "probing",
            "--labelled",
            labels_csv / "t.csv",
            "--html",
            "--tokens",
            20_000,
            "--out",
            tmp_path / "e.json",
        )
        == 0
    )
    one, two = (s["metrics"] for s in json.loads((tmp_path / "e.json").read_text())["saes"])
    assert one["core"]["l1"] == pytest.approx(two["core"]["l1"], rel=1e-4) and one["core"][
        "fvu"
    ] == pytest.approx(two["core"]["fvu"], rel=1e-4)
    name = f"probing {labels_csv / 't.csv'}"
    assert one[name]["sae_top_2_test_accuracy"] == pytest.approx(
        two[name]["sae_top_2_test_accuracy"], abs=0.05
    )
    assert "no run folder" in two["stability"]["cannot_run"] and one["stability"]["core"] > 0


def test_prompts_longer_than_the_model_are_no_numbers():
    """Where a prompt does not fit into the model's contexts there must be a reason; a silent SAE must get no absorption."""
    model, tokenizer, sae, _ = letters_world()
    task = ev.letter_task(model, 0, tokenizer, 0)
    with pytest.raises(ev.CannotRun, match="no latent fires"):
        ev.absorption(task, ready_sae(sae.W_enc.detach(), sae.W_dec.detach(), math.inf))
    model.config = SimpleNamespace(
        get_text_config=lambda: SimpleNamespace(num_hidden_layers=1, max_position_embeddings=40)
    )
    with pytest.raises(ev.CannotRun, match="contexts of 40"):
        ev.letter_task(model, 0, tokenizer, 0)


def test_two_runs_and_jsonl_and_foreign_folder(story, lm, labels_csv, tmp_path, capsys):
    """A folder with only SAELens's metadata must be evaluated on a given text, and must say that it has no run; columns can be named."""
    foreign = tmp_path / "sae"
    shutil.copytree(story / "cycle0", foreign)
    (foreign / "core.safetensors").unlink()
    cfg = json.loads((foreign / "cfg.json").read_text())
    for key in "config", "result", "widths", "n_core", "n_exempt":
        cfg["metadata"].pop(key)
    (foreign / "cfg.json").write_text(json.dumps(cfg))
    assert (
        evaluation(
            foreign,
            "--only",
            "core",
            "stability",
            "probing",
            "scr",
            "--text",
            lm / "text.txt",
            "--separator",
            "|||",
            "--labelled",
            labels_csv / "t.jsonl",
            "--columns",
            "words",
            "topic",
            "--tokens",
            20_000,
            "--html",
        )
        == 0
    )
    report = json.loads((foreign / "eval.json").read_text())
    metrics = report["saes"][0]["metrics"]
    assert (
        len(metrics["core"]["prefixes"]) == 2
        and "may have been trained on" in report["text"]
        and (foreign / "eval.html").exists()
    )
    assert (
        "no run folder" in metrics["stability"]["cannot_run"]
        and "third column" in metrics[f"scr {labels_csv / 't.jsonl'}"]["cannot_run"]
    )
    assert evaluation(story, story, "--only", "stability", "--out", tmp_path / "two.json") == 0
    printed = capsys.readouterr().out
    assert "[1]" in printed and "core after training 3" in printed


def test_the_page_escapes_and_shades(lm, story):
    """Tokens that look like HTML must be escaped, and the token where a latent peaks must be the darkest."""
    from transformers import AutoTokenizer

    model, text, ids = held(lm)
    ids[2, 9] = ids[6, 3] = AutoTokenizer.from_pretrained(lm)("<", add_special_tokens=False)[
        "input_ids"
    ][0]
    sae, (core, _) = (
        load_sae(story / "cycle3"),
        dmsae.load_core(story / "cycle3" / "core.safetensors"),
    )
    cards = ev.core_cards(
        model, 0, AutoTokenizer.from_pretrained(lm), text, ids, sae, core, n=10, window=16
    )
    assert "&lt;" in cards and not re.search(r"<(?!/?(hr|article|h3|small|p|kbd|span)\b)", cards)
    report = dict(
        model="<b>",
        layer=0,
        text="<i>&",
        stability={},
        agreement={},
        saes=[dict(folder="a<", metrics={"<u>": dict(cannot_run="because <u> of that reason")})],
    )
    page = ev.page(report, {"<s>": cards})
    assert not re.search(r"<(b|i|u|s)>", page) and "&lt;b&gt;" in page
    first = cards.split("<article>")[1]
    acts = sae.encode(dmsae.residual_stream(model, 0, ids).flatten(0, 1))[:, core.index[0]].view(
        10, 16
    ) * text.keep(ids)
    assert first.count("<p>") - 1 == int((acts.amax(1) > 0).sum()) and ",1.00)" in first


@pytest.mark.parametrize(
    "words, says",
    [
        (["/nowhere"], "neither a run folder"),
        (["RUN", "--only", "speed"], "invalid choice"),
        (["RUN", "--tokens", "0"], "--tokens 0"),
        (["RUN", "--labelled", "/nowhere.csv"], "cannot be read"),
        (["RUN", "--labelled", "EMPTY"], "columns text label"),
        (["RUN", "--labelled", "MD"], "cannot be read"),
        (["RUN", "--ctx", "65"], "--ctx up to 64"),
        (["RUN", "--labelled", "ONE"], "two are needed"),
        (["RUN", "--labelled", "CSV", "--columns", "words", "label"], "--columns text label"),
        (["RUN", "--ravel", "BAD"], "must be like"),
        (["RUN", "--ravel", "/nowhere.json"], "No such file"),
        (["RUN", "--out", "/nowhere/eval.json"], "--out /nowhere/eval.json"),
        (["RUN", "--model", "OTHER"], "width"),
        (["RUN", "--text", "/nowhere.txt"], "no such file"),
        ([], "required"),
        (["RUN", "--device", "cuda:9"], "--device"),
        (["HOOK"], "hook"),
        (["RUN", "--seeds", "x"], "invalid int"),
    ],
)
def test_eval_refuses_bad_input_in_one_line(words, says, story, lm, labels_csv, tmp_path, capsys):
    """One line that says what is wrong, exit code 2, and nothing written."""
    (tmp_path / "bad.json").write_text('{"entities": 3}')
    from transformers import Gemma2Config, Gemma2ForCausalLM

    if "OTHER" in words:
        Gemma2ForCausalLM(
            Gemma2Config(
                vocab_size=300,
                hidden_size=16,
                intermediate_size=16,
                num_hidden_layers=1,
                num_attention_heads=1,
                num_key_value_heads=1,
                head_dim=16,
            )
        ).save_pretrained(tmp_path / "other")
    if "HOOK" in words:
        (tmp_path / "hook").mkdir()
        (tmp_path / "hook" / "cfg.json").write_text(
            json.dumps(dict(metadata=dict(model_name="m", hook_name="blocks.0.hook_mlp_out")))
        )
    (tmp_path / "empty.csv").write_text("text,label\n")
    (tmp_path / "one.csv").write_text("text,label\n" + "x,1\n" * 30)
    real = dict(
        RUN=story,
        EMPTY=tmp_path / "empty.csv",
        ONE=tmp_path / "one.csv",
        MD=HERE / "README.md",
        CSV=labels_csv / "t.csv",
        BAD=tmp_path / "bad.json",
        OTHER=tmp_path / "other",
        HOOK=tmp_path / "hook",
    )
    before = sorted(story.rglob("*"))
    try:
        code = evaluation(
            *(real.get(w, w) for w in words),
            *(["--only", "probing"] if words[1:] and "--only" not in words else []),
        )
    except SystemExit as e:
        code = e.code
    err = capsys.readouterr().err
    assert (
        code == 2
        and err.startswith("eval: ")
        and err.count("\n") == 1
        and says in err
        and sorted(story.rglob("*")) == before
    )


# ---- README --------------------------------------------------------------------------------------------------------------
def test_readme_commands_parse_and_its_claims_hold():
    """Every dmsae.py and eval.py command of README.md, as bash expands it, must parse; line counts must be true; the JSON must be JSON."""
    readme = (HERE / "README.md").read_text()
    blocks = [
        b for language, b in re.findall(r"(?ms)^```(\w*)\n(.*?)^```$", readme) if not language
    ]
    shown = [
        b for b in blocks if not re.match("(python|pip|torchrun|for|demo=|story=) ?", b)
    ]  # what is no command
    assert [b.split()[0] for b in shown] == [
        "text",
        "dmsae",
        "demo/cycle0",
        "runs/<model>_k<k>_seed<seed>/",
        "B",
        "dmsae",
        "@article{martinlinares2025dmsae,",
    ]
    blocks = [b for b in blocks if b not in shown]
    scripts = re.findall(r"(?ms)<<'EOF'\n(.*?)^EOF$", readme)
    assert len(scripts) == sum("python - " in line for line in readme.splitlines()) == 4
    for script in scripts:
        compile(script, "README.md", "exec")
    record = 'python() { printf "%q " "$@"; echo; }; pip() { :; }; torchrun() { shift 2; python "$@"; }\n'
    variables = "\n".join(re.findall(r"(?m)^(?:demo|story)=.*$", readme))
    seen = Counter()
    for block in blocks:
        out = subprocess.run(
            ["bash", "-uc", f"{record}{variables}\n{block}"],
            capture_output=True,
            text=True,
            cwd="/",
            check=True,
        )
        assert not out.stderr, (block, out.stderr)
        for name, *argv in filter(None, map(shlex.split, out.stdout.splitlines())):
            seen[name] += 1
            if name.endswith(".py") and "--help" not in argv:
                ({"dmsae.py": dmsae.parse, "eval.py": ev.parse}[name])(argv)
    assert seen["dmsae.py"] >= 10 and seen["eval.py"] >= 3
    for name, limit in ("dmsae", 1816), ("eval", 1448):
        (claimed,) = re.findall(rf"`{name}\.py` \((\d+) lines", readme)
        assert int(claimed) == len((HERE / f"{name}.py").read_text().splitlines()) <= limit
    facts = json.loads(re.search(r"```json\n(.*?)```", readme, re.S)[1])
    assert facts["templates"].keys() == facts["entities"]["Tom"].keys()


def test_readme_snippets_run(story, lm, tmp_path, monkeypatch):
    """The three snippets must run as written, on a run folder of the README's name."""
    monkeypatch.chdir(tmp_path)
    readme = (HERE / "README.md").read_text()
    snippets = re.findall(r"```python\n(.*?)```", readme, re.S)
    (folder,) = set(re.findall(r'"(runs/[^"]*?)/cycle', "".join(snippets)))
    Path(folder).parent.mkdir(parents=True)
    os.symlink(story, folder)
    assert len(snippets) == 3
    for code in snippets:
        exec(code, {"acts": torch.randn(4096, 32), "torch": torch})


# ---- Benchmark ---------------------------------------------------------------------------------------------------------
def benchmark(B=1024, D=512, F_=16384, k=32, rounds=15):
    """Print median milliseconds of each alternative, taken in turn in one process, and ratios."""
    x, quarter, guess = torch.randn(B, D), torch.arange(3 * F_ // 4, F_), [0.0]
    widths = [F_ // 32, 3 * F_ // 32, 7 * F_ // 32, 15 * F_ // 32, F_]
    sae, dense = MatryoshkaSAE(D, widths), MatryoshkaSAE(D, widths)
    trained, dense_trained = sae.trained(), dense.trained()
    b, both = torch.zeros(F_), [nn.Parameter(torch.randn(F_, D)) for _ in range(2)]
    for p in both:
        p.grad = torch.randn(F_, D)
    W = both[0].detach()
    adam, dense_adam, both_adam = (
        torch.optim.Adam(p, 1e-6, fused=True) for p in (trained, dense_trained, both)
    )

    def sparse_step(dead=()):
        guess[0] = 0.9 * loss_and_grad(sae, trained, x, k, guess=guess[0], dead=dead)[2]
        apply_gradients(trained, adam, 1e-6)

    def dense_step(dead=()):
        free, b_enc, W_dec, b_dec = dense_trained
        pre = ((x - b_dec) @ free.T + b_enc).relu()
        top = pre.flatten().topk(B * k, sorted=False)
        acts = torch.zeros_like(pre).flatten().scatter(0, top.indices, top.values).view_as(pre)
        parts = [
            a @ W_
            for a, W_ in zip(
                acts.tensor_split(dense.widths[:-1], 1), W_dec.tensor_split(dense.widths[:-1])
            )
        ]
        x_hats = torch.stack(parts, 1).cumsum(1) + b_dec
        loss = nested_loss(x, x_hats)
        if len(dead):
            residual, on = (x - x_hats[:, -1]).detach(), pre[:, dead].topk(D // 2, sorted=False)
            error = (
                residual - torch.zeros(B, len(dead)).scatter(1, on.indices, on.values) @ W_dec[dead]
            )
            loss = loss + error.pow(2).sum() / (residual - residual.mean(0)).pow(2).sum() / 32
        loss.backward()
        apply_gradients(dense_trained, dense_adam, 1e-6)

    def gradients(dead=()):
        loss_and_grad(sae, trained, x, k, guess=guess[0], dead=dead)
        adam.zero_grad()  # as in a step, where the next one finds no gradients to add to

    def product():
        torch.addmm(
            b, x, W.T
        )  # with its bias, as any encoder has it; the step adds no bias to what it throws away

    def product_and_adam():
        product()
        both_adam.step()

    cases = {
        "dmsae step": sparse_step,
        "dense autograd step": dense_step,
        "dmsae step, 1/4 dead": lambda: sparse_step(quarter),
        "dense step, 1/4 dead": lambda: dense_step(quarter),
        "encoder product": product,
        "... without bias": lambda: x @ W.T,
        "encoder product + Adam": product_and_adam,
        "encode and select": lambda: sae.survivors(x, k, guess=guess[0]),
        "... and differentiate": gradients,
        "the same, 1/4 dead": lambda: gradients(quarter),
    }
    place = torch.randperm(F_ * B)[: B * k].sort().values
    i, j, a = place // B, place % B, torch.randn(B, D)
    cases["paired dots, sampled"] = lambda: dmsae.paired_dots(W, i, a, j)
    cases["paired dots, gathered"] = lambda: torch.cat(
        [(W[p] * a[q]).sum(1) for p, q in zip(i.split(512), j.split(512))]
    )
    times = {name: [] for name in cases}
    for n in range(rounds + 2):
        for name, f in cases.items():
            start = time.perf_counter()
            f()
            times[name].append(1e3 * (time.perf_counter() - start))
    ms = {name: sorted(t[2:])[rounds // 2] for name, t in times.items()}
    print(
        f"B {B}, D {D}, F {F_}, k {k}, float32, {torch.get_num_threads()} threads, torch {torch.__version__}, median of {rounds}"
    )
    for name in cases:
        print(
            f"{name:24s} {ms[name]:8.1f} ms   {ms[name] / ms['encoder product']:6.2f} x product   "
            f"{ms[name] / ms['encoder product + Adam']:6.2f} x product + Adam"
        )
    stages = {
        "encoder product": ms["encoder product"],
        "select": ms["encode and select"] - ms["encoder product"],
        "decode, loss, backward": ms["... and differentiate"] - ms["encode and select"],
        "dead-latent loss, if 1/4 are dead": ms["the same, 1/4 dead"] - ms["... and differentiate"],
        "clip, Adam, unit rows": ms["dmsae step"] - ms["... and differentiate"],
    }
    print("a step by stage, ms: " + ", ".join(f"{name} {t:.1f}" for name, t in stages.items()))
    print(
        f"dense / dmsae: {ms['dense autograd step'] / ms['dmsae step']:.2f}, with 1/4 dead: "
        f"{ms['dense step, 1/4 dead'] / ms['dmsae step, 1/4 dead']:.2f}"
    )


if __name__ == "__main__":
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as dmsae.main does
    benchmark()
