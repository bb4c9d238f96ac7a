"""Train a small Llama natively with NOSA attention on synthetic recall, or its dense twin; one GPU, unattended.

    python -m bench.train_native --minutes 8 --out out/native
    python -m bench.train_native --minutes 8 --out out/dense --dense

Training goes by the clock: sequences grow from 128 to 8192 tokens, each length as soon as the one before it is learnt
or its share of the time is over; the learning rate is constant, then falls to zero over the last third. A native run
learns the task densely first; then selection joins, beginning with the length at which it leaves something out.

The folder gets the model (bfloat16, loadable by transformers), `heads.safetensors` (the learned heads), `weights.pt`
(fp32, for --resume), `log.jsonl`, and at the end `results.json`: the geometry, and exactly answered questions by task,
length and attention.
"""

import argparse
import json
import math
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from bench.native_attention import NAME, Geometry, ImportanceHead, Pass, native_attention
from rheo_offload.eval.recall import BOS, CLOSE, PAD, VOCABULARY, Layout, draw_layout, make_batch
from rheo_offload.model.learned_heads import HeadsInfo, save_heads
from rheo_offload.model.specs import layer_specs

EVAL_SEED = 10**6
LEARNT = 0.98
DECAY_FROM = 0.65
WARMUP_STEPS = 200
EMBEDDING_STD = 0.25
"""So large that the steps of the optimiser do not rewrite the embeddings at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Sizes of a run."""

    lengths: tuple[int, ...] = (128, 256, 512, 1024, 2048, 4096, 8192)
    shares: tuple[float, ...] = (0.25, 0.05, 0.05, 0.1, 0.1, 0.1, 0.35)
    """Largest share of the time for every length."""
    max_question_tokens: int = 320
    tokens_per_step: int = 2**15
    max_batch: int = 192
    geometry: Geometry = Geometry()
    hidden: int = 256
    layers: int = 4
    heads: int = 8
    learning_rate: float = 1e-3
    align: float = 1.0
    dense_share: float = 0.35
    """Largest share of the time in which a native run only learns the task, densely."""
    wired: bool = True
    """Whether the model begins with an induction circuit."""
    eval_sequences: int = 16
    eval_lengths: tuple[int, ...] = (1024, 2048, 4096, 8192)

    def batch(self, length: int) -> int:
        """Sequences per step."""
        return max(1, min(self.max_batch, self.tokens_per_step // length))

    @property
    def first_sparse(self) -> int:
        """Return the index of the first length of twice the budget or more, else the last: others leave little out."""
        enough = (i for i, length in enumerate(self.lengths) if length >= 2 * self.geometry.tokens)
        return next(enough, len(self.lengths) - 1)

    def question_tokens(self, length: int) -> int:
        """Room for questions at the end of a sequence."""
        return min(self.max_question_tokens, length // 3)


TINY = Recipe(
    lengths=(96, 192, 512),
    shares=(0.4, 0.2, 0.4),
    tokens_per_step=2304,
    geometry=Geometry(block_size=16, unit=4),
    hidden=64,
    layers=2,
    heads=4,
    eval_sequences=4,
    eval_lengths=(192, 512),
)


def geometry_of(block_size: int, tokens: int) -> Geometry:
    """Return a budget of so many tokens in blocks of this size: windows of half a block, a fifth for importance."""
    budget = tokens // block_size
    return Geometry(block_size=block_size, unit=block_size // 4, budget=budget, agnostic=budget // 5)


def build_model(recipe: Recipe, seed: int) -> LlamaForCausalLM:
    """Make the model with its importance heads, in training attention.

    The rotary base is large so that most channels of a key hardly turn over the whole context: content is what has to
    be matched at any distance, and the few fast channels are enough to tell neighbours.
    """
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=recipe.hidden,
        intermediate_size=recipe.hidden * 7 // 4,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=2,
        head_dim=64 if recipe.hidden >= 256 else 32,
        max_position_embeddings=32768,
        rope_parameters={"rope_type": "default", "rope_theta": 1e8},
        tie_word_embeddings=False,
        bos_token_id=BOS,
        eos_token_id=CLOSE,
        pad_token_id=PAD,
    )
    AttentionInterface.register(NAME, native_attention)
    AttentionMaskInterface.register(NAME, lambda *_, **__: None)
    model = LlamaForCausalLM(config)
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=EMBEDDING_STD)
    model.set_attn_implementation(NAME)
    for layer in model.model.layers:
        layer.self_attn.importance = ImportanceHead(config.num_key_value_heads, config.head_dim)
    if recipe.wired:
        wire_induction(model)
    return model


@torch.no_grad()
def wire_induction(model: LlamaForCausalLM) -> None:
    """Let the model begin with the circuit that recall takes: find what followed the last mention of this token.

    Finding it by chance is most of the time that such training takes, and a plateau without any progress to see. One
    head of the first layer looks at the previous token: one channel of the embeddings is the same for all tokens, and
    the head's query of that channel is its key turned back by one position, in the fast rotary pairs. What it reads
    goes into channels of its own, and one head of the second layer compares them with the current token, in the slow
    pairs. What to do with a match, all other heads, and every selection of blocks are left to training.
    """
    config = model.config
    first, second = (layer.self_attn for layer in model.model.layers[:2])
    embeddings = model.get_input_embeddings().weight
    embeddings /= (
        embeddings.square().mean(1, keepdim=True).sqrt().clamp(min=1e-6)
    )  # else norms outweigh positions
    embeddings[:, 0] = 4
    embeddings[PAD] = 0
    embeddings *= EMBEDDING_STD
    constant = 4 / math.sqrt(1 + 16 / config.hidden_size)  # that channel after the norm, within a few percent
    half, fast = config.head_dim // 2, config.head_dim // 6
    theta = config.rope_parameters["rope_theta"] ** (-torch.arange(fast) / half)
    gain = 9 / constant
    first.q_proj.weight[: config.head_dim] = 0
    for weight, angle in ((first.q_proj.weight, -theta), (first.k_proj.weight, 0 * theta)):
        weight[:fast, 0] = gain * torch.cos(angle)
        weight[half : half + fast, 0] = gain * torch.sin(angle)
    slow = torch.cat((torch.arange(half // 2, half), torch.arange(half * 3 // 2, 2 * half)))
    basis = torch.linalg.qr(torch.randn(config.hidden_size - 1, 2 * len(slow)))[0]
    read, write = torch.nn.functional.pad(basis, (0, 0, 1, 0)).T.chunk(2)  # [slow, hidden] each
    first.v_proj.weight[: len(slow)] = read
    first.o_proj.weight[:, : len(slow)] = 2 * EMBEDDING_STD * write.T
    second.q_proj.weight[: config.head_dim] = 0
    second.q_proj.weight[slow] = 2 * read
    second.k_proj.weight[: config.head_dim] = 0
    second.k_proj.weight[slow] = write


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One word, one token."""
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<pad>"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<bos>", eos_token="]", padding_side="left"
    )


def answers(model: LlamaForCausalLM, ids: Tensor, layout: Layout, native: Pass) -> tuple[Tensor, Tensor]:
    """Return the loss over answer tokens, and whether a question's tokens are all right: bool [B, questions]."""
    hidden = model.model(input_ids=ids, native=native, use_cache=False).last_hidden_state
    logits = model.lm_head(hidden[:, layout.context_tokens : -1])
    start = torch.tensor([q.start for q in layout.questions], device=ids.device) - layout.context_tokens
    end = torch.tensor([q.end for q in layout.questions], device=ids.device) - layout.context_tokens
    place = torch.arange(logits.shape[1], device=ids.device)
    asked = (place >= start[:, None]) & (place < end[:, None])  # [questions, R - 1]
    targets = ids[:, layout.context_tokens + 1 :]
    losses = cross_entropy(logits.float().transpose(1, 2), targets, reduction="none")
    answer = asked.any(0)
    loss = (losses * answer).sum() / (len(ids) * answer.sum())
    wrong = logits.argmax(-1) != targets
    return loss, ~(wrong[:, None] & asked).any(-1)


@torch.no_grad()
def evaluate(
    model: LlamaForCausalLM, recipe: Recipe, geometry: Geometry | None, bias: bool
) -> dict[str, dict[str, float]]:
    """Share of exactly answered questions by length and task, on sequences no training step sees."""
    device = model.device
    table = {}
    for length in recipe.eval_lengths:
        right: dict[str, list[float]] = defaultdict(list)
        for i in range(recipe.eval_sequences // 4):
            layout = draw_layout(
                length, recipe.question_tokens(length), torch.Generator().manual_seed(EVAL_SEED + i)
            )
            ids = make_batch(layout, 4, torch.Generator(device).manual_seed(EVAL_SEED + i))
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                _, good = answers(
                    model,
                    ids,
                    layout,
                    Pass(context_tokens=layout.context_tokens, geometry=geometry, bias=bias),
                )
            for question, column in zip(layout.questions, good.float().mean(0).tolist(), strict=True):
                right[question.task].append(column)
        table[str(length)] = {task: round(sum(v) / len(v), 4) for task, v in sorted(right.items())}
    return table


class Trainer:
    """A run: model, optimiser, clock and curriculum."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.recipe = TINY if args.tiny else Recipe()
        if args.block_size is not None:
            self.recipe = replace(
                self.recipe, geometry=geometry_of(args.block_size, self.recipe.geometry.tokens)
            )
        if args.dense_share is not None:
            self.recipe = replace(self.recipe, dense_share=args.dense_share)
        if args.align is not None:
            self.recipe = replace(self.recipe, align=args.align)
        if args.lr is not None:
            self.recipe = replace(self.recipe, learning_rate=args.lr)
        self.dense, self.out, self.seconds = args.dense, args.out, args.minutes * 60
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = build_model(self.recipe, args.seed).to(self.device)
        if args.resume:
            self.model.load_state_dict(read_weights(args.resume), strict=args.resume.suffix == ".pt")
        matrices = [p for p in self.model.parameters() if p.ndim > 1]
        others = [p for p in self.model.parameters() if p.ndim <= 1]
        self.optimiser = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}],
            lr=self.recipe.learning_rate, betas=(0.9, 0.98), fused=self.device.type == "cuda",
        )  # fmt: skip
        self.cpu_random = torch.Generator().manual_seed(args.seed)
        self.random = torch.Generator(self.device).manual_seed(args.seed + 1)
        self.out.mkdir(parents=True, exist_ok=True)
        self.stage = self.recipe.lengths.index(args.from_length or self.recipe.lengths[0])
        self.step, self.spent_before = 0, 0.0
        self.selecting = not self.dense and self.recipe.dense_share == 0
        if self.selecting:
            self.stage = max(self.stage, self.recipe.first_sparse)
        self.recent, self.found = 0.0, 0.0

    def run(self) -> None:
        """Train until the time is over."""
        begin = last_log = last_save = time.monotonic()
        while (elapsed := time.monotonic() - begin) < self.seconds:
            fraction = elapsed / self.seconds
            loss, aligned, right, length, sparse = self.train_step(fraction)
            if self.step % 5 == 0:  # reading a value waits for the device
                self._advance(fraction, float(right), length, sparse)
            if self.step % 10 == 0:
                now = time.monotonic()
                if now - last_log > 5:
                    last_log = now
                    self.log(elapsed, float(loss), float(aligned), length)
                if now - last_save > 60:
                    last_save = now
                    self.save()
        self.save()

    def train_step(self, fraction: float) -> tuple[Tensor, Tensor, Tensor, int, bool]:
        """One update; returns loss, alignment and share of right answers (on the device), length, and if it was sparse.

        A step attends to selected blocks as often as such steps lately found the answers, at least every tenth time;
        the others are dense. Ranking is learnt from both.
        """
        recipe, r = self.recipe, self.cpu_random
        stage = self.stage
        first = recipe.first_sparse if self.selecting else 0
        if stage > first and float(torch.rand((), generator=r)) < 0.3:
            stage = int(torch.randint(first, stage, (), generator=r))
        length = recipe.lengths[stage]
        layout = draw_layout(length, recipe.question_tokens(length), r)
        ids = make_batch(layout, recipe.batch(length), self.random)
        sparse = self.selecting and float(torch.rand((), generator=r)) < max(0.1, self.found)
        native = Pass(
            context_tokens=layout.context_tokens,
            geometry=recipe.geometry if self.selecting else None,
            sparse=sparse,
            bias=not self.dense,
            align=self.selecting and recipe.align > 0,
        )
        for group in self.optimiser.param_groups:
            group["lr"] = recipe.learning_rate * self._rate(fraction)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            loss, good = answers(self.model, ids, layout, native)
        aligned = torch.stack(native.losses).mean() if native.losses else torch.zeros_like(loss)
        (loss + recipe.align * aligned).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.step += 1
        return loss.detach(), aligned.detach(), good.float().mean(), length, sparse

    def _rate(self, fraction: float) -> float:
        falling = (1 - fraction) / (1 - DECAY_FROM)
        return min(1.0, (self.step + 1) / WARMUP_STEPS, max(0.0, falling))

    def _advance(self, fraction: float, right: float, length: int, sparse: bool) -> None:
        """Go on to the next length when this one is learnt, or when its share of the time is over, learnt or not."""
        if length == self.recipe.lengths[self.stage]:
            if sparse:
                self.found = 0.8 * self.found + 0.2 * right
            else:
                self.recent = 0.8 * self.recent + 0.2 * right
        last = self.stage + 1 == len(self.recipe.lengths)
        learnt = (self.found if self.selecting else self.recent) > LEARNT
        over = fraction - self.spent_before > self._share()
        if not (self.dense or self.selecting) and ((learnt and last) or fraction > self.recipe.dense_share):
            self.selecting = True
            self._begin(self.recipe.first_sparse, fraction)
        elif (learnt or over) and not last:
            self._begin(self.stage + 1, fraction)

    def _begin(self, stage: int, fraction: float) -> None:
        self.stage, self.spent_before, self.recent, self.found = stage, fraction, 0.0, 0.0

    def _share(self) -> float:
        """Return the largest share of the whole time for this length in this phase."""
        recipe = self.recipe
        if self.dense:
            return recipe.shares[self.stage]
        if not self.selecting:
            return recipe.shares[self.stage] * recipe.dense_share
        return (
            (1 - recipe.dense_share) * recipe.shares[self.stage] / sum(recipe.shares[recipe.first_sparse :])
        )

    def log(self, elapsed: float, loss: float, aligned: float, length: int) -> None:
        """One line a few seconds, printed and kept."""
        line = {
            "s": round(elapsed, 1), "step": self.step, "stage": self.recipe.lengths[self.stage], "length": length,
            "loss": round(loss, 4), "align": round(aligned, 4), "right": round(self.recent, 4),
            "found": round(self.found, 4), "selecting": self.selecting,
            "lr": round(self.optimiser.param_groups[0]["lr"], 6),
        }  # fmt: skip
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss} at step {self.step}; lower --lr")
        print(json.dumps(line), flush=True)
        with (self.out / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def save(self) -> None:
        """Write the folder; see the module."""
        state = {name: tensor.detach().cpu() for name, tensor in self.model.state_dict().items()}
        torch.save(state, self.out / "weights.pt")
        plain = {n: t.bfloat16() for n, t in state.items() if ".importance." not in n}
        save_file(plain, self.out / "model.safetensors", metadata={"format": "pt"})
        self.model.config.dtype = "bfloat16"
        self.model.config.save_pretrained(self.out)
        self.model.generation_config.save_pretrained(self.out)
        build_tokenizer().save_pretrained(self.out)
        if not self.dense:
            info = HeadsInfo.of(
                layer_specs(self.model.config),
                model_type="llama",
                method="nosa",
                provenance="bench.train_native",
            )
            save_heads(self.out / "heads.safetensors", importance_tensors(state), info)

    def results(self) -> dict[str, object]:
        """Evaluate with every attention that makes sense for this model."""
        geometry = self.recipe.geometry
        by_query = replace(geometry, agnostic=0)
        modes = {"dense": (None, not self.dense), "infllm_v2": (by_query, not self.dense)}
        if not self.dense:
            modes["nosa"] = (geometry, True)
        self.model.eval()
        return {
            "trained": "dense" if self.dense else "nosa", "steps": self.step,
            "block_size": geometry.block_size, "budget_tokens": geometry.tokens, "window_stride": geometry.unit,
            "sink_blocks": geometry.sink, "recent_blocks": geometry.recent,
            "query_agnostic_blocks": geometry.agnostic, "query_agnostic_share": round(geometry.share, 4),
            "accuracy": {mode: evaluate(self.model, self.recipe, *how) for mode, how in modes.items()},
        }  # fmt: skip


def read_weights(file: Path) -> dict[str, Tensor]:
    """Read `weights.pt`, or a `model.safetensors` that lacks the importance heads (they begin anew)."""
    if file.suffix == ".pt":
        return torch.load(file, map_location="cpu", weights_only=True)
    return {name: tensor.float() for name, tensor in load_file(file).items()}


def importance_tensors(state: dict[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    """Return the learned heads by layer and by the names that `learned_heads` gives them; fp32."""
    layers: dict[int, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in state.items():
        if ".self_attn.importance." in name:
            layers[int(name.split(".")[2])]["self_attn." + name.split(".importance.")[1]] = tensor.float()
    return layers


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.train_native", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument(
        "--minutes", type=float, default=8.0, help="of training; the evaluation takes half a minute more"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of model, log and results")
    parser.add_argument("--dense", action="store_true", help="the twin: dense attention, no importance heads")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--resume",
        type=Path,
        metavar="FILE",
        help="weights.pt, or the model.safetensors of a dense twin, to start from",
    )
    parser.add_argument("--from-length", type=int, metavar="N", help="length to begin with, for --resume")
    parser.add_argument("--tiny", action="store_true", help="a miniature for a CPU")
    parser.add_argument("--block-size", type=int, metavar="N", help="tokens of a block, at the same budget")
    parser.add_argument(
        "--dense-share", type=float, metavar="F", help="largest share of the time for the task alone"
    )
    parser.add_argument("--align", type=float, help="weight of the alignment of ranking scores")
    parser.add_argument("--lr", type=float, help="peak learning rate")
    args = parser.parse_args(argv)
    if args.resume and not args.resume.is_file():
        parser.error(f"--resume: there is no file {args.resume}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Train, save, evaluate, print."""
    args = parse(argv)
    torch.set_float32_matmul_precision("high")
    trainer = Trainer(args)
    trainer.run()
    results = trainer.results()
    (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
