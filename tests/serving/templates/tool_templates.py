"""Short chat templates that show tools and write calls as those of well-known families do."""

_TURNS = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
_TOOLS = "{% if tools %}{% for tool in tools %}{{ tool | tojson }}{% endfor %}{% endif %}"


def template(*parts: str) -> str:
    """A template that shows its tools, and somewhere says how to call them."""
    said = "".join("{{ " + repr(part) + " }}" for part in parts)
    return f"{_TOOLS}{said}{_TURNS}"


_DEEPSEEK = ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>")  # noqa: RUF001
# Parser, `model_type`, what the template says of calls, and the tokens that the tokenizer must have.
FAMILIES: dict[str, tuple[str, str, tuple[str, ...], tuple[str, ...]]] = {
    "gpt-oss": ("openai", "gpt_oss", ("<|start|>assistant", "<|channel|>final"), ()),
    "seed-oss": ("seed_oss", "seed_oss", ("<seed:tool_call>\n<function=x>\n<parameter=y>",), ()),
    "minimax-m2": ("minimax_m2", "minimax_m2", ('<minimax:tool_call>\n<invoke name="x">',), ()),
    "minimax-m3": ("minimax_m3", "minimax_m3", ("]<]minimax[>[<tool_call>",), ()),
    "step-3.5": ("step3p5", "step3p5", ("<tool_call>\n<function=x>\n<parameter=y>",), ()),
    "mimo": ("mimo", "mimo_v2_flash", ("<tool_call>\n<function=x>\n<parameter=y>",), ()),
    "qwen3-coder": ("qwen3_coder", "qwen3_moe", ("<tool_call>\n<function=x>\n<parameter=y>",), ()),
    "qwen3.5": ("qwen3_coder", "qwen3_5", ("<tool_call>\n<function=x>\n<parameter=y>",), ()),
    "glm-4.5": ("glm45", "glm4_moe", ("<tool_call>{function-name}\n<arg_key>",), ()),
    "glm-4.7": ("glm47", "glm4_moe", ("<tool_call>{function-name}<arg_key>",), ()),
    "kimi-k2": ("kimi_k2", "kimi_k2", ("<|tool_calls_section_begin|>",), ()),
    "deepseek-v3": ("deepseek_v3", "deepseek_v3", ("<｜tool▁calls▁begin｜>", "```json"), _DEEPSEEK),  # noqa: RUF001
    "deepseek-v3.1": ("deepseek_v31", "deepseek_v3", ("<｜tool▁calls▁begin｜>",), _DEEPSEEK),  # noqa: RUF001
    "step-3": ("step3", "step3", ("<｜tool_calls_begin｜>",), ()),  # noqa: RUF001
    "mistral": ("mistral", "mistral", ("[AVAILABLE_TOOLS]", "[TOOL_CALLS]"), ()),
    "llama-4": ("llama4_pythonic", "llama4", ("<|python_start|>",), ()),
    "llama-3.1": ("llama3_json", "llama", ("<|start_header_id|>ipython<|end_header_id|>",), ("<|python_tag|>",)),
    "functiongemma": ("functiongemma", "gemma3_text", ("<start_function_call>call:",), ()),
    "gemma-4": ("gemma4", "gemma4", ("<|tool_call>call:",), ()),
    "granite-4": ("granite4", "granitemoehybrid", ('<tool_call>\n{"name": x, "arguments": y}',), ()),
    "granite-3": ("granite", "granite", ("<|tool_call|>",), ()),
    "lfm2": ("lfm2", "lfm2", ("<|tool_list_start|>",), ("<|tool_call_start|>",)),
    "olmo-3": ("olmo3", "olmo3", ("<function_calls>",), ()),
    "hunyuan-a13b": ("hunyuan_a13b", "hunyuan_v1_moe", ("<tool_calls>",), ()),
    "jamba": ("jamba", "jamba", ("<tool_calls>",), ("<tool_calls>", "</tool_calls>")),
    "apertus": ("apertus", "apertus", ("<|tools_prefix|>",), ()),
    "longcat": ("longcat", "longcat_flash", ("<longcat_tool_call>",), ()),
    "dots": ("dots", "dots1", ("<dots_function_call>",), ()),
    "qwen3": ("hermes", "qwen3", ('<tool_call>\n{"name": x, "arguments": y}\n</tool_call>',), ()),
    "qwq": ("hermes", "qwen2", ('<tool_call>\n{"name": x, "arguments": y}\n</tool_call>',), ()),
}
