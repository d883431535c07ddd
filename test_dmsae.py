"""Tests of dmsae.py and eval.py: every name is a claim. No network, no GPU; tiny sizes.

`python test_dmsae.py` instead times a training step, and with --model a whole run.
"""

import ast
import contextlib
import copy
import gc
import inspect
import io
import itertools
import json
import math
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections import Counter, defaultdict
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
from dmsae import Config, Core, MatryoshkaSAE, attribute, batch_topk, evaluate, fast_training_loss
from dmsae import load_sae, mean_loss, next_core, select_core, sparse_topk
from dmsae import spliced_loss, training_loss, update, update_threshold

HERE = Path(__file__).parent


# ---- Helpers ------------------------------------------------------------------------------------
def random_sae(d_model=8, widths=(13, 25, 64), n_core=0, dtype=torch.float64, seed=0):
    """An SAE in which nothing is at its initial value: biases at zero hide bugs."""
    torch.manual_seed(seed)
    sae = MatryoshkaSAE(d_model, widths, n_core).to(dtype)
    for p in (sae.b_enc, sae.b_dec, sae.W_enc):
        nn.init.normal_(p)
    sae.threshold.uniform_(0.1, 0.5)
    return sae


def pre_of(sae, x):
    """Pre-activations by their definition: (B, F)."""
    return (((x[:, None] - sae.b_dec) * sae.W_enc).sum(2) + sae.b_enc).detach()


class Toy(nn.Module):
    """A one-layer 'language model': embedding, an identity layer to splice, a linear head."""

    def __init__(self, embedding, head):
        super().__init__()
        self.embedding = embedding
        self.head = head
        self.experts = nn.ModuleList([nn.Identity(), nn.Identity()])  # They are no layers.
        self.layers = nn.ModuleList([nn.Identity()])
        text_config = SimpleNamespace(num_hidden_layers=1, vocab_size=len(embedding))
        self.config = SimpleNamespace(get_text_config=lambda: text_config)
        self.device = torch.device("cpu")
        self.dtype = embedding.dtype

    def get_decoder(self):
        return self

    def get_input_embeddings(self):
        return SimpleNamespace(weight=self.embedding)

    def forward(self, ids, use_cache=False):
        return SimpleNamespace(logits=self.layers[0](self.embedding[ids]) @ self.head)


def random_toy(n_words, dtype=torch.float32):
    torch.manual_seed(0)
    return Toy(torch.randn(n_words, 8, dtype=dtype), torch.randn(8, n_words, dtype=dtype))


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
    shape = dict(vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2)
    shape |= dict(num_attention_heads=2, num_key_value_heads=1, head_dim=16)
    shape |= dict(query_pre_attn_scalar=16, max_position_embeddings=64, initializer_range=0.2)
    torch.manual_seed(0)
    config = Gemma2Config(**shape, pad_token_id=0, eos_token_id=1, bos_token_id=2)
    Gemma2ForCausalLM(config).save_pretrained(folder)
    (folder / "text.txt").write_text("|||".join(docs), "utf-8")
    return folder


@pytest.fixture
def own_lm(lm, tmp_path):
    """A copy of the folder that a test may change."""
    return shutil.copytree(lm, tmp_path / "lm")


def load_tiny(lm):
    """The tiny language model, at its last layer and longest context, and its tokenizer."""
    return dmsae.load_model(Config(model=str(lm), layer=1, ctx=64, device="cpu"))


def replace_weights(folder):
    """Put another model of the same shape into a model folder."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(1)
    config = AutoConfig.from_pretrained(folder)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def replace_in(path, old, new):
    path.write_text(path.read_text("utf-8").replace(old, new), "utf-8")


def swap_two_words(folder):
    """Give two words of the tokenizer in a model folder each other's id."""
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text("utf-8"))
    vocab = data["model"]["vocab"]
    vocab["s"], vocab["n"] = vocab["n"], vocab["s"]
    path.write_text(json.dumps(data), "utf-8")


def command(lm, out, **changes):
    """A command line of a run that takes about a second."""
    words = dict(model=lm, text=lm / "text.txt", separator="|||", layer=0, ctx=32, d_sae=128, k=6)
    words |= dict(tokens=12_800, batch=128, lr=3e-3, cycles=1, attribution_tokens=1000)
    words |= dict(device="cpu", out=out) | changes
    given = {f"--{name.replace('_', '-')}": v for name, v in words.items() if v is not None}
    return [word for flag, value in given.items() for word in (flag, str(value))]


def refusal(capsys, argv, program=dmsae):
    """The one line with which a command must end, with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        program.main(argv)
    *before, line = capsys.readouterr().err.splitlines()
    assert end.value.code == 2
    assert line.startswith(f"{program.__name__}: ")
    assert not [other for other in before if "dmsae:" in other or "Traceback" in other]
    return line


def spied(monkeypatch, owner, name):
    """The calls of owner.name from now on, as (arguments, result): a list that grows."""
    calls = []
    real = getattr(owner, name)

    def spy(*args):
        calls.append((args, real(*args)))
        return calls[-1][1]

    monkeypatch.setattr(owner, name, spy)
    return calls


def weights(out, cycle):
    return load_file(Path(out) / f"cycle{cycle}" / "sae_weights.safetensors")


def saved_core(out, cycle):
    return load_file(Path(out) / f"cycle{cycle}" / "core.safetensors")


def metadata(out, cycle):
    return json.loads((Path(out) / f"cycle{cycle}" / "cfg.json").read_text("utf-8"))["metadata"]


def result(out, cycle):
    return metadata(out, cycle)["result"]


def measured(out):
    return json.loads((Path(out) / "config.json").read_text("utf-8"))["measured"]


def assert_same(a, b, cycles):
    """SAEs and cores of two runs must be bitwise the same."""
    for cycle in cycles:
        for read in (weights, saved_core):
            x, y = read(a, cycle), read(b, cycle)
            assert x.keys() == y.keys()
            assert all(torch.equal(x[name], y[name]) for name in x), cycle


@pytest.fixture(scope="session")
def watched(lm, tmp_path_factory):
    """A run of three cycles by main: its folder `out`, what it `printed`, calls of functions."""
    out = tmp_path_factory.mktemp("run") / "out"
    printed = io.StringIO()
    names = "update", "update_threshold", "fast_training_loss", "attribute", "harvest"
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        calls = {name: spied(patch, dmsae, name) for name in names}
        dmsae.main(command(lm, out, cycles=3))
    return SimpleNamespace(out=out, printed=printed.getvalue(), **calls)


@pytest.fixture(scope="session")
def story(watched):
    """The folder of the shared run."""
    return watched.out


# ---- Hard cases, and the definition of the loss -------------------------------------------------
OTHERS = {"few positive": -6, "nothing positive": -99}  # what is added to their b_enc
CORE = {"core over budget": 9, "nothing positive": -99}
THRESHOLDS = {"thresholds of 0": 0, "huge thresholds": 1e6, "negative thresholds": -1}
THRESHOLDS |= {"equal values": 1, "unequal thresholds": torch.tensor([0.0, 6.0]).repeat(32)}
KINDS = ["plain", "budget above all", "negative dead", "one prefix", "one token"]
KINDS += sorted({*OTHERS, *CORE, *THRESHOLDS})


def hard_case(kind, n_core=0, n_dead=0):
    """SAE, batch x (B, 8), k, and indices of dead latents, of one of the KINDS."""
    sae = random_sae(widths=[64] if kind == "one prefix" else [13, 25, 64], n_core=n_core)
    x = torch.randn(1 if kind == "one token" else 16, 8).double()
    dead = n_core + torch.randperm(64 - n_core)[:n_dead]
    k = {"core over budget": 2, "budget above all": 70}.get(kind, 11)
    with torch.no_grad():
        sae.b_enc[n_core:] += OTHERS.get(kind, 0)
        sae.b_enc[:n_core] += CORE.get(kind, 0)
        sae.b_enc[dead] -= 99 * (kind == "negative dead")
        sae.threshold[:] = torch.as_tensor(THRESHOLDS.get(kind, sae.threshold))
        for tensor in (x, *sae.parameters()) if kind == "equal values" else ():
            tensor.round_()
    return sae, x, k, dead


def naive_topk(pre, threshold, n_core, k):
    """What is on in training, (token, latent) by (token, latent), and the smallest one kept."""
    size = {at: pre[at].item() for at in itertools.product(*map(range, pre.shape))}
    positive = [at for at in size if size[at] > 0]
    core = [(t, i) for t, i in positive if i < n_core and size[t, i] > threshold[i]]
    others = [(t, i) for t, i in positive if i >= n_core]
    budget = max(len(pre) * k - len(core), len(pre) * max(1, k // 10))
    largest = sorted((size[at] for at in others), reverse=True)[:budget]
    smallest_kept = largest[-1] if largest else 0
    return sorted(core + [at for at in others if size[at] >= smallest_kept]), smallest_kept


def naive_training_loss(sae, x, k, dead):
    """The loss as the paper defines it, term by term."""
    B, D = x.shape
    pre = ((x[:, None] - sae.b_dec) * sae.W_enc).sum(2) + sae.b_enc  # (B, F)
    on, smallest_kept = naive_topk(pre.detach(), sae.threshold, sae.n_core, k)

    def decoded(t, latents):
        return (pre[t, latents, None] * sae.W_dec[latents]).sum(0)

    loss = 0
    residual = []
    for t in range(B):
        for width in sae.widths:
            x_hat = decoded(t, [i for s, i in on if s == t and i < width]) + sae.b_dec
            loss = loss + (x[t] - x_hat).square().sum() / (B * len(sae.widths) * D)
        residual.append((x[t] - x_hat).detach())
    mean = sum(residual) / B
    variance = sum((r - mean).square().sum() for r in residual)
    for t in range(B if len(dead) and B > 1 else 0):
        best = sorted(dead.tolist(), key=lambda i: -pre[t, i])[: D // 2]
        x_hat = decoded(t, [i for i in best if pre[t, i] > 0])
        loss = loss + (residual[t] - x_hat).square().sum() / variance / 32
    fired = torch.tensor([i for _, i in on]).long().bincount(minlength=len(sae.b_enc))
    return loss, fired, torch.tensor(smallest_kept, dtype=torch.float64)


def outcome(loss_function, sae, x, k, dead):
    """All that a loss function returns, and its gradients, by name."""
    sae.zero_grad()
    loss, fired, smallest_kept = loss_function(sae, x, k, dead)
    loss.backward()
    grads = {name: p.grad for name, p in sae.named_parameters()}
    return dict(loss=loss.detach(), fired=fired, smallest_kept=smallest_kept, **grads)


def assert_equal_to_1e_12(got, want):
    for name, value in want.items():
        assert (got[name] - value).abs().max() <= 1e-12 * max(1, value.abs().max()), name


def test_hard_cases_are_what_they_are_called():
    """Each kind of batch must have the property that makes it hard."""
    seen = {}
    for kind in KINDS:
        sae, x, k, _ = hard_case(kind, n_core=5)
        pre = pre_of(sae, x)
        core = int((pre[:, :5] > sae.threshold[:5].clamp_min(0)).sum())
        others = pre[:, 5:].flatten().sort(descending=True).values
        left = len(x) * k - core  # for the others, which are positive, or not below the last kept
        kept = int((others >= others[min(left, len(others)) - 1]).sum())
        at_threshold = int((pre[:, :5] == sae.threshold[:5]).sum())
        seen[kind] = core, left, int((others > 0).sum()), kept, at_threshold
    core, left, positive, kept, _ = seen["plain"]
    assert 0 < core < left == kept < positive
    core, left, positive, kept, at_threshold = seen["equal values"]
    assert left + 9 < kept < positive
    assert at_threshold > 0
    core, left, positive, *_ = seen["few positive"]
    assert 0 < positive < left
    core, _, positive, *_ = seen["nothing positive"]
    assert core == positive == 0
    assert seen["core over budget"][1] < 0
    assert seen["budget above all"][1] > 64 * 16


# ---- BatchTopK ----------------------------------------------------------------------------------
def test_budget_and_smallest_of_largest_by_hand():
    """The others must get what the core leaves of k per token, at least k / 10, at least one; of
    their n largest values the last positive one counts, and 0 where there is none."""
    for n_core_active, k, want in ((20, 6, 76), (40, 2, 16), (16 * 39, 40, 64)):
        assert dmsae.shared_budget(16, k, n_core_active) == want
    cases = ([3, 1, 2], 2, 2), ([3, -1, 2], 3, 2), ([3, 1], 9, 1), ([0, -1], 1, 0), ([], 3, 0)
    for values, n, want in cases:
        assert dmsae.smallest_of_largest(torch.tensor(values).float(), n) == want


@pytest.mark.parametrize("factor", [None, 0.0, 0.5, 1.0, 1.04, 1.3, 30.0])
@pytest.mark.parametrize("n_core", [0, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_both_versions_of_batch_topk_are_its_definition(kind, n_core, factor):
    """What is on, in order, and the smallest one kept must be what a sort of all entries gives: for
    the thresholds of the case, or `factor` times the smallest one kept."""
    sae, x, k, _ = hard_case(kind, n_core)
    pre = pre_of(sae, x)
    want, smallest_kept = naive_topk(pre, sae.threshold, n_core, k)
    if factor is not None:
        sae.threshold[n_core:] = factor * smallest_kept
    acts, least = batch_topk(pre, sae.threshold, n_core, k)
    value, row, col, sparse_least = sparse_topk(pre, sae.threshold, n_core, k)
    assert [*zip(row.tolist(), col.tolist(), strict=True)] == want
    assert torch.equal(torch.stack([row, col], 1), acts.nonzero())
    assert torch.equal(value, pre[row, col])
    assert torch.equal(value, acts[row, col])
    assert smallest_kept == least == sparse_least


# ---- The loss -----------------------------------------------------------------------------------
@pytest.mark.parametrize("n_dead", [0, 3, 20, 40])
@pytest.mark.parametrize("n_core", [0, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_both_versions_of_the_loss_are_its_definition(kind, n_core, n_dead):
    """All that is returned, and all gradients, must be those of sums written out term by term."""
    case = hard_case(kind, n_core, n_dead)
    plain = outcome(training_loss, *case)
    assert_equal_to_1e_12(outcome(fast_training_loss, *case), plain)
    if kind != "equal values" or n_dead < 4:  # Of more dead latents with equal values any will do.
        assert_equal_to_1e_12(plain, outcome(naive_training_loss, *case))
    names = ["b_dec"] if kind == "nothing positive" else ["W_enc", "b_enc", "W_dec", "b_dec"]
    assert all(plain[name].abs().max() > 1e-4 for name in names)


@pytest.mark.parametrize("loss_function, large", [(training_loss, 1), (fast_training_loss, 0)])
def test_the_fast_loss_keeps_nothing_of_the_size_of_all_activations(loss_function, large):
    """No tensor of even half of B x F may wait for its backward pass, as it does for the plain."""
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()), len):
        loss_function(random_sae(), torch.randn(100, 8).double(), 4, torch.arange(0))
    assert (max(sizes) > 100 * 64 / 2) == large


# ---- One step of the optimiser ------------------------------------------------------------------
def seen_by_adam(sae, lr=1e-3):
    """An Adam, and the list of the gradients that reach it, a list for each step."""
    adam, seen = torch.optim.Adam(sae.parameters(), lr), []
    adam.register_step_pre_hook(lambda *_: seen.append([p.grad.clone() for p in sae.parameters()]))
    return adam, seen


@pytest.mark.parametrize("size", [1e-4, 0.02, 10.0])  # norms far below 1, above it, far above
def test_the_gradient_reaches_adam_whole(size):
    """Of what Adam sees, the decoder rows' own part must be gone, and nothing scaled or clipped."""
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
    assert not torch.equal(sae.W_dec, rows)


def test_core_rows_stay_bitwise_through_the_optimiser():
    """Adam must never move them, only their decoder rows and biases; no gradient may be left."""
    sae = random_sae(n_core=5, dtype=torch.float32)
    nn.init.constant_(sae.b_enc, 1.0)
    adam, seen = seen_by_adam(sae)
    before = {name: p.detach().clone() for name, p in sae.named_parameters()}
    for step in range(20):
        fast_training_loss(sae, torch.randn(64, 8), 16, torch.arange(50, 64))[0].backward()
        assert step or sae.W_enc.grad[:5].any(dim=1).all()
        update(sae, adam, 1e-2)
        assert all(p.grad is None for p in sae.parameters())
    assert torch.equal(sae.W_enc[:5], before["W_enc"][:5])
    assert not any(step[0][:5].any() for step in seen)
    assert (sae.W_enc[5:] != before["W_enc"][5:]).any(dim=1).sum() > 40
    assert (sae.W_dec[:5] != before["W_dec"][:5]).any(dim=1).all()
    assert (sae.b_enc[:5] != before["b_enc"][:5]).all()


