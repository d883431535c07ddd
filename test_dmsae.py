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
import resource
import shutil
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
from dmsae import Config, Core, MatryoshkaSAE, attribute, batch_topk, evaluate, fast_training_loss
from dmsae import load_sae, mean_loss, nested_loss, next_core, select_core, sparse_topk
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
    (folder / "text.txt").write_text("|||".join(docs))
    return folder


@pytest.fixture
def own_lm(lm, tmp_path):
    """A copy of the folder that a test may change."""
    return shutil.copytree(lm, tmp_path / "lm")


def load_tiny(lm):
    """The tiny language model, at its last layer and longest context."""
    return dmsae.load_model(Config(model=str(lm), layer=1, ctx=64, device="cpu"))[0]


def tokenizer_of(lm):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(lm)


def replace_weights(folder):
    """Put another model of the same shape into a model folder."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(1)
    config = AutoConfig.from_pretrained(folder)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def replace_in(path, old, new):
    path.write_text(path.read_text().replace(old, new))


def swap_two_words(folder):
    """Give two words of the tokenizer in a model folder each other's id."""
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text())
    vocab = data["model"]["vocab"]
    vocab["s"], vocab["n"] = vocab["n"], vocab["s"]
    path.write_text(json.dumps(data))


def command(lm, out, **changes):
    """A command line of a run that takes about a second."""
    words = dict(model=lm, text=lm / "text.txt", separator="|||", layer=0, ctx=32, d_sae=128, k=6)
    words |= dict(tokens=12_800, batch=128, lr=3e-3, cycles=1, attribution_tokens=1000)
    words |= dict(device="cpu", out=out) | changes
    given = {f"--{name.replace('_', '-')}": v for name, v in words.items() if v is not None}
    return [word for flag, value in given.items() for word in (flag, str(value))]


