"""Which language a text is in, roughly: by its script, and for Latin script by its commonest small words."""

import re
import unicodedata
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping
from types import MappingProxyType

# Start of a block of letters, and the script it belongs to; sorted, so that bisection finds a letter's block.
_BLOCKS = (
    (0x0000, "latin"),
    (0x0370, "greek"),
    (0x0400, "cyrillic"),
    (0x0530, "armenian"),
    (0x0590, "hebrew"),
    (0x0600, "arabic"),
    (0x0900, "devanagari"),
    (0x0980, "other"),
    (0x0E00, "thai"),
    (0x0E80, "other"),
    (0x1100, "hangul"),
    (0x1200, "other"),
    (0x1E00, "latin"),
    (0x1F00, "greek"),
    (0x2000, "other"),
    (0x3040, "kana"),
    (0x3100, "other"),
    (0x3400, "han"),
    (0xA000, "other"),
    (0xAC00, "hangul"),
    (0xD7B0, "other"),
    (0xF900, "han"),
    (0xFB00, "latin"),
    (0xFB1D, "hebrew"),
    (0xFB50, "arabic"),
    (0xFF21, "latin"),
    (0xFF66, "kana"),
    (0xFFA0, "other"),
    (0x20000, "han"),
)
_STARTS = tuple(start for start, _ in _BLOCKS)
# Japanese mixes kana with Han letters; Chinese has none.
_KANA_SHARE = 0.1
_BY_SCRIPT: Mapping[str, str] = MappingProxyType({"han": "zh", "hangul": "ko", "greek": "el", "thai": "th"})
_SMALL_WORDS: Mapping[str, str] = MappingProxyType(
    {
        "en": "the of and to is that it for was with as on are this be have from or not you",
        "de": "der die das und ist nicht ein eine zu den mit von auf für sich dem im auch es ich",
        "fr": "le la les des et est une un que dans pour pas qui sur au avec ce il du nous",
        "es": "el la los las de y que en un una es por con para del se no lo como más",
        "it": "il di che la è per un una non sono con del della gli le si ma anche come più",
        "pt": "o de que e do da em um uma para com não os no se na por mais as é",
    }
)
_FEWEST_VOTES = 2
_WORD = re.compile(r"[^\W\d_]+")


def language_of(text: str) -> str:
    """Name a text's language ("en", "zh"), or else its script ("cyrillic"), or "none" where it has no letters."""
    letters = Counter(map(_script, filter(str.isalpha, text)))
    if not letters:
        return "none"
    if letters["kana"] > _KANA_SHARE * (letters["kana"] + letters["han"]) and letters["kana"] >= letters["latin"]:
        return "ja"
    script = max(sorted(letters), key=lambda name: letters[name])
    return _latin_language(text) if script == "latin" else _BY_SCRIPT.get(script, script)


def dedup_key(text: str) -> str:
    """Reduce a text to what near duplicates share: its letters and digits, without case, accents' form or spacing."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(re.findall(r"\w+", folded))


def _script(letter: str) -> str:
    return _BLOCKS[bisect_right(_STARTS, ord(letter)) - 1][1]


def _latin_language(text: str) -> str:
    words = [word.casefold() for word in _WORD.findall(text)]
    votes = {language: _hits(words, frozenset(small.split())) for language, small in _SMALL_WORDS.items()}
    first, second = sorted(votes, key=lambda language: (-votes[language], language))[:2]
    return first if votes[first] >= _FEWEST_VOTES and votes[first] > votes[second] else "latin"


def _hits(words: list[str], small: frozenset[str]) -> int:
    return sum(word in small for word in words)
