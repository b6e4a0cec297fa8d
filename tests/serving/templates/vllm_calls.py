"""Reads calls of tools with vLLM's own parsers; no engine runs and no model is loaded.

`tool_calls.txt` has, by parser, how a model writes a call of `look_up_weather` for Paris, as the parser's source says.
Prints a JSON object: by parser, the calls that it found, alone and behind a thought with our reasoning parser.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.parser import ParserManager

from serving.templates.plan import PARSER
from serving.templates.tool_calling import TOOL
from tests.reasoning.vllm_answers import tokenizer

FILE = Path(__file__).with_name("tool_calls.txt")
THOUGHT = "<think>hm</think>\n\n"
# Words that are tokens of their own, in one tokenizer or another.
TOKENS = re.compile(r"<(?!parameter|function=)[^<> ]*>|\[TOOL_CALLS\]")


def found(parser: str, text: str, reasoning_parser: str | None) -> list[tuple[str, Any]]:
    """The calls that vLLM finds in a generated text."""
    words = tokenizer(tags=True)
    words.add_tokens(["<|python_tag|>", *sorted(set(TOKENS.findall(text)))])
    made = ParserManager.get_parser(
        tool_parser_name=parser, reasoning_parser_name=reasoning_parser, enable_auto_tools=True, tokenizer=words
    )
    messages = [{"role": "user", "content": "How is the weather in Paris?"}]
    request = ChatCompletionRequest(model="m", messages=messages, tools=[TOOL], tool_choice="auto")
    ids = words.encode(text, add_special_tokens=False)
    _, _, calls = made(words, request.tools, chat_template_kwargs={}).parse(
        text, request, enable_auto_tools=True, model_output_token_ids=ids
    )
    return [(call.name, json.loads(call.arguments)) for call in calls or ()]


def main() -> None:
    """Read every call, twice."""
    calls = re.findall(r"^== (\w+)\n(.*?)\n(?===|\Z)", FILE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    told = {name: [found(name, text, None), found(name, THOUGHT + text, PARSER)] for name, text in calls}
    # vLLM may have put something of its own in the place of stdout.
    print(json.dumps(told), file=sys.__stdout__)


if __name__ == "__main__":
    main()