def test_learning_rate_warms_up_holds_and_falls_to_zero():
    """A tenth of a short run (of a long one 1000 steps) must go up, the last fifth down."""
    rates = [dmsae.learning_rate(step, 100, 2.0) for step in range(101)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert set(rates[9:81]) == {2.0}
    assert rates[81:] == pytest.approx([2.0 * i / 20 for i in range(19, -1, -1)])
    assert dmsae.learning_rate(499, 100_000, 2.0) == 1.0


def test_threshold_follows_the_last_tenth_of_the_steps():
    """A smallest activation that doubles half-way must be forgotten by the end; gates of the core
    must not be touched; in a long run the last 100 steps weigh 1 - 0.99^100 = 0.634."""
    sae = random_sae(n_core=5)
    gates = sae.threshold[:5].clone()
    for step in range(100):
        update_threshold(sae, torch.tensor(1.0 if step < 50 else 2.0).double(), step)
        assert step or set(sae.threshold[5:].tolist()) == {1.0}, "the first step sets it"
    assert (sae.threshold[5:] - 2).abs().max() < 0.01
    assert torch.equal(sae.threshold[:5], gates)
    for step in range(5000, 5100):
        update_threshold(sae, torch.tensor(3.0).double(), step)
    assert sae.threshold[-1] == pytest.approx(2 + 0.634, abs=0.01)


# ---- The SAE ------------------------------------------------------------------------------------
def test_encode_by_hand():
    """A latent must be on above its threshold, not at it, and never below zero; x must be 2-D."""
    sae = MatryoshkaSAE(2, [2, 3])
    with torch.no_grad():
        sae.W_enc.copy_(torch.tensor([[1.0, 0], [0, 1], [1, 1]]))
        sae.b_dec.copy_(torch.tensor([1.0, -1]))
    sae.threshold.copy_(torch.tensor([2.0, 1, -9]))
    x = torch.tensor([[3.0, 0.5], [4, 0], [0, -1]])  # minus b_dec: (2, 1.5), (3, 1), (-1, 0)
    assert sae.encode(x).tolist() == [[0, 1.5, 3.5], [3, 0, 4], [0, 0, 0]]
    assert sae.encode(x, 2).tolist() == [[0, 1.5], [3, 0], [0, 0]]
    with pytest.raises(ValueError, match="flatten"):
        sae.encode(x[None])


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


def fit(widths, batch, k, steps, lr, dead=None, b_enc=0.0):
    """An SAE trained on batch(step) -> (B, D), and how often each latent fired in each step. dead:
    those to revive, by default those that have not fired for 20 steps."""
    torch.manual_seed(0)
    sae = MatryoshkaSAE(32, widths)
    sae.b_enc.data += b_enc
    adam = torch.optim.Adam(sae.parameters())
    silent = torch.zeros(len(sae.b_enc))
    history = []
    for step in range(steps):
        revived = (silent > 20).nonzero()[:, 0] if dead is None else dead
        loss, fired, smallest_kept = fast_training_loss(sae, batch(step), k, revived)
        loss.backward()
        update(sae, adam, dmsae.learning_rate(step, steps, lr))
        update_threshold(sae, smallest_kept, step)
        silent = (silent + 1) * (fired == 0)
        history.append(fired)
    return sae, history


def test_planted_parents_are_found_in_the_first_prefix():
    """Where a child only comes with its parent, prefix 0 must hold every parent; a plain SAE of
    the same size must not (its latents are parent + child, at a cosine of 1 / sqrt(1 + 0.6^2) =
    0.857: absorption). On new data the thresholds must give k active latents within 5 %."""
    parents, batch = planted()
    worst = []
    for widths in ([10, 48], [48]):
        sae, _ = fit(widths, lambda step: batch(step, 256), k=2, steps=600, lr=5e-3)
        best = (sae.W_dec[: widths[0]] @ parents.T).max(0)  # over latents, for each parent
        assert len(set(best.indices.tolist())) == 6
        worst.append(best.values.min().item())
        l0 = (sae.encode(batch(10_000, 4096)) > 0).sum(1).float().mean()
        assert l0 == pytest.approx(2, rel=0.05)
    assert worst[0] > 0.9
    assert worst[1] < 0.87


def test_dead_latents_come_back():
    """Latents that lose every BatchTopK must win some after the dead-latent loss, fewer without."""
    _, batch = planted()
    b_enc = torch.where(torch.arange(48) < 24, 0.0, -0.6)
    wins = []
    for dead in (torch.arange(24, 48), torch.arange(0)):
        _, history = fit([6, 48], lambda step: batch(step % 100), 3, 101, 3e-3, dead, b_enc)
        wins += [int(history[step][24:].sum()) for step in (0, 100)]  # both times on batch(0)
    assert wins[0] == wins[2] < wins[1]
    assert wins[3] < wins[1]


# ---- The language model -------------------------------------------------------------------------
def test_residual_stream_is_the_layers_output_and_stops_there(lm):
    """It must equal transformers' own hidden states, and run neither later layers nor the head."""
    model, ids = load_tiny(lm)[0], torch.randint(3, 300, (2, 10))
    want = model(ids, output_hidden_states=True).hidden_states[1]
    ran = []
    for m in (dmsae.decoder_layers(model)[1], model.lm_head):
        m.register_forward_hook(lambda *_: ran.append(1))
    assert torch.equal(dmsae.residual_stream(model, 0, ids), want)
    assert not ran
    assert model.config._attn_implementation == "eager", "soft-capping needs eager attention"


@pytest.mark.parametrize("rest", [(), ("cache",)])
def test_splicing_takes_tensors_and_tuples(rest):
    """Tuples (transformers 4) and tensors must be replaced while open, and left alone after."""
    toy, h = random_toy(5), torch.ones(3)
    toy.layers[0].forward = lambda h: (h, *rest) if rest else h
    with dmsae.spliced(toy, 0, lambda h: 2 * h):
        inside = toy.layers[0](h)
    after = toy.layers[0](h)
    if rest:
        assert inside[1:] == after[1:] == rest
        inside, after = inside[0], after[0]
    assert torch.equal(inside, 2 * h)
    assert torch.equal(after, h)


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
    """What one sentence does not show must be seen before anything not finite is in config.json."""
    words, harvest = command(lm, tmp_path / "out", cycles=0), dmsae.harvest
    monkeypatch.setattr(
        dmsae, "harvest", lambda *at: harvest(*at).index_fill(0, torch.tensor([5]), math.nan)
    )
    assert "nan or inf in the first training block" in refusal(capsys, words)
    assert "measured" not in json.loads((tmp_path / "out" / "config.json").read_text("utf-8"))
    monkeypatch.undo()
    dmsae.main(words)


def change_weight(lm, change):
    """Put change(tensor), or nothing where that is None, into a model of two layers."""
    w = load_file(lm / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    w[name] = change(w[name])
    kept = {name: t for name, t in w.items() if t is not None}
    save_file(kept, lm / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda lm: (lm / "config.json").unlink(), "--model {}: cannot be used; if it was not"),
        (lambda lm: (lm / "model.safetensors").unlink(), "--model {}: cannot be used"),
        (lambda lm: (lm / "tokenizer.json").unlink(), "--model {}: cannot be used"),
        (lambda lm: replace_in(lm / "tokenizer_config.json", "_token", "_"), "--model: its tokeni"),
        (lambda lm: change_weight(lm, lambda w: w * math.nan), "{}.*next-token loss is nan"),
        (lambda lm: change_weight(lm, lambda w: None), "{}.*lacks.*layers.1.mlp.down_proj.weight"),
    ],
)
def test_a_folder_that_is_no_whole_model_is_refused(own_lm, tmp_path, capsys, damage, words):
    """What is missing, or NaN in any layer, must be refused before the text is tokenised."""
    damage(own_lm)
    line = refusal(capsys, command(own_lm, tmp_path / "out"))
    assert re.search(words.format(own_lm), line)
    assert not (tmp_path / "out" / "tokens.bin").exists()


def test_checksum_is_of_all_weights_their_names_and_the_vocabulary():
    """It must be another after any change, and the same in bfloat16, which is how a GPU has it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).bfloat16().float()
    words = dict(a=0, b=1)

    def checksum(model, words):
        return dmsae.checksum(model, SimpleNamespace(get_vocab=lambda: words))

    seen = [checksum(model, words), checksum(model, dict(a=1, b=0)), checksum(model, dict(a=0))]
    assert checksum(model.bfloat16(), dict(reversed(words.items()))) == seen[0]
    for p in model.parameters():
        p.data.flatten()[-1] += 1
        seen.append(checksum(model, words))
    seen.append(checksum(nn.ModuleDict(dict(zip("ab", model, strict=True))), words))
    assert len(set(seen)) == len(seen) == 8
    assert all(re.fullmatch("[0-9a-f]{8}", code) for code in seen)


# ---- Text ---------------------------------------------------------------------------------------
def test_documents_are_packed_with_bos_first_and_between(lm, tmp_path):
    """The stream must be doc BOS doc BOS... whole up to the limit, contexts begin with BOS."""
    _, tokenizer = load_tiny(lm)
    docs = ["the cat sat", "", "a dog ran to the house"] * 20  # more than one call takes
    plain = [tokenizer(d, add_special_tokens=False)["input_ids"] for d in docs if d]
    want = [i for doc in plain for i in (*doc, 2)]
    path = tmp_path / "t"
    for limit in (10**6, len(want), len(want) - 3, 4):
        dmsae.tokenize(iter(docs), tokenizer, 2, limit, path, 300)
        assert np.fromfile(path, np.int32).tolist() == want[:limit]
    ids, keep = dmsae.contexts(np.array(want[:9], np.int32).reshape(3, 3), [2, 1, 0])
    assert ids.tolist() == [[2, *want[3 * i : 3 * i + 3]] for i in range(3)]
    assert torch.equal(keep, ids > 2)
    assert [*tmp_path.glob("*")] == [path]


def write_text(path, content):
    """A text file of the kind that its name says: content is its text, or a list of rows."""
    if path.suffix == ".txt":
        path.write_text(content, "utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"text": row}) + "\n" for row in content), "utf-8")
    else:
        from datasets import Dataset

        Dataset.from_dict({"text": content}).to_parquet(path)
    return path


@pytest.mark.parametrize(
    "name, content, separator, want",
    [
        ("t.txt", "one\ntwo|three", None, ["one\ntwo|three"]),
        ("t.txt", "one\ntwo|three", "|", ["one\ntwo", "three"]),
        ("t.txt", "one\n\ntwo\nlines\n\nthree", "\n\n", ["one", "two\nlines", "three"]),
        ("t.txt", "one\n\ntwo\nlines\n\nthree", r"\n\n", ["one", "two\nlines", "three"]),
        ("t[1].txt", "no pattern", None, ["no pattern"]),
        ("t.jsonl", ["one|two", None, "three"], None, ["one|two", "", "three"]),
        ("t.jsonl", ["one|two", None, "three"], "|", ["one", "two", "", "three"]),
        ("t.parquet", ["one|two", None, "three"], None, ["one|two", "", "three"]),
        ("t.parquet", ["one|two", None, "three"], "|", ["one", "two", "", "three"]),
    ],
)
def test_local_files_give_their_documents(name, content, separator, want, tmp_path):
    """.txt must be one document, others a row each; separators split; no text must stop nothing."""
    (tmp_path / "t1.txt").write_text("not this", "utf-8")
    cfg = Config(text=str(write_text(tmp_path / name, content)), separator=separator)
    assert [*dmsae.documents(cfg)] == want


def test_a_dataset_can_name_a_configuration(monkeypatch):
    """name:configuration must reach load_dataset as its two arguments."""
    import datasets

    signature = inspect.signature(datasets.load_dataset)

    def load_dataset(*args, **words):
        given = signature.bind(*args, **words).arguments
        return [{"text": f"{given['path']} {given.get('name')} {given['split']}"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for dataset, want in (("wikitext:raw", "wikitext raw train"), ("a/b", "a/b None train")):
        assert [*dmsae.documents(Config(dataset=dataset))] == [want]


def test_ids_beyond_the_embedding_are_refused(own_lm, tmp_path, capsys):
    """A word added to the tokenizer alone must be refused where it occurs, and only there."""
    _, tokenizer = load_tiny(own_lm)
    tokenizer.add_tokens(["sat on"])
    tokenizer.save_pretrained(own_lm)
    words = command(own_lm, tmp_path / "out")
    assert "token id 300: the model has 300 embeddings" in refusal(capsys, words)
    docs = iter(["the cat ran to house"])
    dmsae.tokenize(docs, tokenizer, 2, 99, tmp_path / "t", 300)
    assert (tmp_path / "t").exists()


@pytest.mark.parametrize(
    "n_eval, n_attribution, tokens, sizes",
    [
        (62, 90, 3000, (2, 3, 98)),  # as asked for: 62 / 31, 90 / 31 upwards, 1.02 * 3000 / 31
        (90, 31, 3000, (3, 1, 98)),
        (10**6, 1000, 10**6, (55, 55, 990)),  # a short text: a tenth of it, and each a half
        (62, 10**6, 10**6, (2, 108, 990)),  # a tenth of it, of which evaluation takes little
    ],
)
def test_the_first_contexts_are_held_out(lm, tmp_path, n_eval, n_attribution, tokens, sizes):
    """Evaluation, attribution and training must follow each other in the text, in the sizes asked
    for, or in those that a short text allows; a second call must read the file of the first."""
    cfg = Config(text=str(lm / "text.txt"), separator="|||", ctx=32, tokens=tokens)
    cfg.eval_tokens, cfg.attribution_tokens = n_eval, n_attribution
    (_, tokenizer), toy = load_tiny(lm), random_toy(300)
    parts = dmsae.open_text(cfg, toy, tokenizer, tmp_path)
    assert tuple(map(len, parts)) == sizes
    ids = np.fromfile(tmp_path / "tokens.bin", np.int32)
    assert np.array_equal(np.concatenate(parts).flatten(), ids[: 31 * sum(sizes)])
    cfg.text = "no.txt"
    assert all(map(np.array_equal, dmsae.open_text(cfg, toy, tokenizer, tmp_path), parts))


def bare_run(model, rows, **changes):
    """A Run of a model and rows of a text, which opens no file."""
    run = dmsae.Run.__new__(dmsae.Run)
    run.cfg = Config(layer=0, ctx=1 + rows.shape[1], device="cpu", **changes)
    run.model = model
    run.rows = rows.astype(np.int32)
    run.special = [2, 1, 0]
    run.scale = 2.0
    run.norm_limit = math.inf
    run.checksum = "0" * 8
    return run


def some_rows(n, width=7):
    return np.random.default_rng(0).integers(3, 300, (n, width))


def test_blocks_are_fixed_by_number_and_read_the_text_in_turn(monkeypatch):
    """A number must give the same contexts for every seed; each must come once in a pass."""
    monkeypatch.setattr(dmsae, "harvest", lambda model, layer, ids, keep: ids)
    rows = np.arange(5, 20)[:, None].repeat(3, 1)

    def block(number, seed=0):
        return bare_run(None, rows, seed=seed).block(number, 5)

    assert torch.equal(block(1), block(1, seed=1))
    seen = torch.cat([block(i)[:, 1] for i in range(3)])
    assert seen.tolist() != sorted(seen.tolist()) == list(range(5, 20))
    assert torch.equal(block(3), block(0))


@pytest.mark.parametrize("ids, want", [([0, 1, 2], [0, 1, 2]), ([None, 1, None], [1])])
def test_bos_or_else_eos_begins_every_context(ids, want):
    """The special tokens that a tokenizer has must come in this order: BOS, EOS, PAD."""
    names = "bos_token_id", "eos_token_id", "pad_token_id"
    tokenizer = SimpleNamespace(**dict(zip(names, ids, strict=True)))
    assert dmsae.special_tokens(tokenizer) == want


def test_batches_have_an_order_of_their_own_and_resume_at_any_step(lm, monkeypatch):
    """Activations, scaled, must be the same in every training and seed; their order must not; and
    the batch of a step must be the same whether or not the ones before were drawn."""
    monkeypatch.setattr(dmsae, "BLOCK", 64 * 14 + 5)
    model, rows = load_tiny(lm)[0], some_rows(128)  # Block 1 is block 0 again.
    seeds = [bare_run(model, rows, batch=14, seed=seed) for seed in (0, 1)]

    def blocks(run, training):
        return torch.cat([*itertools.islice(run.batches(training), 128)]).split(64 * 14)

    (a, b), (c, _), (d, _) = blocks(seeds[0], 0), blocks(seeds[0], 1), blocks(seeds[1], 0)
    ids, _ = dmsae.contexts(rows, [2, 1, 0])
    want = 2 * dmsae.residual_stream(model, 0, ids)[:, 1:].flatten(0, 1)
    for one, other in itertools.combinations([a, b, c, d], 2):
        assert not torch.equal(one, other)
    for one in (a, b, c, d):
        assert torch.equal(one.sort(0).values, want.sort(0).values)
    for step in (1, 63, 64, 65, 127):
        resumed = torch.cat([*itertools.islice(seeds[0].batches(0, step), 128 - step)])
        assert torch.equal(resumed, torch.cat([a, b])[14 * step :])


# ---- Evaluation and attribution -----------------------------------------------------------------
def test_attribution_is_exact_and_evaluation_changes_nothing():
    """a_i(t) must be the derivative of the loss when latent i at token t is scaled, the rest of
    the narrowest reconstruction held fixed; SAE and language model must stay bit for bit."""
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = dict(vocab_size=300, n_embd=32, n_layer=2, n_head=2, n_positions=16)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**shape, initializer_range=0.3))
    model = model.double().eval().requires_grad_(False)
    ids = torch.randint(3, 300, (3, 9))
    ids[:, 0] = 2
    ids[1, 4] = 1
    keep = ids > 2
    sae = random_sae(32, (12, 40), n_core=4)
    x = dmsae.harvest(model, 0, ids, keep)
    sae.b_dec.data = x.mean(0)
    before = {n: t.clone() for m in (sae, model) for n, t in m.state_dict().items()}
    evaluate(sae, x)
    mean_loss(model, 0, ids, keep, sae)
    score, density = attribute(model, 0, ids, keep, sae)
    after = {n: t for m in (sae, model) for n, t in m.state_dict().items()}
    assert all(torch.equal(t, after[n]) for n, t in before.items())
    assert all(p.grad is None for p in (*sae.parameters(), *model.parameters()))
    assert not dmsae.decoder_layers(model)[0]._forward_hooks
    f = sae.encode(x, 12).detach()
    x_hat, h = (f @ sae.W_dec[:12] + sae.b_dec).detach(), 1e-4

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


def test_attribution_in_several_parts_is_exact():
    """Score and density of contexts that come in several parts must be the means over the parts."""
    toy, sae = random_toy(50), random_sae(dtype=torch.float32)
    ids = torch.randint(1, 50, (306, 10))
    whole = attribute(toy, 0, ids, ids > 0, sae)
    parts = [attribute(toy, 0, part, part > 0, sae) for part in ids.split(102)]
    for mean, values in zip(whole, zip(*parts, strict=True), strict=True):
        assert torch.allclose(mean, sum(values) / 3, rtol=1e-5)
        assert not torch.allclose(mean, values[-1], rtol=1e-3)


def test_evaluation_by_hand():
    """FVU, L0 and the core's L0 must be as defined, in parts too, and shifts must not matter."""
    sae, x = random_sae(n_core=5, dtype=torch.float32), torch.randn(5000, 8)
    acts = sae.encode(x)
    variance = (x - x.mean(0)).pow(2).sum()
    x_hats = [acts[:, :w] @ sae.W_dec[:w] + sae.b_dec for w in sae.widths]
    fvu = [(x - x_hat).pow(2).sum() / variance for x_hat in x_hats]
    got = evaluate(sae, x)
    assert got["fvu"] == pytest.approx([f.item() for f in fvu], rel=1e-4)
    assert got["l0"] == pytest.approx((acts > 0).sum(1).float().mean().item())
    assert got["core_l0"] == pytest.approx((acts[:, :5] > 0).sum(1).float().mean().item())
    sae.b_dec.data += 1e4
    assert evaluate(sae, x + 1e4)["fvu"] == pytest.approx(got["fvu"], rel=1e-3)


@pytest.mark.parametrize("shape", [(600, 10), (2, 1500)])
def test_mean_loss_by_hand(shape):
    """Cross-entropy at kept positions, of many contexts, or of one that is longer than a part."""
    toy, sae = random_toy(50), random_sae(dtype=torch.float32)
    ids = torch.randint(1, 50, shape)
    ids[:, 0] = 0
    ids[1, 3:6] = 0
    keep = ids > 0
    h = toy.embedding[ids]

    def loss(h):
        logits = (h @ toy.head)[:, :-1][keep[:, :-1]]
        return F.cross_entropy(logits, ids[:, 1:][keep[:, :-1]]).item()

    with_sae = h.clone()
    with_sae[keep] = sae(h[keep]).detach()
    assert mean_loss(toy, 0, ids, keep, sae) == pytest.approx(loss(with_sae), rel=1e-5)
    assert mean_loss(toy, 0, ids, keep, nn.Identity()) == pytest.approx(loss(h), rel=1e-5)
    assert mean_loss(toy, 0, ids, keep, torch.zeros_like) == pytest.approx(math.log(50), rel=1e-5)


def test_a_model_in_bfloat16_is_measured_in_float32():
    """The SAE must get float32 at the layer, and the loss be that of the logits in float32."""
    toy, seen = random_toy(50, torch.bfloat16), []
    ids = torch.randint(1, 50, (4, 10))
    loss = spliced_loss(toy, 0, ids, ids > 0, lambda x: seen.append(x.dtype) or x)
    logits = (toy.embedding[ids] @ toy.head)[:, :-1].float()
    want = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    assert seen == [torch.float32]
    assert loss == pytest.approx(want.item(), rel=1e-6)


# ---- Positions of large norm --------------------------------------------------------------------
def test_positions_above_the_limit_are_left_out():
    """keep must lose those whose norm is above the limit, not those at it, and gain none."""
    toy = random_toy(5)
    toy.embedding[:] = torch.tensor([1.0, 1, 3, 3.01, 99])[:, None] * torch.eye(8)[0]
    ids = torch.tensor([[0, 1, 2, 3, 4], [4, 3, 2, 1, 0]])
    keep = dmsae.without_outliers(toy, 0, ids, ids != 1, 3.0)
    assert keep.tolist() == [[True, False, True, False, False], [False, False, True, False, True]]
    assert torch.equal(dmsae.without_outliers(toy, 0, ids, ids != 1, math.inf), ids != 1)


def test_one_word_of_huge_norm_changes_nothing_for_the_others(lm, tmp_path, monkeypatch):
    """Where a word has 128 times its norm (the layer above sees no difference; a power of two costs
    no digit), all must be bitwise as if it were special; with --max-norm 0 it must drown the rest,
    although the same cache is read."""
    _, tokenizer = load_tiny(lm)
    (word,) = tokenizer(" spring")["input_ids"]
    changes = dict(cycles=0, tokens=6400, cache=tmp_path / "cache")
    with monkeypatch.context() as patch:
        special = dmsae.special_tokens
        patch.setattr(dmsae, "special_tokens", lambda tokenizer: [*special(tokenizer), word])
        dmsae.main(command(lm, tmp_path / "without", **changes))
    shutil.rmtree(tmp_path / "cache")
    load = dmsae.load_model

    def planted_model(cfg):
        model, tokenizer = load(cfg)
        at = []
        model.register_forward_pre_hook(lambda m, args: at.append((args[0] == word)[..., None]))
        read, after = dmsae.decoder_layers(model)[:2]
        read.register_forward_hook(lambda m, args, h: torch.where(at[-1], 128 * h, h))
        after.register_forward_pre_hook(
            lambda m, args: (torch.where(at[-1], args[0] / 128, args[0]), *args[1:])
        )
        return model, tokenizer

    monkeypatch.setattr(dmsae, "load_model", planted_model)
    dmsae.main(command(lm, tmp_path / "with", **changes))
    assert_same(tmp_path / "without", tmp_path / "with", [0])
    assert result(tmp_path / "without", 0) == result(tmp_path / "with", 0)
    without, planted = measured(tmp_path / "without"), measured(tmp_path / "with")
    for name in ("scale", "ce_original", "ce_zero"):
        assert without[name] == planted[name]
    assert metadata(tmp_path / "with", 0)["max_norm"] == 5
    assert metadata(tmp_path / "with", 0)["median_norm"] == planted["median_norm"]
    harvested = spied(monkeypatch, dmsae, "harvest")
    dmsae.main(command(lm, tmp_path / "off", max_norm=0, **changes))
    assert len(harvested) == 1, "to evaluate"
    assert measured(tmp_path / "off")["scale"] < planted["scale"] / 10
    assert measured(tmp_path / "off")["median_norm"] == planted["median_norm"]


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


