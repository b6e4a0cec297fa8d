"""Token counts in the `usage` object of OpenAI's and Anthropic's APIs."""

import msgspec


class CompletionDetails(msgspec.Struct):
    """Breakdown of completion tokens."""

    reasoning_tokens: int | None = None


class Usage(msgspec.Struct, gc=False):
    """Token counts as the engine reports them.

    Chat and completions use `prompt_tokens` and `completion_tokens`, responses and messages the other two.
    """

    prompt_tokens: int | None = 0
    completion_tokens: int | None = 0
    completion_tokens_details: CompletionDetails | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    output_tokens_details: CompletionDetails | None = None

    @property
    def prompt(self) -> int:
        """Prompt tokens."""
        return self.input_tokens or self.prompt_tokens or 0

    @property
    def completion(self) -> int:
        """Generated tokens, reasoning included."""
        return self.output_tokens or self.completion_tokens or 0

    @property
    def reasoning(self) -> int:
        """Generated tokens of reasoning."""
        details = self.output_tokens_details or self.completion_tokens_details
        return (details.reasoning_tokens if details else 0) or 0

    def merged_with(self, earlier: "Usage | None") -> "Usage":
        """Fill in counts from an earlier event: Anthropic sends input tokens first and output tokens last."""
        if earlier is None:
            return self
        return msgspec.structs.replace(
            self,
            input_tokens=self.input_tokens or earlier.input_tokens,
            output_tokens=self.output_tokens or earlier.output_tokens,
        )