def refusal(capsys, argv):
    """The one line with which a command must end, with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        dmsae.main(argv)
    *before, line = capsys.readouterr().err.splitlines()
    assert end.value.code == 2
    assert line.startswith("dmsae: ")
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
    return json.loads((Path(out) / f"cycle{cycle}" / "cfg.json").read_text())["metadata"]


def result(out, cycle):
    return metadata(out, cycle)["result"]


def measured(out):
    return json.loads((Path(out) / "config.json").read_text())["measured"]


def assert_same(a, b, cycles):
    """SAEs and cores of two runs must be bitwise the same."""
    for cycle in cycles:
        for read in (weights, saved_core):
            x, y = read(a, cycle), read(b, cycle)
            assert x.keys() == y.keys()
            assert all(torch.equal(x[name], y[name]) for name in x), cycle


@pytest.fixture(scope="session")
def watched(lm, tmp_path_factory):
    """A whole run of three cycles through the real main: its folder `out`, what it `printed`, and
    all calls of some functions."""
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
THRESHOLDS["unequal thresholds"] = torch.tensor([0.0, 6.0]).repeat(32)
KINDS = ["plain", "equal values", "budget above all", "negative dead", "one prefix", "one token"]
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
        seen[kind] = core, left, int((others > 0).sum()), kept
    core, left, positive, kept = seen["plain"]
    assert 0 < core < left == kept < positive
    core, left, positive, kept = seen["equal values"]
    assert left + 9 < kept < positive
    core, left, positive, _ = seen["few positive"]
    assert 0 < positive < left
    assert seen["nothing positive"][::2] == (0, 0)
    assert seen["core over budget"][1] < 0
    assert seen["budget above all"][1] > 64 * 16


# ---- BatchTopK ----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "pre, n_core, threshold, k, want, smallest_kept",
    [
        # The four largest of six, in whatever row they are.
        ([[1, 5, 2], [6, 0.5, 4]], 0, 0, 2, [[0, 5, 2], [6, 0, 4]], 2),
        # Of equal entries at the edge all stay.
        ([[1, 2, 1], [1, 3, 1]], 0, 0, 2, [[1, 2, 1], [1, 3, 1]], 1),
        # Zero and below is never on, though there is room.
        ([[-1, 2], [0, 5]], 0, 1, 2, [[0, 2], [0, 5]], 2),
        ([[-1, -2], [0, -5]], 0, 1, 2, [[0, 0], [0, 0]], 0),
        # A core latent is on above its threshold, however small; the others share what it leaves.
        ([[3, 1, 2], [2, 4, 9]], 1, 2, 2, [[3, 0, 2], [0, 4, 9]], 2),
        # It is so without them, too.
        ([[3, -1, -2]], 1, 2, 2, [[3, 0, 0]], 0),
        # At a negative threshold it is on above zero.
        ([[-0.5, 1, 2], [0.5, 4, 0]], 1, -1, 1, [[0, 0, 2], [0.5, 4, 0]], 2),
        # The others get one per token (a tenth of k, at least 1) beside any core.
        ([[3, 3, 1, 2], [2, 2, 4, 9]], 2, 1, 1, [[3, 3, 0, 0], [2, 2, 4, 9]], 4),
    ],
)
def test_batch_topk_by_hand(pre, n_core, threshold, k, want, smallest_kept):
    """Which activations are on, and which is the smallest, must be as worked out by hand."""
    thresholds = torch.full((len(pre[0]),), float(threshold))
    acts, least = batch_topk(torch.tensor(pre).float(), thresholds, n_core, k)
    assert acts.tolist() == want
    assert least == smallest_kept


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
    """What is on, its order, and the smallest one kept must be what a sort of all entries, one by
    one, gives: for the thresholds of the case, or `factor` times the smallest one kept."""
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
@pytest.mark.parametrize("n_core, n_dead", [(0, 3), (5, 0), (5, 20)])
@pytest.mark.parametrize("kind", KINDS)
def test_training_loss_is_its_definition(kind, n_core, n_dead):
    """Loss, what fired, the smallest one kept and all gradients must be those of sums written out
    over tokens, prefixes and latents."""
    if kind == "equal values":
        n_dead = min(n_dead, 3)  # Of more dead latents with equal values, any may be taken.
    case = hard_case(kind, n_core, n_dead)
    got = outcome(training_loss, *case)
    assert_equal_to_1e_12(got, outcome(naive_training_loss, *case))
    names = ["b_dec"] if kind == "nothing positive" else ["W_enc", "b_enc", "W_dec", "b_dec"]
    assert all(got[name].abs().max() > 1e-4 for name in names)


@pytest.mark.parametrize("n_dead", [0, 3, 20, 40])
@pytest.mark.parametrize("n_core", [0, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_fast_training_loss_equals_training_loss(kind, n_core, n_dead):
    """Loss, what fired, the smallest one kept and all gradients must agree in every hard case."""
    case = hard_case(kind, n_core, n_dead)
    want = outcome(training_loss, *case)
    assert_equal_to_1e_12(outcome(fast_training_loss, *case), want)


@pytest.mark.parametrize("loss_function, large", [(training_loss, 1), (fast_training_loss, 0)])
def test_the_fast_loss_keeps_nothing_of_the_size_of_all_activations(loss_function, large):
    """No tensor of even half of B x F may wait for its backward pass, as it does for the plain."""
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()), len):
        loss_function(random_sae(), torch.randn(100, 8).double(), 4, torch.arange(0))
    assert (max(sizes) > 100 * 64 / 2) == large


def test_nested_loss_by_hand():
    """x = (3, 4), prefix 0 gives (3, 0), prefix 1 (3, 3): the loss must be (16 + 1) / (2 * 2)."""
    x_hats = torch.tensor([[[3.0, 0.0], [3.0, 3.0]]])
    assert nested_loss(torch.tensor([[3.0, 4.0]]), x_hats) == 17 / 4


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
    """Their gradient is there after the loss; Adam must nevertheless never move them, whereas
    their decoder rows and biases are trained; no gradient may be left for the next step."""
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
    """A latent must be on above its threshold, not at it, and never below zero."""
    sae = MatryoshkaSAE(2, [2, 3])
    with torch.no_grad():
        sae.W_enc.copy_(torch.tensor([[1.0, 0], [0, 1], [1, 1]]))
        sae.b_dec.copy_(torch.tensor([1.0, -1]))
    sae.threshold.copy_(torch.tensor([2.0, 1, -9]))
    x = torch.tensor([[3.0, 0.5], [4, 0], [0, -1]])  # minus b_dec: (2, 1.5), (3, 1), (-1, 0)
    assert sae.encode(x).tolist() == [[0, 1.5, 3.5], [3, 0, 4], [0, 0, 0]]
    assert sae.encode(x, 2).tolist() == [[0, 1.5], [3, 0], [0, 0]]


def test_3d_input_is_refused():
    """A (batch, sequence, D) tensor must be refused with the mend in the message."""
    with pytest.raises(ValueError, match="flatten"):
        random_sae().encode(torch.randn(2, 3, 8).double())


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
    """An SAE trained on batch(step) -> (B, D), and how often each latent fired in each step: the
    loop that a reader would write around the pieces. dead: those to revive, by default those that
    have not fired for 20 steps."""
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
    the same size and budget must not (its latents are parent + child, at a cosine of
    1 / sqrt(1 + 0.6^2) = 0.857: absorption)."""
    parents, batch = planted()
    worst = []
    for widths in ([10, 48], [48]):
        sae, _ = fit(widths, lambda step: batch(step, 256), k=2, steps=600, lr=5e-3)
        best = (sae.W_dec[: widths[0]] @ parents.T).max(0)  # over latents, for each parent
        assert len(set(best.indices.tolist())) == 6
        worst.append(best.values.min().item())
    assert worst[0] > 0.9
    assert worst[1] < 0.87


