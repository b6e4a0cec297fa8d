"""Token counts of an answer, as OpenAI's and Anthropic's APIs report them."""

import msgspec


class CompletionDetails(msgspec.Struct):
    """The part of `usage` that tells thinking apart."""

    reasoning_tokens: int | None = None


class Usage(msgspec.Struct):
    """Token counts as the engine reports them, in the words of each API."""

    prompt_tokens: int | None = 0
    completion_tokens: int | None = 0
    completion_tokens_details: CompletionDetails | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    output_tokens_details: CompletionDetails | None = None

    @property
    def prompt(self) -> int:
        """Tokens that were read."""
        return self.input_tokens or self.prompt_tokens or 0

    @property
    def completion(self) -> int:
        """Tokens that were generated, thinking included."""
        return self.output_tokens or self.completion_tokens or 0

    @property
    def reasoning(self) -> int:
        """Tokens of thinking."""
        details = self.output_tokens_details or self.completion_tokens_details
        return (details.reasoning_tokens if details else 0) or 0

    def beside(self, earlier: "Usage | None") -> "Usage":
        """Add what an earlier event said, and this one doesn't: Anthropic tells input first and output last."""
        if earlier is None:
            return self
        return msgspec.structs.replace(
            self,
            input_tokens=self.input_tokens or earlier.input_tokens,
            output_tokens=self.output_tokens or earlier.output_tokens,
        )
