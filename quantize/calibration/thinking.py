r"""How a model marks its reasoning, seen from its chat template; where reasoning is in a text. Pure.

| family                  | reasoning                                                         |
| ----------------------- | ----------------------------------------------------------------- |
| most                    | `<think>...</think>`                                              |
| Mistral (Magistral)     | `[THINK]...[/THINK]`                                              |
| Seed-OSS                | `<seed:think>...</seed:think>`                                    |
| EXAONE Deep             | `<thought>...</thought>`                                          |
| Cohere                  | `<|START_THINKING|>...<|END_THINKING|>`                           |
| Kimi-VL                 | `◁think▷...◁/think▷`                                              |
| gpt-oss (harmony)       | the channel `analysis`, before the channel `final` of the answer  |
"""

import re
from dataclasses import dataclass

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Markers:
    """What stands before and after reasoning, and between it and the answer.

    `field` is the key of a message in which the template takes reasoning, where it refuses it in the content.
    """

    start: str
    end: str
    between: str = "\n\n"
    field: str = ""

    @property
    def tags(self) -> re.Pattern[str]:
        """Match either marker."""
        return re.compile(f"{re.escape(self.start)}|{re.escape(self.end)}")


THINK = Markers("<think>", "</think>")
HARMONY = Markers(
    "<|channel|>analysis<|message|>",
    "<|end|>",
    between="<|start|>assistant<|channel|>final<|message|>",
    field="thinking",
)
MARKERS = (
    THINK,
    Markers("[THINK]", "[/THINK]", between=""),
    Markers("<seed:think>", "</seed:think>", between=""),
    Markers("<thought>", "</thought>"),
    Markers("<|START_THINKING|>", "<|END_THINKING|>", between=""),
    Markers("◁think▷", "◁/think▷", between=""),
    HARMONY,
)


def markers_of(tokenizer: object) -> Markers:
    """Find the markers that a tokenizer's chat template writes or looks for; `<think>` where it has none."""
    template = getattr(tokenizer, "chat_template", None)
    text = template if isinstance(template, str) else ""
    return next(
        (marker for marker in MARKERS if marker.start in text or (marker is not HARMONY and marker.end in text)), THINK
    )


def converted(content: str, markers: Markers) -> str:
    """Replace the markers of another family at the start of an answer; any other text stays as it is."""
    for other in MARKERS:
        if other == markers or not content.lstrip().startswith(other.start) or other.end not in content:
            continue
        thought, _, answer = content.lstrip().removeprefix(other.start).partition(other.end)
        answer = answer.lstrip().removeprefix(other.between).lstrip()
        return joined(thought.strip(), answer, markers)
    return content


def joined(thought: str, answer: str, markers: Markers) -> str:
    """Write reasoning and answer as a model with these markers does."""
    line = "" if markers.field else "\n"
    return f"{markers.start}{line}{thought}{line}{markers.end}{markers.between}{answer}"


def divided(content: str, markers: Markers) -> tuple[str, str]:
    """Split an answer into its reasoning, without markers, and what follows."""
    spans = reasoning_spans(content, markers)
    if not spans:
        return "", content
    thoughts = "\n".join(markers.tags.sub("", content[start:end]).strip() for start, end in spans)
    return thoughts, content[spans[-1][1] :].lstrip().removeprefix(markers.between).lstrip()


def reasoning_spans(answer: str, markers: Markers = THINK) -> list[Span]:
    """Find the character ranges of reasoning in an answer, tags included, but not those of empty thoughts.

    A first span that only closes began with the answer (the prompt had opened it); one that only opens was cut.
    """
    spans: list[Span] = []
    opened: int | None = None
    for tag in markers.tags.finditer(answer):
        if tag[0] == markers.start:
            opened = tag.start() if opened is None else opened
        elif opened is not None or not (spans or markers.field):
            spans.append((opened or 0, tag.end()))
            opened = None
    if opened is not None:
        spans.append((opened, len(answer)))
    return [(start, end) for start, end in spans if markers.tags.sub("", answer[start:end]).strip()]


def thoughts(content: str, markers: Markers = THINK) -> list[str]:
    """Take the pieces of reasoning out of an answer, without their tags."""
    return [markers.tags.sub("", content[start:end]).strip() for start, end in reasoning_spans(content, markers)]
