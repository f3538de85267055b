"""Prompt sets as their authors publish them: the real headers, over harmless prompts made up here."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from duo.errors import UserError
from duo.fields import as_table, build
from duo.promptsets import LONGEST, PromptRow, PromptSource, read_pairs, read_prompts

SHARES = "inappropriate_percentage,nudity_percentage,q16_percentage,sd_safety_percentage,prompt_toxicity,lexica_url"
I2P = f"prompt,categories,hard,{SHARES},sd_seed,sd_guidance_scale,sd_image_width,sd_image_height,sd_model"
I2P_COPY = (
    f",prompt,categories,hard,{SHARES},evaluation_seed,evaluation_guidance,"
    "sd_image_width,sd_image_height,sd_model,case_number"
)
MMA = "target_prompt,adv_prompt,sanitized_adv_prompt,success_against_sanitization_defense,clean_prompt"


def i2p(prompt: str, categories: str, nudity: float, seed: int) -> str:
    return f'{prompt},"{categories}",0,50.0,{nudity},10.0,20.0,0.17,https://example.org,{seed},13,512,384,sd-v1-4'


@pytest.fixture
def hub_copy(tmp_path: Path) -> Path:
    """Three rows of I2P as the hub has it; a line end within quotes, spaces at the ends, categories after a space."""
    rows = [
        i2p("a red house ", "violence, sexual", 50.0, 4290749014),
        i2p('"two lines,\nof one ""prompt"""', "hate", 60.0, 1),
        i2p("a tent", "sexual, illegal activity", 100.0, 2),
    ]
    return write(tmp_path, "\n".join([I2P, *rows, ""]))


def write(folder: Path, data: str | bytes, name: str = "one.csv") -> Path:
    path = folder / name
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def rows(path: Path, **fields: Any) -> tuple[PromptRow, ...]:
    return read_prompts(PromptSource(path=str(path), **fields)).rows


def refused(match: str, path: Path, **fields: Any) -> None:
    with pytest.raises(UserError, match=match) as caught:
        rows(path, **fields)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_i2p_of_the_hub_gives_prompts_verbatim_with_their_settings(hub_copy: Path) -> None:
    found = read_prompts(PromptSource(path=str(hub_copy)))
    assert found.rows[0] == PromptRow(
        prompt="a red house ", line=2, seed=4290749014, guidance_scale=13.0, size=(512, 384)
    )
    assert found.rows[1].prompt == 'two lines,\nof one "prompt"' and found.rows[1].line == 4
    assert (found.total, found.empty) == (3, 0)
    assert found.digest == hashlib.sha256(hub_copy.read_bytes()).hexdigest()


def test_the_repositories_copy_of_i2p_has_other_names_and_an_empty_prompt(tmp_path: Path) -> None:
    row = '{},{},"hate",0,50.0,0.0,1.0,2.0,0.1,https://example.org,{},7.5,512,512,sd-v1-4,{}'
    text = "\r\n".join([I2P_COPY, row.format(0, "a boat", 41, 10), row.format(1, "", 42, 11), ""])
    found = read_prompts(PromptSource(path=str(write(tmp_path, text))))
    assert found.rows == (PromptRow(prompt="a boat", line=2, key="10", seed=41, guidance_scale=7.5, size=(512, 512)),)
    assert (found.total, found.empty) == (2, 1)


# What the files of Ring-A-Bell, UnlearnDiffAtk, P4D, MMA-Diffusion and of COCO's captions hold.
@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("prompt,case_number,evaluation_seed\na car,3,41\n", {"key": "3", "seed": 41}),
        (
            "case_number,prompt,evaluation_seed,evaluation_guidance\n0,a car,1415,7.5\n",
            {"key": "0", "seed": 1415, "guidance_scale": 7.5},
        ),
        ("Unnamed: 0,case_number,prompt,evaluation_seed,artist\n0,7,a car,9,x\n", {"key": "7", "seed": 9}),
        (f"{MMA}\na tree,a car,a ball,True,a house\n", {}),
        ("image_id,source,prompt,evaluation_seed\n000000203564,x,a car,5\n", {"key": "000000203564", "seed": 5}),
        ("case_number,source,prompt,evaluation_seed,coco_id\n1,x,a car,5,203564\n", {"key": "203564", "seed": 5}),
        # SPM's are the photographs' sizes, at which nobody draws.
        ("image_id,source,prompt,evaluation_seed,width,height\n4,x,a car,5,640,427\n", {"key": "4", "seed": 5}),
    ],
)
def test_each_set_has_its_own_columns(tmp_path: Path, text: str, wanted: dict[str, Any]) -> None:
    assert rows(write(tmp_path, text)) == (PromptRow(prompt="a car", line=2, **wanted),)


def test_a_column_and_seeds_of_other_names_are_given(tmp_path: Path) -> None:
    path = write(tmp_path, f"{MMA},number\na tree,a car,a ball,True,a house,18446744073709551615\n")
    (row,) = rows(path, column="target_prompt", seed_column="number")
    assert (row.prompt, row.seed) == ("a tree", 2**64 - 1)


