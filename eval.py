"""Measure SAEs: SAEBench's metrics in one file, for folders of dmsae.py and of SAELens 6.

    python eval.py runs/gemma-2-2b_k64_seed0                  # its plain SAE beside its last one
    python eval.py runs/seed0 runs/seed1 --labelled news.csv --html --all

Each metric is one function. It returns figures, which MEANING explains, or it raises ValueError,
which says why there are none here. Each can be used alone:

    model, tokenizer = dmsae.load_model(dmsae.Config(model="google/gemma-2-2b", layer=12))
    sae = unit_rows(dmsae.load_sae("runs/seed0/cycle5", model.device))
    X, A = pooled(model, 12, tokenizer, sae, texts)
    sparse_probing(X, A, labels)

Definitions are SAEBench 0.6.0's (Karvonen et al. 2025, arXiv 2503.09532) unless a comment says
"ours". Decoder rows must have unit norm. Positions with a residual norm above `limit` are left out,
as in training. Shapes: as in dmsae.py; n words or texts, P probes, V tokens in the vocabulary.
"""

import argparse
import csv
import itertools
import json
import math
import os
import re
import sys
import tempfile
import zlib
from collections import Counter, defaultdict, namedtuple
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import dmsae
from dmsae import generator, load_core, load_sae, read_json, refusing, residual_stream

# What each figure is; N is a number. NAME_std is the deviation of NAME, as of a sample: over
# letters in absorption, over classes in probing, over seeds in tpp and scr.
MEANING = """
l0, core_l0: latents that are active per token; those of the core
frac_alive: share of the latents that are active anywhere in this text; higher is better
fvu: squared error over the variance about the mean; lower is better
fvu_all_positions: fvu with the positions that training left out for their norm
ce_loss_without_sae, ce_loss_with_sae: next-token loss of the model alone, and with the SAE, in nats
ce_loss_with_ablation: next-token loss with the layer's output zeroed, in nats
ce_loss_score: share of what zeroing costs that the SAE recovers; void if that lowers the loss
explained_variance: as SAEBench 0.6.0 has it, about zero; 1 - fvu is the usual one
explained_variance_legacy: mean over tokens of 1 - FVU of the token, as in SAEBench's papers
cossim: mean cosine of residual and reconstruction; higher is better
tokens: tokens measured on; in stability, tokens of the training
full_absorption_rate: share of words whose main latents are silent while one other fires
fraction_0_6_0: how much of the letter other latents carry, as SAEBench 0.6.0 has it
num_split_features: main latents of a letter
main_f1: how well the main latents tell the letter; below 0.6 there are no figures
letters, words: that the residual tells; that were used, and the fraction falls as they grow
sae_top_N_test_accuracy: accuracy of a probe on the N best latents; chance is 0.5
llm_top_N_test_accuracy: accuracy of a probe on the N best channels of the residual
probe_accuracy: accuracy of the probes before any ablation
tpp_threshold_N_total_metric: intended less unintended, without N latents; higher is better
tpp_threshold_N_intended, tpp_threshold_N_unintended: accuracy that its own, other probes lose
scr_metric_threshold_N: the direction of lower biased accuracy, none in a tie; 1 is best
scr_dirN_threshold_N: share of the way from biased to oracle accuracy, without N latents
pairs: pairs of classes measured on
cycle, core: number of the training; latents of the core that was chosen after it
kept, dropped, new: latents of the core chosen again, not again, and for the first time
dead: share of latents that were dead at the end of the training
ce, ce_recovered: ce_loss_with_sae and ce_loss_score after the training
"""
METRICS = "reconstruction absorption probing tpp scr stability".split()
MIN_F1 = 0.6  # of a letter's probe, and of its main latents: below, there is nothing to measure
MIN_LETTERS = 20  # that the probes must read (SAEBench)
MIN_TEXTS = 50  # of a class, and of each kind in scr: a fifth of them is for tests
ABLATED = 2, 5, 10, 20, 50, 100, 500  # latents at once; SAEBench's main figure is that of 20
# What is printed without --all.
PRINTED = "reconstruction: .*|absorption: (full.*rate|words)|stability: (core|kept)"
PRINTED += "|.*(sae_top_1_test_accuracy|tpp_threshold_20_total_metric|scr_metric_threshold_20)"
bar = partial(tqdm, disable=None, leave=False)  # a progress bar, on a terminal only


def mean_of(rows):
    """Means over rows, dicts of the same figures, and as NAME_std the deviations; without None."""
    out = {}
    for name in rows[0]:
        values = [row[name] for row in rows if row[name] is not None]
        out[name] = np.mean(values) if values else None
        out[f"{name}_std"] = np.std(values, ddof=1) if len(values) > 1 else None
    return out


def unit_rows(sae):
    """Rescale each latent, in place, to a decoder row of unit norm. The SAE computes the same."""
    norm = sae.requires_grad_(False).W_dec.norm(dim=1).clamp_min(1e-8)  # (F,)
    sae.W_dec /= norm[:, None]
    for tensor in sae.W_enc.T, sae.b_enc, sae.threshold:
        tensor *= norm
    return sae


def residuals(model, layer, rows, at_once=64):
    """Yield the residual stream of each of rows, lists of token ids: (its length, D). Raises
    ValueError where the model cannot read them."""
    config = model.config.get_text_config()
    longest = getattr(config, "max_position_embeddings", math.inf)
    if any(len(row) > longest or max(row) >= config.vocab_size for row in rows):
        raise ValueError(f"over {longest} tokens, or ids from {config.vocab_size} on, in a text")
    for i in bar(range(0, len(rows), at_once), "residuals"):
        batch = [torch.tensor(row) for row in rows[i : i + at_once]]
        ids = pad_sequence(batch, True).to(model.device)  # on the right, where no token sees it
        for row, x in zip(batch, residual_stream(model, layer, ids), strict=True):
            yield x[: len(row)].float()  # (T, D)


# ---- Probes, as SAEBench trains them. A probe is its weights, and then its bias: (d + 1,) --------
def probe_logits(x, probes):
    """x (n, d), probes (P, d + 1) -> (n, P)"""
    return F.linear(x, probes[:, :-1], probes[:, -1])


def logistic_regression(x, y, balanced=False):
    """The minimum of scikit-learn's LogisticRegression(C=1): x (n, d), y (n,) bool -> (1, d + 1).
    balanced: both classes weigh the same."""
    # In float64, and on the CPU: a GPU would wait at each of hundreds of tiny steps.
    columns, truth = x.double().cpu(), y.double().cpu()
    weight = 0.5 / torch.where(truth > 0, truth.mean(), 1 - truth.mean()) if balanced else None
    mean = columns.mean(0)  # (d,)
    columns = F.pad(columns - mean, (0, 1), value=1.0)  # (n, d + 1), the bias last
    # LBFGS stops early where columns differ in scale. So it moves probe / scale, where curvatures
    # are alike: about n / 4 times the variance from the loss, and 1 from the penalty.
    scale = (1 + len(x) / 4 * columns.square().mean(0)).rsqrt()  # (d + 1,)
    z = torch.zeros_like(scale, requires_grad=True)
    exact = dict(tolerance_grad=1e-12, tolerance_change=1e-14, line_search_fn="strong_wolfe")
    lbfgs = torch.optim.LBFGS([z], max_iter=500, **exact)

    def objective():
        lbfgs.zero_grad()
        logits = columns @ (z * scale)  # (n,)
        loss = F.binary_cross_entropy_with_logits(logits, truth, weight, reduction="sum")
        loss += (z * scale)[:-1].square().sum() / 2  # The penalty, in the old units.
        loss.backward()
        return loss

    lbfgs.step(objective)
    probe = (z * scale).detach()  # (d + 1,)
    probe[-1] -= probe[:-1] @ mean  # of columns that are not centred
    return probe[None].to(x)