def test_selection_at_its_limits():
    """No zeros must be selected, nor one latent too many; nothing to share out must be refused."""
    assert select_core(torch.tensor([0.0, 3.0, 0.0, 1.0]), 1.0).tolist() == [1, 3]
    assert select_core(torch.tensor([1.0, 2.0, 1.0]), 0.75).tolist() == [1, 0]
    for scores in ([0.0, 0.0], [1.0, math.nan], [1.0, math.inf]):
        with pytest.raises(ValueError, match="no core"):
            select_core(torch.tensor(scores), 0.9)


def test_controls_are_as_many_and_others():
    """As many latents must be chosen as by attribution, but the most frequent, or random ones."""
    scores, density = torch.rand(100), torch.rand(100)

    def chosen(select, seed=0, cycle=0):
        return dmsae.choose(Config(select=select, seed=seed), scores, density, cycle).tolist()

    n = len(select_core(scores, 0.9))
    assert chosen("attribution") == select_core(scores, 0.9).tolist()
    assert chosen("frequency") == density.argsort(descending=True)[:n].tolist()
    draws = [chosen("random", *key) for key in ((0, 0), (0, 0), (1, 0), (0, 1))]
    assert draws[0] == draws[1]
    assert [len(set(draw)) for draw in draws] == [n] * 4
    assert len({tuple(draw) for draw in draws}) == 3


def test_identity_votes_and_gates_travel():
    """Old members must keep what they are and gain a vote; newcomers must get theirs."""
    sae = random_sae(widths=(6, 64), n_core=2, dtype=torch.float32)
    old = Core(torch.randn(2, 8), torch.tensor([7.0, 8.0]), torch.tensor([0.1, 0.2]))
    old.birth, old.votes = torch.tensor([[0, 11], [1, 5]]), torch.tensor([3, 1])
    scores, density = torch.arange(6.0).double(), torch.arange(6.0) / 10
    new = next_core(old, sae, torch.tensor([4, 1]), scores, density, 2)
    assert new.birth.tolist() == [[2, 4], [1, 5]]
    assert new.votes.tolist() == [1, 2]
    assert new.index.tolist() == [4, 1]
    assert new.score.tolist() == [4, 1]
    assert torch.equal(new.density, density[[4, 1]])
    assert torch.equal(new.W_enc, torch.stack([sae.W_enc[4], old.W_enc[1]]))
    gate = (sae.b_enc[4] - sae.W_enc[4] @ sae.b_dec).item()
    assert new.bias.tolist() == pytest.approx([gate, 8.0])
    assert torch.equal(new.threshold, torch.stack([sae.threshold[4], old.threshold[1]]))


@pytest.mark.parametrize("mode", ["dynamic", "gated"])
def test_a_new_sae_carries_encoder_rows_and_nothing_else(mode):
    """Core rows must be there bit by bit, all else be fresh; gated must keep the function, dynamic
    have gates at zero; the first threshold must let about k of the others through."""
    donor, x = random_sae(dtype=torch.float32), torch.randn(200, 8)
    ones, no_core = torch.ones(13), Core(torch.zeros(0, 8))
    core = next_core(no_core, donor, torch.arange(5), ones, ones, 0)
    cfg = Config(d_sae=64, k=10, core_sparsity=mode)
    sae, other = (dmsae.new_sae(cfg, core, x * 3, 3.0, training) for training in (1, 2))
    assert torch.equal(sae.W_enc[:5], donor.W_enc[:5])
    assert torch.allclose(sae.W_dec[:5], F.normalize(donor.W_enc[:5]))
    assert not torch.equal(sae.W_enc[5:], other.W_enc[5:]), "a new seed each training"
    assert torch.equal(sae.W_enc[5:], sae.W_dec[5:])
    assert torch.allclose(sae.b_dec, 3 * x.mean(0), atol=1e-6)
    assert (sae.n_core, sae.widths) == (5, [7, 11, 19, 35, 64])
    assert not sae.b_enc[5:].any()
    others = sae.pre_activations(3 * x[:64])[:, 5:].flatten()
    want = others.sort(descending=True).values[64 * 10 - 1]
    assert torch.allclose(sae.threshold[5:], 0.9 * want)
    if mode == "gated":
        got, want = sae.encode(3 * x)[:, :5], donor.encode(x)[:, :5]
        assert torch.equal(got > 0, want > 0)
        assert torch.allclose(got, 3 * want, atol=1e-4)
    else:
        assert not sae.b_enc.any()
        assert not sae.threshold[:5].any()


def test_core_takes_its_place_inside_d_sae():
    """Widths must grow by the core except the last; a core that leaves no room is refused."""
    cfg = Config(d_sae=64, prefixes=(1 / 8, 1 / 2))
    assert cfg.widths() == [8, 32, 64]
    assert cfg.widths(10) == [18, 42, 64]
    assert cfg.widths(31) == [39, 63, 64]
    for n_core in (32, 62, 64):
        with pytest.raises(ValueError, match=f"core of {n_core} to --d-sae 64"):
            cfg.widths(n_core)
    assert Config().widths() == [2048, 6144, 14336, 30720, 65536]


# ---- Training -----------------------------------------------------------------------------------
def test_a_training_counts_its_steps_from_0(watched):
    """Rate and threshold must be those of steps 0 to 99; Adam's eps far below our gradients."""
    rates = [lr for (_, _, lr), _ in watched.update]
    assert rates == 4 * [dmsae.learning_rate(i, 100, 3e-3) for i in range(100)]
    assert {adam.defaults["eps"] for (_, adam, _), _ in watched.update} == {1e-12}
    assert [step for (_, _, step), _ in watched.update_threshold] == 4 * [*range(100)]
    kept = [smallest_kept for (_, smallest_kept, _), _ in watched.update_threshold]
    assert kept == [least for _, (_, _, least) in watched.fast_training_loss]
    assert {k for (_, _, k, _), _ in watched.fast_training_loss} == {6}


def test_rows_are_printed_and_logged(watched):
    """Ten rows of each training and its figures must be on the screen and in log.jsonl."""
    rows = [
        json.loads(line) for line in (watched.out / "log.jsonl").read_text("utf-8").splitlines()
    ]
    printed = re.findall(r"(?m)^ +(\d+) +([\d.]+) +([\d.]+) +([\d.]+) +([\d.]+)%", watched.printed)
    for cycle in range(4):
        assert rows.pop(10).items() <= result(watched.out, cycle).items()
        for step in range(10, 101, 10):
            (sae, _, _, dead), (loss, fired, _) = watched.fast_training_loss[100 * cycle + step - 1]
            row = rows.pop(0)
            want = dict(cycle=cycle, step=step, tokens=128 * step, loss=loss.item())
            want |= dict(l0=fired.sum().item() / 128, dead=len(dead) / 128)
            want |= dict(core_l0=fired[: sae.n_core].sum().item() / 128)
            want |= dict(lr=dmsae.learning_rate(step - 1, 100, 3e-3), seconds=row["seconds"])
            assert row == pytest.approx(want, rel=1e-5)
            want = step, row["loss"], row["l0"], row["core_l0"], 100 * row["dead"]
            assert [*map(float, printed.pop(0))] == pytest.approx(want, abs=0.06)
    assert rows == printed == []
    ids = np.fromfile(watched.out / "tokens.bin", np.int32)
    ids = ids[: len(ids) // 31 * 31]
    assert f"text: {len(ids)} tokens in {(ids == 2).sum()} documents\n" in watched.printed


def test_the_dead_are_those_silent_for_a_tenth_of_the_tokens(lm, tmp_path, monkeypatch):
    """They must be looked for before steps 1, 11, 21, ..., never be of the core, and their share in
    the end be in the result."""
    steps = spied(monkeypatch, dmsae, "fast_training_loss")
    dmsae.main(command(lm, tmp_path, k=1, prefixes=0.5, select="random"))
    core_was_silent = False
    for cycle in (0, 1):
        silent = torch.zeros(128)
        for step, ((sae, _, _, dead), (_, fired, _)) in enumerate(steps[100 * cycle :][:100]):
            if step % 10 == 0:
                want = [i for i in range(sae.n_core, 128) if silent[i] >= 1280]
            assert dead.tolist() == want
            silent = (silent + 128) * (fired == 0)
            core_was_silent |= bool((silent[: sae.n_core] >= 1280).any())
        assert want
        share = (silent[sae.n_core :] >= 1280).sum().item() / 128
        assert result(tmp_path, cycle)["dead"] == pytest.approx(share)
    assert core_was_silent


def train_stub(batches, restore=print, after_step=print, scale=1.0, tokens=10**9):
    """dmsae.train on batches(training, step), with a journal of two functions."""
    cfg = Config(d_sae=64, k=4, tokens=tokens, batch=128)
    run = SimpleNamespace(cfg=cfg, scale=scale, batches=batches)
    journal = SimpleNamespace(saved=dict(step=0), cycle=0, restore=restore, after_step=after_step)
    return dmsae.train(run, Core(torch.zeros(0, 8)), 0, journal)


def test_a_latent_is_dead_after_ten_million_tokens(monkeypatch):
    """10,000,000 silent tokens must be enough in any training; TF32 must be for the SAE alone."""
    seen, precisions = [], []

    def loss_function(sae, x, k, dead):
        seen.append(dead.tolist())
        precisions.append(torch.get_float32_matmul_precision())
        return fast_training_loss(sae, x, k, dead)

    def batches(training, step):
        while len(seen) < 11:
            precisions.append(torch.get_float32_matmul_precision())
            yield torch.randn(128, 8)

    def restore(sae, adam, silent):
        sae.b_enc.data[:2] = -99
        silent[:2] = torch.tensor([10**7 - 128, 10**7])

    monkeypatch.setattr(dmsae, "fast_training_loss", loss_function)
    with pytest.raises(StopIteration):
        train_stub(batches, restore)
    assert seen == [[1]] * 10 + [[0, 1]]
    assert precisions == ["highest", "high"] * 11


def test_a_trained_sae_is_for_activations_as_they_are():
    """sae(x) must be what the last step's SAE makes of s * x, over s; its rows must be as then."""
    x, kept = torch.randn(128, 8), []
    sae, _ = train_stub(
        lambda training, step: itertools.repeat(2.5 * x),
        restore=lambda sae, *_: kept.append(sae),
        after_step=lambda *_: kept.append(copy.deepcopy(kept[0])),
        scale=2.5,
        tokens=1280,
    )
    assert torch.allclose(sae(x), kept[-1](2.5 * x) / 2.5, atol=1e-5)
    assert (sae.encode(x) > 0).any(0).sum() > 10
    assert torch.equal(sae.W_enc, kept[-1].W_enc)
    assert torch.equal(sae.W_dec, kept[-1].W_dec)


def journal_at(folder, monkeypatch, **changes):
    """Of a training whose steps take 4 s each: its journal, SAE, Adam and counter of silent tokens
    after `restore`, and a function after_step(step)."""
    cfg = Config(d_sae=64, batch=16, tokens=1600, out=str(folder), device="cpu", **changes)
    sae, silent = random_sae(dtype=torch.float32), torch.zeros(64).long()
    adam = torch.optim.Adam(sae.parameters())
    clock = SimpleNamespace(time=lambda: clock.now, now=1000)
    monkeypatch.setattr(dmsae, "time", clock)
    journal = dmsae.Journal(cfg, 3)
    journal.restore(sae, adam, silent)

    def after_step(step, loss=0.5):
        for p in sae.parameters():
            p.grad = torch.ones_like(p)
        adam.step()
        silent.add_(1)
        clock.now += 4
        journal.after_step(step, torch.tensor(loss), torch.ones(64), 0)

    return journal, sae, adam, silent, after_step


def test_checkpoints_are_the_minutes_apart(tmp_path, monkeypatch):
    """Of steps of 4 s every twentieth must be kept, where a minute is asked for, and the next
    start give back all; a short file, or one of another kind, must be named, with what to do."""
    kept = spied(monkeypatch, torch, "save")
    *_, sae, adam, silent, after_step = journal_at(tmp_path, monkeypatch, checkpoint_minutes=1)
    for step in range(1, 101):
        after_step(step)
    assert [state["step"] for (state, _), _ in kept] == [20, 40, 60, 80, 100]
    journal, sae_2, adam_2, silent_2, _ = journal_at(tmp_path, monkeypatch)
    assert journal.path.name == "checkpoint3.pt"
    assert journal.saved["step"] == 100
    assert silent_2.tolist() == silent.tolist() == [100] * 64
    for p, p_2 in zip(sae.parameters(), sae_2.parameters(), strict=True):
        assert torch.equal(p, p_2)
        assert all(torch.equal(t, adam_2.state[p_2][name]) for name, t in adam.state[p].items())
    for content in (b"", b"hello", journal.path.read_bytes()[:-100]):
        journal.path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{journal.path}.*move"):
            journal_at(tmp_path, monkeypatch)


@pytest.mark.parametrize("what", ["loss", "weights"])
def test_what_is_not_finite_stops_and_keeps_the_last_good_checkpoint(tmp_path, monkeypatch, what):
    """Both must be looked at: the loss is that before the update, which may break the weights."""
    _, sae, _, _, after_step = journal_at(tmp_path, monkeypatch, checkpoint_minutes=0)
    for step in range(1, 20):
        after_step(step)
    if what == "weights":
        sae.W_dec.data[0, 0] = math.nan
    with pytest.raises(ValueError, match="diverged by step 20: try a smaller --lr"):
        after_step(20, math.nan if what == "loss" else 0.5)
    assert torch.load(tmp_path / "checkpoint3.pt")["step"] == 10


# ---- Whole runs ---------------------------------------------------------------------------------
def test_frozen_rows_are_bitwise_unchanged_and_everything_is_on_disk(story):
    """Core rows must be those chosen before, bit by bit; identities, files and figures complete."""
    for cycle in (1, 2, 3):
        core, now, w = saved_core(story, cycle - 1), saved_core(story, cycle), weights(story, cycle)
        C = len(core["W_enc"])
        assert C > 0
        assert torch.equal(w["W_enc"].T[:C], core["W_enc"])
        assert not torch.allclose(w["W_dec"][:C], F.normalize(core["W_enc"])), "it is trained"
        old = {tuple(b): row for b, row in zip(core["birth"].tolist(), core["W_enc"], strict=True)}
        members = zip(now["birth"].tolist(), now["W_enc"], now["votes"].tolist(), strict=True)
        for birth, row, votes in members:
            assert (votes > 1) == (birth[0] < cycle)
            assert votes == 1 or torch.equal(old[tuple(birth)], row)
        r, kept = result(story, cycle), int((now["index"] < C).sum())
        new, dropped = len(now["index"]) - kept, C - kept
        assert (r["core"], r["kept"], r["new"], r["dropped"]) == (kept + new, kept, new, dropped)
        assert r["cycle"] == cycle
        assert r["core_l0"] > 0
        assert r["l0"] == pytest.approx(max(6, r["core_l0"] + 1), rel=0.15)
        assert len(r["fvu"]) == 5
        assert r["tokens"] == 12_800
    names = "config.json tokens.bin log.jsonl lock cycle0 cycle1 cycle2 cycle3".split()
    assert {path.name for path in story.iterdir()} == {*names}


def test_figures_of_a_run_are_those_of_its_saved_sae(watched, story):
    """Scale, FVU, L0, CE and CE recovered must come out again from the files, on the held-out text;
    attribution must have seen another part of it, and the scale the rest."""
    (model, _, for_attribution, _, _), _ = watched.attribute[-1]
    rows = np.fromfile(story / "tokens.bin", np.int32)
    rows = rows[: len(rows) // 31 * 31].reshape(-1, 31)
    n = len(rows) // 20
    parts = [dmsae.contexts(part, [2, 1, 0]) for part in np.split(rows, [n, 2 * n])]
    (ids, keep), (others, _), training = parts
    assert torch.equal(for_attribution, others)
    sae, r, values = load_sae(story / "cycle3"), result(story, 3), measured(story)
    x = dmsae.harvest(model, 0, ids, keep)
    acts = sae.encode(x)
    error, variance = (x - sae.decode(acts)).pow(2).sum(), (x - x.mean(0)).pow(2).sum()
    assert r["fvu"][-1] == pytest.approx((error / variance).item(), rel=1e-4)
    assert r["l0"] == pytest.approx((acts > 0).sum(1).float().mean().item(), rel=1e-4)

    def ce(edit):
        with torch.no_grad(), dmsae.spliced(model, 0, edit):
            logits = model(ids).logits[:, :-1][keep[:, :-1]]
        return F.cross_entropy(logits, ids[:, 1:][keep[:, :-1]]).item()

    spliced = ce(lambda h: h.masked_scatter(keep[..., None], sae(h[keep])))
    original, zero = ce(nn.Identity()), ce(torch.zeros_like)
    assert r["ce"] == pytest.approx(spliced, rel=1e-5)
    assert r["ce_recovered"] == pytest.approx((zero - spliced) / (zero - original), rel=1e-4)
    assert values["ce_original"] == pytest.approx(original, rel=1e-5)
    assert values["ce_zero"] == pytest.approx(zero, rel=1e-5)
    variance = dmsae.harvest(model, 0, *training).var(0).mean().item()
    assert values["scale"] ** 2 * variance == pytest.approx(1, rel=2e-2)


@pytest.mark.parametrize("cycle", [0, 3])
def test_saved_folder_is_a_jumprelu_sae(story, tmp_path, cycle):
    """A few lines that know only SAELens's jumprelu must give our forward; without our metadata, as
    SAELens writes it, a folder must load as one prefix, no core."""
    cfg = json.loads((story / f"cycle{cycle}" / "cfg.json").read_text("utf-8"))
    want = dict(dmsae.SAELENS, dtype="float32", device="cpu", reshape_activations="none")
    assert want.items() <= cfg.items()
    meta, w = cfg["metadata"], weights(story, cycle)
    assert (meta["hook_name"], meta["context_size"]) == ("blocks.0.hook_resid_post", 32)
    assert meta["prepend_bos"] is True
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
    folder = shutil.copytree(story / f"cycle{cycle}", tmp_path / "sae")
    for metadata in (None, {"sae_lens_version": "6.0.0"}):
        dmsae.write_json(dict(cfg, metadata=metadata), folder / "cfg.json")
        again = load_sae(folder)
        assert (again.widths, again.n_core) == ([128], 0)
        assert torch.equal(again(x), sae(x))


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda cfg, w: cfg.unlink(), "cfg.json"),
        (lambda cfg, w: cfg.write_text("[1, 2]", "utf-8"), "cfg.json"),
        (lambda cfg, w: replace_in(cfg, "jumprelu", "topk"), "topk"),
        (lambda cfg, w: replace_in(cfg, '"none"', '"layer_norm"'), "layer_norm"),
        (lambda cfg, w: replace_in(cfg, '_to_input": true', '_to_input": false'), "_to_input"),
        (lambda cfg, w: replace_in(cfg, "d_in", "d_inn"), "KeyError.*d_in"),
        (lambda cfg, w: replace_in(cfg, '_activations": "none"', '_activations": "z"'), "reshape"),
        (lambda cfg, w: w.unlink(), "sae_weights"),
        (lambda cfg, w: w.write_bytes(w.read_bytes()[:-9]), ""),
        (lambda cfg, w: save_file(dict(load_file(w), factor=torch.ones(9)), w), "factor"),
    ],
)
def test_a_folder_that_is_no_sae_is_refused(story, tmp_path, damage, words):
    """What is missing, cut, of another kind or would not be used must be named, with the folder."""
    folder = shutil.copytree(story / "cycle3", tmp_path / "sae")
    damage(folder / "cfg.json", folder / "sae_weights.safetensors")
    with pytest.raises(ValueError, match=f"{folder}: is no SAE folder of cfg.json and.*{words}"):
        load_sae(folder)


