"""What is hidden in untrusted text is seen in everything that a report writes: terminal, page, card and JSON."""

from __future__ import annotations

import json
import sys
import tomllib
import unicodedata

import pytest

from duo.report.markdown import code, fenced, plain
from duo.report.plain_text import json_text, shown, visible
from duo.report.toml_text import toml_text

KEPT = {
    0x200C,
    0x200D,
    *range(0x600, 0x606),
    0x6DD,
    0x70F,
    0x890,
    0x891,
    0x8E2,
    0x110BD,
    0x110CD,
}  # joiners, signs that show
HIDDEN = [
    chr(number)
    for number in range(sys.maxunicode + 1)
    if unicodedata.category(chr(number)) in ("Cc", "Cf", "Cs", "Zl", "Zp") and number not in KEPT
]


def test_no_control_nor_format_character_of_unicode_is_left() -> None:
    left = [hex(ord(one)) for one in HIDDEN if one in visible(one) or not visible(one).isprintable()]
    assert not left
    left = [hex(ord(one)) for one in HIDDEN if one in json_text(one) and one != "\n"]
    assert not left


def test_what_is_read_stays_as_it_is() -> None:
    text = "a café, 日本語, كلب, می‌خواهم, 👩‍🚒, x₁ — “fire”"
    assert visible(text) == text


def test_lines_stay_where_they_are_meant() -> None:
    assert visible("a\r\nb\x85c\u2028d\te") == "a b c d e"
    assert visible("a\r\nb\x85c\u2028d\te", lines=True) == "a\nb\nc\nd\te"


def test_a_long_text_is_cut_and_its_length_told() -> None:
    assert shown("x" * 300) == "x" * 300
    assert shown("x" * 100_000) == "x" * 300 + "… (100,000 characters)"


@pytest.mark.parametrize("text", ["\x1b[2J\x7f\x9b", "a\u202eb", "\U000e0041", "x\x85\u2028y", "plain", "\ud800"])
def test_json_reads_back_as_it_was(text: str) -> None:
    assert json.loads(json_text({"a": text})) == {"a": text}
    json_text({"a": text}).encode()


@pytest.mark.parametrize("text", ["\x1b[2J\x7f\x9b", "a\u202eb", "\U000e0041", "x\x85\u2028y\r\n"])
def test_toml_reads_back_as_it_was(text: str) -> None:
    written = toml_text({"a": text})
    assert tomllib.loads(written) == {"a": text}
    assert visible(written, lines=True) == written


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("<script>alert(1)</script>", "&lt;script&gt;alert(1)&lt;/script&gt;"),
        ("[a](javascript:x)", r"\[a\](javascript:x)"),
        ("![a](http://x.y/z.png)", r"!\[a\](http\://x.y/z.png)"),
        ("https://x.y and WWW.x.y", r"https\://x.y and WWW\.x.y"),
        ("a | b\n# c", r"a \| b \# c"),
        ("$x_1$ ~~no~~ `rm` \\*", r"\$x\_1\$ \~\~no\~\~ \`rm\` \\\*"),
        ("&lt;img&gt;", "&amp;lt;img&amp;gt;"),
        ("a\u202eb\x1b[1m", r"a\\u202eb\\u001b\[1m"),
    ],
)
def test_markdown_acts_upon_nothing(text: str, told: str) -> None:
    assert plain(text) == told


def test_code_does_not_end_before_its_end() -> None:
    assert code("a`b`\n\u202e") == "a'b' \\u202e"
    assert fenced("a = 1\n```\n<b>") == "a = 1\n'''\n<b>"