def test_inference_l0_is_the_trained_l0():
    """On data not trained on, the fixed threshold must give k active latents within 5 %."""
    _, batch = planted()
    sae, _ = fit([6, 48], batch, k=3, steps=300, lr=3e-3)
    l0 = (sae.encode(batch(10_000, 4096)) > 0).sum(1).float().mean()
    assert l0 == pytest.approx(3, rel=0.05)


def test_dead_latents_come_back():
    """Latents that lose every BatchTopK must win some after training with the dead-latent loss,
    and fewer without."""
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
    model, ids = load_tiny(lm), torch.randint(3, 300, (2, 10))
    want = model(ids, output_hidden_states=True).hidden_states[1]
    ran = []
    for m in (dmsae.decoder_layers(model)[1], model.lm_head):
        m.register_forward_hook(lambda *_: ran.append(1))
    assert torch.equal(dmsae.residual_stream(model, 0, ids), want)
    assert not ran
    assert model.config._attn_implementation == "eager", "soft-capping needs eager attention"


@pytest.mark.parametrize("rest", [(), ("cache",)])
def test_splicing_takes_tensors_and_tuples(rest):
    """transformers 4 returns a tuple from a decoder layer, transformers 5 a tensor: both must be
    replaced while open, and left alone after."""
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
    assert "measured" not in json.loads((tmp_path / "out" / "config.json").read_text())
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
        (lambda lm: (lm / "config.json").unlink(), "--model {}: cannot be used"),
        (lambda lm: (lm / "model.safetensors").unlink(), "--model {}: cannot be used"),
        (lambda lm: (lm / "tokenizer.json").unlink(), "--model {}: cannot be used"),
        (lambda lm: replace_in(lm / "tokenizer_config.json", "_token", "_"), "--model: its tokeni"),
        (lambda lm: change_weight(lm, lambda w: w * math.nan), "{}.*next-token loss is nan"),
        (lambda lm: change_weight(lm, lambda w: None), "{}.*lacks.*layers.1.mlp.down_proj.weight"),
    ],
)
def test_a_folder_that_is_no_whole_model_is_refused(own_lm, tmp_path, capsys, damage, words):
    """A missing file, a tokenizer without special tokens, a layer with NaN or without weights, also
    behind the one that is read, must be refused before the text is tokenised."""
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
    """The stream must be doc BOS doc BOS..., every context must start with BOS, and no token may
    be lost up to the limit."""
    tokenizer = tokenizer_of(lm)
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
        path.write_text(content)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"text": row}) + "\n" for row in content))
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
    """.txt must be one document, .jsonl and .parquet a row each; a separator, also as a shell hands
    it over, must split them; a row without a text must stop nothing."""
    (tmp_path / "t1.txt").write_text("not this")
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
    tokenizer = tokenizer_of(own_lm)
    tokenizer.add_tokens(["sat on"])
    tokenizer.save_pretrained(own_lm)
    words = command(own_lm, tmp_path / "out")
    assert "token id 300: the model has 300 embeddings" in refusal(capsys, words)
    docs = iter(["the cat ran to house"])
    dmsae.tokenize(docs, tokenizer, 2, 99, tmp_path / "t", 300)
    assert (tmp_path / "t").exists()


@pytest.mark.parametrize(
    "eval_tokens, attribution_tokens, tokens, sizes",
    [
        (62, 90, 3000, (2, 3, 98)),  # as asked for: 62 / 31, 90 / 31 upwards, 1.02 * 3000 / 31
        (90, 31, 3000, (3, 1, 98)),
        (10**6, 1000, 10**6, (55, 55, 990)),  # a short text: a tenth of it, and each a half
        (62, 10**6, 10**6, (2, 108, 990)),  # a tenth of it, of which evaluation takes little
    ],
)
def test_the_first_contexts_are_held_out(
    lm, tmp_path, eval_tokens, attribution_tokens, tokens, sizes
):
    """Evaluation, attribution and training must follow each other in the text, in the sizes asked
    for, or in those that a short text allows; a second call must read the file of the first."""
    cfg = Config(text=str(lm / "text.txt"), separator="|||", ctx=32, tokens=tokens)
    cfg.eval_tokens, cfg.attribution_tokens = eval_tokens, attribution_tokens
    tokenizer, toy = tokenizer_of(lm), random_toy(300)
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
    """A number must always give the same contexts, for every seed; every context must come once a
    pass; after a pass the text must start again."""
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


def test_batches_resume_at_any_step(lm, monkeypatch):
    """The batch of a step must be the same whether or not the ones before were drawn, also at the
    edges of blocks; and every block after it whole."""
    monkeypatch.setattr(dmsae, "BLOCK", 64 * 16 + 5)
    run = bare_run(load_tiny(lm), some_rows(400), batch=16)
    drawn = [*itertools.islice(run.batches(0), 130)]
    for step in (1, 63, 64, 65, 127, 128):
        resumed = [*itertools.islice(run.batches(0, step), 130 - step)]
        assert all(map(torch.equal, resumed, drawn[step:]))


