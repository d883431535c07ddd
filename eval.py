"""SAEBench's metrics, light and exact, for SAEs of dmsae.py and for SAELens `jumprelu` folders.

    python eval.py runs/gemma-2-2b_k64_seed0                  # its plain SAE beside its last one
    python eval.py runs/seed0 runs/seed1 --labelled news.csv --html --all

One function for each metric, in the order of the table; then the page and the command line. A
metric returns a dict of figures, and raises CannotRun where it has no value. In a notebook:

    model, tokenizer, _ = dmsae.load_model(dmsae.Config(model="google/gemma-2-2b", layer=12))
    sae = unit_rows(dmsae.load_sae("runs/seed0/cycle5", model.device))
    absorption(model, 12, tokenizer, sae)
    X, A = pooled(model, 12, tokenizer, sae, texts)  # for tpp and scr too
    sparse_probing(X, A, labels)

Definitions are SAEBench 0.6.0's (Karvonen et al. 2025, arXiv 2503.09532) unless a docstring says
"ours"; decoder rows must have unit norm. Shapes: dmsae.py's; n words or texts, P probes, V tokens.
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
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import dmsae
from dmsae import BadInput, Config, load_core, load_sae, read_json, refusing, residual_stream

bar = partial(tqdm, disable=None, leave=False)  # a progress bar, on a terminal only


class CannotRun(Exception):
    """Why a metric has no value here."""


def mean_of(rows):
    """Of each figure in rows (dicts), None left out: the mean, and as figure_std the deviation."""
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


def residuals(model, layer, rows):
    """The residual stream of each of rows, lists of ids, in turn: (its length, D)"""
    for i in bar(range(0, len(rows), 64), "residuals"):
        part = [torch.tensor(row) for row in rows[i : i + 64]]
        ids = pad_sequence(part, batch_first=True)  # on the right, where no earlier token sees it
        for row, x in zip(part, residual_stream(model, layer, ids.to(model.device)), strict=True):
            yield x[: len(row)].float()


def edited_logits(model, layer, ids, edit):
    """Logits (R, T, V) where the layer's output h (R, T, D) is replaced by edit(h)."""
    with dmsae.spliced(model, layer, edit):
        return model(ids, use_cache=False).logits


# ---- Probes, as SAEBench trains them. A probe is its weights, and then its bias: (d + 1,) --------
def probe_logits(x, probes):
    """x (n, d), probes (P, d + 1) -> (n, P)"""
    return F.linear(x, probes[:, :-1], probes[:, -1])


def logistic_regression(x, y, balanced=False):
    """scikit-learn's (L2, C = 1), by LBFGS in float64. balanced: both classes weigh alike. On the
    CPU, as a GPU would wait at some 700 evaluations. x (n, d), y (n,) bool -> probe (1, d + 1)"""
    like, x, y = x, x.double().cpu(), y.double().cpu()
    weight = 0.5 / torch.where(y > 0, y.mean(), 1 - y.mean()) if balanced else None
    probe = x.new_zeros(1, x.shape[1] + 1, requires_grad=True)
    lbfgs = torch.optim.LBFGS([probe], max_iter=500, line_search_fn="strong_wolfe")

    def objective():
        lbfgs.zero_grad()
        logits = probe_logits(x, probe)[:, 0]
        loss = F.binary_cross_entropy_with_logits(logits, y, weight, reduction="sum")
        loss = loss + probe[:, :-1].square().sum() / 2
        loss.backward()
        return loss

    lbfgs.step(objective)
    return probe.detach().to(like)


@torch.enable_grad()
def train_epoch(probes, adam, x, y, batch, rng, l1, pos_weight=None):
    """One epoch of probes (P, d + 1): BCE + l1 * their mean |w|_1. x (n, d), y (n, P)"""
    for at in torch.randperm(len(x), generator=rng).to(x.device).split(batch):
        logits = probe_logits(x[at], probes)
        loss = F.binary_cross_entropy_with_logits(logits, y[at], pos_weight=pos_weight)
        adam.zero_grad()
        (loss + l1 * probes[:, :-1].abs().sum(1).mean()).backward()
        adam.step()


