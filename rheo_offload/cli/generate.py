"""`rheo generate`: prompts in, streamed text out, statistics on stderr."""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import TextStreamer
from transformers.generation.streamers import BaseStreamer

from rheo_offload import Engine, Request, SamplingParams, Stats, offload
from rheo_offload.cli.options import add_config_options, at_least, config_from
from rheo_offload.errors import CacheError, RheoError
from rheo_offload.model.generation import sampling_params
from rheo_offload.model.loader import load
from rheo_offload.model.specs import max_positions

EXIT_INTERRUPTED = 130


def add_parser(subparsers: Any) -> None:
    """Add the `generate` verb."""
    parser = subparsers.add_parser("generate", help="generate text from prompts", description=__doc__)
    add_run_options(parser)
    parser.add_argument(
        "--max-batch",
        type=at_least(1),
        metavar="N",
        help="decode at most N prompts at once; the others join as rows become free (default: all in one batch)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON record instead of the text")
    add_config_options(parser)
    parser.set_defaults(run=run)


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Add what says which model generates what: model, prompts, length, sampling."""
    parser.add_argument("--model", required=True, help="Hugging Face id or local directory")
    parser.add_argument("--gguf", metavar="FILE", help="GGUF file inside that directory")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="the prompt, or - to read it from stdin")
    prompt.add_argument(
        "--prompt-file", metavar="FILE", help="file that holds the prompt; one final newline is dropped"
    )
    prompt.add_argument("--prompts-file", metavar="JSONL", help='batch: one {"prompt": "..."} a line')
    parser.add_argument("--chat", action="store_true", help="put the prompt into the model's chat template")
    parser.add_argument("--system", metavar="TEXT", help="system message; implies --chat")
    parser.add_argument("--max-new-tokens", type=at_least(0), default=256, metavar="N", help="default: 256")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    parser.add_argument(
        "--temperature", type=float, help="sample at this temperature (0 = greedy, the default)"
    )
    parser.add_argument("--top-p", type=float, help="sample from the smallest set of this probability")
    parser.add_argument("--top-k", type=at_least(1), help="sample from the k most likely tokens")
    parser.add_argument("--repetition-penalty", type=float)
    parser.add_argument("--seed", type=int, default=0, help="of sampling (default: 0)")
    parser.add_argument("--allow-longer", action="store_true", help="exceed the model's maximum position")
    parser.add_argument(
        "--decode-tail",
        type=at_least(1),
        default=1,
        metavar="N",
        help="feed the last N prompt tokens through sparse decoding, not the dense prefill (default: 1)",
    )


def run(args: argparse.Namespace) -> int:
    """Generate and return the exit code (130 when Ctrl-C ended it early)."""
    # Everything that can be refused without the weights is refused before they are loaded.
    config, prompts, sampling = config_from(args), read_prompts(args), sampling_options(args)
    if args.max_batch is not None:
        check_queue(args)
    model, tokenizer = load(args.model, gguf=args.gguf, dtype=args.dtype, device=args.device)
    rows = encode(prompts, tokenizer, chat=args.chat, system=args.system)
    check_lengths(rows, args, max_positions(model.config))
    if args.max_batch is not None:
        params = sampling_params(model, max_new_tokens=args.max_new_tokens, **sampling)
    offload(model, config)
    torch.manual_seed(args.seed)
    recorder = Recorder(tokenizer, len(rows), stream_text=len(rows) == 1 and not args.json)
    interrupted = False
    try:
        if args.max_batch is not None:
            generate_queue(model, rows, recorder, params, args.max_batch)
        else:
            generate(model, tokenizer, rows, recorder, args, sampling)
    except KeyboardInterrupt:
        interrupted = True
    recorder.close()
    results = [
        result(row, new, tokenizer, stop_ids(model), interrupted)
        for row, new in zip(rows, recorder.new_tokens, strict=True)
    ]
    report(args, results, recorder.stats or statistics(model, interrupted), interrupted)
    return EXIT_INTERRUPTED if interrupted else 0


def generate(
    model: Any,
    tokenizer: Any,
    rows: list[list[int]],
    recorder: "Recorder",
    args: Any,
    sampling: dict[str, Any],
) -> None:
    """Run the model over left-padded rows; new tokens arrive in `recorder`."""
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    width = max(len(row) for row in rows)
    input_ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=model.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=model.device)
    with tqdm(total=width, unit="tok", desc="prefill", file=sys.stderr, leave=False, disable=None) as bar:

        def progress(done_tokens: int, total_tokens: int) -> None:
            bar.total = total_tokens
            bar.update(done_tokens - bar.n)
            if done_tokens >= total_tokens:
                bar.close()

        model.generate(
            input_ids=input_ids,
            attention_mask=mask,
            max_new_tokens=args.max_new_tokens,
            pad_token_id=pad,
            streamer=recorder,
            rheo_progress=progress,
            decode_tail_tokens=args.decode_tail,
            allow_longer=args.allow_longer,
            **sampling,
        )


def check_queue(args: argparse.Namespace) -> None:
    """Refuse what a queue of requests cannot do."""
    if args.max_new_tokens < 1:
        raise RheoError("--max-batch needs --max-new-tokens of at least 1")
    off = {"decode_tail": (1,), "repetition_penalty": (None, 1.0), "allow_longer": (False,)}
    for name, values in off.items():
        if getattr(args, name) not in values:
            raise RheoError(f"--{name.replace('_', '-')} does not work together with --max-batch")


def generate_queue(
    model: Any, rows: list[list[int]], recorder: "Recorder", params: SamplingParams, max_batch: int
) -> None:
    """Run the prompts through an engine of `max_batch` rows; new tokens arrive in `recorder`."""
    longest = max(map(len, rows)) + params.max_new_tokens
    tokens = params.max_new_tokens * len(rows)
    with (
        Engine(model, max_rows=min(max_batch, len(rows)), max_context_tokens=longest) as engine,
        tqdm(total=tokens, unit="tok", desc="decode", file=sys.stderr, leave=False, disable=None) as bar,
    ):
        row_of: dict[str, int] = {}

        def add(request: Request, token: int) -> None:
            recorder.add(row_of[request.id], token)
            bar.update()

        for i, ids in enumerate(rows):
            row_of[engine.submit(ids, params, on_token=add).id] = i
        engine.run()
        recorder.stats = engine.stats()


class Recorder(BaseStreamer):  # type: ignore[misc]
    """Keep every row's new tokens as they come, so that an interrupted run has them; print a single row's."""

    def __init__(self, tokenizer: Any, num_rows: int, *, stream_text: bool) -> None:
        self.new_tokens: list[list[int]] = [[] for _ in range(num_rows)]
        self._text = TextStreamer(tokenizer, skip_special_tokens=True) if stream_text else None
        self._prompt_seen = False
        self.stats: Stats | None = None
        """Figures of a run whose cache is gone."""

    def put(self, value: torch.Tensor) -> None:
        """Take one token per row ([B]); the first call brings the prompt ([B, T]) and is dropped."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        for row, token in enumerate(value.reshape(-1).tolist()):
            self.add(row, token)

    def add(self, row: int, token: int) -> None:
        """Take one token of one row."""
        self.new_tokens[row].append(token)
        if self._text is not None:
            self._text.put(torch.tensor([token]))

    def end(self) -> None:
        """Do nothing: `close` also runs after an interruption."""

    def close(self) -> None:
        """Print what the text streamer holds back until a word is complete."""
        if self._text is not None:
            self._text.end()


