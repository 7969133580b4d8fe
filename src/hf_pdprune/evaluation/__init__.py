from .benchmark import SpeedBenchmark
from .benchmark_config import BenchmarkConfig
from .continuation_scorer import ContinuationScorer
from .pair_source import PairSource
from .quality import compare_hand_overs, compare_quality, evaluate_quality, handing_over_all_tokens
from .report import write_report
from .results import read_results, write_results
from .run_comparison import compare_runs


__all__ = [
    "BenchmarkConfig",
    "ContinuationScorer",
    "PairSource",
    "SpeedBenchmark",
    "compare_hand_overs",
    "compare_quality",
    "compare_runs",
    "evaluate_quality",
    "handing_over_all_tokens",
    "read_results",
    "write_report",
    "write_results",
]
