"""A model named `rheo` for EleutherAI's lm-evaluation-harness: its tasks, through the sparse decode path.

    python -m rheo_offload.eval.lm_eval_adapter run --model rheo \\
        --model_args pretrained=DIR,config=quest,selection.token_budget=1024 --tasks lambada_openai

This is the harness's own command line (`lm_eval`) with the model registered. In a script, import this module, then
call `lm_eval.simple_evaluate(model="rheo", model_args=...)`. The context of a request is read by the exact, dense
prefill but for its last `decode_tail_tokens` tokens; those, and the continuation, go through the decode path one by
one. The interface is that of lm_eval 0.4.13 (`TemplateLM`); the harness is not a dependency of this package.
"""

import sys
from collections.abc import Sequence
from typing import Any

import torch
from tqdm import tqdm

from rheo_offload.config import RheoConfig
from rheo_offload.errors import RheoError
from rheo_offload.eval.script import decode_script, script_of
from rheo_offload.model.loader import load
from rheo_offload.model.offload import offload
from rheo_offload.model.specs import max_positions

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    missing = f"this module needs the lm-evaluation-harness ({error}): pip install 'lm_eval>=0.4.13'"
    if __name__ == "__main__":
        sys.exit(f"lm_eval_adapter: {missing}")
    raise RheoError(missing) from error

__all__ = ["RheoLM", "main"]

DEFAULT_LENGTH = 2048
"""Longest sequence of a model whose configuration does not say."""


