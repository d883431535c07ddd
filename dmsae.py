"""Distilled Matryoshka Sparse Autoencoders (Martin-Linares & Ling 2025, arXiv 2512.24975).

    core = nothing
    for n in 0 .. cycles:         # training 0 has no core: the plain Matryoshka BatchTopK baseline
        sae   = a Matryoshka BatchTopK SAE trained from scratch, its first latents the frozen core
        score = mean |activation x gradient| of each latent of prefix 0, the core included; the
                gradient is that of the next-token loss at the narrowest nested reconstruction
        core  = the fewest latents that hold 90 % of the score; their encoder rows travel

    python dmsae.py --demo                 # in miniature: no network, no GPU, a few minutes
    python dmsae.py --cycles 5 --k 64      # Gemma-2-2B, layer 12, 65,536 latents, one GPU

For the method read `MatryoshkaSAE`, `loss_and_grad`, `update`, `train`, `attribute`, `select_core`,
`next_core`, `new_sae`, `distil`. Shapes: B tokens in a batch, T in a context, R contexts, D its
width, F latents, G nested prefixes, C core latents, M in prefix 0, core too; W_enc, W_dec (F, D).
"""

import argparse
import contextlib
import glob
import inspect
import itertools
import json
import math
import os
import re
import sys
import sysconfig
import time
import zlib
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm


# ---- Settings: each field of Config is a flag (d_sae is --d-sae), and its default stands only here
class BadInput(ValueError):
    """Something that the user can mend: one line, and exit code 2."""


@contextlib.contextmanager
def refusing(what):
    """Every error inside becomes a BadInput that begins with `what`."""
    try:
        yield
    except Exception as e:  # a dozen unrelated types: transformers', datasets', safetensors', ...
        raise BadInput(f"{what} ({e if isinstance(e, ValueError) else repr(e)})") from None


@dataclass
class Config:
    """All settings. The comment behind a field is the help of its flag."""

    model: str = "google/gemma-2-2b"  # hub name or folder of any AutoModelForCausalLM
    layer: int = 12  # read and replace the output of this decoder layer, counted from 0
    dataset: str = "JeanKaddour/minipile"  # hub name, or name:configuration; train is streamed
    text: str = None  # local .txt, .jsonl or .parquet file, in place of --dataset
    text_column: str = "text"  # column that holds the text
    separator: str = None  # string that splits each document further; \n is a new line
    ctx: int = 1024  # context length in tokens, BOS included
    d_sae: int = 65536  # number of latents, core included
    k: int = 64  # active latents per token (L0), on average over a batch
    prefixes: tuple[float] = (1 / 32, 3 / 32, 7 / 32, 15 / 32)  # inner widths, shares of d_sae
    tokens: int = 100_000_000  # tokens of each training (the paper: 500_000_000)
    batch: int = 4096  # tokens per training step
    lr: float = 3e-4  # peak learning rate of Adam
    cycles: int = 5  # trainings with a core, after the plain training 0
    core_sparsity: Literal["gated", "dynamic", "exempt", "compete"] = "gated"  # when the core is on
    coverage: float = 0.9  # share of the attribution that the core must hold
    select: Literal["attribution", "frequency", "random"] = "attribution"  # the core, or controls
    attribution_tokens: int = 1_000_000  # held-out tokens for attribution
    core: str = None  # core.safetensors to start training 0 with
    transfer_k: tuple[int] = ()  # then train SAEs of these k around the last core
    seed: int = 0  # seed of everything random
    device: str = "auto"  # cuda, cuda:N or cpu; auto is cuda where there is one
    out: str = None  # run folder; the same command resumes (runs/<model>_k<k>_seed<seed>)
    checkpoint_minutes: float = 5.0  # minutes between checkpoints, at least
    cache: str = None  # folder that keeps activations for later trainings and runs
    demo: bool = False  # miniature settings, and a small Gemma-2 trained on the spot

    def __post_init__(self):
        name = "demo" if self.demo else Path(self.model).name
        self.out = self.out or f"runs/{name}_k{self.k}_seed{self.seed}"
        if self.device == "auto":
            self.device = "cuda" if torch.cuda.is_available() else "cpu"
        if self.demo and self.model == Config.model:
            self.model = f"{self.out}/model"
            self.text = self.text or f"{self.out}/model/text.jsonl"

    def widths(self, n_core=0):
        """Cumulative prefix widths (G,), a core of n_core latents in each; last d_sae. BadInput"""
        widths = [n_core, *(n_core + round(p * self.d_sae) for p in self.prefixes), self.d_sae]
        if widths != sorted({*widths}):
            room = f"--d-sae {self.d_sae} above a core of {n_core}"
            raise BadInput(f"--prefixes: shares must ascend within {room}, for example 0.1 0.3")
        return widths[1:]


DEMO = dict(layer=1, ctx=128, tokens=400_000, attribution_tokens=60_000, cycles=3)
DEMO |= dict(d_sae=2048, k=16, batch=1024, lr=2e-3)
KINDS = {".txt": dict(path="text", sample_by="document")}  # what `datasets` calls them
KINDS |= {".jsonl": dict(path="json"), ".parquet": dict(path="parquet")}
SAELENS = dict(architecture="jumprelu", normalize_activations="none", apply_b_dec_to_input=True)


def parse(argv=None):
    """Command line -> Config; what cannot be read ends the program with one line."""
    defaults = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser("dmsae.py", formatter_class=defaults, allow_abbrev=False)
    parser.error = lambda why: parser.exit(2, f"dmsae: {why}; --help shows all flags\n")
    notes = dict(re.findall(r"(\w+): .* # (.*)", inspect.getsource(Config)))
    for f in fields(Config):
        kind, inner = dict(type=f.type), get_args(f.type)
        if f.type is bool:
            kind = dict(action="store_true")
        elif isinstance(f.default, tuple):
            kind = dict(type=inner[0], nargs="*")
        elif inner:
            kind = dict(choices=inner)
        flags = sorted({"--" + f.name, "--" + f.name.replace("_", "-")})
        parser.add_argument(*flags, default=f.default, help=notes[f.name], **kind)
    if "--demo" in (argv or sys.argv):
        parser.set_defaults(**DEMO)
    return Config(**vars(parser.parse_args(argv)))