# ---- Killed, resumed, refused -------------------------------------------------------------------
def test_killed_twice_and_resumed_equals_uninterrupted(lm, story, tmp_path):
    """Killed while it is set up, and in its second training, a run must end bitwise the same."""
    words = command(lm, tmp_path, checkpoint_minutes=0)
    for when in ("config.json", "checkpoint1.pt"):
        line = [sys.executable, HERE / "dmsae.py", *words]
        process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        end = time.time() + 300
        while not (tmp_path / when).exists():
            assert time.time() < end and process.poll() is None
            time.sleep(0.01)
        process.kill()
        assert process.wait(60) == -9
        assert (tmp_path / when).exists()
    dmsae.main(words)
    assert_same(tmp_path, story, (0, 1))
    assert not [*tmp_path.glob("checkpoint*"), *tmp_path.glob("*.part")]


@pytest.mark.parametrize("stop", [75, 100])
def test_stopped_at_a_step_and_resumed_equals_uninterrupted(lm, story, tmp_path, monkeypatch, stop):
    """A run must go on from the tenth step before, also if stopped between training and saving."""
    words = command(lm, tmp_path, cycles=0, checkpoint_minutes=0)
    real, steps = dmsae.Journal.after_step, []

    def stopping(journal, step, *args):
        real(journal, step, *args)
        steps.append(step)
        if len(steps) == stop:
            raise KeyboardInterrupt

    monkeypatch.setattr(dmsae.Journal, "after_step", stopping)
    with pytest.raises(KeyboardInterrupt):
        dmsae.main(words)
    dmsae.main(words)
    assert steps[stop:] == [*range(stop // 10 * 10 + 1, 101)]
    assert_same(tmp_path, story, [0])


def test_another_configuration_in_the_same_folder_is_refused(lm, story, capsys):
    """What differs must be named with both values, also without tokens.bin; nothing be touched."""
    before = {p: p.stat().st_mtime_ns for p in story.rglob("*")}
    (story / "tokens.bin").rename(story / "away.bin")  # to save room, perhaps
    words = command(lm, story, cycles=3, k=7, lr=0.1)
    line = refusal(capsys, words)
    (story / "away.bin").rename(story / "tokens.bin")
    assert refusal(capsys, words) == line
    assert "(k 6 there, 7 here; lr 0.003 there, 0.1 here)" in line
    others = dict(core=story / "cycle0" / "core.safetensors", select="random", coverage=0.8, seed=1)
    others |= dict(core_sparsity="dynamic", prefixes=0.5, attribution_tokens=999, tokens=12_801)
    others |= dict(ctx=31, d_sae=127, batch=127, layer=1, separator="the", max_norm=4)
    others |= dict(eval_tokens=999, text_column="words")
    for name, value in others.items():
        assert f"({name} " in refusal(capsys, command(lm, story, **{name: value}))
    assert before == {p: p.stat().st_mtime_ns for p in story.rglob("*")}


def test_fewer_or_more_cycles_are_no_other_configuration(lm, story, tmp_path, capsys):
    """Fewer must lose nothing that is begun; more be added, whatever a finished training left."""
    out = shutil.copytree(story, tmp_path / "out")
    shutil.rmtree(out / "cycle3")
    (out / "checkpoint3.pt").write_text("of a later cycle", "utf-8")
    dmsae.main(command(lm, out, cycles=2, checkpoint_minutes=1, cache=out))
    (out / "checkpoint3.pt").rename(out / "checkpoint2.pt")
    capsys.readouterr()
    dmsae.main(command(lm, out, cycles=3))
    assert_same(out, story, range(4))
    printed = capsys.readouterr().out
    rows = re.findall(r"(?m)^(\d) +(\d+) ", printed)
    assert rows == [(str(n), str(result(story, n)["core"])) for n in range(4)]
    votes = Counter(saved_core(story, 3)["votes"].tolist())
    assert f"selected: {[votes[n] for n in range(1, max(votes) + 1)]}" in printed


@pytest.mark.parametrize("content", ["", "null", "[1]"])
def test_an_emptied_file_of_a_run_is_named(lm, story, tmp_path, capsys, content):
    """As a power cut leaves it: it must be named; where it can be made again, the run goes on."""
    out = shutil.copytree(story, tmp_path / "out")
    words = command(lm, out, cycles=3)
    (out / "tokens.bin").write_text(content, "utf-8")
    assert "less than three contexts" in refusal(capsys, words)
    dmsae.main(words)
    (out / "cycle0" / "cfg.json").write_text(content, "utf-8")
    with pytest.raises(ValueError, match=f"{out}/cycle0: is damaged; move it away"):
        dmsae.main(words)
    (out / "config.json").write_text(content, "utf-8")
    assert f"{out}/config.json: is missing or damaged" in refusal(capsys, words)
    (out / "config.json").unlink()  # Then tokens.bin may be of any text and tokenizer.
    assert "other settings" in refusal(capsys, words)


def test_a_saved_core_starts_another_sparsity(lm, story, tmp_path, capsys):
    """--core FILE --cycles 0 must train one SAE at another k around the rows of the file, its
    identities kept; a newcomer is born in training 4; a core above half of k must be warned of."""
    path = story / "cycle3" / "core.safetensors"
    out = tmp_path / "out"
    changes = dict(core=path, cycles=0, k=8, seed=3, coverage=0.99, core_sparsity="dynamic")
    dmsae.main(command(lm, out, **changes))
    printed = capsys.readouterr().out
    core, now = saved_core(story, 3), saved_core(out, 0)
    C = len(core["W_enc"])
    assert torch.equal(weights(out, 0)["W_enc"].T[:C], core["W_enc"])
    births = {tuple(b) for b in core["birth"].tolist()}
    born = [b[0] for b in now["birth"].tolist() if tuple(b) not in births]
    assert set(born) == {4}
    assert f"core {C}\n" in printed
    l0 = result(out, 0)["core_l0"]
    assert 4 < l0 < 7
    assert result(out, 0)["l0"] == pytest.approx(8, rel=0.15)
    assert f"warning: the core alone has L0 {l0:.1f}, above half of k 8" in printed
    _, origin = dmsae.load_core(out / "cycle0" / "core.safetensors")
    assert (origin["training"], origin["config"]["k"], origin["layer"]) == (4, 8, 0)


@pytest.mark.parametrize("what", ["weights", "layer", "origin", "size"])
def test_a_core_that_does_not_fit_is_refused(own_lm, story, tmp_path, capsys, what):
    """One of another model or layer, of unknown origin, or as large as the SAE, must be refused."""
    path, core = story / "cycle3" / "core.safetensors", saved_core(story, 3)
    says, n = "is of another model, tokenizer or layer", len(core["index"])
    changes = dict(layer=1) if what == "layer" else {}
    if what == "weights":
        replace_weights(own_lm)
    elif what == "origin":
        path = tmp_path / "core.safetensors"
        save_file(core, path, {"dmsae": json.dumps(dict(training=0))})
    elif what == "size":
        changes, says = dict(d_sae=n), f"a core of {n} to --d-sae {n}"
    line = refusal(capsys, command(own_lm, tmp_path / "out", core=path, **changes))
    assert says in line
    assert what == "size" or f"--core {path}" in line
    assert not {*(tmp_path / "out").glob("*")} - {tmp_path / "out/lock"}


# ---- The cache ----------------------------------------------------------------------------------
@pytest.fixture(scope="session")
def cached(lm, tmp_path_factory):
    """A run of the shared run's first two cycles with --cache, and how often it harvested."""
    folder = tmp_path_factory.mktemp("cached")
    with pytest.MonkeyPatch.context() as patch:
        harvested = spied(patch, dmsae, "harvest")
        dmsae.main(command(lm, folder / "out", cache=folder / "cache"))
    return SimpleNamespace(out=folder / "out", cache=folder / "cache", harvests=len(harvested))


def test_cache_changes_no_result_and_is_shared(lm, cached, story, tmp_path, monkeypatch):
    """With --cache, weights must be bitwise those without, and every block be harvested once; a run
    of another seed and k must harvest no block again, and train another SAE."""
    assert_same(cached.out, story, (0, 1))
    assert cached.harvests == 2 + 2, "blocks of the scale and of the training; two evaluations"
    harvested = spied(monkeypatch, dmsae, "harvest")
    dmsae.main(command(lm, tmp_path, cache=cached.cache, cycles=0, seed=1, k=5))
    assert len(harvested) == 1, "the evaluation"
    assert len([*cached.cache.iterdir()]) == 2
    assert not torch.equal(weights(tmp_path, 0)["W_enc"], weights(story, 0)["W_enc"])


@pytest.mark.parametrize("what", ["model", "layer"])
def test_what_harvests_otherwise_never_gets_cached_activations(own_lm, cached, tmp_path, what):
    """With another model behind the same name, or another layer, a run with a filled cache must be
    bitwise the one without."""
    cache = shutil.copytree(cached.cache, tmp_path / "cache")
    if what == "model":
        replace_weights(own_lm)
    changes = dict(cycles=0, tokens=1280, layer=int(what == "layer"))
    dmsae.main(command(own_lm, tmp_path / "a", cache=cache, **changes))
    dmsae.main(command(own_lm, tmp_path / "b", **changes))
    assert len([*cache.iterdir()]) == 2 + 2
    assert_same(tmp_path / "a", tmp_path / "b", [0])


def test_two_runs_may_fill_one_cache_at_once(lm, tmp_path, monkeypatch):
    """Where another process writes the same block meanwhile, both must get it, and one file be
    left; a damaged one must be named, with what to do."""
    run = bare_run(load_tiny(lm)[0], some_rows(20), cache=str(tmp_path))
    real, others = dmsae.save_file, []

    def meanwhile(tensors, path):
        real(tensors, path)
        monkeypatch.setattr(dmsae, "save_file", real)
        with monkeypatch.context() as patch:
            patch.setattr(os, "getpid", lambda: 123)
            others.append(run.block(0, 20))

    monkeypatch.setattr(dmsae, "save_file", meanwhile)
    acts = run.block(0, 20)
    assert torch.equal(acts, others[0])
    assert torch.equal(acts, bare_run(run.model, some_rows(20)).block(0, 20))
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=f"{path}.*move"):
        run.block(0, 20)


# ---- Bad input ----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(k=128), ["--k 128", "--d-sae 128"]),
        (dict(k=0), ["--k 0", "from 1"]),
        (dict(coverage=1.5), ["--coverage 1.5", "to 1", "0.9"]),
        (dict(coverage="nan"), ["--coverage nan", "to 1", "0.9"]),
        (dict(layer=2), ["--layer 2", "at most 1"]),
        (dict(layer=-1), ["--layer -1", "from 0"]),
        (dict(text="no.txt"), ["--text no.txt", "existing file"]),
        (dict(text=__file__), ["--text", ".py", ".txt, .jsonl, .parquet"]),
        (dict(core="no.safetensors"), ["no.safetensors: is damaged or holds no core"]),
        (dict(core=__file__), [f"{__file__}: is damaged or holds no core"]),
        (dict(cycles=-1), ["--cycles -1", "from 0", "5"]),
        (dict(lr="inf"), ["--lr inf", "0.0003"]),
        (dict(lr=0), ["--lr 0", "from 1e-09", "0.0003"]),
        (dict(max_norm=-1), ["--max-norm -1", "from 0", "for example 5"]),
        (dict(tokens=5), ["--tokens 5", "at least --batch 128"]),
        (dict(batch=-128), ["--batch -128", str(Config.batch)]),
        (dict(attribution_tokens=0), ["--attribution-tokens 0", "1000000"]),
        (dict(eval_tokens=0), ["--eval-tokens 0", "131072"]),
        (dict(model="/no/such/folder"), ["--model /no/such/folder", "--demo"]),
        (dict(ctx=65), ["--ctx 65", "64"]),
        (dict(ctx=3), ["--ctx 3", "from 4"]),
        (dict(device="cuda:77"), ["--device cuda:77", "must be cpu, cuda or cuda:N"]),
        (dict(device="toaster"), ["--device toaster", "must be cpu, cuda or cuda:N"]),
        (dict(d_sae="many"), ["--d-sae", "invalid int", "many"]),
        (dict(d_sae=10**12), ["--d-sae", "65536"]),
        (dict(colour="red"), ["--colour"]),
        (dict(cover=0.5), ["--cover", "--help"]),  # no abbreviation of --coverage
        (dict(select="best"), ["--select", "best", "attribution", "frequency", "random"]),
        (dict(core_sparsity="no"), ["--core-sparsity", "gated", "dynamic"]),
        (dict(cache=__file__), [__file__]),
        (dict(prefixes="0.5 0.2"), ["--prefixes", "0.1 0.3"]),
        (dict(prefixes="0.5 1"), ["--prefixes", "0.1 0.3"]),
        (dict(prefixes="0 0.5"), ["--prefixes", "0.1 0.3"]),
        (dict(prefixes="32 64"), ["--prefixes", "from 0 to 1"]),
        (dict(prefixes="-0.1 0.5"), ["--prefixes", "from 0 to 1"]),
        (dict(prefixes="nan"), ["--prefixes", "from 0 to 1"]),
        (dict(out=f"{__file__}/run"), [__file__]),
        (dict(cache=f"{__file__}/cache", cycles=0), [__file__]),
    ],
)
def test_bad_input_is_one_line_and_exit_2(lm, tmp_path, capsys, changes, words):
    """What was given and what is allowed must be said; no traceback, nothing written."""
    argv = command(lm, **dict(out=tmp_path / "out") | changes)
    if "prefixes" in changes:
        at = argv.index("--prefixes") + 1
        argv[at : at + 1] = argv[at].split()
    line = refusal(capsys, argv)
    assert all(w in line for w in words), line
    assert not {*(tmp_path / "out").glob("*")} - {tmp_path / "out/lock"}


def test_the_demo_refuses_a_text_before_it_trains(tmp_path, capsys, monkeypatch):
    """--demo --text no.txt must end at once, not after minutes."""
    monkeypatch.chdir(tmp_path)
    line = refusal(capsys, ["--demo", "--text", "no.txt"])
    assert "--text no.txt: must be an existing file" in line
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("t.txt", "", "three contexts of 32"),
        ("t.txt", "the cat sat on the mat", "three contexts of 32"),
        ("t.txt", "<eos>" * 30_000, "variance 0 at layer"),
        (
            "t.jsonl",
            ["the cat sat on the mat"] * 900 + [7],
            "--text-column text: must be a column of text, of text",
        ),
    ],
)
def test_a_text_that_is_none_is_refused(lm, tmp_path, capsys, name, content, words):
    """The file must be named; a text in its place must work with the same folder."""
    path = write_text(tmp_path / name, content)
    changes = dict(text=path, cycles=0, tokens=128, separator=None)
    line = refusal(capsys, command(lm, tmp_path / "out", **changes))
    assert words in line
    if "eos" not in content:  # Its tokens are a text, with which other ones would not agree.
        assert str(path) in line
        write_text(path, ["the cat"] * 900 if name == "t.jsonl" else "the cat " * 9000)
        dmsae.main(command(lm, tmp_path / "out", **changes))
    changes["text_column"] = "no"
    assert "--text-column no" in refusal(capsys, command(lm, tmp_path / "b", **changes))


# ---- What other people met ----------------------------------------------------------------------
def test_what_is_named_is_what_is_read(tmp_path):
    """--text FOLDER must read the files of this folder, in order, with their line breaks, whatever
    signs are in its name and whatever the case of a suffix."""
    for name in ("d/set1", "d/set[1]", "d:e"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "b.TXT").write_text(f"{name}\n\nb", encoding="utf-8")
        (tmp_path / name / "a.txt").write_text(f"{name}\na", encoding="utf-8")
        (tmp_path / name / "LICENSE").write_text("is no text", encoding="utf-8")
        docs = [*dmsae.documents(Config(text=f"{tmp_path}/{name}"))]
        assert docs == [f"{name}\na", f"{name}\n\nb"]


def test_a_folder_of_two_kinds_and_a_local_dataset_are_refused(lm, tmp_path, capsys, monkeypatch):
    """Which files are meant, and whether a name is one on the hub, must not be guessed."""
    (tmp_path / "c:d").mkdir()
    (tmp_path / "c:d/a.txt").touch()
    monkeypatch.chdir(tmp_path)
    for dataset in ("c:d", f"{tmp_path}/c:d", f"{tmp_path}:d"):
        line = refusal(capsys, command(lm, "out", text=None, dataset=dataset))
        assert f"--dataset {dataset}: is a folder here; name it by --text" in line
    (tmp_path / "c:d/b.jsonl").touch()
    assert "in one of .txt, .jsonl" in refusal(capsys, command(lm, "out", text="c:d"))
    (tmp_path / "c:d/b.jsonl").unlink()
    assert "holds --out c:d/out" in refusal(capsys, command(lm, "c:d/out", text="c:d"))


def test_a_changed_file_of_a_text_folder_is_another_text(lm, tmp_path, capsys):
    """Files count by their content: the same command must not go on with other words."""
    (tmp_path / "t").mkdir()
    for name in ("a.txt", "b.txt"):
        shutil.copy(lm / "text.txt", tmp_path / "t" / name)
    words = command(lm, tmp_path / "out", text=tmp_path / "t", cycles=0)
    dmsae.main(words)
    replace_in(tmp_path / "t/b.txt", "cat", "dog")
    assert "other settings (text" in refusal(capsys, words)


def test_a_folder_in_use_is_refused_until_its_program_ends(lm, tmp_path, capsys):
    """A second start must end at once with one line. A killed program must leave no lock."""
    out = tmp_path / "out"
    code = f"import dmsae, time; lock = dmsae.locked({str(out)!r}); print(1, flush=True)\n"
    code += "with lock: time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=HERE) as other:
        other.stdout.readline()
        assert f"{out}: is in use by another run" in refusal(capsys, command(lm, out))
        assert [path.name for path in out.iterdir()] == ["lock"]
        other.kill()
    dmsae.main(command(lm, out, cycles=0))
    dmsae.main(command(lm, out, cycles=0))


def test_a_disk_without_locks_is_said(tmp_path, capsys, monkeypatch):
    """Some network disks cannot lock. The run must go on, and say so."""

    def refuse(self, timeout):
        raise OSError(95, "not supported")

    monkeypatch.setattr(dmsae.FileLock, "acquire", refuse)
    with dmsae.locked(tmp_path):
        assert "not locked, so start no other run" in capsys.readouterr().out


def test_what_is_read_must_be_a_decoder_layers_output(lm, tmp_path, capsys, monkeypatch):
    """Where another module is hooked, the start must say so; where transformers gives no such
    output, which is so at the last layer, it must say that nothing was checked."""
    dmsae.main(command(lm, tmp_path / "last", layer=1, cycles=0))
    assert "not checked: whether the output of layer 1" in capsys.readouterr().out
    monkeypatch.setattr(dmsae, "decoder_layers", lambda model: model.get_decoder().layers[::-1])
    line = refusal(capsys, command(lm, tmp_path / "out"))
    assert "--layer 0: another module than the decoder layer is read" in line


@pytest.mark.parametrize(
    "name, damage, words",
    [
        ("cycle0/cfg.json", lambda path: path.write_text("{}", "utf-8"), "cycle0: is damaged"),
        ("cycle1/cfg.json", lambda path: replace_in(path, '"result"', '"x"'), "cycle1: is damaged"),
        (
            "cycle0/sae_weights.safetensors",
            lambda path: path.write_text("", "utf-8"),
            "cycle0: is damaged",
        ),
        ("cycle1/core.safetensors", lambda path: path.unlink(), "cycle1: is damaged"),
        ("tokens.bin", lambda path: os.truncate(path, 60_000), "tokens.bin: is not what it was"),
    ],
)
def test_what_is_damaged_does_not_pass_as_finished(lm, story, tmp_path, name, damage, words):
    """The same command must name it, and must do no training on top of it."""
    out = shutil.copytree(story, tmp_path / "out")
    damage(out / name)
    run_file = Path(out, "cycle4")
    with pytest.raises((ValueError, SystemExit)) as end:
        dmsae.main(command(lm, out, cycles=4))
    assert end.type is SystemExit or words in str(end.value)
    assert not run_file.exists()


@pytest.mark.parametrize("change, warned", [(-0.5, True), (0.5, False)])
def test_ce_recovered_is_doubted_where_zeroing_helps(
    lm, tmp_path, capsys, monkeypatch, change, warned
):
    """Where the model predicts better without the layer, one line must say so."""
    losses = itertools.count(3, change)
    monkeypatch.setattr(dmsae, "mean_loss", lambda *args: next(losses))
    dmsae.main(command(lm, tmp_path, cycles=0))
    assert ("without layer 0 the loss is lower; ignore" in capsys.readouterr().out) == warned


