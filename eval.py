"""SAEBench's metrics, light and exact, for SAEs of dmsae.py and for SAELens `jumprelu` folders.

    python eval.py runs/gemma-2-2b_k64_seed0                  # its plain SAE beside its last one
    python eval.py runs/seed0 runs/seed1 --labelled news.csv --ravel facts.json --html --all

One function for each metric, in the order of the table; then the page and the command line. A
metric takes a language model, a layer, an SAE and data, returns a dict, and raises CannotRun where
it has no value. In a notebook: `eval.absorption(model, 12, tokenizer, sae)`.

Definitions are those of SAEBench 0.6.0 (Karvonen et al. 2025, arXiv 2503.09532) unless a docstring
says "ours". They compare activations of latents: decoder rows must have unit norm. Shapes: as in
dmsae.py; also n words or texts, P probes, V words of the vocabulary.
"""

import argparse
import csv
import itertools
import json
import os
import re
import sys
import tempfile
from collections import Counter, defaultdict, namedtuple
from contextlib import suppress
from dataclasses import fields, replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import dmsae
from dmsae import BadInput, Config, load_core, load_sae, residual_stream, spliced

bar = partial(tqdm, disable=None, leave=False)  # a progress bar, on a terminal only


class CannotRun(Exception):
    """Why a metric has no value here."""


def mean_of(rows):
    """Mean of each figure over rows (dicts), and as figure_std the sample standard deviation. A
    None is left out; None where nothing is left."""
    out = {}
    for key in rows[0]:
        values = [row[key] for row in rows if row[key] is not None]
        out[key] = float(np.mean(values)) if values else None
        out[f"{key}_std"] = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return out


def special_tokens(tokenizer):
    """Ids of BOS, EOS and PAD, of those that there are; the first one begins every context."""
    ids = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    return [i for i in ids if i is not None]


def padded(rows, device):
    """Lists of ids -> (n, longest), filled on the right, where no earlier position sees it."""
    return pad_sequence([torch.tensor(row) for row in rows], True, rows[0][0]).to(device)


def residuals(model, layer, rows):
    """The residual stream of each of rows, lists of ids, in turn: (its length, D)"""
    for i in bar(range(0, len(rows), 64), "residuals"):
        part = rows[i : i + 64]
        h = residual_stream(model, layer, padded(part, model.device))
        for row, x in zip(part, h, strict=True):
            yield x[: len(row)].float()


def last_residuals(model, layer, rows):
    """Those at the last token of each row: (n, D). What would follow cannot change them."""
    return torch.stack([x[-1].clone() for x in residuals(model, layer, rows)])


def edited_logits(model, layer, ids, edit):
    """Logits (R, T, V) where the layer's output h (R, T, D) is replaced by edit(h)."""
    with spliced(model, layer, edit):
        return model(ids, use_cache=False).logits


# ---- Probes, as SAEBench trains them. A probe is its weights, and then its bias: (d + 1,) --------
def probe_logits(x, probes):
    """x (n, d), probes (P, d + 1) -> (n, P)"""
    return F.linear(x, probes[:, :-1], probes[:, -1])


def logistic_regression(x, y, balanced=False):
    """scikit-learn's (L2, C = 1), by LBFGS in float64. balanced: both classes weigh alike.
    x (n, d), y (n,) bool -> one probe, (1, d + 1)"""
    dtype, x, y = x.dtype, x.double(), y.double()
    weight = 0.5 / torch.where(y > 0, y.mean(), 1 - y.mean()) if balanced else None
    probe = x.new_zeros(1, x.shape[1] + 1, requires_grad=True)
    settings = dict(max_iter=500, tolerance_grad=1e-5, line_search_fn="strong_wolfe")
    lbfgs = torch.optim.LBFGS([probe], **settings)

    def objective():
        lbfgs.zero_grad()
        logits = probe_logits(x, probe)[:, 0]
        loss = F.binary_cross_entropy_with_logits(logits, y, weight, reduction="sum")
        loss = loss + probe[:, :-1].square().sum() / 2
        loss.backward()
        return loss

    lbfgs.step(objective)
    return probe.detach().to(dtype)


@torch.enable_grad()
def train_epoch(probes, adam, x, y, batch, rng, l1, pos_weight=None):
    """One epoch of probes (P, d + 1) in batches: BCE + l1 times the mean over probes of |w|_1.
    x (n, d), y (n, P)"""
    for at in torch.randperm(len(x), generator=rng).to(x.device).split(batch):
        logits = probe_logits(x[at], probes)
        loss = F.binary_cross_entropy_with_logits(logits, y[at], pos_weight=pos_weight)
        adam.zero_grad()
        (loss + l1 * probes[:, :-1].abs().sum(1).mean()).backward()
        adam.step()


