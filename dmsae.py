"""Distilled Matryoshka Sparse Autoencoders (DMSAE) in one file.

After "Attribution-Guided Distillation of Matryoshka Sparse Autoencoders" (Martin-Linares & Ling, arXiv 2512.24975):

    core = nothing
    for n in 0 .. cycles:  # training 0 has no core: it is the plain Matryoshka BatchTopK baseline
        sae   = a Matryoshka BatchTopK SAE, trained from scratch; `core` stands frozen inside its every prefix
        score = |activation x gradient| of each latent of core + prefix 0, the gradient being that of the language
                model's next-token loss, back-propagated to the narrowest nested reconstruction
        core  = the smallest set of latents that holds 90 % of the score; only its encoder rows travel on

    python dmsae.py --demo                    everything in miniature, no network, no GPU: 3 min 41 s on two CPU cores
    python dmsae.py --cycles 5 --k 64         google/gemma-2-2b, layer 12, 65,536 latents, one GPU

Letters in the shape comments: B tokens in a batch, T tokens in a context, D = d_model, F = d_sae, G prefixes, C core
latents, M = C + the width of prefix 0, n survivors of BatchTopK. W_enc and W_dec are both (F, D): one row per latent.
Parents: Bussmann et al. 2025 (Matryoshka, arXiv 2503.17547), Bussmann et al. 2024 (BatchTopK, 2412.06410), Gao et al. 2024
(TopK and the dead-latent loss, 2406.04093), Karvonen et al. 2025 (SAEBench, 2503.09532).
"""
import argparse
import importlib.util
import json
import math
import re
import shutil
import signal
import sys
import sysconfig
import time
import warnings
import zlib
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

# ---- Settings: the dataclass is the only place where a default is written; the command line is generated from it -------
class BadInput(ValueError):
    """Something the user can mend. main() prints its one line and exits with 2."""

def need(ok, message, error=BadInput):
    """Raise BadInput, or another error, unless ok."""
    if not ok:
        raise error(message)

def opt(default, help, choices=None, **words):
    """A dataclass field that carries the words for argparse."""
    return field(default=default, metadata=dict(help=help, choices=choices, **words))

@dataclass
class Config:
    """All settings of a run. Every field is a flag: d_sae is --d-sae."""
    model: str = opt("google/gemma-2-2b", "language model: hub name or local folder, any AutoModelForCausalLM")
    layer: int = opt(12, "read and replace the output of this decoder layer, counted from 0")
    dataset: str = opt("JeanKaddour/minipile", "hub dataset, streamed; needs a train split")
    text: str = opt(None, "local .txt, .jsonl or .parquet file, in place of --dataset")
    text_column: str = opt("text", "column that holds the text (not for .txt)")
    separator: str = opt(None, "string between the documents of a .txt file; without it the file is one document")
    ctx: int = opt(1024, "context length in tokens, BOS included")
    tokens: int = opt(100_000_000, "tokens for each training (the paper: 500_000_000); a shorter text is repeated")
    d_sae: int = opt(65536, "number of latents, core included")
    k: int = opt(64, "active latents per token that BatchTopK leaves on average (L0)")
    prefixes: tuple = opt((1 / 32, 3 / 32, 7 / 32, 15 / 32, 1.0), "ascending nested widths, core not counted: fractions of "
                          "d_sae that end in 1, or numbers of latents that end in d_sae", type=float, nargs="+")
    batch: int = opt(4096, "tokens per training step")
    lr: float = opt(3e-4, "peak learning rate of Adam")
    cycles: int = opt(5, "distillation cycles: trainings 0..cycles, where training 0 is the plain baseline")
    coverage: float = opt(0.9, "share of the attribution that the core must hold")
    select: str = opt("attribution", "what chooses the core; two controls of the same size", ("attribution", "frequency", "random"))
    core: str = opt(None, "core.safetensors file to start training 0 with")
    core_sparsity: str = opt("dynamic", "the core is outside BatchTopK, the rest shrinking (dynamic) or not (exempt); in it "
                             "(compete); dynamic with its gate of birth (gated)", ("dynamic", "exempt", "compete", "gated"))
    core_decoder: str = opt("encoder", "where a core latent's decoder row starts", ("encoder", "random"))
    attribution_agg: str = opt("mean", "over tokens: mean |a|, |mean a|, 0.99 quantile of |a|", ("mean", "signed", "quantile"))
    attribution_error: bool = opt(False, "add the SAE's error back, so that gradients are those of the unspliced model")
    attribution_tokens: int = opt(1_000_000, "held-out tokens for attribution; of a short text a tenth is held out")
    seed: int = opt(0, "seed of everything random")
    device: str = opt("auto", "cuda, cuda:N, mps or cpu; auto is the first of these that is there")
    out: str = opt(None, "run folder, resumed by the same command (default: runs/<model>_k<k>_seed<seed>)")
    checkpoint_minutes: float = opt(5.0, "minutes of work between checkpoints")
    demo: bool = opt(False, "miniature settings, and a small Gemma-2 trained on the spot on Python's own documentation")

    def __post_init__(self):
        self.out = self.out or f"runs/{'demo' if self.demo else Path(self.model).name}_k{self.k}_seed{self.seed}"
        if self.device == "auto":
            self.device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        if self.demo and self.model == Config.model:
            self.model, self.text = f"{self.out}/model", self.text or f"{self.out}/model/text.jsonl"
        self.demo_builds = self.demo and self.model == f"{self.out}/model" and not Path(self.model).exists()

    def widths(self, n_core=0):
        """Cumulative prefix widths with a core of n_core latents, core included: (G,) ints. The core takes its place
        inside d_sae, so it is the last group that shrinks; BadInput where nothing of it is left."""
        m = [round(p * self.d_sae) if max(self.prefixes) <= 1 else int(p) for p in self.prefixes]
        need(all(a < b for a, b in zip([0, *m], m)) and m[-1] == self.d_sae, f"--prefixes {' '.join(map(str, self.prefixes))}: "
             f"must ascend from above 0 and end in 1 or in d_sae ({self.d_sae}), for example --prefixes 0.0625 0.25 1")
        inner = m[-2] if len(m) > 1 else 0
        need(n_core + inner < self.d_sae, f"--d-sae {self.d_sae}: must be above the core ({n_core}) plus the inner "
             f"prefixes ({inner}), for example --d-sae {2 * max(n_core, self.d_sae)}")
        return [n_core + w for w in m[:-1]] + m[-1:]

KINDS = {".txt": "text", ".jsonl": "json", ".parquet": "parquet"}  # what `datasets` calls them
DEMO = dict(layer=1, ctx=128, tokens=400_000, d_sae=2048, k=16, batch=1024, lr=2e-3, cycles=3, attribution_tokens=60_000)