@pytest.mark.parametrize("name, out", [("lm", "runs/a"), ("hub/lm", "./runs/a"), ("lm", None)])
def test_a_model_is_looked_for_where_its_run_began(name, out, story, tmp_path):
    """That is as far above the run as --out says. A hub name must be no folder that is near."""
    folder = shutil.copytree(story / "cycle0", tmp_path / "runs" / "a" / "cycle0")
    [(tmp_path / p).mkdir(parents=True) for p in ("lm", "runs/lm", "runs/hub/lm", "runs/a/lm")]
    cfg = json.loads((folder / "cfg.json").read_text("utf-8"))
    cfg["metadata"] |= dict(model_name=name, config=dict(model=name, out=out) if out else {})
    (folder / "cfg.json").write_text(json.dumps(cfg), "utf-8")
    assert ev.open_sae(folder).cfg.model == (f"{tmp_path}/lm" if out == "runs/a" else name)


def test_two_evaluations_at_once_write_two_files(story, tmp_path, monkeypatch):
    """One that starts while another measures must not find its name free."""
    words, measure = [f"{story}/cycle0", "--only=stability", f"--out={tmp_path}/e"], ev.measure
    others = iter([[*words, "--seeds=8"]])
    monkeypatch.setattr(ev, "measure", lambda *how: (*map(ev.main, others), measure(*how))[-1])
    ev.main([*words, "--seeds=7"])
    written = [json.loads((tmp_path / f"e{n}.json").read_text("utf-8")) for n in ("", "-2")]
    assert [report["arguments"]["seeds"] for report in written] == ["[7]", "[8]"]


CANNOT = [(" dog", {}, "reconstruction: .* nan or inf in held-out text")]
CANNOT += [("7", {}, "labelled t_1.csv: .* nan or inf in labelled texts")]
CANNOT += [("", dict(vocab_size=9), "labelled t_1.csv: .* ids from 9 on")]
CANNOT += [("", dict(max_position_embeddings=3), "labelled t_1.csv: over 3 tokens")]


@pytest.mark.parametrize("word, config, says", CANNOT)
def test_the_others_go_on(word, config, says, story, lm, labels_csv, tmp_path, capsys, monkeypatch):
    """What the model cannot read, or answers with NaN, must stop one metric, with one line."""
    bad, read = torch.tensor(load_tiny(lm)[1](word)["input_ids"][-1:]), dmsae.residual_stream

    def with_nan(model, layer, ids):
        model.config.update(config)
        return read(model, layer, ids).masked_fill(torch.isin(ids, bad)[..., None], math.nan)

    [monkeypatch.setattr(module, "residual_stream", with_nan) for module in (ev, dmsae)]
    words = "--only", "reconstruction", "probing", "stability", "--html", "--labelled", labels_csv
    report, _ = report_of(capsys, story / "cycle0", *words, f"--out={tmp_path}/e")
    rows = report["saes"][0]["metrics"].items()
    (why,) = [f"{name}: {row['cannot_run']}" for name, row in rows if "cannot_run" in row]
    assert re.match(says, why) and len(rows) == 3


def test_labelled_files_are_read_as_people_write_them(tmp_path):
    """Blank lines, .CSV and copies must do no harm; a lone surrogate and few texts be refused."""
    rows, path = [(f"{c} {i % 60}", c) for c in "ab" for i in range(100)], tmp_path / "t.jsonl"
    lines = [json.dumps(dict(text=text, label=c)) for text, c in rows]
    (tmp_path / "t.CSV").write_text("\n".join(["text,label", *map(",".join, rows)]), "utf-8")
    path.write_text("\n \n".join(["", *lines]), "utf-8")
    for file in path, tmp_path / "t.CSV":
        texts, labels, _ = ev.labelled(file)
        assert (len({*texts}), Counter(labels)) == (120, dict(a=60, b=60))
    for last, says in ("", "two are needed of 50"), (r'{"text": "\ud800"}', "surrogates"):
        path.write_text("\n".join([*lines[:149], last]), "utf-8")
        with pytest.raises(ValueError, match=says):
            ev.labelled(path)


def test_what_a_run_kept_of_nan_or_lost_is_no_figure(story, labels_csv, tmp_path, capsys):
    """NaN of a training must be null; a lost SAE and a file named as another must be one line."""
    run, words = shutil.copytree(story, tmp_path / "run"), [f"{story}/cycle0", "--only=stability"]
    replace_in(run / "cycle0" / "cfg.json", '"ce": ', '"ce": NaN, "x": ')
    assert report_of(capsys, run, words[1])[0]["stability"][f"{run}"][0]["ce"] is None
    assert "same name" in refusal(capsys, [*words, "--labelled", *2 * [str(labels_csv)]], ev)
    (run / "cycle3" / "sae_weights.safetensors").write_bytes(b"")
    assert f"{run}/cycle3: is no SAE" in refusal(capsys, [f"{run}/cycle0", *words], ev)


@pytest.mark.parametrize("name", ["dmsae.py", "eval.py", "test_dmsae.py"])
def test_text_is_read_and_written_as_utf_8(name):
    """Else Windows takes its own encoding. Binary files are the exception."""
    for node in ast.walk(ast.parse((HERE / name).read_text("utf-8"))):
        if isinstance(node, ast.Call) and not re.search("utf-8|'[rw]b'", call := ast.unparse(node)):
            assert not re.search(r"(^|\.)open$|\.(read|write)_text$", ast.unparse(node.func)), call


# ---- Files and command line ---------------------------------------------------------------------
def test_what_is_there_stays_whole_where_writing_fails(tmp_path):
    """A file must keep its old content until the new one is complete."""
    path = tmp_path / "a.json"
    dmsae.write_json([1], path)
    with pytest.raises(KeyError), dmsae.written_whole(path) as part:
        part.write_text("half", "utf-8")
        raise KeyError
    assert json.loads(path.read_text("utf-8")) == [1]
    dmsae.write_json([2], path)
    assert json.loads(path.read_text("utf-8")) == [2]
    assert [*tmp_path.iterdir()] == [path]


def test_flags_follow_the_dataclass():
    """Every field must be a flag, underscores accepted; the defaults are Config's, or those of
    --demo, which change nothing that is given."""
    assert dmsae.parse([]) == Config()
    words = ["--d_sae", "256", "--attribution_tokens=9", "--core-sparsity", "dynamic"]
    want = Config(d_sae=256, attribution_tokens=9, core_sparsity="dynamic")
    assert dmsae.parse(words) == want
    assert dmsae.parse("--prefixes 0.1 0.3".split()).prefixes == [0.1, 0.3]
    demo = dmsae.parse(["--demo"])
    assert all(getattr(demo, name) == value for name, value in dmsae.DEMO.items())
    assert demo.out == f"runs/demo_k{demo.k}_seed0"
    assert demo.model == f"{demo.out}/model"
    assert demo.text == f"{demo.out}/model/text.jsonl"
    other = dmsae.parse("--demo --k 5 --model m --text t.txt".split())
    assert (other.k, other.model, other.text, other.out) == (5, "m", "t.txt", "runs/demo_k5_seed0")


def test_help_says_what_each_flag_is(capsys):
    """Every field must be in --help with the words beside it."""
    with pytest.raises(SystemExit) as end:
        dmsae.parse(["--help"])
    assert end.value.code == 0
    shown = "".join(capsys.readouterr().out.split())
    for field in fields(Config):
        words = "".join(field.type.__metadata__[0].split())
        assert len(words) > 5
        assert words in shown
        assert f"--{field.name.replace('_', '-')}" in shown


def test_importing_has_no_side_effects():
    """import dmsae must not import transformers or datasets, nor print."""
    code = "import sys, dmsae; print({'transformers', 'datasets'} & {*sys.modules})"
    words = [sys.executable, "-c", code]
    out = subprocess.run(words, capture_output=True, text=True, cwd=HERE)
    assert (out.stdout, out.stderr) == ("set()\n", "")


# ---- eval.py: reconstruction --------------------------------------------------------------------
def ready_sae(W_enc, W_dec, threshold=0.0, widths=None, n_core=0):
    """An SAE with given rows and no biases."""
    sae = MatryoshkaSAE(W_enc.shape[1], widths or [len(W_enc)], n_core).requires_grad_(False)
    sae.W_enc.copy_(W_enc)
    sae.W_dec.copy_(W_dec)
    sae.threshold.fill_(threshold)
    return sae


def held(lm):
    """The tiny language model, contexts of random ids, and keep, where they are not special."""
    ids = torch.randint(3, 300, (300, 16), generator=torch.Generator().manual_seed(0))
    ids[:, 0], ids[3, 7], ids[5, 15] = 2, 2, 1
    return load_tiny(lm)[0], ids, ids > 2