def test_lines_without_a_header_keep_quotes_and_commas(tmp_path: Path) -> None:
    text = 'a "red house\nwith, commas"\n\na\u2028separator\n'
    path = write(tmp_path, text)
    found = read_prompts(PromptSource(path=str(path), lines=True))
    assert [(row.line, row.prompt) for row in found.rows] == [
        (1, 'a "red house'),
        (2, 'with, commas"'),
        (4, "a\u2028separator"),
    ]
    assert (found.total, found.empty) == (4, 1)
    refused(r"lines = true", path)  # a CSV reader would make one prompt of two, and a header of that
    assert len(rows(write(tmp_path, text, "one.txt"))) == 3


@pytest.mark.parametrize(
    ("filters", "lines"),
    [
        (["nudity_percentage > 50"], [4, 5]),
        (["nudity_percentage >= 50"], [2, 4, 5]),
        (["nudity_percentage=60"], [4]),
        (["nudity_percentage != 60.0"], [2, 5]),
        (["categories has sexual"], [2, 5]),
        (["categories has illegal activity"], [5]),
        (["categories has illegal"], None),
        (["categories = hate"], [4]),
        (["categories has sexual", "nudity_percentage<60"], [2]),
    ],
)
def test_filters(hub_copy: Path, filters: list[str], lines: list[int] | None) -> None:
    if lines is None:
        refused(r"gives no prompt: none of its 3 rows passes categories has illegal$", hub_copy, filters=tuple(filters))
    else:
        assert [row.line for row in rows(hub_copy, filters=tuple(filters))] == lines
        assert [row.line for row in rows(hub_copy, filters=tuple(filters), limit=1)] == lines[:1]


def test_a_recipe_can_hold_a_source(hub_copy: Path) -> None:
    table = {"path": str(hub_copy), "filters": ["nudity_percentage > 50"], "limit": 1}
    source = build(PromptSource, table, "prompts")
    assert len(read_prompts(source).rows) == 1
    assert build(PromptSource, {k: v for k, v in as_table(source).items() if v is not None}, "prompts") == source
    for wrong, match in (
        ({"limit": 0}, "limit is 0"),
        ({"filters": ["nudity_percentage"]}, "filter 'nudity_percentage' is none"),
        ({"filters": ["nudity_percentage > much"]}, "compares with 'much'"),
        ({"lines": True, "column": "prompt"}, "leave out column"),
        ({"colum": "prompt"}, "did you mean 'column'"),
    ):
        with pytest.raises(UserError, match=match):
            build(PromptSource, table | wrong, "prompts")


def test_wrong_columns_are_told_with_those_found_and_known(tmp_path: Path, hub_copy: Path) -> None:
    path = write(tmp_path, "text,seed\na car,1\n", "other.csv")
    refused(r"no known column of prompts: its columns are 'text', 'seed'; known are prompt, adv_prompt, caption", path)
    refused(r"no column 'txt': its columns are 'text', 'seed'", path, column="txt")
    refused(r"no column 'sede' of seeds", path, column="text", seed_column="sede")
    refused(
        r"filter 'share > 1': .* has no such column; it has 'prompt', 'categories'", hub_copy, filters=("share > 1",)
    )
    refused(r"line 2: categories is 'violence, sexual', .* needs a number", hub_copy, filters=("categories > 1",))
    refused(r"two columns 'prompt'", write(tmp_path, "prompt,prompt\na,b\n"))


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", r"is empty$"),
        (b"\xef\xbb\xbf \r\n", r"is empty$"),
        (b"prompt\n", r"has a header and no rows$"),
        (b"prompt\n\n  \n", r"gives no prompt: all are empty$"),
        ("prompt\nun château\n".encode("latin1"), r"line 2: byte 0xe2 is not UTF-8; .*iconv"),
        ("prompt\na car\n".encode("utf-16"), r"line 1: there is a NUL; .*UTF-16"),
        (b"prompt\na car\na \0 tree\n", r"line 3: there is a NUL"),
        (b"prompt\n" + b"a" * 10**6 + b"\n", r"line 2: "),
        (b"prompt\n" + b"a" * (LONGEST + 1) + b"\n", rf"line 2: the prompt has {LONGEST + 1} characters"),
        (b'prompt\n"a car\na tree\n', r"line 3: unexpected end of data"),
        (b'prompt\n"a car" red\n', r"line 2: "),
        (b"prompt,sd_seed\na car, red,1\n", r"line 2: 3 cells under 2 columns; a prompt with commas"),
        (b"prompt,sd_seed\na car,-1\n", r"line 2: sd_seed is '-1', expected a whole number"),
        (b"prompt,sd_seed\na car,1.5\n", r"sd_seed is '1.5'"),
        (b"prompt,sd_seed\na car,\n", r"sd_seed is ''"),
        (b"prompt,sd_guidance_scale\na car,nan\n", r"sd_guidance_scale is 'nan', expected a number"),
    ],
)
def test_damaged_files_are_told_in_one_line(tmp_path: Path, data: bytes, match: str) -> None:
    refused(match, write(tmp_path, data))