def check(cfg):
    """Refuse settings that cannot work, before anything is downloaded or trained. BadInput"""
    k = 1, cfg.d_sae - 1, 1  # lowest, highest, one that works
    limits = dict(d_sae=(2, 99_999_999, 65536), attribution_tokens=(1, 99_999_999_999, 1_000_000))
    limits |= dict(tokens=(cfg.batch, 999_999_999_999, 1000 * cfg.batch), coverage=(1e-6, 1, 0.9))
    limits |= dict(ctx=(4, 9_999_999, 128), batch=(1, 99_999_999, 4096), lr=(1e-9, 1e99, 3e-4))
    limits |= dict(k=k, transfer_k=k, layer=(0, 999, 12), cycles=(0, 999, 5), prefixes=(0, 1, 0.1))
    for name, (low, high, works) in limits.items():
        for value in np.atleast_1d(getattr(cfg, name)):
            if not low <= value <= high:
                must = f"must be from {low} to {high}, for example {works}"
                raise BadInput(f"--{name.replace('_', '-')} {value}: {must}")
    cfg.widths(len(load_core(cfg.core)[0].W_enc) if cfg.core else 0)  # is there room?
    if cfg.text and not (cfg.demo or Path(cfg.text).suffix in KINDS and Path(cfg.text).is_file()):
        raise BadInput(f"--text {cfg.text}: must be an existing file in {', '.join(KINDS)}")
    if Path(cfg.cache or ".").is_file():
        raise BadInput(f"--cache {cfg.cache}: must be a folder")
    with refusing(f"--device {cfg.device}: must be cpu, cuda or cuda:N"):
        torch.empty(0, device=cfg.device)


def generator(*key):
    """A torch.Generator seeded by (seed, training, block, ...): then no random state is saved."""
    return torch.Generator().manual_seed(zlib.crc32(repr(key).encode()))


# ---- Text: documents -> one stream of token ids on disk -> contexts -----------------------------
def documents(cfg):
    """Yield the documents of --text or --dataset in pieces of at most 100,000 characters, cut at
    white space, so that no long one is tokenised whole. BadInput where it is no text."""
    from datasets import load_dataset

    path, _, name = cfg.dataset.partition(":")
    source = dict(path=path, name=name or None)
    if cfg.text:  # escaped: else t[1].txt is a pattern
        source = dict(KINDS[Path(cfg.text).suffix], data_files=glob.escape(cfg.text))
    separator = (cfg.separator or "\0").replace("\\n", "\n")  # a shell's "\n" is two characters
    with refusing(f"{cfg.text or cfg.dataset}: gave no text from --text-column {cfg.text_column}"):
        for row in load_dataset(**source, split="train", streaming=True):
            for document in ("" + (row[cfg.text_column] or "")).split(separator):
                yield from re.findall(r"(?s).{1,100000}(?=\s|$)|.{1,100000}", document)


def tokenize(docs, tokenizer, bos, limit, path, vocabulary):
    """Write docs (an iterator, none may hold BOS) as doc BOS doc BOS ... to path: at most `limit`
    int32 ids, below `vocabulary`. Resumes: skips as many documents as path.part holds. BadInput"""
    with written_whole(path) as part, open(part, "ab") as f:
        ends = np.flatnonzero(np.fromfile(part, np.int32) == bos) + 1  # of whole documents
        limit -= f.truncate(4 * max(ends, default=0)) // 4
        for _ in ends:
            next(docs, None)
        while limit > 0 and (some := list(itertools.islice(docs, 32))):
            ids = tokenizer(some, add_special_tokens=False, verbose=False)["input_ids"]
            flat = [i for doc in ids if doc for i in (*doc, bos)][:limit]
            if max(flat, default=0) >= vocabulary:
                raise BadInput(f"token id {max(flat)}: the model has only {vocabulary} embeddings")
            f.write(np.array(flat, np.int32).tobytes())
            limit -= len(flat)


@dataclass
class Text:
    """Contexts of token ids. The first n_eval are held out for evaluation, the next n_attribution
    for attribution: a core must not be judged on the tokens that chose it."""

    rows: np.ndarray  # (R, T - 1) int32, memory-mapped; a context is BOS and a row
    bos: int
    special: torch.Tensor  # BOS, EOS, PAD: Gemma's BOS is so large that an SAE learns nothing else
    n_eval: int
    n_attribution: int

    def contexts(self, places):
        """Contexts at `places`: ids (R, T), BOS first; keep (R, T), where the SAE works."""
        ids = torch.from_numpy(self.rows[places].astype(np.int64))
        ids = F.pad(ids, (1, 0), value=self.bos)
        return ids, ~torch.isin(ids, self.special)

    def held_out(self):
        """Contexts (ids, keep) for evaluation, and for attribution."""
        n = self.n_eval
        return self.contexts(slice(n)), self.contexts(slice(n, n + self.n_attribution))

    def block(self, number, n, seed):
        """The n contexts of training block `number`. At its end the text starts again."""
        held = self.n_eval + self.n_attribution
        order = torch.randperm(len(self.rows) - held, generator=generator(seed, "contexts"))
        places = np.arange(number * n, (number + 1) * n) % len(order)
        return self.contexts(held + order.numpy()[places])


