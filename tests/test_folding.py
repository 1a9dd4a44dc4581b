"""Texts that count up become loops, and nothing else does."""

from nnscaler.folding import folded


def test_layers_one_after_the_other():
    texts = ["l_0 = f(e)", *(f"# m.{i}\n  l_{i} = f(l_{i - 1}, c_7)" for i in range(1, 32)), "return l_31"]
    assert list(folded(texts)) == [
        "l_0 = f(e)", "for i in 1..31:\n    # m.{i}\n      l_{i} = f(l_{i-1}, c_7)", "return l_31"
    ]  # fmt: skip


def test_layers_of_two_kinds_that_take_turns():
    texts = [f"l_{i} = {'fg'[i % 2]}(l_{i - 1})" for i in range(1, 9)]
    assert list(folded(texts)) == ["for i in 0..3:\n    l_{2i+1} = g(l_{2i})\n    l_{2i+2} = f(l_{2i+1})"]


def test_what_does_not_count_up_evenly_stays():
    for texts in (["a", "a", "a", "a"], ["a 1", "a 2", "b 3"], ["a 1", "a 2", "a 4", "a 8"], ["a 1", "b 2"], []):
        assert list(folded(texts)) == texts