def test_each_training_and_block_has_an_order_of_its_own(lm, monkeypatch):
    """The activations of a block must be the same in every training, those of positions that are
    not special, scaled; their order must not; nor may two blocks, or two seeds, be shuffled alike.
    """
    monkeypatch.setattr(dmsae, "BLOCK", 64 * 14)
    model, rows = load_tiny(lm), some_rows(128)  # Block 1 is block 0 again.
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
    sae = random_sae(32, (12, 40), n_core=4)
    sae.b_dec.data = dmsae.harvest(model, 0, ids, keep).mean(0)
    return model, ids, keep, sae


def test_attribution_equals_finite_differences():
    """a_i(t) must be the derivative of the loss when latent i at token t is scaled, the rest of
    the narrowest reconstruction held fixed."""
    model, ids, keep, sae = tiny_case()
    score, density = attribute(model, 0, ids, keep, sae)
    f = sae.encode(dmsae.harvest(model, 0, ids, keep), 12).detach()
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
    assert select_core(score, 0.999).tolist() == [1, 3, 5]
    assert density[0] > 0.9
    assert score[[0, 2, 4, 6, 7]].max() < 1e-6


def test_evaluation_by_hand():
    """FVU of each prefix, L0 and the core's L0 must equal their definitions, in parts too; 1e4
    added to x and b_dec must change no FVU by more than 1e-3 of itself."""
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
    """It must be the cross-entropy at kept positions, where the kept outputs are replaced, over
    many contexts and over one that is longer than a part."""
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


# ---- Positions of large norm --------------------------------------------------------------------
def test_positions_above_the_limit_are_left_out():
    """keep must lose those whose norm is above the limit, not those at it, and gain none."""
    toy = random_toy(5)
    toy.embedding[:] = torch.tensor([1.0, 1, 3, 3.01, 99])[:, None] * torch.eye(8)[0]
    ids = torch.tensor([[0, 1, 2, 3, 4], [4, 3, 2, 1, 0]])
    keep = dmsae.without_outliers(toy, 0, ids, ids != 1, 3.0)
    assert keep.tolist() == [[True, False, True, False, False], [False, False, True, False, True]]
    assert torch.equal(dmsae.without_outliers(toy, 0, ids, ids != 1, math.inf), ids != 1)


def plant(monkeypatch, word):
    """Let the layer's output be 128 times as large at every `word`; the layer above sees no
    difference, and a power of two costs no digit."""
    load = dmsae.load_model

    def planted(cfg):
        model, tokenizer = load(cfg)
        at = []
        model.register_forward_pre_hook(lambda m, args: at.append((args[0] == word)[..., None]))
        read, after = dmsae.decoder_layers(model)[:2]
        read.register_forward_hook(lambda m, args, h: torch.where(at[-1], 128 * h, h))
        after.register_forward_pre_hook(
            lambda m, args: (torch.where(at[-1], args[0] / 128, args[0]), *args[1:])
        )
        return model, tokenizer

    monkeypatch.setattr(dmsae, "load_model", planted)


def test_one_word_of_huge_norm_changes_nothing_for_the_others(lm, tmp_path, monkeypatch):
    """Where a word has 128 times its norm, scale, SAE, core and figures must be bitwise those of a
    run that leaves this word out as a special token; with --max-norm 0 it must drown the others,
    although the same cache is read: that keeps all positions."""
    (word,) = tokenizer_of(lm)(" spring")["input_ids"]
    changes = dict(cycles=0, tokens=6400, cache=tmp_path / "cache")
    with monkeypatch.context() as patch:
        special = dmsae.special_tokens
        patch.setattr(dmsae, "special_tokens", lambda tokenizer: [*special(tokenizer), word])
        dmsae.main(command(lm, tmp_path / "without", **changes))
    shutil.rmtree(tmp_path / "cache")
    plant(monkeypatch, word)
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
    """Full coverage must not select zeros, nor a coverage that is met exactly a latent more; where
    there is nothing to share out, it must be refused."""
    assert select_core(torch.tensor([0.0, 3.0, 0.0, 1.0]), 1.0).tolist() == [1, 3]
    assert select_core(torch.tensor([1.0, 2.0, 1.0]), 0.75).tolist() == [1, 0]
    for scores in ([0.0, 0.0], [1.0, math.nan], [1.0, math.inf]):
        with pytest.raises(ValueError, match="no core"):
            select_core(torch.tensor(scores), 0.9)


def test_controls_are_as_many_and_others():
    """By frequency or at random as many latents must be chosen as by attribution, but others: the
    most frequent, or a choice of its own in each training and seed."""
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
    """Old members must keep row, gate and birth, and gain a vote; newcomers must get theirs; the
    unchosen must be gone."""
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


