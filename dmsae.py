"""Distilled Matryoshka Sparse Autoencoders (Martin-Linares & Ling 2025, arXiv 2512.24975).

    core = no latents
    for cycle in range(cycles + 1):             # cycle 0 has no core: the plain baseline
        sae    = train(core, activations)       # every nested prefix contains the frozen core
        scores = attribute(model, sae)          # |activation x gradient|, next-token loss
        core   = select_core(scores, 0.9)       # the fewest latents that hold 90 % of the score;
                                                # their encoder rows travel, frozen
    python dmsae.py --demo                      # in miniature: no network, no GPU, three minutes
    python dmsae.py --cycles 5 --k 64           # Gemma-2-2B, layer 12, 65,536 latents, one GPU

Part 1 is the method, in the plainest code that says it. Part 2 is the loss of Part 1 again, with
the same results in a fifth of the time. Part 3 is plumbing: the language model, text, files.

Shapes: B tokens in a batch, T tokens in a context, R contexts, D width of the residual stream,
F latents, C of them in the core, M in the narrowest prefix with the core, d dead, G prefixes,
n activations that are not zero. Row i of W_enc (F, D) and of W_dec (F, D) belongs to latent i.
L0 is the mean number of latents that are on at a token; k is the L0 that training aims at.
An error that a user can fix is a ValueError.
"""

import argparse
import glob
import itertools
import json
import math
import os
import sys
import time
import zlib
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from filelock import FileLock, Timeout
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

# ==== Part 1: the method =====================================================
# ---- 1.1 Settings -----------------------------------------------------------
DEMO = dict(layer=1, ctx=128, d_sae=2048, k=16, batch=512, lr=6e-3, cycles=3)
DEMO |= dict(tokens=400_000, attribution_tokens=60_000)  # the defaults of the flags under --demo
BLOCK = 262_144  # tokens that are harvested and shuffled together: enough to mix many documents
# How `load_dataset` reads each kind of file. It would split a .txt by line and lose the breaks.
LOADERS = {".txt": dict(path="text", sample_by="document")}
LOADERS |= {".jsonl": dict(path="json"), ".parquet": dict(path="parquet")}
# What SAELens must know of an SAE, to compute what `MatryoshkaSAE.encode` does.
SAELENS = dict(architecture="jumprelu", normalize_activations="none", apply_b_dec_to_input=True)
# Other settings of SAELens that change what an SAE computes. They must be absent or "none".
CHANGING = ["reshape_activations", "rescale_acts_by_decoder_norm", "finetuning_scaling_factor"]


@dataclass
class Config:
    """All settings. Each field is a flag (d_sae is --d-sae) with its help, lowest and highest."""

    model: Annotated[str, "hub name or folder of an AutoModelForCausalLM"] = "google/gemma-2-2b"
    layer: Annotated[int, "decoder layer that is read and replaced, from 0", 0, 999] = 12
    dataset: Annotated[str, "hub name, or name:configuration"] = "JeanKaddour/minipile"
    text: Annotated[str, "a .txt, .jsonl or .parquet file, or a folder of such"] = None
    text_column: Annotated[str, "the column that holds the text"] = "text"
    separator: Annotated[str, "splits each text into documents; \\n is a new line"] = None
    ctx: Annotated[int, "context length in tokens, BOS included", 4, 9_999_999] = 1024
    d_sae: Annotated[int, "number of latents, core included", 2, 99_999_999] = 65536
    k: Annotated[int, "mean number of active latents per token (L0)", 1, 99_999_999] = 64
    prefixes: Annotated[tuple, "inner widths / d_sae", 0, 1] = (1 / 32, 3 / 32, 7 / 32, 15 / 32)
    tokens: Annotated[int, "tokens per training (the paper: 500_000_000)", 1, 10**12] = 100_000_000
    batch: Annotated[int, "tokens per training step", 1, 99_999_999] = 2048
    lr: Annotated[float, "peak learning rate; fewer steps or latents need more", 1e-9, 1e9] = 3e-4
    max_norm: Annotated[float, "skip positions above this x the median norm; 0: none", 0, 1e9] = 5
    cycles: Annotated[int, "trainings with a core, after the plain training 0", 0, 999] = 5
    core_sparsity: Annotated[Literal["gated", "dynamic"], "keep a core latent's gate?"] = "gated"
    coverage: Annotated[float, "share of the score that the core must hold", 1e-6, 1] = 0.9
    select: Annotated[Literal["attribution", "frequency", "random"], "ranking"] = "attribution"
    attribution_tokens: Annotated[int, "held-out tokens for attribution", 1, 10**11] = 1_000_000
    eval_tokens: Annotated[int, "held-out tokens for evaluation", 1, 10**11] = 131_072
    core: Annotated[str, "a core.safetensors to start training 0 with"] = None
    seed: Annotated[int, "seed of the start, of shuffling, of random controls"] = 0
    device: Annotated[str, "cpu, cuda or cuda:N; auto is cuda where there is one"] = "auto"
    out: Annotated[str, "run folder (runs/MODEL_kK_seedSEED); the same command resumes"] = None
    checkpoint_minutes: Annotated[float, "minutes between checkpoints, at least", 0, 1e9] = 5.0
    cache: Annotated[str, "folder that keeps activations for later trainings and runs"] = None
    demo: Annotated[bool, "small settings, and a small Gemma-2 trained on the spot"] = False

    def __post_init__(self):
        name = "demo" if self.demo else Path(self.model).name
        self.out = self.out or f"runs/{name}_k{self.k}_seed{self.seed}"
        if self.device == "auto":
            self.device = "cuda" if torch.cuda.is_available() else "cpu"
        if self.demo and self.model == Config.model:
            self.model = f"{self.out}/model"
            self.text = self.text or f"{self.out}/model/text.jsonl"

    def widths(self, n_core=0):
        """Widths of the G prefixes, the core in each; the last one is the whole SAE."""
        inner = [n_core + round(share * self.d_sae) for share in self.prefixes]
        edges = [n_core, *inner, self.d_sae]
        if edges != sorted(set(edges)):
            room = f"from a core of {n_core} to --d-sae {self.d_sae}"
            raise ValueError(f"--prefixes: must ascend {room}, for example 0.1 0.3")
        return edges[1:]


# ---- 1.2 The SAE ------------------------------------------------------------
class MatryoshkaSAE(nn.Module):
    """A Matryoshka BatchTopK SAE (Bussmann et al. 2025) whose first n_core latents are a core.
    Prefix j consists of the first widths[j] latents, so the core is in all of them. W_enc, W_dec
    (F, D); b_enc, threshold (F,); b_dec (D,)."""

    def __init__(self, d_model, widths, n_core=0, generator=None):
        super().__init__()
        self.widths = list(widths)
        self.n_core = n_core
        n_latents = self.widths[-1]
        directions = F.normalize(torch.randn(n_latents, d_model, generator=generator))
        self.W_enc = nn.Parameter(directions.clone())
        self.W_dec = nn.Parameter(directions)  # Its rows keep unit norm, see `update`.
        self.b_enc = nn.Parameter(torch.zeros(n_latents))
        self.b_dec = nn.Parameter(torch.zeros(d_model))
        # In use, a latent is on where its pre-activation exceeds its threshold. In training,
        # BatchTopK decides instead, and the thresholds follow it.
        self.register_buffer("threshold", torch.zeros(n_latents))
        # (F,) the number of the narrowest prefix that holds the latent
        prefix = torch.bucketize(torch.arange(n_latents), torch.tensor(self.widths), right=True)
        self.register_buffer("prefix", prefix, persistent=False)

    def pre_activations(self, x, width=None):
        """x (B, D) -> (B, width), of the first latents, by default of all F."""
        return F.linear(x - self.b_dec, self.W_enc[:width], self.b_enc[:width])

    def encode(self, x, width=None):
        """x (B, D) -> activations (B, width) in use. Other tokens do not matter, as in training."""
        if x.ndim != 2:
            raise ValueError(f"x must be (tokens, D), not {tuple(x.shape)}: try x.flatten(0, -2)")
        pre = self.pre_activations(x, width)
        return pre.relu() * (pre > self.threshold[:width])

    def decode(self, acts):
        """Activations (B, w) of the first w latents -> reconstruction (B, D)."""
        return acts @ self.W_dec[: acts.shape[1]] + self.b_dec

    def forward(self, x):
        return self.decode(self.encode(x))

    @torch.no_grad()
    def fold_scale(self, scale):
        """Turn an SAE of scale * x into one of x. Encoder and decoder rows stay as they are."""
        for tensor in (self.b_enc, self.b_dec, self.threshold):
            tensor /= scale