def naive_loss(model, ids, keep, x):
    """Mean next-token loss at the positions keep, if the layer's output is x."""
    with dmsae.spliced(model, 0, lambda h: x):
        log_p = model(ids).logits.double().log_softmax(-1)
    of_next = log_p[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
    return -of_next[keep[:, :-1]].mean().item()


def test_reconstruction_at_its_limits(lm):
    """A silent SAE must be its bias, and 0 / 0 have no number."""
    model, ids, keep = held(lm)
    r = ev.reconstruction(model, 0, ids, keep, ready_sae(torch.eye(32), torch.eye(32), math.inf))
    x = dmsae.residual_stream(model, 0, ids).masked_fill(keep[..., None], 0)
    assert r["ce_loss_with_sae"] == pytest.approx(naive_loss(model, ids, keep, x), rel=1e-5)
    assert r["l0"] == r["frac_alive"] == r["cossim"] == 0
    assert r["fvu"] >= 1
    toy, ids = Toy(torch.ones(5, 4), torch.zeros(4, 5)), torch.arange(20).view(4, 5) % 5
    r = ev.reconstruction(toy, 0, ids, ids >= 0, ready_sae(torch.eye(4), torch.eye(4)))
    none = "ce_loss_score", "explained_variance_legacy", "fvu", "fvu_all_positions"
    assert sorted(name for name in r if r[name] is None) == [*none]
    assert r["ce_loss_with_sae"] == pytest.approx(math.log(5))


def naive_reconstruction(model, ids, keep, sae, width, limit):
    """The figures of the first `width` latents by their definitions, in SAEBench's batches."""
    x = dmsae.residual_stream(model, 0, ids)
    usual = keep & (x.norm(dim=-1) <= limit)
    acts = sae.encode(x.flatten(0, 1), width)
    x_hat = sae.decode(acts).view_as(x)
    density = (acts.view(*ids.shape, width)[usual] > 0).double().mean(0)
    error = (x - x_hat).double().square().sum(-1)
    tokens, batches = x[usual].double(), [x[i : i + 128][usual[i : i + 128]] for i in (0, 128, 256)]
    of_batch = torch.cat([(b - b.mean(0)).square().sum(1) for b in batches])
    square = tokens.square().sum(1).mean()
    own, zeroed = (naive_loss(model, ids, usual, y) for y in (x, torch.zeros_like(x)))
    with_sae = naive_loss(model, ids, usual, torch.where(usual[..., None], x_hat, x))
    variances = [(y - y.mean(0)).square().sum() for y in (tokens, x[keep].double())]
    out = dict(l0=density.sum(), core_l0=density[: sae.n_core].sum(), tokens=usual.sum())
    out |= dict(fvu=error[usual].sum() / variances[0], frac_alive=(density > 0).sum() / 50)
    out |= dict(fvu_all_positions=error[keep].sum() / variances[1])
    out |= dict(explained_variance=1 - error[usual].mean() / (square - (square / 32) ** 2))
    out |= dict(explained_variance_legacy=(1 - error[usual] / of_batch).mean())
    out |= dict(cossim=F.cosine_similarity(x[usual], x_hat[usual]).mean())
    out |= dict(ce_loss_without_sae=own, ce_loss_with_sae=with_sae, ce_loss_with_ablation=zeroed)
    return out | dict(ce_loss_score=(zeroed - with_sae) / (zeroed - own))


@pytest.mark.parametrize("n_core, share", [(0, 1.0), (7, 1.0), (7, 0.8)])
def test_reconstruction_equals_a_naive_reference(lm, n_core, share):
    """All figures, of each prefix and within a limit, must be as defined, and the SAE as before."""
    model, ids, keep = held(lm)
    torch.manual_seed(1)
    W_dec = F.normalize(torch.randn(50, 32))
    sae = ready_sae(torch.randn(50, 32), W_dec, 0.5, [20, 50], n_core)
    sae.W_enc[0] *= 0  # a dead latent, and one that is always on
    sae.b_enc[1] = 1e3
    sae.b_dec[:] = torch.randn(32) / 9
    norms = dmsae.residual_stream(model, 0, ids)[keep].norm(dim=1)
    limit = norms.quantile(share).item() if share < 1 else math.inf
    for width in {n_core or 9, 20, 50}:
        alone = copy.deepcopy(sae)
        alone.threshold[width:] = math.inf
        before = copy.deepcopy(alone.state_dict())
        got = ev.reconstruction(model, 0, ids, keep, alone, limit)
        want = naive_reconstruction(model, ids, keep, sae, width, limit)
        assert got.keys() == want.keys()
        for name, value in want.items():
            assert got[name] == pytest.approx(float(value), rel=1e-4, abs=1e-6), (name, width)
        assert all(torch.equal(t, before[name]) for name, t in alone.state_dict().items())
    assert got["tokens"] == pytest.approx(share * int(keep.sum()), abs=1)
    # Their last bit may differ.
    assert (got["fvu"] == pytest.approx(got["fvu_all_positions"], rel=1e-12)) == (share == 1)


@pytest.mark.parametrize("mean, scale", [(0, 1e-3), (0, 1), (0, 1e6), (3e4, 1e4), (-1e6, 1)])
@pytest.mark.parametrize("wrong, precision", [(1, 1e-6), (0, 3e-3)])
def test_logistic_regression_of_two_places_by_hand(mean, scale, wrong, precision):
    """Of 3 positives and `wrong` negatives at mean + scale, mirrored at mean - scale, the weight
    u / scale must solve u / (2 scale^2) = (3 + wrong) / (1 + exp(u)) - wrong."""
    low, high = 0.0, 100.0  # of u
    for _ in range(200):
        u = (low + high) / 2
        below = u / (2 * scale**2) < (3 + wrong) / (1 + math.exp(u)) - wrong
        low, high = (u, high) if below else (low, u)
    side = torch.tensor([1] * (3 + wrong) + [-1] * (3 + wrong)).double()[:, None]
    y = torch.tensor([True] * 3 + [False] * (wrong + 3) + [True] * wrong)
    ((weight, bias),) = ev.logistic_regression(mean + scale * side, y).tolist()
    assert weight * scale == pytest.approx(low, rel=precision)
    assert bias == pytest.approx(-weight * mean, rel=1e-6, abs=1e-5)


@pytest.mark.parametrize("mean, scales", [(0, [1, 1, 1]), (3e4, [1e4] * 3), (0, [1e-3, 1, 1e6])])
@pytest.mark.parametrize("balanced", [False, True])
def test_logistic_regression_is_the_minimum(balanced, mean, scales):
    """The gradient of scikit-learn's objective must vanish, and float32 must tell as much."""
    torch.manual_seed(0)
    z, scales = torch.randn(200, 3).double(), torch.tensor(scales).double()
    y = z.sum(1) + torch.randn(200) > 1
    x = mean + scales * z
    probe = ev.logistic_regression(x, y, balanced)
    weight = torch.where(y, 100 / y.sum(), 100 / (~y).sum()) if balanced else torch.ones(200)
    error = weight * (torch.sigmoid(x @ probe[0, :-1] + probe[0, -1]) - y.double())
    gradient = (x - mean).T @ error + probe[0, :-1]
    assert (gradient / scales.clamp_min(1)).abs().max() < 1e-6
    assert error.sum().abs() < 1e-6
    single = ev.probe_logits(x.float(), ev.logistic_regression(x.float(), y, balanced)) > 0
    assert torch.equal(single, ev.probe_logits(x, probe) > 0)


@pytest.mark.parametrize("seed, epoch", [(1, 19), (5, 13)])
def test_a_probe_equals_a_naive_reference(seed, epoch):
    """It must start as nn.Linear does, and be the best of 20 epochs of BCE and L1."""
    torch.manual_seed(0)
    x, y = torch.randn(400, 5), torch.tensor([1.0] * 200 + [0.0] * 200)
    x[:200] += 0.2
    train, test = torch.arange(400).view(2, 200).split([104, 96], 1)
    got = ev.train_probe(x, train, test, seed)
    rng, probe, epochs = dmsae.generator(seed, "probes"), nn.Linear(5, 1), []
    bound = math.sqrt(1 / probe.in_features)  # of weight and bias in nn.Linear.reset_parameters
    start = bound * (2 * torch.rand(6, generator=rng) - 1)
    probe.load_state_dict(dict(weight=start[None, :5], bias=start[5:]))
    adam = torch.optim.AdamW(probe.parameters(), 1e-3)
    for _ in range(20):
        for at in train.flatten()[torch.randperm(208, generator=rng)].split(16):
            adam.zero_grad()
            loss = nn.BCEWithLogitsLoss()(probe(x[at])[:, 0], y[at])
            (loss + 1e-3 * probe.weight.abs().sum()).backward()
            adam.step()
        right = sum((probe(x[i]) > 0).item() == y[i] for i in test.flatten()).item()
        epochs.append((right, nn.utils.parameters_to_vector(probe.parameters()).detach()))
    best = max(range(20), key=lambda i: epochs[i][0])  # the first of these
    assert best == epoch
    assert torch.allclose(epochs[best][1], got[0], atol=1e-5)
    assert ev.accuracy(x, test, got) == pytest.approx(epochs[best][0] / 192)


@pytest.mark.parametrize("batch, taken", [(50, 6), (4, 4)])  # 50 would be 3 batches; 20 is least
def test_letter_probes_equal_a_naive_reference(batch, taken):
    """They must be those of torch's own schedule and of losses written out, and read a letter."""
    y = torch.cat([torch.arange(26), torch.zeros(100, dtype=torch.long)])
    noise = torch.randn(126, 4, generator=torch.Generator().manual_seed(0))
    x = torch.cat([3 * F.one_hot(y, 26).float(), noise], 1)
    got = ev.train_letter_probes(x, y, batch, 1e-4, l1=0.02, seed=4)
    assert (ev.probe_logits(x, got).argmax(1) == y).all()
    rng, probes = dmsae.generator(4, "letters"), nn.Linear(30, 26)
    for p in probes.parameters():
        nn.init.zeros_(p)
    adam = torch.optim.Adam(probes.parameters(), 1e-2, weight_decay=1e-4)
    decay = torch.optim.lr_scheduler.ExponentialLR(adam, (1e-5 / 1e-2) ** (1 / 50))
    truth = y[:, None] == torch.arange(26)
    weight = torch.where(truth, (~truth).sum(0) / truth.sum(0), 1.0)
    for _ in range(50):
        for at in torch.randperm(126, generator=rng).split(taken):
            p = torch.sigmoid(probes(x[at]))
            losses = -weight[at] * torch.where(truth[at], p, 1 - p).log()
            adam.zero_grad()
            (losses.mean(0).sum() + 0.02 * probes.weight.abs().sum()).div(26).backward()
            adam.step()
        decay.step()
    assert torch.allclose(got[:, :-1], probes.weight, atol=2e-3)
    assert torch.allclose(got[:, -1], probes.bias, atol=2e-3)


# ---- Absorption ---------------------------------------------------------------------------------
def test_absorption_scores_equal_a_naive_reference():
    """Word by word, both scores must equal SAEBench's definitions written as plain arithmetic."""
    rng, seen = np.random.default_rng(0), Counter()
    for _ in range(400):
        f = rng.random((4, 8)) * (rng.random((4, 8)) < 0.4) * 2
        f = f + rng.random((4, 8)) * (rng.random() < 0.3) / 3  # often four and more are on
        x, W_dec = rng.normal(size=(4, 5)) + 0.5, rng.normal(size=(8, 5))
        w, main = rng.normal(size=5) + 0.5, rng.choice(8, rng.integers(1, 3), replace=False)
        u = w / np.linalg.norm(w)
        if rng.random() < 0.5:  # a latent that is hardly along the probe, but very active
            W_dec[0] -= (W_dec[0] @ u - 0.04 * rng.random()) * u
            f[:, 0] *= 1000
        got = ev.absorption_scores(*map(torch.tensor, (f, x, W_dec, w, main)))
        c = [row @ u / np.linalg.norm(row) for row in W_dec]
        for i in range(4):
            p, projection = [f[i, j] * c[j] for j in range(8)], x[i] @ u
            m, top = sum(p[j] for j in main), int(np.argmax(p))
            silent = all(f[i, j] < 1e-8 for j in main)
            enough = projection >= 0 and p[top] / projection >= 0.4
            full = silent and enough and c[top] >= 0.025
            others = [p[j] for j in range(8) if j not in main and c[j] >= 0.1 and p[j] > 0]
            t = sum(sorted(others)[-3:])
            share = min(t, projection - m)
            fraction = 1 if m <= 0 else share / (share + m)
            if m >= projection or t / projection < 0.4:
                fraction = 0
            assert (bool(got[0][i]), got[1][i].item()) == (full, pytest.approx(fraction))
            seen.update(full=int(full), part=int(0 < fraction < 1), whole=int(fraction == 1))
            seen.update(zero=int(fraction == 0), thin=int(silent and enough and not full))
    assert min(seen.values()) > 20  # every branch was met


@pytest.mark.parametrize("sizes, n", [([97, 3], 1), ([90, 10], 2), ([10] * 10, 10)])
def test_a_further_main_latent_must_add_to_the_f1(sizes, n):
    """A latent that adds .015 to the F1 must be left out, and ten that add .05 or more be taken."""
    group = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    f = 5.0 * F.pad(F.one_hot(group).float(), (0, 0, 0, 100))
    y = torch.arange(200) < 100
    main, f1 = ev.main_latents(torch.arange(len(sizes)), f, y, f, y)
    assert main.tolist() == list(range(n)) and f1 > 0.94
    on, rare = y.float()[:, None], torch.arange(200) < 20  # on at 100, of which 20 are of a letter
    assert ev.main_latents(torch.tensor([0]), on, rare, on, rare)[1] == pytest.approx(40 / 120)


class Words(tuple):
    """A tokenizer: its tokens, words between spaces and newlines. 0 is BOS, 1 unknown."""

    bos_token_id, eos_token_id, pad_token_id = 0, None, None

    def convert_ids_to_tokens(self, ids):
        return [self[i] for i in ids]

    def __call__(self, texts, **_):
        rows = [re.findall(r"\n|[^ \n]+", text) for text in texts]
        return {"input_ids": [[self.index(w) if w in self else 1 for w in row] for row in rows]}


@pytest.fixture(scope="session")
def letters():
    """A model of 26 x 40 words, each with its letter's direction and its own; its tokenizer; an SAE
    with a latent for each letter, blind to 14 words in s, one for each of these; their ids; task"""
    words = [f"{chr(97 + c)}{'x' * j}q" for c in range(26) for j in range(40)]
    letter, eye = torch.arange(1040) // 40, torch.eye(26 + 1040)
    table = torch.cat([5 * F.one_hot(letter, 26).float(), torch.eye(1040)], 1)
    blind = 18 * 40 + torch.arange(14)
    W_enc = torch.cat([eye[:26], 5 * eye[26 + blind]])
    W_enc[18, 26 + blind] = -10
    sae = ready_sae(W_enc, torch.cat([eye[:26], F.normalize(table[blind])]))
    tokenizer = Words(["<bos>", "<unk>", *words, "has", "the", "first", "letter:"])
    table = F.pad(table, (0, 0, 2, 4))
    model = Toy(table, torch.zeros(1066, len(table)))
    task = ev.spelling_task(model, 0, tokenizer, 10_000, 0, math.inf)
    return model, tokenizer, sae, {*(2 + blind).tolist()}, task


def test_the_letter_task_reads_the_word_behind_ten_examples(letters, monkeypatch):
    """A prompt must be BOS, newline, ten lines of examples and another word, which must be read."""
    model, tokenizer, *_ = letters
    calls = spied(monkeypatch, ev, "residuals")
    task = ev.spelling_task(model, 0, tokenizer, 900, 1)
    tail = [tokenizer.index(word) for word in "has the first letter:".split()]
    own, examples = [], []  # of training, test and fresh prompts
    for (_, _, prompts), _ in calls:
        own.append([prompt[-1] for prompt in prompts])
        examples.append({i for prompt in prompts for i in prompt[2:-1:7]})
        for prompt in prompts:
            lines = prompt[2:-1]  # example, tail, letter (unknown here), newline
            assert (prompt[:2], len(lines)) == ([0, 1], 70)
            assert prompt[-1] not in lines[::7]
            assert all(lines[j + 1 : j + 5] == tail for j in range(0, 70, 7))
    train, test, fresh = own
    assert test == fresh and (len(train), len({*train, *test})) == (720, 900)
    assert examples[0] <= {*train} and examples[1] <= {*test} and examples[2] & {*train}
    for got, ids in zip((task.x_train, task.x_test, task.x_fresh), own, strict=True):
        assert torch.equal(got, model.embedding[ids])
    for y, ids in (task.y_train, train), (task.y_test, test):
        assert y.tolist() == [ord(tokenizer[i][0]) - 97 for i in ids]
    right = ev.probe_logits(task.x_test, task.probes).argmax(1) == task.y_test
    assert right.float().mean() > 0.95


def test_words_above_the_limit_are_left_out(letters, monkeypatch):
    """A word with a residual above the limit in any of its prompts must be left out of all."""
    model, tokenizer, _, _, whole = letters
    huge = iter([2, 0, 1])  # a training prompt, a test prompt, a fresh prompt

    def residuals(model, layer, rows):
        at = next(huge)
        return [model.embedding[row] * (1 + 9 * (i == at)) for i, row in enumerate(rows)]

    monkeypatch.setattr(ev, "residuals", residuals)
    task = ev.spelling_task(model, 0, tokenizer, 10_000, 0, 6.0)
    for got, want in zip(task[:2], whole, strict=False):
        assert torch.equal(got, torch.cat([want[:2], want[3:]]))
    for got, want in zip(task[2:5], whole[2:5], strict=True):
        assert torch.equal(got, want[2:])


def test_absorption_finds_the_planted_words(letters):
    """Full absorption must be the share of blind words among words in s, and else zero."""
    model, tokenizer, sae, blind, task = letters
    r = ev.absorption(model, 0, tokenizer, sae)
    read = ev.probe_logits(task.x_test, task.probes)[:, 18] > 0
    hit = task.x_test[read & (task.y_test == 18), 26:].argmax(1) + 2  # token ids
    share, rows = np.mean([i in blind for i in hit.tolist()]), r["details"]
    assert 0 < share < 1
    assert rows["s"]["full_absorption_rate"] == pytest.approx(share)
    assert rows["s"]["fraction_0_6_0"] == pytest.approx(share, abs=1e-4)
    assert rows["s"]["num_split_features"] == 1
    assert all(row["full_absorption_rate"] == 0 for c, row in rows.items() if c != "s")
    assert (r["words"], r["letters"]) == (1043, len(rows))
    for name in "full_absorption_rate", "main_f1":
        assert r[name] == pytest.approx(np.mean([row[name] for row in rows.values()]))


def test_what_cannot_be_read_is_left_out_or_refused(letters, monkeypatch):
    """A letter that is not read must not count; what tells too few must give a reason instead."""
    model, tokenizer, sae, _, task = letters
    noise = torch.randn(30, 1066, generator=torch.Generator().manual_seed(0))
    noise[:, :26] = 0  # of single words only, none of which is in train and test
    silent = ready_sae(sae.W_enc, sae.W_dec, math.inf)
    for bad, f1 in (ready_sae(noise, noise), "0.[0-5]"), (silent, "0.00"):
        with pytest.raises(ValueError, match=f"mean F1 is {f1}"):
            ev.absorption(model, 0, tokenizer, bad)
    task = copy.deepcopy(task)
    task.probes[[0, 25]] = F.pad(torch.zeros(1066), (0, 1), value=-1)
    task.x_test[task.y_test == 1] *= torch.arange((task.y_test == 1).sum())[:, None] > 0
    monkeypatch.setattr(ev, "spelling_task", lambda *words: task)
    scored = spied(monkeypatch, ev, "absorption_scores")
    assert "".join(ev.absorption(model, 0, tokenizer, sae)["details"]) == "bcdefghijklmnopqrstuvwxy"
    read = (ev.probe_logits(task.x_test, task.probes) > 0).gather(1, task.y_test[:, None]).sum()
    assert sum(len(call[0]) for call, _ in scored) == read
    monkeypatch.setattr(ev, "MIN_LETTERS", 25)
    with pytest.raises(ValueError, match="read 24 of 26"):
        ev.absorption(model, 0, tokenizer, sae)


def test_labelled_texts_are_read_evenly(tmp_path):
    """Rows must be complete, of classes of fifty or more, as many of each, in UTF-8 of any kind."""
    sizes, path = dict(a=91, b=71, c=50), tmp_path / "t.jsonl"
    rows = [dict(words=f"{c} é {i}" * (i > 0), topic=c) for c, n in sizes.items() for i in range(n)]
    path.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    texts, labels, spurious = ev.labelled(path, ("words", "topic"), budget=120)
    assert (Counter(labels), len({*texts}), spurious) == (dict(a=60, b=60), 120, None)
    assert all(t.split()[:2] == [c, "é"] for t, c in zip(texts, labels, strict=True))
    texts, labels, same = ev.labelled(path, ("words", "topic", "topic"))
    assert (Counter(labels), [*same]) == (dict(a=90, b=70), [*labels])
    lines = [f'"text, {i}",{i % 2}' for i in range(12_000)]
    lines[11_000], lines[3] = "text,", ",1"  # One missing label must not turn 1 into 1.0.
    (tmp_path / "t[1].csv").write_text("\n".join(["text,label", *lines]), "utf-8-sig")
    texts, labels, _ = ev.labelled(tmp_path / "t[1].csv", budget=10**6)
    assert Counter(labels) == {"0": 2500, "1": 2500}
    assert all(re.fullmatch(r"text, \d+", text) for text in texts)


@pytest.mark.parametrize("share", [1.0, 0.7])
def test_pooled_equals_text_by_text(lm, share):
    """Means within the limit must be those of each text; to move one must be to zero latents."""
    model, tokenizer = load_tiny(lm)
    sae = random_sae(32, dtype=torch.float32)
    texts = ["the cat<eos> sat", "dog", "a bird sang a loud song of spring " * 20]
    rows = [[2, *tokenizer(t, add_special_tokens=False)["input_ids"]][:12] for t in texts]
    xs = [dmsae.residual_stream(model, 0, torch.tensor([row]))[0] for row in rows]
    xs = [x[torch.tensor(row) > 2] for x, row in zip(xs, rows, strict=True)]  # none that is special
    limit = 1.001 * torch.cat(xs).norm(dim=1).quantile(share).item()
    X, A = ev.pooled(model, 0, tokenizer, sae, texts, 12, limit)
    for i, x in enumerate(xs):
        x = x[x.norm(dim=1) <= limit]
        f = sae.encode(x)
        less = f.index_fill(1, torch.tensor([3, 5]), 0)
        ablated = sae.decode(less) + (x - sae.decode(f))  # what `ablations` takes it to be
        moved = X[i] - A[i, [3, 5]] @ sae.W_dec[[3, 5]]
        for got, want in (X[i], x), (A[i], f), (moved, ablated):
            assert torch.allclose(got, want.mean(0), atol=1e-5)
    assert not ev.pooled(model, 0, tokenizer, sae, texts, 12, 0.0)[1].any()


def test_one_vs_rest_is_balanced_and_disjoint():
    """Negatives must be as many, of all others in equal shares, and no text in train and test."""
    labels = np.array(list("abc" * 50) + ["a"] * 30)
    for c, (train, test) in zip("abc", ev.one_vs_rest(labels, 1), strict=True):
        for on, off in train, test:
            assert {*labels[on]} == {c} and c not in labels[off]
        used = [*train.flatten().tolist(), *test.flatten().tolist()]
        assert len({*used}) == len(used)
        others = Counter(labels[train[1]]).values()
        assert len(others) == 2 and max(others) - min(others) <= 1
        assert train.shape[1] in (40, 64)
    for train, test in ev.one_vs_rest(list("abcd" * 50)):
        assert (train.shape, test.shape) == ((2, 40), (2, 10))


def test_sparse_probing_finds_planted_classes():
    """A latent that fires on one class must tell it, also by its silence, and none be at chance."""
    torch.manual_seed(0)
    of_class = F.one_hot(torch.arange(120) % 3, 3) * (1 + torch.rand(120, 3))
    A, labels = torch.cat([of_class, torch.rand(120, 3)], 1), np.array(list("abc") * 40)
    X = F.pad(A, (0, 2))
    r = ev.sparse_probing(X @ torch.linalg.qr(torch.randn(8, 8))[0], A, labels)
    assert r["sae_top_1_test_accuracy"] == 1 > r["llm_top_1_test_accuracy"]
    always = torch.cat([A, 9 + torch.rand(120, 1)], 1)  # large, and the same for all classes
    for rows in always, 1.0 - (A[:, :3] > 0).float():
        assert ev.sparse_probing(X, rows, labels)["sae_top_1_test_accuracy"] == 1
    assert ev.sparse_probing(X, torch.zeros_like(A), labels)["sae_top_5_test_accuracy"] == 0.5
    same = ev.sparse_probing(A, A, labels)
    assert same["llm_top_2_test_accuracy"] == same["sae_top_2_test_accuracy"]
    for given in labels.tolist(), labels.astype(object), torch.arange(120) % 3:
        assert ev.sparse_probing(A, A, given) == same


ABLATED = 2, 5, 10, 20, 50, 100, 500


def naive_accuracy(task, probe, X, A, W_dec, gone=()):
    """Of a probe on a task's positives and the rest, without the latents `gone`."""
    left = X - sum(A[:, i, None] * W_dec[i] for i in gone)
    says = left @ probe[:-1] + probe[-1] > 0
    return np.mean([*says[list(task[0])], *~says[list(task[1])]])


def test_tpp_equals_a_naive_reference():
    """With the same probes, figures must equal ablation text by text, and means over the seeds."""
    torch.manual_seed(3)
    labels, A = np.array(list("abcd") * 100), torch.rand(400, 30) * (torch.rand(400, 30) < 0.5)
    A += 0.4 * F.one_hot(torch.arange(400) % 4, 30)
    W_dec = F.normalize(torch.randn(30, 6))
    X = A @ W_dec + 0.1 * torch.randn(400, 6)
    r = ev.tpp(X, A, labels, W_dec, seeds=(5, 6))
    row, other = r["details"]
    tasks = ev.one_vs_rest(labels, 5)
    probes = [ev.train_probe(X, *task, 5)[0].numpy() for task in tasks]
    data = X.numpy(), A.numpy(), W_dec.numpy()
    lost = {(n, own): [] for n in ABLATED for own in (True, False)}
    before = [naive_accuracy(tasks[j][1], probes[j], *data) for j in range(4)]
    for i in range(4):
        on, off = (A[texts].mean(0) for texts in tasks[i][0])
        effect = (on - off).clamp_min(0) * torch.tensor(data[2] @ probes[i][:-1])
        # As many may go as are not zero: among them some of no effect, as in SAEBench.
        order = effect.topk(int((effect != 0).sum())).indices.tolist()
        for j, n in itertools.product(range(4), ABLATED):
            after = naive_accuracy(tasks[j][1], probes[j], *data, order[:n])
            lost[n, i == j].append(before[j] - after)
    assert row["probe_accuracy"] == pytest.approx(np.mean(before))
    for (n, own), values in lost.items():
        name = f"tpp_threshold_{n}_{'intended' if own else 'unintended'}"
        assert row[name] == pytest.approx(np.mean(values), abs=1e-6)
        total = row[f"tpp_threshold_{n}_intended"] - row[f"tpp_threshold_{n}_unintended"]
        assert row[f"tpp_threshold_{n}_total_metric"] == pytest.approx(total)
    assert other != row
    assert ev.mean_of([row, other]).items() <= r.items()
    r = ev.mean_of([dict(a=1.0, b=None), dict(a=3.0, b=5.0)])  # deviations over n - 1
    assert r == dict(a=2, a_std=pytest.approx(math.sqrt(2)), b=5, b_std=None)


def test_scr_equals_a_naive_reference():
    """With the same probes, figures must equal loops over texts and latents; a tie must be None."""
    torch.manual_seed(4)
    label, spurious = torch.arange(1200) % 2, torch.arange(1200) // 2 % 2
    A = torch.rand(1200, 12) * (torch.rand(1200, 12) < 0.5)
    A[:, 0] += 0.3 * label
    A[:, 1] += 0.6 * spurious
    W_dec = F.normalize(torch.randn(12, 5))
    X = A @ W_dec + 0.1 * torch.randn(1200, 5)
    labels = label.numpy(), spurious.numpy()
    r = ev.scr(X, A, *labels, W_dec, seeds=(3, 4))
    row, other = r["details"]
    assert (r["pairs"], other != row) == (1, True)
    assert ev.mean_of([row, other]).items() <= r.items()
    tie = ev.scr(0 * X, A, *labels, W_dec, seeds=(3,))
    assert tie["scr_metric_threshold_2"] is tie["scr_metric_threshold_2_std"] is None
    assert tie["scr_dir1_threshold_2"] == 0
    rng, cells = np.random.default_rng(3), []
    for c, v in itertools.product((0, 1), (0, 1)):
        cells.append(rng.permutation(np.flatnonzero((label == c) & (spurious == v))).tolist())

    def tasks(at, half):
        au, av, bu, bv = (cell[at][:half] for cell in cells)
        biased = cells[0][at][: 2 * half], cells[3][at][: 2 * half]
        return [(au + av, bu + bv), (au + bu, av + bv), biased]

    train, test = tasks(slice(0, 240), 120), tasks(slice(240, 300), 30)
    pairs = [map(torch.tensor, pair) for pair in zip(train, test, strict=True)]
    probes = [ev.train_probe(X, *pair, 3)[0].numpy() for pair in pairs]
    data = X.numpy(), A.numpy(), W_dec.numpy()
    before = [naive_accuracy(test[i], probes[2], *data) for i in (0, 1)]
    assert before[0] != before[1]
    for n in ABLATED:
        scores = []
        for asked, other in (0, 1), (1, 0):
            on, off = train[other]
            effect = (A[on].mean(0) - A[off].mean(0)).numpy() * (data[2] @ probes[other][:-1])
            gone = sorted(range(12), key=lambda k: -abs(effect[k]))[:n]
            room = naive_accuracy(test[asked], probes[asked], *data) - before[asked]
            gain = naive_accuracy(test[asked], probes[2], *data, gone) - before[asked]
            scores.append(gain / room if room >= 0.001 else 0)
        scores.append(scores[np.argmin(before)])
        names = [f"scr_{name}_threshold_{n}" for name in ("dir1", "dir2", "metric")]
        assert [row[name] for name in names] == pytest.approx(scores, abs=1e-5)


def test_scr_takes_the_pairs_with_the_most_texts():
    """It must take the four whose smallest of four cells is the largest, and is 50 at least."""
    sizes = dict(a=60, b=55, c=50, d=52, e=49)
    labels = [c for c, n in sizes.items() for _ in range(2 * n)]
    values = [v for n in sizes.values() for v in "uv" for _ in range(n)]
    found = ev.scr_cells(labels, values)
    pairs = ["".join(labels[cell[0]] for cell in cells[::2]) for cells in found]
    assert pairs == ["ab", "ad", "bd", "ac"]
    assert str(ev.scr_cells(np.array(labels), np.array(values, object))) == str(found)
    for bad in None, ["u"] * len(labels), ["u" if c == "a" else "v" for c in labels]:
        with pytest.raises(ValueError, match="third column"):
            ev.scr_cells(labels, bad)


def test_stability_equals_sets_of_births(story):
    """All must equal what the sets of identities in the saved cores give, and the counts there."""
    rows, before = [ev.stability(folder) for folder in ev.cycles(story)], set()
    for n, row in enumerate(rows):
        core = saved_core(story, n)
        now = {*map(tuple, core["birth"].tolist())}
        both = len(now & before)
        assert (row["cycle"], row["core"], row["kept"]) == (n, len(now), both)
        assert (row["new"], row["dropped"]) == (len(now - before), len(before - now))
        assert row["births"] == Counter(training for training, _ in now)
        before = now
    assert n == 3 and 0 < row["kept"] < row["core"]
    assert ev.stability(f"{story}/cycle3") == row


def test_assignment_equals_brute_force():
    """It must have the least cost of all matchings, and find a planted order in noise."""
    rng = np.random.default_rng(0)
    sizes = [*itertools.combinations_with_replacement(range(1, 7), 2), *[(5, 5)] * 60]
    for n, m in sizes:  # In few of a size does the price of a column matter.
        for cost in rng.integers(0, 4, (n, m)).astype(float), rng.normal(size=(n, m)):
            row_of = ev.assignment(cost)
            taken = row_of >= 0
            assert sorted(row_of[taken].tolist()) == list(range(n))
            columns = itertools.permutations(range(m), n)
            best = min(cost[np.arange(n), list(c)].sum() for c in columns)
            assert cost[row_of, np.arange(m)][taken].sum() == pytest.approx(best)
    torch.manual_seed(0)
    a, order = torch.randn(200, 24), torch.randperm(200)  # as many rows as a core has
    b = a[order] + 0.1 * torch.randn(200, 24)
    cosine = (F.normalize(a) @ F.normalize(b).T).double().numpy()
    assert np.array_equal(ev.assignment(-cosine), order.numpy())
    assert ev.pw_mcc(a, a[order]) == pytest.approx(1)
    assert ev.pw_mcc(a[:1], -a[:1]) == pytest.approx(-1)
    assert 0.9 < ev.pw_mcc(a, b[:50]) == pytest.approx(ev.pw_mcc(b[:50], a))


def test_agreement_of_planted_runs_beside_its_baselines(tmp_path, monkeypatch):
    """Runs that share their cores and nothing else must have a PW-MCC of 1 for the cores only."""
    torch.manual_seed(0)
    runs, shared, birth = [tmp_path / "a", tmp_path / "b"], torch.randn(20, 64), torch.zeros(20, 2)
    for run in runs:
        rows = torch.cat([shared, torch.randn(80, 64)])
        sae = ready_sae(rows, F.normalize(rows), 0.0, [60, 100])
        core = Core(shared, birth=birth.long(), index=torch.arange(20))
        about = SimpleNamespace(cfg=Config(d_sae=100), checksum="0", median_norm=1.0)
        run.mkdir()
        dmsae.save_cycle(about, run / "cycle0", 0, sae, core, {})
    matched = spied(monkeypatch, ev, "pw_mcc")
    r = ev.agreement(*runs)
    assert all((a < 0).any() for (a, _), _ in matched), "random directions are of either sign"
    core, drawn, prefix = r.values()
    assert [*r] == ["core", "drawn from prefix 0", "prefix 0"]
    assert (core["n"], drawn["n"], prefix["n"]) == ([20, 20], [20, 20], [60, 60])
    assert core["decoder"] == pytest.approx(1, abs=1e-5)
    assert core["decoder_random"] < 0.4
    assert prefix["decoder_random"] < prefix["decoder"] < 0.8
    assert drawn["decoder"] < 0.6
    assert ev.agreement(*runs) == r != ev.agreement(*runs, seed=1)
    assert ev.agreement(runs[0], runs[0])["prefix 0"]["decoder"] == pytest.approx(1, abs=1e-5)


# ---- The command line of eval.py, its table and its page ----------------------------------------
def report_of(capsys, *words):
    """What eval.py's command line writes, which must be strict JSON, and the lines it prints."""
    assert ev.main([*map(str, words)]) == 0
    lines = capsys.readouterr().out.splitlines()
    written = Path(lines[-1].removeprefix("written: ")).read_text("utf-8")
    return json.loads(written, parse_constant=pytest.fail), lines


def data_of(page):
    return json.loads(re.search(r"id=\"data\">(.*?)</script>", page, re.S)[1])


@pytest.fixture(scope="session")
def labels_csv(tmp_path_factory):
    """Labelled texts of the tiny model's words, with a spurious label."""
    path = tmp_path_factory.mktemp("labels") / "t_1.csv"
    starts, ends = ("the cat sat", "a bird sang"), ("song", "loud")
    rows = [f"{starts[i % 2]} {ends[i // 2 % 2]} {i},{i % 2},{i // 2 % 2}" for i in range(200)]
    path.write_text("\n".join(["text,label,spurious", *rows]), "utf-8")
    return path


def test_a_command_measures_all(letters, story, labels_csv, tmp_path, capsys, monkeypatch):
    """Metrics must have figures, those of the training, or a reason, and figures a meaning."""
    tried = spied(monkeypatch, ev, "tried")
    run, columns = shutil.copytree(story, tmp_path / "out"), ["text", "label", "spurious"]
    words = story, run, "--labelled", labels_csv, "--columns", *columns, "--seeds", 0, 1, "--html"
    report, lines = report_of(capsys, *words, "--tokens", 26_000, "--out", tmp_path / "e.json")
    assert [sae["folder"] for sae in report["saes"]] == ["out/cycle0", "out/cycle3"] * 2
    assert (report["arguments"]["seeds"], len(report["stability"])) == ("[0, 1]", 2)
    code, notes = metadata(story, 3)["checksum"], report["notes"]
    at = lines.index(notes[0])
    assert lines[at : at + 3] == notes
    assert notes[0].endswith(f"the one that the SAEs were trained on (checksum {code})")
    assert re.fullmatch("text: .* tokens in contexts of 32, held out by the run out", notes[1])
    assert re.fullmatch("t_1.csv, each text once: {'[01]': 100, '[01]': 100}", notes[2])
    measures = ev.reconstruction, ev.absorption, ev.pooled
    calls = [call for call, _ in tried if call[0] in measures]
    limit = 5 * metadata(story, 3)["median_norm"]
    assert [call[-1] for call in calls] == [limit] * 12  # three metrics of four SAEs
    plain, last, *_ = (sae["metrics"] for sae in report["saes"])
    labelled = [f"{metric} t_1.csv" for metric in ("probing", "tpp", "scr")]
    assert [*plain] == [*last] == ["reconstruction", "absorption", *labelled, "stability"]
    got, want = last["reconstruction"], result(story, 3)
    assert got["ce_loss_score"] == pytest.approx(want["ce_recovered"], abs=1e-4)
    assert [got["l0"], got["core_l0"]] == pytest.approx([want["l0"], want["core_l0"]], rel=1e-3)
    assert got["fvu"] == pytest.approx(want["fvu"][-1], rel=1e-3)
    assert (last["stability"]["core"], last["scr t_1.csv"]["pairs"]) == (want["core"], 1)
    assert len(last["tpp t_1.csv"]["details"]) == 2
    assert "words of letters only" in (reason := last["absorption"]["cannot_run"])
    shown = [f"reconstruction: {name}" for name in got] + [f"absorption: cannot run: {reason}"]
    kinds = "sae_top_1_test_accuracy", "tpp_threshold_20_total_metric", "scr_metric_threshold_20"
    shown += [f"{metric}: {kind}" for metric, kind in zip(labelled, kinds, strict=True)]
    shown += ["stability: core", "stability: kept"]
    assert [line.split("  ")[0] for line in lines[at + 4 : -4]] == shown
    assert report["agreement"][f"{story} and {run}"]["core"]["decoder"] == pytest.approx(1)
    assert lines[-4].startswith(f"PW-MCC of {story} and {run}, core [")
    assert ": 1.000, random directions 0." in lines[-4]
    assert str(labels_csv) not in (tmp_path / "e.html").read_text("utf-8")
    report["saes"][0]["metrics"]["absorption"] = ev.absorption(*letters[:1], 0, *letters[1:3])
    data = data_of(ev.page(report, {}))
    found = {name.split(": ")[1].removesuffix("_std") for name in data["all"]} - {"cannot_run"}
    found = {name if name in data["meaning"] else re.sub(r"\d+", "N", name) for name in found}
    assert found == {*data["meaning"]}


def test_the_page_holds_what_it_shows(story, tmp_path, capsys, monkeypatch):
    """It must hold all figures and the core's latents with their peaks; no text is HTML."""
    pages = spied(monkeypatch, ev, "core_page")
    report, _ = report_of(capsys, story, "--only", "stability", "--html", "--out", tmp_path / "e")
    page = (tmp_path / "e.html").read_text("utf-8")
    assert not re.search(r'(src|href)="?http|@import|document.write', page)
    data, core = data_of(page), saved_core(story, 3)
    assert (data["all"], data["notes"]) == (ev.every_figure(report), report["notes"])
    assert len(*data["stability"].values()) == 4
    assert len(data["scores"]) == len(data["density"]) == load_sae(story / "cycle3").widths[0]
    order = core["score"].argsort(descending=True)
    assert data["core"]["index"] == core["index"][order].tolist()
    assert len(data["contexts"]) == len(data["raises"]) == len(order)
    for raised, contexts in zip(data["raises"], data["contexts"], strict=True):
        peaks = [max(shades) for _, shades in contexts]
        assert (len(raised), len(peaks)) == (8, 4)
        assert peaks == sorted(peaks, reverse=True)
        assert peaks[0] == pytest.approx(1) or not any(peaks)
    ((given, _),) = pages
    given[-1].sae.threshold.fill_(math.inf)  # All latents are off: no token may be shaded.
    silent = ev.core_page(*given)["contexts"]
    assert not any(any(shades) for contexts in silent for _, shades in contexts)
    metrics = {"<u>": dict(cannot_run="because </script><b>")}
    report |= dict(model="<b>", notes=["<i>&"], saes=[dict(folder="a<", metrics=metrics)])
    page = ev.page(report, dict(raises=[["</script>"]]))
    assert all(page.count(tag) == ev.PAGE.count(tag) for tag in ("</script>", "<b>", "<i>"))
    assert data_of(page)["all"] == {"<u>: cannot_run": ["because </script><b>"]}


def test_files_are_utf_8_and_whole_or_not_there(story, tmp_path, monkeypatch):
    """Files must be UTF-8 anywhere, no page half there, and each SAE's figures there at once."""
    write, words = Path.write_text, ["--only", "stability", "--html", f"--out={tmp_path}/e.json"]

    def full_disk(path, data, encoding=None):
        assert encoding == "utf-8"
        write(path, data[:99] if "html" in path.name else data, encoding)
        if "html" in path.name:
            raise OSError("no space left")

    monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises(OSError, match="no space"):
        ev.main([f"{story}/cycle3", *words])
    measured = iter([{}])
    monkeypatch.setattr(ev, "measure", lambda *args: next(measured))
    with pytest.raises(StopIteration):  # at the second SAE
        ev.main([str(story), *words])
    for name in "e.json", "e-2.json":
        assert len(json.loads((tmp_path / name).read_text("utf-8"))["saes"]) == 1
    assert not (tmp_path / "e.html").exists()


@pytest.mark.parametrize("kind", ["Bloom", "OPT", "Gemma2"])
def test_raised_tokens_are_the_models_own(kind):
    """The tokens must be those of the head, behind whatever norm or projection a model has."""
    import transformers

    shape = dict(vocab_size=50, hidden_size=16, num_attention_heads=2, num_hidden_layers=2)
    shape |= dict(n_head=2, n_layer=2, head_dim=8, num_key_value_heads=1, ffn_dim=16)
    shape |= dict(word_embed_proj_dim=8, do_layer_norm_before=False)  # of OPT
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**shape)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    for name, p in model.named_parameters():
        nn.init.normal_(p, 1.0 if "norm" in name else 0.0)  # a norm of ones could be left out
    rows, seen, head = torch.randn(7, 16), [], model.get_output_embeddings()
    head.register_forward_hook(lambda m, x, y: seen.append(x[0][:, 0]))
    ids = ev.raised_tokens(model, rows)
    assert torch.equal(ids, F.linear(seen[0], head.weight).topk(8).indices)
    norm = dict(Bloom="transformer.ln_f", Gemma2="model.norm").get(kind)
    if norm:
        assert torch.allclose(seen[0], model.get_submodule(norm)(rows), atol=1e-5)


