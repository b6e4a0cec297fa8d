"""A program around vLLM's own chat serving: generated tokens in, the bytes that vLLM would answer out.

No engine runs and no model is loaded: vLLM's parsers, its stream and its whole answers are the real ones. It reads JSON
lines `{"request": {...}, "prompt": text, "choices": [[text, ...], ...], "finish": reason, "stop_reason": ...}`, each
text one step of a choice, and writes a JSON line `{"answer": text}` for each: a stream of events, or a whole answer.
"""

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from vllm.entrypoints.generate.base.protocol import RequestResponseMetadata
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.parser import ParserManager

SPECIAL = ["<|im_start|>", "<|im_end|>"]
TAGS = ["<think>", "</think>"]


def tokenizer(*, tags: bool) -> Any:
    """Bytes as tokens, the marks of a turn beside them, and the tags if the model has them as tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bare = Tokenizer(models.BPE({each: number for number, each in enumerate(alphabet)}, []))
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    bare.add_special_tokens(SPECIAL)
    bare.add_tokens(TAGS if tags else [])
    return PreTrainedTokenizerFast(tokenizer_object=bare, eos_token=SPECIAL[1])


class Serving(OpenAIServingChat):  # type: ignore[misc]
    """vLLM's chat endpoint behind the engine, as the server sets it up with `--reasoning-parser qwen3`."""

    def __init__(self, words: Any) -> None:
        self.words = words
        self.parser_cls = ParserManager.get_parser(reasoning_parser_name="qwen3", tokenizer=words)
        self.model_config = None
        self.response_role = "assistant"
        self.chat_template, self.chat_template_content_format = None, "string"
        self.default_chat_template_kwargs: dict[str, Any] = {}
        self.enable_auto_tools = self.enable_log_outputs = self.enable_log_deltas = False
        self.enable_force_include_usage = self.enable_per_request_metrics = False
        self.enable_prompt_tokens_details = False
        self._include_reasoning_tokens_details = True
        self.request_logger = self.system_fingerprint = None

    async def answer(self, row: dict[str, Any]) -> str:
        """What the server sends for a request if the model generates this."""
        request = ChatCompletionRequest(**row["request"])
        about: tuple[Any, ...] = ("chatcmpl-1", "m1", [], self.words, RequestResponseMetadata(request_id="chatcmpl-1"))
        kwargs = self._effective_chat_template_kwargs(request)
        if request.stream:
            stream = self.chat_completion_stream_generator(request, self.steps(row), *about, kwargs)
            return "".join([event async for event in stream])
        parser = self._make_parser(request, self.words, kwargs)
        whole = await self.chat_completion_full_generator(request, self.whole(row), *about, parser)
        return str(whole.model_dump_json())

    async def steps(self, row: dict[str, Any]) -> AsyncIterator[Any]:
        """The engine's output, as much at a time as the row says; the last step carries the end of the turn."""
        longest = max(map(len, row["choices"]))
        for step in range(longest):
            outputs = [
                self.output(row, index, texts[step], last=step == len(texts) - 1)
                for index, texts in enumerate(row["choices"])
                if step < len(texts)
            ]
            yield self.result(row, outputs, finished=step == longest - 1)

    async def whole(self, row: dict[str, Any]) -> AsyncIterator[Any]:
        """The engine's output, all at once."""
        outputs = [self.output(row, index, "".join(texts), last=True) for index, texts in enumerate(row["choices"])]
        yield self.result(row, outputs, finished=True)

    def output(self, row: dict[str, Any], index: int, text: str, *, last: bool) -> Any:
        """Some tokens of one choice; one that ended by itself ends with a token that has no text."""
        ids = self.words.encode(text, add_special_tokens=False)
        if last and row["finish"] == "stop" and row.get("stop_reason") is None:
            ids = [*ids, self.words.eos_token_id]
        reason = row["finish"] if last else None
        return CompletionOutput(index, text, ids, None, None, finish_reason=reason, stop_reason=row.get("stop_reason"))

    def result(self, row: dict[str, Any], outputs: list[Any], *, finished: bool) -> Any:
        """What the engine hands to the server."""
        prompt = self.words.encode(row["prompt"], add_special_tokens=False)
        return RequestOutput("1", row["prompt"], prompt, None, outputs, finished)


async def main() -> None:
    """Answer every line."""
    servings = {tags: Serving(tokenizer(tags=tags)) for tags in (True, False)}
    for line in sys.stdin:
        row = json.loads(line)
        # vLLM may have put something of its own in the place of stdout.
        print(json.dumps({"answer": await servings[row["tags"]].answer(row)}), file=sys.__stdout__)


if __name__ == "__main__":
    asyncio.run(main())
