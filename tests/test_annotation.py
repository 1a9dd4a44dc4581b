"""The annotation language by example and by property."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nnscaler.annotation import Annotation
from nnscaler.errors import UserError
from nnscaler.placement import PARTIAL, REPLICATE, SHARED, Shard


def ways(text, inputs, outputs, devices=2):
    return {way.name: way for way in Annotation.parse(text).bind(inputs, outputs).splits(devices)}


def test_chunk_loss_splits_along_batch_and_sequence():
    found = ways("b l d^, n^ d^, b l -> b l", [(4, 8, 16), (32, 16), (4, 8)], [(4, 8)])
    assert set(found) == {None, "b", "l"}
    assert found["l"].inputs == (Shard(1), SHARED, Shard(1))
    assert found["l"].outputs == (Shard(1),)
    assert found[None].inputs == (REPLICATE,) * 3


def test_a_summed_dimension_gives_partial_results():
    found = ways("m k+, k+ n -> m n", [(4, 8), (8, 6)], [(4, 6)])
    assert found["k"].inputs == (Shard(1), Shard(0))
    assert found["k"].outputs == (PARTIAL,)
    assert found["n"].inputs == (SHARED, Shard(1))


def test_groups_split_along_their_outermost_name():
    found = ways("b (k g^) l^ d^, b k s^ d^ -> b l^ (k g^) d^", [(1, 8, 16, 4), (1, 2, 16, 4)], [(1, 16, 8, 4)])
    assert set(found) == {None, "k"}
    assert found["k"].outputs == (Shard(2),)
    inner = ways("(a b) c -> a b c", [(6, 2)], [(3, 2, 2)])
    assert set(inner) == {None, "c"}  # a does not divide by 2, b is inside
    assert set(ways("(a b) c -> a b c", [(2, 2)], [(1, 2, 2)])) == {None, "b", "c"}  # b is outermost where a is 1


def test_a_star_stands_for_any_number_of_dimensions():
    assert set(ways("* k+, n k+ -> * n", [(2, 4, 8), (6, 8)], [(2, 4, 6)])) == {None, "*0", "*1", "k", "n"}
    assert set(ways("* k+, n k+ -> * n", [(8,), (6, 8)], [(6,)])) == {None, "k", "n"}
    assert set(ways("*^ a -> *^ a", [(4, 2)], [(4, 2)])) == {None, "a"}
    assert set(ways("*^ a -> a", [(2, 6, 4)], [(4,)])) == {None, "a"}
    assert set(ways("n k+, * k+ -> * n", [(6, 8), (2, 4, 8)], [(2, 4, 6)])) == {None, "*0", "*1", "k", "n"}
    between = ways("a * b -> b * a", [(2, 4, 6, 8)], [(8, 4, 6, 2)])
    places = {name: (way.inputs, way.outputs) for name, way in between.items() if name}
    shards = {"a": (0, 3), "*0": (1, 1), "*1": (2, 2), "b": (3, 0)}
    assert places == {name: ((Shard(place),), (Shard(to),)) for name, (place, to) in shards.items()}


def test_whole_tensors_and_scalars():
    found = ways("a b, ? -> a b", [(4, 4), (3,)], [(4, 4)])
    assert found["a"].inputs == (Shard(0), SHARED)
    assert set(ways("a+ -> ()", [(4,)], [()])) == {None, "a"}
    assert set(ways(" -> n^", [], [(4,)])) == {None}
    assert set(ways("a b -> ?", [(4, 4)], [(3,)])) == {None}, "what has no names is not known to be divided"


def test_what_is_said_of_an_argument_that_is_left_out_is_left_out():
    found = ways("* k, * a^, k -> * k", [None, None, (4,)], [(2, 6, 4)])
    assert set(found) == {None, "*0", "*1", "k"}
    assert (found["k"].inputs[2], found["k"].outputs) == (Shard(0), (Shard(2),))
    assert (found["*1"].inputs[2], found["*1"].outputs) == (SHARED, (Shard(1),))


def test_the_outermost_name_takes_all_that_nothing_tells_apart():
    def sizes(text: str, *shapes: tuple[int, ...]) -> dict[str, int]:
        return Annotation.parse(text).bind(shapes[:-1], shapes[-1:]).sizes

    assert sizes("(a b) -> (a b)", (6,), (6,)) == {"a": 6, "b": 1}
    assert sizes("(a b c), a -> (a b c)", (6,), (2,), (6,)) == {"a": 2, "b": 3, "c": 1}
    assert sizes("(a b), b -> (a b)", (6,), (3,), (6,)) == {"a": 2, "b": 3}


def test_only_sizes_that_divide_are_offered():
    assert set(ways("a b -> a b", [(6, 4)], [(6, 4)], devices=4)) == {None, "b"}


def test_a_name_that_only_outputs_have_is_not_split():
    assert set(ways("a -> a n", [(4,)], [(4, 8)])) == {None, "a"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a b", "expected '->' between inputs and outputs at position 3"),
        ("a & b -> a b", "unexpected '&' at position 2"),
        ("a (b c -> a b c", "expected a name or '\\)', found '->' at position 7"),
        ("a ( ) b -> a b", "expected a name inside '\\(' at position 3"),
        ("a, , b -> a", "expected a tensor .* at position 3"),
        ("a -> a -> a", "expected the end, found '->' at position 7"),
        ("a * b * -> a", "a second '\\*' in one tensor at position 6"),
        ("*+ -> ()", "'\\*' cannot be summed at position 0"),
        ("a b -> a", "'b' is missing in an output; mark it 'b\\^'"),
        ("a a -> a", "'a' stands twice in one tensor"),
        ("a -> a a", "'a' stands twice in one tensor"),
        ("a -> a | a", "expected two names or more after '\\|' at position 10"),
        ("a -> a | a c", "'c' stands after '\\|', but in no input"),
        ("a b -> a b | a b", "a and b stand after '\\|', and in one tensor"),
        ("a b^ -> a | a b", "a and b stand after '\\|', and in one tensor"),
        ("a^, b^ -> a b | a b", "a and b stand after '\\|', and in one tensor"),
    ],
)
def test_errors_say_what_and_where(text, message):
    with pytest.raises(UserError, match=message):
        Annotation.parse(text)


@pytest.mark.parametrize(
    ("text", "inputs", "outputs", "message"),
    [
        ("a b -> a b", [(2, 3, 4)], [(2, 3)], "input 0 has 3 dimensions \\[2, 3, 4\\], annotated are 2"),
        ("a b, b -> a b", [(2, 3), (4,)], [(2, 3)], "dimension 0 of input 1 is 4, but 'b' is 3 elsewhere"),
        ("a 4 -> a 4", [(2, 3)], [(2, 3)], "dimension 1 of input 0 is 3, annotated is 4"),
        ("(a b) -> a b", [(7,)], [(2, 3)], "'\\(a b\\)' is|is 7, but"),
        ("a -> a", [(2,), (2,)], [(2,)], "describes 1 inputs and 1 outputs; the operator has 2 and 1"),
        ("a -> a", [(2,)], [(2,), (2,)], "describes 1 inputs and 1 outputs; the operator has 1 and 2"),
        (
            "a 4 (b c) -> a 4 (b c)",
            [(2, 4)],
            [(2, 4, 6)],
            "input 0 has 2 dimensions .*, annotated are 3: 'a 4 \\(b c\\)'",
        ),
        ("b, (a b) -> a b", [(0,), (0,)], [(3, 0)], "dimension 0 of input 1 is 0, but '\\(a b\\)' is 0 elsewhere"),
        ("a b * -> a b *", [(2,)], [(2,)], "input 0 has 1 dimensions \\[2\\], annotated are at least 2"),
    ],
)
def test_shapes_that_do_not_fit_are_named(text, inputs, outputs, message):
    with pytest.raises(UserError, match=message):
        Annotation.parse(text).bind(inputs, outputs)


def test_names_that_are_split_together():
    text = "t d^, t k^, n^ d^ -> t d^ | t n"
    shapes = [(8, 4), (8, 2), (6, 4)]
    found = ways(text, shapes, [(8, 4)], 2)
    assert set(found) == {None, "t", "t n"}
    assert found["t n"].inputs == found["t n"].inputs[:1] * 3 == (Shard(0),) * 3
    assert found["t n"].outputs == (Shard(0),)
    assert found["t n"].names == ["t", "n"]
    assert set(ways(text, shapes, [(8, 4)], 4)) == {None, "t"}, "6 do not divide by 4"
    assert "t n" not in ways(text, [(8, 4), (8, 2), (1, 4)], [(8, 4)], 1), "of one expert there are no parts"
    assert "t n" in ways("t d^, (n^ m^) d^, n^ -> t d^ | t n", [(8, 4), (12, 4), (4,)], [(8, 4)], 2)
    inside = ways("t d^, (m^ n^) d^, n^ -> t d^ | t n", [(8, 4), (12, 4), (4,)], [(8, 4)], 2)
    assert set(inside) == {None, "t"}, "where one lies within another it is not cut"
    others = ways("t^ d^, n^ d^ -> t d^, n | t n", [(8, 4), (6, 4)], [(8, 4), (6,)], 2)
    assert others["t n"].outputs == (Shard(0), Shard(0))
    assert "t n" not in ways("t^ d^, n^ d^ -> t d^, d^ | t n", [(8, 4), (6, 4)], [(8, 4), (4,)], 2), "a term of a sum"


@given(st.text(alphabet="ab(),->^+*?| 1", max_size=24))
def test_any_text_parses_or_is_refused_in_one_line(text):
    with contextlib.suppress(UserError):
        assert Annotation.parse(text).text == text


NAMES = st.lists(st.sampled_from("abcdef"), unique=True, min_size=1, max_size=4)


@given(
    names=NAMES,
    sizes=st.lists(st.integers(1, 12), min_size=6, max_size=6),
    devices=st.integers(2, 4),
    order=st.randoms(),
)
def test_permutations_split_along_every_dimension_that_divides(names, sizes, devices, order):
    size = dict(zip("abcdef", sizes))
    target = list(names)
    order.shuffle(target)
    found = ways(
        f"{' '.join(names)} -> {' '.join(target)}",
        [tuple(size[n] for n in names)], [tuple(size[n] for n in target)], devices,
    )  # fmt: skip
    assert set(found) == {None} | {name for name in names if size[name] % devices == 0 and size[name] > 1}
    for name, way in found.items():
        if name is not None:
            assert way.inputs == (Shard(names.index(name)),)
            assert way.outputs == (Shard(target.index(name)),)
