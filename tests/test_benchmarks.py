"""What the benchmarks compute beside the clock."""

import pytest

from benchmarks.inference import agreement, common_start, summary


def test_common_start_leaves_each_prompt_a_token() -> None:
    assert common_start([[1, 2, 3, 4], [1, 2, 5]]) == 2
    assert common_start([[1, 2, 3], [1, 2, 3]]) == 2
    assert common_start([[1, 2], [3, 4]]) == 0


def test_agreement_compares_with_gold_and_reference() -> None:
    found = [[0.9, 0.1], [0.4, 0.6], [0.2, 0.8], [0.7, 0.3]]
    reference = [[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.7, 0.3]]
    said = agreement(found, reference, gold=[0, 1, 0, 1])
    assert said == "accuracy 0.500, same letter as fp32 0.750, probabilities 0.050 apart"


def test_ratios_are_of_medians() -> None:
    def runs(*speeds: float) -> list[dict[str, float]]:
        return [{"rows_s": speed, "rss_mb": 100 * speed} for speed in speeds]

    figures = summary({"ours": runs(30, 10, 90), "llama_cpp": runs(9, 10, 11), "hf": runs(20, 1, 15)}, "_2")
    assert figures == {
        "ours_rows_s_2": 30,
        "llama_cpp_rows_s_2": 10,
        "hf_rows_s_2": 15,
        "ratio_llama_cpp_2": 3,
        "ratio_hf_2": pytest.approx(2),
        "ours_rss_mb_2": 3000,
        "llama_cpp_rss_mb_2": 1000,
        "hf_rss_mb_2": 1500,
    }