def test_a_foreign_folder_is_measured_unchecked(story, lm, labels_csv, tmp_path, capsys):
    """SAELens's files must be enough, and the report say that model and run are not known."""
    foreign = shutil.copytree(story / "cycle0", tmp_path / "hub" / "sae")
    (foreign / "core.safetensors").unlink()
    cfg, known = json.loads((foreign / "cfg.json").read_text("utf-8")), metadata(story, 0)
    names = "sae_lens_version", "model_name", "context_size", "hook_name", "prepend_bos"
    (foreign / "cfg.json").write_text(
        json.dumps(cfg | dict(metadata={n: known[n] for n in names})), "utf-8"
    )
    w, factor = weights(story, 0), 0.2 + torch.rand(128)
    w |= {name: w[name] / factor for name in ("W_enc", "b_enc", "threshold")}
    save_file(w | dict(W_dec=w["W_dec"] * factor[:, None]), foreign / "sae_weights.safetensors")
    trained, x = ev.open_sae(foreign), 9 * torch.randn(500, 32)
    assert torch.allclose(trained.sae.encode(x), load_sae(story / "cycle0").encode(x), atol=1e-4)
    assert torch.allclose(trained.sae.W_dec.norm(dim=1), torch.ones(128))
    assert trained.limit == math.inf
    words = story / "cycle0", foreign, "--only", "reconstruction", "stability", "--html"
    report, lines = report_of(capsys, *words, "--out", tmp_path / "e.json")
    assert f"not checked: {foreign} has no checksum of it" in report["notes"][0]
    ours, theirs = (sae["metrics"] for sae in report["saes"])
    for name in "l0", "fvu_all_positions":
        assert ours["reconstruction"][name] == pytest.approx(theirs["reconstruction"][name])
    assert "no run folder" in theirs["stability"]["cannot_run"]
    (line,) = [line for line in lines if line.startswith("stability: core ")]
    assert line.split()[2:] == [str(ours["stability"]["core"]), "-"]
    words = foreign, "--only", "scr", "--html", "--labelled", labels_csv, "--text", lm / "text.txt"
    report, _ = report_of(capsys, *words, "--tokens", 2000)
    assert report["notes"][1].endswith(f"{lm}/text.txt, not known to be held out")
    assert "third column" in report["saes"][0]["metrics"]["scr t_1.csv"]["cannot_run"]
    assert "core" not in data_of((foreign / "eval.html").read_text("utf-8"))


@pytest.mark.parametrize("change", [replace_weights, swap_two_words])
def test_another_model_behind_the_same_name_is_refused(own_lm, tmp_path, capsys, change):
    """The run must not go on; eval.py must measure with --model, on new ids, and report it."""
    run = tmp_path / "run"
    dmsae.main(command(own_lm, run, cycles=0))
    change(own_lm)
    line = refusal(capsys, command(own_lm, run, cycles=0))
    assert re.search(r"\(checksum \w{8} there, \w{8} here\)", line)
    code = metadata(run, 0)["checksum"]
    says = f"not {code} of {run}/cycle0; --model {own_lm} measures"
    assert says in refusal(capsys, [str(run)], ev)
    words = run, "--only", "reconstruction", "--model", own_lm, "--tokens", 2000
    report, _ = report_of(capsys, *words)
    assert re.match(f"model: [0-9a-f]{{8}} of {own_lm}, not {code} of ", report["notes"][0])
    assert report["notes"][1].endswith("text.txt, not known to be held out")
    replace_in(own_lm / "config.json", '"hidden_size": 32', '"hidden_size": 16')
    replace_weights(own_lm)
    assert "is not of width 16" in refusal(capsys, [*map(str, words)], ev)


@pytest.mark.parametrize(
    "file, change, says",
    [
        ("cycle0/cfg.json", lambda old: old.replace(b'"ctx": 32', b'"ctx": 16'), "32.*16"),
        ("cycle0/cfg.json", lambda old: old.replace(b"131072", b"310"), "1705 tokens.*'310 tokens"),
        ("tokens.bin", lambda old: old[4:] + old[:4], "1705 tokens.*'1705 tokens"),
    ],
)
def test_runs_of_other_texts_are_refused(story, tmp_path, capsys, file, change, says):
    """Other contexts, held-out parts or texts in one command must be refused, and be named."""
    run = shutil.copytree(story, tmp_path / "run")
    (run / file).write_bytes(change((run / file).read_bytes()))
    line = refusal(capsys, [f"{story}/cycle0", f"{run}/cycle0"], ev)
    assert re.search(f"so measure one by one.*{story}.*{says}", line)


def test_long_names_of_columns_stay_apart():
    """The default run's folder, gemma-2-2b_k64_seed0/cycle0, was wider than its column."""
    saes = [dict(folder=name * 27, metrics={}) for name in "abc"]
    assert len(next(ev.table(dict(saes=saes, agreement={}))).split()) == 3


def test_a_given_text_is_cut_by_its_own_separator(story, lm, tmp_path, capsys, monkeypatch):
    """It must be cut as --separator says, the run's own be named, and nothing be overwritten."""
    docs = (lm / "text.txt").read_text("utf-8").split("|||")
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps(dict(doc=doc)) for doc in docs), "utf-8")
    (tmp_path / "t.txt").write_text("\n".join(docs), "utf-8")
    (tmp_path / "e.html").write_text("precious", "utf-8")
    opened = spied(monkeypatch, ev, "open_contexts")
    for text, flags, cut, out, free in (
        (lm / "text.txt", [], False, "e", "e-2"),
        (lm / "text.txt", ["--separator", "|||"], True, "e.json", "e-3"),
        (tmp_path / "t.txt", ["--separator", r"\n", "--html"], True, "v0.1", "v0.1"),
        (tmp_path / "t.jsonl", ["--text-column", "doc", "--all"], True, "v0.1", "v0.1-2"),
    ):
        words = "--only", "stability", "probing", "--tokens", 2000, "--text", text, *flags
        report, lines = report_of(capsys, story / "cycle0", *words, "--out", tmp_path / out)
        assert lines[-1] == f"written: {tmp_path}/{free}.json"
        given = flags[1] if "--separator" in flags else None
        assert f"--separator {given!r} (of the first SAE: '|||')" in report["notes"][1]
        assert [line for line in lines if "--labelled FILE" in line] == report["notes"][2:]
        assert ("stability: dropped" in "".join(lines)) == ("--all" in flags)
        ids, keep, _ = opened[-1][1]
        assert ids.shape == (62, 32)
        assert ((ids[:, 1:] == 2).sum() > 5) == cut
    assert all(torch.equal(opened[1][1][0], same[0]) for _, same in opened[2:])
    assert (tmp_path / "e.html").read_text("utf-8") == "precious"


def test_paths_may_be_given_from_anywhere(lm, labels_csv, tmp_path, capsys, monkeypatch):
    """A run must be measured alike from any folder, by a link, with a slash or as a dot."""
    work = tmp_path / "work"
    shutil.copytree(lm, work / "lm")
    monkeypatch.chdir(work)
    dmsae.main(command(Path("lm"), "runs/a", cycles=0))
    (tmp_path / "link").symlink_to(work / "runs" / "a" / "cycle0")
    only = "--tokens", 2000, "--only", "reconstruction", "stability", "probing"
    seen = []
    for base, folder in ("runs", "a/"), ("runs/a", "."), ("runs/a/cycle0", "."), ("..", "link"):
        monkeypatch.chdir(work / base)
        labels = os.path.relpath(labels_csv)
        report, _ = report_of(capsys, folder, *only, "--labelled", labels, "--out", "e")
        seen.append((report["model"], report["notes"], report["saes"]))
    assert seen[0] == seen[1] == seen[2] == seen[3]
    model, (_, text, *_), (sae,) = seen[0]
    assert (model, sae["folder"]) == (f"{work}/lm", "a/cycle0")
    assert text.endswith("held out by the run a")
    (work / "runs" / "a" / "tokens.bin").unlink()
    for flags in (), ("--model", "work/lm", "--text", "work/lm/text.txt"):
        report, _ = report_of(capsys, "work/runs/a", *only, *flags)
        assert report["model"] == f"{work}/lm"
        assert f"the start of {work}/lm/text.txt" in report["notes"][1]


BAD_FILES = {"empty.csv": "text,label\n", "l.jsonl": '["a b"]', "m.md": "# text\n"}
BAD_FILES |= {"c.jsonl": '{"text": "a", "lab', "one.csv": "\n".join(["text,label", *30 * ["x,1"]])}
BAD_FILES["good.csv"] = "\n".join(["text,label", *(f"{i},{i % 2}" for i in range(60))])
REFUSED = """
required <-
is no SAE folder <- /nowhere
invalid choice <- RUN --only speed
invalid int <- RUN --tokens x; RUN --seeds x
--tokens: 1 or above; --seeds: 0 or above <- RUN --columns text; RUN --tokens 0; RUN --seeds -1
need --text <- RUN --separator x; RUN --text-column x
No such file <- RUN --labelled /nowhere.csv
has only no rows <- RUN --labelled empty.csv
two are needed <- RUN --labelled one.csv; RUN --labelled good.csv --columns label text
must be a .csv or .jsonl <- RUN --labelled m.md; RUN --labelled c.jsonl; RUN --labelled l.jsonl
has only ['text', 'label'] <- RUN --labelled good.csv --columns words label
label sex <- RUN --labelled good.csv --columns text label sex
--out /nowhere/eval.json <- RUN --out /nowhere/eval.json
existing file <- RUN --text /nowhere.txt
--device <- RUN --device cuda:9
--model /nowhere: cannot be used <- RUN --model /nowhere
blocks.N.hook_resid_post <- cycle0/cfg.json:resid_post:mlp_out; cycle3/cfg.json:resid_post:resid_pre
--layer 9 <- cycle3/cfg.json:blocks.0:blocks.9
cycle0/cfg.json: is missing or damaged <- cycle0/cfg.json
cycle1/cfg.json: is missing or damaged <- cycle1/cfg.json
'result' <- cycle1/cfg.json:result:x
'd_in' <- cycle0/cfg.json:d_in:x
'hook_name' <- cycle0/cfg.json:hook_name:x
cycle1/core.safetensors: is damaged <- cycle1/core.safetensors
has less than three contexts <- tokens.bin
"""
REFUSED = [line.split(" <-") for line in REFUSED.strip().splitlines()]