def train_letter_probes(x, y, batch, weight_decay, l1=0.0, seed=0):
    """A one-vs-rest probe for each letter, positives weighted by negatives / positives: Adam, 50
    epochs, rate 1e-2 falling to 1e-5. x (n, d), y (n,) in 0..25 -> (26, d + 1)

    Ours: at least 20 batches an epoch, so 1000 steps, about what SAEBench's vocabularies give. With
    few words its L1 probe, in batches of 4096, would end after 50, and absorption measure that."""
    rng = dmsae.generator(seed, "letters")
    is_letter = F.one_hot(y, 26).float()
    rare = len(y) / is_letter.sum(0).clamp_min(1) - 1  # (26,)
    probes = x.new_zeros(26, x.shape[1] + 1, requires_grad=True)
    adam = torch.optim.Adam([probes], weight_decay=weight_decay)
    batch = min(batch, max(1, len(x) // 20))
    for epoch in range(50):
        adam.param_groups[0]["lr"] = 1e-2 * 1e-3 ** (epoch / 50)
        train_epoch(probes, adam, x, is_letter, batch, rng, l1, rare)
    return probes.detach()


def is_positive(task, device):
    """Of a task (2, m), indices of positives and then of the rest: (2 m,) bool"""
    return torch.arange(task.numel(), device=device) < task.shape[1]


def accuracy(x, test, probe):
    """Accuracy of one probe on a task (2, m) of x (n, d): a float"""
    says = probe_logits(x[test.flatten()], probe)[:, 0] > 0
    return (says == is_positive(test, x.device)).float().mean().item()


def train_probe(x, train, test, seed=0):
    """A probe for TPP and SCR: AdamW at 1e-3, L1 1e-3, batches of 16, of 20 epochs that of the best
    test accuracy. x (n, d), train and test tasks (2, m) of it -> (1, d + 1)"""
    rng = dmsae.generator(seed, "probes")
    y = is_positive(train, x.device).float()[:, None]
    probe = x.new_zeros(1, x.shape[1] + 1, requires_grad=True)
    adam = torch.optim.AdamW([probe], lr=1e-3)
    epochs = []
    for _ in range(20):
        train_epoch(probe, adam, x[train.flatten()], y, 16, rng, 1e-3)
        epochs.append((accuracy(x, test, probe), probe.detach().clone()))
    return max(epochs, key=lambda epoch: epoch[0])[1]


# ---- Core: what the language model loses, what the reconstruction loses, how sparse it is --------
def spliced_losses(model, layer, ids, keep, x_hat):
    """Sums over the positions keep (R, T) of the next-token loss and of the KL divergence to the
    model's own prediction, in nats, of the model itself, with the layer's output zeroed, and with
    x_hat (B, D) at these positions: (3, 2)"""

    def put_back(h):  # positions outside keep stay as they are
        return h.masked_scatter(keep[..., None], x_hat.to(h.dtype))

    reference = edited_logits(model, layer, ids, lambda h: h)  # (R, T, V)
    sums = torch.zeros(3, 2, dtype=torch.float64, device=reference.device)
    for edit, (ce, kl) in zip((lambda h: h, torch.zeros_like, put_back), sums, strict=True):
        logits = edited_logits(model, layer, ids, edit)
        for q, p, row, kept in zip(logits, reference, ids, keep, strict=True):  # V: up to 256,000
            q, p = (t.float().log_softmax(-1) for t in (q, p))
            source = kept[:-1]
            ce += F.nll_loss(q[:-1][source], row[1:][source], reduction="sum")
            kl += F.kl_div(q[kept], p[kept], reduction="sum", log_target=True)
    return sums


def core_sums(model, layer, ids, keep, sae):
    """Sums over a batch's tokens where keep (R, T), means where SAEBench averages over batches. In
    float64: sums of squares minus squared sums lose float32's digits."""
    x = residual_stream(model, layer, ids)[keep].float()  # (B, D)
    acts = sae.encode(x)  # (B, F)
    x, x_hat = x.double(), sae.decode(acts).double()
    norm_in, norm_out = x.norm(dim=1), x_hat.norm(dim=1)  # (B,)
    error = (x - x_hat).square().sum(1)
    return dict(
        losses=spliced_losses(model, layer, ids, keep, x_hat),
        x=x.sum(0),
        square=norm_in.square().sum(),
        error=error.sum(),
        explained_variance_legacy=(1 - error / (x - x.mean(0)).square().sum(1)).sum(),
        mse_saebench=error.mean(),
        cossim=F.cosine_similarity(x, x_hat).sum(),
        l2_norm_in=norm_in.sum(),
        l2_norm_out=norm_out.sum(),
        l2_ratio=(norm_out / norm_in).sum(),
        bias=norm_out.square().sum() / (x * x_hat).sum(),
        fired=(acts > 0).sum(0),
        l1=acts.sum(dtype=torch.float64),
    )


def latent_figures(density, sae):
    """How often latents fire, density (F,), and how close they are to each other: {name: ()}

    frac_alive: share of latents that fire at all on this text
    l0, core_l0: latents on at a token; those of the core
    freq_over_N_percent, normalized_freq_over_N_percent: latents on at more tokens; of all firing
    average_max_encoder_cosine_sim, average_max_decoder_cosine_sim: to the nearest other latent
    """
    alive = (density > 0).double().mean()
    out = dict(frac_alive=alive, l0=density.sum(), core_l0=density[: sae.n_core].sum())
    for percent in 1, 10:
        often = density > percent / 100
        out[f"freq_over_{percent}_percent"] = often.double().mean()
        out[f"normalized_freq_over_{percent}_percent"] = density[often].sum() / density.sum()
    for name, rows in ("encoder", sae.W_enc), ("decoder", sae.W_dec):
        rows = F.normalize(rows)
        nearest = [(part @ rows.T).topk(2).values[:, 1] for part in rows.split(4096)]  # not itself
        out[f"average_max_{name}_cosine_sim"] = torch.cat(nearest).mean()
    return out


@torch.no_grad()
def core_metrics(model, layer, ids, keep, sae):
    """Core evaluation on contexts ids (R, T). Positions outside keep (R, T) stay as they are; the
    ablation zeroes all. None is a 0 / 0. For a prefix of w latents: sae.threshold[w:] = math.inf

    ce_loss_without_sae, ce_loss_with_sae: next-token loss without and with the SAE, nats a token
    ce_loss_with_ablation, kl_div_with_ablation: loss and divergence with the layer's output zeroed
    ce_loss_score: share of what zeroing the layer costs in loss that the SAE recovers; 1 is best
    kl_div_with_sae: KL divergence to the model's own prediction, nats a token
    kl_div_score: as ce_loss_score, of this divergence
    fvu: squared error over the variance about the mean
    explained_variance_legacy: mean over tokens of 1 - such a ratio, as in SAEBench's papers
    explained_variance_0_6_0: about zero, as SAEBench 0.6.0 has it
    mse_saebench: squared error of a token, over the tokens of a batch
    cossim: mean cosine of input and reconstruction
    l1: sum of activations at a token
    l2_norm_in, l2_norm_out, l2_ratio: mean norm of input and reconstruction; mean ratio
    relative_reconstruction_bias: mean squared norm of the reconstruction over its inner product
    """
    size = max(1, 2048 // ids.shape[1])  # SAEBench's batch: 16 contexts of 128
    batches = list(zip(ids.split(size), keep.split(size), strict=True))
    sums = Counter()
    for b, kept in bar(batches, "core"):
        b, kept = b.to(model.device), kept.to(model.device)
        sums.update(core_sums(model, layer, b, kept, sae))  # a Counter adds
    n = int(keep.sum())
    error, square, x = sums["error"] / n, sums["square"] / n, sums["x"] / n
    names = "explained_variance_legacy mse_saebench cossim l1 l2_norm_in l2_norm_out l2_ratio"
    figures = latent_figures(sums["fired"] / n, sae)
    figures |= {name: sums[name] / n for name in names.split()}
    figures["fvu"] = error / (square - x.square().sum())
    figures["explained_variance_0_6_0"] = 1 - error / (square - (square / len(x)) ** 2)
    figures["relative_reconstruction_bias"] = sums["bias"] / len(batches)
    ce, kl = sums["losses"].T
    ce, kl = ce / int(keep[:, :-1].sum()), kl / n  # (3,) each, nats a token
    figures["ce_loss_without_sae"] = ce[0]
    for name, (own, zeroed, with_sae) in ("ce_loss", ce), ("kl_div", kl):
        figures[f"{name}_with_ablation"] = zeroed
        figures[f"{name}_with_sae"] = with_sae
        figures[f"{name}_score"] = (zeroed - with_sae) / (zeroed - own)
    figures = {name: float(t) if t.isfinite() else None for name, t in figures.items()}
    return figures | dict(tokens=n, contexts=len(ids))


# ---- First-letter absorption: is a latent for "starts with s" silent where one for an s-word fires
MIN_F1 = 0.6  # of a letter's probe, and of its main latents: below, there is nothing to measure
MIN_LETTERS = 20  # that the probes must read (SAEBench)

# residuals at n train and m test words, (n, D) and (m, D), their letters 0..25, residuals at the
# test words in other prompts (m, D), and the probes that read the letters there (26, D + 1)
Spelling = namedtuple("Spelling", "x_train y_train x_test y_test x_fresh probes")


@cache  # the same for every SAE of a layer
def spelling_task(model, layer, tokenizer, n_words=10**6, seed=0):
    """The Spelling of at most n_words tokens that are a word, in prompts of "\\n", ten lines
    "{example} has the first letter: X" of others, and "{word}", which would go on so. CannotRun"""
    rng = np.random.default_rng(seed)
    letter = {}
    for i, token in enumerate(tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))):
        if word := re.fullmatch("[ ▁Ġ]?([a-zA-Z]+)", token or ""):
            letter[i] = ord(word[1][0].upper()) - 65
    if len(letter) < 100:
        raise CannotRun(f"the vocabulary has {len(letter)} words of letters only; 100 are needed")
    words = rng.permutation(list(letter))[:n_words]
    train, test = np.split(words, [int(0.8 * len(words))])

    def after(string):
        """Its ids where it follows another word."""
        first, both = tokenizer(["a", "a" + string], add_special_tokens=False)["input_ids"]
        return both[len(first) :]

    newline, tail = after("\n"), after(" has the first letter:")
    rest_of_line = [[*tail, *after(f" {chr(65 + c)}"), *newline] for c in range(26)]

    def read(words, pool):
        prompts = []
        for word in words:
            prompt = [special_tokens(tokenizer)[0], *newline]
            examples = rng.choice(pool, 11, replace=False)
            for example in examples[examples != word][:10]:
                prompt += [example, *rest_of_line[letter[example]]]
            prompts.append([*prompt, word])
        return last_residuals(model, layer, prompts)

    x_train, x_test, x_fresh = read(train, train), read(test, test), read(test, words)
    y = torch.tensor([letter[word] for word in words], device=model.device)
    y_train, y_test = y[: len(train)], y[len(train) :]
    probes = train_letter_probes(x_train, y_train, 64, 1e-4, seed=seed)
    return Spelling(x_train, y_train, x_test, y_test, x_fresh, probes)


def f1_score(positive, truth):
    """F1 along the first dimension of two bool tensors."""
    return 2 * (positive & truth).sum(0) / (positive.sum(0) + truth.sum(0)).clamp_min(1)


def main_latents(order, f_train, y_train, f_test, y_test):
    """A letter's main latents: the first k of order, where a larger k must add .03 to the F1 of a
    regression on them. f (n, F), y (n,) bool. Also that F1."""
    best, main = -1.0, None
    for k in range(1, 11):
        probe = logistic_regression(f_train[:, order[:k]], y_train, balanced=True)
        now = f1_score(probe_logits(f_test[:, order[:k]], probe)[:, 0] > 0, y_test).item()
        if now <= best + 0.03:
            break
        best, main = now, order[:k]
    return main, best


def absorption_scores(f, x, W_dec, w, main):
    """Of n words of one letter: full absorption (bool), and the absorbed fraction, (n,) each.
    f (n, F) activations, x (n, D) residuals, w (D,) the letter's probe, main: indices of its main
    latents."""
    u = F.normalize(w, dim=0)
    c = F.normalize(W_dec) @ u  # (F,)
    p = f * c  # (n, F) what each latent adds to
    A = x @ u  # (n,) the projection on the probe,
    m = p[:, main].sum(1)  # (n,) and the main ones together
    top, at = p.max(1)
    full = (f[:, main] < 1e-8).all(1) & (c[at] >= 0.025) & (A > 0) & (top >= 0.4 * A)
    others = p * (c >= 0.1).index_fill(0, main, False)
    t = others.clamp_min(0).topk(min(3, len(c)), 1).values.sum(1)
    part = torch.minimum(t, A - m)
    fraction = torch.where(m <= 0, 1, part / (part + m))
    return full, fraction.masked_fill((m >= A) | (A <= 0) | (t < 0.4 * A), 0)


@torch.no_grad()
def absorption(model, layer, tokenizer, sae, n_words=10**6, seed=0):
    """First-letter absorption (Chanin et al. 2024, arXiv 2409.14507). CannotRun where too few
    letters are read from the residual with F1 > .6; ours: or where the main latents' mean F1 is
    below, as the figure would be theirs.

    full_absorption_rate: share of words whose main latents are silent while one other fires
    fraction_0_6_0: how much of the letter comes from others, as SAEBench 0.6.0 has it
    num_split_features: main latents of a letter, mean
    main_f1: how well they tell the letter, mean; below 0.6 there would be no figure
    """
    task = spelling_task(model, layer, tokenizer, n_words, seed)
    read = probe_logits(task.x_test, task.probes) > 0  # (m, 26)
    is_letter = F.one_hot(task.y_test, 26).bool()
    letters = (f1_score(read, is_letter) > MIN_F1).nonzero()[:, 0].tolist()
    if len(letters) < MIN_LETTERS:
        few = f"the layer's probes read {len(letters)} of 26 first letters"
        raise CannotRun(f"{few}; {MIN_LETTERS} are needed")
    xs = task.x_train, task.x_test, task.x_fresh
    f_train, f_test, f_fresh = (torch.cat([*map(sae.encode, x.split(2048))]) for x in xs)
    W = train_letter_probes(f_train, task.y_train, 4096, 1e-6, 0.01, seed)[:, :-1]
    rows = {}
    for c in bar(letters, "absorption"):
        order = W[c].argsort(descending=True)
        truth = is_letter[:, c]
        main, main_f1 = main_latents(order, f_train, task.y_train == c, f_test, truth)
        hit = truth & read[:, c]
        probe = task.probes[c, :-1]
        scores = absorption_scores(f_fresh[hit], task.x_fresh[hit], sae.W_dec, probe, main)
        full, fraction = (score.float().mean().item() for score in scores)
        row = dict(full_absorption_rate=full, fraction_0_6_0=fraction)
        rows[chr(97 + c)] = row | dict(num_split_features=len(main), main_f1=main_f1)
    out = mean_of([*rows.values()])
    if out["main_f1"] < MIN_F1:
        raise CannotRun(f"the main latents' mean F1 is {out['main_f1']:.2f}, below {MIN_F1}")
    return out | dict(letters=len(rows), details=rows)


# ---- Sparse probing: what a few latents tell of a labelled text ---------------------------------
def read_rows(path):
    """Rows of a .csv file with a header, or of a .jsonl file: dicts. BadInput"""
    csv.field_size_limit(2**31 - 1)
    try:
        with open(path, newline="", encoding="utf-8-sig") as f:
            return list(csv.DictReader(f) if Path(path).suffix == ".csv" else map(json.loads, f))
    except (OSError, ValueError, csv.Error) as e:
        why = f"cannot be read ({type(e).__name__}: {e}); it must be a .csv or .jsonl file"
        raise BadInput(f"--labelled {path}: {why}") from None


def labelled(rows, columns=("text", "label"), budget=10**4, seed=0):
    """Texts and labels, (n,) str each, of two columns of rows (dicts), about `budget` in all: at
    most 2500 a class (SAEBench: 2000 + 500), no class below 10; and for SCR, where a third column
    is named, the values there, else None. BadInput"""
    by_class = {}
    for i in np.random.default_rng(seed).permutation(len(rows)):
        values = [rows[i].get(column) for column in columns]
        if not {None, ""} & {*values}:
            by_class.setdefault(str(values[1]), []).append([str(value) for value in values])
    classes = [found for found in by_class.values() if len(found) >= 10]
    if len(classes) < 2:
        has = ", ".join(map(str, rows[0])) if rows else "no rows"
        few = f"{len(classes)} classes of 10 texts or more, two are needed; the file has only {has}"
        raise BadInput(f"--columns {' '.join(columns)}: {few}")
    most = min(2500, max(10, budget // len(classes)))
    texts, labels, *spurious = np.array(sum((found[:most] for found in classes), [])).T
    return texts, labels, spurious[0] if spurious else None


@torch.no_grad()
def pooled(model, layer, tokenizer, sae, texts, ctx=128):
    """Means over each text's kept tokens of residual and latents: X (n, D), A (n, F)."""
    special = special_tokens(tokenizer)
    rows = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    rows = [special[:1] + row[: ctx - 1] for row in rows]
    X, A = [], []
    for row, x in zip(rows, residuals(model, layer, rows), strict=True):
        x = x[torch.tensor([i not in special for i in row])]  # (tokens, D)
        X.append(x.sum(0) / max(1, len(x)))
        A.append(sae.encode(x).sum(0) / max(1, len(x)))
    return torch.stack(X), torch.stack(A)


def one_vs_rest(labels, seed=0):
    """[(train (2, m), test (2, m'))] for each class in sorted order, 80/20: indices of texts,
    positives first; as many of the others, in equal shares."""
    rng = np.random.default_rng(seed)
    classes = [rng.permutation(np.flatnonzero(labels == c)) for c in sorted(set(labels))]
    parts = [np.split(texts, [int(0.8 * len(texts))]) for texts in classes]

    def task(c, part):
        share = -(-len(part[c]) // (len(part) - 1))  # rounded up
        rest = [texts[:share] for other, texts in enumerate(part) if other != c]
        rest = rng.permutation(np.concatenate(rest))
        return torch.from_numpy(np.stack([part[c][: len(rest)], rest[: len(part[c])]]))

    train, test = zip(*parts, strict=True)
    return [(task(c, train), task(c, test)) for c in range(len(parts))]


def class_gap(x, train):
    """Mean of x (n, d) over the positives of a task (2, m) less that over the rest: (d,)"""
    return x[train[0]].mean(0) - x[train[1]].mean(0)


def sparse_probing(X, A, labels, seed=0, ks=(1, 2, 5)):
    """Logistic regressions that tell a class from the others by texts' means, `pooled`'s X (n, D)
    and A (n, F); mean over classes. labels (n,)

    sae_top_N_test_accuracy: on the N latents whose class means differ most; chance is .5
    llm_top_N_test_accuracy: the same on channels of the residual stream
    """
    rows = []
    for train, test in one_vs_rest(labels, seed):
        row = {}
        y = is_positive(train, X.device)
        for name, x in ("sae", A), ("llm", X):
            order = class_gap(x, train).abs().argsort(descending=True)
            for k in ks:
                top = x[:, order[:k]]
                probe = logistic_regression(top[train.flatten()], y)
                row[f"{name}_top_{k}_test_accuracy"] = accuracy(top, test, probe)
        rows.append(row)
    return mean_of(rows)


# ---- TPP and SCR: what a few ablated latents cost probes of the residual stream -----------------
ABLATED = 2, 5, 10, 20, 50, 100, 500  # latents at once; SAEBench's main figure is that of 20


def ablations(X, A, W_dec, effect):
    """(n, X without them) of the n latents of the largest effect (F,), for each n of ABLATED: where
    they are zeroed on every token, the SAE's error kept, X (n, D) moves by -A W_dec of these. As in
    SAEBench of all latents of any effect: a large n takes negative ones too."""
    order = effect.topk(min(max(ABLATED), int((effect != 0).sum()))).indices
    for n in ABLATED:
        yield n, X - A[:, order[:n]] @ W_dec[order[:n]]


@torch.no_grad()
def tpp(X, A, labels, W_dec, seeds=(0, 1, 2)):
    """Targeted probe perturbation: mean over classes, then over seeds, each with its own split and
    probes. X (n, D) and A (n, F) of `pooled`, labels (n,), W_dec (F, D)

    tpp_threshold_N_total_metric: intended less unintended; higher is better
    tpp_threshold_N_intended: accuracy that a class's probe loses without the class's N latents
    tpp_threshold_N_unintended: what the other classes' probes lose then
    probe_accuracy: before any ablation
    """
    rows = []
    for seed in bar(seeds, "tpp"):
        tasks = one_vs_rest(labels, seed)
        probes = [train_probe(X, *task, seed) for task in tasks]
        before = [accuracy(X, test, probes[c]) for c, (_, test) in enumerate(tasks)]
        lost = defaultdict(list)
        for i, (train, _) in enumerate(tasks):
            effect = class_gap(A, train).clamp_min(0) * (W_dec @ probes[i][0, :-1])
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


def scr_cells(labels, spurious, most=4):
    """The pairs of classes a, b with the most texts of spurious values u, v, at least 20 of each:
    [indices of texts of a with u, a with v, b with u, b with v]. CannotRun"""
    values = [] if spurious is None else sorted(set(spurious))
    found = []
    for pair in itertools.combinations(sorted(set(labels)), 2):
        cells = [np.flatnonzero((labels == c) & (spurious == v)) for c in pair for v in values]
        if len(values) == 2 and min(map(len, cells)) >= 20:
            found.append(cells)
    if not found:
        raise CannotRun("it needs a third column of two values, each in 20 texts of two classes")
    return sorted(found, key=lambda cells: -min(map(len, cells)))[:most]


def scr_tasks(texts):
    """Indices of texts (4, n), as of `scr_cells`, -> tasks (2, m): class a against b and value u
    against v, both balanced, and a with u against b with v."""
    h = texts.shape[1] // 2
    by_class, by_value = texts[:, :h], texts[[0, 2, 1, 3], :h]
    return by_class.reshape(2, -1), by_value.reshape(2, -1), texts[[0, 3], : 2 * h]


@torch.no_grad()
def scr(X, A, labels, spurious, W_dec, seeds=(0, 1, 2)):
    """Spurious correlation removal: a biased probe learns class a against b where a always has the
    spurious value u, and b has v; an oracle learns on balanced texts. Direction 1 asks the biased
    probe for the class without the spurious label's N latents, direction 2 for the spurious label
    without the class's. Mean over class pairs and seeds. X (n, D), A (n, F) of `pooled`, labels,
    spurious (n,), W_dec (F, D). CannotRun

    scr_metric_threshold_N: the direction of lower biased accuracy, none in a tie; 1 is best
    scr_dirN_threshold_N: share of the way from biased to oracle accuracy; 0 where it is below .001
    """
    runs = list(itertools.product(scr_cells(labels, spurious), seeds))
    rows = []
    for cells, seed in bar(runs, "scr"):
        rng = np.random.default_rng(seed)
        size = min(map(len, cells))
        texts = torch.tensor(np.array([rng.permutation(cell)[:size] for cell in cells]))
        train, test = map(scr_tasks, texts.tensor_split([int(0.8 * size)], 1))
        *oracles, biased = (train_probe(X, *task, seed) for task in zip(train, test, strict=True))
        before = [accuracy(X, test[i], biased) for i in (0, 1)]
        row = {}
        for i in 0, 1:  # what the biased probe is asked for: the class, and the spurious label
            room = accuracy(X, test[i], oracles[i]) - before[i]
            effect = class_gap(A, train[1 - i]) * (W_dec @ oracles[1 - i][0, :-1])
            for n, x in ablations(X, A, W_dec, effect.abs()):
                gain = accuracy(x, test[i], biased) - before[i]
                row[f"scr_dir{i + 1}_threshold_{n}"] = gain / room if room >= 0.001 else 0.0
        lower = None if before[0] == before[1] else before.index(min(before)) + 1
        for n in ABLATED:
            row[f"scr_metric_threshold_{n}"] = row.get(f"scr_dir{lower}_threshold_{n}")
        rows.append(row)
    return mean_of(rows) | dict(pairs=len(runs) // len(seeds), details=rows)


# ---- RAVEL: do a few latents carry one attribute of an entity, and no other? --------------------
# A question: its tokens, the position of the entity's last one, the first token of the answer
# (ours; SAEBench: the text of six), the attribute asked for, and all that is known of the entity
Prompt = namedtuple("Prompt", "ids at answer asked facts")


def ravel_prompts(tokenizer, facts):
    """Prompts from {"entities": {"Paris": {"country": "France"}}, "templates": {"country":
    ["{entity} is in"]}}. Entity, prompt and answer must each end where a token ends."""
    prompts = []

    def encode(string):
        return tokenizer(string, add_special_tokens=False)["input_ids"]

    for asked, templates in facts["templates"].items():
        for template, (entity, about) in itertools.product(templates, facts["entities"].items()):
            text = template.replace("{entity}", entity)
            head = encode(template.split("{entity}")[0] + entity)
            ids, answered = encode(text), encode(f"{text} {about.get(asked)}")
            ends = ids[: len(head)] == head and answered[: len(ids)] == ids != answered
            if asked in about and ends:
                bos, answer = special_tokens(tokenizer)[0], answered[len(ids)]
                prompts.append(Prompt([bos, *ids], len(head), answer, asked, about))
    return prompts


def ravel_pairs(prompts, known, attribute, most, rng):
    """Pairs (base, source) of prompts where known (n,) -> (pairs, 2), whose entities differ in the
    attribute. By turns: base asks for it, which shall change; for another, which shall not."""
    value = np.array([str(p.facts.get(attribute)) for p in prompts])
    answer = np.array([p.answer for p in prompts])
    own = np.array([p.asked == attribute for p in prompts])
    fits = (value[:, None] != value) & known[:, None] & (known & own)
    changes = fits & own[:, None] & (answer[:, None] != answer)  # else no change could be seen
    halves = [rng.permutation(np.argwhere(kind)) for kind in (changes, fits & ~own[:, None])]
    m = min(most // 2, *map(len, halves))
    return torch.from_numpy(np.stack([half[:m] for half in halves], 1).reshape(-1, 2))


@torch.enable_grad()
def train_mask(swap, pairs, expect, n_latents, rng):
    """The latents (F,) bool whose swap gives the expected answers: swap(pairs, mask) are logits,
    the mask is sigmoid(b / T) with T from 1 to 1e-4, in 2 epochs of Adam at 1e-3, batches of 32
    (ours); then b > 0."""
    b = torch.zeros(n_latents, device=expect.device, requires_grad=True)
    adam = torch.optim.Adam([b], lr=1e-3)
    epochs = (torch.from_numpy(rng.permutation(len(pairs))) for _ in range(2))
    steps = [part for epoch in epochs for part in epoch.split(32)]
    for part, T in zip(bar(steps, "ravel"), np.geomspace(1, 1e-4, len(steps)), strict=True):
        loss = F.cross_entropy(swap(pairs[part], torch.sigmoid(b / T)), expect[part])
        (b.grad,) = torch.autograd.grad(loss, b)  # the model and the SAE get none
        adam.step()
    return b.detach() > 0


@torch.no_grad()
def ravel(model, layer, sae, prompts, most=5000, seed=0):
    """RAVEL (Huang et al. 2024, arXiv 2402.17700) by a learnt mask: at the entity's last token the
    masked latents of a base prompt take their values in a source prompt, without error term. At
    most `most` pairs an attribute, 70 % of them to train the mask. CannotRun

    disentanglement_score: mean of cause and isolation; higher is better
    cause_score: share of pairs about the attribute that then give the source's answer
    isolation_score: share of pairs about other attributes that keep their own
    latents: how many are swapped, mean over attributes
    """
    if not prompts:
        raise CannotRun("it needs facts whose words end where tokens end: --ravel FILE.json")
    ids = padded([p.ids for p in prompts], model.device)
    at, last, answer = torch.tensor([(p.at, len(p.ids) - 1, p.answer) for p in prompts]).T
    x = last_residuals(model, layer, [p.ids[: p.at + 1] for p in prompts])  # (n, D)

    def ask(which, edit):  # -> logits of the next token (b, V)
        logits = edited_logits(model, layer, ids[which], edit)
        return logits[torch.arange(len(which)), last[which]].float()

    def swap(pairs, mask):
        base, source = pairs.T
        f_base, f_source = sae.encode(x[base]), sae.encode(x[source])  # (b, F)
        new = sae.decode(f_base + mask * (f_source - f_base))
        where = torch.arange(len(base)), at[base]
        return ask(base, lambda h: h.index_put(where, new.to(h.dtype)))

    parts = torch.arange(len(ids)).split(64)
    says = torch.cat([ask(part, lambda h: h).argmax(1).cpu() for part in parts])
    known = (says == answer).numpy()
    rng = np.random.default_rng(seed)
    rows = {}
    for attribute in dict.fromkeys(p.asked for p in prompts):
        pairs = ravel_pairs(prompts, known, attribute, most, rng)
        if len(pairs) >= 20:
            n = int(0.7 * len(pairs))
            changes = torch.arange(len(pairs)) % 2 == 0
            expect = answer[torch.where(changes, pairs[:, 1], pairs[:, 0])]
            mask = train_mask(swap, pairs[:n], expect[:n].to(x.device), len(sae.W_enc), rng)
            says = torch.cat([swap(part, mask).argmax(1).cpu() for part in pairs[n:].split(64)])
            right = (says == expect[n:]).double()
            cause, isolation = (right[changes[n:] == kind].mean().item() for kind in (True, False))
            row = dict(disentanglement_score=(cause + isolation) / 2, latents=int(mask.sum()))
            rows[attribute] = row | dict(cause_score=cause, isolation_score=isolation)
    if not rows:
        raise CannotRun(f"the model answers {known.sum()} of {len(known)} prompts: too few")
    return mean_of([*rows.values()]) | dict(prompts_known=int(known.sum()), details=rows)


# -------------------------------------------------------------------------------------------------
# Stability: is the core of a run still the core a training later, and that of another run?
# -------------------------------------------------------------------------------------------------
def cycles(run):
    """The SAE folders of a run folder, in order; none where it is no run."""
    folders = [path.parent for path in Path(run).glob("cycle*/cfg.json")]
    return sorted((f for f in folders if f.name[5:].isdigit()), key=lambda f: int(f.name[5:]))


def is_trained(folder):
    """Whether an SAE folder is a training of a run."""
    return folder in cycles(folder.parent) and (folder / "core.safetensors").exists()


def stability(run):
    """For each training of a run its row of dmsae.py's table, and how its core overlaps with that
    before. Exact: a core's rows are frozen, so an identity needs no matching. BadInput

    core: latents of the core chosen after the training
    kept, dropped: those of the core before that were chosen again, and that were not
    new: those chosen for the first time
    jaccard: kept over all in either core; 1 is the same core
    identity_overlap: share of the core before that was kept
    """
    rows = []
    for folder in cycles(run):
        row = read_cfg(folder)["result"]
        core, _ = load_core(folder / "core.safetensors")
        row["votes"] = dict(sorted(Counter(core.votes.tolist()).items()))
        row["jaccard"] = row["kept"] / (row["core"] + row["dropped"])
        row["identity_overlap"] = row["kept"] / max(1, row["kept"] + row["dropped"])
        rows.append(row)
    return rows


def training_row(folder):
    """Of an SAE folder, its row of `stability`, in numbers. CannotRun"""
    if not is_trained(folder):
        raise CannotRun("the SAE is in no run folder of dmsae.py")
    row = stability(folder.parent)[cycles(folder.parent).index(folder)]
    return {k: row[k] for k in ("core", "kept", "new", "dropped", "jaccard", "identity_overlap")}


def assignment(cost):
    """The column of each row, one to one, of least total cost: (n, m), n <= m, -> (n,). Exact, by
    shortest augmenting paths (Jonker & Volgenant 1987): of n rows each at most n vector operations.
    """
    n, m = cost.shape
    row_price, column_price = np.zeros(n), np.zeros(m + 1)
    row_of = np.full(m + 1, -1)  # of each column; column m is where a path begins
    for row in range(n):
        row_of[m], column = row, m
        seen, previous = np.zeros(m + 1, bool), np.full(m + 1, m)
        slack = np.full(m + 1, np.inf)
        while row_of[column] >= 0:  # until a column is free
            seen[column] = True
            reduced = cost[row_of[column]] - row_price[row_of[column]] - column_price[:m]
            closer = np.flatnonzero(~seen[:m] & (reduced < slack[:m]))
            slack[closer], previous[closer] = reduced[closer], column
            column = np.where(seen, np.inf, slack).argmin()
            step = slack[column]
            row_price[row_of[seen]] += step
            column_price[seen] -= step
            slack[~seen] -= step
        while column != m:  # shift the partners along the path
            row_of[column] = row_of[previous[column]]
            column = previous[column]
    taken = np.flatnonzero(row_of[:m] >= 0)
    return taken[row_of[taken].argsort()]


def matched_cosines(a, b):
    """Cosines of the one-to-one matching of a (n, D) and b (m, D) of the largest sum: (min(n, m),).
    Their mean is PW-MCC (Song et al. 2025, arXiv 2505.20254). Ours: signed, as a latent is on in
    one direction only; of sets of unequal size the smaller is matched."""
    cosine = (F.normalize(a) @ F.normalize(b).T).double().cpu().numpy()
    cosine = cosine if len(a) <= len(b) else cosine.T
    return cosine[np.arange(len(cosine)), assignment(-cosine)]


def agreement(run_a, run_b, seed=0):
    """Whether the last SAEs of two runs have the same features: {set: PW-MCC of encoder and decoder
    rows} of the cores, of as many latents drawn from prefix 0, and of prefix 0, core included; and
    beside each, as _random, that of as many random directions and the second run's rows. why: a
    figure of stability means nothing without these two baselines. BadInput"""
    rng, sides, out = dmsae.generator(seed, "agreement"), [], {}
    for folder in cycles(run_a)[-1], cycles(run_b)[-1]:
        sae, (core, _) = load_sae(folder), load_core(folder / "core.safetensors")
        prefix = torch.arange(sae.widths[0])
        drawn = torch.randperm(len(prefix), generator=rng)[: len(core.index)]
        sets = {"core": core.index, "drawn from prefix 0": drawn, "prefix 0": prefix}
        rows = torch.stack([sae.W_enc, sae.W_dec]).detach()  # (2, F, D)
        sides.append({name: rows[:, index] for name, index in sets.items()})
    for name, rows in sides[0].items():
        others = sides[1][name]
        out[name] = dict(n=[rows.shape[1], others.shape[1]])
        for kind, a, b in zip(("encoder", "decoder"), rows, others, strict=True):
            out[name][kind] = float(matched_cosines(a, b).mean())
            noise = torch.randn(a.shape, generator=rng)
            out[name][f"{kind}_random"] = float(matched_cosines(noise, b).mean())
    return out


# -------------------------------------------------------------------------------------------------
# The table
# -------------------------------------------------------------------------------------------------
FIRST = """
L0 | core | l0 | lower
core L0 | core | core_l0 | lower
FVU | core | fvu | lower
CE recovered | core | ce_loss_score | higher
alive | core | frac_alive | higher
core size | stability | core | lower
kept | stability | kept | higher
probing, 1 latent | probing | sae_top_1_test_accuracy | higher
TPP, 20 latents | tpp | tpp_threshold_20_total_metric | higher
SCR, 20 latents | scr | scr_metric_threshold_20 | higher
RAVEL | ravel | disentanglement_score | higher
"""


def short(folder):
    return "/".join(Path(folder).parts[-2:])


def headline(report):
    """[(name, key, better, figures of the SAEs)] of the first eight of FIRST that ran."""
    rows = []
    for name, kind, key, better in (line.split(" | ") for line in FIRST.strip().splitlines()):
        values = []
        for sae in report["saes"]:
            ran = [m for metric, m in sae["metrics"].items() if metric.split()[0] == kind]
            values.append(next((m[key] for m in ran if key in m), None))
        if any(value is not None for value in values):
            rows.append((name, key, better, values))
    return rows[:8]


def every_figure(report):
    """(metric, key, figures of the SAEs) of all that is one number or word."""
    saes = [sae["metrics"] for sae in report["saes"]]
    for metric in dict.fromkeys(name for metrics in saes for name in metrics):
        of_each = [metrics.get(metric, {}) for metrics in saes]
        for key in dict.fromkeys(key for figures in of_each for key in figures):
            values = [figures.get(key) for figures in of_each]
            if not any(isinstance(value, (list, dict)) for value in values):
                yield metric, key, values


def show(value):
    return f"{value:.4g}" if isinstance(value, float) else "-" if value is None else str(value)


def table(report, everything=False):
    """Lines for the terminal."""
    rows = [("", *(short(sae["folder"]) for sae in report["saes"]))]
    rows += [(name, *map(show, values)) for name, _, _, values in headline(report)]
    if everything or len(rows) == 1:
        rows += [(f"{m}: {key}", *map(show, values)) for m, key, values in every_figure(report)]
    left, right = max(len(row[0]) for row in rows), max(14, *map(len, rows[0]))
    for name, *cells in rows:
        yield name.ljust(left) + "".join(f"  {cell:>{right}}" for cell in cells)
    reasons = {}
    for sae, (metric, figures) in ((s, m) for s in report["saes"] for m in s["metrics"].items()):
        if "cannot_run" in figures:
            names = reasons.setdefault(figures["cannot_run"], ({}, {}))
            names[0][metric] = names[1][short(sae["folder"])] = None  # each once, in order
    for why, names in reasons.items():
        metrics, folders = map(", ".join, names)
        yield f"{metrics} of {folders} cannot run: {why}"
    for pair, sets in report["agreement"].items():
        for name, row in sets.items():
            beside = "{n}: decoder {decoder:.3f}, random directions {decoder_random:.3f}"
            yield f"PW-MCC of {pair}, {name} {beside.format(**row)}"


# -------------------------------------------------------------------------------------------------
# The page: one file without network, which draws the report and the core's latents
# -------------------------------------------------------------------------------------------------
PAGE = """<!doctype html><html lang=en><meta charset=utf-8><title>dmsae</title>
<meta name=viewport content="width=device-width,initial-scale=1"><style>
body{font:16px/1.5 system-ui,sans-serif;margin:auto;max-width:68em;padding:1em;color:#222}
h1{font-size:1.4em}h2{margin-top:2em}small{color:#666}a{color:inherit}
td{padding:.1em .8em .1em 0;vertical-align:top}
.bar{display:block;height:.5em;max-width:8em;background:#4477aa}
.grid{display:grid;gap:1.5em;grid-template-columns:repeat(auto-fill,minmax(min(19em,100%),1fr))}
figure{margin:0}svg{width:100%}text{font-size:11px;fill:#444;text-anchor:middle}
.key{display:inline-block;margin-right:1em}
.key i{background:currentColor;margin-right:.4em;padding:0 .4em}
article{border:1px solid #ddd;border-radius:.5em;padding:.7em;overflow-wrap:anywhere}
article h3{margin:0}article p{font:.8em/1.6 monospace;margin:.5em 0;white-space:pre-wrap}
kbd{background:#eee;border-radius:.3em;padding:0 .3em;margin-right:.3em;white-space:pre}
:target{outline:3px solid #ccbb44}[hidden]{display:none}
details{overflow-x:auto}details td{font-size:.85em}</style>
<h1></h1><p id=about></p><table id=first><tr><td><td>plain SAE<td>last SAE<td>difference</table>
<h2>The run</h2><div id=charts class=grid></div>
<h2>The core's features</h2><input id=find placeholder="filter, such as a token"> by
<select id=by><option>attribution<option>density<option>birth</select><p>
<div id=cards class=grid></div><h2>All figures</h2><div id=all></div>
<script type="application/json" id=data>DATA</script><script>
const colours = "#4477aa #ee6677 #228833 #ccbb44 #66ccee #aa3377 #bbbbbb".split(" ")
const at = id => document.getElementById(id), data = JSON.parse(at("data").textContent)

function add(parent, tag, text = "", attributes = {}) {  // text is never read as HTML
  const svg = "http://www.w3.org/2000/svg"
  const element = document.createElementNS(tag == "svg" ? svg : parent.namespaceURI, tag)
  for (const name in attributes) element.setAttribute(name, attributes[name])
  element.textContent = text
  return parent.appendChild(element)
}
function show(v, digits = 4) {
  return typeof v != "number" ? v ?? "-" : Number.isInteger(v) ? v : +v.toPrecision(digits)
}

function says(key) {
  const name = key.replace(/_std$/, "")
  return data.says[name] ?? data.says[name.replace(/\\d+/g, "N")] ?? ""
}

function ticks(low, high) {
  const unit = 10 ** Math.floor(Math.log10(high - low)), out = []
  const step = [0.2, 0.5, 1, 2].map(s => s * unit).find(s => (high - low) / s <= 5)
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9; i++) out.push(i * step)
  return out
}

// series: {name: [[x, y], ...]}; bars stand one on the other
function chart(title, xName, yName, series, bars = false) {
  const figure = add(at("charts"), "figure"), points = Object.values(series).flat()
  add(figure, "b", title)
  add(figure, "div", yName, {style: "font-size:.8em;color:#666"})
  const svg = add(figure, "svg", "", {viewBox: "0 0 320 225"}), floor = {}
  const xs = [...new Set(points.map(p => p[0]))].sort((a, b) => a - b)
  const gap = xs.length > 1 ? Math.min(...xs.slice(1).map((x, i) => x - xs[i])) / 2 : 0.5
  const left = xs[0] - gap, width = xs.at(-1) + gap - left, ys = points.map(p => p[1])
  const sums = xs.map(x => points.filter(p => p[0] == x).reduce((sum, p) => sum + p[1], 0))
  const bottom = bars ? 0 : Math.min(...ys), top = Math.max(...(bars ? sums : ys))
  const height = top - bottom || 1
  const across = x => 52 + 260 * (x - left) / width, down = y => 185 - 170 * (y - bottom) / height
  for (const y of ticks(bottom, bottom + height)) {
    add(svg, "path", "", {d: `M52 ${down(y)}H312`, stroke: "#ddd"})
    add(svg, "text", show(y), {x: 26, y: down(y) + 4})
  }
  for (const x of ticks(left, left + width)) add(svg, "text", show(x), {x: across(x), y: 202})
  add(svg, "text", xName, {x: 182, y: 220})
  Object.entries(series).forEach(([name, points], i) => {
    const colour = colours[i % 7], key = add(figure, "span", "", {class: "key"})
    add(key, "i", "", {style: `color:${colour}`})
    add(key, "small", name)
    const path = points.map(([x, y]) => `${across(x)},${down(y)}`).join(" ")
    if (!bars) add(svg, "polyline", "", {points: path, fill: "none", stroke: colour})
    for (const [x, y] of points) {
      const y0 = floor[x] ?? 0, box = {x: across(x - gap / 2), y: down(y0 + y), fill: colour}
      const size = {width: 260 * gap / width, height: 170 * y / height}
      const r = points.length < 20 ? 4 : 1
      const shape = bars ? add(svg, "rect", "", {...box, ...size}) :
        add(svg, "circle", "", {cx: across(x), cy: down(y), r, fill: colour})
      add(shape, "title", `${name}: ${xName} ${show(x)}, ${yName} ${show(y)}`)
      if (bars) floor[x] = y0 + y
    }
  })
}

at("about").textContent = data.about
document.querySelector("h1").textContent = data.title
for (const [name, key, better, values] of data.first) {
  const row = add(at("first"), "tr", "", {title: `${says(key)}; ${better} is better`})
  const [a, b] = values, most = Math.max(a ?? 0, b ?? 0) || 1
  add(row, "td", name)
  for (const v of values.slice(0, 2)) {
    const style = `width:${20 * (v ?? 0) / most}vmin`
    add(add(row, "td", show(v)), "i", "", {class: "bar", style})
  }
  add(row, "td", a == null || b == null ? "" : (b < a ? "" : "+") + show(b - a, 3))
}
const rows = data.rows, of = value => rows.map((row, t) => [t, value(row)])
if (rows.length) {
  const births = Object.keys(Object.assign({}, ...rows.map(row => row.origins)))
  const born = births.map(b => [`born in ${b}`, of(row => row.origins[b] ?? 0)])
  const fvu = rows[0].fvu.map((_, g) => [`prefix ${g}`, of(row => row.fvu[g])])
  const ce = rows.map((row, t) => [`training ${t}`, [[row.l0, row.ce_recovered]]])
  const l0 = {core: of(row => row.core_l0), rest: of(row => row.l0 - row.core_l0)}
  chart("The core, and who was born when", "training", "latents", Object.fromEntries(born), true)
  chart("FVU by prefix", "training", "FVU, lower is better", Object.fromEntries(fvu))
  chart("Loss recovered", "L0", "CE recovered, up is better", Object.fromEntries(ce))
  chart("L0, core and rest", "training", "latents on at a token", l0, true)
}
if (data.share.length) {
  const curve = data.share.map((y, i) => [i + 1, y]), line = [[1, 0.9], [curve.length, 0.9]]
  const half = d => Math.floor(2 * Math.log10(d)) / 2  // in half decades
  const bins = [...new Set([...data.core, ...data.others].map(half))]
  const count = all => bins.map(b => [b, all.filter(d => half(d) == b).length])
  const often = {core: count(data.core), "rest of prefix 0": count(data.others)}
  chart("Attribution of the first latents", "latents", "share of all", {curve, "90 %": line})
  chart("How often latents fire", "log10 of share of tokens", "latents", often, true)
}
const cards = data.latents.map(latent => {
  const card = add(at("cards"), "article", "", {id: `latent-${latent.index}`})
  add(add(card, "h3"), "a", `latent ${latent.index}`, {href: `#${card.id}`})
  const [share, often] = [latent.attribution, latent.density].map(v => show(100 * v) + " %")
  add(card, "small", `${share} of the core's attribution; on at ${often} of tokens; ` +
    `born in training ${latent.birth}; votes ${latent.votes}`)
  const raises = add(card, "p", "raises ")
  for (const token of latent.raises) add(raises, "kbd", token)
  for (const context of latent.contexts) {
    const line = add(card, "p")
    for (const [token, shade] of context)
      add(line, "span", token, {style: `background:rgba(238,102,119,${shade})`})
  }
  return Object.assign(card, {latent})
})
at("find").oninput = at("by").onchange = () => {
  const by = at("by").value, sign = by == "birth" ? 1 : -1, words = at("find").value.toLowerCase()
  cards.sort((a, b) => sign * (a.latent[by] - b.latent[by]))
  for (const card of cards) card.hidden = !card.textContent.toLowerCase().includes(words)
  at("cards").append(...cards)
}
let metric, table
for (const [name, key, values] of data.all) {
  if (name != metric) {
    const folded = add(at("all"), "details")
    add(folded, "summary", metric = name)
    table = add(folded, "table")
  }
  const row = add(table, "tr")
  for (const cell of [key, ...values.map(v => show(v)), says(key)]) add(row, "td", cell)
}
if (location.hash) location.hash = location.hash  // the card is here only now
</script></html>
"""


@torch.no_grad()
def raised_tokens(model, rows, n=8):
    """The n tokens that directions rows (C, D) raise most: (C, n). The model itself goes from its
    last layer to logits: a final norm or projection has another name in every model."""
    last = model.config.get_text_config().num_hidden_layers - 1
    ids = torch.zeros(len(rows), 1, dtype=torch.long, device=model.device)
    logits = edited_logits(model, last, ids, lambda h: rows[:, None].to(h))
    return logits[:, 0].topk(n).indices


def core_latents(tokenizer, core, ids, acts, raised):
    """Facts of each latent of a Core, most important first: the tokens that it raises (C, n), and
    the four contexts of ids (R, T) in which it fires most, with its activation acts (R, T, C)."""
    first = tokenizer("a", add_special_tokens=False)["input_ids"]  # after it no space is lost

    def words(ids):
        decoded = tokenizer.batch_decode([[*first, i] for i in ids.tolist()])
        return [text[len(tokenizer.decode(first)) :].replace("\n", "↵") for text in decoded]

    for c in core.score.argsort(descending=True)[:200].tolist():
        peak, where = acts[:, :, c].max(1)  # (R,)
        contexts = []
        for r in peak.argsort(descending=True)[:4].tolist():
            near = slice(max(0, int(where[r]) - 10), int(where[r]) + 11)
            shades = (acts[r, near, c] / peak.max()).tolist()
            if peak[r] > 0:
                contexts.append(list(zip(words(ids[r, near]), shades, strict=True)))
        yield dict(
            index=int(core.index[c]),
            attribution=float(core.score[c] / core.score.sum()),
            density=float(core.density[c]),
            birth=int(core.birth[c, 0]),
            votes=int(core.votes[c]),
            raises=words(raised[c]),
            contexts=contexts,
        )


@torch.no_grad()
def core_page(model, tokenizer, ids, keep, subject):
    """Of (folder, Config, SAE) what the page shows of its core: facts of the latents, attribution's
    cumulative share over its candidates, densities of the core and of the other candidates."""
    folder, cfg, sae = subject
    core, acts = load_core(folder / "core.safetensors")[0], []
    for row in bar(ids.to(model.device), "page"):
        x = residual_stream(model, cfg.layer, row[None])[0].float()
        acts.append(sae.encode(x)[:, core.index].cpu())
    acts = torch.stack(acts) * keep[..., None]
    raised = raised_tokens(model, sae.W_dec[core.index])
    with torch.enable_grad():
        score, density = dmsae.attribute(model, cfg.layer, ids, keep, sae)
    share = score.sort(descending=True).values.cumsum(0) / score.sum()
    density = density.clamp_min(1e-6)
    others = torch.ones_like(density, dtype=torch.bool).index_fill(0, core.index, False)
    return dict(
        latents=list(core_latents(tokenizer, core, ids, acts, raised)),
        share=share.tolist(),
        core=density[~others].tolist(),
        others=density[others].tolist(),
    )


def page(report, of_core):
    """The report, and what `core_page` gives (or a dict of empty lists), as HTML."""
    told = latent_figures, core_metrics, absorption, sparse_probing, tpp, scr
    docs = "".join(function.__doc__ for function in (*told, ravel, stability))
    lines = re.findall(r"^ +([\w, ]+): (.+)$", docs, re.M)  # what each figure says
    says = {name: text for names, text in lines for name in names.split(", ")}
    run, rows = next(iter(report["stability"].items()), ("", []))
    about = f"Measured on {report['text']}."
    if rows:
        words = dict(rows[-1], run=run, k=report["k"], cycles=len(rows) - 1)
        about = f"{SENTENCE.format(**words, plain=rows[0]['ce_recovered'])} {about}"
    data = dict(title=f"{report['model']}, layer {report['layer']}", about=about, says=says)
    data |= dict(first=headline(report), all=list(every_figure(report)), rows=rows) | of_core
    return PAGE.replace("DATA", json.dumps(data).replace("<", "\\u003c"))


NO_CORE = dict(latents=[], share=[], core=[], others=[])
SENTENCE = """{run}: k {k}, {tokens:,} tokens a training. After {cycles} cycles the core has {core}
latents, {kept} of them kept from the training before. Of {l0:.1f} latents on at a token
{core_l0:.1f} are the core's. Loss recovered is {ce_recovered:.4f}, without a core {plain:.4f}."""


# -------------------------------------------------------------------------------------------------
# The command line
# -------------------------------------------------------------------------------------------------
METRICS = "core absorption probing tpp scr ravel stability".split()
FLAGS = "model text dataset text_column separator ctx device".split()  # those of dmsae.py


def parse(argv=None):
    """Command line -> argparse's namespace; what cannot be read ends with one line. BadInput"""
    parser = argparse.ArgumentParser("eval.py", allow_abbrev=False)
    parser.error = lambda why: parser.exit(2, f"eval: {why}; --help shows all flags\n")
    add = parser.add_argument
    add("folders", nargs="+", type=Path, help="run folders (first and last SAE) or SAE folders")
    add("--only", nargs="+", choices=METRICS, default=METRICS, help="some of the metrics")
    add("--tokens", type=int, default=1_000_000, help="at most, for a metric (%(default)s)")
    add("--labelled", nargs="+", default=[], help=".csv or .jsonl files, for probing, tpp and scr")
    names = "of --labelled: text, label and, for scr, a spurious label (%(default)s)"
    add("--columns", nargs="+", default=["text", "label"], help=names)
    add("--ravel", help="JSON file of entities and attributes, see `ravel_prompts`")
    add("--seed", type=int, default=0, help="seed of everything random (%(default)s)")
    add("--seeds", type=int, default=3, help="how many, from --seed on, for tpp and scr")
    add("--all", action="store_true", help="print every figure; the JSON always has them")
    add("--html", action="store_true", help="also write a page with charts and the core's latents")
    add("--out", type=Path, help="JSON file (FOLDER/eval.json); nothing is overwritten")
    for f in fields(Config):
        if f.name in FLAGS:
            flag = "--" + f.name.replace("_", "-")
            add(flag, type=f.type, help="as in dmsae.py, in place of the SAE's own")
    args = parser.parse_args(argv)
    if min(args.tokens, args.seeds) < 1 or not 2 <= len(args.columns) <= 3:
        given = f"--tokens {args.tokens} --seeds {args.seeds} --columns {' '.join(args.columns)}"
        raise BadInput(f"{given}: must be 1 or above, 1 or above, and two or three names")
    return args


def read_facts(path):
    """Facts as `ravel_prompts` takes them. BadInput"""
    with suppress(ValueError, KeyError, TypeError, AttributeError):
        facts = json.loads(Path(path).read_text())
        strings = [a for known in facts["entities"].values() for a in known.values()]
        templates = [t for templates in facts["templates"].values() for t in templates]
        once = all(t.count("{entity}") == 1 for t in templates)
        if once and all(isinstance(a, str) for a in strings):
            return facts
    like = '{"entities": {"Paris": {"country": "France"}}, '
    like += '"templates": {"country": ["{entity} is in"]}}'
    raise BadInput(f"--ravel {path}: must be like {like}")


def read_cfg(folder):
    """An SAE's cfg.json, its metadata among the rest, wherever a version of SAELens put them.
    BadInput"""
    try:
        cfg = json.loads((folder / "cfg.json").read_text())
        return cfg | (cfg.get("metadata") or {})
    except (OSError, ValueError, TypeError, AttributeError) as e:
        what = "is neither a run folder nor, by its cfg.json, that of an SAE"
        raise BadInput(f"{folder}: {what} ({e!r})") from None


def config_of(folder, given):
    """The Config that an SAE was trained with, as far as its cfg.json says, changed by the dict
    `given`. BadInput"""
    cfg = read_cfg(folder)
    hook = re.fullmatch(r"blocks\.(\d+)\.hook_resid_(post|pre)", str(cfg.get("hook_name")))
    if not hook:
        what = f"its hook_name is {cfg.get('hook_name')}, not blocks.N.hook_resid_post"
        raise BadInput(f"{folder}: {what}")
    known = dict(model=cfg.get("model_name"), ctx=cfg.get("context_size"))
    known |= dict(dataset=cfg.get("dataset_path"), layer=int(hook[1]) - (hook[2] == "pre"))
    known |= cfg.get("config") or {}
    for name in "model", "text":  # a relative path began where dmsae.py was started
        places = [base / str(known.get(name)) for base in (Path(), *folder.resolve().parents)]
        known[name] = next((str(p) for p in places if p.exists()), known.get(name))
    if {"text", "dataset"} & given.keys():
        known |= dict(text=None, separator=None)
    known |= dict(device="auto") | given
    if not known["model"]:
        raise BadInput(f"{folder}: names no language model: --model google/gemma-2-2b, for example")
    names = {*FLAGS, *"layer k batch tokens attribution_tokens".split()}
    return Config(**{k: v for k, v in known.items() if k in names and v is not None})


def unit_rows(sae):
    """The same function with decoder rows of unit norm, in place."""
    norm = sae.requires_grad_(False).W_dec.norm(dim=1).clamp_min(1e-8)
    sae.W_dec.div_(norm[:, None])
    sae.W_enc.mul_(norm[:, None])
    for gate in sae.b_enc, sae.threshold:
        gate.mul_(norm)
    return sae


def load(args):
    """[(folder, Config, SAE)], the Config to read text with, and the run folder whose held-out text
    it is, or None. BadInput"""
    given = {name: getattr(args, name) for name in FLAGS if getattr(args, name) is not None}
    folders = []
    for folder in args.folders:
        trained = cycles(folder) or [folder]
        folders += dict.fromkeys([trained[0], trained[-1]])
    configs = [config_of(folder, given) for folder in folders]
    cfg, home = configs[0], folders[0].parent
    if given.keys() <= {"device"} and (home / "tokens.bin").exists():
        cfg = replace(cfg, text=None, separator=None, dataset=f"{home}/tokens.bin")
    else:
        cfg, home = replace(cfg, tokens=max(cfg.batch, args.tokens), attribution_tokens=1), None
    dmsae.check(cfg)
    saes = [unit_rows(load_sae(folder, cfg.device)) for folder in folders]
    return list(zip(folders, configs, saes, strict=True)), cfg, home


def open_model(subjects, cfg):
    """The language model and its tokenizer, if they are those of all (folder, Config, SAE).
    BadInput"""
    model, tokenizer = dmsae.load_model(cfg)
    lm = model.config.get_text_config()
    there = f"{cfg.model} has {lm.num_hidden_layers} layers, width {lm.hidden_size}"
    for folder, c, sae in subjects:
        here = c.model, sae.W_enc.shape[1]
        if here != (cfg.model, lm.hidden_size) or c.layer >= lm.num_hidden_layers:
            raise BadInput(f"{folder}: is of {here[0]}, layer {c.layer}, width {here[1]}; {there}")
    return model, tokenizer


def open_text(args, cfg, tokenizer, home):
    """The contexts to measure on, ids and keep, and a line that says what they are. BadInput"""
    with tempfile.TemporaryDirectory() as scratch:
        text = dmsae.open_text(cfg, tokenizer, home or scratch)
        most = text.n_eval if home else len(text.rows)
        ids, keep = text.contexts(slice(min(most, max(1, args.tokens // cfg.ctx))))
    source = f"held out by {home}" if home else f"the first of {cfg.text or cfg.dataset}"
    return ids, keep, f"{ids.numel():,} tokens in contexts of {cfg.ctx}, {source}"


def free_path(args):
    """Where the JSON goes. BadInput"""
    path = (args.out or args.folders[0] / "eval").with_suffix(".json")
    names = [path, *(path.with_stem(f"{path.stem}-{i}") for i in range(2, 1000))]
    path = next(p for p in names if not (p.exists() or p.with_suffix(".html").exists()))
    if not os.access(path.parent, os.W_OK):
        raise BadInput(f"--out {path}: must be in a folder that exists and can be written")
    return path


def no_labels():
    raise CannotRun("it needs labelled texts: --labelled FILE.csv with columns text and label")


# All that is measured on: contexts ids, keep (R, T); {file: texts, labels, spurious}; prompts
Data = namedtuple("Data", "ids keep texts prompts")


def measures(args, model, tokenizer, data, subject):
    """(name, function without arguments) of each metric on subject (folder, Config, SAE)."""
    folder, cfg, sae = subject
    at, seed = (model, cfg.layer), args.seed
    yield "core", partial(core_metrics, *at, data.ids, data.keep, sae)
    n_words = max(100, args.tokens // 120)  # of about 100 tokens, and a fifth is read twice
    yield "absorption", partial(absorption, *at, tokenizer, sae, n_words, seed)
    kinds, seeds = ("probing", "tpp", "scr"), range(seed, seed + args.seeds)
    yield from ((kind, no_labels) for kind in kinds if not data.texts)
    for file, (texts, labels, spurious) in data.texts.items() if {*kinds} & {*args.only} else ():
        X, A = pooled(*at, tokenizer, sae, texts, min(128, data.ids.shape[1]))
        yield f"probing {file}", partial(sparse_probing, X, A, labels, seed)
        yield f"tpp {file}", partial(tpp, X, A, labels, sae.W_dec, seeds)
        yield f"scr {file}", partial(scr, X, A, labels, spurious, sae.W_dec, seeds)
    pair = 1.7 * max((len(p.ids) for p in data.prompts), default=1)  # is read 2 x .7 + .3 times
    pair *= len({p.asked for p in data.prompts}) or 1
    most = min(5000, int(args.tokens / pair))
    yield "ravel", partial(ravel, *at, sae, data.prompts, most, seed)
    yield "stability", partial(training_row, folder)


def run(args):
    """Load, measure, print, write."""
    subjects, cfg, home = load(args)
    path, runs = free_path(args), []
    words = args.columns, args.tokens // 128, args.seed
    texts = {file: labelled(read_rows(file), *words) for file in args.labelled}
    facts = read_facts(args.ravel) if args.ravel else dict(entities={}, templates={})
    model, tokenizer = open_model(subjects, cfg)
    ids, keep, about = open_text(args, cfg, tokenizer, home)
    data = Data(ids, keep, texts, ravel_prompts(tokenizer, facts))

    report = dict(model=cfg.model, layer=cfg.layer, k=cfg.k, seed=args.seed, text=about, saes=[])
    report["arguments"] = {name: str(value) for name, value in vars(args).items()}
    if "stability" in args.only:
        runs = list(dict.fromkeys(f.parent for f, _, _ in subjects if is_trained(f)))
    report["stability"] = {str(run): stability(run) for run in runs}
    pairs = itertools.combinations(runs, 2)
    report["agreement"] = {f"{a} and {b}": agreement(a, b, args.seed) for a, b in pairs}
    for subject in subjects:
        figures = {}
        report["saes"].append(dict(folder=str(subject[0]), layer=subject[1].layer, metrics=figures))
        for name, metric in measures(args, model, tokenizer, data, subject):
            if name.split()[0] in args.only:
                try:
                    figures[name] = metric()
                except CannotRun as why:
                    figures[name] = dict(cannot_run=str(why))
                dmsae.write_json(report, path)
    print(*table(report, args.all), f"written: {path}", sep="\n")
    if args.html:
        mine = [s for s in subjects if is_trained(s[0]) and s[0].parent == subjects[0][0].parent]
        of_core = core_page(model, tokenizer, ids, keep, mine[-1]) if mine else NO_CORE
        with dmsae.written_whole(path.with_suffix(".html")) as part:
            part.write_text(page(report, of_core))


if __name__ == "__main__":
    sys.exit(dmsae.main(name="eval", work=lambda argv: run(parse(argv))))