@register_model("rheo")
class RheoLM(TemplateLM):  # type: ignore[misc]
    """An offloaded model behind the harness's interface; one request at a time."""

    def __init__(
        self,
        pretrained: str,
        *,
        gguf: str | None = None,
        config: str = "default",
        decode_tail_tokens: int = 1,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        device: str | None = None,
        dtype: str = "auto",
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        **overrides: Any,
    ) -> None:
        """Load a model and offload it.

        Args:
            pretrained: directory or hub id, as `rheo_offload.model.loader.load` takes it.
            gguf: GGUF file inside that directory.
            config: YAML file or packaged configuration.
            decode_tail_tokens: tokens of a context that go through the decode path; the rest is prefilled.
            max_length: longest sequence in tokens; longer contexts lose their beginning. None: the model's positions.
            max_gen_toks: new tokens of a request that does not say.
            device: `auto`, `cpu` or `cuda`; None is `auto`.
            dtype: `auto`, `float32`, `bfloat16` or `float16`.
            batch_size, max_batch_size: what the harness passes on; only 1 and `auto` are served.
            overrides: `group.key` -> value, over `config`.

        Raises:
            RheoError: an argument is unknown or out of range, or the model cannot be loaded or offloaded.
        """
        super().__init__()
        unknown = [key for key in overrides if "." not in key]
        if unknown:
            raise RheoError(
                f"model_args has no {unknown[0]!r}; configuration keys are written group.key=value"
            )
        if str(batch_size).split(":")[0] not in ("1", "auto"):
            raise RheoError(
                f"requests are served one at a time: batch_size must be 1 or auto, not {batch_size}"
            )
        if decode_tail_tokens < 1:
            raise RheoError(f"decode_tail_tokens must be at least 1, not {decode_tail_tokens}")
        settings = RheoConfig.from_yaml(config).with_overrides(f"{k}={v}" for k, v in overrides.items())
        self.model, self.tokenizer = load(pretrained, gguf=gguf, dtype=dtype, device=device or "auto")
        offload(self.model, settings)
        self.name, self.decode_tail_tokens, self.max_gen_toks = pretrained, decode_tail_tokens, max_gen_toks
        self.max_length = max_length or max_positions(self.model.config) or DEFAULT_LENGTH
        self._device = self.model.device

    # ---- text and tokens ---------------------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        """What the harness keys its caches of requests with."""
        return self.name.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return the ids of a text; a text that begins with the BOS token gets no second one."""
        bos = self.tokenizer.bos_token
        if add_special_tokens is None and bos and string.startswith(bos):
            add_special_tokens = False
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        ids: list[int] = self.tokenizer.encode(string, **options)
        return ids

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return a conversation as the model's prompt."""
        text: str = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text

    # ---- the three kinds of request ----------------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Score continuations: (anything, context ids, continuation ids) -> (log-probability, whether greedy)."""
        results = []
        for pair, context, continuation in tqdm(requests, desc="loglikelihood", disable=disable_tqdm):
            results.append(self.score(context, continuation))
            if pair is not None:
                self.cache_hook.add_partial("loglikelihood", pair, results[-1])
        return results

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Score whole texts, each in windows of `max_length` tokens, every token once."""
        results = []
        for request in tqdm(requests, desc="loglikelihood_rolling", disable=disable_tqdm):
            (text,) = request.args
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text, add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            results.append(sum(self.score(*make_disjoint_window(window))[0] for window in windows))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), results[-1])
        return results

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continue texts greedily until a stop sequence, the end token or the limit.

        Raises:
            RheoError: a request wants sampling, or leaves no room for its context.
        """
        results = []
        for request in tqdm(requests, desc="generate_until", disable=disable_tqdm):
            context, given = request.args
            options = normalize_gen_kwargs(given, self.max_gen_toks)
            if options["do_sample"] or options.get("num_beams", 1) != 1:
                raise RheoError(f"the model `rheo` generates greedily; the task asks for {given}")
            results.append(self._continue(context, options["until"], int(options["max_gen_toks"])))
            self.cache_hook.add_partial("generate_until", (context, given), results[-1])
        return results

    # ---- one request -------------------------------------------------------------------------------------------------

    def score(self, context: Sequence[int], continuation: Sequence[int]) -> tuple[float, bool]:
        """Return the log-probability of a continuation and whether each token of it is the likeliest.

        Raises:
            RheoError: the continuation is empty or longer than `max_length`.
        """
        if not 0 < len(continuation) <= self.max_length or not context:
            raise RheoError(
                f"a continuation has 1 to {self.max_length} tokens after at least one of context, not "
                f"{len(continuation)} after {len(context)}"
            )
        ids = torch.tensor([[*context, *continuation][-(self.max_length + 1) :]])
        known = ids.shape[1] - len(continuation)
        total, greedy = 0.0, True
        if (
            known == 1
        ):  # nothing to prefill: a token that has only itself to attend to is the same in any method
            with torch.no_grad():
                logits = self.model(input_ids=ids[:, :1].to(self.model.device), use_cache=False).logits[0, -1]
            total, greedy = (
                float(logits.float().log_softmax(-1)[ids[0, 1]]),
                int(logits.argmax()) == int(ids[0, 1]),
            )
            known = 2
        scored = ids.shape[1] - known
        if scored:
            run = decode_script(self.model, script_of(ids), start=max(1, known - self.decode_tail_tokens))
            total += float(run.logprobs[-scored:].double().sum())
            greedy = greedy and torch.equal(run.likeliest[-scored:], run.tokens[-scored:])
        return total, greedy

    def _continue(self, context: str, until: Sequence[str], new_tokens: int) -> str:
        room = self.max_length - new_tokens
        if room < 2:
            raise RheoError(
                f"{new_tokens} new tokens leave no room for a context in {self.max_length} positions"
            )
        ids = self.tok_encode(context)
        ids = [self.prefix_token_id, *ids] if len(ids) < 2 else ids
        prompt = torch.tensor([ids[-room:]])
        start = max(1, prompt.shape[1] - self.decode_tail_tokens)
        stops = [text for text in until if text]
        behind = prompt.shape[1] - start - 1  # tokens of the prompt that the run reports, too
        made: list[int] = []

        def ends(token: int) -> bool:
            made.append(token)
            new = made[behind:]
            return bool(new) and (new[-1] == self.eot_token_id or any(s in self._text(new) for s in stops))

        decode_script(self.model, script_of(prompt, new_tokens), start=start, stop=ends)
        new = made[behind:]
        text = self._text(new[:-1] if new[-1] == self.eot_token_id else new)
        return text[: min([len(text), *(text.index(s) for s in stops if s in text)])]

    def _text(self, ids: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text


def main() -> None:
    """Run the harness's command line; `--model rheo` is this one."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
