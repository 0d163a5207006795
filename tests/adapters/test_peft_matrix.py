"""PEFT's own tests, run for each of our methods: `python -m tests.adapters.peft_matrix` prints the table."""

import pytest

from tests.adapters.peft_matrix import Unreachable, run, table
from tests.adapters.peft_rows import OURS, THEIRS


# Tests that compare a message with PEFT's wording, where ours says more. They have to raise ValueError all the same.
OTHER_WORDS = {"test_merge_layers_nan"}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    try:
        return run(tmp_path_factory.mktemp("peft"))
    except Unreachable as error:
        pytest.skip(f"the package index gives no source distribution of PEFT: {error}")


def outcomes(results, variant, outcome):
    return [result for result in results if (result["variant"], result["outcome"]) == (variant, outcome)]


@pytest.mark.slow
@pytest.mark.parametrize("variant", [*OURS, *THEIRS])
def test_peft_finds_nothing_wrong(results, variant):
    failed = [
        f"{result['test']}[{result['id']}]: {result['message']}"
        for result in outcomes(results, variant, "failed")
        if not (result["test"] in OTHER_WORDS and result["message"].startswith("Regex pattern did not match"))
    ]
    assert not failed, "\n".join([table(results), *failed])


@pytest.mark.slow
@pytest.mark.parametrize("variant", OURS)
def test_no_fewer_of_its_tests_ran_than_for_miss(results, variant):
    """Otherwise nothing could have gone wrong."""

    def ran(name):
        return {result["test"] for outcome in ("passed", "failed") for result in outcomes(results, name, outcome)}

    # Tests of a whole configuration class run for one of its variants.
    of_a_class = {result["test"] for result in results if result["id"].endswith("Config")}
    assert ran("MiSS") - ran(variant) <= of_a_class
    of_a_class &= ran("MiSS")
    assert len(outcomes(results, variant, "passed")) >= len(outcomes(results, "MiSS", "passed")) - 2 * len(of_a_class)