def shared_budget(n_tokens, k, n_core_active):
    """How many activations of a batch are left for the latents outside the core: the *total* L0
    shall be k, but they get at least a tenth of k (our choice), for else they would not learn."""
    return max(n_tokens * k - n_core_active, n_tokens * max(1, k // 10))


def smallest_of_largest(values, n):
    """Of the n largest values (m,) the smallest positive one: (); 0 where none is positive."""
    if len(values) == 0:
        return values.new_zeros(())
    largest = values.topk(min(n, len(values)), sorted=False).values
    return largest.masked_fill(largest <= 0, math.inf).min().nan_to_num(posinf=0)


def batch_topk(pre, threshold, n_core, k):
    """The activations in training: pre-activations (B, F) -> (B, F), and the smallest one kept
    outside the core: (), 0 where there is none. A core latent is on above its own threshold. All
    others compete: the largest in the whole batch are kept (BatchTopK, Bussmann et al. 2024)."""
    acts = pre.relu()
    core = acts[:, :n_core] * (pre[:, :n_core] > threshold[:n_core])
    others = acts[:, n_core:]
    budget = shared_budget(len(pre), k, int((core > 0).sum()))
    smallest_kept = smallest_of_largest(others.flatten(), budget)
    return torch.cat([core, others * (others >= smallest_kept)], 1), smallest_kept


# ---- 1.3 The loss -----------------------------------------------------------
def nested_loss(x, x_hats):
    """Squared error, summed over the prefixes with equal weights (the paper), mean over tokens: ().
    x (B, D), x_hats (B, G, D). Divided by G * D (ours): so it starts near 1 for any G and D."""
    return F.mse_loss(x_hats, x[:, None].expand_as(x_hats))


def dead_latent_loss(residual, pre_dead, W_dead):
    """How badly dead latents alone explain what the others left over (AuxK, Gao et al. 2024): ().
    residual (B, D), pre_dead (B, d) pre-activations, W_dead (d, D) decoder rows. A token uses its
    D / 2 largest ones. The squared error is divided by the residual's variance."""
    if len(residual) == 1:
        return residual.new_zeros(())  # One token has no variance.
    top = pre_dead.relu().topk(min(len(W_dead), residual.shape[1] // 2), sorted=False)
    acts = torch.zeros_like(pre_dead).scatter(1, top.indices, top.values)  # (B, d)
    error = (acts @ W_dead - residual).square().sum()
    variance = (residual - residual.mean(0)).square().sum()
    return error / variance.clamp_min(1e-30)


def training_loss(sae, x, k, dead):
    """The loss of a batch x (B, D), as the paper defines it. dead (d,): indices of dead latents.
    Returns the loss (), how often each latent fired (F,), and the smallest activation kept ().
    `train` calls `fast_training_loss` of Part 2, which takes and returns the same. To try another
    loss, change this function and name it in `train`: that is all."""
    pre = sae.pre_activations(x)  # (B, F)
    acts, smallest_kept = batch_topk(pre, sae.threshold, sae.n_core, k)
    # Each prefix adds its own latents to the reconstruction of the one before.
    edges = [0, *sae.widths]
    parts = [acts[:, a:b] @ sae.W_dec[a:b] for a, b in itertools.pairwise(edges)]
    x_hats = torch.stack(parts, 1).cumsum(1) + sae.b_dec  # (B, G, D)
    loss = nested_loss(x, x_hats)
    if len(dead):
        # detach(): the dead-latent loss must not move the other latents.
        residual = (x - x_hats[:, -1]).detach()
        aux = dead_latent_loss(residual, pre[:, dead], sae.W_dec[dead])
        loss = loss + aux / 32  # the weight of Gao et al.
    return loss, (acts > 0).sum(0), smallest_kept.detach()


# ---- 1.4 Training one SAE ---------------------------------------------------
@torch.no_grad()
def update(sae, adam, lr):
    """One step of the optimiser. Encoder rows of the core stay, decoder rows keep unit norm."""
    sae.W_enc.grad[: sae.n_core] = 0  # Adam without weight decay then leaves them bit for bit.
    # The part of a gradient along its row would only change the norm, which is reset below.
    along = torch.linalg.vecdot(sae.W_dec.grad, sae.W_dec)  # (F,)
    sae.W_dec.grad.addcmul_(along[:, None], sae.W_dec, value=-1)
    adam.param_groups[0]["lr"] = lr
    adam.step()
    adam.zero_grad()
    sae.W_dec /= sae.W_dec.norm(dim=1, keepdim=True)


@torch.no_grad()
def update_threshold(sae, smallest_kept, step):
    """Let thresholds outside the core follow smallest_kept (): a running mean over the last tenth
    of the steps so far, 100 at most (our choice)."""
    weight = min(1, max(0.01, 10 / (step + 1)))
    sae.threshold[sae.n_core :].lerp_(smallest_kept, weight)


def learning_rate(step, steps, peak):
    """Rises over 1000 steps or a tenth of all, stays, and falls to 0 over the last fifth."""
    warm_up = min(1000, steps // 10 or 1)
    return peak * min(1, (step + 1) / warm_up, 5 * (steps - step) / steps)


def train(run, core, training, journal):
    """Train an SAE from scratch around `core`. Returns it, for activations as they come from the
    model, and the share of dead latents. `journal` prints, and lets a killed training go on."""
    cfg = run.cfg
    steps = cfg.tokens // cfg.batch
    dead_after = min(10_000_000, cfg.tokens // 10 or 1)  # Gao et al. 2024; the tenth is ours.
    first = journal.saved["step"]  # 0, or where a killed training goes on
    batches = run.batches(training, first)
    x = next(batches)  # (B, D)
    sae = new_sae(cfg, core, x, run.scale, training)
    adam = torch.optim.Adam(sae.parameters(), eps=1e-12, fused=True)  # Our gradients are small.
    silent = torch.zeros(cfg.d_sae, dtype=torch.int64, device=x.device)  # tokens since it fired
    journal.restore(sae, adam, silent)
    for step in tqdm(range(first, steps), f"training {training}", disable=None):
        if step % 10 == 0:
            # nonzero() makes a GPU wait, so we look for dead latents every 10 steps only.
            dead = (silent >= dead_after).nonzero()[:, 0]
        # TF32 for the SAE alone: it makes the rotary angles of some language models inexact.
        torch.set_float32_matmul_precision("high")
        loss, fired, smallest_kept = fast_training_loss(sae, x, cfg.k, dead)
        loss.backward()
        torch.set_float32_matmul_precision("highest")
        update(sae, adam, learning_rate(step, steps, cfg.lr))
        update_threshold(sae, smallest_kept, step)
        silent.add_(len(x)).masked_fill_(fired > 0, 0)
        silent[: sae.n_core] = 0  # The core is never dead: its encoder rows are frozen.
        journal.after_step(step + 1, loss.detach(), fired, len(dead))
        if step + 1 < steps:
            x = next(batches)
    sae.fold_scale(run.scale)
    return sae, (silent >= dead_after).float().mean().item()


# ---- 1.5 Attribution: which latents does the language model need? -----------
def attribute(model, layer, ids, keep, sae):
    """Score of each latent of the narrowest prefix, the core included, and the share of tokens at
    which it is on: (M,), (M,). Measured on contexts ids (R, T) where keep (R, T).
    The layer's output is replaced by the narrowest reconstruction x_hat (the paper), for the core
    has to be useful without the finer latents. To first order, switching latent i off at a token
    changes the next-token loss by -a_i, a_i = activation_i * <dLoss / dx_hat, W_dec_i>.
    The score is the mean of |a_i| over tokens (our choice)."""
    W_dec = sae.W_dec[: sae.widths[0]].detach()  # (M, D)
    total = torch.zeros(len(W_dec), dtype=torch.float64, device=W_dec.device)
    on = torch.zeros_like(total)
    acts = x_hat = None

    def replace(x):
        nonlocal acts, x_hat
        acts = sae.encode(x, len(W_dec)).detach()  # (B, M)
        x_hat = sae.decode(acts).detach().requires_grad_()  # (B, D)
        return x_hat

    for part in in_parts(model, ids, keep):
        loss = spliced_loss(model, layer, *part, replace)
        (gradient,) = torch.autograd.grad(loss, x_hat)  # (B, D)
        attribution = acts * (gradient @ W_dec.T)  # (B, M)
        total += attribution.abs().sum(0, dtype=torch.float64)
        on += (acts > 0).sum(0)
    n_tokens = int(keep.sum())
    return (total / n_tokens).cpu(), (on / n_tokens).float().cpu()


# ---- 1.6 The core -----------------------------------------------------------
def select_core(scores, coverage):
    """The fewest latents that hold `coverage` of the total score, best first: (M,) -> (C,)."""
    value, order = scores.double().sort(descending=True, stable=True)
    so_far = value.cumsum(0)  # It rises to the total.
    total = so_far[-1]
    if not 0 < total < math.inf:
        raise ValueError(f"no core can be selected: the attribution scores sum to {total}")
    # + 1: the latent that reaches the coverage belongs to the core.
    return order[: int((so_far < coverage * total).sum()) + 1]


def choose(cfg, scores, density, training):
    """The next core: (C,) of the M candidates with these scores and densities (M,). As controls,
    cfg.select ranks them by frequency or at random; the core is as large as by attribution."""
    noise = torch.rand(len(scores), generator=generator(cfg.seed, training, "core"))
    rank_by = dict(attribution=scores, frequency=density, random=noise)[cfg.select]
    size = len(select_core(scores, cfg.coverage))
    return rank_by.argsort(descending=True, stable=True)[:size]


@dataclass
class Core:
    """What travels from one training to the next. Core(torch.zeros(0, D)) is that of cycle 0."""

    W_enc: torch.Tensor  # (C, D) the frozen encoder rows: all that travels in the paper
    bias: torch.Tensor = torch.zeros(0)  # (C,) b_enc - W_enc b_dec at birth, for `gated`
    threshold: torch.Tensor = torch.zeros(0)  # (C,) at birth, for `gated`
    # The history, which no training reads. Rows are frozen, so a latent's identity is exact.
    birth: torch.Tensor = torch.zeros(0, 2).long()  # (C, 2) the training, and its index there
    votes: torch.Tensor = torch.zeros(0).long()  # (C,) how many trainings selected it
    score: torch.Tensor = torch.zeros(0)  # (C,) at the last selection
    density: torch.Tensor = torch.zeros(0)  # (C,) the share of tokens at which it was on
    index: torch.Tensor = torch.zeros(0).long()  # (C,) its row in the SAE it was selected from


@torch.no_grad()
def next_core(core, sae, chosen, scores, density, training):
    """The core after a training: the latents `chosen` (C,) of M candidates, which are the old
    core, with its history, and the rest of the narrowest prefix. scores, density (M,)."""
    new = torch.arange(len(core.W_enc), sae.widths[0])
    W_enc = sae.W_enc.cpu()[new]
    candidates = Core(
        W_enc=torch.cat([core.W_enc, W_enc]),
        bias=torch.cat([core.bias, sae.b_enc.cpu()[new] - W_enc @ sae.b_dec.cpu()]),
        threshold=torch.cat([core.threshold, sae.threshold.cpu()[new]]),
        birth=torch.cat([core.birth, F.pad(new[:, None], (1, 0), value=training)]),
        votes=torch.cat([core.votes, torch.zeros_like(new)]) + 1,
        score=scores.float(),
        density=density,
        index=torch.arange(len(scores)),
    )
    return Core(*(tensor[chosen] for tensor in vars(candidates).values()))


@torch.no_grad()
def new_sae(cfg, core, x, scale, training):
    """A fresh SAE around the core. x (B, D) is a first batch, already multiplied by `scale`.

    The core's encoder rows are taken over, frozen, and everything else is initialised anew. So what
    is selected again has proved useful among new neighbours. By cfg.core_sparsity, a core latent
    dynamic (the paper): starts with a new bias, and is on above 0;
    gated (our addition): starts with the bias of its birth, and is on above the threshold of its
    birth. In both, the bias is trained, and what it became is forgotten after the training."""
    n_core = len(core.W_enc)
    random = generator(cfg.seed, training, "init")
    sae = MatryoshkaSAE(x.shape[1], cfg.widths(n_core), n_core, random).to(x.device)
    sae.b_dec.copy_(x.mean(0))
    sae.W_enc[:n_core] = core.W_enc
    sae.W_dec[:n_core] = F.normalize(core.W_enc)  # Our choice: the best guess that there is.
    if cfg.core_sparsity == "gated":
        # The same function of x as at birth, around the new b_dec.
        sae.b_enc[:n_core] = core.bias.to(x) * scale + sae.W_enc[:n_core] @ sae.b_dec
        sae.threshold[:n_core] = core.threshold * scale
    # Without a first threshold, half of B x F entries would be candidates in `sparse_topk`.
    others = sae.pre_activations(x[:64])[:, n_core:]
    sae.threshold[n_core:] = 0.9 * smallest_of_largest(others.flatten(), len(others) * cfg.k)
    return sae


# ---- 1.7 Evaluation, and the distillation cycles ----------------------------
@torch.no_grad()
def evaluate(sae, x):
    """Of activations x (N, D): fvu, the fraction of variance unexplained by each of the G
    prefixes; l0 and core_l0, how many latents, and how many of the core, are on per token."""
    errors = 0  # (G,)
    on = 0  # (F,)
    for some in x.split(4096):
        acts = sae.encode(some)  # (B, F)
        x_hats = torch.stack([sae.decode(acts[:, :width]) for width in sae.widths])  # (G, B, D)
        errors += (some - x_hats).double().square().sum((1, 2))
        on += (acts > 0).sum(0) / len(x)
    fvu = errors / (x - x.mean(0)).double().square().sum()
    return dict(fvu=fvu.tolist(), l0=on.sum().item(), core_l0=on[: sae.n_core].sum().item())


def distil(run):
    """Train, attribute, select; then again around what was selected. Each cycle leaves a folder
    with its SAE and the core selected from it; where that is there, it is not trained again."""
    cfg = run.cfg
    core = run.first_core
    results = []
    for cycle in range(cfg.cycles + 1):
        folder = Path(cfg.out) / f"cycle{cycle}"
        if not folder.exists():
            size = len(core.W_enc) or "0: the plain Matryoshka baseline"
            print(f"cycle {cycle} of {cfg.cycles}   k {cfg.k}   core {size}", flush=True)
            training = run.first_training + cycle  # With --core, its trainings are counted on.
            journal = Journal(cfg, cycle)
            sae, dead = train(run, core, training, journal)
            scores, density = attribute(run.model, cfg.layer, *run.for_attribution, sae)
            chosen = choose(cfg, scores, density, training)
            kept = int((chosen < sae.n_core).sum())
            core = next_core(core, sae, chosen, scores, density, training)
            result = evaluate(sae, harvest(run.model, cfg.layer, *run.for_evaluation).float())
            ce = mean_loss(run.model, cfg.layer, *run.for_evaluation, sae)
            recovered = (run.ce_zero - ce) / (run.ce_zero - run.ce_original)
            result |= dict(cycle=cycle, core=len(chosen), kept=kept, new=len(chosen) - kept)
            result |= dict(dropped=sae.n_core - kept, ce=ce, ce_recovered=recovered)
            result |= dict(dead=dead, tokens=cfg.tokens)
            journal.log(result)
            save_cycle(run, folder, training, sae, core, result)
        core, result = load_cycle(folder)
        Path(cfg.out, f"checkpoint{cycle}.pt").unlink(missing_ok=True)
        results.append(result)
    print_table(cfg, core, results)
    print(f"SAEs and cores are in {cfg.out}/cycle*; next: python eval.py {cfg.out}")


# ==== Part 2: the same loss, fast ============================================
# Of the B x F activations only about B * k are not zero. The product with the encoder has to be
# dense, because nobody knows the largest entries before. All that follows is a sum of rows:
#   decoding:         x_hat[token]   = sum over its active latents of activation * W_dec[latent]
#   encoder gradient: grad_W[latent] = sum over the tokens where it is on of gradient * x[token]
# Both are a `segment_sum`, once by token and once by latent. No B x F tensor has a gradient.
def segment_sum(table, index, weight, segment, n_segments):
    """(n_segments, D): row s is the sum of weight[i] * table[index[i]] over all i with segment[i]
    == s, in their order. table (m, D); index, segment (n,), ascending; weight (n,), None for 1."""
    starts = torch.searchsorted(segment, torch.arange(n_segments, device=segment.device))
    return F.embedding_bag(index, table, starts, mode="sum", per_sample_weights=weight)


class EncodeAt(torch.autograd.Function):
    """The pre-activations at (row, col), which are known already: value (n,). In the backward
    pass W_enc, b_enc and b_dec get the gradients that dense autograd would give."""

    @staticmethod
    def forward(ctx, W_enc, b_enc, b_dec, x, value, row, col):
        ctx.save_for_backward(W_enc, b_dec, x, row, col)
        return value.clone()

    @staticmethod
    def backward(ctx, grad):
        W_enc, b_dec, x, row, col = ctx.saved_tensors
        col, by_latent = col.sort(stable=True)  # Each latent's entries are now one segment.
        row = row[by_latent]
        grad_W_enc = segment_sum(x - b_dec, row, grad[by_latent], col, len(W_enc))  # (F, D)
        grad_b_enc = segment_sum(grad[:, None], by_latent, None, col, len(W_enc))[:, 0]  # (F,)
        grad_b_dec = -grad_b_enc @ W_enc  # b_dec enters each pre-activation as -W_enc b_dec.
        return grad_W_enc, grad_b_enc, grad_b_dec, None, None, None, None


def sparse_topk(pre, threshold, n_core, k):
    """`batch_topk` as its entries that are not zero: value, row, col, (n,) each, ordered by row;
    and the smallest one outside the core."""
    # Nearly all that will be kept lie above the running threshold, so we look there first, and
    # then lower. The last pass takes all positive entries and is always right.
    at_least = threshold.clamp_min(0)
    bound = at_least[n_core:].max()  # one for all that compete
    for share in (0.95, 0.7, 0.0):
        at_least[n_core:] = share * bound
        row, col = (pre > at_least).nonzero(as_tuple=True)
        in_core = col < n_core
        n_core_active = int(in_core.sum()) if n_core else 0
        budget = shared_budget(len(pre), k, n_core_active)
        if len(row) - n_core_active >= budget:
            break
    value = pre[row, col]
    smallest_kept = smallest_of_largest(value.masked_fill(in_core, 0), budget)
    kept = (in_core | (value >= smallest_kept)).nonzero()[:, 0]
    return value[kept], row[kept], col[kept], smallest_kept


def nested_decode(value, row, col, sae, n_tokens):
    """The reconstruction by each prefix, (B, G, D), from the entries value, row, col (n,). Each
    latent is decoded once, into the narrowest prefix that has it; then the prefixes add up."""
    n_prefixes = len(sae.widths)
    segment = row * n_prefixes + sae.prefix[col]  # It ascends: entries are ordered by row and col.
    parts = segment_sum(sae.W_dec, col, value, segment, n_tokens * n_prefixes)
    return parts.view(n_tokens, n_prefixes, -1).cumsum(1) + sae.b_dec


def fast_training_loss(sae, x, k, dead):
    """`training_loss` for less work: the same arguments, and the same results to 1e-12."""
    with torch.no_grad():
        pre = sae.pre_activations(x)  # (B, F)
        value, row, col, smallest_kept = sparse_topk(pre, sae.threshold, sae.n_core, k)
    del pre  # the only large tensor
    value = EncodeAt.apply(sae.W_enc, sae.b_enc, sae.b_dec, x, value, row, col)
    x_hats = nested_decode(value, row, col, sae, len(x))
    loss = nested_loss(x, x_hats)
    if len(dead):
        # Dead latents need many entries per token: their rows are taken out, for dense products.
        residual = (x - x_hats[:, -1]).detach()
        W_enc, b_enc, W_dec = (p.index_select(0, dead) for p in (sae.W_enc, sae.b_enc, sae.W_dec))
        pre_dead = F.linear(x - sae.b_dec, W_enc, b_enc)  # (B, d)
        loss = loss + dead_latent_loss(residual, pre_dead, W_dec) / 32
    fired = torch.zeros_like(sae.prefix).index_add_(0, col, torch.ones_like(col))  # (F,)
    return loss, fired, smallest_kept


# ==== Part 3: plumbing =======================================================
# ---- 3.1 The language model: read a layer, replace a layer ------------------
def load_model(cfg):
    """The frozen language model and its tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    advice = "try --demo, or accept its licence on the hub and run `hf auth login`"
    with refusing(f"--model {cfg.model}: cannot be used; if it was not found, {advice}"):
        lm = AutoConfig.from_pretrained(cfg.model).get_text_config()
    with refusing(f"--model {cfg.model}: cannot be used"):
        last = lm.num_hidden_layers - 1
        longest = getattr(lm, "max_position_embeddings", cfg.ctx)
        if cfg.layer > last or cfg.ctx > longest:
            raise ValueError(f"--layer {cfg.layer} --ctx {cfg.ctx}: at most {last} and {longest}")
        options = dict(dtype=torch.bfloat16 if "cuda" in cfg.device else torch.float32)
        if getattr(lm, "attn_logit_softcapping", None):
            # PyTorch's own attention silently leaves out Gemma-2's soft-capping.
            options["attn_implementation"] = "eager"
        load = AutoModelForCausalLM.from_pretrained
        model, info = load(cfg.model, output_loading_info=True, **options)
        if info["missing_keys"]:  # They would be drawn at random, and anew at each start.
            raise ValueError(f"it lacks weights, such as {min(info['missing_keys'])}")
        tokenizer = AutoTokenizer.from_pretrained(cfg.model)
        model = model.to(cfg.device).eval().requires_grad_(False)
        ids = torch.tensor([tokenizer("What is useful again and again stays.")["input_ids"]])
        mean_loss(model, cfg.layer, ids, ids >= 0, nn.Identity())  # It is refused unless finite.
        check_layer(model, cfg.layer, ids.to(cfg.device))
        return model, tokenizer


@torch.no_grad()
def check_layer(model, layer, ids):
    """Raise ValueError unless what is read at `layer` is what transformers calls its output."""
    states = model(ids, use_cache=False, output_hidden_states=True).hidden_states or ()
    # Most models put the embedding first, some do not. The last state is normalised.
    outputs = states[:-1][layer : layer + 2]
    read = residual_stream(model, layer, ids)
    if len(outputs) < 2:
        print(f"not checked: whether the output of layer {layer} is what transformers gives")
    elif min((h - read).norm() / h.norm() for h in outputs) > 0.01:
        raise ValueError(f"--layer {layer}: another module than the decoder layer is read")


def checksum(model, tokenizer):
    """8 hex digits over the vocabulary, all weights, and their names: no other model has them.
    Weights count as bfloat16, so that neither device nor dtype matters."""
    crc = zlib.crc32(repr(sorted(tokenizer.get_vocab().items())).encode())
    for name, weight in model.named_parameters():
        bits = weight.detach().bfloat16().contiguous().view(torch.int16).cpu()
        crc = zlib.crc32(bits.numpy(), zlib.crc32(name.encode(), crc))
    return f"{crc:08x}"


def special_tokens(tokenizer):
    """The ids of BOS, EOS and PAD, those that there are. The first begins every context."""
    ids = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    if set(ids) == {None}:
        raise ValueError("--model: its tokenizer has neither a BOS, an EOS nor a PAD token")
    return [i for i in ids if i is not None]


def decoder_layers(model):
    """The ModuleList of decoder layers, whatever the architecture calls it."""
    n = model.config.get_text_config().num_hidden_layers
    modules = model.get_decoder().modules()  # A vision tower may have as many layers.
    return next(m for m in modules if isinstance(m, nn.ModuleList) and len(m) == n)


def spliced(model, layer, edit):
    """Inside `with`, the output h (R, T, D) of decoder layer `layer` is replaced by edit(h)."""

    def hook(module, args, out):
        return (edit(out[0]), *out[1:]) if isinstance(out, tuple) else edit(out)

    return decoder_layers(model)[layer].register_forward_hook(hook)


@torch.no_grad()
def residual_stream(model, layer, ids):
    """The output of decoder layer `layer` (resid_post) for ids (R, T): (R, T, D)."""

    class Reached(Exception):
        """Leaves the model early, so that later layers and the head never run."""

    def leave(h):
        raise Reached(h)

    try:
        with spliced(model, layer, leave):
            model(ids, use_cache=False)
    except Reached as reached:
        return reached.args[0]


def in_parts(model, ids, keep, tokens=1024):
    """Contexts ids and keep (R, T) on the model's device, about `tokens` at a time."""
    n = max(1, tokens // ids.shape[1])
    parts = zip(ids.to(model.device).split(n), keep.to(model.device).split(n), strict=True)
    return tqdm(list(parts), "model", leave=False, delay=5, disable=None)


def harvest(model, layer, ids, keep):
    """The residual stream of ids (R, T) where keep (R, T): (tokens, D), in the model's dtype."""
    parts = in_parts(model, ids, keep, 4096)
    return torch.cat([residual_stream(model, layer, ids)[keep] for ids, keep in parts])


def usual(x, limit, what):
    """Where the norm of x (..., D) is at most `limit`: (...). Above are attention sinks, like BOS:
    few, but with most of the variance. Raises ValueError for nan or inf."""
    norm = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32)
    if not norm.isfinite().all():
        raise ValueError(f"the language model gives nan or inf in {what}")
    return norm <= limit


def without_outliers(model, layer, ids, keep, limit):
    """keep (R, T) without the positions of ids whose norm is above `limit`."""
    parts = in_parts(model, ids, keep, 4096)
    kept = [usual(residual_stream(model, layer, ids), limit, "held-out text") for ids, _ in parts]
    return keep & torch.cat(kept).cpu()


def spliced_loss(model, layer, ids, keep, replace):
    """The next-token loss of ids (R, T) in nats, summed over the positions keep (R, T), where the
    layer's output x (tokens, D) at these positions is replaced by replace(x)."""
    dtype = torch.promote_types(model.dtype, torch.float32)  # at least float32

    def edit(h):
        x_hat = replace(h[keep].to(dtype))
        return h.masked_scatter(keep[..., None], x_hat.to(h.dtype))

    with spliced(model, layer, edit):
        logits = model(ids, use_cache=False).logits.flatten(0, 1)  # (R * T, vocabulary)
    # cross_entropy ignores -100. Taking out the kept logits would copy a gigabyte.
    targets = F.pad(ids[:, 1:], (0, 1), value=-100).masked_fill(~keep, -100).flatten()
    # In float32, the logits of 1024 tokens of Gemma take 1 GiB. So they are converted in parts.
    parts = zip(logits.split(1024), targets.split(1024), strict=True)
    return sum(F.cross_entropy(some.to(dtype), y, reduction="sum") for some, y in parts)


@torch.no_grad()
def mean_loss(model, layer, ids, keep, replace):
    """spliced_loss in nats per token, over any number of contexts: a float, which is finite."""
    losses = [spliced_loss(model, layer, *part, replace) for part in in_parts(model, ids, keep)]
    loss = float(sum(losses) / keep[:, :-1].sum())
    if not math.isfinite(loss):
        raise ValueError(f"the model's next-token loss is {loss}")
    return loss


# ---- 3.2 Text ---------------------------------------------------------------
def text_files(text):
    """The files that --text names: itself, or all in the folder that have a suffix of LOADERS.
    Raises ValueError where there are none, or of several kinds."""
    files = sorted(Path(text).rglob("*")) if Path(text).is_dir() else [Path(text)]
    files = [file for file in files if file.suffix.lower() in LOADERS and file.is_file()]
    kinds = {file.suffix.lower() for file in files}
    if len(kinds) != 1:
        must = f"must be an existing file, or a folder of such, in one of {', '.join(LOADERS)}"
        raise ValueError(f"--text {text}: {must}; it has {', '.join(sorted(kinds)) or 'none'}")
    return files


def documents(cfg):
    """Yield the documents of --text or --dataset."""
    from datasets import load_dataset

    name, _, configuration = cfg.dataset.partition(":")
    source = dict(path=name, name=configuration or None)
    if cfg.text:
        files = text_files(cfg.text)
        escaped = [glob.escape(str(file)) for file in files]  # t[1].txt is no pattern.
        source = dict(LOADERS[files[0].suffix.lower()], data_files=escaped)
    # A shell hands \n over as two letters. The default, a zero byte, splits no text.
    separator = (cfg.separator or "\0").replace("\\n", "\n")
    with refusing(f"{cfg.text or cfg.dataset}: cannot be read"):
        for row in load_dataset(**source, split="train", streaming=True):
            text = row.get(cfg.text_column, 0)
            if not isinstance(text, str | None):  # An empty text may be None.
                must = f"must be a column of text, of {', '.join(row)}"
                raise ValueError(f"--text-column {cfg.text_column}: {must}")
            yield from (text or "").split(separator)


def tokenize(docs, tokenizer, bos, limit, path, n_embeddings):
    """Write an iterator of documents to `path` as `ids BOS ids BOS ...`, int32, at most `limit`."""
    with written_whole(path) as part, open(part, "wb") as file:
        while limit > 0 and (some := list(itertools.islice(docs, 32))):
            ids = tokenizer(some, add_special_tokens=False, verbose=False)["input_ids"]
            flat = [i for doc in ids if doc for i in (*doc, bos)][:limit]
            if max(flat, default=0) >= n_embeddings:
                raise ValueError(f"token id {max(flat)}: the model has {n_embeddings} embeddings")
            np.array(flat, np.int32).tofile(file)
            limit -= len(flat)


def contexts(rows, special):
    """Contexts of rows (R, T - 1) of token ids: ids (R, T), BOS first; and keep (R, T), where the
    SAE works. Special tokens are left alone: Gemma's BOS is so large that it drowns all else."""
    ids = F.pad(torch.from_numpy(rows.astype(np.int64)), (1, 0), value=special[0])
    return ids, ~torch.isin(ids, torch.tensor(special))


def open_text(cfg, model, tokenizer, folder):
    """Rows (R, T - 1) of token ids, on disk, for evaluation, attribution and training: a core must
    not be judged on the tokens that chose it. They are written once, to FOLDER/tokens.bin."""
    bos = special_tokens(tokenizer)[0]
    path = Path(folder, "tokens.bin")
    width = cfg.ctx - 1
    n_eval = math.ceil(cfg.eval_tokens / width)
    n_held_out = n_eval + math.ceil(cfg.attribution_tokens / width)
    if not path.exists():
        # 2 % more than is trained on, for BOS and other positions that are left alone.
        limit = int(1.02 * cfg.tokens) + n_held_out * width
        docs = iter(tqdm(documents(cfg), "tokenise", disable=None))
        tokenize(docs, tokenizer, bos, limit, path, len(model.get_input_embeddings().weight))
    n = path.stat().st_size // 4 // width
    if n < 3:
        path.unlink()
        raise ValueError(f"{cfg.text or cfg.dataset}: has less than three contexts of {cfg.ctx}")
    rows = np.memmap(path, np.int32, "r", shape=(n, width))
    if n // 10 < n_held_out:  # Of a short text a tenth is held out, half of it for evaluation.
        n_held_out = max(2, n // 10)
        n_eval = min(n_eval, n_held_out // 2)
    print(f"text: {rows.size} tokens in {(rows == bos).sum()} documents")
    return np.split(rows, [n_eval, n_held_out])


# ---- 3.3 A run: what its trainings share ------------------------------------
class Run:
    """What the trainings of a run share: the language model, the text, the core to begin with."""

    def __init__(self, cfg):
        self.cfg = cfg
        Path(cfg.cache or cfg.out).mkdir(parents=True, exist_ok=True)
        if cfg.model == f"{cfg.out}/model" and not Path(cfg.model).exists():
            build_demo(cfg.model)
        print(f"dmsae | {cfg.model} layer {cfg.layer} | {cfg.device} | {cfg.out}")
        self.model, tokenizer = load_model(cfg)
        self.special = special_tokens(tokenizer)
        self.checksum = checksum(self.model, tokenizer)
        self.first_core = Core(torch.zeros(0, self.model.config.get_text_config().hidden_size))
        self.first_training = 0
        if cfg.core:
            self.first_core, origin = load_core(cfg.core)
            self.first_training = origin["training"] + 1  # Each training has its own number.
            if (origin.get("checksum"), origin.get("layer")) != (self.checksum, cfg.layer):
                raise ValueError(f"--core {cfg.core}: is of another model, tokenizer or layer")
        known = known_settings(cfg, self.checksum)
        evaluation, attribution, self.rows = open_text(cfg, self.model, tokenizer, cfg.out)
        passes = cfg.tokens / self.rows.size
        print(f"to evaluate: {evaluation.size} tokens; training reads its part {passes:.2f} times")
        measured = known.get("measured") or self.measure_scale()
        if measured.setdefault("rows", len(self.rows)) != len(self.rows):
            raise ValueError(f"{cfg.out}/tokens.bin: is not what it was; move it away")
        self.scale = measured["scale"]
        self.median_norm = measured["median_norm"]
        self.norm_limit = cfg.max_norm * self.median_norm or math.inf
        self.for_evaluation = self.held_out(evaluation)  # ids (R, T), keep (R, T)
        self.for_attribution = self.held_out(attribution)
        if "measured" not in known:
            held_out = self.model, cfg.layer, *self.for_evaluation, nn.Identity()
            measured["ce_original"] = mean_loss(*held_out)
            with spliced(self.model, cfg.layer, torch.zeros_like):
                measured["ce_zero"] = mean_loss(*held_out)
            write_json(known | dict(measured=measured), f"{cfg.out}/config.json")
        self.ce_original = measured["ce_original"]  # loss of the model, in nats per token
        self.ce_zero = measured["ce_zero"]  # the same with the layer's output zeroed, at BOS too
        if self.ce_zero <= self.ce_original:
            print(f"warning: without layer {cfg.layer} the loss is lower; ignore `ce recovered`")

    def measure_scale(self):
        """Of 65,536 tokens (ours) the median norm; and, without those above the limit, the scale,
        such that the mean variance per channel of scale * x is 1."""
        cfg = self.cfg
        x = self.block(0, math.ceil(65536 / cfg.ctx)).float()  # (tokens, D)
        median = x.norm(dim=-1).median().item()
        kept = x[usual(x, cfg.max_norm * median or math.inf, "the first training block")]
        # About the mean: a constant changes nothing.
        variance = kept.var(0).mean().item() if len(kept) > 1 else 0
        if not 0 < variance < math.inf:
            raise ValueError(f"the text: variance {variance} at layer {cfg.layer}; is it of words?")
        print(f"--max-norm {cfg.max_norm} leaves {1 - len(kept) / len(x):.2%} of positions alone")
        return dict(median_norm=median, scale=variance**-0.5)

    def held_out(self, rows):
        """Contexts of rows: ids (R, T), and keep (R, T) without positions of large norm."""
        ids, keep = contexts(rows, self.special)
        return ids, without_outliers(self.model, self.cfg.layer, ids, keep, self.norm_limit)

    def block(self, number, n):
        """Activations (tokens, D) of block `number`, n contexts of the training text, which starts
        again at its end. They are the same for every seed, so that runs can share a --cache."""
        cfg = self.cfg
        order = torch.randperm(len(self.rows), generator=generator("contexts"))
        places = torch.arange(number * n, (number + 1) * n) % len(order)
        ids, keep = contexts(self.rows[order[places].numpy()], self.special)
        if not cfg.cache:
            return harvest(self.model, cfg.layer, ids, keep)
        code = zlib.crc32(keep.numpy(), zlib.crc32(ids.numpy()))
        name = f"layer{cfg.layer}-{self.checksum}-{self.model.dtype}-{code:08x}.safetensors"
        path = Path(cfg.cache, name)
        if not path.exists():
            # Another run may write it at the same time, under a name of its own.
            with written_whole(path, time.time_ns()) as part:
                save_file(dict(acts=harvest(self.model, cfg.layer, ids, keep)), part)
        with refusing(f"{path}: is damaged; move it away"):
            return load_file(path, device=cfg.device)["acts"]

    def batches(self, training, step=0):
        """Yield the scaled batches (B, D) of `step` and all later steps. Blocks of about 262,144
        tokens (our choice) are harvested and shuffled as a whole."""
        cfg = self.cfg
        n_batches = max(1, BLOCK // cfg.batch)
        size = n_batches * cfg.batch
        n_contexts = min(math.ceil(size / (cfg.ctx - 1)), len(self.rows))
        for number in itertools.count(step // n_batches):
            acts = self.block(number, n_contexts)
            acts = acts[usual(acts, self.norm_limit, f"training block {number}")]
            order = torch.randperm(len(acts), generator=generator(cfg.seed, training, number))
            # Where they are too few (some are left alone, the text is short), all are used again.
            order = order.repeat(1 + math.ceil(size / len(acts)))[:size].to(acts.device)
            for rows in order.split(cfg.batch)[step % n_batches :]:
                yield acts[rows].float() * self.scale
            step = 0
            del acts  # The next block needs the memory.


def known_settings(cfg, code):
    """Write OUT/config.json, and return it: the settings, the model's checksum, and, from an
    earlier start, what was measured. Refused where it is of another run."""
    path = Path(cfg.out, "config.json")
    settings = asdict(cfg) | dict(checksum=code, prefixes=list(cfg.prefixes))
    for name in ("model", "device", "out", "checkpoint_minutes", "cycles", "cache"):
        del settings[name]  # The checksum stands for the model. The others change no training.
    for name in ("text", "core"):
        if settings[name]:  # Files count by their content, wherever they lie.
            crc = 0
            for file in text_files(cfg.text) if name == "text" else [cfg.core]:
                crc = zlib.crc32(np.memmap(file, np.uint8), crc)
            settings[name] = f"{crc:08x}"
    old = read_json(path) if path.exists() else {}
    differ = [f"{k} {old.get(k)} there, {v} here" for k, v in settings.items() if old.get(k) != v]
    if not differ:
        return old
    if "measured" in old or path.with_name("tokens.bin").exists():
        raise ValueError(f"--out {cfg.out}: holds a run with other settings ({'; '.join(differ)})")
    write_json(settings, path)
    return settings


# ---- 3.4 What a training prints, logs and saves -----------------------------
class Journal:
    """Prints and logs the rows of a training, and keeps a checkpoint in case it is killed."""

    def __init__(self, cfg, cycle):
        self.cfg = cfg
        self.cycle = cycle
        self.path = Path(cfg.out, f"checkpoint{cycle}.pt")
        self.saved = dict(step=0)  # the first step to do
        if self.path.exists():
            with refusing(f"{self.path}: is damaged; move it away"):
                self.saved = torch.load(self.path, map_location="cpu", weights_only=True)
        self.began = self.saved_at = time.time()
        tqdm.write("   step     loss      l0 core l0   dead  seconds")

    def restore(self, sae, adam, silent):
        """Fill in what the checkpoint holds, if there is one."""
        self.sae, self.adam, self.silent = sae, adam, silent
        if "sae" in self.saved:  # pop(), because they are large and not needed again.
            sae.load_state_dict(self.saved.pop("sae"))
            adam.load_state_dict(self.saved.pop("adam"))
            silent.copy_(self.saved.pop("silent"))

    def after_step(self, step, loss, fired, n_dead):
        """Write about ten rows in a training, and a checkpoint every few minutes."""
        cfg = self.cfg
        steps = cfg.tokens // cfg.batch
        now = time.time()
        if step == steps or step % (steps // 10 or 1) == 0:
            on = fired / cfg.batch  # (F,)
            row = dict(cycle=self.cycle, step=step, tokens=step * cfg.batch, loss=loss.item())
            row |= dict(l0=on.sum().item(), core_l0=on[: self.sae.n_core].sum().item())
            row |= dict(dead=n_dead / cfg.d_sae, seconds=now - self.began)
            self.log(row | dict(lr=self.adam.param_groups[0]["lr"]))
            words = "{step:7d} {loss:8.4f} {l0:7.1f} {core_l0:7.1f} {dead:6.1%} {seconds:8.0f}"
            tqdm.write(words.format(**row))
        # Dead latents are looked for every 10 steps, and a checkpoint falls just before that.
        due = step % 10 == 0 and now - self.saved_at >= 60 * cfg.checkpoint_minutes
        if due or step == steps:
            if not all(t.isfinite().all() for t in (loss, *self.sae.parameters())):
                raise ValueError(f"diverged by step {step}: try a smaller --lr, another --out")
            state = dict(step=step, sae=self.sae.state_dict(), adam=self.adam.state_dict())
            with written_whole(self.path) as part:
                torch.save(state | dict(silent=self.silent), part)
            self.saved_at = now

    def log(self, row):
        """Add a row (a dict) to OUT/log.jsonl."""
        with open(self.path.with_name("log.jsonl"), "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def print_table(cfg, core, results):
    """Print a row for each cycle, and how often the latents of the last core were selected."""
    print("cycle     core   kept    new dropped      l0 core l0  ce recovered    dead  fvu")
    row = "{cycle:<8d}{core:6d} {kept:6d} {new:6d} {dropped:7d} {l0:7.1f} {core_l0:7.1f}"
    row += "{ce_recovered:14.4f} {dead:7.1%} "
    for result in results:
        print(row.format(**result), *(f"{v:.4f}" for v in result["fvu"]))
    if result["core_l0"] > cfg.k / 2:
        print(f"warning: the core alone has L0 {result['core_l0']:.1f}, above half of k {cfg.k}")
        print("and leaves too little to the others: try a lower --coverage, such as 0.5")
    print(f"latents that 1, 2, ... trainings selected: {core.votes.bincount()[1:].tolist()}")


# ---- 3.5 Files --------------------------------------------------------------
@contextmanager
def refusing(what):
    """Every error inside becomes a ValueError that begins with `what`."""
    try:
        yield
    except Exception as e:  # transformers, datasets and safetensors raise a dozen unrelated types
        raise ValueError(f"{what} ({e if isinstance(e, ValueError) else repr(e)})") from e


@contextmanager
def written_whole(path, mark="part"):
    """Yield another name to write a file or folder under, and rename it to `path` at the end: a
    crash leaves no half-written file."""
    part = Path(f"{path}.{mark}")
    yield part
    part.replace(path)


def locked(folder):
    """A lock (for `with`) that keeps other runs out of `folder`. It does not outlive a program,
    however that ends. Raises ValueError where another run has it."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    lock = FileLock(f"{folder}/lock")
    try:
        return lock.acquire(timeout=0)
    except Timeout as e:
        raise ValueError(f"{folder}: is in use by another run; try another --out") from e
    except (OSError, NotImplementedError) as e:
        print(f"not locked, so start no other run in {folder}: {e!r}")
        return nullcontext()


def read_json(path):
    """The content of a JSON file, a dict."""
    with refusing(f"{path}: is missing or damaged; move its folder away"):
        return dict(json.loads(Path(path).read_text("utf-8")))


def write_json(data, path):
    """Write data as JSON to `path`, whole or not at all."""
    with written_whole(path) as part:
        part.write_text(json.dumps(data, indent=1), "utf-8")


def save_cycle(run, folder, training, sae, core, result):
    """Write what a cycle leaves to `folder`: the SAE in SAELens' layout, the core, the figures."""
    cfg = run.cfg
    origin = dict(training=training, config=asdict(cfg), checksum=run.checksum, layer=cfg.layer)
    metadata = dict(origin, sae_lens_version="6.0.0", model_name=cfg.model, context_size=cfg.ctx)
    metadata |= dict(hook_name=f"blocks.{cfg.layer}.hook_resid_post", prepend_bos=True)
    metadata |= dict(widths=sae.widths, n_core=sae.n_core, result=result)
    metadata |= dict(max_norm=cfg.max_norm, median_norm=run.median_norm)
    about = dict(SAELENS, d_in=len(sae.b_dec), d_sae=cfg.d_sae, dtype="float32", device="cpu")
    about |= dict(reshape_activations="none", metadata=metadata)
    weights = dict(sae.state_dict(), W_enc=sae.W_enc.detach().T.contiguous())  # There it is (D, F).
    with written_whole(folder) as part:
        part.mkdir(exist_ok=True)
        save_file(weights, part / "sae_weights.safetensors")
        save_file(vars(core), part / "core.safetensors", {"dmsae": json.dumps(origin)})
        write_json(about, part / "cfg.json")


def load_cycle(folder):
    """The core that a cycle left in `folder`, and its figures. Raises ValueError for damage."""
    with refusing(f"{folder}: is damaged; move it away"):
        load_sae(folder)
        core, _ = load_core(folder / "core.safetensors")
        return core, read_json(folder / "cfg.json")["metadata"]["result"]


def load_core(path):
    """The Core in a file of `save_cycle`, and a dict of its training, config, checksum, layer."""
    with refusing(f"{path}: is damaged or holds no core"), safe_open(path, "pt") as f:
        core = Core(**{name: f.get_tensor(name) for name in f.keys()})
        return core, json.loads(f.metadata()["dmsae"])


def load_sae(folder, device="cpu"):
    """The SAE in a folder of SAELens' `jumprelu` layout, ours or another's."""
    with refusing(f"{folder}: is no SAE folder of cfg.json and sae_weights.safetensors"):
        cfg = read_json(f"{folder}/cfg.json")
        other = {key: cfg[key] for key in CHANGING if (cfg.get(key) or "none") != "none"}
        other |= {key: cfg[key] for key, v in SAELENS.items() if cfg.get(key, v) != v}
        if other:
            raise ValueError(f"its {other} would change the result: only {SAELENS} is read")
        ours = dict(widths=[cfg["d_sae"]], n_core=0) | (cfg.get("metadata") or {})
        sae = MatryoshkaSAE(cfg["d_in"], ours["widths"], ours["n_core"])
        weights = load_file(f"{folder}/sae_weights.safetensors")
        sae.load_state_dict(dict(weights, W_enc=weights["W_enc"].T))
        return sae.to(device)


def generator(*key):
    """A torch.Generator seeded by (seed, cycle, block, ...): so no random state has to be saved."""
    return torch.Generator().manual_seed(zlib.crc32(repr(key).encode()))


# ---- 3.6 The demo's language model ------------------------------------------
def build_demo(folder, steps=1000):
    """Train a small Gemma-2 on Python's own documentation and sources; put all into `folder`."""
    from pydoc_data.topics import topics
    from tokenizers import ByteLevelBPETokenizer
    from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedTokenizerFast

    sources = Path(os.__file__).parent.glob("*.py")
    docs = [*topics.values(), *(p.read_text("utf-8", errors="replace") for p in sources)]
    docs = [d[i : i + 4000] for d in docs for i in range(0, len(d), 4000)]
    docs.sort(key=lambda d: zlib.crc32(d.encode()))  # A fixed shuffle: held out is like the rest.
    special = dict(pad_token="<pad>", eos_token="<eos>", bos_token="<bos>")  # ids 0, 1, 2
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(docs, 2048, special_tokens=[*special.values()], show_progress=False)
    ids = torch.tensor([i for doc in bpe.encode_batch(docs) for i in (2, *doc.ids)])
    ids = ids.repeat(2)[: 8 * 128 * steps].view(-1, 128)  # 8 contexts in a step
    shape = dict(vocab_size=2048, hidden_size=160, intermediate_size=320, num_hidden_layers=3)
    shape |= dict(num_attention_heads=4, num_key_value_heads=2, head_dim=40)
    shape |= dict(attn_logit_softcapping=None, final_logit_softcapping=None, initializer_range=0.08)
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(Gemma2Config(**shape))
    embedding, *others = model.parameters()
    groups = dict(params=[embedding], lr=1.4e-2), dict(params=others, lr=2.8e-3)
    adam = torch.optim.Adam(groups, betas=(0.8, 0.99), fused=True)
    decay = torch.optim.lr_scheduler.LinearLR(adam, 1, 0, steps)
    for batch in tqdm(ids[torch.randperm(len(ids))].split(8), "training the language model"):
        model(batch, labels=batch).loss.backward()
        adam.step()
        adam.zero_grad()
        decay.step()
    with written_whole(folder) as part:
        model.save_pretrained(part)
        PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, **special).save_pretrained(part)
        lines = "\n".join(json.dumps({"text": d}) for d in docs)
        (part / "text.jsonl").write_text(lines, "utf-8")


# ---- 3.7 The command line ---------------------------------------------------
# The first field of each group of flags, and the group's name in --help.
GROUPS = dict(model="model", dataset="text", d_sae="SAE", tokens="training", cycles="core")
GROUPS |= dict(seed="run")


def parse(argv=None):
    """Command line -> Config. What cannot be read ends the program with one line and code 2."""
    about = dict(usage="dmsae.py [flags]", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser = argparse.ArgumentParser("dmsae.py", allow_abbrev=False, **about)
    parser.error = lambda why: parser.exit(2, f"dmsae: {why}; --help shows all flags\n")
    options = {bool: dict(action="store_true"), tuple: dict(type=float, nargs="*")}
    for field in fields(Config):
        kind, words, *_ = get_args(field.type)
        choices = get_args(kind)  # of a Literal
        how = dict(choices=choices) if choices else options.get(kind, dict(type=kind))
        if field.name in GROUPS:
            group = parser.add_argument_group(GROUPS[field.name])
        if field.default is None:
            how["default"] = argparse.SUPPRESS  # Then --help says nothing of a default.
        # --d_sae works as --d-sae does, but is not shown.
        for flag in sorted({f"--{field.name}", f"--{field.name.replace('_', '-')}"}):
            group.add_argument(flag, **dict(default=field.default, help=words) | how)
            words = argparse.SUPPRESS
    if "--demo" in (argv or sys.argv):
        parser.set_defaults(**DEMO)
    return Config(**vars(parser.parse_args(argv)))


def check(cfg):
    """Raise ValueError for settings that cannot work, before anything is downloaded or trained."""
    for field in fields(Config):
        _, _, *limits = get_args(field.type)
        value = getattr(cfg, field.name)
        if limits and np.any(np.clip(value, *limits) != value):  # This is true for nan, too.
            must = f"must be from {limits[0]} to {limits[1]}, for example {field.default}"
            raise ValueError(f"--{field.name.replace('_', '-')} {value}: {must}")
    if cfg.k >= cfg.d_sae:
        raise ValueError(f"--k {cfg.k}: must be below --d-sae {cfg.d_sae}, for example 1")
    if cfg.tokens < cfg.batch:
        raise ValueError(f"--tokens {cfg.tokens}: must be at least --batch {cfg.batch}")
    cfg.widths(len(load_core(cfg.core)[0].W_enc) if cfg.core else 0)  # Is there room for the core?
    if cfg.text and cfg.text != f"{cfg.out}/model/text.jsonl":
        text_files(cfg.text)
        if Path(cfg.out).resolve().is_relative_to(Path(cfg.text).resolve()):
            raise ValueError(f"--text {cfg.text}: holds --out {cfg.out}; try another --out")
    elif not cfg.text and (Path(cfg.dataset).is_dir() or Path(cfg.dataset.split(":")[0]).is_dir()):
        raise ValueError(f"--dataset {cfg.dataset}: is a folder here; name it by --text")
    with refusing(f"--device {cfg.device}: must be cpu, cuda or cuda:N"):
        torch.empty(0, device=cfg.device)


@contextmanager
def setting_up(program):
    """While a run is set up, an error that the user can fix is one line, and exit code 2."""
    try:
        yield
    except (ValueError, OSError) as e:  # OSError: a folder or disk that takes no files
        print(f"{program}: " + " ".join(str(e).split())[:1000], file=sys.stderr)
        sys.exit(2)


def main(argv=None):
    """The command line."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # Huge pages: a sixth faster on a CPU.
    with setting_up("dmsae"):
        cfg = parse(argv)
        check(cfg)
        lock = locked(cfg.out)
    with lock:
        with setting_up("dmsae"):
            run = Run(cfg)
        distil(run)


if __name__ == "__main__":
    main()