def core_of(sae, n):
    """A first core: the first n latents of an SAE."""
    M, D = sae.widths[0], sae.W_enc.shape[1]
    scores = torch.ones(M)
    return next_core(Core(torch.zeros(0, D)), sae, torch.arange(n), scores, scores, 0)


@pytest.mark.parametrize("mode", ["dynamic", "gated"])
def test_a_new_sae_carries_encoder_rows_and_nothing_else(mode):
    """Core rows must be there bit by bit; decoder, biases and the other latents must be fresh;
    gated must keep the function, dynamic have gates at zero; the first threshold must let about k
    of the others through."""
    donor, x = random_sae(dtype=torch.float32), torch.randn(200, 8)
    core = core_of(donor, 5)
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
    rows = [json.loads(line) for line in (watched.out / "log.jsonl").read_text().splitlines()]
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
    """However long the training is, 10,000,000 silent tokens must be enough. And TF32 must be
    allowed for the SAE alone: some language models compute angles that it would ruin."""
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
    """sae(x) must be what the SAE of the last step, which saw s * x, makes of s * x, over s; its
    rows must be as they were, bit for bit."""
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
    """Of steps that take 4 s each every twentieth must be kept, where a minute is asked for; a
    journal of the next start must give back step, SAE, Adam and counter."""
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


@pytest.mark.parametrize("what", ["loss", "weights"])
def test_what_is_not_finite_stops_and_keeps_the_last_good_checkpoint(tmp_path, monkeypatch, what):
    """The loss of a step is that before its update, which may be what breaks the weights: both
    must be looked at."""
    _, sae, _, _, after_step = journal_at(tmp_path, monkeypatch, checkpoint_minutes=0)
    for step in range(1, 20):
        after_step(step)
    if what == "weights":
        sae.W_dec.data[0, 0] = math.nan
    with pytest.raises(ValueError, match="diverged by step 20: try a smaller --lr"):
        after_step(20, math.nan if what == "loss" else 0.5)
    assert torch.load(tmp_path / "checkpoint3.pt")["step"] == 10


def test_an_error_in_a_training_keeps_its_traceback(lm, tmp_path, monkeypatch):
    """What goes wrong after the setting up must reach whoever forks as it was raised."""
    monkeypatch.setattr(dmsae, "update", lambda *args: torch.zeros(2).item())
    with pytest.raises(RuntimeError):
        dmsae.main(command(lm, tmp_path))


@pytest.mark.parametrize("content", [b"", b"hello", "cut"])
def test_a_damaged_checkpoint_is_refused(tmp_path, monkeypatch, content):
    """A short file and another kind of file must be noticed, and the message must say which file
    it is and what to do."""
    path = tmp_path / "checkpoint3.pt"
    journal_at(tmp_path, monkeypatch)[-1](100)
    path.write_bytes(path.read_bytes()[:-100] if content == "cut" else content)
    with pytest.raises(ValueError, match=f"{path}.*move"):
        journal_at(tmp_path, monkeypatch)


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
            assert (votes > 1) == (birth[0] < cycle)
            assert votes == 1 or torch.equal(old[tuple(birth)], row)
        r, kept = result(story, cycle), int((now["index"] < C).sum())
        new, dropped = len(now["index"]) - kept, C - kept
        assert (r["core"], r["kept"], r["new"], r["dropped"]) == (kept + new, kept, new, dropped)
        assert r["cycle"] == cycle
        assert len(r["fvu"]) == 5
        assert r["tokens"] == 12_800
    names = "config.json tokens.bin log.jsonl cycle0 cycle1 cycle2 cycle3".split()
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
def test_saved_folder_is_a_jumprelu_sae(story, cycle):
    """A few lines that know only SAELens's jumprelu must give our forward; its config must say
    what the SAE reads, and that nothing is reshaped or normalised."""
    cfg = json.loads((story / f"cycle{cycle}" / "cfg.json").read_text())
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


@pytest.mark.parametrize("metadata", [None, {"sae_lens_version": "6.0.0"}])
def test_a_plain_sae_of_saelens_loads(story, tmp_path, metadata):
    """A folder without our metadata, as SAELens writes it, must load as one prefix, no core."""
    folder = shutil.copytree(story / "cycle3", tmp_path / "sae")
    sae, x = load_sae(folder), torch.randn(9, 32)
    cfg = json.loads((folder / "cfg.json").read_text())
    dmsae.write_json(dict(cfg, metadata=metadata), folder / "cfg.json")
    again = load_sae(folder)
    assert (again.widths, again.n_core) == ([128], 0)
    assert torch.equal(again(x), sae(x))