def parse(argv=None):
    """Command line -> Config. One line and exit code 2 on words that cannot be read."""
    p = argparse.ArgumentParser("dmsae.py", description="Distilled Matryoshka Sparse Autoencoders.", allow_abbrev=False,
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.error = lambda message: p.exit(2, f"dmsae: {message}; python dmsae.py --help shows all flags\n")
    for f in fields(Config):
        words = (dict(help=f.metadata["help"], action=argparse.BooleanOptionalAction) if f.type is bool else
                 {"type": f.type, **f.metadata})
        p.add_argument("--" + f.name.replace("_", "-"), default=f.default, **words)
    argv = [re.sub("^--[^=]*", lambda flag: flag[0].replace("_", "-"), a) for a in (sys.argv[1:] if argv is None else argv)]
    if "--demo" in argv:
        p.set_defaults(**DEMO)
    args = vars(p.parse_args(argv))
    return Config(**{**args, "prefixes": tuple(args["prefixes"])})

def check(cfg):
    """Refuse impossible settings before anything is downloaded or trained. BadInput."""
    least = dict(d_sae=2, k=1, batch=1, tokens=1, attribution_tokens=1, ctx=4, lr=1e-12)
    for name in (*least, "cycles", "layer", "seed", "checkpoint_minutes"):
        value, low = getattr(cfg, name), least.get(name, 0)
        need(value >= low, f"--{name.replace('_', '-')} {value}: must be {low} or above, for example {getattr(Config, name)}")
    need(cfg.k < cfg.d_sae, f"--k {cfg.k}: must be below d_sae ({cfg.d_sae}), for example {max(1, cfg.d_sae // 64)}")
    need(cfg.tokens >= cfg.batch, f"--tokens {cfg.tokens}: must be one batch ({cfg.batch}) or more, for example {1000 * cfg.batch}")
    need(0 < cfg.coverage <= 1, f"--coverage {cfg.coverage}: must be above 0 and at most 1, for example 0.9")
    cfg.widths()
    for flag, path in ("--core", cfg.core), ("--text", None if cfg.demo_builds else cfg.text):
        need(path is None or Path(path).is_file(), f"{flag} {path}: there is no such file")
    need(not cfg.text or Path(cfg.text).suffix in KINDS, f"--text {cfg.text}: must end in {', '.join(KINDS)}")
    need(cfg.separator is None or cfg.separator and (cfg.text or "").endswith(".txt"), f"--separator {cfg.separator!r}: needs "
         "a .txt file and must not be empty, for example --text stories.txt --separator '<|endoftext|>'")
    need("pile-uncopyrighted" not in cfg.dataset or cfg.text or importlib.util.find_spec("zstandard"),
         f"--dataset {cfg.dataset}: is zstd-compressed; pip install zstandard, or use {Config.dataset}")
    try:
        torch.empty(0, device=cfg.device)
    except (RuntimeError, AssertionError) as e:
        raise BadInput(f"--device {cfg.device}: cannot be used here, try --device cpu ({e})") from None

# ---- Text: documents -> one flat stream of token ids on disk -> contexts -----------------------------------------------
def documents(cfg):
    """Yield the documents of --text or --dataset, one str each. BadInput where they cannot be read."""
    from datasets import load_dataset
    local = cfg.text and KINDS[Path(cfg.text).suffix]
    whole = dict(sample_by="document") if local == "text" else {}
    try:
        for row in load_dataset(local or cfg.dataset, data_files=cfg.text, split="train", streaming=True, **whole):
            doc = row.get(cfg.text_column)
            need(isinstance(doc, str), f"--text-column {cfg.text_column}: holds no text; the columns are {', '.join(row)}")
            yield from doc.split(cfg.separator) if cfg.separator else [doc]
    except Exception as e:  # datasets, fsspec and pyarrow raise a dozen unrelated types for a source that they cannot read
        raise e if isinstance(e, BadInput) else BadInput(f"{cfg.text or cfg.dataset}: is no readable text ({type(e).__name__}: {e})")

def tokenize(docs, tokenizer, bos, limit, path):
    """Write `doc BOS doc BOS ...` to `path` as flat int32 ids, at most `limit`. Returns how many. why on disk: every
    training reads the same text, any context is reached directly, and a resumed run does not tokenise again."""
    n, docs = 0, iter(docs)
    with open(path, "wb") as f, progress("tokenise", total=limit, unit="tok") as bar:
        while n < limit and (batch := [doc for _, doc in zip(range(512), docs)]):
            ids = tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]
            flat = np.concatenate([np.array([*i, bos] if i else [], dtype=np.int32) for i in ids])[:limit - n]
            f.write(flat.tobytes())
            n += len(flat)
            bar.update(len(flat))
    return n

def progress(name, items=None, **words):
    """A progress bar on a terminal, nothing in a log."""
    return tqdm(items, desc=name, unit_scale=True, disable=None, leave=False, **words)

def generator(*place):
    """A CPU generator seeded by its place (seed, cycle, block, ...). why: then there is no generator state to save."""
    return torch.Generator().manual_seed(zlib.crc32(repr(place).encode()))

@dataclass
class Text:
    """A run's text as R contexts of token ids: which are held out, and which tokens the SAE never sees."""
    rows: np.ndarray  # (R, ctx - 1) int32, memory-mapped; a context is BOS and a row
    bos: int
    special: torch.Tensor  # why: Gemma's BOS residual is so large that it is all an SAE would learn; EOS and PAD likewise
    n_eval: int  # contexts 0..n_eval-1 are held out. why two sets: a core must not be judged on the tokens that chose it
    n_attribution: int  # the next ones, held out too

    def contexts(self, at):
        """Contexts number `at` (n, or a slice), BOS first: (n, ctx) int64."""
        return F.pad(torch.from_numpy(self.rows[at].astype(np.int64)), (1, 0), value=self.bos)

    def block(self, number, n, seed):
        """The n contexts of training block `number`: (n, ctx). At its end the text starts again."""
        held = self.n_eval + self.n_attribution
        order = torch.randperm(len(self.rows) - held, generator=generator(seed, "contexts")).numpy()
        return self.contexts(held + order[np.arange(number * n, (number + 1) * n) % len(order)])

    def keep(self, ids):
        """True where the SAE reads and replaces: every token but BOS, EOS and PAD. Same shape as ids."""
        return ~torch.isin(ids, self.special.to(ids.device))

