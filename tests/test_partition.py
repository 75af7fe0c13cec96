"""Groups that overlap belong together, and the order is that of the names."""

from hypothesis import given
from hypothesis import strategies as st

from onnx_fliqs.partition import united


def test_without_groups_everybody_is_alone() -> None:
    assert united("abc", []) == (("a",), ("b",), ("c",))
    assert united([], []) == ()


def test_overlapping_groups_are_one_part() -> None:
    assert united("abcdef", ["eb", "df", "be", "fa"]) == (("a", "d", "f"), ("b", "e"), ("c",))


@given(
    groups=st.lists(st.lists(st.sampled_from("abcdefgh"), min_size=1), max_size=5),
)
def test_the_parts_split_no_group_and_are_no_larger_than_needed(
    groups: list[list[str]],
) -> None:
    parts = united("abcdefgh", groups)
    assert sorted("".join(map("".join, parts))) == list("abcdefgh")
    assert [part[0] for part in parts] == sorted(part[0] for part in parts)
    for group in groups:
        assert sum(bool(set(group) & set(part)) for part in parts) == 1
    for part in parts:
        assert list(part) == sorted(part)
        # From any member, groups lead to all others.
        reached = {part[0]}
        for _ in groups:
            reached |= {n for group in groups if reached & set(group) for n in group}
        assert reached == set(part)