@pytest.mark.parametrize(
    "name, damage, words",
    [
        ("cfg.json", lambda path: path.unlink(), "cfg.json"),
        ("cfg.json", lambda path: path.write_text("[1, 2]"), "cfg.json"),
        ("cfg.json", lambda path: replace_in(path, "jumprelu", "topk"), "topk"),
        ("cfg.json", lambda path: replace_in(path, '"none"', '"layer_norm"'), "layer_norm"),
        (
            "cfg.json",
            lambda path: replace_in(path, '_to_input": true', '_to_input": false'),
            "False",
        ),
        ("cfg.json", lambda path: replace_in(path, "d_in", "d_inn"), "KeyError.*d_in"),
        ("sae_weights.safetensors", lambda path: path.unlink(), "sae_weights"),
        ("sae_weights.safetensors", lambda path: path.write_bytes(path.read_bytes()[:-9]), ""),
        # Weights that would not be used:
        (
            "sae_weights.safetensors",
            lambda path: save_file(dict(load_file(path), scaling_factor=torch.ones(9)), path),
            "scaling_factor",
        ),
    ],
)
def test_a_folder_that_is_no_sae_is_refused(story, tmp_path, name, damage, words):
    """A file that is missing, cut or of another architecture, a missing key, and weights that we
    would not use must be named, with the folder."""
    folder = shutil.copytree(story / "cycle3", tmp_path / "sae")
    damage(folder / name)
    with pytest.raises(ValueError, match=f"{folder}: is no SAE folder of cfg.json and.*{words}"):
        load_sae(folder)


# ---- Killed, resumed, refused -------------------------------------------------------------------
def test_killed_twice_and_resumed_equals_uninterrupted(lm, story, tmp_path):
    """Killed while it is set up, and again in its second training, a run must end with bitwise the
    same weights and cores."""
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
    """Stopped at any step, or after the last one but before the SAE is saved, a run must go on from
    the tenth step before, and end with bitwise the same weights."""
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


def test_a_run_stopped_between_its_folder_and_its_checkpoint_goes_on(lm, story, tmp_path):
    """A checkpoint that a finished training left behind must disturb nothing."""
    out = shutil.copytree(story, tmp_path / "out")
    shutil.rmtree(out / "cycle3")
    (out / "checkpoint2.pt").write_bytes(b"left behind")
    dmsae.main(command(lm, out, cycles=3))
    assert_same(out, story, range(4))


def test_another_configuration_in_the_same_folder_is_refused(lm, story, capsys):
    """What differs must be named with both values, whatever it is, and nothing be touched, also
    where tokens.bin is gone."""
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


def test_fewer_cycles_are_no_other_configuration(lm, story, capsys):
    """A finished run must just print its table, and lose nothing that a longer one has begun."""
    path = story / "checkpoint3.pt"
    path.write_text("of a later cycle")
    dmsae.main(command(lm, story, cycles=2, checkpoint_minutes=1, cache=story))
    assert path.exists()
    path.unlink()
    capsys.readouterr()
    dmsae.main(command(lm, story, cycles=3))
    printed = capsys.readouterr().out
    rows = re.findall(r"(?m)^(\d) +(\d+) ", printed)
    assert rows == [(str(n), str(result(story, n)["core"])) for n in range(4)]
    votes = Counter(saved_core(story, 3)["votes"].tolist())
    assert f"selected: {[votes[n] for n in range(1, max(votes) + 1)]}" in printed


@pytest.mark.parametrize("change", [replace_weights, swap_two_words])
def test_another_model_behind_the_same_name_is_refused(own_lm, tmp_path, capsys, change):
    """Where the folder's weights or tokenizer were replaced, the same command must not go on."""
    words = command(own_lm, tmp_path / "out", cycles=0, tokens=128)
    dmsae.main(words)
    change(own_lm)
    assert re.search(r"\(checksum \w{8} there, \w{8} here\)", refusal(capsys, words))


def test_tokens_that_somebody_left_are_not_read(lm, tmp_path, capsys):
    """A tokens.bin without the config.json of its run may be of any text and tokenizer."""
    np.full(4000, 5, np.int32).tofile(tmp_path / "tokens.bin")
    assert "other settings" in refusal(capsys, command(lm, tmp_path))


@pytest.mark.parametrize("content", ["", "null", "[1]"])
def test_an_emptied_file_of_a_run_is_named(lm, story, tmp_path, capsys, content):
    """As a power cut or an editor leaves it: the file must be named; what can be made again is,
    and the same command goes on."""
    out = shutil.copytree(story, tmp_path / "out")
    words = command(lm, out, cycles=3)
    (out / "tokens.bin").write_text(content)
    assert "less than three contexts" in refusal(capsys, words)
    dmsae.main(words)
    (out / "cycle0" / "cfg.json").write_text(content)
    with pytest.raises(ValueError, match=f"{out}/cycle0/cfg.json: is missing or damaged"):
        dmsae.main(words)
    (out / "config.json").write_text(content)
    assert f"{out}/config.json: is missing or damaged" in refusal(capsys, words)


