"""SAEBench's metrics, light and exact, for the SAEs that dmsae.py writes and for any SAELens `jumprelu` folder.

    python eval.py runs/gemma-2-2b_k64_seed0                         its plain SAE and its last one, side by side
    python eval.py runs/seed0 runs/seed1/cycle3 --labelled news.csv --ravel facts.json --html

Each metric is a function of a language model, an SAE and data that returns a dict; what cannot be had says why. Definitions: SAEBench
0.6.0 (Karvonen et al. 2025, arXiv 2503.09532), unless a docstring differs. Shapes as in dmsae.py; also n words or texts, P probes.
"""

import argparse
import html
import json
import os
import re
import sys
import tempfile
from collections import Counter
from dataclasses import fields, replace
from functools import cache
from itertools import chain, combinations, islice, product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from dmsae import (
    BadInput,
    Config,
    candidates,
    check,
    generator,
    load_core,
    load_model,
    load_sae,
    main,
    model_config,
    need,
    open_text,
    progress,
    residual_stream,
    spliced,
    write_text,
)


class CannotRun(Exception):
    """Why a metric has no value here."""


def mean_of(rows, keys, std=False):
    """Means of keys over rows (dicts); std: also their sample standard deviation, which a single row has not."""
    kinds = {"": np.mean} | (
        {"_std": lambda v: np.std(v, ddof=1) if len(v) > 1 else None} if std else {}
    )
    return {key + end: kind([r[key] for r in rows]) for key in keys for end, kind in kinds.items()}


@torch.enable_grad()
def descend(optimiser, batches, loss):
    """A step of the optimiser for each batch of indices."""
    for at in batches:
        optimiser.zero_grad()
        loss(at).backward()
        optimiser.step()


def logistic_regression(x, y, balanced=False):
    """scikit-learn's L2 logistic regression, C = 1, by LBFGS in float64; balanced: classes weigh alike. x (n, d), y (n,) bool -> w (d,), b ()"""
    given, x, y = x, x.double(), y.double()
    weight = (
        torch.where(y > 0, len(y) / 2 / y.sum(), len(y) / 2 / (1 - y).sum()) if balanced else None
    )
    wb = x.new_zeros(x.shape[1] + 1, requires_grad=True)

    def objective():
        wb.grad = None
        loss = (
            F.binary_cross_entropy_with_logits(x @ wb[:-1] + wb[-1], y, weight, reduction="sum")
            + wb[:-1].pow(2).sum() / 2
        )
        loss.backward()
        return loss

    torch.optim.LBFGS([wb], max_iter=500, tolerance_grad=1e-5, line_search_fn="strong_wolfe").step(
        objective
    )
    return wb.detach()[:-1].to(given), wb.detach()[-1].to(given)


def train_letter_probes(x, y, batch, weight_decay, l1=0.0, seed=0):
    """A linear one-vs-rest probe for each letter: BCE with pos_weight negatives / positives plus l1 * mean over letters of
    |w|_1; Adam, 50 epochs, rate 1e-2 falling exponentially to 1e-5. x (n, d), y (n,) in 0..25 -> W (26, d), b (26,)"""
    rng, target = generator(seed, "letters"), F.one_hot(y, 26).float()
    (W, b), rare = (
        (x.new_zeros(shape, requires_grad=True) for shape in ((26, x.shape[1]), 26)),
        len(y) / target.sum(0).clamp_min(1) - 1,
    )
    adam = torch.optim.Adam([W, b], weight_decay=weight_decay)
    for epoch in range(50):
        adam.param_groups[0]["lr"] = 1e-2 * 1e-3 ** (epoch / 49)
        descend(
            adam,
            torch.randperm(len(x), generator=rng).to(x.device).split(batch),
            lambda at: (
                l1 * W.abs().sum(1).mean()
                + F.binary_cross_entropy_with_logits(
                    F.linear(x[at], W, b), target[at], pos_weight=rare
                )
            ),
        )
    return W.detach(), b.detach()


def train_probes(x, train, test, seed=0):
    """P linear probes at once, SAEBench's for TPP and SCR: BCE + 1e-3 |w|_1, AdamW 1e-3, batch 16, 20 epochs, the epoch of best test
    accuracy kept. x (n, D); train (P, 2, m), test (P, 2, m'): indices of x, positives first. -> W (P, D), b (P,)"""
    rng, P, m, epochs = generator(seed, "probes"), len(train), train.shape[2], []
    train, y = train.flatten(1), (torch.arange(2 * m, device=x.device) < m).float().expand(P, -1)
    W, b = (x.new_zeros(P, width, requires_grad=True) for width in (x.shape[1], 1))
    adam = torch.optim.AdamW([W, b], lr=1e-3)
    for _ in range(20):
        descend(
            adam,
            torch.randperm(2 * m, generator=rng).to(x.device).split(16),
            lambda at: (
                1e-3 * W.abs().sum()
                + P
                * F.binary_cross_entropy_with_logits(
                    torch.einsum("pbd,pd->pb", x[train[:, at]], W) + b, y[:, at]
                )
            ),
        )
        epochs.append(torch.cat([W, b], 1).detach())  # (P, D + 1)
    kept = torch.stack(epochs)[
        torch.stack([accuracy(x, test, e[:, :-1], e[:, -1]) for e in epochs]).argmax(0),
        torch.arange(P),
    ]
    return kept[:, :-1], kept[:, -1]


def accuracy(x, test, W, b, change=0):
    """Test accuracy (P,) of P probes W (P, D), b (P,), each on its own rows test (P, 2, m) of x (n, D), positives first; change adds to logits."""
    logits = torch.einsum("pymd,pd->pym", x[test], W) + b[:, None, None] + change
    return ((logits > 0) == torch.tensor([[True], [False]], device=x.device)).float().mean((1, 2))