def open_text(cfg, tokenizer, out, commit):
    """Tokenise the text once into OUT/tokens.bin, or find it there. `commit` is called when the text has proved good."""
    bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    need(bos is not None, f"--model {cfg.model}: its tokenizer has neither a BOS nor an EOS token")
    path, width = out / "tokens.bin", cfg.ctx - 1
    n_eval, n_attribution = -(-131072 // width), -(-cfg.attribution_tokens // width)  # 131,072: our choice
    if not path.exists():
        limit = int(1.02 * cfg.tokens) + (n_eval + n_attribution) * width  # 2 %: special positions do not count
        n = tokenize(documents(cfg), tokenizer, bos, limit, out / "tokens.bin.part")
        need(n >= 3 * width, f"{cfg.text or cfg.dataset}: holds {n} tokens, but needs three contexts of {cfg.ctx} (to train, to "
             f"evaluate, to attribute); give more text{f', or --ctx {n // 4}' if n >= 16 else ''}")
        commit()
        (out / "tokens.bin.part").replace(path)
    rows = np.memmap(path, np.int32, "r")
    rows = rows[:len(rows) // width * width].reshape(-1, width)
    held = max(2, min(n_eval + n_attribution, len(rows) // 10))
    special = {bos, tokenizer.eos_token_id, tokenizer.pad_token_id} - {None}
    n_eval = min(n_eval, held // 2)
    return Text(rows, bos, torch.tensor(sorted(special)), n_eval, held - n_eval)

# ---- The language model: read a layer, replace a layer -----------------------------------------------------------------
def model_config(cfg):
    """The language model's configuration, before its weights are fetched. BadInput with what to do."""
    if cfg.demo_builds:
        return demo_config()
    from transformers import AutoConfig
    try:
        return AutoConfig.from_pretrained(cfg.model).get_text_config()
    except (OSError, ValueError) as e:
        gated = f"accept the licence on https://huggingface.co/{cfg.model}, then run `hf auth login`. " * ("google/" in cfg.model)
        raise BadInput(f"--model {cfg.model}: cannot be loaded. {gated}--demo needs no download. ({e})") from None

def load_model(cfg):
    """The frozen language model, bfloat16 on CUDA, else float32."""
    from transformers import AutoModelForCausalLM, utils
    if not sys.stderr.isatty():
        utils.logging.disable_progress_bar()
    # why: SDPA would silently drop Gemma-2's attention soft-capping
    eager = {"attn_implementation": "eager"} if getattr(model_config(cfg), "attn_logit_softcapping", None) else {}
    dtype = torch.bfloat16 if cfg.device.startswith("cuda") else torch.float32
    model = AutoModelForCausalLM.from_pretrained(cfg.model, dtype=dtype, **eager)
    return model.to(cfg.device).eval().requires_grad_(False)

def decoder_layers(model):
    """The ModuleList of decoder layers, whatever the architecture calls it."""
    n = model.config.get_text_config().num_hidden_layers
    return next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == n)

@contextmanager
def spliced(model, layer, edit):
    """While open, the output h (b, T, D) of decoder layer `layer` is replaced by edit(h)."""
    def hook(module, args, out):  # transformers 4 returns a tuple here, transformers 5 the tensor
        return (edit(out[0]), *out[1:]) if isinstance(out, tuple) else edit(out)
    handle = decoder_layers(model)[layer].register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()

class _Stop(Exception):
    """Carries a layer's output out of the model, so that later layers and the LM head never run."""

@torch.no_grad()
def residual_stream(model, layer, ids):
    """Output of decoder layer `layer` (resid_post) for token ids (b, T): (b, T, D)."""
    def stop(h):
        raise _Stop(h)
    try:
        with spliced(model, layer, stop):
            model(ids, use_cache=False)
    except _Stop as reached:
        return reached.args[0]

def harvest(model, layer, text, ids):
    """Residual stream of contexts (R, ctx) at every kept position: (tokens, D) in the model's dtype, on its device."""
    tokens = 16384 if model.device.type == "cuda" else 4096  # at once: what fills a GPU, what a CPU's caches hold
    ids = ids.to(model.device).split(max(1, tokens // ids.shape[1]))
    return torch.cat([residual_stream(model, layer, b)[text.keep(b)] for b in ids])

def spliced_losses(model, layer, text, ids, edit):
    """Run contexts ids (R, ctx) with the layer's output h (b, T, D) replaced by edit(h, keep (b, T)); for every b contexts
    yield the next-token loss in nats, summed over kept source positions (Karvonen et al. 2025), and their number. b is such
    that float32 logits stay within 1 GiB. why: Gemma has 256,000 of them a token."""
    n = max(1, min(16384, 2**28 // model.config.get_text_config().vocab_size) // ids.shape[1])
    for b in progress("held out", ids.to(model.device).split(n)):
        keep = text.keep(b)
        with spliced(model, layer, lambda h: edit(h, keep)):
            logits = model(b, use_cache=False).logits  # (b, T, V)
        source = keep[:, :-1]
        logits = logits[:, :-1][source].to(torch.promote_types(logits.dtype, torch.float32))  # (positions, V)
        yield F.cross_entropy(logits, b[:, 1:][source], reduction="sum"), len(logits)

@torch.no_grad()
def mean_loss(*args):
    """Mean of spliced_losses over all positions, nats a token."""
    loss, positions = zip(*spliced_losses(*args))
    return sum(loss).item() / sum(positions)

# ---- The sparse step: exact, with B*k of B x F activations not zero, so that only the encoder's product is dense -------
def batch_topk(pre, n_keep, guess=0.0):
    """The n_keep largest positive entries of the whole batch (Bussmann et al. 2024), exactly.
    pre (B, F). guess >= 0 should lie below the cut: it spares sorting B x F numbers; a bad one costs time, not exactness. Of
    ties at the cut the earlier token, then the lower latent wins; fewer than n_keep positive entries are all kept. Returns
    row (n,) and col (n,), sorted by row, then col; and the smallest value kept, ()."""
    for lower in guess, guess / 2, 0:
        row, col = (pre > lower).nonzero(as_tuple=True)  # a device sync: how many. Without it nothing can be compacted
        if len(row) >= n_keep:
            break
    value = pre[row, col]
    if len(row) <= n_keep:
        return row, col, value.min() if len(row) else pre.new_zeros(())
    cut = value.kthvalue(len(value) - n_keep + 1).values
    above, tie = value > cut, value == cut
    keep = above | (tie & (tie.cumsum(0) <= n_keep - above.sum()))
    return row[keep], col[keep], cut

def segment_sum(table, index, weight, segment, n_segments):
    """out[s] = sum of weight[i] * table[index[i]] over all i with segment[i] == s; segment (n,) ascends. (n_segments, D)"""
    first = torch.searchsorted(segment, torch.arange(n_segments, device=segment.device))
    return F.embedding_bag(index, table, first, mode="sum", per_sample_weights=weight)

def paired_dots(a, i, b, j):
    """<a[i], b[j]> for n pairs sorted by (i, j): (n,)"""
    if a.device.type == "cpu":  # never writes the gathered rows: several times faster there (python test_dmsae.py)
        start = torch.searchsorted(i, torch.arange(len(a) + 1))
        pattern = torch.sparse_csr_tensor(start, j, a.new_zeros(len(j)), (len(a), len(b)), check_invariants=False)
        return torch.sparse.sampled_addmm(pattern, a, b.T, beta=0.0).values()
    n = max(1, 2**26 // a.shape[1])  # pairs at once: 256 MiB of gathered rows
    return torch.cat([(a[p] * b[q]).sum(1) for p, q in zip(i.split(n), j.split(n))])

class SparseAutoencode(torch.autograd.Function):
    """Encode at n survivors, decode their sums: dense autograd's gradients without a B x F one. Returns, differentiable:
    value (n,) = ((x - b_dec) W_enc^T + b_enc)[row, col], which is given as computed without a graph; and parts (S, D),
    parts[s] = sum of value[i] * W_dec[col[i]] over segment[i] == s (ascending). Only free = W_enc[C:] gets a gradient."""
    @staticmethod
    def forward(ctx, free, b_enc, W_dec, b_dec, W_enc, x, value, row, col, segment, n_segments):
        ctx.save_for_backward(W_dec, b_dec, W_enc, x, value, row, col, segment)
        ctx.n_core = len(W_enc) - len(free)
        return value.clone(), segment_sum(W_dec, col, value, segment, n_segments)

    @staticmethod
    def backward(ctx, g_value, g_parts):  # (n,), (S, D)
        W_dec, b_dec, W_enc, x, value, row, col, segment = ctx.saved_tensors
        g_value = g_value + paired_dots(g_parts, segment, W_dec, col)  # (n,)
        order = col.argsort(stable=True)  # by latent, so that each latent's survivors are one segment
        g_W_dec = segment_sum(g_parts, segment[order], value[order], col[order], len(W_dec))  # (F, D)
        g_W_enc = segment_sum(x - b_dec, row[order], g_value[order], col[order], len(W_enc))  # (F, D)
        g_b_enc = g_value.new_zeros(len(W_enc)).index_add_(0, col, g_value)  # (F,)
        # why: summed over the batch before it meets W_enc, b_dec's gradient is a vector times a matrix, not B x F x D
        return (g_W_enc[ctx.n_core:], g_b_enc, g_W_dec, -(g_b_enc @ W_enc)) + (None,) * 7

# ---- The SAE -----------------------------------------------------------------------------------------------------------
class MatryoshkaSAE(nn.Module):
    """Matryoshka BatchTopK SAE (Bussmann et al. 2025) whose first n_core latents are a frozen core.
    W_enc, W_dec (F, D); b_enc (F,); b_dec (D,); threshold (F,), each latent's fixed threshold at inference. widths: G
    ascending prefix widths, core included, the last is F. The first n_exempt latents (the core, or none where it
    competes) stay outside BatchTopK: they are on wherever pre > threshold."""

    def __init__(self, d_model, widths, n_core=0, n_exempt=0, device="cpu", dtype=torch.float32, generator=None):
        super().__init__()
        self.widths, self.n_core, self.n_exempt = list(widths), n_core, n_exempt
        rows = F.normalize(torch.randn(widths[-1], d_model, generator=generator)).to(device, dtype)
        self.W_enc, self.W_dec = nn.Parameter(rows.clone()), nn.Parameter(rows)
        self.b_enc, self.b_dec = nn.Parameter(rows.new_zeros(len(rows))), nn.Parameter(rows.new_zeros(d_model))
        self.register_buffer("threshold", rows.new_zeros(len(rows)))
        self.register_buffer("edges", torch.tensor(self.widths, device=device), persistent=False)  # (G,)

    def trained(self):
        """For the optimiser: W_enc without the core rows (a view, so that Adam writes into W_enc itself), b_enc, W_dec, b_dec."""
        return [self.W_enc.detach()[self.n_core:].requires_grad_(), self.b_enc, self.W_dec, self.b_dec]

    def pre(self, x, width=None):
        """Pre-activations of the first `width` latents (default all). (B, D) -> (B, width). ValueError unless 2-D."""
        if x.ndim != 2:  # why: a 3-D input would make each sequence a batch that shares a BatchTopK budget
            raise ValueError(f"x must be (tokens, d_model), got {tuple(x.shape)}: flatten it with x.flatten(0, -2)")
        return torch.addmm(self.b_enc[:width], x - self.b_dec, self.W_enc[:width].T)

    def encode(self, x, width=None):
        """Activations at inference of the first `width` latents. (B, D) -> (B, width)
        why a threshold: the B*k largest entries of a batch depend on the other tokens in it; a fixed cut does not."""
        pre = self.pre(x, width)
        return pre * (pre > self.threshold[:width])

    def decode(self, acts):
        """Activations (B, w) of the first w latents -> reconstruction (B, D)."""
        return acts @ self.W_dec[:acts.shape[1]] + self.b_dec

    def forward(self, x):
        """(B, D) -> reconstruction (B, D) by all latents, at inference."""
        return self.decode(self.encode(x))

    def segment(self, row, col):
        """Which sum a survivor belongs to: its token, and the narrowest prefix that holds its latent. (n,) in 0..B*G-1"""
        return row * len(self.widths) + torch.bucketize(col, self.edges, right=True)

    def nest(self, parts):
        """Sums of single groups (B*G, D) -> the G nested reconstructions (B, G, D), every latent decoded once."""
        return parts.view(-1, len(self.widths), parts.shape[1]).cumsum(1) + self.b_dec

    @torch.no_grad()
    def reconstruct(self, x):
        """The G nested reconstructions at inference (B, G, D); which latents were on, and how much: (n,), (n,). x (B, D)"""
        pre = self.pre(x)
        row, col = (pre > self.threshold).nonzero(as_tuple=True)
        parts = segment_sum(self.W_dec, col, pre[row, col], self.segment(row, col), len(x) * len(self.widths))
        return self.nest(parts), col, pre[row, col]

    @torch.no_grad()
    def survivors(self, x, k, floor=1, guess=0.0):
        """BatchTopK beside a core. x (B, D) -> value, row, col (n,) sorted by row, then col; cut (); core L0 ().
        Exempt latents take what they need; the others share what is left of B*k, at least B*floor, so that the *total* L0
        is k wherever the core leaves room (our reading). floor = k is the paper's first version, with L0 = k + core."""
        pre, E, B = self.pre(x), self.n_exempt, len(x)
        core_row, core_col = (pre[:, :E] > self.threshold[:E]).nonzero(as_tuple=True)
        row, col, cut = batch_topk(pre[:, E:], max(B * k - len(core_row), B * floor), guess)
        row, col = torch.cat([core_row, row]), torch.cat([core_col, col + E])
        if E:
            order = (row * pre.shape[1] + col).argsort()
            row, col = row[order], col[order]
        return pre[row, col], row, col, cut, (col < self.n_core).sum() / B

    @torch.no_grad()
    def update_threshold(self, cut, step):
        """Move the threshold of all competing latents towards this batch's smallest kept activation (its cut). The average
        is over the last tenth of the steps, at most the last 100 (our choice): as the rate falls to 0 it settles."""
        self.threshold[self.n_exempt:].lerp_(cut, min(1, max(0.01, 10 / (step + 1))))

    @torch.no_grad()
    def fold_scale(self, scale):
        """Turn an SAE trained on scale * x into one for x. Encoder and decoder rows stay as they are."""
        for t in (self.b_enc, self.b_dec, self.threshold):
            t.div_(scale)

def nested_loss(x, x_hats):
    """Sum over prefixes of ||x - x_hat||^2, mean over tokens, over G * D. x (B, D), x_hats (B, G, D) -> (). why divided (our
    choice): it then starts near 1, so that dead-latent loss and gradient clip weigh the same whatever D and G are."""
    return (x[:, None] - x_hats).pow(2).mean()

def dead_latent_loss(x, residual, W_enc, b_enc, W_dec, b_dec, k_aux):
    """AuxK (Gao et al. 2024): the k_aux most active of d dead latents reconstruct the residual of the widest
    reconstruction; error over the residual's variance. x, residual (B, D); W_enc, W_dec (d, D); b_enc (d,) -> ()"""
    acts = F.linear(x, W_enc, b_enc - W_enc @ b_dec).relu()  # (B, d). b_dec stands outside: its gradient is cheap there
    if acts.shape[1] > k_aux:
        acts = acts * (acts >= acts.detach().topk(k_aux, sorted=False).values.amin(1, keepdim=True))
    error = (residual - acts @ W_dec).pow(2).sum()
    return error / (residual - residual.mean(0)).pow(2).sum().clamp_min(1e-30)

def loss_and_grad(sae, trained, x, k, floor=1, guess=0.0, dead=(), alpha=1 / 32):  # alpha: Gao et al. 2024
    """Loss of a batch x (B, D); its gradient is added to the .grad of `trained`, which sae.trained() gave.
    dead (d,): indices of dead latents. Returns loss (), x_hat (B, D), cut (), col (n,) the latents that fired, core L0 ()."""
    free, b_enc, W_dec, b_dec = trained
    value, row, col, cut, core_l0 = sae.survivors(x, k, floor, guess)
    value, parts = SparseAutoencode.apply(free, b_enc, W_dec, b_dec, sae.W_enc.detach(), x, value, row, col,
                                          sae.segment(row, col), len(x) * len(sae.widths))
    x_hats = sae.nest(parts)  # (B, G, D)
    x_hat = x_hats[:, -1].detach()
    loss = nested_loss(x, x_hats)
    if len(dead):  # why copies of the dead rows: indexing the parameters would cost two more F x D gradients
        where = (dead - sae.n_core, dead, dead)
        rows = [p.detach()[at].requires_grad_() for p, at in zip(trained, where)]
        loss = loss + alpha * dead_latent_loss(x, x - x_hat, *rows, b_dec, k_aux=x.shape[1] // 2)
    loss.backward()
    if len(dead):
        for p, r, at in zip(trained, rows, where):
            p.grad.index_add_(0, at, r.grad)
    return loss.detach(), x_hat, cut, col, core_l0

@torch.no_grad()
def apply_gradients(trained, adam, lr):
    """One optimiser step that leaves decoder rows unit-norm. Returns the gradient's norm before clipping, ()."""
    W_dec = trained[2]
    # why: along a unit row the gradient only works against the normalisation, and fills Adam's moments with that
    W_dec.grad.addcmul_(W_dec, torch.einsum("fd,fd->f", W_dec.grad, W_dec)[:, None], value=-1)
    norm = nn.utils.clip_grad_norm_(trained, 1.0)  # the clip of the SAEBench suite's trainings
    adam.param_groups[0]["lr"] = lr
    adam.step()
    adam.zero_grad()
    W_dec.div_(W_dec.norm(dim=1, keepdim=True))
    return norm

# ---- Training one SAE --------------------------------------------------------------------------------------------------
def batches(model, cfg, text, scale, cycle, block=0, start=0):
    """Endless shuffled batches (B, D), float32, scaled; each with the position from which the next one follows.
    A block (about 64 batches, our choice) is harvested at once and shuffled whole: its number, the cycle and the seed fix it."""
    n = -(-64 * cfg.batch // (cfg.ctx - 1))
    while True:
        acts = harvest(model, cfg.layer, text, text.block(block, n, cfg.seed))  # (about 64 B, D)
        need(len(acts) >= cfg.batch, "the text holds hardly more than special tokens: nothing to train on")
        order = torch.randperm(len(acts), generator=generator(cfg.seed, cycle, block)).to(acts.device)
        for i in range(start, len(order) // cfg.batch):
            yield acts[order[i * cfg.batch:(i + 1) * cfg.batch]].float() * scale, (block, i + 1)
        block, start = block + 1, 0

@torch.no_grad()
def new_sae(cfg, core, x, scale, cycle):
    """A fresh SAE around the core's encoder rows. x (B, D): a first batch, whose mean is b_dec's start. why only rows travel
    (the paper's choice): they say what a latent detects; a row that is useful again has proved it among new neighbours."""
    C = len(core)
    sae = MatryoshkaSAE(x.shape[1], cfg.widths(C), C, 0 if cfg.core_sparsity == "compete" else C, x.device,
                        generator=generator(cfg.seed, cycle, "init"))
    sae.b_dec.copy_(x.mean(0))
    sae.W_enc[:C] = core.W_enc.to(x.device)
    if cfg.core_decoder == "encoder":
        sae.W_dec[:C] = F.normalize(sae.W_enc[:C])
    if cfg.core_sparsity == "gated":  # the latent starts as the function that it was at birth
        sae.b_enc[:C] = core.bias.to(x.device) * scale + sae.W_enc[:C] @ sae.b_dec
        sae.threshold[:C] = core.threshold.to(x.device) * scale
    return sae

def learning_rate(step, steps, peak):
    """Linear warm-up over 1000 steps (a short run: a tenth), constant, linear to 0 in the last fifth: the SAEBench suite's."""
    return peak * min(1, (step + 1) / min(1000, max(1, steps // 10)), (steps - step) / (0.2 * steps))

def train_sae(cfg, model, text, scale, core, cycle, out):
    """Train one SAE on scaled activations, from OUT/checkpoint.safetensors if that is of this cycle. Returns the SAE (scale
    not folded in), its share of dead latents, seconds. KeyboardInterrupt, after a checkpoint, on Ctrl-C; BadInput where the
    loss is not finite."""
    clock, steps, path = time.time(), cfg.tokens // cfg.batch, out / "checkpoint.safetensors"
    dead_after = min(10_000_000, cfg.tokens // 10)  # tokens without firing: Gao et al. 2024; the tenth is ours, for short runs
    saved, at = load_tensors(path, "delete it to begin this training again; finished ones are kept") if path.exists() else ({}, {})
    if at.get("cycle") != cycle:
        saved, at = {}, dict(step=0, position=(0, 0), row_step=0, seconds=0.0)
    trim_log(out, cycle, at["step"])
    data = batches(model, cfg, text, scale, cycle, *at["position"])
    x, position = next(data)
    sae = new_sae(cfg, core, x, scale, cycle)
    trained = sae.trained()
    # why a new Adam: moments of other latents are noise. why eps: a rare latent's gradient, under a loss divided by G * D,
    # is near Adam's default of 1e-8
    adam = torch.optim.Adam(trained, lr=cfg.lr, betas=(0.9, 0.999), eps=1e-12, fused=True)
    since = torch.zeros(cfg.d_sae, dtype=torch.int64, device=x.device)  # tokens since each latent fired
    sums = torch.zeros(6, device=x.device)  # since the last row: loss, squared error, variance, l0, core l0, gradient norm
    state = {"since": since, "sums": sums, **{f"sae.{name}": t for name, t in sae.state_dict().items()}}
    for i, p in enumerate(trained):
        adam.state[p] = dict(step=torch.zeros((), device=x.device), exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
        state |= {f"adam{i}.{name}": t for name, t in adam.state[p].items()}
    for name in list(saved):
        state[name].detach().copy_(saved.pop(name))
    floor = cfg.k if cfg.core_sparsity == "exempt" else max(1, cfg.k // 10)  # k/10: our choice
    guess = 0.9 * sae.survivors(x[:64], cfg.k, floor)[3]  # why: without a guess half of all B x F would be candidates
    clock, saved_at, row_step = clock - at["seconds"], time.time(), at["row_step"]
    stopped = []  # why: Ctrl-C must not cut a step in two
    with ExitStack() as stack:
        stack.callback(signal.signal, signal.SIGINT, signal.signal(signal.SIGINT, lambda *_: stopped.append(True)))
        for step in progress(f"train {cycle}", range(at["step"], steps), total=steps, initial=at["step"], unit="step"):
            dead = sae.n_core + (since[sae.n_core:] >= dead_after).nonzero()[:, 0]  # (d,)
            loss, x_hat, cut, col, core_l0 = loss_and_grad(sae, trained, x, cfg.k, floor, guess, dead)
            norm = apply_gradients(trained, adam, learning_rate(step, steps, cfg.lr))
            sae.update_threshold(cut, step)
            guess = 0.9 * cut  # our choice: the cut moves a few per cent between batches
            since += len(x)
            since[col] = 0
            sums += torch.stack([loss, (x - x_hat).pow(2).sum(), (x - x.mean(0)).pow(2).sum(),
                                 torch.full_like(loss, len(col) / len(x)), core_l0, norm])
            row_due = (step + 1) % max(1, steps // 10) == 0 or step + 1 == steps
            save_due = stopped or step + 1 == steps or time.time() - saved_at >= 60 * cfg.checkpoint_minutes
            if row_due or save_due:  # the only places that read numbers back from the device
                need(sums.isfinite().all(), f"training {cycle}: the loss is not finite at step {step + 1}; the last good "
                     f"checkpoint, if there was one, is kept in {out}; try another --out with --lr {cfg.lr / 3:.2g}")
            if row_due:
                loss, error, variance, l0, core_l0, _ = (sums / (step + 1 - row_step)).tolist()
                row = dict(cycle=cycle, step=step + 1, tokens=(step + 1) * cfg.batch, loss=loss, fvu=error / variance, l0=l0,
                           core_l0=core_l0, dead=len(dead) / cfg.d_sae, seconds=time.time() - clock)
                log(out, row, f"{row['step']:7d} {row['tokens'] / 1e6:8.2f}M {loss:8.4f} {row['fvu']:7.4f} {l0:7.1f} "
                    f"{f'({core_l0:.1f})':>7s} {row['dead']:6.1%} {row['tokens'] / row['seconds'] / 1e3:8.1f}")
                sums.zero_()
                row_step = step + 1
            if save_due:
                saved_at = time.time()
                save_tensors(state, path, cycle=cycle, step=step + 1, position=position, row_step=row_step, seconds=saved_at - clock)
            if stopped:
                raise KeyboardInterrupt
            if step + 1 < steps:
                x, position = next(data)
    return sae, (since >= dead_after).float().mean().item(), time.time() - clock

# ---- Held-out evaluation, and attribution ------------------------------------------------------------------------------
def evaluate(model, layer, text, ids, sae, ce_original, ce_zero):
    """Held-out figures of an SAE in raw units with its inference thresholds: a dict of floats; fvu has one per prefix.
    fvu = squared error / variance about the mean. ce_recovered = (zero - sae) / (zero - original), where `zero` is the
    loss with the layer's output zeroed at all positions (Karvonen et al. 2025, eq. 4)."""
    sums = []
    def edit(h, keep):
        x = h[keep].float()  # (B, D)
        x_hats, col, _ = sae.reconstruct(x)  # (B, G, D), (n,)
        error = (x[:, None] - x_hats).pow(2).sum((0, 2))  # (G,)
        counts = len(x), len(col), (col < sae.n_core).sum().item(), x.pow(2).sum().item()
        sums.append(torch.tensor([*counts, *error.tolist(), *x.sum(0).tolist()], dtype=torch.float64))
        return h.masked_scatter(keep[..., None], x_hats[:, -1].to(h.dtype))
    ce, G = mean_loss(model, layer, text, ids, edit), len(sae.widths)
    tokens, on, core_on, square, *rest = sum(sums).tolist()
    fvu = [e / (square - sum(s * s for s in rest[G:]) / tokens) for e in rest[:G]]
    return dict(fvu=fvu, l0=on / tokens, core_l0=core_on / tokens, ce=ce, ce_recovered=(ce_zero - ce) / (ce_zero - ce_original))

def attribute(model, layer, text, ids, sae, agg="mean", with_error=False):
    """Score of each candidate (core and prefix 0), and the share of tokens where it is on: (M,), (M,), float64.
    a_i(t) = f_i(t) <dLoss/dx_hat(t), W_dec_i>: the loss is the next-token loss summed over tokens of ids (R, ctx), the
    layer's output being replaced by x_hat, the most nested reconstruction (the paper). why the narrowest: the core shall
    carry what the model needs without finer latents to lean on. Score: mean over tokens of |a_i|; signed: |mean of a_i|;
    quantile: 0.99 quantile of |a_i|. with_error adds the constant x - x_hat, so that gradients are those of the model's own
    forward pass. Only layers after the splice are differentiated: nothing before it asks for a gradient."""
    M, total, on, tokens, top, at = sae.widths[0], 0.0, 0.0, 0, None, {}
    rank = int(0.01 * text.keep(ids).sum()) + 1  # the 0.99 quantile is the value with this rank from above
    def edit(h, keep):
        x = h[keep].to(sae.W_enc.dtype)  # (B, D)
        with torch.no_grad():
            at["f"] = sae.encode(x, M)  # (B, M)
            x_hat = sae.decode(at["f"])
        at["x_hat"] = x_hat.requires_grad_()
        out = x_hat + (x - x_hat).detach() if with_error else x_hat
        return h.masked_scatter(keep[..., None], out.to(h.dtype))
    for loss, _ in spliced_losses(model, layer, text, ids, edit):
        grad, = torch.autograd.grad(loss, at["x_hat"])  # (B, D)
        a = at["f"] * (grad @ sae.W_dec[:M].detach().T)  # (B, M)
        total += (a if agg == "signed" else a.abs()).sum(0).cpu().double()
        on += (at["f"] > 0).sum(0).cpu().double()
        tokens += len(a)
        if agg == "quantile":  # exact: keep the `rank` largest so far of every latent
            top = a.abs() if top is None else torch.cat([top, a.abs()])
            top = top.topk(min(rank, len(top)), dim=0, sorted=False).values
    return top.amin(0).cpu().double() if agg == "quantile" else total.abs() / tokens, on / tokens

# ---- The core ----------------------------------------------------------------------------------------------------------
def select_core(scores, coverage):
    """Smallest set of latents that holds `coverage` of the total score, the most important first. (M,) -> (C,) indices.
    BadInput (a ValueError) where there is no positive, finite total to share out."""
    value, order = scores.double().sort(descending=True, stable=True)
    share = value.cumsum(0)  # (M,) rises to the total
    need(0 < share[-1] < math.inf, f"no core can be selected: the scores sum to {share[-1]:g}; try more --tokens")
    return order[:int((share < coverage * share[-1]).sum()) + 1]  # + 1: the latent that crosses the line

@dataclass
class Core:
    """What travels between trainings: C encoder rows with their gates (used by `gated` only) and their history."""
    W_enc: torch.Tensor  # (C, D) frozen rows; Core(torch.zeros(0, D)) is the core of training 0
    bias: torch.Tensor = torch.zeros(0)  # (C,) b_enc - W_enc b_dec at birth, raw activation units
    threshold: torch.Tensor = torch.zeros(0)  # (C,) at birth, raw units
    birth: torch.Tensor = torch.zeros(0, 2).long()  # (C, 2) training and index there: its identity, as rows never change
    votes: torch.Tensor = torch.zeros(0).long()  # (C,) how many trainings selected it
    score: torch.Tensor = torch.zeros(0)  # (C,) at the last selection
    density: torch.Tensor = torch.zeros(0)  # (C,) share of tokens on which it was on then
    index: torch.Tensor = torch.zeros(0).long()  # (C,) its place in the SAE that it was last selected from

    def __len__(self):
        return len(self.W_enc)

@torch.no_grad()
def next_core(core, sae, chosen, scores, density, training):
    """The core after a training: `chosen` of the M candidates. Old members keep row, gate and identity bit by bit.
    sae: in raw units. training: number of this training in the newcomers' identity."""
    new = torch.arange(len(core), sae.widths[0])
    W_new = sae.W_enc.cpu()[new]
    candidates = Core(  # old members first, as in the SAE
        torch.cat([core.W_enc, W_new]), torch.cat([core.bias, sae.b_enc.cpu()[new] - W_new @ sae.b_dec.cpu()]),
        torch.cat([core.threshold, sae.threshold.cpu()[new]]),
        torch.cat([core.birth, torch.stack([torch.full_like(new, training), new], 1)]),
        torch.cat([core.votes, torch.zeros_like(new)]) + 1, scores.float(), density.float(), torch.arange(sae.widths[0]))
    return Core(*(t[chosen] for t in vars(candidates).values()))

# ---- Files: written beside their place, then renamed, so what is there is whole ----------------------------------------
def write_text(text, path):
    """Write a text file atomically."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    part.replace(path)

def checksum(tensors):
    """CRC-32 of named tensors. why: safetensors notices a file cut short, but not a changed byte."""
    crc = 0
    for name in sorted(tensors):
        crc = zlib.crc32(tensors[name].cpu().reshape(-1).view(torch.uint8).numpy(), crc)
    return crc

def save_tensors(tensors, path, **meta):
    """Write named tensors and JSON metadata atomically, as safetensors."""
    part = path.with_name(path.name + ".part")
    tensors = {name: t.detach().contiguous() for name, t in tensors.items()}
    save_file(tensors, part, {"dmsae": json.dumps({**meta, "crc": checksum(tensors)})})
    part.replace(path)

def load_tensors(path, mend):
    """Tensors and metadata from save_tensors. BadInput, saying how to `mend` it, where the file is damaged or not ours."""
    try:
        tensors = load_file(path)
        with safe_open(path, "pt") as f:
            meta = json.loads(f.metadata()["dmsae"])
        need(checksum(tensors) == meta["crc"], "its checksum differs")
        return tensors, meta
    except Exception as e:  # safetensors raises its own types, and a foreign header can hold anything
        raise BadInput(f"{path}: is damaged or not from dmsae.py ({e}); {mend}") from None

def load_core(path, d_model=None):
    """A Core from core.safetensors, and the number of the training that selected it. BadInput on another width (None: any)."""
    tensors, meta = load_tensors(Path(path), "give a core.safetensors that dmsae.py wrote")
    need("birth" in tensors, f"--core {path}: holds no core; give a core.safetensors")
    need(d_model in (None, tensors["W_enc"].shape[1]), f"--core {path}: has rows of width {tensors['W_enc'].shape[1]}, but the model's "
         f"activations have {d_model}; use the model that it came from ({meta['model']} layer {meta['layer']})")
    return Core(**tensors), meta["training"]

def save_sae(sae, folder, **metadata):
    """Write an SAE in raw units in SAELens's layout: cfg.json and sae_weights.safetensors with W_enc (D, F). SAELens's
    `jumprelu`, on where pre > threshold with a threshold per latent, is exactly our inference."""
    weights = {"W_enc": sae.W_enc.T, "W_dec": sae.W_dec, "b_enc": sae.b_enc, "b_dec": sae.b_dec, "threshold": sae.threshold}
    save_file({name: t.detach().contiguous() for name, t in weights.items()}, folder / "sae_weights.safetensors")
    metadata = dict(sae_lens_version="6.0.0", **metadata, widths=sae.widths, n_core=sae.n_core, n_exempt=sae.n_exempt)
    write_text(json.dumps(dict(
        architecture="jumprelu", d_in=sae.W_enc.shape[1], d_sae=len(sae.W_enc), dtype="float32", device="cpu",
        apply_b_dec_to_input=True, normalize_activations="none", reshape_activations="none", metadata=metadata), indent=1),
        folder / "cfg.json")

def load_sae(folder, device="cpu"):
    """The SAE in a folder of SAELens's `jumprelu` layout, ours or another's; it takes raw activations. BadInput."""
    try:
        cfg = json.loads((Path(folder) / "cfg.json").read_text())
        w = load_file(Path(folder) / "sae_weights.safetensors", device=str(device))
        for key, only in dict(architecture="jumprelu", normalize_activations="none", apply_b_dec_to_input=True).items():
            need(cfg.get(key, only) == only, f"{key} is {cfg.get(key)!r}, only {only!r} is read")
        m = cfg.get("metadata", {})
        sae = MatryoshkaSAE(cfg["d_in"], m.get("widths", [cfg["d_sae"]]), m.get("n_core", 0), m.get("n_exempt", 0), device)
        sae.load_state_dict({**w, "W_enc": w["W_enc"].T})
        return sae
    except Exception as e:  # missing, cut or foreign files
        raise BadInput(f"{folder}: is no SAE folder ({e}); it needs cfg.json and sae_weights.safetensors") from None

def log(out, row, line):
    """Append a row to OUT/log.jsonl, and print its line above the progress bar."""
    with open(out / "log.jsonl", "a") as f:
        f.write(json.dumps(row) + "\n")
    tqdm.write(line)

def trim_log(out, cycle, step):
    """Drop the log's rows past a step of a cycle: they will be written again."""
    lines = (out / "log.jsonl").read_text().splitlines(keepends=True) if (out / "log.jsonl").exists() else []
    at = [(row["cycle"], row.get("step", math.inf)) for row in map(json.loads, lines)]
    write_text("".join(line for line, place in zip(lines, at) if place <= (cycle, step)), out / "log.jsonl")

# ---- The demo's language model: trained on the spot, then an ordinary Hugging Face folder like any other ---------------
def demo_config():
    """A Gemma-2 of 1.4M parameters."""
    from transformers import Gemma2Config
    return Gemma2Config(vocab_size=2048, hidden_size=160, intermediate_size=640, num_hidden_layers=3, num_attention_heads=4,
                        num_key_value_heads=2, head_dim=40, query_pre_attn_scalar=40, max_position_embeddings=512,
                        sliding_window=512, pad_token_id=0, eos_token_id=1, bos_token_id=2)

def build_demo(folder, steps=900):
    """Train a tokenizer and a model (8 x 128 tokens a step) on the 5 MB of English and Python in every Python installation:
    its language reference and standard library. Leaves both in `folder`, and the text in text.jsonl."""
    from pydoc_data.topics import topics
    from tokenizers import ByteLevelBPETokenizer
    from transformers import Gemma2ForCausalLM, PreTrainedTokenizerFast
    docs = [*topics.values(), *(p.read_text(errors="replace") for p in Path(sysconfig.get_path("stdlib")).glob("*.py"))]
    docs = [d[i:i + 4000] for d in docs for i in range(0, len(d), 4000)]
    docs.sort(key=lambda d: zlib.crc32(d.encode()))  # a fixed shuffle. why: then what is held out is like the rest
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(docs, vocab_size=2048, special_tokens=["<pad>", "<eos>", "<bos>"], show_progress=False)
    ids = torch.tensor([i for e in bpe.encode_batch(docs) for i in (2, *e.ids)]).repeat(2)[:8 * 128 * steps].view(-1, 128)
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(demo_config())
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if all(p is not m for m in matrices)]
    # why Muon: at this size it learns clearly more in the same time than AdamW alone
    muon, adam = torch.optim.Muon(matrices, lr=9e-3, weight_decay=0), torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.95))
    for step, b in enumerate(progress("demo model", ids[torch.randperm(len(ids))].split(8), unit="step")):
        loss = F.cross_entropy(model(b).logits[:, :-1].flatten(0, 1), b[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for o, peak in (muon, 9e-3), (adam, 3e-3):
            o.param_groups[0]["lr"] = peak * min(1, (step + 1) / 30, (steps - step) / (0.6 * steps))
            o.step()
            o.zero_grad()
    part = folder.with_name(folder.name + ".part")
    model.save_pretrained(part)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>")
    tokenizer.save_pretrained(part)
    write_text("".join(json.dumps({"text": d}) + "\n" for d in docs), part / "text.jsonl")
    part.replace(folder)

# ---- The distillation cycles -------------------------------------------------------------------------------------------
def open_run(cfg, out):
    """What an earlier run measured in OUT, {} if there was none. BadInput where OUT belongs to another configuration."""
    if not (out / "config.json").exists():
        return {}
    old, new = json.loads((out / "config.json").read_text()), json.loads(json.dumps(asdict(cfg)))
    free = "device", "out", "checkpoint_minutes", "cycles"  # none of these changes a training: more cycles go on
    differ = [f"{key} {old.get(key)} there, {new[key]} here" for key in new if key not in free and old.get(key) != new[key]]
    need(not differ, f"--out {out}: holds a run with other settings ({'; '.join(differ)}); give another --out")
    return old["measured"]

def one_cycle(cfg, model, text, measured, core, training, cycle, out):
    """Train, evaluate, attribute, select; save OUT/cycleN. Returns the next core, and the row for the table.
    training: the cycle's number counted over all runs that led to the core."""
    print(f"cycle {cycle}/{cfg.cycles}   core {len(core)}{'' if len(core) else ' (this is the plain Matryoshka baseline)'}\n"
          "   step    tokens     loss     fvu      l0  (core)   dead   ktok/s", flush=True)
    sae, dead, seconds = train_sae(cfg, model, text, measured["scale"], core, cycle, out)
    clock = time.time() - seconds
    sae.fold_scale(measured["scale"])
    ids = text.contexts(slice(text.n_eval + text.n_attribution)).split([text.n_eval, text.n_attribution])
    held = evaluate(model, cfg.layer, text, ids[0], sae, measured["ce_original"], measured["ce_zero"])
    scores, density = attribute(model, cfg.layer, text, ids[1], sae, cfg.attribution_agg, cfg.attribution_error)
    chosen = select_core(scores, cfg.coverage)
    order = dict(attribution=chosen, frequency=density.sort(descending=True, stable=True).indices,
                 random=torch.randperm(len(scores), generator=generator(cfg.seed, cycle, "core")))
    chosen = order[cfg.select][:len(chosen)]  # the controls are of the size that attribution would have chosen
    new, kept = next_core(core, sae, chosen, scores, density, training), int((chosen < len(core)).sum())
    births, tokens = new.birth[:, 0].tolist(), cfg.tokens // cfg.batch * cfg.batch
    origins = {b: births.count(b) for b in sorted(set(births))}
    row = dict(cycle=cycle, core=len(new), kept=kept, new=len(new) - kept, dropped=len(core) - kept, origins=origins, **held,
               dead=dead, widths=sae.widths, tokens=tokens, seconds=time.time() - clock)
    part = out / f"cycle{cycle}.part"
    part.mkdir(exist_ok=True)
    save_sae(sae, part, model_name=cfg.model, hook_name=f"blocks.{cfg.layer}.hook_resid_post", context_size=cfg.ctx,
             prepend_bos=True, dataset_path=cfg.text or cfg.dataset, config=asdict(cfg), result=row)
    save_tensors(vars(new), part / "core.safetensors", training=training, **asdict(cfg))
    log(out, row, f"  core: {len(new)} of {sae.widths[0]} latents, {scores[chosen].sum() / scores.sum():.1%} of the attribution; "
        f"born in training {', '.join(f'{b}: {count}' for b, count in origins.items())}")
    part.replace(out / f"cycle{cycle}")
    (out / "checkpoint.safetensors").unlink()
    if held["core_l0"] > cfg.k / 2:
        print(f"  warning: the core alone has L0 {held['core_l0']:.1f}, more than half of k = {cfg.k}; "
              f"total L0 is {held['l0']:.1f}. See --core-sparsity", flush=True)
    return new, row

def run(cfg):
    """A whole run, from wherever OUT has it."""
    check(cfg)
    from transformers import AutoTokenizer
    out = Path(cfg.out)
    measured, lm = open_run(cfg, out), model_config(cfg)
    need(cfg.layer < lm.num_hidden_layers, f"--layer {cfg.layer}: {cfg.model} has layers 0 to {lm.num_hidden_layers - 1}, for "
         f"example --layer {lm.num_hidden_layers // 2}")
    need(cfg.ctx <= getattr(lm, "max_position_embeddings", cfg.ctx), f"--ctx {cfg.ctx}: {cfg.model} takes at most "
         f"{getattr(lm, 'max_position_embeddings', 0)}, for example --ctx 128")
    core, training = load_core(cfg.core, lm.hidden_size) if cfg.core else (Core(torch.zeros(0, lm.hidden_size)), -1)
    cfg.widths(len(core))
    free = shutil.disk_usage(next(p for p in (out, *out.absolute().parents) if p.exists())).free
    wanted = (6 + cfg.cycles + 1) * 8 * cfg.d_sae * lm.hidden_size + 4 * cfg.tokens  # checkpoint, old and new; SAEs; token ids
    need(measured or free >= wanted, f"--out {out}: has {free / 1e9:.3g} GB free of the {wanted / 1e9:.3g} GB that it writes; "
         "give another disk, or a smaller --d-sae or --tokens")
    cuda = cfg.device.startswith("cuda")
    machine = torch.cuda.get_device_name(cfg.device) if cuda else f"{cfg.device}, {torch.get_num_threads()} threads"
    print(f"dmsae | {cfg.model} layer {cfg.layer} | {machine} | {out}\n  cycles {cfg.cycles}   k {cfg.k}   d_sae {cfg.d_sae:,}   "
          f"prefixes {' '.join(map(str, cfg.widths()))}   tokens/training {cfg.tokens:,}   core {cfg.core_sparsity}", flush=True)
    torch.set_float32_matmul_precision("high")  # TF32 for the encoder's product; parameters and moments stay float32
    out.mkdir(parents=True, exist_ok=True)
    clock = time.time()
    if cfg.demo_builds:
        build_demo(Path(cfg.model))
        print(f"  demo language model trained in {time.time() - clock:.0f} s, saved in {cfg.model}", flush=True)
    save_config = lambda: write_text(json.dumps({**asdict(cfg), "measured": measured}, indent=1), out / "config.json")
    text = open_text(cfg, AutoTokenizer.from_pretrained(cfg.model), out, save_config)
    n_train = len(text.rows) - text.n_eval - text.n_attribution
    print(f"  text: {text.rows.size:,} tokens, of which {1 - n_train / len(text.rows):.1%} held out; each training "
          f"reads the others {cfg.tokens / n_train / (cfg.ctx - 1):.1f} times", flush=True)
    model = load_model(cfg)
    if not measured:
        where = model, cfg.layer, text, text.contexts(slice(text.n_eval))
        x = harvest(model, cfg.layer, text, text.block(0, -(-65536 // cfg.ctx), cfg.seed)).float()
        measured = dict(scale=math.sqrt(x.shape[1] / x.pow(2).sum(1).mean().item()),  # mean ||x||^2 = D, on 65,536 tokens (ours)
                        ce_original=mean_loss(*where, lambda h, keep: h),
                        ce_zero=mean_loss(*where, lambda h, keep: torch.zeros_like(h)))
    save_config()
    print("  held-out loss {ce_original:.3f} nats a token, {ce_zero:.3f} with the layer zeroed".format(**measured), flush=True)
    table = []
    while (out / f"cycle{len(table)}").exists() and len(table) <= cfg.cycles:
        table.append(json.loads((out / f"cycle{len(table)}" / "cfg.json").read_text())["metadata"]["result"])
        core, _ = load_core(out / f"cycle{len(table) - 1}" / "core.safetensors", lm.hidden_size)
        print(f"  cycle {len(table) - 1} is done")
    for cycle in range(len(table), cfg.cycles + 1):
        core, row = one_cycle(cfg, model, text, measured, core, training + 1 + cycle, cycle, out)
        table.append(row)
    print("cycle   core   kept    new dropped      l0    (core)  ce recovered    dead   minutes   fvu by prefix")
    for r in table:
        print("{cycle:5d} {core:6d} {kept:6d} {new:6d} {dropped:7d} {l0:7.1f} {core_l0:9.1f}".format(**r),
              f"{r['ce_recovered']:13.4f} {r['dead']:7.1%} {r['seconds'] / 60:9.1f}  ", *(f"{f:.4f}" for f in r["fvu"]))
    counts = [f"{int((core.votes >= v).sum())} by {v} or more" for v in range(1, int(core.votes.max()) + 1)]
    peak = f", peak GPU memory {torch.cuda.max_memory_allocated(cfg.device) / 2**30:.1f} GiB" if cuda else ""
    print(f"distilled core: latents by how many trainings selected them: {', '.join(counts)}\n"
          f"done in {(time.time() - clock) / 60:.1f} minutes{peak}; SAEs and cores are in {out}/cycle*; next: python eval.py {out}")

def main(argv=None, name="dmsae", work=lambda argv: run(parse(argv))):
    """The command line (eval.py's too). Returns the exit code: 0 done, 2 bad input, 130 interrupted."""
    warnings.filterwarnings("ignore", message="Sparse CSR")  # torch calls them beta
    try:
        work(argv)
        return 0
    except (BadInput, OSError) as e:  # OSError: a folder that cannot be written, a full disk
        print(f"{name}: " + " ".join(str(e).split())[:1000], file=sys.stderr)  # one line, also where libraries say several
        return 2
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted; a training goes on from its last checkpoint with the same command", file=sys.stderr)
        return 130

if __name__ == "__main__":
    sys.exit(main())
