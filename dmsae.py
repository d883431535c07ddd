"""Distilled Matryoshka Sparse Autoencoders (DMSAE) in one file (Martin-Linares & Ling 2025, arXiv 2512.24975):

    core = nothing
    for n in 0 .. cycles:  # training 0 has no core: it is the plain Matryoshka BatchTopK baseline
        sae   = a Matryoshka BatchTopK SAE, trained from scratch; `core` stands frozen inside its every prefix
        score = |activation x gradient| of each latent of core + prefix 0, the gradient being that of the language
                model's next-token loss, back-propagated to the narrowest nested reconstruction
        core  = the smallest set of latents that holds 90 % of the score; only its encoder rows travel on (and, ours, their gates)

    python dmsae.py --demo                    everything in miniature, no network, no GPU: some 3 minutes on two CPU cores
    python dmsae.py --cycles 5 --k 64         google/gemma-2-2b, layer 12, 65,536 latents, one GPU

Shapes: B tokens in a batch, T in a context, D = d_model, F = d_sae, G prefixes, C core latents, M latents in core and prefix 0,
n survivors of BatchTopK. W_enc and W_dec are both (F, D): one row per latent. Parents: Bussmann et al. 2025 (Matryoshka, arXiv
2503.17547), Bussmann et al. 2024 (BatchTopK, 2412.06410), Gao et al. 2024 (TopK and the dead-latent loss, 2406.04093), Karvonen
et al. 2025 (SAEBench, 2503.09532).
"""

import argparse, contextlib, datetime, importlib.util, itertools, json, math, os, re, shutil, signal, sys, sysconfig, time, warnings, zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
import numpy as np
import torch
import torch.distributed as dist
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


def opt(
    default, help, choices=None, **words
):  # a dataclass field that carries the words for argparse
    return field(default=default, metadata=dict(help=help, choices=choices, **words))


@dataclass
class Config:
    """All settings of a run. Every field is a flag: d_sae is --d-sae."""

    model: str = opt(
        "google/gemma-2-2b", "language model: hub name or local folder, any AutoModelForCausalLM"
    )
    layer: int = opt(12, "read and replace the output of this decoder layer, counted from 0")
    dataset: str = opt("JeanKaddour/minipile", "hub dataset, streamed; needs a train split")
    text: str = opt(None, "local .txt, .jsonl or .parquet file, in place of --dataset")
    text_column: str = opt("text", "column that holds the text (not for .txt)")
    separator: str = opt(
        None, "string between the documents of a .txt file; without it the file is one document"
    )
    ctx: int = opt(1024, "context length in tokens, BOS included")
    tokens: int = opt(
        100_000_000, "tokens for each training (the paper: 500_000_000); a shorter text is repeated"
    )
    d_sae: int = opt(65536, "number of latents, core included")
    k: int = opt(64, "active latents per token that BatchTopK leaves on average (L0)")
    prefixes: tuple = opt(
        (1 / 32, 3 / 32, 7 / 32, 15 / 32, 1.0),
        "nested widths without the core, shares or numbers of d_sae",
        type=float,
        nargs="+",
    )
    core_in_prefixes: bool = opt(
        False, "--prefixes count the core too; each keeps room for a new latent"
    )
    batch: int = opt(4096, "tokens per training step")
    lr: float = opt(3e-4, "peak learning rate of Adam")
    cycles: int = opt(
        5, "distillation cycles: trainings 0..cycles, where training 0 is the plain baseline"
    )
    coverage: float = opt(0.9, "share of the attribution that the core must hold")
    select: str = opt(
        "attribution",
        "what chooses the core; two controls of the same size",
        ("attribution", "frequency", "random"),
    )
    core: str = opt(None, "core.safetensors file to start training 0 with")
    core_sparsity: str = opt(
        "gated",
        "core outside BatchTopK, the rest shrinks (dynamic: the paper) or not (exempt); in it (compete); "
        "dynamic with its gate of birth (gated)",
        ("dynamic", "exempt", "compete", "gated"),
    )
    core_decoder: str = opt(
        "encoder", "where a core latent's decoder row starts", ("encoder", "random")
    )
    attribution_agg: str = opt(
        "mean",
        "over tokens: mean |a|, |mean a|, 0.99 quantile of |a|",
        ("mean", "signed", "quantile"),
    )
    attribution_error: bool = opt(
        False, "add the SAE's error back, so that gradients are those of the unspliced model"
    )
    attribution_tokens: int = opt(
        1_000_000, "held-out tokens for attribution; of a short text a tenth is held out"
    )
    seed: int = opt(0, "seed of everything random")
    device: str = opt("auto", "cuda, cuda:N or cpu; auto is cuda where there is one")
    out: str = opt(
        None, "run folder, resumed by the same command (default: runs/<model>_k<k>_seed<seed>)"
    )
    checkpoint_minutes: float = opt(5.0, "minutes of work between checkpoints")
    transfer_k: tuple = opt(
        (),
        "then train SAEs of the distilled core with these k, on the same blocks",
        type=int,
        nargs="+",
    )
    cache: str = opt(
        None,
        "folder that keeps harvested activations for later cycles and for other runs on the same text",
    )
    cache_gb: float = opt(
        None, "how much --cache may hold; what is beyond is harvested every time (default: all)"
    )
    compile: bool = opt(
        True, "torch.compile the harvested layers; only on CUDA, where triton is there"
    )
    dry_run: bool = opt(
        False,
        "time every phase of this very command on random tokens, print what it would take, and stop",
    )
    random_init: bool = opt(
        False, "with --dry-run: random weights, so that nothing is downloaded for gemma-2-2b"
    )
    demo: bool = opt(
        False,
        "miniature settings, and a small Gemma-2 trained on the spot on Python's own documentation",
    )

    def __post_init__(self):
        self.out = (
            self.out
            or f"runs/{'demo' if self.demo else Path(self.model).name}_k{self.k}_seed{self.seed}"
        )
        if self.device == "auto":
            self.device = "cuda" if torch.cuda.is_available() else "cpu"
        if self.demo and self.model == Config.model:
            self.model, self.text = f"{self.out}/model", self.text or f"{self.out}/model/text.jsonl"

    @property
    def demo_builds(self):  # whether the demo's language model has still to be trained
        return self.demo and self.model == f"{self.out}/model" and not Path(self.model).exists()

    def widths(self, n_core=0):
        """Cumulative widths of the prefixes, (G,) ints, a core of n_core latents in each; the last (or first) group shrinks. BadInput"""
        m = [
            0,
            *(round(p * self.d_sae) if max(self.prefixes) <= 1 else int(p) for p in self.prefixes),
        ]
        need(
            all(a < b for a, b in zip(m, m[1:])) and m[-1] == self.d_sae,
            f"--prefixes {' '.join(map(str, self.prefixes))}: must ascend "
            f"from above 0 and end in 1 or in d_sae ({self.d_sae}), for example --prefixes 0.0625 0.25 1",
        )
        least = n_core + (len(m) - 2 if self.core_in_prefixes else m[-2])
        need(
            least < m[-1],
            f"--d-sae {m[-1]}: must be above the core ({n_core}) plus the inner prefixes ({least - n_core})",
        )
        return [
            max(w, n_core + i) if self.core_in_prefixes else n_core + w
            for i, w in enumerate(m[1:-1], 1)
        ] + m[-1:]


KINDS = {".txt": "text", ".jsonl": "json", ".parquet": "parquet"}  # what `datasets` calls them
DEMO = dict(
    layer=1,
    ctx=128,
    tokens=400_000,
    d_sae=2048,
    k=16,
    batch=1024,
    lr=2e-3,
    cycles=3,
    attribution_tokens=60_000,
)


