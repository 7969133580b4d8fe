from .benchmark import BenchmarkConfig, SpeedBenchmark
from .quality import compare_quality, evaluate_quality
from .report import write_report
from .results import read_results, update_results


__all__ = [
    "BenchmarkConfig",
    "SpeedBenchmark",
    "compare_quality",
    "evaluate_quality",
    "read_results",
    "update_results",
    "write_report",
]