def train_letter_probes(x, y, batch, weight_decay, l1=0.0, seed=0):
    """A one-vs-rest probe for each letter, positives weighted by negatives / positives: Adam, 50
    epochs, rate 1e-2 falling to 1e-5. Ours: at least 20 batches an epoch, so 1000 steps, as
    SAEBench's vocabularies give; few words in batches of 4096 would give its L1 probe 50 steps, and
    absorption would measure that. x (n, d), y (n,) in 0..25 -> (26, d + 1)"""
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
    edits = torch.zeros_like, lambda h: h.masked_scatter(keep[..., None], x_hat.to(h.dtype))
    own = model(ids, use_cache=False).logits  # (R, T, V)
    edited = (edited_logits(model, layer, ids, edit) for edit in edits)  # one at a time: V is large
    following = F.pad(ids[:, 1:], (0, 1), value=-100).where(keep, -100)  # -100: not counted
    sums = torch.zeros(3, 2, dtype=torch.float64, device=own.device)  # .item() would stop a GPU
    for logits, (ce, kl) in zip(itertools.chain([own], edited), sums, strict=True):
        for q, p, target, kept in zip(logits, own, following, keep, strict=True):
            q, p = (t.float().log_softmax(-1) for t in (q, p))  # (T, V)
            ce += F.nll_loss(q, target, reduction="sum")
            kl += (F.kl_div(q, p, reduction="none", log_target=True).sum(1) * kept).sum()
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
    """Core evaluation on contexts ids, keep (R, T) of a dmsae.Text. Outside keep the SAE changes
    nothing; the ablation zeroes all. None is a 0 / 0. For a prefix w: sae.threshold[w:] = math.inf

    ce_loss_without_sae, ce_loss_with_sae: next-token loss without and with the SAE, nats a token
    ce_loss_with_ablation, kl_div_with_ablation: loss and divergence with the layer's output zeroed
    kl_div_with_sae: KL divergence to the model's own prediction, nats a token
    ce_loss_score, kl_div_score: share of what zeroing costs that the SAE recovers; 1 is best
    fvu: squared error over the variance about the mean
    explained_variance_legacy: mean over tokens of 1 - such a ratio, as in SAEBench's papers
    explained_variance_0_6_0: about zero, as SAEBench 0.6.0 has it
    mse_saebench: squared error of a token, over the tokens of a batch
    cossim, l1: mean cosine of input and reconstruction; mean sum of activations at a token
    l2_norm_in, l2_norm_out, l2_ratio: mean norm of input and reconstruction; mean ratio
    relative_reconstruction_bias: mean squared norm of the reconstruction over its inner product
    """
    batches = list(dmsae.in_parts(model, ids, keep, 2048))  # SAEBench's batch: 16 contexts of 128
    sums = Counter()  # it adds
    for batch in bar(batches, "core"):
        sums.update(core_sums(model, layer, *batch, sae))
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

# Residuals x (n, D) at words, x_fresh in other prompts; letters y (n,) 0..25; probes (26, D + 1)
Spelling = namedtuple("Spelling", "x_train y_train x_test y_test x_fresh probes")


@cache  # the same for every SAE of a layer; it holds the model until .cache_clear()
def spelling_task(model, layer, tokenizer, n_words=10**4, seed=0):
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

    def after(string):  # its ids where it follows another word
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
        return torch.stack([x[-1].clone() for x in residuals(model, layer, prompts)])

    x_train, x_test, x_fresh = read(train, train), read(test, test), read(test, words)
    y = torch.tensor([letter[word] for word in words], device=model.device)
    probes = train_letter_probes(x_train, y[: len(train)], 64, 1e-4, seed=seed)
    return Spelling(x_train, y[: len(train)], x_test, y[len(train) :], x_fresh, probes)


def f1_score(positive, truth):
    """F1 along the first dimension of two bool tensors."""
    return 2 * (positive & truth).sum(0) / (positive.sum(0) + truth.sum(0)).clamp_min(1)


def main_latents(order, f_train, y_train, f_test, y_test):
    """A letter's main latents: the first k of order, where a larger k must add .03 to the F1 of a
    regression on them; and that F1. f (n, F), y (n,) bool"""
    best, main = -1.0, None
    for k in range(1, 11):
        probe = logistic_regression(f_train[:, order[:k]], y_train, balanced=True)
        now = f1_score(probe_logits(f_test[:, order[:k]], probe)[:, 0] > 0, y_test).item()
        if now <= best + 0.03:
            break
        best, main = now, order[:k]
    return main, best


def absorption_scores(f, x, W_dec, w, main):
    """Full absorption (bool) and the absorbed fraction of n words of a letter, (n,) each, from
    activations f (n, F), residuals x (n, D), the letter's probe w (D,), and its main latents."""
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
def absorption(model, layer, tokenizer, sae, n_words=10**4, seed=0):
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
        raise CannotRun(f"the probes read {len(letters)} of 26 letters; {MIN_LETTERS} are needed")
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
    with refusing(f"--labelled {path}: must be a .csv or .jsonl file"):
        with open(path, newline="", encoding="utf-8-sig") as f:
            rows = csv.DictReader(f) if Path(path).suffix == ".csv" else map(json.loads, f)
            return [{**row} for row in rows]


