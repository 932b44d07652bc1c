"""Names that are alike are told apart."""

from distill.naming import numbered


def test_the_second_of_a_name_and_those_after_it_are_numbered():
    assert numbered(['a', 'b', 'a', 'a', 'b']) == ('a', 'b', 'a_2', 'a_3', 'b_2')
    assert numbered([]) == ()