def open_text(cfg, model, tokenizer, folder):
    """The text as contexts; tokenized once, into FOLDER/tokens.bin. BadInput"""
    ids = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    special = [i for i in ids if i is not None]
    if not special:
        raise BadInput(f"--model {cfg.model}: its tokenizer has neither a BOS nor an EOS token")
    path, width = Path(f"{folder}/tokens.bin"), cfg.ctx - 1
    n_eval, n_attribution = math.ceil(131072 / width), math.ceil(cfg.attribution_tokens / width)
    if not path.exists():
        limit = int(1.02 * cfg.tokens) + (n_eval + n_attribution) * width  # 2 %: block ends, BOS
        docs = iter(tqdm(documents(cfg), "tokenise", disable=None))
        tokenize(docs, tokenizer, special[0], limit, path, len(model.get_input_embeddings().weight))
    n = path.stat().st_size // 4 // width
    if n < 3:
        path.unlink()
        source = f"{cfg.text or cfg.dataset} as {path}"
        raise BadInput(f"{source}: holds less than three contexts of {cfg.ctx}; removed, try again")
    rows = np.memmap(path, np.int32, "r", shape=(n, width))
    print(f"text: {rows.size} tokens in {(rows == special[0]).sum()} documents")
    held = max(2, min(n_eval + n_attribution, n // 10))  # of a short text a tenth
    n_eval = min(n_eval, held // 2)
    return Text(rows, special[0], torch.tensor(special), n_eval, held - n_eval)


# ---- The language model: read a layer, replace a layer ------------------------------------------
def load_model(cfg):
    """The frozen language model, its tokenizer, and the fingerprint of `check_model`. BadInput"""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    words = dict(dtype=torch.bfloat16 if cfg.device.startswith("cuda") else torch.float32)
    advice = "try --demo, or accept its licence on huggingface.co and run `hf auth login`"
    with refusing(f"--model {cfg.model}: cannot be used; if it was not found, {advice}"):
        lm = AutoConfig.from_pretrained(cfg.model).get_text_config()
        if getattr(lm, "attn_logit_softcapping", None):
            words["attn_implementation"] = "eager"  # SDPA silently drops Gemma-2's soft-capping
        last, longest = lm.num_hidden_layers - 1, getattr(lm, "max_position_embeddings", cfg.ctx)
        if cfg.layer > last or cfg.ctx > longest:
            raise BadInput(f"--layer {cfg.layer} --ctx {cfg.ctx}: at most {last} and {longest}")
        tokenizer = AutoTokenizer.from_pretrained(cfg.model)
        model = AutoModelForCausalLM.from_pretrained(cfg.model, **words)
        model = model.to(cfg.device).eval().requires_grad_(False)
        return model, tokenizer, check_model(model, tokenizer, cfg.layer, cfg.ctx)


@torch.no_grad()
def check_model(model, tokenizer, layer, ctx):
    """Refuse a model that is not finite or not causal, by two contexts whose last halves differ.
    Returns its fingerprint (D,): the layer's output at the end of a sentence. BadInput"""
    sentence = tokenizer("What is useful again and again stays.")["input_ids"][:ctx]
    ids = torch.tensor(sentence, device=model.device).repeat(2, ctx)[:, :ctx]
    ids[1, ctx // 2 :] = ids[1, 0]
    x = residual_stream(model, layer, ids)
    shape = 2, ctx, model.config.get_text_config().hidden_size
    if x.shape != shape:
        raise BadInput(f"layer {layer} gives {tuple(x.shape)}, not {shape}")
    if not spliced_loss(model, layer, ids, ids >= 0, lambda x: x).isfinite():
        raise BadInput("its loss is not finite")
    if not torch.allclose(*x[:, : ctx // 2], 0.05, 0.05 * x.std().item()):
        raise BadInput("a token changes the layer's output before it: no causal language model")
    return x[0, len(sentence) - 1].tolist()


def same_model(a, b):
    """Whether two fingerprints are of one model; another GPU's rounding passes."""
    return len(a) == len(b) and math.dist(a, b) < 0.05 * math.hypot(*a)


def decoder_layers(model):
    """The ModuleList of decoder layers, whatever the architecture calls it."""
    n = model.config.get_text_config().num_hidden_layers
    modules = model.get_decoder().modules()  # a vision tower may have as many
    return next(m for m in modules if isinstance(m, nn.ModuleList) and len(m) == n)


@contextlib.contextmanager
def spliced(model, layer, edit):
    """While open, the output h (R, T, D) of decoder layer `layer` is replaced by edit(h)."""

    def hook(module, args, out):
        return (edit(out[0]), *out[1:]) if isinstance(out, tuple) else edit(out)

    with decoder_layers(model)[layer].register_forward_hook(hook):
        yield


@torch.no_grad()
def residual_stream(model, layer, ids):
    """Output of decoder layer `layer` (resid_post) for ids (R, T): (R, T, D)."""

    class Reached(Exception):
        pass  # it carries h out of the model, so that later layers and the head never run

    def stop(h):
        raise Reached(h)

    try:
        with spliced(model, layer, stop):
            model(ids, use_cache=False)
    except Reached as reached:
        return reached.args[0]


def harvest(model, layer, ids, keep):
    """Residual stream of ids (R, T) where keep (R, T): (tokens, D), in the model's dtype."""
    parts = in_parts(model, ids, keep, 4096)
    return torch.cat([residual_stream(model, layer, ids)[keep] for ids, keep in parts])


def spliced_loss(model, layer, ids, keep, replace):
    """Next-token loss of ids (R, T) in nats, summed over the positions keep (R, T), where the
    layer's output x (tokens, D) at these positions is replaced by replace(x)."""

    def edit(h):
        x = h[keep].to(torch.promote_types(h.dtype, torch.float32))
        return h.masked_scatter(keep[..., None], replace(x).to(h.dtype))

    with spliced(model, layer, edit):
        logits = model(ids, use_cache=False).logits[:, :-1][keep[:, :-1]]  # (tokens, vocabulary)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, ids[:, 1:][keep[:, :-1]], reduction="sum")


def in_parts(model, ids, keep, tokens=1024):
    """ids and keep (R, T), some tokens at a time: of 1024, Gemma's float32 logits take 1 GiB."""
    n = max(1, tokens // ids.shape[1])
    return zip(ids.to(model.device).split(n), keep.to(model.device).split(n), strict=True)


@torch.no_grad()
def mean_loss(model, layer, ids, keep, replace):
    """spliced_loss in nats a token, over any number of contexts."""
    parts = in_parts(model, ids, keep)
    total = sum(spliced_loss(model, layer, *part, replace) for part in parts)
    return (total / keep[:, :-1].sum()).item()


# ---- The sparse step: only n = B*k of B x F activations are not zero, so sums of n rows suffice --
class SparseActs(NamedTuple):
    """The active entries of activations (B, F), in the order of row (token), then col (latent)."""

    value: torch.Tensor  # (n,)
    row: torch.Tensor  # (n,)
    col: torch.Tensor  # (n,)


def segment_sum(table, index, weight, segment, n_segments):
    """out[s] = sum of weight[i] * table[index[i]] over segment[i] == s; segment (n,) ascends."""
    starts = torch.searchsorted(segment, torch.arange(n_segments, device=segment.device))
    return F.embedding_bag(index, table, starts, mode="sum", per_sample_weights=weight)


class EncodeAt(torch.autograd.Function):
    """((x - b_dec) W_enc^T + b_enc)[row, col]: (n,), equal to acts.value, which was computed so.
    W_enc, b_enc, b_dec get dense autograd's gradients, without a B x F tensor; x gets none."""

    @staticmethod
    def forward(ctx, W_enc, b_enc, b_dec, x, acts):
        ctx.save_for_backward(W_enc, b_dec, x, acts.row, acts.col)
        return acts.value.clone()

    @staticmethod
    def backward(ctx, grad):  # (n,)
        W_enc, b_dec, x, row, col = ctx.saved_tensors
        col, order = col.sort(stable=True)  # each latent's entries are then one segment
        g_W_enc = segment_sum(x - b_dec, row[order], grad[order], col, len(W_enc))  # (F, D)
        g_b_enc = segment_sum(grad[:, None], order, None, col, len(W_enc)).flatten()  # (F,)
        return g_W_enc, g_b_enc, -g_b_enc @ W_enc, None, None


def nested_decode(acts, W_dec, b_dec, edges, B):
    """Reconstructions by each prefix, (B, G, D). Every latent is decoded once, into the narrowest
    prefix that holds it; then sums run over the prefixes, whose widths are edges (G,)."""
    G = len(edges)
    segment = acts.row * G + torch.bucketize(acts.col, edges, right=True)  # ascends, as acts do
    parts = segment_sum(W_dec, acts.col, acts.value, segment, B * G).view(B, G, -1)
    return parts.cumsum(1) + b_dec


# ---- The SAE and its losses ---------------------------------------------------------------------
class MatryoshkaSAE(nn.Module):
    """Matryoshka BatchTopK SAE (Bussmann et al. 2025) whose first n_core latents are a core.

    W_enc, W_dec (F, D); b_enc (F,); b_dec (D,); threshold (F,): at inference a latent is on where
    its pre-activation exceeds it. widths: the G ascending prefix widths, core included, last F.
    The first n_exempt latents (the core, or none where it competes) are outside BatchTopK: in
    training too they are on where they exceed their threshold."""

    def __init__(self, d_model, widths, n_core=0, n_exempt=0, generator=None):
        super().__init__()
        self.widths, self.n_core, self.n_exempt = list(widths), n_core, n_exempt
        rows = F.normalize(torch.randn(widths[-1], d_model, generator=generator))
        self.W_enc = nn.Parameter(rows.clone())
        self.b_enc = nn.Parameter(torch.zeros(widths[-1]))
        self.W_dec = nn.Parameter(rows)
        self.b_dec = nn.Parameter(torch.zeros(d_model))
        self.register_buffer("threshold", torch.zeros(widths[-1]))
        self.register_buffer("edges", torch.tensor(self.widths), persistent=False)

    def encode(self, x, width=None):
        """Activations at inference of the first `width` latents: x (B, D) -> (B, width). By a
        threshold: the B*k largest of a batch depend on its other tokens, a fixed cut does not."""
        if x.ndim != 2:
            raise ValueError(f"x must be (tokens, D), not {tuple(x.shape)}: try x.flatten(0, -2)")
        pre = F.linear(x - self.b_dec, self.W_enc[:width], self.b_enc[:width])
        return pre.relu() * (pre > self.threshold[:width])

    def decode(self, acts):
        """Activations (B, w) of the first w latents -> reconstruction (B, D)."""
        return acts @ self.W_dec[: acts.shape[1]] + self.b_dec

    def forward(self, x):
        return self.decode(self.encode(x))

    @torch.no_grad()
    def batch_topk(self, pre, k, floor=1):
        """The activations in training, of pre-activations (B, F): SparseActs, and the cut ().
        Exempt latents take what they need. The others share what is left of B*k, at least B*floor,
        so that the *total* L0 stays k wherever the core leaves room (our reading)."""
        B, E = len(pre), self.n_exempt
        for share in (0.95, 0.7, 0.0):  # of the threshold: spares sorting B x F; 0: all above 0
            bound = self.threshold.clamp_min(0)
            bound[E:] = share * bound[E:].amax().clamp_min(0)
            row, col = (pre > bound).nonzero(as_tuple=True)
            exempt = col < E
            taken = int(exempt.sum()) if E else 0
            n_keep = max(B * k, taken + B * floor)
            if len(row) >= n_keep:
                break
        value = pre[row, col]
        order = value.masked_fill(exempt, math.inf).sort(descending=True, stable=True)
        keep = order.indices[:n_keep].sort().values
        cut = order.values[:n_keep][-1:].nan_to_num(posinf=0).sum()  # 0 where only the core is on
        return SparseActs(value[keep], row[keep], col[keep]), cut

    @torch.no_grad()
    def update_threshold(self, cut, step):
        """Average the cut over a tenth of the steps so far, at most 100 (our choice)."""
        self.threshold[self.n_exempt :].lerp_(cut, min(1, max(0.01, 10 / (step + 1))))

    @torch.no_grad()
    def fold_scale(self, scale):
        """Turn an SAE of scale * x into one of x; encoder and decoder rows stay as they are."""
        for t in (self.b_enc, self.b_dec, self.threshold):
            t.div_(scale)


def nested_loss(x, x_hats):
    """Sum over prefixes of ||x - x_hat||^2, mean over tokens, over G * D (ours: then it starts near
    1, and the dead-latent loss weighs the same for all G, D). x (B, D), x_hats (B, G, D)"""
    return F.mse_loss(x_hats, x[:, None].expand_as(x_hats))


def dead_latent_loss(residual, acts, W_dec):
    """AuxK (Gao et al. 2024): squared error of the residual's reconstruction by dead latents alone,
    over the residual's variance. residual (B, D), acts (B, d), W_dec (d, D)"""
    error = acts @ W_dec - residual
    return error.pow(2).sum() / (residual - residual.mean(0)).pow(2).sum()


def loss_and_grad(sae, x, k, floor=1, dead=()):
    """Training loss (), of x (B, D); its gradient is added to the .grad of sae's parameters.
    dead (d,): indices of dead latents. Also the SparseActs, and BatchTopK's cut ()."""
    centred = x - sae.b_dec.detach()
    pre = F.linear(centred, sae.W_enc, sae.b_enc).detach()  # (B, F)
    acts, cut = sae.batch_topk(pre, k, floor)
    value = EncodeAt.apply(sae.W_enc, sae.b_enc, sae.b_dec, x, acts)
    x_hats = nested_decode(acts._replace(value=value), sae.W_dec, sae.b_dec, sae.edges, len(x))
    loss = nested_loss(x, x_hats)
    if len(dead):  # autograd over their rows alone: no second F x D gradient
        acts_dead = pre.index_select(1, dead)  # (B, d), of which a token keeps the D/2 largest
        top = acts_dead.topk(min(x.shape[1] // 2, len(dead)), sorted=False).values
        off = acts_dead < top.amin(1, True).clamp_min(1e-30)  # or not positive
        acts_dead.masked_fill_(off, 0).requires_grad_()
        W_dead = sae.W_dec.detach()[dead].requires_grad_()
        aux = dead_latent_loss(x - x_hats[:, -1].detach(), acts_dead, W_dead)
        loss = loss + aux / 32  # Gao et al. 2024
    loss.backward()
    if len(dead):
        g_pre = acts_dead.grad.masked_fill_(off, 0)
        g_b_enc = g_pre.sum(0)
        sae.W_dec.grad.index_add_(0, dead, W_dead.grad)
        sae.W_enc.grad.index_add_(0, dead, g_pre.T @ centred)
        sae.b_enc.grad.index_add_(0, dead, g_b_enc)
        sae.b_dec.grad -= g_b_enc @ sae.W_enc.detach()[dead]
    return loss.detach(), acts, cut


@torch.no_grad()
def update(sae, adam, lr):
    """One optimiser step: the core's encoder rows stay; decoder rows keep unit norm."""
    sae.W_enc.grad[: sae.n_core] = 0  # Adam without weight decay then keeps them bit for bit
    g, W = sae.W_dec.grad, sae.W_dec
    # The part of g along its unit row only changes the norm, which is undone: keep it out of Adam.
    g.addcmul_(W, torch.linalg.vecdot(g, W)[:, None], value=-1)
    adam.param_groups[0]["lr"] = lr
    adam.step()
    adam.zero_grad()
    W.div_(W.norm(dim=1, keepdim=True))


# ---- Training -----------------------------------------------------------------------------------
def activations(run, ids, keep):
    """Activations (tokens, D) of contexts ids where keep (R, T): harvested, or from --cache."""
    if not run.cfg.cache:
        return harvest(run.model, run.cfg.layer, ids, keep)
    key = f"{zlib.crc32(repr(run.fingerprint).encode()):08x}{zlib.crc32(ids.numpy()):08x}"
    path = Path(f"{run.cfg.cache}/layer{run.cfg.layer}-{key}.safetensors")
    if not path.exists():
        save_tensors({"acts": harvest(run.model, run.cfg.layer, ids, keep)}, path)
    return load_tensors(path)[0]["acts"].to(run.cfg.device)


def batches(run, training, block=0, start=0):
    """Endless batches (B, D), scaled, each with the position of the next one. Blocks of about 64
    batches (ours), the same in every training, are harvested and shuffled whole."""
    cfg, B = run.cfg, run.cfg.batch
    contexts = math.ceil(64 * B / (cfg.ctx - 1))
    for number in itertools.count(block):
        acts = activations(run, *run.text.block(number, contexts, cfg.seed))
        n = len(acts) // B  # batches
        if not n:
            raise BadInput("the text holds hardly more than special tokens: nothing to train on")
        order = torch.randperm(len(acts), generator=generator(cfg.seed, training, number))
        order = order[: n * B].view(n, B).to(acts.device)
        for i in range(start, n):
            yield acts[order[i]].float() * run.scale, (number, i + 1)
        start = 0
        del acts  # the next block needs the memory


@torch.no_grad()
def new_sae(cfg, core, x, scale, training):
    """A fresh SAE around the core's encoder rows; b_dec starts as the mean of x (B, D). All else
    starts anew (the paper; ours: not the gates): what is selected again has proved useful among new
    neighbours. By cfg.core_sparsity, a core latent is on
    dynamic  (the paper) where its pre-activation is above 0; the others share what is left of k
    exempt   (the paper's withdrawn first version) the same, but the others share k
    gated    (ours) above its gate, set as at birth (b_enc then trains on); else as dynamic
    compete  where BatchTopK keeps it, like any other latent"""
    C = len(core.W_enc)
    n_exempt = 0 if cfg.core_sparsity == "compete" else C
    random = generator(cfg.seed, training, "init")
    sae = MatryoshkaSAE(x.shape[1], cfg.widths(C), C, n_exempt, random).to(x.device)
    sae.b_dec.copy_(x.mean(0))
    sae.W_enc[:C] = core.W_enc
    sae.W_dec[:C] = F.normalize(core.W_enc)  # our choice
    if cfg.core_sparsity == "gated":
        sae.b_enc[:C] = core.bias.to(x) * scale + sae.W_enc[:C] @ sae.b_dec
        sae.threshold[:C] = core.threshold * scale
    return sae


def learning_rate(step, steps, peak):
    """Warm-up over 1000 steps (a short run: a tenth), constant, linear to 0 in the last fifth."""
    return peak * min(1, (step + 1) / min(1000, steps // 10 or 1), 5 * (steps - step) / steps)


def train(run, core, k, training, path):
    """Train an SAE of sparsity k around `core`, from the checkpoint `path` if it is there. Returns
    it, in units of scaled activations, and the share of dead latents."""
    cfg, steps = run.cfg, run.cfg.tokens // run.cfg.batch
    saved, at = {}, dict(step=0, position=(0, 0))
    if path.exists():
        saved, at = load_tensors(path)
    began = saved_at = time.time()
    stream = batches(run, training, *at["position"])
    x, position = next(stream)
    sae = new_sae(cfg, core, x, run.scale, training)
    adam = torch.optim.Adam(sae.parameters(), eps=1e-12, fused=True)  # our gradients are small
    since = torch.zeros(cfg.d_sae, dtype=torch.int64, device=x.device)  # tokens since it fired
    state = dict(sae.state_dict(), since=since)
    for name, p in sae.named_parameters():
        adam.state[p] = {m: torch.zeros_like(p) for m in ("exp_avg", "exp_avg_sq")}
        adam.state[p]["step"] = p.new_zeros(())
        state |= {f"{name}.{key}": t for key, t in adam.state[p].items()}
    for name, t in saved.items():
        state[name].copy_(t)
    floor = k if cfg.core_sparsity == "exempt" else max(1, k // 10)  # k/10: our choice
    dead_after = min(10_000_000, cfg.tokens // 10)  # tokens: Gao et al. 2024; the tenth is ours
    tqdm.write("   step     loss      l0 core l0   dead  seconds")
    for step in tqdm(range(at["step"] + 1, steps + 1), path.stem, disable=None):
        if step % 10 == 1:  # ours: a GPU waits for the search; checkpoints come just before one
            dead = (since >= dead_after).nonzero()[:, 0]
        loss, acts, cut = loss_and_grad(sae, x, k, floor, dead)
        update(sae, adam, learning_rate(step - 1, steps, cfg.lr))
        sae.update_threshold(cut, step - 1)
        since.add_(cfg.batch).index_fill_(0, acts.col, 0)
        since[: sae.n_core] = 0  # the core is never dead: its rows are frozen
        last = step == steps
        if last or step % (steps // 10 or 1) == 0:
            core_l0 = (acts.col < sae.n_core).sum() / len(x)
            row = f"{step:7d} {loss:8.4f} {len(acts.col) / len(x):7.1f} {core_l0:7.1f}"
            tqdm.write(f"{row} {len(dead) / cfg.d_sae:6.1%} {time.time() - began:8.0f}")
        if last or step % 10 == 0 and time.time() - saved_at >= 60 * cfg.checkpoint_minutes:
            if not (loss.isfinite() and sae.W_dec.isfinite().all()):
                raise BadInput(f"diverged by step {step}: try a smaller --lr, another --out")
            save_tensors(state, path, step=step, position=position)
            saved_at = time.time()
        if not last:
            x, position = next(stream)
    return sae, (since >= dead_after).float().mean().item()


# ---- Held-out evaluation, and attribution -------------------------------------------------------
@torch.no_grad()
def evaluate(sae, x):
    """Of an SAE of raw activations x (N, D): fvu by prefix, about the mean; l0, core_l0 a token."""
    errors = on = 0
    for some in x.split(4096):
        acts = sae.encode(some)  # (B, F)
        x_hats = torch.stack([sae.decode(acts[:, :width]) for width in sae.widths])  # (G, B, D)
        errors += (some - x_hats).double().pow(2).sum((1, 2))
        on += (acts > 0).sum(0) / len(x)  # (F,)
    fvu = errors / (x - x.mean(0)).double().pow(2).sum()
    return dict(fvu=fvu.tolist(), l0=on.sum().item(), core_l0=on[: sae.n_core].sum().item())


def attribute(model, layer, ids, keep, sae):
    """Score of each latent of prefix 0, core included; and share of tokens it is on: (M,), (M,).
    The layer's output is replaced by the narrowest nested reconstruction x_hat (the paper: the core
    shall do without finer latents); latent i is worth a_i = f_i <dLoss / dx_hat, W_dec_i> at a
    token, where f_i is its activation; its score is the mean of |a_i|. sae: of raw activations."""
    W_dec = sae.W_dec[: sae.widths[0]].detach()  # (M, D)
    n, score, on = keep.sum().item(), 0, 0
    acts = x_hat = None

    def replace(x):
        nonlocal acts, x_hat
        acts = sae.encode(x, len(W_dec)).detach()  # (B, M)
        x_hat = sae.decode(acts).detach().requires_grad_()  # (B, D)
        return x_hat

    for part in in_parts(model, ids, keep):
        loss = spliced_loss(model, layer, *part, replace)
        (grad,) = torch.autograd.grad(loss, x_hat)  # (B, D)
        a = acts * (grad @ W_dec.T)  # (B, M)
        score += a.abs().sum(0, dtype=torch.float64) / n
        on += (acts > 0).sum(0) / n
    return score.cpu(), on.cpu()


# ---- The core -----------------------------------------------------------------------------------
def select_core(scores, coverage):
    """The fewest latents that hold `coverage` of the total score, best first: (M,) -> (C,)."""
    value, order = scores.double().sort(descending=True, stable=True)
    held = value.cumsum(0)  # rises to the total
    if not 0 < held[-1] < math.inf:
        raise BadInput(f"no core can be selected: the scores sum to {held[-1]}; try more --tokens")
    return order[: int((held < coverage * held[-1]).sum()) + 1]  # + 1: the one that crosses


@dataclass
class Core:
    """What travels between trainings: C encoder rows, their gates (for `gated`), their history."""

    W_enc: torch.Tensor  # (C, D) frozen rows; Core(torch.zeros(0, D)) is that of training 0
    bias: torch.Tensor = torch.zeros(0)  # (C,) b_enc - W_enc b_dec at birth, for raw activations
    threshold: torch.Tensor = torch.zeros(0)  # (C,) at birth, for raw activations
    birth: torch.Tensor = torch.zeros(0, 2).long()  # (C, 2) training, index in its SAE: identity
    votes: torch.Tensor = torch.zeros(0).long()  # (C,) how many trainings selected it
    score: torch.Tensor = torch.zeros(0)  # (C,) attribution, at the last selection
    density: torch.Tensor = torch.zeros(0)  # (C,) the share of tokens on which it was on
    index: torch.Tensor = torch.zeros(0).long()  # (C,) its row in the SAE of the last selection


@torch.no_grad()
def next_core(core, sae, chosen, scores, density, training):
    """The core after a training: `chosen` (C,) of M candidates, old ones first. sae: raw units."""
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
    return Core(*(t[chosen] for t in vars(candidates).values()))


# ---- Files: written beside their place, then renamed, so that what is there is whole ------------
@contextlib.contextmanager
def written_whole(path):
    """Yield where to write the file or folder `path`; then it is renamed into its place."""
    part = Path(f"{path}.part")
    yield part
    for file in part, *part.rglob("*"):
        if file.is_file():
            with open(file, "rb") as f:
                os.fsync(f.fileno())  # else a power cut may leave an empty file of the right name
    part.replace(path)


def read_json(path):
    """The content of a JSON file. BadInput"""
    with refusing(f"{path}: is missing or damaged; move its folder away"):
        return dict(json.loads(Path(path).read_text()))


def write_json(data, path):
    """Write data as JSON to path, whole or not at all."""
    with written_whole(path) as part:
        part.write_text(json.dumps(data, indent=1))


def save_tensors(tensors, path, **meta):
    """Write named tensors and JSON metadata as safetensors."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as part:
        tensors = {name: t.detach().contiguous() for name, t in tensors.items()}
        save_file(tensors, part, {"dmsae": json.dumps(meta)})


def load_tensors(path, kind=dict):
    """Tensors, as dict or another `kind`, and metadata of save_tensors. BadInput"""
    with refusing(f"{path}: is damaged or foreign; move it away"), safe_open(path, "pt") as f:
        tensors = kind(**{name: f.get_tensor(name) for name in f.keys()})
        return tensors, json.loads(f.metadata()["dmsae"])


def load_core(path):
    """A Core; and its origin, a dict: training that selected it, config, fingerprint. BadInput"""
    return load_tensors(path, Core)


def save_sae(sae, folder, **metadata):
    """Write an SAE of raw activations in SAELens's layout, as its `jumprelu`: W_enc is (D, F)."""
    weights = dict(sae.state_dict(), W_enc=sae.W_enc.T)
    save_tensors(weights, Path(f"{folder}/sae_weights.safetensors"))
    metadata |= dict(sae_lens_version="6.0.0", widths=sae.widths, n_core=sae.n_core)
    cfg = dict(SAELENS, d_in=sae.W_enc.shape[1], d_sae=len(sae.W_enc), dtype="float32")
    cfg |= dict(device="cpu", reshape_activations="none")
    write_json(cfg | dict(metadata=metadata | dict(n_exempt=sae.n_exempt)), f"{folder}/cfg.json")


def load_sae(folder, device="cpu"):
    """The SAE in a folder of SAELens's `jumprelu` layout, ours or another's. BadInput"""
    with refusing(f"{folder}: is no SAE folder of cfg.json and sae_weights.safetensors"):
        cfg = read_json(f"{folder}/cfg.json")
        if not SAELENS.items() <= (SAELENS | cfg).items():
            raise BadInput(f"{[cfg.get(key) for key in SAELENS]}, only {SAELENS} is read")
        ours = dict(widths=[cfg["d_sae"]], n_core=0, n_exempt=0) | (cfg.get("metadata") or {})
        sae = MatryoshkaSAE(cfg["d_in"], ours["widths"], ours["n_core"], ours["n_exempt"])
        weights = load_file(f"{folder}/sae_weights.safetensors")
        weights["W_enc"] = weights["W_enc"].T
        if torch.all(weights.get("scaling_factor", torch.zeros(1)) == 1):  # SAELens once wrote it
            del weights["scaling_factor"]
        sae.load_state_dict(weights)
    return sae.to(device)


# ---- The demo's language model, trained on Python's own documentation and sources ---------------
def build_demo(folder, steps=3000):
    """Train a tokenizer and a small Gemma-2, 4 x 128 tokens a step; put all into folder."""
    from pydoc_data.topics import topics
    from tokenizers import ByteLevelBPETokenizer
    from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedTokenizerFast

    sources = Path(sysconfig.get_path("stdlib")).glob("*.py")
    docs = [*topics.values(), *(p.read_text(errors="replace") for p in sources)]
    docs = [d[i : i + 4000] for d in docs for i in range(0, len(d), 4000)]
    docs.sort(key=lambda d: zlib.crc32(d.encode()))  # a fixed shuffle: held out is like the rest
    special = dict(pad_token="<pad>", eos_token="<eos>", bos_token="<bos>")  # ids 0, 1, 2
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(docs, 2048, special_tokens=[*special.values()], show_progress=False)
    ids = [i for doc in bpe.encode_batch(docs) for i in (2, *doc.ids)]
    ids = torch.tensor(ids).repeat(2)[: 4 * 128 * steps].view(-1, 128)
    shape = dict(vocab_size=2048, hidden_size=160, intermediate_size=320, num_hidden_layers=3)
    shape |= dict(num_attention_heads=4, num_key_value_heads=2, head_dim=40)
    shape |= dict(attn_logit_softcapping=None, final_logit_softcapping=None, initializer_range=0.08)
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(Gemma2Config(**shape))
    embedding, *others = model.parameters()
    groups = dict(params=[embedding], lr=1e-2), dict(params=others, lr=2e-3)
    adam = torch.optim.Adam(groups, betas=(0.8, 0.99), fused=True)
    decay = torch.optim.lr_scheduler.LinearLR(adam, 1, 0, steps)
    for step, batch in enumerate(ids[torch.randperm(len(ids))].split(4)):
        loss = model(batch, labels=batch).loss
        loss.backward()
        adam.step()
        adam.zero_grad()
        decay.step()
        if step % 100 == 0:
            print(f"  demo language model: step {step} of {steps}, loss {loss:.3f}", flush=True)
    with written_whole(folder) as part:
        model.save_pretrained(part)
        PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, **special).save_pretrained(part)
        (part / "text.jsonl").write_text("\n".join(json.dumps({"text": d}) for d in docs))


# ---- The distillation cycles --------------------------------------------------------------------
def prepare(cfg, model, tokenizer, fingerprint):
    """What all trainings share. scale: of scale * x the mean variance is 1; ce_original, ce_zero:
    held-out loss, nats a token, as it is; layer zeroed, also at BOS. BadInput: OUT is another's"""
    out, new = Path(cfg.out), json.loads(json.dumps(asdict(cfg)))
    for name in "device out checkpoint_minutes cycles transfer_k cache".split():
        del new[name]  # these change no training
    out.mkdir(parents=True, exist_ok=True)
    path = out / "config.json"
    old = read_json(path) if path.exists() else {}
    differ = [f"{n} {old.get(n)} there, {new[n]} here" for n in new if old.get(n) != new[n]]
    if not same_model(old.get("fingerprint", []), fingerprint):
        differ.append(f"another model or tokenizer behind {cfg.model}")
    new["fingerprint"] = fingerprint
    if differ and ("measured" in old or (out / "tokens.bin").exists()):
        raise BadInput(f"--out {out}: holds a run with other settings ({'; '.join(differ)})")
    if differ:
        (out / "tokens.bin.part").unlink(missing_ok=True)
        write_json(new, path)
    text = open_text(cfg, model, tokenizer, out)
    if "measured" not in old:
        (ids, keep), _ = text.held_out()
        some = text.block(0, math.ceil(65536 / cfg.ctx), cfg.seed)  # 65,536 tokens: our choice
        x = harvest(model, cfg.layer, *some).float()
        if not x.isfinite().all():
            raise BadInput(f"--model {cfg.model}: gives nan or inf")
        ratio = x.norm(dim=1) / x.norm(dim=1).median()
        if (ratio > 10).any():
            share = f"{(ratio > 10).float().mean():.2%} of tokens"
            print(f"warning: {share} have 10 to {ratio.max():.0f} x the median norm")
        new["measured"] = dict(
            scale=1 / x.var(0).mean().sqrt().item(),  # about the mean
            ce_original=mean_loss(model, cfg.layer, ids, keep, lambda x: x),
            ce_zero=mean_loss(model, cfg.layer, ids, keep | True, torch.zeros_like),
            fingerprint=fingerprint,
        )
        write_json(old := new, path)
    return SimpleNamespace(cfg=cfg, model=model, text=text, **old["measured"])


def finish(run, core, sae, dead, k, training, label):
    """Evaluate a trained SAE, choose the next core, save both as OUT/cycle<label>."""
    cfg, model = run.cfg, run.model
    sae.fold_scale(run.scale)
    for_evaluation, for_attribution = run.text.held_out()
    held = evaluate(sae, harvest(model, cfg.layer, *for_evaluation).float())
    ce = mean_loss(model, cfg.layer, *for_evaluation, sae)
    scores, density = attribute(model, cfg.layer, *for_attribution, sae)
    chosen = select_core(scores, cfg.coverage)
    C = len(chosen)  # the controls are of the size that attribution would have chosen
    if cfg.select == "frequency":
        chosen = density.argsort(descending=True, stable=True)[:C]
    if cfg.select == "random":
        chosen = torch.randperm(len(scores), generator=generator(cfg.seed, label, "core"))[:C]
    new = next_core(core, sae, chosen, scores, density, training)
    kept = int((chosen < len(core.W_enc)).sum())
    row = dict(cycle=label, core=C, kept=kept, new=C - kept, dropped=len(core.W_enc) - kept)
    row |= dict(held, dead=dead, tokens=cfg.tokens, ce=ce)
    row["ce_recovered"] = (run.ce_zero - ce) / (run.ce_zero - run.ce_original)
    origin = dict(training=training, config=asdict(cfg) | dict(k=k))
    where = dict(model_name=cfg.model, hook_name=f"blocks.{cfg.layer}.hook_resid_post")
    with written_whole(f"{cfg.out}/cycle{label}") as part:
        save_tensors(vars(new), part / "core.safetensors", fingerprint=run.fingerprint, **origin)
        save_sae(sae, part, **where, context_size=cfg.ctx, prepend_bos=True, result=row, **origin)


def print_table(rows, core):
    """A row for each training; and how often the core's latents were selected."""
    print("cycle     core   kept    new dropped      l0 core l0  ce recovered    dead  fvu")
    row = "{cycle!s:8s}{core:6d} {kept:6d} {new:6d} {dropped:7d} {l0:7.1f} {core_l0:7.1f}"
    row += "{ce_recovered:14.4f} {dead:7.1%} "
    for r in rows:
        print(row.format(**r), *(f"{v:.4f}" for v in r["fvu"]))
    print(f"latents that 1, 2, ... trainings selected: {core.votes.bincount()[1:].tolist()}")


def distil(cfg):
    """A whole run, from wherever OUT has it: trainings 0..cycles, then transfers of the core."""
    check(cfg)
    if "cuda:" in cfg.device:
        torch.cuda.set_device(cfg.device)
    out, rows = Path(cfg.out), []
    if cfg.model == f"{cfg.out}/model" and not Path(cfg.model).exists():
        build_demo(Path(cfg.model))
    print(f"dmsae | {cfg.model} layer {cfg.layer} | {cfg.device} | {out}")
    model, tokenizer, fingerprint = load_model(cfg)
    core, before = Core(torch.zeros(0, len(fingerprint))), 0  # before: trainings of --core's run
    if cfg.core:
        core, origin = load_core(cfg.core)
        before = origin["training"] + 1
        D = core.W_enc.shape[1]
        if D != len(fingerprint):
            raise BadInput(f"--core {cfg.core}: is of width {D}, not {len(fingerprint)}")
        if not same_model(origin.get("fingerprint", fingerprint), fingerprint):
            print(f"warning: --core {cfg.core} is of another model, tokenizer or layer")
    run = prepare(cfg, model, tokenizer, fingerprint)
    for n, k in enumerate([cfg.k] * (cfg.cycles + 1) + [*cfg.transfer_k]):
        label = n if n <= cfg.cycles else f"{cfg.cycles}_k{k}"
        folder, training = out / f"cycle{label}", before + min(n, cfg.cycles + 1)
        if not folder.exists():
            size = len(core.W_enc) or "0: the plain Matryoshka baseline"
            print(f"cycle {label} of {cfg.cycles}   k {k}   core {size}", flush=True)
            checkpoint = out / f"checkpoint{label}.safetensors"
            sae, dead = train(run, core, k, training, checkpoint)
            finish(run, core, sae, dead, k, training, label)
            checkpoint.unlink()
        rows.append(read_json(folder / "cfg.json")["metadata"]["result"])
        if rows[-1]["core_l0"] > k / 2:
            print(f"warning: the core alone has L0 {rows[-1]['core_l0']:.1f}, above half of k {k}")
        if n <= cfg.cycles:
            core, _ = load_core(folder / "core.safetensors")
    print_table(rows, core)
    print(f"SAEs and cores are in {out}/cycle*; next: python eval.py {out}")


def main(argv=None, name="dmsae", parse=parse, work=distil):
    """The command line (eval.py's too). Returns 0: done, 2: bad input, 130: interrupted."""
    torch.set_float32_matmul_precision("high")  # TF32 for the encoder's product
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # huge pages: a sixth faster on a CPU
    try:
        work(parse(argv))
    except (BadInput, OSError, SafetensorError) as e:  # also a folder or disk that takes no files
        print(f"{name}: " + " ".join(str(e).split())[:1000], file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{name}: interrupted; the same command goes on from any checkpoint", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