@pytest.mark.parametrize("says, words", [(a, w) for a, b in REFUSED for w in b.split(";")])
def test_bad_input_of_eval_is_one_line(says, words, story, tmp_path, capsys, monkeypatch):
    """It must be one line, exit code 2, and nothing written. A file stands for a run where it is
    empty, or where a name in it is another."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(story, "RUN")
    for name, text in BAD_FILES.items():
        Path(name).write_text(text, "utf-8")
    if re.match("cycle|tokens", words.strip()):
        file, *change = words.strip().split(":")
        path, words = Path("RUN", file), "RUN"
        path.write_text(path.read_text("utf-8").replace(*change) if change else "", "utf-8")
    before = {*Path().rglob("*")}
    assert says in refusal(capsys, words.split(), ev)
    assert {*Path().rglob("*")} <= before


def test_trainings_come_in_the_order_of_their_numbers(tmp_path):
    """Training 10 must come after training 2, and no other folder count."""
    for name in "cycle10", "cycle2", "cycle0", "cycle1.part", "cyclex", "cycle3":
        (tmp_path / name).mkdir()
        (tmp_path / name / ("cfg.json" if name == "cycle3" else "core.safetensors")).touch()
    assert [path.name for path in ev.cycles(tmp_path)] == ["cycle0", "cycle2", "cycle10"]


@pytest.mark.skipif(not shutil.which("node"), reason="needs Node.js")
def test_the_pages_script_draws_the_share_of_the_best_latents():
    """In a document of stubs it must run, and the attribution curve must end at 1."""
    core = dict(index=[2], score=[3.0], density=[0.1], birth=[[0, 2]], votes=[1])
    of_core = dict(core=core, contexts=[[]], raises=[[]], scores=[1.0, 3.0, 4.0], density=[0.1] * 3)
    page = ev.page(dict(model="m", layer=0, notes=[], saes=[], stability={}), of_core)
    code = "const all = {}, stub = () => ({ innerHTML: '', value: '', children: [] })\n"
    code += "const document = { getElementById: id => (all[id] = all[id] ?? stub()) }\n"
    data = json.dumps(json.dumps(data_of(page)))
    code += f"document.getElementById('data').textContent = {data}\n"
    code += re.search(r"</script><script>(.*)</script>", page, re.S)[1]
    node = ["node", "-e", code + "\nconsole.log(all.charts.innerHTML)"]
    drawn = subprocess.run(node, capture_output=True, text=True, check=True).stdout
    assert re.findall("<title>attribution: .* (.*)</title>", drawn) == ["0.5", "0.875", "1"]


# ---- README: its commands parse, its pieces paste, its claims hold ------------------------------
README = (HERE / "README.md").read_text("utf-8")
PASTE_HEAD = "import torch\nimport torch.nn.functional as F\nfrom torch import nn"


def readme_blocks(kind):
    """The fenced blocks of README.md that are marked as of this kind."""
    return [text for k, text in re.findall(r"(?ms)^```(\w*)\n(.*?)^```$", README) if k == kind]


def readme_pieces():
    """The rows of README.md's table of pieces: {last name taken: (names, imports)}."""
    table = re.search(r"\| piece \| take \| and import \|\n\|---.*\n((?:\|.*\n)+)", README)[1]
    rows = [row.split("|") for row in table.splitlines()]
    names = [(re.findall("`(.*?)`", row[2]), re.findall("`(.*?)`", row[3])) for row in rows]
    return {take[-1]: (take, imports) for take, imports in names}


def paste(name):
    """An empty module with a piece of dmsae.py, and with nothing but what the table says."""
    source = (HERE / "dmsae.py").read_text("utf-8")
    take, imports = readme_pieces()[name]
    found = {w: re.search(rf"(?m)^from (\S+) import .*\b{w}\b", source) for w in imports}
    code = [f"from {m[1]} import {w}" if m else f"import {w}" for w, m in found.items()]
    code.insert(0, PASTE_HEAD)
    for node in ast.parse(source).body:
        targets = getattr(node, "targets", [])
        if {getattr(node, "name", ""), *(getattr(t, "id", "") for t in targets)} & set(take):
            first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
            code.append("\n".join(source.splitlines()[first - 1 : node.end_lineno]))
    module = ModuleType("pasted")
    exec("\n\n".join(code), vars(module))
    assert all(hasattr(module, word) for word in take)
    return module


def test_pieces_of_the_method_paste():
    """They must run in an empty module, and an SAE learn; the table must name seven pieces."""
    names = "select_core nested_loss nested_decode update_threshold residual_stream attribute"
    assert [*readme_pieces()] == [*names.split(), "load_sae"]
    assert paste("select_core").select_core(torch.tensor([1.0, 3.0, 0.0]), 0.7).tolist() == [1]
    x_hats = torch.tensor([[[3.0, 0.0], [3.0, 3.0]]])
    assert paste("nested_loss").nested_loss(torch.tensor([[3.0, 4.0]]), x_hats) == 17 / 4
    piece, sae, x = paste("nested_decode"), random_sae(), torch.randn(3, 8).double()
    row, col = torch.tensor([0, 0, 2]), torch.tensor([1, 50, 14])
    value = sae.pre_activations(x)[row, col].detach()
    value = piece.EncodeAt.apply(sae.W_enc, sae.b_enc, sae.b_dec, x, value, row, col)
    x_hats = piece.nested_decode(value, row, col, sae, 3)
    dense = torch.zeros(3, 64).double().index_put((row, col), value)
    assert torch.allclose(x_hats[:, 1], sae.decode(dense[:, :25]))
    x_hats.sum().backward()
    assert sae.W_enc.grad.any()
    piece = paste("update_threshold")
    sae, x, losses = piece.MatryoshkaSAE(8, [16, 64]), torch.randn(256, 8), []
    adam = torch.optim.Adam(sae.parameters())
    for step in range(30):
        loss, fired, smallest_kept = piece.training_loss(sae, x, 4, torch.arange(60, 64))
        loss.backward()
        piece.update(sae, adam, lr=1e-2)
        piece.update_threshold(sae, smallest_kept, step)
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert fired.sum() == 256 * 4


def test_the_language_model_pieces_paste(story):
    """They must run on a toy in an empty module, and load_sae load our folder."""
    toy, ids = random_toy(50), torch.randint(1, 50, (6, 10))
    piece = paste("residual_stream")
    assert torch.equal(piece.residual_stream(toy, 0, ids), toy.embedding[ids])
    with piece.spliced(toy, 0, torch.zeros_like):
        assert not toy(ids).logits.any()
    score, density = paste("attribute").attribute(toy, 0, ids, ids > 0, MatryoshkaSAE(8, [8, 16]))
    assert len(score) == 8
    assert score.sum() > 0
    assert 0 < density.sum() < 8
    x = torch.randn(5, 32)
    ours = load_sae(story / "cycle3").encode(x)
    assert torch.equal(paste("load_sae").load_sae(story / "cycle3").encode(x), ours)


def test_readme_commands_parse(tmp_path):
    """Every dmsae.py and eval.py command must parse that a shell makes of README.md's blocks (with
    a `python` that only writes down what it is given); a run's --core must be another's."""
    plain = "".join(readme_blocks("")).splitlines()
    lines = [line for line in plain if line.startswith(("python ", "pip "))]
    stub = f"python() {{ printf '%s\\0' \"$@\" END >> {tmp_path}/log; echo 0.1 0.2 0.3 0.4; }}"
    script = "\n".join([stub, "pip() { true; }", *lines, *readme_blocks("sh")])
    subprocess.run(["bash", "-euc", script], check=True, capture_output=True, cwd=tmp_path)
    calls = (tmp_path / "log").read_text("utf-8").split("END\0")[:-1]
    given = {"dmsae.py": [], "eval.py": [], "test_dmsae.py": [], "evidence.py": [], "-m": []}
    for name, *words in (call.split("\0")[:-1] for call in calls):
        given[name].append(words)
    runs = [dmsae.parse(words) for words in given["dmsae.py"] if words != ["--help"]]
    assert len(runs) >= 7
    assert len([ev.parse(words) for words in given["eval.py"]]) >= 2
    outs = {cfg.out for cfg in runs} | {words[-1] for words in given["evidence.py"]}
    cores = {cfg.core for cfg in runs if cfg.core}
    assert all(core in outs or str(Path(core).parents[1]) in outs for core in cores)


def test_readme_line_counts_are_true():
    """The lines of each file must be as claimed, and must not grow."""
    for name, most in (("dmsae.py", 1153), ("eval.py", 1000)):
        (claimed,) = re.findall(rf"\| `{name}` \| (\d+) \|", README)
        assert int(claimed) == len((HERE / name).read_text("utf-8").splitlines()) <= most


def test_readme_snippets_run(story, tmp_path, monkeypatch):
    """The Python snippets must run as written, on a run folder of the README's name."""
    monkeypatch.chdir(tmp_path)
    snippets = readme_blocks("python")
    (folder,) = set(re.findall(r'"(runs/[^"]*?)/cycle', "".join(snippets)))
    Path(folder).parent.mkdir(parents=True)
    os.symlink(story, folder)
    assert len(snippets) == 2
    scope = {"acts": torch.randn(4096, 32), "x": torch.randn(9, 32), "torch": torch}
    for code in snippets:
        exec(code, scope)


def test_readme_saebench_lines(story, monkeypatch):
    """The lines for SAEBench must give its class, which is (x W_enc + b_enc) above the threshold,
    our latents. Its package is not installed here, so two stubs stand for it."""
    (code,) = [block for block in readme_blocks("") if "sae_bench" in block]
    code = re.sub('"runs/.*?/cycle5', f'"{story}/cycle3', code).replace("2304, 65536", "32, 128")
    calls = []

    class JumpReluSAE:
        def __init__(self, d_in, d_sae, model_name, layer, device, dtype):
            self.names = {"W_enc", "W_dec", "b_enc", "b_dec", "threshold"}

        def load_state_dict(self, given):
            assert given.keys() == self.names
            self.weights = given

    stubs = {"jumprelu_sae": ModuleType("a"), "run_all_evals_custom_saes": ModuleType("b")}
    stubs["jumprelu_sae"].JumpReluSAE = JumpReluSAE
    stubs["run_all_evals_custom_saes"].run_evals = lambda *args: calls.append(args)
    for name in ("sae_bench", "sae_bench.custom_saes"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for name, module in stubs.items():
        monkeypatch.setitem(sys.modules, f"sae_bench.custom_saes.{name}", module)
    exec(code, {})
    ((model, ((_, sae),), *_),) = calls
    assert model == "gemma-2-2b"
    x = 5 * torch.randn(50, 32)
    pre = x @ sae.weights["W_enc"] + sae.weights["b_enc"]
    acts = pre.relu() * (pre > sae.weights["threshold"])
    assert acts.any()
    assert torch.allclose(acts, load_sae(story / "cycle3").encode(x), atol=1e-4)


def test_the_evidence_is_what_the_rows_say(tmp_path, monkeypatch):
    """README's table must hold figures of rows in results/, each of one run; the core that is there
    must be what it says; and the code in results/README.md must draw the pictures there."""
    rows = (HERE / "results/gemma-3-270m-layer9.jsonl").read_text("utf-8").splitlines()
    found = set()
    sizes = {row["name"]: row.get("core") for row in map(json.loads, rows)}
    for row in map(json.loads, rows):
        l0, fvu = f"{row['l0']:.1f} ({row['core_l0']:.1f})", f"{row['fvu'][-1]:.4f}"[1:]
        ce = f"{row.get('ce_recovered', 0):.4f}"[1:]
        found.add((f"{row['k']}", l0, fvu, ce, f"{100 * row['dead']:.0f} %"))
    table = README.split("| training (seed 0) | k | L0 ")[1].split("\n\n")[0].splitlines()[2:]
    assert len(table) == 7
    for line in table:
        _, *figures = (cell.strip(" |") for cell in line.split(" | "))
        assert tuple(figures) in found, line
    core, origin = dmsae.load_core(HERE / "results/gemma-3-270m-layer9-core.safetensors")
    *chain, last = (sizes[f"m3_k64_c90_s0{t}"] for t in ("", "_t2", "_t3", "_t4", "_t5"))
    assert (len(core.W_enc), origin["training"], int((core.votes == 6).sum())) == (last, 5, 149)
    first = ", ".join(map(str, [sizes["m3_k64_s0"], *chain]))
    assert f"{first} and {last} latents" in README and f"Of its {last} latents, 149" in README
    shutil.copytree(HERE / "results", tmp_path / "results")
    about = (tmp_path / "results/README.md").read_text("utf-8")
    runs = defaultdict(list)
    for line in (HERE / "results/small-models.jsonl").read_text("utf-8").splitlines():
        row = json.loads(line)
        runs[row["model"], row["kind"], row["coverage"], row["lr"]].append(row["fvu"][-1])
    five = [fvu for fvu in runs.values() if len(fvu) == 5]
    assert len(five) == 8
    for fvu in five:
        mean, deviation = f"{statistics.mean(fvu):.4f}", f"{statistics.stdev(fvu):.4f}"
        assert f"| {mean[1:]} ± {deviation[1:]} |" in about
    (code,) = re.findall(r"(?ms)^```python\n(.*?)^```$", about)
    for name in ("core-share", "compute", "chain"):
        (tmp_path / f"results/{name}.svg").unlink()
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    for path in (HERE / "results").glob("*.svg"):
        drawn = (tmp_path / "results" / path.name).read_text("utf-8")
        assert drawn == path.read_text("utf-8")


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


def peak_gib(device):
    """Peak memory since it was reset, GiB: of the GPU's allocator, or of the process."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 2**30
    with contextlib.suppress(OSError):
        status = Path("/proc/self/status").read_text("utf-8")
        return int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) / 2**20
    return math.nan  # Only Linux says it.


def step_cases(sae, x, k):
    """What is timed of a training step; "product + Adam" is what no exact trainer can do without,
    and "dense autograd" is the same step by the plain loss."""
    n_latents = len(sae.W_enc)
    none = torch.arange(0, device=x.device)
    quarter = torch.arange(3 * n_latents // 4, n_latents, device=x.device)
    adam = torch.optim.Adam(sae.parameters(), 1e-6, fused=True)
    grads = []
    steps = itertools.count()

    @torch.no_grad()
    def product():
        return sae.pre_activations(x)

    def product_and_adam():
        product()
        if not grads:
            grads.extend(torch.zeros_like(p) for p in sae.parameters())
        for p, grad in zip(sae.parameters(), grads, strict=True):
            p.grad = grad
        adam.step()
        adam.zero_grad()

    def step(loss_function, dead):
        loss, _, smallest_kept = loss_function(sae, x, k, dead)
        loss.backward()
        update(sae, adam, 1e-6)
        update_threshold(sae, smallest_kept, next(steps))

    return {
        "encoder product": product,
        "encoder product + Adam": product_and_adam,
        "product and selection": lambda: sparse_topk(product(), sae.threshold, 0, k),
        "step": lambda: step(fast_training_loss, none),
        "step, quarter dead": lambda: step(fast_training_loss, quarter),
        "dense autograd": lambda: step(training_loss, none),
        "dense autograd, quarter dead": lambda: step(training_loss, quarter),
    }


def benchmark_model(cfg, model, sae, x, step_ms):
    """Harvest and attribution in tokens a second, and what the whole command would take."""
    lm = model.config.get_text_config()
    on_cuda = cfg.device.startswith("cuda")
    contexts, rounds = (4, 3) if on_cuda else (1, 1)
    gc.collect()  # Forget the peak so far, dense autograd's, where the system can.
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(cfg.device)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", "utf-8")
    block = torch.ones(64 * cfg.batch, lm.hidden_size, dtype=model.dtype, device=cfg.device)
    step = step_cases(sae, x, cfg.k)["step"]
    step()
    step()
    del block
    ids = torch.randint(1, lm.vocab_size, (contexts, cfg.ctx))
    keep = torch.ones_like(ids, dtype=torch.bool)
    cases = {
        "harvest": lambda: dmsae.harvest(model, cfg.layer, ids, keep),
        "attribution": lambda: attribute(model, cfg.layer, ids[:1], keep[:1], sae),
    }
    ms = median_ms(cases, rounds, cfg.device)
    rates = {"train": 1e3 * cfg.batch / step_ms}
    for name, n in (("harvest", ids.numel()), ("attribution", cfg.ctx)):
        rates[name] = 1e3 * n / ms[name]
        print(f"{name:30s}{ms[name]:10.1f} ms {rates[name]:12,.0f} tokens/s")
    saes = cfg.cycles + 1
    seconds = saes * cfg.tokens * (1 / rates["train"] + 1 / rates["harvest"])
    seconds += saes * (cfg.attribution_tokens + cfg.eval_tokens) / rates["attribution"]
    gigabytes = 8e-9 * cfg.d_sae * lm.hidden_size * (saes + 6) + 4e-9 * cfg.tokens
    print(f"the whole command: {seconds / 3600:.1f} hours, {gigabytes:.0f} GB on disk", end="")
    print(f", peak {peak_gib(cfg.device):.1f} GiB")


def benchmark(argv):
    """Time a training step; with --model, everything of `python dmsae.py` with these flags."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as dmsae.main does
    cfg = dmsae.parse(argv or ["--d-sae", "16384", "--k", "32", "--batch", "1024"])
    D, rounds, model = 512, 15, None
    if any(word.split("=")[0] == "--model" for word in argv):
        # A model of the named shape with random weights: nothing is downloaded.
        from transformers import AutoConfig, AutoModelForCausalLM, Gemma2Config

        if Path(cfg.model).name == "gemma-2-2b":
            shape = Gemma2Config(attn_implementation="eager")  # its defaults are Gemma-2-2B's
        else:
            shape = AutoConfig.from_pretrained(cfg.model)
        dtype = torch.bfloat16 if cfg.device.startswith("cuda") else torch.float32
        with torch.device(cfg.device):
            model = AutoModelForCausalLM.from_config(shape, dtype=dtype)
        model.eval().requires_grad_(False)
        D, rounds = shape.get_text_config().hidden_size, 3
    torch.manual_seed(0)
    x = torch.randn(cfg.batch, D, device=cfg.device)
    sae = dmsae.new_sae(cfg, Core(torch.zeros(0, D)), x, 1.0, 0)
    print(f"B {cfg.batch}, D {D}, F {cfg.d_sae}, k {cfg.k} | {cfg.device}, ", end="")
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, median of {rounds}")
    torch.set_float32_matmul_precision("high")  # as `train` does
    ms = median_ms(step_cases(sae, x, cfg.k), rounds, cfg.device)
    torch.set_float32_matmul_precision("highest")
    floor = ms["encoder product + Adam"]
    for name in ms:
        print(f"{name:30s}{ms[name]:10.1f} ms {ms[name] / floor:8.2f} x product + Adam")
    if model is not None:
        benchmark_model(cfg, model, sae, x, ms["step"])
    names = "step", "step, quarter dead", "dense autograd"
    ratios = [f"{ms[name] / floor:.2f}" for name in names]
    print("ratios: step {}, quarter dead {}, dense autograd {}".format(*ratios))


def test_the_benchmark_runs(lm, capsys):
    """It must end in a whole run's time and the ratios; its peak must be none of before."""
    waste = torch.ones(10**9, dtype=torch.int8)
    before = peak_gib("cpu")
    del waste
    words = "--layer 0 --ctx 32 --d-sae 256 --k 4 --batch 64 --device cpu --model"
    benchmark([*words.split(), str(lm)])
    *_, whole, last = capsys.readouterr().out.splitlines()
    peak = re.fullmatch(r"the whole command: \S+ hours, \d+ GB on disk, peak (\S+) GiB", whole)[1]
    assert float(peak) < before - 0.3
    assert re.fullmatch(r"ratios: step \S+, quarter dead \S+, dense autograd \S+", last)


if __name__ == "__main__":
    benchmark(sys.argv[1:])