def test_a_million_characters_are_told_whatever_reads_them(tmp_path: Path) -> None:
    refused(r"line 1: the prompt has 1000000 characters", write(tmp_path, "a" * 10**6), lines=True)
    with pytest.raises(UserError, match="is no file"):
        read_prompts(PromptSource(path=str(tmp_path / "none.csv")))


def test_a_mark_of_byte_order_and_windows_line_ends_are_no_part_of_the_text(tmp_path: Path) -> None:
    path = write(tmp_path, b"\xef\xbb\xbfprompt,sd_seed\r\na car,1\r\n")
    assert rows(path) == (PromptRow(prompt="a car", line=2, seed=1),)


def test_pairs_for_a_concept_vector_are_no_adversarial_prompts(tmp_path: Path) -> None:
    trap = write(tmp_path, "sensitive prompt,normal prompt\r\na burning car,a car\r\na burning car,a car\r\n")
    for fields in ({}, {"column": "sensitive prompt"}):
        refused(r"holds pairs for a concept vector .* no adversarial prompts, .*read_pairs", trap, **fields)
    # Doubles weigh in the mean that the vector is.
    assert read_pairs(str(trap)) == (("a burning car", "a car"),) * 2

    two = write(tmp_path, "prompt,case_number,evaluation_seed,prompt1\na car on fire,0,1,a car\n", "two.csv")
    refused(r"holds pairs for a concept vector", two)
    assert read_pairs(str(two)) == (("a car on fire", "a car"),)
    assert rows(two, column="prompt1")[0].prompt == "a car"
    with pytest.raises(UserError, match=r"holds no pairs: its columns are 'prompt'; known are"):
        read_pairs(str(write(tmp_path, "prompt\na car\n", "none.csv")))
    with pytest.raises(UserError, match=r"line 2: a prompt of the pair is empty"):
        read_pairs(str(write(tmp_path, "prompt,prompt1\na car, \n", "half.csv")))


def test_pairs_in_two_files_are_put_together_by_their_cases(tmp_path: Path) -> None:
    parts = "case_number,nudity,people,clothes,location,evaluation_seed\n"
    parts += "0,burning,red car,None,the beach,7\n1,fire,None,None,a meadow,8\n"
    with_it = write(tmp_path, parts, "parts.csv")
    without = write(tmp_path, "case_number,prompt,evaluation_seed\n1,a meadow,8\n0,a red car,7\n", "plain.csv")
    wanted = (("burning red car, the beach", "a red car"), ("fire, a meadow", "a meadow"))
    assert read_pairs(str(with_it), str(without)) == wanted
    refused("pairs for a concept vector", with_it)
    with pytest.raises(UserError, match="give the file of those without it as neutral"):
        read_pairs(str(with_it))
    other = write(tmp_path, "case_number,prompt\n0,a red car\n", "short.csv")
    with pytest.raises(UserError, match=r"short\.csv has no case_number '1', which .*parts\.csv has at line 3"):
        read_pairs(str(with_it), str(other))


@pytest.fixture
def cached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The snapshot of a data set in an offline hub cache, with one CSV."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    folder, commit = tmp_path / "datasets--some--prompts", "0" * 40
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    snapshot = folder / "snapshots" / commit
    snapshot.mkdir(parents=True)
    write(snapshot, "prompt\na car\n", "one.csv")
    write(snapshot, "no prompts", "README.md")
    return snapshot


def test_a_data_set_of_the_hub(cached: Path) -> None:
    for path in ("hub:some/prompts", "hub:some/prompts/one.csv"):
        assert read_prompts(PromptSource(path=path)).rows == (PromptRow(prompt="a car", line=2),)
    write(cached, "prompt\na tree\n", "two.csv")
    for path, match in (
        ("hub:some/prompts", r"holds several files of prompts \(one\.csv, two\.csv\); give hub:some/prompts/FILE"),
        ("hub:some/prompts/no.csv", r"its no\.csv is not in the cache.*hf download some/prompts --repo-type dataset`"),
        ("hub:some/other", r"^'some/other' is neither .* a data set .*HF_HUB_OFFLINE is set"),
        ("hub:some", r"'hub:some' is no place on the hub"),
        ("hub:some/prompts/../x.csv", r"is no place on the hub"),
    ):
        with pytest.raises(UserError, match=match) as caught:
            read_prompts(PromptSource(path=path))
        assert "\n" not in str(caught.value)
    for csv in cached.glob("*.csv"):
        csv.unlink()
    with pytest.raises(UserError, match=r"holds no CSV \(README\.md\); save it as a CSV"):
        read_prompts(PromptSource(path="hub:some/prompts"))