def parse(argv=None):
    """Command line -> Config. One line and exit code 2 on words that cannot be read."""
    p = argparse.ArgumentParser(
        "dmsae.py", allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    p.error = lambda message: p.exit(
        2, f"dmsae: {message}; python dmsae.py --help shows all flags\n"
    )
    for f in fields(Config):
        words = (
            dict(type=f.type) if f.type is not bool else dict(action=argparse.BooleanOptionalAction)
        )
        p.add_argument(
            "--" + f.name.replace("_", "-"),
            default=f.default,
            **words | {k: v for k, v in f.metadata.items() if v},
        )
    argv = [
        re.sub("^--[^=]*", lambda flag: flag[0].replace("_", "-"), a)
        for a in (sys.argv[1:] if argv is None else argv)
    ]
    if "--demo" in argv:
        p.set_defaults(**DEMO)
    return Config(
        **{
            name: tuple(v) if isinstance(v, list) else v
            for name, v in vars(p.parse_args(argv)).items()
        }
    )


def check(cfg):
    """Refuse impossible settings before anything is downloaded or trained. BadInput."""
    least, world = (
        dict(d_sae=2, k=1, batch=1, tokens=1, attribution_tokens=1, ctx=4, lr=1e-12),
        int(os.environ.get("WORLD_SIZE", 1)),
    )
    for name in (*least, "cycles", "layer", "seed", "checkpoint_minutes"):
        value, low = getattr(cfg, name), least.get(name, 0)
        need(
            value >= low,
            f"--{name.replace('_', '-')} {value}: must be {low} or above, for example {getattr(Config, name)}",
        )
    for flag, ks in ("--k", [cfg.k]), ("--transfer-k", cfg.transfer_k):
        need(
            all(0 < k < cfg.d_sae for k in ks) and len({*ks}) == len(ks),
            f"{flag} {' '.join(map(str, ks))}: must be above 0 and below d_sae "
            f"({cfg.d_sae}), none twice, for example {max(1, cfg.d_sae // 64)}",
        )
    need(
        cfg.tokens >= cfg.batch,
        f"--tokens {cfg.tokens}: must be one batch ({cfg.batch}) or more, for example {1000 * cfg.batch}",
    )
    least = world * max(64, cfg.ctx // 64)
    need(
        world == 1 or cfg.batch >= least,
        f"--batch {cfg.batch}: must be {least} or above with {world} processes, for example {4 * least}",
    )
    need(
        cfg.cache_gb is None or cfg.cache and cfg.cache_gb > 0,
        f"--cache-gb {cfg.cache_gb}: must be above 0, beside --cache DIR",
    )
    need(
        cfg.dry_run or not cfg.random_init,
        "--random-init: needs --dry-run; a random model has nothing to distil",
    )
    need(
        0 < cfg.coverage <= 1,
        f"--coverage {cfg.coverage}: must be above 0 and at most 1, for example 0.9",
    )
    cfg.widths()
    for flag, path in ("--core", cfg.core), ("--text", None if cfg.demo_builds else cfg.text):
        need(path is None or Path(path).is_file(), f"{flag} {path}: there is no such file")
    need(
        not cfg.text or Path(cfg.text).suffix in KINDS,
        f"--text {cfg.text}: must end in {', '.join(KINDS)}",
    )
    need(
        cfg.separator is None or cfg.separator and (cfg.text or "").endswith(".txt"),
        f"--separator {cfg.separator!r}: must not be empty, and needs a .txt file, for example --text stories.txt --separator '<|endoftext|>'",
    )
    there = ["cpu"] + [
        "cuda",
        *(f"cuda:{i}" for i in range(torch.cuda.device_count())),
    ] * torch.cuda.is_available()
    need(
        cfg.device in there,
        f"--device {cfg.device}: must be auto, or what is here: {', '.join(there)}",
    )


# ---- Several processes (torchrun): each harvests and encodes its share of a batch; sums over the batch are all-reduced -----
def place():  # (rank of this process, number of processes)
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def over_all(t, op=dist.ReduceOp.SUM):
    """Reduce t over all processes, in place. Returns t."""
    if dist.is_initialized():
        dist.all_reduce(t, op)
    return t


def joined(t):
    """The 1-D tensors t of all processes, one after the other; and where this process's begins."""
    rank, world = place()
    if world == 1:
        return t, 0
    sizes = over_all(
        torch.tensor([len(t) * (r == rank) for r in range(world)], device=t.device)
    ).tolist()
    return over_all(F.pad(t, (sum(sizes[:rank]), sum(sizes[rank + 1 :])))), sum(sizes[:rank])


# ---- Text: documents -> one flat stream of token ids on disk -> contexts -----------------------------------------------
def documents(cfg):
    """Yield the documents of --text or --dataset, one str each. BadInput where they cannot be read."""
    from datasets import load_dataset

    kind = KINDS[Path(cfg.text).suffix] if cfg.text else cfg.dataset
    try:
        for row in load_dataset(
            kind,
            data_files=cfg.text,
            split="train",
            streaming=True,
            **dict(sample_by="document") if kind == "text" else {},
        ):
            doc = row.get(cfg.text_column)
            need(
                isinstance(doc, str),
                f"--text-column {cfg.text_column}: holds no text; the columns are {', '.join(row)}",
            )
            yield from doc.split(cfg.separator) if cfg.separator else [doc]
    except Exception as e:  # datasets, fsspec and pyarrow raise a dozen unrelated types for a source that they cannot read
        raise (
            e
            if isinstance(e, BadInput)
            else BadInput(
                f"{cfg.text or cfg.dataset}: is no readable text ({type(e).__name__}: {e})"
            )
        )


def tokenize(docs, tokenizer, bos, limit, path):
    """Write `doc BOS doc BOS ...` to `path` as flat int32 ids, at most `limit`; returns how many. why on disk: nothing is tokenised twice."""
    n, docs = 0, iter(docs)
    with open(path, "wb") as f, progress("tokenise", total=limit, unit="tok") as bar:
        for batch in ahead(iter(lambda: list(itertools.islice(docs, 512)), [])):
            ids = tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]
            flat = np.concatenate([np.array([*i, bos] if i else [], dtype=np.int32) for i in ids])[
                : limit - n
            ]
            f.write(flat.tobytes())
            n += len(flat)
            bar.update(len(flat))
            if n == limit:
                break
    return n


def ahead(items):
    """The same items of an iterator, each made by a thread while the one before it is in use."""
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = thread.submit(next, items, None)
            yield item


def progress(name, items=None, **words):  # a bar of process 0 on a terminal, nothing in a log
    return tqdm(
        items, desc=name, unit_scale=True, disable=place()[0] > 0 or None, leave=False, **words
    )


def generator(
    *key,
):  # seeded by its key (seed, training, block, ...). why: then there is no generator state to save
    return torch.Generator().manual_seed(zlib.crc32(repr(key).encode()))


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
    path, part, width = out / "tokens.bin", out / "tokens.bin.part", cfg.ctx - 1
    n_eval, n_attribution = (
        -(-131072 // width),
        -(-cfg.attribution_tokens // width),
    )  # 131,072: our choice
    if not path.exists():
        limit = (
            int(1.02 * cfg.tokens) + (n_eval + n_attribution) * width
        )  # 2 %: special positions do not count
        n = tokenize(documents(cfg), tokenizer, bos, limit, part)
        need(
            n >= 3 * width,
            f"{cfg.text or cfg.dataset}: holds {n} tokens, not three contexts of {cfg.ctx}; give more, or a smaller --ctx",
        )
        commit()
        part.replace(path)
    rows = np.memmap(path, np.int32, "r", shape=(path.stat().st_size // 4 // width, width))
    held = max(2, min(n_eval + n_attribution, len(rows) // 10))
    special, n_eval = (
        {bos, tokenizer.eos_token_id, tokenizer.pad_token_id} - {None},
        min(n_eval, held // 2),
    )
    return Text(rows, bos, torch.tensor(sorted(special)), n_eval, held - n_eval)


# ---- The language model: read a layer, replace a layer -----------------------------------------------------------------
def model_config(cfg):
    """The language model's configuration, before its weights are fetched. BadInput with what to do."""
    if cfg.demo_builds:
        return demo_config()
    from transformers import AutoConfig, Gemma2Config

    if cfg.random_init and Path(cfg.model).name == "gemma-2-2b":
        return Gemma2Config()  # its defaults are Gemma-2-2B's
    try:
        return AutoConfig.from_pretrained(cfg.model).get_text_config()
    except (OSError, ValueError) as e:
        gated = (
            f"accept the licence on https://huggingface.co/{cfg.model}, then run `hf auth login`. "
            * ("google/" in cfg.model)
        )
        raise BadInput(
            f"--model {cfg.model}: cannot be loaded. {gated}--demo needs no download. ({e})"
        ) from None


def can_compile(cfg):  # by default: its code generator is there
    return cfg.compile and cfg.device.startswith("cuda") and importlib.util.find_spec("triton")


def load_model(cfg):
    """The frozen language model, bfloat16 on CUDA, else float32; its harvested layers compiled where cfg.compile says so."""
    from transformers import AutoModelForCausalLM as Auto, utils

    if not sys.stderr.isatty():
        utils.logging.disable_progress_bar()
    lm, words = (
        model_config(cfg),
        dict(dtype=torch.bfloat16 if cfg.device.startswith("cuda") else torch.float32),
    )
    if getattr(lm, "attn_logit_softcapping", None):
        words["attn_implementation"] = (
            "eager"  # why: SDPA would silently drop Gemma-2's attention soft-capping
        )
    model = (
        Auto.from_config(lm, **words)
        if cfg.random_init or cfg.demo_builds
        else Auto.from_pretrained(cfg.model, **words)
    )
    for layer in decoder_layers(model)[: cfg.layer + 1] if can_compile(cfg) else ():
        layer.forward = torch.compile(
            layer.forward
        )  # why not the whole model: `spliced` hooks in between
    return model.to(cfg.device).eval().requires_grad_(False)


def decoder_layers(model):
    """The ModuleList of decoder layers, whatever the architecture calls it."""
    return next(
        m
        for m in model.modules()
        if isinstance(m, nn.ModuleList)
        and len(m) == model.config.get_text_config().num_hidden_layers
    )


@contextlib.contextmanager
def spliced(model, layer, edit):
    """While open, the output h (b, T, D) of decoder layer `layer` is replaced by edit(h)."""
    hook = lambda module, args, out: (
        (edit(out[0]), *out[1:]) if isinstance(out, tuple) else edit(out)
    )  # transformers 4: a tuple
    with decoder_layers(model)[layer].register_forward_hook(hook):
        yield


@torch.no_grad()
def residual_stream(model, layer, ids):
    """Output of decoder layer `layer` (resid_post) for token ids (b, T): (b, T, D)."""

    class Reached(Exception):
        """Carries the output out of the model, so that later layers and the LM head never run."""

    def stop(h):
        raise Reached(h)

    try:
        with spliced(model, layer, stop):
            model(ids, use_cache=False)
    except Reached as reached:
        return reached.args[0]


def harvest(model, layer, text, ids):
    """Residual stream of contexts (R, ctx) at every kept position: (tokens, D) in the model's dtype, on its device."""
    tokens, acts = (
        16384 if model.device.type == "cuda" else 4096,
        [],
    )  # at once: what fills a GPU, what a CPU's caches hold
    for b in ids.split(max(1, tokens // ids.shape[1])):
        at = (
            text.keep(b).flatten().nonzero()[:, 0]
        )  # why on the CPU: a mask on the device would be a sync
        acts.append(
            residual_stream(model, layer, b.to(model.device)).flatten(0, 1)[at.to(model.device)]
        )
    return torch.cat(acts)


def spliced_losses(model, layer, text, ids, edit):
    """Run contexts ids (R, ctx) with the layer's output h (b, T, D) replaced by edit(h, keep (b, T)); for every b contexts yield the
    next-token loss in nats, summed over kept source positions (Karvonen et al. 2025), and their number."""
    n = max(
        1, min(16384, 2**28 // model.config.get_text_config().vocab_size) // ids.shape[1]
    )  # why: float32 logits within 1 GiB
    for b in progress("held out", ids.to(model.device).split(n)):
        keep = text.keep(b)
        with spliced(model, layer, lambda h: edit(h, keep)):
            logits = model(b, use_cache=False).logits  # (b, T, V)
        logits, targets = (
            logits[:, :-1][keep[:, :-1]],
            b[:, 1:][keep[:, :-1]],
        )  # (positions, V), (positions,)
        yield (
            F.cross_entropy(
                logits.to(torch.promote_types(logits.dtype, torch.float32)),
                targets,
                reduction="sum",
            ),
            len(logits),
        )


@torch.no_grad()
def mean_loss(*args):
    """Mean of spliced_losses over all positions, nats a token."""
    loss, positions = zip(*spliced_losses(*args))
    return sum(loss).item() / sum(positions)


# ---- The sparse step: exact, with B*k of B x F activations not zero, so that only the encoder's product is dense -------
def candidates(x, W_enc, b_enc, bound):
    """The entries of x W_enc^T + b_enc above bound (F,): value, row and col, each (n,), sorted by row, then col. x (B, D)
    why in slices of latents: a slice is searched while it is still in the cache, and a large F needs no buffer of B x F."""
    width, found = (
        max(8, (2**28 if x.is_cuda else 2**21) // max(1, len(x)) // 8 * 8),
        [],
    )  # B x width: 1 GiB on a GPU, 8 MiB on a CPU
    for W, b, low, start in zip(
        W_enc.split(width), b_enc.split(width), bound.split(width), range(0, len(W_enc), width)
    ):
        pre = (
            x @ W.T
        )  # (B, width). why b is not added here: that would be a pass over B x F numbers more
        at = (
            pre > low - b
        ).flatten()  # (B * width,). Few are True, and those numpy finds several times faster than torch
        at = (
            at.nonzero()[:, 0] if x.is_cuda else torch.from_numpy(np.flatnonzero(at))
        )  # on a GPU a sync: it waits for their number
        found.append((pre.flatten()[at] + b[at % len(W)], at // len(W), at % len(W) + start))
    value, row, col = map(torch.cat, zip(*found))
    row, order = row.sort(stable=True)
    return value[order], row, col[order]


def batch_topk(value, n_keep):
    """Which of value (n,) are the n_keep largest (Bussmann et al. 2024; of ties the earlier; fewer are all kept): mask (n,), least kept ()."""
    if len(value) <= n_keep:
        return torch.ones_like(value, dtype=torch.bool), value.amin() if len(
            value
        ) else value.new_zeros(())
    cut = value.kthvalue(len(value) - n_keep + 1).values
    above, tie = value > cut, value == cut
    return above | (tie & (tie.cumsum(0) <= n_keep - above.sum())), cut


def segment_sum(table, index, weight, segment, n_segments):
    """out[s] = sum of weight[i] * table[index[i]] over all i with segment[i] == s; segment (n,) ascends. (n_segments, D)"""
    first = torch.searchsorted(
        segment, torch.arange(n_segments, dtype=segment.dtype, device=segment.device)
    )  # (n_segments,)
    sums = lambda columns: F.embedding_bag(
        index, columns.contiguous(), first, mode="sum", per_sample_weights=weight
    )
    if table.device.type != "cpu" or len(index) < 16 * max(len(table), n_segments):
        return sums(table)
    return torch.cat(
        [*map(sums, table.split(128, 1))], 1
    )  # why: rows read so often should lie in the cache. 16 and 128: ours, measured


def paired_dots(a, i, b, j):
    """<a[i], b[j]> for n pairs sorted by (i, j): (n,)"""
    if (
        a.device.type == "cpu"
    ):  # never writes the gathered rows: several times faster there (python test_dmsae.py)
        start = torch.searchsorted(i, torch.arange(len(a) + 1, dtype=i.dtype))
        pattern = torch.sparse_csr_tensor(
            start, j, a.new_zeros(len(j)), (len(a), len(b)), check_invariants=False
        )
        return torch.sparse.sampled_addmm(pattern, a, b.T, beta=0.0).values()
    n = max(1, 2**26 // a.shape[1])  # pairs at once: 256 MiB of gathered rows
    return torch.cat([(a[p] * b[q]).sum(1) for p, q in zip(i.split(n), j.split(n))])


def nested_sums(W_dec, b_dec, value, row, col, edges, B):
    """The nested reconstructions (B, G, D): [b, g] = b_dec + the sum of value[i] * W_dec[col[i]] over all i with row[i] == b
    and col[i] < edges[g]. Every latent is decoded once, into the narrowest prefix that holds it. Also that segment, (n,)."""
    segment = row * len(edges) + torch.bucketize(col, edges, right=True)  # ascends with (row, col)
    x_hats = segment_sum(W_dec, col, value, segment, B * len(edges)).view(B, len(edges), -1)
    x_hats[:, 0] += b_dec
    for g in range(1, len(edges)):
        x_hats[:, g] += x_hats[:, g - 1]
    return x_hats, segment


class SparseAutoencode(torch.autograd.Function):
    """Encode at n survivors, decode all prefixes: dense autograd's gradients without a B x F one. Returns, differentiable: value (n,) =
    ((x - b_dec) W_enc^T + b_enc)[row, col], given as computed; and the nested reconstructions (B, G, D). (row, col) ascends; free is W_enc[C:]."""

    @staticmethod
    def forward(ctx, free, b_enc, W_dec, b_dec, W_enc, x, value, row, col, edges):
        x_hats, segment = nested_sums(W_dec, b_dec, value, row, col, edges, len(x))
        ctx.save_for_backward(W_dec, b_dec, W_enc, x, value, col, segment)
        ctx.n_core = len(W_enc) - len(free)
        return value.clone(), x_hats

    @staticmethod
    def backward(ctx, g_value, g_x_hats):  # (n,), (B, G, D)
        W_dec, b_dec, W_enc, x, value, col, segment = ctx.saved_tensors
        g_parts = g_x_hats.clone()
        for g in reversed(range(g_parts.shape[1] - 1)):
            g_parts[:, g] += g_parts[:, g + 1]  # a group is in its own and all wider prefixes
        g_b_dec, g_parts = g_parts[:, 0].sum(0), g_parts.flatten(0, 1)  # (D,), (B*G, D)
        col, order = col.int().sort(
            stable=True
        )  # by latent, so that each latent's survivors are one segment
        segment = segment[order]
        g_value = g_value[order] + paired_dots(W_dec, col, g_parts, segment)  # (n,)
        g_W_dec = segment_sum(g_parts, segment, value[order], col, len(W_dec))  # (F, D)
        g_W_enc = segment_sum(
            x - b_dec, segment // g_x_hats.shape[1], g_value, col, len(W_enc)
        )  # (F, D)
        g_b_enc = g_value.new_zeros(len(W_enc)).index_add_(0, col, g_value)  # (F,)
        # why: summed over the batch before it meets W_enc, b_dec's gradient is a vector times a matrix, not B x F x D
        return (g_W_enc[ctx.n_core :], g_b_enc, g_W_dec, g_b_dec - g_b_enc @ W_enc) + (None,) * 6


# ---- The SAE -----------------------------------------------------------------------------------------------------------
class MatryoshkaSAE(nn.Module):
    """Matryoshka BatchTopK SAE (Bussmann et al. 2025) whose first n_core latents are a frozen core. W_enc, W_dec (F, D); b_enc (F,);
    b_dec (D,); threshold (F,), each latent's fixed threshold at inference. widths: G ascending prefix widths, core included, the
    last is F. The first n_exempt latents (the core, or none where it competes) are outside BatchTopK: on wherever pre > threshold."""

    def __init__(
        self,
        d_model,
        widths,
        n_core=0,
        n_exempt=0,
        device="cpu",
        dtype=torch.float32,
        generator=None,
    ):
        super().__init__()
        self.widths, self.n_core, self.n_exempt = list(widths), n_core, n_exempt
        rows = F.normalize(torch.randn(widths[-1], d_model, generator=generator)).to(device, dtype)
        self.W_enc, self.W_dec = nn.Parameter(rows.clone()), nn.Parameter(rows)
        self.b_enc, self.b_dec = (
            nn.Parameter(rows.new_zeros(len(rows))),
            nn.Parameter(rows.new_zeros(d_model)),
        )
        self.register_buffer("threshold", rows.new_zeros(len(rows)))
        self.register_buffer(
            "edges", torch.tensor(self.widths, device=device), persistent=False
        )  # (G,)

    def trained(self):
        """For the optimiser: W_enc without the core rows (a view, so that Adam writes into W_enc itself), b_enc, W_dec, b_dec."""
        return [
            self.W_enc.detach()[self.n_core :].requires_grad_(),
            self.b_enc,
            self.W_dec,
            self.b_dec,
        ]

    def encode(self, x, width=None):
        """Activations at inference of the first `width` latents (default all). (B, D) -> (B, width). ValueError unless 2-D.
        why a threshold: the B*k largest entries of a batch depend on the other tokens in it; a fixed cut does not."""
        need(
            x.ndim == 2,
            f"x must be (tokens, d_model), got {tuple(x.shape)}: flatten it with x.flatten(0, -2)",
            ValueError,
        )
        pre = torch.addmm(self.b_enc[:width], x - self.b_dec, self.W_enc[:width].T)
        return pre * (pre > self.threshold[:width])

    def decode(self, acts):
        """Activations (B, w) of the first w latents -> reconstruction (B, D)."""
        return acts @ self.W_dec[: acts.shape[1]] + self.b_dec

    def forward(self, x):  # (B, D) -> reconstruction (B, D) by all latents, at inference
        return self.decode(self.encode(x))

    @torch.no_grad()
    def reconstruct(self, x):
        """The G nested reconstructions at inference (B, G, D); which latents were on, and how much: (n,), (n,). x (B, D)"""
        value, row, col = candidates(x - self.b_dec, self.W_enc, self.b_enc, self.threshold)
        return (
            nested_sums(self.W_dec, self.b_dec, value, row, col, self.edges, len(x))[0],
            col,
            value,
        )

    @torch.no_grad()
    def survivors(self, x, k, floor=1, guess=0.0, B=None):
        """BatchTopK beside a core. x (B, D) -> value, row, col (n,) sorted by row, then col; cut (); core L0 (). Exempt latents take
        what they need; the others share what is left of B*k, at least B*floor, so that the *total* L0 is k wherever the core leaves
        room (our reading). floor = k is the paper's first version, with L0 = k + core. guess >= 0 should lie below the cut: it
        spares sorting B x F numbers; a bad one costs time, not exactness. B: see loss_and_grad; the budget is one for all."""
        E, B = self.n_exempt, B or len(x)
        bound = torch.cat(
            [self.threshold[:E], self.threshold.new_ones(len(self.W_enc) - E) * guess]
        )
        value, row, col = candidates(x - self.b_dec, self.W_enc, self.b_enc, bound)
        everywhere, start = joined(value.masked_fill(col < E, math.inf))
        n_core = int(everywhere.isinf().sum()) if E else 0
        n_keep = max(B * k, n_core + B * floor)
        if len(everywhere) < n_keep and guess > 0:
            return self.survivors(x, k, floor, guess / 2 if guess > 1e-3 else 0.0, B)
        keep, cut = batch_topk(
            everywhere, n_keep
        )  # an infinite cut: nothing but exempt latents was on
        keep = keep[start : start + len(value)].nonzero()[:, 0]  # a sync
        value, row, col = value[keep], row[keep], col[keep]
        return value, row, col, cut.masked_fill(cut.isinf(), 0), (col < self.n_core).sum() / B

    @torch.no_grad()
    def update_threshold(self, cut, step):
        """Move the threshold of competing latents towards this batch's cut: an average over the last tenth of the steps, at most 100 (ours)."""
        self.threshold[self.n_exempt :].lerp_(cut, min(1, max(0.01, 10 / (step + 1))))

    @torch.no_grad()
    def fold_scale(self, scale):
        """Turn an SAE trained on scale * x into one for x. Encoder and decoder rows stay as they are."""
        for t in (self.b_enc, self.b_dec, self.threshold):
            t.div_(scale)


def nested_loss(x, x_hats, B=None):
    """Sum over prefixes of ||x - x_hat||^2, mean over B tokens, over G * D. x (B, D), x_hats (B, G, D) -> (). why divided (our
    choice): it then starts near 1, so that dead-latent loss and gradient clip weigh the same whatever D and G are."""
    return F.mse_loss(x_hats, x[:, None].expand_as(x_hats), reduction="sum") / (
        (B or len(x)) * x_hats[0].numel()
    )


def dead_latent_loss(x, residual, W_enc, b_enc, W_dec, b_dec, k_aux, B=None):
    """AuxK (Gao et al. 2024): the k_aux most active of d dead latents reconstruct the residual of the widest reconstruction; error
    over the residual's variance over all B tokens. x, residual (B, D); W_enc, W_dec (d, D); b_enc (d,)"""
    pre, n = (
        F.linear(x, W_enc, b_enc - W_enc @ b_dec),
        min(k_aux, len(W_enc)),
    )  # (B, d). b_dec stands outside: its gradient is cheap there
    acts = (
        pre.detach()
    )  # the same memory. Below: numpy's partition is three times faster than topk on two cores
    low = (
        acts.topk(n, sorted=False).values.amin(1)
        if x.is_cuda
        else torch.from_numpy(np.partition(acts, -n, axis=1)[:, -n])
    )  # (B,)
    off = acts < low.clamp_min(1e-30)[:, None]  # (B, d)
    if x.is_cuda or len(W_enc) < 8 * n or not low.isfinite().all():
        x_hat = pre.masked_fill_(off, 0) @ W_dec  # in place: fewer passes
    else:  # few of many (8: ours, measured), and no NaN: sparse, like the step. A GPU multiplies many times faster than it gathers rows
        row, col = (~off).nonzero(as_tuple=True)  # (n_on,), (n_on,)
        entries = acts[row, col], row, col, torch.tensor([len(W_enc)])
        x_hat = (
            SparseAutoencode.apply(W_enc, b_enc, W_dec, b_dec, W_enc.detach(), x, *entries)[1][:, 0]
            - b_dec
        )
    error = F.mse_loss(x_hat, residual, reduction="sum")
    return error / over_all(
        (residual - over_all(residual.sum(0)) / (B or len(x))).pow(2).sum()
    ).clamp_min(1e-30)


def loss_and_grad(
    sae, trained, x, k, floor=1, guess=0.0, dead=(), alpha=1 / 32, B=None
):  # alpha: Gao et al. 2024
    """Loss of a batch x (B, D); its gradient is added to the .grad of `trained`, which sae.trained() gave. dead (d,): their indices.
    Returns loss (), x_hat (B, D), cut (), col (n,) that fired, core L0 (). B: tokens of the whole batch, where x is a share; results are summands."""
    free, b_enc, W_dec, b_dec = trained
    value, row, col, cut, core_l0 = sae.survivors(x, k, floor, guess, B)
    value, x_hats = SparseAutoencode.apply(
        free, b_enc, W_dec, b_dec, sae.W_enc.detach(), x, value, row, col, sae.edges
    )
    x_hat, loss = x_hats[:, -1].detach(), nested_loss(x, x_hats, B)
    where = (dead - sae.n_core, dead, dead) if len(dead) else ()
    rows = [
        p.detach()[at].requires_grad_() for p, at in zip(trained, where)
    ]  # why copies: indexing costs F x D gradients
    if rows:
        loss = loss + alpha * dead_latent_loss(x, x - x_hat, *rows, b_dec, x.shape[1] // 2, B)
    loss.backward()
    for p, r, at in zip(trained, rows, where):
        p.grad.index_add_(0, at, r.grad)
    return loss.detach(), x_hat, cut, col, core_l0


@torch.no_grad()
def apply_gradients(trained, adam, lr):
    """One optimiser step that leaves decoder rows unit-norm. Returns the gradient's norm before clipping, ()."""
    W_dec = trained[2]
    for p in trained:
        over_all(p.grad)
    # why: along a unit row the gradient only works against the normalisation, and fills Adam's moments with that
    rows = (
        512 if W_dec.device.type == "cpu" else 8192
    )  # at once (ours): on a CPU what its cache holds
    for g, W in zip(W_dec.grad.split(rows), W_dec.split(rows)):
        g.addcmul_(W, torch.linalg.vecdot(g, W)[:, None], value=-1)
    norm = sum(
        torch.dot(g, g) for p in trained for g in p.grad.flatten().split(2**30)
    ).sqrt()  # cuBLAS counts in int32
    if norm.is_cuda or norm > 1:
        nn.utils.clip_grads_with_norm_(
            trained, 1.0, norm
        )  # the SAEBench suite's clip. On a GPU a look at it is a sync
    adam.param_groups[0]["lr"] = lr
    adam.step()
    adam.zero_grad()
    for W in W_dec.split(rows):
        W.div_(W.norm(dim=1, keepdim=True))
    return norm


# ---- Training: batches, harvested or from the cache; one SAE, or several side by side -----------------------------------
def cache_folder(cfg, model, text):
    """Where --cache keeps the activations of this model, layer and text: CACHE/<name>/<block>.<process>.safetensors; or None."""
    weights = [
        p.flatten()[:9].tolist() for p in decoder_layers(model)[cfg.layer].parameters()
    ]  # another model in the same folder differs
    same = (
        cfg.layer,
        cfg.ctx,
        cfg.batch,
        cfg.seed,
        place()[1],
        model.dtype,
        text.n_eval + text.n_attribution,
        weights,
    )
    name = f"{Path(cfg.model).name}-layer{cfg.layer}-{zlib.crc32(text.rows, zlib.crc32(repr(same).encode())):08x}"
    return Path(cfg.cache) / name if cfg.cache else None


def batches(cfg, model, text, scale, training, block=0, start=0):
    """Endless batches (B, D), float32, scaled; each with the position from which the next one follows. A block, about 64 batches (ours), is
    the same in every training, and shuffled whole by its number, the training's and the seed. Each of several processes harvests a part of it."""
    folder, (rank, world), contexts = (
        cache_folder(cfg, model, text),
        place(),
        -(-64 * cfg.batch // (cfg.ctx - 1)),
    )

    def load(number):
        path = folder and folder / f"{number}.{rank}.safetensors"
        acts = (
            load_tensors(path, "delete it to harvest it again")[0]["acts"]
            if path and path.exists()
            else None
        )
        return (
            number,
            path,
            acts.pin_memory() if acts is not None and model.device.type == "cuda" else acts,
        )

    for block, path, acts in ahead(map(load, itertools.count(block))):
        ids = text.block(block, contexts, cfg.seed)
        n, mine = text.keep(ids).sum(1), torch.arange(contexts).tensor_split(world)[rank]
        if acts is None:
            acts = harvest(model, cfg.layer, text, ids[mine])  # (its tokens, D), on the device
            if path and (block + 1) * contexts * (cfg.ctx - 1) * acts[0].nbytes <= 1e9 * (
                cfg.cache_gb or math.inf
            ):
                folder.mkdir(parents=True, exist_ok=True)
                save_tensors({"acts": acts}, path)
        acts = acts.to(model.device, non_blocking=True)
        order = torch.randperm(int(n.sum()), generator=generator(cfg.seed, training, block)) - int(
            n[: mine[0]].sum()
        )
        order = order[: len(order) // cfg.batch * cfg.batch].view(-1, cfg.batch)
        need(len(order), "the text holds hardly more than special tokens: nothing to train on")
        here = (order >= 0) & (order < len(acts))
        rows = (
            order[here].to(acts.device).split(here.sum(1).tolist())
        )  # indices into acts, a tensor for each batch
        for i in range(start, len(rows)):
            yield acts[rows[i]].float() * scale, (block, i + 1)
        start, acts = 0, None  # why None: the next block needs the memory


@torch.no_grad()
def new_sae(cfg, core, x, scale, training):
    """A fresh SAE around the core's encoder rows. x: a first batch (B, D), whose mean is b_dec's start. why only rows travel (the paper):
    they say what a latent detects, and one that is useful again has proved it among new neighbours."""
    C, n_exempt = len(core), 0 if cfg.core_sparsity == "compete" else len(core)
    sae = MatryoshkaSAE(
        x.shape[1],
        cfg.widths(C),
        C,
        n_exempt,
        x.device,
        generator=generator(cfg.seed, training, "init"),
    )
    sae.b_dec.copy_(over_all(x.sum(0)) / cfg.batch)
    sae.W_enc[:C] = core.W_enc.to(x.device)
    if cfg.core_decoder == "encoder":
        sae.W_dec[:C] = F.normalize(sae.W_enc[:C])
    if cfg.core_sparsity == "gated":  # the latent starts as the function that it was at birth
        sae.b_enc[:C], sae.threshold[:C] = (
            core.bias.to(x) * scale + sae.W_enc[:C] @ sae.b_dec,
            core.threshold.to(x) * scale,
        )
    return sae


def learning_rate(step, steps, peak):
    """Linear warm-up over 1000 steps (a short run: a tenth), constant, linear to 0 in the last fifth: the SAEBench suite's."""
    return peak * min(
        1, (step + 1) / min(1000, max(1, steps // 10)), (steps - step) / (0.2 * steps)
    )


class Training:
    """One SAE in training, with optimiser and counters; `state` holds every tensor of it that a checkpoint needs."""

    def __init__(self, cfg, k, core, x, scale, training):
        self.cfg, self.k, self.steps = cfg, k, cfg.tokens // cfg.batch
        self.sae = new_sae(cfg, core, x, scale, training)
        self.trained = self.sae.trained()
        self.floor = k if cfg.core_sparsity == "exempt" else max(1, k // 10)  # k/10: our choice
        self.dead_after = min(
            10_000_000, cfg.tokens // 10
        )  # tokens: Gao et al. 2024; the tenth is ours, for short runs
        self.guess = 4.0  # why: pre-activations start with a variance near 1. Where it is too high it is halved
        # why new: moments of other latents are noise. why eps: a rare latent's gradient, divided by G * D, is near Adam's 1e-8
        self.adam = torch.optim.Adam(
            self.trained, lr=cfg.lr, betas=(0.9, 0.999), eps=1e-12, fused=True
        )
        self.since = torch.zeros(
            cfg.d_sae, dtype=torch.int64, device=x.device
        )  # tokens since each latent fired
        self.sums = torch.zeros(
            6, device=x.device
        )  # since the last row: loss, squared error, variance, l0, core l0, gradient norm
        self.state = {
            "since": self.since,
            "sums": self.sums,
            **{f"sae.{name}": t for name, t in self.sae.state_dict().items()},
        }
        for i, p in enumerate(self.trained):
            self.adam.state[p] = dict(
                step=torch.zeros((), device=x.device),
                exp_avg=torch.zeros_like(p),
                exp_avg_sq=torch.zeros_like(p),
            )
            self.state |= {f"adam{i}.{name}": t for name, t in self.adam.state[p].items()}

    def dead(self):
        """Which latents have not fired for long: (F,) bool. The core is never counted: its rows are frozen."""
        return (self.since >= self.dead_after).index_fill(
            0, torch.arange(self.sae.n_core, device=self.since.device), False
        )

    def step(self, x, step):
        """One step on this process's share x of a batch. No number is read back from the device for a log."""
        sae, B, dead = self.sae, self.cfg.batch, self.dead().nonzero()[:, 0]
        loss, x_hat, cut, col, core_l0 = loss_and_grad(
            sae, self.trained, x, self.k, self.floor, self.guess, dead, B=B
        )
        norm = apply_gradients(
            self.trained, self.adam, learning_rate(step, self.steps, self.cfg.lr)
        )
        sae.update_threshold(cut, step)
        self.guess = 0.9 * cut  # our choice: the cut moves a few per cent between batches
        self.since += B
        self.since[col] = 0
        over_all(self.since, dist.ReduceOp.MIN)
        variance = (x - over_all(x.sum(0)) / B).pow(2).sum()
        row = torch.stack(
            [loss, (x - x_hat).pow(2).sum(), variance, torch.full_like(loss, len(col) / B), core_l0]
        )
        self.sums += torch.cat([over_all(row), norm[None]])

    def report(self, step, steps, seconds):
        """Print the figures of the last `steps` steps, and begin anew."""
        loss, error, variance, l0, core_l0, _ = (self.sums / steps).tolist()
        tokens, dead, core = (
            step * self.cfg.batch / 1e3,
            self.dead().float().mean().item(),
            f"({core_l0:.1f})",
        )
        tqdm.write(
            f"{step:7d} {tokens / 1e3:8.2f}M {loss:8.4f} {error / variance:7.4f} {l0:7.1f} {core:>7s} {dead:6.1%} {tokens / seconds:8.1f}"
        )
        self.sums.zero_()


def train_saes(cfg, model, text, scale, core, training, ks, out):
    """Train the SAEs ks = {label: k} side by side on the same batches, from their checkpoint in OUT if there is one. Returns
    {label: Training}, scale not folded in, and seconds. KeyboardInterrupt after a checkpoint; BadInput where a loss is not finite."""
    clock, steps, rank, path = (
        time.time(),
        cfg.tokens // cfg.batch,
        place()[0],
        out / f"checkpoint{next(iter(ks))}.safetensors",
    )
    saved, at = (
        load_tensors(path, "delete it to begin this training again; finished ones are kept")
        if path.exists()
        else ({}, {})
    )
    if not ks.keys() <= set(at.get("labels", ())):
        saved, at = {}, dict(step=0, position=(0, 0), row_step=0, seconds=0.0)
    stream = batches(cfg, model, text, scale, training, *at["position"])
    x, position = next(stream)
    saes = {label: Training(cfg, k, core, x, scale, training) for label, k in ks.items()}
    state = {f"{label}.{name}": t for label, sae in saes.items() for name, t in sae.state.items()}
    for name in saved.keys() & state.keys():
        state[name].detach().copy_(saved.pop(name))
    clock, saved_at, row_step, stopped = clock - at["seconds"], time.time(), at["row_step"], []
    signal.signal(
        signal.SIGINT, signal.SIG_IGN if rank else lambda *_: stopped.append(True)
    )  # why: not in the middle of a step
    for step in progress(
        f"train {training}",
        range(at["step"] + 1, steps + 1),
        total=steps,
        initial=at["step"],
        unit="step",
    ):
        for sae in saes.values():
            sae.step(x, step - 1)
        row_due = step == steps or step % max(1, steps // 10) == 0
        save_due = step == steps or stopped or time.time() - saved_at >= 60 * cfg.checkpoint_minutes
        for label, sae in (
            saes.items() if row_due or save_due else ()
        ):  # only here numbers are read back
            need(
                sae.sums.isfinite().all(),
                f"training {label}: the loss is not finite at step {step}; checkpoints from before are kept "
                f"in {out}; try another --out with --lr {cfg.lr / 3:.2g}",
            )
            if row_due:
                sae.report(step, step - row_step, time.time() - clock)
        row_step = step if row_due else row_step
        if save_due and rank == 0:
            saved_at = time.time()
            save_tensors(
                state,
                path,
                labels=[*ks],
                step=step,
                position=position,
                row_step=row_step,
                seconds=saved_at - clock,
            )
        need(not stopped, "", KeyboardInterrupt)
        if step < steps:
            x, position = next(stream)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return saes, time.time() - clock


# ---- Held-out evaluation, and attribution ------------------------------------------------------------------------------
def evaluate(model, layer, text, ids, sae, ce_original, ce_zero):
    """Held-out figures of an SAE in raw units at inference: dict of floats. fvu, one per prefix = squared error / variance about the mean;
    ce_recovered = (zero - sae) / (zero - original), `zero`: loss with the layer's output zeroed (Karvonen et al. 2025, eq. 4)."""
    sums = []

    def edit(h, keep):
        x = h[keep].float()  # (B, D)
        x_hats, col, _ = sae.reconstruct(x)  # (B, G, D), (n,)
        error = (x[:, None] - x_hats).pow(2).sum((0, 2))  # (G,)
        counts = len(x), len(col), (col < sae.n_core).sum().item(), x.pow(2).sum().item()
        sums.append(
            torch.tensor([*counts, *error.tolist(), *x.sum(0).tolist()], dtype=torch.float64)
        )
        return h.masked_scatter(keep[..., None], x_hats[:, -1].to(h.dtype))

    ce, G = mean_loss(model, layer, text, ids, edit), len(sae.widths)
    tokens, on, core_on, square, *rest = sum(sums).tolist()
    fvu = [e / (square - sum(s * s for s in rest[G:]) / tokens) for e in rest[:G]]
    return dict(
        fvu=fvu,
        l0=on / tokens,
        core_l0=core_on / tokens,
        ce=ce,
        ce_recovered=(ce_zero - ce) / (ce_zero - ce_original),
    )


def attribute(model, layer, text, ids, sae, agg="mean", with_error=False):
    """Score of each candidate (core and prefix 0), and the share of tokens where it is on: (M,), (M,), float64. a_i(t) = f_i(t)
    <dLoss/dx_hat(t), W_dec_i>: the next-token loss summed over tokens of ids (R, ctx), the layer's output replaced by x_hat, the most
    nested reconstruction (the paper). why the narrowest: the core shall carry what the model needs without finer latents. Score: mean
    of |a_i| over tokens; |mean of a_i|; 0.99 quantile of |a_i|. with_error adds x - x_hat: gradients are those of the model's own pass."""
    M, total, on, tokens, top, at = sae.widths[0], 0.0, 0.0, 0, None, {}
    rank = (
        int(0.01 * text.keep(ids).sum()) + 1
    )  # the 0.99 quantile is the value with this rank from above

    def edit(h, keep):
        x = h[keep].to(sae.W_enc.dtype)  # (B, D)
        at["f"] = sae.encode(x, M).detach()  # (B, M)
        at["x_hat"] = x_hat = sae.decode(at["f"]).detach().requires_grad_()
        out = x_hat + (x - x_hat).detach() if with_error else x_hat
        return h.masked_scatter(keep[..., None], out.to(h.dtype))

    for loss, n in spliced_losses(model, layer, text, ids, edit):
        (grad,) = torch.autograd.grad(loss, at["x_hat"])  # (B, D)
        a = at["f"] * (grad @ sae.W_dec[:M].detach().T)  # (B, M)
        total += (a if agg == "signed" else a.abs()).sum(0).cpu().double()
        on, tokens = on + (at["f"] > 0).sum(0).cpu().double(), tokens + len(a)
        if agg == "quantile":  # exact: keep the `rank` largest so far of every latent
            top = a.abs() if top is None else torch.cat([top, a.abs()])
            top = top.topk(min(rank, len(top)), dim=0, sorted=False).values
    return top.amin(0).cpu().double() if agg == "quantile" else total.abs() / tokens, on / tokens


# ---- The core ----------------------------------------------------------------------------------------------------------
def select_core(scores, coverage):
    """Smallest set of latents that holds `coverage` of the total score, most important first. (M,) -> (C,) indices. BadInput: no total."""
    value, order = scores.double().sort(descending=True, stable=True)
    share = value.cumsum(0)  # (M,) rises to the total
    need(
        0 < share[-1] < math.inf,
        f"no core can be selected: the scores sum to {share[-1]:g}; try more --tokens",
    )
    return order[
        : int((share < coverage * share[-1]).sum()) + 1
    ]  # + 1: the latent that crosses the line


@dataclass
class Core:
    """What travels between trainings: C encoder rows with their gates (used by `gated` only) and their history."""

    W_enc: torch.Tensor  # (C, D) frozen rows; Core(torch.zeros(0, D)) is the core of training 0
    bias: torch.Tensor = torch.zeros(0)  # (C,) b_enc - W_enc b_dec at birth, raw activation units
    threshold: torch.Tensor = torch.zeros(0)  # (C,) at birth, raw units
    birth: torch.Tensor = torch.zeros(
        0, 2
    ).long()  # (C, 2) training and index there: its identity, as rows never change
    votes: torch.Tensor = torch.zeros(0).long()  # (C,) how many trainings selected it
    score: torch.Tensor = torch.zeros(0)  # (C,) at the last selection
    density: torch.Tensor = torch.zeros(0)  # (C,) share of tokens on which it was on then
    index: torch.Tensor = torch.zeros(
        0
    ).long()  # (C,) its place in the SAE that it was last selected from

    def __len__(self):
        return len(self.W_enc)


@torch.no_grad()
def next_core(core, sae, chosen, scores, density, training):
    """The core after training number `training`: `chosen` of the M candidates. Old members keep row, gate and identity. sae: raw units."""
    new = torch.arange(len(core), sae.widths[0])
    W_new, birth = sae.W_enc.cpu()[new], torch.stack([torch.full_like(new, training), new], 1)
    offered = Core(  # old members first, as in the SAE
        torch.cat([core.W_enc, W_new]),
        torch.cat([core.bias, sae.b_enc.cpu()[new] - W_new @ sae.b_dec.cpu()]),
        torch.cat([core.threshold, sae.threshold.cpu()[new]]),
        torch.cat([core.birth, birth]),
        torch.cat([core.votes, torch.zeros_like(new)]) + 1,
        scores.float(),
        density.float(),
        torch.arange(sae.widths[0]),
    )
    return Core(*(t[chosen] for t in vars(offered).values()))


# ---- Files: written beside their place, then renamed, so what is there is whole ----------------------------------------
def write_text(text, path):
    """Write a text file atomically."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    part.replace(path)


def save_tensors(tensors, path, **meta):
    """Write named tensors and JSON metadata atomically, as safetensors."""
    part = path.with_name(path.name + ".part")
    save_file(
        {name: t.detach().contiguous() for name, t in tensors.items()},
        part,
        {"dmsae": json.dumps(meta)},
    )
    part.replace(path)


def load_tensors(path, mend):
    """Tensors and metadata from save_tensors. BadInput, saying how to `mend` it, where the file is damaged or not ours."""
    try:
        with safe_open(path, "pt") as f:
            return {name: f.get_tensor(name) for name in f.keys()}, json.loads(
                f.metadata()["dmsae"]
            )
    except (
        Exception
    ) as e:  # safetensors raises its own types, and a foreign header can hold anything
        raise BadInput(f"{path}: is damaged or not from dmsae.py ({e}); {mend}") from None


def load_core(path, d_model=None):
    """A Core from core.safetensors, and the number of the training that selected it. BadInput on another width (None: any)."""
    tensors, meta = load_tensors(Path(path), mend := "give a core.safetensors that dmsae.py wrote")
    need("birth" in tensors, f"--core {path}: holds no core; {mend}")
    need(
        d_model in (None, width := tensors["W_enc"].shape[1]),
        f"--core {path}: has rows of width {width}, the model's activations "
        f"have {d_model}; use the model that it came from ({meta['model']} layer {meta['layer']})",
    )
    return Core(**tensors), meta["training"]


def save_sae(sae, folder, **metadata):
    """Write an SAE in raw units as SAELens's `jumprelu` (on where pre > threshold): cfg.json, sae_weights.safetensors with W_enc (D, F)."""
    weights = {
        "W_enc": sae.W_enc.T,
        "W_dec": sae.W_dec,
        "b_enc": sae.b_enc,
        "b_dec": sae.b_dec,
        "threshold": sae.threshold,
    }
    save_file(
        {name: t.detach().contiguous() for name, t in weights.items()},
        folder / "sae_weights.safetensors",
    )
    metadata = dict(
        sae_lens_version="6.0.0",
        **metadata,
        widths=sae.widths,
        n_core=sae.n_core,
        n_exempt=sae.n_exempt,
    )
    write_text(
        json.dumps(
            dict(
                architecture="jumprelu",
                d_in=sae.W_enc.shape[1],
                d_sae=len(sae.W_enc),
                dtype="float32",
                device="cpu",
                apply_b_dec_to_input=True,
                normalize_activations="none",
                reshape_activations="none",
                metadata=metadata,
            ),
            indent=1,
        ),
        folder / "cfg.json",
    )


def load_sae(folder, device="cpu"):
    """The SAE in a folder of SAELens's `jumprelu` layout, ours or another's; it takes raw activations. BadInput."""
    try:
        cfg, w = (
            json.loads((Path(folder) / "cfg.json").read_text()),
            load_file(Path(folder) / "sae_weights.safetensors", device=str(device)),
        )
        for key, only in dict(
            architecture="jumprelu", normalize_activations="none", apply_b_dec_to_input=True
        ).items():
            need(cfg.get(key, only) == only, f"{key} is {cfg.get(key)!r}, only {only!r} is read")
        m = dict(widths=[cfg["d_sae"]], n_core=0, n_exempt=0) | cfg.get("metadata", {})
        sae = MatryoshkaSAE(cfg["d_in"], m["widths"], m["n_core"], m["n_exempt"], device)
        sae.load_state_dict({**w, "W_enc": w["W_enc"].T})
        return sae
    except Exception as e:  # missing, cut or foreign files
        raise BadInput(
            f"{folder}: is no SAE folder ({e}); it needs cfg.json and sae_weights.safetensors"
        ) from None


# ---- The demo's language model: trained on the spot, then an ordinary Hugging Face folder like any other ---------------
def demo_config():  # a Gemma-2 of 1.4M parameters
    from transformers import Gemma2Config

    return Gemma2Config(
        vocab_size=2048,
        hidden_size=160,
        intermediate_size=640,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=40,
        query_pre_attn_scalar=40,
        max_position_embeddings=512,
        sliding_window=512,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )


def build_demo(folder, steps=900):
    """Train a tokenizer and a model (8 x 128 tokens a step) on Python's own 5 MB of English and code. Both go to `folder`, with text.jsonl."""
    from pydoc_data.topics import topics
    from tokenizers import ByteLevelBPETokenizer
    from transformers import Gemma2ForCausalLM, PreTrainedTokenizerFast

    docs = [
        *topics.values(),
        *(p.read_text(errors="replace") for p in Path(sysconfig.get_path("stdlib")).glob("*.py")),
    ]
    docs = [d[i : i + 4000] for d in docs for i in range(0, len(d), 4000)]
    docs.sort(
        key=lambda d: zlib.crc32(d.encode())
    )  # a fixed shuffle. why: then what is held out is like the rest
    bpe, part = ByteLevelBPETokenizer(), folder.with_name(folder.name + ".part")
    bpe.train_from_iterator(
        docs, vocab_size=2048, special_tokens=["<pad>", "<eos>", "<bos>"], show_progress=False
    )
    ids = (
        torch.tensor([i for e in bpe.encode_batch(docs) for i in (2, *e.ids)])
        .repeat(2)[: 8 * 128 * steps]
        .view(-1, 128)
    )
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(demo_config())
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if all(p is not m for m in matrices)]
    # why Muon: at this size it learns clearly more in the same time than AdamW alone
    muon, adam = (
        torch.optim.Muon(matrices, lr=9e-3, weight_decay=0),
        torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.95)),
    )
    for step, b in enumerate(
        progress("demo model", ids[torch.randperm(len(ids))].split(8), unit="step")
    ):
        F.cross_entropy(model(b).logits[:, :-1].flatten(0, 1), b[:, 1:].flatten()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for o, peak in (muon, 9e-3), (adam, 3e-3):
            o.param_groups[0]["lr"] = peak * min(1, (step + 1) / 30, (steps - step) / (0.6 * steps))
            o.step()
            o.zero_grad()
    model.save_pretrained(part)
    PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>"
    ).save_pretrained(part)
    write_text("".join(json.dumps({"text": d}) + "\n" for d in docs), part / "text.jsonl")
    part.replace(folder)


# ---- The distillation cycles -------------------------------------------------------------------------------------------
def open_run(cfg, out):
    """What an earlier run measured in OUT, {} if there was none. BadInput where OUT belongs to another configuration."""
    if not (out / "config.json").exists():
        return {}
    old, new = json.loads((out / "config.json").read_text()), json.loads(json.dumps(asdict(cfg)))
    free = (
        "device",
        "out",
        "checkpoint_minutes",
        "cycles",
        "transfer_k",
        "cache",
        "cache_gb",
        "compile",
    )  # these change no training
    differ = [
        f"{key} {old.get(key)} there, {new[key]} here"
        for key in new
        if key not in free and old.get(key) != new[key]
    ]
    need(
        not differ,
        f"--out {out}: holds a run with other settings ({'; '.join(differ)}); give another --out",
    )
    return old["measured"]


def check_model(cfg):
    """Refuse what only the model's configuration and the disks can tell. Returns the configuration; bytes for OUT and cache. BadInput"""
    lm, size = model_config(cfg), 2 if cfg.device.startswith("cuda") else 4
    saes, D, longest = (
        cfg.cycles + 1 + len(cfg.transfer_k),
        lm.hidden_size,
        getattr(lm, "max_position_embeddings", cfg.ctx),
    )
    disk = (
        (6 + saes) * 8 * cfg.d_sae * D + 4 * cfg.tokens,
        min(1e9 * (cfg.cache_gb or math.inf), cfg.tokens * D * size),
    )  # 6: checkpoints
    need(
        cfg.layer < lm.num_hidden_layers,
        f"--layer {cfg.layer}: {cfg.model} has layers 0 to {lm.num_hidden_layers - 1}, for "
        f"example --layer {lm.num_hidden_layers // 2}",
    )
    need(
        cfg.ctx <= longest,
        f"--ctx {cfg.ctx}: {cfg.model} takes at most {longest}, for example --ctx {min(longest, 128)}",
    )
    for flag, path, wanted in (
        zip(("--out", "--cache"), (cfg.out, cfg.cache), disk) if not cfg.dry_run else ()
    ):
        near = next(
            p for p in (Path(path or "."), *Path(path or ".").absolute().parents) if p.exists()
        )
        need(
            not path or near.is_dir(),
            f"{flag} {path}: must be a folder, and {near} is a file; give another name",
        )
        free = shutil.disk_usage(near).free + sum(
            f.stat().st_size for f in Path(path or "none").rglob("*.*")
        )  # what is there counts
        need(
            not path or free >= wanted,
            f"{flag} {path}: has {free / 1e9:.3g} GB free of the {wanted / 1e9:.3g} GB that it takes; give "
            "another disk, or a smaller --d-sae, --tokens or --cache-gb",
        )
    return lm, disk


def prepare(cfg, out):
    """The language model, the text, and what is measured of them once for all trainings; all is in OUT when it returns."""
    from transformers import AutoTokenizer

    measured, clock = open_run(cfg, out), time.time()
    out.mkdir(parents=True, exist_ok=True)
    if cfg.demo_builds:
        build_demo(Path(cfg.model))
        print(
            f"  demo language model trained in {time.time() - clock:.0f} s, saved in {cfg.model}",
            flush=True,
        )
    save_config = lambda: write_text(
        json.dumps({**asdict(cfg), "measured": measured}, indent=1), out / "config.json"
    )
    text = open_text(cfg, AutoTokenizer.from_pretrained(cfg.model), out, save_config)
    n_train = len(text.rows) - text.n_eval - text.n_attribution
    print(
        f"  text: {text.rows.size:,} tokens, of which {1 - n_train / len(text.rows):.1%} held out; each training "
        f"reads the others {cfg.tokens / n_train / (cfg.ctx - 1):.1f} times",
        flush=True,
    )
    model = load_model(cfg)
    if not measured:
        where = model, cfg.layer, text, text.contexts(slice(text.n_eval))
        x = harvest(model, cfg.layer, text, text.block(0, -(-65536 // cfg.ctx), cfg.seed)).float()
        measured = dict(
            scale=math.sqrt(
                x.shape[1] / x.pow(2).sum(1).mean().item()
            ),  # mean ||x||^2 = D, on 65,536 tokens (ours)
            ce_original=mean_loss(*where, lambda h, keep: h),
            ce_zero=mean_loss(*where, lambda h, keep: torch.zeros_like(h)),
        )
    if place()[0] == 0:
        save_config()
    print(
        "  held-out loss {ce_original:.3f} nats a token, {ce_zero:.3f} with the layer zeroed".format(
            **measured
        ),
        flush=True,
    )
    return model, text, measured


def finish(cfg, model, text, measured, core, number, label, training, seconds):
    """Evaluate, attribute, select; save all of it as OUT/cycle<label>. number: the training's, over all runs that led to the core."""
    clock, sae, out = time.time() - seconds, training.sae, Path(cfg.out) / f"cycle{label}"
    sae.fold_scale(measured["scale"])
    ids = text.contexts(slice(text.n_eval + text.n_attribution)).split(
        [text.n_eval, text.n_attribution]
    )
    held = evaluate(
        model, cfg.layer, text, ids[0], sae, measured["ce_original"], measured["ce_zero"]
    )
    scores, density = attribute(
        model, cfg.layer, text, ids[1], sae, cfg.attribution_agg, cfg.attribution_error
    )
    chosen = select_core(scores, cfg.coverage)
    order = dict(
        attribution=chosen,
        frequency=density.sort(descending=True, stable=True).indices,
        random=torch.randperm(len(scores), generator=generator(cfg.seed, label, "core")),
    )
    chosen = order[cfg.select][
        : len(chosen)
    ]  # the controls are of the size that attribution would have chosen
    new, kept = (
        next_core(core, sae, chosen, scores, density, number),
        int((chosen < len(core)).sum()),
    )
    origins, dead = (
        dict(sorted(Counter(new.birth[:, 0].tolist()).items())),
        training.dead().float().mean().item(),
    )
    row = dict(
        cycle=label,
        core=len(new),
        kept=kept,
        new=len(new) - kept,
        dropped=len(core) - kept,
        origins=origins,
        **held,
        dead=dead,
        widths=sae.widths,
        tokens=training.steps * cfg.batch,
        seconds=time.time() - clock,
    )
    part = out.with_suffix(".part")
    part.mkdir(exist_ok=True)
    save_sae(
        sae,
        part,
        model_name=cfg.model,
        hook_name=f"blocks.{cfg.layer}.hook_resid_post",
        context_size=cfg.ctx,
        prepend_bos=True,
        dataset_path=cfg.text or cfg.dataset,
        config=asdict(cfg),
        result=row,
    )
    save_tensors(vars(new), part / "core.safetensors", training=number, **asdict(cfg))
    part.replace(out)
    print(
        f"  core: {len(new)} of {sae.widths[0]} latents, {scores[chosen].sum() / scores.sum():.1%} of the attribution; "
        f"born in training {', '.join(f'{b}: {count}' for b, count in origins.items())}",
        flush=True,
    )
    words = "  warning: the core alone has L0 {core_l0:.1f}, more than half of k = {k}; total L0 is {l0:.1f}. See --core-sparsity"
    if row["core_l0"] > training.k / 2:
        print(words.format(k=training.k, **row), flush=True)


def distil(cfg):
    """A whole run, from wherever OUT has it: trainings 0..cycles, then the transfers of the last core."""
    clock, cuda, (lm, _), out = (
        time.time(),
        cfg.device.startswith("cuda"),
        check_model(cfg),
        Path(cfg.out),
    )
    core, number = (
        load_core(cfg.core, lm.hidden_size)
        if cfg.core
        else (Core(torch.zeros(0, lm.hidden_size)), -1)
    )
    cfg.widths(len(core))
    (rank, world), wait, table = (
        place(),
        dist.barrier if dist.is_initialized() else lambda: None,
        [],
    )
    where = f"{world} x " * (world > 1) + (
        torch.cuda.get_device_name(cfg.device)
        if cuda
        else f"{cfg.device}, {torch.get_num_threads()} threads"
    )
    print(
        f"dmsae | {cfg.model} layer {cfg.layer} | {where} | {out}\n  cycles {cfg.cycles}   k {cfg.k}   d_sae {cfg.d_sae:,}   "
        f"prefixes {' '.join(map(str, cfg.widths()))}   tokens/training {cfg.tokens:,}   core {cfg.core_sparsity}",
        flush=True,
    )
    if rank:
        wait()  # process 0 prepares, and the others find its files
    model, text, measured = prepare(cfg, out)
    if not rank:
        wait()
    for n in range(cfg.cycles + 2):  # the last round is the transfers'
        ks = {n: cfg.k} if n <= cfg.cycles else {f"{cfg.cycles}_k{k}": k for k in cfg.transfer_k}
        todo = [label for label in ks if not (out / f"cycle{label}").exists()]
        room = (
            torch.cuda.mem_get_info(cfg.device)[1] - sum(p.nbytes for p in model.parameters())
            if cuda
            else math.inf
        )
        fit = max(
            1, int(min(len(ks), room / (24 * cfg.d_sae * lm.hidden_size) - 2))
        )  # SAEs with Adam in memory at once, and 2 spare
        for group in (todo[i : i + fit] for i in range(0, len(todo), fit)):
            print(
                f"cycle {', '.join(map(str, group))} of {cfg.cycles}   core {len(core) or '0 (this is the plain Matryoshka baseline)'}\n"
                "   step    tokens     loss     fvu      l0  (core)   dead   ktok/s",
                flush=True,
            )
            trainings, seconds = train_saes(
                cfg,
                model,
                text,
                measured["scale"],
                core,
                n,
                {label: ks[label] for label in group},
                out,
            )
            for label in group if rank == 0 else ():
                finish(
                    cfg,
                    model,
                    text,
                    measured,
                    core,
                    number + 1 + n,
                    label,
                    trainings.pop(label),
                    seconds,
                )
            wait()
            (out / f"checkpoint{group[0]}.safetensors").unlink(missing_ok=True)
        table += [
            json.loads((out / f"cycle{label}" / "cfg.json").read_text())["metadata"]["result"]
            for label in ks
        ]
        if n <= cfg.cycles:
            core = load_core(out / f"cycle{n}" / "core.safetensors", lm.hidden_size)[0]
    print(
        "cycle     core   kept    new dropped      l0    (core)  ce recovered    dead   minutes   fvu by prefix"
    )
    for r in table:
        print(
            "{cycle!s:8s}{core:6d} {kept:6d} {new:6d} {dropped:7d} {l0:7.1f} {core_l0:9.1f}".format(
                **r
            ),
            f"{r['ce_recovered']:13.4f} {r['dead']:7.1%} {r['seconds'] / 60:9.1f}  ",
            *(f"{f:.4f}" for f in r["fvu"]),
        )
    peak = (
        f", peak GPU memory {torch.cuda.max_memory_allocated(cfg.device) / 2**30:.1f} GiB"
        if cuda
        else ""
    )
    print(
        f"core latents by how many trainings selected them: {dict(sorted(Counter(core.votes.tolist()).items()))}\n"
        f"done in {(time.time() - clock) / 60:.1f} minutes{peak}; SAEs and cores are in {out}/cycle*; next: python eval.py {out}"
    )


def run(cfg):
    """What the command line asks for; under torchrun one process of it."""
    check(cfg)
    torch.set_float32_matmul_precision(
        "high"
    )  # TF32 for the encoder's product; parameters and moments stay float32
    if cfg.dry_run:
        return dry_run(cfg)
    if "WORLD_SIZE" not in os.environ:
        return distil(cfg)
    if cfg.device.startswith("cuda"):
        cfg.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(cfg.device)
    dist.init_process_group(
        timeout=datetime.timedelta(hours=12)
    )  # why so long: the others wait while process 0 evaluates
    sys.stdout = sys.stdout if place()[0] == 0 else open(os.devnull, "w")
    distil(cfg)
    dist.destroy_process_group()


# ---- --dry-run: what would it take? ------------------------------------------------------------------------------------
def timed(f, device, seconds=5):
    """Median seconds of f() (torch.utils.benchmark, for `seconds` or two calls); peak memory in bytes, on a CPU of the process so far."""
    import resource, torch.utils.benchmark  # resource is not there on Windows

    f()  # compiles, warms up
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    timer = torch.utils.benchmark.Timer(
        "f()", globals=dict(f=f), num_threads=torch.get_num_threads()
    )
    median, host = (
        timer.blocked_autorange(min_run_time=seconds).median,
        1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    )
    return median, torch.cuda.max_memory_allocated(device) if device.type == "cuda" else host


def dry_run(cfg):
    """Time every phase of the command, in its real shapes, on random tokens, beside what this machine needs at least, and print the whole's cost."""
    (lm, disk), B, model = check_model(cfg), cfg.batch, load_model(cfg)
    D, V, device, cuda = lm.hidden_size, lm.vocab_size, model.device, cfg.device.startswith("cuda")
    rows = np.random.default_rng(0).integers(
        1, V, (-(-(16384 if cuda else 4096) // cfg.ctx), cfg.ctx - 1), np.int32
    )
    text, x = (
        Text(rows, 0, torch.tensor([0]), 1, 1),
        torch.randn(B, D, device=device),
    )  # token 0 is BOS
    ids, block = (
        text.contexts(slice(len(rows))),
        torch.empty(64 * B, D, dtype=model.dtype, device=device),
    )  # block: lies there in training
    few, t = (
        ids[: max(1, 2**28 // V // cfg.ctx)],
        Training(cfg, cfg.k, Core(torch.zeros(0, D)), x, 1.0, 0),
    )

    def step(dead=0):
        t.since[cfg.d_sae - dead :] = t.dead_after
        t.step(x, 0)

    a, b = (
        torch.randn(*2 * [8192 if cuda else 2048], dtype=model.dtype, device=device),
        torch.empty(2, 2**25, device=device),
    )
    flops, copied = (
        2 * len(a) ** 3 / timed(lambda: a @ a, device)[0],
        b.nbytes / timed(lambda: b[0].copy_(b[1]), device)[0],
    )  # a second
    product = timed(lambda: x @ t.sae.W_enc.data.T, device)[0]
    adam = (
        28 * sum(p.numel() for p in t.trained) / copied
    )  # 28: the bytes that Adam moves for a parameter
    P = [sum(p.numel() for p in layer.parameters()) for layer in decoder_layers(model)] + [
        V * D
    ]  # parameters, head last
    kept = (
        disk[1] / (cfg.tokens * D * block.itemsize) if cfg.cache else 0
    )  # share of the activations that the cache holds
    saes, again = (
        cfg.cycles + 1 + len(cfg.transfer_k),
        (cfg.cycles + bool(cfg.transfer_k)) * (1 - kept),
    )
    phases = {  # what is called; tokens of a call, and of the whole command; seconds that a call needs at least
        "train": (step, B, cfg.tokens * saes, product + adam),
        "train, 1/4 dead": (lambda: step(cfg.d_sae // 4), B, 0, product + adam),
        "harvest": (
            lambda: harvest(model, cfg.layer, text, ids),
            ids.numel(),
            cfg.tokens * (1 + again),
            2 * ids.numel() * sum(P[: cfg.layer + 1]) / flops,
        ),
        "attribute": (
            lambda: attribute(model, cfg.layer, text, few, t.sae, cfg.attribution_agg),
            few.numel(),
            saes * (cfg.attribution_tokens + 131072),
            2 * few.numel() * (sum(P) + sum(P[cfg.layer + 1 :])) / flops,
        ),
    }
    times = {name: timed(f, device) for name, (f, *_) in phases.items()}
    total = sum(times[name][0] * tokens / n for name, (_, n, tokens, _) in phases.items())
    print(
        f"dmsae --dry-run | {cfg.model} layer {cfg.layer} | {cfg.device}, torch {torch.__version__}: {flops / 1e12:.3g} TFLOP/s "
        f"({model.dtype} product), {copied / 1e9:.3g} GB/s (copy)\nphase                  ms    tokens/s    share   peak GiB   time / floor"
    )
    for name, (_, n, tokens, floor) in phases.items():
        s, peak = times[name]
        print(
            f"{name:15s} {1e3 * s:9.1f} {n / s:11,.0f} {s * tokens / n / total:8.1%} {peak / 2**30:10.2f} {s / floor:14.2f}"
        )
    print(
        f"floors: encoder product {1e3 * product:.1f} ms and Adam's bytes {1e3 * adam:.1f} ms a step; 2 FLOP a parameter and token\nthe whole "
        f"command: {total / 3600:.3g} hours and tokenising; {disk[0] / 1e9:.3g} GB in {cfg.out}",
        f"and {disk[1] / 1e9:.3g} GB in {cfg.cache}" * bool(cfg.cache),
    )


def main(argv=None, name="dmsae", work=lambda argv: run(parse(argv))):
    """The command line (eval.py's too). Returns the exit code: 0 done, 2 bad input, 130 interrupted."""
    warnings.filterwarnings("ignore", message="Sparse CSR")  # torch calls them beta
    os.environ.setdefault(
        "THP_MEM_ALLOC_ENABLE", "1"
    )  # why: huge pages make a step on a CPU a sixth faster
    try:
        work(argv)
        return 0
    except (BadInput, OSError) as e:  # OSError: a folder that cannot be written, a full disk
        print(
            f"{name}: " + " ".join(str(e).split())[:1000], file=sys.stderr
        )  # one line, also where libraries say several
        return 2
    except KeyboardInterrupt:
        print(
            f"\n{name}: interrupted; a training goes on from its last checkpoint with the same command",
            file=sys.stderr,
        )
        return 130


if __name__ == "__main__":
    sys.exit(main())
