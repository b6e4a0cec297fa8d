"""Special tokens written out in a message's content (`What does <|im_end|> mean?`) stay text when a chat is encoded.

A tokenizer turns every `<|im_end|>` of a rendered chat into its special token, a user's, too. Here the first
character of those in contents is replaced, before the template runs, by a private one of the same length. A second
tokenizer then knows the special tokens of the template by another private character, and the contents as they were.
Only rows that contain such text go this way; all others are encoded by the base's tokenizer as ever.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from quantize.calibration.records import Message, Record
from quantize.calibration.thinking import MARKERS

# Private use planes: no text has these characters. One masks text in contents, one marks special tokens.
_MASKS, _GUARDS = 0x100000, 0xF0000
_THINKING = frozenset(tag for marker in MARKERS for tag in (marker.start, marker.end) if tag != "<|end|>")


@dataclass(frozen=True)
class Literals:
    """The special tokens of a tokenizer, and how to keep their text in contents from becoming them.

    Think markers are none of them in an assistant's content: there they mark reasoning.
    """

    tokenizer: Any
    tokens: tuple[str, ...]

    @classmethod
    def of(cls, tokenizer: Any) -> "Literals":
        """Take the special tokens of a tokenizer that can be rebuilt from its JSON; none of any other."""
        if getattr(tokenizer, "backend_tokenizer", None) is None:
            return cls(tokenizer, ())
        special = {str(token.content) for token in tokenizer.added_tokens_decoder.values() if token.special}
        return cls(tokenizer, tuple(sorted(special, key=lambda token: (-len(token), token))))

    def masked(self, record: Record) -> Record:
        """Mask special tokens in the contents of a chat; the same row where there are none."""
        if not self.tokens or not any(map(self._pattern.search, _texts(record))):
            return record
        messages = tuple(map(self._masked_turn, record.messages))
        return replace(record, messages=messages, tools=self._mask(record.tools, frozenset()))

    def encode(self, rendered: str) -> dict[str, Any]:
        """Encode the text of a masked row; offsets are those of `rendered`."""
        run_command = self._pattern.sub(lambda found: self._guards[found[0]], rendered)
        encoded = self._guarded.encode(self.unmasked(run_command), add_special_tokens=False)
        ids = [self._special_ids.get(token, token) for token in encoded.ids]
        return {"input_ids": ids, "offset_mapping": list(encoded.offsets)}

    def unmasked(self, text: str) -> str:
        """Restore masked text."""
        for mask, token in self._originals.items():
            text = text.replace(mask, token)
        return text

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, self.tokens)))

    @cached_property
    def _originals(self) -> Mapping[str, str]:
        return {chr(_MASKS + place) + token[1:]: token for place, token in enumerate(self.tokens)}

    @cached_property
    def _guards(self) -> Mapping[str, str]:
        return {token: chr(_GUARDS + place) + token[1:] for place, token in enumerate(self.tokens)}

    @cached_property
    def _guarded(self) -> Any:
        """The same tokenizer, which finds special tokens by their guarded text only."""
        from tokenizers import Tokenizer  # noqa: PLC0415

        described = json.loads(self.tokenizer.backend_tokenizer.to_str())
        for token in described["added_tokens"]:
            token["content"] = self._guards.get(token["content"], token["content"])
        return Tokenizer.from_str(json.dumps(described | {"post_processor": None, "truncation": None, "padding": None}))

    @cached_property
    def _special_ids(self) -> Mapping[int, int]:
        """Ids of the guarded tokens -> those of the base's tokenizer."""
        known = {str(token.content): number for number, token in self.tokenizer.added_tokens_decoder.items()}
        return {self._guarded.token_to_id(guard): known[token] for token, guard in self._guards.items()}

    def _masked_turn(self, turn: Message) -> Message:
        kept = _THINKING if turn.role == "assistant" else frozenset()
        calls = tuple(replace(call, arguments=self._mask(call.arguments, kept)) for call in turn.tool_calls)
        return replace(turn, content=self._mask(turn.content, kept), tool_calls=calls)

    def _mask(self, text: str, kept: frozenset[str]) -> str:
        masks = {token: mask for mask, token in self._originals.items()}
        return self._pattern.sub(lambda found: found[0] if found[0] in kept else masks[found[0]], text)


def _texts(record: Record) -> Iterable[str]:
    yield record.tools
    for turn in record.messages:
        yield turn.content
        yield from (call.arguments for call in turn.tool_calls)