@torch.enable_grad()
def train_epoch(probes, adam, x, y, batch, rng, l1, pos_weight=None):
    """An epoch of P probes on x (n, d), y (n, P): cross-entropy + l1 * mean over P of sum |w|."""
    for at in torch.randperm(len(x), generator=rng).to(x.device).split(batch):
        logits = probe_logits(x[at], probes)  # (batch, P)
        loss = F.binary_cross_entropy_with_logits(logits, y[at], pos_weight=pos_weight)
        adam.zero_grad()
        (loss + l1 * probes[:, :-1].abs().sum(1).mean()).backward()
        adam.step()


def train_letter_probes(x, y, batch, weight_decay, seed=0, l1=0.0):
    """A one-vs-rest probe for each letter: x (n, d), y (n,) in 0..25 -> (26, d + 1). Ours: at least
    20 batches in each of 50 epochs. So they are trained, too, where there are few words."""
    rng = generator(seed, "letters")
    is_letter = F.one_hot(y, 26).float()  # (n, 26)
    pos_weight = len(y) / is_letter.sum(0).clamp_min(1) - 1  # (26,) negatives / positives
    probes = x.new_zeros(26, x.shape[1] + 1, requires_grad=True)
    adam = torch.optim.Adam([probes], weight_decay=weight_decay)
    batch = min(batch, max(1, len(x) // 20))  # 20 batches an epoch, or more
    for epoch in bar(range(50), "letter probes"):
        adam.param_groups[0]["lr"] = 1e-2 * 1e-3 ** (epoch / 50)
        train_epoch(probes, adam, x, is_letter, batch, rng, l1, pos_weight)
    return probes.detach()


def is_positive(task, device):
    """The labels of a task (2, m), indices of positives and then of others: (2 m,) bool."""
    return torch.arange(task.numel(), device=device) < task.shape[1]


def accuracy(x, task, probe):
    """Accuracy of one probe (1, d + 1) on a task (2, m) of x (n, d): a float."""
    says = probe_logits(x[task.flatten()], probe)[:, 0] > 0  # (2 m,)
    return (says == is_positive(task, x.device)).float().mean().item()


def train_probe(x, train, test, seed=0):
    """A probe for TPP and SCR, of tasks (2, m) of x (n, d): (1, d + 1). AdamW, batches of 16; of
    20 epochs the one that is best on `test`. It starts as nn.Linear does, from the seed."""
    rng = generator(seed, "probes")
    y = is_positive(train, x.device).float()[:, None]  # (2 m, 1)
    bound = x.shape[1] ** -0.5
    probe = torch.empty(1, x.shape[1] + 1).uniform_(-bound, bound, generator=rng).to(x)
    adam = torch.optim.AdamW([probe.requires_grad_()], lr=1e-3)
    epochs = []  # (accuracy, probe) after each
    for _ in range(20):
        train_epoch(probe, adam, x[train.flatten()], y, 16, rng, 1e-3)
        epochs.append((accuracy(x, test, probe), probe.detach().clone()))
    return max(epochs, key=lambda epoch: epoch[0])[1]


# ---- Reconstruction, SAEBench's group "core": what is lost, and how sparse it is -----------------
@torch.no_grad()
def reconstruction(model, layer, ids, keep, sae, limit=math.inf):
    """SAEBench's group "core", on contexts ids, keep (R, T) of dmsae.contexts. Outside keep the SAE
    changes nothing. Where a figure has no number, as for 0 / 0, it is None."""
    contexts = model, layer, ids, dmsae.without_outliers(model, layer, ids, keep, limit)
    sums = Counter()  # It adds what has the same name.
    # 2048 tokens at a time, as SAEBench's 16 contexts of 128.
    for some, kept in dmsae.in_parts(model, ids, keep, 2048):
        x = residual_stream(model, layer, some)[kept].float()  # (B, D)
        acts, usual = sae.encode(x), x.norm(dim=1) <= limit  # (B, F), (B,)
        # In float64: differences of sums of squares need its digits.
        x, x_hat = x.double(), sae.decode(acts).double()  # (B, D)
        error, square = (x - x_hat).square().sum(1), x.square().sum(1)  # (B,)
        rows = torch.stack([usual, usual | True]).double()  # (2, B): within the limit, and all
        sums.update(n=rows.sum(1), x=rows @ x, square=rows @ square, error=rows @ error)
        x, x_hat, error = x[usual], x_hat[usual], error[usual]
        legacy = 1 - error / (x - x.mean(0)).square().sum(1)  # (B,)
        cosine = F.cosine_similarity(x, x_hat)  # (B,)
        sums.update(legacy=legacy.sum(), cosine=cosine.sum(), fired=(acts[usual] > 0).sum(0))
    n, square = sums["n"], sums["square"]  # (2,) each
    density = sums["fired"] / n[0]  # (F,)
    fvu = sums["error"] / (square - sums["x"].square().sum(1) / n)  # (2,)
    # SAEBench subtracts the square of one number, the mean square over D, not of the mean.
    variance = square[0] - n[0] * (square[0] / n[0] / len(sae.b_dec)) ** 2
    own, with_sae = dmsae.mean_loss(*contexts, lambda x: x), dmsae.mean_loss(*contexts, sae)
    with dmsae.spliced(model, layer, torch.zeros_like):  # at BOS too
        zeroed = dmsae.mean_loss(*contexts, lambda x: x)
    figures = dict(l0=density.sum(), core_l0=density[: sae.n_core].sum(), fvu=fvu[0])
    figures |= dict(fvu_all_positions=fvu[1], explained_variance=1 - sums["error"][0] / variance)
    figures |= dict(explained_variance_legacy=sums["legacy"] / n[0], cossim=sums["cosine"] / n[0])
    figures |= dict(frac_alive=(density > 0).double().mean(), ce_loss_with_ablation=zeroed)
    figures |= dict(ce_loss_score=(zeroed - with_sae) / (zeroed - own or math.nan))
    figures |= dict(ce_loss_without_sae=own, ce_loss_with_sae=with_sae)
    figures = {name: float(t) if math.isfinite(t) else None for name, t in figures.items()}
    return figures | dict(tokens=int(n[0]))


# ---- First-letter absorption: is the latent for "starts with s" silent at some words? ------------
# Residuals x (n, D) at words, x_fresh in other prompts; letters y (n,), 0..25; probes (26, D + 1)
Spelling = namedtuple("Spelling", "x_train y_train x_test y_test x_fresh probes")


@cache  # the same for every SAE of a layer; it keeps the model, too, until .cache_clear()
def spelling_task(model, layer, tokenizer, n_words=10_000, seed=0, limit=math.inf):
    """The Spelling of at most n_words tokens that are words, a fifth of them for tests. A prompt is
    a new line, ten lines "{example} has the first letter: X" of other words, and the word, which
    would go on so. Raises ValueError where the vocabulary has too few words."""
    rng, letters = np.random.default_rng(seed), {}  # the letter of each id that is a word: 0..25
    for i, token in enumerate(tokenizer.convert_ids_to_tokens([*range(len(tokenizer))])):
        if word := re.fullmatch("[ ▁Ġ]?([a-zA-Z]+)", token or ""):
            letters[i] = ord(word[1][0].upper()) - 65
    if len(letters) < 100:
        raise ValueError(f"the vocabulary has {len(letters)} words of letters only; 100 are needed")
    words = rng.permutation([*letters])[:n_words]  # ids
    train, test = np.split(words, [int(0.8 * len(words))])

    def after_word(string):
        word, both = tokenizer(["a", "a" + string], add_special_tokens=False)["input_ids"]
        return both[len(word) :]

    def read(words, pool):
        prompts = []
        for word in words:
            prompt = [dmsae.special_tokens(tokenizer)[0], *newline]
            examples = rng.choice(pool, 11, replace=False)
            for example in examples[examples != word][:10]:
                prompt += [example, *rest_of_line[letters[example]]]
            prompts.append([*prompt, word])
        return torch.stack([x[-1].clone() for x in residuals(model, layer, prompts)])  # (n, D)

    newline, tail = after_word("\n"), after_word(" has the first letter:")  # ids
    rest_of_line = [[*tail, *after_word(f" {chr(65 + c)}"), *newline] for c in range(26)]
    x, x_test, x_fresh = read(train, train), read(test, test), read(test, words)
    y = torch.tensor([letters[word] for word in words], device=model.device)  # (n + m,)
    y, y_test = y.tensor_split([len(train)])
    usual = dmsae.usual(x, limit, "prompts")  # (n,)
    x, y = x[usual], y[usual]
    usual = dmsae.usual(torch.stack([x_test, x_fresh]), limit, "prompts").all(0)  # (m,)
    probes = train_letter_probes(x, y, 64, 1e-4, seed)
    return Spelling(x, y, x_test[usual], y_test[usual], x_fresh[usual], probes)


def f1_score(positive, truth):
    """F1 along the first dimension of two bool tensors."""
    return 2 * (positive & truth).sum(0) / (positive.sum(0) + truth.sum(0)).clamp_min(1)


def main_latents(order, f_train, y_train, f_test, y_test):
    """A letter's main latents: the first k of `order`, as long as one more adds over .03 to the F1
    of a regression on them; and that F1. f (n, F) activations, y (n,) bool."""
    best, main = -1.0, None
    for k in range(1, 11):
        probe = logistic_regression(f_train[:, order[:k]], y_train, balanced=True)
        f1 = f1_score(probe_logits(f_test[:, order[:k]], probe)[:, 0] > 0, y_test).item()
        if f1 <= best + 0.03:
            break
        best, main = f1, order[:k]
    return main, best


def absorption_scores(f, x, W_dec, w, main):
    """Full absorption (bool) and the absorbed fraction of n words of a letter, (n,) each, from
    activations f (n, F), residuals x (n, D), the letter's probe w (D,), and its main latents."""
    u = F.normalize(w, dim=0)
    along = F.normalize(W_dec) @ u  # (F,) cosine of each latent with the probe
    parts = f * along  # (n, F) what each latent adds to
    projection = x @ u  # (n,) the projection on the probe,
    by_main = parts[:, main].sum(1)  # (n,) and the main latents together
    top, at = parts.max(1)  # (n,) the largest, and which it is
    silent = (f[:, main] < 1e-8).all(1)  # (n,)
    full = silent & (along[at] >= 0.025) & (projection > 0) & (top >= 0.4 * projection)
    others = parts * (along >= 0.1).index_fill(0, main, False)  # (n, F)
    by_others = others.clamp_min(0).topk(min(3, len(along)), 1).values.sum(1)  # (n,)
    share = torch.minimum(by_others, projection - by_main)  # (n,)
    fraction = torch.where(by_main <= 0, 1, share / (share + by_main))
    none = (by_main >= projection) | (projection <= 0) | (by_others < 0.4 * projection)
    return full, fraction.masked_fill(none, 0)


@torch.no_grad()
def absorption(model, layer, tokenizer, sae, n_words=10_000, seed=0, limit=math.inf):
    """First-letter absorption (Chanin et al. 2024, arXiv 2409.14507), mean over letters. Raises
    ValueError where the residual tells too few letters, or (ours) main latents tell them badly."""
    task = spelling_task(model, layer, tokenizer, n_words, seed, limit)
    read = probe_logits(task.x_test, task.probes) > 0  # (m, 26)
    is_letter = F.one_hot(task.y_test, 26).bool()  # (m, 26)
    letters = (f1_score(read, is_letter) > MIN_F1).nonzero()[:, 0].tolist()
    if len(letters) < MIN_LETTERS:
        raise ValueError(f"the probes read {len(letters)} of 26 letters; {MIN_LETTERS} are needed")
    xs = task.x_train, task.x_test, task.x_fresh
    f_train, f_test, f_fresh = (torch.cat([*map(sae.encode, x.split(2048))]) for x in xs)  # (n, F)
    sparse = train_letter_probes(f_train, task.y_train, 4096, 1e-6, seed, 0.01)
    rows = {}  # of each letter
    for c in bar(letters, "absorption"):
        order, truth = sparse[c, :-1].argsort(descending=True), is_letter[:, c]
        main, main_f1 = main_latents(order, f_train, task.y_train == c, f_test, truth)
        hit = truth & read[:, c]  # (m,) test words of the letter whose letter is read
        probe = task.probes[c, :-1]  # (D,)
        scores = absorption_scores(f_fresh[hit], task.x_fresh[hit], sae.W_dec, probe, main)
        full, fraction = (score.float().mean().item() for score in scores)
        row = dict(full_absorption_rate=full, fraction_0_6_0=fraction, main_f1=main_f1)
        rows[chr(97 + c)] = row | dict(num_split_features=len(main))
    out = mean_of([*rows.values()])
    if out["main_f1"] < MIN_F1:
        raise ValueError(f"the main latents' mean F1 is {out['main_f1']:.2f}, below {MIN_F1}")
    out["words"] = len(task.y_train) + len(task.y_test)
    return out | dict(letters=len(rows), details=rows)


# ---- Sparse probing: what a few latents tell of a labelled text ---------------------------------
def labelled(path, columns=("text", "label"), budget=10_000, seed=0):
    """Texts, labels, and a third column for SCR or None, (n,) each, of a .csv or .jsonl file: about
    `budget` in all, as many of each class, at most 2500 (SAEBench: 2000 + 500), each text once, and
    none of a class below MIN_TEXTS. Raises ValueError where less than two classes are left."""
    with refusing(f"--labelled {path}: must be a .csv or .jsonl file in UTF-8"):
        with open(path, newline="", encoding="utf-8-sig") as file:
            is_csv = Path(path).suffix.lower() == ".csv"
            rows = csv.DictReader(file) if is_csv else map(json.loads, filter(str.strip, file))
            rows = [*map(dict, rows)]
        json.dumps(rows, ensure_ascii=False).encode()  # It fails where a text is no UTF-8.
    by_class, seen = defaultdict(list), set()  # rows as lists of strings; texts
    for i in np.random.default_rng(seed).permutation(len(rows)):
        values = [rows[i].get(column) for column in columns]
        text = str(values[0]).strip()
        # Each text once: a probe must not be tested on a copy of what it was trained on.
        if None not in values and "" not in values and text not in seen:
            seen.add(text)
            by_class[str(values[1])].append([*map(str, values)])
    classes = [found for found in by_class.values() if len(found) >= MIN_TEXTS]
    if len(classes) < 2:
        few = f"classes of {[*map(len, by_class.values())]}, two are needed of {MIN_TEXTS} texts"
        has = [*rows[0]] if rows else "no rows"
        raise ValueError(f"--columns {' '.join(columns)}: {few}; {path} has only {has}")
    most = min(2500, max(MIN_TEXTS, budget // len(classes)))
    chosen = sum((found[:most] for found in classes), [])
    return (*np.array(chosen, object).T, None)[:3]  # texts, labels, spurious values or None


@torch.no_grad()
def pooled(model, layer, tokenizer, sae, texts, ctx=128, limit=math.inf):
    """Means over the tokens of each text that are not special: X (n, D) of the residual, A (n, F)
    of the activations. A text is cut at ctx tokens."""
    special = dmsae.special_tokens(tokenizer)
    rows = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    rows = [special[:1] + row[: ctx - 1] for row in rows]  # BOS first, as in training
    X, A = [], []
    for row, x in zip(rows, residuals(model, layer, rows), strict=True):
        plain = torch.tensor([i not in special for i in row], device=x.device)
        x = x[plain & dmsae.usual(x, limit, "labelled texts")]  # (tokens, D)
        X.append(x.sum(0) / max(1, len(x)))
        A.append(sae.encode(x).sum(0) / max(1, len(x)))
    return torch.stack(X), torch.stack(A)


def one_vs_rest(labels, seed=0):
    """For each class in sorted order (train (2, m), test (2, m')), 80 to 20: indices of its texts,
    and of as many others, in equal shares of the other classes."""
    rng = np.random.default_rng(seed)
    classes = [rng.permutation(np.flatnonzero(np.asarray(labels) == c)) for c in np.unique(labels)]
    parts = [np.split(texts, [int(0.8 * len(texts))]) for texts in classes]  # train, test

    def task(c, part):
        share = math.ceil(len(part[c]) / (len(part) - 1))
        rest = [texts[:share] for other, texts in enumerate(part) if other != c]
        rest = rng.permutation(np.concatenate(rest))  # of all other classes
        return torch.from_numpy(np.stack([part[c][: len(rest)], rest[: len(part[c])]]))

    train, test = zip(*parts, strict=True)
    return [(task(c, train), task(c, test)) for c in range(len(parts))]


def sparse_probing(X, A, labels, seed=0):
    """How well the k latents (baseline: channels of the residual) whose class means differ most
    tell a class from the others, mean over classes. X, A of `pooled`, labels (n,)."""
    rows = []
    for train, test in bar(one_vs_rest(labels, seed), "probing"):
        row, y = {}, is_positive(train, X.device)
        for name, x in ("sae", A), ("llm", X):
            gap = x[train[0]].mean(0) - x[train[1]].mean(0)  # (d,)
            order = gap.abs().argsort(descending=True)  # (d,)
            for k in 1, 2, 5:
                top = x[:, order[:k]]  # (n, k)
                probe = logistic_regression(top[train.flatten()], y)
                row[f"{name}_top_{k}_test_accuracy"] = accuracy(top, test, probe)
        rows.append(row)
    return mean_of(rows)


# ---- TPP and SCR: what a few ablated latents cost probes of the residual stream -----------------
def ablations(X, A, W_dec, effect):
    """Yield n, and X (n, D) without the n latents of the largest effect (F,), for n of ABLATED. To
    zero them at every token and keep the SAE's error moves the mean X by -A W_dec. Ours: not at
    special tokens. As in SAEBench, as many may go as have an effect other than 0, so that a large n
    takes latents of negative effect."""
    order = effect.topk(min(max(ABLATED), int((effect != 0).sum()))).indices
    for n in ABLATED:
        yield n, X - A[:, order[:n]] @ W_dec[order[:n]]


def tpp(X, A, labels, W_dec, seeds=(0, 1, 2)):
    """Targeted probe perturbation: which probes suffer where the latents of a class are ablated?
    Mean over classes, then seeds, each with its own split and probes. Negatives are drawn once (in
    SAEBench at each call, which adds noise). X, A of `pooled`, labels (n,), W_dec (F, D)."""
    rows = []
    for seed in bar(seeds, "tpp"):
        tasks = one_vs_rest(labels, seed)
        probes = [train_probe(X, *task, seed) for task in tasks]  # one for each class
        before = [accuracy(X, test, probes[c]) for c, (_, test) in enumerate(tasks)]
        lost = defaultdict(list)  # accuracies that are lost, by n and whether by its own probe
        for i, (train, _) in enumerate(tasks):
            gap = A[train[0]].mean(0) - A[train[1]].mean(0)  # (F,)
            effect = gap.clamp_min(0) * (W_dec @ probes[i][0, :-1])  # (F,)
            for n, x in ablations(X, A, W_dec, effect):
                for j, (_, test) in enumerate(tasks):
                    lost[n, i == j].append(before[j] - accuracy(x, test, probes[j]))
        row = dict(probe_accuracy=np.mean(before))
        for n in ABLATED:
            intended, unintended = np.mean(lost[n, True]), np.mean(lost[n, False])
            row[f"tpp_threshold_{n}_total_metric"] = intended - unintended
            row[f"tpp_threshold_{n}_intended"] = intended
            row[f"tpp_threshold_{n}_unintended"] = unintended
        rows.append(row)
    return mean_of(rows) | dict(details=rows)


def scr_cells(labels, spurious):
    """Pairs of classes a, b with spurious values u, v, at most four, those with the most texts:
    [indices of the texts of a with u, a with v, b with u, b with v]. Raises ValueError where none
    has MIN_TEXTS texts of each kind."""
    values = [] if spurious is None else np.unique(spurious)
    found = []
    for pair in itertools.combinations(np.unique(labels), 2):
        own = [np.equal(labels, c) for c in pair]  # two masks (n,)
        cells = [np.flatnonzero(one & np.equal(spurious, v)) for one in own for v in values]
        if len(values) == 2 and min(map(len, cells)) >= MIN_TEXTS:
            found.append(cells)
    if not found:
        raise ValueError(f"needs a third column of two values, in {MIN_TEXTS} texts of two classes")
    return sorted(found, key=lambda cells: -min(map(len, cells)))[:4]


def scr_row(X, A, W_dec, cells, seed):
    """The figures of `scr` for one pair of classes and one seed."""
    rng = np.random.default_rng(seed)
    size = min(map(len, cells))  # as many texts of each kind
    texts = torch.tensor(np.array([rng.permutation(cell)[:size] for cell in cells]))  # (4, size)

    def tasks(texts):  # Three (2, m): a against b, u against v, and a with u against b with v.
        half = texts.shape[1] // 2
        by_class, by_value = texts[:, :half], texts[[0, 2, 1, 3], :half]  # both balanced
        return by_class.reshape(2, -1), by_value.reshape(2, -1), texts[[0, 3], : 2 * half]

    train, test = map(tasks, texts.tensor_split([int(0.8 * size)], 1))  # three tasks each
    *oracles, biased = (train_probe(X, *task, seed) for task in zip(train, test, strict=True))
    before = [accuracy(X, test[i], biased) for i in (0, 1)]
    row = {}
    for i in 0, 1:  # What the biased probe is asked for: the class, and the spurious value.
        room = accuracy(X, test[i], oracles[i]) - before[i]
        on, off = train[1 - i]  # texts with the other one of the two, and without
        effect = (A[on].mean(0) - A[off].mean(0)) * (W_dec @ oracles[1 - i][0, :-1])  # (F,)
        for n, x in ablations(X, A, W_dec, effect.abs()):
            gain = accuracy(x, test[i], biased) - before[i]
            row[f"scr_dir{i + 1}_threshold_{n}"] = gain / room if room >= 0.001 else 0.0
    worse = None if before[0] == before[1] else before.index(min(before)) + 1
    for n in ABLATED:
        row[f"scr_metric_threshold_{n}"] = row.get(f"scr_dir{worse}_threshold_{n}")
    return row


def scr(X, A, labels, spurious, W_dec, seeds=(0, 1, 2)):
    """Spurious correlation removal: does ablating latents make a biased probe fair? It learns class
    a against b where a always has the spurious value u, and b has v; oracles learn on balanced
    texts. Direction 1 asks it for the class, without latents of the value, direction 2 the reverse.
    Mean over pairs of classes, seeds. X, A of `pooled`; labels, spurious (n,)."""
    pairs = scr_cells(labels, spurious)
    rows = [scr_row(X, A, W_dec, *run) for run in bar([*itertools.product(pairs, seeds)], "scr")]
    return mean_of(rows) | dict(pairs=len(pairs), details=rows)


# ---- Stability: is the core of a run still the core a training later, and that of another run? --
def cycles(run):
    """The SAE folders of a run folder, in order; none where it is no run."""
    numbers = [path.parent.name[5:] for path in Path(run).glob("cycle*/core.safetensors")]
    return [Path(run) / f"cycle{n}" for n in sorted(int(n) for n in numbers if n.isdigit())]


def stability(folder):
    """The figures of a training, from its SAE folder, and how many latents were born when. Raises
    ValueError where the folder is in no run, or is damaged."""
    folder = Path(folder)
    if folder not in cycles(folder.parent):
        raise ValueError("the SAE is in no run folder of dmsae.py")
    with refusing(f"{folder}: is of no training of dmsae.py"):
        core, _ = load_core(folder / "core.safetensors")
        row = read_json(folder / "cfg.json")["metadata"]["result"]
        return row | dict(births=Counter(core.birth[:, 0].tolist()))  # {training: latents}


def assignment(cost):
    """The one-to-one matching of least total cost (n, m), n <= m: (m,), the row of each column, -1
    where it has none. Exact, by augmenting paths (Jonker & Volgenant 1987)."""
    price, row_of = np.zeros(cost.shape[1]), np.full(cost.shape[1], -1)  # (m,)
    for row in range(len(cost)):  # Find a place for one row after the other.
        distance = cost[row] - price  # of the shortest path to each column,
        previous, seen = np.full(len(price), -1), np.zeros(len(price), bool)  # and its last step
        column = distance.argmin()
        while row_of[column] >= 0:
            seen[column] = True  # The shortest path to it is known.
            further = cost[row_of[column]] - price  # from its row on to each column
            further += distance[column] - further[column]
            closer = ~seen & (further < distance)
            distance[closer], previous[closer] = further[closer], column
            column = np.where(seen, np.inf, distance).argmin()
        price[seen] += distance[seen] - distance[column]
        while previous[column] >= 0:  # Shift the partners along the path.
            row_of[column] = row_of[previous[column]]
            column = previous[column]
        row_of[column] = row
    return row_of


def pw_mcc(a, b):
    """Mean cosine of the one-to-one matching of a (n, D) and b (m, D) where it is largest (Song et
    al. 2025, arXiv 2505.20254). Ours: signed; of sets of unequal size the smaller is matched."""
    a, b = sorted((a, b), key=len)
    cosine = (F.normalize(a) @ F.normalize(b).T).double().numpy(force=True)  # (n, m)
    row_of = assignment(-cosine)
    return cosine[row_of, np.arange(len(b))][row_of >= 0].mean()


def agreement(run_a, run_b, seed=0):
    """Do the last SAEs of two runs have the same features? {set: PW-MCC of decoder rows} of the
    cores and of prefix 0. Baselines: latents drawn from prefix 0, and random directions."""
    rng, sides, out = generator(seed, "agreement"), [], {}
    for folder in cycles(run_a)[-1], cycles(run_b)[-1]:
        sae, (core, _) = load_sae(folder), load_core(folder / "core.safetensors")
        rows = sae.W_dec[: sae.widths[0]]  # (M, D)
        drawn = rows[torch.randperm(len(rows), generator=rng)[: len(core.index)]]
        sides.append({"core": rows[core.index], "drawn from prefix 0": drawn, "prefix 0": rows})
    for name, a in sides[0].items():
        b, random = sides[1][name], torch.randn(a.shape, generator=rng)
        out[name] = dict(n=[len(a), len(b)], decoder=pw_mcc(a, b), decoder_random=pw_mcc(random, b))
    return out


# ---- The table ----------------------------------------------------------------------------------
def every_figure(report):
    """{"metric: figure": its values for the SAEs} of all that is one number or word."""
    rows = defaultdict(lambda: [None] * len(report["saes"]))
    for i, sae in enumerate(report["saes"]):
        for metric, figures in sae["metrics"].items():
            for figure, value in figures.items():
                if not isinstance(value, list | dict):
                    rows[f"{metric}: {figure}"][i] = value
    return rows


def table(report, everything=False):
    """Yield the lines for the terminal: figures, reasons why there are none, and PW-MCC."""
    yield " " * 58 + "".join(f" {sae['folder']:>29}" for sae in report["saes"])
    for name, row in every_figure(report).items():
        if name.endswith(": cannot_run"):
            yield f"{name.removesuffix('_run')} run: {'; '.join(dict.fromkeys(filter(None, row)))}"
        elif everything or re.fullmatch(PRINTED, name):
            cells = (f"{v:.4g}" if isinstance(v, float) else v for v in row)
            yield f"{name:58}" + "".join(f" {'-' if v is None else v:>29}" for v in cells)
    for pair, sets in report["agreement"].items():
        for name, row in sets.items():
            line = "PW-MCC of {}, {} {n}: {decoder:.3f}, random directions {decoder_random:.3f}"
            yield line.format(pair, name, **row)


# ---- The page: one file without network, which draws the report and the core's latents ----------
PAGE = r"""<!doctype html><html lang="en"><meta charset="utf-8"><title>dmsae</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
body { font: 16px/1.5 system-ui; margin: auto; max-width: 70em; padding: 1em; color: #222 }
h2 { margin-top: 2em } figure { margin: 0 } small { color: #666 } kbd { background: #eee }
svg { width: 100%; overflow: visible } text { font-size: 11px; fill: #666 }
.grid { display: grid; gap: 1.5em; grid: auto / repeat(auto-fill, minmax(min(18em, 100%), 1fr)) }
article { border: 1px solid #ddd; border-radius: .5em; padding: .8em; overflow-wrap: anywhere }
article p { font: .8em/1.6 monospace; margin: .5em 0 0; white-space: break-spaces }
progress { width: 3em } details { overflow-x: auto } td { padding-right: 1em }
:target { border-color: red }</style>
<h1 id="title"></h1><p id="about"></p><div id="first" class="grid"></div>
<h2>The run</h2><div id="charts" class="grid"></div>
<h2>The core's latents</h2><input id="find" placeholder="filter, such as a token"> by
<select id="by"><option value="score">attribution<option>density<option>birth</select>
<p><div id="cards" class="grid"></div><h2>All figures</h2><div id="all"></div>
<script type="application/json" id="data">DATA</script><script>
const at = id => document.getElementById(id)
const each = (list, write) => list.map(write).join("")
const sum = list => list.reduce((a, b) => a + b, 0)
const show = (v, digits = 4) => typeof v == "number" && v % 1 ? +v.toPrecision(digits) : v ?? "-"
// Strings are escaped as they are read, so that no token and no name becomes HTML.
const escaped = s => s.replace(/[&<>"]/g, c => `&#${c.charCodeAt()};`).replace(/\n/g, "↵")
const data = JSON.parse(at("data").textContent, (_, v) => typeof v == "string" ? escaped(v) : v)
const { core } = data
const trainings = Object.values(data.stability)[0] ?? []  // of the first run
const figures = Object.entries(data.all).map(([name, values]) => {
  const [, metric, figure, plain] = name.match(/^(.*): ((\w+?)(?:_std)?)$/)
  const meaning = data.meaning[plain] ?? data.meaning[plain.replace(/\d+/g, "N")] ?? ""
  return { name, metric, figure, values, meaning }
})
// Where a value is drawn along an axis, and the round numbers to write beside it.
function axis(values, from, to, leastStep) {
  const low = Math.min(...values)
  const range = Math.max(...values) - low || 1
  const power = 10 ** Math.floor(Math.log10(range))
  const step = Math.max(leastStep, power * [0.2, 0.5, 1, 2].find(s => range / power / s <= 5))
  const round = []
  for (let i = Math.ceil(low / step); i * step < low + 1.001 * range; i++) round.push(i * step)
  return [value => from + (to - from) * (0.04 + 0.92 * (value - low) / range), round]
}
// Adds a chart of lines, {name: [[x, y], ...]}.
function chart(title, xName, yName, lines, leastStep = 0) {
  const points = Object.values(lines).flat()
  const radius = points.length > 99 ? 1 : 4
  const [across, xs] = axis(points.map(point => point[0]), 40, 320, leastStep)
  const [down, ys] = axis(points.map(point => point[1]), 195, 5, 0)
  let key = "", svg = `<text x=180 y=226 text-anchor=middle>${xName}</text>`
  svg += each(xs, x => `<text x=${across(x)} y=210 text-anchor=middle>${show(x, 6)}</text>`)
  svg += each(ys, y => `<path d="M40 ${down(y)}H320" stroke=#ddd></path>
    <text x=34 y=${down(y) + 4} text-anchor=end>${show(y, 6)}</text>`)
  Object.entries(lines).forEach(([name, line], i) => {
    const colour = `hsl(${210 + 137 * i}, 60%, ${40 + 12 * (i % 3)}%)`
    svg += `<polyline fill=none stroke="${colour}" points="${each(line,
      ([x, y]) => `${across(x)},${down(y)} `)}"></polyline>`
    svg += each(line, ([x, y]) => `<circle cx=${across(x)} cy=${down(y)} r=${radius}
      fill="${colour}"><title>${name}: ${xName} ${show(x)}, ${yName} ${show(y)}</title></circle>`)
    key += `<nobr style="color: ${colour}">■ <small>${name}</small></nobr> &ensp; `
  })
  at("charts").innerHTML += `<figure><b>${title}</b><br><small>${yName}</small>
    <svg viewBox="0 0 325 230">${svg}</svg>${key}</figure>`
}
function drawRun(last) {
  const over = f => trainings.map((row, t) => [t, f(row)])
  const births = { all: over(row => row.core) }
  for (const b in last.births) births[`born in ${b}`] = over(row => row.births[b] ?? 0)
  const fvu = Object.fromEntries(last.fvu.map((_, g) => [`prefix ${g}`, over(row => row.fvu[g])]))
  const ce = trainings.map((row, t) => [`training ${t}`, [[row.l0, row.ce_recovered]]])
  const l0 = { core: over(row => row.core_l0), rest: over(row => row.l0 - row.core_l0) }
  at("about").innerHTML = `After ${trainings.length} trainings of ${show(last.tokens / 1e6, 3)}
    million tokens the core has ${last.core} latents, ${last.kept} of them from the training before;
    of the ${show(last.l0, 3)} latents active per token ${show(last.core_l0, 3)} are the core's. `
  chart("The core, and who was born when", "training", "latents", births, 1)
  chart("Error by prefix", "training", "FVU, lower is better", fvu, 1)
  chart("Loss recovered", "L0", "CE recovered, higher is better", Object.fromEntries(ce))
  chart("L0 of core and rest", "training", "latents active per token", l0, 1)
}
function drawCore() {
  const ranked = data.scores.sort((a, b) => b - a)
  const share = ranked.map((_, i) => [i + 1, sum(ranked.slice(0, i + 1)) / sum(ranked)])
  const bins = data.density.map(d => Math.round(2 * Math.log10(d + 1e-6)) / 2)
  const count = inCore => [...new Set(bins)].sort((a, b) => a - b).map(bin =>
    [bin, bins.filter((b, i) => b == bin && core.index.includes(i) == inCore).length])
  chart("Attribution, largest first", "latents of core and prefix 0", "share of all",
    { attribution: share, "90 %": [[1, 0.9], [share.length, 0.9]] })
  chart("How often latents are active", "log10 of the share of tokens", "latents",
    { core: count(true), "rest of prefix 0": count(false) }, 0.5)
}
function firstFigure({ figure, values, meaning }) {
  const [a, b] = values
  const change = a == null || b == null ? "" : (b > a ? "+" : "") + show(b - a, 3)
  return `<div title="${meaning}"><b>${figure}</b> ${change}` + each(values, (value, i) => `<br>
    <progress value=${value ?? 0} max=${Math.max(...values) || 1}></progress> ${show(value)}
    <small>${data.saes[i].folder}</small>`) + "</div>"
}
function card(contexts, c) {
  const id = `latent-${core.index[c]}`
  return `<article id=${id}><b><a href="#${id}">latent ${core.index[c]}</a></b><br><small>
    ${show(100 * core.score[c] / sum(core.score), 3)} % of the core's attribution; active at
    ${show(100 * core.density[c], 3)} % of tokens; born in training ${core.birth[c][0]};
    votes ${core.votes[c]}</small><p>raises ${each(data.raises[c], t => `<kbd>${t}</kbd> `)}` +
    each(contexts, ([words, shades]) => "<p>" + each(words, (word, i) =>
      `<span style="background: rgba(238, 102, 119, ${shades[i]})">${word}</span>`)) + "</article>"
}
function sortAndFilter() {
  const wanted = at("find").value.toLowerCase(), by = at("by").value
  for (const [c, element] of [...at("cards").children].entries()) {
    element.style.order = Math.round(1e6 * (by == "birth" ? core.birth[c][0] : -core[by][c]))
    element.hidden = !element.textContent.toLowerCase().includes(wanted)
  }
}
at("title").innerHTML = `${data.model.replace(/.*[\\/]/, "")}, layer ${data.layer}`
if (trainings.length) drawRun(trainings.at(-1))
at("about").innerHTML += data.notes.join("; ") + "."
const first = new RegExp("(n: (core_l0|l0|fvu|ce_loss_score|frac_alive)|y: (core|kept)" +
  "|sae_top_1_test_accuracy|_20_total_metric)$")
at("first").innerHTML = each(figures.filter(row => first.test(row.name)).slice(0, 8), firstFigure)
if (core) {
  drawCore()
  at("cards").innerHTML = each(data.contexts, card)
  at("find").oninput = at("by").onchange = sortAndFilter
} else at("cards").innerHTML = data.cannot_run ?? "No SAE here has a core."
for (const metric of new Set(figures.map(row => row.metric))) {
  const rows = each(figures.filter(row => row.metric == metric), row => `<tr><td>${row.figure}
    <td>${row.values.map(value => show(value)).join("<td>")}<td>${row.meaning}`)
  at("all").innerHTML += `<details><summary>${metric}</summary><table>${rows}</table></details>`
}
</script></html>
"""


def raised_tokens(model, rows):
    """The 8 tokens whose logits rise most if the last layer gives rows (C, D): (C, 8)."""
    with dmsae.spliced(model, -1, lambda h: rows[:, None].to(h)):
        logits = model(rows.new_zeros(len(rows), 1).long()).logits  # (C, 1, V)
    return logits[:, 0].topk(8).indices


def core_page(model, tokenizer, ids, keep, trained):
    """For the page: scores and densities of the candidates (M,), the core's facts, and of its 200
    strongest latents the tokens they raise and the contexts that raise them."""
    layer, sae = trained.cfg.layer, trained.sae
    core, _ = load_core(trained.folder / "core.safetensors")  # chosen from this SAE
    order = core.score.argsort(descending=True)  # (C,)
    core = {name: t[order].tolist() for name, t in vars(core).items() if name != "W_enc"}
    keep = dmsae.without_outliers(model, layer, ids, keep, trained.limit)
    score, density = dmsae.attribute(model, layer, ids, keep, sae)  # (M,)
    start = tokenizer("a", add_special_tokens=False)["input_ids"]  # After it no space is lost.

    def words(ids):
        decoded = tokenizer.batch_decode([[*start, i] for i in ids.tolist()])
        return [text[len(tokenizer.decode(start)) :] for text in decoded]

    shown, contexts = core["index"][:200], []
    acts = [sae.encode(x)[:, shown].cpu() for x in residuals(model, layer, ids.tolist(), 1)]
    for fired in (torch.stack(acts) * keep[..., None]).unbind(2):  # (R, T)
        peak, at = fired.max(1)  # (R,)
        contexts.append([])
        for r in peak.argsort(descending=True)[:4].tolist():
            near = slice(max(0, at[r] - 10), at[r] + 11)  # ten tokens on either side
            shades = fired[r, near] / peak.max().clamp_min(1e-9)  # 0 to 1, at the latent's peak
            contexts[-1].append((words(ids[r, near]), shades.tolist()))
    out = dict(core=core, contexts=contexts, scores=score.tolist(), density=density.tolist())
    return out | dict(raises=[words(row) for row in raised_tokens(model, sae.W_dec[shown])])


def page(report, of_core):
    """The report, and what `core_page` gives, as HTML."""
    lines = [line.split(": ", 1) for line in MEANING.strip().splitlines()]  # names, text
    meaning = {name: text for names, text in lines for name in names.split(", ")}
    data = dict(report, **of_core, meaning=meaning, all=every_figure(report), arguments=None)
    return PAGE.replace("DATA", json.dumps(data).replace("<", "\\u003c"))


# ---- What is measured: SAEs, their language model, and a text ------------------------------------
@dataclass
class Trained:
    """An SAE, and what its folder says about its training."""

    folder: Path
    sae: dmsae.MatryoshkaSAE
    cfg: dmsae.Config  # of another's SAE only model, layer, ctx and dataset
    limit: float  # residual norms above it were left out
    checksum: str  # of the language model and its tokenizer, or None
    run: Path  # the run folder with the ids of its text, or None


def open_sae(folder):
    """The Trained of an SAE folder. Raises ValueError."""
    sae, meta = unit_rows(load_sae(folder)), read_json(folder / "cfg.json").get("metadata") or {}
    with refusing(f"{folder}: must be of a blocks.N.hook_resid_post and of this version"):
        layer = re.fullmatch(r"blocks\.(\d+)\.hook_resid_post", meta["hook_name"])[1]
        cfg = dict(model=meta.get("model_name", "unknown"), ctx=meta.get("context_size", 128))
        cfg |= dict(dataset=meta.get("dataset_path", "unknown (give --text)"))
        cfg |= meta.get("config", {}) | dict(layer=int(layer), core=None, cache=None)
        # A relative path began where dmsae.py was started: as far above the run as --out says.
        above = len(Path(cfg.get("out", folder)).parts)
        for name in "model", "text":
            place = Path(*folder.parts[: -1 - above], str(cfg.get(name)))
            cfg[name] = str(place) if place.exists() else cfg.get(name)
        cfg = dmsae.Config(**cfg)
        limit = meta.get("max_norm", 0) * meta.get("median_norm", 0) or math.inf  # 0: none
    run = folder.parent if (folder.parent / "tokens.bin").exists() else None
    return Trained(folder, sae, cfg, limit, meta.get("checksum"), run)


def configure(args, saes):
    """The Config of the language model and the text, by the first SAE and the flags. Raises
    ValueError where the SAEs cannot be measured side by side."""
    contexts = {f"{sae.folder}": sae.cfg.ctx for sae in saes}
    if len({*contexts.values()}) > 1:
        raise ValueError(f"the contexts differ in length, so measure one by one: {contexts}")
    first = saes[0].cfg
    cfg = replace(first, device=args.device, text=args.text, model=args.model or first.model)
    if Path(cfg.model).exists():  # Say in full which folder it is, not a model of the hub.
        cfg.model = str(Path(cfg.model).resolve())
    cfg.layer = max(sae.cfg.layer for sae in saes)  # Where this one is, all are.
    dmsae.check(cfg)
    if not os.access(args.out.parent, os.W_OK):
        raise ValueError(f"--out {args.out}: must be in a folder that exists and can be written")
    if args.text:  # The run's separator and column belong to its own text.
        return replace(cfg, separator=args.separator, text_column=args.text_column)
    return replace(cfg, text=first.text)  # It may be gone: what was held out is kept as ids.


def open_model(args, cfg, saes):
    """The language model, its tokenizer, and a line on whether the SAEs were trained on it. Raises
    ValueError for another one, unless --model names it."""
    model, tokenizer = dmsae.load_model(cfg)
    width, found = model.config.get_text_config().hidden_size, dmsae.checksum(model, tokenizer)
    says = f"model: {cfg.model}, the one that the SAEs were trained on (checksum {found})"
    for trained in saes:
        if len(trained.sae.b_dec) != width:
            raise ValueError(f"{trained.folder}: is not of width {width}, as {cfg.model} is")
        trained.sae.to(model.device)  # Of Gemma's size each takes 1.2 GB.
        if trained.checksum is None:
            says = f"model: {cfg.model}, not checked: {trained.folder} has no checksum of it"
        elif trained.checksum != found:
            trained.run = None  # Its ids may be of another tokenizer.
            says = f"model: {found} of {cfg.model}, not {trained.checksum} of {trained.folder}"
            if not args.model:
                raise ValueError(f"{says}; --model {cfg.model} measures all the same")
    return model, tokenizer, says


def open_contexts(args, cfg, saes, model, tokenizer):
    """Contexts ids, keep (R, T), and a line on them: what the runs of the SAEs held out, or else
    the start of a text. Raises ValueError where the runs held out different texts."""
    held_out = {}  # a description for each run
    for run, own in {sae.run: sae.cfg for sae in saes if sae.run and not args.text}.items():
        rows, *_ = dmsae.open_text(own, model, tokenizer, run)
        held_out[f"{run}"] = f"{rows.size} tokens, checksum {zlib.crc32(rows):08x}"
        source = f"held out by the run {run.name}"
    if len({*held_out.values()}) > 1:
        raise ValueError(f"the runs held out different texts, so measure one by one: {held_out}")
    if not held_out:
        cfg = replace(cfg, tokens=args.tokens, batch=1, attribution_tokens=1)
        with tempfile.TemporaryDirectory() as scratch:  # for its tokens.bin
            rows = np.concatenate(dmsae.open_text(cfg, model, tokenizer, scratch))
        cut = f"--separator {cfg.separator!r} (of the first SAE: {saes[0].cfg.separator!r})"
        source = f"{cut}, the start of {cfg.text or cfg.dataset}, not known to be held out"
    rows = rows[: max(1, args.tokens // cfg.ctx)]  # (R, T - 1)
    about = f"text: {rows.size:,} tokens in contexts of {cfg.ctx}, {source}"
    return *dmsae.contexts(rows, dmsae.special_tokens(tokenizer)), about


def free_path(out):
    """Where the JSON goes, and beside it the page: OUT.json, or OUT-2.json, ..., the first that is
    not there. It is made at once, so that another evaluation takes the next one."""
    first = path = Path(f"{out}".removesuffix(".json") + ".json")
    for number in itertools.count(2):
        if not path.with_suffix(".html").exists():
            with suppress(FileExistsError):
                path.touch(exist_ok=False)
                return path
        path = first.with_stem(f"{first.stem}-{number}")


# ---- The command line ---------------------------------------------------------------------------
def parse(argv=None):
    """Command line -> argparse's namespace. What cannot be read ends with one line and code 2."""
    parser = argparse.ArgumentParser(usage="eval.py FOLDER ... [flags]", allow_abbrev=False)
    parser.error = lambda why: parser.exit(2, f"eval: {why}; --help shows all flags\n")
    add = parser.add_argument
    path = dict(type=lambda given: Path(given).resolve())  # "." and a link have other parents.
    add("folders", nargs="+", help="run folders (first and last SAE) or SAE folders", **path)
    add("--only", nargs="+", choices=METRICS, default=METRICS, help="some of the metrics")
    add("--tokens", type=int, default=1_000_000, help="at most, for a metric (%(default)s)")
    add("--text", help=".txt, .jsonl or .parquet, in place of what the runs held out", **path)
    add("--text-column", "--text_column", default="text", help="of --text (%(default)s)")
    add("--separator", help="string that splits each text of --text into documents; \\n works")
    add("--model", help="hub name or folder, in place of the one the SAEs were trained on")
    add("--device", default="auto", help="cuda, cuda:N or cpu (%(default)s)")
    add("--labelled", nargs="+", default=[], help=".csv, .jsonl, for probing, tpp and scr", **path)
    add("--columns", nargs="+", default=["text", "label"], help="of --labelled; scr needs a third")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="all for tpp, scr; else the first")
    add("--all", action="store_true", help="print every figure; the JSON always has them")
    add("--html", action="store_true", help="also write a page with charts and the core's latents")
    add("--out", help="JSON file (FOLDER/eval.json); nothing is overwritten", **path)
    args = parser.parse_args(argv)
    if len(args.columns) < 2 or args.tokens < 1 or min(args.seeds) < 0:
        parser.error("--columns: two or three names; --tokens: 1 or above; --seeds: 0 or above")
    if not args.text and (args.separator or args.text_column != "text"):
        parser.error("--separator, --text-column: need --text; what a run held out stays as it is")
    args.out = args.out or args.folders[0] / "eval"
    return args


def tried(function, *arguments):
    """What it returns, or why it returns nothing. The others go on."""
    try:
        return function(*arguments)
    except ValueError as why:
        return dict(cannot_run=str(why))


def measure(args, model, tokenizer, ids, keep, texts, trained):
    """{metric: its figures, or why there are none} of one SAE."""
    sae, layer, limit, out = trained.sae, trained.cfg.layer, trained.limit, {}
    seed, n_words = args.seeds[0], max(100, args.tokens // 120)  # in prompts of about 100 tokens

    def add(name, metric, *arguments):
        if name.split()[0] in args.only:
            out[name] = tried(metric, *arguments)

    add("reconstruction", reconstruction, model, layer, ids, keep, sae, limit)
    add("absorption", absorption, model, layer, tokenizer, sae, n_words, seed, limit)
    for file, (some, labels, spurious) in texts.items():
        read = tried(pooled, model, layer, tokenizer, sae, some, min(128, ids.shape[1]), limit)
        if isinstance(read, dict):
            out[f"labelled {file}"] = read
            continue
        add(f"probing {file}", sparse_probing, *read, labels, seed)
        add(f"tpp {file}", tpp, *read, labels, sae.W_dec, args.seeds)
        add(f"scr {file}", scr, *read, labels, spurious, sae.W_dec, args.seeds)
    add("stability", stability, trained.folder)
    return out


def main(argv=None):
    """Load, measure, print, write. Returns 0; exits with 2 on bad input."""
    with dmsae.setting_up("eval"):
        args = parse(argv)
        found = [cycles(folder) or [folder] for folder in args.folders]  # a list for each
        saes = [*map(open_sae, dict.fromkeys(some[end] for some in found for end in (0, -1)))]
        cfg = configure(args, saes)
        how = args.columns, args.tokens // 128, args.seeds[0]  # of texts of 128 tokens, at most
        texts = {file.name: labelled(file, *how) for file in args.labelled}
        if len(texts) < len(args.labelled):
            raise ValueError("--labelled: two files have the same name; rename one")
        runs = dict.fromkeys(sae.folder.parent for sae in saes if "stability" in args.only)
        trainings = {f"{run}": [*map(stability, cycles(run))] for run in runs if cycles(run)}
        model, tokenizer, of_model = open_model(args, cfg, saes)
        ids, keep, of_text = open_contexts(args, cfg, saes, model, tokenizer)
        pairs = itertools.combinations(trainings, 2)
        same = {f"{a} and {b}": agreement(a, b, args.seeds[0]) for a, b in pairs}
        path = free_path(args.out)
    notes = [of_model, of_text]
    notes += [f"{file}, each text once: {dict(Counter(texts[file][1]))}" for file in texts]
    if not texts and "probing" in args.only:
        notes.append("probing, tpp and scr: need labelled texts, --labelled FILE")
    print(*notes, sep="\n")
    report = dict(model=cfg.model, layer=cfg.layer, notes=notes, saes=[])
    report |= dict(stability=trainings, agreement=same)
    report["arguments"] = {name: str(value) for name, value in vars(args).items()}
    for sae in saes:
        metrics = measure(args, model, tokenizer, ids, keep, texts, sae)
        report["saes"].append(dict(folder="/".join(sae.folder.parts[-2:]), metrics=metrics))
        report = json.loads(json.dumps(report), parse_constant=lambda name: None)  # of nan, inf
        dmsae.write_json(report, path)  # After each SAE: the next may take an hour.
    print(*table(report, args.all), f"written: {path}", sep="\n")
    if args.html:
        own = [sae for sae in saes if sae.folder in cycles(saes[0].folder.parent)]
        of_core = tried(core_page, model, tokenizer, ids, keep, own[-1]) if own else {}
        with dmsae.written_whole(path.with_suffix(".html")) as part:
            part.write_text(page(report, of_core), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