@pytest.mark.parametrize("mode", ["dynamic", "gated"])
def test_every_core_sparsity_holds_its_budget(lm, tmp_path, mode):
    """The core's rows must be frozen, and the total L0 be k, or one beside a core that takes it."""
    dmsae.main(command(lm, tmp_path, core_sparsity=mode))
    core = saved_core(tmp_path, 0)["W_enc"]
    assert torch.equal(weights(tmp_path, 1)["W_enc"].T[: len(core)], core)
    r = result(tmp_path, 1)
    assert r["core_l0"] > 0
    assert r["l0"] == pytest.approx(max(6, r["core_l0"] + 1), rel=0.15)


def test_a_saved_core_starts_another_sparsity(lm, story, tmp_path, capsys):
    """--core FILE --cycles 0 must train one SAE at another k around the rows of the file, its
    identities kept; a newcomer is born in training 4, not again in 0; a core that takes half of k
    must be warned of."""
    path = story / "cycle3" / "core.safetensors"
    out = tmp_path / "out"
    dmsae.main(command(lm, out, core=path, cycles=0, k=3, seed=3, coverage=0.99))
    printed = capsys.readouterr().out
    core, now = saved_core(story, 3), saved_core(out, 0)
    C = len(core["W_enc"])
    assert torch.equal(weights(out, 0)["W_enc"].T[:C], core["W_enc"])
    births = {tuple(b) for b in core["birth"].tolist()}
    born = [b[0] for b in now["birth"].tolist() if tuple(b) not in births]
    assert set(born) == {4}
    assert f"core {C}\n" in printed
    l0 = result(out, 0)["core_l0"]
    assert 1.5 < l0 < 3
    assert f"warning: the core alone has L0 {l0:.1f}, above half of k 3" in printed
    _, origin = dmsae.load_core(out / "cycle0" / "core.safetensors")
    assert (origin["training"], origin["config"]["k"], origin["layer"]) == (4, 3, 0)


@pytest.mark.parametrize("what", ["weights", "layer"])
def test_a_core_of_another_model_or_layer_is_refused(own_lm, story, tmp_path, capsys, what):
    """One line must name the file, whose directions would mean nothing there."""
    path = story / "cycle3" / "core.safetensors"
    if what == "weights":
        replace_weights(own_lm)
    words = command(own_lm, tmp_path / "out", core=path, layer=int(what == "layer"))
    assert f"--core {path}: is of another model, tokenizer or layer" in refusal(capsys, words)
    assert not [*(tmp_path / "out").glob("*")]


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
    run = bare_run(load_tiny(lm), some_rows(20), cache=str(tmp_path))
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


def test_a_constant_added_to_the_activations_changes_no_fvu(lm, story, tmp_path, monkeypatch):
    """Where a layer's output is shifted for the SAE alone, by thirty of its deviations, held-out
    FVU of every prefix, and the loss, must stay within 1 %."""
    shift = 30 / measured(story)["scale"]
    real = dmsae.spliced

    def shifted(model, layer, edit):
        return real(model, layer, lambda h: edit(h + shift) - shift)

    monkeypatch.setattr(dmsae, "spliced", shifted)
    dmsae.main(command(lm, tmp_path, cycles=0))
    as_it_is, there = result(story, 0), result(tmp_path, 0)
    assert there["fvu"] == pytest.approx(as_it_is["fvu"], rel=0.01)
    assert there["ce"] == pytest.approx(as_it_is["ce"], rel=0.01)


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
    assert not [*(tmp_path / "out").glob("*")]


def test_the_demo_refuses_a_text_before_it_trains(tmp_path, capsys, monkeypatch):
    """--demo --text no.txt must end at once, not after minutes."""
    monkeypatch.chdir(tmp_path)
    assert "--text no.txt: must be an existing file" in refusal(
        capsys, ["--demo", "--text", "no.txt"]
    )
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("t.txt", "", "three contexts of 32"),
        ("t.txt", "the cat sat on the mat", "three contexts of 32"),
        ("t.txt", "<eos>" * 30_000, "variance 0 at layer"),
        ("t.jsonl", ["the cat sat on the mat"] * 900 + [7], "no text from --text-column text"),
    ],
)
def test_a_text_that_is_none_is_refused(lm, tmp_path, capsys, name, content, words):
    """Less than three contexts, nothing but special tokens, and what is not text must be refused,
    with the file's name; a text in its place must work with the same folder."""
    path = write_text(tmp_path / name, content)
    changes = dict(text=path, cycles=0, tokens=128, separator=None)
    line = refusal(capsys, command(lm, tmp_path / "out", **changes))
    assert words in line
    if "eos" not in content:  # Its tokens are a text, with which other ones would not agree.
        assert str(path) in line
        write_text(path, ["the cat"] * 900 if name == "t.jsonl" else "the cat " * 9000)
        dmsae.main(command(lm, tmp_path / "out", **changes))
    assert "--text-column no" in refusal(
        capsys, command(lm, tmp_path / "b", **changes | dict(text_column="no"))
    )