def read_prompts(args: argparse.Namespace) -> list[str]:
    """Return the prompts of `--prompt`, `--prompt-file` or `--prompts-file`.

    Raises:
        RheoError: a file cannot be read, a line is not {"prompt": "..."}, or a prompt is empty.
    """
    if args.prompts_file is not None:
        lines = read_text(args.prompts_file).splitlines()
        prompts = [
            prompt_of(line, f"{args.prompts_file}:{n}") for n, line in enumerate(lines, 1) if line.strip()
        ]
    elif args.prompt_file is not None:
        prompts = [read_text(args.prompt_file).removesuffix("\n")]
    else:
        prompts = [sys.stdin.read().removesuffix("\n") if args.prompt == "-" else args.prompt]
    if not prompts or not all(prompt.strip() for prompt in prompts):
        raise RheoError(
            "the prompt is empty" if len(prompts) == 1 else "the prompts file holds no or an empty prompt"
        )
    return prompts


def read_text(file: str) -> str:
    """Return the text of a UTF-8 file, or raise RheoError saying why it cannot be read."""
    try:
        return Path(file).read_text(encoding="utf-8")
    except OSError as error:
        raise RheoError(f"cannot read {file!r}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RheoError(f"{file!r} is not UTF-8 text: {error.reason} at byte {error.start}") from error


def prompt_of(line: str, where: str) -> str:
    """Return the prompt of one JSON line."""
    try:
        prompt = json.loads(line)["prompt"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise RheoError(f'{where}: not a JSON object with a "prompt"') from error
    if not isinstance(prompt, str):
        raise RheoError(f"{where}: the prompt must be text, not {prompt!r}")
    return prompt


def sampling_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the sampling arguments of `model.generate`; greedy unless one of them asks for sampling.

    Raises:
        RheoError: a value is out of range, or temperature 0 comes together with top-p or top-k.
    """
    given = {
        name: getattr(args, name)
        for name in ("temperature", "top_p", "top_k")
        if getattr(args, name) is not None
    }
    if not 0 <= given.get("temperature", 0) < float("inf"):
        raise RheoError(f"--temperature must be at least 0, not {args.temperature}")
    if not 0 < given.get("top_p", 1) <= 1:
        raise RheoError(f"--top-p must be above 0 and at most 1, not {args.top_p}")
    if given.get("temperature") == 0:
        if len(given) > 1:
            raise RheoError("--temperature 0 is greedy and cannot be combined with --top-p or --top-k")
        given = {}
    options: dict[str, Any] = {"do_sample": bool(given), **given}
    if args.repetition_penalty is not None:
        if not 0 < args.repetition_penalty < float("inf"):
            raise RheoError(f"--repetition-penalty must be above 0, not {args.repetition_penalty}")
        options["repetition_penalty"] = args.repetition_penalty
    return options


def encode(prompts: list[str], tokenizer: Any, *, chat: bool, system: str | None) -> list[list[int]]:
    """Return the token ids of each prompt, through the chat template when asked for.

    Raises:
        RheoError: there is no chat template, or a prompt has no tokens.
    """
    if not chat and system is None:
        rows = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    else:
        if not tokenizer.chat_template:
            raise RheoError("--chat and --system need a chat template, and this tokenizer has none")
        head = [{"role": "system", "content": system}] if system is not None else []
        texts = [
            tokenizer.apply_chat_template(
                [*head, {"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
            )
            for prompt in prompts
        ]
        # The template writes the special tokens itself.
        rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    if not all(rows):
        raise RheoError("a prompt has no tokens")
    return rows


def check_lengths(rows: list[list[int]], args: argparse.Namespace, positions: int | None) -> None:
    """Refuse what would run past the model's positions, or a decode tail that leaves no prompt."""
    longest, shortest = max(map(len, rows)), min(map(len, rows))
    if args.decode_tail > shortest:
        raise RheoError(f"--decode-tail {args.decode_tail} exceeds the shortest prompt ({shortest} tokens)")
    total = longest + args.max_new_tokens
    if positions is not None and total > positions and not args.allow_longer:
        raise RheoError(
            f"prompt ({longest} tokens) + --max-new-tokens {args.max_new_tokens} = {total} is "
            f"{total - positions} more than the model's {positions} positions; shorten one of them, or pass "
            "--allow-longer"
        )


def stop_ids(model: Any) -> set[int]:
    """Return the token ids that end a row."""
    stop = model.generation_config.eos_token_id
    return set() if stop is None else {stop} if isinstance(stop, int) else set(stop)


@dataclass(frozen=True, slots=True)
class Result:
    """What became of one prompt."""

    prompt_tokens: int
    new_tokens: int
    finish_reason: str
    """`stop` (an end token), `length` or `interrupted`."""
    text: str


def result(row: list[int], new: list[int], tokenizer: Any, stop: set[int], interrupted: bool) -> Result:
    """Cut a row's new tokens at its end token (what follows pads the batch) and decode them."""
    end = next((i + 1 for i, token in enumerate(new) if token in stop), None)
    reason = "stop" if end is not None else "interrupted" if interrupted else "length"
    kept = new[:end]
    return Result(len(row), len(kept), reason, tokenizer.decode(kept, skip_special_tokens=True))


def statistics(model: Any, interrupted: bool) -> Stats | None:
    """Return the run's figures; None when it was interrupted before there were any."""
    try:
        stats: Stats = model.rheo.stats()
        return stats
    except CacheError:
        if interrupted:
            return None
        raise


def report(args: argparse.Namespace, results: list[Result], stats: Stats | None, interrupted: bool) -> None:
    """Write the statistics to stderr, and to stdout what streaming has not written yet."""
    if args.json:
        record = {
            "model": args.model,
            "interrupted": interrupted,
            "results": [{name: getattr(r, name) for name in Result.__slots__} for r in results],
            "stats": stats.to_dict() if stats else None,
        }
        print(json.dumps(record))
        return
    if len(results) > 1:
        for i, r in enumerate(results):
            print(f"--- prompt {i + 1} of {len(results)} ({r.finish_reason})\n{r.text}")
    if stats is not None:
        print(stats.table(), file=sys.stderr)
    if interrupted:
        tokens = sum(r.new_tokens for r in results)
        print(f"rheo: interrupted after {tokens} new tokens", file=sys.stderr)