# ---- Core: what the language model loses, what the reconstruction loses, how sparse it is ------------------------------
def next_token_sums(logits, reference, ids, keep):
    """Sums over kept positions of the next-token loss and of KL(reference || logits), in nats. logits, reference (b, T, V);
    ids, keep (b, T). A few positions at a time: Gemma has 256,000 logits a token."""
    (_, T, V), ce, kl = logits.shape, 0.0, 0.0
    for at in (
        keep.flatten().nonzero()[:, 0].split(max(1, 2**25 // V))
    ):  # 128 MiB of float32 a tensor
        q, p = (t.flatten(0, 1)[at].float().log_softmax(-1) for t in (logits, reference))
        ce += F.nll_loss(
            q[at % T < T - 1], ids.flatten()[at[at % T < T - 1] + 1], reduction="sum"
        ).item()  # the last position has no next
        kl += F.kl_div(q, p, reduction="sum", log_target=True).item()
    return ce, kl


@torch.no_grad()
def core_metrics(model, layer, text, ids, sae):
    """Every scalar of SAEBench's core evaluation on contexts ids (R, ctx), and under "prefixes" most of them for the core alone (without one:
    b_dec) and each prefix. explained_variance is about the mean; _legacy averages per-token ratios (the papers'); _0_6_0 is about zero
    (SAEBench 0.6.0); mse is per element, mse_saebench SAEBench's. BOS, EOS, PAD keep their residual; the ablation zeroes all positions."""
    s, (d_sae, D), widths = {}, sae.W_enc.shape, [sae.n_core, *sae.widths]
    edges, G, square = (
        torch.tensor(widths, device=model.device),
        len(widths),
        lambda t: t.pow(2).sum(-1),
    )
    add = lambda **terms: s.update(
        {name: s.get(name, 0) + torch.as_tensor(t).cpu().double() for name, t in terms.items()}
    )

    def run(edit):
        with spliced(model, layer, edit):
            return model(b, use_cache=False).logits  # (b, T, V)

    for b in progress(
        "core", ids.to(model.device).split(max(1, 2048 // ids.shape[1]))
    ):  # SAEBench's batch: 16 x 128 tokens
        keep, h = text.keep(b), []
        original = run(lambda out: h.append(out) or out)
        x = h[0][keep].float()  # (B, D)
        x_hats, col, value = sae.reconstruct(x)  # (B, G - 1, D), (n,), (n,)
        x_hats = torch.cat([sae.decode(sae.encode(x, sae.n_core))[:, None], x_hats], 1)  # (B, G, D)
        group = torch.bucketize(col, edges, right=True)
        r2, xx, yy, xy = (
            square(x[:, None] - x_hats),
            square(x)[:, None],
            square(x_hats),
            (x[:, None] * x_hats).sum(-1),
        )
        add(
            tokens=len(x),
            sources=keep[:, :-1].sum(),
            batches=1,
            x=x.sum(0),
            xx=xx.sum(),
            norm_in=xx.sqrt().sum(),
            r2=r2.sum(0),
            mse=r2.mean(0),
            norm_out=yy.sqrt().sum(0),
            legacy=(1 - r2 / square(x - x.mean(0))[:, None]).sum(0),
            cossim=F.cosine_similarity(x[:, None], x_hats, -1).sum(0),
            ratio=(yy / xx).sqrt().sum(0),
            bias=yy.mean(0) / xy.mean(0),
            l0=torch.bincount(group, minlength=G),
            l1=torch.bincount(group, value, G),
            fired=torch.bincount(col, minlength=d_sae),
        )
        edits = [
            torch.zeros_like,
            *(
                lambda h, y=y: h.masked_scatter(keep[..., None], y.to(h.dtype))
                for y in x_hats.unbind(1)
            ),
        ]
        add(
            behaviour=[
                next_token_sums(logits, original, b, keep)
                for logits in chain([original], map(run, edits))
            ]
        )
    n, (ce, kl) = (
        s["tokens"],
        (s["behaviour"] / torch.stack([s["sources"], s["tokens"]])).T,
    )  # (2 + G,) each: original, ablated, prefixes
    second_moment, variance, density = (
        s["xx"] / n,
        s["xx"] - square(s["x"]) / n,
        s["fired"] / n,
    )  # density (F,)
    nearest = lambda rows: torch.cat(
        [(part @ rows.T).topk(2).values[:, 1] for part in rows.split(4096)]
    ).mean()  # the largest is its own
    per = dict(  # (G,) each
        ce_loss_score=(ce[1] - ce[2:]) / (ce[1] - ce[0]),
        ce_loss_with_sae=ce[2:],
        kl_div_score=(kl[1] - kl[2:]) / kl[1],
        kl_div_with_sae=kl[2:],
        explained_variance=1 - s["r2"] / variance,
        explained_variance_legacy=s["legacy"] / n,
        explained_variance_0_6_0=1 - s["r2"] / n / (second_moment - (second_moment / D) ** 2),
        fvu=s["r2"] / variance,
        mse=s["r2"] / n / D,
        mse_saebench=s["mse"] / n,
        cossim=s["cossim"] / n,
        l0=s["l0"].cumsum(0) / n,
        l1=s["l1"].cumsum(0) / n,
        l2_norm_out=s["norm_out"] / n,
        l2_ratio=s["ratio"] / n,
        relative_reconstruction_bias=s["bias"] / s["batches"],
    )
    whole = {name: v[-1] for name, v in per.items()} | dict(
        core_l0=per["l0"][0],
        non_core_l0=per["l0"][-1] - per["l0"][0],
        ce_loss_without_sae=ce[0],
        ce_loss_with_ablation=ce[1],
        kl_div_with_ablation=kl[1],
        l2_norm_in=s["norm_in"] / n,
        frac_alive=(density > 0).double().mean(),
        **{f"freq_over_{p}_percent": (density > p / 100).double().mean() for p in (1, 10)},
        **{
            f"normalized_freq_over_{p}_percent": density[density > p / 100].sum() / density.sum()
            for p in (1, 10)
        },
        average_max_encoder_cosine_sim=nearest(F.normalize(sae.W_enc)),
        average_max_decoder_cosine_sim=nearest(F.normalize(sae.W_dec)),
    )
    plain = lambda figures: {
        name: float(v) if v.isfinite() else None for name, v in figures.items()
    }
    prefixes = [
        dict(
            prefix=f"prefix {g - 1}" if g else "core only",
            width=w,
            **plain({k: v[g] for k, v in per.items()}),
        )
        for g, w in enumerate(widths)
    ]
    return plain(whole) | dict(tokens=int(n), contexts=len(ids), prefixes=prefixes)


# ---- First-letter absorption: does a latent for "starts with s" stay silent where a latent for one s-word fires? -------
def residuals_at(model, layer, prompts, at, fill):
    """Residual stream of prompts (lists of ids), padded with `fill` on the right, at one position each, at (n,): (n, D)"""
    limit, x = getattr(model.config.get_text_config(), "max_position_embeddings", 10**9), []
    need(
        max(map(len, prompts)) <= limit,
        f"a prompt of {max(map(len, prompts))} tokens is longer than the model's contexts of {limit}",
        CannotRun,
    )
    for i in progress("prompts", range(0, len(prompts), 64)):
        ids = pad_sequence([torch.tensor(p) for p in prompts[i : i + 64]], True, fill).to(
            model.device
        )
        x.append(residual_stream(model, layer, ids)[torch.arange(len(ids)), at[i : i + 64]].float())
    return torch.cat(x)


def letter_task(model, layer, tokenizer, bos, budget=10**6, seed=0):
    """x_train (n, D), y_train (n,), x_test (m, D), y_test (m,), x_fresh (m, D), probe W (26, D), b (26,): residuals at the word in "\\n" + 10
    lines "{example} has the first letter: X" + "{word} has the first letter:", the test words in two prompts each; letters. CannotRun."""
    rng, tokens = (
        np.random.default_rng(seed),
        enumerate(tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))),
    )
    letter = {
        i: ord(t.lstrip(" ▁Ġ")[0].upper()) - 65
        for i, t in tokens
        if t and re.fullmatch("[ ▁Ġ]?[a-zA-Z]+", t)
    }
    need(
        len(letter) >= 100,
        f"the vocabulary has {len(letter)} words of letters only; 100 are needed",
        CannotRun,
    )
    words = rng.permutation(list(letter))[
        : max(100, budget // 120)
    ]  # a prompt has about 100 tokens, a fifth are read twice
    train, test = words[: int(0.8 * len(words))], words[int(0.8 * len(words)) :]
    after = lambda s: tokenizer("a" + s, add_special_tokens=False)["input_ids"][
        len(tokenizer("a", add_special_tokens=False)["input_ids"]) :
    ]
    newline, tail, *answer = map(
        after, ("\n", " has the first letter:", *(f" {chr(65 + c)}" for c in range(26)))
    )

    def read(words, pool):
        prompts = []
        for word in words.tolist():
            examples = [e for e in rng.choice(pool, 11, replace=False).tolist() if e != word][:10]
            prompts.append(
                [
                    bos,
                    *newline,
                    *(i for e in examples for i in (e, *tail, *answer[letter[e]], *newline)),
                    word,
                    *tail,
                ]
            )
        return residuals_at(
            model, layer, prompts, torch.tensor([len(p) - 1 - len(tail) for p in prompts]), bos
        )

    x, y, z = (
        read(train, train),
        *(
            torch.tensor([letter[w] for w in at.tolist()], device=model.device)
            for at in (train, test)
        ),
    )
    return (
        x,
        y,
        read(test, test),
        z,
        read(test, words),
        *train_letter_probes(x, y, 64, 1e-4, seed=seed),
    )


def absorption_scores(f, x, W_dec, w, main):
    """For n words of one letter: full absorption (bool), and the absorbed fraction by SAEBench 0.6.0 and by 0.3.2 (published).
    f (n, F) activations, x (n, D) residuals, w (D,) the letter's probe, main: indices of its main latents. -> (n,) each"""
    c = F.normalize(W_dec) @ (u := F.normalize(w, dim=0))  # (F,)
    p, A, m = (
        f * c,
        x @ u,
        (f * c)[:, main].sum(1),
    )  # p (n, F): each latent's share of the projection A (n,); m: the main ones'
    top, at = p.max(1)
    full = (f[:, main] < 1e-8).all(1) & (c[at] >= 0.025) & (A > 0) & (top >= 0.4 * A)
    t = (
        (p * (c >= 0.1).index_fill(0, main, False))
        .clamp_min(0)
        .topk(min(3, len(c)), 1)
        .values.sum(1)
    )
    b, s = torch.minimum(t, A - m), p.sum(1)
    now = torch.where((m >= A) | (A <= 0) | (t < 0.4 * A), 0, torch.where(m <= 0, 1, b / (b + m)))
    return full, now, torch.where((m >= A) | (s <= 0), 0, ((s - m) / s).clamp(0, 1))


@torch.no_grad()
def absorption(task, sae, min_f1=0.6, min_letters=20, seed=0):
    """First-letter absorption (Chanin et al. 2024); lower is better. Letters count where the residual's probe has F1 > min_f1 (fraction_0_3_2:
    all, as published). Main latents: an L1 probe's k largest weights, where a larger k must add 0.03 to a regression's F1. CannotRun."""
    x_train, y_train, x_test, y_test, x_fresh, probe, bias = task
    logits, is_letter, rows = (
        F.linear(x_test, probe, bias),
        F.one_hot(y_test, 26).bool(),
        [],
    )  # (m, 26)
    f1 = lambda positive, y: 2 * (positive & y).sum(0) / (positive.sum(0) + y.sum(0)).clamp_min(1)
    score = f1(logits > 0, is_letter)  # (26,)
    failed = (
        ", ".join(
            f"{chr(97 + c)} {score[c]:.2f}" for c in (score <= min_f1).nonzero()[:, 0].tolist()
        )
        or "none"
    )
    need(
        (score > min_f1).sum() >= min_letters,
        f"the layer's probe reads {(score > min_f1).sum()} of 26 first letters with F1 > {min_f1}, "
        f"--min-letters {min_letters} are asked for; F1 of the others: {failed}",
        CannotRun,
    )
    f_train, f_test, f_fresh = (
        torch.cat([sae.encode(part) for part in x.split(2048)]) for x in (x_train, x_test, x_fresh)
    )
    active = (f_train > 0).any(0).nonzero()[:, 0]  # a latent that never fires is no letter's
    need(len(active), "no latent fires on any word", CannotRun)
    W, _ = train_letter_probes(
        f_train[:, active], y_train, 4096, 1e-6, l1=0.01, seed=seed
    )  # (26, active)
    for c in progress("absorption", range(26)):
        order, best, main = active[W[c].argsort(descending=True)], -1.0, None
        for k in range(1, 11):
            w, b = logistic_regression(f_train[:, order[:k]], y_train == c, balanced=True)
            now = f1(f_test[:, order[:k]] @ w + b > 0, is_letter[:, c]).item()
            if now <= best + 0.03:
                break
            best, main = now, order[:k]
        hit = is_letter[:, c] & (logits[:, c] > 0)
        if hit.any():
            full, now, published = (
                v.float()
                for v in absorption_scores(f_fresh[hit], x_fresh[hit], sae.W_dec, probe[c], main)
            )
            rows.append(
                dict(
                    first_letter=chr(97 + c),
                    probe_f1=score[c].item(),
                    num_probe_true_positives=len(full),
                    main_f1=best,
                    full_absorption_rate=full.mean().item(),
                    num_full_absorption=int(full.sum()),
                    num_split_features=len(main),
                    fraction_0_6_0=now.mean().item(),
                    fraction_0_3_2=published.mean().item(),
                    main_latents=main.tolist(),
                )
            )
    good, keys = (
        [r for r in rows if r["probe_f1"] > min_f1],
        ["full_absorption_rate", "fraction_0_6_0", "num_split_features"],
    )
    return (
        mean_of(good, keys, std=True)
        | mean_of(rows, ["fraction_0_3_2"])
        | dict(
            letters=len(good),
            failed_letters=failed,
            train_words=len(y_train),
            test_words=len(y_test),
            details=rows,
        )
    )


# ---- Labelled texts: sparse probing, TPP, SCR --------------------------------------------------------------------------
HUB = {
    "fancyzhx/ag_news": (
        ("text", "label"),
        None,
    ),  # the two of SAEBench's eight sets that `datasets` reads by itself
    "LabHC/bias_in_bios": (("hard_text", "profession", "gender"), (0, 1, 2, 6, 9)),
}


def labelled(source, columns=("text", "label"), only=None, budget=10**4, seed=0):
    """(texts, labels, spurious labels or None), n each, from a .csv or .jsonl file (or BadInput) or the first 20,000 rows of a hub dataset
    (or CannotRun); only: labels to take. At most 2500 a class (SAEBench: 2000 + 500), about `budget` in all, no class below 10."""
    from datasets import load_dataset

    (text, label, spurious), kind = (
        [*columns, *("label", "spurious")[len(columns) - 1 :]][:3],
        source not in HUB and {".jsonl": "json"}.get(source[-6:], "csv"),
    )
    raw = {"csv": dict(converters=dict.fromkeys((text, label, spurious), str))}.get(
        kind, {}
    )  # without it an empty label would turn 1 into 1.0
    try:
        rows = load_dataset(
            kind or source,
            data_files=source if kind else None,
            split="train",
            streaming=True,
            **raw,
        )
        rows = list(
            islice((r for r in rows if only is None or r[label] in only), None if kind else 20_000)
        )
    except Exception as e:  # datasets, fsspec and pandas raise a dozen unrelated types
        raise (BadInput if kind else CannotRun)(
            f"{source}: cannot be read ({type(e).__name__}: {e}); --labelled FILE.csv works"
        ) from None
    need(
        rows and {text, label, *columns} <= rows[0].keys(),
        f"{source}: has only {', '.join(rows[0]) if rows else 'no rows'}, not {', '.join(columns)}; try --columns text label",
    )
    rows = [
        rows[i]
        for i in np.random.default_rng(seed).permutation(len(rows))
        if not {rows[i].get(key, 0) for key in (text, label, spurious)} & {None, ""}
    ]
    classes = [c for c, n in Counter(str(r[label]) for r in rows).items() if n >= 10]
    need(
        len(classes) > 1,
        f"{source}: column {label} has {len(classes)} classes of 10 texts or more; two are needed",
    )
    rows = [
        r
        for c in classes
        for r in [r for r in rows if str(r[label]) == c][
            : min(2500, max(10, budget // len(classes)))
        ]
    ]
    return [str(r[text]) for r in rows], *(
        np.array([str(r[key]) for r in rows]) if key in rows[0] else None
        for key in (label, spurious)
    )


@torch.no_grad()
def pooled(model, layer, tokenizer, text, sae, texts, ctx=128):
    """Mean over each text's kept tokens of residual and latents: X (n, D), A (n, F). why TPP and SCR need no more: zeroing latents, the
    SAE's error kept, moves X by exactly -A W_dec of these. (SAEBench also encodes masked positions, as zeros; not here.)"""
    X, A, d_sae = [], [], len(sae.W_enc)
    for i in progress("texts", range(0, len(texts), 32)):
        rows = tokenizer(texts[i : i + 32], add_special_tokens=False, verbose=False)["input_ids"]
        ids = pad_sequence(
            [torch.tensor([text.bos, *r[: ctx - 1]]) for r in rows], True, text.bos
        ).to(model.device)
        keep = text.keep(ids)
        n, doc = (
            keep.sum(1, keepdim=True).clamp_min(1),
            keep.nonzero()[:, 0],
        )  # doc (B,): which text a token is of
        x = residual_stream(model, layer, ids)[keep].float()  # (B, D)
        value, row, col = candidates(x - sae.b_dec, sae.W_enc, sae.b_enc, sae.threshold)
        A.append(
            x.new_zeros(len(rows) * d_sae)
            .index_add_(0, doc[row] * d_sae + col, value)
            .view(-1, d_sae)
            / n
        )
        X.append(x.new_zeros(len(rows), x.shape[1]).index_add_(0, doc, x) / n)
    return torch.cat(X), torch.cat(A)


def one_vs_rest(labels, seed=0):
    """[(train (2, m), test (2, m'))] for each class in sorted order: indices of texts, positives first; as many others, in equal shares; 80/20."""
    rng = np.random.default_rng(seed)

    def task(c, part):
        rest = rng.permutation(
            np.concatenate(
                [at[: -(-len(part[c]) // (len(part) - 1))] for o, at in enumerate(part) if o != c]
            )
        )
        return torch.from_numpy(np.stack([part[c][: len(rest)], rest[: len(part[c])]]))

    parts = list(
        zip(
            *(
                np.split(
                    rng.permutation(np.flatnonzero(labels == c)), [int(0.8 * sum(labels == c))]
                )
                for c in sorted(set(labels))
            )
        )
    )
    return [tuple(task(c, part) for part in parts) for c in range(len(parts[0]))]


def sparse_probing(X, A, labels, seed=0, ks=(1, 2, 5)):
    """Test accuracy (chance 0.5), mean over classes, of logistic regression on the k latents (sae) or residual channels (llm) of largest
    difference of class means, and on all (SAEBench there: the best test epoch of AdamW). X (n, D), A (n, F), labels (n,)"""
    rows = []
    for c, (train, test) in zip(
        sorted(set(labels)), progress("probing", one_vs_rest(labels, seed))
    ):
        rows.append(dict(label=c, train=train.numel(), test=test.numel()))
        y, here = (
            torch.arange(train.numel(), device=X.device) < train.shape[1],
            torch.arange(test.numel()).view(1, 2, -1),
        )
        for name, data in ("sae", A), ("llm", X):
            order = (data[train[0]].mean(0) - data[train[1]].mean(0)).abs().argsort(descending=True)
            seen = (
                (data[train.flatten()] != 0).any(0).nonzero()[:, 0]
            )  # a latent that never fires has no weight
            for key, at in (*((f"top_{k}_", order[:k]) for k in ks), ("", seen)):
                w, b = logistic_regression(data[train.flatten()][:, at], y)
                rows[-1][f"{name}_{key}test_accuracy"] = accuracy(
                    data[test.flatten()][:, at], here, w[None], b[None]
                ).item()
    return mean_of(rows, [key for key in rows[0] if key.endswith("accuracy")]) | dict(
        texts=len(labels), details=rows
    )


def drops(X, A, W_dec, test, W, b, effect, ns=(2, 5, 10, 20, 50, 100, 500)):
    """{n: (P,)} loss of test accuracy of probes W (P, D), b (P,) when the n latents of the largest positive effects (F,) are zeroed on
    every token, the SAE's error kept; SAEBench's main n is 20. X (n, D), A (n, F), test (P, 2, m)"""
    value, at = effect.topk(min(max(ns), len(effect)))
    gone = lambda at: -torch.einsum("pymn,pn->pym", A[test[..., None], at], W @ W_dec[at].T)
    return {
        n: accuracy(X, test, W, b) - accuracy(X, test, W, b, gone(at[:n][value[:n] > 0]))
        for n in ns
    }


def tpp(X, A, labels, W_dec, seeds=(0, 1, 2)):
    """Targeted probe perturbation: how much more the ablation of a class's n latents costs its own probe than the others'.
    Mean over classes, then over seeds, each with its own split and probes. X (n, D), A (n, F), labels (n,), W_dec (F, D)."""
    rows = []
    for seed in progress("tpp", seeds):
        train, test = (
            torch.stack([t[:, : min(u.shape[1] for u in part)] for t in part]).to(X.device)
            for part in zip(*one_vs_rest(labels, seed))
        )
        W, b = train_probes(X, train, test, seed)
        rows.append(
            dict(
                seed=seed,
                probe_accuracy=accuracy(X, test, W, b).mean().item(),
                train=train[0].numel(),
                test=test[0].numel(),
            )
        )
        lost = [
            drops(X, A, W_dec, test, W, b, (A[p].mean(0) - A[q].mean(0)).clamp_min(0) * (W_dec @ w))
            for (p, q), w in zip(train, W)
        ]
        for n in lost[0]:
            drop, K = (
                torch.stack([d[n] for d in lost]),
                len(W),
            )  # (K, K): the latents of a row's class, the probe of a column's
            own, others = (
                drop.diagonal().mean().item(),
                (drop.sum() - drop.trace()).item() / (K * (K - 1)),
            )
            rows[-1] |= {
                f"tpp_threshold_{n}_{key}": v
                for key, v in zip(
                    ("total_metric", "intended", "unintended"), (own - others, own, others)
                )
            }
    return mean_of(
        rows, [key for key in rows[0] if "total" in key or "accuracy" in key], std=True
    ) | dict(seeds=len(rows), details=rows)


def scr(X, A, labels, spurious, W_dec, seeds=(0, 1, 2), max_pairs=4):
    """Spurious correlation removal. A biased probe learns class a against b where a always has spurious value u, b has v. dir1 ablates the
    spurious label's n latents and scores it on balanced a and b: (ablated - biased) / (oracle - biased), or 0 where the oracle is
    < 0.001 better; dir2 the reverse. scr_metric: the direction of lower biased accuracy; mean over class pairs, then seeds."""
    need(
        spurious is not None,
        "no spurious label: SCR needs a third column, for example --columns text label gender",
        CannotRun,
    )
    values, classes, rows = sorted(set(spurious)), sorted(set(labels)), []
    need(
        len(values) == 2, f"the spurious column has {len(values)} values; SCR needs two", CannotRun
    )
    cells = {
        (c, v): np.flatnonzero((labels == c) & (spurious == v)) for c in classes for v in values
    }
    size = {
        pair: min(len(cells[cell]) for cell in product(pair, values))
        for pair in combinations(classes, 2)
    }
    pairs = sorted((p for p in size if size[p] >= 20), key=lambda p: -size[p])[:max_pairs]
    need(pairs, "no two classes have 20 texts with either value of the spurious label", CannotRun)

    def tasks(
        Q,
    ):  # text indices (2 classes, 2 values, n) -> (3, 2, m): by class, by spurious label, biased
        h = Q.shape[2] // 2
        return torch.stack(
            [
                Q[..., :h].flatten(1),
                Q.transpose(0, 1)[..., :h].flatten(1),
                torch.stack([Q[0, 0], Q[1, 1]])[:, : 2 * h],
            ]
        )

    for seed, pair in progress("scr", list(product(seeds, pairs))):
        rng, n = np.random.default_rng(seed), int(0.8 * size[pair])
        Q = np.array([[rng.permutation(cells[c, v])[: size[pair]] for v in values] for c in pair])
        train, test = (tasks(torch.tensor(part, device=X.device)) for part in np.split(Q, [n], 2))
        W, b = train_probes(X, train, test, seed)
        oracle, biased = (
            accuracy(X, test, W, b),
            accuracy(X, test[:2], W[[2, 2]], b[[2, 2]]),
        )  # (3,), (2,)
        rows.append(
            dict(
                seed=seed,
                pair=pair,
                biased_accuracy=biased.tolist(),
                oracle_accuracy=oracle[:2].tolist(),
                test=test[0].numel(),
            )
        )
        for i, (p, q), w in (
            (0, train[1], W[1]),
            (1, train[0], W[0]),
        ):  # scored by class: the spurious label's latents go, and the reverse
            lost, room = (
                drops(
                    X,
                    A,
                    W_dec,
                    test[:2],
                    W[[2, 2]],
                    b[[2, 2]],
                    ((A[p].mean(0) - A[q].mean(0)) * (W_dec @ w)).abs(),
                ),
                (oracle[:2] - biased)[i],
            )
            rows[-1] |= {
                f"scr_dir{i + 1}_threshold_{n}": (-lost[n][i] / room).item()
                if room >= 0.001
                else 0.0
                for n in lost
            }
        rows[-1] |= {
            f"scr_metric_threshold_{n}": rows[-1][
                f"scr_dir{1 + int(biased[1] < biased[0])}_threshold_{n}"
            ]
            for n in lost
        }
    means = [
        mean_of([r for r in rows if r["seed"] == seed], [key for key in rows[0] if "metric" in key])
        for seed in seeds
    ]
    return mean_of(means, list(means[0]), std=True) | dict(
        seeds=len(means), pairs=len(pairs), details=rows
    )


# ---- RAVEL: do a few latents carry one attribute of an entity, and no other? -------------------------------------------
def ravel(model, layer, tokenizer, text, sae, facts, budget=10**6, seed=0):
    """RAVEL (Huang et al. 2024) by MDBM; facts as in read_facts. At the entity's last token the masked latents of a base prompt take their
    values in a source prompt; no error term. cause: share of prompts on the attribute that then give the source's answer; isolation:
    of prompts on other attributes that keep theirs. An answer is its first token, greedily (SAEBench: text of six); only what the model
    knows counts. At most 5000 pairs, 70/30; mask sigmoid(b / T), T 1 to 1e-4, 2 epochs of Adam 1e-3, batch 32 (ours); then b > 0. CannotRun."""
    need(facts, "no entities and attributes: give --ravel FILE.json", CannotRun)
    encode, rows = lambda s: [text.bos, *tokenizer(s, add_special_tokens=False)["input_ids"]], []
    for attribute, template, (entity, known) in (
        (a, t, e)
        for a, ts in facts["templates"].items()
        for t in ts
        for e in facts["entities"].items()
    ):
        prompt = template.replace("{entity}", entity)
        head, ids, full = map(
            encode,
            (
                template.split("{entity}")[0] + entity,
                prompt,
                f"{prompt} {known.get(attribute, '')}",
            ),
        )
        if (
            attribute in known and ids[: len(head)] == head and full[: len(ids)] == ids != full
        ):  # all three end where a token ends
            rows.append((ids, len(ids) - 1, len(head) - 1, full[len(ids)], entity, attribute))
    need(
        rows,
        "no prompt can be built from the facts: entity or answer does not end where a token ends",
        CannotRun,
    )
    prompts, *columns, entities, asked = map(list, zip(*rows))
    (last, at, target), asked, rng = (
        torch.tensor(columns, device=model.device),
        np.array(asked),
        np.random.default_rng(seed),
    )  # (n,) each
    padded = pad_sequence([torch.tensor(p) for p in prompts], True, text.bos).to(
        model.device
    )  # (n, T)

    def answer(i, edit=lambda h: h):  # logits of the token after prompts i (b,): (b, V)
        with spliced(model, layer, edit):
            return model(padded[i], use_cache=False).logits[torch.arange(len(i)), last[i]].float()

    def swap(base, source, mask):
        f_base, f_source = sae.encode(x[base]), sae.encode(x[source])  # (b, F)
        new = sae.decode(f_base + mask * (f_source - f_base))  # (b, D)
        return lambda h: h.index_put(
            (torch.arange(len(base), device=h.device), at[base]), new.to(h.dtype)
        )

    with torch.no_grad():
        x = residuals_at(model, layer, prompts, at, text.bos)  # (n, D)
        known = (
            torch.cat([answer(i).argmax(1) == target[i] for i in torch.arange(len(rows)).split(64)])
            .cpu()
            .numpy()
        )
    details, differ = [], np.not_equal.outer(columns[2], columns[2])  # (n, n)
    n_pairs = min(
        5000, int(budget / 1.7 / padded.shape[1] / len(facts["templates"]))
    )  # each is read 2 x 0.7 + 0.3 times
    for attribute in facts["templates"]:
        value, own = (
            np.array([str(facts["entities"][e].get(attribute)) for e in entities]),
            asked == attribute,
        )
        pairs = np.argwhere(
            (value[:, None] != value) & (~own[:, None] | differ) & known[:, None] & (known & own)
        )  # (base, source)
        halves = [
            rng.permutation(pairs[own[pairs[:, 0]] == about])[: n_pairs // 2]
            for about in (True, False)
        ]
        if (m := min(map(len, halves))) < 10:
            continue
        base, source = torch.from_numpy(
            np.stack([h[:m] for h in halves], 1).reshape(-1, 2)
        ).T  # by turns about the attribute, about others
        about, n, b = (
            torch.from_numpy(own)[base],
            int(0.7 * len(base)),
            x.new_zeros(len(sae.W_enc), requires_grad=True),
        )
        expect = target[torch.where(about, source, base)]  # (pairs,)
        order = [p for _ in range(2) for p in torch.from_numpy(rng.permutation(n)).split(32)]
        loss = lambda T, p: F.cross_entropy(
            answer(base[p], swap(base[p], source[p], torch.sigmoid(b / T))), expect[p]
        )
        descend(
            torch.optim.Adam([b], lr=1e-3),
            zip(np.geomspace(1, 1e-4, len(order)), progress(f"ravel {attribute}", order)),
            lambda at: loss(*at),
        )
        with torch.no_grad():
            hit = torch.cat(
                [
                    answer(base[p], swap(base[p], source[p], b > 0)).argmax(1) == expect[p]
                    for p in torch.arange(n, len(base)).split(64)
                ]
            )
        cause, isolation = (
            hit.cpu()[about[n:] == yes].double().mean().item() for yes in (True, False)
        )
        details.append(
            dict(
                attribute=attribute,
                disentanglement_score=(cause + isolation) / 2,
                cause_score=cause,
                isolation_score=isolation,
                latents=int((b > 0).sum()),
                train_pairs=n,
                test_pairs=len(hit),
            )
        )
    need(
        details,
        f"the model answers {known.sum()} of {len(known)} prompts: too few of two attributes with different answers, or --tokens too few",
        CannotRun,
    )
    return mean_of(
        details, ["disentanglement_score", "cause_score", "isolation_score", "latents"]
    ) | dict(
        prompts=len(known),
        prompts_known=int(known.sum()),
        attributes=", ".join(d["attribute"] for d in details),
        details=details,
    )


# ---- Core stability: the paper's own question --------------------------------------------------------------------------
def cycles(run):
    """The SAE folders of a run folder, in order: a list, empty where it is none."""
    return sorted(
        (c.parent for c in Path(run).glob("cycle*/cfg.json") if c.parent.name[5:].isdigit()),
        key=lambda c: int(c.name[5:]),
    )


def stability(run):
    """For each training of a run folder its row of dmsae.py's table, votes, and overlap with the core before: exact, as rows are frozen."""
    rows = [
        json.loads((folder / "cfg.json").read_text())["metadata"]["result"]
        | dict(
            votes=dict(
                sorted(Counter(load_core(folder / "core.safetensors")[0].votes.tolist()).items())
            )
        )
        for folder in cycles(run)
    ]
    return [
        r
        | dict(
            jaccard=r["kept"] / (r["core"] + r["dropped"]),
            identity_overlap=r["kept"] / max(1, r["kept"] + r["dropped"]),
        )
        for r in rows
    ]


def partners(a, b, floors=(0.7, 0.9)):
    """How many rows of a (n, D) and b (m, D) pair off one to one with a cosine above each floor, the closest first."""
    cosine, found, mutual = F.normalize(a) @ F.normalize(b).T, [], torch.ones(1)
    while mutual.any():
        best, j = cosine.max(1)
        mutual = (cosine.argmax(0)[j] == torch.arange(len(j))) & (
            best > min(floors)
        )  # nobody is closer to either
        found += best[mutual].tolist()
        cosine[mutual], cosine[:, j[mutual]] = -2, -2
    return {f"above_{floor}": sum(c > floor for c in found) for floor in floors}


def agreement(run_a, run_b, seed=0):
    """How many latents two runs share, by encoder and decoder rows: {set: {n, encoder, decoder}}. Sets: their last cores; as many random
    directions with the second core; as many random latents of the two prefixes 0; all of prefix 0 (core included)."""
    sets, rng, out = [], generator(seed, "agreement"), {}
    for folder in cycles(run_a)[-1], cycles(run_b)[-1]:
        sae, index = load_sae(folder), load_core(folder / "core.safetensors")[0].index
        some = torch.randperm(sae.widths[0], generator=rng)[: len(index)]
        sets.append(
            [
                (rows[index], rows[some], rows[: sae.widths[0]])
                for rows in (sae.W_enc.detach(), sae.W_dec.detach())
            ]
        )
    for rows, a, b in zip(("encoder", "decoder"), *sets):
        a, b = (a[0], torch.randn(a[0].shape, generator=rng), *a[1:]), (b[0], *b)
        for name, one, two in zip(
            ("core", "random directions", "random latents of prefix 0", "prefix 0"), a, b
        ):
            out.setdefault(name, dict(n=[len(one), len(two)]))[rows] = partners(one, two)
    return out


# ---- The table and the page --------------------------------------------------------------------------------------------
def table(report):
    """Rows of cells, a column for each SAE; and lines to stand below: what cannot be had, and why; the stability of runs."""
    show = lambda v: (
        "-"
        if v is None
        else f"{v:,}"
        if isinstance(v, int)
        else f"{v:.4g}"
        if isinstance(v, float)
        else v
    )
    rows, notes = [["", *("/".join(Path(s["folder"]).parts[-2:]) for s in report["saes"])]], []
    note = lambda v: (
        v
        if len(v) < 20
        else notes.append(v) or f"[{len(notes)}]"
        if v not in notes
        else f"[{notes.index(v) + 1}]"
    )
    for metric in dict.fromkeys(m for s in report["saes"] for m in s["metrics"]):
        cells = [
            {k: note(show(v)) for k, v in r.items() if not isinstance(v, (list, dict))}
            | {
                f"{p['prefix']}: {k}": show(p[k])
                for p in r.get("prefixes", ())
                for k in ("width", "l0", "fvu", "ce_loss_score")
            }
            for r in (s["metrics"].get(metric, {}) for s in report["saes"])
        ]
        rows += [
            [f"-- {metric}"],
            *(
                [k, *(c.get(k, "-") for c in cells)]
                for k in dict.fromkeys(k for c in cells for k in c)
            ),
        ]
    lines = [f"[{i}] {words}" for i, words in enumerate(notes, 1)]
    for run, trainings in report["stability"].items():
        lines += [
            f"-- stability of {run}",
            *(
                f"core after training {r['cycle']}: {r['core']} latents, {r['kept']} kept, {r['new']} new, "
                f"{r['dropped']} dropped; Jaccard {r['jaccard']:.2f}; by birth {r['origins']}; by votes {r['votes']}"
                for r in trainings
            ),
        ]
    for pair, sets in report["agreement"].items():
        lines += [
            f"-- one-to-one partners, {pair}",
            *(
                f"{name}, {s['n'][0]} and {s['n'][1]}: "
                + "; ".join(
                    f"{of} {s[of]['above_0.7']} above 0.7, {s[of]['above_0.9']} above 0.9"
                    for of in ("encoder", "decoder")
                )
                for name, s in sets.items()
            ),
        ]
    return rows, lines


@torch.no_grad()
def core_cards(model, layer, tokenizer, text, ids, sae, core, most=200, n=4, window=10):
    """HTML of a Core's `most` latents of highest score: facts, the 8 tokens that the decoder row raises most through final norm and
    unembedding, and the n contexts of ids (R, ctx) where it fires most, shaded by activation."""
    total, core, acts, cards = (
        core.score.sum(),
        replace(
            core,
            **{
                name: t[core.score.argsort(descending=True)[:most]]
                for name, t in vars(core).items()
            },
        ),
        [],
        [],
    )
    a, index = tokenizer("a", add_special_tokens=False)["input_ids"], core.index.to(model.device)
    words = lambda ids: [
        html.escape(t[len(tokenizer.decode(a)) :].replace("\n", "↵"))
        for t in tokenizer.batch_decode([[*a, i] for i in ids.tolist()])
    ]
    for b in progress("page", ids.to(model.device).split(max(1, 4096 // ids.shape[1]))):
        keep, f = text.keep(b), torch.zeros(*b.shape, len(index), device=model.device)
        f[keep] = sae.encode(residual_stream(model, layer, b)[keep].float(), int(index.max()) + 1)[
            :, index
        ]
        acts.append(f.cpu())
    acts, W_U = torch.cat(acts), model.get_output_embeddings().weight  # (R, T, C), (V, D)
    norm = next(
        (m for name, m in model.base_model.named_children() if "norm" in name or name == "ln_f"),
        torch.nn.Identity(),
    )
    for i, latent in enumerate(index.tolist()):
        (peak, where), raised = (
            acts[..., i].max(1),
            words((W_U @ norm(sae.W_dec[latent].to(W_U))).topk(8).indices),
        )  # (R,), (R,)
        cards.append(
            f"<hr><article><h3>{i + 1}. latent {latent}</h3><small>on {core.density[i]:.2%} of tokens; {core.score[i] / total:.2%} of the core's attribution; "
            f"votes {core.votes[i]}; born in training {core.birth[i, 0]}</small><p>raises "
            + "".join(f"<kbd>{t}</kbd>" for t in raised)
        )
        for r in (r for r in peak.topk(min(n, len(peak))).indices if peak[r] > 0):
            s = slice(max(0, where[r] - window), where[r] + window + 1)
            cards.append(
                "<p>"
                + "".join(
                    f'<span style="background:rgba(238,102,119,{v:.2f})">{t}</span>'
                    for t, v in zip(words(ids[r, s]), acts[r, s, i] / peak.max())
                )
            )
    return "".join(cards)


COLOURS = (
    "#4477aa #ee6677 #228833 #ccbb44 #66ccee #aa3377 #bbbbbb #000000".split() * 99
)  # Paul Tol's bright scheme
HEAD = """<meta charset=utf-8><meta name=viewport content="width=device-width,initial-scale=1"><title>dmsae</title><style>td{padding:0 .5em}td+td{text-align:right}
body{font:16px/1.5 system-ui,sans-serif;margin:auto;max-width:60em;padding:1em;overflow-wrap:anywhere}figure{margin:0;flex:1 1 18em;max-width:30em}svg{width:100%}
.charts,.bar{display:flex}.charts{flex-wrap:wrap;gap:1em}article p{font:.85em monospace;white-space:pre-wrap}kbd{background:#eee;margin:.4em}i{padding:0 .4em}</style>"""


def chart(title, series, bars=False):
    """Named series over trainings 0, 1, ... as HTML: lines in an inline SVG, or a stacked bar for each training."""
    low, high, rows = (
        min(map(min, series.values())),
        max(map(max, series.values())),
        list(zip(*series.values())),
    )
    X, Y = (
        lambda t: 45 + 265 * (t + 0.5) / len(rows),
        lambda v: 150 - 135 * (v - low) / (high - low or 1),
    )
    bar = lambda row: "".join(
        f'<span style="background:{c};width:{80 * v / max(1, *map(sum, rows))}%"></span>'
        for v, c in zip(row, COLOURS)
    )
    marks = [
        f'<path d="M45 {Y(v)}H310" stroke="#ddd"/><text x="40" y="{Y(v) + 4}" text-anchor="end">{v:.3g}</text>'
        for v in {low, high}
    ]
    marks += [f'<text x="{X(t)}" y="168">{t}</text>' for t in range(len(rows))]
    line = lambda s: (
        "M" + "L".join(f"{X(t)} {Y(v)}" for t, v in enumerate(s)) + "h.01"
    )  # h.01: a single point is a dot
    marks += [
        f'<path fill="none" stroke="{c}" stroke-width="3" stroke-linecap="round" d="{line(s)}"/>'
        for s, c in zip(series.values(), COLOURS)
    ]
    body = (
        "".join(
            f"<div class=bar>{t}&ensp;{bar(row)}&ensp;{sum(row)}</div>"
            for t, row in enumerate(rows)
        )
        if bars
        else f'<svg viewBox="0 0 320 175" font-size="11" fill="#444">{"".join(marks)}</svg>'
    )
    legend = "".join(
        f' <i style="background:{c}"></i> {html.escape(name)}' for name, c in zip(series, COLOURS)
    )
    return f"<figure><b>{html.escape(title)}</b>{body}<figcaption>by training: {legend}</figcaption></figure>"


def page(report, cards):
    """The report as one HTML page that needs nothing else: no script, no network. cards: {title: core_cards(...)}"""
    e, (rows, lines) = html.escape, table(report)
    out = [
        f"<h1>{e(report['model'])}, layer {report['layer']}</h1><p>{e(report['text'])}<table>",
        *("<tr>" + "".join(f"<td>{e(c)}" for c in r) for r in rows),
        "</table>",
        *(f"<p>{e(line)}" for line in lines),
    ]
    for run, trainings in report["stability"].items():
        sizes, fvu, ce, origins = (
            [r[key] for r in trainings] for key in ("core", "fvu", "ce_recovered", "origins")
        )
        born = {
            f"born in {b}": [o.get(b, 0) for o in origins]
            for b in sorted({b for o in origins for b in o}, key=int)
        }
        out += [
            f"<h2>{e(run)}</h2><div class=charts>",
            chart("core size", {"latents": sizes}),
            chart("cross-entropy recovered", {"whole SAE": ce}),
            chart("FVU by prefix", {f"prefix {j}": v for j, v in enumerate(zip(*fvu))}),
            chart("the core by birth", born, bars=True),
            "</div>",
        ]
    return "\n".join(
        [
            f"<!doctype html><html lang=en>{HEAD}",
            *out,
            *(f"<h2>{e(title)}</h2>{latents}" for title, latents in cards.items()),
            "</html>\n",
        ]
    )


# ---- The command line --------------------------------------------------------------------------------------------------
METRICS, GIVEN = (
    "core absorption probing tpp scr ravel stability".split(),
    "model text dataset text_column separator ctx device".split(),
)


def parse(argv=None):
    """Command line -> argparse's namespace. One line and exit code 2 on words that cannot be read; BadInput."""
    p = argparse.ArgumentParser(
        "eval.py", description="SAEBench's metrics for dmsae's SAEs.", allow_abbrev=False
    )
    p.error, add = (
        lambda message: p.exit(2, f"eval: {message}; python eval.py --help shows all flags\n"),
        p.add_argument,
    )
    add(
        "folders",
        nargs="+",
        type=Path,
        help="run folders (of each, its plain SAE and its last) or SAE folders",
    )
    add(
        "--only",
        nargs="+",
        choices=METRICS,
        default=METRICS,
        metavar="NAME",
        help="some of " + ", ".join(METRICS),
    )
    add(
        "--tokens",
        type=int,
        default=1_000_000,
        help="at most about so many through the model for a metric of an SAE (default 1_000_000)",
    )
    add(
        "--labelled",
        nargs="+",
        default=[],
        metavar="FILE",
        help=".csv or .jsonl for probing, tpp and scr, in place of hub datasets",
    )
    add(
        "--columns",
        nargs="+",
        default=["text", "label"],
        metavar="NAME",
        help="of --labelled: text, label and, for scr, spurious label",
    )
    add("--ravel", metavar="FILE", help="JSON of entities and attributes; the README shows one")
    add(
        "--min-letters",
        type=int,
        default=20,
        help="first letters that the model must spell for absorption (default 20)",
    )
    add("--seed", type=int, default=0, help="seed of everything random (default 0)")
    add(
        "--seeds",
        type=int,
        default=3,
        help="how many seeds, from --seed on, tpp and scr are averaged over (default 3)",
    )
    add(
        "--html",
        action="store_true",
        help="write a page with charts, and a card for each core latent (at most 200), beside the JSON",
    )
    add(
        "--out",
        type=Path,
        help="JSON file (default: eval.json in the first folder); nothing is overwritten",
    )
    for f in (f for f in fields(Config) if f.name in GIVEN):
        add(
            "--" + f.name.replace("_", "-"),
            type=f.type,
            help=f"in place of the SAE's own: {f.metadata['help']}",
        )
    args = p.parse_args(argv)
    for name in "tokens", "seeds", "min_letters":
        need(
            getattr(args, name) > 0,
            f"--{name.replace('_', '-')} {getattr(args, name)}: must be 1 or above, for example {p.get_default(name)}",
        )
    return args


def config_of(folder, given):
    """The Config that an SAE was trained with, or as much of it as its cfg.json says, with the changes `given`. BadInput."""
    try:
        meta = json.loads((folder / "cfg.json").read_text())["metadata"]
        known = dict(
            meta,
            model=meta.get("model_name"),
            ctx=meta.get("context_size"),
            dataset=meta.get("dataset_path"),
            layer=int(re.fullmatch(r"blocks\.(\d+)\.hook_resid_post", meta["hook_name"])[1]),
        ) | meta.get("config", {})
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as e:
        raise BadInput(
            f"{folder}: is neither a run folder (cycle0, ...) nor the folder of an SAE of blocks.N.hook_resid_post ({e!r})"
        ) from None
    known |= (
        dict(device="auto", demo=False, core=None)
        | ({"text": None, "separator": None} if {"text", "dataset"} & given.keys() else {})
        | given
    )
    need(
        known["model"],
        f"{folder}: does not name its language model; give it, for example --model google/gemma-2-2b",
    )
    return Config(
        **{f.name: known[f.name] for f in fields(Config) if known.get(f.name) is not None}
        | dict(compile=False)
    )


def read_facts(path):
    """Entities and templates for ravel. BadInput."""
    try:
        facts = json.loads(Path(path).read_text())
        need(
            all(t.count("{entity}") == 1 for ts in facts["templates"].values() for t in ts)
            and all(
                isinstance(a, str) for known in facts["entities"].values() for a in known.values()
            ),
            "",
        )
        return facts
    except (ValueError, KeyError, TypeError, AttributeError):
        raise BadInput(
            f'--ravel {path}: must be like {{"entities": {{"Paris": {{"country": "France"}}}}, '
            '"templates": {"country": ["{entity} is in"]}}, with {entity} once in a template'
        ) from None


def run(args):
    """Evaluate folders, print the table, write the JSON (after each metric) and the page."""
    given, facts = (
        {name: getattr(args, name) for name in GIVEN if getattr(args, name) is not None},
        args.ravel and read_facts(args.ravel),
    )
    folders = [
        f
        for folder in args.folders
        for f in dict.fromkeys([*cycles(folder)[:1], *cycles(folder)[-1:]] or [folder])
    ]
    configs, home = [config_of(f, given) for f in folders], folders[0].parent
    cfg, own = configs[0], not given.keys() - {"device"} and (home / "tokens.bin").exists()
    source = (
        f"held out by {home}"
        if own
        else f"the first of {cfg.text or cfg.dataset}, which the SAE may have been trained on"
    )
    cfg = (
        replace(cfg, text=None, separator=None, dataset=Config.dataset)
        if own
        else replace(cfg, tokens=max(cfg.batch, args.tokens), attribution_tokens=1)
    )
    check(cfg)
    longest, saes = (
        getattr(lm := model_config(cfg), "max_position_embeddings", cfg.ctx),
        [load_sae(f, cfg.device) for f in folders],
    )
    for folder, sae, c in zip(folders, saes, configs):
        need(
            (sae.W_enc.shape[1], c.model) == (lm.hidden_size, cfg.model)
            and c.layer < lm.num_hidden_layers
            and cfg.ctx <= longest,
            f"{folder}: {c.model}, layer "
            f"{c.layer}, width {sae.W_enc.shape[1]}, --ctx {cfg.ctx}: {cfg.model} has {lm.num_hidden_layers} layers, width {lm.hidden_size}, --ctx up to {longest}",
        )
        n = (
            sae.requires_grad_(False).W_dec.norm(dim=1).clamp_min(1e-8)
        )  # unit decoder rows: the same function, but activations that compare
        for t, factor in (sae.W_dec.T, 1 / n), (sae.W_enc.T, n), (sae.b_enc, n), (sae.threshold, n):
            t.mul_(factor)
    out = (args.out or args.folders[0] / "eval").with_suffix(".json")
    path = next(
        p
        for p in (out, *(out.with_stem(f"{out.stem}-{i}") for i in range(2, 10**6)))
        if not (p.exists() or p.with_suffix(".html").exists())
    )
    need(
        os.access(path.parent, os.W_OK),
        f"--out {path}: must be in a folder that exists and can be written, for example --out eval.json",
    )
    sources, texts, cards = {path: (args.columns, None) for path in args.labelled} or HUB, {}, {}
    for name in sources if {"probing", "tpp", "scr"} & set(args.only) else ():
        try:
            texts[name] = labelled(name, *sources[name], args.tokens // 128, args.seed)
        except CannotRun as why:
            texts[name] = why
    runs = list(
        dict.fromkeys(
            f.parent
            for f in folders
            if f in cycles(f.parent)
            and (f / "core.safetensors").exists()
            and "stability" in args.only
        )
    )
    from transformers import AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(cfg.model), load_model(cfg)
    text = open_text(
        cfg,
        tokenizer,
        home if own else Path((tmp := tempfile.TemporaryDirectory()).name),
        lambda: None,
    )
    ids = text.contexts(
        slice(min(text.n_eval if own else len(text.rows), max(1, args.tokens // cfg.ctx)))
    )
    report = dict(
        model=cfg.model,
        layer=cfg.layer,
        seed=args.seed,
        text=f"{ids.numel():,} tokens in contexts of {cfg.ctx}, {source}",
        arguments={k: str(v) for k, v in vars(args).items()},
        stability={str(r): stability(r) for r in runs},
        agreement={f"{a} and {b}": agreement(a, b, args.seed) for a, b in combinations(runs, 2)},
        saes=[dict(folder=str(f), layer=c.layer, metrics={}) for f, c in zip(folders, configs)],
    )
    seeds, spelling = (
        range(args.seed, args.seed + args.seeds),
        cache(lambda layer: letter_task(model, layer, tokenizer, text.bos, args.tokens, args.seed)),
    )
    for folder, entry, sae, c in zip(folders, report["saes"], saes, configs):
        where, pool = (
            (model, c.layer),
            cache(
                lambda name: (
                    need(not isinstance(texts[name], CannotRun), texts[name], CannotRun)
                    or pooled(
                        model, c.layer, tokenizer, text, sae, texts[name][0], min(128, longest)
                    )
                )
            ),
        )
        row = dict(zip(cycles(folder.parent), report["stability"].get(str(folder.parent), ()))).get(
            folder
        )
        actions = dict(
            core=lambda: core_metrics(*where, text, ids, sae),
            stability=lambda: (
                need(row, "the SAE is in no run folder of dmsae.py", CannotRun)
                or {
                    k: row[k]
                    for k in ("core", "kept", "new", "dropped", "jaccard", "identity_overlap")
                }
            ),
            absorption=lambda: absorption(
                spelling(c.layer), sae, min_letters=args.min_letters, seed=args.seed
            ),
            ravel=lambda: ravel(*where, tokenizer, text, sae, facts, args.tokens, args.seed),
        )
        for name in texts:
            actions |= {
                f"probing {name}": lambda name=name: sparse_probing(
                    *pool(name), texts[name][1], args.seed
                ),
                f"tpp {name}": lambda name=name: tpp(*pool(name), texts[name][1], sae.W_dec, seeds),
                f"scr {name}": lambda name=name: scr(
                    *pool(name), *texts[name][1:], sae.W_dec, seeds
                ),
            }
        for metric, action in actions.items():
            if metric.split()[0] in args.only:
                try:
                    entry["metrics"][metric] = action()
                except CannotRun as why:
                    entry["metrics"][metric] = dict(cannot_run=str(why))
                write_text(json.dumps(report, indent=1, default=float), path)
        if args.html and (folder / "core.safetensors").exists():
            cards[f"core after {folder}"] = core_cards(
                *where, tokenizer, text, ids, sae, load_core(folder / "core.safetensors")[0]
            )
    if args.html:
        write_text(page(report, cards), path.with_suffix(".html"))
    rows, lines = table(report)
    width = [max(len(r[i]) for r in rows if i < len(r)) for i in range(len(rows[0]))]
    print(
        *(
            "  ".join(
                [r[0].ljust(width[0]), *(c.rjust(w) for c, w in zip(r[1:], width[1:]))]
            ).rstrip()
            for r in rows
        ),
        *lines,
        f"written: {path}" + f" and {path.with_suffix('.html')}" * args.html,
        sep="\n",
    )


if __name__ == "__main__":
    sys.exit(main(name="eval", work=lambda argv: run(parse(argv))))
