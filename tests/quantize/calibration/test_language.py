"""Languages by script and small words; dedup_key by letters alone."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantize.calibration.language import dedup_key, language_of

EXAMPLES = [
    ("The train leaves at nine, and you have to change in Leeds.", "en"),
    ("Der Zug fährt um neun ab, und du musst in Ulm nicht umsteigen.", "de"),
    ("Le train part à neuf heures, et il ne faut pas changer dans les gares.", "fr"),
    ("El tren sale a las nueve y no hay que cambiar en la estación.", "es"),
    ("Il treno parte alle nove e non si deve cambiare per la città.", "it"),
    ("O trem sai às nove e não é preciso trocar na estação do centro.", "pt"),
    ("火车九点开。不用换车。", "zh"),
    ("電車は九時に出ます。乗り換えはありません。", "ja"),
    ("기차는 아홉 시에 출발합니다.", "ko"),
    ("Поезд отправляется в девять часов.", "cyrillic"),
    ("القطار يغادر في التاسعة.", "arabic"),
    ("\u03a4\u03bf τρένο φεύγει στις εννέα.", "greek"),
    ("रेलगाड़ी नौ बजे निकलती है।", "devanagari"),
    ("Solve: x = 3", "latin"),
    ("def f(x): return x", "latin"),
    ("1 + 1 = 2", "none"),
    ("", "none"),
    ("In Python, 列表 is called a list, and it is what you want for this.", "en"),
]


@pytest.mark.parametrize("text,language", [(text, "el" if name == "greek" else name) for text, name in EXAMPLES])
def test_languages(text: str, language: str) -> None:
    """A sentence is enough where small words or letters tell; otherwise the script is all that is said."""
    assert language_of(text) == language


@given(st.text())
def test_every_text_has_one(text: str) -> None:
    """Whatever is in it, and the same each time."""
    assert language_of(text) == language_of(text) != ""


@pytest.mark.parametrize(
    "one,other,alike",
    [
        ("What is 1+1?", "what is  1 + 1", True),
        ("What is 1+1?", "What is 1+2?", False),
        ("Grüße", "GRÜSSE", True),
        ("Gru\u0308ße", "Grüße", True),
        ("a b", "ab", False),
    ],
)
def test_likeness(one: str, other: str, alike: bool) -> None:
    """Case, spacing, punctuation and the form of accents make no difference; letters and digits do."""
    assert (dedup_key(one) == dedup_key(other)) == alike
