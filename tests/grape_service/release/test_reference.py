"""Names and references, hostile ones above all."""

from __future__ import annotations

import pytest

from grape_service.errors import UserError
from grape_service.release.reference import check_name, check_tag, check_version, parse_reference, version_name


@pytest.mark.parametrize(
    ("text", "path", "name", "version_or_tag"),
    [
        ("s3://t/datasets/math-sft@v0003", "s3://t/datasets", "math-sft", "v0003"),
        ("s3://t/math-sft", "s3://t", "math-sft", "latest"),
        ("/data/sets/a@best-1.0", "/data/sets", "a", "best-1.0"),
        ("/home/me@work/sets/a", "/home/me@work/sets", "a", "latest"),
        ("/data/a@v12345", "/data", "a", "v12345"),
    ],
)
def test_references(text: str, path: str, name: str, version_or_tag: str) -> None:
    reference = parse_reference(text)
    assert (reference.path, reference.name, reference.version_or_tag) == (path, name, version_or_tag)
    assert str(parse_reference(str(reference))) == str(reference)


HOSTILE = [
    "../x",
    "..",
    ".",
    "",
    "/etc",
    "a/b",
    "a b",
    "A",
    "-a",
    "a" * 64,
    "а",
    "math‐sft",
    "math\u200bsft",
    "a\n",
    "a\0",
    "%2e",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_are_refused_with_one_sentence(name: str) -> None:
    with pytest.raises(UserError, match="is not a dataset name: use a-z") as refused:
        check_name(name)
    assert str(refused.value).isascii()
    assert "\n" not in str(refused.value)
    if "/" not in name:
        with pytest.raises(UserError):
            parse_reference(f"s3://bucket/{name}@v0001")


@pytest.mark.parametrize("tag", [*HOSTILE, "v0001", "v1", "v00000000000000000001", "l\u0430test", "@"])
def test_hostile_tags_are_refused(tag: str) -> None:
    with pytest.raises(UserError, match=r"is not a tag|reads like a version") as refused:
        check_tag(tag)
    assert len(str(refused.value)) < 220


@pytest.mark.parametrize("version", ["v1", "v0000", "v00001", "0001", "v0001/..", "v\u0660\u0660\u0661\u0661", "x", ""])
def test_hostile_versions_are_refused(version: str) -> None:
    with pytest.raises(UserError, match="is not a version"):
        check_version(version)


@pytest.mark.parametrize("text", ["s3://b/x/", "s3://b/x@latest/", " s3://b/x"])
def test_a_slash_behind_it_says_nothing(text: str) -> None:
    assert str(parse_reference(text)) == "s3://b/x@latest"


@pytest.mark.parametrize("text", ["", "s3://", "s3://bucket", "s3://bucket/a@", "gs://bucket/a", "s3://../a/b@@v0001"])
def test_broken_references_are_refused(text: str) -> None:
    with pytest.raises(UserError):
        parse_reference(text)


def test_numbers_grow_beyond_four_digits() -> None:
    assert [version_name(n) for n in (1, 9999, 10_000)] == ["v0001", "v9999", "v10000"]
    assert check_version("v10000") == "v10000"