def labelled(rows, columns=("text", "label"), budget=10**4, seed=0):
    """Texts and labels, (n,) str each, of two columns of rows (dicts), about `budget` in all: at
    most 2500 a class (SAEBench: 2000 + 500), no class below 10. Then the values in a third column,
    for SCR, or None. BadInput"""
    by_class = {}
    for i in np.random.default_rng(seed).permutation(len(rows)):
        values = [rows[i].get(column) for column in columns]
        if None not in values and "" not in values:
            by_class.setdefault(str(values[1]), []).append([str(value) for value in values])
    classes = [found for found in by_class.values() if len(found) >= 10]
    if len(classes) < 2:
        has = ", ".join(map(str, rows[0])) if rows else "no rows"
        few = f"{len(classes)} classes of 10 texts or more, two are needed; the file has only {has}"
        raise BadInput(f"--columns {' '.join(columns)}: {few}")
    most = min(2500, max(10, budget // len(classes)))
    texts, labels, *spurious = np.array(sum((found[:most] for found in classes), []), object).T
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
    classes = [rng.permutation(np.flatnonzero(np.asarray(labels) == c)) for c in np.unique(labels)]
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
    """(n, X without the n latents of the largest effect) for each n of ABLATED: zeroed on every
    kept token (ours: not on zeros in place of special ones), the SAE's error kept, they move X
    (n, D) by -A W_dec. effect (F,), of any sign, as in SAEBench: a large n takes negative ones."""
    order = effect.topk(min(max(ABLATED), int((effect != 0).sum()))).indices
    for n in ABLATED:
        yield n, X - A[:, order[:n]] @ W_dec[order[:n]]


@torch.no_grad()
def tpp(X, A, labels, W_dec, seeds=(0, 1, 2)):
    """Targeted probe perturbation, by ablating N latents of a class: mean over classes, then over
    seeds, each with its own split and probes. X (n, D), A (n, F) of `pooled`, labels (n,), W_dec

    tpp_threshold_N_total_metric: intended less unintended; higher is better
    tpp_threshold_N_intended, tpp_threshold_N_unintended: accuracy lost by its probe; by others
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
    values = [] if spurious is None else np.unique(spurious)
    found = []
    for pair in itertools.combinations(np.unique(labels), 2):
        own = [np.equal(labels, c) for c in pair]
        cells = [np.flatnonzero(one & np.equal(spurious, v)) for one in own for v in values]
        if len(values) == 2 and min(map(len, cells)) >= 20:
            found.append(cells)
    if not found:
        raise CannotRun("it needs a third column of two values, each in 20 texts of two classes")
    return sorted(found, key=lambda cells: -min(map(len, cells)))[:most]


def scr_tasks(texts):
    """Indices of texts (4, n) of `scr_cells` -> tasks (2, m): class a against b and value u against
    v, both balanced, and a with u against b with v."""
    h = texts.shape[1] // 2
    by_class, by_value = texts[:, :h], texts[[0, 2, 1, 3], :h]
    return by_class.reshape(2, -1), by_value.reshape(2, -1), texts[[0, 3], : 2 * h]


@torch.no_grad()
def scr(X, A, labels, spurious, W_dec, seeds=(0, 1, 2)):
    """Spurious correlation removal: a biased probe learns class a against b where a always has the
    spurious value u, and b has v; oracles learn on balanced texts. Direction 1 asks the biased one
    for the class, without N latents of the spurious label; direction 2 the reverse. Mean over class
    pairs, seeds. X (n, D), A (n, F) of `pooled`, labels, spurious (n,), W_dec (F, D). CannotRun

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


# ---- Stability: is the core of a run still the core a training later, and that of another run? --
def cycles(run):
    """The SAE folders of a run folder, in order; none where it is no run."""
    numbers = [p.parent.name[5:] for p in Path(run).glob("cycle*/core.safetensors")]
    return [Path(run) / f"cycle{n}" for n in sorted(int(n) for n in numbers if n.isdigit())]


def stability(folder):
    """The figures of a training, an SAE folder, and how the core chosen after it overlaps with that
    before. Exact: a core's rows are frozen, an identity needs no matching. CannotRun, BadInput

    core, new: latents of the core chosen after the training; those chosen for the first time
    kept, dropped: those of the core before that were chosen again, and that were not
    jaccard: kept over all in either core; 1 is the same core
    identity_overlap: share of the core before that was kept
    cycle, tokens, dead, ce, ce_recovered: of the training; the tokens of core are those measured on
    """
    if Path(folder) not in cycles(Path(folder).parent):
        raise CannotRun("the SAE is in no run folder of dmsae.py, or is a transfer")
    with refusing(f"{folder}: is of no training of dmsae.py"):
        row = read_json(f"{folder}/cfg.json")["metadata"]["result"]
    core, _ = load_core(f"{folder}/core.safetensors")
    row["votes"] = Counter(sorted(core.votes.tolist()))
    row["births"] = Counter(sorted(core.birth[:, 0].tolist()))
    row["jaccard"] = row["kept"] / (row["core"] + row["dropped"])
    return row | dict(identity_overlap=row["kept"] / max(1, row["kept"] + row["dropped"]))


def assignment(cost):
    """The row of each column, one to one, of least total cost: (n, m), n <= m, -> (m,), -1 for a
    column without. Exact, by augmenting paths (Jonker & Volgenant 1987); n^2 vector operations."""
    price, row_of = np.zeros(cost.shape[1]), np.full(cost.shape[1], -1)
    for row in range(len(cost)):
        distance = cost[row] - price  # of the shortest path to each column,
        previous, seen = np.full(len(price), -1), np.zeros(len(price), bool)  # and its last step
        while row_of[column := np.where(seen, np.inf, distance).argmin()] >= 0:
            seen[column] = True
            further = cost[row_of[column]] - price
            further += distance[column] - further[column]
            closer = ~seen & (further < distance)
            distance[closer], previous[closer] = further[closer], column
        price[seen] += distance[seen] - distance[column]
        while previous[column] >= 0:  # shift the partners along the path
            row_of[column] = row_of[previous[column]]
            column = previous[column]
        row_of[column] = row
    return row_of


def pw_mcc(a, b):
    """Mean cosine of the one-to-one matching of a (n, D) and b (m, D) where it is largest (Song et
    al. 2025, arXiv 2505.20254). Ours: signed, as a latent is on in one direction only; of sets of
    unequal size the smaller is matched."""
    a, b = sorted((a, b), key=len)
    cosine = (F.normalize(a) @ F.normalize(b).T).double().detach().cpu().numpy()
    row_of = assignment(-cosine)
    return cosine[row_of, np.arange(len(b))][row_of >= 0].mean()


def agreement(run_a, run_b, seed=0):
    """Whether the last SAEs of two runs have the same features: {set: PW-MCC of encoder and decoder
    rows} of the cores, of as many latents drawn from prefix 0, and of prefix 0, core included; as
    _random that of random directions and the second run's rows: the two are baselines. BadInput"""
    rng, sides, out = dmsae.generator(seed, "agreement"), [], {}
    for folder in cycles(run_a)[-1], cycles(run_b)[-1]:
        sae, (core, _) = load_sae(folder), load_core(folder / "core.safetensors")
        drawn = torch.randperm(sae.widths[0], generator=rng)[: len(core.index)]
        sets = {"core": core.index, "drawn from prefix 0": drawn}
        sets["prefix 0"] = torch.arange(sae.widths[0])
        kinds = ("encoder", sae.W_enc.detach()), ("decoder", sae.W_dec.detach())
        sides.append({(s, kind): W[at] for s, at in sets.items() for kind, W in kinds})
    for (name, kind), a in sides[0].items():
        b = sides[1][name, kind]
        row = out.setdefault(name, dict(n=[len(a), len(b)]))
        row[kind] = pw_mcc(a, b)
        row[f"{kind}_random"] = pw_mcc(torch.randn(a.shape, generator=rng), b)
    return out


# ---- The table ----------------------------------------------------------------------------------
FIRST = {  # what matters first: its name, and which way is better
    "core: l0": "L0, lower is better",
    "core: core_l0": "core L0",
    "core: fvu": "FVU, lower is better",
    "core: ce_loss_score": "CE recovered, higher is better",
    "core: frac_alive": "alive, higher is better",
    "stability: core": "core size",
    "stability: kept": "kept, higher is better",
    "probing: sae_top_1_test_accuracy": "probing by 1 latent, higher is better",
    "tpp: tpp_threshold_20_total_metric": "TPP of 20 latents, higher is better",
}


def every_figure(report):
    """{"metric: key": figures of the SAEs} of all that is one number or word."""
    rows, n = {}, len(report["saes"])
    for i, sae in enumerate(report["saes"]):
        for metric, figures in sae["metrics"].items():
            for key, value in figures.items():
                if not isinstance(value, (list, dict)):
                    rows.setdefault(f"{metric}: {key}", [None] * n)[i] = value
    return rows


def headline(report):
    """[(name, "metric: key", figures of the SAEs)] of the first eight, of the last file."""
    ran = {re.sub(" .*:", ":", at): values for at, values in every_figure(report).items()}
    return [(name, at, ran[at]) for at, name in FIRST.items() if at in ran][:8]


def table(report, everything=False):
    """Lines for the terminal."""
    rows = {"": ["/".join(Path(sae["folder"]).parts[-2:]) for sae in report["saes"]]}
    rows |= {name: values for name, _, values in headline(report)}
    figures = every_figure(report)
    reasons = {at: figures.pop(at) for at in list(figures) if "cannot_run" in at}
    if everything or len(rows) == 1:
        rows |= figures
    for name, values in rows.items():
        cells = [f"{v:.4g}" if isinstance(v, float) else v for v in values]
        yield f"{name:38}" + "".join(f"  {'-' if v is None else v:>26}" for v in cells)
    for name, whys in reasons.items():
        yield f"{name.removesuffix('_run')} run: {'; '.join(dict.fromkeys(filter(None, whys)))}"
    for pair, sets in report["agreement"].items():
        for name, row in sets.items():
            beside = f"decoder {row['decoder']:.3f}, random directions {row['decoder_random']:.3f}"
            yield f"PW-MCC of {pair}, {name} {row['n']}: {beside}"


# ---- The page: one file without network, which draws the report and the core's latents ----------
PAGE = """<!doctype html><html lang=en><meta charset=utf-8><title>dmsae</title>
<meta name=viewport content="width=device-width,initial-scale=1"><style>
body{font:16px/1.5 system-ui;margin:auto;max-width:70em;padding:1em;color:#222}small{color:#666}
h2{margin-top:2em}figure{margin:0}svg{width:100%;overflow:visible}text{font-size:11px;fill:#666}
#first,#charts,#cards{display:grid;gap:1.5em;grid:auto/repeat(auto-fill,minmax(min(18em,100%),1fr))}
article{border:1px solid #ddd;border-radius:.5em;padding:.8em;overflow-wrap:anywhere}
article p{font:.8em/1.6 monospace;margin:.5em 0 0;white-space:break-spaces}kbd{background:#eee}
progress{width:3em}details{overflow-x:auto}td{padding-right:1em}:target{border-color:red}</style>
<h1 id=title></h1><p id=about></p><div id=first></div><h2>The run</h2><div id=charts></div>
<h2>The core's latents</h2><input id=find placeholder="filter, such as a token"> by <select id=by>
<option value=score>attribution<option>density<option>birth</select><p><div id=cards></div>
<h2>All figures</h2><div id=all></div><script type="application/json" id=data>DATA</script><script>
const at = id => document.getElementById(id), each = (list, f) => list.map(f).join("")
const plain = v => v?.replace?.(/[&<>"]/g, c => `&#${c.charCodeAt()};`).replace(/\\n/g, "↵") ?? v
const data = JSON.parse(at("data").textContent, (_, v) => plain(v))  // no text is read as HTML
const {core} = data, rows = Object.values(data.stability)[0] ?? [], last = rows.at(-1)
const show = (v, digits = 4) => typeof v == "number" && v % 1 ? +v.toPrecision(digits) : v ?? "-"
const says = (figure, key = figure.replace(/.*: |_std$/g, "")) =>
  data.says[key] ?? data.says[key.replace(/\\d+/g, "N")] ?? ""
function axis(values, from, to, least) {  // [place of a value, round numbers along the axis]
  const low = Math.min(...values), width = Math.max(...values) - low || 1, round = []
  const unit = 10 ** Math.floor(Math.log10(width)), fits = s => width / unit / s <= 5
  const step = Math.max(least, unit * [0.2, 0.5, 1, 2].find(fits))
  for (let i = Math.ceil(low / step); i * step < low + 1.001 * width; i++) round.push(i * step)
  return [v => from + (to - from) * (0.04 + 0.92 * (v - low) / width), round]
}
function chart(title, xName, yName, series, least = 0) {  // series: {name: [[x, y], ...]}
  const points = Object.values(series).flat(), r = points.length > 99 ? 1 : 4
  const [across, xs] = axis(points.map(p => p[0]), 40, 320, least)
  const [down, ys] = axis(points.map(p => p[1]), 195, 5, 0)
  let key = "", svg = `<text x=180 y=226 text-anchor=middle>${xName}</text>`
  svg += each(xs, x => `<text x=${across(x)} y=210 text-anchor=middle>${show(x, 6)}</text>`)
  svg += each(ys, y => `<path d="M40 ${down(y)}H320" stroke=#ddd></path>
    <text x=34 y=${down(y) + 4} text-anchor=end>${show(y, 6)}</text>`)
  Object.entries(series).forEach(([name, line], i) => {
    const colour = `hsl(${210 + 137 * i},60%,${40 + 12 * (i % 3)}%)`  // far from the one before
    const places = line.map(([x, y]) => [across(x), down(y)])
    svg += `<polyline fill=none stroke=${colour} points="${places.join(" ")}"></polyline>`
    svg += each(places, ([x, y], n) => `<circle cx=${x} cy=${y} r=${r} fill=${colour}>
      <title>${name}: ${xName} ${show(line[n][0])}, ${yName} ${show(line[n][1])}</title></circle>`)
    key += `<nobr style="color:${colour}">■ <small>${name}</small></nobr> &ensp; `
  })
  at("charts").innerHTML += `<figure><b>${title}</b><br><small>${yName}</small>
    <svg viewBox="0 0 325 230">${svg}</svg>${key}</figure>`
}
at("title").innerHTML = `${data.model}, layer ${data.layer}`
at("first").innerHTML = each(data.first, ([name, figure, values]) => {
  const [title, way = "neither way is better"] = name.split(", "), [a, b] = values
  const change = a == null || b == null ? "" : (b > a ? "+" : "") + show(b - a, 3)
  const bar = (v, i) => `<br><progress value=${v ?? 0} max=${Math.max(...values) || 1}></progress>
    ${show(v)} <small>${data.folders[i].split("/").slice(-2).join("/")}</small>`
  return `<div title="${says(figure)}; ${way}"><b>${title}</b> ${change}${each(values, bar)}</div>`
})
if (last) {
  const over = f => rows.map((row, t) => [t, f(row)]), born = {all: over(row => row.core)}
  const l0 = {core: over(row => row.core_l0), rest: over(row => row.l0 - row.core_l0)}, fvu = {}
  for (const b in last.births) born[`born in ${b}`] = over(row => row.births[b] ?? 0)
  for (const g in last.fvu) fvu[`prefix ${g}`] = over(row => row.fvu[g])
  const ce = rows.map((row, t) => [`training ${t}`, [[row.l0, row.ce_recovered]]])
  at("about").innerHTML = `After ${rows.length} trainings of ${show(last.tokens / 1e6, 3)} million
    tokens the core has ${last.core} latents, ${last.kept} of them from the training before; of the
    ${show(last.l0, 3)} latents on at a token ${show(last.core_l0, 3)} are the core's. `
  chart("The core, and who was born when", "training", "latents", born, 1)
  chart("Error by prefix", "training", "FVU, lower is better", fvu, 1)
  chart("Loss recovered", "L0", "CE recovered, higher is better", Object.fromEntries(ce))
  chart("L0 of core and rest", "training", "latents on at a token", l0, 1)
}
at("about").innerHTML += `Measured on ${data.text}.`
if (core) {
  const curve = data.share.map((y, i) => [i + 1, y]), end = curve.length
  chart("Attribution, largest first", "latents of core and prefix 0", "share of all",
    {attribution: curve, "90 %": [[1, 0.9], [end, 0.9]]})
  const bins = data.density.map(d => Math.round(2 * Math.log10(d + 1e-6)) / 2)
  const often = own => [...new Set(bins)].sort((a, b) => a - b).map(bin =>
    [bin, bins.filter((b, i) => b == bin && core.index.includes(i) == own).length])
  chart("How often latents are on", "log10 of the share of tokens", "latents",
    {core: often(true), "rest of prefix 0": often(false)}, 0.5)
  at("cards").innerHTML = each(data.contexts, (contexts, c) => `<article id=latent-${core.index[c]}>
    <b><a href="#latent-${core.index[c]}">latent ${core.index[c]}</a></b><br><small>
    ${show(100 * core.score[c], 3)} % of the core's attribution; on at
    ${show(100 * core.density[c], 3)} % of tokens; born in training ${core.birth[c][0]};
    votes ${core.votes[c]}</small><p>raises ${each(data.raises[c], t => `<kbd>${t}</kbd> `)}</p>` +
    each(contexts, ([words, shades]) => "<p>" + each(words, (word, i) =>
    `<span style="background:rgba(238,102,119,${shades[i]})">${word}</span>`)) + "</article>")
  at("find").oninput = at("by").onchange = () => [...at("cards").children].forEach((card, c) => {
    const by = at("by").value, key = by == "birth" ? core.birth[c][0] : -core[by][c]
    card.style.order = Math.round(1e6 * key)
    card.hidden = !card.textContent.toLowerCase().includes(at("find").value.toLowerCase())
  })
}
for (const metric of new Set(data.all.map(row => row[0].split(": ")[0])))
  at("all").innerHTML += `<details><summary>${metric.replace(/ .*[\\/]/, " ")}</summary><table>` +
    each(data.all.filter(row => row[0].startsWith(metric + ": ")), ([figure, values]) =>
    `<tr><td>${figure.replace(/.*: /, "")}<td>${values.map(v => show(v)).join("<td>")}<td>${
    says(figure)}`) + "</table></details>"
</script></html>
"""


def raised_tokens(model, rows, n=8):
    """The n tokens that directions rows (C, D) raise most: (C, n). The model itself goes from its
    last layer to logits: a final norm or projection has another name in every model."""
    last = model.config.get_text_config().num_hidden_layers - 1
    ids = rows.new_zeros(len(rows), 1).long()
    return edited_logits(model, last, ids, lambda h: rows[:, None].to(h))[:, 0].topk(n).indices


def core_page(model, tokenizer, ids, keep, folder, layer, sae):
    """For the page: attribution's share and density of the candidates (M,), the core's facts, and
    of its 200 strongest latents the tokens they raise and the contexts that raise them."""
    core, _ = load_core(folder / "core.safetensors")
    core.score /= core.score.sum()
    order = core.score.argsort(descending=True)
    core = {name: t[order].tolist() for name, t in vars(core).items() if name != "W_enc"}
    score, density = dmsae.attribute(model, layer, ids, keep, sae.to(model.device))
    share = score.sort(descending=True).values.cumsum(0) / score.sum()
    start = tokenizer("a", add_special_tokens=False)["input_ids"]  # after it no space is lost

    def words(ids):
        decoded = tokenizer.batch_decode([[*start, i] for i in ids.tolist()])
        return [text[len(tokenizer.decode(start)) :] for text in decoded]

    shown, acts, contexts = core["index"][:200], [], []
    for row in bar(ids.to(model.device), "page"):
        x = residual_stream(model, layer, row[None])[0].float()
        pre = F.linear(x - sae.b_dec, sae.W_enc[shown], sae.b_enc[shown])
        acts.append((pre.relu() * (pre > sae.threshold[shown])).cpu())  # (T, shown)
    for fired in (torch.stack(acts) * keep[..., None]).unbind(2):  # (R, T)
        peak, at = fired.max(1)
        contexts.append([])
        for r in peak.argsort(descending=True)[:4].tolist():
            near = slice(max(0, at[r] - 10), at[r] + 11)
            shades = fired[r, near] / peak.max().clamp_min(1e-9)
            contexts[-1].append((words(ids[r, near]), shades.tolist()))
    out = dict(core=core, share=share.tolist(), density=density.tolist(), contexts=contexts)
    return out | dict(raises=[words(row) for row in raised_tokens(model, sae.W_dec[shown])])


def page(report, of_core):
    """The report, and what `core_page` gives or {}, as HTML."""
    lines = re.findall(r"^    ([\w, ]+): (.+)$", Path(__file__).read_text(), re.M)  # of docstrings
    says = {name: text for names, text in lines for name in names.split(", ")}
    data = {key: report[key] for key in ("layer", "text", "stability")}
    data |= dict(says=says, first=headline(report), all=list(every_figure(report).items()))
    data |= dict(model=Path(report["model"]).name, folders=[s["folder"] for s in report["saes"]])
    return PAGE.replace("DATA", json.dumps(data | of_core).replace("<", "\\u003c"))


# ---- The command line ---------------------------------------------------------------------------
METRICS = "core absorption probing tpp scr stability".split()
NEEDED = "model layer ctx batch tokens attribution_tokens device dataset text text_column separator"


def parse(argv=None):
    """Command line -> argparse's namespace; what cannot be read ends with one line."""
    parser = argparse.ArgumentParser("eval.py", allow_abbrev=False)
    parser.error = lambda why: parser.exit(2, f"eval: {why}; --help shows all flags\n")
    add = parser.add_argument
    add("folders", nargs="+", type=Path, help="run folders (first and last SAE) or SAE folders")
    add("--only", nargs="+", choices=METRICS, default=METRICS, help="some of the metrics")
    add("--tokens", type=int, default=1_000_000, help="at most, for a metric (%(default)s)")
    add("--text", help=".txt, .jsonl or .parquet file, in place of what the run held out")
    add("--model", help="hub name or folder, in place of the SAE's own; give --text too")
    add("--device", default="auto", help="cuda, cuda:N or cpu (%(default)s)")
    add("--labelled", nargs="+", default=[], help=".csv or .jsonl files, for probing, tpp and scr")
    add("--columns", nargs="+", default=["text", "label"], help="of --labelled; scr needs a third")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="all for tpp, scr; else the first")
    add("--all", action="store_true", help="print every figure; the JSON always has them")
    add("--html", action="store_true", help="also write a page with charts and the core's latents")
    add("--out", type=Path, help="JSON file (FOLDER/eval.json); nothing is overwritten")
    args = parser.parse_args(argv)
    if len(args.columns) < 2 or args.tokens < 1 or min(args.seeds) < 0:
        parser.error("--columns: two or three names; --tokens: 1 or above; --seeds: 0 or above")
    return args


def unit_rows(sae):
    """The same function with decoder rows of unit norm, in place."""
    norm = sae.requires_grad_(False).W_dec.norm(dim=1).clamp_min(1e-8)
    sae.W_dec /= norm[:, None]
    for t in sae.W_enc.T, sae.b_enc, sae.threshold:
        t *= norm
    return sae


def read_cfg(folder):
    """From an SAE's cfg.json, in dmsae.py's names: its layer, and how it was trained. BadInput"""
    with refusing(f"{folder}: is no SAE folder"):
        cfg = read_json(folder / "cfg.json")
        cfg |= cfg.get("metadata") or {}  # older SAELens has all at the top
        hook = re.fullmatch(r"blocks\.(\d+)\.hook_resid_(post|pre)", str(cfg["hook_name"]))
    if not hook or hook[0] == "blocks.0.hook_resid_pre":
        raise BadInput(f"{folder}: {cfg['hook_name']}: hook_name must be blocks.N.hook_resid_post")
    known = dict(model=cfg.get("model_name"), ctx=cfg.get("context_size"))
    known |= dict(dataset=cfg.get("dataset_path")) | (cfg.get("config") or {})
    for name in "model", "text":  # a relative path began where dmsae.py was started
        places = [base / str(known.get(name)) for base in (Path(), *folder.resolve().parents)]
        known[name] = next((str(p.resolve()) for p in places if p.exists()), known.get(name))
    return known | dict(layer=int(hook[1]) - (hook[2] == "pre"))


def load(args):
    """[(folder, layer, SAE)]; the Config of the first, as far as its cfg.json says; and the run
    folder whose held-out text is measured on, or None. BadInput"""
    trained = [cycles(folder) or [folder] for folder in args.folders]
    cfgs = {folder: read_cfg(folder) for t in trained for folder in (t[0], t[-1])}
    models = {args.model or cfg["model"] for cfg in cfgs.values()}
    if len(models) > 1 or None in models:
        raise BadInput(f"{trained[0][0]}: SAEs of models {models}: name one by --model")
    known, home = cfgs[trained[0][0]], trained[0][0].parent
    if args.text or args.model or not (home / "tokens.bin").exists():
        home = None
        known |= dict(batch=1, tokens=args.tokens, attribution_tokens=1)
    else:
        known |= dict(text=None, dataset=f"{home}/tokens.bin")
    if args.text:
        known |= dict(text=args.text, separator=None, text_column=None)
    known |= dict(model=models.pop(), device=args.device)
    known["layer"] = max(cfg["layer"] for cfg in cfgs.values())  # where this one is, all are
    cfg = Config(**{name: known[name] for name in NEEDED.split() if known.get(name) is not None})
    dmsae.check(cfg)
    saes = [(f, c["layer"], unit_rows(load_sae(f))) for f, c in cfgs.items()]
    return saes, cfg, home


def open_inputs(args, saes, cfg, home):
    """All that is measured with: model, tokenizer, contexts ids and keep (R, T), {labelled file:
    (texts, labels, spurious)}; and a line that says what the text is. BadInput"""
    words = args.columns, args.tokens // 128, args.seeds[0]
    texts = {file: labelled(read_rows(file), *words) for file in args.labelled}
    model, tokenizer, _ = dmsae.load_model(cfg)
    width, widths = model.config.get_text_config().hidden_size, {len(s.b_dec) for *_, s in saes}
    if widths != {width}:
        raise BadInput(f"--model {cfg.model}: is of width {width}, the SAEs are of {widths}")
    with tempfile.TemporaryDirectory() as scratch:
        text = dmsae.open_text(cfg, model, tokenizer, home or scratch)
        most = text.n_eval if home else len(text.rows)
        ids, keep = text.contexts(slice(min(most, max(1, args.tokens // cfg.ctx))))
    source = "held out by the run" if home else f"first of {Path(cfg.text or cfg.dataset).name}"
    about = f"{ids.numel():,} tokens in contexts of {cfg.ctx}, {source}"
    return (model, tokenizer, ids, keep, texts), about


def free_path(args):
    """Where the JSON goes, and beside it the page; nothing is overwritten. BadInput"""
    first = path = Path(f"{args.out or args.folders[0] / 'eval'}".removesuffix(".json") + ".json")
    number = itertools.count(2)
    while path.exists() or path.with_suffix(".html").exists():
        path = first.with_stem(f"{first.stem}-{next(number)}")
    if not os.access(path.parent, os.W_OK):
        raise BadInput(f"--out {path}: must be in a folder that exists and can be written")
    return path


def no_labels():
    """In place of a metric of labelled texts, where none are given. CannotRun"""
    raise CannotRun("it needs labelled texts: --labelled FILE.csv with columns text and label")


def measures(args, model, tokenizer, ids, keep, texts, folder, layer, sae):
    """(name, function, its arguments) of each metric of an SAE."""
    at, seed = (model, layer), args.seeds[0]
    sae.to(model.device)  # one at a time: of Gemma's size each takes 1.2 GB
    yield "core", core_metrics, *at, ids, keep, sae
    n_words = max(100, args.tokens // 120)  # of about 100 tokens, and a fifth is read twice
    yield "absorption", absorption, *at, tokenizer, sae, n_words, seed
    for kind in ("probing", "tpp", "scr") if not texts else ():
        yield kind, no_labels
    for file, (some, labels, spurious) in texts.items():
        X, A = pooled(*at, tokenizer, sae, some, min(128, ids.shape[1]))
        yield f"probing {file}", sparse_probing, X, A, labels, seed
        yield f"tpp {file}", tpp, X, A, labels, sae.W_dec, args.seeds
        yield f"scr {file}", scr, X, A, labels, spurious, sae.W_dec, args.seeds
    yield "stability", stability, folder
    sae.cpu()


def run(args):
    """Load, measure, print, write."""
    saes, cfg, home = load(args)
    path = free_path(args)
    report = dict(model=cfg.model, layer=saes[0][1], saes=[], stability={}, agreement={})
    report["arguments"] = {name: str(value) for name, value in vars(args).items()}
    inputs, report["text"] = open_inputs(args, saes, cfg, home)
    if "stability" in args.only:
        runs = dict.fromkeys(folder.parent for folder, *_ in saes if cycles(folder.parent))
        report["stability"] = {str(run): [*map(stability, cycles(run))] for run in runs}
        for a, b in itertools.combinations(runs, 2):
            report["agreement"][f"{a} and {b}"] = agreement(a, b, args.seeds[0])
    for folder, layer, sae in saes:
        figures = {}
        report["saes"].append(dict(folder=str(folder), layer=layer, metrics=figures))
        for name, metric, *words in measures(args, *inputs, folder, layer, sae):
            if name.split()[0] in args.only:
                try:
                    figures[name] = metric(*words)
                except CannotRun as why:
                    figures[name] = dict(cannot_run=str(why))
                dmsae.write_json(report, path)
    print(*table(report, args.all), f"written: {path}", sep="\n")
    if args.html:
        last = [sae for sae in saes if sae[0].parent == saes[0][0].parent][-1]  # of the first run
        of_core = core_page(*inputs[:4], *last) if (last[0] / "core.safetensors").exists() else {}
        path.with_suffix(".html").write_text(page(report, of_core))


if __name__ == "__main__":
    sys.exit(dmsae.main(name="eval", parse=parse, work=run))