@pytest.mark.parametrize(
    "sae, n, words",
    [
        (random_sae(dtype=torch.float32), 3, "is of another model"),
        (random_sae(32, (120, 200), dtype=torch.float32), 120, "a core of 120 to --d-sae 128"),
    ],
)
def test_a_core_that_does_not_fit_is_refused(lm, tmp_path, capsys, sae, n, words):
    """One of nobody knows what model, and one as large as the SAE, must be refused."""
    path = tmp_path / "c.safetensors"
    save_file(vars(core_of(sae, n)), path, {"dmsae": json.dumps(dict(training=0))})
    assert words in refusal(capsys, command(lm, tmp_path / "out", core=path))
    assert not [*(tmp_path / "out").glob("*")]


# ---- Files and command line ---------------------------------------------------------------------
def test_what_is_there_stays_whole_where_writing_fails(tmp_path):
    """A file must keep its old content until the new one is complete."""
    path = tmp_path / "a.json"
    dmsae.write_json([1], path)
    with pytest.raises(KeyError), dmsae.written_whole(path) as part:
        part.write_text("half")
        raise KeyError
    assert json.loads(path.read_text()) == [1]
    dmsae.write_json([2], path)
    assert json.loads(path.read_text()) == [2]
    assert [*tmp_path.iterdir()] == [path]


def test_flags_follow_the_dataclass():
    """Every field must be a flag, underscores accepted; the defaults are Config's."""
    assert dmsae.parse([]) == Config()
    words = ["--d_sae", "256", "--attribution_tokens=9", "--core-sparsity", "dynamic"]
    want = Config(d_sae=256, attribution_tokens=9, core_sparsity="dynamic")
    assert dmsae.parse(words) == want
    assert dmsae.parse("--prefixes 0.1 0.3".split()).prefixes == [0.1, 0.3]


def test_the_demo_changes_defaults_only():
    """What the command line gives must win over the demo's settings."""
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


# ---- README: its commands parse, its pieces paste, its claims hold ------------------------------
README = (HERE / "README.md").read_text()
PASTE_HEAD = "import torch\nimport torch.nn.functional as F\nfrom torch import nn"
PASTE_IMPORTS = dict(
    Path="from pathlib import Path",
    contextmanager="from contextlib import contextmanager",
    load_file="from safetensors.torch import load_file",
    tqdm="from tqdm import tqdm",
)


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
    source = (HERE / "dmsae.py").read_text()
    take, imports = readme_pieces()[name]
    code = [PASTE_HEAD, *(PASTE_IMPORTS.get(word, f"import {word}") for word in imports)]
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
    """select_core, nested_loss, the sparse step, and an SAE that learns must run in an empty
    module; the table must name seven pieces."""
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
    """Reading and replacing a layer, and attribution, must run on a toy in an empty module; and
    load_sae must load our folder and encode the same."""
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
    import eval as ev

    plain = "".join(readme_blocks("")).splitlines()
    lines = [line for line in plain if line.startswith(("python ", "pip "))]
    stub = f"python() {{ printf '%s\\0' \"$@\" END >> {tmp_path}/log; echo 0.1 0.2 0.3 0.4; }}"
    script = "\n".join([stub, "pip() { true; }", *lines, *readme_blocks("sh")])
    subprocess.run(["bash", "-euc", script], check=True, capture_output=True, cwd=tmp_path)
    calls = (tmp_path / "log").read_text().split("END\0")[:-1]
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
    """The lines of each file must be as claimed, and must not grow past 1,080."""
    for name in ("dmsae.py", "eval.py"):
        (claimed,) = re.findall(rf"\| `{name}` \| (\d+) \|", README)
        assert int(claimed) == len((HERE / name).read_text().splitlines()) <= 1080


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


def reset_peak(device):
    """Forget the peak memory so far, where the system can."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_gib(device):
    """Peak memory since `reset_peak`, GiB: of the GPU's allocator, or of the process."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 2**30
    with contextlib.suppress(OSError):
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


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


def benchmark_model(cfg, model, sae, x, step_ms):
    """Harvest and attribution in tokens a second, and what the whole command would take."""
    lm = model.config.get_text_config()
    on_cuda = cfg.device.startswith("cuda")
    contexts, rounds = (4, 3) if on_cuda else (1, 1)
    reset_peak(cfg.device)  # without dense autograd's
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
        model, rounds = random_model(cfg), 3
        D = model.config.get_text_config().hidden_size
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
    """With --model it must time a whole run and end in the line of ratios; the peak that it prints
    must be none of before."""
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
